"""What one rank keeps in memory and sends: in training, and in a compaction.

The figures come from the code that a run uses, on the meta device (``meta.py``): exact for weights,
gradients and optimizer state; for activations exact in the tensors that layers keep and make, blind
to what kernels use inside themselves and to what an allocator loses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea import config as configuration
from megatron_idea.config import Config, ParallelConfig, TrainingConfig
from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.engine.optimizer import set_state
from megatron_idea.engine.passes import forward_backward
from megatron_idea.engine.shards import MOMENTS, ShardExchange, has_main_copy, shard_of
from megatron_idea.engine.trainable import Trainable, assemble
from megatron_idea.planning.dry_run import LiveBytes, Paper
from megatron_idea.prune import compact as compaction
from megatron_idea.prune.compact import Relocations
from megatron_idea.prune.relocate import relocate
from megatron_idea.shape import Shape


def build(config: Config, paper: Paper, widths: Sequence[int]) -> Trainable:
    """Assemble this rank's model and optimizer as a run does, its moments as after a step."""
    config = configuration.replace(config, training={"kernel_implementation": "reference"})
    shape = Shape.full(config.model).with_counts("ffn_hidden_size", widths)
    trainable = assemble(config.sections, paper.groups, shape, initialize=False)
    for parameter in trainable.parameters:
        part = shard_of(trainable.optimizer, parameter)
        if part is not None:
            moments = {name: torch.zeros_like(part.main) for name in MOMENTS}
            set_state(trainable.optimizer, parameter, 1, None, moments)
    return trainable


def kept_tensors(trainable: Trainable) -> dict[str, list[Tensor]]:
    """What stays in memory between steps, by kind; a storage may come more than once."""
    state = [p for p in (shard_of(trainable.optimizer, p) for p in trainable.parameters) if p]
    buffers = [b for chunk in trainable.chunks for b in chunk.buffers]
    return {
        "weights": [
            *(p.data for p in trainable.parameters),
            *(b.param_data for b in buffers if b.param_data is not None),
        ],
        "gradients": [b.grad_data for b in buffers],
        "main_weights": [part.main.data for part in state if has_main_copy(part.parameter)],
        "moments": [part.state[name] for part in state for name in MOMENTS],
        "masks": [b for chunk in trainable.chunks for b in chunk.module.buffers()],
    }


def kept_bytes(trainable: Trainable) -> dict[str, int]:
    """Bytes of ``kept_tensors`` by kind, each storage once; of real or meta tensors."""
    return {
        kind: sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
        for kind, tensors in kept_tensors(trainable).items()
    }


def _all_kept(trainable: Trainable) -> list[Tensor]:
    return [tensor for tensors in kept_tensors(trainable).values() for tensor in tensors]


