"""Sums over the weights of units, from what this rank's optimizer holds of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.config import ModelConfig
from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.engine.shards import slot
from megatron_idea.engine.trainable import Trainable
from megatron_idea.kernels import MatrixShard, matrix_scores
from megatron_idea.prune.axis import AXES, LAYER_TENSORS, Share, fold, shares_of
from megatron_idea.prune.strategy import Measure
from megatron_idea.prune.units import named_shares
from megatron_idea.shape import Shape

Sums = dict[tuple[str, int], Tensor]
"""By axis and layer, for the layers of this rank: fp32 [matrices, units on this rank]."""


@torch.no_grad()
def unit_sums(trainable: Trainable, axes: Sequence[str], measure: Measure) -> Sums:
    """Reduce a measure over every matrix of every unit, on this rank's optimizer shards.

    Measures of gradients: call between the reduction of gradients and the optimizer's step, weights
    before their update, gradients before clipping. Results of data-parallel ranks add up.
    """
    owned = [
        (parameter, share)
        for _, parameter, shares in named_shares(trainable)
        for share in shares
        if share.axis in axes
    ]
    totals = matrix_scores(
        [_shard(parameter, share, measure, trainable) for parameter, share in owned],
        measure.element,
        measure.reduction,
        device=trainable.groups.device,
        implementation=trainable.training.kernel_implementation,
    )
    rows: dict[tuple[str, int], dict[str, Tensor]] = {}
    for total, (_, share) in zip(totals, owned, strict=True):
        assert share.layer is not None, "only axes of the layers are measured"
        parts = fold(total, share, measure.reduction)
        names = (name for name, _ in share.matrices)
        rows.setdefault((share.axis, share.layer), {}).update(zip(names, parts, strict=True))
    sums = {key: torch.stack([of[m] for m in AXES[key[0]].matrices]) for key, of in rows.items()}
    if measure.reduction == "max":  # not linear: the shards of a row must meet at once
        all_reduce(list(sums.values()), dist.ReduceOp.MAX, trainable.groups)
        if trainable.groups.shards.rank() > 0:
            sums = {key: torch.zeros_like(value) for key, value in sums.items()}
    return sums


def _shard(
    parameter: torch.nn.Parameter, share: Share, measure: Measure, trainable: Trainable
) -> MatrixShard:
    """Describe what this rank's optimizer holds of a matrix, per row or column as its units lie."""
    rows, columns = parameter.shape
    whole = MatrixShard((rows, columns), "row" if share.dim == 0 else "column")
    # Without shards every rank holds the whole: one of them counts.
    is_sharded = trainable.parallel.use_distributed_optimizer
    if not is_sharded and trainable.groups.shards.rank() > 0:
        return whole
    held = slot(trainable.optimizer, parameter)
    if held is None:
        return whole
    grad = held.grad if measure.needs_gradients else None
    return replace(whole, w=held.main.detach().view(-1), g=grad, lo=held.start)


def unit_sizes(model: ModelConfig, shape: Shape, axes: Sequence[str]) -> dict[str, Tensor]:
    """Count the weights that one unit has in each matrix: axis -> fp32 [matrices, 1]."""
    sizes = {}
    for axis in axes:
        found: dict[str, int] = {}
        for tensor in LAYER_TENSORS:
            for share in shares_of(f"decoder.layers.0.{tensor}", model, shape, tp=1):
                found |= dict(share.matrices) if share.axis == axis else {}
        sizes[axis] = torch.tensor([[float(found[name])] for name in AXES[axis].matrices])
    return sizes


def all_reduce(
    values: Sequence[Tensor], op: dist.ReduceOp.RedOpType, groups: ProcessGroups
) -> None:
    """Reduce small tensors over data-parallel ranks in place, in one message."""
    if groups.shards.size() == 1 or not values:
        return
    flat = torch.cat([v.flatten() for v in values])
    dist.all_reduce(flat, op=op, group=groups.shards)
    for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
        value.copy_(part.view_as(value))
