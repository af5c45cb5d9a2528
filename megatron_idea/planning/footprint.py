"""Work out what one rank keeps in memory and sends: in training, and in a compaction.

The figures come from the code that a run uses, in a dry run (``dry_run.py``): exact for weights,
gradients and optimizer state; for activations exact in the tensors that layers keep and make, blind
to what kernels use inside themselves and to what an allocator loses. Of a compaction the code runs
that a live one runs, too; which units and layers go is drawn by chance.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea import config as configuration
from megatron_idea.config import Config, ParallelConfig, Sections, TrainingConfig
from megatron_idea.course import TeacherSize
from megatron_idea.distill.teacher import Teacher
from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.engine.model import layers_by_stage
from megatron_idea.engine.optimizer import set_state
from megatron_idea.engine.passes import forward_backward
from megatron_idea.engine.shards import MOMENTS, ShardExchange, deal, has_main_copy, shard_of
from megatron_idea.engine.trainable import Trainable, assemble
from megatron_idea.planning.dry_run import DryRun, LiveBytes
from megatron_idea.prune import compact as compaction
from megatron_idea.prune.axis import EMBEDDING, whole_shapes
from megatron_idea.prune.compact import Relocations, relocations_of, stored_after
from megatron_idea.prune.plan import Plan, StoredUnits, first_units, present
from megatron_idea.shape import LAYER_AXES, Shape


def build(config: Config, dry: DryRun, shape: Shape) -> Trainable:
    """Assemble this rank's model and optimizer as a run does, its moments as after a step."""
    config = configuration.replace(config, training={"kernel_implementation": "reference"})
    trainable = assemble(config.sections, dry.groups, shape, initialize=False)
    for parameter in trainable.parameters:
        part = shard_of(trainable.optimizer, parameter)
        if part is not None:
            moments = {name: torch.zeros_like(part.main) for name in MOMENTS}
            set_state(trainable.optimizer, parameter, 1, None, moments)
    return trainable


def kept_tensors(trainable: Trainable) -> dict[str, list[Tensor]]:
    """List what stays in memory between steps, by kind; a storage may come more than once."""
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
    }


def kept_bytes(trainable: Trainable) -> dict[str, int]:
    """Add up ``kept_tensors`` in bytes by kind, each storage once; of real or meta tensors."""
    return {
        kind: sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
        for kind, tensors in kept_tensors(trainable).items()
    }


def build_teacher(config: Config, dry: DryRun, size: TeacherSize) -> Teacher:
    """Assemble this rank's part of a teacher as a run does; hidden states wait on the device."""
    config = configuration.replace(
        config,
        training={"kernel_implementation": "reference"},
        distill={"keep_hidden": "device"},
    )
    return Teacher(
        size.model, size.shape, config.training, config.parallel, config.distill, dry.groups
    )


def _weights(teacher: Teacher) -> list[Tensor]:
    return [p.data for chunk in teacher.chunks for p in chunk.parameters()]


def teacher_bytes(teacher: Teacher) -> int:
    """Add up the weights of this rank's part of a teacher in bytes, each storage once."""
    storages = [weight.untyped_storage() for weight in _weights(teacher)]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def hidden_bytes(config: Config, size: TeacherSize) -> int:
    """Bytes of a micro-batch's hidden states that a rank of the last stage keeps of the teacher."""
    training, parallel = config.training, config.parallel
    tokens = training.seq_length * training.micro_batch_size
    if parallel.sequence_parallel:
        tokens //= parallel.tensor_model_parallel_size
    return tokens * size.shape.hidden_size * (2 if training.precision == "bf16" else 4)


def _all_kept(trainable: Trainable) -> list[Tensor]:
    return [tensor for tensors in kept_tensors(trainable).values() for tensor in tensors]


