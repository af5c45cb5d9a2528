"""The tensors of a checkpoint, from any parallel layout to any other.

Model weights; Adam's moments and (for bf16) fp32 main weights, each parameter whole, by the
data-parallel rank that owns it; who is alive and stored, and scores; random-number states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_idea.checkpoint.state import CheckpointError, TrainState, read_state
from megatron_idea.engine import cpu
from megatron_idea.engine.distributed import ProcessGroups, agree_or_raise
from megatron_idea.engine.model import unwrap
from megatron_idea.engine.optimizer import finish_main_update, set_state
from megatron_idea.engine.shards import MOMENTS, has_main_copy
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.pruner import Pruner

# Transformer Engine's modules, norms among them, keep their FP8 scales under this name, and nothing
# without FP8. Not stored: a job without Transformer Engine could not write it for one with it.
_EXTRA_STATE = "_extra_state"


def load(trainable: Trainable, pruner: Pruner, path: Path) -> TrainState:
    """Read a checkpoint into a model that was built in the checkpoint's shape; collective.

    Random-number streams continue only in the layout that saved them, and on the same kind of
    device; elsewhere they start from the seed again, which matters with dropout alone.

    Raises: CheckpointError on every rank when a file is missing or does not fit.
    """
    state = read_state(path)
    groups = trainable.groups
    assert state.shape == trainable.shape, (state.shape, trainable.shape)
    wanted = tensors_of(
        trainable,
        pruner.blank_state(state.plan_due, state.has_scores),
        state.has_moments,
        empty=True,
    )
    if state.layout != layout_of(groups):
        wanted.pop("rng")
    loaded = _load_tensors(wanted, path, groups)
    _take_weights(trainable.chunks, loaded)
    if state.has_moments:
        _load_optimizer(trainable, loaded["optimizer"], state.adam_step)
    else:  # before the first step main weights are the weights
        trainable.optimizer.reload_model_params()
    problem = pruner.unfit(trainable, loaded["pruner"])
    agree_or_raise(CheckpointError(f"{path} is damaged: {problem}") if problem else None, groups)
    pruner.load_state(trainable, loaded["pruner"], state.pending_steps, state.memory)
    if "rng" in loaded:
        _set_rng({name: value[0] for name, value in loaded["rng"].items()}, path, groups)
    return state


def load_weights(chunks: Sequence[torch.nn.Module], path: Path, groups: ProcessGroups) -> None:
    """Read weights alone, into chunks that were built in the checkpoint's shape.

    What is removed is zero in them: nothing else has to be known to use the model.
    """
    _take_weights(chunks, _load_tensors(weight_tensors(chunks, groups), path, groups))


def _load_tensors(wanted: dict[str, Any], path: Path, groups: ProcessGroups) -> dict[str, Any]:
    """Read what is asked for. Raises: CheckpointError on every rank when one cannot."""
    error: Exception | None = None
    try:
        cpu.install()
        loaded = dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
    except (Exception, CheckpointException) as caught:  # agree_or_raise raises it everywhere
        error = CheckpointError(f"cannot read checkpoint {path}: {reason(caught)}")
        error.__cause__ = caught
    agree_or_raise(error, groups)
    return loaded


def _take_weights(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        found = unwrap(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        missing = [key for key in found.missing_keys if not key.endswith(_EXTRA_STATE)]
        assert not missing and not found.unexpected_keys, found


def weight_tensors(chunks: Sequence[torch.nn.Module], groups: ProcessGroups) -> dict[str, Any]:
    """Weights with their place in the whole, keyed per layer."""
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.shards}
    tree = {}
    for index, chunk in enumerate(chunks):
        state = unwrap(chunk).sharded_state_dict(metadata=metadata)
        tree[f"model{index}"] = {k: v for k, v in state.items() if not k.endswith(_EXTRA_STATE)}
    return tree


@torch.no_grad()
def _load_optimizer(trainable: Trainable, loaded: dict[str, dict[str, Tensor]], step: int) -> None:
    shards = trainable.exchange()
    for name, parameter in _named(trainable):
        whole = None
        if shards.owns(parameter):
            parts = loaded.pop(name)
            # fp32 training has no main copy: the model's own weight, loaded before, is it.
            main = parts.get("main", parameter.detach())
            states = (main, *(parts[m] for m in MOMENTS))
            whole = torch.stack([x.view(-1).to(parameter.device) for x in states])
        part = shards.scatter(parameter, whole)
        if part is not None:
            moments = dict(zip(MOMENTS, part[1:], strict=True))
            set_state(trainable.optimizer, parameter, step, part[0], moments)
    finish_main_update(trainable.optimizer, trainable.chunks)


def _named(trainable: Trainable) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with a name that is unique on this rank."""
    for index, chunk in enumerate(trainable.chunks):
        for name, parameter in unwrap(chunk).named_parameters():
            yield f"{index}.{name}", parameter