def owned_ranges(
    buffers: Sequence[Any], parameters: Sequence[Tensor], dp: int
) -> list[list[tuple[int, int]]]:
    """[data-parallel rank][parameter]: elements [start, end) of it in that rank's shard.

    The distributed optimizer's rule: each bucket of a buffer is cut into equal parts, one a rank.
    """
    place = {}
    for buffer in buffers:
        for parameter, (start, end, bucket) in buffer.param_index_map.items():
            first, last = buffer.bucket_indices[bucket]
            place[parameter] = (start - first, end - start, (last - first) // dp)

    def cut(rank: int, offset: int, size: int, part: int) -> tuple[int, int]:
        start, end = rank * part - offset, (rank + 1) * part - offset
        return (max(0, start), min(size, end)) if start < size and end > 0 else (0, 0)

    return [[cut(rank, *place[p]) for p in parameters] for rank in range(dp)]


def own_shard(trainable: Trainable) -> int:
    """Elements of the optimizer shard of this rank."""
    parts = (shard_of(trainable.optimizer, p) for p in trainable.parameters)
    return sum(part.end - part.start for part in parts if part)


def fullest_shard(trainable: Trainable) -> int:
    """Elements of the largest optimizer shard of any data-parallel rank.

    Shards differ by the padding between parameters and at the ends of buckets alone. That the rule
    holds is checked on the shard that was built, which is the first one.
    """
    parameters, dp = trainable.parameters, trainable.groups.shards
    if not trainable.parallel.use_distributed_optimizer:
        return sum(p.numel() for p in parameters)
    buffers = [buffer for chunk in trainable.chunks for buffer in chunk.buffers]
    ranges = owned_ranges(buffers, parameters, dp.size())
    mine = [shard_of(trainable.optimizer, p) for p in parameters]
    assert ranges[dp.rank()] == [(p.start, p.end) if p else (0, 0) for p in mine]
    return max(sum(end - start for start, end in of_rank) for of_rank in ranges)


@dataclass(frozen=True)
class Step:
    """What a training step of this rank needs beside ``kept_tensors``."""

    activation_bytes: int
    """Most bytes alive at once: kept for the backward pass, or in use."""
    sent_bytes: dict[str, int]
    """Bytes sent in one optimizer step over ``tp``, ``pp``, ``dp`` and the tied ``embedding``."""


def _microbatches_to_run(
    parallel: ParallelConfig, pipeline_rank: int, num_microbatches: int
) -> int:
    """Enough for a rank to hold as many micro-batches at once as it ever does."""
    pp = parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    if vpp == 1:
        return min(num_microbatches, pp - pipeline_rank)
    return min(num_microbatches, 2 * pp)


class _Batches:
    """Stands for ``Batches``: ``count`` micro-batches without contents."""

    def __init__(self, training: TrainingConfig, count: int) -> None:
        self.num_microbatches = count
        self.micro_batch_size = training.micro_batch_size
        self.seq_length = training.seq_length

    def step(self, _consumed_samples: int) -> Iterator[dict[str, Tensor]]:
        shape = (self.micro_batch_size, self.seq_length)
        for _ in range(self.num_microbatches):
            ids = {name: torch.empty(shape, dtype=torch.int64) for name in _IDS}
            yield {**ids, "loss_mask": torch.empty(shape)}


_IDS = ("tokens", "labels", "position_ids")


def step(paper: Paper, trainable: Trainable) -> Step:
    """Run micro-batches through the pipeline schedule and finish the gradients.

    Only as many as are in flight at once; what each sends is scaled to the number in a step.
    """
    groups, core, operations = paper.groups, trainable.core, paper.operations
    training = trainable.training
    in_step = training.global_batch_size // (training.micro_batch_size * groups.dp.size())
    count = _microbatches_to_run(trainable.parallel, groups.pp.rank(), in_step)
    finish: Any = core.finalize_model_grads_func

    def finish_and_say_so(*args: Any, **kwargs: Any) -> None:
        operations.finishing = True
        finish(*args, **kwargs)

    operations.sent.clear()
    operations.finishing = False
    core.finalize_model_grads_func = finish_and_say_so
    with LiveBytes(_all_kept(trainable)) as live:
        before = live.live
        forward_backward(trainable, _Batches(training, count), 0)
    core.finalize_model_grads_func = finish
    for chunk in trainable.chunks:  # the optimizer does that; with overlap the forward does
        ddp = chunk.ddp_config
        if ddp.use_distributed_optimizer and not ddp.overlap_param_gather:
            chunk.start_param_sync()
    return Step(live.peak - before, _by_kind(operations.sent, groups, in_step / count))


def _by_kind(
    sent: Counter[tuple[tuple[int, ...], bool]], groups: ProcessGroups, repeats: float
) -> dict[str, int]:
    """Bytes by the name of the group; those of micro-batches ``repeats`` times."""
    names = {"tp": groups.tp, "pp": groups.pp, "dp": groups.dp}
    known = {tuple(dist.get_process_group_ranks(g)): name for name, g in names.items()}
    total = dict.fromkeys([*names, "embedding"], 0)
    for (ranks, finishing), size in sent.items():
        # With two stages the embedding's ranks are those of the pipeline; it comes at the end.
        name = known.get(ranks, "embedding")
        if finishing and name == "pp":
            name = "embedding"
        is_per_microbatch = name in ("tp", "pp") and not finishing
        total[name] += round(size * (repeats if is_per_microbatch else 1))
    return total


@dataclass(frozen=True)
class Compaction:
    """What a compaction needs on this rank."""

    peak_bytes: int
    """Most bytes alive at once after the gradients were freed, which is what comes first."""
    sent_bytes: int
    """To other ranks: state to its owners and back, neurons to their new ranks, new weights."""


def random_relocations(config: Config, before: int, after: int) -> Relocations:
    """Where neurons go when ``after`` of ``before`` in each layer survive, drawn by chance."""
    tp = config.parallel.tensor_model_parallel_size
    generator = torch.Generator().manual_seed(before)
    relocations = {}
    for layer in range(config.model.num_layers):
        keep = torch.zeros(before, dtype=torch.bool)
        keep[torch.randperm(before, generator=generator)[:after]] = True
        ids = torch.arange(before).chunk(tp)
        key = ("ffn_hidden_size", layer)
        relocations[key] = relocate(ids, keep.chunk(tp), config.prune.placement)
    return relocations


def compact(
    paper: Paper, trainable: Trainable, width: int, relocations: Relocations
) -> tuple[Trainable, Compaction]:
    """Take ``trainable`` through a compaction to ``width`` neurons a layer, which ends it.

    Returns: the model at the new width, and what it took.
    """
    operations = paper.operations
    operations.sent.clear()
    with (
        mock.patch.object(ShardExchange, "_all_ranges", _all_ranges),
        LiveBytes(_all_kept(trainable)) as live,
    ):
        compaction.free_gradients(trainable)
        live.peak = live.live
        staged, owners = compaction.stage(trainable, relocations)
        compaction.release(trainable)
        shape = trainable.shape.with_counts("ffn_hidden_size", width)
        fresh = assemble(trainable.sections, paper.groups, shape, initialize=False, gradients=False)
        compaction.restore(fresh, staged, owners, 1)
        for chunk in fresh.chunks:
            chunk.restore_grad_buffers()
    return fresh, Compaction(live.peak, sum(operations.sent.values()))


def _all_ranges(
    exchange: ShardExchange, parameters: Sequence[torch.nn.Parameter]
) -> dict[int, list[tuple[int, int]]]:
    """``ShardExchange._all_ranges`` by the rule: on paper there is nobody to ask."""
    if not exchange._sharded:
        return {}
    by_rank = owned_ranges(exchange._optimizer.buffers, parameters, exchange._groups.shards.size())
    return {id(p): [ranges[i] for ranges in by_rank] for i, p in enumerate(parameters)}