def owned_ranges(
    buffers: Sequence[Any], parameters: Sequence[Tensor], dp: int
) -> list[list[tuple[int, int]]]:
    """Say which elements of each parameter are in each data-parallel rank's shard.

    The distributed optimizer's rule: each bucket of a buffer is cut into equal parts, one a rank.

    Returns: [data-parallel rank][parameter], the first element and the one after the last.
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
    """Count the elements of this rank's optimizer shard."""
    parts = (shard_of(trainable.optimizer, p) for p in trainable.parameters)
    return sum(part.end - part.start for part in parts if part)


def fullest_shard(trainable: Trainable) -> int:
    """Count the elements of the largest optimizer shard of any data-parallel rank.

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
    """Most bytes alive at once: kept for the backward pass, or in use; with a teacher its logits
    are in it, and the hidden states that wait are not."""
    sent_bytes: dict[str, int]
    """Bytes sent in one optimizer step over ``tp``, ``pp``, ``dp`` and the tied ``embedding``."""


def _microbatches_to_run(
    parallel: ParallelConfig, pipeline_rank: int, num_microbatches: int
) -> int:
    """Return how many it takes for a rank to hold as many at once as it ever does."""
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


def step(
    dry: DryRun, trainable: Trainable, teacher: Teacher | None = None, hidden: int = 0
) -> Step:
    """Run micro-batches through the pipeline schedule and finish the gradients.

    Only as many as are in flight at once; what each sends is scaled to the number in a step.

    Args:
        teacher: is asked in this step.
        hidden: bytes that this rank keeps of its hidden states for a micro-batch.
    """
    groups, core, operations = dry.groups, trainable.core, dry.operations
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
    batches, weights = _Batches(training, count), _weights(teacher) if teacher else []
    with LiveBytes([*_all_kept(trainable), *weights]) as live:
        before = live.live
        taught = (
            teacher.teaching(trainable.chunks, batches, 0, alpha=0.5)
            if teacher
            else contextlib.nullcontext()
        )
        with taught:
            forward_backward(trainable, batches, 0)
    core.finalize_model_grads_func = finish
    for chunk in trainable.chunks:  # the optimizer does that; with overlap the forward does
        ddp = chunk.ddp_config
        if ddp.use_distributed_optimizer and not ddp.overlap_param_gather:
            chunk.start_param_sync()
    activations = live.peak - before - count * hidden
    return Step(activations, _by_kind(operations.sent, groups, in_step / count))


def _by_kind(
    sent: Counter[tuple[tuple[int, ...], bool]], groups: ProcessGroups, repeats: float
) -> dict[str, int]:
    """Sort bytes by the name of their group; those of micro-batches count ``repeats`` times."""
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
    """To other ranks: state to its owners and back, units to their new tensor-parallel ranks,
    layers to their new pipeline stages, new weights."""


@dataclass(frozen=True)
class Change:
    """A compaction to ``shape``, and where units go then."""

    shape: Shape
    relocations: Relocations


def random_changes(config: Config, shapes: Sequence[Shape]) -> list[Change]:
    """Draw by chance which units and layers go from each of ``shapes`` to the next.

    All layers of a shape have the counts of its first. Draw before a dry run: in one, new tensors
    have no contents.
    """
    generator = torch.Generator().manual_seed(0)
    tp, placement = config.parallel.tensor_model_parallel_size, config.prune.placement
    full = now = shapes[0]
    stored: StoredUnits = first_units(full)

    def draw(ids: Tensor, count: int) -> Tensor:
        return ids[torch.randperm(len(ids), generator=generator)[:count]]

    changes = []
    for target in shapes[1:]:
        (numbers,) = stored["num_layers"]
        shape = now.with_layers(draw(numbers, target.num_layers).tolist())
        for axis in (*LAYER_AXES, "hidden_size"):
            shape = shape.with_counts(axis, target.counts(axis)[0])
        after = {axis: list(stored[axis]) for axis in stored}
        after["num_layers"] = [torch.tensor([layer.number for layer in shape.layers])]
        for axis in (*LAYER_AXES, "hidden_size"):
            after[axis] = [draw(ids, shape.counts(axis)[0]) for ids in stored[axis]]
        plan = Plan.of(present(after, now, full), shape, torch.empty(0))
        relocations = relocations_of(plan, stored, now, tp, placement)
        changes.append(Change(shape, relocations))
        stored, now = stored_after(stored, relocations, now, shape), shape
    return changes


def parameter_sizes(sections: Sections, shape: Shape, pipeline_rank: int) -> dict[str, int]:
    """Count the weights of each parameter that a rank of a pipeline stage has, by name."""
    model, parallel = sections.model, sections.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    stages = layers_by_stage(shape.num_layers, parallel.num_stages)
    layers = [layer for stage in stages[pipeline_rank::pp] for layer in stage]
    is_last = pipeline_rank == pp - 1
    is_tied = model.share_embeddings_and_output_weights
    sizes = {}
    for name, dims in whole_shapes(model, shape):
        if found := re.match(r"decoder\.layers\.(\d+)\.", name):
            is_here = int(found[1]) in layers
        elif name == EMBEDDING:
            is_here = pipeline_rank == 0 or (is_last and is_tied)
        else:
            is_here = is_last
        if is_here:
            sizes[name] = math.prod(dims) // (tp if len(dims) > 1 else 1)
    return sizes


def compact(dry: DryRun, trainable: Trainable, change: Change) -> tuple[Trainable, Compaction]:
    """Take ``trainable`` through a compaction, which ends it.

    Returns: the model in its new shape, and what it took.
    """
    operations = dry.operations
    operations.sent.clear()
    stages_say, echo = _stages_say(trainable, change.shape), dist.all_gather_object

    def all_gather(gathered: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
        echo(gathered, own)
        if group is dry.groups.pp:
            gathered[:] = stages_say
            gathered[group.rank()] = own

    with (
        mock.patch.object(ShardExchange, "_all_ranges", _all_ranges),
        mock.patch("torch.distributed.all_gather_object", all_gather),
        LiveBytes(_all_kept(trainable)) as live,
    ):
        compaction.free_gradients(trainable)
        live.peak = live.live
        fresh, _ = compaction.rebuild(trainable, change.relocations, change.shape, step=1)
    return fresh, Compaction(live.peak, sum(operations.sent.values()))


def _stages_say(
    trainable: Trainable, new: Shape
) -> list[tuple[dict[str, tuple[int, int]], list[str]]]:
    """Answer for every pipeline stage in ``move_layers``: in a dry run there is nobody to ask."""
    sections, old = trainable.sections, trainable.shape
    stays, groups = compaction.layers_after(old, new), trainable.groups
    stages = range(groups.pp.size())
    sizes = {}
    for stage in stages:
        sizes |= parameter_sizes(sections, new, stage)
    answers = []
    for stage in stages:
        had = parameter_sizes(sections, old, stage)
        owners = deal(list(had.values()), groups.shards.size())
        here = {}
        for name, owner in zip(had, owners, strict=True):
            if (after := compaction.renamed(name, stays)) is not None:
                is_sharded = sections.parallel.use_distributed_optimizer
                is_here = owner == groups.shards.rank() or not is_sharded
                here[after] = (owner, sizes[after] if is_here else 0)
        answers.append((here, list(parameter_sizes(sections, new, stage))))
    return answers


def _all_ranges(
    exchange: ShardExchange, parameters: Sequence[torch.nn.Parameter]
) -> dict[int, list[tuple[int, int]]]:
    """Follow the rule in ``ShardExchange._all_ranges``: in a dry run there is nobody to ask."""
    if not exchange._sharded:
        return {}
    by_rank = owned_ranges(exchange._optimizer.buffers, parameters, exchange._groups.shards.size())
    return {id(p): [ranges[i] for ranges in by_rank] for i, p in enumerate(parameters)}
