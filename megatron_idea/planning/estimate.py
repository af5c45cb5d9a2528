"""Forecast what a run will cost: parameters, FLOPs, KV cache, live and stored units over time.

Everything follows from shapes and from ``schedule.py``; no tensor is made and torch is not
imported, unless another model's folder has to be looked into, which teaches this one. Counts are
those of ``course.py``: per layer, of layers that are alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Group
from rich.text import Text

from megatron_idea.config import Config, validate
from megatron_idea.course import (
    TeacherSize,
    flops_between,
    live_at_step,
    num_steps,
    own_teacher,
    removed_by_axis,
    shape_at,
    shape_plan,
    target_shape,
    teacher_flops_between,
)
from megatron_idea.errors import UserError
from megatron_idea.planning.law import Outlook, outlook
from megatron_idea.records.readable import human_count, human_range
from megatron_idea.records.terminal import table
from megatron_idea.schedule import (
    learning_rate,
    lr_decay_begins,
    part_of_window,
    phase,
    phase_ends,
    removal_window,
)
from megatron_idea.shape import AXES, UNITS, ParameterCount, Shape

Counts = dict[str, int]
"""Units by axis: of a layer, or of the model."""


@dataclass(frozen=True)
class Size:
    """A model: what it stores, and what that adds up to."""

    stored: Counts
    parameters: ParameterCount
    flops_per_token: int
    """Of training."""
    kv_cache_bytes_per_token: int
    """Of serving at the training's precision: keys and values of all layers."""


@dataclass(frozen=True)
class PhasePlan:
    """One phase: how long it is and what it costs."""

    name: str
    tokens: int
    steps: int
    flops: int
    teacher_flops: int | None
    """As ``Cost.teacher``."""
    parameters: int
    """Stored at its end."""


@dataclass(frozen=True)
class Point:
    """The curves at one moment of the run."""

    label: str
    tokens: int
    step: int
    phase: str
    lr: float
    removed: float
    """Share of the removal that is done, in [0, 1]: the mean over the axes."""
    live: Counts
    stored: Counts


@dataclass(frozen=True)
class Compaction:
    """From ``tokens`` on the model stores so many units."""

    tokens: int
    step: int
    stored: Counts


@dataclass(frozen=True)
class Cost:
    """Training FLOPs of the run, and of two runs over the same tokens to hold it against."""

    this_run: int
    zeros_only: int
    """The same run without compaction: the enlarged model is computed to the end."""
    target_from_scratch: int
    """Plain training at the target's shape."""
    teacher: int | None
    """Of the teacher's forward passes, which ``this_run`` does not have in it; 0 without one, None
    where its size cannot be read."""


@dataclass(frozen=True)
class Forecast:
    """All that is known of a run before it starts. Made by ``forecast``."""

    run_dir: str
    world_size: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    num_attention_heads: int
    kv_channels: int
    vocab_size: int
    enlarged: Size
    target: Size
    parameter_goal: int | None
    """Most weights of the shipped model, where the method finds its shape: ``target`` and all that
    follows from it is then a forecast in equal shares."""
    alone: dict[str, Size]
    """Axis -> the enlarged model cut to the target on it alone."""
    seq_length: int
    batch_tokens: int
    total_tokens: int
    steps: int
    lr_decay_style: str
    removal: str
    """The removal curve, with the number of rounds where it has them."""
    phases: list[PhasePlan]
    points: list[Point]
    compactions: list[Compaction]
    cost: Cost
    outlook: Outlook | None
    """None where nothing is pruned."""

    @property
    def axes(self) -> list[str]:
        """List the axes along which units are removed."""
        return [axis for axis in AXES if self.enlarged.stored[axis] > self.target.stored[axis]]


