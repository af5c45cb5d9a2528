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
    forget_dummy_gradients,
    forget_rotary_cache,
    together,
)
from megatron_idea.engine.model import named_parameters
from megatron_idea.engine.optimizer import adam_step, finish_main_update, set_state
from megatron_idea.engine.shards import MOMENTS, has_main_copy, slot
from megatron_idea.engine.trainable import Trainable, assemble, forget_data_parallel
from megatron_idea.prune.axis import AXES, Share
from megatron_idea.prune.plan import Plan, StoredUnits
from megatron_idea.prune.relocate import Relocation, move, relocate
from megatron_idea.prune.units import named_shares
from megatron_idea.prune.verify import check, fingerprint
from megatron_idea.shape import Shape

Relocations = Mapping[tuple[str, int], Relocation]
"""By axis and layer's position."""


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did, for events.jsonl."""

    before: dict[str, list[int]]
    """Stored units of the axes that shrank, for each layer."""
    after: dict[str, list[int]]
    moved_units: int
    """Survivors that went to another tensor-parallel rank, over all layers."""
    moved_bytes: int
    """What they own of main weights and moments."""
    seconds: float
    peak_bytes: int
    """Highest memory in use on one rank: on a GPU at any moment, on a CPU between phases."""
    loss_change: float
    """Mean absolute change of a token's loss on a fixed text, in nats; rounding alone."""
    digest: str


def kept(alive: Tensor, ids: Tensor, count: int) -> Tensor:
    """Say which of the units ``ids`` stay in memory: the live, and zeros up to ``count``.

    ``alive``: bool, of all units of the layer. Returns: bool, one for each of ``ids``.
    """
    keep = alive[ids].clone()
    spare = count - int(keep.sum())
    assert spare >= 0, f"{count} units cannot hold {int(keep.sum())} live ones"
    zeros = (~keep).nonzero().view(-1)
    keep[zeros[ids[zeros].argsort()[:spare]]] = True
    return keep


def relocations_of(
    plan: Plan, stored: StoredUnits, shape: Shape, tp: int, placement: str
) -> Relocations:
    """Decide where units go, for every layer of the whole model on the axes that shrink."""
    found: dict[tuple[str, int], Relocation] = {}
    for axis in shrinking(shape, plan.shape):
        assert AXES[axis].is_split, f"{axis} cannot be cut from a live model yet"
        for layer, (ids, count) in enumerate(
            zip(stored[axis], plan.shape.counts(axis), strict=True)
        ):
            keep = kept(plan.alive[axis][shape.layers[layer].number], ids, count)
            parts = ids.chunk(tp), keep.chunk(tp)
            found[axis, layer] = relocate(*parts, placement)
    return found


def shrinking(old: Shape, new: Shape) -> list[str]:
    """List the axes on which two shapes differ."""
    return [axis for axis in AXES if old.counts(axis) != new.counts(axis)]


def stored_after(stored: StoredUnits, relocations: Relocations) -> StoredUnits:
    """Return the units in memory once they have been relocated."""
    after = {axis: list(ids) for axis, ids in stored.items()}
    for (axis, layer), relocation in relocations.items():
        home, index = torch.cat(relocation.sources).unbind(1)
        per_rank = len(stored[axis][layer]) // len(relocation.sources)
        after[axis][layer] = stored[axis][layer][home * per_rank + index]
    return {axis: tuple(ids) for axis, ids in after.items()}


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


def compact(
    trainable: Trainable, plan: Plan, stored: StoredUnits, placement: str
) -> tuple[CompactReport, StoredUnits]:
    """Shrink the live model and its optimizer to ``plan.shape``, in place of ``trainable``.

    Call at a step boundary, when what the plan removes is zero and the plan was compared over all
    ranks. Collective over all ranks.

    Returns: what was done, and the units that are in memory now.
    Raises: AssertionError for a plan that does not fit the model; nothing was changed then.
        CompactionError when the result is not the model that there was.
    """
    begin = time.perf_counter()
    groups, old = trainable.groups, trainable.shape
    _quiesce(trainable)
    step = adam_step(trainable.optimizer, groups)

    def decide() -> Relocations:
        assert step > 0, "there is no optimizer state to carry over before the first step"
        return relocations_of(plan, stored, old, groups.tp.size(), placement)

    relocations: Relocations = together(decide, groups)
    after = stored_after(stored, relocations)
    moved_bytes = _moved_bytes(trainable, relocations)
    before = fingerprint(trainable, stored, last_bit=True)
    peak = PeakMemory()
    attributes = {name: _attributes(p) for name, p in named_parameters(trainable.chunks)}

    # The order keeps the peak down: gradients go first and come back last, old shards go one by
    # one while survivors are staged, and all of the old is gone before the new is built.
    free_gradients(trainable)
    staged, owners = stage(trainable, relocations)
    release(trainable)

    fresh = assemble(trainable.sections, groups, plan.shape, initialize=False, gradients=False)
    for name, parameter in named_parameters(fresh.chunks):
        assert _attributes(parameter) == attributes[name], (
            f"{name} lost an attribute in the rebuild"
        )
    restore(fresh, staged, owners, step)
    for chunk in fresh.chunks:
        chunk.restore_grad_buffers()
    trainable.core, trainable.chunks = fresh.core, fresh.chunks
    trainable.optimizer, trainable.shape = fresh.optimizer, fresh.shape
    peak_bytes = peak.bytes
    loss_change = check(before, fingerprint(trainable, after), trainable)
    shrunk = shrinking(old, plan.shape)
    report = CompactReport(
        {axis: list(old.counts(axis)) for axis in shrunk},
        {axis: list(plan.shape.counts(axis)) for axis in shrunk},
        sum(relocation.moved for relocation in relocations.values()),
        moved_bytes,
        time.perf_counter() - begin,
        _highest(peak_bytes, groups),
        loss_change,
        plan.digest,
    )
    return report, after


def _moved_bytes(trainable: Trainable, relocations: Relocations) -> int:
    """Add up what the units that change their rank own of main weights and moments."""
    groups, state_bytes = trainable.groups, torch.float32.itemsize * (1 + len(MOMENTS))
    weights = sum(
        relocation.moved * share.unit_numel
        for _, _, shares in named_shares(trainable)
        for share, relocation in _relocated(shares, relocations)
    )
    total = torch.tensor(weights * state_bytes, device=groups.device)
    dist.all_reduce(total)
    # Tensor- and data-parallel ranks of a stage have counted the same units.
    return int(total) // (groups.tp.size() * groups.shards.size())


def _relocated(shares: Sequence[Share], relocations: Relocations) -> list[tuple[Share, Relocation]]:
    """Pair the shares whose units are relocated with how."""
    found = ((share, relocations.get((share.axis, share.layer or 0))) for share in shares)
    return [(share, how) for share, how in found if how is not None and share.layer is not None]


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
        leaving = _relocated(shares, relocations)
        work.append((name, parameter, leaving))
    staged: dict[str, Tensor] = {}
    # What is cut comes first: two copies of it are there meanwhile, and most is still free then.
    for name, parameter, leaving in sorted(work, key=lambda item: not item[2]):
        whole = shards.gather(parameter)
        _drop(trainable, parameter)
        if whole is None:  # another rank owns it
            continue
        for share, relocation in leaving:
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
