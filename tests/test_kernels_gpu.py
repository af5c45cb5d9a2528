"""What only a GPU can show of the kernels: rounding, sizes, CUDA graphs, launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_idea.kernels import FfnShard, ffn_scores, masked_swiglu, masked_swiglu_backward
from megatron_idea.testing import assert_close, assert_equal

pytestmark = pytest.mark.gpu


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


def test_bf16_is_rounded_once_and_to_nearest() -> None:
    x = draw(333, 2 * 1408)
    y = masked_swiglu(x, implementation="triton")
    gate, up = x.double().chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    # Half a unit in the last of 8 bits, and what fp32 arithmetic adds to it.
    assert bool(((y.double() - exact).abs() <= exact.abs() * 2**-8 * (1 + 1e-3) + 1e-38).all())
    nearest = (y == exact.to(torch.bfloat16)).float().mean()
    assert float(nearest) > 0.995, "only what fp32 arithmetic pushes over a tie may differ"


def test_more_than_two_to_the_31st_elements() -> None:
    tokens, width = 80_000, 14_848
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    x, dy = draw(tokens, 2 * width), draw(tokens, width)
    assert x.numel() > 2**31
    mask = (torch.arange(width, device="cuda") % 3 > 0).bfloat16()
    y = masked_swiglu(x, mask)
    dx, _, dm = masked_swiglu_backward(dy, x, mask, with_dm=True)
    assert dm is not None
    for rows in (slice(0, 64), slice(tokens // 2, tokens // 2 + 64), slice(tokens - 64, tokens)):
        assert_equal(y[rows], masked_swiglu(x[rows].clone(), mask), f"y {rows}")
        part = masked_swiglu_backward(dy[rows].clone(), x[rows].clone(), mask)
        assert_equal(dx[rows], part.dx_T2F, f"dx {rows}")


def test_a_cuda_graph_replays_what_was_captured() -> None:
    x, dy, mask = draw(256, 2 * 1408), draw(256, 1408), torch.ones(1408, device="cuda")
    g1, g2 = (draw(n * 1408 * 512, dtype=torch.float32) for n in (2, 1))
    layer = FfnShard(1408, 512, draw(2 * 1408 * 512), g1, 0, draw(1408 * 512), g2, 0)

    def step() -> list[Tensor | None]:
        y = masked_swiglu(x, mask)
        gradients = masked_swiglu_backward(dy, x, mask, with_h=True, with_dm=True)
        return [y, *gradients, *ffn_scores([layer])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and copies the tables
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for scale in (1.0, -2.0):
        x.mul_(scale)
        g1.mul_(scale)
        graph.replay()
        for replayed, eager in zip(captured, step(), strict=True):
            assert replayed is not None and eager is not None
            assert_equal(replayed, eager)


def test_three_launches_score_many_layers_as_the_reference_does() -> None:
    layers = []
    for f in (1408, 704, 1000):
        w1, w2 = draw(2 * f * 512), draw(f * 512)
        g1, g2 = (draw(w.numel(), dtype=torch.float32) for w in (w1, w2))
        layers.append(FfnShard(f, 512, w1[32:], g1[32:], 32, w2, g2, 0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ffn_scores(layers)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.name.endswith("_kernel")]
    assert len(kernels) <= 3, kernels
    for ours, law in zip(
        ffn_scores(layers), ffn_scores(layers, implementation="reference"), strict=True
    ):
        assert_close(ours / law.max(), law / law.max(), tolerance=1e-5)
