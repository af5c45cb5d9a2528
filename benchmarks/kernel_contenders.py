"""What else computes the masked activation and the scores, and whether it is right."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_clock import Call
from torch import Tensor

from megatron_idea.kernels import MatrixShard, masked_swiglu, matrix_scores
from megatron_idea.kernels.swiglu import reference
from megatron_idea.testing import assert_close

PASSES = {"forward": 3, "backward": 5}
"""Elements that must be read or written per token and neuron."""


@dataclass(frozen=True)
class Contender:
    """A way to compute the activation."""

    name: str
    activation: Callable[[Tensor, Tensor], Tensor]
    masked: bool = True
    slow: bool = True
    """Compiles for every shape or moves many bytes: not at each of them."""


def contenders(implementation: str) -> tuple[list[Contender], dict[str, str]]:
    """All of them, and why some are left out."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    def ours(x: Tensor, m: Tensor | None) -> Tensor:
        return masked_swiglu(x, m, implementation=implementation)

    # One lambda each: torch.compile keeps what it compiled by code object.
    static = torch.compile(lambda x, m: reference(x, m), dynamic=False)
    dynamic = torch.compile(lambda x, m: reference(x, m), dynamic=True)
    found = [
        Contender("ours", ours, slow=False),
        Contender("ours_unmasked", lambda x, _: ours(x, None), masked=False, slow=False),
        Contender("eager", reference),
        Contender("compile_static", static),
        Contender("compile_dynamic", dynamic),
        # Without a mask: what a path costs that trusts a removed neuron's weights to be zero.
        Contender("megatron", lambda x, _: bias_swiglu_impl(x, None), masked=False),
        Contender("megatron_mask", lambda x, m: bias_swiglu_impl(x, None) * m),
    ]
    try:
        liger = importlib.import_module("liger_kernel.ops").LigerFusedGateUpSiLUMulFunction
    except (ImportError, AttributeError) as error:
        return found, {"liger": str(error)}
    return [
        *found,
        Contender("liger", lambda x, _: liger.apply(x, False), masked=False),
        Contender("liger_mask", lambda x, m: liger.apply(x, False) * m),
    ], {}


@dataclass(frozen=True)
class Inputs:
    """Buffers of one shape in rotation."""

    xs: list[Tensor]
    dys: list[Tensor]
    mask: Tensor

    @classmethod
    def draw(
        cls, tokens: int, width: int, dtype: torch.dtype, device: torch.device, least_bytes: int = 0
    ) -> Inputs:
        count = max(4, math.ceil(least_bytes / (3 * tokens * width * dtype.itemsize)))
        generator = torch.Generator(device).manual_seed(tokens + width)
        kinds = {"generator": generator, "device": device, "dtype": dtype}
        xs = [torch.randn(tokens, 2 * width, **kinds).requires_grad_() for _ in range(count)]
        dys = [torch.randn(tokens, width, **kinds) for _ in range(count)]
        return cls(xs, dys, (torch.arange(width, device=device) % 3 > 0).to(dtype))

    def calls(self, contender: Contender) -> dict[str, Call]:
        """What to time, by pass; the graphs of the backward are made on the way."""
        n = len(self.xs)
        ys = [contender.activation(x, self.mask) for x in self.xs]

        def backward(i: int) -> Any:
            j = i % n
            return torch.autograd.grad(ys[j], self.xs[j], self.dys[j], retain_graph=True)

        return {
            "forward": lambda i: contender.activation(self.xs[i % n], self.mask),
            "backward": backward,
        }


def check(contender: Contender, dtype: torch.dtype, device: torch.device) -> None:
    """Compare with fp64. Raises: AssertionError where they differ."""
    inputs = Inputs.draw(40, 264, dtype, device)
    x, dy = inputs.xs[0], inputs.dys[0]
    y = contender.activation(x, inputs.mask)
    (dx,) = torch.autograd.grad(y, x, dy)
    x64 = x.detach().double().requires_grad_()
    law = reference(x64, inputs.mask.double() if contender.masked else None)
    (expected_dx,) = torch.autograd.grad(law, x64, dy.double())
    # In bf16 an unfused path rounds up to four times, by half of 2^-8 each.
    limit = 2**-6 if dtype == torch.bfloat16 else 1e-5
    assert_close(y, law, f"y of {contender.name}", limit)
    assert_close(dx, expected_dx, f"dx of {contender.name}", limit)


def runnable(
    found: list[Contender], dtype: torch.dtype, device: torch.device, left_out: dict[str, str]
) -> list[Contender]:
    """Those that run here and are right; why a baseline does not run goes to ``left_out``."""
    good = []
    for contender in found:
        try:
            check(contender, dtype, device)
        except AssertionError:
            raise
        except Exception as error:  # a baseline may want a compiler or a GPU that is not here
            if contender.name.startswith("ours"):
                raise
            left_out[contender.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        print(f"{contender.name:<16} agrees with fp64")
        good.append(contender)
    return good


def draw_ffns(layers: int, hidden: int, f: int, device: torch.device) -> list[MatrixShard]:
    """fc1 per row and fc2 per column of every layer: bf16 weights and fp32 gradients."""
    return [
        MatrixShard(
            shape, per,
            torch.randn(math.prod(shape), dtype=torch.bfloat16, device=device),
            torch.randn(math.prod(shape), device=device),
        )
        for _ in range(layers)
        for shape, per in (((2 * f, hidden), "row"), ((hidden, f), "column"))
    ]  # fmt: skip


def score_formula(w: Tensor, g: Tensor, shape: tuple[int, int], axis: int) -> Tensor:
    """|w g| over rows or columns, in g's dtype."""
    return (w.to(g.dtype) * g).abs().view(shape).sum(axis)


def score_calls(shards: list[MatrixShard], implementation: str) -> dict[str, Call]:
    """All matrices at once, or one by one. Raises: AssertionError where they differ from fp64."""
    compiled = torch.compile(score_formula, dynamic=False)
    device, axes = shards[0].w.device, [1 if s.per == "row" else 0 for s in shards]

    def one_by_one(formula: Callable[..., Tensor]) -> Call:
        return lambda _: [
            formula(s.w, s.g, s.shape, axis) for s, axis in zip(shards, axes, strict=True)
        ]

    calls: dict[str, Call] = {
        "ours": lambda _: matrix_scores(shards, device=device, implementation=implementation),
        "eager": one_by_one(score_formula),
        "compile_static": one_by_one(compiled),
    }
    for name, call in calls.items():
        found = call(0)
        for shard, axis, scores in zip(shards[:2], axes, found, strict=False):
            law = score_formula(shard.w, shard.g.double(), shard.shape, axis)
            assert_close(scores / law, torch.ones_like(law), f"scores of {name}", 1e-5)
    return calls
