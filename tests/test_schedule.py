"""The curves, against values worked out by hand, and their properties for all configurations."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idea.config import ScheduleConfig
from megatron_idea.schedule import (
    PHASES,
    _rounds_begun,
    crossed,
    gathers_scores,
    learning_rate,
    lr_decay_begins,
    phase,
    phase_ended,
    phase_ends,
    removal_window,
    removed,
)
from megatron_idea.shape import live_count

TOTAL = 2_000_000
PAPER = ScheduleConfig(total_tokens=TOTAL, lr=0.01, min_lr=5e-5, lr_warmup_fraction=0.0)
R = 0.375
CURVES = ("cubic", "linear", "rounds", "one_shot")


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    enlarged = draw(st.integers(0, 100))
    prune = draw(st.integers(0, 100 - enlarged))
    lr = draw(st.floats(1e-6, 1.0))
    return ScheduleConfig(
        total_tokens=draw(st.integers(1, 10**13)),
        lr=lr,
        min_lr=lr * draw(st.floats(0, 1)),
        lr_warmup_fraction=draw(st.floats(0, 0.5)),
        enlarged_fraction=enlarged / 100,
        prune_fraction=prune / 100,
        recover_fraction=(100 - enlarged - prune) / 100,
        prune_warmup_fraction=draw(st.floats(0, 0.9)),
        removal=draw(st.sampled_from(CURVES)),
        rounds=draw(st.integers(1, 30)),
        lr_decay_style=draw(st.sampled_from(("cosine", "WSD", "linear"))),
    )


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, 1e-2), (0.25, 8.54e-3), (0.5, 5.025e-3), (0.75, 1.51e-3), (0.9, 2.93e-4), (1.0, 5e-5)],
)
def test_one_cosine_passes_through_the_papers_points(share: float, expected: float) -> None:
    assert learning_rate(PAPER, int(share * TOTAL)) == pytest.approx(expected, rel=2e-3)


def test_warm_up_is_linear_from_zero_to_the_peak() -> None:
    schedule = ScheduleConfig(total_tokens=1000, lr=0.01, min_lr=0.0, lr_warmup_fraction=0.1)
    assert learning_rate(schedule, 1) == pytest.approx(1e-4)
    assert learning_rate(schedule, 50) == pytest.approx(5e-3)
    assert learning_rate(schedule, 100) == pytest.approx(1e-2)
    # The cosine spans what is left: half of it is over at (100 + 1000) / 2.
    assert learning_rate(schedule, 550) == pytest.approx(5e-3)
    assert learning_rate(schedule, 1000) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("boundary", ["enlarged", "prune"])
def test_the_learning_rate_crosses_each_boundary_by_one_steps_decay(boundary: str) -> None:
    step = TOTAL // 1000
    end = phase_ends(PAPER)[boundary]
    before, at, after = (learning_rate(PAPER, end + d * step) for d in (-1, 0, 1))
    # Steepest fall of the cosine: (pi / 2) (lr - min_lr) per whole run.
    steepest = 1.5708 * (PAPER.lr - PAPER.min_lr) / 1000
    assert 0 < before - at <= steepest
    assert at - after == pytest.approx(before - at, rel=0.02)


def test_restarted_anneals_warms_up_again_and_anneals_again() -> None:
    schedule = ScheduleConfig(
        kind="restarted", total_tokens=1000, lr=0.01, min_lr=5e-5, lr_warmup_fraction=0.1
    )
    assert learning_rate(schedule, 100) == pytest.approx(0.01)
    assert learning_rate(schedule, 500) == pytest.approx(5e-5)
    assert learning_rate(schedule, 550) == pytest.approx(0.005)
    assert learning_rate(schedule, 600) == pytest.approx(0.01)
    assert learning_rate(schedule, 800) == pytest.approx(5.025e-3)
    assert learning_rate(schedule, 1000) == pytest.approx(5e-5)


def styled(style: str, **values: Any) -> ScheduleConfig:
    given = {"total_tokens": 1000, "lr": 0.5, "min_lr": 0.125, "lr_warmup_fraction": 0.1} | values
    return ScheduleConfig(lr_decay_style=style, **given)


@pytest.mark.parametrize(
    ("style", "rates"),
    [
        # At the middle and the end of the warm-up, half-way, before, at and in the decay of WSD.
        ("linear", {50: 0.25, 100: 0.5, 550: 0.3125, 1000: 0.125}),
        ("WSD", {50: 0.25, 100: 0.5, 550: 0.5, 750: 0.5, 875: 0.3125, 1000: 0.125}),
        ("constant", {50: 0.25, 100: 0.5, 550: 0.5, 1000: 0.5}),
    ],
)
def test_each_style_passes_through_values_worked_out_by_hand(
    style: str, rates: dict[int, float]
) -> None:
    schedule = styled(style, lr_wsd_decay_fraction=0.25)
    assert {t: learning_rate(schedule, t) for t in rates} == rates
    # The last step may overshoot.
    assert learning_rate(schedule, 1100) == rates[1000]


@pytest.mark.parametrize(
    ("style", "rates"),
    [
        ("linear", {50: 0.25, 100: 0.5, 300: 0.3125, 500: 0.125}),
        # A quarter of 500 tokens, not of 1000.
        ("WSD", {50: 0.25, 100: 0.5, 375: 0.5, 400: 0.425, 500: 0.125}),
        ("constant", {50: 0.25, 100: 0.5, 500: 0.5}),
    ],
)
def test_each_style_restarts_as_the_same_curve(style: str, rates: dict[int, float]) -> None:
    schedule = styled(style, lr_wsd_decay_fraction=0.25, kind="restarted")
    assert {t: learning_rate(schedule, t) for t in rates} == pytest.approx(rates, rel=1e-15)
    for tokens in range(1, 501):
        assert learning_rate(schedule, tokens + 500) == learning_rate(schedule, tokens)


@pytest.mark.parametrize("kind", ["integrated", "restarted"])
@pytest.mark.parametrize("style", ["cosine", "linear", "WSD", "constant"])
def test_a_rate_rises_to_the_peak_and_falls_to_its_end(style: str, kind: str) -> None:
    schedule = styled(style, kind=kind)
    rates = [learning_rate(schedule, t) for t in range(1, 1001)]
    assert rates == [learning_rate(schedule, t) for t in range(1, 1001)]
    curve = rates if kind == "integrated" else rates[500:]
    assert curve[:100] == sorted(curve[:100]) and curve[99] == max(rates) == 0.5
    assert curve[99:] == sorted(curve[99:], reverse=True)
    assert rates[-1] == (0.5 if style == "constant" else 0.125)


def test_wsd_leaves_its_peak_where_it_says() -> None:
    for schedule in (styled("WSD"), styled("WSD", kind="restarted")):
        for begins in lr_decay_begins(schedule):
            assert (
                learning_rate(schedule, int(begins))
                == 0.5
                > learning_rate(schedule, int(begins) + 1)
            )
    assert lr_decay_begins(styled("WSD")) == [900]
    assert lr_decay_begins(styled("WSD", kind="restarted")) == [450, 950]


@pytest.mark.parametrize(
    ("share_of_window", "share_removed"), [(0.1, 0.271), (0.25, 0.578), (0.5, 0.875), (0.75, 0.984)]
)
def test_cubic_removal_is_front_loaded(share_of_window: float, share_removed: float) -> None:
    start, end = removal_window(PAPER)
    tokens = round(start + share_of_window * (end - start))
    assert removed(PAPER, "cubic", tokens) == pytest.approx(share_removed, abs=1e-3)


def test_nothing_is_removed_while_scores_settle() -> None:
    start, end = removal_window(PAPER)
    assert (start, end) == (1_000_000 + 0.05 * 300_000, 1_300_000)
    assert removed(PAPER, "cubic", 0) == removed(PAPER, "cubic", int(start)) == 0.0
    assert 0.0 < removed(PAPER, "cubic", int(start) + 1) < 1e-3
    assert removed(PAPER, "cubic", end - 1000) < 1.0
    assert removed(PAPER, "cubic", end) == removed(PAPER, "cubic", TOTAL) == 1.0


def test_one_shot_removes_everything_when_the_prune_warm_up_ends() -> None:
    start, _ = removal_window(PAPER)
    assert removed(PAPER, "one_shot", int(start) - 1) == 0.0
    assert removed(PAPER, "one_shot", int(start)) == 1.0


def test_linear_removal_is_the_share_of_the_window() -> None:
    start, end = removal_window(PAPER)
    moments = [start - 1, start, start + (end - start) / 4, start + (end - start) / 2, end]
    assert [removed(PAPER, "linear", int(t)) for t in moments] == [0, 0, 0.25, 0.5, 1]


def rounds(count: int, **fractions: float) -> ScheduleConfig:
    """A window from token 100 to 100 + prune of 1000, in so many rounds."""
    given = {"enlarged_fraction": 0.1, "prune_warmup_fraction": 0.0} | fractions
    return ScheduleConfig(total_tokens=1000, rounds=count, **given)


def events(schedule: ScheduleConfig, curve: str = "rounds", **part: float) -> dict[int, float]:
    """Each token at which something goes -> what is gone then."""
    gone = [removed(schedule, curve, t, **part) for t in range(schedule.total_tokens + 1)]
    return {t: gone[t] for t in range(1, len(gone)) if gone[t] != gone[t - 1]}


def test_rounds_begin_with_the_window_end_with_it_and_move_apart() -> None:
    five = rounds(5, prune_fraction=0.6, recover_fraction=0.3)
    assert events(five) == {100: 0.2, 160: 0.4, 280: 0.6, 460: 0.8, 700: 1.0}
    # Prune : recover is (N - 1) : 2, so round i has 2 i / (N (N + 1)) of the 900 tokens.
    bounds = [*events(five), 1000]
    shares = [after - before for before, after in pairwise(bounds)]
    assert shares == [900 * 2 * i // (5 * 6) for i in range(1, 6)]
    assert sum(shares) == 900


def test_one_round_is_one_shot_and_two_are_the_ends_of_the_window() -> None:
    shares = {"prune_fraction": 0.6, "recover_fraction": 0.3}
    assert events(rounds(1, **shares)) == events(rounds(9, **shares), "one_shot") == {100: 1.0}
    assert events(rounds(2, **shares)) == {100: 0.5, 700: 1.0}


def test_no_round_comes_late_because_a_float_is_not_quite_a_whole_number() -> None:
    # 0.07 x 100 is 7.000000000000001.
    schedule = rounds(
        3, enlarged_fraction=0.0, prune_fraction=0.1, recover_fraction=0.9,
        prune_warmup_fraction=0.07,
    )  # fmt: skip
    assert removal_window(schedule)[0] > 7
    assert events(schedule) == {7: 1 / 3, 38: 2 / 3, 100: 1.0}
    assert events(schedule, "one_shot") == {7: 1.0}
    # At the paper's size, where floats are coarse: each event at its token and not one before.
    for start, span, count in ((10**13 + 1, 3 * 10**12 + 20, 20), (7, 4 * 380, 20), (3, 6, 30)):
        for i in range(1, count + 1):
            at = start - (-i * (i - 1) * span // (count * (count - 1)))
            assert _rounds_begun(count, start, start + span, at) >= i
            assert _rounds_begun(count, start, start + span, at - 1) < i


def test_rounds_of_a_part_of_the_window_stay_in_it() -> None:
    schedule = rounds(3, prune_fraction=0.6, recover_fraction=0.3)
    assert events(schedule, begin=0.5) == {400: 1 / 3, 500: 2 / 3, 700: 1.0}
    assert events(schedule, end=0.5) == {100: 1 / 3, 200: 2 / 3, 400: 1.0}


@given(schedules(), st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_what_is_removed_is_a_share_that_never_falls(
    schedule: ScheduleConfig, shares: list[float]
) -> None:
    tokens = sorted(int(share * schedule.total_tokens) for share in shares)
    gone = [removed(schedule, str(schedule.removal), t) for t in tokens]
    assert gone == sorted(gone) and 0.0 <= gone[0] <= gone[-1] <= 1.0


def test_the_last_live_count_is_the_target() -> None:
    for full, target in ((16384, 6144), (1024, 384), (8192, 3072), (1000, 333)):
        assert live_count(full, target, removed(PAPER, "cubic", TOTAL)) == target


@given(schedules(), st.integers(1, 16384), st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_live_counts_never_grow(schedule: ScheduleConfig, target: int, shares: list[float]) -> None:
    tokens = sorted(int(share * schedule.total_tokens) for share in shares)
    counts = [
        live_count(16384, target, removed(schedule, str(schedule.removal), t)) for t in tokens
    ]
    assert counts == sorted(counts, reverse=True)
    assert all(target <= count <= 16384 for count in counts)


@given(schedules(), st.floats(0, 1))
def test_the_learning_rate_stays_between_zero_and_the_peak(
    schedule: ScheduleConfig, share: float
) -> None:
    rate = learning_rate(schedule, int(share * schedule.total_tokens))
    assert 0 <= rate <= schedule.lr * (1 + 1e-12)


@given(schedules())
def test_the_learning_rate_ends_at_its_minimum(schedule: ScheduleConfig) -> None:
    # With fewer tokens than a warm-up needs there is no cosine to end.
    if schedule.lr_warmup_fraction * schedule.total_tokens + 1 <= schedule.total_tokens:
        end = learning_rate(schedule, schedule.total_tokens)
        assert end == pytest.approx(schedule.min_lr, rel=1e-6, abs=1e-12)


@given(schedules(), st.integers(1, 100))
def test_phases_partition_the_tokens(schedule: ScheduleConfig, parts: int) -> None:
    ends = list(phase_ends(schedule).values())
    assert ends == sorted(ends)
    assert ends[-1] == schedule.total_tokens
    tokens = [max(1, schedule.total_tokens * part // parts) for part in range(parts + 1)]
    order = [PHASES.index(phase(schedule, t)) for t in tokens]
    assert order == sorted(order)


def test_a_phase_owns_its_last_token() -> None:
    ends = phase_ends(PAPER)
    assert phase(PAPER, ends["enlarged"]) == "enlarged"
    assert phase(PAPER, ends["enlarged"] + 1) == "prune"
    assert phase(PAPER, ends["prune"]) == "prune"
    assert phase(PAPER, ends["prune"] + 1) == "recover"


def test_scores_are_gathered_in_the_prune_phase_only() -> None:
    ends = phase_ends(PAPER)
    moments = (1, ends["enlarged"], ends["enlarged"] + 1, ends["prune"], ends["prune"] + 1)
    assert [gathers_scores(PAPER, t) for t in moments] == [False, False, True, True, False]


@given(schedules(), st.integers(1, 60))
def test_every_phase_ends_once_whatever_the_batch(schedule: ScheduleConfig, steps: int) -> None:
    batch = -(-schedule.total_tokens // steps)
    ended = [phase_ended(schedule, s * batch, (s + 1) * batch) for s in range(steps)]
    seen = [name for name in ended if name is not None]
    assert len(seen) == len(set(seen))
    assert seen == sorted(seen, key=PHASES.index)
    assert seen[-1] == "recover" or phase_ends(schedule)["prune"] == schedule.total_tokens


def test_crossed_sees_a_multiple_inside_a_step_and_none_when_off() -> None:
    assert crossed(100, 99, 100)
    assert crossed(100, 50, 350)
    assert not crossed(100, 100, 199)
    assert not crossed(0, 0, 10**9)
