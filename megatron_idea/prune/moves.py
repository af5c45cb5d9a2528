"""Where one layer's neurons go over tensor-parallel ranks, and how their state gets there.

What stays on its rank is copied straight to its place. What leaves is packed into one message per
peer, [3, H] for each state of each neuron, so that one all-to-all moves all that a neuron owns.
Everything is copied as bits. The C++ extension does the work on the CPU where it was built, PyTorch
elsewhere; both give the same.

Shapes: n states (main weight, exp_avg, exp_avg_sq), f neurons on this rank before and t after,
H hidden. Stacked states are fc1 [n, 2 f, H], gate rows above up rows, and fc2 [n, H, f].
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

SWITCH = "MEGATRON_IDEA_EXTENSION"
MODES = ("auto", "require", "off")
CHUNK_BYTES = 64 * 2**20

# Copied as integers: not every op knows every float, and none may touch the bits.
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


# ----------------------------------------------------------------------------------- where to


@dataclass(frozen=True)
class Relocation:
    """Where one layer's neurons go: ``sources[r]`` lists what TP rank ``r`` holds afterwards."""

    sources: list[Tensor]
    """Per rank [t, 2] int64: (rank that has it, its local index there), in the new local order."""

    @property
    def moves(self) -> list[list[int]]:
        """[from][to]: how many neurons change their rank; 0 on the diagonal."""
        tp = len(self.sources)
        arriving = [torch.bincount(s[:, 0], minlength=tp).tolist() for s in self.sources]
        return [[arriving[d][s] if s != d else 0 for d in range(tp)] for s in range(tp)]

    @property
    def moved(self) -> int:
        return sum(map(sum, self.moves))


