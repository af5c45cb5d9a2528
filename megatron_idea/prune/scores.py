"""Moving averages of what was measured, in original numbering and equal on every rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.config import ModelConfig
from megatron_idea.engine.distributed import on_device
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.axis import AXES
from megatron_idea.prune.measures import Sums, all_reduce, carries, num_lines, unit_sums
from megatron_idea.prune.plan import StoredUnits, local_part, table_size
from megatron_idea.prune.strategy import Activation, Measure, Strategy
from megatron_idea.prune.units import local_layers
from megatron_idea.shape import LAYER_AXES, Shape

Measured = Measure | Activation


class Scores:
    """What a strategy wants to know of units.

    Every rank adds up each step's sums over its own optimizer shards, and of the tokens that it has
    seen, in ``pending``; observing is one read of weights, gradients and activations and, but for
    statistics of split sequences, no communication. When a plan is due,
    ``pending`` is reduced over data-parallel ranks, brought into original numbering over tensor-
    and pipeline-parallel ranks, and let into ``average``:

        average <- history * average + (1 - history) * mean over the steps

    What this began with, zeros, has the weight ``history`` to the power of the plans so far. It
    scales all sums over weights alike. Activations go to the strategy without it: a variance is
    made of a mean and of a mean of squares.
    """

    def __init__(
        self, strategy: Strategy, model: ModelConfig, history: float, device: torch.device
    ) -> None:
        self._model = model
        self._full = Shape.full(model)
        self._history = history
        self._device = device
        self._axes = {m: m.axes(strategy.axes) for m in strategy.measures}
        self._averaged = tuple(
            m for m in self._axes if isinstance(m, Activation) or m.needs_gradients
        )
        self.average = {m: self._empty(m) for m in self._averaged}
        self._of_zeros = 1.0
        self.pending: dict[Measured, Sums] = {}
        self.pending_steps = 0

    def _empty(self, measure: Measured) -> dict[str, Tensor]:
        tables = {}
        for axis in self._axes[measure]:
            *rows, units = table_size(axis, self._full)
            number = num_lines(measure, axis, self._model)
            tables[axis] = torch.zeros(*rows, number, units, device=self._device)
        return tables

    @property
    def activations(self) -> dict[Activation, tuple[str, ...]]:
        """What forward passes have to be watched for, and the axes of each."""
        return {m: axes for m, axes in self._axes.items() if isinstance(m, Activation)}

    def observe(
        self, trainable: Trainable, seen: Mapping[Activation, Sums] | None = None
    ) -> dict[Measured, Sums]:
        """Measure this step's gradients; what comes of it counts once ``record`` is called.

        Args:
            seen: what ``watched`` saw of the step's passes, of ``activations``.
        """
        seen = seen or {}
        return {
            m: seen[m] if isinstance(m, Activation) else unit_sums(trainable, self._axes[m], m)
            for m in self._averaged
        }

    def record(self, observed: Mapping[Measured, Sums]) -> None:
        """Let a step count."""
        for measure, sums in observed.items():
            kept = self.pending.setdefault(measure, {})
            if not kept:
                kept.update(sums)
            elif sums:  # a rank may have seen nothing of what is the same on all
                torch._foreach_add_([kept[key] for key in sums], list(sums.values()))
        self.pending_steps += 1

    def fold(self, trainable: Trainable, stored: StoredUnits) -> None:
        """Let pending steps into the averages; a collective over all ranks when there are any."""
        if self.pending_steps == 0:
            return
        for measure, average in self.average.items():
            weight = (1 - self._history) / self.pending_steps
            found = self._collect(trainable, stored, measure, self.pending[measure])
            for axis, value in found.items():
                average[axis].mul_(self._history).add_(value, alpha=weight)
        self._of_zeros *= self._history
        self.pending, self.pending_steps = {}, 0

    def now(self, trainable: Trainable, stored: StoredUnits) -> dict[Measured, dict[str, Tensor]]:
        """Return averages, and measures of weights as they are; equal on every rank."""
        fresh: dict[Measured, dict[str, Tensor]] = {
            m: self._collect(trainable, stored, m, unit_sums(trainable, axes, m))
            for m, axes in self._axes.items()
            if not isinstance(m, Activation) and not m.needs_gradients
        }
        seen = 1.0 - self._of_zeros or 1.0
        whole = {
            m: {axis: table / seen for axis, table in tables.items()}
            for m, tables in self.average.items()
            if isinstance(m, Activation)
        }
        return self.average | whole | fresh

    def state(self, trainable: Trainable, stored: StoredUnits) -> dict[str, Tensor]:
        """Return averages and pending sums in original numbering; collective over all ranks."""
        tensors = {}
        for number, measure in enumerate(self._averaged):
            tables = self._collect(trainable, stored, measure, self.pending.get(measure, {}))
            if self.pending_steps:  # reduced now, as one that goes on from here will have it
                self.pending[measure] = self._spread(tables, trainable, stored)
            for axis in tables:
                tensors[f"average.{number}.{axis}"] = self.average[measure][axis].clone()
                tensors[f"pending.{number}.{axis}"] = tables[axis]
        if self.activations:
            tensors["of_zeros"] = torch.tensor([self._of_zeros], dtype=torch.float64)
        return tensors

    def blank_state(self) -> dict[str, Tensor]:
        """Return tensors of the names and sizes of ``state``, to be read into."""
        tensors = {
            f"{kind}.{number}.{axis}": table
            for number, measure in enumerate(self._averaged)
            for kind in ("average", "pending")
            for axis, table in self._empty(measure).items()
        }
        if self.activations:
            tensors["of_zeros"] = torch.ones(1, dtype=torch.float64)
        return tensors

    def load_state(
        self,
        tensors: Mapping[str, Tensor],
        pending_steps: int,
        trainable: Trainable,
        stored: StoredUnits,
    ) -> None:
        """Take over what ``state`` returned, in the present layout."""
        self.pending, self.pending_steps = {}, pending_steps
        if self.activations:
            self._of_zeros = float(tensors["of_zeros"])
        for number, measure in enumerate(self._averaged):
            for axis, average in self.average[measure].items():
                average.copy_(tensors[f"average.{number}.{axis}"])
            if pending_steps:
                tables = {axis: tensors[f"pending.{number}.{axis}"] for axis in self._axes[measure]}
                self.pending[measure] = self._spread(tables, trainable, stored)

    def _collect(
        self, trainable: Trainable, stored: StoredUnits, measure: Measured, sums: Sums
    ) -> dict[str, Tensor]:
        """Bring sums over local units to tables in original numbering, equal on every rank."""
        all_reduce(list(sums.values()), dist.ReduceOp.SUM, trainable.groups.shards)
        tables = self._empty(measure)
        for (axis, layer), value in sums.items():
            of_layer, ids = self._place(trainable, stored, axis, layer)
            self._part(tables, axis, of_layer)[:, ids] = value
        # Each entry of a split axis is on one rank only, the others have parts on several.
        all_reduce(list(tables.values()), dist.ReduceOp.SUM, trainable.groups.collection.mp)
        return tables

    def _spread(
        self, tables: Mapping[str, Tensor], trainable: Trainable, stored: StoredUnits
    ) -> Sums:
        """Cut tables down to this rank's units; one of the ranks that share them has the values."""
        sums: Sums = {}
        for axis, layer in local_layers(trainable, list(tables)):
            of_layer, ids = self._place(trainable, stored, axis, layer)
            value = self._part(tables, axis, of_layer)[:, ids]
            sums[axis, layer] = (
                value if carries(axis, trainable.groups) else torch.zeros_like(value)
            )
        return sums

    @staticmethod
    def _part(tables: Mapping[str, Tensor], axis: str, layer: int) -> Tensor:
        """View [lines, units] of an axis, in a layer where layers have units of their own."""
        return tables[axis][layer] if axis in LAYER_AXES else tables[axis]

    def _place(
        self, trainable: Trainable, stored: StoredUnits, axis: str, layer: int | None
    ) -> tuple[int, Tensor]:
        """Return a layer's original number, and those of the units on this rank."""
        number = trainable.shape.layers[layer or 0].number
        if axis == "num_layers":
            return number, torch.tensor([number], device=self._device)
        ids = stored[axis][layer or 0]
        if AXES[axis].is_split:
            ids = local_part(ids, trainable.groups.tp)
        return number, on_device(ids, self._device)
