"""Apply a plan physically: removed units leave weights, main weights, moments and buffers.

The model, its gradient buffers and its optimizer are rebuilt at the new shape from a staged copy
of the survivors' state. Neurons and KV groups are spread evenly over tensor-parallel ranks, layers
over pipeline stages; channels are the same on every rank. Every survivor's main weight and moments
arrive bit for bit; Adam's step count, the learning rate, the data position and the random-number
streams do not notice. All checks of the plan come before the first tensor is dropped, and the
result is checked against what there was: an error ends the job, and the last checkpoint stands.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.config import ModelConfig
from megatron_idea.engine.distributed import (
    PeakMemory,
    ProcessGroups,
    together,
)
from megatron_idea.engine.model import named_parameters
from megatron_idea.engine.optimizer import adam_step, finish_main_update, has_moments, set_state
from megatron_idea.engine.shards import MOMENTS, has_main_copy, shard_of
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.axis import AXES, Share, shares_of
from megatron_idea.prune.plan import Plan, StoredUnits
from megatron_idea.prune.relocate import Relocation, move, relocate
from megatron_idea.prune.units import named_shares
from megatron_idea.prune.verify import check, fingerprint
from megatron_idea.shape import LAYER_AXES, Shape

Relocations = Mapping[tuple[str, int | None], Relocation]
"""By axis and layer's position in the old model, None for channels. Those of a layer that goes are
not there."""


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did, for events.jsonl."""

    before: dict[str, list[int]]
    """Stored units of the axes that shrank, for each layer."""
    after: dict[str, list[int]]
    moved_units: int
    """Survivors that went to another tensor-parallel rank, over all layers."""
    moved_layers: int
    """Survivors that went to another pipeline stage."""
    moved_bytes: int
    """What they own of main weights and moments, before anything is cut."""
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
    found: dict[tuple[str, int | None], Relocation] = {}
    after = {layer.number: layer for layer in plan.shape.layers}
    for axis in LAYER_AXES:
        for position, layer in enumerate(shape.layers):
            if layer.number not in after:
                continue
            count = getattr(after[layer.number], axis)
            if count < getattr(layer, axis):
                ids = stored[axis][position]
                keep = kept(plan.alive[axis][layer.number], ids, count)
                parts = ids.chunk(tp), keep.chunk(tp)
                found[axis, position] = relocate(*parts, placement)
    if plan.shape.hidden_size < shape.hidden_size:
        (ids,) = stored["hidden_size"]
        keep = kept(plan.alive["hidden_size"], ids, plan.shape.hidden_size)
        found["hidden_size", None] = relocate([ids], [keep], placement)
    return found


def shrinking(old: Shape, new: Shape) -> list[str]:
    """List the axes on which two shapes differ."""
    still = old.with_layers(layer.number for layer in new.layers)
    shrunk = [axis for axis in AXES if still.counts(axis) != new.counts(axis)]
    return shrunk + (["num_layers"] if still != old else [])


def layers_after(old: Shape, new: Shape) -> dict[int, int]:
    """Map the position of every layer that stays to that in the new model."""
    position = {layer.number: n for n, layer in enumerate(new.layers)}
    return {
        n: position[layer.number] for n, layer in enumerate(old.layers) if layer.number in position
    }


def stored_after(
    stored: StoredUnits, relocations: Relocations, old: Shape, new: Shape
) -> StoredUnits:
    """Return the units in memory once they have been relocated."""
    after = {axis: list(ids) for axis, ids in stored.items()}
    for (axis, layer), relocation in relocations.items():
        place = layer or 0
        home, index = torch.cat(relocation.sources).unbind(1)
        per_rank = len(stored[axis][place]) // len(relocation.sources)
        after[axis][place] = stored[axis][place][home * per_rank + index]
    for axis in LAYER_AXES:
        after[axis] = [after[axis][position] for position in layers_after(old, new)]
    after["num_layers"] = [torch.tensor([layer.number for layer in new.layers])]
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
    moments = has_moments(trainable.optimizer, groups)

    def decide() -> Relocations:
        assert moments, "there is no optimizer state to carry over before the first step"
        return relocations_of(plan, stored, old, groups.tp.size(), placement)

    relocations: Relocations = together(decide, groups)
    after = stored_after(stored, relocations, old, plan.shape)
    moved_bytes = _moved_bytes(trainable, relocations)
    before = fingerprint(trainable, stored, last_bit=True)
    peak = PeakMemory()
    # The order keeps the peak down: gradients go first and come back last, old shards go one by
    # one while survivors are staged, and all of the old is gone before the new is built.
    free_gradients(trainable)
    fresh, moved_layers = rebuild(trainable, relocations, plan.shape, step)
    vars(trainable).update(vars(fresh))
    peak_bytes = peak.bytes
    loss_change = check(before, fingerprint(trainable, after), plan.alive, trainable)
    shrunk = shrinking(old, plan.shape)
    report = CompactReport(
        {axis: list(old.counts(axis)) for axis in shrunk},
        {axis: list(plan.shape.counts(axis)) for axis in shrunk},
        sum(relocation.moved for relocation in relocations.values()),
        moved_layers,
        moved_bytes,
        time.perf_counter() - begin,
        _highest(peak_bytes, groups),
        loss_change,
        plan.digest,
    )
    return report, after


