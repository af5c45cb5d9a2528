"""Apply a plan logically: removed neurons are silenced, everything keeps its place and size."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_idea.layers import PrunableMLP
from megatron_idea.prune.strategy import Plan


def apply_mask(mlps: Iterable[tuple[int, PrunableMLP]], plan: Plan) -> None:
    """Set each MLP's mask to the plan's live neurons."""
    for layer, mlp in mlps:
        mlp.set_mask(plan.alive[layer, mlp.neuron_ids])
