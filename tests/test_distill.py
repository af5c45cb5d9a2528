"""A teacher in the run: zero against itself, in every layout the loss and gradients of one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jobs import RandomBatches, live_run, run_job, small, train_on, whole
from test_all_axes import PP2, TP2, killed_after
from test_checkpoint import checkpoint_at, curves, tensors

from megatron_idea.checkpoint import read_state
from megatron_idea.config import Config, replace
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_sp": (2, TP2),
    "tp2": (2, {**TP2, "sequence_parallel": False}),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "pp2": (2, PP2),
    "vpp2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {**TP2, **PP2}),
}
MODEL = {"num_layers": 4, "num_query_groups": 4, "init_method_std": 0.1}
"""More layers than stages, and groups for four ranks."""


def config_of(**sections: Any) -> Config:
    model = MODEL | sections.pop("model", {})
    return small(model=model, **sections)


def taught(
    groups: ProcessGroups, config: Config, teacher_seed: int | None, alpha: float
) -> dict[str, Any]:
    """Losses and gradients of a step with a teacher: the student itself, or of another seed."""
    from megatron_idea.distill.teacher import Teacher
    from megatron_idea.engine.model import initialize_weights, named_parameters
    from megatron_idea.engine.passes import forward_backward
    from megatron_idea.shape import Shape

    run, _ = live_run(groups, config)
    trainable, data = run.trainable, RandomBatches(config, groups)
    teacher = Teacher(
        config.model, Shape.full(config.model), config.training, config.parallel,
        config.distill, groups,
    )  # fmt: skip
    seed = config.training.seed if teacher_seed is None else teacher_seed
    initialize_weights(config.model, seed, teacher.chunks, groups)
    before = [p.clone() for chunk in teacher.chunks for p in chunk.parameters()]
    with teacher.teaching(trainable.chunks, data, 0, alpha) as lessons:
        losses = forward_backward(trainable, data, 0)
    after = [p for chunk in teacher.chunks for p in chunk.parameters()]
    for one, two in zip(before, after, strict=True):
        assert_equal(two, one, "a teacher's weights")
        assert two.grad is None and not two.requires_grad
    plain = forward_backward(trainable, data, 0)
    with teacher.teaching(trainable.chunks, data, 0, alpha):
        forward_backward(trainable, data, 0)
    names = [name for name, _ in named_parameters(trainable.chunks)]
    grads = [whole(trainable, p, "grad").view(p.shape) for p in trainable.parameters]
    means = {
        name: [float(x) for x in getattr(lessons, name)]
        for name in ("cross_entropy", "kl", "teacher_cross_entropy", "acceptance")
    }
    return means | {
        "mixed": [float(x) for x in losses],
        "plain": [float(x) for x in plain],
        "grads": dict(zip(names, grads, strict=True)),
    }


@pytest.mark.parametrize(
    ("layout", "tied"), [("one", True), ("pp2", False), *((layout, True) for layout in LAYOUTS)]
)
def test_a_model_has_nothing_to_learn_from_itself(
    workers: Workers, layout: str, tied: bool
) -> None:
    size, parallel = LAYOUTS.get(layout, (1, {}))
    config = config_of(parallel=parallel, model={"share_embeddings_and_output_weights": tied})
    for found in run_job(workers, taught, size, config, None, 1.0):
        assert all(x == 0 for x in [*found["kl"], *found["mixed"]])
        assert found["cross_entropy"] == found["teacher_cross_entropy"]
        assert found["cross_entropy"] == pytest.approx(found["plain"], rel=1e-6)
        for name, grad in found["grads"].items():
            assert not bool(grad.any()), name


def taught_as_alone(
    groups: ProcessGroups, config: Config, alpha: float, alone: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Compare this rank's part of every gradient, element by element, with one process's."""
    from megatron_idea.engine.model import named_parameters, own_part

    found = taught(groups, config, 99, alpha)
    run, _ = live_run(groups, config)
    for name, parameter in named_parameters(run.trainable.chunks):
        expected = own_part(name, parameter, alone[name], groups)
        scale = alone[name].abs().max()
        assert_close(found["grads"][name] / scale, expected / scale, name, 2e-6)
    return found


MIX = {"alpha": 0.6, "distill": {"acceptance": True, "keep_hidden": "host"}}


@pytest.fixture(scope="module")
def alone(workers: Workers) -> dict[str, Any]:
    (found,) = run_job(workers, taught, 1, config_of(distill=MIX["distill"]), 99, MIX["alpha"])
    return found


