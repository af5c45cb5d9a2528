"""Read a run's records: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_idea import files
from megatron_idea.errors import UserError

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SCORES = "scores.jsonl"
SAMPLES = "samples.jsonl"


# Of these readers: ``broken`` takes the names of lines that are no record, for those who look at a
# run; without it such a line raises UserError. A last line that a kill cut short is left out.


def read_scores(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the score records of a run, oldest first; none where nothing was pruned."""
    return [record for record, _ in _lines(run_dir / SCORES, broken)]


def read_samples(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read what a run's model wrote, oldest first: ``step``, ``tokens``, ``prompt``, ``text``."""
    return [record for record, _ in _lines(run_dir / SAMPLES, broken)]


def read_metrics(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the records of a run, oldest first.

    Neighbours with equal widths share the list: of half a million steps of 24 layers most of the
    memory would be these.
    """
    records = []
    last: dict[str, Any] = {}
    for record, _ in _lines(run_dir / METRICS, broken):
        for key in ("ffn_live", "ffn_width"):
            if key in record:
                if record[key] == last.get(key):
                    record[key] = last[key]
                last[key] = record[key]
        records.append(record)
    return records


def read_events(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the events that belong to the run as it stands, oldest first.

    What a killed process did after the step from which the next one resumed is left out; the file
    itself keeps everything.
    """
    events: list[dict[str, Any]] = []
    for event, _ in _lines(run_dir / EVENTS, broken):
        if event["kind"] in ("started", "resumed") and "step" in event:
            events = [earlier for earlier in events if earlier.get("step", 0) <= event["step"]]
        events.append(event)
    return events


# What every record of a file has, whatever else it has: a line without them is no record.
FIELDS = {METRICS: {"step", "tokens"}, EVENTS: {"kind"}, SCORES: {"step"}, SAMPLES: {"step"}}


def _is_word(value: Any) -> bool:
    return isinstance(value, str)


def _is_measured(value: Any) -> bool:
    """Of a step that went wrong it is NaN or infinite."""
    return files.is_number(value, finite=False)


def _is_amount(value: Any) -> bool:
    return files.is_number(value) and value >= 0


def _are_widths(values: Any) -> bool:
    return (
        type(values) is list
        and set(map(type, values)) == {int}
        and min(values) >= 0
        and max(values) < 1 << 53
    )


def _are_scores(values: Any) -> bool:
    return type(values) is list and bool(values) and all(map(_is_measured, values))


def _are_of_layers(values: Any) -> bool:
    return type(values) is list and bool(values) and all(map(_are_scores, values))


def _are_correlations(values: Any) -> bool:
    return type(values) is list and all(v is None or files.is_number(v) for v in values)


def _is_environment(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("versions"), dict)
        and all(map(_is_word, value["versions"].values()))
        and _is_word(value.get("device"))
        and files.is_whole(value.get("processes"))
        and files.is_whole(value.get("threads"))
    )


# What the fields that somebody reads hold, in whichever file they are.
TYPES: dict[str, Callable[[Any], bool]] = (
    dict.fromkeys(
        ("step", "tokens", "skipped", "from_step", "skipped_samples", "moved_neurons"),
        files.is_whole,
    )
    | dict.fromkeys(("loss", "grad_norm", "val_loss", "average"), _is_measured)
    | dict.fromkeys(
        ("lr", "keep_ratio", "tokens_per_s", "step_s", "time", "seconds", "waited_s"), _is_amount
    )
    | dict.fromkeys(
        ("memory_bytes", "mfu", "peak_bytes"), lambda value: value is None or _is_amount(value)
    )
    | dict.fromkeys(("phase", "kind", "why", "path", "reason", "prompt", "text"), _is_word)
    | dict.fromkeys(("ffn_live", "ffn_width", "widths_before", "widths_after"), _are_widths)
    | {
        "name": lambda value: value is None or _is_word(value),
        "environment": _is_environment,
        "quantiles": _are_of_layers,
        "cut": _are_scores,
        "rank_correlation": _are_correlations,
    }
)


def is_record(name: str, record: Any) -> bool:
    """Whether a line of the file ``name`` is one of its records, every field of its type."""
    return (
        isinstance(record, dict)
        and record.keys() >= FIELDS[name]
        and all(TYPES[key](value) for key, value in record.items() if key in TYPES)
    )


def _lines(path: Path, broken: list[str] | None = None) -> Iterator[tuple[dict[str, Any], int]]:
    """Each record of a JSONL file, with the byte offset of its end."""
    if not path.is_file():
        return
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # the writer was killed in the middle of this line
            end += len(line)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if broken is None:
                    message = f"{path}, line {number} is not JSON; remove that line"
                    raise UserError(message) from error
                record = None
            if is_record(path.name, record):
                yield record, end
            elif broken is None:
                raise UserError(f"{path}, line {number} is not a record; remove that line")
            else:
                broken.append(f"{path.name}, line {number}")
