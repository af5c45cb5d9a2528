"""Masked SwiGLU: the activation of a prunable FFN.

    y = silu(gate) * up * m,   [gate | up] = x

    d = dy * m,   s = sigmoid(gate)
    dgate = d * up * s * (1 + gate * (1 - s)),   dup = d * gate * s

The mask gets no gradient, and none is needed: with z = y W2 and W2's gradient g, the sum over the
rows j of w_ji g_ji is m_i dL/dm_i. ``matrix_scores`` gives it, element ``signed`` per column of
fc2; it is 0 for a removed neuron.

Shapes: T tokens, F neurons of a tensor-parallel rank. x_T2F, dx_T2F [..., 2F] as fc1 leaves it;
y_TF, dy_TF [..., F]; mask_F [F].

Bytes at the limit, per token and neuron in bf16: forward 6, backward 10. The mask is read once a
program.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_idea.kernels.dispatch import jit, launch, tl, uses_triton


def masked_swiglu(
    x_T2F: Tensor, mask_F: Tensor | None = None, *, implementation: str = "auto"
) -> Tensor:
    """Gate, multiply and mask the output of a fused gate-and-up projection.

    Args:
        x_T2F: [..., 2F], gate half first, unit stride in the last dimension; in Triton bf16 or
            fp32.
        mask_F: [F] factors in x's dtype or fp32, 0 for a removed neuron; None keeps all.
        implementation: ``auto`` (Triton on CUDA, PyTorch elsewhere), ``triton``, ``reference``.
    Returns: [..., F]. Where the factor is 0 and x is finite, the output and the gradient of both
        halves are 0.
    Raises: ValueError for an implementation that cannot run here.
    """
    in_triton = uses_triton("masked_swiglu", implementation, x_T2F.device)
    _check(x_T2F, mask_F, in_triton)
    y_TF: Tensor = (_Triton if in_triton else _Reference).apply(x_T2F, mask_F)
    return y_TF


def _check(x_T2F: Tensor, mask_F: Tensor | None, in_triton: bool) -> None:
    width, dtype = x_T2F.shape[-1] // 2, x_T2F.dtype
    assert x_T2F.shape[-1] == 2 * width > 0, f"no gate and up in {[*x_T2F.shape]}"
    assert _unit_stride(x_T2F), x_T2F.stride()
    assert not in_triton or dtype in (torch.bfloat16, torch.float32), dtype
    if mask_F is not None:
        assert mask_F.shape == (width,) and mask_F.device == x_T2F.device, mask_F.shape
        assert mask_F.dtype in (dtype, torch.float32) and _unit_stride(mask_F), mask_F.dtype
        assert not mask_F.requires_grad, "the mask gets no gradient"


def _unit_stride(t: Tensor) -> bool:
    return t.shape[-1] <= 1 or t.stride(-1) == 1


def reference(x_T2F: Tensor, mask_F: Tensor | None = None) -> Tensor:
    """The formula in plain PyTorch: the law for every other path."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    y_TF = F.silu(gate_TF) * up_TF
    return y_TF if mask_F is None else (y_TF * mask_F).to(x_T2F.dtype)


class _Reference(torch.autograd.Function):
    """Saves x alone and recomputes silu(gate); writes both halves of dx in place of a cat."""

    @staticmethod
    def forward(ctx: Any, x_T2F: Tensor, mask_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_T2F, mask_F)
        gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
        y_TF = F.silu(gate_TF).mul_(up_TF)
        return y_TF if mask_F is None else y_TF.mul_(mask_F)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor, None]:
        x_T2F, mask_F = ctx.saved_tensors
        gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
        silu_TF = F.silu(gate_TF)
        if mask_F is not None:
            dy_TF = (dy_TF * mask_F).to(x_T2F.dtype)
        dx_T2F = torch.empty_like(x_T2F)
        dgate_TF, dup_TF = dx_T2F.chunk(2, dim=-1)
        torch.mul(dy_TF, silu_TF, out=dup_TF)
        torch.mul(dy_TF, up_TF, out=silu_TF)
        torch.ops.aten.silu_backward.grad_input(silu_TF, gate_TF, grad_input=dgate_TF)
        return dx_T2F, None


