"""Stopping and going on: bit for bit in the same layout, closely in another; complete or absent.

One run per layout is driven through ``train.build`` and ``train.step`` and saved at four kinds of
places. Every resume is a ``train()`` on a copy of its folder in which the later checkpoints are
missing, as after a kill.
"""

from __future__ import annotations

import errno
import gc
import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idea.config import Config, replace
from megatron_idea.metrics import read_events, read_metrics
from megatron_idea.testing import Workers, assert_close, assert_equal

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}

# Steps of the schedule in ``small_run``, and what is special about stopping there.
STEPS = 16
STOPS = {"enlarged": 3, "masked": 6, "between_compactions": 10, "recovery": 14}


@dataclass(frozen=True)
class Layout:
    """Processes, ``parallel`` settings and what else sets a run apart."""

    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(2, TP2),
    "pp2": Layout(2, PP2),
    # Masks every third step: a checkpoint falls into a window of gathered scores.
    "dp2": Layout(2, {}, {"prune": {"mask_interval_steps": 3}}),
    "dp2_replicated": Layout(2, {"use_distributed_optimizer": False}),
    # Dropout: the random-number streams must go on, too.
    "tp2_bf16": Layout(
        2,
        TP2,
        {
            "training": {"precision": "bf16"},
            "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        },
    ),
}


def parts_of(trainable: Any) -> dict[str, tuple[Any, ...]]:
    """What this rank's optimizer holds of each parameter: numpy, so that it can be sent."""
    from megatron_idea.optim import MOMENTS, slot

    parts = {}
    for index, parameter in enumerate(trainable.parameters):
        part = slot(trainable.optimizer, parameter)
        if part is not None and part.state:
            values = [part.main.detach().flatten(), *(part.state[m].flatten() for m in MOMENTS)]
            step = part.state["step"]
            parts[f"{index}"] = (
                part.start, part.end, torch.stack(values).clone().numpy(), float(step), id(step),
            )  # fmt: skip
    return parts


def drive(
    rendezvous: str, config: Config, save_after: tuple[int, ...]
) -> tuple[dict[int, Any], dict[int, Any]]:
    """Train to the end; save after some steps.

    Returns: ``parts_of`` at each of them, and who is alive after every step.
    """
    from megatron_idea.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, save, step

    gc.freeze()  # compaction collects garbage; what was imported is none
    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        held, alive = {}, {}
        while state.consumed_tokens < config.schedule.total_tokens:
            record, _ = step(run, state)
            run.log.write(record)
            alive[state.step] = run.pruner.alive.numpy()
            if state.step in save_after:
                save(run, state)
                held[state.step] = parts_of(run.trainable)
        run.log.close()
        return held, alive
    finally:
        stop_distributed()


def train_on(rendezvous: str, config: Config) -> None:
    from megatron_idea.train import train

    gc.freeze()
    train(config, rendezvous)


def go_on(rendezvous: str, config: Config, steps: int) -> tuple[Any, list[float], list[Any]]:
    """Build a run at its latest checkpoint, write that checkpoint again, take some steps.

    Returns: ``parts_of`` the loaded run; losses and who is alive after each step.
    """
    from megatron_idea.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, save, step

    gc.freeze()
    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        held = parts_of(run.trainable)
        save(run, state)
        losses, alive = [], []
        for _ in range(steps):
            losses.append(step(run, state)[0]["loss"])
            alive.append(run.pruner.alive.numpy())
        run.log.close()
        return held, losses, alive
    finally:
        stop_distributed()


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, whole, but for the random-number states."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(checkpoint)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("rng.")
    }
    load(found, storage_reader=reader, no_dist=True)
    assert any(name.endswith("linear_fc1.weight") for name in found)
    return found


def assert_same_tensors(actual: Path, expected: Path) -> None:
    ours, theirs = tensors(actual), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal(ours[name], theirs[name], name)


