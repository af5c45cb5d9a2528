"""Draw charts as HTML: curves in a stretched SVG, words and numbers around it in plain elements.

So one chart fits a phone and a wide screen: text keeps its size, lines their width. Coordinates
are whole numbers from 0 to ``SIZE``; the page's script reads values back from them.
"""

from __future__ import annotations

import base64
import bisect
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

from megatron_idea.report.chart import (
    POINTS,
    Axis,
    Band,
    Chart,
    Figure,
    HeatMap,
    Series,
    colours_of,
    shade,
)

SIZE = 10_000

# Two labels on one axis closer than this, as a share of it, would touch on a phone.
TIGHT = 0.12

# Columns of a heat map's picture; its own columns may be of any widths.
MAP_COLUMNS = 480


def figure(drawn: Figure) -> str:
    """Draw a chart or heat map as a ``<figure>``."""
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
    runs = "".join(
        f'<li data-run="{i}" tabindex="0"><i class="key line {colour}"></i>{escape(name)}</li>'
        for i, (name, colour) in enumerate(
            zip(chart.runs, colours_of(len(chart.runs)), strict=True)
        )
    )
    items = [
        f'<li><i class="key {style} {colour}"></i>{escape(name)}</li>'
        for name, style, colour in chart.entries()
    ]
    items += [
        f'<li><i class="key band {"inner " if band.is_inner else ""}{band.colour}"></i>'
        f"{escape(band.name)}</li>"
        for band in chart.bands
        if band.name
    ]
    if chart.marks:
        items.append('<li><i class="key mark"></i>compaction</li>')
    return (
        f'<ul class="legend runs">{runs}</ul>' if runs else ""
    ) + f'<ul class="legend">{"".join(items)}</ul>'


def _shades(drawn: HeatMap) -> str:
    low, high = drawn.values.write(drawn.values.low), drawn.values.write(drawn.values.high)
    gap = f'<li><i class="key gap"></i>{escape(drawn.gap)}</li>' if drawn.has_gaps else ""
    return (
        f'<ul class="legend"><li>{escape(drawn.values.label)}: {low}'
        f'<i class="shades"></i>{high}</li>{gap}</ul>'
    )


def _frame(chart: Chart) -> str:
    grid = "".join(f'<path d="M0 {_down(chart.y, value)}H{SIZE}"/>' for value, _ in chart.y.ticks())
    svg = (
        f"{_tints(chart.phases, chart.x)}"
        f'<g class="grid">{grid}</g>'
        f'<g class="curves" clip-path="url(#plot)">'
        f"{''.join(_band(chart, band) for band in chart.bands)}"
        f"{''.join(_curve(chart, s) for s in chart.series if s.style not in POINTS)}</g>"
        f"{_marks(chart)}"
        f"{''.join(_curve(chart, s) for s in chart.series if s.style in POINTS)}"
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
        f"{_plot(_svg(svg, chart.title), chart)}{right}{_x_parts(chart.x)}</div>"
    )