def rebuild(
    trainable: Trainable, relocations: Relocations, shape: Shape, step: int
) -> tuple[Trainable, int]:
    """Make a model of ``shape`` with the survivors' state; that of ``trainable`` is gone then.

    Gradients are freed before. Collective over all ranks.

    Args:
        step: that Adam has taken.
    Returns: the new model, and how many layers have changed their pipeline stage.
    """
    old = trainable.shape
    attributes = {tensor_of(name): _attributes(p) for name, p in named_parameters(trainable.chunks)}
    staged, owners = stage(trainable, relocations, shape)
    fresh = trainable.rebuilt(shape)
    for name, parameter in named_parameters(fresh.chunks):
        known = attributes.get(tensor_of(name))  # unknown where a stage has its first layer now
        assert known is None or _attributes(parameter) == known, (
            f"{name} lost an attribute in the rebuild: {_attributes(parameter)}, was {known}"
        )
    moved_layers = 0
    if shape.num_layers < old.num_layers:
        moved_layers = move_layers(staged, owners, fresh)
    restore(fresh, staged, owners, step)
    for chunk in fresh.chunks:
        chunk.restore_grad_buffers()
    return fresh, moved_layers


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
    found = ((share, relocations.get(_place(share))) for share in shares)
    return [(share, how) for share, how in found if how is not None]


def _place(share: Share) -> tuple[str, int | None]:
    return share.axis, None if share.axis == "hidden_size" else share.layer


def tensor_of(name: str) -> str:
    """Return a parameter's name without the number of its layer."""
    return re.sub(r"layers\.\d+\.", "layers.", name)


def _highest(peak_bytes: int, groups: ProcessGroups) -> int:
    peak = torch.tensor(peak_bytes, device=groups.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak)


# What megatron-core 0.16.1 to 0.19 writes on a parameter that says how it is sharded, reduced,
# clipped and decayed, and what it takes where nothing is written. Others add notes of their own:
# Transformer Engine does at the first forward.
PARAMETER_ATTRIBUTES = {
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "partition_stride": 1,
    "sequence_parallel": False,
    "pipeline_parallel": False,
    "average_gradients_across_tp_domain": False,
    "allreduce": True,
    "expert_tp": False,
    "is_qkv": False,
    "shared": False,
    "shared_embedding": False,
    "is_embedding_parameter": False,
    "is_embedding_or_output_parameter": False,
}


def _attributes(parameter: torch.nn.Parameter) -> dict[str, object]:
    """Those of ``PARAMETER_ATTRIBUTES``, as megatron-core reads them."""
    return {name: vars(parameter).get(name, value) for name, value in PARAMETER_ATTRIBUTES.items()}