def checkpoint_at(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def curves(run_dir: str | Path, after: int) -> list[dict[str, Any]]:
    """What a step computed, without what the clock and the machine add to its record."""
    measured = ("tokens_per_s", "step_s", "memory_bytes")
    return [
        {name: value for name, value in record.items() if name not in measured}
        for record in read_metrics(Path(run_dir))
        if record["step"] > after
    ]


@dataclass
class Source:
    """A run that was never interrupted, with checkpoints at ``STOPS`` and at its end."""

    config: Config
    held: list[dict[int, Any]]
    """Per rank and stop, what the optimizer held."""
    alive: dict[int, Any]
    """After every step, [num_layers, ffn_hidden_size] bool."""

    def killed_after(self, step: int, run_dir: Path, **sections: Any) -> Config:
        """A copy of the run's folder as a kill after ``step`` leaves it; returns its config."""
        origin = Path(self.config.run_dir)
        shutil.copytree(origin, run_dir)
        for path in (run_dir / "checkpoints").iterdir():
            if int(path.name.removeprefix("step_")) > step:
                shutil.rmtree(path)
        return replace(self.config, run_dir=str(run_dir), **sections)


@pytest.fixture
def small_run(tiny: Config) -> Config:
    """16 steps, one micro-batch each: pruned in steps 6 to 12 in blocks of 16 neurons."""
    return replace(
        tiny,
        training={"micro_batch_size": 4},
        schedule={
            "total_tokens": STEPS * 128,
            "enlarged_fraction": 0.25,
            "prune_fraction": 0.5,
            "recover_fraction": 0.25,
            "prune_warmup_fraction": 0.125,
        },
        prune={"compaction_block": 16},
    )


@pytest.fixture(scope="module")
def made() -> dict[str, Source]:
    return {}


@pytest.fixture
def source(
    made: dict[str, Source],
    small_run: Config,
    workers: Workers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Source]:
    """The uninterrupted run of a layout; made once."""

    def make(name: str) -> Source:
        if name not in made:
            layout = LAYOUTS[name]
            folder = tmp_path_factory.mktemp(name)
            config = replace(
                small_run,
                run_dir=str(folder / "run"),
                parallel=layout.parallel,
                data={"cache_dir": str(folder / "cache")},
                checkpoint={"keep_last": 0},
            )
            if layout.world_size == 2 and not layout.parallel.keys() & {*TP2, *PP2}:
                config = replace(config, training={"micro_batch_size": 2})
            config = replace(config, **layout.sections)
            stops = (*STOPS.values(), STEPS)
            ranks = workers.run(drive, layout.world_size, config, stops)
            made[name] = Source(config, [held for held, _ in ranks], ranks[0][1])
        return made[name]

    return make


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    source: Callable[[str], Source], workers: Workers, tmp_path: Path, layout: str, stop: str
) -> None:
    whole = source(layout)
    config = whole.killed_after(STOPS[stop], tmp_path / "resumed")
    workers.run(train_on, LAYOUTS[layout].world_size, config)
    assert curves(config.run_dir, 0) == curves(whole.config.run_dir, 0)
    assert len(curves(config.run_dir, 0)) == STEPS
    assert_same_tensors(
        checkpoint_at(config.run_dir, STEPS), checkpoint_at(whole.config.run_dir, STEPS)
    )


def test_the_places_to_stop_at_are_what_they_are_called(source: Callable[[str], Source]) -> None:
    records = {r["step"]: r for r in read_metrics(Path(source("tp1").config.run_dir))}
    at = {name: records[step] for name, step in STOPS.items()}
    assert at["enlarged"]["phase"] == "enlarged"
    assert sum(at["masked"]["ffn_live"]) < sum(at["masked"]["ffn_width"]) == 2 * 64
    between = at["between_compactions"]
    assert 2 * 24 < sum(between["ffn_live"]) < sum(between["ffn_width"]) < 2 * 64
    assert at["recovery"]["phase"] == "recover"
    state = json.loads(
        (checkpoint_at(source("dp2").config.run_dir, STEPS) / "state.json").read_text()
    )
    assert state["adam_step"] == STEPS


