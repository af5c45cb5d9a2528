"""PCA of the residual stream: rotate it into its principal directions, then cut the weakest.

What of SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024) a stock Llama can hold: one orthogonal
basis for the whole model, folded into its weights. See docs/method.md.
"""

from __future__ import annotations

import torch

from megatron_idea.prune.plan import Units
from megatron_idea.prune.strategy import Scheduled, Stats


class PcaStem(Scheduled):
    """Channels go by their number: ``mend`` turns the stream so that they lie by falling energy.

    It turns once, so everything goes at once.
    """

    mend = "rotate"

    def importance(self, stats: Stats) -> Units:
        """Rank a channel below those with lower numbers; nothing is measured before they turn."""
        channels = len(stats.alive["hidden_size"])
        return {"hidden_size": -torch.arange(channels, dtype=torch.float32)}
