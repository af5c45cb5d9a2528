"""The CUDA branches of a whole run, on the device of ``cuda_stand_in``: it is no GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cuda_stand_in import build
from cuda_stand_in.serve import serve

from megatron_idea.config import Config, PruneTarget, replace
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.testing import Workers

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 2": (2, {"tensor_model_parallel_size": 2}),
    "PP 2": (2, {"pipeline_model_parallel_size": 2}),
    "DP 2": (2, {}),
}


def stand_in_workers(folder: Path, with_transformer_engine: bool) -> Iterator[Workers]:
    import torch

    if torch.version.cuda or sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the stand-in takes Linux, g++ and a torch without CUDA")
    tree = None
    if with_transformer_engine:
        try:
            tree = build.transformer_engine()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no Transformer Engine to be had: {error.stderr.strip()[-200:]}")
    pool = Workers(folder, serve=partial(serve, build.library(), tree))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Processes with CUDA, without Transformer Engine."""
    yield from stand_in_workers(tmp_path_factory.mktemp("cuda"), False)


@pytest.fixture(scope="module")
def cuda_with_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    yield from stand_in_workers(tmp_path_factory.mktemp("cuda_with_engine"), True)


@pytest.fixture()
def piped(tiny: Config) -> Config:
    """The tiny run with a checkpoint at every eighth step, all of them kept.

    It starts far from 0: near it, norms multiply what rounding changes (docs/internals.md).
    """
    return replace(
        tiny,
        model={"init_method_std": 0.1},
        checkpoint={"every_tokens": 8 * tiny.batch_tokens, "keep_last": 0},
        training={"kernel_implementation": "reference"},  # Triton's interpreter knows no stand-in
    )


# ------------------------------------------------------------------------------ the stand-in itself


def refusals(_rendezvous: str) -> dict[str, str]:
    """What the device says to mistakes that a GPU or NCCL would not take."""
    import torch
    import torch.distributed as dist

    here, there = torch.ones(4, device="cuda:0"), torch.ones(4, device="cuda:1")
    mistakes: dict[str, Callable[[], Any]] = {
        "mixed": lambda: torch.add(here, torch.ones(4)),
        "two": lambda: torch.add(here, there),
        "the wrong one": lambda: dist.all_reduce(there),
        "integers": lambda: torch.mm(*(torch.ones(2, 2, dtype=torch.int32, device="cuda"),) * 2),
        "strided": lambda: dist.all_reduce(torch.ones(4, 2, device="cuda").t()),
        "int16": lambda: dist.all_reduce(here.to(torch.int16)),
        "a list": lambda: dist.all_gather([torch.ones(4)], here),
    }
    said = {}
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    for name, mistake in mistakes.items():
        with pytest.raises(RuntimeError) as raised:
            mistake()
        said[name] = str(raised.value)
    dist.destroy_process_group()
    return said


def test_the_stand_in_refuses_what_a_gpu_or_nccl_would(cuda: Workers) -> None:
    said = cuda.run(refusals, 1)[0]
    assert "same device" in said["mixed"]
    assert "cuda:1" in said["two"]
    assert "while the current device is cuda:0" in said["the wrong one"]
    assert "not implemented on CUDA" in said["integers"]
    assert "contiguous" in said["strided"]
    assert "NCCL has no Short" in said["int16"]
    assert "NCCL needs CUDA tensors" in said["a list"]


def counted(_rendezvous: str) -> dict[str, int]:
    """How often the host waits in each of some expressions."""
    import _cuda_stand_in as native
    import torch

    x, mask = torch.ones(4, device="cuda"), torch.zeros(4, dtype=torch.bool, device="cuda")
    assert torch.empty(3, device="cuda").isnan().all()
    expressions: dict[str, Callable[[], Any]] = {
        "arithmetic": lambda: (x * 2 + x).sum(),
        "item": lambda: x[0].item(),
        "tolist": lambda: x.tolist(),
        "copy up": lambda: torch.ones(4).to("cuda"),
        "pinned copy up": lambda: torch.ones(4).pin_memory().to("cuda", non_blocking=True),
        "mask": lambda: x[mask],
        "put": lambda: x.index_put_((mask,), x[:0]),
        "masked fill": lambda: x.masked_fill_(mask, 0.0),
        "nonzero": lambda: mask.nonzero(),
        "synchronize": lambda: torch.cuda.synchronize(),
    }
    counts = {}
    for name, expression in expressions.items():
        native.take_waits()
        expression()
        counts[name] = sum(native.take_waits().values())
    return counts


def test_the_stand_in_counts_what_the_host_waits_for(cuda: Workers) -> None:
    none = {"arithmetic", "pinned copy up", "masked fill"}
    for name, count in cuda.run(counted, 1)[0].items():
        assert count == (0 if name in none else 1), name


# ------------------------------------------------------------------------------------- whole runs


def run(rendezvous: str, config: Config) -> dict[str, Any]:
    """Train to the last token.

    Returns: for each step how often the host waited in it and for what, None where it completed a
    checkpoint; whose the optimizer is, whether it is fused, whether communication overlaps.
    """
    from megatron_idea import train as module

    try:
        import _cuda_stand_in as native
    except ImportError:  # the CPU, for comparison
        native = None
    waits: list[dict[str, int] | None] = []
    kinds: dict[str, Any] = {}
    step = module.step

    def counting(run: Any, state: Any) -> Any:
        optimizer = run.trainable.optimizer.optimizer
        kinds["optimizer"] = type(optimizer).__module__.split(".")[0]
        kinds["fused"] = optimizer.param_groups[0].get("fused")
        kinds["overlap"] = run.trainable.chunks[0].ddp_config.overlap_param_gather
        saving = run.saving
        native and native.take_waits()
        result = step(run, state)
        completed_a_checkpoint = run.saving is not saving
        waits.append(native.take_waits() if native and not completed_a_checkpoint else None)
        return result

    module.step = counting
    try:
        module.train(config, rendezvous)
    finally:
        module.step = step
    return {"waits": waits, **kinds}


