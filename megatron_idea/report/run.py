"""A run folder, read, and its curves thinned to what a picture can show."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idea.config import Config, load
from megatron_idea.estimate import human_count, parameter_count
from megatron_idea.metrics import METRICS, read_events, read_metrics, read_scores

# Points of a curve: about as many as a wide chart has columns of pixels.
MOST_POINTS = 800


@dataclass(frozen=True)
class Run:
    """What a run recorded, finished or not."""

    run_dir: Path
    config: Config
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    @property
    def tokens(self) -> int:
        """Consumed so far."""
        return self.records[-1]["tokens"]

    @property
    def is_finished(self) -> bool:
        return self.tokens >= self.config.schedule.total_tokens

    @property
    def prunes(self) -> bool:
        return self.config.prune.strategy != "none"

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def evaluations(self) -> list[dict[str, Any]]:
        """Held-out losses in order of tokens; of two at one step the later, after compaction."""
        by_step = {event["step"]: event for event in self.of_kind("evaluated")}
        return [by_step[step] for step in sorted(by_step)]

    def compactions(self) -> list[dict[str, Any]]:
        """One event a compaction, also where a resume repeated it."""
        by_step = {event["step"]: event for event in self.of_kind("compacted")}
        return [by_step[step] for step in sorted(by_step)]

    def parameters(self, record: dict[str, Any]) -> str:
        return human_count(parameter_count(self.config.model, record["ffn_width"]).total)


def read_run(run_dir: Path) -> Run:
    """Read a run folder.

    Raises: ValueError when it is none, or when no step has been recorded yet.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(
            f"{run_dir} is not a run folder: it has no config.yaml; give the run_dir of a run"
        )
    records = read_metrics(run_dir)
    if not records:
        raise ValueError(f"{run_dir / METRICS} has no records: the run has not finished a step")
    return Run(
        run_dir,
        load(run_dir / "config.yaml"),
        records,
        read_events(run_dir),
        read_scores(run_dir),
        _read_samples(run_dir / "samples.jsonl"),
    )


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """Texts that the model wrote; a line that is not one is left out, it costs nobody a report."""
    samples = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            sample = json.loads(line)
        except ValueError:
            continue
        if isinstance(sample, dict) and "text" in sample:
            samples.append(sample)
    return samples


@dataclass(frozen=True)
class Curve:
    """A quantity over tokens in at most ``MOST_POINTS`` groups of neighbouring steps."""

    tokens: list[int]
    middle: list[float]
    low: list[float]
    high: list[float]
    is_thinned: bool
    """Groups have more than one step."""


def curve(
    run: Run,
    value: Callable[[dict[str, Any]], float],
    middle: Callable[[Sequence[float]], float] = statistics.fmean,
) -> Curve:
    """Thin a quantity of the records; values that are not finite are left out of their group."""
    thinned = Curve([], [], [], [], False)
    size = -(-len(run.records) // MOST_POINTS)
    # Groups are counted from the end: the curve ends where the run does.
    first = len(run.records) % size or size
    for end in range(first, len(run.records) + 1, size):
        group = run.records[max(0, end - size) : end]
        values = [v for v in map(value, group) if math.isfinite(v)]
        thinned.tokens.append(group[-1]["tokens"])
        thinned.middle.append(middle(values) if values else math.nan)
        thinned.low.append(min(values, default=math.nan))
        thinned.high.append(max(values, default=math.nan))
    return Curve(thinned.tokens, thinned.middle, thinned.low, thinned.high, size > 1)


def smooth(
    values: Sequence[float],
    middle: Callable[[Sequence[float]], float] = statistics.fmean,
) -> list[float]:
    """Centred running mean (or other middle) over about a thirtieth of the curve; skips gaps."""
    window = len(values) // 60
    result = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window) : i + window + 1] if math.isfinite(v)]
        result.append(middle(near) if near else math.nan)
    return result


def mean_of(key: str) -> Callable[[dict[str, Any]], float]:
    """The mean over layers of a recorded list."""
    return lambda record: statistics.fmean(record[key])


def number(key: str) -> Callable[[dict[str, Any]], float]:
    """A recorded number; a gap where it is missing."""

    def read(record: dict[str, Any]) -> float:
        value = record.get(key)
        return math.nan if value is None else float(value)

    return read


def spread(widths: Sequence[int]) -> str:
    """Widths of all layers in a few characters."""
    low, high = min(widths), max(widths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
