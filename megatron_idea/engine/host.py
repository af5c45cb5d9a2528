"""Somebody else's model and optimizer as a ``Trainable``: their own code builds the next ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_idea.config import ParallelConfig, Sections
from megatron_idea.engine.distributed import ProcessGroups, device, together
from megatron_idea.engine.model import named_parameters, unwrap
from megatron_idea.engine.trainable import Trainable
from megatron_idea.errors import UserError
from megatron_idea.prune.axis import whole_shapes
from megatron_idea.shape import Shape

Chunks = Sequence[DistributedDataParallel]


class HostError(UserError):
    """What a host has or asks for cannot be pruned; the message says what can."""


class Builder(Protocol):
    """The host's own code that makes a model and its optimizer, of any size."""

    def __call__(self, shape: Shape) -> tuple[Chunks, MegatronOptimizer]:
        """Build this rank's model chunks and the optimizer over them, ready for the next step.

        Called on all ranks at once. Weights may be whatever they are: they are overwritten, and
        random numbers that are drawn here are not missed later. Functions that the loop hangs on
        the model's configuration for megatron-core's schedules have to be hung on this one's.

        Args:
            shape: ``num_layers``; ``layers[0].ffn_hidden_size``, ``.num_query_groups`` and
                ``.heads_per_group``, the same in all layers, over all tensor-parallel ranks.
        """
        ...


LOOP_FUNCTIONS = (
    "finalize_model_grads_func",
    "grad_scale_func",
    "no_sync_func",
    "grad_sync_func",
    "param_sync_func",
)
"""What loops hang on megatron-core's configuration. Most are bound to a model or an optimizer."""

PARTS = "GPTModel, DistributedDataParallel and get_megatron_optimizer's Adam, of megatron-core"


@dataclass
class HostTrainable(Trainable):
    """A host's model and optimizer."""

    build: Builder
    given: MegatronOptimizer
    """The optimizer as the host has it: ``optimizer`` may be the only one in a chain."""

    @staticmethod
    def of(
        sections: Sections,
        groups: ProcessGroups,
        shape: Shape,
        built: tuple[Chunks, MegatronOptimizer],
        build: Builder,
    ) -> HostTrainable:
        """Take over what a host has built.

        Raises: HostError, on every rank, for parts of another kind or size.
        """

        def take_over() -> HostTrainable:
            chunks, given = list(built[0]), built[1]
            core, adam = unwrap(chunks[0]).config, _only_adam(given)
            mine = HostTrainable(sections, groups, shape, core, chunks, adam, build, given)
            mine._check_numbers()
            mine._check_sizes()
            return mine

        taken: HostTrainable = together(take_over, groups)
        return taken

    def _let_go(self) -> None:
        chunks, given = self.chunks, self.given
        super()._let_go()
        self.core.grad_scale_func = None
        del self.given
        # The host's variables still refer to the old ones: they keep no memory, and do not run.
        given.step = _gone
        for chunk in chunks:
            chunk.forward = chunk.zero_grad_buffer = _gone
            for parameter in chunk.parameters():
                parameter.data = parameter.data.new_empty(0)
            for buffer in chunk.buffers:
                if buffer.param_data is not None:
                    buffer.param_data.untyped_storage().resize_(0)

    def rebuilt(self, shape: Shape) -> HostTrainable:
        """Release this, and let the host build its like.

        Learning rates and whatever else stands in the optimizer's parameter groups come along.
        Raises: HostError when what was built is not ready for the next step.
        """
        functions = [name for name in LOOP_FUNCTIONS if getattr(self.core, name) is not None]
        settings = [_settings(group) for group in self.optimizer.param_groups]
        self.release()
        with _same_random_numbers():
            built = self.build(shape)
        fresh = HostTrainable.of(self.sections, self.groups, shape, built, self.build)
        for name in functions:
            if getattr(fresh.core, name) is None:
                raise HostError(
                    f"the model's configuration had {name}, and that of the model which build() "
                    "has made has none: set it there, on the new chunks and optimizer"
                )
        groups = fresh.optimizer.param_groups
        if len(groups) != len(settings):
            raise HostError(
                f"build() has made an optimizer of {len(groups)} parameter groups; the one before "
                f"had {len(settings)}"
            )
        for group, values in zip(groups, settings, strict=True):
            group.update(values)
        return fresh

    def _check_numbers(self) -> None:
        precision = self.training.precision
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        for name, parameter in named_parameters(self.chunks):
            if parameter.dtype != wanted:
                raise HostError(
                    f"{name} is {parameter.dtype}, and training.precision is {precision}; all "
                    "weights are fp32, or all are bf16"
                )
            grad: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
            if grad.dtype != torch.float32:
                raise HostError(
                    f"gradients are kept in {grad.dtype}; scores need fp32: set "
                    "grad_reduce_in_fp32=True in DistributedDataParallelConfig"
                )

    def _check_sizes(self) -> None:
        """Compare parameters with those of the model that ``model`` and the shape describe."""
        tp, known = self.groups.tp.size(), dict(whole_shapes(self.model, self.shape))
        found = set()
        for name, parameter in named_parameters(self.chunks):
            if name not in known:
                raise HostError(
                    f"nobody knows who owns {name}: pruning works on a GPTModel with RMSNorm, "
                    "rotary embeddings, grouped-query attention and a gated FFN, without biases"
                )
            size = list(parameter.shape)
            if getattr(parameter, "tensor_model_parallel", False):
                size[parameter.partition_dim] *= tp  # type: ignore[attr-defined]
            if tuple(size) != known[name]:
                raise HostError(
                    f"{name} is {tuple(size)} over all tensor-parallel ranks; by the configuration "
                    f"and the shape that was asked for it is {known[name]}"
                )
            found.add(name)
        layers = {_layer(name) for name in found} - {None}
        for name in known:
            if name not in found and _layer(name) in layers:
                raise HostError(f"the model has no {name}, which the configuration asks for")


