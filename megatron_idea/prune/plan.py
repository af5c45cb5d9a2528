"""Who lives on and what is stored: the values that a pruning decision is made of.

Units go by the number that they have in the enlarged model, which they keep for life. Everything
here is small, on the CPU, and the same on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.shape import AXES, LAYER_AXES, Shape

Units = Mapping[str, Tensor]
"""Axis -> one value a unit: [layers, units] for neurons and KV groups, [units] for the others."""

StoredUnits = Mapping[str, tuple[Tensor, ...]]
"""Axis -> for each stored layer (one entry for an axis of the model) int64: the numbers of the
units in memory, those of the first tensor-parallel rank first, in their order there."""


@dataclass(frozen=True)
class Plan:
    """Which units live on, and the shape that the model is stored in from now on."""

    alive: Units
    """bool; a subset of what was alive before."""
    shape: Shape
    """Larger than the live units need where zeroed ones stay in memory for now."""
    memory: Tensor
    """What the strategy wants to be told next time."""
    gains: Tensor
    """fp32 [2 layers + 1]: what to multiply the gains of each norm with as channels go; two a layer
    of the enlarged model, in their order, and the final one."""
    digest: str
    """SHA-256 of the above, compared over all ranks before anything is applied."""

    @staticmethod
    def of(alive: Units, shape: Shape, memory: Tensor, gains: Tensor | None = None) -> Plan:
        """Make a plan with its digest; without ``gains`` norms stay as they are."""
        if gains is None:
            gains = torch.ones(2 * len(alive["num_layers"]) + 1)
        digest = hashlib.sha256(repr(shape).encode())
        for tensor in (memory, gains, *(alive[axis] for axis in sorted(alive))):
            digest.update(tensor.numpy().tobytes())
        return Plan(alive, shape, memory, gains, digest.hexdigest())


def first_units(shape: Shape) -> dict[str, tuple[Tensor, ...]]:
    """Return the stored units of a model from which nothing was removed, in their order."""
    return {axis: tuple(torch.arange(count) for count in shape.counts(axis)) for axis in AXES}


def present(stored: StoredUnits, shape: Shape, full: Shape) -> dict[str, Tensor]:
    """Return which units of the enlarged model are in memory, bool."""
    return {axis: _present(axis, stored[axis], shape, full) for axis in AXES}


def _present(axis: str, stored: Sequence[Tensor], shape: Shape, full: Shape) -> Tensor:
    counts = full.counts(axis)
    rows = torch.zeros(len(counts), counts[0], dtype=torch.bool)
    for position, ids in enumerate(stored):
        row = shape.layers[position].number if axis in LAYER_AXES else 0
        rows[row, ids] = True
    return rows if axis in LAYER_AXES else rows[0]


def table_size(axis: str, full: Shape) -> tuple[int, ...]:
    """Return the size of a table in ``Units``."""
    counts = full.counts(axis)
    return (len(counts), counts[0]) if axis in LAYER_AXES else counts


def misfit(axis: str, alive: Tensor, stored: Tensor, shape: Shape, full: Shape) -> str:
    """Say why units that a file names cannot be those of a model; empty if they can.

    Args:
        alive: as in ``Units``; stored: int64, those of all layers in one.
    """
    counts, number = shape.counts(axis), full.counts(axis)[0]
    if stored.shape != (sum(counts),) or alive.shape != table_size(axis, full):
        return f"its tables of {axis} have {len(stored)} and {alive.numel()} entries"
    parts = stored.split(list(counts))
    for ids in parts:
        if len(ids.unique()) != len(ids) or not bool(((ids >= 0) & (ids < number)).all()):
            return f"it stores units of {axis} that the enlarged model of {number} has not"
    if bool((alive.bool() & ~_present(axis, parts, shape, full)).any()):
        return f"units of {axis} live that it does not store"
    return ""


def unfit_plan(alive: Units, due: Units, gains: Tensor) -> str:
    """Say why a plan that a file has cannot be carried out; empty if it can."""
    layers = due["num_layers"]
    for axis in AXES:
        if bool((due[axis] & ~alive[axis]).any()):
            return f"its plan revives units of {axis}"
        rows = due[axis][layers] if axis in LAYER_AXES else due[axis][None]
        if not bool(rows.any(dim=-1).all()):
            return f"its plan leaves nothing of {axis}"
        if axis in LAYER_AXES and bool(due[axis][~layers].any()):
            return f"its plan keeps units of {axis} in a layer that goes"
    if not bool((gains.isfinite() & (gains > 0)).all()):
        return "its plan rescales norms by no positive number"
    return ""


def live_counts(alive: Tensor) -> list[int]:
    """Count the live units of an axis: one number a layer, or one."""
    counts: list[int] = alive.reshape(-1, alive.shape[-1]).sum(dim=1).tolist()
    return counts


def live_by_axis(alive: Units) -> dict[str, list[int]]:
    """Count the live units of every axis: for each layer of the enlarged model, or of it all."""
    return {axis: live_counts(alive[axis]) for axis in AXES}


def live_layers(alive: Units) -> list[int]:
    """List the numbers of the live layers, ascending."""
    layers: list[int] = alive["num_layers"].nonzero().view(-1).tolist()
    return layers


def local_part(stored: Tensor, tp: dist.ProcessGroup) -> Tensor:
    """Return the part of stored units that is on this tensor-parallel rank."""
    return stored.chunk(tp.size())[tp.rank()]
