"""Score records: few, right, and without an effect on what is pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import live_run, on_ranks, small

from megatron_idea.config import ScheduleConfig
from megatron_idea.prune.distribution import MOST_RECORDS, Decision, Distribution, spearman
from megatron_idea.train import step

SCHEDULE = ScheduleConfig(total_tokens=1_000_000)


def decision(importance: torch.Tensor, keep: int) -> Decision:
    alive = torch.ones_like(importance, dtype=torch.bool)
    kept = importance >= importance.topk(keep).values[:, -1:]
    return Decision(importance, alive, kept)


def test_quantiles_and_cut_are_of_each_layer() -> None:
    importance = torch.stack([torch.arange(101.0), torch.arange(101.0).flip(0) * 10])
    (record,) = Distribution(SCHEDULE).records({"neurons": decision(importance, 40)}, 1)
    assert record["axis"] == "neurons"
    assert record["quantiles"][0] == [0, 5, 25, 50, 75, 95, 100]
    assert record["quantiles"][1] == [0, 50, 250, 500, 750, 950, 1000]
    assert record["cut"] == [61, 610]
    assert record["rank_correlation"] == [None, None]


def test_removed_neurons_do_not_count() -> None:
    importance = torch.tensor([[0.0, 5.0, 7.0, 9.0]])
    alive = torch.tensor([[False, True, True, True]])
    distribution = Distribution(SCHEDULE)
    distribution.records({"a": Decision(importance, alive, alive)}, 1)
    # The removed one moves from the last place to the first: nobody minds.
    moved = torch.tensor([[99.0, 5.0, 7.0, 9.0]])
    other = Decision(torch.zeros(1, 3), *[torch.zeros(1, 3, dtype=torch.bool)] * 2)
    decisions = {"a": Decision(moved, alive, alive), "b": other}
    record, of_nobody = distribution.records(decisions, 500_000)
    assert record["quantiles"][0][0] == 5 and record["rank_correlation"] == [1.0]
    assert of_nobody["axis"] == "b"
    assert of_nobody["quantiles"] == of_nobody["cut"] == of_nobody["rank_correlation"] == [None]


def test_spearman_is_that_of_the_textbook() -> None:
    a = torch.tensor([106.0, 100, 86, 101, 99, 103, 97, 113, 112, 110])
    b = torch.tensor([7.0, 27, 2, 50, 28, 29, 20, 12, 6, 17])
    assert spearman(a, b) == pytest.approx(-29 / 165, abs=1e-6)
    assert spearman(a, -a) == -1 and spearman(a, a.exp2()) == 1
    assert spearman(a[:1], b[:1]) is None


@pytest.mark.parametrize("steps", [50, 1000, 20_000])
def test_a_run_has_a_bounded_number_of_records(steps: int) -> None:
    prune = range(500_000, 650_001, 150_000 // steps)
    distribution = Distribution(SCHEDULE)
    values = decision(torch.rand(2, 8), 4)
    count = sum(len(distribution.records({"a": values}, tokens)) for tokens in prune)
    assert min(steps, MOST_RECORDS) <= count <= MOST_RECORDS + 1


@on_ranks(2)
def test_recording_changes_nothing(groups: Any, config: Any) -> None:
    states = []
    for is_recorded in (True, False):
        config = small(
            schedule={"total_tokens": 20 * 96, "prune_warmup_fraction": 0.4}, parallel={}
        )
        run, state = live_run(groups, config)
        records: list[dict[str, Any]] = []
        run.log.scores = records.append
        if not is_recorded:
            run.pruner.score_records = lambda tokens: []
        losses = [step(run, state)[0].loss for _ in range(20)]
        weights = [p.detach().clone() for chunk in run.trainable.chunks for p in chunk.parameters()]
        states.append((losses, run.pruner.alive["ffn_hidden_size"], weights))
        assert bool(records) == (is_recorded and groups.is_writer)
        assert all(len(record["quantiles"]) == 2 for record in records)
    (losses, alive, weights), (other_losses, other_alive, other_weights) = states
    assert losses == other_losses and torch.equal(alive, other_alive)
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
