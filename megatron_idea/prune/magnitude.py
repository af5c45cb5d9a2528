"""Magnitude pruning: the units with the smallest weights go (Han et al. 2015, arXiv 1506.02626).

A baseline: nothing is learnt from gradients. ``prune.row_reduce`` chooses the norm of a unit's
weights in a matrix: ``mean`` or ``sum`` L1, ``l2`` L2, ``max`` the largest.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_idea.config import AxisGoal, PruneConfig
from megatron_idea.prune.strategy import Weighted


class Magnitude(Weighted):
    """A unit's importance is the norm of its weights as they are now."""

    def __init__(self, config: PruneConfig, goals: Mapping[str, AxisGoal]) -> None:
        super().__init__(config, goals, "weight")
