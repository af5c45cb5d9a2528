"""A run folder, drawn: ``report/run.png`` and the closing table, from what the run recorded."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from megatron_idea.config import Config, load
from megatron_idea.estimate import human_count, parameter_count
from megatron_idea.metrics import METRICS, read_events, read_metrics
from megatron_idea.schedule import PHASES, phase_ended, phase_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Steps at the start of a stretch whose speed says nothing: warm-up, allocation, first compilation.
SETTLING_STEPS = 5

# Of each curve: more than the picture has columns of pixels, few enough for plain Python.
MOST_POINTS = 4000

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREEN, RED = "#2563eb", "#ea580c", "#0f766e", "#be123c"
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
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class ReportPaths:
    """Files that ``report`` wrote."""

    picture: Path


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    run_dir: Path
    config: Config
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def evaluations(self) -> list[dict[str, Any]]:
        """Held-out losses in order of tokens; of two at one step the later, after compaction."""
        by_step = {event["step"]: event for event in self.of_kind("evaluated")}
        return [by_step[step] for step in sorted(by_step)]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


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
    return Run(run_dir, load(run_dir / "config.yaml"), records, read_events(run_dir))


def report(run_dir: Path) -> ReportPaths:
    """Draw a run, finished or not, into ``<run_dir>/report``.

    Raises: ValueError as ``read_run`` does.
    """
    run = read_run(Path(run_dir))
    picture = run.run_dir / "report" / "run.png"
    picture.parent.mkdir(exist_ok=True)
    stride = -(-len(run.records) // MOST_POINTS)
    # From the end backwards: the picture ends where the run does.
    _draw(dataclasses.replace(run, records=run.records[::-stride][::-1]), picture)
    return ReportPaths(picture)


def _draw(run: Run, path: Path) -> None:
    # Here, not above: matplotlib takes a second to import, and the closing table needs none of it.
    import matplotlib

    with matplotlib.rc_context(RC):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import FuncFormatter

        layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08, hspace=0.03)
        figure = Figure(figsize=(9, 10.2), layout=layout)
        FigureCanvasAgg(figure)
        axes = figure.subplots(4, 1, sharex=True, height_ratios=(1.5, 1, 1, 0.8))
        tokens = [record["tokens"] for record in run.records]
        _draw_loss(axes[0], run, tokens)
        _draw_schedule(axes[1], run, tokens)
        _draw_widths(axes[2], run, tokens)
        _draw_speed(axes[3], run, tokens)
        for axis in axes:
            _shade_phases(axis, run.config)
            axis.set_xlim(0, tokens[-1])
            axis.yaxis.set_label_coords(-0.078, 0.5)
        _name_phases(axes[0], run.config, tokens[-1])
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
        axes[-1].set_xlabel("consumed tokens")
        figure.suptitle(_title(run), x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.savefig(path, dpi=200)


def _title(run: Run) -> str:
    before, after = (
        human_count(parameter_count(run.config.model, run.records[i]["ffn_width"]).total)
        for i in (0, -1)
    )
    sizes = f"{before} → {after} parameters" if before != after else f"{before} parameters"
    return f"{run.run_dir.resolve().name}:  {sizes}"


def _draw_loss(axis: Axes, run: Run, tokens: Sequence[int]) -> None:
    loss = [record["loss"] for record in run.records]
    smoothed = _smooth(loss, window=len(loss) // 60)
    axis.plot(tokens, loss, color=BLUE, alpha=0.25, linewidth=0.7)
    axis.plot(tokens, smoothed, color=BLUE, linewidth=1.6, label="training, smoothed")
    held_out = [(event["tokens"], event["val_loss"]) for event in run.evaluations()]
    finite = sorted(value for value in smoothed if math.isfinite(value))
    if finite:
        # The fall from ln(vocab) would flatten everything after it; cut to where most steps are.
        low = min([finite[0], *(loss for _, loss in held_out)])
        high = finite[int(0.97 * (len(finite) - 1))]
        span = max(high - low, 1e-3)
        axis.set_ylim(low - 0.08 * span, high + 0.25 * span)
    shown = [point for point in held_out if point[1] <= axis.get_ylim()[1]]
    if shown:
        axis.plot(
            *zip(*shown, strict=True),
            color=RED,
            linestyle="none",
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            clip_on=False,
            zorder=3,
            label="held-out",
        )
    axis.set_ylabel("loss (nats per token)")
    axis.legend(loc="upper right", ncols=2)


def _draw_schedule(axis: Axes, run: Run, tokens: Sequence[int]) -> None:
    axis.plot(
        tokens,
        [record["lr"] for record in run.records],
        color=BLUE,
        linewidth=1.6,
        label="learning rate",
    )
    axis.set_ylabel("learning rate")
    axis.set_ylim(0, 1.22 * max(record["lr"] for record in run.records))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    keep = axis.twinx()
    keep.spines["right"].set_visible(True)
    keep.grid(False)
    keep.plot(
        tokens,
        [record["keep_ratio"] for record in run.records],
        color=ORANGE,
        linewidth=1.6,
        label="keep ratio",
    )
    keep.set_ylim(0, 1.22)
    keep.set_yticks([0, 0.25, 0.5, 0.75, 1])
    keep.set_ylabel("keep ratio")
    axis.legend(handles=[*axis.lines, *keep.lines], loc="upper right", ncols=2)


def _draw_widths(axis: Axes, run: Run, tokens: Sequence[int]) -> None:
    width = [statistics.fmean(record["ffn_width"]) for record in run.records]
    live = [statistics.fmean(record["ffn_live"]) for record in run.records]
    axis.fill_between(tokens, live, width, step="post", color=GREEN, alpha=0.16, linewidth=0)
    axis.step(tokens, width, where="post", color=GREEN, linewidth=3, label="physical")
    axis.plot(tokens, live, color=ORANGE, linewidth=1.4, label="live")
    compacted = {event["step"]: event for event in run.of_kind("compacted")}.values()
    if compacted:
        axis.plot(
            [event["tokens"] for event in compacted],
            [statistics.fmean(event["widths_after"]) for event in compacted],
            color=GREEN,
            linestyle="none",
            marker="v",
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.7,
            zorder=3,
            label="compaction",
        )
    axis.set_ylim(0, 1.25 * max(width))
    axis.set_ylabel("FFN neurons per layer")
    axis.legend(loc="upper right", ncols=3)


def _draw_speed(axis: Axes, run: Run, tokens: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter

    speed = [record["tokens_per_s"] for record in run.records]
    smoothed = _smooth(speed, window=len(speed) // 60, middle=statistics.median)
    axis.plot(tokens, speed, color=BLUE, alpha=0.25, linewidth=0.7)
    axis.plot(tokens, smoothed, color=BLUE, linewidth=1.6, label="running median")
    axis.set_ylim(0, 1.3 * max(smoothed))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    axis.set_ylabel("tokens/s")
    axis.legend(loc="upper right")


def _shade_phases(axis: Axes, config: Config) -> None:
    if config.prune.strategy == "none":
        return
    begin = 0
    for name, end in phase_ends(config.schedule).items():
        axis.axvspan(begin, end, color=PHASE_TINT[name], linewidth=0, zorder=-2)
        if 0 < begin < end:
            axis.axvline(begin, color="#9ca3af", linewidth=0.8, linestyle=(0, (4, 3)), zorder=-1)
        begin = end


def _name_phases(axis: Axes, config: Config, last_token: int) -> None:
    """Write the phases' names over the top panel, each over the part that has been run."""
    if config.prune.strategy == "none":
        return
    begin = 0
    for name, end in phase_ends(config.schedule).items():
        end = min(end, last_token)
        if begin < end:
            axis.annotate(
                name,
                xy=((begin + end) / 2, 1.0),
                xycoords=axis.get_xaxis_transform(),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=MUTED,
                fontsize=10,
            )
            begin = end


