"""Count the training FLOPs of a run from its recorded shapes, and of what it is compared with."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from megatron_idea.course import finished_axes, own_teacher, target_shape
from megatron_idea.records.record import shape_of
from megatron_idea.report.run import Run
from megatron_idea.shape import Shape


@dataclass(frozen=True)
class Cost:
    """Holds sums up to each recorded step: of training FLOPs, without evaluations."""

    tokens: list[int]
    this_run: list[float]
    zeros_only: list[float]
    """Had nothing been removed from memory."""
    ideal: list[float]
    """Had every unit been removed from memory in the step that silenced it."""
    from_scratch: list[float]
    """Plain training of the target's shape, over the same tokens; where the method finds the shape
    it is the one found, and until then the forecast."""
    teacher: list[float]
    """Of the teacher's forward passes, which are in none of the others; NaN once a teacher was
    asked whose size is not in the run's records."""
    parameter_tokens: list[float]
    """Not FLOPs: the live parameters in each step times its tokens, added up."""


@functools.lru_cache(maxsize=32)
def cost(run: Run) -> Cost:
    """Add up a run's FLOPs; a step runs in the shape that the step before it left."""
    model, seq_length = run.config.model, run.config.training.seq_length

    def per_token(shape: Shape) -> int:
        return shape.flops_per_token(model, seq_length)

    # The records' first tokens may lie after the run's: one that began from another's checkpoint.
    done = run.records[0].tokens - run.config.batch_tokens
    live, stored = run.records[0].live, run.records[0].stored
    shapes = (shape_of(model, stored), Shape.full(model), shape_of(model, live))
    teacher = own_teacher(run.config)
    asked = teacher.flops_per_token(seq_length) if teacher else math.nan
    rates = [*map(per_token, shapes), per_token(_target(run)), 0.0]
    rates.append(shapes[2].parameters(model).total)
    total = Cost([], [], [], [], [], [], [])
    columns = (
        total.this_run, total.zeros_only, total.ideal, total.from_scratch, total.teacher,
        total.parameter_tokens,
    )  # fmt: skip
    sums = [0.0] * len(columns)
    for record in run.records:
        tokens = record.tokens - done
        rates[4] = 0.0 if record.kl is None else asked
        for i, column in enumerate(columns):
            sums[i] += tokens * rates[i]
            column.append(sums[i])
        total.tokens.append(record.tokens)
        done = record.tokens
        # Neighbours with equal counts share them, see Record.parse.
        if record.stored is not stored:
            stored = record.stored
            rates[0] = per_token(shape_of(model, stored))
        if record.live is not live:
            live = record.live
            shape = shape_of(model, live)
            rates[2], rates[5] = per_token(shape), shape.parameters(model).total
    return total


def _target(run: Run) -> Shape:
    config, last = run.config, run.records[-1]
    found = len(finished_axes(config, last.tokens)) == len(config.goals)
    if config.parameter_goal is not None and found:
        return shape_of(config.model, last.live)
    return target_shape(config)
