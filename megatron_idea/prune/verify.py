"""Did a compaction carry everything? Checksums of every unit's state, losses of a fixed text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.engine.distributed import ProcessGroups, together
from megatron_idea.engine.passes import at_least, through
from megatron_idea.engine.shards import MOMENTS, slot
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.axis import Share
from megatron_idea.prune.plan import StoredUnits
from megatron_idea.prune.units import named_shares
from megatron_idea.shape import UNITS

# Mean absolute change of a token's loss, in nats. Leaving masked neurons out changes nothing but
# the order of summation: at most 2e-7 (fp32) and 3e-4 (bf16) at the quickstart's shape, where a
# live neuron lost of 400 changes 2e-4 and 7e-4 (medians). Single neurons are what the checksums
# find; the losses find masks, other weights and whole layers that went wrong.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
# In bf16 rounding grows with depth: 6e-2 at 32 layers of hidden size 512. So it is measured, too:
# by this many times the change that comes of FFN activations that are all off by their last bit.
# Of those changes rounding made at most 0.7 (bf16) and 1.3 (fp32) at 4 to 32 layers.
LAST_BITS = 4
_CHUNK = 1 << 22


class CompactionError(RuntimeError):
    """The model after a compaction is not the one before: it must not be trained on."""


@dataclass(frozen=True)
class Fingerprint:
    """What a compaction must not change."""

    checksums: dict[tuple[str, int], dict[int, int]]
    """(Axis, layer's position) -> unit's number -> checksum of its main weight and moments, for the
    layers of this pipeline stage."""
    losses: Tensor
    """[tokens] loss of each token of a fixed text; on every rank."""
    last_bit: float = 0.0
    """Mean absolute change of a token's loss, in nats, by the last bits of FFN activations."""


def fingerprint(trainable: Trainable, stored: StoredUnits, last_bit: bool = False) -> Fingerprint:
    """Take it before and after; collective over all ranks, and no random number is drawn.

    ``last_bit``: measure what rounding may change, too, where it may be much; wanted before.
    """
    checksums = {}
    for axis in ("ffn_hidden_size",):
        for layer, sums in unit_checksums(trainable, axis).items():
            assert layer is not None
            everyones = sums.new_empty(trainable.groups.tp.size() * len(sums))
            dist.all_gather_into_tensor(everyones, sums, group=trainable.groups.tp)
            ids = stored[axis][layer].tolist()
            checksums[axis, layer] = dict(zip(ids, everyones.tolist(), strict=True))
    losses = _losses(trainable)
    return Fingerprint(checksums, losses, _last_bit(trainable, losses) if last_bit else 0.0)


def _last_bit(trainable: Trainable, losses: Tensor) -> float:
    if trainable.training.precision == "bf16":
        bit = torch.finfo(torch.bfloat16).eps
    elif torch.backends.cuda.matmul.allow_tf32:
        bit = 2.0**-10
    else:
        return 0.0  # at any depth rounding of fp32 is far below its tolerance

    def disturb(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0] * (1.0 + bit), *inputs[1:]

    hooks = [mlp.linear_fc2.register_forward_pre_hook(disturb) for _, mlp in trainable.mlps]
    change = float((_losses(trainable) - losses).abs().mean())
    for hook in hooks:
        hook.remove()
    return change


def check(before: Fingerprint, after: Fingerprint, trainable: Trainable) -> float:
    """Compare every neuron that is left, and the losses; collective over all ranks.

    Returns: mean absolute change of a token's loss, in nats.
    Raises: CompactionError on every rank, naming a neuron or the change.
    """
    change = float((after.losses - before.losses).abs().mean())
    limit = max(TOLERANCE[trainable.training.precision], LAST_BITS * before.last_bit)

    def compare() -> None:
        for (axis, layer), sums in after.checksums.items():
            known = before.checksums[axis, layer]
            wrong = [n for n, value in sums.items() if known.get(n) != value]
            if wrong:
                raise CompactionError(
                    f"compaction changed the state of {len(wrong)} of {len(sums)} "
                    f"{UNITS[axis]}s in layer {layer}, the first is {min(wrong)}"
                )
        if not change <= limit:
            raise CompactionError(
                f"compaction changed the loss of a fixed text by {change:.2e} nats per token; "
                f"rounding explains {limit:.0e}"
            )

    together(compare, trainable.groups)
    return change


@torch.no_grad()
def unit_checksums(trainable: Trainable, axis: str) -> dict[int | None, Tensor]:
    """Add up all bits of each unit's main weights and moments, each times its odd place number.

    Places are counted through what a unit owns, in the order (state, tensor, outer, inner).
    Products are modulo 2^32. Taken on the optimizer's shards, added up over data-parallel ranks.

    Args:
        axis: one whose units belong to a layer.
    Returns: by layer, [units on this rank] int64.
    """
    owned: dict[int | None, list[tuple[Share, torch.nn.Parameter]]] = {}
    for _, parameter, shares in named_shares(trainable):
        for share in shares:
            if share.axis == axis:
                owned.setdefault(share.layer, []).append((share, parameter))
    return {layer: _layer_checksums(trainable, tensors) for layer, tensors in owned.items()}


def _layer_checksums(
    trainable: Trainable, tensors: Sequence[tuple[Share, torch.nn.Parameter]]
) -> Tensor:
    """[units] int64 from all tensors of one layer that its units own something of."""
    groups = trainable.groups
    sums = torch.zeros(tensors[0][0].count, dtype=torch.int64, device=groups.device)
    per_state, first = sum(share.unit_numel for share, _ in tensors), 0
    for share, parameter in tensors:
        part = slot(trainable.optimizer, parameter)
        if part is not None:
            for number, state in enumerate((part.main, *(part.state[m] for m in MOMENTS))):
                bits = state.detach().view(-1).view(torch.int32)
                _add_checksums(sums, bits, part.start, share, number * per_state + first)
        first += share.unit_numel
    if trainable.parallel.use_distributed_optimizer and groups.shards.size() > 1:
        dist.all_reduce(sums, group=groups.shards)
    return sums


def _add_checksums(sums: Tensor, bits: Tensor, start: int, share: Share, place: int) -> None:
    """Add elements [start, start + len(bits)) of a tensor, whose slices begin at ``place``."""
    count, stride, device = share.count, share.stride, sums.device
    units_are_columns = stride == 1
    row_length = count if units_are_columns else stride
    end = start + bits.numel()
    for begin, row, column, rows, columns in _blocks(start, end, row_length):
        block = bits[begin : begin + rows * columns].view(rows, columns)
        row_ids = torch.arange(row, row + rows, device=device)
        column_ids = torch.arange(column, column + columns, device=device)
        if units_are_columns:  # [outer, units]
            places = (place + row_ids)[:, None]
            sums.index_add_(0, column_ids, (block * _odd(places)).sum(0))
        else:  # [outer units, inner]
            places = (place + row_ids // count * stride)[:, None] + column_ids
            sums.index_add_(0, row_ids % count, (block * _odd(places)).sum(1))


def _odd(places: Tensor) -> Tensor:
    """An odd factor, so that no bit is lost in 32-bit products that wrap around."""
    return (2 * places + 1).int()


def _blocks(start: int, end: int, length: int) -> Iterator[tuple[int, int, int, int, int]]:
    """[start, end) of a matrix with rows of ``length``, as blocks of whole or broken rows.

    Yields: (offset from ``start``, row, column, rows, columns).
    """
    at = start
    while at < end:
        row, column = divmod(at, length)
        if column or end - at < length:  # a broken row at the beginning or the end
            rows, columns = 1, min(length - column, end - at)
        else:
            rows = min((end - at) // length, max(1, _CHUNK // length))
            columns = length
        yield at - start, row, column, rows, columns
        at += rows * columns


@torch.no_grad()
def _losses(trainable: Trainable) -> Tensor:
    """Loss of each token of a fixed random text, computed as in training but without dropout."""
    groups = trainable.groups
    # Enough to see every layer at work; a multiple of TP, for sequence parallelism.
    length = min(trainable.training.seq_length, 64 * groups.tp.size())
    chunks = trainable.chunks
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(trainable.model.vocab_size, (1, length + 1), generator=generator)
    text = text.to(groups.device)
    positions = torch.arange(length, device=groups.device)[None]
    collected: list[Tensor] = []

    def forward(_batches: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        output = model(text[:, :-1], positions, None, labels=text[:, 1:])

        def collect(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            collected.append(losses.detach().float().flatten())
            return losses.float().sum(), {}

        return output, collect

    for chunk in chunks:
        chunk.eval()
    through(
        chunks,
        lambda: itertools.repeat(None),
        forward,
        num_microbatches=at_least(chunks, groups),  # of the same text
        seq_length=length,
        micro_batch_size=1,
    )
    for chunk in chunks:
        chunk.train()
    losses = collected[0] if collected else torch.zeros(length, device=groups.device)
    return _from_last_stage(losses, groups)


def _from_last_stage(losses: Tensor, groups: ProcessGroups) -> Tensor:
    """The last pipeline stage's values on all of its pipeline's ranks."""
    if groups.pp.size() > 1:
        last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
        dist.broadcast(losses, src=last, group=groups.pp)
    return losses
