"""When layers shrink, and to which widths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_idea.config import AxisGoal
from megatron_idea.shape import LayerShape, Shape, due_shape, round_up


def due_counts(
    widths: tuple[int, ...], live: list[int], multiple: int, block: int, final: bool
) -> tuple[int, ...]:
    """FFN widths after a step, where nothing but neurons goes."""
    axis = "ffn_hidden_size"
    shape = Shape(64, tuple(LayerShape(n, width, 2, 2) for n, width in enumerate(widths)))
    goals = {axis: AxisGoal(max(widths), multiple, multiple, multiple, block)}
    left = due_shape(shape, {axis: live}, range(len(widths)), goals, goals if final else ())
    assert left.with_counts(axis, widths) == shape, "another axis has changed"
    return left.counts(axis)


@st.composite
def prunings(draw: st.DrawFn) -> tuple[int, int, int, list[list[int]]]:
    """(multiple, block, full width, live neurons per layer at each step, never growing)."""
    multiple = draw(st.integers(1, 16))
    block = multiple * draw(st.integers(1, 8))
    full = multiple * draw(st.integers(1, 40))
    layers = draw(st.integers(1, 4))
    steps = draw(st.integers(1, 25))
    falls = draw(
        st.lists(
            st.lists(st.integers(0, full), min_size=steps, max_size=steps),
            min_size=layers,
            max_size=layers,
        )
    )
    live = [sorted(fall, reverse=True) for fall in falls]
    return multiple, block, full, [list(at_step) for at_step in zip(*live, strict=True)]


@given(st.integers(0, 10**6), st.integers(1, 512))
def test_rounding_up_gives_the_smallest_multiple_above_zero(width: int, multiple: int) -> None:
    rounded = round_up(width, multiple)
    assert rounded % multiple == 0
    assert rounded >= max(width, 1)
    assert rounded - multiple < max(width, 1)


@given(prunings())
def test_widths_hold_the_live_neurons_are_legal_and_never_grow(
    pruning: tuple[int, int, int, list[list[int]]],
) -> None:
    multiple, block, full, steps = pruning
    widths = (full,) * len(steps[0])
    for live in steps:
        shrunk = due_counts(widths, live, multiple, block, final=False)
        assert all(n <= s <= w for n, s, w in zip(live, shrunk, widths, strict=True))
        assert all(s % multiple == 0 and s > 0 for s in shrunk)
        widths = shrunk


@given(prunings())
def test_at_most_one_block_is_computed_in_vain_between_compactions(
    pruning: tuple[int, int, int, list[list[int]]],
) -> None:
    multiple, block, full, steps = pruning
    widths = (full,) * len(steps[0])
    for live in steps:
        widths = due_counts(widths, live, multiple, block, final=False)
        assert all(w - n <= block for w, n in zip(widths, live, strict=True))


@given(prunings())
def test_a_compaction_is_worth_a_block_in_some_layer(
    pruning: tuple[int, int, int, list[list[int]]],
) -> None:
    multiple, block, full, steps = pruning
    widths = (full,) * len(steps[0])
    for live in steps:
        shrunk = due_counts(widths, live, multiple, block, final=False)
        assert shrunk == widths or max(w - s for w, s in zip(widths, shrunk, strict=True)) >= block
        widths = shrunk


@given(prunings())
def test_the_end_of_pruning_lands_on_what_the_live_neurons_need(
    pruning: tuple[int, int, int, list[list[int]]],
) -> None:
    multiple, block, full, steps = pruning
    widths = (full,) * len(steps[0])
    for live in steps[:-1]:
        widths = due_counts(widths, live, multiple, block, final=False)
    last = due_counts(widths, steps[-1], multiple, block, final=True)
    assert last == tuple(round_up(n, multiple) for n in steps[-1])
    # Nothing is left to do: a later step does not compact again.
    assert due_counts(last, steps[-1], multiple, block, final=True) == last


def test_by_hand() -> None:
    # Blocks of 16, multiples of 8: nothing is due at 49 (needs 56), one is at 48.
    assert due_counts((64,), [49], 8, 16, final=False) == (64,)
    assert due_counts((64,), [48], 8, 16, final=False) == (48,)
    # One layer is due, so all shrink.
    assert due_counts((64, 64), [48, 50], 8, 16, final=False) == (48, 56)
    assert due_counts((64, 64), [57, 50], 8, 16, final=True) == (64, 56)
    # 24 is no multiple of 16, as TP = 2 wants it after TP = 1: it waits for 16.
    assert due_counts((24,), [22], 16, 16, final=False) == (24,)
    assert due_counts((24,), [16], 16, 16, final=True) == (16,)


def test_all_axes_shrink_when_one_is_due() -> None:
    shape = Shape(64, tuple(LayerShape(n, 32, 4, 2) for n in range(3)))
    goals = {
        "ffn_hidden_size": AxisGoal(32, 16, 8, 8, 16),
        "num_query_groups": AxisGoal(4, 2, 2, 2, 2),
        "hidden_size": AxisGoal(64, 32, 8, 8, 16),
        "num_layers": AxisGoal(3, 2, 1, 1, 1),
    }

    def due(neurons: int, groups: int, channels: int, layers: list[int], *final: str) -> Shape:
        rows = {axis: [0, 0, 0] for axis in ("ffn_hidden_size", "num_query_groups")}
        for layer in layers:
            rows["ffn_hidden_size"][layer], rows["num_query_groups"][layer] = neurons, groups
        return due_shape(shape, {**rows, "hidden_size": [channels]}, layers, goals, final)

    everyone = [0, 1, 2]
    assert due(17, 3, 49, everyone) == shape  # each has less than a block to shed
    assert due(17, 3, 49, everyone, "num_query_groups") == shape  # of which 3 need all 4
    neurons = due(24, 3, 56, everyone, "ffn_hidden_size")
    assert neurons == Shape(56, tuple(LayerShape(n, 24, 4, 2) for n in range(3)))
    groups = due(17, 2, 49, everyone)
    assert groups == Shape(56, tuple(LayerShape(n, 24, 2, 2) for n in range(3)))
    assert due(17, 3, 48, everyone).counts("hidden_size") == (48,)
    # A layer that is gone does not wait, and the others shrink with it.
    assert due(17, 3, 49, [0, 2]) == Shape(56, (LayerShape(0, 24, 4, 2), LayerShape(2, 24, 4, 2)))


@given(prunings(), st.integers(2, 4))
def test_a_resume_with_larger_multiples_goes_on_and_lands_on_them(
    pruning: tuple[int, int, int, list[list[int]]], factor: int
) -> None:
    multiple, block, full, steps = pruning
    larger, full = factor * multiple, factor * full
    widths = (full,) * len(steps[0])
    for index, live in enumerate(steps):
        now = multiple if index < len(steps) // 2 else larger
        shrunk = due_counts(widths, live, now, factor * block, final=False)
        assert all(n <= s <= w for n, s, w in zip(live, shrunk, widths, strict=True))
        # Either the width of before the resume, or legal after it.
        assert all(s == w or s % now == 0 for s, w in zip(shrunk, widths, strict=True))
        widths = shrunk
    # The target is legal after the resume.
    target = tuple(
        min(n // larger * larger or larger, w) for n, w in zip(steps[-1], widths, strict=True)
    )
    assert due_counts(widths, target, larger, factor * block, final=True) == target
