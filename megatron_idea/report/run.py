"""Read a run folder, and thin its curves to what a picture can show."""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idea.config import Config, load
from megatron_idea.errors import UserError
from megatron_idea.records.read import (
    EVENTS,
    METRICS,
    SAMPLES,
    SCORES,
    read_events,
    read_metrics,
    read_samples,
    read_scores,
)
from megatron_idea.records.readable import human_count
from megatron_idea.records.record import Record, mean_count
from megatron_idea.shape import AXES, LAYER_AXES, UNITS, Shape

# Points of a curve: about as many as a wide chart has columns of pixels.
MOST_POINTS = 800


# Compared by identity: what is worked out from a run is kept with it, see cost.
@dataclass(frozen=True, eq=False)
class Run:
    """Holds what a run recorded, finished or not."""

    run_dir: Path
    config: Config
    records: list[Record]
    events: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    broken: tuple[str, ...] = ()
    """Lines of its files that are no records, by file and number; they were left out."""

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return self.run_dir.resolve().name

    @property
    def tokens(self) -> int:
        """Return the tokens consumed so far."""
        return self.records[-1].tokens

    @property
    def is_finished(self) -> bool:
        """Tell whether all tokens of the schedule are consumed."""
        return self.tokens >= self.config.schedule.total_tokens

    @property
    def prunes(self) -> bool:
        """Tell whether the configuration prunes at all."""
        return self.config.prune.strategy != "none"

    @property
    def axes(self) -> list[str]:
        """List the axes that the run prunes."""
        return pruned_axes(self.config, self.records[-1])

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """List the events of a kind."""
        return [event for event in self.events if event["kind"] == kind]

    def evaluations(self) -> list[dict[str, Any]]:
        """List held-out losses in order of steps; of two at one step the later one."""
        by_step = {event["step"]: event for event in self.of_kind("evaluated")}
        return [by_step[step] for step in sorted(by_step)]

    def compactions(self) -> list[dict[str, Any]]:
        """List compactions in order of steps, one also where a resume repeated it."""
        by_step = {event["step"]: event for event in self.of_kind("compacted")}
        return [by_step[step] for step in sorted(by_step)]

    def removed_layers(self) -> list[dict[str, Any]]:
        """List why layers went, in order of steps, once for each layer."""
        by_layer = {event["layer"]: event for event in self.of_kind("layer_removed")}
        return sorted(by_layer.values(), key=lambda event: (event["step"], event["layer"]))

    def scores_of(self, axis: str) -> list[dict[str, Any]]:
        """List the score records of an axis, oldest first."""
        return [record for record in self.scores if record["axis"] == axis]

    @functools.cached_property
    def is_taught(self) -> bool:
        """Tell whether a teacher was asked in any step so far."""
        return any(record.kl is not None for record in self.records)

    def passed_teacher(self) -> tuple[dict[str, Any], float] | None:
        """Say since when the model knows better than its teacher, where both were measured.

        Returns: the evaluation from which on every held-out loss is below the teacher's, and that
        of the teacher; None where the last one is not.
        """
        teachers = [event for event in self.of_kind("teacher") if "val_loss" in event]
        if not teachers:
            return None
        its_loss, since = teachers[-1]["val_loss"], None
        for event in self.evaluations():
            if event["tokens"] <= teachers[-1]["tokens"] or not event["val_loss"] < its_loss:
                since = None
            elif since is None:
                since = event
        return (since, its_loss) if since else None

    def parameters(self, record: Record) -> str:
        """Count the parameters in memory after a step, in words: 2.03M."""
        model = self.config.model
        return human_count(record.shape(model).parameters(model).total)


def pruned_axes(config: Config, last: Record) -> list[str]:
    """List the axes that a run prunes or has pruned, of those that its records count."""
    full = Shape.full(config.model)

    def has_shrunk(axis: str) -> bool:
        return any(0 < count < full.counts(axis)[0] for count in last.live[axis])

    return [a for a in AXES if a in last.live and (a in config.goals or has_shrunk(a))]


