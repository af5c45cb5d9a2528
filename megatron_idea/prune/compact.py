"""Apply a plan physically: removed neurons leave weights, main weights, moments and buffers.

The model, its gradient buffers and its optimizer are rebuilt at the new widths from a staged copy
of the survivors' state. Every survivor's main weight and moments arrive bit for bit; Adam's step
count, the learning rate, the data position and the random-number streams do not notice. All checks
of the plan come before the first tensor is dropped, and the result is checked against what there
was: an error ends the job, and the last checkpoint stands.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.engine.distributed import (
    PeakMemory,
    ProcessGroups,
    assert_same_on_all_ranks,
    forget_dummy_gradients,
    forget_rotary_cache,
    together,
)
from megatron_idea.engine.model import named_parameters
from megatron_idea.engine.optimizer import adam_step, finish_main_update, set_state
from megatron_idea.engine.shards import MOMENTS, has_main_copy, slot
from megatron_idea.engine.trainable import Trainable, assemble, forget_data_parallel
from megatron_idea.prune.mask import apply_mask
from megatron_idea.prune.relocate import Relocation, move, relocate
from megatron_idea.prune.strategy import Plan
from megatron_idea.prune.units import named_shares
from megatron_idea.prune.verify import check, fingerprint

Relocations = Mapping[tuple[str, int | None], Relocation]
"""By axis and layer, as ``Share`` has them."""


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did, for events.jsonl."""

    widths_before: list[int]
    widths_after: list[int]
    moved_neurons: int
    """Survivors that went to another tensor-parallel rank, over all layers."""
    moved_bytes: int
    """What they own of main weights and moments."""
    seconds: float
    peak_bytes: int
    """Highest memory in use on one rank: on a GPU at any moment, on a CPU between phases."""
    loss_change: float
    """Mean absolute change of a token's loss on a fixed text, in nats; rounding alone."""
    digest: str


def stored(alive: Tensor, ids: Sequence[Tensor], width: int) -> list[Tensor]:
    """Which neurons of a layer stay in memory: the live, then masked ones by id up to ``width``."""
    present = torch.cat(list(ids))
    is_alive = alive[present]
    spare = width - int(is_alive.sum())
    assert spare >= 0, f"{width} neurons cannot hold {int(is_alive.sum())} live ones"
    stored = is_alive.clone()
    masked = (~is_alive).nonzero().view(-1)
    stored[masked[present[masked].argsort()[:spare]]] = True
    return list(stored.split([len(i) for i in ids]))


def _tp_ids(ids: Tensor, groups: ProcessGroups) -> list[Tensor]:
    """Every TP rank's neuron ids of a layer, on the CPU."""
    everyones = ids.new_empty(groups.tp.size() * ids.numel())
    dist.all_gather_into_tensor(everyones, ids, group=groups.tp)
    return list(everyones.cpu().split(ids.numel()))


def _quiesce(trainable: Trainable) -> None:
    """Make sure that no gradient reduction or parameter gathering is on its way."""
    for chunk in trainable.chunks:
        for group in chunk.bucket_groups:
            assert group.grad_reduce_handle is None, "a gradient reduction is in flight"
            if group.param_gather_handle is not None:
                group.finish_param_sync(skip_next_bucket_dispatch=True)


def free_gradients(trainable: Trainable) -> None:
    """Give the memory of gradients back; a pending step has been taken."""
    for chunk in trainable.chunks:
        chunk.offload_grad_buffers()
    trainable.optimizer.zero_grad()


def _let_go(trainable: Trainable) -> None:
    """Drop the old model, buffers and optimizer, and what would keep them alive."""
    for chunk in trainable.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=False)
    forget_data_parallel(trainable.core)
    trainable.chunks = []
    del trainable.optimizer
    forget_rotary_cache()
    forget_dummy_gradients()


def release(trainable: Trainable) -> None:
    """Give the memory of a model and its optimizer back; nothing of ``trainable`` can be used."""
    _let_go(trainable)  # apart from here: a loop variable that is still bound would keep it all
    gc.collect()  # hooks, buffers and parameters refer to each other in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compact(trainable: Trainable, plan: Plan, placement: str) -> CompactReport:
    """Shrink the live model and its optimizer to ``plan.widths``, in place of ``trainable``.

    Call at a step boundary. Collective over all ranks. Neurons that the plan keeps in memory
    though they are masked stay masked.

    Raises: RuntimeError when the plan differs between ranks, AssertionError for a plan that does
        not fit the model; in both cases nothing was changed. CompactionError when the result is
        not the model that there was.
    """
    begin = time.perf_counter()
    groups, old_widths = trainable.groups, trainable.widths
    assert_same_on_all_ranks(plan.digest.encode(), "the pruning plan", groups)
    _quiesce(trainable)
    ids = {
        ("ffn_hidden_size", layer): _tp_ids(mlp.neuron_ids, groups) for layer, mlp in trainable.mlps
    }
    step = adam_step(trainable.optimizer, groups)

    def decide() -> Relocations:
        assert step > 0, "there is no optimizer state to carry over before the first step"
        return {
            (axis, layer): relocate(
                of, stored(plan.alive[layer], of, plan.widths[layer]), placement
            )
            for (axis, layer), of in ids.items()
        }

    relocations: Relocations = together(decide, groups)
    moved, moved_bytes = _moved(trainable, relocations)
    apply_mask(trainable.mlps, plan)
    before = fingerprint(trainable, last_bit=True)
    peak = PeakMemory()
    attributes = {name: _attributes(p) for name, p in named_parameters(trainable.chunks)}

    # The order keeps the peak down: gradients go first and come back last, old shards go one by
    # one while survivors are staged, and all of the old is gone before the new is built.
    free_gradients(trainable)
    staged, owners = stage(trainable, relocations)
    release(trainable)

    fresh = assemble(trainable.config, groups, plan.widths, initialize=False, gradients=False)
    for name, parameter in named_parameters(fresh.chunks):
        assert _attributes(parameter) == attributes[name], (
            f"{name} lost an attribute in the rebuild"
        )
    restore(fresh, staged, owners, step)
    for layer, mlp in fresh.mlps:
        key = ("ffn_hidden_size", layer)
        source = relocations[key].sources[groups.tp.rank()]
        mlp.neuron_ids.copy_(torch.stack(ids[key])[source[:, 0], source[:, 1]])
    apply_mask(fresh.mlps, plan)
    for chunk in fresh.chunks:
        chunk.restore_grad_buffers()
    trainable.core, trainable.chunks = fresh.core, fresh.chunks
    trainable.optimizer, trainable.widths = fresh.optimizer, fresh.widths
    peak_bytes = peak.bytes
    loss_change = check(before, fingerprint(trainable), trainable)
    return CompactReport(
        list(old_widths),
        list(plan.widths),
        moved,
        moved_bytes,
        time.perf_counter() - begin,
        _highest(peak_bytes, groups),
        loss_change,
        plan.digest,
    )


