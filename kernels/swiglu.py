"""Masked SwiGLU: the activation of a prunable FFN.

    y = silu(gate) * up * mask,   [gate | up] = x

Shapes: x_T2F [..., 2F] as fc1 leaves it on a tensor-parallel rank; mask_F [F]; y_TF [..., F].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x_T2F: Tensor, mask_F: Tensor | None = None) -> Tensor:
    """The formula in plain PyTorch: the law for every other path."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    y_TF = F.silu(gate_TF) * up_TF
    return y_TF if mask_F is None else y_TF * mask_F


class _MaskedSwiGLU(torch.autograd.Function):
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
        if mask_F is not None:
            dy_TF = dy_TF * mask_F
        gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
        dx_T2F = torch.empty_like(x_T2F)
        dgate_TF, dup_TF = dx_T2F.chunk(2, dim=-1)
        silu_TF = F.silu(gate_TF)
        torch.mul(dy_TF, silu_TF, out=dup_TF)
        torch.mul(dy_TF, up_TF, out=silu_TF)
        torch.ops.aten.silu_backward.grad_input(silu_TF, gate_TF, grad_input=dgate_TF)
        return dx_T2F, None


def masked_swiglu(x_T2F: Tensor, mask_F: Tensor | None = None) -> Tensor:
    """Gate, multiply and mask the output of a fused gate-and-up projection.

    Args:
        x_T2F: [..., 2F], gate half first.
        mask_F: [F] factors in x's dtype, 0 for a removed neuron; None keeps all. No gradient.
    Returns: [..., F]. Where the factor is 0 the output and the gradient of both halves are 0.
    Raises: ValueError for an odd last dimension or a mask of another length or dtype.
    """
    width = x_T2F.shape[-1]
    if width % 2:
        raise ValueError(f"the last dimension holds gate and up and must be even, not {width}")
    if mask_F is not None and (mask_F.shape != (width // 2,) or mask_F.dtype != x_T2F.dtype):
        raise ValueError(
            f"mask is {mask_F.dtype} {tuple(mask_F.shape)}; legal: {x_T2F.dtype} ({width // 2},)"
        )
    y_TF: Tensor = _MaskedSwiGLU.apply(x_T2F, mask_F)
    return y_TF
