"""Draw the charts of the page as a picture, one above the other, with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_idea.report.chart import SHADES as MAP_SHADES
from megatron_idea.report.chart import Axis as ChartAxis
from megatron_idea.report.chart import Band, Chart, HeatMap, Series, colours_of
from megatron_idea.report.chart import Figure as Drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
# Those of the page's light theme.
SHADES = {
    "blue": "#1740b5", "orange": "#d97b08", "green": "#1f9e86", "red": "#85091f",
    "violet": "#7a1de3", "teal": "#03617a", "pink": "#de46d4", "olive": "#735b03", "ink": MUTED,
}  # fmt: skip

PHASE_TINT = {"enlarged": "#ffffff", "prune": "#fff1dd", "recover": "#eff4fb"}
RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}
LINE: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "thin": {"linewidth": 0.7, "alpha": 0.25},
    "dashed": {"linewidth": 1.5, "linestyle": (0, (5, 3))},
    "dotted": {"linewidth": 2.0, "linestyle": (0, (0.1, 2.2)), "dash_capstyle": "round"},
    "mixed": {"linewidth": 1.5, "linestyle": (0, (6, 2.5, 1.5, 2.5))},
    "steps": {"linewidth": 3.0, "drawstyle": "steps-post"},
    "count": {"linewidth": 1.4, "drawstyle": "steps-post"},
    "points": {
        "linestyle": "none", "marker": "o", "markersize": 4.5, "markeredgecolor": "white",
        "markeredgewidth": 0.7, "clip_on": False, "zorder": 3,
    },
    "specks": {"linestyle": "none", "marker": "o", "markersize": 1.6, "clip_on": False},
}  # fmt: skip


def draw(charts: Sequence[Drawn], path: Path, title: str, *, columns: int = 1) -> None:
    """Write the charts as a PNG: 1800 pixels wide, and as much again for a second column."""
    # Here, not above: matplotlib takes a second to import, and the closing table needs none of it.
    import matplotlib

    with matplotlib.rc_context(RC):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        rows = -(-len(charts) // columns)
        wide = columns == 1 and any(chart.is_wide for chart in charts)
        heights = [2.7 if wide and number == 0 else 1.9 for number in range(rows)]
        names = next((chart.runs for chart in charts if isinstance(chart, Chart)), ())
        layout = ConstrainedLayoutEngine(h_pad=0.05, w_pad=0.08, hspace=0.02)
        head = 0.4 + 0.2 * _legend_rows(names, columns)
        figure = Figure(figsize=(9 * columns, sum(heights) + head), layout=layout)
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, height_ratios=heights, squeeze=False)
        for number, drawn in enumerate(charts):
            axes = grid[number // columns, number % columns]
            _shade_phases(axes, drawn, is_named=number < columns)
            if isinstance(drawn, HeatMap):
                _draw_map(axes, drawn)
            else:
                _draw_chart(axes, drawn, is_first=number == 0)
            axes.set_title(drawn.title, loc="left", fontsize=10, fontweight="bold")
            _ticks(axes.xaxis, drawn.x, 8)
            axes.set_xlim(drawn.x.low, drawn.x.high)
            # Once under charts over the same tokens.
            below = charts[number + columns : number + columns + 1]
            if below and below[0].x == drawn.x:
                axes.tick_params(labelbottom=False)
            else:
                axes.set_xlabel(drawn.x.label)
            axes.yaxis.set_label_coords(-0.078, 0.5)
        for axes in grid.flat[len(charts) :]:
            axes.set_visible(False)
        if names:
            _name_runs(figure, names, columns)
        else:
            figure.suptitle(_spelled(title), x=0.01, ha="left", fontsize=13, fontweight="bold")
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a PNG with a palette, a third of the size: curves on white have few colours."""
    from PIL import Image  # comes with matplotlib

    whole = io.BytesIO()
    figure.savefig(whole, dpi=200)
    with Image.open(whole) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(path, optimize=True)


# Of a legend's row in one column of charts, each entry's line included.
LEGEND_CHARACTERS = 110


