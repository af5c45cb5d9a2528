"""Wanda (Sun et al. 2023, arXiv 2306.11695) for whole units, which FLAP's authors call Wanda-sp.

    S_c = mean over rows r of |W_rc| * ||X_c||_2

of column c of the matrix that reads the activations X: down for a neuron, the projection for a KV
group, whose columns add up. The norm is over tokens, here of their mean, a common factor.
"""

from __future__ import annotations

from megatron_idea.prune.plan import Units
from megatron_idea.prune.strategy import Activation, Measure, Scheduled, Stats


class Wanda(Scheduled):
    """A unit's importance is the size of what it adds to the residual stream, weight by weight."""

    measures: tuple[Measure | Activation, ...] = (
        Measure("weight", "sum", per="line"),
        Activation("mean_square"),
    )

    def importance(self, stats: Stats) -> Units:
        """Join weights as they are now and activations as steps have shown them."""
        weights, squares = (stats.sums[m] for m in self.measures)
        found = {}
        for axis in self.axes:
            columns = squares[axis].shape[1]
            rows = stats.sizes[axis][-1] / columns
            means = weights[axis][:, -columns:] / rows
            found[axis] = (means * squares[axis].sqrt()).sum(dim=1)
        return found
