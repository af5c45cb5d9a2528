"""What a run does when the loss is not what it should be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idea.config import Config, ConfigError, GuardConfig, replace
from megatron_idea.guard import DivergedError, Watch, observe
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.testing import Workers

CALM = GuardConfig(spike_increase=0.5, spike_window_steps=4, max_skipped_in_row=3)


def watch_of(losses: list[float], config: GuardConfig = CALM) -> Watch:
    watch = Watch()
    for loss in losses:
        watch = observe(config, watch, loss, math.isfinite(loss))
    return watch


def test_a_spike_begins_above_the_average_and_ends_below_half_of_the_bound() -> None:
    level = [2.0] * 6
    assert not watch_of(level).in_spike
    assert not watch_of([*level, 2.49]).in_spike
    assert watch_of([*level, 2.6]).in_spike
    assert watch_of([*level, 3.0, 2.6]).in_spike, "0.35 above the average of 2.25: not over"
    assert not watch_of([*level, 3.0, 2.3]).in_spike
    assert not watch_of([2.0, 9.0]).in_spike, "not before the window is full"


def test_a_level_that_stays_becomes_normal() -> None:
    assert not watch_of([2.0] * 6 + [4.0] * 10).in_spike


@given(st.lists(st.floats(0, 20), min_size=1, max_size=40))
def test_the_average_stays_among_the_losses(losses: list[float]) -> None:
    watch = watch_of(losses)
    assert min(losses) - 1e-9 <= watch.average <= max(losses) + 1e-9
    assert watch.steps == min(len(losses), 4)


def test_steps_in_a_row_that_are_not_taken_end_the_run() -> None:
    assert watch_of([2.0, math.nan, math.inf]).bad_in_row == 2
    assert watch_of([2.0, math.nan, math.nan, 2.0, math.nan, math.nan]).bad_in_row == 2
    assert watch_of([math.nan, 2.0]).average == 2.0
    with pytest.raises(DivergedError, match="3 steps in a row"):
        watch_of([2.0, math.nan, math.nan, math.nan])
    never = GuardConfig(max_skipped_in_row=0)
    assert watch_of([math.nan] * 100, never).bad_in_row == 100


def test_illegal_settings_are_refused() -> None:
    for setting in ({"on_spike": "panic"}, {"spike_increase": -1.0}, {"spike_window_steps": 0}):
        with pytest.raises(ConfigError, match="guard"):
            GuardConfig(**setting)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ in a run


def job(rendezvous: str, config: Config, strange: dict[int, float]) -> list[tuple[int, int]]:
    """A run whose loss is what ``strange`` says after some samples have been read.

    Returns: for each step its number and the first sample that it read.
    """
    from megatron_idea import train as module

    share, seen = module.share, []
    read = module.Batches.step
    first = [0]

    def noted(self: Any, consumed_samples: int) -> Any:
        first[0] = consumed_samples
        return read(self, consumed_samples)

    def told(run: Any, losses: Any, lessons: Any) -> Any:
        means, *rest = share(run, losses, lessons)
        seen.append((len(seen) + 1, first[0]))
        return means | {"loss": strange.get(first[0], means["loss"])}, *rest

    module.share, module.Batches.step = told, noted  # type: ignore[method-assign]
    try:
        module.train(config, rendezvous)
    finally:
        module.share, module.Batches.step = share, read  # type: ignore[method-assign]
    return seen


def guarded(tiny: Config, **settings: Any) -> Config:
    return replace(tiny, guard={"spike_window_steps": 3, "spike_increase": 1.0, **settings})


def events(config: Config, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(Path(config.run_dir)) if e["kind"] == kind]


def test_a_step_whose_loss_is_not_finite_is_not_taken(tiny: Config, workers: Workers) -> None:
    config = guarded(tiny)
    workers.run(job, 2, replace(config, parallel={"tensor_model_parallel_size": 2}), {36: math.nan})
    records = read_metrics(Path(config.run_dir))
    assert [r.skipped for r in records] == [0] * 9 + [1] * 15
    assert math.isnan(records[9].grad_norm)
    assert records[9].live["ffn_hidden_size"] == records[8].live["ffn_hidden_size"]


def test_too_many_of_them_end_the_run_on_every_rank(tiny_halved: Config, workers: Workers) -> None:
    config = guarded(tiny_halved, max_skipped_in_row=2)
    with pytest.raises(RuntimeError, match="2 steps in a row had a loss or gradient") as error:
        workers.run(job, 2, config, {36: math.nan, 40: math.inf})
    assert "rank 0" in str(error.value) and "rank 1" in str(error.value)


def test_pruning_waits_until_a_spike_is_over_and_then_catches_up(
    tiny: Config, workers: Workers
) -> None:
    config = guarded(tiny, on_spike="pause_pruning")
    workers.run(job, 1, config, {36: 30.0, 40: 60.0})  # steps 10 and 11
    records = read_metrics(Path(config.run_dir))
    live = [r.live["ffn_hidden_size"][0] for r in records]
    assert live[8] == live[9] == live[10] > live[11] > live[12]
    assert live[-1] == 24
    assert [e["step"] for e in events(config, "spike")] == [10]


def test_a_rollback_goes_on_from_the_checkpoint_with_the_data_after_the_spike(
    tiny: Config, workers: Workers
) -> None:
    config = guarded(tiny, on_spike="rollback")
    config = replace(config, checkpoint={"every_tokens": 4 * 128})
    (seen,) = workers.run(job, 1, config, {36: 30.0})  # 4 samples a step: step 10
    # Saved at step 8 (samples 0 to 31); steps 9 and 10 again, with what comes after the spike.
    assert [sample for _, sample in seen[:12]] == [*range(0, 40, 4), 40, 44]
    assert seen[-1][1] == 4, "what was left out is made up for from the beginning"
    (event,) = events(config, "rolled_back")
    assert (event["step"], event["from_step"], event["skipped_samples"]) == (8, 10, 8)
    records = read_metrics(Path(config.run_dir))
    assert [r.step for r in records] == list(range(1, 25))
    assert records[-1].stored["ffn_hidden_size"] == [24, 24]


def test_rollbacks_are_limited(tiny: Config, workers: Workers) -> None:
    config = guarded(tiny, on_spike="rollback", max_rollbacks=1)
    config = replace(config, checkpoint={"every_tokens": 4 * 128})
    with pytest.raises(RuntimeError, match="after 1 rollbacks"):
        workers.run(job, 1, config, {36: 30.0, 44: 60.0})


def test_a_rollback_does_not_go_back_to_the_spike_when_a_compaction_is_due_with_it(
    tiny: Config, workers: Workers
) -> None:
    config = guarded(tiny, on_spike="rollback")
    config = replace(config, checkpoint={"before_compaction": True})
    workers.run(job, 1, config, {36: 30.0})  # step 10; widths shrink at steps 9 and 10
    (event,) = events(config, "rolled_back")
    assert (event["step"], event["from_step"], event["skipped_samples"]) == (9, 10, 4)
    records = read_metrics(Path(config.run_dir))
    assert [r.step for r in records] == list(range(1, 25))
    assert records[8].stored["ffn_hidden_size"] > records[9].stored["ffn_hidden_size"]
    assert records[-1].stored["ffn_hidden_size"] == [24, 24]


def signalled_job(rendezvous: str, config: Config, strange: dict[int, float]) -> None:
    """``job`` that is told to stop in the middle of a rollback."""
    import os
    import signal

    from megatron_idea import train as module

    roll_back = module.roll_back

    def told(run: Any, state: Any) -> Any:
        release = run.trainable.release

        def stop_and_release() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            release()

        run.trainable.release = stop_and_release
        return roll_back(run, state)

    module.roll_back = told
    try:
        job(rendezvous, config, strange)
    finally:
        module.roll_back = roll_back


def test_a_signal_during_a_rollback_stops_the_run(tiny: Config, workers: Workers) -> None:
    config = guarded(tiny, on_spike="rollback")
    config = replace(config, checkpoint={"every_tokens": 4 * 128})
    workers.run(signalled_job, 1, config, {36: 30.0})
    assert [e["name"] for e in events(config, "signal")] == ["SIGTERM"]
    assert len(read_metrics(Path(config.run_dir))) == 9
