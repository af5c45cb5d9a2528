"""The Triton kernels against fp64, on a GPU or in Triton's interpreter.

Not collected by name: ``test_kernels_triton.py`` runs this file in a process of its own, as the
interpreter must be asked for before a kernel is defined.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from jobs import backward, on_ranks
from torch import Tensor

from megatron_idea.config import Config, replace
from megatron_idea.distributed import ProcessGroups
from megatron_idea.kernels import (
    FfnShard,
    ffn_scores,
    masked_swiglu,
    masked_swiglu_backward,
    score,
    swiglu,
)
from megatron_idea.kernels.score import ELEMENTS, REDUCTIONS
from megatron_idea.testing import assert_close, assert_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = {"implementation": "triton"}
# The interpreter cuts fp32 down to bf16 where a GPU rounds to nearest: up to 1 unit of 2^-7 here.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
WIDTHS = (8, 24, 136, 264)  # less than a tile, less than a warp's row, more than one tile of fp32


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def masks(width: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    ones = torch.ones(width, dtype=dtype, device=DEVICE)
    return {
        "none": None,
        "ones": ones,
        "zeros": ones * 0,
        "random": (torch.arange(width, device=DEVICE) % 3 > 0).to(dtype),
        "soft": torch.linspace(0, 1.5, width, device=DEVICE).to(dtype),
    }


def formula(x: Tensor, mask: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dm in fp64, derivatives written out."""
    gate, up = x.double().chunk(2, dim=-1)
    factor = torch.ones(gate.shape[-1], device=DEVICE) if mask is None else mask
    factor, dy = factor.double(), dy.double()
    sigmoid = 1 / (1 + torch.exp(-gate))
    h = gate * sigmoid * up
    d = dy * factor
    dgate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
    dx = torch.cat([dgate, d * gate * sigmoid], dim=-1)
    return h * factor, dx, (dy * h).reshape(-1, h.shape[-1]).sum(0)


