"""LLM-Pruner (Ma et al. 2023, arXiv 2305.11627): a sum over all matrices that a unit couples.

``prune.element`` chooses the paper's form: ``abs`` the first order of each weight, sum |w g|;
``fisher`` its mixed form, sum |w g - w^2 v / 2|; ``signed`` the vector form, |sum w g| of each
matrix, then their sum.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_idea.config import AxisGoal, PruneConfig
from megatron_idea.prune.plan import Units
from megatron_idea.prune.strategy import Measure, Scheduled, Stats


class LlmPruner(Scheduled):
    """A unit's importance is that of all its weights, summed up."""

    def __init__(self, config: PruneConfig, goals: Mapping[str, AxisGoal]) -> None:
        super().__init__(config, goals)
        self.measures = (Measure(config.element, "sum"),)

    def importance(self, stats: Stats) -> Units:
        """Add up a unit's matrices; signed sums take their absolute value here."""
        (sums,) = stats.sums.values()
        return {axis: sums[axis].abs().sum(dim=-2) for axis in self.axes}
