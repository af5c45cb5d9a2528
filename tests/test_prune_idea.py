"""From measured sums to the neurons that live on: importance, budgets, selection."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_idea.config import AxisGoal, ConfigError, PruneConfig
from megatron_idea.guard import DivergedError
from megatron_idea.prune.axis import AXES
from megatron_idea.prune.idea import IdeaPrune
from megatron_idea.prune.plan import live_counts
from megatron_idea.prune.strategy import (
    Measure,
    Scheduled,
    Stats,
    drop_blocks,
    ranked,
    select,
)
from megatron_idea.testing import assert_close, assert_equal

NEURONS = "ffn_hidden_size"
ROW_LENGTH = 4


def goal(full: int, target: int, multiple: int) -> AxisGoal:
    return AxisGoal(full, target, multiple, multiple, multiple)


def strategy(**settings: str) -> IdeaPrune:
    return IdeaPrune(PruneConfig(**settings), {NEURONS: goal(24, 12, 1)})  # type: ignore[arg-type]


def measured(method: IdeaPrune, sums: Tensor) -> Tensor:
    """Importance of units with these averages, [..., matrices, units] to [..., units]."""
    sizes = torch.full((sums.shape[-2], 1), float(ROW_LENGTH))
    alive = torch.ones(sums.shape[0], sums.shape[-1], dtype=torch.bool)
    (measure,) = method.measures
    stats = Stats({measure: {NEURONS: sums}}, {NEURONS: sizes}, {NEURONS: alive})
    return method.importance(stats)[NEURONS]


def importance(sums: list[float], **settings: str) -> float:
    """Of one neuron with these averaged sums for gate, up and down."""
    return float(measured(strategy(**settings), torch.tensor(sums).view(1, 3, 1)))


def equal_counts(scores: Tensor, alive: Tensor, keep: int) -> list[int]:
    """What the schedule leaves of each layer when it wants ``keep`` on average."""
    method = Scheduled(PruneConfig(), {NEURONS: goal(scores.shape[1], keep, 1)})
    counts, _ = method.budget({NEURONS: scores}, {NEURONS: alive}, {NEURONS: 1.0}, torch.empty(0))
    return counts[NEURONS]


def one_ranking(multiple: int, scores: Tensor, alive: Tensor, keep: int) -> list[int]:
    """Likewise where all layers are ranked against each other."""
    return drop_blocks(scores, alive, keep * len(scores), multiple)


def table(values: list[list[float]]) -> tuple[Tensor, Tensor]:
    """[L, F] importance, all alive."""
    return torch.tensor(values), torch.ones(len(values), len(values[0]), dtype=torch.bool)


def test_the_default_is_the_largest_row_mean_of_the_three_matrices() -> None:
    assert importance([8.0, 4.0, 2.0]) == 2.0
    assert importance([4.0, 8.0, 2.0]) == 2.0
    assert importance([4.0, 2.0, 8.0]) == 2.0


@pytest.mark.parametrize(
    ("row_reduce", "matrix_reduce", "expected"),
    [
        ("mean", "max", 4.0), ("mean", "mean", 7 / 3), ("mean", "sum", 7.0),
        ("sum", "max", 16.0), ("sum", "mean", 28 / 3), ("sum", "sum", 28.0),
        ("l2", "max", 4.0), ("l2", "mean", (2 + 2 * math.sqrt(2) + 4) / 3),
        ("max", "max", 16.0), ("max", "sum", 28.0),
    ],
)  # fmt: skip
def test_each_switch_is_its_formula(row_reduce: str, matrix_reduce: str, expected: float) -> None:
    value = importance([4.0, 8.0, 16.0], row_reduce=row_reduce, matrix_reduce=matrix_reduce)
    assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("row_reduce", "reduction"),
    [("mean", "sum"), ("sum", "sum"), ("l2", "sum_of_squares"), ("max", "max")],
)
def test_each_row_reduction_asks_the_kernel_for_what_it_needs(
    row_reduce: str, reduction: str
) -> None:
    assert strategy(row_reduce=row_reduce).measures == (Measure("abs", reduction),)


def test_signed_sums_count_by_their_size() -> None:
    assert importance([-8.0, 4.0, 2.0], element="signed") == 2.0


def test_the_maximum_of_signed_values_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="to abs, squared or fisher"):
        strategy(element="signed", row_reduce="max")


def test_matrices_are_gate_up_down_in_this_order() -> None:
    assert AXES[NEURONS].matrices == ("gate", "up", "down")


def test_the_most_important_live_on() -> None:
    scores, alive = table([[0.1, 0.5, 0.3, 0.4], [4.0, 3.0, 2.0, 1.0]])
    kept = select(scores, alive, [2, 1])
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]


def test_ties_go_to_the_lower_index() -> None:
    scores, alive = table([[1.0, 2.0, 1.0, 1.0, 2.0, 1.0]])
    assert select(scores, alive, [4]).tolist() == [[True, True, True, False, True, False]]
    # So two runs whose scores are all alike prune alike.
    assert select(torch.zeros(1, 1000), torch.ones(1, 1000, dtype=torch.bool), [7])[0, :7].all()


def test_a_removed_neuron_never_returns_whatever_its_score() -> None:
    scores, alive = table([[9.0, 1.0, 2.0, 3.0]])
    alive[0, 0] = False
    assert select(scores, alive, [2]).tolist() == [[False, False, True, True]]
    assert ranked(scores, alive).tolist() == [[3, 2, 1, 0]]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_live_neuron_without_a_finite_score_is_an_error(broken: float) -> None:
    scores, alive = table([[1.0, 2.0], [3.0, broken]])
    with pytest.raises(DivergedError, match="not finite"):
        select(scores, alive, [1, 1])
    alive[1, 1] = False  # the score of a removed neuron says nothing
    select(scores, alive, [1, 1])


@st.composite
def populations(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Importance with many ties, and who is alive."""
    layers, width = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = torch.randint(0, 6, (layers, width), generator=generator).float()
    alive = torch.rand(layers, width, generator=generator) < draw(st.sampled_from((0.3, 0.9, 2.0)))
    return scores, alive