# One token, an odd number, more than one program's rows, sequences of a batch, no token.
@pytest.mark.parametrize("tokens", [(1,), (7,), (33,), (3, 5), (0,)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_the_formulas(
    tokens: tuple[int, ...], width: int, dtype: torch.dtype
) -> None:
    x, dy = draw(*tokens, 2 * width, dtype=dtype), draw(*tokens, width, dtype=dtype)
    names = ["none", "soft"] if tokens != (7,) else ["none", "ones", "zeros", "random", "soft"]
    for name in names:
        mask = masks(width, dtype)[name]
        leaf = x.clone().requires_grad_()
        y = masked_swiglu(leaf, mask, **TRITON)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        expected_y, expected_dx, _ = formula(x, mask, dy)
        assert y.dtype == dx.dtype == dtype
        assert_close(y, expected_y, f"y, mask {name}", TOLERANCE[dtype])
        assert_close(dx, expected_dx, f"dx, mask {name}", TOLERANCE[dtype])


@pytest.mark.parametrize("width", [24, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_h_and_dm_come_with_the_backward(width: int, dtype: torch.dtype) -> None:
    # 130 rows: three programs add to dm.
    x, dy = draw(130, 2 * width, dtype=dtype), draw(130, width, dtype=dtype)
    mask = masks(width, torch.float32)["random"]
    dx, h, dm = masked_swiglu_backward(dy, x, mask, with_h=True, with_dm=True, **TRITON)
    expected_h, expected_dx, expected_dm = formula(x, mask, dy)
    assert h is not None and dm is not None and dm.dtype == torch.float32
    assert_close(dx, expected_dx, "dx", TOLERANCE[dtype])
    assert_close(h, expected_h, "h", TOLERANCE[dtype])
    assert_close(dm, expected_dm, "dm", 5e-6)  # 130 terms of either sign
    assert bool((dm[mask == 0] != 0).all()), "a removed neuron has a dm too"
    again = masked_swiglu_backward(dy, x, mask, with_h=True, with_dm=True, **TRITON)
    for first, second, name in zip((dx, h, dm), again, ("dx", "h", "dm"), strict=True):
        assert_equal(first, second, f"{name}, run twice")


def test_a_mask_that_wants_a_gradient_gets_dm() -> None:
    x, dy = draw(3, 5, 48), draw(3, 5, 24)
    mask = masks(24, torch.float32)["soft"]
    assert mask is not None
    y = masked_swiglu(x, mask.requires_grad_(), **TRITON)
    (dm,) = torch.autograd.grad(y, mask, dy)
    assert_close(dm, formula(x, mask.detach(), dy)[2], "dm", 5e-6)


def test_no_token_leaves_dm_at_zero() -> None:
    dx, h, dm = masked_swiglu_backward(
        draw(0, 24), draw(0, 48), None, with_h=True, with_dm=True, **TRITON
    )
    assert h is not None and dm is not None
    assert (dx.shape, h.shape) == ((0, 48), (0, 24))
    assert_equal(dm, torch.zeros(24, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_masked_neuron_is_exactly_zero_whatever_comes_in(dtype: torch.dtype) -> None:
    x, dy = draw(7, 2 * 136, dtype=dtype) * 1e4, draw(7, 136, dtype=dtype)
    mask = masks(136, dtype)["random"]
    assert mask is not None
    y = masked_swiglu(x, mask, **TRITON)
    dx, h, _ = masked_swiglu_backward(dy, x, mask, with_h=True, **TRITON)
    dead = mask == 0
    assert h is not None
    assert not y[:, dead].any() and not h[:, dead].any()
    assert not dx[:, torch.cat([dead, dead])].any()
    assert bool(y[:, ~dead].any(dim=0).all())


@pytest.mark.parametrize("dead", [range(128, 256), range(264), range(0)], ids=str)
def test_skipping_changes_no_bit(dead: range) -> None:
    # 128 neurons are a block in fp32; the third block has 8.
    x, dy, mask = draw(7, 528), draw(7, 264), torch.ones(264, device=DEVICE)
    mask[list(dead)] = 0
    leaf = x.clone().requires_grad_()
    outcomes = []
    for skip in (False, True):
        y = masked_swiglu(leaf, mask, skip_blocks=skip, **TRITON)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        h = masked_swiglu_backward(dy, x, mask, with_h=True, skip_blocks=skip, **TRITON).h_TF
        outcomes.append((y, dx, h))
    for whole, skipped, name in zip(*outcomes, ("y", "dx", "h"), strict=True):
        assert_equal(skipped, whole, name)


def test_rows_may_lie_apart() -> None:
    x, dy = draw(7, 2 * 136), draw(7, 136)
    mask = masks(136, torch.float32)["soft"]
    wide_x, wide_dy = draw(7, 300), draw(7, 200)
    wide_x[:, 5 : 5 + 272], wide_dy[:, 3 : 3 + 136] = x, dy
    apart_x, apart_dy = wide_x[:, 5 : 5 + 272], wide_dy[:, 3 : 3 + 136]
    assert_equal(masked_swiglu(apart_x, mask, **TRITON), masked_swiglu(x, mask, **TRITON))
    expected = masked_swiglu_backward(dy, x, mask, **TRITON).dx_T2F
    assert_equal(masked_swiglu_backward(apart_dy, apart_x, mask, **TRITON).dx_T2F, expected)
    leaf = x.clone().requires_grad_()
    masked_swiglu(leaf, mask, **TRITON).sum().backward()  # its gradient has strides (0, 0)
    ones = torch.ones_like(dy)
    assert_equal(leaf.grad, masked_swiglu_backward(ones, x, mask, **TRITON).dx_T2F)


def test_in_place_writes_the_same_over_x_and_forbids_a_second_backward() -> None:
    x, dy = draw(7, 2 * 136), draw(7, 136)
    mask = masks(136, torch.float32)["soft"]
    expected = masked_swiglu_backward(dy, x, mask, **TRITON).dx_T2F
    overwritten = x.clone()
    dx = masked_swiglu_backward(dy, overwritten, mask, inplace=True, **TRITON).dx_T2F
    assert dx.data_ptr() == overwritten.data_ptr()
    assert_equal(dx, expected)
    middle = x.clone().requires_grad_() * 1
    y = masked_swiglu(middle, mask, inplace_backward=True, **TRITON)
    (dx,) = torch.autograd.grad(y, middle, dy, retain_graph=True)
    assert_equal(dx, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, middle, dy)


def test_tensor_parallel_parts_are_the_whole() -> None:
    x, dy = draw(7, 2 * 264), draw(7, 264)
    mask = masks(264, torch.float32)["soft"]
    assert mask is not None
    y = masked_swiglu(x, mask, **TRITON)
    dx, _, dm = masked_swiglu_backward(dy, x, mask, with_dm=True, **TRITON)
    assert dm is not None
    for rank in range(3):
        part = slice(rank * 88, rank * 88 + 88)
        gate, up = (t[:, part] for t in x.chunk(2, dim=-1))
        mine = torch.cat([gate, up], dim=-1)
        assert_equal(masked_swiglu(mine, mask[part], **TRITON), y[:, part], "y")
        my_dx, _, my_dm = masked_swiglu_backward(
            dy[:, part], mine, mask[part], with_dm=True, **TRITON
        )
        for half in range(2):
            theirs = dx[:, half * 264 :][:, part]
            assert_equal(my_dx[:, half * 88 : half * 88 + 88], theirs, "dx")
        assert_equal(my_dm, dm[part], "dm")


def test_a_row_beyond_two_to_the_31st_element() -> None:
    """Rows are 2^30 elements apart, in 4 GB that are not touched but at three places."""
    rows, apart = 3, 2**30
    try:
        store = torch.empty((rows - 1) * apart + 32, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"not enough address space: {error}")
    far = store.as_strided((rows, 16), (apart, 1))
    x, dy = draw(rows, 16, dtype=torch.bfloat16), draw(rows, 8, dtype=torch.bfloat16)
    far.copy_(x)
    assert_equal(masked_swiglu(far, **TRITON), masked_swiglu(x, **TRITON), "y")
    expected = masked_swiglu_backward(dy, x, **TRITON).dx_T2F
    far_dy = store[16:].as_strided((rows, 8), (apart, 1))
    far_dy.copy_(dy)
    assert_equal(masked_swiglu_backward(far_dy, far, inplace=True, **TRITON).dx_T2F, expected)


PAIRS = [pair for pair in itertools.product(ELEMENTS, REDUCTIONS) if pair != ("signed", "max")]


def ffn(f: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w1, g1, w2, g2, flat."""
    size = f * hidden
    return (
        draw(2 * size, dtype=dtype),
        draw(2 * size + 1)[1:].clone(),
        draw(size, dtype=dtype),
        draw(size + 1)[1:].clone(),
    )


def cut(
    tensors: tuple[Tensor, ...], f: int, hidden: int, fc1: tuple[int, int], fc2: tuple[int, int]
) -> FfnShard:
    w1, g1, w2, g2 = tensors
    (lo1, hi1), (lo2, hi2) = fc1, fc2
    return FfnShard(f, hidden, w1[lo1:hi1], g1[lo1:hi1], lo1, w2[lo2:hi2], g2[lo2:hi2], lo2)


def whole(tensors: tuple[Tensor, ...], f: int, hidden: int) -> FfnShard:
    return cut(tensors, f, hidden, (0, 2 * f * hidden), (0, f * hidden))


def definition(
    tensors: tuple[Tensor, ...], f: int, hidden: int, element: str, reduction: str
) -> Tensor:
    """[3, f] in fp64, from the matrices."""
    w1, g1, w2, g2 = (t.double() for t in tensors)
    e = torch.cat([(w1 * g1).view(2, f, hidden), (w2 * g2).view(hidden, f).t()[None]])
    e = {"abs": e.abs(), "squared": e**2, "signed": e}[element]
    if reduction == "max":
        return e.amax(-1)
    return (e**2 if reduction == "sum_of_squares" else e).sum(-1)


def assert_scores(actual: Tensor, expected: Tensor) -> None:
    """Relative to the largest: signed sums cancel."""
    scale = expected.abs().max().clamp(min=1e-30)
    assert_close(actual.double() / scale, expected.double() / scale, tolerance=1e-6)


# Several layers of different widths; 130 rows of fc2 are two chunks of partial sums.
@pytest.mark.parametrize(
    ("dtype", "element", "reduction"),
    [(torch.float32, *pair) for pair in PAIRS] + [(torch.bfloat16, "abs", "sum")],
    ids=str,
)
def test_scores_are_the_definition(dtype: torch.dtype, element: str, reduction: str) -> None:
    sizes = [(8, 130), (24, 130)]
    tensors = [ffn(f, hidden, dtype) for f, hidden in sizes]
    layers = [whole(t, *size) for t, size in zip(tensors, sizes, strict=True)]
    scores = ffn_scores(layers, element, reduction, **TRITON)
    for one, t, size in zip(scores, tensors, sizes, strict=True):
        assert one.dtype == torch.float32
        assert_scores(one, definition(t, *size, element, reduction))
    for first, second in zip(scores, ffn_scores(layers, element, reduction, **TRITON), strict=True):
        assert_equal(second, first, "run twice")


# Row length 48 and f 136 are aligned, 45 and 24 are not; cuts at multiples of 16 and anywhere, on
# a row's border, inside a row, with an empty shard.
@pytest.mark.parametrize(
    ("f", "hidden", "cuts"),
    [
        (32, 48, ((0, 512, 1536, 3072), (0, 512, 1024, 1536))),
        (24, 45, ((0, 45, 45, 1000, 2160), (0, 7, 24, 500, 1080))),
        (24, 48, ((0, 3, 2304), (0, 1, 1152))),
    ],
)
@pytest.mark.parametrize(("element", "reduction"), [("abs", "sum"), ("abs", "max")])
def test_shards_add_up_to_the_whole(
    f: int, hidden: int, cuts: tuple[tuple[int, ...], ...], element: str, reduction: str
) -> None:
    tensors = ffn(f, hidden, torch.bfloat16)
    parts = [
        ffn_scores([cut(tensors, f, hidden, *ranges)], element, reduction, **TRITON)[0]
        for ranges in zip(itertools.pairwise(cuts[0]), itertools.pairwise(cuts[1]), strict=True)
    ]
    together = torch.stack(parts)
    together = together.amax(0) if reduction == "max" else together.sum(0)
    assert_scores(together, definition(tensors, f, hidden, element, reduction))


def test_what_is_elsewhere_is_zero() -> None:
    tensors = ffn(24, 48, torch.float32)
    expected = definition(tensors, 24, 48, "abs", "sum")
    w1, g1, w2, g2 = tensors
    layers = [
        FfnShard(24, 48, w1=w1, g1=g1),
        FfnShard(8, 48),
        FfnShard(24, 48, w2=w2, g2=g2),
        FfnShard(24, 48, w1[:0], g1[:0], 96, w2[:0], g2[:0], 5),
    ]
    first, nothing, last, empty = ffn_scores(layers, **TRITON)
    assert_scores(first, torch.cat([expected[:2], torch.zeros(1, 24, device=DEVICE)]))
    assert_scores(last, torch.cat([torch.zeros(2, 24, device=DEVICE), expected[2:]]))
    assert not nothing.any() and not empty.any()
    (alone,) = ffn_scores([FfnShard(8, 48)], device=torch.device(DEVICE), **TRITON)
    assert_equal(alone, torch.zeros(3, 8, device=DEVICE))


@pytest.mark.parametrize("history", [0.0, 0.9, 1.0])
def test_the_moving_average_moves(history: float) -> None:
    layers = [whole(ffn(f, 48, torch.float32), f, 48) for f in (8, 136)]
    before = [draw(3, layer.f) for layer in layers]
    averages = [b.clone() for b in before]
    scores = ffn_scores(layers, averages=averages, history=history, **TRITON)
    for average, old, value in zip(averages, before, scores, strict=True):
        expected = history * old.double() + (1 - history) * value.double()
        assert_close(average, expected, tolerance=1e-6)


def test_a_non_finite_gradient_stays_visible() -> None:
    for reduction in REDUCTIONS:
        w1, g1, w2, g2 = ffn(8, 20, torch.float32)
        g1[3 * 20 + 5], g2[2 * 8 + 6] = float("nan"), float("inf")
        (scores,) = ffn_scores([whole((w1, g1, w2, g2), 8, 20)], "abs", reduction, **TRITON)
        broken = [(matrix, c) for matrix, c in (~torch.isfinite(scores)).nonzero().tolist()]
        assert broken == [(0, 3), (2, 6)], reduction


def test_signed_scores_of_up_and_down_are_dm() -> None:
    """sum_j W_down g = sum_j W_up g = dm; what the gate row sums to is another number."""
    tokens, f, hidden = 33, 24, 48
    inputs, dz = draw(tokens, hidden), draw(tokens + 1, hidden)[1:]
    fc1, fc2 = draw(2 * f, hidden).requires_grad_(), draw(hidden, f).requires_grad_()
    mask = torch.ones(f, device=DEVICE, requires_grad=True)
    z = masked_swiglu(inputs @ fc1.t(), mask, **TRITON) @ fc2.t()
    z.backward(dz)
    w1, g1, w2, g2 = (t.detach().flatten() for t in (fc1, fc1.grad, fc2, fc2.grad) if t is not None)
    (scores,) = ffn_scores([whole((w1, g1, w2, g2), f, hidden)], "signed", **TRITON)
    assert mask.grad is not None
    gate, up, down = scores
    scale = mask.grad.abs().max()
    assert_close(up / scale, mask.grad / scale, "up", 5e-6)
    assert_close(down / scale, mask.grad / scale, "down", 5e-6)
    assert float(((gate - up) / scale).abs().max()) > 1e-2


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object, **__: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(swiglu, "launch", launch)
    monkeypatch.setattr(score, "launch", launch)


X, DY = torch.ones(3, 16, device=DEVICE), torch.ones(3, 8, device=DEVICE)
MASK = torch.ones(8, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked_swiglu(X.half(), **TRITON), "x is torch.float16; legal: torch.bfloat16, t"),
        (lambda: masked_swiglu(X.double(), **TRITON), "x is torch.float64; legal: torch.bfloat16,"),
        (lambda: masked_swiglu(X[:, :15], **TRITON), "must be even, not 15"),
        (lambda: masked_swiglu(X[:, ::2], **TRITON), r"x has strides \(16, 2\); legal: 1 in"),
        (lambda: masked_swiglu(X, MASK[:7], **TRITON), r"mask is torch.float32 \(7,\); legal: .*8"),
        (lambda: masked_swiglu(X, MASK.bool(), **TRITON), "mask is torch.bool"),
        (lambda: masked_swiglu(X, MASK.bfloat16(), **TRITON), "mask is torch.bfloat16"),
        (lambda: masked_swiglu(X, MASK.to("meta"), **TRITON), "mask is on meta; legal"),
        (
            lambda: masked_swiglu(X[:1].expand(3, 16), inplace_backward=True, **TRITON),
            r"do not overlap, 16 or more apart, not strides \(0, 1\)",
        ),
        (lambda: masked_swiglu_backward(DY[:2], X, **TRITON), r"\(2, 8\); legal: .* \(3, 8\)"),
        (lambda: masked_swiglu_backward(DY.bfloat16(), X, **TRITON), "dy is torch.bfloat16"),
        (lambda: masked_swiglu_backward(DY.to("meta"), X, **TRITON), "dy is on meta; legal"),
        (lambda: masked_swiglu_backward(DY.t().contiguous().t(), X, **TRITON), "dy has strides"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_before_a_launch(
    no_launch: None, call: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_shards_that_do_not_fit_are_an_error_before_a_launch(no_launch: None) -> None:
    tensors = ffn(8, 20, torch.float32)
    good, other = whole(tensors, 8, 20), whole(ffn(8, 24, torch.float32), 8, 24)
    narrow = whole(ffn(8, 20, torch.bfloat16), 8, 20)
    w1, g1, *_ = tensors
    apart = dataclasses.replace(good, w1=w1.repeat_interleave(2)[::2])
    for layers, message in (
        ([dataclasses.replace(good, lo1=1)], r"shard \[1, 321\) is outside the 16 x 20 matrix"),
        ([dataclasses.replace(good, lo2=-1)], r"shard \[-1, 159\) is outside the 20 x 8 matrix"),
        ([dataclasses.replace(good, w1=w1[1:])], r"flat and equally long, not \[319\], \[320\]"),
        ([dataclasses.replace(good, w1=w1.view(16, 20))], "flat and equally long"),
        ([dataclasses.replace(good, g1=g1.to("meta"))], "and g on meta; legal: the same device"),
        ([dataclasses.replace(good, g1=g1.bfloat16())], "gradients are torch.bfloat16, .*; legal"),
        ([dataclasses.replace(good, w1=w1.half())], "weights are torch.float16, .*; legal: all"),
        ([good, narrow], "weights are torch.bfloat16, torch.float32; legal: all"),
        ([good, other], r"hidden sizes differ: \[20, 24\]; legal: one"),
        ([apart], "a shard has stride 2; legal: 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ffn_scores(layers, **TRITON)


@on_ranks(1)
def test_a_model_trains_and_scores_as_with_the_reference(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron_idea.optim import assemble, update
    from megatron_idea.prune.pruner import build_strategy
    from megatron_idea.prune.score import ScoreTracker

    curves: dict[str, list[float]] = {}
    scores: dict[str, list[Tensor]] = {}
    for implementation in ("triton", "reference"):
        chosen = replace(config, training={"kernel_implementation": implementation})
        trainable = assemble(chosen, groups, [24, 16], initialize=True)
        for _, mlp in trainable.mlps:
            mlp.set_mask(torch.arange(mlp.width, device=groups.device) % 3 > 0)
        tracker = ScoreTracker(trainable.mlps, build_strategy(chosen), 0.9)
        curve = curves[implementation] = []
        for step in range(6):
            backward(trainable, seed=step)
            scores[implementation] = tracker.observe(trainable)
            curve.append(update(trainable.optimizer, chosen, 1e-2))
    assert len(set(curves["triton"])) == 6
    assert_close(curves["triton"], curves["reference"], "gradient norms", tolerance=1e-5)
    for ours, theirs in zip(scores["triton"], scores["reference"], strict=True):
        assert_close(ours / theirs.max(), theirs / theirs.max(), "scores", tolerance=1e-4)
        assert not ours[:, ::3].any() and bool(ours[:, 1::3].all())
