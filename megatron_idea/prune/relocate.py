"""Where one layer's units go over tensor-parallel ranks, and how what they own gets there.

Tensor by tensor, what stays on its rank is copied straight to its place. What leaves is packed into
one message per peer, so that one all-to-all moves all that a unit owns of a tensor. Everything is
copied as bits. The C++ extension does the work on the CPU where it was built, PyTorch elsewhere;
both give the same.

Shapes: a tensor on one rank is [outer, units, slice] as ``prune/axis.py`` says, with its states
(main weight, exp_avg, exp_avg_sq) in front of ``outer``: n units before and t after. In a message
a unit is [outer, slice].
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.config import ConfigError
from megatron_idea.prune.axis import Share

SWITCH = "MEGATRON_IDEA_EXTENSION"
MODES = ("auto", "require", "off")
CHUNK_BYTES = 64 * 2**20

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

logger = logging.getLogger(__name__)


@functools.cache
def extension() -> ModuleType | None:
    """The C++ extension, or None where PyTorch does its work; says once in the log which.

    The environment's MEGATRON_IDEA_EXTENSION decides when it is first asked: ``auto`` (default)
    takes the extension if it imports, ``off`` does not try, ``require`` insists.
    Raises: ConfigError for another value, and for ``require`` where it does not import.
    """
    mode = os.environ.get(SWITCH, "auto")
    if mode not in MODES:
        raise ConfigError(f"{SWITCH} is {mode!r}; legal values: {', '.join(MODES)}")
    if mode == "off":
        logger.info("compaction: PyTorch (%s=off)", SWITCH)
        return None
    try:
        import megatron_idea._C as native
    except ImportError as error:
        if mode == "require":
            raise ConfigError(
                f"{SWITCH} is 'require' and the C++ extension does not import ({error}); install "
                "with a C++17 compiler at hand, or set 'auto' to let PyTorch do its work"
            ) from error
        logger.warning("compaction: PyTorch; the C++ extension does not import (%s)", error)
        return None
    logger.info("compaction: C++ extension (%s=%s)", SWITCH, mode)
    return native


@dataclass(frozen=True)
class Relocation:
    """Where one layer's units go: ``sources[r]`` lists what TP rank ``r`` holds afterwards."""

    sources: list[Tensor]
    """Per rank [t, 2] int64: (rank that has it, its local index there), in the new local order."""

    @functools.cached_property
    def moves(self) -> list[list[int]]:
        """[from][to]: how many units change their rank; 0 on the diagonal."""
        tp = len(self.sources)
        arriving = [torch.bincount(s[:, 0], minlength=tp).tolist() for s in self.sources]
        return [[arriving[d][s] if s != d else 0 for d in range(tp)] for s in range(tp)]

    @property
    def moved(self) -> int:
        return sum(map(sum, self.moves))