@settings(deadline=None)
@given(populations(), st.integers(0, 24))
def test_the_same_count_in_every_layer_and_a_subset_of_the_living(
    population: tuple[Tensor, Tensor], keep: int
) -> None:
    scores, alive = population
    budget = equal_counts(scores, alive, keep)
    assert budget == [min(keep, live) for live in live_counts(alive)]
    kept = select(scores, alive, budget)
    assert live_counts(kept) == budget
    assert not (kept & ~alive).any()
    for layer in range(len(scores)):
        out = alive[layer] & ~kept[layer]
        if kept[layer].any() and out.any():
            assert scores[layer][kept[layer]].min() >= scores[layer][out].max()


@settings(deadline=None)
@given(populations(), st.lists(st.integers(0, 24), min_size=2, max_size=4))
def test_removing_in_steps_with_fixed_scores_is_removing_at_once(
    population: tuple[Tensor, Tensor], counts: list[int]
) -> None:
    scores, start = population
    alive = start
    for keep in sorted(counts, reverse=True):
        alive = select(scores, alive, equal_counts(scores, alive, keep))
    at_once = select(scores, start, equal_counts(scores, start, min(counts)))
    assert_equal(alive, at_once)


@st.composite
def global_prunings(draw: st.DrawFn) -> tuple[int, int, list[Tensor], list[int]]:
    """(unit, full width, importance at each step, keep counts down to a legal target)."""
    unit, layers, units = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 8))
    full, target = unit * units, unit * draw(st.integers(1, units - 1))
    steps = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = [torch.rand(layers, full, generator=generator) for _ in range(steps)]
    falls = draw(st.lists(st.integers(target, full), min_size=steps - 1, max_size=steps - 1))
    return unit, full, scores, [*sorted(falls, reverse=True), target]


@settings(deadline=None)
@given(global_prunings())
def test_one_ranking_keeps_legal_widths_floors_and_lands_exactly_on_the_target(
    pruning: tuple[int, int, list[Tensor], list[int]],
) -> None:
    unit, full, scores, keeps = pruning
    layers = len(scores[0])
    alive = torch.ones(layers, full, dtype=torch.bool)
    for score, keep in zip(scores, keeps, strict=True):
        budget = one_ranking(unit, score, alive, keep)
        assert all(n % unit == 0 and n >= unit for n in budget)
        assert all(n <= live for n, live in zip(budget, live_counts(alive), strict=True))
        assert 0 <= sum(budget) - keep * layers < unit or budget == live_counts(alive)
        kept = select(score, alive, budget)
        assert not (kept & ~alive).any()
        alive = kept
    assert sum(live_counts(alive)) == keeps[-1] * layers


def test_one_ranking_drops_the_least_important_blocks_first() -> None:
    scores, alive = table(
        [
            [8.0, 8.0, 8.0, 7.0, 7.0, 7.0],  # blocks of two, best first: 8, 7.5, 7
            [9.0, 9.0, 3.0, 3.0, 1.0, 1.0],  # 9, 3, 1
            [6.0, 6.0, 6.0, 6.0, 2.0, 2.0],  # 6, 6, 2
        ]
    )
    # Away go 1, 2, 3, 6 in this order; the layer of 9 keeps its last block.
    assert one_ranking(2, scores, alive, 6) == [6, 6, 6]
    assert one_ranking(2, scores, alive, 5) == [6, 4, 6]
    assert one_ranking(2, scores, alive, 4) == [6, 2, 4]
    assert one_ranking(2, scores, alive, 3) == [6, 2, 2]
    # 18 - 8 = 10 live of 3 x 3 = 9: one more block would be one neuron too many.
    assert one_ranking(2, scores, alive, 2) == [2, 2, 2]


