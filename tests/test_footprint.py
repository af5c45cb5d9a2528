"""Figures of dry runs against processes that really build, train and compact the same model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from jobs import RandomBatches, backward, run_job
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_idea import config as configuration
from megatron_idea.config import Config
from megatron_idea.course import own_teacher
from megatron_idea.distill.teacher import Teacher
from megatron_idea.engine.distributed import start_distributed, stop_distributed
from megatron_idea.engine.model import named_parameters
from megatron_idea.engine.optimizer import update
from megatron_idea.engine.passes import forward_backward
from megatron_idea.engine.trainable import Trainable, assemble
from megatron_idea.planning import footprint
from megatron_idea.planning.dry_run import LiveBytes, dry_run
from megatron_idea.prune import compact as compaction
from megatron_idea.prune.axis import EMBEDDING
from megatron_idea.shape import AXES, Shape
from megatron_idea.testing import Workers

HIDDEN, WIDTH, VOCAB, SEQUENCE = 64, 1024, 2048, 64
NARROW = 512

# Processes, precision and layout: each kind of parallelism alone and with the others, with and
# without the distributed optimizer, several buckets, two chunks a stage.
LAYOUTS: list[tuple[int, str, dict[str, Any]]] = [
    (1, "bf16", {}),
    (2, "bf16", {"tensor_model_parallel_size": 2}),
    (2, "fp32", {"pipeline_model_parallel_size": 2}),
    (
        2,
        "bf16",
        {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 200_000},
    ),
    (2, "bf16", {"use_distributed_optimizer": False}),
    (4, "bf16", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    (4, "bf16", {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
]


def model(precision: str = "bf16", **parallel: Any) -> Config:
    """1M parameters: enough to outweigh the tables and messages that go with them."""
    return configuration.from_dict(
        {
            "model": {
                "num_layers": 4, "hidden_size": HIDDEN, "ffn_hidden_size": WIDTH,
                "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 16,
                "vocab_size": VOCAB, "qk_layernorm": True,
            },
            "training": {
                "seq_length": SEQUENCE, "micro_batch_size": 2, "global_batch_size": 8,
                "precision": precision,
            },
            "prune": {"target": {"ffn_hidden_size": NARROW}},
            "parallel": parallel,
        }
    )  # fmt: skip


@contextmanager
def dry_model(config: Config, world: int, stage: int = 0) -> Iterator[tuple[Any, Trainable]]:
    with dry_run(config, world, stage) as dry:
        yield dry, footprint.build(config, dry, Shape.full(config.model))


def dry_ranks(config: Config, world: int) -> dict[int, int]:
    """Rank -> its pipeline stage, of the ranks that ``dry_run`` can be."""
    stages = config.parallel.pipeline_model_parallel_size
    return {stage * world // stages: stage for stage in range(stages)}


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def all_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]


def train_a_step(groups: Any, config: Config) -> dict[str, Any]:
    """What this rank measures: bytes kept by kind and in all, activations, its shard."""
    gc.unfreeze()  # a worker's collections skip what it has imported; tensors may be there too
    before = {id(x) for x in all_tensors()}
    trainable = assemble(config.sections, groups, Shape.full(config.model), initialize=True)
    backward(trainable)
    update(trainable.optimizer, lr=1e-3)
    alive = [x for x in all_tensors() if id(x) not in before]
    kept = footprint.kept_bytes(trainable)
    with LiveBytes(alive) as live:
        start = live.live
        backward(trainable)
    return {
        "parameters": {name: p.numel() for name, p in named_parameters(trainable.chunks)},
        "kept": kept,
        "alive": storage_bytes(alive),
        "activations": live.peak - start,
        "shard": footprint.own_shard(trainable),
    }


@pytest.mark.parametrize(("world", "precision", "parallel"), LAYOUTS, ids=str)
def test_a_dry_run_says_what_a_rank_measures(
    workers: Workers, world: int, precision: str, parallel: dict[str, Any]
) -> None:
    config = model(precision, **parallel)
    measured = run_job(workers, train_a_step, world, config)
    stages = dry_ranks(config, world)
    for rank, stage in stages.items():
        with dry_model(config, world, stage) as (dry, trainable):
            names = {name: p.numel() for name, p in named_parameters(trainable.chunks)}
            kept = footprint.kept_bytes(trainable)
            fullest = footprint.fullest_shard(trainable)
            step = footprint.step(dry, trainable)
        assert names == measured[rank]["parameters"]
        assert kept == measured[rank]["kept"]
        peers = measured[rank : rank + world // len(stages)]
        assert fullest == max(peer["shard"] for peer in peers)
        # Everything that is alive in the process: rotary tables and the last messages come on top.
        assert sum(kept.values()) == pytest.approx(measured[rank]["alive"], rel=0.03)
        # A CPU's attention kernel keeps other small things than a GPU's; so do gloo's messages.
        assert step.activation_bytes == pytest.approx(measured[rank]["activations"], rel=0.05)


def take_a_taught_step(groups: Any, config: Config) -> dict[str, int]:
    """What this rank measures of a teacher: its weights, and the peak of a step beside both."""
    trainable = assemble(config.sections, groups, Shape.full(config.model), initialize=True)
    teacher = Teacher(
        config.model, Shape.full(config.model), config.training, config.parallel, config.distill,
        groups,
    )  # fmt: skip
    backward(trainable)
    update(trainable.optimizer, lr=1e-3)
    batches = RandomBatches(config, groups)
    weights = [p.data for chunk in teacher.chunks for p in chunk.parameters()]
    kept = [t for of_kind in footprint.kept_tensors(trainable).values() for t in of_kind]
    peak = 0
    for _ in range(2):  # rotary tables and the like are made in the first
        with LiveBytes([*kept, *weights]) as live:
            start = live.live
            with teacher.teaching(trainable.chunks, batches, 0, alpha=0.5):
                forward_backward(trainable, batches, 0)
        peak = live.peak - start
    return {"weights": storage_bytes(weights), "peak": peak}


@pytest.mark.parametrize(
    ("world", "precision", "parallel"), [LAYOUTS[i] for i in (0, 1, 2, 6)], ids=str
)
def test_a_dry_run_says_what_a_teacher_takes(
    workers: Workers, world: int, precision: str, parallel: dict[str, Any]
) -> None:
    config = configuration.replace(model(precision, **parallel), distill={"teacher": "self"})
    measured = run_job(workers, take_a_taught_step, world, config)
    size = own_teacher(config)
    assert size is not None
    for rank, stage in dry_ranks(config, world).items():
        is_last = stage == config.parallel.pipeline_model_parallel_size - 1
        hidden = footprint.hidden_bytes(config, size) if is_last else 0
        with dry_model(config, world, stage) as (dry, trainable):
            teacher = footprint.build_teacher(config, dry, size)
            weights = footprint.teacher_bytes(teacher)
            step = footprint.step(dry, trainable, teacher, hidden)
            waiting = config.training.global_batch_size // (2 * dry.groups.dp.size())
        assert weights == measured[rank]["weights"]
        peak = step.activation_bytes + waiting * hidden
        assert peak == pytest.approx(measured[rank]["peak"], rel=0.05)


def compact_really(groups: Any, config: Config, change: footprint.Change) -> dict[str, Any]:
    """The peak of a compaction on this rank, and the bytes it sends itself."""
    from torch.distributed import all_to_all_single, send

    trainable = assemble(config.sections, groups, Shape.full(config.model), initialize=True)
    backward(trainable)
    update(trainable.optimizer, lr=1e-3)
    sent = 0

    def count(output: Any, given: Any, out_splits: Any, in_splits: Any, group: Any) -> Any:
        nonlocal sent
        row = given.numel() * given.element_size() // max(1, sum(in_splits))
        sent += row * (sum(in_splits) - in_splits[group.rank()])
        return all_to_all_single(output, given, out_splits, in_splits, group=group)

    def count_sent(tensor: Any, **to: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return send(tensor, **to)

    # No name for the tensors: the first to go must be free to go.
    live = LiveBytes(t for of_kind in footprint.kept_tensors(trainable).values() for t in of_kind)
    patches = mock.patch.multiple(dist, all_to_all_single=count, send=count_sent)
    with patches, live:
        compaction.free_gradients(trainable)
        live.peak = live.live
        fresh, moved = compaction.rebuild(trainable, change.relocations, change.shape, 1)
    names = [name for name, _ in named_parameters(fresh.chunks)]
    return {"peak": live.peak, "sent": sent, "moved_layers": moved, "names": names}


NEURONS = {"ffn_hidden_size": NARROW}
ALL = {"ffn_hidden_size": 768, "num_query_groups": 2, "hidden_size": 48, "num_layers": 2}


@pytest.mark.parametrize(
    ("world", "parallel", "target"),
    [
        (1, {}, NEURONS),
        (2, {"tensor_model_parallel_size": 2}, NEURONS),
        (4, {"tensor_model_parallel_size": 2}, NEURONS),
        (1, {}, ALL),
        (4, {"pipeline_model_parallel_size": 2}, ALL),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, ALL),
    ],
    ids=str,
)
def test_a_dry_compaction_peaks_where_a_real_one_does(
    workers: Workers, world: int, parallel: dict[str, Any], target: dict[str, int]
) -> None:
    config = model("bf16", **parallel)
    shape = Shape.full(config.model)
    for axis, count in target.items():
        shape = shape.with_counts(axis, count)
    (change,) = footprint.random_changes(config, [Shape.full(config.model), shape])
    tp, pp = (
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
    )
    # gloo's threads let go of a message some time after it has arrived: the least of three counts.
    runs = [run_job(workers, compact_really, world, config, change) for _ in range(3)]
    for rank, stage in dry_ranks(config, world).items():
        measured = min((run[rank] for run in runs), key=lambda run: run["peak"])
        with dry_model(config, world, stage) as (dry, trainable):
            fresh, figures = footprint.compact(dry, trainable, change)
            names = [name for name, _ in named_parameters(fresh.chunks)]
            numel = sum(buffer.numel for chunk in fresh.chunks for buffer in chunk.buffers)
            dp = dry.groups.dp.size()
        assert names == measured["names"]
        assert figures.peak_bytes == pytest.approx(measured["peak"], rel=0.01)
        # The new bf16 weights are gathered at the end; both ends of a pipeline agree on a tied
        # embedding when they are built.
        sent = measured["sent"] + 2 * numel * (dp - 1) // dp
        if pp > 1:
            sent += 2 * VOCAB // tp * change.shape.hidden_size
            assert measured["moved_layers"] > 0
        assert figures.sent_bytes == sent


@pytest.mark.parametrize("axis", [*AXES, "all"])
@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, 1), (2, 2, 1), (1, 4, 1), (2, 2, 2)])
def test_every_stage_has_the_parameters_that_are_counted(
    axis: str, tp: int, pp: int, vpp: int
) -> None:
    """Also where layers do not divide: megatron-core reads global state for the count then."""
    config = configuration.replace(
        model(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
        ),
        model={"num_layers": 8},
    )
    shape = Shape.full(config.model)
    for one in AXES if axis == "all" else (axis,):
        shape = shape.with_counts(one, {**ALL, "num_layers": 5}[one])
    total = 0
    for stage in range(pp):
        with dry_run(config, tp * pp, stage) as dry:
            trainable = footprint.build(config, dry, shape)
            built = {name: p.numel() for name, p in named_parameters(trainable.chunks)}
            split = {n for n, p in named_parameters(trainable.chunks) if p.tensor_model_parallel}
        assert built == footprint.parameter_sizes(config.sections, shape, stage)
        total += sum(
            numel * (tp if name in split else 1)
            for name, numel in built.items()
            if not (stage and name == EMBEDDING)  # tied: a copy
        )
    assert total == shape.parameters(config.model).total


def test_messages_are_those_of_the_layout() -> None:
    """TP 2 with sequence parallelism, PP 2, DP 2: bytes by hand."""
    config = model("bf16", tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with dry_model(config, 8) as (dry, trainable):
        numel = sum(b.numel for chunk in trainable.chunks for b in chunk.buffers)
        sent = footprint.step(dry, trainable).sent_bytes
    # fp32 gradients are scattered and bf16 weights gathered, half of each goes to the other.
    assert sent["dp"] == numel * (4 + 2) // 2
    # Each of 2 micro-batches' residual stream goes to the next stage: half of the tokens a rank.
    tokens = 2 * SEQUENCE
    assert sent["pp"] == 2 * tokens // 2 * HIDDEN * 2
    assert sent["embedding"] == VOCAB // 2 * HIDDEN * 4


def count_flops(groups: Any, config: Config) -> int:
    trainable = assemble(config.sections, groups, Shape.full(config.model), initialize=True)
    # The plain formula of attention is made of products that the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backward(trainable)
    return counter.get_total_flops()


def test_flops_are_those_counted_in_a_training_step(workers: Workers) -> None:
    config = model("fp32")
    (counted,) = run_job(workers, count_flops, 1, config)
    shape = Shape.full(config.model)
    linear = shape.flops_per_token(config.model, 0)
    causal = shape.flops_per_token(config.model, SEQUENCE) - linear
    # The plain formula computes the half above the diagonal, too.
    assert counted == config.batch_tokens * (linear + 2 * causal)


def test_nothing_of_a_dry_run_is_left_even_after_an_error() -> None:
    config = model()
    state = torch.get_rng_state()
    gc.unfreeze()  # what conftest.py has frozen: a run leaves things as they were
    with pytest.raises(ZeroDivisionError), dry_model(config, 1024):
        raise ZeroDivisionError
    assert not dist.is_initialized()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.zeros(2).device.type == "cpu"
    assert gc.get_freeze_count() == 0


def test_a_process_can_train_after_it_has_planned() -> None:
    config = model()
    with dry_model(config, 4) as (dry, trainable):
        footprint.step(dry, trainable)
    del dry, trainable
    groups = start_distributed(config.parallel, seed=1)
    try:
        trainable = assemble(config.sections, groups, Shape.full(config.model), initialize=True)
        backward(trainable)
        assert 0 < update(trainable.optimizer, lr=1e-3) < float("inf")
    finally:
        stop_distributed()
