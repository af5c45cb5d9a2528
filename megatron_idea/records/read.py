"""Read a run's records: one JSON object a line. Files may come from strangers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_idea import files
from megatron_idea.errors import UserError
from megatron_idea.records.record import (
    Record,
    are_counts,
    is_amount,
    is_amount_or_none,
    is_measured,
    is_word,
)
from megatron_idea.shape import AXES

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SCORES = "scores.jsonl"
SAMPLES = "samples.jsonl"

T = TypeVar("T")


class Reader(Generic[T]):
    """Iterates over the records of a JSONL file, and the next time over those added since.

    A last line without its line feed is left for the next time: it is being written, or a kill cut
    it short.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[Any, T | None], T | None],
        broken: list[str] | None = None,
    ) -> None:
        """Begin at the start of the file, which need not exist yet.

        Args:
            parse: makes a record from a line's JSON and the record before; None if it is none.
            broken: gets the name of each line that is no record; None: such a line raises
                UserError.
        """
        self.end = 0
        """Bytes of the file that have been read."""
        self._path = path
        self._parse = parse
        self._broken = broken
        self._lines = 0
        self._last: T | None = None

    def __iter__(self) -> Iterator[T]:
        if not self._path.is_file():
            return
        with open(self._path, "rb") as file:
            file.seek(self.end)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.end += len(line)
                self._lines += 1
                record = self._read(line)
                if record is not None:
                    self._last = record
                    yield record

    def begins_again(self) -> bool:
        """Go back to the start if the file was cut, as a resumed run does; say whether it was."""
        size = self._path.stat().st_size if self._path.is_file() else 0
        was_cut = size < self.end
        if was_cut:
            self.end = self._lines = 0
        return was_cut

    def _read(self, line: bytes) -> T | None:
        what = "a record of this version"
        record = None
        try:
            record = self._parse(json.loads(line), self._last)
        except (ValueError, RecursionError):
            what = "JSON"
        if record is None and self._broken is None:
            raise UserError(f"{self._path}, line {self._lines} is not {what}; remove that line")
        if record is None and self._broken is not None:
            self._broken.append(f"{self._path.name}, line {self._lines}")
        return record


def metrics_of(run_dir: Path, broken: list[str] | None = None) -> Reader[Record]:
    """Open the records of a run's steps; ``broken`` as for a ``Reader``."""
    return Reader(run_dir / METRICS, Record.parse, broken)


def lines_of(run_dir: Path, name: str, broken: list[str] | None = None) -> Reader[dict[str, Any]]:
    """Open the events, scores or samples of a run; ``broken`` as for a ``Reader``."""

    def parse(line: Any, _before: dict[str, Any] | None) -> dict[str, Any] | None:
        return line if _is_sound(name, line) else None

    return Reader(run_dir / name, parse, broken)


def read_metrics(run_dir: Path, broken: list[str] | None = None) -> list[Record]:
    """Read the records of a run's steps, oldest first; ``broken`` as for a ``Reader``."""
    return list(metrics_of(run_dir, broken))


def read_scores(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the score records of a run, oldest first: one an axis and recorded plan."""
    return list(lines_of(run_dir, SCORES, broken))


def read_samples(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the texts that a run's model generated, oldest first."""
    return list(lines_of(run_dir, SAMPLES, broken))


def read_events(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the events of a run, oldest first.

    Those of steps that a resumed run ran again are left out; the file itself keeps them.
    """
    events: list[dict[str, Any]] = []
    for event in lines_of(run_dir, EVENTS, broken):
        if event["kind"] in ("started", "resumed") and "step" in event:
            events = [earlier for earlier in events if earlier.get("step", 0) <= event["step"]]
        events.append(event)
    return events


def _rows_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Check a list with an entry a row, None where there is no value."""
    return lambda rows: (
        type(rows) is list and bool(rows) and all(row is None or check(row) for row in rows)
    )


def _are_quantiles(values: Any) -> bool:
    return type(values) is list and bool(values) and all(map(is_measured, values))


def _are_losses(value: Any) -> bool:
    """Check losses by number of layer; JSON writes numbers that name something as text."""
    return isinstance(value, dict) and all(
        number.isascii() and number.isdigit() and len(number) < 10 and is_measured(loss)
        for number, loss in value.items()
    )


def _is_environment(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("versions"), dict)
        and all(map(is_word, value["versions"].values()))
        and is_word(value.get("device"))
        and files.is_whole(value.get("processes"))
        and files.is_whole(value.get("threads"))
    )


# What every line of a file has, whatever else it has: a line without it is no record.
_NEEDED = {EVENTS: {"kind"}, SCORES: {"step"}, SAMPLES: {"step"}}

# What the fields that somebody reads hold, in whichever file they are.
_TYPES: dict[str, Callable[[Any], bool]] = (
    dict.fromkeys(
        (
            "step",
            "tokens",
            "scored_tokens",
            "skipped",
            "from_step",
            "skipped_samples",
            "moved_units",
            "moved_layers",
            "layer",
        ),
        files.is_whole,
    )
    | dict.fromkeys(("loss", "val_loss", "average"), is_measured)
    | dict.fromkeys(("time", "seconds", "waited_s"), is_amount)
    | dict.fromkeys(
        ("kind", "why", "path", "reason", "prompt", "text", "source", "was", "now"), is_word
    )
    | dict.fromkeys(("before", "after"), are_counts)
    | {
        "peak_bytes": is_amount_or_none,
        "name": lambda value: value is None or is_word(value),
        "environment": _is_environment,
        "losses": _are_losses,
        "axis": lambda value: is_word(value) and value in AXES,
        "quantiles": _rows_of(_are_quantiles),
        "cut": _rows_of(is_measured),
        "rank_correlation": _rows_of(files.is_number),
    }
)


def _is_sound(name: str, line: Any) -> bool:
    return (
        isinstance(line, dict)
        and line.keys() >= _NEEDED[name]
        and all(_TYPES[key](value) for key, value in line.items() if key in _TYPES)
    )