def relocate(ids: Sequence[Tensor], keep: Sequence[Tensor], placement: str) -> Relocation:
    """Spread the kept units of one layer evenly over TP ranks.

    ``min``: a rank keeps up to its share where they are, in order; the surplus fills the others up
    in rank order, so no more units move than must. ``ordered``: rank r gets the r-th part of all
    survivors sorted by id, which is the order at TP = 1.

    Args:
        ids: per rank [n], unit ids in local order, on the CPU.
        keep: per rank [n] bool, on the CPU; the total is a multiple of the number of ranks.
    """
    assert placement in ("min", "ordered"), placement
    assert all(i.shape == k.shape for i, k in zip(ids, keep, strict=True)), "an id per mask bit"
    assert len(torch.cat(list(ids)).unique()) == sum(map(len, ids)), "a unit is there twice"
    tp, total = len(ids), sum(int(k.sum()) for k in keep)
    assert total > 0, "no unit survives"
    assert total % tp == 0, f"{total} survivors cannot be split over {tp} ranks"
    native = extension()
    if native is None:
        return Relocation(_relocate(ids, keep, placement, total // tp))
    sources = torch.empty(total, 2, dtype=torch.int64)
    arrays = ([x.contiguous().numpy() for x in rows] for rows in (ids, keep))
    native.relocate(*arrays, placement == "ordered", sources.numpy())
    return Relocation(list(sources.split(total // tp)))


def _relocate(
    ids: Sequence[Tensor], keep: Sequence[Tensor], placement: str, share: int
) -> list[Tensor]:
    kept = [
        torch.stack([torch.full((int(k.sum()),), rank), k.nonzero().view(-1)], dim=1)
        for rank, k in enumerate(keep)
    ]
    if placement == "ordered":
        everyone = torch.cat(kept)
        order = torch.cat([i[k] for i, k in zip(ids, keep, strict=True)]).argsort()
        return list(everyone[order].split(share))
    surplus = torch.cat([k[share:] for k in kept])
    sources = []
    for k in kept:
        missing = max(0, share - len(k))
        sources.append(torch.cat([k[:share], surplus[:missing]]))
        surplus = surplus[missing:]
    return sources


@torch.no_grad()
def move(
    whole: Tensor,
    share: Share,
    relocation: Relocation,
    group: dist.ProcessGroup | None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Bring one tensor's surviving units to the ranks where the relocation wants them.

    Collective over ``group`` when a unit changes its rank, else without any message.

    Args:
        whole: [states, numel], contiguous, of 1 to 8 bytes an element; left as is.
        share: who owns what of each state.
        group: None where every rank has its part of all units, and cuts for itself.
        chunk_bytes: limit of what a rank has in transit, sent and received; one unit may pass.
    Returns: new [states, numel t / n], units in the relocation's order, bit for bit.
    """
    states, me, ranks = whole.shape[0], 0, 1
    if group is not None:
        me, ranks = group.rank(), group.size()
    assert len(relocation.sources) == ranks, "a relocation for another number of ranks"
    assert whole.shape[1] == share.count * share.unit_numel > 0, f"{share} of {whole.shape}"
    # As integers: not every op knows every float, and none may touch the bits.
    units = whole.detach().view(_BITS[whole.element_size()]).view(-1, share.count, share.stride)
    home, index = relocation.sources[me].unbind(dim=1)
    # Something has to stand where units will arrive; they overwrite it.
    moved = _gather(units, index.where(home == me, 0))

    leaving = [s[s[:, 0] == me, 1] for s in relocation.sources]
    arriving = [(home == rank).nonzero().view(-1) for rank in range(ranks)]
    unit_bytes = units[:, 0].nbytes
    chunks = list(_chunks(relocation.moves, max(1, chunk_bytes // unit_bytes)))
    traffic = [(chunk[me], [row[me] for row in chunk]) for chunk in chunks]
    most = max((sum(sent) + sum(received) for sent, received in traffic), default=0)
    staging = torch.empty(most, unit_bytes, dtype=torch.uint8, device=units.device)
    for sent, received in traffic:
        outgoing, incoming, _ = staging.split(
            [sum(sent), sum(received), most - sum(sent) - sum(received)]
        )
        _pack(units, _take(leaving, sent), outgoing)
        dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
        _unpack(incoming, _take(arriving, received), moved)
    return moved.view(whole.dtype).view(states, -1)


def _chunks(moves: list[list[int]], limit: int) -> Iterator[list[list[int]]]:
    """Cut [from][to] numbers into parts in which no rank sends and receives above ``limit``.

    Every rank computes the same parts, so all make the same number of calls. One unit may pass
    whatever the limit.
    """
    tp, left = len(moves), [list(row) for row in moves]
    while any(map(any, left)):
        room, part = [max(1, limit)] * tp, [[0] * tp for _ in range(tp)]
        for distance in range(1, tp):  # pairs that share no rank come after each other
            for sender in range(tp):
                receiver = (sender + distance) % tp
                count = min(left[sender][receiver], room[sender], room[receiver])
                part[sender][receiver] = count
                left[sender][receiver] -= count
                room[sender] -= count
                room[receiver] -= count
        yield part


def _take(lists: list[Tensor], counts: list[int]) -> Tensor:
    """Remove the first ``counts[r]`` entries from each list; returns them in one."""
    taken = torch.cat([x[:count] for x, count in zip(lists, counts, strict=True)])
    lists[:] = [x[count:] for x, count in zip(lists, counts, strict=True)]
    return taken


def _native(tensor: Tensor) -> Any:
    return extension() if tensor.device.type == "cpu" else None


def _bytes(units: Tensor) -> Any:
    """The memory of a CPU tensor [outer, units, slice] as NumPy bytes: what the extension takes."""
    return units.view(torch.uint8).numpy()


def _gather(units: Tensor, index: Tensor) -> Tensor:
    """Return units ``index`` [t] of [outer, n, slice], in that order."""
    if (native := _native(units)) is None:
        return _selected(units, index)
    result = units.new_empty(units.shape[0], len(index), units.shape[2])
    native.gather(_bytes(units), index.numpy(), _bytes(result))
    return result


def _pack(units: Tensor, index: Tensor, message: Tensor) -> None:
    """Write units ``index`` [m] into ``message`` [m, unit bytes]."""
    if (native := _native(units)) is None:
        _pieces(message, units).copy_(_selected(units, index).transpose(0, 1))
        return
    native.pack(_bytes(units), index.numpy(), _bytes(_pieces(message, units)))


def _unpack(message: Tensor, index: Tensor, units: Tensor) -> None:
    """Write the units in ``message`` [m, unit bytes] to places ``index`` [m]."""
    pieces = _pieces(message, units)
    if (native := _native(units)) is not None:
        native.unpack(_bytes(pieces), index.numpy(), _bytes(units))
    elif units.shape[2] == 1:
        units.scatter_(1, _columns(index, units), pieces.transpose(0, 1))
    else:
        units.index_copy_(1, index.to(units.device), pieces.transpose(0, 1))


def _pieces(message: Tensor, units: Tensor) -> Tensor:
    """View ``message`` as [m, outer, slice] of the kind that ``units`` are."""
    return message.view(units.dtype).view(-1, units.shape[0], units.shape[2])


def _selected(units: Tensor, index: Tensor) -> Tensor:
    if units.shape[2] == 1:
        # On the CPU index_select goes column by column: 13.2 ms against 0.7 for half of
        # [3, 512, 2048].
        return units.gather(1, _columns(index, units))
    return units.index_select(1, index.to(units.device))


def _columns(index: Tensor, units: Tensor) -> Tensor:
    return index.to(units.device)[:, None].expand(units.shape[0], -1, -1)
