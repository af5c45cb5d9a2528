"""Row and column sums of a flat shard against the whole matrix in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_idea.kernels import MatrixShard, matrix_scores
from megatron_idea.kernels.score import ELEMENTS, REDUCTIONS
from megatron_idea.kernels.swiglu import reference
from megatron_idea.testing import assert_close, assert_equal

CPU = torch.device("cpu")
PER = ("row", "column")
# The maximum of signed values has no neutral element for the shards that do not touch a row.
PAIRS = [pair for pair in itertools.product(ELEMENTS, REDUCTIONS) if pair != ("signed", "max")]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(31 * rows + columns)
    w, g = torch.randn(2, rows, columns, generator=generator)
    return w.to(dtype), g


def second_moment(g: Tensor) -> Tensor:
    """Some v that makes both terms of ``fisher`` count."""
    return (g.roll(1) * 2).square()


def scores_of(
    w: Tensor,
    g: Tensor | None,
    shape: tuple[int, int],
    per: str,
    *names: str,
    lo: int = 0,
    v: Tensor | None = None,
) -> Tensor:
    (scores,) = matrix_scores([MatrixShard(shape, per, w, g, lo, v)], *names, device=CPU)
    return scores


def dense(w: Tensor, g: Tensor, v: Tensor, per: str, element: str, reduction: str) -> Tensor:
    """The definition, over the whole matrix, in fp64."""
    w, g, v = w.double(), g.double(), v.double()
    e = {
        "abs": (w * g).abs(), "squared": (w * g) ** 2, "signed": w * g, "weight": w.abs(),
        "fisher": (w * g - w**2 * v / 2).abs(),
    }[element]  # fmt: skip
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
    v = second_moment(g)
    scores = scores_of(w.flatten(), g.flatten(), shape, per, element, reduction, v=v.flatten())
    assert scores.dtype == torch.float32
    # Products and sums are fp32 also for bf16 weights.
    assert_close(scores, dense(w, g, v, per, element, reduction), tolerance=2e-6)


def test_by_hand() -> None:
    w, g = torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, -1.0, 0.5])
    assert_equal(scores_of(w, g, (2, 2), "row"), torch.tensor([3.0, 5.0]))
    assert_equal(scores_of(w, g, (2, 2), "column"), torch.tensor([4.0, 4.0]))
    assert_equal(scores_of(w, g, (2, 2), "row", "signed"), torch.tensor([-1.0, -1.0]))
    assert_equal(scores_of(w, g, (2, 2), "row", "abs", "max"), torch.tensor([2.0, 3.0]))
    assert_equal(scores_of(w, None, (2, 2), "column", "weight"), torch.tensor([4.0, 6.0]))
    # 1 - 1, -2 - 4, -3 - 9, 2 - 4
    v = torch.tensor([2.0, 2.0, 2.0, 0.5])
    assert_equal(scores_of(w, g, (2, 2), "row", "fisher", v=v), torch.tensor([6.0, 14.0]))
    # Only -2 and -3: the end of the first row, the start of the second.
    assert_equal(scores_of(w[1:3], g[1:3], (2, 2), "row", lo=1), torch.tensor([2.0, 3.0]))


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
    v = second_moment(g)
    parts = torch.stack(
        [
            scores_of(w[lo:hi], g[lo:hi], (rows, columns), per, *pair, lo=lo, v=v[lo:hi])
            for lo, hi in itertools.pairwise(bounds)
        ]
    )
    together = parts.amax(0) if pair[1] == "max" else parts.sum(0)
    whole = scores_of(w, g, (rows, columns), per, *pair, v=v)
    if pair[1] == "max":
        assert_equal(together, whole)
    else:
        assert_close(together, whole, tolerance=2e-6)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("lo", "hi"), [(0, 0), (35, 35), (9, 11), (7, 14), (10, 25)])
def test_a_shard_leaves_what_it_does_not_touch_at_zero(lo: int, hi: int, per: str) -> None:
    # Empty at both ends, inside one row, exactly one row, across three rows.
    w, g = matrix(5, 7)
    scores = scores_of(w.flatten()[lo:hi], g.flatten()[lo:hi], (5, 7), per, lo=lo)
    inside = torch.zeros(35)
    inside[lo:hi] = 1
    inside = inside.view(5, 7)
    touched = inside.any(1 if per == "row" else 0)
    assert not scores[~touched].any()
    assert_close(scores, dense(w * inside, g, g, per, "abs", "sum"), tolerance=2e-6)


def test_inputs_are_left_alone() -> None:
    w, g = (x.flatten() for x in matrix(5, 7))
    v = second_moment(g)
    before = w.clone(), g.clone(), v.clone()
    for pair in PAIRS:
        scores_of(w, g, (5, 7), "row", *pair, v=v)
    assert_equal(w, before[0], "weights")
    assert_equal(g, before[1], "gradients")
    assert_equal(v, before[2], "second moments")


def test_without_second_moments_fisher_is_abs() -> None:
    w, g = (x.flatten() for x in matrix(5, 7))
    for v in (None, torch.zeros(35)):
        assert_equal(
            scores_of(w, g, (5, 7), "row", "fisher", v=v), scores_of(w, g, (5, 7), "row", "abs")
        )


def test_a_non_finite_gradient_stays_visible() -> None:
    w, g = matrix(3, 4)
    g[1, 2] = float("nan")
    for reduction in REDUCTIONS:
        scores = scores_of(w.flatten(), g.flatten(), (3, 4), "row", "abs", reduction)
        assert torch.isfinite(scores).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(0, 7), (7, 0)], ids=str)
def test_a_matrix_without_elements_has_no_score(shape: tuple[int, int]) -> None:
    for axis, per in enumerate(PER):
        scores = scores_of(torch.ones(0), torch.ones(0), shape, per)
        assert_equal(scores, torch.zeros(shape[axis]))


def test_every_matrix_of_a_list_has_its_own_result() -> None:
    shapes = [((5, 7), "row"), ((5, 7), "column"), ((1, 9), "column")]
    held = [(*(x.flatten() for x in matrix(*shape)), shape, per) for shape, per in shapes]
    nothing = MatrixShard((4, 3), "row")
    shards = [MatrixShard(shape, per, w, g) for w, g, shape, per in held]
    *found, empty = matrix_scores([*shards, nothing], device=CPU)
    for scores, one in zip(found, held, strict=True):
        assert_equal(scores, scores_of(*one))
    assert_equal(empty, torch.zeros(4))
    assert matrix_scores([], device=CPU) == []


@pytest.mark.parametrize(
    ("shard", "names"),
    [
        (MatrixShard((2, 2), "row", torch.ones(4), torch.ones(4), lo=1), ()),
        (MatrixShard((2, 2), "row", torch.ones(4), torch.ones(3)), ()),
        (MatrixShard((2, 2), "row", torch.ones(4)), ()),
        (MatrixShard((2, 2), "row", torch.ones(4), torch.ones(4, dtype=torch.int32)), ()),
        (MatrixShard((2, 2), "row", torch.ones(4), torch.ones(4), 0, torch.ones(3)), ("fisher",)),
        (MatrixShard((2, 2), "rows"), ()),
        (MatrixShard((2, 2), "row"), ("l1",)),
        (MatrixShard((2, 2), "row"), ("abs", "mean")),
        (MatrixShard((2, 2), "row"), ("signed", "max")),
    ],
)  # fmt: skip
def test_calls_that_would_read_or_mean_something_else_end_in_an_assertion(
    shard: MatrixShard, names: tuple[str, ...]
) -> None:
    with pytest.raises(AssertionError):
        matrix_scores([shard], *names, device=CPU)


def test_signed_sums_of_down_columns_are_the_gradient_of_the_mask() -> None:
    """sum_j w_ji g_ji over a column of fc2, or over an up row of fc1, is m_i dL/dm_i."""
    generator = torch.Generator().manual_seed(0)
    x, fc1, fc2, dz = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((33, 12), (2 * 6, 12), (12, 6), (33, 12))
    )
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (mask, fc1, fc2)]
    (reference(x @ fc1.t(), mask) @ fc2.t()).backward(dz)
    dm, g1, g2 = (t.grad for t in leaves)
    assert dm is not None and g1 is not None and g2 is not None and bool((dm != 0).all())
    expected = (mask * dm).detach()
    w1, w2 = fc1.detach().flatten(), fc2.detach().flatten()
    rows = scores_of(w1, g1.flatten(), (12, 12), "row", "signed")
    down = scores_of(w2, g2.flatten(), (12, 6), "column", "signed")
    scale = expected.abs().max()
    assert_close(down / scale, expected / scale, "down", 1e-6)
    assert_close(rows[6:] / scale, expected / scale, "up", 1e-6)
    # The gate's is another number.
    assert float(((rows[:6] - expected) / scale).abs().max()) > 1e-2
