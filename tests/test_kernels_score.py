"""Row and column sums of a flat shard against the whole matrix in fp64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_idea.kernels import FfnShard, ffn_scores, matrix_scores
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


@pytest.mark.parametrize("which", [0, 1], ids=["w", "g"])
def test_integers_are_an_error_that_says_what_is_legal(which: int) -> None:
    shards = [torch.ones(4), torch.ones(4)]
    shards[which] = shards[which].int()
    with pytest.raises(ValueError, match=f"{'wg'[which]} is torch.int32; legal: a floating-point"):
        matrix_scores(*shards, 0, (2, 2), "row")


@pytest.mark.parametrize("shape", [(0, 7), (7, 0)], ids=str)
def test_a_matrix_without_elements_has_no_score(shape: tuple[int, int]) -> None:
    for axis, per in enumerate(PER):
        scores = matrix_scores(torch.ones(0), torch.ones(0), 0, shape, per)
        assert_equal(scores, torch.zeros(shape[axis]))


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


def ffn(f: int, hidden: int) -> FfnShard:
    """All of an FFN."""
    (w1, g1), (w2, g2) = matrix(2 * f, hidden), matrix(hidden, f)
    return FfnShard(
        f, hidden, w1.flatten(), g1.flatten(), w2=w2.flatten(), g2=g2.flatten()
    )  # fmt: skip


def test_an_ffn_is_gate_up_and_down() -> None:
    layer = ffn(5, 7)
    assert layer.w1 is not None and layer.g1 is not None
    assert layer.w2 is not None and layer.g2 is not None
    scores, elsewhere = ffn_scores([layer, FfnShard(3, 7)])
    assert_equal(scores[:2].flatten(), matrix_scores(layer.w1, layer.g1, 0, (10, 7), "row"))
    assert_equal(scores[2], matrix_scores(layer.w2, layer.g2, 0, (7, 5), "column"))
    assert_equal(elsewhere, torch.zeros(3, 3))
    assert ffn_scores([], device=torch.device("cpu")) == []


@pytest.mark.parametrize("history", [0.0, 0.9, 1.0])
def test_the_moving_average_moves(history: float) -> None:
    before = torch.rand(3, 5)
    average = before.clone()
    (scores,) = ffn_scores([ffn(5, 7)], averages=[average], history=history)
    assert_close(average, history * before + (1 - history) * scores)


def test_ffns_that_do_not_fit_are_an_error() -> None:
    whole = ffn(5, 7)
    for layer, message in (
        (dataclasses.replace(whole, lo1=1), r"shard \[1, 71\) is outside the 10 x 7 matrix"),
        (dataclasses.replace(whole, lo2=-1), r"shard \[-1, 34\) is outside the 7 x 5 matrix"),
        (dataclasses.replace(whole, g2=None), "fc2 of layer 0 has only one of weight and gradient"),
        (dataclasses.replace(whole, g1=torch.ones(70, device="meta")), "w is on cpu and g on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            ffn_scores([layer])
    with pytest.raises(ValueError, match="say on which device"):
        ffn_scores([FfnShard(3, 7)])
    with pytest.raises(ValueError, match="legal: all on meta"):
        ffn_scores([whole], device=torch.device("meta"))
    with pytest.raises(ValueError, match=r"average is .* \(3, 4\); legal: torch.float32 \(3, 5\)"):
        ffn_scores([whole], averages=[torch.zeros(3, 4)])
    with pytest.raises(
        ValueError, match=r"average is torch.bfloat16 \(3, 5\); legal: torch.float32"
    ):
        ffn_scores([whole], averages=[torch.zeros(3, 5, dtype=torch.bfloat16)])
    with pytest.raises(
        ValueError, match=r"average has strides \(1, 3\); legal: contiguous \(5, 1\)"
    ):
        ffn_scores([whole], averages=[torch.zeros(5, 3).t()])
    with pytest.raises(ValueError, match="2 averages for 1 layers; legal: one each"):
        ffn_scores([whole], averages=[torch.zeros(3, 5)] * 2)
    with pytest.raises(ValueError, match="implementation is 'triton'"):
        ffn_scores([whole], implementation="triton")
    with pytest.raises(ValueError, match="element is 'l1'"):
        ffn_scores([whole], "l1")
