"""AdamW on megatron-core: build it, step it, set its state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    DistributedOptimizer,
    MegatronOptimizer,
    clip_grads,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from torch import Tensor

from megatron_idea.config import ModelConfig, OptimizerConfig, ScheduleConfig
from megatron_idea.engine.core_versions import grads_for_norm
from megatron_idea.engine.distributed import ProcessGroups, device
from megatron_idea.engine.shards import MOMENTS, shard_of


def build_optimizer(
    model: ModelConfig,
    settings: OptimizerConfig,
    schedule: ScheduleConfig,
    chunks: Sequence[DistributedDataParallel],
    groups: ProcessGroups,
) -> MegatronOptimizer:
    """Build AdamW over ``chunks``: Transformer Engine's or apex's fused one if there, else torch's.

    Norm weights are not decayed. With ``lr_scaling=mup_simple`` matrices of attention and FFN step
    with lr * min(768 / hidden_size, 1) while their decay per step stays that of the plain rate.
    """
    core, ddp = chunks[0].config, chunks[0].ddp_config
    core_config = CoreOptimizerConfig(
        optimizer="adam",
        lr=schedule.lr,
        min_lr=schedule.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=core.bf16,
        params_dtype=core.params_dtype,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(core_config)
    # By the enlarged model's hidden size, whatever is stored: removing channels must not bend the
    # learning rate.
    scale = settings.matrix_scale(model.hidden_size)
    if scale < 1:
        matrices = ParamKey(name="*decoder.layers.*.linear_*.weight")
        overrides[matrices] = {"max_lr": schedule.lr * scale, "wd_mult": 1.0 / scale}
    (optimizer,) = get_megatron_optimizer(
        core_config,
        list(chunks),
        config_overrides=overrides,
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    ).chained_optimizers
    if _is_torch_adam(optimizer.optimizer):
        for group in optimizer.optimizer.param_groups:
            group["fused"] = True  # one pass per parameter instead of ten
    return optimizer


@torch.no_grad()
def squared_grad_norm(optimizer: MegatronOptimizer) -> Tensor:
    """Global squared norm of the reduced gradients: fp32 [1] on the device, equal on all ranks.

    megatron-core's own function returns a number, for which the host waits; without Transformer
    Engine and apex it waits for each gradient. Collective over all ranks.
    """
    optimizer.prepare_grads()
    gradients = grads_for_norm(optimizer)
    if gradients:
        squared = torch.nn.utils.get_total_norm(gradients).square().view(1)
    else:  # all shards are on other ranks
        squared = torch.zeros(1, device=device())
    torch.distributed.all_reduce(squared, group=optimizer.get_grad_stats_parallel_group())
    return squared


def update(optimizer: MegatronOptimizer, lr: float) -> float:
    """Clip gradients and take one step with learning rate ``lr``.

    Returns: the global gradient norm before clipping. When it is not finite no weight, moment or
    step count is changed.
    """
    grad_norm = squared_grad_norm(optimizer).item() ** 0.5
    if math.isfinite(grad_norm):
        clip_and_step(optimizer, lr, grad_norm)
    return grad_norm


def clip_and_step(optimizer: MegatronOptimizer, lr: float, grad_norm: float) -> None:
    """Scale gradients of norm ``grad_norm`` down to ``clip_grad`` and take one step at ``lr``."""
    settings = optimizer.config
    for group in optimizer.param_groups:
        group["lr"] = lr * group["max_lr"] / settings.lr
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    if settings.clip_grad > 0:
        clip_grads.clip_grad_by_total_norm_fp32(
            optimizer.get_parameters(), settings.clip_grad, grad_norm
        )
    optimizer.step_with_ready_grads()


def adam_step(optimizer: MegatronOptimizer, groups: ProcessGroups) -> int:
    """Steps that Adam has taken, the same for all parameters; 0 before the first.

    torch keeps it with each parameter, Transformer Engine and apex with each parameter group; they
    pass over a group of which this rank holds nothing, and its count stands still. A rank may own
    no shard at all, so the largest over all ranks counts.
    """
    inner = optimizer.optimizer
    kept = [s["step"] for s in inner.state.values() if "step" in s]
    kept += [group["step"] for group in inner.param_groups if "step" in group and group["params"]]
    steps = {int(step) for step in kept}
    assert len(steps) <= 1, f"Adam's step count differs between parameters: {sorted(steps)}"
    word = torch.tensor([max(steps, default=0)], device=groups.device)
    torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX)
    return int(word.item())


def has_moments(optimizer: MegatronOptimizer, groups: ProcessGroups) -> bool:
    """Say whether there are moments, and main weights apart from weights: since the first step.

    Adam's step count does not say: ``reset_moments`` makes it 0. Collective over all ranks.
    """
    found = any("exp_avg" in state for state in optimizer.optimizer.state.values())
    word = torch.tensor([int(found)], device=groups.device)
    torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX)
    return bool(word.item())


def set_state(
    optimizer: MegatronOptimizer,
    parameter: torch.nn.Parameter,
    step: int,
    main: Tensor | None,
    moments: dict[str, Tensor],
) -> None:
    """Put flat fp32 values of this rank's part into the optimizer.

    ``main`` is None where the model weight itself is the main weight (fp32 training). Each
    parameter gets a ``step`` tensor of its own: torch's Adam adds one to it in place, so a shared
    tensor would count every parameter (a load through megatron-core shares it).
    """
    part = shard_of(optimizer, parameter)
    assert part is not None
    inner = optimizer.optimizer
    if main is not None:
        part.main.data.copy_(main.view_as(part.main))
    state = inner.state[part.main]
    for name, value in moments.items():
        state[name] = value.clone().view_as(part.main)
    if _is_torch_adam(inner):  # fused, it counts on the parameter's device
        state["step"] = torch.full((), float(step), device=part.main.device)
    else:
        for group in inner.param_groups:
            group["step"] = step


@torch.no_grad()
def reset_moments(optimizer: MegatronOptimizer) -> None:
    """Let Adam begin anew: both moments and the step count become 0, in this rank's shards."""
    inner = optimizer.optimizer
    for state in inner.state.values():
        for name in (*MOMENTS, "step"):
            if name in state:
                state[name].zero_()
    for group in inner.param_groups:
        if "step" in group:
            group["step"] = 0


def _is_torch_adam(inner: torch.optim.Optimizer) -> bool:
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def finish_main_update(
    optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel]
) -> None:
    """After main weights were set by hand: cast them into the model and gather shards over DP."""
    if isinstance(optimizer, DistributedOptimizer):
        optimizer._copy_main_params_to_model_params()
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)
    elif optimizer.config.bf16:
        optimizer._copy_main_params_to_model_params()
