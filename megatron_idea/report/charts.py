"""Make the charts of one run, or of several in the same charts, from what they recorded."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from megatron_idea.records.readable import scaled
from megatron_idea.records.record import Record
from megatron_idea.report.chart import (
    Axis,
    Band,
    Chart,
    Figure,
    HeatMap,
    Series,
    colours_of,
    fitted,
    tokens_axis,
)
from megatron_idea.report.cost import cost
from megatron_idea.report.run import (
    MOST_POINTS,
    Run,
    curve,
    labels,
    mean_of,
    named,
    number,
    smooth,
)
from megatron_idea.schedule import distillation_share, phase_ends
from megatron_idea.shape import AXES, LAYER_AXES, UNITS

# Of a heat map: about as many as it has pixels on a phone, and half as many as on a desk.
MOST_COLUMNS = 400

# Layers whose scores are drawn one by one; of more, as many spread evenly over the depth.
MOST_LAYERS = 8

# From so many evaluations on their points hide curves and each other.
MANY = 60


def overview(runs: Sequence[Run]) -> list[Chart]:
    """Draw loss, the two schedules, live and stored units of each axis, and speed."""
    return list(_overview(tuple(runs)))


def details(runs: Sequence[Run]) -> list[Chart]:
    """Draw what a teacher says, cost, step time, utilization, memory and gradients.

    What was not recorded is left out.
    """
    return list(_details(tuple(runs)))


# Each is asked for twice: for the page and for the picture.
@functools.lru_cache(maxsize=4)
def _overview(runs: tuple[Run, ...]) -> list[Chart]:
    axes = dict.fromkeys(axis for run in runs for axis in run.axes)
    return [loss(runs), schedules(runs), *(units(runs, axis) for axis in axes), speed(runs)]


@functools.lru_cache(maxsize=4)
def _details(runs: tuple[Run, ...]) -> list[Chart]:
    taught = any(run.is_taught for run in runs)
    charts = [student_and_teacher(runs), divergence(runs)] if taught else []
    charts += [costs(runs), step_time(runs), utilization(runs), memory(runs), gradients(runs)]
    return [chart for chart in charts if chart.series]


def layers(run: Run) -> list[Figure]:
    """Draw what differs between layers: units, and how stable the rankings are."""
    axes = [axis for axis in run.axes if axis in LAYER_AXES]
    if not axes and "num_layers" in run.axes:  # any of them shows which layers went
        axes = [axis for axis in LAYER_AXES if axis in run.records[0].live][:1]
    figures: list[Figure | None] = [units_map(run, axis) for axis in axes]
    for axis in _scored(run):
        figures += [churn_map(run, axis), churn(run, axis)]
    return [figure for figure in figures if figure]


def _each(runs: Sequence[Run], alone: str) -> list[tuple[Run, str, int | None]]:
    """Pair every run with its colour and its number; one alone has none."""
    if len(runs) == 1:
        return [(runs[0], alone, None)]
    return list(zip(runs, colours_of(len(runs)), range(len(runs)), strict=True))


def _chart(
    runs: Sequence[Run],
    slug: str,
    title: str,
    note: str,
    y: Axis,
    series: Sequence[Series],
    **more: Any,
) -> Chart:
    """Make a chart over the tokens of all runs, with phases where the runs have the same ones."""
    x = tokens_axis(0, max(run.tokens for run in runs))
    marks = [event["tokens"] for event in runs[0].compactions()] if len(runs) == 1 else []
    names = labels(runs) if len(runs) > 1 else []
    return Chart(
        slug, title, note, x, y, series,
        phases=_phases(runs, x.high), marks=marks, runs=names, **more,
    )  # fmt: skip


def _phases(runs: Sequence[Run], last: float) -> list[tuple[str, float, float]]:
    """List name, first and last token of the phases that were begun."""
    ends = [phase_ends(run.config.schedule) for run in runs]
    if not all(run.prunes for run in runs) or any(other != ends[0] for other in ends):
        return []
    phases = []
    begin = 0.0
    for name, end in ends[0].items():
        if begin < min(end, last):
            phases.append((name, begin, min(float(end), last)))
            begin = float(end)
    return phases


def _measured(
    runs: Sequence[Run],
    value: Callable[[Record], float],
    middle: Callable[[Sequence[float]], float],
    name: str,
    colour: str = "blue",
) -> tuple[list[Series], list[Band], list[float]]:
    """Smooth a noisy quantity; with one run also draw every step of it, faintly.

    Returns: series, bands and the smoothed values.
    """
    series: list[Series] = []
    bands: list[Band] = []
    values: list[float] = []
    longest = max(run.tokens for run in runs)
    for run, shade, place in _each(runs, colour):
        points = curve(run, value, middle)
        if not any(map(math.isfinite, points.middle)):
            continue
        # Over the same tokens in every run: else the shorter one looks the noisier one.
        window = min(round(longest * len(points.tokens) / run.tokens), 6 * len(points.tokens)) // 60
        smoothed = smooth(points.middle, middle, window)
        if len(runs) == 1 and points.is_thinned:
            bands.append(Band(points.tokens, points.low, points.high, shade, "range of steps"))
        elif len(runs) == 1:
            series.append(Series("each step", points.tokens, points.middle, shade, "thin"))
        series.append(Series(name, points.tokens, smoothed, shade, run=place))
        values += [v for v in smoothed if math.isfinite(v)]
    return series, bands, values


def loss(runs: Sequence[Run]) -> Chart:
    """Draw the training loss and the held-out loss."""
    series, bands, smoothed = _measured(
        runs, number("loss"), statistics.fmean, "training, smoothed"
    )
    held_out = [
        Series(
            "held-out",
            [event["tokens"] for event in run.evaluations()],
            [event["val_loss"] for event in run.evaluations()],
            "orange" if len(runs) == 1 else colour,
            "points" if len(run.evaluations()) <= MANY else "specks",
            run=place,
        )
        for run, colour, place in _each(runs, "blue")
        if run.evaluations()
    ]
    scatter = [v for band in bands for v in band.low]
    scatter += [v for one in series if one.style == "thin" for v in one.y]
    y = loss_axis(smoothed, [v for points in held_out for v in points.y], scatter)
    shown = [points for one in held_out if (points := _below(one, y.high)).x]
    return _chart(
        runs,
        "loss",
        "Loss",
        "Training loss, and held-out loss where it was measured. The first fall is cut off.",
        y,
        [*series, *shown],
        bands=bands,
        is_wide=True,
    )


def loss_axis(
    smoothed: Sequence[float], held_out: Sequence[float], scatter: Sequence[float]
) -> Axis:
    """Fit the axis to where most steps are: the fall from ln(vocab) would flatten all others.

    ``scatter``: losses of single steps; all but the lowest fiftieth are to be seen.
    """
    held_out = [v for v in held_out if math.isfinite(v)]
    scatter = sorted(v for v in scatter if math.isfinite(v))
    ordered = sorted(smoothed)
    if not ordered:
        return fitted("loss (nats per token)", held_out)
    low = min([ordered[0], *held_out, *scatter[len(scatter) // 50 :][:1]])
    high = ordered[int(0.92 * (len(ordered) - 1))]
    span = max(high - low, 0.02)
    return Axis("loss (nats per token)", low - 0.05 * span, high + 0.25 * span)


def _below(points: Series, high: float) -> Series:
    kept = [(x, y) for x, y in zip(points.x, points.y, strict=True) if y <= high]
    return dataclasses.replace(points, x=[x for x, _ in kept], y=[y for _, y in kept])


def student_and_teacher(runs: Sequence[Run]) -> Chart:
    """Draw both models' cross entropy on the batches of the steps that asked the teacher."""

    def student(record: Record) -> float:
        return math.nan if record.kl is None else record.loss

    series = []
    for run, colour, place in _each(runs, "blue"):
        if not run.is_taught:
            continue
        other = "orange" if place is None else colour
        for name, value, shade, style in (
            ("student", student, colour, "line"),
            ("teacher", number("teacher_loss"), other, "dashed"),
        ):
            points = curve(run, value)
            series.append(
                Series(name, points.tokens, smooth(points.middle), shade, style, run=place)
            )
    return _chart(
        runs,
        "teacher",
        "Student and teacher",
        "Cross entropy of both on the same batches, smoothed. Where the student's is the lower one "
        "the teacher holds it back.",
        loss_axis([v for one in series for v in one.y if math.isfinite(v)], [], []),
        series,
    )


