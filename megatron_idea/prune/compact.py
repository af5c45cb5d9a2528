"""Apply a plan physically: removed neurons leave weights, main weights, moments and buffers.

The model, its gradient buffers and its optimizer are rebuilt at the new widths from a staged copy
of the survivors' state. Every survivor's main weight and moments arrive bit for bit; Adam's step
count, the learning rate, the data position and the random-number streams do not notice. All checks
come before the first tensor is dropped: an error after that ends the job, and the last checkpoint
stands.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.distributed import (
    ProcessGroups,
    assert_same_on_all_ranks,
    forget_rotary_cache,
    memory_bytes,
    together,
)
from megatron_idea.model import named_parameters
from megatron_idea.optim import (
    MOMENTS,
    ShardExchange,
    Trainable,
    adam_step,
    assemble,
    finish_main_update,
    forget_data_parallel,
    has_main_copy,
    set_state,
    slot,
)
from megatron_idea.prune.strategy import Plan
from megatron_idea.prune.units import pack, unpack


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did, for events.jsonl."""

    widths_before: list[int]
    widths_after: list[int]
    moved_neurons: int
    """Survivors that went to another tensor-parallel rank, over this pipeline stage's layers."""
    seconds: float
    peak_bytes: int
    """Highest memory in use that was seen at the phase borders, on this rank."""
    digest: str


@dataclass(frozen=True)
class Relocation:
    """Where one layer's neurons go: ``sources[r]`` lists what TP rank ``r`` holds afterwards."""

    sources: list[Tensor]
    """Per rank [t, 2] int64: (rank that has it, its local index there), in the new local order."""

    @property
    def moved(self) -> int:
        return sum(int((s[:, 0] != rank).sum()) for rank, s in enumerate(self.sources))


def relocate(ids: Sequence[Tensor], keep: Sequence[Tensor], placement: str) -> Relocation:
    """Spread the kept neurons of one layer evenly over TP ranks.

    ``min``: a rank keeps up to its share where they are, in order; the surplus fills the others up
    in rank order, so no more neurons move than must. ``ordered``: rank r gets the r-th part of all
    survivors sorted by neuron id, which is the order at TP = 1.

    Args:
        ids: per rank [f], neuron ids in local order.
        keep: per rank [f] bool; the total is a multiple of the number of ranks.
    """
    tp = len(ids)
    kept = [
        torch.stack([torch.full((int(k.sum()),), rank), k.nonzero().view(-1)], dim=1)
        for rank, k in enumerate(keep)
    ]
    total = sum(len(k) for k in kept)
    assert total % tp == 0, f"{total} survivors cannot be split over {tp} ranks"
    share = total // tp
    if placement == "ordered":
        everyone = torch.cat(kept)
        order = torch.cat([i[k] for i, k in zip(ids, keep, strict=True)]).argsort()
        return Relocation(list(everyone[order].split(share)))
    surplus = torch.cat([k[share:] for k in kept])
    sources = []
    for k in kept:
        missing = max(0, share - len(k))
        sources.append(torch.cat([k[:share], surplus[:missing]]))
        surplus = surplus[missing:]
    return Relocation(sources)


def exchange(neurons: Tensor, relocation: Relocation, group: dist.ProcessGroup) -> Tensor:
    """Send [f, ...] rows to where the relocation wants them; one all-to-all over TP.

    Returns: [t, ...] rows in the new local order, bit for bit.
    """
    me = group.rank()
    wanted = relocation.sources[me]
    if group.size() == 1:
        return neurons[wanted[:, 1].to(neurons.device)]
    outgoing = [s[s[:, 0] == me, 1] for s in relocation.sources]
    arriving = [int((wanted[:, 0] == rank).sum()) for rank in range(group.size())]
    sent = neurons[torch.cat(outgoing).to(neurons.device)]
    received = sent.new_empty(sum(arriving), *neurons.shape[1:])
    dist.all_to_all_single(received, sent, arriving, [len(o) for o in outgoing], group=group)
    # Rows arrive sorted by sender; inside a sender they keep the order of ``wanted``.
    position = torch.argsort(wanted[:, 0], stable=True).to(neurons.device)
    result = torch.empty_like(received)
    result[position] = received
    return result


def _stored(alive: Tensor, ids: Sequence[Tensor], width: int) -> list[Tensor]:
    """Which neurons of a layer stay in memory: the live, then masked ones by id up to ``width``."""
    present = torch.cat(list(ids))
    is_alive = alive.cpu()[present]
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


