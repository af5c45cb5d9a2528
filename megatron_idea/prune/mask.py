"""Apply a plan logically: removed neurons are silenced, everything keeps its place and size."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_idea.engine.distributed import on_device
from megatron_idea.engine.layers import PrunableMLP
from megatron_idea.prune.strategy import Plan


def apply_mask(mlps: Iterable[tuple[int, PrunableMLP]], plan: Plan) -> None:
    """Set each MLP's mask to the plan's live neurons."""
    live, alive = plan.live, None
    for layer, mlp in mlps:
        if alive is None:
            alive = on_device(plan.alive, mlp.mask.device)
        stored = mlp.width * mlp.tp_group.size()
        mlp.set_mask(alive[layer, mlp.neuron_ids], whole=live[layer] == stored)