def divergence(runs: Sequence[Run]) -> Chart:
    """Draw the divergence from the teacher, its share of the loss, and acceptance if recorded."""
    series, bands, values = _measured(runs, number("kl"), statistics.fmean, "KL, smoothed")
    shares = []
    for run, colour, place in _each(runs, "blue"):
        if not run.is_taught:
            continue
        config, other = run.config, "orange" if place is None else colour
        tokens = curve(run, number("kl")).tokens
        alpha = [distillation_share(config.schedule, config.distill, at) for at in tokens]
        shares.append(Series("alpha", tokens, alpha, other, "dashed", True, run=place))
        accepted = curve(run, number("acceptance"))
        if any(map(math.isfinite, accepted.middle)):
            other = "green" if place is None else colour
            smoothed = smooth(accepted.middle)
            shares.append(
                Series("acceptance", accepted.tokens, smoothed, other, "dotted", True, run=place)
            )
    return _chart(
        runs,
        "kl",
        "Divergence from the teacher",
        "KL divergence at distill.temperature, not scaled by its share of the loss, alpha."
        + (
            " Acceptance: how often the teacher accepts a token that the student drafts."
            if any(one.name == "acceptance" for one in shares)
            else ""
        ),
        fitted("KL (nats per token)", values, headroom=0.15),
        [*series, *shares],
        bands=bands,
        right=Axis("share", 0.0, 1.08),
    )


