"""What computes the masked activation besides our kernels, and whether it is right."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_clock import Call
from torch import Tensor

from megatron_idea.kernels import masked_swiglu, masked_swiglu_backward
from megatron_idea.kernels.swiglu import reference
from megatron_idea.testing import assert_close


@dataclass(frozen=True)
class Pass:
    """Elements that it must read and write per token and neuron."""

    name: str
    reads: int
    writes: int

    def bytes(self, tokens: int, width: int, itemsize: int, alive: float) -> float:
        return (self.reads * alive + self.writes) * itemsize * tokens * width


PASSES = (Pass("forward", 2, 1), Pass("backward", 3, 2), Pass("backward_h_dm", 3, 3))
HALF_DEAD = 0.5


@dataclass(frozen=True)
class Contender:
    """A way to compute the masked activation, or the backward that makes h and dm as well."""

    name: str
    activation: Callable[[Tensor, Tensor | None], Tensor] | None = None
    backward_h_dm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] | None = None
    mask: str = "scattered"
    slow: bool = True
    """Compiles for every shape or moves many bytes: not at each of them."""

    @property
    def alive(self) -> float:
        """The share of x that it must read: half, where it skips blocks."""
        return HALF_DEAD if self.mask == "clustered" else 1.0


def contenders(implementation: str) -> tuple[list[Contender], dict[str, str]]:
    """All of them, and why some are left out."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    def ours(x: Tensor, m: Tensor | None, **settings: bool) -> Tensor:
        return masked_swiglu(x, m, implementation=implementation, **settings)

    def ours_h_dm(dy: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return masked_swiglu_backward(
            dy, x, m, with_h=True, with_dm=True, implementation=implementation
        )

    # One lambda each: torch.compile keeps what it compiled by code object.
    static = torch.compile(lambda x, m: reference(x, m), dynamic=False)
    dynamic = torch.compile(lambda x, m: reference(x, m), dynamic=True)
    found = [
        Contender("ours", ours, slow=False),
        Contender("ours_unmasked", ours, mask="none", slow=False),
        Contender("ours_skip", lambda x, m: ours(x, m, skip_blocks=True), None, "clustered", False),
        Contender("ours_h_dm", None, ours_h_dm, slow=False),
        Contender("eager", reference),
        Contender("compile_static", static),
        Contender("compile_dynamic", dynamic),
        Contender("compile_h_dm", None, torch.compile(backward_h_dm, dynamic=False)),
        # Without a mask: what a path costs that sets a removed neuron's weights to zero instead.
        Contender("megatron", lambda x, _: bias_swiglu_impl(x, None), mask="none"),
        Contender("megatron_mask", lambda x, m: bias_swiglu_impl(x, None) * m),
    ]
    left_out = {}
    try:
        liger = importlib.import_module("liger_kernel.ops").LigerFusedGateUpSiLUMulFunction
        found += [
            Contender("liger", lambda x, _: liger.apply(x, False), mask="none"),
            Contender("liger_mask", lambda x, m: liger.apply(x, False) * m),
        ]
    except (ImportError, AttributeError) as error:
        left_out["liger"] = left_out["liger_mask"] = str(error)
    return found, left_out


def backward_h_dm(dy: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, h, dm as one expression for torch.compile."""
    gate, up = (half.float() for half in x.chunk(2, dim=-1))
    s = torch.sigmoid(gate)
    h, d = gate * s * up, dy.float()
    dm, d = (d * h).sum(0), d * m.float()
    dx = torch.cat([d * up * s * (1 + gate * (1 - s)), d * gate * s], dim=-1)
    return dx.to(x.dtype), (h * m.float()).to(x.dtype), dm


def score_formula(
    w1: Tensor, g1: Tensor, w2: Tensor, g2: Tensor, f: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[3, f]: |w g| over gate rows, up rows and down columns."""
    rows = (w1.to(dtype) * g1).abs().view(2 * f, -1).sum(1)
    return torch.cat([rows, (w2.to(dtype) * g2).abs().view(-1, f).sum(0)]).view(3, f)


@dataclass(frozen=True)
class Inputs:
    """Rotating buffers of one shape."""

    xs: list[Tensor]
    dys: list[Tensor]
    masks: dict[str, Tensor | None]

    @classmethod
    def draw(
        cls, tokens: int, width: int, dtype: torch.dtype, device: torch.device, least_bytes: int = 0
    ) -> Inputs:
        each = 3 * tokens * width * dtype.itemsize
        count = max(4, math.ceil(least_bytes / each))
        generator = torch.Generator(device).manual_seed(tokens + width)
        kinds = {"generator": generator, "device": device, "dtype": dtype}
        xs = [torch.randn(tokens, 2 * width, **kinds).requires_grad_() for _ in range(count)]
        dys = [torch.randn(tokens, width, **kinds) for _ in range(count)]
        neuron = torch.arange(width, device=device)
        masks = {"none": None, "scattered": (neuron % 3 > 0).to(dtype),
                 "clustered": (neuron >= width * HALF_DEAD).to(dtype)}  # fmt: skip
        return cls(xs, dys, masks)

    def calls(self, contender: Contender) -> Iterator[tuple[Pass, Call]]:
        """What to time; the graphs of the backward are made on the way."""
        mask, n = self.masks[contender.mask], len(self.xs)
        forward, backward, extras = PASSES
        if contender.backward_h_dm is not None:
            run = contender.backward_h_dm
            xs = [x.detach() for x in self.xs]
            yield extras, lambda i: run(self.dys[i % n], xs[i % n], mask)
        if (activation := contender.activation) is not None:
            yield forward, lambda i: activation(self.xs[i % n], mask)
            ys = [activation(x, mask) for x in self.xs]

            def run_backward(i: int) -> Any:
                j = i % n
                return torch.autograd.grad(ys[j], self.xs[j], self.dys[j], retain_graph=True)

            yield backward, run_backward


def check(contender: Contender, dtype: torch.dtype, device: torch.device) -> None:
    """Compare with fp64. Raises: AssertionError where they differ."""
    inputs = Inputs.draw(40, 264, dtype, device)
    x, dy, mask = inputs.xs[0], inputs.dys[0], inputs.masks[contender.mask]
    x64 = x.detach().double().requires_grad_()
    factor = torch.ones(264, device=device) if mask is None else mask
    factor = factor.double().requires_grad_()
    law = reference(x64, factor)
    expected_dx, expected_dm = torch.autograd.grad(law, (x64, factor), dy.double())
    if contender.activation is not None:
        h = contender.activation(x, mask)
        (dx,) = torch.autograd.grad(h, x, dy)
        dm = expected_dm
    else:
        dx, h, dm = contender.backward_h_dm(dy, x.detach(), mask)
    # In bf16 an unfused path rounds up to four times, by half of 2^-8 each.
    limit = 2**-6 if dtype == torch.bfloat16 else 1e-5
    for what, ours, theirs in (("h", h, law), ("dx", dx, expected_dx), ("dm", dm, expected_dm)):
        assert_close(ours, theirs, f"{what} of {contender.name}", limit)


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
