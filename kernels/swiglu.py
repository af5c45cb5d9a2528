"""Masked SwiGLU: the activation of a prunable FFN.

    y = silu(gate) * up * m,   [gate | up] = x

    d = dy * m,   s = sigmoid(gate)
    dgate = d * up * s * (1 + gate * (1 - s)),   dup = d * gate * s
    dm_i  = sum over tokens of dy * gate * s * up

Shapes: T tokens, F neurons of a tensor-parallel rank. x_T2F, dx_T2F [..., 2F] as fc1 leaves it;
y_TF, dy_TF, h_TF [..., F]; mask_F, dm_F [F]. B row blocks: partials_BF [B, F] fp32.

Bytes at the limit, per token and neuron in bf16: forward 6, backward 10, with h 12. dm adds 8/64
for its partial sums. The mask is read once a program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_idea.kernels.dispatch import architecture, jit, launch, tl, uses_triton


class Gradients(NamedTuple):
    """What the backward pass makes; None for what was not asked for."""

    dx_T2F: Tensor
    h_TF: Tensor | None
    dm_F: Tensor | None
    """fp32, also for masked neurons: what letting one back in would do to the loss."""


def reference(x_T2F: Tensor, mask_F: Tensor | None = None) -> Tensor:
    """The formula in plain PyTorch: the law for every other path."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    y_TF = F.silu(gate_TF) * up_TF
    return y_TF if mask_F is None else (y_TF * mask_F).to(x_T2F.dtype)


