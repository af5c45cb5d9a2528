"""Charts as pictures: the same ones as on the page, one above the other, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_idea.report.chart import Axis as ChartAxis
from megatron_idea.report.chart import Band, Chart, HeatMap, Series
from megatron_idea.report.chart import Figure as Drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
SHADES = {
    "blue": "#2563eb", "orange": "#ea580c", "green": "#0f766e", "red": "#be123c",
    "violet": "#7c3aed", "teal": "#0e7490", "pink": "#c026d3", "olive": "#4d7c0f",
}  # fmt: skip
# Of a legend's row, each entry's line included: as many as a picture is wide.
LEGEND_CHARACTERS = 110

PHASE_TINT = {"enlarged": "#ffffff", "prune": "#fff4e5", "recover": "#f4f7fb"}
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
    "steps": {"linewidth": 3.0, "drawstyle": "steps-post"},
    "points": {
        "linestyle": "none", "marker": "o", "markersize": 4.5, "markeredgecolor": "white",
        "markeredgewidth": 0.7, "clip_on": False, "zorder": 3,
    },
}  # fmt: skip


def draw(charts: Sequence[Drawn], path: Path, title: str, *, is_titled: bool = True) -> None:
    """Write the charts as a PNG 1800 pixels wide. ``is_titled``: each chart has its own title."""
    # Here, not above: matplotlib takes a second to import, and the closing table needs none of it.
    import matplotlib

    with matplotlib.rc_context(RC):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        heights = [3.3 if chart.is_wide and isinstance(chart, Chart) else 2.3 for chart in charts]
        layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08, hspace=0.03)
        figure = Figure(figsize=(9, sum(heights)), layout=layout)
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(charts), 1, height_ratios=heights, squeeze=False)
        for number, (axes, drawn) in enumerate(zip(grid[:, 0], charts, strict=True)):
            _shade_phases(axes, drawn, is_named=number == 0 and not is_titled)
            if isinstance(drawn, HeatMap):
                _draw_map(axes, drawn)
            else:
                _draw_chart(axes, drawn, is_titled)
            if is_titled:
                axes.set_title(drawn.title, loc="left", fontsize=10, fontweight="bold")
            _ticks(axes.xaxis, drawn.x, 8)
            axes.set_xlim(drawn.x.low, drawn.x.high)
            # Under the last of several over the same tokens.
            if number + 1 == len(charts) or is_titled:
                axes.set_xlabel(drawn.x.label)
            else:
                axes.tick_params(labelbottom=False)
            axes.yaxis.set_label_coords(-0.078, 0.5)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.savefig(path, dpi=200)


def _ticks(axis: Any, drawn: ChartAxis, most: int) -> None:
    places, texts = zip(*drawn.ticks(most), strict=True)
    axis.set_ticks(places, texts)


def _draw_chart(axes: Axes, chart: Chart, is_titled: bool) -> None:
    right = axes.twinx() if chart.right else None
    if chart.y.is_log:
        axes.set_yscale("log")
    for band in chart.bands:
        _draw_band(axes, band)
    handles = [
        line
        for series in chart.series
        for line in _draw_series(right if series.is_right and right else axes, series)
    ]
    if chart.marks:
        feet = [0.0] * len(chart.marks)
        style = {"color": MUTED, "linestyle": "none", "marker": "|", "markersize": 9}
        transform = axes.get_xaxis_transform()
        marks = axes.plot(chart.marks, feet, transform=transform, clip_on=False, **style)
        if not is_titled:
            marks[0].set_label("compaction")
            handles += marks
    _set_y(axes, chart.y)
    if right and chart.right:
        right.spines["right"].set_visible(True)
        right.grid(False)
        _set_y(right, chart.right)
    named = [handle for handle in handles if not str(handle.get_label()).startswith("_")]
    if named:
        # Beside the title, where there is one: there a legend covers no curve.
        place = {"bbox_to_anchor": (1.0, 0.98), "loc": "lower right"} if is_titled else {}
        longest = max(len(str(handle.get_label())) for handle in named)
        columns = max(1, min(len(named), LEGEND_CHARACTERS // (longest + 6)))
        axes.legend(**{"handles": named, "loc": "upper right", "ncols": columns} | place)


def _set_y(axes: Axes, axis: ChartAxis) -> None:
    axes.set_ylim(axis.low, axis.high)
    _ticks(axes.yaxis, axis, 6)
    axes.minorticks_off()
    axes.set_ylabel(axis.label)


def _draw_series(axes: Axes, series: Series) -> list[Any]:
    return axes.plot(
        series.x,
        series.y,
        color=SHADES[series.colour],
        label=series.name or "_",
        **LINE[series.style],
    )


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
    # Edges of rows so that the first layer is at the top, as on the page.
    count = len(drawn.rows)
    mesh = axes.pcolormesh(
        drawn.edges,
        range(count + 1),
        drawn.rows,
        vmin=drawn.values.low,
        vmax=drawn.values.high,
        cmap="YlGnBu",
    )
    axes.grid(False)
    axes.set_ylim(count, 0)
    labelled = range(0, count, -(-count // 8))
    axes.set_yticks([layer + 0.5 for layer in labelled], [str(layer) for layer in labelled])
    axes.set_ylabel("layer")
    axes.figure.colorbar(mesh, ax=axes, pad=0.01, label=drawn.values.label)


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
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=MUTED,
                fontsize=10,
            )
