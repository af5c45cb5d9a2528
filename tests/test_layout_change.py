"""A run that goes on in another layout when its model has become small."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from jobs import train_on
from test_checkpoint import assert_same_tensors, checkpoint_at, curves

from megatron_idea import checkpoint
from megatron_idea.config import Config, ConfigError, from_dict, load, replace, to_yaml, validate
from megatron_idea.records.read import read_events
from megatron_idea.testing import Workers

# ``tensors`` reads in one process, and means to.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Steps of ``tiny``: 6 in the enlarged phase, 10 in the prune phase, 8 to recover.
PRUNED, STEPS = 16, 24


def threads_of_rebuilt(rendezvous: str, config: Config) -> tuple[int, int]:
    """Train; returns this process's threads before and after."""
    import psutil

    before = psutil.Process().num_threads()
    train_on(rendezvous, config)
    return before, psutil.Process().num_threads()


def changed(config: Config, run_dir: Path, **after: Any) -> Config:
    parallel = replace(config, parallel=after).parallel
    return replace(config, run_dir=str(run_dir), parallel_after_prune=parallel)


@pytest.fixture
def tp2(tiny_halved: Config) -> Config:
    return replace(
        tiny_halved, parallel={"tensor_model_parallel_size": 2}, checkpoint={"keep_last": 0}
    )


def test_tp_2_becomes_dp_2_and_computes_the_same(
    tp2: Config, workers: Workers, tmp_path: Path
) -> None:
    config = changed(tp2, tmp_path / "changed", tensor_model_parallel_size=1)
    workers.run(train_on, 2, tp2)
    for before, after in workers.run(threads_of_rebuilt, 2, config):
        assert after <= before, "the first layout's groups leave threads behind"
    whole, ours = curves(tp2.run_dir, 0), curves(config.run_dir, 0)
    assert ours[:PRUNED] == whole[:PRUNED] and len(ours) == STEPS
    for ours_at, at in zip(ours[PRUNED:], whole[PRUNED:], strict=True):
        assert ours_at["loss"] == pytest.approx(at["loss"], rel=1e-6)
        for name in ("lr", "live", "stored", "flops", "tokens"):
            assert ours_at[name] == at[name]
    (event,) = [e for e in read_events(Path(config.run_dir)) if e["kind"] == "layout_changed"]
    assert (event["step"], event["was"]) == (PRUNED, "TP 2 x PP 1 x DP 1")
    assert event["now"] == "TP 1 x PP 1 x DP 2"
    states = [checkpoint.read_state(path) for path in checkpoint.complete(config.run_dir)]
    assert [state.layout["tp"] for state in states] == [2, 2, 1]
    # The run folder says what was asked for, and the same call goes on.
    assert load(Path(config.run_dir) / "config.yaml") == config
    before = curves(config.run_dir, 0)
    workers.run(train_on, 2, config)
    assert curves(config.run_dir, 0) == before


def test_killed_after_the_change_it_goes_on_in_the_small_models_layout(
    tp2: Config, workers: Workers, tmp_path: Path
) -> None:
    often = replace(tp2, checkpoint={"every_tokens": 128})
    config = changed(often, tmp_path / "whole", tensor_model_parallel_size=1)
    workers.run(train_on, 2, config)
    for step in (PRUNED - 1, PRUNED, PRUNED + 3):
        again = replace(config, run_dir=str(tmp_path / f"after{step}"))
        shutil.copytree(config.run_dir, again.run_dir)
        for path in (Path(again.run_dir) / "checkpoints").iterdir():
            if path.name > f"step_{step:08d}":
                shutil.rmtree(path)
        workers.run(train_on, 2, again)
        assert curves(again.run_dir, 0) == curves(config.run_dir, 0)
        last = [checkpoint_at(run.run_dir, STEPS) for run in (again, config)]
        assert_same_tensors(*last)


def test_where_only_data_parallel_messages_change_it_is_bitwise_the_same(
    tiny_halved: Config, workers: Workers, tmp_path: Path
) -> None:
    config = changed(
        tiny_halved, tmp_path / "changed", overlap_grad_reduce=True, overlap_param_gather=True
    )
    workers.run(train_on, 2, tiny_halved)
    workers.run(train_on, 2, config)
    assert curves(config.run_dir, 0) == curves(tiny_halved.run_dir, 0)
    assert_same_tensors(
        checkpoint_at(config.run_dir, STEPS), checkpoint_at(tiny_halved.run_dir, STEPS)
    )


def test_a_pipeline_and_its_teacher_come_along(
    tiny_halved: Config, workers: Workers, tmp_path: Path
) -> None:
    taught = replace(
        tiny_halved,
        parallel={"pipeline_model_parallel_size": 2},
        distill={"teacher": "self", "average_last": 1},
    )
    config = changed(taught, tmp_path / "changed", pipeline_model_parallel_size=1)
    workers.run(train_on, 2, taught)
    workers.run(train_on, 2, config)
    for ours, at in zip(curves(config.run_dir, 0), curves(taught.run_dir, 0), strict=True):
        for name in ("loss", "kl") if "kl" in at else ("loss",):
            assert ours[name] == pytest.approx(at[name], rel=2e-6, abs=1e-7)


def test_what_is_left_out_is_as_before_and_what_does_not_shrink_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "parallel: {tensor_model_parallel_size: 4, sequence_parallel: false}\n"
        "parallel_after_prune: {tensor_model_parallel_size: 2}\n"
        "model: {num_query_groups: 4}\n"
    )
    config = load(path)
    after = config.parallel_after_prune
    assert after is not None and not after.sequence_parallel
    assert config.after_prune.parallel == after and after.tensor_model_parallel_size == 2
    assert load(path, ["parallel_after_prune=null"]).parallel_after_prune is None
    mapping = "parallel_after_prune={tensor_model_parallel_size: 1, sequence_parallel: true}"
    assert load(path, [mapping]).after_prune.parallel.sequence_parallel
    for overrides, words in (
        (["parallel_after_prune.tensor_model_parallel_size=3"], "must divide that of parallel"),
        (["parallel_after_prune.pipeline_model_parallel_size=2"], "be at most 1"),
        (["prune.strategy=none"], "prune.strategy is none"),
        (["training.micro_batch_size=8"], "parallel_after_prune: training.global_batch_size"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(load(path, overrides), 4)
    validate(load(path, ["training.micro_batch_size=4"]), 4)
    # On fewer nodes it is the layout of fewer processes, which train checks.
    validate(load(path, ["training.micro_batch_size=8", "nodes_after_prune=1"]), 4)
    with pytest.raises(ConfigError, match="did you mean"):
        from_dict({"parallel_after_prune": {"tensor_parallel": 1}})


def test_a_run_may_be_given_a_layout_after_pruning_when_it_has_begun(
    tiny: Config, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints" / "step_00000001"
    path.mkdir(parents=True)
    both = [tiny, replace(tiny, parallel_after_prune=tiny.parallel)]
    for saved, config in (both, both[::-1]):
        (path / "config.yaml").write_text(to_yaml(saved))
        checkpoint.check_same_run(path, config)
