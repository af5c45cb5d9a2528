"""The optimizer, and ONE view of what it holds for a parameter over data-parallel shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    DistributedOptimizer,
    MegatronOptimizer,
    clip_grads,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_idea.config import Config
from megatron_idea.distributed import ProcessGroups, device
from megatron_idea.layers import PrunableMLP
from megatron_idea.model import (
    build_model,
    initialize_weights,
    prunable_mlps,
    transformer_config,
)
from megatron_idea.shape import Shape

MOMENTS = ("exp_avg", "exp_avg_sq")


def wrap_data_parallel(
    config: Config,
    core: TransformerConfig,
    chunks: Sequence[torch.nn.Module],
    groups: ProcessGroups,
) -> list[DistributedDataParallel]:
    """Give each chunk megatron-core's gradient buffers and tell the schedules about them.

    Gradients are accumulated and reduced in fp32, and averaged over data-parallel ranks.
    """
    parallel = config.parallel.resolved(cuda=groups.device.type == "cuda")
    wrapped = [
        DistributedDataParallel(
            config=core,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=bool(parallel.overlap_grad_reduce),
                overlap_param_gather=bool(parallel.overlap_param_gather),
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                bucket_size=parallel.bucket_size or None,
            ),
            module=chunk,
            disable_bucketing=index > 0,
            pg_collection=groups.collection,
        )
        for index, chunk in enumerate(chunks)
    ]
    core.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        core.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def forget_data_parallel(core: TransformerConfig) -> None:
    """Drop what ``wrap_data_parallel`` hung on the config: bound methods keep old buffers alive."""
    core.finalize_model_grads_func = None
    core.no_sync_func = None
    core.grad_sync_func = None
    core.param_sync_func = None


def build_optimizer(
    config: Config, chunks: Sequence[DistributedDataParallel], groups: ProcessGroups
) -> MegatronOptimizer:
    """AdamW over ``chunks``: Transformer Engine's or apex's fused one when installed, else torch's.

    Norm weights are not decayed. With ``lr_scaling=mup_simple`` matrices of attention and FFN step
    with lr * min(768 / hidden_size, 1) while their decay per step stays that of the plain rate.
    """
    settings, peak = config.optimizer, config.schedule.lr
    core_config = CoreOptimizerConfig(
        optimizer="adam",
        lr=peak,
        min_lr=config.schedule.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=config.training.precision == "bf16",
        params_dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(core_config)
    scale = min(768 / config.model.hidden_size, 1.0)
    if settings.lr_scaling == "mup_simple" and scale < 1:
        matrices = ParamKey(name="*decoder.layers.*.linear_*.weight")
        overrides[matrices] = {"max_lr": peak * scale, "wd_mult": 1.0 / scale}
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
    renamed = getattr(optimizer, "get_grads_for_grad_norm", None)  # megatron-core 0.19
    gradients = (renamed or optimizer.get_main_grads_for_grad_norm)()
    if gradients:
        squared = torch.nn.utils.get_total_norm(gradients).square().view(1)
    else:  # all shards are on other ranks
        squared = torch.zeros(1, device=device())
    torch.distributed.all_reduce(squared, group=optimizer.get_grad_stats_parallel_group())
    return squared


def update(optimizer: MegatronOptimizer, config: Config, lr: float) -> float:
    """Clip gradients and take one step with learning rate ``lr``.

    Returns: the global gradient norm before clipping. When it is not finite no weight, moment or
    step count is changed.
    """
    grad_norm = squared_grad_norm(optimizer).item() ** 0.5
    if math.isfinite(grad_norm):
        clip_and_step(optimizer, config, lr, grad_norm)
    return grad_norm


def clip_and_step(
    optimizer: MegatronOptimizer, config: Config, lr: float, grad_norm: float
) -> None:
    """Scale gradients of norm ``grad_norm`` down to ``clip_grad`` and take one step at ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["max_lr"] / config.schedule.lr
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
    if config.optimizer.clip_grad > 0:
        clip_grads.clip_grad_by_total_norm_fp32(
            optimizer.get_parameters(), config.optimizer.clip_grad, grad_norm
        )
    optimizer.step_with_ready_grads()


