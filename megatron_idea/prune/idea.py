"""IDEA Prune (arXiv 2503.05920): gradient x weight sensitivity, mean over rows, max over matrices.

The paper names sensitivity, a moving average, "mean-max" and a cubic schedule. Where it leaves a
choice the default is our reading and the alternative a switch in ``PruneConfig``; docs/method.md
lists them.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from megatron_idea.config import PruneConfig
from megatron_idea.prune.strategy import Stats, live_counts, ranked


class IdeaPrune:
    """S_i = max over {gate, up, down} of mean_j EMA |w_ij g_ij|, the same budget in every layer."""

    def __init__(self, config: PruneConfig, unit: int) -> None:
        """``unit``: with one ranking over all layers neurons go in blocks of this many."""
        self.element = config.element
        self.reduction = {"l2": "sum_of_squares", "max": "max"}.get(config.row_reduce, "sum")
        self._row_reduce = config.row_reduce
        self._matrix_reduce = config.matrix_reduce
        self._scope = config.scope
        self._unit = unit

    def importance(self, stats: Stats) -> Tensor:
        """[L, F] from [L, 3, F]; the maximum comes after the moving average, which is linear.

        ``l2`` is the root of the averaged sum of squares. ``signed`` sums take their absolute value
        here, after averaging.
        """
        rows = stats.sums.abs()
        if self._row_reduce == "mean":
            rows = rows / stats.row_length
        elif self._row_reduce == "l2":
            rows = rows.sqrt()
        if self._matrix_reduce == "max":
            return rows.amax(dim=1)
        return rows.mean(dim=1) if self._matrix_reduce == "mean" else rows.sum(dim=1)

    def allocate(self, importance: Tensor, alive: Tensor, keep_count: int) -> list[int]:
        """Layer scope: the same count everywhere. Global: drop the least important blocks first."""
        if self._scope == "layer":
            return [min(keep_count, live) for live in live_counts(alive)]
        return self._drop_blocks(importance, alive, keep_count * alive.shape[0])

    def _drop_blocks(self, importance: Tensor, alive: Tensor, total: int) -> list[int]:
        """Rank every layer's tail blocks of ``unit`` neurons against each other by their mean.

        Widths stay multiples of the unit at every moment and no layer falls below one unit, so
        the last plan lands on legal widths whose mean is the target. What a layer has beyond a
        multiple of the unit goes first: after a resume with a larger one, and at the full width.
        """
        unit = self._unit
        order = ranked(importance, alive)
        budget = live_counts(alive)
        best_first = pad(importance.gather(1, order), (0, -order.shape[1] % unit))
        tails = best_first.unfold(1, unit, unit).mean(dim=2).tolist()

        def rank(layer: int) -> tuple[bool, float, int]:
            live = budget[layer]
            return live % unit == 0, tails[layer][(live - 1) // unit], layer

        while True:
            cuts = [n % unit or unit for n in budget]
            spare = sum(budget) - total
            layers = [i for i, n in enumerate(budget) if cuts[i] <= min(spare, n - unit)]
            if not layers:
                return budget
            layer = min(layers, key=rank)
            budget[layer] -= cuts[layer]
