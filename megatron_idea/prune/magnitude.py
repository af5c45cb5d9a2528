"""Magnitude pruning: the units with the smallest weights go (Han et al. 2015, arXiv 1506.02626).

A baseline: nothing is learnt from gradients. ``prune.row_reduce`` chooses the norm of a unit's
weights in a matrix: ``mean`` or ``sum`` L1, ``l2`` L2, ``max`` the largest.
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


class Magnitude:
    """A unit's importance is the norm of its weights as they are now."""

    def __init__(self, config: PruneConfig, goals: Mapping[str, Goal]) -> None:
        self.axes: tuple[str, ...] = tuple(goals)
        self.measures: tuple[Measure, ...] = (Measure("weight", reduction(config)),)
        self._config = config
        self._goals = goals

    def is_due(self, alive: Units, removed: float) -> bool:
        """Follow the schedule."""
        return scheduled_removal_is_due(alive, self._goals, removed)

    def importance(self, stats: Stats) -> Units:
        """Reduce the norms over a unit's matrices."""
        sums = stats.sums[self.measures[0]]
        return {a: reduce_matrices(sums[a], stats.sizes[a], self._config) for a in self.axes}

    def budget(
        self, importance: Units, alive: Units, removed: float, memory: Tensor
    ) -> tuple[Counts, Tensor]:
        """Follow the schedule."""
        scope = self._config.scope
        return scheduled_counts(importance, alive, self._goals, removed, scope), memory
