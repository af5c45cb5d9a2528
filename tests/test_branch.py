"""A run that begins at another one's checkpoint: what carries over and what may change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import train_on
from test_checkpoint import assert_same_tensors, checkpoint_at, curves, tensors

from megatron_idea import checkpoint
from megatron_idea.checkpoint.branch import named
from megatron_idea.config import BlendEntry, Config, ConfigError, PruneTarget, replace
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.records.settings import check_may_branch
from megatron_idea.report.cost import cost
from megatron_idea.report.run import read_run
from megatron_idea.testing import Workers

# ``tensors`` reads in one process, and means to.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TP2 = {"tensor_model_parallel_size": 2}
# Steps of ``tiny``: 6 in the enlarged phase, 10 in the prune phase, 8 to recover.
ENLARGED, BETWEEN, RECOVERING, STEPS = 6, 11, 20, 24


def attempt(rendezvous: str, config: Config) -> str:
    """Train; returns the error that ended it, or nothing."""
    from megatron_idea.errors import UserError

    try:
        train_on(rendezvous, config)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def made() -> dict[str, Config]:
    return {}


@pytest.fixture
def source(
    made: dict[str, Config],
    tiny: Config,
    workers: Workers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Config]:
    """A finished run with a checkpoint after every step, and before each compaction; made once."""

    def make(name: str = "tp1", world_size: int = 1, **sections: Any) -> Config:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            config = replace(
                tiny,
                run_dir=str(folder / "run"),
                data={"cache_dir": str(folder / "cache")},
                checkpoint={"keep_last": 0, "every_tokens": 128, "before_compaction": True},
            )
            made[name] = replace(config, **sections)
            workers.run(train_on, world_size, made[name])
        return made[name]

    return make


def branched(config: Config, run_dir: Path, at: int | str, **sections: Any) -> Config:
    """The configuration of a branch of a run: at a step, or where a word says."""
    start = checkpoint_at(config.run_dir, at) if isinstance(at, int) else f"{config.run_dir}@{at}"
    few = {"keep_last": 1, "every_tokens": 0}
    sections = {"checkpoint": few} | sections
    return replace(config, run_dir=str(run_dir), start_from=str(start), **sections)


@pytest.mark.parametrize(
    ("layout", "at"),
    [("tp1", "enlarged"), ("tp1", BETWEEN), ("tp2", BETWEEN), ("tp1", RECOVERING)],
)
def test_a_branch_with_nothing_changed_is_bitwise_the_run_that_goes_on(
    source: Callable[..., Config], workers: Workers, tmp_path: Path, layout: str, at: int | str
) -> None:
    world_size = 2 if layout == "tp2" else 1
    whole = source(layout, world_size, **({"parallel": TP2} if layout == "tp2" else {}))
    config = branched(whole, tmp_path / "branch", at)
    workers.run(train_on, world_size, config)
    step = ENLARGED if at == "enlarged" else int(at)
    assert curves(config.run_dir, 0) == curves(whole.run_dir, step)
    assert len(curves(config.run_dir, 0)) == STEPS - step
    last = [checkpoint_at(run.run_dir, STEPS) for run in (config, whole)]
    assert_same_tensors(*last)
    assert checkpoint.read_state(last[0]).began_at == step
    (event,) = [e for e in read_events(Path(config.run_dir)) if e["kind"] == "branched"]
    assert (event["step"], event["tokens"]) == (step, step * 128)
    evaluated = [e for e in read_events(Path(config.run_dir)) if e["kind"] == "evaluated"]
    assert evaluated[0]["why"] == "start" and evaluated[0]["step"] == step


def test_one_that_was_saved_right_before_a_compaction_compacts_first(
    source: Callable[..., Config], workers: Workers, tmp_path: Path
) -> None:
    whole = source()
    compacted = [e["step"] for e in read_events(Path(whole.run_dir)) if e["kind"] == "compacted"]
    copy = tmp_path / "copy"
    shutil.copytree(whole.run_dir, copy)
    # Of the two at this step only the second is left; the first is made again by going on.
    for path in (copy / "checkpoints").iterdir():
        if path.name >= f"step_{compacted[0]:08d}":
            shutil.rmtree(path)
    again = replace(whole, run_dir=str(copy))
    assert workers.run(interrupted_in_compaction, 1, again) == ["here"]
    due = checkpoint_at(copy, compacted[0])
    assert checkpoint.read_state(due).plan_due
    config = branched(again, tmp_path / "branch", compacted[0])
    workers.run(train_on, 1, config)
    assert curves(config.run_dir, 0) == curves(whole.run_dir, compacted[0])
    assert_same_tensors(checkpoint_at(config.run_dir, STEPS), checkpoint_at(whole.run_dir, STEPS))
    # Another method has not decided this: it makes its own plan, from its own scores.
    other = branched(again, tmp_path / "other", compacted[0], prune={"strategy": "magnitude"})
    workers.run(train_on, 1, other)
    assert {*curves(other.run_dir, 0)[-1]["stored"]["ffn_hidden_size"]} == {24}


def interrupted_in_compaction(rendezvous: str, config: Config) -> str:
    from megatron_idea import train as module
    from megatron_idea.prune.pruner import Pruner

    def fail(*_: Any) -> None:
        raise RuntimeError("here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pruner, "silence", fail)
        try:
            module.train(config, rendezvous)
        except RuntimeError as error:
            return str(error)
    return ""


CHANGES: dict[str, dict[str, Any]] = {
    "random": {"prune": {"strategy": "random"}},
    "one_shot": {"schedule": {"removal": "one_shot"}},
    "wanda": {"prune": {"strategy": "wanda"}},
    "no pruning": {"prune": {"strategy": "none"}},
    "two axes": {"prune": {"target": PruneTarget(ffn_hidden_size=32, num_query_groups=1)}},
    "its own teacher": {"distill": {"teacher": "self", "average_last": 1}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_sharing_a_prefix_is_bitwise_not_sharing_it(
    source: Callable[..., Config], workers: Workers, tmp_path: Path, name: str
) -> None:
    whole, changes = source(), CHANGES[name]
    config = branched(whole, tmp_path / "branch", "enlarged", **changes)
    alone = replace(config, run_dir=str(tmp_path / "alone"), start_from="")
    workers.run(train_on, 1, config)
    workers.run(train_on, 1, alone)
    assert curves(config.run_dir, 0) == curves(alone.run_dir, ENLARGED)
    assert curves(config.run_dir, 0) != curves(whole.run_dir, ENLARGED)
    last = [checkpoint_at(run.run_dir, STEPS) for run in (config, alone)]
    assert_same_tensors(*last)
    assert checkpoint.read_state(last[0]).flops == checkpoint.read_state(last[1]).flops


def test_a_branch_that_was_killed_goes_on_without_the_run_that_it_left(
    source: Callable[..., Config], workers: Workers, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source().run_dir, copy)
    whole = replace(source(), run_dir=str(copy))
    config = branched(
        whole, tmp_path / "branch", BETWEEN, checkpoint={"every_tokens": 128, "keep_last": 0}
    )
    workers.run(train_on, 1, config)
    expected = curves(config.run_dir, 0)
    for path in (tmp_path / "branch" / "checkpoints").iterdir():
        if path.name > f"step_{RECOVERING:08d}":
            shutil.rmtree(path)
    shutil.rmtree(copy)
    workers.run(train_on, 1, config)
    assert curves(config.run_dir, 0) == expected
    # Killed when it had linked the checkpoint, and before it could say so.
    for path in (tmp_path / "branch" / "checkpoints").iterdir():
        if path.name > f"step_{BETWEEN:08d}":
            shutil.rmtree(path)
    (tmp_path / "branch" / "events.jsonl").unlink()
    workers.run(train_on, 1, config)
    assert curves(config.run_dir, 0) == expected
    (event,) = [e for e in read_events(Path(config.run_dir)) if e["kind"] == "branched"]
    assert (event["step"], event["source"]) == (BETWEEN, config.start_from)
    shutil.rmtree(tmp_path / "branch")
    (said,) = workers.run(attempt, 1, config)
    assert "neither a checkpoint, nor a run with a complete one" in said


def test_tensors_are_linked_and_outlive_the_retention_of_the_other_run(
    source: Callable[..., Config], workers: Workers, tmp_path: Path
) -> None:
    whole = source()
    config = branched(
        whole, tmp_path / "branch", "enlarged", checkpoint={"keep_last": 0, "every_tokens": 0}
    )
    workers.run(train_on, 1, config)
    theirs, ours = (checkpoint_at(run.run_dir, ENLARGED) for run in (whole, config))
    weights = sorted(path.name for path in theirs.glob("*.distcp"))
    assert weights
    for name in weights:
        assert (theirs / name).samefile(ours / name)
    assert checkpoint.read_config(ours) == config
    assert checkpoint.read_config(theirs) == whole


def test_what_cannot_change_is_refused_by_name(tiny: Config, tmp_path: Path) -> None:
    other = replace(
        tiny,
        model={"hidden_size": 64, "hidden_dropout": 0.1},
        training={"seq_length": 64, "global_batch_size": 8, "precision": "bf16", "seed": 7},
        data={"tokenizer": str(tmp_path / "tokenizer.json")},
        schedule={"lr": 1e-3},
        prune={"strategy": "random"},
    )
    with pytest.raises(ConfigError) as refused:
        check_may_branch(tiny, other)
    said = str(refused.value)
    for key in (
        "model.hidden_size: 32", "model.hidden_dropout", "training.seq_length: 32",
        "training.global_batch_size", "training.precision", "training.seed", "data.tokenizer",
    ):  # fmt: skip
        assert key in said
    assert "schedule.lr" not in said and "prune.strategy" not in said
    check_may_branch(tiny, replace(tiny, schedule={"lr": 1e-3}, parallel=TP2))


@pytest.mark.parametrize(
    ("at", "sections", "words"),
    [
        (STEPS, {}, ["has consumed 3,072 tokens", "nothing would be left"]),
        ("enlarged", {"training": {"seed": 1}}, ["cannot change", "training.seed: 1234"]),
        (
            RECOVERING,
            {"prune": {"target": PruneTarget(ffn_hidden_size=32)}},
            ["24 left of model.ffn_hidden_size", "prune.target.ffn_hidden_size is 32"],
        ),
        (
            RECOVERING,
            {"prune": {"target": PruneTarget(num_query_groups=1)}},
            ["24 left", "does not name ffn_hidden_size, which keeps all 64"],
        ),
        (
            # Stored are still 64 neurons: what is dead is known when the checkpoint is loaded.
            9,
            {"prune": {"target": PruneTarget(ffn_hidden_size=60)}},
            ["left of model.ffn_hidden_size", "prune.target.ffn_hidden_size is 60"],
        ),
        ("summer", {}, ["after the @ comes a phase (enlarged, prune, recover)"]),
        ("1e9", {}, ["no checkpoint from there", "1,000,000,000", "768"]),
    ],
)
def test_a_future_that_is_not_possible_is_refused_on_all_ranks(
    source: Callable[..., Config],
    workers: Workers,
    tmp_path: Path,
    at: int | str,
    sections: dict[str, Any],
    words: list[str],
) -> None:
    config = branched(source(), tmp_path / "branch", at, **sections)
    for said in workers.run(attempt, 1, config):
        for word in words:
            assert word in said


def test_a_run_is_named_with_the_place_in_it(source: Callable[..., Config]) -> None:
    run = source().run_dir
    assert named(run) == checkpoint_at(run, STEPS)
    assert named(f"{run}@prune") == checkpoint_at(run, 16)
    assert named(f"{run}@recover") == checkpoint_at(run, STEPS)
    assert named(f"{run}@1.4e3") == checkpoint_at(run, 11)  # the step that came there
    assert named(str(checkpoint_at(run, 3))) == checkpoint_at(run, 3)


def test_ends_of_phases_stay_when_asked(tiny: Config, workers: Workers, tmp_path: Path) -> None:
    keep = {"keep_last": 1, "every_tokens": 128, "keep_phase_ends": True}
    config = replace(tiny, checkpoint=keep)
    workers.run(train_on, 1, config)
    assert [path.name for path in checkpoint.complete(config.run_dir)] == [
        f"step_{step:08d}" for step in (ENLARGED, 16, STEPS)
    ]
    with pytest.raises(ConfigError, match=r"no checkpoint from there.*1,000 consumed.*768, 2,048"):
        named(f"{config.run_dir}@1e3")  # not the next one that there is: more is removed by then
    late = replace(config, run_dir=str(tmp_path / "late"), start_from=f"{config.run_dir}@prune")
    late = replace(late, checkpoint={"keep_phase_ends": False})
    workers.run(train_on, 1, late)
    gone = replace(late, run_dir=str(tmp_path / "gone"), start_from=f"{late.run_dir}@prune")
    (said,) = workers.run(attempt, 1, gone)
    assert "has no checkpoint from there, which is at 2,048 consumed tokens" in said
    assert "keep_phase_ends" in said


def positions(rendezvous: str, config: Config) -> list[int]:
    """The first tokens of the next step's batch."""
    from megatron_idea.engine.distributed import start_distributed, stop_distributed
    from megatron_idea.train import build, samples_before

    groups = start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        run, state = build(config, groups)
        batch = next(iter(run.data.step(samples_before(run, state, state.consumed_tokens))))
        run.log.close()
        return [int(token) for token in batch["tokens"][0]]
    finally:
        stop_distributed()


