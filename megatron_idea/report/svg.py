"""Charts as HTML: curves in a stretched SVG, words and numbers around it in plain elements.

So one chart fits a phone and a wide screen: text keeps its size, lines their width. Coordinates
are whole numbers from 0 to ``SIZE``; the page's script reads values back from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from megatron_idea.report.chart import Axis, Band, Chart, Figure, HeatMap, Series

SIZE = 10_000

# Two labels on one axis closer than this, as a share of it, would touch on a phone.
TIGHT = 0.12


def figure(drawn: Figure) -> str:
    """A chart or heat map as a ``<figure>``."""
    body, legend = (
        (_map_frame(drawn), _shades(drawn))
        if isinstance(drawn, HeatMap)
        else (_frame(drawn), _legend(drawn))
    )
    wide = " wide" if drawn.is_wide else ""
    data = {"x": _axis_data(drawn.x)}
    if isinstance(drawn, Chart):
        data |= {"y": _axis_data(drawn.y)}
        data |= {"right": _axis_data(drawn.right)} if drawn.right else {}
    attributes = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    return (
        f'<figure class="chart{wide}" data-slug="{escape(drawn.slug)}"{attributes}>'
        f"<figcaption><h3>{escape(drawn.title)}</h3><p>{escape(drawn.note)}</p></figcaption>"
        f"{legend}{body}</figure>\n"
    )


def _axis_data(axis: Axis) -> str:
    return f"{axis.low!r} {axis.high!r} {'log' if axis.is_log else 'linear'} {axis.kind}"


def _legend(chart: Chart) -> str:
    items = [
        f'<li><i class="key {s.style} {s.colour}"></i>{escape(s.name)}</li>'
        for s in chart.series
        if s.name
    ]
    items += [
        f'<li><i class="key band {band.colour}"></i>{escape(band.name)}</li>'
        for band in chart.bands
        if band.name
    ]
    if chart.marks:
        items.append('<li><i class="key mark"></i>compaction</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _shades(drawn: HeatMap) -> str:
    low, high = drawn.values.write(drawn.values.low), drawn.values.write(drawn.values.high)
    return (
        f'<ul class="legend"><li>{escape(drawn.values.label)}: {low}'
        f'<i class="shades"></i>{high}</li></ul>'
    )


def _frame(chart: Chart) -> str:
    grid = "".join(f'<path d="M0 {_down(chart.y, value)}H{SIZE}"/>' for value, _ in chart.y.ticks())
    svg = (
        f"{_tints(chart.phases, chart.x)}"
        f'<g class="grid">{grid}</g>'
        f'<g class="curves" clip-path="url(#plot)">'
        f"{''.join(_band(chart, band) for band in chart.bands)}"
        f"{''.join(_curve(chart, s) for s in chart.series if s.style != 'points')}</g>"
        f"{_marks(chart)}"
        f"{''.join(_curve(chart, s) for s in chart.series if s.style == 'points')}"
    )
    right = ""
    if chart.right:
        right = (
            f'<div class="ticks y right">{_y_labels(chart.right)}</div>'
            f'<div class="label right">{escape(chart.right.label)}</div>'
        )
    return (
        f'<div class="frame"><div class="label y">{escape(chart.y.label)}</div>'
        f'<div class="ticks y">{_y_labels(chart.y)}</div>'
        f"{_plot(svg, chart)}{right}{_x_parts(chart.x)}</div>"
    )


def _map_frame(drawn: HeatMap) -> str:
    count = len(drawn.rows)
    height = SIZE / count
    cells = "".join(
        _row(drawn, row, round(i * height), round((i + 1) * height))
        for i, row in enumerate(drawn.rows)
    )
    labelled = range(0, count, -(-count // 8))
    names = "".join(
        f'<span style="bottom:{100 * (1 - (i + 0.5) / count):.2f}%">{i}</span>' for i in labelled
    )
    svg = f'<g class="cells">{cells}</g>'
    tall = min(340, max(120, 22 * count))
    # Beside another chart it is as tall as that.
    kind = "map" if drawn.is_wide else ""
    return (
        f'<div class="{kind} frame" style="--tall:{tall}px"><div class="label y">layer</div>'
        f'<div class="ticks y">{names}</div>'
        f"{_plot(svg, drawn)}{_x_parts(drawn.x)}</div>"
    )


def _row(drawn: HeatMap, row: Sequence[float], top: int, bottom: int) -> str:
    """Rectangles of a layer; neighbours of the same shade are one."""
    shades = [_shade(drawn.values, value) for value in row]
    parts = []
    column = 0
    for shade, same in itertools.groupby(shades):
        first, column = column, column + len(list(same))
        if shade is None:
            continue
        left, right = (_across(drawn.x, drawn.edges[i]) for i in (first, column))
        parts.append(
            f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" '
            f'fill-opacity="{shade}"/>'
        )
    return "".join(parts)


def _shade(axis: Axis, value: float) -> str | None:
    if not math.isfinite(value):
        return None
    return f"{0.05 + 0.95 * min(1.0, max(0.0, axis.place(value))):.2f}"


def _plot(svg: str, drawn: Figure) -> str:
    names = "".join(
        f'<span class="phase" style="left:{100 * drawn.x.place(begin):.2f}%;'
        f'width:{100 * (drawn.x.place(end) - drawn.x.place(begin)):.2f}%">{escape(name)}</span>'
        for name, begin, end in drawn.phases
    )
    return (
        f'<div class="plot">{names}<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(drawn.title)}">{svg}</svg></div>'
    )


def _tints(phases: Sequence[tuple[str, float, float]], x: Axis) -> str:
    return "".join(
        f'<rect class="tint {escape(name)}" x="{_across(x, begin)}" y="0" '
        f'width="{_across(x, end) - _across(x, begin)}" height="{SIZE}"/>'
        for name, begin, end in phases
    )


def _marks(chart: Chart) -> str:
    """A tick at the foot of the plot for every compaction."""
    path = "".join(f"M{_across(chart.x, tokens)} {SIZE}V{SIZE - 450}" for tokens in chart.marks)
    return f'<path class="mark" d="{path}"/>' if path else ""


def _y_labels(axis: Axis) -> str:
    return "".join(
        f'<span style="bottom:{100 * axis.place(value):.2f}%">{text}</span>'
        for value, text in axis.ticks()
    )


def _x_parts(x: Axis) -> str:
    """Labels under the plot; on a narrow screen every second one."""
    labels = []
    for number, (value, text) in enumerate(x.ticks(8)):
        place = x.place(value)
        text_class = "last" if place > 1 - TIGHT / 4 else "odd" if number % 2 else "even"
        labels.append(f'<span class="{text_class}" style="left:{100 * place:.2f}%">{text}</span>')
    return (
        f'<div class="ticks x">{"".join(labels)}</div><div class="label x">{escape(x.label)}</div>'
    )


def _curve(chart: Chart, series: Series) -> str:
    axis = chart.right if series.is_right and chart.right else chart.y
    path = _path(chart.x, axis, series.x, series.y, series.style)
    name = f' data-name="{escape(series.name)}"' if series.name else ""
    side = ' data-side="right"' if series.is_right else ""
    return f'<path class="{series.style} {series.colour}"{name}{side} d="{path}"/>'


def _path(x_axis: Axis, y_axis: Axis, xs: Sequence[float], ys: Sequence[float], style: str) -> str:
    parts: list[str] = []
    drawing = False
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            drawing = False
            continue
        across, down = _across(x_axis, x), _down(y_axis, y)
        if style == "points":
            parts.append(f"M{across} {down}h0")
        elif style == "steps" and drawing:
            parts.append(f"H{across}V{down}")
        else:
            parts.append(f"{'L' if drawing else 'M'}{across} {down}")
        drawing = True
    return "".join(parts)


def _band(chart: Chart, band: Band) -> str:
    style = "steps" if band.steps else "line"
    known = [
        i for i, pair in enumerate(zip(band.low, band.high, strict=True))
        if all(map(math.isfinite, pair))
    ]  # fmt: skip
    if len(known) < 2:
        return ""
    xs, lows, highs = ([side[i] for i in known] for side in (band.x, band.low, band.high))
    # There along the high side, back along the low one; a step back rises before it runs.
    there = _path(chart.x, chart.y, xs, highs, style)
    back = _path(chart.x, chart.y, xs[::-1], lows[::-1], "line")
    return f'<path class="band {band.colour}" d="{there}L{back[1:]}Z"/>'


def _across(axis: Axis, value: float) -> int:
    return round(SIZE * axis.place(value))


def _down(axis: Axis, value: float) -> int:
    """Curves that leave the plot keep their slope up to a plot's height outside of it."""
    return round(SIZE * (1 - min(2.0, max(-1.0, axis.place(value)))))