def test_one_ranking_leaves_no_layer_without_neurons() -> None:
    scores, alive = table([[1.0] * 8, [1000.0] * 8])
    assert one_ranking(2, scores, alive, 5) == [2, 8]
    assert one_ranking(2, scores, alive, 3) == [2, 4]


def test_one_ranking_goes_on_after_a_resume_with_a_larger_unit() -> None:
    scores = torch.arange(48.0).view(2, 24)
    alive = torch.zeros(2, 24, dtype=torch.bool)
    alive[:, :12] = True  # legal in units of 4
    assert one_ranking(8, scores, alive, 12) == [12, 12]
    assert one_ranking(8, scores, alive, 11) == [12, 12]
    # The ends that are no whole unit go first; the lower scores are in the first layer.
    assert one_ranking(8, scores, alive, 10) == [8, 12]
    assert one_ranking(8, scores, alive, 8) == [8, 8]
    alive[0, 12:16] = True  # 16 and 12 live: four go before any eight
    assert one_ranking(8, scores, alive, 12) == [16, 8]


def test_one_ranking_takes_a_full_width_that_is_no_whole_number_of_blocks() -> None:
    """Servers may want larger multiples at the end than training does at the start."""
    scores = torch.arange(20.0).view(2, 10)
    alive = torch.ones(2, 10, dtype=torch.bool)
    assert one_ranking(4, scores, alive, 9) == [8, 10]
    assert one_ranking(4, scores, alive, 8) == [8, 8]
    assert one_ranking(4, scores, alive, 6) == [4, 8]


def test_blocks_are_ranked_by_their_mean() -> None:
    scores, alive = table([[9.0, 9.0, 9.0, 0.0], [9.0, 9.0, 4.0, 4.0]])
    # The last blocks have means 4.5 and 4, smallest members 0 and 4.
    assert one_ranking(2, scores, alive, 3) == [4, 2]


def test_the_schedule_says_how_many_go_and_when() -> None:
    goals = {NEURONS: goal(24, 12, 4), "hidden_size": goal(32, 16, 8), "num_layers": goal(2, 1, 1)}
    alive = {
        NEURONS: torch.ones(2, 24, dtype=torch.bool),
        "hidden_size": torch.ones(32, dtype=torch.bool),
        "num_layers": torch.ones(2, dtype=torch.bool),
    }
    scores = {axis: torch.rand(live.shape) for axis, live in alive.items()}
    method = Scheduled(PruneConfig(), goals)
    nothing = dict.fromkeys(goals, 0.0)
    for removed, due in ((0.0, False), (0.04, False), (0.05, True), (1.0, True)):
        assert method.is_due(alive, nothing | {NEURONS: removed}) is due
    for removed, due in ((0.02, False), (0.04, True)):
        assert method.is_due(alive, nothing | {"hidden_size": removed}) is due
    for scope, halfway in (("layer", [18, 18]), ("global", None)):
        method = Scheduled(PruneConfig(scope=scope), goals)
        due_shares = {NEURONS: 0.5, "hidden_size": 0.25, "num_layers": 1.0}
        counts, memory = method.budget(scores, alive, due_shares, torch.tensor([7.0]))
        assert memory.tolist() == [7.0]
        assert counts["hidden_size"] == [28] and counts["num_layers"] == [1]
        assert sum(counts[NEURONS]) == 36 and counts[NEURONS] == (halfway or counts[NEURONS])
    alive[NEURONS][:, 18:] = False
    assert not method.is_due(alive, nothing | {NEURONS: 0.5})
    # A layer that is gone has no neurons to give, and the others need not give them for it.
    alive[NEURONS][0] = False
    for scope in ("layer", "global"):
        method = Scheduled(PruneConfig(scope=scope), goals)
        assert not method.is_due(alive, nothing | {NEURONS: 0.5})
        counts, _ = method.budget(scores, alive, nothing | {NEURONS: 1.0}, torch.empty(0))
        assert counts[NEURONS] == [0, 12]


def test_importance_needs_no_scale() -> None:
    sums = torch.rand(2, 3, 16, generator=torch.Generator().manual_seed(0))
    method = strategy()
    small, large = (measured(method, sums * s) for s in (1.0, 1024.0))
    assert_close(large, small * 1024.0)
    assert_equal(ranked(large, large >= 0), ranked(small, small >= 0))
