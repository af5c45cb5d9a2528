"""ShortGPT (Men et al. 2024, arXiv 2403.03853): layers that turn their input least go."""

from __future__ import annotations

from megatron_idea.prune.plan import Units
from megatron_idea.prune.strategy import (
    COSINE,
    Activation,
    Measure,
    Scheduled,
    Stats,
    block_influence,
)


class ShortGpt(Scheduled):
    """A layer's importance is its block influence, 1 - mean cosine of its input and output."""

    measures: tuple[Measure | Activation, ...] = (COSINE,)

    def importance(self, stats: Stats) -> Units:
        """Return it, a moving average over steps."""
        return {"num_layers": block_influence(stats)}
