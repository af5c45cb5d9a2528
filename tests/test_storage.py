"""A checkpoint's files: damage is found and named, retention keeps what it should, saving waits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idea import checkpoint
from megatron_idea.checkpoint import storage
from megatron_idea.config import Config, replace
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.testing import Workers


@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    last=st.integers(0, 4),
    every=st.sampled_from([0, 10, 37, 100]),
)
def test_retention_keeps_the_last_and_the_milestones(
    steps: list[int], last: int, every: int
) -> None:
    tokens = [sum(steps[: i + 1]) for i in range(len(steps))]
    known = [(Path(f"step_{t:08d}"), t) for t in tokens]
    stays: list[tuple[Path, int]] = []
    for one in known:  # as in a run: after every save
        stays.append(one)
        gone = storage.superfluous(stays, last, every)
        stays = [s for s in stays if s[0] not in gone]
    if not last:
        assert stays == known
        return
    assert stays[-last:] == known[-last:]
    reached = {t // every for t in tokens} - {0} if every else set()
    milestones = {next(p for p, t in known if t // every == n) for n in reached}
    assert {p for p, _ in stays} == milestones | {p for p, _ in known[-last:]}


def train_once(rendezvous: str, config: Config) -> None:
    from megatron_idea.train import train

    train(config, rendezvous)


@pytest.fixture
def run(tiny: Config, workers: Workers) -> Config:
    """A finished run of one process with four checkpoints."""
    config = replace(tiny, checkpoint={"keep_last": 0, "every_tokens": 10 * 128})
    workers.run(train_once, 1, config)
    assert [p.name for p in checkpoint.complete(config.run_dir)] == [
        f"step_{n:08d}" for n in (6, 10, 16, 20, 24)
    ]
    return config


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink], ids=["flipped", "cut", "gone"])
def test_damage_to_any_file_is_found_and_the_file_named(
    run: Config, tmp_path: Path, damage: Any
) -> None:
    whole = checkpoint.complete(run.run_dir)[0]
    storage.verify(whole)
    names = {p.name for p in whole.iterdir()} - {storage.MANIFEST}
    assert set(json.loads((whole / storage.MANIFEST).read_text())["files"]) == names
    assert {"state.json", "config.yaml", "common.pt", "__0_0.distcp", ".metadata"} <= names
    for name in sorted(names):
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        damage(copy / name)
        with pytest.raises(storage.DamagedError, match="is damaged: " + name.replace(".", r"\.")):
            storage.verify(copy)
        shutil.rmtree(copy)


def test_a_damaged_checkpoint_stops_a_run_or_is_passed_over_when_asked(
    run: Config, workers: Workers
) -> None:
    expected = read_metrics(Path(run.run_dir))
    found = checkpoint.complete(run.run_dir)
    flip_a_bit(found[-1] / "__0_0.distcp")
    with pytest.raises(RuntimeError, match=f"previous goes on from {found[-2]}"):
        workers.run(train_once, 1, run)
    cut(found[-2] / "state.json")
    asked = replace(run, checkpoint={"keep_last": 0, "on_damage": "previous"})
    workers.run(train_once, 1, asked)
    events = [e for e in read_events(Path(run.run_dir)) if e["kind"] == "damaged"]
    assert [found[-1].name in e["reason"] or found[-2].name in e["reason"] for e in events] == [
        True,
        True,
    ]
    again = read_metrics(Path(run.run_dir))
    assert [r.loss for r in again] == [r.loss for r in expected]
    for path in found[:1]:
        (path / storage.MANIFEST).write_text("{")
    for path in checkpoint.complete(run.run_dir)[1:]:
        shutil.rmtree(path)
    with pytest.raises(RuntimeError, match="there is no older one"):
        workers.run(train_once, 1, asked)


def slow_job(rendezvous: str, config: Config) -> list[int]:
    """Steps that were taken while a checkpoint was being written, by the step it was of."""
    import threading

    from megatron_idea import train as module

    may_go_on = threading.Event()
    write, step = storage.Writing._write_buckets, module.step
    overtaken: list[int] = []

    def slowly(self: Any, *arguments: Any) -> None:
        may_go_on.wait(60)
        write(self, *arguments)

    def watched(run: Any, state: Any) -> Any:
        outcome = step(run, state)
        if run.saving is not None and run.saving.state.step < state.step:
            overtaken.append(run.saving.state.step)
            if state.step - run.saving.state.step == 3:
                may_go_on.set()
                run.saving._folder.writing.join()
        return outcome

    storage.Writing._write_buckets, module.step = slowly, watched  # type: ignore[method-assign]
    try:
        module.train(config, rendezvous)
    finally:
        storage.Writing._write_buckets, module.step = write, step  # type: ignore[method-assign]
    return overtaken


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_its_own_step(
    world_size: int, tiny_halved: Config, workers: Workers, tmp_path: Path
) -> None:
    config = replace(tiny_halved, checkpoint={"keep_last": 0})
    waiting = replace(
        config,
        run_dir=str(tmp_path / "waiting"),
        checkpoint={"keep_last": 0, "asynchronous": False},
    )
    workers.run(train_once, world_size, waiting)
    for overtaken in workers.run(slow_job, world_size, config):
        assert overtaken[:3] == [6, 6, 6], "three steps were taken before step 6 was written"
    for ours, theirs in zip(
        checkpoint.complete(config.run_dir), checkpoint.complete(waiting.run_dir), strict=True
    ):
        storage.verify(ours)
        sums = [json.loads((p / storage.MANIFEST).read_text())["files"] for p in (ours, theirs)]
        for name in sums[0]:
            if name.endswith(".distcp"):
                assert sums[0][name] == sums[1][name], f"{ours.name}/{name}"
    saved = [e for e in read_events(Path(config.run_dir)) if e["kind"] == "saved"]
    assert [e["step"] for e in saved] == [6, 16, 24]


def abandoned_job(rendezvous: str, config: Config) -> None:
    """A save that nobody finishes, one that is finished, and its checkpoint read again."""
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, save, step

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        for _ in range(14):
            step(run, state)
            if state.step == 2:
                checkpoint.Saving(config, run.trainable, run.pruner, state)._folder.writing.join()
        assert run.trainable.shape.counts("ffn_hidden_size")[0] < 64, (
            "the abandoned one had other sizes"
        )
        save(run, state, wait=True)
        run.log.close()
        build(config, groups)[0].log.close()
    finally:
        stop_distributed()


def test_a_save_that_nobody_finished_does_not_get_into_the_next(
    tiny: Config, workers: Workers
) -> None:
    workers.run(abandoned_job, 1, tiny)


def one_step(rendezvous: str, config: Config) -> None:
    """Take up a run, save after its next step, and leave it there."""
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, save, step

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        step(run, state)
        save(run, state, wait=True)
        run.log.close()
    finally:
        stop_distributed()


def names(config: Config) -> list[str]:
    return [path.name for path in checkpoint.complete(config.run_dir)]


def test_a_damaged_checkpoint_does_not_push_the_one_just_written_out(
    run: Config, workers: Workers
) -> None:
    (newest,) = checkpoint.complete(run.run_dir)[-1:]
    flip_a_bit(newest / "__0_0.distcp")
    workers.run(one_step, 1, replace(run, checkpoint={"keep_last": 1, "on_damage": "previous"}))
    assert names(run) == ["step_00000021", newest.name]


def test_a_checkpoint_whose_replacement_was_cut_short_is_put_back(
    run: Config, workers: Workers
) -> None:
    """Killed between the two renames of a second save of one step."""
    found = checkpoint.complete(run.run_dir)
    for path in found[:-2]:
        shutil.rmtree(path)
    path = found[-2]
    shutil.copytree(path, path.with_name(f"{path.name}.partial"))
    path.rename(path.with_name(f"{path.name}.replaced"))
    shutil.rmtree(found[-1])
    assert names(run) == []
    workers.run(one_step, 1, run)
    assert names(run) == ["step_00000020", "step_00000021"]
    assert [p for p in checkpoint.checkpoints_of(run.run_dir).iterdir() if p.suffix] == []


def test_a_deletion_that_is_cut_short_leaves_nothing_that_looks_complete(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest = checkpoint.complete(run.run_dir)[0]

    def killed(path: Path, **_: Any) -> None:
        next(path.glob("*.distcp")).unlink()

    monkeypatch.setattr(shutil, "rmtree", killed)
    storage.remove([oldest])
    assert oldest not in checkpoint.complete(run.run_dir)


def look(rendezvous: str, config: Config) -> list[str]:
    """What each rank would go on from, when the disk shows rank 1 nothing."""
    from megatron_idea.engine.distributed import start_distributed, stop_distributed

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    complete = checkpoint.complete
    if groups.world.rank() == 1:
        checkpoint.complete = lambda run_dir: []
    try:
        path, _damage = checkpoint.choose(config, groups)
        return [path.name] if path else []
    finally:
        checkpoint.complete = complete
        stop_distributed()


def test_all_ranks_go_on_from_what_the_first_one_sees(run: Config, workers: Workers) -> None:
    assert workers.run(look, 2, run) == [["step_00000024"]] * 2