def relocate(ids: Sequence[Tensor], keep: Sequence[Tensor], placement: str) -> Relocation:
    """Spread the kept neurons of one layer evenly over TP ranks.

    ``min``: a rank keeps up to its share where they are, in order; the surplus fills the others up
    in rank order, so no more neurons move than must. ``ordered``: rank r gets the r-th part of all
    survivors sorted by neuron id, which is the order at TP = 1.

    Args:
        ids: per rank [f], neuron ids in local order, on the CPU.
        keep: per rank [f] bool, on the CPU; the total is a multiple of the number of ranks.
    """
    assert placement in ("min", "ordered"), placement
    assert all(i.shape == k.shape for i, k in zip(ids, keep, strict=True)), "an id per mask bit"
    tp, total = len(ids), sum(int(k.sum()) for k in keep)
    assert total > 0, "no neuron survives"
    assert total % tp == 0, f"{total} survivors cannot be split over {tp} ranks"
    native = extension()
    if native is None:
        return Relocation(_relocate(ids, keep, placement, total // tp))
    sources = torch.empty(total, 2, dtype=torch.int64)
    arrays = ([x.contiguous().numpy() for x in rows] for rows in (ids, keep))
    try:
        native.relocate(*arrays, placement == "ordered", sources.numpy())
    except ValueError as error:  # for the binding a fault of its caller; here an invariant of ours
        raise AssertionError(str(error)) from error
    return Relocation(list(sources.split(total // tp)))


def _relocate(
    ids: Sequence[Tensor], keep: Sequence[Tensor], placement: str, share: int
) -> list[Tensor]:
    assert len(torch.cat(list(ids)).unique()) == sum(map(len, ids)), "a neuron is there twice"
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


# ------------------------------------------------------------------------------------ the way


@torch.no_grad()
def move_ffn(
    fc1: Tensor,
    fc2: Tensor,
    relocation: Relocation,
    group: dist.ProcessGroup,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Bring one FFN's surviving neurons to the ranks where the relocation wants them.

    Collective over ``group`` when a neuron changes its rank, else without any message.

    Args:
        fc1, fc2: [n, 2 f, H] and [n, H, f], contiguous, one dtype of 1 to 8 bytes; left as is.
        chunk_bytes: limit of what a rank has in transit, sent and received; one neuron may pass.
    Returns: new [n, 2 t, H] and [n, H, t], neurons in the relocation's order, bit for bit.
    """
    (n, hidden, _), dtype, me = fc2.shape, fc1.dtype, group.rank()
    fc1, fc2 = _as_bits(fc1, fc2)
    assert len(relocation.sources) == group.size(), "a relocation for another number of ranks"
    home, index = relocation.sources[me].unbind(dim=1)
    # Something has to stand where neurons will arrive; they overwrite it.
    new1, new2 = _gather(fc1, fc2, index.where(home == me, 0))

    leaving = [s[s[:, 0] == me, 1] for s in relocation.sources]
    arriving = [(home == rank).nonzero().view(-1) for rank in range(group.size())]
    neuron_bytes = n * 3 * hidden * fc1.element_size()
    plan = list(_chunks(relocation.moves, max(1, chunk_bytes // neuron_bytes)))
    traffic = [(chunk[me], [row[me] for row in chunk]) for chunk in plan]
    most = max((sum(sent) + sum(received) for sent, received in traffic), default=0)
    staging = torch.empty(most, neuron_bytes, dtype=torch.uint8, device=fc1.device)
    for sent, received in traffic:
        outgoing, incoming, _ = staging.split(
            [sum(sent), sum(received), most - sum(sent) - sum(received)]
        )
        _pack(fc1, fc2, _take(leaving, sent), outgoing)
        dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
        _unpack(incoming, _take(arriving, received), new1, new2)
    return new1.view(dtype), new2.view(dtype)


def _as_bits(fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor]:
    """Both as integers of the same width; what the copies rely on is checked here."""
    n, hidden, f = fc2.shape
    assert fc1.shape == (n, 2 * f, hidden), f"{fc1.shape} and {fc2.shape} are not of one FFN"
    assert fc1.numel() > 0, f"{fc1.shape} has no neuron"
    assert fc1.dtype == fc2.dtype and fc1.device == fc2.device, "fc1 and fc2 differ in kind"
    assert fc1.is_contiguous() and fc2.is_contiguous(), "fc1 and fc2 must be contiguous"
    bits = _BITS[fc1.element_size()]
    return fc1.detach().view(bits), fc2.detach().view(bits)


def _chunks(moves: list[list[int]], limit: int) -> Iterator[list[list[int]]]:
    """Cut [from][to] numbers into parts in which no rank sends and receives above ``limit``.

    Every rank computes the same parts, so all make the same number of calls. One neuron may pass
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


# --------------------------------------------------------------------------------- the copies


def _native(tensor: Tensor) -> Any:
    return extension() if tensor.device.type == "cpu" else None


def _bytes(*tensors: Tensor) -> Iterator[Any]:
    """The memory of CPU tensors as NumPy bytes: what the extension takes."""
    return (x.view(torch.uint8).numpy() for x in tensors)


def _gather(fc1: Tensor, fc2: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons ``index`` [t] of fc1 and fc2, in that order."""
    n, hidden, f = fc2.shape
    if (native := _native(fc1)) is not None:
        new1, new2 = fc1.new_empty(n, 2 * len(index), hidden), fc2.new_empty(n, hidden, len(index))
        native.gather(*_bytes(fc1, fc2), index.numpy(), *_bytes(new1, new2))
        return new1, new2
    index = index.to(fc1.device)
    gate_up = fc1.view(n, 2, f, hidden).index_select(2, index)
    return gate_up.view(n, -1, hidden), _columns(fc2, index)


def _pack(fc1: Tensor, fc2: Tensor, index: Tensor, message: Tensor) -> None:
    """Write neurons ``index`` [m] into ``message`` [m, neuron bytes]."""
    n, hidden, f = fc2.shape
    if (native := _native(fc1)) is not None:
        native.pack(*_bytes(fc1, fc2), index.numpy(), message.view(-1).numpy())
        return
    index = index.to(fc1.device)
    neurons = message.view(fc1.dtype).view(-1, n, 3, hidden)
    neurons[:, :, :2] = fc1.view(n, 2, f, hidden).index_select(2, index).permute(2, 0, 1, 3)
    neurons[:, :, 2] = _columns(fc2, index).permute(2, 0, 1)


def _unpack(message: Tensor, index: Tensor, fc1: Tensor, fc2: Tensor) -> None:
    """Write the neurons in ``message`` [m, neuron bytes] to places ``index`` [m] of fc1 and fc2."""
    n, hidden, f = fc2.shape
    if (native := _native(fc1)) is not None:
        native.unpack(message.view(-1).numpy(), index.numpy(), *_bytes(fc1, fc2))
        return
    index = index.to(fc1.device)
    neurons = message.view(fc1.dtype).view(-1, n, 3, hidden)
    fc1.view(n, 2, f, hidden).index_copy_(2, index, neurons[:, :, :2].permute(1, 2, 0, 3))
    fc2.scatter_(2, index.expand(n, hidden, -1), neurons[:, :, 2].permute(1, 2, 0))


def _columns(fc2: Tensor, index: Tensor) -> Tensor:
    """Columns ``index`` of [n, H, f]."""
    # On the CPU index_select goes column by column: 13.2 ms against 0.7 for half of [3, 512, 2048].
    return fc2.gather(2, index.expand(*fc2.shape[:2], -1))
