"""What Transformer Engine's Python asks of its C++, in plain PyTorch: bf16 and fp32, no FP8."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor


class DType(enum.IntEnum):
    """Numbers of the dtypes as Transformer Engine counts them."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_TORCH = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


class _Members(type):
    """Hands out a member for any name: which ones there are differs from version to version."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name != "__members__":
            raise AttributeError(name)
        members = cls.__dict__["known"]
        if name == "__members__":
            return members
        return members.setdefault(name, int.__new__(cls, len(members)))


def __getattr__(name: str) -> Any:
    """An enum or a class for a capitalized name, else a function that says what is missing."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        made: Any = _Members(name, (int,), {"known": {}})
    else:

        def made(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in")

    globals()[name] = made
    return made


# What Transformer Engine looks up when it is imported or picks a kernel by name, and does not call.
for _name in (
    "layernorm_fwd", "layernorm_bwd", "rmsnorm_bwd_add", "quantize", "dequantize", "bgrad_quantize",
    "split_quantize", "group_quantize", "multi_tensor_quantize", "fused_qkv_rope_forward",
    "fused_qkv_rope_backward", "fused_attn_fwd", "fused_attn_bwd", "swiglu", "dswiglu", "gelu",
    "dgelu", "geglu", "dgeglu", "relu", "drelu", "silu", "dsilu", "DType",
):  # fmt: skip
    if _name not in globals():
        __getattr__(_name)


def _on_cuda(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_cuda:
            raise RuntimeError(f"a kernel of Transformer Engine got a tensor on {tensor.device}")


def get_cublasLt_version() -> int:
    return 130200


def get_cudnn_version() -> int:
    return 91300


def get_num_cublas_streams() -> int:
    return 4


def device_supports_multicast(*_: Any) -> bool:
    return False


def get_fused_attn_backend(*_: Any, **__: Any) -> Any:
    return globals()["NVTE_Fused_Attn_Backend"].NVTE_No_Backend


def generic_gemm(
    A: Tensor, transa: bool, B: Tensor, transb: bool, out: Tensor | None, quantizer: Any,
    out_dtype: DType | None, bias: Tensor | None, bias_dtype: Any, gelu: bool, gelu_in: Any,
    grad: bool, workspace: Tensor, workspace_size: int, accumulate: bool, *_: Any, **__: Any,
) -> tuple[Tensor, Tensor | None, None, None]:  # fmt: skip
    """B A in cuBLAS's column-major order, in fp32; added to ``out`` or written over it."""
    _on_cuda(A, B, out, bias, workspace)
    assert quantizer is None and not gelu and A.dtype == B.dtype
    a, b = (x.reshape(-1, x.shape[-1]).float() for x in (A, B))
    product = (b.t() if transb else b) @ (a.t() if transa else a)
    bias_grad = b.sum(0) if grad and bias is not None else None
    if not grad and bias is not None and bias.numel():
        product = product + bias
    if not transb:
        product = product.view(*B.shape[:-1], product.shape[-1])
    if out is None:
        dtype = B.dtype if out_dtype is None else _TORCH[out_dtype]
        return product.to(dtype), bias_grad, None, None
    product = product.view(out.shape).to(out.dtype)
    out.add_(product) if accumulate else out.copy_(product)
    return out, bias_grad, None, None


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: Any,
    _margin: int, zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:  # fmt: skip
    _on_cuda(x, weight, out)
    assert x.dim() == 2 and quantizer is None
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * scale[:, None] * (weight.float() + zero_centered)
    y = y.to(dtype if isinstance(dtype, torch.dtype) else _TORCH[dtype])
    return (y if out is None else out.copy_(y)), None, scale


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, _margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    _on_cuda(dy, x, scale, weight)
    normed = x.float() * scale[:, None]
    weighted = dy.float() * (weight.float() + zero_centered)
    dx = scale[:, None] * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)


def _rotate(x: Tensor, freqs: Tensor, sign: int) -> Tensor:
    _on_cuda(x, freqs)
    angles = freqs[: x.shape[0]]
    turned, rest = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * angles.cos() + sign * torch.cat([-second, first], -1) * angles.sin()
    return torch.cat([turned.to(x.dtype), rest], -1)


def fused_rope_forward(x: Tensor, freqs: Tensor, *_: Any) -> Tensor:
    """Rotary embedding of [s, b, heads, channels]."""
    return _rotate(x, freqs, 1)


def fused_rope_backward(dy: Tensor, freqs: Tensor, *_: Any) -> Tensor:
    return _rotate(dy, freqs, -1)


def scaled_upper_triang_masked_softmax_forward(x: Tensor, scale: float | Tensor) -> Tensor:
    """Causal softmax of scores [b, s, s]."""
    _on_cuda(x)
    future = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return (x.float() * float(scale)).masked_fill(future, float("-inf")).softmax(-1).to(x.dtype)


def scaled_upper_triang_masked_softmax_backward(
    dy: Tensor, y: Tensor, scale: float | Tensor
) -> Tensor:
    d, p = dy.float(), y.float()
    return (float(scale) * p * (d - (d * p).sum(-1, keepdim=True))).to(y.dtype)


scaled_aligned_causal_masked_softmax_forward = scaled_upper_triang_masked_softmax_forward
scaled_aligned_causal_masked_softmax_backward = scaled_upper_triang_masked_softmax_backward


def scaled_masked_softmax_forward(x: Tensor, mask: Tensor, scale: float | Tensor) -> Tensor:
    """Softmax of scores [b, heads, s, s] where ``mask``, bool, is not set."""
    _on_cuda(x, mask)
    return (x.float() * float(scale)).masked_fill(mask, float("-inf")).softmax(-1).to(x.dtype)


def scaled_masked_softmax_backward(dy: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    return scaled_upper_triang_masked_softmax_backward(dy, y, float(scale))


def multi_tensor_l2norm(
    _chunk: int, noop: Tensor, lists: list[list[Tensor]], _per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    _on_cuda(noop, *lists[0])
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm().view(1), norms


def multi_tensor_scale(_chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    _on_cuda(noop, *lists[0], *lists[1])
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    _chunk: int, noop: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float,
    eps: float, step: int, decoupled: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """AdamW of fp32 weights."""
    assert decoupled and bias_correction
    for tensors in zip(*lists[:4], strict=True):
        _on_cuda(noop, *tensors)
        grad, weight, average, square = (t.view(-1) for t in tensors)
        assert average.dtype == square.dtype == torch.float32
        grad = grad.float()
        average.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = (square / (1 - beta2**step)).sqrt() + eps
        weight.mul_(1 - lr * weight_decay).sub_(lr / (1 - beta1**step) * average / size)
