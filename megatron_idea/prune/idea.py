"""IDEA Prune (arXiv 2503.05920): gradient x weight sensitivity, mean over rows, max over matrices.

The paper names sensitivity, a moving average, "mean-max" and a cubic schedule. Where it leaves a
choice the default is our reading and the alternative a switch in ``PruneConfig``; docs/method.md
lists them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_idea.config import PruneConfig
from megatron_idea.prune.plan import Units
from megatron_idea.prune.strategy import (
    Counts,
    Goal,
    Measure,
    Stats,
    reduce_matrices,
    reduction,
    scheduled_counts,
    scheduled_removal_is_due,
)


class IdeaPrune:
    """S_i = max over {gate, up, down} of mean_j EMA |w_ij g_ij|; the schedule says how many go."""

    def __init__(self, config: PruneConfig, goals: Mapping[str, Goal]) -> None:
        self.axes: tuple[str, ...] = tuple(goals)
        self.measures: tuple[Measure, ...] = (Measure(config.element, reduction(config)),)
        self._config = config
        self._goals = goals

    def is_due(self, alive: Units, removed: float) -> bool:
        """Follow the schedule."""
        return scheduled_removal_is_due(alive, self._goals, removed)

    def importance(self, stats: Stats) -> Units:
        """Reduce the moving averages; the maximum comes after averaging, which is linear."""
        sums = stats.sums[self.measures[0]]
        return {a: reduce_matrices(sums[a], stats.sizes[a], self._config) for a in self.axes}

    def budget(
        self, importance: Units, alive: Units, removed: float, memory: Tensor
    ) -> tuple[Counts, Tensor]:
        """Follow the schedule; equal counts in all layers, or one ranking over them."""
        scope = self._config.scope
        return scheduled_counts(importance, alive, self._goals, removed, scope), memory
