"""Read the runs of a suite, and put their results together: by arm, and by pair within seeds."""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group
from rich.text import Text

from megatron_idea.compare.statistics import Interval, interval, verdict
from megatron_idea.compare.suite import ArmRun, Suite
from megatron_idea.config import LawConfig
from megatron_idea.errors import UserError
from megatron_idea.law import in_range, predict
from megatron_idea.records.record import Record, shape_of
from megatron_idea.records.terminal import table
from megatron_idea.report.cost import cost
from megatron_idea.report.run import Run, read_run
from megatron_idea.report.tables import environment_of
from megatron_idea.schedule import removal_window
from megatron_idea.shape import AXES, UNITS, Shape

EQUAL_FLOPS = 0.01
"""Arms whose FLOPs differ by no larger a share have equal FLOPs: tokens come in whole batches."""


@dataclass(frozen=True)
class Evaluation:
    """Holds a held-out loss and what was spent until then."""

    tokens: int
    flops: float
    """NaN where it is not known."""
    loss: float


@dataclass(frozen=True)
class RunResult:
    """Holds what a run has come to. What is None is not known, or the run has not finished."""

    finished: bool
    tokens: int
    """Consumed so far."""
    total_tokens: int
    loss: float | None = None
    """The last held-out loss, nats per token."""
    flops: float | None = None
    """Of training, a teacher's forward passes included."""
    wall_s: float | None = None
    """Of training steps."""
    parameters: int | None = None
    """Alive at the end: a unit that is zero counts for nothing, stored or not."""
    average_parameters: float | None = None
    """Alive, mean over consumed tokens."""
    shape: str = ""
    """Live units of the axes that have fewer than the suite's largest model."""
    rise: float | None = None
    """Highest held-out loss from the first removal on, minus the last one before."""
    evaluations: tuple[Evaluation, ...] = ()


@dataclass(frozen=True)
class ArmResult:
    """Holds what the finished runs of an arm show, at its best value of the sweep."""

    value: str
    swept: dict[str, float]
    """Mean loss at each value."""
    at_edge: bool
    """Whether the best value is an end of the sweep: a better one may lie beyond it."""
    seeds: list[int]
    loss: Interval
    tokens: float
    flops: float | None
    wall_s: Interval
    average_parameters: float
    parameters: list[int]
    shapes: list[str]
    rise: Interval | None


@dataclass(frozen=True)
class PairResult:
    """Holds how the left arm's loss differs from the right one's within the same seeds."""

    left: str
    right: str
    equal: str
    """``tokens``, ``FLOPs``, ``tokens and FLOPs`` or ``neither``."""
    tokens_ratio: float
    """Left to right."""
    flops_ratio: float | None
    difference: Interval
    """Left minus right, nats per token."""
    agree: int
    """Seeds whose difference has the mean's sign."""
    of: int
    verdict: str
    predicted: float | None
    """The difference that the configuration's scaling law predicts, nats per token, from recorded
    average parameters and tokens; None where the arms name different laws."""
    in_range: bool
    """Whether the law was fitted to sizes like those of both arms."""


@dataclass(frozen=True)
class Results:
    """Holds what a suite's runs show so far; arms and pairs without a finished run are left out."""

    suite: str
    """Name of the file."""
    reference: str
    seeds: list[int]
    sweep: str
    """The key that is swept; empty without a sweep."""
    device: str
    versions: dict[str, str]
    arms: dict[str, ArmResult]
    pairs: list[PairResult]
    runs: dict[str, dict[str, dict[int, RunResult]]]
    """By arm, value and seed."""


_Chosen = Mapping[str, Mapping[int, RunResult]]
"""The finished runs of each arm at its best value, by seed."""


@dataclass(frozen=True)
class Curve:
    """Holds an arm's held-out loss over its course: mean and extremes over seeds."""

    tokens: list[int]
    flops: list[float]
    """Mean over seeds; NaN where it is not known."""
    mean: list[float]
    low: list[float]
    high: list[float]


