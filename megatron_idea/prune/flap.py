"""FLAP's fluctuation score (An et al. 2023, arXiv 2312.11983), without its compensation.

    S_c = Var(X_c) * ||W_:c||_2^2

of column c of down (neurons) or of the projection (KV groups), and its z-score over the columns of
a layer, so that layers and kinds compare. What FLAP makes up for a removed column with, a bias
W_:c E[X_c], has no place in a model without biases; in a run that goes on, training does.
"""

from __future__ import annotations

from torch import Tensor

from megatron_idea.prune.plan import Units
from megatron_idea.prune.strategy import Activation, Measure, Scheduled, Stats


class FlapScore(Scheduled):
    """A unit's importance is the mean z-score of its columns."""

    measures: tuple[Measure | Activation, ...] = (
        Measure("weight", "sum_of_squares", per="line"),
        Activation("mean"),
        Activation("mean_square"),
    )

    def importance(self, stats: Stats) -> Units:
        """Score in fp64: a variance is the small difference of two means."""
        weights, means, squares = (stats.sums[m] for m in self.measures)
        found = {}
        for axis in self.axes:
            variance = squares[axis].double() - means[axis].double().square()
            columns = variance.shape[1]
            score = variance.clamp(min=0) * weights[axis][:, -columns:]
            alive = stats.alive[axis].to(score.device)[:, None].expand_as(score)
            found[axis] = _standard(score, alive).mean(dim=1).float()
        return found


def _standard(score: Tensor, alive: Tensor) -> Tensor:
    """Return z-scores [layers, lines, units] over what is alive in a layer; 0 for all else."""
    number = alive.sum(dim=(1, 2), keepdim=True)
    mean = (score * alive).sum(dim=(1, 2), keepdim=True) / number.clamp(min=1)
    from_mean = (score - mean) * alive
    squares = from_mean.square().sum(dim=(1, 2), keepdim=True)
    deviation = (squares / (number - 1).clamp(min=1)).sqrt()
    return from_mean / deviation.where(deviation > 0, 1.0)
