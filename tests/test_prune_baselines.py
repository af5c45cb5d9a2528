"""Random and magnitude pruning: what they draw and measure, in any layout, and a run of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jobs import backward, live_run, run_job, small, whole
from torch import Tensor

from megatron_idea.config import AxisGoal, Config, PruneConfig, replace
from megatron_idea.prune.magnitude import Magnitude
from megatron_idea.prune.random import RandomPrune
from megatron_idea.prune.strategy import Measure, Stats, select
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

NEURONS = "ffn_hidden_size"
GOALS = {
    NEURONS: AxisGoal(24, 12, 4, 4, 4),
    "num_query_groups": AxisGoal(4, 2, 1, 1, 1),
}
ALIVE = {
    NEURONS: torch.ones(2, 24, dtype=torch.bool),
    "num_query_groups": torch.ones(2, 4, dtype=torch.bool),
}


def drawn(seed: int, alive: Any = ALIVE) -> dict[str, Tensor]:
    method = RandomPrune(PruneConfig(strategy="random"), GOALS, seed)
    return dict(method.importance(Stats({}, {}, alive)))


def test_random_importance_is_drawn_once_and_of_the_seed() -> None:
    first = drawn(1)
    assert {axis: tuple(value.shape) for axis, value in first.items()} == {
        NEURONS: (2, 24), "num_query_groups": (2, 4),
    }  # fmt: skip
    fewer = {axis: alive & (torch.rand(alive.shape) < 0.5) for axis, alive in ALIVE.items()}
    torch.manual_seed(0)
    for axis, value in drawn(1, fewer).items():
        assert_equal(value, first[axis], "whoever is alive, whatever was drawn elsewhere")
    others = drawn(2)
    assert not any(torch.equal(first[axis], others[axis]) for axis in GOALS)
    assert len(set(first[NEURONS].flatten().tolist())) == 48, "layers draw apart"
    assert not torch.equal(first[NEURONS][:, :4], first["num_query_groups"]), "axes draw apart"


def test_random_importance_asks_for_nothing_and_leaves_global_random_numbers_alone() -> None:
    assert RandomPrune(PruneConfig(strategy="random"), GOALS, 1).measures == ()
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    drawn(1)
    assert_equal(torch.rand(4), expected)


def magnitude(**settings: Any) -> Magnitude:
    return Magnitude(PruneConfig(strategy="magnitude", **settings), {NEURONS: GOALS[NEURONS]})


@pytest.mark.parametrize(
    ("row_reduce", "reduction", "importance"),
    [
        ("mean", "sum", [2.0, 4.0]), ("sum", "sum", [8.0, 16.0]),
        ("l2", "sum_of_squares", [8.0**0.5, 4.0]), ("max", "max", [8.0, 16.0]),
    ],
)  # fmt: skip
def test_magnitude_is_a_norm_of_weights(
    row_reduce: str, reduction: str, importance: list[float]
) -> None:
    method = magnitude(row_reduce=row_reduce)
    assert method.measures == (Measure("weight", reduction),)
    assert not method.measures[0].needs_gradients
    sums = torch.tensor([[[8.0, 1.0], [4.0, 2.0], [2.0, 16.0]]])  # gate, up, down of two neurons
    stats = Stats({method.measures[0]: {NEURONS: sums}}, {NEURONS: torch.full((3, 1), 4.0)}, ALIVE)
    assert_close(method.importance(stats)[NEURONS], torch.tensor([importance]))


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.abs().mean(1),
    "l2": lambda rows: rows.square().sum(1).sqrt(),
    "max": lambda rows: rows.abs().amax(1),
}


def _magnitude_of_main_weights(groups: ProcessGroups, config: Config) -> None:
    """In bf16, where main weights are other numbers than the model's after a step."""
    from megatron_idea.engine.optimizer import update

    for row_reduce, norm in NORMS.items():
        prune = {"strategy": "magnitude", "row_reduce": row_reduce}
        run, _ = live_run(groups, replace(config, training={"precision": "bf16"}, prune=prune))
        backward(run.trainable)
        update(run.trainable.optimizer, 1e-3)
        assert not run.pruner.scores.observe(run.trainable), "nothing is measured of gradients"
        found = run.pruner.strategy.importance(run.pruner.stats(run.trainable))[NEURONS]
        assert found.shape == (2, 24)
        tp = groups.tp
        for layer, mlp in run.trainable.mlps:
            fc1, fc2 = (
                whole(run.trainable, weight, "main").view_as(weight).double()
                for weight in (mlp.linear_fc1.weight, mlp.linear_fc2.weight)
            )
            expected = torch.stack([norm(part) for part in (*fc1.chunk(2), fc2.T)]).amax(0)
            mine = found[layer].chunk(tp.size())[tp.rank()]
            assert_close(mine / expected.max(), expected / expected.max(), row_reduce, 1e-6)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {"tensor_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2}), (3, {})],
    ids=["tp2", "pp2", "dp3"],
)
def test_magnitude_is_of_main_weights_wherever_they_are(
    workers: Workers, world_size: int, parallel: dict[str, int]
) -> None:
    run_job(workers, _magnitude_of_main_weights, world_size, small(parallel=parallel))


