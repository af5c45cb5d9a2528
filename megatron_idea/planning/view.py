"""Show a budget: tables for a terminal, and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from megatron_idea.engine.gpus import USABLE, Gpu
from megatron_idea.planning.budget import AfterPrune, Budget, Layout, Stretch
from megatron_idea.records.readable import gigabytes, human_count
from megatron_idea.records.terminal import table
from megatron_idea.report.picture import MUTED, RC
from megatron_idea.shape import UNITS

BLUE, ORANGE, GREEN, RED, VIOLET = "#2563eb", "#ea580c", "#0f766e", "#be123c", "#6d28d9"

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "main_weights": "main",
    "moments": "moments",
    "activations": "activations",
    "teacher": "teacher",
}


def render_budget(budget: Budget) -> Group:
    """Lay out a budget for a terminal, about 100 columns wide."""
    parts: list[RenderableType] = [_headline(budget), _render_memory(budget)]
    if len(budget.stretches) > 1:
        parts.append(_render_compactions(budget))
    parts += [_render_hours(budget), _render_messages(budget)]
    return Group(*(part for each in parts for part in ("", each)))


def _headline(budget: Budget) -> Text:
    assume = budget.assumptions
    return Text.assemble(
        (f"{budget.gpus} x {budget.gpu}", "bold"),
        f"   TP {budget.tensor_parallel} x PP {budget.pipeline_parallel} x DP "
        f"{budget.data_parallel}, {budget.num_microbatches} micro-batches of "
        f"{budget.micro_batch_size} a step, about {budget.days:.1f} days\n"
        f"assumed, not measured: MFU {assume.mfu:g}, "
        f"{8e-9 * assume.network_bytes_per_s:g} Gb/s a GPU between nodes, "
        f"{USABLE:.0%} of a GPU's memory may be filled",
        "" if all(phase.teacher is not None for phase in budget.phases) else _UNKNOWN_TEACHER,
    )


_UNKNOWN_TEACHER = "\nwithout the teacher: its size cannot be read from distill.teacher"


def _kinds(budget: Budget) -> dict[str, str]:
    """Name the kinds of memory that there are: a teacher only where there is one."""
    teaches = any(stretch.memory.teacher for stretch in budget.stretches)
    return {kind: name for kind, name in KINDS.items() if teaches or kind != "teacher"}


def _units(budget: Budget) -> dict[str, str]:
    """Name the axes that have a column: those along which the model shrinks, else the neurons."""
    first, last = budget.stretches[0].stored, budget.stretches[-1].stored
    shrink = [axis for axis in first if last[axis] < first[axis]] or ["ffn_hidden_size"]
    return {axis: f"{UNITS[axis]}s" for axis in shrink}


def _stored(budget: Budget, stretch: Stretch) -> list[str]:
    return [str(stretch.stored[axis]) for axis in _units(budget)]


def _render_memory(budget: Budget) -> Group:
    rows = []
    for stretch in budget.stretches:
        kinds = dataclasses.asdict(stretch.memory)
        sizes = (*(kinds[kind] for kind in _kinds(budget)), stretch.total_bytes)
        tokens = human_count(stretch.tokens)
        rows.append((tokens, *_stored(budget, stretch), *map(gigabytes, sizes)))
    return table(
        ("from token", *_units(budget).values(), *_kinds(budget).values(), "total"),
        rows,
        title=f"Memory of the fullest GPU in GB ({gigabytes(budget.usable_bytes)} may be filled)",
        note=f"{_fullest(budget)}; activations: what layers keep and make, without workspaces of "
        "kernels"
        + (
            "; teacher: from when it begins to teach, weights and hidden states that wait"
            if "teacher" in _kinds(budget)
            else ""
        ),
    )


def _fullest(budget: Budget) -> str:
    stages = sorted({stretch.stage for stretch in budget.stretches})
    return f"pipeline stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"


def _render_compactions(budget: Budget) -> Group:
    rows = [
        (
            human_count(stretch.tokens),
            *_stored(budget, stretch),
            gigabytes(stretch.compaction_peak_bytes),
            gigabytes(stretch.compaction_sent_bytes),
            f"{stretch.compaction_wire_s:.2f}",
            gigabytes(stretch.checkpoint_bytes),
        )
        for stretch in budget.stretches[1:]
    ]
    units = (f"to {unit}" for unit in _units(budget).values())
    return table(
        ("at token", *units, "peak", "sent", "seconds on the wire", "checkpoint after"),
        rows,
        title="Compactions, on one GPU in GB",
        note="peak: alive at once after gradients were freed, when units and layers go by chance; "
        "the rebuild itself takes time on top",
    )


def _render_hours(budget: Budget) -> Group:
    names = ["this_run", "teacher", "zeros_only", "target_from_scratch"]
    if not any(phase.teacher for phase in budget.phases):
        names.remove("teacher")
    rows = [
        (
            phase.name,
            human_count(phase.tokens),
            f"{phase.flops_per_token:.2e}",
            *(f"{getattr(phase, name):,.0f}" for name in names),
        )
        for phase in budget.phases
    ]
    sums = [sum(getattr(phase, name) for phase in budget.phases) for name in names]
    tokens = sum(phase.tokens for phase in budget.phases)
    rows.append(("all", human_count(tokens), "", *(f"{hours:,.0f}" for hours in sums)))
    columns = ("phase", "tokens", "FLOPs/token", *(name.replace("_", " ") for name in names))
    return table(columns, rows, title="GPU-hours, for the same tokens")


def _render_messages(budget: Budget) -> Group:
    ends = {"enlarged": budget.stretches[0], "last": budget.stretches[-1]}
    rows = [
        (
            name,
            *(gigabytes(at.sent_bytes[kind]) for kind in ("tp", "pp", "dp", "embedding")),
            f"{at.step_s:.3f}",
            gigabytes(at.checkpoint_bytes),
        )
        for name, at in list(ends.items())[: len(budget.stretches)]
    ]
    return table(
        ("GB sent by a GPU over", "TP", "PP", "DP", "tied embedding", "step in s", "checkpoint"),
        rows,
        title="One optimizer step of the enlarged model, and of the last",
    )


def render_layouts(fitting: Sequence[Layout], refused: Sequence[Layout], gpu: Gpu) -> Group:
    """Lay out the fastest layouts and what holds each back, and why others do not fit."""
    rows = []
    for layout in fitting[:5]:
        waits = {k: v / layout.step_s for k, v in layout.seconds.items() if k != "compute"}
        said = [f"{kind} {share:.0%}" for kind, share in waits.items() if share >= 0.005]
        rows.append(
            (
                _name(layout),
                f"{layout.num_microbatches} x {layout.micro_batch_size}",
                gigabytes(layout.total_bytes),
                f"{layout.step_s:.3f}",
                ", ".join(said) or "nothing",
            )
        )
    columns = ("TP x PP x DP", "micro-batch", "GB", "step in s", "waits for")
    shown = [table(columns, rows, title=f"Layouts that fit {gpu.name}, fastest first")]
    lines = [Text(f"{_name(layout)} does not fit: {layout.refusal}") for layout in refused[:5]]
    return Group("", *(shown if fitting else []), *lines)


def render_after_prune(after: AfterPrune) -> Text:
    """Say which layout the small model would be faster in, and what that saves."""
    now, best = after.now, after.best
    if best is now:
        return Text(f"The small model is at its fastest in this run's layout, {_name(now)}.")
    return Text(
        f"The small model is faster in {_name(best)}: a step of {best.step_s:.3f} s in place of "
        f"{now.step_s:.3f} s saves {after.gpu_hours_saved:,.0f} GPU-hours over the last "
        f"{after.steps:,} steps. parallel_after_prune: {{tensor_model_parallel_size: "
        f"{best.tensor_parallel}, pipeline_model_parallel_size: {best.pipeline_parallel}, "
        "virtual_pipeline_model_parallel_size: 1}"
    )


def _name(layout: Layout) -> str:
    return f"{layout.tensor_parallel} x {layout.pipeline_parallel} x {layout.data_parallel}"


def draw_budget(budget: Budget, path: Path) -> None:
    """Draw memory by kind and cost over tokens into a PNG file."""
    # Here, not above: matplotlib takes a second to import, and the tables need none of it.
    import matplotlib

    with matplotlib.rc_context(RC):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import FuncFormatter

        figure = Figure(figsize=(9, 6.4), layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08))
        FigureCanvasAgg(figure)
        memory, hours = figure.subplots(2, 1, sharex=True, height_ratios=(1.3, 1))
        _draw_memory(memory, budget)
        _draw_hours(hours, budget)
        hours.set_xlim(0, sum(phase.tokens for phase in budget.phases))
        hours.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
        hours.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
        hours.set_xlabel("consumed tokens")
        title = f"{budget.gpus} x {budget.gpu}, as planned: nothing here was measured"
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.savefig(path, dpi=200)


def _draw_memory(axis: Axes, budget: Budget) -> None:
    end = sum(phase.tokens for phase in budget.phases)
    shown = _kinds(budget)
    tokens = [stretch.tokens for stretch in budget.stretches] + [end]
    kinds = [dataclasses.asdict(stretch.memory) for stretch in budget.stretches]
    kinds.append(kinds[-1])
    colors: dict[str, Any] = dict(
        zip(KINDS, (BLUE, GREEN, MUTED, RED, ORANGE, VIOLET), strict=True)
    )
    axis.stackplot(
        tokens,
        *([each[kind] / 1e9 for each in kinds] for kind in shown),
        labels=["main weights" if kind == "main_weights" else kind for kind in shown],
        colors=[colors[kind] for kind in shown],
        alpha=0.75,
        step="post",
        linewidth=0,
    )
    axis.axhline(budget.usable_bytes / 1e9, color=RED, linewidth=1, linestyle=(0, (4, 3)))
    axis.annotate(
        "may be filled", xy=(0.005, budget.usable_bytes / 1e9), color=RED, fontsize=9,
        xycoords=axis.get_yaxis_transform(), xytext=(0, 3), textcoords="offset points",
    )  # fmt: skip
    top = max(budget.usable_bytes, *(stretch.total_bytes for stretch in budget.stretches))
    axis.set_ylim(0, 1.3 * top / 1e9)
    axis.set_ylabel("GB on the fullest GPU")
    axis.legend(loc="upper right", ncols=len(shown), handlelength=1.2, columnspacing=1.0)


def _draw_hours(axis: Axes, budget: Budget) -> None:
    for name, label, color in (
        ("zeros_only", "zeros only", MUTED),
        ("this_run", "this run", BLUE),
        ("target_from_scratch", "target from scratch", ORANGE),
    ):
        tokens, hours = [0], [0.0]
        for phase in budget.phases:
            tokens.append(tokens[-1] + phase.tokens)
            hours.append(hours[-1] + getattr(phase, name))
        axis.plot(tokens, hours, color=color, linewidth=1.8, label=label)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("GPU-hours")
    axis.legend(loc="upper left")
