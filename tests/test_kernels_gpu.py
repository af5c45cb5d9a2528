"""What only a GPU can show of the kernels: rounding, sizes, CUDA graphs, launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_idea.kernels import MatrixShard, masked_swiglu, matrix_scores
from megatron_idea.testing import assert_close, assert_equal

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


def value_and_gradient(x: Tensor, mask: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = masked_swiglu(leaf, mask)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    return y.detach(), dx


def ffn(f: int, hidden: int, skipped: int = 0) -> list[MatrixShard]:
    """fc1 without its first weights, per row, and fc2, per column."""
    w1, w2 = draw(2 * f * hidden), draw(f * hidden)
    g1, g2 = (draw(len(w), dtype=torch.float32) for w in (w1, w2))
    return [
        MatrixShard((2 * f, hidden), "row", w1[skipped:], g1[skipped:], skipped),
        MatrixShard((hidden, f), "column", w2, g2),
    ]


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
    y, dx = value_and_gradient(x, mask, dy)
    for rows in (slice(0, 64), slice(tokens // 2, tokens // 2 + 64), slice(tokens - 64, tokens)):
        part = value_and_gradient(x[rows].clone(), mask, dy[rows].clone())
        assert_equal(y[rows], part[0], f"y {rows}")
        assert_equal(dx[rows], part[1], f"dx {rows}")


def test_a_cuda_graph_replays_what_was_captured() -> None:
    x, dy, mask = draw(256, 2 * 1408), draw(256, 1408), torch.ones(1408, device="cuda")
    shards = ffn(1408, 512)

    def step() -> list[Tensor]:
        return [*value_and_gradient(x, mask, dy), *matrix_scores(shards, device=GPU)]

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
        shards[0].g.mul_(scale)
        graph.replay()
        for replayed, eager in zip(captured, step(), strict=True):
            assert_equal(replayed, eager)


def test_three_kernels_score_many_layers_as_the_reference_does() -> None:
    shards = [shard for f in (1408, 704, 1008) for shard in ffn(f, 512, skipped=32)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ours = matrix_scores(shards, device=GPU)
        torch.cuda.synchronize()
    names = {"_rows_kernel", "_columns_kernel", "_finalise_kernel"}
    assert sorted(e.name for e in profile.events() if e.name in names) == sorted(names)
    law = matrix_scores(shards, device=GPU, implementation="reference")
    for mine, expected in zip(ours, law, strict=True):
        assert_close(mine / expected.max(), expected / expected.max(), tolerance=1e-5)
