"""The Triton kernels against fp64, on a GPU or in Triton's interpreter.

Not collected by name: ``test_kernels_triton.py`` runs this file in a process of its own, as the
interpreter must be asked for before a kernel is defined.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from jobs import backward, ffn_shape, on_ranks
from torch import Tensor

from megatron_idea.config import Config, replace
from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.kernels import MatrixShard, masked_swiglu, matrix_scores, score
from megatron_idea.kernels.score import ELEMENTS, REDUCTIONS
from megatron_idea.testing import assert_close, assert_equal

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
TRITON = {"implementation": "triton"}
# The interpreter cuts fp32 down to bf16 where a GPU rounds to nearest: up to 1 unit of 2^-7 here.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 if DEVICE.type == "cuda" else 2**-7}
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


def value_and_gradient(
    x: Tensor, mask: Tensor | None, dy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y, dx; without ``dy`` of a sum, whose gradient has strides (0, 0)."""
    leaf = x.detach().requires_grad_()
    y = masked_swiglu(leaf, mask, **TRITON)
    (dx,) = torch.autograd.grad(y if dy is not None else y.sum(), leaf, dy)
    return y.detach(), dx


def formula(x: Tensor, mask: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y, dx in fp64, derivatives written out."""
    gate, up = x.double().chunk(2, dim=-1)
    factor = torch.ones(gate.shape[-1], device=DEVICE) if mask is None else mask
    factor, dy = factor.double(), dy.double()
    sigmoid = 1 / (1 + torch.exp(-gate))
    h = gate * sigmoid * up
    d = dy * factor
    dgate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
    return h * factor, torch.cat([dgate, d * gate * sigmoid], dim=-1)


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
        y, dx = value_and_gradient(x, mask, dy)
        expected_y, expected_dx = formula(x, mask, dy)
        assert y.dtype == dx.dtype == dtype
        assert_close(y, expected_y, f"y, mask {name}", TOLERANCE[dtype])
        assert_close(dx, expected_dx, f"dx, mask {name}", TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_masked_neuron_is_exactly_zero_whatever_comes_in(dtype: torch.dtype) -> None:
    x, dy = draw(7, 2 * 136, dtype=dtype) * 1e4, draw(7, 136, dtype=dtype)
    mask = masks(136, dtype)["random"]
    assert mask is not None
    y, dx = value_and_gradient(x, mask, dy)
    dead = mask == 0
    assert not y[:, dead].any()
    assert not dx[:, torch.cat([dead, dead])].any()
    assert bool(y[:, ~dead].any(dim=0).all())


def test_rows_may_lie_apart() -> None:
    x, dy = draw(7, 2 * 136), draw(7, 136)
    mask = masks(136, torch.float32)["soft"]
    wide_x, wide_dy = draw(7, 300), draw(7, 200)
    wide_x[:, 5 : 5 + 272], wide_dy[:, 3 : 3 + 136] = x, dy
    apart = value_and_gradient(wide_x[:, 5 : 5 + 272], mask, wide_dy[:, 3 : 3 + 136])
    for ours, expected in zip(apart, value_and_gradient(x, mask, dy), strict=True):
        assert_equal(ours, expected)
    of_a_sum = value_and_gradient(x, mask)[1]
    assert_equal(of_a_sum, value_and_gradient(x, mask, torch.ones_like(dy))[1])


def test_tensor_parallel_parts_are_the_whole() -> None:
    x, dy = draw(7, 2 * 264), draw(7, 264)
    mask = masks(264, torch.float32)["soft"]
    assert mask is not None
    y, dx = value_and_gradient(x, mask, dy)
    for rank in range(3):
        part = slice(rank * 88, rank * 88 + 88)
        mine = torch.cat([half[:, part] for half in x.chunk(2, dim=-1)], dim=-1)
        my_y, my_dx = value_and_gradient(mine, mask[part], dy[:, part])
        assert_equal(my_y, y[:, part], "y")
        theirs = torch.cat([half[:, part] for half in dx.chunk(2, dim=-1)], dim=-1)
        assert_equal(my_dx, theirs, "dx")


def test_a_row_beyond_two_to_the_31st_element() -> None:
    """Rows are 2^30 elements apart, in 4 GB that are not touched but at three places."""
    rows, apart = 3, 2**30
    try:
        store = torch.empty((rows - 1) * apart + 32, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"not enough address space: {error}")
    far, far_dy = (store[at:].as_strided((rows, n), (apart, 1)) for at, n in ((0, 16), (16, 8)))
    x, dy = draw(rows, 16, dtype=torch.bfloat16), draw(rows, 8, dtype=torch.bfloat16)
    far.copy_(x), far_dy.copy_(dy)
    found = masked_swiglu(far, **TRITON), value_and_gradient(x, None, far_dy)[1]
    for ours, expected in zip(found, value_and_gradient(x, None, dy), strict=True):
        assert_equal(ours, expected)


PAIRS = [*((e, "sum") for e in ELEMENTS), *(("abs", r) for r in REDUCTIONS if r != "sum")]


def flat(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """w, g of a matrix."""
    size = shape[0] * shape[1]
    return draw(size, dtype=dtype), draw(size + 1)[1:].clone()


def second_moment(g: Tensor) -> Tensor:
    """Some v that makes both terms of ``fisher`` count."""
    return (g.roll(1) * 2).square()


def scores_of(
    shards: list[MatrixShard], element: str = "abs", reduction: str = "sum"
) -> list[Tensor]:
    return matrix_scores(shards, element, reduction, device=DEVICE, **TRITON)


def definition(w: Tensor, g: Tensor, shard: MatrixShard, element: str, reduction: str) -> Tensor:
    """In fp64, from the whole matrix."""
    w, g, v = (t.double().view(shard.shape) for t in (w, g, second_moment(g)))
    e = {
        "abs": (w * g).abs(), "squared": (w * g) ** 2, "signed": w * g, "weight": w.abs(),
        "fisher": (w * g - w**2 * v / 2).abs(),
    }[element]  # fmt: skip
    axis = 1 if shard.per == "row" else 0
    if reduction == "max":
        return e.amax(axis)
    return (e**2 if reduction == "sum_of_squares" else e).sum(axis)


def assert_scores(actual: Tensor, expected: Tensor) -> None:
    """Relative to the largest: signed sums cancel."""
    scale = expected.abs().max().clamp(min=1e-30)
    assert_close(actual.double() / scale, expected.double() / scale, tolerance=1e-6)


# Widths of less than a tile and of more than one, a vector, 130 rows: two chunks of partial sums.
# Addresses and widths of sixteens beside others.
SHAPES = [((16, 130), "row"), ((5, 272), "row"), ((130, 8), "column"), ((130, 136), "column"),
          ((1, 48), "column")]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "element", "reduction"),
    [(torch.float32, *pair) for pair in PAIRS]
    + [(torch.float32, "fisher", "max"), (torch.bfloat16, "fisher", "sum")]
    + [(torch.bfloat16, "abs", "sum")],
    ids=str,
)
def test_scores_of_all_matrices_are_the_definition(
    dtype: torch.dtype, element: str, reduction: str
) -> None:
    held = [flat(*shape, dtype=dtype) for shape, _ in SHAPES]
    shards = [
        MatrixShard(*what, w, g, v=second_moment(g))
        for what, (w, g) in zip(SHAPES, held, strict=True)
    ]
    first, second = (scores_of(shards, element, reduction) for _ in range(2))
    for shard, (w, g), scores, again in zip(shards, held, first, second, strict=True):
        assert scores.dtype == torch.float32
        assert_scores(scores, definition(w, g, shard, element, reduction))
        assert_equal(again, scores, "run twice")


# Cuts at multiples of 16 and anywhere, on a row's border, inside a row, with an empty shard.
@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((64, 48), (0, 512, 1536, 3072)),
        ((48, 45), (0, 45, 45, 1000, 2160)),
        ((24, 48), (0, 3, 1152)),
    ],
)
@pytest.mark.parametrize("per", ["row", "column"])
@pytest.mark.parametrize(
    ("element", "reduction"), [("abs", "sum"), ("abs", "max"), ("fisher", "sum")]
)
def test_shards_add_up_to_the_whole(
    shape: tuple[int, int], cuts: tuple[int, ...], per: str, element: str, reduction: str
) -> None:
    w, g = flat(*shape, dtype=torch.bfloat16)
    v = second_moment(g)
    shards = [
        MatrixShard(shape, per, w[lo:hi], g[lo:hi], lo, v[lo:hi])
        for lo, hi in itertools.pairwise(cuts)
    ]
    parts = torch.stack(scores_of(shards, element, reduction))
    together = parts.amax(0) if reduction == "max" else parts.sum(0)
    assert_scores(together, definition(w, g, shards[0], element, reduction))


@pytest.mark.parametrize("per", ["row", "column"])
def test_what_is_elsewhere_is_zero(per: str) -> None:
    w, g = flat(24, 48)
    shards = [
        MatrixShard((24, 48), per),
        MatrixShard((24, 48), per, w[96:100], g[96:100], 96),
        MatrixShard((24, 48), per, w[:0], g[:0], 96),
    ]
    nothing, some, empty = scores_of(shards)
    assert not nothing.any() and not empty.any()
    touched = some.nonzero().flatten().tolist()
    assert touched == ([2] if per == "row" else [0, 1, 2, 3])
    (alone,) = scores_of([shards[0]])
    assert_equal(alone, torch.zeros(shards[0].size, device=DEVICE))


def test_the_magnitude_of_weights_reads_no_gradient() -> None:
    w, _ = flat(24, 48)
    shards = [MatrixShard((24, 48), per, w) for per in ("row", "column")]
    for shard, scores in zip(shards, scores_of(shards, "weight"), strict=True):
        assert_scores(scores, definition(w, w, shard, "weight", "sum"))


@pytest.mark.parametrize("skipped", [0, 3])
def test_one_matrix_without_second_moments_leaves_those_of_others_alone(skipped: int) -> None:
    """A shard without v beside one whose v lies at any address, that of w and g aligned."""
    w, g = flat(24, 48)
    v = torch.cat([draw(skipped), second_moment(g)])[skipped:]
    for per in ("row", "column"):
        shards = [MatrixShard((24, 48), per, w, g), MatrixShard((24, 48), per, w, g, v=v)]
        without, with_v = scores_of(shards, "fisher")
        assert_scores(without, definition(w, g, shards[0], "abs", "sum"))
        assert_scores(with_v, definition(w, g, shards[1], "fisher", "sum"))


def test_a_non_finite_gradient_stays_visible() -> None:
    for reduction in REDUCTIONS:
        w, g = flat(20, 8)
        g[3 * 8 + 5], g[9 * 8 + 5] = float("nan"), float("inf")
        shards = [MatrixShard((20, 8), per, w, g) for per in ("row", "column")]
        rows, columns = scores_of(shards, "abs", reduction)
        broken = [(~torch.isfinite(each)).nonzero().flatten().tolist() for each in (rows, columns)]
        assert broken == [[3, 9], [5]], reduction


def test_what_a_kernel_cannot_read_is_refused_before_a_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[object] = []
    monkeypatch.setattr(score, "launch", lambda *args, **_: launched.append(args))
    w, g = flat(8, 20)
    good = MatrixShard((8, 20), "row", w, g)
    for shards in (
        [MatrixShard((8, 20), "row", w.half(), g)],
        [MatrixShard((8, 20), "row", w, g.bfloat16())],
        [MatrixShard((8, 20), "row", w, g.to("meta"))],
        [MatrixShard((8, 20), "row", w, g, v=g.bfloat16())],
        [MatrixShard((8, 20), "row", w.repeat_interleave(2)[::2], g)],
        [good, MatrixShard((8, 20), "row", w.bfloat16(), g)],
    ):
        with pytest.raises(AssertionError):
            scores_of(shards, "fisher")
    for x in (draw(3, 16).half(), draw(3, 16).double()):
        with pytest.raises(AssertionError):
            masked_swiglu(x, **TRITON)
    assert not launched


@on_ranks(1)
def test_a_model_trains_and_scores_as_with_the_reference(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron_idea.engine.optimizer import update
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.measures import unit_sums
    from megatron_idea.prune.strategy import Measure

    curves: dict[str, list[float]] = {}
    scores: dict[str, list[Tensor]] = {}
    for implementation in ("triton", "reference"):
        chosen = replace(config, training={"kernel_implementation": implementation})
        trainable = assemble(chosen.sections, groups, ffn_shape(chosen, [24, 16]), initialize=True)
        for _, mlp in trainable.mlps:
            mlp.set_alive(torch.arange(mlp.width) % 3 > 0)
        curve = curves[implementation] = []
        for step in range(6):
            backward(trainable, seed=step)
            sums = unit_sums(trainable, ["ffn_hidden_size"], Measure("abs", "sum"))
            scores[implementation] = list(sums.values())
            curve.append(update(trainable.optimizer, 1e-2))
    assert len(set(curves["triton"])) == 6
    assert_close(curves["triton"], curves["reference"], "gradient norms", tolerance=1e-5)
    for ours, theirs in zip(scores["triton"], scores["reference"], strict=True):
        assert_close(ours / theirs.max(), theirs / theirs.max(), "scores", tolerance=1e-4)
        assert not ours[:, ::3].any() and bool(ours[:, 1::3].all())