def _per_row(names: Sequence[str], columns: int) -> int:
    longest = max(map(len, names), default=1)
    return max(1, min(len(names) or 1, columns * LEGEND_CHARACTERS // (longest + 6)))


def _legend_rows(names: Sequence[str], columns: int) -> int:
    return -(-len(names) // _per_row(names, columns))


def _name_runs(figure: Any, names: Sequence[str], columns: int) -> None:
    """Draw one legend for all charts: which colour is which run."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=SHADES[colour], linewidth=2.5, label=_spelled(name))
        for name, colour in zip(names, colours_of(len(names)), strict=True)
    ]
    ncols = _per_row(names, columns)
    figure.legend(handles=handles, loc="outside upper left", ncols=ncols, fontsize=10)


def _spelled(text: str) -> str:
    """Keep a run's name as it is: matplotlib reads a formula between two dollars."""
    return text.replace("$", r"\$")


def _ticks(axis: Any, drawn: ChartAxis, most: int) -> None:
    places, texts = zip(*drawn.ticks(most), strict=True)
    axis.set_ticks(places, texts)


def _draw_chart(axes: Axes, chart: Chart, is_first: bool) -> None:
    from matplotlib.patches import Patch

    right = axes.twinx() if chart.right else None
    if chart.y.is_log:
        axes.set_yscale("log")
    for band in chart.bands:
        _draw_band(axes, band)
    for series in chart.series:
        _draw_series(right if series.is_right and right else axes, series)
    if chart.marks:
        feet = [0.0] * len(chart.marks)
        transform = axes.get_xaxis_transform()
        axes.plot(chart.marks, feet, transform=transform, clip_on=False, **MARK)
    _set_y(axes, chart.y)
    if right and chart.right:
        right.spines["right"].set_visible(True)
        right.grid(False)
        _set_y(right, chart.right)
    handles: list[Any] = [
        _entry(name, SHADES[colour], LINE[style]) for name, style, colour in chart.entries()
    ]
    handles += [
        Patch(
            facecolor=SHADES[band.colour],
            alpha=0.4 if band.is_inner else 0.2,
            linewidth=0,
            label=band.name,
        )
        for band in chart.bands
        if band.name
    ]
    # Once is enough for what looks the same in all of them.
    handles += [_entry("compaction", MUTED, MARK)] if chart.marks and is_first else []
    if handles:
        _place_legend(axes, handles)


def _place_legend(axes: Axes, handles: Sequence[Any]) -> None:
    """Draw a legend beside the title: there it covers no curve."""
    axes.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=len(handles),
        columnspacing=1.4, handlelength=1.8, handletextpad=0.5, borderaxespad=0.2,
    )  # fmt: skip


GAP: dict[str, Any] = {
    "facecolor": "white",
    "edgecolor": "#9ca3af",
    "hatch": "/////",
    "linewidth": 0,
}
MARK: dict[str, Any] = {"color": MUTED, "linestyle": "none", "marker": "|", "markersize": 9}


def _entry(name: str, colour: str, style: dict[str, Any]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"color": colour, "label": name} | style)


def _set_y(axes: Axes, axis: ChartAxis) -> None:
    axes.set_ylim(axis.low, axis.high)
    _ticks(axes.yaxis, axis, 6)
    axes.minorticks_off()
    axes.set_ylabel(axis.label)


def _draw_series(axes: Axes, series: Series) -> None:
    axes.plot(series.x, series.y, color=SHADES[series.colour], **LINE[series.style])


def _draw_band(axes: Axes, band: Band) -> None:
    axes.fill_between(
        band.x,
        band.low,
        band.high,
        step="post" if band.steps else None,
        color=SHADES[band.colour],
        alpha=0.16,
        linewidth=0,
    )


def _draw_map(axes: Axes, drawn: HeatMap) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    # Edges of rows so that the first layer is at the top, as on the page.
    count = len(drawn.rows)
    mesh = axes.pcolormesh(
        drawn.edges,
        range(count + 1),
        drawn.rows,
        vmin=drawn.values.low,
        vmax=drawn.values.high,
        cmap=LinearSegmentedColormap.from_list("shades", MAP_SHADES),
    )
    axes.grid(False)
    axes.set_ylim(count, 0)
    labelled = range(0, count, -(-count // 8))
    axes.set_yticks([layer + 0.5 for layer in labelled], [str(layer) for layer in labelled])
    axes.set_ylabel("layer")
    axes.figure.colorbar(mesh, ax=axes, pad=0.01, label=drawn.values.label)
    if drawn.has_gaps:
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, zorder=-1, **GAP))
        _place_legend(axes, [Rectangle((0, 0), 1, 1, label=drawn.gap, **GAP)])


def _shade_phases(axes: Axes, drawn: Drawn, is_named: bool) -> None:
    for name, begin, end in drawn.phases:
        axes.axvspan(begin, end, color=PHASE_TINT[name], linewidth=0, zorder=-2)
        if begin > 0:
            axes.axvline(begin, color="#9ca3af", linewidth=0.8, linestyle=(0, (4, 3)), zorder=-1)
        if is_named:
            axes.annotate(
                name,
                xy=((begin + end) / 2, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, -4),
                textcoords="offset points",
                ha="center",
                va="top",
                color=MUTED,
                fontsize=10,
            )