def _map_frame(drawn: HeatMap) -> str:
    count = len(drawn.rows)
    labelled = range(0, count, -(-count // 8))
    names = "".join(
        f'<span style="bottom:{100 * (1 - (i + 0.5) / count):.2f}%">{i}</span>' for i in labelled
    )
    levels, cells = _levels(drawn)
    image = _png([shade(drawn.values.place(level)) for level in levels], cells)
    alt = f"{drawn.title}, as shades"
    picture = f'<img alt="{escape(alt)}" src="data:image/png;base64,{image}">'
    values = " ".join(f"{level:.6g}" for level in levels)
    packed = base64.b64encode(b"".join(cells)).decode()
    tall = min(340, max(120, 22 * count))
    # Beside another chart it is as tall as that.
    kind = "map" if drawn.is_wide else ""
    gap = f' data-gap="{escape(drawn.gap)}"' if drawn.has_gaps else ""
    return (
        f'<div class="{kind} frame" style="--tall:{tall}px" data-rows="{count}" '
        f'data-levels="{values}" data-cells="{packed}" data-kind="{drawn.values.kind}" '
        f'data-unit="{escape(drawn.values.label)}"{gap}>'
        f'<div class="label y">layer</div><div class="ticks y">{names}</div>'
        f"{_plot(picture, drawn)}{_x_parts(drawn.x)}</div>"
    )


# The index of a heat map's cells without a value.
GAP = 255


def _levels(drawn: HeatMap) -> tuple[list[float], list[bytes]]:
    """List the values of all cells, at most 255, and for each row its cells as indices of them."""
    known = sorted({v for row in drawn.rows for v in row if math.isfinite(v)})
    if len(known) > GAP:
        low, high = known[0], known[-1]
        known = [low + (high - low) * i / (GAP - 1) for i in range(GAP)]
    x = drawn.x
    centres = [x.low + (x.high - x.low) * (i + 0.5) / MAP_COLUMNS for i in range(MAP_COLUMNS)]
    columns = [bisect.bisect_right(drawn.edges, centre) - 1 for centre in centres]
    cells = []
    for row in drawn.rows:
        indices = [_nearest(known, v) if math.isfinite(v) else GAP for v in row]
        cells.append(bytes(indices[c] if 0 <= c < len(row) else GAP for c in columns))
    return known, cells


def _nearest(known: Sequence[float], value: float) -> int:
    above = min(bisect.bisect_left(known, value), len(known) - 1)
    return above - 1 if above and value - known[above - 1] < known[above] - value else above


def _png(palette: Sequence[tuple[int, int, int]], rows: Sequence[bytes]) -> str:
    """Write a PNG of palette indices, in base64; a gap is transparent.

    Without a library: the page needs no more of one.
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    colours = b"".join(map(bytes, palette)).ljust(3 * (GAP + 1), b"\0")
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    parts = (
        (b"IHDR", head), (b"PLTE", colours), (b"tRNS", b"\xff" * GAP + b"\0"),
        (b"IDAT", data), (b"IEND", b""),
    )  # fmt: skip
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    return base64.b64encode(png).decode()


def _plot(inside: str, drawn: Figure) -> str:
    names = "".join(
        f'<span class="phase" style="left:{100 * drawn.x.place(begin):.2f}%;'
        f'width:{100 * (drawn.x.place(end) - drawn.x.place(begin)):.2f}%"><b>{escape(name)}</b>'
        "</span>"
        for name, begin, end in drawn.phases
    )
    return (
        f'<div class="phases">{names}</div>' if names else ""
    ) + f'<div class="plot">{inside}</div>'


def _svg(inside: str, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{inside}</svg>'
    )


def _tints(phases: Sequence[tuple[str, float, float]], x: Axis) -> str:
    return "".join(
        f'<rect class="tint {escape(name)}" x="{_across(x, begin)}" y="0" '
        f'width="{_across(x, end) - _across(x, begin)}" height="{SIZE}"/>'
        for name, begin, end in phases
    )


def _marks(chart: Chart) -> str:
    """Draw a tick at the foot of the plot for every compaction."""
    path = "".join(f"M{_across(chart.x, tokens)} {SIZE}V{SIZE - 450}" for tokens in chart.marks)
    return f'<path class="mark" d="{path}"/>' if path else ""


def _y_labels(axis: Axis) -> str:
    return "".join(
        f'<span style="bottom:{100 * axis.place(value):.2f}%">{text}</span>'
        for value, text in axis.ticks()
    )


def _x_parts(x: Axis) -> str:
    """Write labels under the plot; on a narrow screen every second one."""
    labels = []
    ticks = x.ticks(8)
    for number, (value, text) in enumerate(ticks):
        place = x.place(value)
        # Counted from the end: a label at the very end is set to the left of its tick.
        is_odd = (len(ticks) - 1 - number) % 2
        text_class = "last" if place > 1 - TIGHT / 4 else "odd" if is_odd else "even"
        labels.append(f'<span class="{text_class}" style="left:{100 * place:.2f}%">{text}</span>')
    return (
        f'<div class="ticks x">{"".join(labels)}</div><div class="label x">{escape(x.label)}</div>'
    )


def _curve(chart: Chart, series: Series) -> str:
    axis = chart.right if series.is_right and chart.right else chart.y
    path = _path(chart.x, axis, series.x, series.y, series.style)
    name = f' data-name="{escape(series.name)}"' if series.name else ""
    side = ' data-side="right"' if series.is_right else ""
    return f'<path class="{series.style} {series.colour}"{name}{side}{_of_run(series)} d="{path}"/>'


def _of_run(drawn: Series | Band) -> str:
    return "" if drawn.run is None else f' data-run="{drawn.run}"'


def _path(x_axis: Axis, y_axis: Axis, xs: Sequence[float], ys: Sequence[float], style: str) -> str:
    parts: list[str] = []
    drawing = False
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            drawing = False
            continue
        across, down = _across(x_axis, x), _down(y_axis, y)
        if style in POINTS:
            parts.append(f"M{across} {down}h0")
        elif style in ("steps", "count") and drawing:
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
    return f'<path class="band {band.colour}"{_of_run(band)} d="{there}L{back[1:]}Z"/>'


def _across(axis: Axis, value: float) -> int:
    return round(SIZE * axis.place(value))


def _down(axis: Axis, value: float) -> int:
    """Return the y coordinate; a curve that leaves the plot keeps its slope for another height."""
    return round(SIZE * (1 - min(2.0, max(-1.0, axis.place(value)))))
