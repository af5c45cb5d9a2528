"""Did a compaction carry everything? Checksums of every unit's state, losses of a fixed text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.engine.distributed import ProcessGroups, together
from megatron_idea.engine.passes import at_least, evaluating, through
from megatron_idea.engine.shards import MOMENTS, shard_of
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.axis import Share
from megatron_idea.prune.plan import StoredUnits, Units, local_part, table_size
from megatron_idea.prune.units import named_shares
from megatron_idea.shape import AXES, LAYER_AXES, UNITS, Shape

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
_STRIDE, _STATE = 1_000_003, 777_767_777  # places are apart for rows, and for states


class CompactionError(RuntimeError):
    """The model after a compaction is not the one before: it must not be trained on."""


@dataclass(frozen=True)
class Fingerprint:
    """What a compaction must not change."""

    checksums: dict[str, Tensor]
    """Axis -> int64, one for each unit of the enlarged model, as in ``Units``: of its main weight
    and moments, those of all layers in one for channels; on the CPU, equal on every rank."""
    losses: Tensor
    """[tokens] loss of each token of a fixed text; on every rank."""
    last_bit: float = 0.0
    """Mean absolute change of a token's loss, in nats, by the last bits of FFN activations."""


def fingerprint(trainable: Trainable, stored: StoredUnits, last_bit: bool = False) -> Fingerprint:
    """Take it before and after; collective over all ranks, and no random number is drawn.

    ``last_bit``: measure what rounding may change, too, where it may be much; wanted before.
    """
    checksums = unit_checksums(trainable, stored)
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


def check(before: Fingerprint, after: Fingerprint, alive: Units, trainable: Trainable) -> float:
    """Compare all that is left, and the losses; collective over all ranks.

    Returns: mean absolute change of a token's loss, in nats.
    Raises: CompactionError on every rank, naming a unit or the change.
    """
    change = float((after.losses - before.losses).abs().mean())
    limit = max(TOLERANCE[trainable.training.precision], LAST_BITS * before.last_bit)

    def compare() -> None:
        for axis, sums in after.checksums.items():
            wrong = ((sums != before.checksums[axis]) & alive[axis]).nonzero().tolist()
            if wrong:
                *layer, unit = wrong[0]
                where = f" of layer {layer[0]}" if layer else ""
                raise CompactionError(
                    f"compaction changed the state of {len(wrong)} of {int(alive[axis].sum())} "
                    f"{UNITS[axis]}s, the first is {UNITS[axis]} {unit}{where}"
                )
        if not change <= limit:
            raise CompactionError(
                f"compaction changed the loss of a fixed text by {change:.2e} nats per token; "
                f"rounding explains {limit:.0e}"
            )

    together(compare, trainable.groups)
    return change


@torch.no_grad()
def unit_checksums(trainable: Trainable, stored: StoredUnits) -> dict[str, Tensor]:
    """Add up all bits of main weights and moments, each times its odd place number, by unit.

    Every tensor counts for one axis: neurons or KV groups where they have a part in it, else
    channels, else the layer. Places are those of the enlarged model, and removed units are zeros,
    so cutting on any axis changes no sum. Products are modulo 2^32.

    Returns: as in ``Fingerprint``; collective over all ranks.
    """
    groups, full = trainable.groups, Shape.full(trainable.model)
    tables = {
        axis: torch.zeros(table_size(axis, full), dtype=torch.int64, device=groups.device)
        for axis in AXES
    }
    for _, parameter, shares in named_shares(trainable):
        part = shard_of(trainable.optimizer, parameter)
        if part is None:
            continue
        home = min(shares, key=lambda share: AXES.index(share.axis))
        table = tables[home.axis]
        if home.axis in LAYER_AXES:
            assert home.layer is not None
            table = table[trainable.shape.layers[home.layer].number]
        # A vector is a row.
        shape = (1, *parameter.shape)[-2:]
        parts = [share for share in shares if share is home or share.axis != "num_layers"]
        by_dim = {share.dim + 2 - parameter.dim(): share for share in parts}
        places, own = [], None
        for dim, length in enumerate(shape):
            share = by_dim.get(dim)
            ids, numbers = _along(dim, length, shape, share, trainable, stored)
            places.append(numbers.to(groups.device))
            if share is home:
                own = (dim, ids.to(groups.device))
        assert own is not None
        states = (part.main, *(part.state[m] for m in MOMENTS if m in part.state))
        for number, state in enumerate(states):
            bits = state.detach().view(-1).view(torch.int32)
            _add_checksums(table, bits, part.start, own, places, number)
    for table in tables.values():
        dist.all_reduce(table)
    return {axis: table.cpu() for axis, table in tables.items()}


def _along(
    dim: int,
    length: int,
    shape: tuple[int, ...],
    share: Share | None,
    trainable: Trainable,
    stored: StoredUnits,
) -> tuple[Tensor, Tensor]:
    """Say of each index of a tensor's dimension, [length] int64, whose it is, and its place.

    Returns: original numbers of units; places in the enlarged model, local ones where no unit has a
        part.
    """
    if share is None:
        return torch.zeros(length, dtype=torch.int64), torch.arange(length)
    if share.axis == "num_layers":
        assert share.layer is not None
        number = trainable.shape.layers[share.layer].number
        return torch.full((length,), number), torch.arange(length)
    is_layers = share.axis in LAYER_AXES
    ids = stored[share.axis][(share.layer or 0) if is_layers else 0]
    if is_layers:
        ids = local_part(ids, trainable.groups.tp)
    full = Shape.full(trainable.model).counts(share.axis)[0]
    inner = share.stride // math.prod(shape[dim + 1 :])
    outer = length // (share.count * inner)
    owners = ids[None, :, None].expand(outer, -1, inner)
    places = torch.arange(outer)[:, None, None] * full + owners
    return owners.reshape(-1), (places * inner + torch.arange(inner)).reshape(-1)


def _add_checksums(
    sums: Tensor,
    bits: Tensor,
    start: int,
    own: tuple[int, Tensor],
    places: Sequence[Tensor],
    state: int,
) -> None:
    """Add elements [start, start + len(bits)) of a matrix to the sums of their units.

    ``own``: the dimension that units lie along, and whose each index of it is.
    """
    dim, owners = own
    # Odd, so that no bit is lost in 32-bit products, which wrap around.
    rows_odd = (2 * (places[0] * _STRIDE + state * _STATE) + 1).int()
    columns_even = (2 * places[1]).int()
    for begin, row, column, rows, columns in _blocks(start, start + bits.numel(), len(places[1])):
        block = bits[begin : begin + rows * columns].view(rows, columns)
        odd = rows_odd[row : row + rows, None] + columns_even[column : column + columns]
        first, count = ((row, rows), (column, columns))[dim]
        sums.index_add_(0, owners[first : first + count], (block * odd).sum(1 - dim))


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

    with evaluating(chunks):
        through(
            chunks,
            lambda: itertools.repeat(None),
            forward,
            num_microbatches=at_least(chunks, groups),  # of the same text
            seq_length=length,
            micro_batch_size=1,
        )
    losses = collected[0] if collected else torch.zeros(length, device=groups.device)
    return _from_last_stage(losses, groups)


def _from_last_stage(losses: Tensor, groups: ProcessGroups) -> Tensor:
    """The last pipeline stage's values on all of its pipeline's ranks."""
    if groups.pp.size() > 1:
        last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
        dist.broadcast(losses, src=last, group=groups.pp)
    return losses
