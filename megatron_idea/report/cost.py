"""Training FLOPs of a run from the widths that it recorded, and of what it is held against."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_idea.course import flops_per_token
from megatron_idea.report.run import Run


@dataclass(frozen=True)
class Cost:
    """Training FLOPs after each recorded step, in the same order; evaluations are not in them."""

    tokens: list[int]
    this_run: list[float]
    masks_only: list[float]
    """Had no neuron been removed physically."""
    ideal: list[float]
    """Had every neuron been removed in the step that masked it."""
    from_scratch: list[float]
    """Plain training at the target width, over the same tokens."""


@functools.lru_cache(maxsize=32)
def cost(run: Run) -> Cost:
    """Add up a run's FLOPs. A step is computed at the widths that the step before it left."""
    model, seq_length = run.config.model, run.config.training.seq_length
    known: dict[tuple[int, ...], int] = {}

    def per_token(widths: Sequence[int]) -> int:
        key = tuple(widths)
        if key not in known:
            known[key] = flops_per_token(model, key, seq_length)
        return known[key]

    first = run.records[0]
    full = [max(model.ffn_hidden_size, *first["ffn_width"])] * model.num_layers
    target = [run.config.target_ffn_hidden_size] * model.num_layers
    # The records' first tokens may lie after the run's: one that began from another's checkpoint.
    done = first["tokens"] - run.config.batch_tokens
    width, live = first["ffn_width"], first["ffn_live"]
    rates = [per_token(widths) for widths in (width, full, live, target)]
    total = Cost([], [], [], [], [])
    columns = (total.this_run, total.masks_only, total.ideal, total.from_scratch)
    sums = [0.0, 0.0, 0.0, 0.0]
    for record in run.records:
        tokens = record["tokens"] - done
        for i, column in enumerate(columns):
            sums[i] += tokens * rates[i]
            column.append(sums[i])
        total.tokens.append(record["tokens"])
        done = record["tokens"]
        # Neighbours with equal widths share their lists, see read_metrics.
        if record["ffn_width"] is not width:
            width = record["ffn_width"]
            rates[0] = per_token(width)
        if record["ffn_live"] is not live:
            live = record["ffn_live"]
            rates[2] = per_token(live)
    return total
