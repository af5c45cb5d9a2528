"""What a run will cost, before it runs: parameters, FLOPs, physical widths over time.

Everything follows from shapes and from ``schedule.py``; no tensor is made and torch is not
imported. Widths are per layer. With ``prune.scope`` global they are means over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_idea.config import Config, validate
from megatron_idea.course import (
    ParameterCount,
    WidthChange,
    _flops_at,
    flops_between,
    live_at_step,
    num_steps,
    parameter_count,
    width_plan,
)
from megatron_idea.records.readable import human_count
from megatron_idea.schedule import keep_ratio, learning_rate, phase, phase_ends, removal_window


@dataclass(frozen=True)
class PhasePlan:
    """One phase: how long it is and what it costs."""

    name: str
    tokens: int
    steps: int
    flops: int


@dataclass(frozen=True)
class Point:
    """The curves at one moment of the run."""

    label: str
    tokens: int
    step: int
    phase: str
    lr: float
    keep_ratio: float
    ffn_live: int
    ffn_width: int


@dataclass(frozen=True)
class Cost:
    """Training FLOPs of the run, and of two runs over the same tokens to hold it against."""

    this_run: int
    masks_only: int
    """The same run without compaction: the enlarged width is computed to the end."""
    target_from_scratch: int
    """Plain training at the target width."""


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts. Made by ``make_plan``."""

    run_dir: str
    world_size: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    enlarged_ffn_hidden_size: int
    target_ffn_hidden_size: int
    enlarged: ParameterCount
    target: ParameterCount
    seq_length: int
    batch_tokens: int
    total_tokens: int
    steps: int
    phases: list[PhasePlan]
    points: list[Point]
    width_changes: list[WidthChange]
    cost: Cost


def make_plan(config: Config, world_size: int = 1) -> Plan:
    """Work out a run from its configuration.

    Raises: ConfigError when the configuration cannot run on ``world_size`` processes.
    """
    validate(config, world_size)
    model, parallel, total = config.model, config.parallel, config.schedule.total_tokens
    full, target = model.ffn_hidden_size, config.target_ffn_hidden_size
    tp = parallel.tensor_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    return Plan(
        run_dir=config.run_dir,
        world_size=world_size,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        data_parallel=world_size // (tp * pp),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        vocab_size=model.vocab_size,
        enlarged_ffn_hidden_size=full,
        target_ffn_hidden_size=target,
        enlarged=parameter_count(model, [full] * model.num_layers),
        target=parameter_count(model, [target] * model.num_layers),
        seq_length=config.training.seq_length,
        batch_tokens=config.batch_tokens,
        total_tokens=total,
        steps=num_steps(config),
        phases=list(_phases(config)),
        points=list(_points(config)),
        width_changes=width_plan(config),
        cost=Cost(
            this_run=flops_between(config, 0, total),
            masks_only=total * _flops_at(config, full),
            target_from_scratch=total * _flops_at(config, target),
        ),
    )


def _phases(config: Config) -> Iterator[PhasePlan]:
    begin, begin_step = 0, 0
    for name, end in phase_ends(config.schedule).items():
        # A step belongs to the phase of its last token; the run's last step may overshoot.
        is_last = end == config.schedule.total_tokens
        end_step = num_steps(config) if is_last else end // config.batch_tokens
        yield PhasePlan(name, end - begin, end_step - begin_step, flops_between(config, begin, end))
        begin, begin_step = end, end_step


def _points(config: Config) -> Iterator[Point]:
    """The moments at which a reader wants to see the curves, in order, each step once."""
    schedule, total = config.schedule, config.schedule.total_tokens
    moments = {"first step": 0.0}
    if schedule.lr_warmup_fraction:
        moments["LR warm-up ends"] = schedule.lr_warmup_fraction * total
    moments |= {f"{percent} %": total * percent / 100 for percent in (25, 50, 75, 90)}
    if config.prune.strategy != "none":
        start, end = removal_window(schedule)
        moments["removal begins"] = start
        for percent in (10, 25, 50):
            moments[f"removal {percent} %"] = start + (end - start) * percent / 100
    # Ends go last so that they give their names to moments that fall on the same step.
    moments |= {f"{name} ends": end for name, end in phase_ends(schedule).items()}
    labels = {
        max(1, math.ceil(tokens / config.batch_tokens)): label for label, tokens in moments.items()
    }
    changes = width_plan(config)
    for step, label in sorted(labels.items()):
        tokens = step * config.batch_tokens
        yield Point(
            label=label,
            tokens=tokens,
            step=step,
            phase=phase(schedule, tokens),
            lr=learning_rate(schedule, tokens),
            keep_ratio=keep_ratio(schedule, tokens, config.final_keep_ratio),
            ffn_live=live_at_step(config, step),
            ffn_width=min(
                (change.width for change in changes if change.tokens <= tokens),
                default=config.model.ffn_hidden_size,
            ),
        )


