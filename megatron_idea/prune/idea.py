"""IDEA Prune (arXiv 2503.05920): gradient x weight sensitivity, mean over rows, max over matrices.

The paper prunes FFN neurons and names sensitivity, a moving average, "mean-max" and a cubic
schedule. Where it leaves a choice the default is our reading and the alternative a switch in
``PruneConfig``; KV groups, channels and layers are scored in the same way. See docs/method.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_idea.config import AxisGoal, PruneConfig
from megatron_idea.prune.strategy import Weighted


class IdeaPrune(Weighted):
    """S_i = max over a unit's matrices of mean_j EMA |w_ij g_ij|; the schedule says how many go.

    A first-order score says little of a whole layer: of the lowest ones the loss itself decides.
    """

    def __init__(self, config: PruneConfig, goals: Mapping[str, AxisGoal]) -> None:
        super().__init__(config, goals, config.element)
        self.layer_candidates = config.layer_candidates