def collect(suite: Suite) -> Results:
    """Read the run folders of a suite. Missing and unfinished runs count for progress only."""
    runs: dict[str, dict[str, dict[int, RunResult]]] = {arm: {} for arm in suite.arms}
    last: dict[tuple[str, str, int], Shape] = {}
    environments = []
    for one in suite.runs:
        parts = _parts(one)
        found = _result(one, parts)
        if found.finished:
            last[one.arm, one.value, one.seed] = _live(parts[-1].run)
            environments.append(environment_of(parts[-1].run))
        runs[one.arm].setdefault(one.value, {})[one.seed] = found
    full = {Shape.full(one.config.model) for one in suite.runs}
    most = {axis: max(max(_counts(shape, axis)) for shape in full) for axis in AXES}
    for (arm, value, seed), shape in last.items():
        found = runs[arm][value][seed]
        runs[arm][value][seed] = dataclasses.replace(found, shape=_brief(shape, most))
    best = {arm: at for arm, values in runs.items() if (at := _best(values)) is not None}
    chosen: _Chosen = {arm: _finished(runs[arm][value]) for arm, value in best.items()}
    laws = {one.arm: one.config.law for one in suite.runs if best.get(one.arm) == one.value}
    pairs = [
        _pair(left, right, chosen, laws)
        for left, right in suite.pairs
        if chosen.get(left, {}).keys() & chosen.get(right, {}).keys()
    ]
    return Results(
        suite.path.name,
        suite.reference,
        list(suite.seeds),
        suite.sweep[0] if suite.sweep else "",
        _joined(found.get("device") for found in environments),
        {
            name: _joined(found.get("versions", {}).get(name) for found in environments)
            for name in dict.fromkeys(name for e in environments for name in e.get("versions", {}))
        },
        {arm: _arm(runs[arm], value, bool(suite.sweep)) for arm, value in best.items()},
        pairs,
        runs,
    )


def _joined(texts: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(text for text in texts if text))


# ---------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class _Part:
    """A run up to the tokens at which another one was branched from it, or all of it."""

    run: Run
    end: float = math.inf

    @property
    def records(self) -> Sequence[Record]:
        records = self.run.records
        return records[: bisect.bisect_right(records, self.end, key=lambda record: record.tokens)]


def _parts(one: ArmRun) -> list[_Part]:
    """Read a run and, before it, what it was branched from; nothing where a folder is missing."""
    try:
        run = read_run(Path(one.config.run_dir))
    except UserError:
        return []
    if one.source is None:
        return [_Part(run)]
    before = _parts(one.source)
    if not before:
        return []
    return [*(_Part(p.run, min(p.end, one.begins)) for p in before), _Part(run)]


def _result(one: ArmRun, parts: Sequence[_Part]) -> RunResult:
    total = one.config.schedule.total_tokens
    if not parts:
        return RunResult(False, 0, total)
    run, evaluations = parts[-1].run, _evaluations(parts)
    is_done = run.is_finished and run.tokens >= total
    if not (is_done and evaluations and evaluations[-1].tokens >= run.tokens):
        return RunResult(False, run.tokens, total)
    flops = evaluations[-1].flops
    return RunResult(
        True,
        run.tokens,
        total,
        evaluations[-1].loss,
        flops if math.isfinite(flops) else None,
        math.fsum(record.step_s for part in parts for record in part.records),
        _live(run).parameters(run.config.model).total,
        _average_parameters(parts),
        rise=_rise(run, evaluations),
        evaluations=tuple(evaluations),
    )


def _evaluations(parts: Sequence[_Part]) -> list[Evaluation]:
    """List the held-out losses since the beginning; of two at the same tokens the later one."""
    losses = {
        event["tokens"]: event["val_loss"]
        for part in parts
        for event in part.run.evaluations()
        if event["tokens"] <= part.end
    }
    tokens, flops = _flops(parts)
    return [
        Evaluation(at, flops[bisect.bisect_right(tokens, at) - 1], losses[at])
        for at in sorted(losses)
    ]


def _flops(parts: Sequence[_Part]) -> tuple[list[int], list[float]]:
    """Count the training FLOPs at the start and up to each record, which says it or its shape."""
    # What a checkpoint from outside of the suite has cost is known to the records alone.
    tokens, flops = [0], [math.nan if parts[0].run.of_kind("branched") else 0.0]
    for part in parts:
        sums, before = cost(part.run), flops[-1]
        for record, own, teacher in zip(part.records, sums.this_run, sums.teacher, strict=False):
            tokens.append(record.tokens)
            flops.append(before + own + teacher if record.flops is None else record.flops)
    return tokens, flops


def _live(run: Run) -> Shape:
    return shape_of(run.config.model, run.records[-1].live)