@dataclass(frozen=True)
class Slot:
    """What this rank's optimizer holds of one parameter: its flat elements [start, end).

    Without the distributed optimizer that is the whole parameter on every data-parallel rank.
    """

    parameter: torch.nn.Parameter
    start: int
    end: int
    main: Tensor
    """Main weight that the inner optimizer steps: fp32, flat or in the parameter's shape."""
    state: dict[str, Any]
    """``exp_avg``, ``exp_avg_sq`` shaped like ``main``, torch's ``step``; empty before step 1."""

    @property
    def grad(self) -> Tensor:
        """Gradient [end - start], fp32, reduced over data-parallel ranks; a view."""
        main_grad: Tensor = self.parameter.main_grad  # type: ignore[attr-defined,assignment]
        return main_grad.view(-1)[self.start : self.end]


def slot(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> Slot | None:
    """This rank's part of ``parameter``; None when its shard is all on other ranks."""
    inner = optimizer.optimizer
    if isinstance(optimizer, DistributedOptimizer):
        if parameter not in optimizer.model_param_gbuf_map:
            return None
        owned = optimizer._get_model_param_range_map(parameter)["param"]
        group, index = optimizer.model_param_group_index_map[parameter]
        main = inner.param_groups[group]["params"][index]
        start, end = owned.start, owned.end
    else:
        main = getattr(parameter, "main_param", parameter)
        start, end = 0, parameter.numel()
    return Slot(parameter, start, end, main, inner.state.get(main, {}))


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
    part = slot(optimizer, parameter)
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


def _is_torch_adam(inner: torch.optim.Optimizer) -> bool:
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def has_main_copy(parameter: torch.nn.Parameter) -> bool:
    """Whether the optimizer keeps an fp32 main weight apart from the model's weight."""
    return parameter.dtype != torch.float32


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


class ShardExchange:
    """Moves a parameter's main weight and moments between DP shards and one whole copy.

    Parameters are dealt out to data-parallel ranks by size; a parameter's owner holds the whole
    [3, numel] (main, exp_avg, exp_avg_sq) while it is cut, saved or loaded. So no rank ever holds
    more than its share of the state and one parameter. Without the distributed optimizer every rank
    has every parameter whole already and nothing travels.
    """

    def __init__(self, trainable: Trainable, owners: Sequence[int] | None = None) -> None:
        """``owners``: those of an exchange over the same model at other widths, to keep them."""
        self._optimizer = trainable.optimizer
        self._groups = trainable.groups
        self._sharded = (
            isinstance(trainable.optimizer, DistributedOptimizer) and trainable.groups.dp.size() > 1
        )
        self._parameters = trainable.parameters
        self._owners = (
            self._deal(self._parameters, trainable.groups.dp.size())
            if owners is None
            else dict(zip(map(id, self._parameters), owners, strict=True))
        )
        self._ranges = self._all_ranges(self._parameters)

    @property
    def owners(self) -> list[int]:
        """The data-parallel rank that each parameter comes together on, in the model's order."""
        return [self._owners[id(parameter)] for parameter in self._parameters]

    @staticmethod
    def _deal(parameters: Sequence[torch.nn.Parameter], dp: int) -> dict[int, int]:
        """Largest first, to the rank that has least; equal over TP because shapes are."""
        load = [0] * dp
        owners = {}
        for parameter in sorted(parameters, key=lambda p: -p.numel()):
            owner = load.index(min(load))
            owners[id(parameter)] = owner
            load[owner] += parameter.numel()
        return owners

    def _all_ranges(
        self, parameters: Sequence[torch.nn.Parameter]
    ) -> dict[int, list[tuple[int, int]]]:
        """Each DP rank's [start, end) of each parameter."""
        if not self._sharded:
            return {}
        parts = (slot(self._optimizer, parameter) for parameter in parameters)
        mine = torch.tensor(
            [(p.start, p.end) if p else (0, 0) for p in parts], device=self._groups.device
        )
        dp = self._groups.dp
        everyones = mine.new_empty(dp.size() * mine.shape[0], 2)
        torch.distributed.all_gather_into_tensor(everyones, mine, group=dp)
        by_rank = everyones.view(dp.size(), -1, 2).tolist()
        return {
            id(parameter): [tuple(ranges[i]) for ranges in by_rank]
            for i, parameter in enumerate(parameters)
        }

    def owns(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the whole of ``parameter`` comes together on this rank."""
        return not self._sharded or self._owners[id(parameter)] == self._groups.dp.rank()

    def is_saver(self, parameter: torch.nn.Parameter) -> bool:
        """Whether this rank, alone among its data-parallel peers, writes ``parameter``."""
        return self._owners[id(parameter)] == self._groups.dp.rank()

    @torch.no_grad()
    def gather(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """Whole fp32 [3, numel] on the owner, None elsewhere; a collective over DP."""
        part = slot(self._optimizer, parameter)
        mine = (
            torch.stack([part.main.detach().view(-1), *(part.state[m].view(-1) for m in MOMENTS)])
            if part
            else torch.empty(3, 0, device=self._groups.device)
        )
        if not self._sharded:
            return mine
        ranges = self._ranges[id(parameter)]
        to_owner = self._splits(parameter)
        from_ranks = [3 * (end - start) for start, end in ranges]
        received = mine.new_empty(sum(from_ranks) if self.owns(parameter) else 0)
        torch.distributed.all_to_all_single(
            received,
            mine.flatten(),
            from_ranks if self.owns(parameter) else [0] * len(ranges),
            to_owner,
            group=self._groups.dp,
        )
        if not self.owns(parameter):
            return None
        # Shards come in rank order, and a parameter's shards lie in rank order.
        parts = [block.view(3, -1) for block in received.split(from_ranks)]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def scatter(self, parameter: torch.nn.Parameter, whole: Tensor | None) -> Tensor | None:
        """This rank's [3, end - start] of the owner's ``whole``; a collective over DP.

        None where this rank holds no part of the parameter.
        """
        if not self._sharded:
            return whole
        ranges = self._ranges[id(parameter)]
        sent = torch.empty(0, device=self._groups.device)
        if whole is not None:
            sent = torch.cat([whole[:, start:end].flatten() for start, end in ranges])
        to_ranks = [3 * (end - start) for start, end in ranges]
        start, end = ranges[self._groups.dp.rank()]
        received = sent.new_empty(3 * (end - start))
        torch.distributed.all_to_all_single(
            received,
            sent,
            self._splits(parameter),
            to_ranks if self.owns(parameter) else [0] * len(ranges),
            group=self._groups.dp,
        )
        return received.view(3, -1) if end > start else None

    def _splits(self, parameter: torch.nn.Parameter) -> list[int]:
        """Elements of this rank's part, at the owner's place."""
        start, end = self._ranges[id(parameter)][self._groups.dp.rank()]
        splits = [0] * self._groups.dp.size()
        splits[self._owners[id(parameter)]] = 3 * (end - start)
        return splits


@dataclass
class Trainable:
    """A model and its optimizer on this rank: what compaction replaces as one."""

    config: Config
    groups: ProcessGroups
    core: TransformerConfig
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    widths: tuple[int, ...]
    """Physical FFN neurons of every layer of the whole model."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters of this rank, in the model's order."""
        return [p for chunk in self.chunks for p in chunk.parameters()]

    @property
    def shape(self) -> Shape:
        """Stored units of every axis, of the whole model."""
        return Shape.full(self.config.model).with_counts("ffn_hidden_size", self.widths)

    @property
    def mlps(self) -> list[tuple[int, PrunableMLP]]:
        """This rank's MLPs with their layer number in the whole model."""
        return list(prunable_mlps(self.chunks))


class _ZerosUntouched(TorchFunctionMode):
    """``torch.zeros`` does not write: on a CPU, gradient buffers cost nothing until used."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (torch.empty if func is torch.zeros else func)(*args, **(kwargs or {}))


def assemble(
    config: Config,
    groups: ProcessGroups,
    widths: Sequence[int],
    initialize: bool,
    gradients: bool = True,
) -> Trainable:
    """Build model, gradient buffers and optimizer at ``widths``.

    ``initialize`` sets the weights from the seed; without it a checkpoint or a compaction must.
    Without ``gradients`` their buffers have no memory until ``restore_grad_buffers``.
    """
    core = transformer_config(config)
    chunks = build_model(config, core, widths, groups)
    if initialize:
        initialize_weights(config, chunks, groups.tp.rank())
    elif config.parallel.use_distributed_optimizer:
        # Their memory will be the parameter buffer, which copies what stands here: one number each.
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
    if gradients:
        wrapped = wrap_data_parallel(config, core, chunks, groups)
    else:
        with _ZerosUntouched():
            wrapped = wrap_data_parallel(config, core, chunks, groups)
        for buffer in (b for chunk in wrapped for b in chunk.buffers):
            if buffer.param_data is not None:
                buffer.param_data.zero_()
        for chunk in wrapped:
            chunk.offload_grad_buffers()
    optimizer = build_optimizer(config, wrapped, groups)
    return Trainable(config, groups, core, wrapped, optimizer, tuple(widths))