def _rows(t: Tensor) -> Tensor:
    """[..., N] as [T, N] with unit stride in N; copies only where rows are not evenly spaced."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


class _Reference(torch.autograd.Function):
    """Saves x alone and recomputes silu(gate); writes both halves of dx in place of a cat."""

    @staticmethod
    def forward(ctx: Any, x_T2F: Tensor, mask_F: Tensor | None, inplace_backward: bool) -> Tensor:
        ctx.save_for_backward(x_T2F, mask_F)
        ctx.inplace = inplace_backward
        gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
        y_TF = F.silu(gate_TF).mul_(up_TF)
        return y_TF if mask_F is None else y_TF.mul_(mask_F)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_T2F, mask_F = ctx.saved_tensors
        gradients = _reference_backward(
            dy_TF, x_T2F, mask_F, False, ctx.needs_input_grad[1], ctx.inplace
        )
        _forbid_second_backward(x_T2F, ctx.inplace)
        return gradients.dx_T2F, gradients.dm_F, None


def _reference_backward(
    dy_TF: Tensor, x_T2F: Tensor, mask_F: Tensor | None, with_h: bool, with_dm: bool, inplace: bool
) -> Gradients:
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    silu_TF = F.silu(gate_TF)
    h_TF = dm_F = None
    if with_h:
        h_TF = silu_TF * up_TF if mask_F is None else (silu_TF * up_TF).mul_(mask_F)
    if with_dm:
        wide = torch.float64 if x_T2F.dtype == torch.float64 else torch.float32
        dm_F = _rows(dy_TF.to(wide) * silu_TF.to(wide) * up_TF.to(wide)).sum(0)
    if mask_F is not None:
        dy_TF = (dy_TF * mask_F).to(x_T2F.dtype)
    dx_T2F = torch.empty_like(x_T2F)
    dgate_TF, dup_TF = dx_T2F.chunk(2, dim=-1)
    torch.mul(dy_TF, silu_TF, out=dup_TF)
    torch.mul(dy_TF, up_TF, out=silu_TF)
    torch.ops.aten.silu_backward.grad_input(silu_TF, gate_TF, grad_input=dgate_TF)
    return Gradients(x_T2F.data.copy_(dx_T2F) if inplace else dx_T2F, h_TF, dm_F)


def _forbid_second_backward(x_T2F: Tensor, inplace: bool) -> None:
    """x may be dx by now: autograd raises when it is asked for x again."""
    if inplace:
        torch.autograd.graph.increment_version(x_T2F)


@jit(do_not_specialize=["tokens"])
def _forward_kernel(
    x_ptr, mask_ptr, y_ptr, tokens,
    WIDTH: tl.constexpr, X_STRIDE: tl.constexpr,
    HAS_MASK: tl.constexpr, SKIP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS neurons of ROWS * STEPS tokens."""
    column_blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    # 64 bits: tokens * 2F passes 2^31 at 72k tokens of F = 14848.
    first = (tl.program_id(0) // column_blocks).to(tl.int64) * (ROWS * STEPS)
    inside = columns < WIDTH
    alive = True
    if HAS_MASK:
        # A factor, never a predicate: loads that each neuron switches are not 128 bits wide.
        m = tl.load(mask_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if SKIP:
            alive = tl.max((m != 0).to(tl.int32), axis=0) > 0
    for step in range(STEPS):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        here = (rows < tokens)[:, None] & inside[None, :]
        y_at = y_ptr + rows[:, None] * WIDTH + columns[None, :]
        if alive:
            x_at = x_ptr + rows[:, None] * X_STRIDE + columns[None, :]
            gate = tl.load(x_at, mask=here, other=0.0).to(tl.float32)
            up = tl.load(x_at + WIDTH, mask=here, other=0.0).to(tl.float32)
            y = gate * tl.sigmoid(gate) * up
            if HAS_MASK:
                y = y * m[None, :]
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=here)
        else:
            tl.store(y_at, tl.zeros([ROWS, COLUMNS], y_ptr.dtype.element_ty), mask=here)


@jit(do_not_specialize=["tokens"])
def _backward_kernel(
    dy_ptr, x_ptr, mask_ptr, dx_ptr, h_ptr, partials_ptr, tokens,
    WIDTH: tl.constexpr, DY_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr, DX_STRIDE: tl.constexpr,
    HAS_MASK: tl.constexpr, WITH_H: tl.constexpr, WITH_DM: tl.constexpr, SKIP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """As the forward; dx may be x itself: a program reads a tile before it writes it."""
    column_blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    row_block = (tl.program_id(0) // column_blocks).to(tl.int64)
    inside = columns < WIDTH
    alive = True
    if HAS_MASK:
        m = tl.load(mask_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if SKIP:
            alive = tl.max((m != 0).to(tl.int32), axis=0) > 0
    if WITH_DM:
        dm = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        rows = row_block * (ROWS * STEPS) + step * ROWS + tl.arange(0, ROWS)
        here = (rows < tokens)[:, None] & inside[None, :]
        dx_at = dx_ptr + rows[:, None] * DX_STRIDE + columns[None, :]
        if alive:
            x_at = x_ptr + rows[:, None] * X_STRIDE + columns[None, :]
            dy_at = dy_ptr + rows[:, None] * DY_STRIDE + columns[None, :]
            gate = tl.load(x_at, mask=here, other=0.0).to(tl.float32)
            up = tl.load(x_at + WIDTH, mask=here, other=0.0).to(tl.float32)
            d = tl.load(dy_at, mask=here, other=0.0).to(tl.float32)
            s = tl.sigmoid(gate)
            silu = gate * s
            h = silu * up
            if WITH_DM:
                dm += d * h
            if HAS_MASK:
                d = d * m[None, :]
                h = h * m[None, :]
            dgate = d * up * s * (1.0 + gate * (1.0 - s))
            tl.store(dx_at, dgate.to(dx_ptr.dtype.element_ty), mask=here)
            tl.store(dx_at + WIDTH, (d * silu).to(dx_ptr.dtype.element_ty), mask=here)
            if WITH_H:
                h_at = h_ptr + rows[:, None] * WIDTH + columns[None, :]
                tl.store(h_at, h.to(h_ptr.dtype.element_ty), mask=here)
        else:
            zero = tl.zeros([ROWS, COLUMNS], dx_ptr.dtype.element_ty)
            tl.store(dx_at, zero, mask=here)
            tl.store(dx_at + WIDTH, zero, mask=here)
            if WITH_H:
                h_at = h_ptr + rows[:, None] * WIDTH + columns[None, :]
                tl.store(h_at, zero, mask=here)
    if WITH_DM:
        tl.store(partials_ptr + row_block * WIDTH + columns, tl.sum(dm, axis=0), mask=inside)


@jit(do_not_specialize=["blocks"])
def _sum_partials_kernel(
    partials_ptr, dm_ptr, blocks,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the row blocks up in a fixed order: float atomics would give other bits each run."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    dm = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, blocks, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        here = (rows < blocks)[:, None] & inside[None, :]
        dm += tl.load(partials_ptr + at, mask=here, other=0.0)
    tl.store(dm_ptr + columns, tl.sum(dm, axis=0), mask=inside)


@dataclass(frozen=True)
class Tile:
    """A program's share: ``steps`` times [rows, columns], a row being ``vectors`` of 16 bytes."""

    rows: int
    vectors: int
    steps: int
    num_warps: int

    def columns(self, dtype: torch.dtype) -> int:
        return self.vectors * 16 // dtype.itemsize

    def row_blocks(self, tokens: int) -> int:
        return math.ceil(tokens / (self.rows * self.steps))


# One vector a thread and step. Fixed, because a tuned tile would change the order of sums from run
# to run. By compute capability; the nearest below counts. Compiled for 8.0, 9.0 and 10.0, not yet
# timed on any of them.
FORWARD = {80: Tile(4, 32, 4, 4)}
BACKWARD = {80: Tile(4, 32, 4, 4)}
# Longer columns: the partial sums written are 4 bytes per 64 tokens and neuron.
BACKWARD_DM = {80: Tile(4, 32, 16, 4)}


def _tile(table: dict[int, Tile], device: torch.device) -> Tile:
    return table[max(arch for arch in table if arch <= architecture(device))]


def _launch_tiles(kernel: Any, tile: Tile, x: Tensor, *arguments: Any, **meta: Any) -> None:
    """Launch over x [T, 2 WIDTH], one program a tile; neighbours share rows."""
    columns = tile.columns(x.dtype)
    programs = tile.row_blocks(len(x)) * math.ceil(meta["WIDTH"] / columns)
    launch(
        kernel, programs, x.device, *arguments, len(x), X_STRIDE=x.stride(0), **meta,
        ROWS=tile.rows, COLUMNS=columns, STEPS=tile.steps, num_warps=tile.num_warps,
    )  # fmt: skip


def _triton_forward(x_T2F: Tensor, mask_F: Tensor | None, skip_blocks: bool) -> Tensor:
    x, width = _rows(x_T2F), x_T2F.shape[-1] // 2
    y_TF = x_T2F.new_empty(*x_T2F.shape[:-1], width)
    _launch_tiles(
        _forward_kernel, _tile(FORWARD, x.device), x, x, mask_F, y_TF,
        WIDTH=width, HAS_MASK=mask_F is not None, SKIP=skip_blocks,
    )  # fmt: skip
    return y_TF


def _triton_backward(
    dy_TF: Tensor,
    x_T2F: Tensor,
    mask_F: Tensor | None,
    with_h: bool,
    with_dm: bool,
    skip_blocks: bool,
    inplace: bool,
) -> Gradients:
    dy, x, width = _rows(dy_TF), _rows(x_T2F), dy_TF.shape[-1]
    dx = x if inplace else torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = _tile(BACKWARD_DM if with_dm else BACKWARD, x.device)
    blocks = tile.row_blocks(len(x))
    h_TF = x.new_empty(dy_TF.shape) if with_h else None
    partials_BF = x.new_empty(blocks, width, dtype=torch.float32) if with_dm else None
    _launch_tiles(
        _backward_kernel, tile, x, dy, x, mask_F, dx, h_TF, partials_BF,
        WIDTH=width, DY_STRIDE=dy.stride(0), DX_STRIDE=dx.stride(0),
        HAS_MASK=mask_F is not None, WITH_H=with_h, WITH_DM=with_dm, SKIP=skip_blocks,
    )  # fmt: skip
    dm_F = None
    if with_dm:
        dm_F = x.new_empty(width, dtype=torch.float32)
        launch(
            _sum_partials_kernel, math.ceil(width / 128), x.device,
            partials_BF, dm_F, blocks, WIDTH=width, ROWS=16, COLUMNS=128, num_warps=4,
        )  # fmt: skip
    return Gradients(dx.view(x_T2F.shape), h_TF, dm_F)


class _Triton(torch.autograd.Function):
    """Saves x alone, as the reference does."""

    @staticmethod
    def forward(
        ctx: Any, x_T2F: Tensor, mask_F: Tensor | None, skip_blocks: bool, inplace_backward: bool
    ) -> Tensor:
        ctx.save_for_backward(x_T2F, mask_F)
        ctx.skip_blocks, ctx.inplace = skip_blocks, inplace_backward
        return _triton_forward(x_T2F, mask_F, skip_blocks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_T2F, mask_F = ctx.saved_tensors
        # The gradient of a sum() is one number, expanded.
        dy_TF = dy_TF if _unit_stride(dy_TF) else dy_TF.contiguous()
        gradients = _triton_backward(
            dy_TF, x_T2F, mask_F, False, ctx.needs_input_grad[1], ctx.skip_blocks, ctx.inplace
        )
        _forbid_second_backward(x_T2F, ctx.inplace)
        return gradients.dx_T2F, gradients.dm_F, None, None


def masked_swiglu(
    x_T2F: Tensor,
    mask_F: Tensor | None = None,
    *,
    skip_blocks: bool = False,
    inplace_backward: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Gate, multiply and mask the output of a fused gate-and-up projection.

    Args:
        x_T2F: [..., 2F], gate half first, unit stride in the last dimension.
        mask_F: [F] factors in x's dtype or fp32, 0 for a removed neuron; None keeps all. Gets the
            gradient dm when it requires one.
        skip_blocks: in Triton, do not read x where 256 neighbours (fp32: 128) are all removed.
            Pays when removed neurons lie together; not together with a mask that wants dm.
        inplace_backward: the backward overwrites x with its gradient. Only where nobody else needs
            x; a second backward raises.
        implementation: ``auto`` (Triton on CUDA, PyTorch elsewhere), ``triton``, ``reference``.
    Returns: [..., F]. Where the factor is 0 and x is finite, the output and the gradient of both
        halves are 0.
    Raises: ValueError for tensors that do not fit each other, and for settings that exclude each
        other.
    """
    with_dm = mask_F is not None and mask_F.requires_grad
    in_triton = _check(x_T2F, mask_F, None, skip_blocks, with_dm, implementation)
    if inplace_backward:
        _check_inplace(x_T2F)
    y_TF: Tensor = (
        _Triton.apply(x_T2F, mask_F, skip_blocks, inplace_backward)
        if in_triton
        else _Reference.apply(x_T2F, mask_F, inplace_backward)
    )
    return y_TF


@torch.no_grad()
def masked_swiglu_backward(
    dy_TF: Tensor,
    x_T2F: Tensor,
    mask_F: Tensor | None = None,
    *,
    with_h: bool = False,
    with_dm: bool = False,
    skip_blocks: bool = False,
    inplace: bool = False,
    implementation: str = "auto",
) -> Gradients:
    """Derive everything that the backward of an FFN needs from dy and x, in one pass over both.

    For callers that own the backward of fc2 as well and so need not store its input.

    Args:
        dy_TF: [..., F] in x's dtype, unit stride in the last dimension; rows may be apart.
        x_T2F, mask_F, skip_blocks, implementation: as for ``masked_swiglu``.
        with_h: recompute h, the forward's output.
        with_dm: sum up dm, also where the factor is 0; not together with ``skip_blocks``.
        inplace: dx overwrites x.
    Returns: dx, h, dm.
    Raises: ValueError, as ``masked_swiglu``.
    """
    in_triton = _check(x_T2F, mask_F, dy_TF, skip_blocks, with_dm, implementation)
    if inplace:
        _check_inplace(x_T2F)
    if in_triton:
        return _triton_backward(dy_TF, x_T2F, mask_F, with_h, with_dm, skip_blocks, inplace)
    return _reference_backward(dy_TF, x_T2F, mask_F, with_h, with_dm, inplace)


_TRITON_DTYPES = (torch.bfloat16, torch.float32)
_DTYPES = (*_TRITON_DTYPES, torch.float16, torch.float64)


def _unit_stride(t: Tensor) -> bool:
    return t.shape[-1] <= 1 or t.stride(-1) == 1


def _check_inplace(x_T2F: Tensor) -> None:
    """dx cannot be written into a copy of x, nor into rows that share memory."""
    rows, strides = _rows(x_T2F), x_T2F.stride()
    if rows.data_ptr() != x_T2F.data_ptr():
        raise ValueError(f"inplace needs evenly spaced rows, not strides {strides}")
    if len(rows) > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(
            f"inplace needs rows that do not overlap, {rows.shape[1]} or more apart, not strides "
            f"{strides}"
        )


def _check(
    x_T2F: Tensor,
    mask_F: Tensor | None,
    dy_TF: Tensor | None,
    skip_blocks: bool,
    with_dm: bool,
    implementation: str,
) -> bool:
    """Refuse what no path can take; whether the path is Triton."""
    if x_T2F.dim() == 0 or x_T2F.shape[-1] % 2 or x_T2F.shape[-1] == 0:
        raise ValueError(
            "the last dimension of x holds gate and up and must be even, not "
            f"{x_T2F.shape[-1] if x_T2F.dim() else 'missing'}"
        )
    width, dtype = x_T2F.shape[-1] // 2, x_T2F.dtype
    in_triton = uses_triton("masked_swiglu", implementation, x_T2F.device)
    legal = _TRITON_DTYPES if in_triton else _DTYPES
    if dtype not in legal:
        raise ValueError(f"x is {dtype}; legal: {', '.join(map(str, legal))}")
    if mask_F is not None and (
        mask_F.shape != (width,) or mask_F.dtype not in (dtype, torch.float32)
    ):
        names = " or ".join(dict.fromkeys((str(dtype), "torch.float32")))
        raise ValueError(f"mask is {mask_F.dtype} {tuple(mask_F.shape)}; legal: {names} ({width},)")
    if dy_TF is not None and (dy_TF.dtype != dtype or dy_TF.shape != (*x_T2F.shape[:-1], width)):
        raise ValueError(
            f"dy is {dy_TF.dtype} {tuple(dy_TF.shape)}; legal: {dtype} {(*x_T2F.shape[:-1], width)}"
        )
    for name, tensor in (("x", x_T2F), ("mask", mask_F), ("dy", dy_TF)):
        if tensor is None:
            continue
        if tensor.device != x_T2F.device:
            raise ValueError(f"{name} is on {tensor.device}; legal: {x_T2F.device}, as x")
        if not _unit_stride(tensor):
            raise ValueError(
                f"{name} has strides {tensor.stride()}; legal: 1 in the last dimension; "
                "call contiguous()"
            )
    if skip_blocks and mask_F is None:
        raise ValueError("skip_blocks without a mask has nothing to skip")
    if skip_blocks and with_dm:
        raise ValueError("dm of a masked neuron is not 0: skip_blocks cannot go with it")
    return in_triton
