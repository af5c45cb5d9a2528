"""What the clock will bring: steps, live and stored units, FLOPs over consumed tokens.

Layers are alike here. With ``prune.scope`` global, counts per layer are means over the layers.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from megatron_idea.config import Config
from megatron_idea.schedule import part_of_window, removal_window, removed
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
    """Optimizer steps of the run; the last one is the first that reaches ``total_tokens``."""
    return -(-config.schedule.total_tokens // config.batch_tokens)


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
    """Consumed tokens by which the last plan was made once ``step`` optimizer steps are done.

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
    """Training FLOPs from ``start`` to ``end`` consumed tokens, the model shrinking as planned."""
    flops = 0
    shape, begin = Shape.full(config.model), 0
    for change in [*shape_plan(config), ShapeChange(max(end, 0), shape)]:
        tokens = max(0, min(change.tokens, end) - max(begin, start))
        flops += tokens * shape.flops_per_token(config.model, config.training.seq_length)
        shape, begin = change.shape, change.tokens
    return flops


def remaining_flops(config: Config, tokens: int) -> int:
    """Training FLOPs still to do after ``tokens`` consumed tokens; evaluations are not in it."""
    return flops_between(config, tokens, config.schedule.total_tokens)
