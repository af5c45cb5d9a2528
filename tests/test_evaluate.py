"""The held-out loss of a checkpoint is the one that its run has measured."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_idea.config import Config, replace
from megatron_idea.metrics import read_events
from megatron_idea.testing import Workers

runner = CliRunner()
ONE_STEP = {
    "total_tokens": 8 * 128, "enlarged_fraction": 0.25, "prune_fraction": 0.5,
    "recover_fraction": 0.25, "prune_warmup_fraction": 0.25,
}  # fmt: skip


def train_and_evaluate(rendezvous: str, config: Config, overrides: list[str]) -> dict[str, Any]:
    """Train over all ranks; then measure the final checkpoint over the same ranks."""
    from megatron_idea import evaluate
    from megatron_idea.train import train

    train(config, rendezvous)
    start = evaluate.start_distributed
    evaluate.start_distributed = lambda parallel, seed: start(parallel, seed, f"{rendezvous}.e")
    try:
        return evaluate.evaluate_checkpoint(Path(config.run_dir), overrides)
    finally:
        evaluate.start_distributed = start


def evaluate_alone(rendezvous: str, path: str, overrides: list[str]) -> dict[str, Any] | str:
    """As a user does: one process, no launcher, nothing in the environment."""
    from megatron_idea.evaluate import evaluate_checkpoint

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    try:
        return evaluate_checkpoint(Path(path), overrides)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def command(rendezvous: str, arguments: list[str]) -> tuple[int, str, str]:
    from megatron_idea import cli

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    result = runner.invoke(cli.app, arguments)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def finished() -> dict[str, Any]:
    return {}


@pytest.fixture
def run(
    finished: dict[str, Any],
    tiny: Config,
    workers: Workers,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Config, dict[str, Any]]:
    """A finished run over two ranks, pruned, and its final checkpoint's measure over both."""
    if not finished:
        folder = tmp_path_factory.mktemp("evaluated")
        config = replace(
            tiny,
            run_dir=str(folder / "run"),
            data={"cache_dir": str(folder)},
            parallel={"tensor_model_parallel_size": 2},
            schedule=ONE_STEP,
        )
        both = workers.run(train_and_evaluate, 2, config, [])
        assert both[0] == both[1]
        finished["run"] = config, both[0]
    return finished["run"]


def measured(config: Config) -> list[float]:
    events = read_events(Path(config.run_dir))
    return [event["val_loss"] for event in events if event["kind"] == "evaluated"]


def test_one_process_measures_what_two_ranks_measured_in_training(
    run: tuple[Config, dict[str, Any]], workers: Workers
) -> None:
    config, over_both = run
    (alone,) = workers.run(evaluate_alone, 1, config.run_dir, [])
    last = measured(config)[-1]
    assert over_both["loss"] == pytest.approx(last, rel=1e-6)
    assert alone["loss"] == pytest.approx(last, rel=1e-6)
    assert alone["tokens"] == over_both["tokens"] == 4 * 32
    assert alone["perplexity"] == pytest.approx(math.exp(alone["loss"]))
    # A byte-level token is a byte, but for the end of a document, which stands for none.
    bits = alone["loss"] / math.log(2)
    assert bits < alone["bits_per_byte"] < 1.02 * bits


def test_an_earlier_checkpoint_and_more_samples_can_be_asked_for(
    run: tuple[Config, dict[str, Any]], workers: Workers
) -> None:
    config, _ = run
    earlier = Path(config.run_dir) / "checkpoints" / "step_00000006"
    (result,) = workers.run(evaluate_alone, 1, str(earlier), [])
    assert result["loss"] == pytest.approx(measured(config)[-2], rel=1e-6)
    (more,) = workers.run(evaluate_alone, 1, config.run_dir, ["evaluation.num_samples=9"])
    assert more["tokens"] == 9 * 32
    assert more["loss"] != result["loss"]


def test_the_command_prints_the_measure(
    run: tuple[Config, dict[str, Any]], workers: Workers
) -> None:
    config, over_both = run
    ((code, out, err),) = workers.run(command, 1, ["evaluate", config.run_dir])
    assert (code, err) == (0, "")
    printed = dict(line.split() for line in out.splitlines())
    assert printed.keys() == {"loss", "perplexity", "tokens", "bits_per_byte"}
    assert float(printed["loss"]) == pytest.approx(over_both["loss"], abs=6e-5)


def test_what_cannot_be_measured_is_said(
    run: tuple[Config, dict[str, Any]], workers: Workers, tmp_path: Path
) -> None:
    config, _ = run
    (said,) = workers.run(evaluate_alone, 1, str(tmp_path), [])
    assert said.startswith("ConfigError: ") and "neither a checkpoint nor a run" in said
    (said,) = workers.run(evaluate_alone, 1, config.run_dir, ["data.validation=[]"])
    assert said == "ConfigError: data.validation is empty: there is nothing to measure on"
    copy = tmp_path / "step_00000008"
    shutil.copytree(Path(config.run_dir) / "checkpoints" / copy.name, copy)
    tensors = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    tensors.write_bytes(tensors.read_bytes()[:1000])
    ((code, _, err),) = workers.run(command, 1, ["evaluate", str(copy)])
    assert code == 2
    assert err.startswith("error: ") and str(copy) in err
    assert len(err.splitlines()) == 1