def schedules(runs: Sequence[Run]) -> Chart:
    """Draw the learning rate and the share of the removal that is done."""
    rates, shares = [], []
    for run, colour, place in _each(runs, "blue"):
        lr, gone = curve(run, number("lr")), curve(run, number("removed"))
        other = "orange" if len(runs) == 1 else colour
        rates.append(Series("learning rate", lr.tokens, lr.middle, colour, run=place))
        shares.append(Series("removed", gone.tokens, gone.middle, other, "dashed", True, run=place))
    highest = max(value for series in rates for value in series.y)
    return _chart(
        runs,
        "schedules",
        "Learning rate and removal",
        "One learning-rate curve over all tokens, and the share of the removal that is done.",
        Axis("learning rate", 0.0, 1.08 * (highest or 1.0), "scientific"),
        [*rates, *shares],
        right=Axis("share removed", 0.0, 1.08),
    )


def units(runs: Sequence[Run], axis: str) -> Chart:
    """Draw the units of an axis that are alive, and those in memory."""
    series: list[Series] = []
    bands: list[Band] = []
    alone = len(runs) == 1
    for run, colour, place in _each(runs, "green"):
        if axis not in run.records[0].live:
            continue
        stored, live = curve(run, mean_of("stored", axis)), curve(run, mean_of("live", axis))
        bold, other, style = ("steps", "orange", "line") if alone else ("count", colour, "dashed")
        series.append(Series("stored", stored.tokens, stored.middle, colour, bold, run=place))
        series.append(Series("live", live.tokens, live.middle, other, style, run=place))
        if alone:
            between = (live.tokens, live.middle, stored.middle)
            bands.append(Band(*between, colour, "removed, still stored", steps=True))
    name, values = UNITS[axis], [value for one in series for value in one.y]
    is_mean = axis in LAYER_AXES
    there = " that are there" if any("num_layers" in run.axes for run in runs) else ""
    return _chart(
        runs,
        axis,
        f"{name[0].upper()}{name[1:]}s: live and stored",
        f"{f'Mean over layers{there}. ' if is_mean else ''}The schedule removes {name}s from "
        "the model step by step, compactions remove them from memory in blocks.",
        # Means of a few differ in their decimals.
        fitted(named(axis), values, kind="plain" if is_mean and max(values) < 100 else "whole"),
        series,
        bands=bands,
    )