@torch.no_grad()
def stage(
    trainable: Trainable, relocations: Relocations, shape: Shape
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Take the whole [3, numel] of the parameters that this rank owns, survivors only.

    One parameter is in transit at a time; its old shards are freed then.

    Args:
        shape: of the new model.
    Returns: by the name that a parameter will have, its state, and the data-parallel rank that owns
        it.
    """
    groups, model, old = trainable.groups, trainable.model, trainable.shape
    exchange = trainable.exchange()
    stays = layers_after(old, shape)
    work = []
    for (name, parameter, shares), owner in zip(
        named_shares(trainable), exchange.owners, strict=True
    ):
        leaving = _relocated(shares, relocations)
        work.append((name, parameter, leaving, owner))
    staged: dict[str, Tensor] = {}
    owners: dict[str, int] = {}
    # What is cut comes first: two copies of it are there meanwhile, and most is still free then.
    for name, parameter, leaving, owner in sorted(work, key=lambda item: not item[2]):
        new_name = renamed(name, stays)
        whole = None if new_name is None else exchange.gather(parameter)
        _drop(trainable, parameter)
        if new_name is None:  # its layer goes
            continue
        owners[new_name] = owner
        if whole is None:  # another rank owns it
            continue
        present = old
        for share, relocation in leaving:
            # What was cut on one axis is shorter on it for the next.
            now = _share_of(name, share.axis, model, present, groups.tp.size())
            group = groups.tp if AXES[share.axis].is_split else None
            whole = move(whole, now, relocation, group)
            present = _shrunk(present, share, relocation)
        staged[new_name] = whole
    return staged, owners


def _share_of(name: str, axis: str, model: ModelConfig, shape: Shape, tp: int) -> Share:
    return next(share for share in shares_of(name, model, shape, tp) if share.axis == axis)


def _shrunk(shape: Shape, share: Share, relocation: Relocation) -> Shape:
    """Return the shape with one axis cut, in one layer where layers have units of their own."""
    count = sum(map(len, relocation.sources))
    if share.axis == "hidden_size":
        return shape.with_counts(share.axis, count)
    counts = list(shape.counts(share.axis))
    assert share.layer is not None
    counts[share.layer] = count
    return shape.with_counts(share.axis, counts)


def renamed(name: str, stays: Mapping[int, int]) -> str | None:
    """Return the name of a parameter in the new model; None when its layer is not there."""
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    if found is None:
        return name
    position = stays.get(int(found[1]))
    return None if position is None else f"decoder.layers.{position}.{name[found.end() :]}"


@torch.no_grad()
def move_layers(staged: dict[str, Tensor], owners: dict[str, int], fresh: Trainable) -> int:
    """Send staged layers to the pipeline stages that have them now; collective over the stages.

    Every rank sends to, and receives from, ranks that differ from it in their stage alone, in one
    order of names. ``staged`` and ``owners`` become those of this rank's new parameters.

    Returns: how many layers have changed their stage.
    """
    pp = fresh.groups.pp
    names = [name for name, _ in named_parameters(fresh.chunks)]
    here = {
        name: (owner, len(staged[name][0]) if name in staged else 0)
        for name, owner in owners.items()
    }
    everyones: list[tuple[dict[str, tuple[int, int]], list[str]]] = [({}, [])] * pp.size()
    dist.all_gather_object(everyones, (here, names), group=pp)
    moved = set()
    had = {name: stage for stage, (known, _) in enumerate(everyones) for name in known}
    has = {name: stage for stage, (_, wanted) in enumerate(everyones) for name in wanted}
    me = pp.rank()
    for name in sorted(name for name in has if name.startswith("decoder.layers.")):
        source, target = had[name], has[name]
        if source == target:
            continue
        moved.add(int(name.split(".")[2]))
        owner, numel = everyones[source][0][name]
        if me == target:
            owners[name] = owner
            if numel:
                staged[name] = torch.empty(3, numel, device=fresh.groups.device)
                dist.recv(staged[name], group=pp, group_src=source)
        elif me == source:
            owners.pop(name)
            if numel:
                dist.send(staged.pop(name).contiguous(), group=pp, group_dst=target)
    return len(moved)


def _drop(trainable: Trainable, parameter: torch.nn.Parameter) -> None:
    """Free this rank's shard of the main weight and moments."""
    part = shard_of(trainable.optimizer, parameter)
    if part is None:
        return
    trainable.optimizer.optimizer.state.pop(part.main, None)
    if has_main_copy(parameter):
        part.main.data = part.main.data.new_empty(0)


@torch.no_grad()
def restore(
    fresh: Trainable, staged: dict[str, Tensor], owners: Mapping[str, int], step: int
) -> None:
    """Hand the staged state to the rebuilt optimizer and refresh the model's weights from it."""
    # In the new shape ownership would be dealt out otherwise.
    shards = fresh.exchange([owners[name] for name, _ in named_parameters(fresh.chunks)])
    for name, parameter in named_parameters(fresh.chunks):
        part = shards.scatter(parameter, staged.pop(name, None))
        if part is not None:
            moments = dict(zip(MOMENTS, part[1:], strict=True))
            set_state(fresh.optimizer, parameter, step, part[0], moments)
    assert not staged, f"staged but not restored: {sorted(staged)}"
    finish_main_update(fresh.optimizer, fresh.chunks)
