"""Masked SwiGLU: the activation of a prunable FFN.

    y = silu(gate) * up * mask,   [gate | up] = x

Shapes: x_T2F [..., 2F] as fc1 leaves it on a tensor-parallel rank; mask_F [F]; y_TF [..., F].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def masked_swiglu(x_T2F: Tensor, mask_F: Tensor | None = None) -> Tensor:
    """Gate, multiply and mask the output of a fused gate-and-up projection.

    Args:
        x_T2F: [..., 2F], gate half first.
        mask_F: [F] factors in x's dtype, 0 for a removed neuron; None keeps all.
    Returns: [..., F]. Where the factor is 0 the output and the gradient of both halves are 0.
    Raises: ValueError for an odd last dimension or a mask of another length.
    """
    width = x_T2F.shape[-1]
    if width % 2:
        raise ValueError(f"the last dimension holds gate and up and must be even, not {width}")
    if mask_F is not None and mask_F.shape != (width // 2,):
        raise ValueError(f"mask has shape {tuple(mask_F.shape)}; legal: ({width // 2},)")
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    y_TF = F.silu(gate_TF) * up_TF
    return y_TF if mask_F is None else y_TF * mask_F