def _smooth(values: Sequence[float], window: int, middle: Any = statistics.fmean) -> list[float]:
    """Centred running mean (or other middle) over up to ``2 window + 1`` values."""
    return [middle(values[max(0, i - window) : i + window + 1]) for i in range(len(values))]


def closing_table(run_dir: Path) -> Table:
    """Sum up a run: the model and its held-out loss at the ends of the phases, and its speed.

    Only what was measured is shown: a moment that the run has not reached has no column.

    Raises: ValueError as ``read_run`` does.
    """
    run = read_run(Path(run_dir))
    moments = _moments(run)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for name in moments:
        table.add_column(name, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("consumed tokens", [human_count(moment["tokens"]) for moment in moments.values()]),
        ("parameters", [_parameters(run, moment) for moment in moments.values()]),
        ("FFN width", [_width(moment) for moment in moments.values()]),
        ("held-out loss", [_held_out(run, moment) for moment in moments.values()]),
        ("training tokens/s", _speeds(run, list(moments.values()))),
    ]
    for name, cells in rows:
        if any(cells):
            table.add_row(name, *cells)
    check = _compaction_check(run)
    if check:
        table.caption, table.caption_justify, table.min_width = check, "left", len(check)
    return table


def _moments(run: Run) -> dict[str, dict[str, Any]]:
    """The records a reader wants side by side, by the name of their column, oldest first."""
    schedule, batch = run.config.schedule, run.config.batch_tokens
    moments = {"start": {**run.records[0], "step": 0, "tokens": 0}}
    if run.config.prune.strategy != "none":
        names = dict(zip(PHASES[:2], ("enlarged", "pruned"), strict=True))
        for record in run.records:
            ended = phase_ended(schedule, record["tokens"] - batch, record["tokens"])
            if ended in names:
                moments[names[ended]] = record
    last = run.records[-1]
    moments["end" if last["tokens"] >= schedule.total_tokens else "so far"] = last
    return moments