def tensors_of(
    trainable: Trainable, pruner: Mapping[str, Tensor], has_moments: bool, empty: bool = False
) -> dict[str, Any]:
    """All tensors of a run with their place in the whole; ``empty``: as targets for loading."""
    groups = trainable.groups
    tree = weight_tensors(trainable.chunks, groups)
    if has_moments:
        tree["optimizer"] = _optimizer_tensors(trainable, tree, empty)
    rank, world = groups.world.rank(), groups.world.size()
    tree["pruner"] = {
        name: ShardedTensor.from_rank_offsets(f"pruner.{name}", value, replica_id=rank)
        for name, value in pruner.items()
    }
    tree["rng"] = {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", value[None], (0, rank, world))
        for name, value in _get_rng().items()
    }
    return tree


def _optimizer_tensors(
    trainable: Trainable, tree: dict[str, Any], empty: bool
) -> dict[str, dict[str, ShardedTensor | ShardedTensorFactory]]:
    """Main weights and moments of the parameters that this rank owns, sharded as the model is."""
    shards = trainable.exchange()
    sharded = {
        id(tensor.data): tensor
        for index in range(len(trainable.chunks))
        for tensor in tree[f"model{index}"].values()
        if isinstance(tensor, (ShardedTensor, ShardedTensorFactory))
    }
    result = {}
    for name, parameter in _named(trainable):
        whole = None
        if not empty:
            whole = shards.gather(parameter)
        wanted = shards.owns(parameter) if empty else shards.is_saver(parameter)
        if not wanted:
            continue
        if whole is None:
            whole = torch.empty(3, parameter.numel())
        elif not empty:
            whole = whole.cpu()  # a whole layer's state at a time on the GPU, not all of it
        kinds = ("main", *MOMENTS) if has_main_copy(parameter) else MOMENTS
        values = dict(zip(("main", *MOMENTS), whole, strict=True))
        model_tensor = sharded[id(parameter)]
        # The owner writes for all its data-parallel peers.
        model_tensor = dataclasses.replace(
            model_tensor, replica_id=(*model_tensor.replica_id[:-1], 0)
        )
        result[name] = {
            kind: make_sharded_optimizer_tensor(
                model_tensor, values[kind].view(parameter.shape), f"optimizer.{kind}"
            )
            for kind in kinds
        }
    return result


def _get_rng() -> dict[str, Tensor]:
    """Every random-number stream of this rank, as bytes."""
    streams = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        streams["cuda"] = torch.cuda.get_rng_state()
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return streams | {f"tracker.{name}": state for name, state in tracker.items()}


def _set_rng(streams: dict[str, Tensor], path: Path, groups: ProcessGroups) -> None:
    streams = {name: state.cpu() for name, state in streams.items()}
    error = None
    try:
        for name, state in streams.items():  # the tracker's are set in use, which is too late
            if name == "cpu" or groups.device.type == "cpu":
                torch.Generator().set_state(state)
        torch.set_rng_state(streams["cpu"])
        if "cuda" in streams:
            torch.cuda.set_rng_state(streams["cuda"])
    except RuntimeError as caught:
        error = CheckpointError(f"{path} is damaged: a random-number state is none: {caught}")
    agree_or_raise(error, groups)
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {n.removeprefix("tracker."): s for n, s in streams.items() if n.startswith("tracker.")}
    )


def reason(error: BaseException) -> str:
    """In one line; torch's own account of failed ranks is their tracebacks."""
    if isinstance(error, CheckpointException):
        causes = [f"rank {rank}: {reason(f[0])}" for rank, f in sorted(error.failures.items())]
        return "; ".join(causes) or "another rank failed, rank 0 says why"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def layout_of(groups: ProcessGroups) -> dict[str, int]:
    sizes = {"tp": groups.tp.size(), "pp": groups.pp.size(), "dp": groups.dp.size()}
    return sizes | {"cuda": int(groups.device.type == "cuda")}
