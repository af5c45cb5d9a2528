"""The comparison at laptop scale: its arms are comparable, its figures are those of its runs."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_idea.config import validate
from megatron_idea.course import flops_between, removed_at, target_shape
from megatron_idea.records.read import read_events, read_metrics

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STEPS = 20
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Modules beside the runner: only the runner's process has their folder in its path."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("signs")


@pytest.mark.parametrize("steps", [STEPS, 3000])
def test_arms_differ_in_nothing_but_what_they_are_about(
    signs: ModuleType, dataset: Path, tmp_path: Path, steps: int
) -> None:
    configs = {
        name: signs.arm_config(name, 0, steps, str(dataset), tmp_path) for name in signs.ARMS
    }
    idea = configs["idea"]
    for name, config in configs.items():
        validate(config, 1)
        for part in ("data", "training", "optimizer", "guard", "evaluation"):
            assert getattr(config, part) == getattr(idea, part), name
        assert name == "scratch-equal-compute" or (
            config.schedule.total_tokens == idea.schedule.total_tokens == steps * 1024
        )
        width = 256 if name == "enlarged" else 96
        assert target_shape(config).counts("ffn_hidden_size") == (width, width)
    long, ours = (
        flops_between(c, 0, c.schedule.total_tokens)
        for c in (configs["scratch-equal-compute"], idea)
    )
    assert long == pytest.approx(ours, rel=0.5 / steps)


@pytest.mark.parametrize("steps", [STEPS, 1000, 3000])
@pytest.mark.parametrize("name", ["idea-one-shot-averaged", "naive-one-shot"])
def test_the_loss_is_measured_right_after_a_one_shot_removal(
    signs: ModuleType, dataset: Path, tmp_path: Path, steps: int, name: str
) -> None:
    config = signs.arm_config(name, 0, steps, str(dataset), tmp_path)
    batch = config.batch_tokens
    removed = next(step for step in range(steps) if removed_at(config, step * batch) > 0)
    assert removed * batch % config.evaluation.every_tokens == 0
    assert removed % config.prune.mask_interval_steps == 0


def test_all_arms_of_a_seed_read_the_same_samples(
    signs: ModuleType, dataset: Path, tmp_path: Path
) -> None:
    def order(seed: int, *names: str) -> str:
        configs = [signs.arm_config(n, seed, STEPS, str(dataset), tmp_path) for n in names]
        return signs.same_order(configs, STEPS)

    assert order(0, *signs.ARMS) != order(1, "idea")
    mixed = [signs.arm_config("idea", seed, STEPS, str(dataset), tmp_path) for seed in (0, 1)]
    with pytest.raises(ValueError, match="same order"):
        signs.same_order(mixed, STEPS)
    with pytest.raises(ValueError, match="each once"):
        signs.same_order([signs.arm_config("idea", 0, 3000, str(dataset), tmp_path)], STEPS)


def test_figures_are_those_of_the_runs_and_a_second_call_trains_nothing(
    signs: ModuleType, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--steps", STEPS, "--seeds", 0, "--arms", "idea", "idea-one-shot"]
    places = ["--data", dataset, "--out", tmp_path / "runs", "--json", tmp_path / "signs.json"]
    monkeypatch.setattr(sys, "argv", ["signs.py", *map(str, [*arguments, *places])])
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        signs.main()
        signs.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    measured = json.loads((tmp_path / "signs.json").read_text())["measured"]
    records, losses = {}, {}
    for name in ("idea", "idea-one-shot"):
        run_dir, found = tmp_path / "runs" / "seed0" / name, measured["runs"][name]["0"]
        records[name] = read_metrics(run_dir)
        assert [r.step for r in records[name]] == list(range(1, STEPS + 1))
        events = read_events(run_dir)
        assert sum(event["kind"] == "compacted" for event in events) == (
            1
            if name == "idea-one-shot"
            else len({tuple(r.stored["ffn_hidden_size"]) for r in records[name]}) - 1
        )
        losses[name] = json.loads((run_dir / "final.json").read_text())["loss"]
        assert found["loss"] == pytest.approx(losses[name], abs=1e-5)
        through = [e["val_loss"] for e in events if e["kind"] == "evaluated"]
        assert found["before"] == pytest.approx(through[11], abs=1e-4)  # removal ends step 12
        assert found["highest"] == pytest.approx(max(through[12 : STEPS + 1]), abs=1e-4)
    # One run until neurons go: the same weights, the same data.
    until = [[r.loss for r in records[name][:12]] for name in records]
    assert until[0] == until[1]
    (sign,) = [row for row in measured["signs"] if row["expected"] == ""]
    (difference,) = sign["difference"]["values"]
    assert difference == pytest.approx(losses["idea"] - losses["idea-one-shot"], abs=2e-4)


def test_a_verdict_needs_all_seeds(signs: ModuleType) -> None:
    def verdict(expected: str, key: str, left: list[float], right: list[float]) -> str:
        runs = {
            name: {seed: {key: value} for seed, value in enumerate(values)}
            for name, values in (("a", left), ("b", right))
        }
        return signs.judge(signs.Sign("a", "b", expected), runs)["verdict"]

    assert verdict("<", "loss", [1.0, 1.0], [1.1, 1.1]) == "shows"
    assert verdict(">", "loss", [1.0, 1.0], [1.1, 1.1]) == "reversed"
    assert verdict("<", "loss", [1.0, 1.2], [1.1, 1.1]) == "unclear"
    assert verdict("", "loss", [1.0], [1.1]) == "reported only"
    assert verdict("spike", "rise", [0.4, 0.5], [0.1, 0.1]) == "shows"
    assert verdict("spike", "rise", [0.4, 0.3], [0.1, 0.1]) == "unclear"
    assert verdict("spike", "rise", [0.1, 0.1], [0.1, 0.2]) == "reversed"
