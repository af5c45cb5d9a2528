"""Sums over the weights of units, from what this rank's optimizer holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.config import ModelConfig
from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.engine.shards import shard_of
from megatron_idea.engine.trainable import Trainable
from megatron_idea.kernels import MatrixShard, matrix_scores
from megatron_idea.prune.axis import AXES, EMBEDDING, Share, fold, lines
from megatron_idea.prune.plan import Units, live_counts
from megatron_idea.prune.strategy import Activation, Measure
from megatron_idea.prune.units import named_shares
from megatron_idea.shape import LAYER_AXES

Sums = dict[tuple[str, int | None], Tensor]
"""By axis and position of a layer on this rank, None for channels: fp32 [lines, units on this
rank]. What ranks have of the same units adds up."""


def num_lines(measure: Measure | Activation, axis: str, model: ModelConfig) -> int:
    """Count the numbers that a measurement has of one unit."""
    heads = model.num_attention_heads // model.num_query_groups
    if isinstance(measure, Activation):
        if axis == "hidden_size":
            return 2 * model.num_layers + 1
        has_lines = axis == "num_query_groups" and measure.statistic in ("mean", "mean_square")
        return heads * model.kv_channels if has_lines else 1
    if measure.per == "line" and axis == "num_query_groups":
        return (2 * heads + 2) * model.kv_channels
    return len(AXES[axis].matrices)


@torch.no_grad()
def unit_sums(trainable: Trainable, axes: Sequence[str], measure: Measure) -> Sums:
    """Reduce a measure over every matrix of every unit, on this rank's optimizer shards.

    Measures of gradients: call between the reduction of gradients and the optimizer's step, weights
    before their update, gradients before clipping. Results of data-parallel ranks add up, and for
    channels and layers, of which each tensor-parallel rank has a part, of those, too.
    """
    owned = [
        (parameter, share)
        for name, parameter, shares in named_shares(trainable)
        for share in shares
        if _is_measured(share, axes) and not _is_copy(name, trainable)
    ]
    # A matrix is read once by rows and once by columns, whatever axes come of it.
    wanted = {(id(parameter), _per(share)): parameter for parameter, share in owned}
    totals = matrix_scores(
        [_shard(parameter, per, measure, trainable) for (_, per), parameter in wanted.items()],
        measure.element,
        measure.reduction,
        device=trainable.groups.device,
        implementation=trainable.training.kernel_implementation,
    )
    by_matrix = dict(zip(wanted, totals, strict=True))
    merge = torch.maximum if measure.reduction == "max" else torch.add
    rows: dict[tuple[str, int | None], dict[str, Tensor]] = {}
    for parameter, share in owned:
        place = None if share.axis == "hidden_size" else share.layer
        found = rows.setdefault((share.axis, place), {})
        of_lines = by_matrix[id(parameter), _per(share)]
        if measure.per == "line" and share.axis in LAYER_AXES:
            found[share.matrices[0][0]] = lines(of_lines, share)
            continue
        parts = fold(of_lines, share, measure.reduction)
        for (name, _), part in zip(share.matrices, parts, strict=True):
            found[name] = merge(found[name], part) if name in found else part
    sums = {key: _stacked(found, key[0], measure.per) for key, found in rows.items()}
    return _largest(sums, trainable.groups) if measure.reduction == "max" else sums


def _stacked(found: Mapping[str, Tensor], axis: str, per: str) -> Tensor:
    """Bring vectors into the order of a table, zeros where this rank has no such matrix."""
    names = AXES[axis].matrices
    if per == "line" and axis in LAYER_AXES:
        return torch.cat([found[name] for name in names if name in found])
    nothing = torch.zeros_like(next(iter(found.values())))
    return torch.stack([found.get(name, nothing) for name in names])


def _is_measured(share: Share, axes: Sequence[str]) -> bool:
    return share.axis in axes and share.matrices[0][0] in AXES[share.axis].matrices


def _is_copy(name: str, trainable: Trainable) -> bool:
    """Say whether it is the last pipeline stage's copy of a tied embedding, which counts once."""
    return name == EMBEDDING and trainable.groups.pp.rank() > 0