def test_data_goes_on_where_it_was_and_other_data_begins_at_its_beginning(
    source: Callable[..., Config], workers: Workers, tmp_path: Path
) -> None:
    whole = source()
    other = [BlendEntry(prefix=whole.data.validation[0].prefix)]
    fresh = replace(whole, data={"train": other}, run_dir=str(tmp_path / "fresh"))
    (first,) = workers.run(positions, 1, fresh)
    on_other = branched(whole, tmp_path / "other", "enlarged", data={"train": other})
    assert workers.run(positions, 1, on_other) == [first]
    same = branched(whole, tmp_path / "same", "enlarged")
    resumed = branched(whole, tmp_path / "twice", "enlarged", data={"train": whole.data.train})
    both = whole.data.train + other
    blend = branched(whole, tmp_path / "blend", "enlarged", data={"train": both})
    (goes_on,), (again,) = (workers.run(positions, 1, each) for each in (same, resumed))
    assert (
        goes_on
        == again
        != workers.run(positions, 1, replace(whole, run_dir=str(tmp_path / "0")))[0]
    )
    state = checkpoint.read_state(checkpoint_at(tmp_path / "twice", ENLARGED))
    assert state.skipped_samples == 0
    workers.run(positions, 1, blend)
    assert checkpoint.read_state(checkpoint_at(tmp_path / "blend", ENLARGED)).skipped_samples == 0