def test_saving_and_measuring_change_nothing(
    source: Callable[[str], Source], workers: Workers, tmp_path: Path
) -> None:
    whole = source("tp1")
    config = replace(whole.config, run_dir=str(tmp_path / "run"))
    workers.run(train_on, 1, config)
    assert curves(config.run_dir, 0) == curves(whole.config.run_dir, 0)
    assert_same_tensors(
        checkpoint_at(config.run_dir, STEPS), checkpoint_at(whole.config.run_dir, STEPS)
    )


ONE = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}


@pytest.mark.parametrize(
    ("before", "after", "stop"),
    [
        ("tp2", Layout(), "masked"),
        ("tp2", Layout(), "recovery"),
        ("tp1", Layout(2, PP2), "masked"),
        ("tp1", Layout(2, PP2), "recovery"),
        ("dp2", Layout(2, TP2), "masked"),
        # Widths of 28 are no multiple of TP 2 x alignment 4.
        ("dp2", Layout(2, TP2), "between_compactions"),
        ("dp2", Layout(), "between_compactions"),
        ("pp2", Layout(2, {"use_distributed_optimizer": False}), "masked"),
    ],
    ids=lambda value: value if isinstance(value, str) else "to",
)
def test_another_layout_holds_the_same_state_and_computes_the_same(
    source: Callable[[str], Source],
    workers: Workers,
    tmp_path: Path,
    before: str,
    after: Layout,
    stop: str,
) -> None:
    whole, step = source(before), STOPS[stop]
    config = whole.killed_after(
        step, tmp_path / "moved", parallel=ONE | after.parallel, training={"micro_batch_size": 2}
    )
    (_, losses, alive), *_ = workers.run(go_on, after.world_size, config, 2)
    saved_again = checkpoint_at(config.run_dir, step)
    assert_same_tensors(saved_again, checkpoint_at(whole.config.run_dir, step))
    expected = [r["loss"] for r in curves(whole.config.run_dir, step)][:2]
    for actual, loss in zip(losses, expected, strict=True):
        assert abs(actual - loss) <= 1e-6 * loss
    for ours, theirs in zip(alive, (whole.alive[step + 1], whole.alive[step + 2]), strict=True):
        assert_equal(torch.from_numpy(ours), torch.from_numpy(theirs), "who is alive")


def test_bf16_main_weights_survive_a_change_of_layout(
    source: Callable[[str], Source], workers: Workers, tmp_path: Path
) -> None:
    whole, step = source("tp2_bf16"), STOPS["masked"]
    config = whole.killed_after(
        step, tmp_path / "moved", parallel=ONE, training={"micro_batch_size": 2}
    )
    workers.run(go_on, 2, config, 0)
    assert_same_tensors(
        checkpoint_at(config.run_dir, step), checkpoint_at(whole.config.run_dir, step)
    )


@pytest.mark.parametrize("layout", ["pp2", "dp2", "dp2_replicated", "tp2_bf16"])
def test_the_optimizer_state_comes_back_with_a_step_of_its_own_for_each_parameter(
    source: Callable[[str], Source], workers: Workers, tmp_path: Path, layout: str
) -> None:
    whole, step = source(layout), STOPS["between_compactions"]
    config = whole.killed_after(step, tmp_path / "resumed")
    loaded = workers.run(go_on, LAYOUTS[layout].world_size, config, 0)
    for (mine, *_), held in zip(loaded, (rank[step] for rank in whole.held), strict=True):
        assert mine.keys() == held.keys() and mine
        for name, (start, end, values, adam_step, _) in mine.items():
            assert (start, end, adam_step) == (held[name][0], held[name][1], step)
            assert_equal(torch.from_numpy(values), torch.from_numpy(held[name][2]), name)
        assert len({identity for *_, identity in mine.values()}) == len(mine)