@jit(do_not_specialize=["tokens"])
def _forward_kernel(
    x_ptr, mask_ptr, y_ptr, tokens,
    WIDTH: tl.constexpr, X_STRIDE: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS neurons of ROWS * STEPS tokens."""
    column_blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    # 64 bits: tokens * 2F passes 2^31 at 72k tokens of F = 14848.
    first = (tl.program_id(0) // column_blocks).to(tl.int64) * (ROWS * STEPS)
    inside = columns < WIDTH
    if HAS_MASK:
        # A factor, never a predicate: loads that each neuron switches are not 128 bits wide.
        m = tl.load(mask_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    for step in range(STEPS):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        here = (rows < tokens)[:, None] & inside[None, :]
        x_at = x_ptr + rows[:, None] * X_STRIDE + columns[None, :]
        gate = tl.load(x_at, mask=here, other=0.0).to(tl.float32)
        up = tl.load(x_at + WIDTH, mask=here, other=0.0).to(tl.float32)
        y = gate * tl.sigmoid(gate) * up
        if HAS_MASK:
            y = y * m[None, :]
        y_at = y_ptr + rows[:, None] * WIDTH + columns[None, :]
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=here)


@jit(do_not_specialize=["tokens"])
def _backward_kernel(
    dy_ptr, x_ptr, mask_ptr, dx_ptr, tokens,
    WIDTH: tl.constexpr, X_STRIDE: tl.constexpr, DY_STRIDE: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """As the forward."""
    column_blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    first = (tl.program_id(0) // column_blocks).to(tl.int64) * (ROWS * STEPS)
    inside = columns < WIDTH
    if HAS_MASK:
        m = tl.load(mask_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    for step in range(STEPS):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        here = (rows < tokens)[:, None] & inside[None, :]
        x_at = x_ptr + rows[:, None] * X_STRIDE + columns[None, :]
        dy_at = dy_ptr + rows[:, None] * DY_STRIDE + columns[None, :]
        gate = tl.load(x_at, mask=here, other=0.0).to(tl.float32)
        up = tl.load(x_at + WIDTH, mask=here, other=0.0).to(tl.float32)
        d = tl.load(dy_at, mask=here, other=0.0).to(tl.float32)
        if HAS_MASK:
            d = d * m[None, :]
        s = tl.sigmoid(gate)
        dgate = d * up * s * (1.0 + gate * (1.0 - s))
        dx_at = dx_ptr + rows[:, None] * (2 * WIDTH) + columns[None, :]
        tl.store(dx_at, dgate.to(dx_ptr.dtype.element_ty), mask=here)
        tl.store(dx_at + WIDTH, (d * (gate * s)).to(dx_ptr.dtype.element_ty), mask=here)


# A program's share: STEPS times [ROWS, COLUMNS], of which each thread moves one vector of 16 bytes
# a step. Fixed, as a tuned tile costs compiling on every rank. Compiled for 8.0, 9.0 and 10.0, not
# yet timed on any of them.
_TILE = {"ROWS": 4, "STEPS": 4, "num_warps": 4}
_COLUMN_BYTES = 512


def _launch_tiles(kernel: Any, x: Tensor, *arguments: Any, **meta: Any) -> None:
    """Launch over x [T, 2 WIDTH], one program a tile; neighbours share rows."""
    columns = _COLUMN_BYTES // x.element_size()
    row_blocks = math.ceil(len(x) / (_TILE["ROWS"] * _TILE["STEPS"]))
    launch(
        kernel, row_blocks * math.ceil(meta["WIDTH"] / columns), x.device, *arguments, len(x),
        X_STRIDE=x.stride(0), **meta, COLUMNS=columns, **_TILE,
    )  # fmt: skip


def _rows(t: Tensor) -> Tensor:
    """[..., N] as [T, N] with unit stride in N; copies only where rows are not evenly spaced."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


class _Triton(torch.autograd.Function):
    """Saves x alone, as the reference does."""

    @staticmethod
    def forward(ctx: Any, x_T2F: Tensor, mask_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_T2F, mask_F)
        x, width = _rows(x_T2F), x_T2F.shape[-1] // 2
        y_TF = x_T2F.new_empty(*x_T2F.shape[:-1], width)
        _launch_tiles(_forward_kernel, x, x, mask_F, y_TF, WIDTH=width, HAS_MASK=mask_F is not None)
        return y_TF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor, None]:
        x_T2F, mask_F = ctx.saved_tensors
        # The gradient of a sum() is one number, expanded.
        dy = _rows(dy_TF if _unit_stride(dy_TF) else dy_TF.contiguous())
        x, width = _rows(x_T2F), dy.shape[1]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        _launch_tiles(
            _backward_kernel, x, dy, x, mask_F, dx,
            WIDTH=width, DY_STRIDE=dy.stride(0), HAS_MASK=mask_F is not None,
        )  # fmt: skip
        return dx.view(x_T2F.shape), None