def test_snapshots_of_the_teacher_come_along_or_are_missed_by_name(
    source: Callable[..., Config], workers: Workers, tmp_path: Path
) -> None:
    distill = {"distill": {"teacher": "self", "average_last": 2, "average_spacing": 0.1}}
    taught = source("taught", 1, **distill)
    for at in (5, "enlarged", BETWEEN):
        config = branched(taught, tmp_path / f"{at}", at)
        workers.run(train_on, 1, config)
        step = ENLARGED if at == "enlarged" else int(at)
        assert curves(config.run_dir, 0) == curves(taught.run_dir, step)
    for at in ("enlarged", BETWEEN):
        (said,) = workers.run(attempt, 1, branched(source(), tmp_path / f"no{at}", at, **distill))
        assert "distill.teacher=self is the mean of weights at 461, 768 consumed tokens" in said
        assert "distill.average_last=1" in said
    other = branched(taught, tmp_path / "other", BETWEEN, distill={"average_last": 1})
    assert "at 768 consumed tokens" in workers.run(attempt, 1, other)[0]
    # What is learnt from the same teacher may change.
    less = branched(taught, tmp_path / "less", BETWEEN, distill={"alpha": 0.5})
    assert workers.run(attempt, 1, less) == [""]


@pytest.mark.parametrize("name", ["tp1", "taught"])
def test_flops_are_counted_step_by_step_from_the_shape(
    source: Callable[..., Config], name: str
) -> None:
    run = read_run(Path(source(name).run_dir))
    sums = cost(run)
    for record, ours, teacher in zip(run.records, sums.this_run, sums.teacher, strict=True):
        assert record.flops == ours + teacher
    assert run.records[-1].flops == checkpoint.read_state(checkpoint_at(run.run_dir, STEPS)).flops
    assert (sums.teacher[-1] > 0) == (name == "taught")


def test_flops_are_unknown_after_a_checkpoint_that_did_not_count_them(
    source: Callable[..., Config], workers: Workers, tmp_path: Path
) -> None:
    import json
    import zlib

    config = branched(source(), tmp_path / "branch", RECOVERING)
    workers.run(positions, 1, config)
    path = checkpoint_at(config.run_dir, RECOVERING)
    state = json.loads((path / "state.json").read_text())
    for name in ("flops", "began_at", "has_scores"):  # as older versions wrote it
        del state[name]
    text = json.dumps(state)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = {"bytes": len(text), "crc32": f"{zlib.crc32(text.encode()):08x}"}
    manifest["files"]["state.json"] = entry
    (path / "state.json").write_text(text)
    (path / "manifest.json").write_text(json.dumps(manifest))
    workers.run(train_on, 1, config)
    assert {record.flops for record in read_metrics(Path(config.run_dir))} == {None}
    assert tensors(checkpoint_at(config.run_dir, STEPS))