def _average_parameters(parts: Sequence[_Part]) -> float:
    """Average what is alive over tokens; a step runs in the shape that the step before it left."""
    first = parts[0].run
    begin = done = first.records[0].tokens - first.config.batch_tokens
    live, total = None, 0.0
    for part in parts:
        model = part.run.config.model
        for record in part.records:
            if live is None:
                live = record.live
                size = shape_of(model, live).parameters(model).total
            total += (record.tokens - done) * size
            done = record.tokens
            if record.live is not live:  # neighbours share their counts, see Record.parse
                live = record.live
                size = shape_of(model, live).parameters(model).total
    return total / (done - begin)


def _rise(run: Run, evaluations: Sequence[Evaluation]) -> float | None:
    """Subtract the last loss before the removal from the highest one since; None if not known."""
    if not run.prunes or not run.config.evaluation.every_tokens:
        return None
    begin, _ = removal_window(run.config.schedule)
    before = [one.loss for one in evaluations if one.tokens < begin]
    after = [one.loss for one in evaluations if one.tokens >= begin]
    return max(after) - before[-1] if before and after else None


def _counts(shape: Shape, axis: str) -> tuple[int, ...]:
    return (shape.num_layers,) if axis == "num_layers" else shape.counts(axis)


def _brief(shape: Shape, most: Mapping[str, int]) -> str:
    """Write the units of the axes that have fewer than the largest model of the suite.

    Returns: ``74 neurons, 2 layers``; ``90 71 64 71 neurons`` where the layers differ.
    """
    parts = []
    for axis in AXES:
        counts = _counts(shape, axis)
        if set(counts) != {most[axis]}:
            shown = counts if len(set(counts)) > 1 else counts[:1]
            many = "" if shown == (1,) else "s"
            parts.append(f"{' '.join(map(str, shown))} {UNITS[axis]}{many}")
    return ", ".join(parts)


# --------------------------------------------------------------------------------- arms and pairs


def _finished(of_seed: Mapping[int, RunResult]) -> dict[int, RunResult]:
    return {seed: found for seed, found in of_seed.items() if found.finished}


def _column(of_seed: Mapping[int, RunResult], name: str) -> list[Any]:
    """List a field of the finished runs, in order of seeds, without what is not known."""
    values = [getattr(found, name) for found in _finished(of_seed).values()]
    return [value for value in values if value is not None]


def _mean(losses: Sequence[float]) -> float:
    """Average losses; infinite where one is not finite, so that it is never the lowest."""
    return statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf


def _best(values: Mapping[str, Mapping[int, RunResult]]) -> str | None:
    """Choose the value of the lowest mean loss among those with the most finished seeds."""
    losses = {value: _column(of_seed, "loss") for value, of_seed in values.items()}
    done = [value for value, each in losses.items() if each]
    return min(done, key=lambda v: (-len(losses[v]), _mean(losses[v])), default=None)


def _arm(values: Mapping[str, Mapping[int, RunResult]], best: str, swept: bool) -> ArmResult:
    found, losses = values[best], {value: _column(each, "loss") for value, each in values.items()}
    seeds = list(_finished(found))

    flops, rises = _column(found, "flops"), _column(found, "rise")
    return ArmResult(
        best,
        {value: _mean(each) for value, each in losses.items() if swept and each},
        best in _edges(values),
        seeds,
        interval(losses[best]),
        statistics.fmean(_column(found, "tokens")),
        statistics.fmean(flops) if len(flops) == len(seeds) else None,
        interval(_column(found, "wall_s")),
        statistics.fmean(_column(found, "average_parameters")),
        _column(found, "parameters"),
        _column(found, "shape"),
        interval(rises) if len(rises) == len(seeds) else None,
    )


def _edges(values: Iterable[str]) -> list[str]:
    """Return the least and the largest value of a sweep, as in ``lr=0.01``; none of words."""
    numbers: dict[str, float] = {}
    for value in values:
        try:
            numbers[value] = float(value.partition("=")[2])
        except ValueError:
            return []
    return [min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)]