def groups_of(collection: ProcessGroupCollection) -> ProcessGroups:
    """Wrap a host's process groups. Raises: HostError for layouts that pruning does not know."""
    missing = [name for name in ("tp", "pp", "mp", "dp", "dp_cp") if not hasattr(collection, name)]
    if missing:
        raise HostError(
            f"the process groups lack {', '.join(missing)}: after parallel_state."
            "initialize_model_parallel, ProcessGroupCollection.use_mpu_process_groups() has all"
        )
    for name, what in (("cp", "context"), ("ep", "expert")):
        group = getattr(collection, name, None)
        if group is not None and group.size() > 1:
            raise HostError(f"{what} parallelism of {group.size()} ranks is not supported: use 1")
    ranks = collection.mp.size() * collection.dp_cp.size()
    if ranks != dist.get_world_size():
        raise HostError(
            f"the groups hold {ranks} of the job's {dist.get_world_size()} ranks: decisions are "
            "taken together with all of them"
        )
    return ProcessGroups(collection, device())


def layout_of(chunks: Chunks, groups: ProcessGroups) -> ParallelConfig:
    """Describe how a host's model is split. Raises: HostError for wrappers of another kind."""
    for chunk in chunks:
        if not isinstance(chunk, DistributedDataParallel):
            raise HostError(f"a model chunk is a {type(chunk).__name__}; pruning works on {PARTS}")
        if (instances := chunk.ddp_config.num_distributed_optimizer_instances) > 1:
            raise HostError(f"num_distributed_optimizer_instances is {instances}; it must be 1")
    return ParallelConfig(
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=groups.pp.size(),
        virtual_pipeline_model_parallel_size=len(chunks),
        use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
    )


def _only_adam(given: MegatronOptimizer) -> MegatronOptimizer:
    """Return the optimizer that holds main weights and moments."""
    chain = getattr(given, "chained_optimizers", [given])
    kinds = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
    if len(chain) != 1 or not isinstance(chain[0], kinds) or chain[0].config.optimizer != "adam":
        names = ", ".join(f"{type(one).__name__} ({one.config.optimizer})" for one in chain)
        raise HostError(f"the optimizer is {names or 'empty'}; pruning works on {PARTS}")
    config = chain[0].config
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(config, name):
            raise HostError(
                f"the optimizer's {name} keeps main weights or moments where pruning does not "
                "reach them: turn it off"
            )
    return chain[0]


def _gone(*_: Any, **__: Any) -> None:
    raise HostError(
        "this model was rebuilt in a smaller shape: take pruning.chunks and pruning.optimizer when "
        "after_step or load_state_dict returns True"
    )


def _layer(name: str) -> str | None:
    """Return the number of a parameter's layer."""
    return name.split(".")[2] if name.startswith("decoder.layers.") else None


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Let random numbers after the block be those that would have come without it."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    tracker.set_states(states)