def _kept(groups: ProcessGroups, config: Config) -> dict[str, list[Any]]:
    """Who lives on, plan after plan, through the removal of a run of 20 steps."""
    from megatron_idea.train import step

    run, state = live_run(groups, config)
    kept = []
    for _ in range(20):
        step(run, state)
        kept.append(run.pruner.alive[NEURONS].tolist())
    return {"kept": kept, "stored": list(run.trainable.shape.counts(NEURONS))}


RANDOM = small(
    schedule={"total_tokens": 20 * 96, "prune_warmup_fraction": 0.4}, prune={"strategy": "random"}
)


@pytest.fixture(scope="module")
def random_of_one_process(workers: Workers) -> dict[str, list[Any]]:
    (found,) = run_job(workers, _kept, 1, RANDOM)
    return found


def test_random_pruning_keeps_those_that_drew_most(
    random_of_one_process: dict[str, list[Any]],
) -> None:
    last = torch.tensor(random_of_one_process["kept"][-1])
    draws = RandomPrune(RANDOM.prune, {NEURONS: GOALS[NEURONS]}, RANDOM.training.seed)
    alive = {NEURONS: ALIVE[NEURONS]}
    importance = draws.importance(Stats({}, {}, alive))[NEURONS]
    assert_equal(last, select(importance, ALIVE[NEURONS], [12, 12]))
    assert random_of_one_process["stored"] == [12, 12]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {"tensor_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2}), (3, {})],
    ids=["tp2", "pp2", "dp3"],
)
def test_random_pruning_is_the_same_in_every_layout(
    workers: Workers,
    random_of_one_process: dict[str, list[Any]],
    world_size: int,
    parallel: dict[str, int],
) -> None:
    for found in run_job(workers, _kept, world_size, replace(RANDOM, parallel=parallel)):
        assert found == random_of_one_process


def _train(rendezvous: str, config: Config) -> int:
    from megatron_idea.train import train

    return train(config, rendezvous).step


@pytest.mark.parametrize("strategy", ["random", "magnitude"])
def test_a_run_ends_at_the_target(workers: Workers, tiny: Config, strategy: str) -> None:
    config = replace(tiny, prune={"strategy": strategy})
    assert workers.run(_train, 1, config) == [24]
    records = read_metrics(Path(config.run_dir))
    axis = "ffn_hidden_size"
    live = [record.live[axis] for record in records]
    assert live[0] == [64, 64] and live[-1] == records[-1].stored[axis] == [24, 24]
    assert live == sorted(live, reverse=True)
    assert records[-1].loss < records[0].loss
    assert any(event["kind"] == "compacted" for event in read_events(Path(config.run_dir)))
