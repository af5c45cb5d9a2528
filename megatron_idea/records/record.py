"""One optimizer step, as a line of ``metrics.jsonl``. Lines may come from strangers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_idea import files
from megatron_idea.config import ModelConfig
from megatron_idea.shape import AXES, LAYER_AXES, Shape

Counts = Mapping[str, Sequence[int]]
"""By axis: units of every layer of the enlarged model, 0 where it is gone, or one number."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known at the end of a step."""

    step: int
    tokens: int
    """Consumed, this step's included."""
    phase: str
    loss: float
    """Training loss of the batch in nats per token; NaN or infinite where the step went wrong."""
    lr: float
    removed: float
    """Share of the removal that is done by schedule, in [0, 1]."""
    live: Counts
    """Units that are alive."""
    stored: Counts
    """Units in memory, live ones and such as are not yet cut away."""
    grad_norm: float
    """Before clipping."""
    tokens_per_s: float
    step_s: float
    skipped: int
    """Steps so far whose loss or gradient was not finite."""
    memory_bytes: float | None = None
    mfu: float | None = None
    """Model FLOPs utilization; None where the devices' peak is not known."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without what is not known."""
        return {name: value for name in _CHECKS if (value := getattr(self, name)) is not None}

    @staticmethod
    def parse(line: Any, before: Record | None = None) -> Record | None:
        """Read a line; None where it is no record, in which every field has its type.

        Counts are shared with the record ``before`` where they are equal: of half a million steps
        of 24 layers most of the memory would be these.
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
        """Tell whether the counts are those of as many layers as ``model`` has."""
        full = shape_of(model, {})
        return all(len(each) == len(full.counts(axis)) for axis, each in self.live.items())

    def shape(self, model: ModelConfig) -> Shape:
        """Return the stored shape of the model."""
        return shape_of(model, self.stored)


def shape_of(model: ModelConfig, counts: Counts) -> Shape:
    """Return the shape of ``model`` with these counts, and the enlarged model's elsewhere."""
    return _shape(model, tuple((axis, tuple(each)) for axis, each in counts.items()))


@functools.lru_cache(maxsize=64)
def _shape(model: ModelConfig, counts: tuple[tuple[str, tuple[int, ...]], ...]) -> Shape:
    full = Shape.full(model)
    shape, stored = full, dict(counts)
    for axis, each in stored.items():
        if axis != "num_layers":
            shape = shape.with_counts(axis, [max(1, count) for count in each])
    rows = zip(*(stored.get(axis, full.counts(axis)) for axis in LAYER_AXES), strict=True)
    return shape.with_layers(n for n, row in enumerate(rows) if all(row))


def is_word(value: Any) -> bool:
    """Tell whether a value of a record is text."""
    return isinstance(value, str)


def is_measured(value: Any) -> bool:
    """Tell whether it is a number; NaN or infinite is one, of a step that went wrong."""
    return files.is_number(value, finite=False)


def is_amount(value: Any) -> bool:
    """Tell whether it is a finite number that is not negative."""
    return files.is_number(value) and value >= 0


def is_amount_or_none(value: Any) -> bool:
    """Tell whether it is an amount, or not known."""
    return value is None or is_amount(value)


def are_counts(value: Any) -> bool:
    """Tell whether it has whole numbers for one axis or more."""
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
    "mfu": is_amount_or_none,
}