def read_run(run_dir: Path) -> Run:
    """Read a run folder, or return what was read before if no file of it has changed.

    Raises: UserError when it is none, or when no step has been recorded yet.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} is not a run folder: it has no config.yaml; give the run_dir of a run"
        )
    paths = [run_dir / name for name in ("config.yaml", METRICS, EVENTS, SCORES, SAMPLES)]
    stats = [path.stat() for path in paths if path.is_file()]
    return _read_run(run_dir, tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


# A page and the table in the terminal are made one after the other: a run of half a million steps
# takes ten seconds to read.
@functools.lru_cache(maxsize=32)
def _read_run(run_dir: Path, _stamp: tuple[tuple[int, int], ...]) -> Run:
    broken: list[str] = []
    config = load(run_dir / "config.yaml")
    records = _in_order(read_metrics(run_dir, broken), config, broken)
    if not records:
        why = "the run has not finished a step"
        if broken:
            why = f"none of its {len(broken):,} lines is a record of this version"
        raise UserError(f"{run_dir / METRICS} has no records: {why}")
    return Run(
        run_dir,
        config,
        records,
        [
            event
            for event in read_events(run_dir, broken)
            if event.keys() >= _OF_EVENTS.get(event["kind"], set())
        ],
        _score_records(read_scores(run_dir, broken), config),
        [one for one in read_samples(run_dir, broken) if one["step"] <= records[-1].step],
        tuple(broken),
    )


# What is drawn of an event.
_OF_EVENTS = {
    "evaluated": {"step", "tokens", "val_loss"},
    "compacted": {"step", "tokens"},
    "teacher": {"step", "tokens"},
    "layer_removed": {"step", "tokens", "layer", "losses"},
}


def _in_order(records: Sequence[Record], config: Config, broken: list[str]) -> list[Record]:
    """Keep the records of this model that go forward; name the others in ``broken``."""
    kept: list[Record] = []
    step = tokens = 0
    last: Record | None = None
    for record in records:
        # Neighbours with equal counts share them, see Record.parse.
        same = last and record.live is last.live and record.stored is last.stored
        if (
            (same or record.is_of(config.model))
            and record.live.keys() == (last or record).live.keys()
            and record.step > step
            and record.tokens > tokens
        ):
            kept.append(record)
            step, tokens, last = record.step, record.tokens, record
        else:
            broken.append(f"{METRICS}, step {record.step}")
    return kept


def _score_records(records: Sequence[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    """Keep the score records of this model that go forward and have all that is drawn of them."""
    full = Shape.full(config.model)
    kept: list[dict[str, Any]] = []
    done = dict.fromkeys(AXES, -1)
    for record in records:
        if not record.keys() >= {"axis", "tokens", *_OF_SCORES}:
            continue
        axis, tokens = record["axis"], record["tokens"]
        rows = len(full.counts(axis))
        if (
            all(len(record[key]) == rows for key in _OF_SCORES)
            and all(row is None or len(row) == _QUANTILES for row in record["quantiles"])
            and tokens > done[axis]
        ):
            kept.append(record)
            done[axis] = tokens
    return kept


_OF_SCORES = ("quantiles", "cut", "rank_correlation")
_QUANTILES = 7


def labels(runs: Sequence[Run]) -> list[str]:
    """Name runs beside each other by what tells them apart.

    What all names begin or end with is left out where that is long: ``…lr1e-3…``. Folders of the
    same name get as many of their parents as it takes.
    """
    paths = [run.run_dir.resolve().parts for run in runs]
    names = _without_common([path[-1] for path in paths])
    for index, path in enumerate(paths):
        same = [other for other in paths if other[-1] == path[-1] and other != path]
        count = 0
        while any(other[-1 - count :] == path[-1 - count :] for other in same):
            count += 1
        names[index] = "/".join([*path[-1 - count : -1], names[index]])
    return names


# Characters that all names have in common, from which on they are left out.
LONG = 12


def _without_common(names: Sequence[str]) -> list[str]:
    """Cut names at separators only, and leave a word of each."""
    words = [re.split(r"(?<=[_.-])", name) for name in sorted(set(names))]
    room = min(map(len, words)) - 1
    same = [len(set(column)) == 1 for column in zip(*words, strict=False)]
    begin = next((i for i in range(room) if not same[i]), room)
    same = [len(set(column)) == 1 for column in zip(*(one[::-1] for one in words), strict=False)]
    end = next((i for i in range(room - begin) if not same[i]), room - begin)
    left = len("".join(words[0][:begin]))
    right = len("".join(words[0][len(words[0]) - end :]))
    if len(words) == 1 or left + right < LONG:
        return list(names)
    return [
        ("…" if left else "")
        + name[left : len(name) - right].rstrip("_.-")
        + ("…" if right else "")
        for name in names
    ]


@dataclass(frozen=True)
class Curve:
    """Holds a quantity over tokens, in at most ``MOST_POINTS`` groups of neighbouring steps."""

    tokens: list[int]
    middle: list[float]
    low: list[float]
    high: list[float]
    is_thinned: bool
    """Whether groups have more than one step."""


def curve(
    run: Run,
    value: Callable[[Record], float],
    middle: Callable[[Sequence[float]], float] = statistics.fmean,
) -> Curve:
    """Thin a quantity to a curve; values that are not finite are left out of their group."""
    thinned = Curve([], [], [], [], False)
    size = -(-len(run.records) // MOST_POINTS)
    # Groups are counted from the end: the curve ends where the run does.
    first = len(run.records) % size or size
    for end in range(first, len(run.records) + 1, size):
        group = run.records[max(0, end - size) : end]
        values = [v for v in map(value, group) if math.isfinite(v)]
        thinned.tokens.append(group[-1].tokens)
        thinned.middle.append(middle(values) if values else math.nan)
        thinned.low.append(min(values, default=math.nan))
        thinned.high.append(max(values, default=math.nan))
    return Curve(thinned.tokens, thinned.middle, thinned.low, thinned.high, size > 1)


def smooth(
    values: Sequence[float],
    middle: Callable[[Sequence[float]], float] = statistics.fmean,
    window: int | None = None,
) -> list[float]:
    """Return the centred running mean (or another ``middle``), gaps left out.

    ``window``: values on either side; by default about a thirtieth of the curve in all.
    """
    window = len(values) // 60 if window is None else window
    result = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window) : i + window + 1] if math.isfinite(v)]
        result.append(middle(near) if near else math.nan)
    return result


def mean_of(which: str, axis: str) -> Callable[[Record], float]:
    """Read the ``live`` or ``stored`` units of an axis, averaged over the layers that are there."""
    seen: list[Any] = [None, 0.0]

    def read(record: Record) -> float:
        counts = getattr(record, which)[axis]
        if counts is not seen[0]:  # neighbours share their lists, see Record.parse
            seen[:] = counts, mean_count(counts)
        return seen[1]

    return read


def number(field: str) -> Callable[[Record], float]:
    """Read a field; NaN, which leaves a gap, where it is not known."""

    def read(record: Record) -> float:
        value = getattr(record, field)
        return math.nan if value is None else float(value)

    return read


def named(axis: str) -> str:
    """Name what an axis counts: "neurons per layer", "channels"."""
    return f"{UNITS[axis]}s per layer" if axis in LAYER_AXES else f"{UNITS[axis]}s"
