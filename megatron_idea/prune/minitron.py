"""Minitron (Muralidharan et al. 2024, arXiv 2407.14679, 2408.11796): the size of activations.

Forward passes alone are looked at. ``prune.aggregation``: over a sample's tokens the mean of |a|,
then L2 over samples, as NVIDIA publishes it; or L2 over tokens, then the mean over samples. Of a
KV group L2 over the channels of its heads; of a channel the sum over what comes out of all norms
of the residual stream. Layers go by block influence.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_idea.config import AxisGoal, PruneConfig
from megatron_idea.prune.plan import Units
from megatron_idea.prune.strategy import COSINE, Activation, Scheduled, Stats, block_influence


class Minitron(Scheduled):
    """A unit's importance is the size of its activations, a layer's its block influence."""

    def __init__(self, config: PruneConfig, goals: Mapping[str, AxisGoal]) -> None:
        super().__init__(config, goals)
        self._sizes = Activation(config.aggregation)
        wanted = {COSINE if axis == "num_layers" else self._sizes: None for axis in goals}
        self.measures = tuple(wanted)

    def importance(self, stats: Stats) -> Units:
        """Aggregate what passes have shown, a moving average over steps."""
        found = {}
        for axis in self.axes:
            if axis == "num_layers":
                found[axis] = block_influence(stats)
                continue
            sizes = stats.sums[self._sizes][axis]
            if self._sizes.statistic == "sequence_mean":
                sizes = sizes.sqrt()
            found[axis] = sizes.sum(dim=-2)
        return found
