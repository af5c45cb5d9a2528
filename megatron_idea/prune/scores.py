"""Moving averages of what was measured, in original numbering and equal on every rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.engine.distributed import on_device
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.axis import AXES
from megatron_idea.prune.measures import Sums, all_reduce, unit_sums
from megatron_idea.prune.plan import StoredUnits, local_part
from megatron_idea.prune.strategy import Measure, Strategy
from megatron_idea.prune.units import local_layers
from megatron_idea.shape import Shape


class Scores:
    """What a strategy wants to know of units.

    Every data-parallel rank adds up each step's sums over its own optimizer shards in ``pending``;
    observing is one read of weights and gradients and no communication. When a plan is due,
    ``pending`` is reduced over data-parallel ranks, brought into original numbering over tensor-
    and pipeline-parallel ranks, and let into ``average``:

        average <- history * average + (1 - history) * mean over the steps
    """

    def __init__(
        self, strategy: Strategy, full: Shape, history: float, device: torch.device
    ) -> None:
        self._strategy = strategy
        self._full = full
        self._history = history
        self._device = device
        self._averaged = tuple(m for m in strategy.measures if m.needs_gradients)
        self.average = {m: self._empty() for m in self._averaged}
        self.pending: dict[Measure, Sums] = {}
        self.pending_steps = 0

    def _empty(self) -> dict[str, Tensor]:
        return {
            axis: torch.zeros(
                self._full.num_layers,
                len(AXES[axis].matrices),
                self._full.counts(axis)[0],
                device=self._device,
            )
            for axis in self._strategy.axes
        }

    def observe(self, trainable: Trainable) -> dict[Measure, Sums]:
        """Measure this step's gradients; what comes of it counts once ``record`` is called."""
        return {m: unit_sums(trainable, self._strategy.axes, m) for m in self._averaged}

    def record(self, observed: Mapping[Measure, Sums]) -> None:
        """Let a step count."""
        for measure, sums in observed.items():
            kept = self.pending.setdefault(measure, {})
            if kept:
                torch._foreach_add_([kept[key] for key in sums], list(sums.values()))
            else:
                kept.update(sums)
        self.pending_steps += 1

    def fold(self, trainable: Trainable, stored: StoredUnits) -> None:
        """Let pending steps into the averages; a collective over all ranks when there are any."""
        if self.pending_steps == 0:
            return
        for measure, average in self.average.items():
            weight = (1 - self._history) / self.pending_steps
            for axis, value in self._collect(trainable, stored, self.pending[measure]).items():
                average[axis].mul_(self._history).add_(value, alpha=weight)
        self.pending, self.pending_steps = {}, 0

    def now(self, trainable: Trainable, stored: StoredUnits) -> dict[Measure, dict[str, Tensor]]:
        """Return averages, and measures of weights as they are; equal on every rank."""
        fresh = {
            m: self._collect(trainable, stored, unit_sums(trainable, self._strategy.axes, m))
            for m in self._strategy.measures
            if not m.needs_gradients
        }
        return self.average | fresh

    def state(self, trainable: Trainable, stored: StoredUnits) -> dict[str, Tensor]:
        """Return averages and pending sums in original numbering; collective over all ranks."""
        tensors = {}
        for number, measure in enumerate(self._averaged):
            pending = self.pending.get(measure, {})
            tables = self._collect(trainable, stored, pending)
            if trainable.groups.shards.rank() > 0:  # reduced now: the first rank carries it on
                for value in pending.values():
                    value.zero_()
            for axis in self._strategy.axes:
                tensors[f"average.{number}.{axis}"] = self.average[measure][axis].clone()
                tensors[f"pending.{number}.{axis}"] = tables[axis]
        return tensors

    def blank_state(self) -> dict[str, Tensor]:
        """Return tensors of the names and sizes of ``state``, to be read into."""
        return {
            f"{kind}.{number}.{axis}": table
            for number in range(len(self._averaged))
            for kind in ("average", "pending")
            for axis, table in self._empty().items()
        }

    def load_state(
        self,
        tensors: Mapping[str, Tensor],
        pending_steps: int,
        trainable: Trainable,
        stored: StoredUnits,
    ) -> None:
        """Take over what ``state`` returned, in the present layout."""
        self.pending, self.pending_steps = {}, pending_steps
        for number, measure in enumerate(self._averaged):
            for axis in self._strategy.axes:
                self.average[measure][axis].copy_(tensors[f"average.{number}.{axis}"])
            if pending_steps:
                tables = {axis: tensors[f"pending.{number}.{axis}"] for axis in self._strategy.axes}
                self.pending[measure] = self._spread(tables, trainable, stored)

    def _collect(self, trainable: Trainable, stored: StoredUnits, sums: Sums) -> dict[str, Tensor]:
        """Bring sums over local units to [layers, matrices, units] tables in original numbering."""
        all_reduce(list(sums.values()), dist.ReduceOp.SUM, trainable.groups)
        tables = self._empty()
        for (axis, layer), value in sums.items():
            row, ids = self._place(trainable, stored, axis, layer)
            tables[axis][row][:, ids] = value
        mp = trainable.groups.collection.mp
        if mp.size() > 1:
            for table in tables.values():
                dist.all_reduce(table, group=mp)  # each entry is on one rank only
        return tables

    def _spread(
        self, tables: Mapping[str, Tensor], trainable: Trainable, stored: StoredUnits
    ) -> Sums:
        """Cut tables down to this rank's units; the first data-parallel rank has their values."""
        sums: Sums = {}
        for axis, layer in local_layers(trainable, self._strategy.axes):
            row, ids = self._place(trainable, stored, axis, layer)
            value = tables[axis][row][:, ids]
            carries = trainable.groups.shards.rank() == 0
            sums[axis, layer] = value if carries else torch.zeros_like(value)
        return sums

    def _place(
        self, trainable: Trainable, stored: StoredUnits, axis: str, layer: int
    ) -> tuple[int, Tensor]:
        """Return a layer's original number, and those of its units on this rank."""
        ids = local_part(stored[axis][layer], trainable.groups.tp)
        return trainable.shape.layers[layer].number, on_device(ids, self._device)