def _pair(left: str, right: str, chosen: _Chosen, laws: Mapping[str, LawConfig]) -> PairResult:
    """Hold an arm against another one in the seeds that both have finished, one or more."""
    shared = [seed for seed in chosen[left] if seed in chosen[right]]

    def both(name: str) -> list[list[Any]]:
        return [[getattr(chosen[arm][seed], name) for seed in shared] for arm in (left, right)]

    losses, tokens, flops = zip(*both("loss"), strict=True), both("tokens"), both("flops")
    known = None not in flops[0] + flops[1]
    flops_ratio = sum(flops[0]) / sum(flops[1]) if known else None
    same = {
        "tokens": tokens[0] == tokens[1],
        "FLOPs": flops_ratio is not None and abs(flops_ratio - 1) <= EQUAL_FLOPS,
    }
    difference = interval([ours - theirs for ours, theirs in losses])
    averages = map(statistics.fmean, both("average_parameters"))
    sizes = list(zip(averages, map(statistics.fmean, tokens), strict=True))
    predicted, valid = _predicted((laws[left], laws[right]), sizes)
    return PairResult(
        left,
        right,
        " and ".join(name for name, is_so in same.items() if is_so) or "neither",
        sum(tokens[0]) / sum(tokens[1]),
        flops_ratio,
        difference,
        sum(_sign(value) == _sign(difference.mean) for value in difference.values),
        len(shared),
        verdict(difference),
        predicted,
        valid,
    )


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _predicted(
    laws: tuple[LawConfig, LawConfig], sizes: Sequence[tuple[float, float]]
) -> tuple[float | None, bool]:
    """Predict the difference of two arms' losses; None where they name different laws.

    Args:
        sizes: of each arm average parameters and tokens, as recorded: what came before a branch is
            not in its own plan.
    """
    if laws[0] != laws[1]:
        return None, False
    ours, theirs = (predict(laws[0], *size) for size in sizes)
    return ours - theirs, all(in_range(laws[0], *size) for size in sizes)


# ------------------------------------------------------------------------------------- what is made


def curves(results: Results) -> dict[str, Curve]:
    """Average each arm's held-out losses over its seeds, where all of them were evaluated."""
    return {
        arm: _curve(list(_finished(results.runs[arm][found.value]).values()))
        for arm, found in results.arms.items()
    }


def _curve(runs: Sequence[RunResult]) -> Curve:
    each = [{one.tokens: one for one in run.evaluations} for run in runs]
    tokens = sorted(set.intersection(*map(set, each)))
    rows = [[by_tokens[at] for by_tokens in each] for at in tokens]
    losses = [[one.loss for one in row] for row in rows]
    return Curve(
        tokens,
        [statistics.fmean(one.flops for one in row) for row in rows],
        [statistics.fmean(row) for row in losses],
        [min(row) for row in losses],
        [max(row) for row in losses],
    )


def as_json(results: Results) -> dict[str, Any]:
    """Return plain values; what is not finite is None. Curves are not in it."""
    return _plain(results)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names if name != "evaluations"}
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


FEW_POINTS = 6
NARROW = 3.0
"""Largest to smallest size, or tokens, below which a fit says little about other ones."""


def fit(results: Results) -> Group:
    """Fit a scaling law to the arms, a point each: means over seeds, at the best value of a sweep.

    Returns: for a terminal, the section ``law`` of a configuration, what it misses of each arm,
        and warnings where the points are few or close to each other.
    Raises: UserError where they are too few to fit.
    """
    from megatron_idea.planning.law import Point
    from megatron_idea.planning.law import fit as fit_law

    points = {
        arm: Point(found.average_parameters, found.tokens, found.loss.mean)
        for arm, found in results.arms.items()
        if math.isfinite(found.loss.mean)
    }
    fitted = fit_law(list(points.values()))
    rows = [
        (
            arm,
            f"{point.parameters:,.0f}",
            f"{point.tokens:,.0f}",
            f"{point.loss:.4f}",
            f"{point.loss - predict(fitted, point.parameters, point.tokens):+.4f}",
        )
        for arm, point in points.items()
    ]
    doubts = []
    if len(points) < FEW_POINTS:
        doubts.append(f"{len(points)} points for the law's five numbers: at least {FEW_POINTS}")
    for name in ("parameters", "tokens"):
        sizes = [getattr(point, name) for point in points.values()]
        if max(sizes) < NARROW * min(sizes):
            doubts.append(
                f"{name} span a factor of {max(sizes) / min(sizes):.2f}: at least {NARROW:g}"
            )
    section = yaml.safe_dump({"law": dataclasses.asdict(fitted)}, sort_keys=False)
    return Group(
        Text(section),
        table(("arm", "average parameters", "tokens", "loss", "measured - fitted"), rows),
        *(
            Text(f"warning: {doubt} would be needed to trust it", style="yellow")
            for doubt in doubts
        ),
    )