def _per(share: Share) -> str:
    return "row" if share.dim == 0 else "column"


def _largest(sums: Sums, groups: ProcessGroups) -> Sums:
    """Take maxima over the ranks that have parts of a unit at once: they do not add up later."""
    all_reduce(list(sums.values()), dist.ReduceOp.MAX, groups.shards)
    split = [value for (axis, _), value in sums.items() if not AXES[axis].is_split]
    all_reduce(split, dist.ReduceOp.MAX, groups.tp)
    channels = [value for (axis, _), value in sums.items() if axis == "hidden_size"]
    all_reduce(channels, dist.ReduceOp.MAX, groups.pp)
    for (axis, _), value in sums.items():
        if not carries(axis, groups):
            value.zero_()
    return sums


def carries(axis: str, groups: ProcessGroups) -> bool:
    """Say whether this rank, of all that have parts of the same units, stands for the others."""
    first = groups.shards.rank() == 0
    if not AXES[axis].is_split:
        first &= groups.tp.rank() == 0
    return first and (axis != "hidden_size" or groups.pp.rank() == 0)


def _shard(
    parameter: torch.nn.Parameter, per: str, measure: Measure, trainable: Trainable
) -> MatrixShard:
    """Describe what this rank's optimizer holds of a matrix."""
    rows, columns = parameter.shape
    whole = MatrixShard((rows, columns), per)
    # Without shards every rank holds the whole: one of them counts.
    is_sharded = trainable.parallel.use_distributed_optimizer
    if not is_sharded and trainable.groups.shards.rank() > 0:
        return whole
    held = shard_of(trainable.optimizer, parameter)
    if held is None:
        return whole
    grad = held.grad if measure.needs_gradients else None
    moment = held.state.get("exp_avg_sq") if measure.needs_second_moment else None
    fisher = None if moment is None else moment.view(-1)
    return replace(whole, w=held.main.detach().view(-1), g=grad, v=fisher, lo=held.start)


def unit_sizes(model: ModelConfig, alive: Units, axes: Sequence[str]) -> dict[str, Tensor]:
    """Count the weights that one unit has in each matrix, those of living units alone.

    Zeros that wait to be cut away do not count, so that cutting them changes no score.

    Returns: axis -> fp32 [matrices, 1]; [matrices, layers of the enlarged model] for layers.
    """
    counts = {axis: torch.tensor(live_counts(alive[axis])) for axis in LAYER_AXES}
    hidden = int(alive["hidden_size"].sum())
    layers = alive["num_layers"]
    q, kv = model.num_attention_heads // model.num_query_groups, model.kv_channels
    embedding = model.vocab_size
    # By one channel of one layer: rows of what reads the channel, columns of what writes it.
    per_channel = torch.stack(
        [
            counts["num_query_groups"] * (q + 2) * kv,
            counts["num_query_groups"] * q * kv,
            counts["ffn_hidden_size"] * 2,
            counts["ffn_hidden_size"],
        ]
    )
    tied = model.share_embeddings_and_output_weights
    channel = torch.tensor([embedding, 0 if tied else embedding])
    of_groups = torch.tensor([q * kv, kv, kv, q * kv]) * hidden
    sizes = {
        "ffn_hidden_size": torch.full((3, 1), hidden),
        "num_query_groups": of_groups[:, None],
        "hidden_size": torch.cat([channel, (per_channel * layers).sum(dim=1)])[:, None],
        "num_layers": (per_channel * hidden).clamp(min=1),
    }
    return {axis: sizes[axis].float() for axis in axes}


def all_reduce(
    values: Sequence[Tensor], op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup
) -> None:
    """Reduce small tensors over ``group`` in place, in one message."""
    if group.size() == 1 or not values:
        return
    flat = torch.cat([v.flatten() for v in values])
    dist.all_reduce(flat, op=op, group=group)
    for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
        value.copy_(part.view_as(value))
