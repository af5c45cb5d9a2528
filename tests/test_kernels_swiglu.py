"""Masked SwiGLU against its formula in fp64: values, gradients, exact zeros, shapes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megatron_idea.kernels import dispatch, masked_swiglu
from megatron_idea.testing import assert_close, assert_equal

# One token, one neuron, widths that are no multiple of a vector, batches of sequences, no token.
SHAPES = [(2,), (1, 2), (7, 26), (33, 2 * 129), (3, 5, 14), (0, 8), (4, 0, 6)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a mask that removes every third neuron from the first on, dy."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator).to(dtype)
    dy = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(dtype)
    mask = (torch.arange(shape[-1] // 2) % 3 > 0).to(dtype)
    return x, mask, dy


def value_and_gradient(x: Tensor, mask: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = masked_swiglu(x, mask)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def formula(x: Tensor, mask: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The same in fp64, derivatives written out."""
    gate, up = x.double().chunk(2, dim=-1)
    factor = torch.ones_like(gate) if mask is None else mask.double()
    sigmoid = 1 / (1 + torch.exp(-gate))
    dy = dy.double() * factor
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return gate * sigmoid * up * factor, torch.cat([d_gate, dy * gate * sigmoid], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_formulas(
    shape: tuple[int, ...], masked: bool, dtype: torch.dtype
) -> None:
    x, mask, dy = inputs(shape, dtype)
    y, dx = value_and_gradient(x, mask if masked else None, dy)
    expected_y, expected_dx = formula(x, mask if masked else None, dy)
    assert y.dtype == dx.dtype == dtype
    assert_close(y, expected_y, "y")
    assert_close(dx, expected_dx, "dx")


def test_gradient_agrees_with_finite_differences() -> None:
    x, mask, _ = inputs((3, 10), torch.float64)
    assert torch.autograd.gradcheck(masked_swiglu, (x.requires_grad_(), mask))
    assert torch.autograd.gradcheck(masked_swiglu, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_masked_neuron_is_exactly_zero_whatever_comes_in(dtype: torch.dtype) -> None:
    x, mask, dy = inputs((33, 2 * 129), dtype)
    y, dx = value_and_gradient(x * 1e4, mask, dy)
    dead = mask == 0
    assert not y[:, dead].any()
    assert not dx[:, torch.cat([dead, dead])].any()
    assert y[:, ~dead].any(dim=0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_of_ones_is_no_mask_bit_for_bit(dtype: torch.dtype) -> None:
    x, mask, dy = inputs((33, 2 * 129), dtype)
    with_ones = value_and_gradient(x, torch.ones_like(mask), dy)
    without = value_and_gradient(x, None, dy)
    assert_equal(with_ones[0], without[0], "y")
    assert_equal(with_ones[1], without[1], "dx")


def test_live_neurons_do_not_notice_the_mask() -> None:
    x, mask, dy = inputs((33, 2 * 129), torch.float32)
    alive = mask.bool()
    masked, whole = value_and_gradient(x, mask, dy), value_and_gradient(x, None, dy)
    assert_equal(masked[0][:, alive], whole[0][:, alive], "y")
    both = torch.cat([alive, alive])
    assert_equal(masked[1][:, both], whole[1][:, both], "dx")


def test_large_gates_saturate_without_nan() -> None:
    x = torch.tensor([[-1e30, 1e30, -100.0, 100.0, 2.0, 2.0, 2.0, 2.0]])
    y, dx = value_and_gradient(x, None, torch.ones(1, 4))
    assert_close(y, [[0.0, 2e30, 0.0, 200.0]], "y")
    assert_close(dx, [[0.0, 2.0, 0.0, 2.0, 0.0, 1e30, 0.0, 100.0]], "dx")


def test_rows_may_lie_apart() -> None:
    x, mask, dy = inputs((33, 2 * 129), torch.float32)
    apart_x, apart_dy = torch.zeros(33, 300)[:, 7 : 7 + 258], torch.zeros(33, 200)[:, :129]
    apart_x.copy_(x), apart_dy.copy_(dy)
    y = masked_swiglu(apart_x.requires_grad_(), mask)
    (dx,) = torch.autograd.grad(y, apart_x, apart_dy)
    expected = value_and_gradient(x, mask, dy)
    assert_equal(y, expected[0], "y")
    assert_equal(dx, expected[1], "dx")


def test_an_fp32_mask_fits_any_x() -> None:
    x, mask, dy = inputs((7, 26), torch.bfloat16)
    for wide, narrow in zip(
        value_and_gradient(x, mask.float(), dy), value_and_gradient(x, mask, dy), strict=True
    ):
        assert_equal(wide, narrow)


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        (torch.ones(3, 7), None),
        (torch.ones(3, 0), None),
        (torch.ones(8, 6).t(), None),
        (torch.ones(3, 8), torch.ones(5)),
        (torch.ones(3, 8), torch.ones(1, 4)),
        (torch.ones(3, 8), torch.ones(4, dtype=torch.bool)),
        (torch.ones(3, 8), torch.ones(8)[::2]),
        (torch.ones(3, 8), torch.ones(4, requires_grad=True)),
    ],
)
def test_what_does_not_fit_ends_in_an_assertion(x: Tensor, mask: Tensor | None) -> None:
    with pytest.raises(AssertionError):
        masked_swiglu(x, mask)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [("cuda", "legal values: auto, triton, reference"), ("triton", "implementation is 'triton'")],
)
def test_an_implementation_that_cannot_run_is_an_error(implementation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_swiglu(torch.ones(3, 8), implementation=implementation)


def test_the_active_implementation_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._say_once.cache_clear()
    with caplog.at_level("INFO", logger="megatron_idea.kernels"):
        for _ in range(2):
            masked_swiglu(torch.ones(3, 8))
    assert caplog.messages == ["masked_swiglu: reference on cpu (implementation 'auto')"]


def test_without_triton_the_package_imports_and_runs() -> None:
    code = """
import sys; sys.modules["triton"] = None
import torch
from megatron_idea.kernels import masked_swiglu, matrix_scores
print(masked_swiglu(torch.ones(2, 4)).shape)
try: masked_swiglu(torch.ones(2, 4), implementation="triton")
except ValueError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "torch.Size([2, 2])",
        "implementation is 'triton', which is not installed; legal: 'reference'",
    ]