def render_plan(plan: Plan) -> Group:
    """Lay out a plan for a terminal, about 90 columns wide."""
    prunes = plan.target_ffn_hidden_size < plan.enlarged_ffn_hidden_size
    parts = [_render_model(plan, prunes), _render_phases(plan), _render_points(plan)]
    if plan.width_changes:
        parts.append(_render_widths(plan))
    if prunes:
        parts.append(_render_cost(plan))
    return Group(_headline(plan), *(part for table in parts for part in ("", table)))


def _headline(plan: Plan) -> Text:
    processes = "process" if plan.world_size == 1 else "processes"
    return Text.assemble(
        (f"{plan.run_dir}\n", "bold"),
        f"{human_count(plan.total_tokens)} tokens in {plan.steps:,} steps of "
        f"{human_count(plan.batch_tokens)}\n",
        f"{plan.num_layers} layers, hidden {plan.hidden_size}, {plan.num_attention_heads} query "
        f"and {plan.num_query_groups} key/value heads of {plan.kv_channels}, "
        f"vocabulary {plan.vocab_size}, sequence {plan.seq_length}\n",
        f"{plan.world_size} {processes}: TP {plan.tensor_parallel} x PP {plan.pipeline_parallel} "
        f"x DP {plan.data_parallel}",
    )


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for header in left:
        table.add_column(header, no_wrap=True)
    for header in right:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _render_model(plan: Plan, prunes: bool) -> Table:
    table = _table(
        "Model", ["parameters"], ["total", "embedding", "attention", "FFN", "norms", "FFN width"]
    )
    rows = [("enlarged" if prunes else "model", plan.enlarged, plan.enlarged_ffn_hidden_size)]
    if prunes:
        rows.append(("target", plan.target, plan.target_ffn_hidden_size))
    for name, count, width in rows:
        parts = (count.embedding, count.attention, count.ffn, count.norm)
        total = human_count(count.total, digits=2)
        table.add_row(name, total, *map(human_count, parts), str(width))
    return table


def _render_phases(plan: Plan) -> Table:
    table = _table("Phases", ["phase"], ["tokens", "steps", "FLOPs", "share of FLOPs"])
    for part in plan.phases:
        share = part.flops / plan.cost.this_run
        table.add_row(
            part.name,
            human_count(part.tokens),
            f"{part.steps:,}",
            f"{part.flops:.2e}",
            f"{share:.0%}",
        )
    return table


def _render_points(plan: Plan) -> Table:
    table = _table("Curves", ["at"], ["step", "tokens", "LR", "keep ratio", "live", "width"])
    for point in plan.points:
        table.add_row(
            point.label,
            f"{point.step:,}",
            human_count(point.tokens),
            f"{point.lr:.3e}",
            f"{point.keep_ratio:.4f}",
            str(point.ffn_live),
            str(point.ffn_width),
        )
    return table


def _render_widths(plan: Plan) -> Table:
    table = _table("Compactions", [], ["#", "step", "tokens", "% of run", "FFN width"])
    for number, change in enumerate(plan.width_changes, start=1):
        table.add_row(
            str(number),
            f"{change.tokens // plan.batch_tokens:,}",
            human_count(change.tokens),
            f"{100 * change.tokens / plan.total_tokens:.2f}",
            str(change.width),
        )
    return table


def _render_cost(plan: Plan) -> Table:
    table = _table(
        "Compute for the same tokens", ["training run"], ["FLOPs", "x target from scratch"]
    )
    cost = plan.cost
    for name, flops in (
        ("this run", cost.this_run),
        ("this run, masks only", cost.masks_only),
        ("target from scratch", cost.target_from_scratch),
    ):
        table.add_row(name, f"{flops:.2e}", f"{flops / cost.target_from_scratch:.2f}")
    return table