def _parameters(run: Run, moment: dict[str, Any]) -> str:
    return human_count(parameter_count(run.config.model, moment["ffn_width"]).total)


def _width(moment: dict[str, Any]) -> str:
    width = _range(moment["ffn_width"])
    live = _range(moment["ffn_live"])
    return width if live == width else f"{width} ({live} live)"


def _range(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low}-{high}"


def _held_out(run: Run, moment: dict[str, Any]) -> str:
    for event in run.evaluations():
        if event["step"] == moment["step"]:
            return f"{event['val_loss']:.4f}"
    return ""


def _speeds(run: Run, moments: Sequence[dict[str, Any]]) -> list[str]:
    """Median tokens/s at the full width under the column in which it ends, and at the last one."""
    cells = [""] * len(moments)
    cells[-1] = _speed(run, run.records[-1]["ffn_width"])
    if run.records[0]["ffn_width"] != run.records[-1]["ffn_width"]:
        cells[1] = _speed(run, run.records[0]["ffn_width"])
    return cells


def _speed(run: Run, ffn_width: Sequence[int]) -> str:
    speeds = [r["tokens_per_s"] for r in run.records if r["ffn_width"] == ffn_width]
    settled = speeds[SETTLING_STEPS:]
    return human_count(statistics.median(settled)) if settled else ""


def _compaction_check(run: Run) -> str:
    """The largest change of held-out loss by a compaction, where it was measured on both sides."""
    before = {e["step"]: e for e in run.of_kind("evaluated") if e["why"] == "compaction_before"}
    after = {e["step"]: e for e in run.of_kind("evaluated") if e["why"] == "compaction_after"}
    changes = [
        abs(after[step]["val_loss"] - before[step]["val_loss"]) for step in before if step in after
    ]
    if not changes:
        return ""
    return f"held-out loss changed by at most {max(changes):.1e} in {len(changes)} compactions"
