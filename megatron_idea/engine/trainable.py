"""A model, its gradient buffers and its optimizer, built and replaced as one."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

from megatron_idea.config import ModelConfig, ParallelConfig, Sections, TrainingConfig
from megatron_idea.engine.distributed import (
    ProcessGroups,
    forget_dummy_gradients,
    forget_rotary_cache,
)
from megatron_idea.engine.model import (
    build_model,
    initialize_weights,
    prunable_mlps,
    transformer_config,
)
from megatron_idea.engine.optimizer import build_optimizer
from megatron_idea.engine.shards import ShardExchange
from megatron_idea.shape import Shape


@contextlib.contextmanager
def modules_left_alone() -> Iterator[None]:
    """Collect only what the block made as garbage, also at its end.

    Not visiting imported modules takes 0.2 s off the collection that every rebuild needs.
    """
    frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if not frozen:
            gc.unfreeze()  # objects that outlive the interpreter make bindings report leaks at exit


def wrap_data_parallel(
    parallel: ParallelConfig,
    core: TransformerConfig,
    chunks: Sequence[torch.nn.Module],
    groups: ProcessGroups,
) -> list[DistributedDataParallel]:
    """Give each chunk megatron-core's gradient buffers and tell the schedules about them.

    Gradients are accumulated and reduced in fp32, and averaged over data-parallel ranks.
    """
    parallel = parallel.resolved(cuda=groups.device.type == "cuda")
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


@dataclass
class Trainable:
    """A model and its optimizer on this rank: what compaction replaces as one."""

    sections: Sections
    """What it was built from, and will be again."""
    groups: ProcessGroups
    shape: Shape
    """Stored units of every axis, of the whole model."""
    core: TransformerConfig
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer

    @property
    def model(self) -> ModelConfig:
        """The enlarged model; ``shape`` says what is left of it."""
        return self.sections.model

    @property
    def training(self) -> TrainingConfig:
        return self.sections.training

    @property
    def parallel(self) -> ParallelConfig:
        return self.sections.parallel

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters of this rank, in the model's order."""
        return [p for chunk in self.chunks for p in chunk.parameters()]

    def exchange(self, owners: Sequence[int] | None = None) -> ShardExchange:
        """Return a way to bring each parameter's whole state together on one rank, and back."""
        return ShardExchange(self.optimizer, self.parameters, self.groups, owners)

    @property
    def mlps(self) -> list[tuple[int, MLP]]:
        """This rank's MLPs with their layer number in the whole model."""
        return list(prunable_mlps(self.chunks))

    def release(self) -> None:
        """Give the memory of the model and its optimizer back; nothing here can be used then."""
        self._let_go()  # apart from here: a loop variable that is still bound would keep it all
        gc.collect()  # hooks, buffers and parameters refer to each other in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _let_go(self) -> None:
        """Drop model, buffers and optimizer, and what would keep them alive."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=False)
        forget_data_parallel(self.core)
        self.chunks = []
        del self.optimizer
        forget_rotary_cache()
        forget_dummy_gradients()

    def rebuilt(self, shape: Shape) -> Trainable:
        """Release this, and build the same in another shape.

        Weights are unset, and gradients have no memory until ``restore_grad_buffers``.
        """
        self.release()
        return assemble(self.sections, self.groups, shape, initialize=False, gradients=False)


class _ZerosUntouched(TorchFunctionMode):
    """``torch.zeros`` does not write: on a CPU, gradient buffers cost nothing until used."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (torch.empty if func is torch.zeros else func)(*args, **(kwargs or {}))


def assemble(
    sections: Sections,
    groups: ProcessGroups,
    shape: Shape,
    initialize: bool,
    gradients: bool = True,
) -> Trainable:
    """Build model, gradient buffers and optimizer of this shape.

    ``initialize`` sets the weights from the seed; without it a checkpoint or a compaction must.
    Without ``gradients`` their buffers have no memory until ``restore_grad_buffers``.
    """
    model, training, parallel = sections.model, sections.training, sections.parallel
    core = transformer_config(model, training, parallel, shape)
    chunks = build_model(model, training, core, groups)
    if initialize:
        initialize_weights(model, training.seed, chunks, groups)
    elif parallel.use_distributed_optimizer:
        # Their memory will be the parameter buffer, which copies what stands here: one number each.
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
    if gradients:
        wrapped = wrap_data_parallel(parallel, core, chunks, groups)
    else:
        with _ZerosUntouched():
            wrapped = wrap_data_parallel(parallel, core, chunks, groups)
        for buffer in (b for chunk in wrapped for b in chunk.buffers):
            if buffer.param_data is not None:
                buffer.param_data.zero_()
        for chunk in wrapped:
            chunk.offload_grad_buffers()
    optimizer = build_optimizer(model, sections.optimizer, sections.schedule, wrapped, groups)
    return Trainable(sections, groups, shape, core, wrapped, optimizer)
