"""Two engines, one loss curve: DeepSpeed ZeRO goes on where ours stops, with its moments."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hf import read
from test_train import train_once
from typer.testing import CliRunner

from megatron_idea import cli
from megatron_idea import config as configuration
from megatron_idea.checkpoint.branch import named
from megatron_idea.config import Config
from megatron_idea.huggingface.export import export_checkpoint
from megatron_idea.huggingface.import_ import import_checkpoint
from megatron_idea.records.read import read_metrics
from megatron_idea.testing import Workers, assert_equal

pytest.importorskip("deepspeed", reason="needs megatron-idea[deepspeed]")

ROOT = Path(__file__).resolve().parents[1]
PRUNED, STEPS = 16, 24
TOLERANCE = 1e-5


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("x", ROOT / "examples/continue_deepspeed.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def deepspeed_job(rendezvous: str, calls: list[dict[str, Any]]) -> list[str]:
    """Call the example as often as asked, in one process group. Returns: what it refused."""
    os.environ["LOCAL_RANK"] = os.environ["RANK"]  # as torchrun gives it
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.distributed as dist

    example = load_example()
    dist.init_process_group(
        "gloo", rendezvous, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    example.start()
    load_moments, refused = example.load_moments, list[str]()
    for call in calls:
        example.load_moments = load_moments if call.pop("moments", True) else lambda *_: None
        try:
            example.run(argparse.Namespace(**call))
        except SystemExit as error:
            refused.append(str(error))
    dist.destroy_process_group()
    return refused


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Ranks of their own: what DeepSpeed leaves behind in a process is not for other tests."""
    pool = Workers(tmp_path_factory.mktemp("zero"), forked=True)
    yield pool
    pool.close()


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(f"{out}.jsonl").read_text().splitlines()]


def apart(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def evaluated(path: Path, data: Path) -> float:
    result = CliRunner().invoke(
        cli.app, ["evaluate", str(path), "--data", f"{data}_heldout", "--json"]
    )
    assert result.exit_code == 0, result.output
    return float(json.loads(result.stdout)["held_out"][0]["loss"])


def test_zero_goes_on_as_we_do(
    workers: Workers, zero: Workers, tiny_halved: Config, dataset: Path, tmp_path: Path
) -> None:
    config = configuration.replace(tiny_halved, checkpoint={"keep_phase_ends": True})
    workers.run(train_once, 2, config)
    ours = [one.loss for one in read_metrics(Path(config.run_dir))]
    small = tmp_path / "small"
    export_checkpoint(named(f"{config.run_dir}@prune"), small, optimizer=True)
    # The small model as the start of a run that removes nothing.
    again = tmp_path / "again"
    overrides = [
        "prune.strategy=none", "training.seq_length=32", "training.micro_batch_size=1",
        "training.global_batch_size=4", f"data.train=[{{prefix: {dataset}_train}}]",
        f"schedule.total_tokens={8 * 128}", "schedule.lr=3e-3",
        "data.tokenizer=byte", "logging.tensorboard=false", "logging.progress=false",
    ]  # fmt: skip
    import_checkpoint(small, again, overrides=overrides)
    workers.run(train_once, 2, configuration.load(again / "config.yaml"))
    plain = [one.loss for one in read_metrics(again)]

    calls = []

    def call(out: str, stage: int, run: Path, **other: Any) -> None:
        given = {"export": small, "config": run / "config.yaml", "out": tmp_path / out}
        given |= {"overrides": [], "stage": stage, "fresh": False, "steps": None}
        calls.append(given | {"universal": False} | other)

    run = Path(config.run_dir)
    for stage in (1, 2, 3):
        call(f"plain{stage}", stage, again, fresh=True)
        # A micro-batch as large as the batch: two ranks make two of it.
        call(f"moments{stage}", stage, run, overrides=["training.micro_batch_size=4"])
    export_checkpoint(run, tmp_path / "ended", optimizer=True)
    call("end", 1, run, export=tmp_path / "ended")
    call("end", 1, run, export=run)
    call("end", 1, run, overrides=["training.global_batch_size=3"])
    call("without", 2, run, moments=False)
    for stage in (2, 3):
        call(f"resumed{stage}", stage, run, steps=4)
        call(f"resumed{stage}", stage, run)
    for refused in zero.run(deepspeed_job, 2, calls):
        assert len(refused) == 3
        assert refused[0].endswith("raise schedule.total_tokens, or begin anew with --fresh")
        assert "there is no" in refused[1] and "--optimizer" in refused[1]
        assert refused[2].startswith("a batch of 3 sequences cannot be spread over 2 ranks")

    parity = {
        f"ZeRO-{stage} {what}": apart(losses_of(tmp_path / f"{name}{stage}"), expected)
        for what, name, expected in (
            ("from the start", "plain", plain),
            ("with moments", "moments", ours[PRUNED:]),
        )
        for stage in (1, 2, 3)
    }
    without = apart(losses_of(tmp_path / "without"), ours[PRUNED:])
    print(json.dumps(parity | {"without moments": without}))
    assert len(plain) == 8 and len(ours) == STEPS
    assert max(parity.values()) < TOLERANCE, parity
    assert without > 100 * TOLERANCE
    for stage in (2, 3):
        one, two = tmp_path / f"moments{stage}", tmp_path / f"resumed{stage}"
        assert losses_of(one) == losses_of(two)
        for name, tensor in read(one).items():
            assert_equal(read(two)[name], tensor, name)
    expected = evaluated(run, dataset)
    for stage in (1, 3):
        assert abs(evaluated(tmp_path / f"moments{stage}", dataset) - expected) < TOLERANCE