def measured(_rendezvous: str, run_dir: str) -> float:
    """The held-out loss of a run's last checkpoint, by a process of its own."""
    import os

    from megatron_idea.evaluation.held_out import evaluate_checkpoint

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    return evaluate_checkpoint(Path(run_dir))["loss"]


def curve(config: Config) -> list[tuple[float, list[int], float]]:
    """Loss, FFN widths and gradient norm of each step."""
    return [
        (r.loss, r.stored["ffn_hidden_size"], r.grad_norm)
        for r in read_metrics(Path(config.run_dir))
    ]


def check_waits(config: Config, found: list[dict[str, Any]]) -> None:
    """Compare how often the host waited in a step with what the step did.

    Not in steps that compact or complete a checkpoint: what those wait for is theirs.
    """
    run_dir = Path(config.run_dir)
    records = read_metrics(run_dir)[: len(found[0]["waits"])]
    others = {e["step"] for e in read_events(run_dir) if e["kind"] == "compacted"}
    seen = set()
    for rank, waits in enumerate(ranks["waits"] for ranks in found):
        for before, record, by_kind in zip(records, records[1:], waits[1:], strict=False):
            if record.step in others or by_kind is None:
                continue
            removed = record.live["ffn_hidden_size"] != before.live["ffn_hidden_size"]
            expected = 1  # loss, gradient norm and flags
            if removed:
                expected += 1 + (rank == 0)  # the ranking; the writer's record of the scores
                expected += len(found) > 1  # the digest
            assert sum(by_kind.values()) == expected, (record.step, rank, by_kind)
            seen.add((record.phase, removed))
    assert {("enlarged", False), ("prune", True), ("recover", False)} <= seen


def assert_curves_close(ours: Config, theirs: Config, tolerance: float) -> None:
    """Compare losses of every step of two runs, in nats."""
    for (loss, *_), (other, *_) in zip(curve(ours), curve(theirs), strict=True):
        assert loss == pytest.approx(other, abs=tolerance)


def check_whole_run(pool: Workers, world_size: int, config: Config) -> list[dict[str, Any]]:
    """Train, prune, compact, save; again from the midst of pruning; evaluate. Findings by rank."""
    found = pool.run(run, world_size, config)
    run_dir = Path(config.run_dir)
    whole, events = curve(config), read_events(run_dir)
    assert whole[-1][1] == [24, 24] and sum(e["kind"] == "compacted" for e in events) > 2
    last = next(e["val_loss"] for e in reversed(events) if e["kind"] == "evaluated")
    assert pool.run(measured, 1, config.run_dir)[0] == pytest.approx(last, rel=1e-3)
    for step in (16, 24):
        shutil.rmtree(run_dir / f"checkpoints/step_{step:08d}")
    pool.run(run, world_size, config)
    assert curve(config) == whole
    return found


def test_without_transformer_engine_cuda_has_the_losses_of_the_cpu(
    cuda: Workers, workers: Workers, piped: Config, tmp_path: Path
) -> None:
    on_cpu = replace(piped, run_dir=str(tmp_path / "cpu"))
    workers.run(run, 1, on_cpu)
    (found,) = check_whole_run(cuda, 1, piped)
    assert found["optimizer"] == "torch" and found["fused"] and found["overlap"]
    # Attention and the gradient norm add up in another order than on the CPU.
    assert_curves_close(piped, on_cpu, 1e-5)
    check_waits(piped, [found])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_transformer_engine_every_layout_runs_to_its_end(
    cuda_with_engine: Workers, workers: Workers, piped: Config, tmp_path: Path, layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    # Two micro-batches: one for each of two data-parallel ranks, or to fill a pipeline with.
    training = {"precision": "bf16", "micro_batch_size": piped.training.micro_batch_size // 2}
    config = replace(piped, training=training, parallel=parallel)
    on_cpu = replace(config, run_dir=str(tmp_path / "cpu"), parallel=type(config.parallel)())
    workers.run(run, 1, on_cpu)
    found = check_whole_run(cuda_with_engine, world_size, config)
    assert found[0]["optimizer"] == "transformer_engine"
    # bf16 keeps 8 bits, and layouts round at other places: over 40 steps losses come .015 apart.
    assert_curves_close(config, on_cpu, 3e-2)
    check_waits(config, found)


def test_all_axes_shrink_where_norms_were_part_of_transformer_engines_layers(
    cuda_with_engine: Workers, workers: Workers, piped: Config, tmp_path: Path
) -> None:
    target = PruneTarget(ffn_hidden_size=24, num_query_groups=1, hidden_size=16, num_layers=3)
    config = replace(
        piped,
        model={"num_layers": 4},
        prune={"target": target, "channel_alignment": 8},
        parallel={"pipeline_model_parallel_size": 2},
    )
    on_cpu = replace(config, run_dir=str(tmp_path / "cpu"), parallel=type(config.parallel)())
    workers.run(run, 1, on_cpu)
    cuda_with_engine.run(run, 2, config)
    last = read_metrics(Path(config.run_dir))[-1]
    assert (last.stored["hidden_size"], last.stored["num_layers"]) == ([16], [3])
    assert sorted(last.stored["num_query_groups"]) == [0, 1, 1, 1]
    assert_curves_close(config, on_cpu, 1e-5)
