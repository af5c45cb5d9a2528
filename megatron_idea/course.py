"""What the clock will bring: steps, live and stored units, FLOPs over consumed tokens.

Layers are alike here. With ``prune.scope`` global, counts per layer are means over the layers.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from megatron_idea.config import Config, ModelConfig
from megatron_idea.schedule import (
    part_of_window,
    phase_ends,
    removal_window,
    removed,
    teaching_begins,
)
from megatron_idea.shape import Shape, due_shape, live_count


@dataclass(frozen=True)
class ShapeChange:
    """A compaction: from ``tokens`` consumed tokens on, the model is stored in ``shape``."""

    tokens: int
    shape: Shape


def target_shape(config: Config) -> Shape:
    """Return the shape that the run ends with."""
    shape = Shape.full(config.model)
    for axis, goal in config.goals.items():
        shape = shape.with_counts(axis, goal.target)
    return shape


def num_steps(config: Config) -> int:
    """Count the optimizer steps of the run; the last is the first to reach ``total_tokens``."""
    return -(-config.schedule.total_tokens // config.batch_tokens)


def layout_at(config: Config, tokens: int) -> Config:
    """Return the configuration in the layout that it has after ``tokens`` consumed tokens."""
    return config.after_prune if tokens >= phase_ends(config.schedule)["prune"] else config


def wants_fewer_nodes(config: Config, tokens: int, nodes: int) -> bool:
    """Tell whether a job has more nodes than its run is to have after ``tokens`` tokens."""
    is_small = phase_ends(config.schedule)["prune"] <= tokens < config.schedule.total_tokens
    return is_small and 0 < config.nodes_after_prune < nodes


def removed_at(config: Config, tokens: int) -> float:
    """Return the share of the removal that is due by ``tokens`` consumed tokens, in [0, 1]."""
    if config.prune.strategy == "none":
        return 0.0
    return removed(config.schedule, config.removal, tokens)


def removed_by_axis(config: Config, tokens: int) -> dict[str, float]:
    """Return each axis's share of its removal that is due by ``tokens`` consumed tokens."""
    return {
        axis: removed(config.schedule, config.removal, tokens, goal.begin, goal.end)
        for axis, goal in config.goals.items()
    }


def finished_axes(config: Config, tokens: int) -> list[str]:
    """List the axes of which nothing more is to be removed after ``tokens`` consumed tokens."""
    return [
        axis
        for axis, goal in config.goals.items()
        if tokens >= part_of_window(config.schedule, goal.begin, goal.end)[1]
    ]


def planned_tokens(config: Config, step: int) -> int:
    """Return the consumed tokens by which the last plan was made once ``step`` steps are done.

    Units go every ``prune.mask_interval_steps`` and in any step past the removal window.
    """
    tokens = step * config.batch_tokens
    if tokens < removal_window(config.schedule)[1]:
        tokens -= step % config.prune.mask_interval_steps * config.batch_tokens
    return tokens


def live_at_step(config: Config, step: int) -> dict[str, int]:
    """Count the units alive, by axis, once ``step`` optimizer steps are done."""
    shares = removed_by_axis(config, planned_tokens(config, step))
    return {
        axis: live_count(goal.full, goal.target, shares[axis])
        for axis, goal in config.goals.items()
    }


def shape_plan(config: Config) -> list[ShapeChange]:
    """Predict the compactions of a run, by the rule that the run follows: ``shape.due_shape``.

    Live counts never grow, so each compaction is found by bisection over steps. Which layers go
    is not known: the last ones stand for them.
    """
    if not config.prune.compact:
        return []
    goals, full = config.goals, Shape.full(config.model)
    shape = full

    def due(step: int) -> Shape:
        live = live_at_step(config, step)
        return due_shape(
            shape,
            {axis: [count] * full.num_layers for axis, count in live.items()},
            range(live.get("num_layers", full.num_layers)),
            goals,
            finished_axes(config, planned_tokens(config, step)),
        )

    changes: list[ShapeChange] = []
    steps, index = range(1, num_steps(config) + 1), 0
    while True:
        index = bisect_left(steps, True, lo=index, key=lambda step: due(step) != shape)
        if index == len(steps):
            return changes
        shape = due(steps[index])
        changes.append(ShapeChange(steps[index] * config.batch_tokens, shape))


def shape_at(config: Config, tokens: int) -> Shape:
    """Return the shape with which the step after ``tokens`` consumed tokens runs."""
    begun = [change.shape for change in shape_plan(config) if change.tokens <= tokens]
    return begun[-1] if begun else Shape.full(config.model)


def flops_between(config: Config, start: int, end: int) -> int:
    """Add up training FLOPs from ``start`` to ``end`` consumed tokens, shrinking as planned."""
    flops = 0
    shape, begin = Shape.full(config.model), 0
    for change in [*shape_plan(config), ShapeChange(max(end, 0), shape)]:
        tokens = max(0, min(change.tokens, end) - max(begin, start))
        flops += tokens * shape.flops_per_token(config.model, config.training.seq_length)
        shape, begin = change.shape, change.tokens
    return flops


def remaining_flops(config: Config, tokens: int) -> int:
    """Add up the training FLOPs still to do after ``tokens`` consumed tokens, no evaluations."""
    return flops_between(config, tokens, config.schedule.total_tokens)


@dataclass(frozen=True)
class TeacherSize:
    """Holds how large a teacher is; what its forward passes cost follows from it."""

    model: ModelConfig
    shape: Shape

    def flops_per_token(self, seq_length: int) -> int:
        """Return the FLOPs of a forward pass: a third of training's, which goes back for two."""
        return self.shape.flops_per_token(self.model, seq_length) // 3


def own_teacher(config: Config) -> TeacherSize | None:
    """Return the size of ``distill.teacher=self``; None for another teacher, or for none."""
    if not config.distill.teaches or config.distill.teacher != "self":
        return None
    return TeacherSize(config.model, Shape.full(config.model))


def taught_between(config: Config, start: int, end: int) -> int:
    """Count the tokens from ``start`` to ``end`` consumed ones in steps that ask the teacher.

    The step that begins in the enlarged phase and ends past it does; the run's last one does not
    where ``distill.alpha_end`` is 0.
    """
    distill, batch = config.distill, config.batch_tokens
    if not distill.teaches:
        return 0
    first = teaching_begins(config.schedule, distill) // batch * batch
    last = (num_steps(config) - (distill.alpha_end == 0)) * batch
    return max(0, min(end, last) - max(start, first))


def teacher_flops_between(
    config: Config, start: int, end: int, teacher: TeacherSize | None
) -> int | None:
    """Add up the FLOPs of the teacher's forward passes from ``start`` to ``end`` consumed tokens.

    Returns: 0 where nobody is asked; None where somebody is whose size is not known.
    """
    tokens = taught_between(config, start, end)
    if tokens and teacher is None:
        return None
    return tokens * teacher.flops_per_token(config.training.seq_length) if teacher else 0