def _free(trainable: Trainable) -> None:
    """Drop the old model, buffers and optimizer, and what would keep them alive."""
    for chunk in trainable.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=False)
    forget_data_parallel(trainable.core)
    trainable.chunks = []
    del trainable.optimizer
    forget_rotary_cache()
    gc.collect()  # hooks, buffers and parameters refer to each other in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compact(trainable: Trainable, plan: Plan, placement: str) -> CompactReport:
    """Shrink the live model and its optimizer to ``plan.widths``, in place of ``trainable``.

    Call at a step boundary. Collective over all ranks. Neurons that the plan keeps in memory
    though they are masked stay masked.

    Raises: RuntimeError when the plan differs between ranks; AssertionError for a plan that does
        not fit the model. In both cases nothing was changed.
    """
    begin = time.perf_counter()
    groups, old_widths = trainable.groups, trainable.widths
    peak = memory_bytes()
    assert_same_on_all_ranks(plan.digest.encode(), "the pruning plan", groups)
    _quiesce(trainable)
    ids = {layer: _tp_ids(mlp.neuron_ids, groups) for layer, mlp in trainable.mlps}
    step = adam_step(trainable.optimizer, groups)

    def decide() -> dict[int, Relocation]:
        assert step > 0, "there is no optimizer state to carry over before the first step"
        return {
            layer: relocate(of, _stored(plan.alive[layer], of, plan.widths[layer]), placement)
            for layer, of in ids.items()
        }

    relocations: dict[int, Relocation] = together(decide, groups)
    attributes = {name: _plain(p) for name, p in named_parameters(trainable.chunks)}

    for chunk in trainable.chunks:
        chunk.offload_grad_buffers()
    trainable.optimizer.zero_grad()
    staged, owners = _stage(trainable, relocations)
    peak = max(peak, memory_bytes())
    _free(trainable)

    fresh = assemble(trainable.config, groups, plan.widths, initialize=False)
    for name, parameter in named_parameters(fresh.chunks):
        assert _plain(parameter) == attributes[name], f"{name} lost an attribute in the rebuild"
    peak = max(peak, memory_bytes())
    _restore(fresh, staged, owners, step)
    for layer, mlp in fresh.mlps:
        source = relocations[layer].sources[groups.tp.rank()]
        mlp.neuron_ids.copy_(torch.stack(ids[layer])[source[:, 0], source[:, 1]])
        mlp.set_mask(plan.alive[layer, mlp.neuron_ids])
    trainable.core, trainable.chunks = fresh.core, fresh.chunks
    trainable.optimizer, trainable.widths = fresh.optimizer, fresh.widths
    return CompactReport(
        list(old_widths),
        list(plan.widths),
        sum(r.moved for r in relocations.values()),
        time.perf_counter() - begin,
        max(peak, memory_bytes()),
        plan.digest,
    )


def _plain(parameter: torch.nn.Parameter) -> dict[str, object]:
    """A parameter's attributes that say how it is sharded, reduced and clipped."""
    return {
        name: value
        for name, value in vars(parameter).items()
        if isinstance(value, (bool, int, str)) and name != "grad_added_to_main_grad"
    }


@torch.no_grad()
def _stage(
    trainable: Trainable, relocations: dict[int, Relocation]
) -> tuple[dict[str, Tensor], list[int]]:
    """The whole [3, numel] of the parameters that this rank owns, survivors only.

    One layer's FFN or one other parameter is in transit at a time; its old shards are freed then.

    Returns: the state by parameter name, and the data-parallel rank that owns each parameter.
    """
    shards = ShardExchange(trainable)
    names = {id(p): name for name, p in named_parameters(trainable.chunks)}
    layers = {id(mlp.linear_fc1.weight): layer for layer, mlp in trainable.mlps}
    staged: dict[str, Tensor] = {}
    for bundle in trainable.bundles:
        gathered = []
        for parameter in bundle:
            gathered.append(shards.gather(parameter))
            _drop(trainable, parameter)
        wholes = [whole for whole in gathered if whole is not None]
        if not wholes:  # another rank owns this bundle
            continue
        if len(bundle) == 2:
            relocation = relocations[layers[id(bundle[0])]]
            wholes = _cut(wholes, bundle, relocation, trainable.groups.tp)
        staged |= {names[id(p)]: whole for p, whole in zip(bundle, wholes, strict=True)}
    return staged, shards.owners


def _drop(trainable: Trainable, parameter: torch.nn.Parameter) -> None:
    """Free this rank's shard of the main weight and moments."""
    part = slot(trainable.optimizer, parameter)
    if part is None:
        return
    trainable.optimizer.optimizer.state.pop(part.main, None)
    if has_main_copy(parameter):
        part.main.data = part.main.data.new_empty(0)


def _cut(
    wholes: list[Tensor],
    ffn: tuple[torch.nn.Parameter, ...],
    relocation: Relocation,
    tp: dist.ProcessGroup,
) -> list[Tensor]:
    """Keep and exchange an FFN's neurons: [3, 2 f H] and [3, H f] go to the new width."""
    fc1, fc2 = (w.view(3, *p.shape) for w, p in zip(wholes, ffn, strict=True))
    return [part.view(3, -1) for part in unpack(exchange(pack(fc1, fc2), relocation, tp))]


@torch.no_grad()
def _restore(fresh: Trainable, staged: dict[str, Tensor], owners: list[int], step: int) -> None:
    """Hand the staged state to the rebuilt optimizer and refresh the model's weights from it."""
    # At the new widths ownership would be dealt out otherwise.
    shards = ShardExchange(fresh, owners)
    for name, parameter in named_parameters(fresh.chunks):
        part = shards.scatter(parameter, staged.pop(name, None))
        if part is not None:
            moments = dict(zip(MOMENTS, part[1:], strict=True))
            set_state(fresh.optimizer, parameter, step, part[0], moments)
    assert not staged, f"staged but not restored: {sorted(staged)}"
    finish_main_update(fresh.optimizer, fresh.chunks)
