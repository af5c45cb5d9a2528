"""Row and column sums of a flat shard against the whole matrix in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_idea.kernels import matrix_scores
from megatron_idea.kernels.score import ELEMENTS, REDUCTIONS
from megatron_idea.testing import assert_close, assert_equal

PER = ("row", "column")
# The maximum of signed values has no neutral element for the shards that do not touch a row.
PAIRS = [pair for pair in itertools.product(ELEMENTS, REDUCTIONS) if pair != ("signed", "max")]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(31 * rows + columns)
    w, g = torch.randn(2, rows, columns, generator=generator)
    return w.to(dtype), g


def dense(w: Tensor, g: Tensor, per: str, element: str, reduction: str) -> Tensor:
    """The definition, over the whole matrix, in fp64."""
    e = w.double() * g.double()
    e = {"abs": e.abs(), "squared": e**2, "signed": e}[element]
    axis = 1 if per == "row" else 0
    if reduction == "max":
        return e.amax(axis)
    return (e**2 if reduction == "sum_of_squares" else e).sum(axis)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("element", "reduction"), PAIRS)
@pytest.mark.parametrize("shape", [(5, 7), (1, 9), (9, 1), (1, 1), (64, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_matrix_gives_the_definition(
    shape: tuple[int, int], element: str, reduction: str, per: str, dtype: torch.dtype
) -> None:
    w, g = matrix(*shape, dtype)
    scores = matrix_scores(w.flatten(), g.flatten(), 0, shape, per, element, reduction)
    assert scores.dtype == torch.float32
    # Products and sums are fp32 also for bf16 weights.
    assert_close(scores, dense(w, g, per, element, reduction), tolerance=2e-6)


def test_by_hand() -> None:
    w, g = torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, -1.0, 0.5])
    assert_equal(matrix_scores(w, g, 0, (2, 2), "row"), torch.tensor([3.0, 5.0]))
    assert_equal(matrix_scores(w, g, 0, (2, 2), "column"), torch.tensor([4.0, 4.0]))
    assert_equal(matrix_scores(w, g, 0, (2, 2), "row", "signed"), torch.tensor([-1.0, -1.0]))
    assert_equal(matrix_scores(w, g, 0, (2, 2), "row", "abs", "max"), torch.tensor([2.0, 3.0]))
    # Only -2 and -3: the end of the first row, the start of the second.
    assert_equal(matrix_scores(w[1:3], g[1:3], 1, (2, 2), "row"), torch.tensor([2.0, 3.0]))


@st.composite
def sharded_matrices(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    cuts = draw(st.lists(st.integers(0, rows * columns), max_size=6))
    return rows, columns, [0, *sorted(cuts), rows * columns]


@settings(deadline=None)
@given(sharded_matrices(), st.sampled_from(PER), st.sampled_from(PAIRS))
def test_shards_add_up_to_the_whole_wherever_it_is_cut(
    sharded: tuple[int, int, list[int]], per: str, pair: tuple[str, str]
) -> None:
    rows, columns, bounds = sharded
    w, g = (x.flatten() for x in matrix(rows, columns))
    parts = torch.stack(
        [
            matrix_scores(w[lo:hi], g[lo:hi], lo, (rows, columns), per, *pair)
            for lo, hi in itertools.pairwise(bounds)
        ]
    )
    together = parts.amax(0) if pair[1] == "max" else parts.sum(0)
    whole = matrix_scores(w, g, 0, (rows, columns), per, *pair)
    if pair[1] == "max":
        assert_equal(together, whole)
    else:
        assert_close(together, whole, tolerance=2e-6)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("lo", "hi"), [(0, 0), (35, 35), (9, 11), (7, 14), (10, 25)])
def test_a_shard_leaves_what_it_does_not_touch_at_zero(lo: int, hi: int, per: str) -> None:
    # Empty at both ends, inside one row, exactly one row, across three rows.
    w, g = matrix(5, 7)
    scores = matrix_scores(w.flatten()[lo:hi], g.flatten()[lo:hi], lo, (5, 7), per)
    inside = torch.zeros(35)
    inside[lo:hi] = 1
    inside = inside.view(5, 7)
    touched = inside.any(1 if per == "row" else 0)
    assert not scores[~touched].any()
    assert_close(scores, dense(w * inside, g, per, "abs", "sum"), tolerance=2e-6)


def test_inputs_are_left_alone() -> None:
    w, g = (x.flatten() for x in matrix(5, 7))
    before = w.clone(), g.clone()
    for pair in PAIRS:
        matrix_scores(w, g, 0, (5, 7), "row", *pair)
    assert_equal(w, before[0], "weights")
    assert_equal(g, before[1], "gradients")


def test_a_non_finite_gradient_stays_visible() -> None:
    w, g = matrix(3, 4)
    g[1, 2] = float("nan")
    for reduction in REDUCTIONS:
        scores = matrix_scores(w.flatten(), g.flatten(), 0, (3, 4), "row", "abs", reduction)
        assert torch.isfinite(scores).tolist() == [True, False, True]


@pytest.mark.parametrize(("lo", "n"), [(-1, 4), (33, 4), (36, 0)])
def test_a_shard_outside_the_matrix_is_an_error(lo: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"shard \[{lo}, {lo + n}\) is outside the 5 x 7 matrix"):
        matrix_scores(torch.ones(n), torch.ones(n), lo, (5, 7), "row")


@pytest.mark.parametrize(("w", "g"), [((4,), (3,)), ((2, 2), (4,)), ((2, 2), (2, 2))], ids=str)
def test_shards_that_are_not_flat_or_not_equally_long_are_an_error(
    w: tuple[int, ...], g: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="flat and equally long"):
        matrix_scores(torch.ones(w), torch.ones(g), 0, (2, 2), "row")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("rows",), "per is 'rows'; legal values: row, column"),
        (("row", "l1"), "element is 'l1'; legal values: abs, squared, signed"),
        (("row", "abs", "mean"), "reduction is 'mean'; legal values: sum, sum_of_squares, max"),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_the_legal_ones(
    names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        matrix_scores(torch.ones(4), torch.ones(4), 0, (2, 2), *names)


@pytest.mark.parametrize("per", PER)
def test_the_maximum_of_signed_values_is_refused(per: str) -> None:
    with pytest.raises(ValueError, match="'signed' has no 'max'"):
        matrix_scores(-torch.ones(4), torch.ones(4), 0, (2, 2), per, "signed", "max")