def _moved(trainable: Trainable, relocations: Relocations) -> tuple[int, int]:
    """Count the units that change their rank in all pipeline stages, and bytes of their state."""
    moved = {key: relocation.moved for key, relocation in relocations.items()}
    weights = sum(
        moved.get((share.axis, share.layer), 0) * share.unit_numel
        for _, _, shares in named_shares(trainable)
        for share in shares
    )
    groups, state_bytes = trainable.groups, torch.float32.itemsize * (1 + len(MOMENTS))
    total = torch.tensor([sum(moved.values()), weights * state_bytes], device=groups.device)
    dist.all_reduce(total)
    # Tensor- and data-parallel ranks of a stage have counted the same units.
    units, size = (total // (groups.tp.size() * groups.shards.size())).tolist()
    return units, size


def _highest(peak_bytes: int, groups: ProcessGroups) -> int:
    peak = torch.tensor(peak_bytes, device=groups.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak)


# What megatron-core 0.16.1 to 0.19 writes on a parameter that says how it is sharded, reduced,
# clipped and decayed. Others add notes of their own: Transformer Engine does at the first forward.
PARAMETER_ATTRIBUTES = (
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "sequence_parallel",
    "pipeline_parallel",
    "average_gradients_across_tp_domain",
    "allreduce",
    "expert_tp",
    "is_qkv",
    "shared",
    "shared_embedding",
    "is_embedding_parameter",
    "is_embedding_or_output_parameter",
)


def _attributes(parameter: torch.nn.Parameter) -> dict[str, object]:
    """Those of ``PARAMETER_ATTRIBUTES`` that are set."""
    return {name: vars(parameter)[name] for name in PARAMETER_ATTRIBUTES if name in vars(parameter)}


@torch.no_grad()
def stage(trainable: Trainable, relocations: Relocations) -> tuple[dict[str, Tensor], list[int]]:
    """The whole [3, numel] of the parameters that this rank owns, survivors only.

    One parameter is in transit at a time; its old shards are freed then.

    Returns: the state by parameter name, and the data-parallel rank that owns each parameter.
    """
    shards = trainable.exchange()
    work = []
    for name, parameter, shares in named_shares(trainable):
        leaving = [share for share in shares if (share.axis, share.layer) in relocations]
        work.append((name, parameter, leaving))
    staged: dict[str, Tensor] = {}
    # What is cut comes first: two copies of it are there meanwhile, and most is still free then.
    for name, parameter, leaving in sorted(work, key=lambda item: not item[2]):
        whole = shards.gather(parameter)
        _drop(trainable, parameter)
        if whole is None:  # another rank owns it
            continue
        for share in leaving:
            relocation = relocations[share.axis, share.layer]
            whole = move(whole, share, relocation, trainable.groups.tp)
        staged[name] = whole
    return staged, shards.owners


def _drop(trainable: Trainable, parameter: torch.nn.Parameter) -> None:
    """Free this rank's shard of the main weight and moments."""
    part = slot(trainable.optimizer, parameter)
    if part is None:
        return
    trainable.optimizer.optimizer.state.pop(part.main, None)
    if has_main_copy(parameter):
        part.main.data = part.main.data.new_empty(0)


@torch.no_grad()
def restore(fresh: Trainable, staged: dict[str, Tensor], owners: list[int], step: int) -> None:
    """Hand the staged state to the rebuilt optimizer and refresh the model's weights from it."""
    # At the new widths ownership would be dealt out otherwise.
    shards = fresh.exchange(owners)
    for name, parameter in named_parameters(fresh.chunks):
        part = shards.scatter(parameter, staged.pop(name, None))
        if part is not None:
            moments = dict(zip(MOMENTS, part[1:], strict=True))
            set_state(fresh.optimizer, parameter, step, part[0], moments)
    assert not staged, f"staged but not restored: {sorted(staged)}"
    finish_main_update(fresh.optimizer, fresh.chunks)
