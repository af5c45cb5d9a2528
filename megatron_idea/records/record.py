"""Describe one optimizer step: a line of ``metrics.jsonl``. Lines may come from strangers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_idea import files
from megatron_idea.config import ModelConfig
from megatron_idea.shape import AXES, LAYER_AXES, Shape

Counts = Mapping[str, Sequence[int]]
"""By axis: units of every layer of the enlarged model, 0 where it is gone; or one number."""


@dataclass(frozen=True, slots=True)
class Record:
    """Holds what is known at the end of a step."""

    step: int
    tokens: int
    """Consumed, this step's included."""
    phase: str
    loss: float
    """Training loss of the batch in nats per token; NaN or infinite where the step went wrong."""
    lr: float
    removed: float
    """Share of the removal that the schedule has asked for, in [0, 1]."""
    live: Counts
    """Units that are not removed."""
    stored: Counts
    """Units in memory: the live ones, and zeros that no compaction has cut out yet."""
    grad_norm: float
    """Before clipping."""
    tokens_per_s: float
    step_s: float
    skipped: int
    """Steps so far whose loss or gradient was not finite."""
    memory_bytes: float | None = None
    flops: float | None = None
    """Training FLOPs of all steps so far, with a teacher's forward passes and those of the run that
    this one was branched from; None where what came before is not known."""
    kl: float | None = None
    """Divergence from the teacher in nats per token, unscaled; None in steps that ask none."""
    teacher_loss: float | None = None
    """The teacher's cross entropy on the batch, likewise."""
    acceptance: float | None = None
    """Sum of min(p, q) over the vocabulary, mean over the batch; None unless asked for."""
    mfu: float | None = None
    """Model FLOPs utilization, of the model in training alone: its teacher's FLOPs are not in it;
    None where the devices' peak is not known."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without what is not known."""
        return {name: value for name in _CHECKS if (value := getattr(self, name)) is not None}

    @staticmethod
    def parse(line: Any, before: Record | None = None) -> Record | None:
        """Read a line; None where a field is missing or of another type.

        Counts that equal those of ``before``, the record of the step before, are shared with it:
        in half a million steps of 24 layers they would be most of the memory.
        """
        if not isinstance(line, dict):
            return None
        if not all(check(line.get(name)) for name, check in _CHECKS.items()):
            return None
        if not _are_alike(line["live"], line["stored"]):
            return None
        values = {name: line[name] for name in _CHECKS if name in line}
        known = {"live": before.live, "stored": before.stored} if before else {}
        values |= {name: counts for name, counts in known.items() if counts == values[name]}
        return Record(**values)

    def is_of(self, model: ModelConfig) -> bool:
        """Tell whether ``model`` can have had these counts.

        Axes have as many entries as it has layers, or one, and no more units than it has; layers
        that are gone are 0 on every axis, and ``num_layers`` counts the others.
        """
        return all(_can_be_of(model, counts) for counts in (self.live, self.stored))

    def shape(self, model: ModelConfig) -> Shape:
        """Return the shape that ``model`` is stored in."""
        return shape_of(model, self.stored)


def shape_of(model: ModelConfig, counts: Counts) -> Shape:
    """Return the shape of ``model`` with these counts; axes without any are as in its config.

    Where only ``num_layers`` is counted, the first layers stand for those that are there.
    """
    return _shape(model, tuple((axis, tuple(each)) for axis, each in counts.items()))


@functools.lru_cache(maxsize=64)
def _shape(model: ModelConfig, counts: tuple[tuple[str, tuple[int, ...]], ...]) -> Shape:
    shape, numbers = Shape.full(model), _numbers(model, dict(counts))
    for axis, each in counts:
        if axis != "num_layers":
            shape = shape.with_counts(axis, each)
    return shape.with_layers(numbers)


def _numbers(model: ModelConfig, counts: Counts) -> Sequence[int]:
    """Return the numbers of the layers that are there."""
    for axis in LAYER_AXES:
        if axis in counts:
            return [number for number, count in enumerate(counts[axis]) if count]
    return range(counts.get("num_layers", [model.num_layers])[0])


@functools.lru_cache(maxsize=64)
def _full(model: ModelConfig) -> Shape:
    return Shape.full(model)


def _can_be_of(model: ModelConfig, counts: Counts) -> bool:
    full = _full(model)
    for axis, each in counts.items():
        of_full = full.counts(axis)
        if len(each) != len(of_full) or max(each) > of_full[0] or not any(each):
            return False
    rows = [[count > 0 for count in counts[axis]] for axis in LAYER_AXES if axis in counts]
    layers = counts.get("num_layers")
    return all(row == rows[0] for row in rows) and (
        not rows or layers is None or sum(rows[0]) == layers[0]
    )


def mean_count(counts: Sequence[int]) -> float:
    """Average the units of an axis over the layers that are there; 0 where none is."""
    there = [count for count in counts if count]
    return sum(there) / len(there) if there else 0.0


def is_word(value: Any) -> bool:
    """Tell whether a field is text."""
    return isinstance(value, str)


def is_measured(value: Any) -> bool:
    """Tell whether a field is a number; NaN and infinity are, as the loss of a failed step is."""
    return files.is_number(value, finite=False)


def is_amount(value: Any) -> bool:
    """Tell whether a field is a finite number and not negative."""
    return files.is_number(value) and value >= 0


def is_amount_or_none(value: Any) -> bool:
    """Tell whether a field is an amount, or None where that is not known."""
    return value is None or is_amount(value)


def is_measured_or_none(value: Any) -> bool:
    """Tell whether a field is a number, or None where nothing was measured."""
    return value is None or is_measured(value)


def are_counts(value: Any) -> bool:
    """Tell whether a field has units by axis: whole numbers, of one axis or more."""
    return isinstance(value, dict) and bool(value) and all(map(_are_of_axis, value.items()))


def _are_of_axis(item: tuple[str, Any]) -> bool:
    axis, each = item
    return (
        axis in AXES
        and type(each) is list
        and set(map(type, each)) == {int}
        and 0 <= min(each) <= max(each) < 1 << 53
    )


def _are_alike(live: Counts, stored: Counts) -> bool:
    return live.keys() == stored.keys() and all(len(live[a]) == len(stored[a]) for a in live)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "step": files.is_whole,
    "tokens": files.is_whole,
    "phase": is_word,
    "loss": is_measured,
    "lr": is_amount,
    "removed": lambda value: is_amount(value) and value <= 1,
    "live": are_counts,
    "stored": are_counts,
    "grad_norm": is_measured,
    "tokens_per_s": is_amount,
    "step_s": is_amount,
    "skipped": files.is_whole,
    "memory_bytes": is_amount_or_none,
    "flops": is_amount_or_none,
    "kl": is_measured_or_none,
    "teacher_loss": is_measured_or_none,
    "acceptance": is_measured_or_none,
    "mfu": is_amount_or_none,
}