def speed(runs: Sequence[Run]) -> Chart:
    """Draw tokens per second."""
    series, bands, values = _measured(
        runs, number("tokens_per_s"), statistics.median, "running median"
    )
    return _chart(
        runs,
        "speed",
        "Training speed",
        "Tokens of all processes together, per second of training steps; evaluations and saves "
        "are not in it.",
        fitted("tokens/s", values, kind="count", headroom=0.15),
        series,
        bands=bands,
    )


def step_time(runs: Sequence[Run]) -> Chart:
    """Draw the seconds of a step."""
    series, bands, values = _measured(
        runs, number("step_s"), statistics.median, "running median", "teal"
    )
    return _chart(
        runs,
        "step-time",
        "Step time",
        "Seconds of one optimizer step.",
        fitted("step time (s)", values, headroom=0.2),
        series,
        bands=bands,
    )


def utilization(runs: Sequence[Run]) -> Chart:
    """Draw the share of the devices' peak FLOP/s that the model makes use of."""

    def percent(record: Record) -> float:
        return 100.0 * number("mfu")(record)

    series, bands, values = _measured(runs, percent, statistics.median, "running median", "violet")
    return _chart(
        runs,
        "mfu",
        "Model FLOPs utilization",
        "FLOPs of the model as it is stored, per second, as a share of the devices' peak.",
        fitted("MFU (% of peak)", values, headroom=0.15),
        series,
        bands=bands,
    )


def memory(runs: Sequence[Run]) -> Chart:
    """Draw the memory after each step, and its peaks in compactions."""
    read = number("memory_bytes")
    largest = max((read(r) for run in runs for r in run.records if r.memory_bytes), default=0)
    divisor, unit = scaled(largest, "B")
    series = []
    for run, colour, place in _each(runs, "violet"):
        points = curve(run, lambda record: read(record) / divisor, max)
        if any(map(math.isfinite, points.middle)):
            series.append(
                Series("after each step", points.tokens, points.middle, colour, run=place)
            )
    peaks = [e for run in runs[:1] for e in run.compactions() if e.get("peak_bytes")]
    if len(runs) == 1 and peaks:
        series.append(
            Series(
                "peak of a compaction",
                [event["tokens"] for event in peaks],
                [event["peak_bytes"] / divisor for event in peaks],
                "red",
                "points",
            )
        )
    return _chart(
        runs,
        "memory",
        "Memory",
        "Of the first process, between steps: allocated on a GPU, resident on a CPU.",
        fitted(f"memory ({unit})", [v for s in series for v in s.y], headroom=0.15),
        series,
    )


def gradients(runs: Sequence[Run]) -> Chart:
    """Draw the gradient norm, and the count of skipped steps."""
    series, bands, values = _measured(
        runs, number("grad_norm"), statistics.median, "running median", "olive"
    )
    extremes = [v for band in bands for v in (*band.low, *band.high)]
    extremes += [v for s in series for v in s.y]
    clip = runs[0].config.optimizer.clip_grad
    last = max(run.tokens for run in runs)
    if len(runs) == 1 and clip > 0 and values and min(values) < 3 * clip:
        series.append(Series("clipped above", [0, last], [clip, clip], "red", "dashed"))
    skipped = [
        Series("skipped steps", points.tokens, points.middle, colour, "count", True, place)
        for run, colour, place in _each(runs, "pink")
        if (points := curve(run, number("skipped"), max)).middle[-1] > 0
    ]
    most = max((s.y[-1] for s in skipped), default=0)
    return _chart(
        runs,
        "gradients",
        "Gradient norm",
        "Global norm before clipping, on a logarithmic scale. Steps whose gradient is not finite "
        + ("are skipped." if skipped else "would be skipped; none was."),
        fitted("gradient norm", extremes, is_log=True),
        [*series, *skipped],
        bands=bands,
        right=Axis("skipped steps", 0, 1.2 * most) if skipped else None,
    )


