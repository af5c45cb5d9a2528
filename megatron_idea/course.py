"""What the clock will bring: steps, live and stored units, FLOPs over consumed tokens.

Layers are alike here. With ``prune.scope`` global, counts per layer are means over the layers.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from megatron_idea.config import Config
from megatron_idea.schedule import removal_window, removed
from megatron_idea.shape import Shape, due_counts, live_count


@dataclass(frozen=True)
class ShapeChange:
    """A compaction: from ``tokens`` consumed tokens on, the model is stored in ``shape``."""

    tokens: int
    shape: Shape


@dataclass(frozen=True)
class _Removal:
    """What a run removes along one axis: units of a layer, or of the model."""

    full: int
    target: int
    multiple: int
    """Stored counts are multiples of this."""
    block: int
    """Units that are removed from memory together."""


def _removals(config: Config) -> dict[str, _Removal]:
    """Look up the axes that a run's configuration gives a target for."""
    neurons = _Removal(
        config.model.ffn_hidden_size,
        config.target_ffn_hidden_size,
        config.ffn_multiple,
        config.compaction_block,
    )
    return {"ffn_hidden_size": neurons}


def target_shape(config: Config) -> Shape:
    """Return the shape that the run ends with."""
    shape = Shape.full(config.model)
    for axis, removal in _removals(config).items():
        shape = shape.with_counts(axis, removal.target)
    return shape


def num_steps(config: Config) -> int:
    """Optimizer steps of the run; the last one is the first that reaches ``total_tokens``."""
    return -(-config.schedule.total_tokens // config.batch_tokens)


def removed_at(config: Config, tokens: int) -> float:
    """Return the share of the removal that is due by ``tokens`` consumed tokens, in [0, 1]."""
    if config.prune.strategy == "none":
        return 0.0
    return removed(config.schedule, tokens)


def live_at_step(config: Config, step: int) -> dict[str, int]:
    """Count the units alive, by axis, once ``step`` optimizer steps are done.

    Units go every ``prune.mask_interval_steps`` and in any step past the removal window.
    """
    tokens = step * config.batch_tokens
    if tokens < removal_window(config.schedule)[1]:
        tokens -= step % config.prune.mask_interval_steps * config.batch_tokens
    return {
        axis: live_count(gone.full, gone.target, removed(config.schedule, tokens))
        for axis, gone in _removals(config).items()
    }


def shape_plan(config: Config) -> list[ShapeChange]:
    """Predict the compactions of a run, by the rule that the run follows: ``shape.due_counts``.

    Live counts never grow, so each compaction is found by bisection over steps.
    """
    if not config.prune.compact:
        return []
    removals = _removals(config)
    window_end = removal_window(config.schedule)[1]
    shape = Shape.full(config.model)
    stored = {axis: gone.full for axis, gone in removals.items()}

    def due(step: int) -> dict[str, int]:
        live, final = live_at_step(config, step), step * config.batch_tokens >= window_end
        return {
            axis: due_counts([stored[axis]], [live[axis]], gone.multiple, gone.block, final)[0]
            for axis, gone in removals.items()
        }

    changes: list[ShapeChange] = []
    steps, index = range(1, num_steps(config) + 1), 0
    while True:
        index = bisect_left(steps, True, lo=index, key=lambda step: due(step) != stored)
        if index == len(steps):
            return changes
        stored = due(steps[index])
        for axis, count in stored.items():
            shape = shape.with_counts(axis, count)
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