def test_the_loss_is_the_mix_and_cross_entropy_is_megatron_cores(alone: dict[str, Any]) -> None:
    assert alone["cross_entropy"] == pytest.approx(alone["plain"], rel=1e-6)
    mixed = [
        0.4 * ce + 0.6 * kl for ce, kl in zip(alone["cross_entropy"], alone["kl"], strict=True)
    ]
    assert alone["mixed"] == pytest.approx(mixed, rel=1e-6)
    assert min(alone["kl"]) > 1e-3 and 0 < max(alone["acceptance"]) < 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(
    workers: Workers, alone: dict[str, Any], layout: str
) -> None:
    size, parallel = LAYOUTS[layout]
    config = config_of(parallel=parallel, distill=MIX["distill"])
    ranks = run_job(workers, taught_as_alone, size, config, MIX["alpha"], alone["grads"])
    if layout != "dp2":  # whose ranks have different micro-batches
        last = ranks[-1]
        for name in ("cross_entropy", "kl", "teacher_cross_entropy", "acceptance"):
            assert last[name] == pytest.approx(alone[name], rel=1e-6), name


# ------------------------------------------------------------------------------------ whole runs


def settings(**distill: Any) -> dict[str, Any]:
    return {"distill": {"teacher": "self", "average_spacing": 0.1, **distill}}


@pytest.fixture()
def real(tiny: Config) -> Config:
    """24 steps on text; the prune phase begins after step 8."""
    return replace(
        tiny,
        **settings(),
        checkpoint={"before_compaction": True, "keep_last": 0, "every_tokens": 2 * 128},
    )


def steps_of(run_dir: str) -> list[int]:
    folder = Path(run_dir) / "checkpoints"
    return [int(path.name.removeprefix("step_")) for path in sorted(folder.iterdir())]


def same_end(one: Config, other: Config) -> None:
    ours, theirs = (tensors(checkpoint_at(c.run_dir, 24)) for c in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal(ours[name], theirs[name], name)


def test_nothing_changes_without_a_share(workers: Workers, tiny: Config, tmp_path: Path) -> None:
    plain, silent = (
        tiny,
        replace(tiny, run_dir=str(tmp_path / "silent"), **settings(alpha=0.0, alpha_end=0.0)),
    )
    for config in (plain, silent):
        workers.run(train_on, 1, config)
    assert curves(plain.run_dir, 0) == curves(silent.run_dir, 0)
    same_end(plain, silent)
    assert not (Path(silent.run_dir) / "teacher").exists()


@pytest.mark.parametrize("layout", ["pp2"])
def test_a_taught_run_goes_on_as_if_it_had_not_stopped(
    workers: Workers, real: Config, tmp_path: Path, layout: str
) -> None:
    size, parallel = LAYOUTS.get(layout, (1, {}))
    config = replace(real, parallel=parallel)
    workers.run(train_on, size, config)
    records = read_metrics(Path(config.run_dir))
    begin = next(n for n, record in enumerate(records) if record.phase == "prune")
    assert all(record.kl is None for record in records[:begin])
    assert all(record.kl is not None and record.kl > 0 for record in records[begin:])
    (event,) = [e for e in read_events(Path(config.run_dir)) if e["kind"] == "teacher"]
    assert event["step"] == begin and event["val_loss"] > 0
    states = {
        step: read_state(checkpoint_at(config.run_dir, step)) for step in steps_of(config.run_dir)
    }
    due = next(step for step, state in states.items() if state.plan_due)
    early = next(step for step in states if step < begin)
    for step in (early, due):
        again = killed_after(config, step, tmp_path / f"after_{step}")
        workers.run(train_on, size, again)
        assert curves(again.run_dir, 0) == curves(config.run_dir, 0)
        same_end(again, config)
    assert states[early].teacher == "" and states[due].teacher == event["digest"]
    assert len(list((Path(config.run_dir) / "teacher").glob("snapshot_*"))) == 3


def test_a_lost_or_changed_teacher_ends_the_run(
    workers: Workers, real: Config, tmp_path: Path
) -> None:
    workers.run(train_on, 1, real)
    folder = Path(real.run_dir) / "teacher" / "self"
    again = killed_after(real, 12, tmp_path / "again")
    manifest = Path(again.run_dir) / "teacher" / "self" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(RuntimeError, match="is not the one that this run has learnt from"):
        workers.run(train_on, 1, again)
    shutil.copy(folder / "manifest.json", manifest)
    weights = next(manifest.parent.glob("*.distcp"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RuntimeError, match="teacher cannot be read"):
        workers.run(train_on, 1, again)
    shutil.rmtree(manifest.parent)
    with pytest.raises(RuntimeError, match="does not go on without"):
        workers.run(train_on, 1, again)