def forecast(config: Config, world_size: int = 1) -> Forecast:
    """Work out a run from its configuration.

    Raises: ConfigError when the configuration cannot run on ``world_size`` processes.
    """
    validate(config, world_size)
    model, parallel, total = config.model, config.parallel, config.schedule.total_tokens
    full, target = Shape.full(model), target_shape(config)
    tp = parallel.tensor_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    teacher = teacher_size(config)
    return Forecast(
        run_dir=config.run_dir,
        world_size=world_size,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        data_parallel=world_size // (tp * pp),
        num_attention_heads=model.num_attention_heads,
        kv_channels=model.kv_channels,
        vocab_size=model.vocab_size,
        enlarged=_size(config, full),
        target=_size(config, target),
        parameter_goal=config.parameter_goal,
        alone={
            axis: _size(config, full.with_counts(axis, goal.target))
            for axis, goal in config.goals.items()
        },
        seq_length=config.training.seq_length,
        batch_tokens=config.batch_tokens,
        total_tokens=total,
        steps=num_steps(config),
        lr_decay_style=config.schedule.lr_decay_style,
        removal=f"{config.schedule.rounds} rounds"
        if config.removal == "rounds"
        else config.removal,
        phases=list(_phases(config, teacher)),
        points=list(_points(config)),
        compactions=[
            Compaction(change.tokens, change.tokens // config.batch_tokens, counts(change.shape))
            for change in shape_plan(config)
        ],
        cost=Cost(
            this_run=flops_between(config, 0, total),
            zeros_only=total * full.flops_per_token(model, config.training.seq_length),
            target_from_scratch=total * target.flops_per_token(model, config.training.seq_length),
            teacher=teacher_flops_between(config, 0, total, teacher),
        ),
        outlook=outlook(config, teacher),
    )


def teacher_size(config: Config) -> TeacherSize | None:
    """Return the size of ``distill.teacher``; None where there is none, or none that can be read.

    A run's last checkpoint may be another one by the time that this run asks for it.
    """
    if not config.distill.teaches or config.distill.teacher == "self":
        return own_teacher(config)
    from megatron_idea import checkpoint  # these import torch
    from megatron_idea.huggingface.import_ import read_model

    path = Path(config.distill.teacher)
    try:
        if (path / "config.json").is_file():
            return TeacherSize(*read_model(path))
        path = checkpoint.resolve(path)
        return TeacherSize(checkpoint.read_config(path).model, checkpoint.read_state(path).shape)
    except UserError:
        return None


def counts(shape: Shape) -> Counts:
    """Return the stored units of every axis, of a shape whose layers are alike."""
    return {axis: shape.counts(axis)[0] for axis in AXES}


def _size(config: Config, shape: Shape) -> Size:
    model, training = config.model, config.training
    width = 2 if training.precision == "bf16" else 4
    return Size(
        counts(shape),
        shape.parameters(model),
        shape.flops_per_token(model, training.seq_length),
        width * shape.kv_cache_values(model),
    )


def _phases(config: Config, teacher: TeacherSize | None) -> Iterator[PhasePlan]:
    begin, begin_step = 0, 0
    for name, end in phase_ends(config.schedule).items():
        # A step belongs to the phase of its last token; the run's last step may overshoot.
        is_last = end == config.schedule.total_tokens
        end_step = num_steps(config) if is_last else end // config.batch_tokens
        flops = flops_between(config, begin, end)
        past = shape_at(config, -(-end // config.batch_tokens) * config.batch_tokens)
        stored = past.parameters(config.model).total
        asked = teacher_flops_between(config, begin, end, teacher)
        yield PhasePlan(name, end - begin, end_step - begin_step, flops, asked, stored)
        begin, begin_step = end, end_step


def _points(config: Config) -> Iterator[Point]:
    """Iterate over moments at which a reader wants to see the curves, in order, each step once."""
    schedule, total = config.schedule, config.schedule.total_tokens
    moments = {"first step": 0.0}
    if schedule.lr_warmup_fraction:
        moments["LR warm-up ends"] = schedule.lr_warmup_fraction * total
    moments |= {f"{percent} %": total * percent / 100 for percent in (25, 50, 75, 90)}
    if schedule.lr_decay_style == "WSD":
        names = ("LR decay begins", "LR decay begins again")
        moments |= dict(zip(names, lr_decay_begins(schedule), strict=False))
    if config.prune.strategy != "none":
        start, end = removal_window(schedule)
        moments["removal begins"] = start
        for percent in (10, 25, 50):
            moments[f"removal {percent} %"] = start + (end - start) * percent / 100
        for begin in {goal.begin for goal in config.goals.values()} - {0.0}:
            units = [f"{UNITS[a]}s" for a, goal in config.goals.items() if goal.begin == begin]
            moments[f"{', '.join(units)} begin"], _ = part_of_window(schedule, begin)
    # Ends go last so that they give their names to moments that fall on the same step.
    moments |= {f"{name} ends": end for name, end in phase_ends(schedule).items()}
    labels = {
        max(1, math.ceil(tokens / config.batch_tokens)): label for label, tokens in moments.items()
    }
    for step, label in sorted(labels.items()):
        tokens = step * config.batch_tokens
        stored = counts(shape_at(config, tokens))
        yield Point(
            label=label,
            tokens=tokens,
            step=step,
            phase=phase(schedule, tokens),
            lr=learning_rate(schedule, tokens),
            removed=fmean(removed_by_axis(config, tokens).values() or [0.0]),
            live=stored | live_at_step(config, step),
            stored=stored,
        )


def render(run: Forecast) -> Group:
    """Lay out a forecast for a terminal, about 90 columns wide."""
    tables = [_render_model(run), _render_phases(run), _render_points(run)]
    if run.compactions:
        tables.append(_render_compactions(run))
    if run.axes or run.cost.teacher != 0:
        tables.append(_render_cost(run))
    if run.outlook is not None:
        tables.append(_render_outlook(run.outlook))
    return Group(_headline(run), *(part for each in tables for part in ("", each)))


def _headline(run: Forecast) -> Text:
    processes = "process" if run.world_size == 1 else "processes"
    model, goal = run.enlarged.stored, run.parameter_goal
    found = (
        "\ntarget: {:,} parameters; the method finds the shape, below is a forecast in equal shares"
    )
    return Text.assemble(
        (f"{run.run_dir}\n", "bold"),
        f"{human_count(run.total_tokens)} tokens in {run.steps:,} steps of "
        f"{human_count(run.batch_tokens)}\n",
        f"{model['num_layers']} layers, hidden {model['hidden_size']}, {run.num_attention_heads} "
        f"query and {model['num_query_groups']} key/value heads of {run.kv_channels}, "
        f"vocabulary {run.vocab_size}, sequence {run.seq_length}\n",
        f"{run.world_size} {processes}: TP {run.tensor_parallel} x PP {run.pipeline_parallel} "
        f"x DP {run.data_parallel}",
        "" if goal is None else found.format(goal),
    )


def _units(run: Forecast) -> dict[str, str]:
    """Name the axes that have a column: those that units are removed along, else the neurons."""
    return {axis: f"{UNITS[axis]}s" for axis in run.axes or ["ffn_hidden_size"]}


def _render_model(run: Forecast) -> Group:
    sizes = {"model": run.target}
    if run.axes:
        alone = {f"{UNITS[axis]}s alone": run.alone[axis] for axis in run.axes}
        sizes = {
            "enlarged": run.enlarged,
            **(alone if len(alone) > 1 else {}),
            "target" if run.parameter_goal is None else "forecast": run.target,
        }
    rows = [
        (
            name,
            human_count(size.parameters.total, digits=2),
            human_count(size.parameters.embedding),
            human_count(size.parameters.attention),
            human_count(size.parameters.ffn),
            human_count(size.parameters.norm),
            f"{size.flops_per_token:.2e}",
            human_count(size.kv_cache_bytes_per_token),
            *(str(size.stored[axis]) for axis in _units(run)),
        )
        for name, size in sizes.items()
    ]
    parts = ("total", "embedding", "attention", "FFN", "norms", "FLOPs/token", "KV bytes/token")
    return table(("parameters", *parts, *_units(run).values()), rows, title="Model")


def _render_phases(run: Forecast) -> Group:
    rows = [
        (
            part.name,
            human_count(part.tokens),
            f"{part.steps:,}",
            f"{part.flops:.2e}",
            f"{part.flops / run.cost.this_run:.0%}",
            human_count(part.parameters),
        )
        for part in run.phases
    ]
    columns = ("phase", "tokens", "steps", "FLOPs", "share of FLOPs", "parameters at its end")
    return table(columns, rows, title="Phases")


def _render_points(run: Forecast) -> Group:
    rows = [
        (
            point.label,
            f"{point.step:,}",
            human_count(point.tokens),
            f"{point.lr:.3e}",
            f"{point.removed:.4f}",
            *(str(each[axis]) for axis in _units(run) for each in (point.live, point.stored)),
        )
        for point in run.points
    ]
    each = [name for unit in _units(run).values() for name in (f"live {unit}", "stored")]
    title = f"Curves: learning rate {run.lr_decay_style}"
    title += f", removal {run.removal}" if run.axes else ""
    return table(("at", "step", "tokens", "LR", "removed", *each), rows, title=title)


def _render_compactions(run: Forecast) -> Group:
    rows = [
        (
            str(number),
            f"{change.step:,}",
            human_count(change.tokens),
            f"{100 * change.tokens / run.total_tokens:.2f}",
            *(str(change.stored[axis]) for axis in _units(run)),
        )
        for number, change in enumerate(run.compactions, start=1)
    ]
    columns = ("#", "step", "tokens", "% of run", *_units(run).values())
    return table(columns, rows, title="Compactions", left=0)


def _render_cost(run: Forecast) -> Group:
    cost = run.cost
    parts: dict[str, int | None] = {"this run": cost.this_run}
    if cost.teacher != 0:
        parts["its teacher, forward passes"] = cost.teacher
    if run.axes:
        parts["this run, zeros only"] = cost.zeros_only
        parts["target from scratch"] = cost.target_from_scratch
    rows = [
        (name, "not known", "")
        if flops is None
        else (name, f"{flops:.2e}", f"{flops / cost.target_from_scratch:.2f}")
        for name, flops in parts.items()
    ]
    columns = ("training run", "FLOPs", "x target from scratch")
    return table(columns, rows, title="Compute for the same tokens")


def _render_outlook(outlook: Outlook) -> Group:
    rows = [
        (
            name,
            human_count(one.average_parameters),
            human_count(one.tokens),
            f"{one.flops:.2e}",
            f"{one.loss:.4f}{' ' if one.in_range else '*'}",
            "" if one is outlook.this_run else f"{one.difference:+.4f}",
        )
        for name, one in outlook.predictions.items()
    ]
    law = outlook.law
    note = (
        f"By the law of {law.name}, which does not know the method, a teacher or data that "
        "repeat. Difference: this run's loss minus the row's, below 0 this run is better."
    )
    if not all(one.in_range for one in outlook.predictions.values()):
        note += (
            f"\n* outside the range of the law ({human_range(law.parameters)} parameters, "
            f"{human_range(law.tokens_per_parameter)} tokens per parameter): an extrapolation."
        )
    if outlook.without_teacher:
        note += "\nWithout the teacher's FLOPs: its size cannot be read from distill.teacher."
    columns = ("training run", "average parameters", "tokens", "FLOPs", "predicted loss")
    return table((*columns, "difference"), rows, title="Should it pay?", note=note)