def costs(runs: Sequence[Run]) -> Chart:
    """Draw the FLOPs so far, and those of what the run is compared with."""
    every = [(cost(run), colour, place) for run, colour, place in _each(runs, "blue")]
    divisor, unit = scaled(max(sums.zeros_only[-1] for sums, _, _ in every), "FLOPs")
    series = []
    for sums, colour, place in every:
        stride = -(-len(sums.tokens) // MOST_POINTS)
        curves = [("this run", sums.this_run, colour, "line")]
        if len(runs) == 1 and runs[0].is_taught and math.isfinite(sums.teacher[-1]):
            curves.append(("its teacher", sums.teacher, "violet", "line"))
        if len(runs) == 1 and runs[0].prunes:
            curves += [
                ("zeros only", sums.zeros_only, "red", "dashed"),
                ("ideal", sums.ideal, "green", "dotted"),
                ("target from scratch", sums.from_scratch, "orange", "mixed"),
            ]
        # From the end backwards: the curve ends where the run does.
        tokens = sums.tokens[::-stride][::-1]
        series += [
            Series(
                name if place is None else "compute",
                tokens,
                [v / divisor for v in values[::-stride][::-1]],
                colour,
                style,
                run=place,
            )
            for name, values, colour, style in curves
        ]
    return _chart(
        runs,
        "cost",
        "Compute so far",
        "Training FLOPs from the recorded shapes, without evaluations and steps that were run "
        "again after a stop."
        + (
            " Ideal: nothing that is removed is computed."
            if len(runs) == 1 and runs[0].prunes
            else ""
        ),
        fitted(f"compute ({unit})", [v for s in series for v in s.y]),
        series,
    )


def units_map(run: Run, axis: str) -> HeatMap | None:
    """Draw every layer's stored units over tokens; live ones where nothing was compacted."""
    if not run.prunes:
        return None
    compacted = run.records[0].stored[axis] != run.records[-1].stored[axis]
    which = "stored" if compacted else "live"
    edges, rows = _columns(run, which, axis)
    return HeatMap(
        f"{axis}-by-layer",
        f"{which.capitalize()} {UNITS[axis]}s of each layer",
        "Layers from the first (top) to the last.",
        tokens_axis(0, run.tokens),
        Axis(f"{UNITS[axis]}s", 0, max(1.0, *(count for row in rows for count in row)), "whole"),
        edges,
        rows,
        "layer removed",
        phases=_phases([run], run.tokens),
        is_wide=True,
    )


def _columns(run: Run, which: str, axis: str) -> tuple[list[float], list[list[float]]]:
    """Return edges in tokens, and per layer its units at the end of each column.

    A layer that is removed has none, also while its zeros are still in memory.
    """
    size = -(-len(run.records) // MOST_COLUMNS)
    lasts = [*run.records[size - 1 :: size]]
    if len(run.records) % size:
        lasts.append(run.records[-1])
    edges = [0.0, *(float(record.tokens) for record in lasts)]
    columns = (
        [n if alive else math.nan for n, alive in zip(counts[which], counts["live"], strict=True)]
        for record in lasts
        for counts in [{"live": record.live[axis], "stored": record.stored[axis]}]
    )
    return edges, [list(row) for row in zip(*columns, strict=True)]


def _scored(run: Run) -> list[str]:
    """List the axes that have score records."""
    return [axis for axis in AXES if run.scores_of(axis)]


def _of_axis(run: Run, axis: str) -> str:
    """Name the axis of a chart of scores; nothing where the run has scores of one axis only."""
    return f": {UNITS[axis]}s" if len(_scored(run)) > 1 else ""


def _scores_axis(run: Run, axis: str) -> Axis:
    tokens = [record["tokens"] for record in run.scores_of(axis)]
    return tokens_axis(tokens[0], tokens[-1])


def _correlations(run: Run, axis: str) -> tuple[list[float], list[list[float]]]:
    """Return the tokens of records with correlations, the one before included, and a row for each.

    The first record has none, nor has the first after a resume; NaN stands for a layer without one.
    """
    scores = run.scores_of(axis)
    known = [i for i, record in enumerate(scores) if set(record["rank_correlation"]) != {None}]
    if not known:
        return [], []
    edges = [scores[i]["tokens"] for i in (max(0, known[0] - 1), *known)]
    return edges, [_numbers(scores[i]["rank_correlation"]) for i in known]


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def churn_map(run: Run, axis: str) -> HeatMap | None:
    """Draw how stable the ranking of an axis' units is in each layer."""
    edges, values = _correlations(run, axis)
    if len(values) < 2 or axis not in LAYER_AXES:
        return None
    rows = [list(row) for row in zip(*values, strict=True)]
    low = min(_known([value for row in rows for value in row]))
    least = min(0.0, low) if low < 0.2 else math.floor(min(low, 0.99) * 10) / 10
    return HeatMap(
        f"{axis}-churn-by-layer",
        f"Stability of the ranking, by layer{_of_axis(run, axis)}",
        "Spearman rank correlation of a layer's importances with those of the record before: "
        "1 is the same order, 0 is no relation. Layers from the first (top) to the last.",
        _scores_axis(run, axis),
        Axis("rank correlation", least, 1.0),
        edges,
        rows,
        "layer removed, or fewer than two units left",
    )


def churn(run: Run, axis: str) -> Chart | None:
    """Draw how stable the ranking of an axis' units is: the mean over layers, and the lowest."""
    edges, values = _correlations(run, axis)
    if len(values) < 2:
        return None
    known = [_known(row) for row in values]
    means, lowest = [statistics.fmean(row) for row in known], [min(row) for row in known]
    series = [Series("rank correlation", edges[1:], means, "blue")]
    if axis in LAYER_AXES:
        series = [
            Series("mean over layers", edges[1:], means, "blue"),
            Series("least stable layer", edges[1:], lowest, "orange", "dashed"),
        ]
    return Chart(
        f"{axis}-churn",
        f"Stability of the ranking{_of_axis(run, axis)}",
        "Spearman rank correlation between neighbouring score records, over units still alive.",
        _scores_axis(run, axis),
        Axis("rank correlation", min(0.0, *lowest), 1.05),
        series,
    )


def distributions(run: Run) -> list[Chart]:
    """Draw the spread of importance along each axis, in each layer, while units are removed."""
    return [chart for axis in _scored(run) for chart in _distributions(run, axis)]


def _distributions(run: Run, axis: str) -> list[Chart]:
    scores = run.scores_of(axis)
    if len(scores) < 2:
        return []
    x = _scores_axis(run, axis)
    tokens = [record["tokens"] for record in scores]
    rows = [[row or [math.nan] * 7 for row in record["quantiles"]] for record in scores]
    cuts = [_numbers(record["cut"]) for record in scores]
    every = [value for record in rows for row in record for value in row[1:-1]]
    # Also the cut; it may fall deep where hardly anything is left to remove.
    every += [value for record in cuts for value in record]
    is_log = all(not value < 0 for value in every)  # some methods predict a gain
    y = fitted("importance", every, kind="scientific", is_log=is_log, from_zero=False)
    alive = f"{UNITS[axis]}s" if len(_scored(run)) > 1 else "what is alive"
    count = len(rows[0])
    shown = sorted({round(i * (count - 1) / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)})
    charts = []
    for layer in shown if count > MOST_LAYERS else range(count):
        # 0, 5, 25, 50, 75, 95, 100 %
        columns = list(zip(*(record[layer] for record in rows), strict=True))
        cut = [record[layer] for record in cuts]
        of_layer = f", layer {layer}" if axis in LAYER_AXES else ""
        charts.append(
            Chart(
                f"{axis}-importance-{layer}",
                f"Importance of {alive}{of_layer}",
                "Before each recorded removal; what lies below the cut was removed.",
                x,
                y,
                [
                    Series("median", tokens, columns[3], "blue"),
                    Series("cut", tokens, cut, "red", "dashed"),
                ],
                bands=[
                    Band(tokens, columns[1], columns[5], "blue", "5 to 95 %"),
                    Band(tokens, columns[2], columns[4], "blue", "25 to 75 %", is_inner=True),
                ],
            )
        )
    return charts
