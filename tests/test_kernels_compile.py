"""Every Triton kernel is compiled for 8.0, 9.0 and 10.0, without a GPU, by the real launchers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idea.kernels import MatrixShard, masked_swiglu, matrix_scores

pytest.importorskip("triton", reason="the triton extra brings it")

from ahead_of_time import ARCHITECTURES, Compiled, compiling

TOKENS, WIDTH, HIDDEN = 16, 1408, 512
TRITON = {"implementation": "triton"}

Compile = Callable[[Callable[[], Any]], list[Compiled]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> Compile:
    """``compiled(call)``: what each launch within ``call`` compiles to."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))

    def compile_all(call: Callable[[], Any]) -> list[Compiled]:
        with compiling(request.param) as kernels:
            call()
        return kernels

    return compile_all


def gate(
    kernel: Compiled, loads: int, stores: int, registers: int, narrow: tuple[int, int] = (0, 0)
) -> None:
    """``loads`` and ``stores`` of 128 bits a loop turn, ``narrow`` others besides at most."""
    assert kernel.spilled_bytes == 0, kernel
    assert kernel.registers <= registers, kernel
    turns = kernel.loads // loads if loads else 0  # that the assembler wrote out
    assert (turns > 0) == (loads > 0), kernel
    assert kernel.loads == turns * loads and kernel.stores == turns * stores, kernel
    assert kernel.narrow_loads <= narrow[0] and kernel.narrow_stores <= narrow[1], kernel


def forward_backward(x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Launch both kernels."""
    y = masked_swiglu(x.requires_grad_(), mask, **TRITON)
    torch.autograd.grad(y, x, torch.zeros_like(y))


# 40 registers leave room for 12 programs of 4 warps on a multiprocessor, 64 for 8.
@pytest.mark.parametrize(
    ("dtype", "masked"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)],
    ids=str,
)
def test_swiglu_moves_128_bits_at_a_time(
    compiled: Compile, dtype: torch.dtype, masked: bool
) -> None:
    x = torch.zeros(TOKENS, 2 * WIDTH, dtype=dtype)
    mask = torch.ones(WIDTH, dtype=dtype) if masked else None
    forward, backward = compiled(lambda: forward_backward(x, mask))
    # The mask's own load may be narrow: it is one a program.
    gate(forward, loads=2, stores=1, registers=40, narrow=(masked, 0))
    gate(backward, loads=3, stores=2, registers=56, narrow=(masked, 0))


@pytest.mark.parametrize("compiled", [90], indirect=True)
@pytest.mark.parametrize("width", [24, 264, 14848])
def test_any_multiple_of_eight_is_a_width_of_full_vectors(compiled: Compile, width: int) -> None:
    x = torch.zeros(TOKENS, 2 * width, dtype=torch.bfloat16)
    forward, backward = compiled(lambda: forward_backward(x))
    gate(forward, loads=2, stores=1, registers=40)
    gate(backward, loads=3, stores=2, registers=56)


@pytest.mark.parametrize("compiled", [90], indirect=True)
def test_the_gates_notice_lost_alignment(compiled: Compile) -> None:
    shifted = torch.zeros(TOKENS * 2 * WIDTH + 1, dtype=torch.bfloat16)[1:].view(TOKENS, -1)
    odd = torch.zeros(TOKENS, 2 * 1404, dtype=torch.bfloat16)
    for x in (shifted, odd):
        forward, _ = compiled(lambda x=x: forward_backward(x))
        assert forward.loads == 0


def shards(dtype: torch.dtype, skipped: int = 0) -> list[MatrixShard]:
    """Matrices of two widths each way, without their first elements: aligned or not."""
    found = []
    for shape, per in (
        ((2 * WIDTH, HIDDEN), "row"), ((HIDDEN, WIDTH), "row"),
        ((HIDDEN, WIDTH), "column"), ((2 * WIDTH, HIDDEN), "column"),
    ):  # fmt: skip
        w, g = (torch.zeros(shape[0] * shape[1], dtype=d)[skipped:] for d in (dtype, torch.float32))
        found.append(MatrixShard(shape, per, w, g, skipped, v=g))
    return found


def scores(matrices: list[MatrixShard], element: str = "abs", reduction: str = "sum") -> None:
    matrix_scores(matrices, element, reduction, device=torch.device("cpu"), **TRITON)


@pytest.mark.parametrize(
    ("dtype", "element", "reduction", "loads"),
    [
        # 1 vector of bf16 weights or 2 of fp32, 2 of gradients, 2 of second moments.
        (torch.bfloat16, "abs", "sum", 3),
        (torch.float32, "abs", "max", 4),
        (torch.bfloat16, "weight", "sum", 1),
        (torch.bfloat16, "fisher", "sum", 5),
        (torch.float32, "fisher", "max", 6),
    ],
    ids=str,
)
def test_scores_are_three_launches_with_full_vectors(
    compiled: Compile, dtype: torch.dtype, element: str, reduction: str, loads: int
) -> None:
    matrices = [*shards(dtype), MatrixShard((64, HIDDEN), "row"), *shards(dtype, skipped=16)]
    rows, columns, finalise = compiled(lambda: scores(matrices, element, reduction))
    # Narrow: the table's entry, and the results.
    narrow = (11 if element == "fisher" else 10, 1)
    gate(rows, loads, 0, registers=56, narrow=narrow)
    gate(columns, loads, 0, registers=56, narrow=narrow)
    gate(finalise, 0, 0, registers=48, narrow=(24, 1))


@pytest.mark.parametrize("compiled", [90], indirect=True)
def test_a_shard_that_is_not_aligned_slows_no_other(compiled: Compile) -> None:
    kernels = compiled(lambda: scores([*shards(torch.bfloat16), *shards(torch.bfloat16, 3)]))
    rows, slow_rows, columns, slow_columns, _finalise = kernels
    for kernel, loads in ((rows, 3), (columns, 3), (slow_rows, 0), (slow_columns, 0)):
        gate(kernel, loads, 0, registers=80, narrow=(64, 1))


@pytest.mark.parametrize("compiled", [90], indirect=True)
def test_offsets_of_rows_have_64_bits(compiled: Compile) -> None:
    """2^31 elements are 72k tokens of F = 14848; 32 bits would wrap without an error."""
    x = torch.zeros(TOKENS, 2 * WIDTH)
    kernels = compiled(lambda: (forward_backward(x), scores(shards(torch.bfloat16))))
    assert len(kernels) == 5
    for kernel in kernels:
        # Columns within a row may have 32 bits, whole tiles and rows (one column wide) may not.
        offsets = re.findall(r"tt\.addptr .*<[\w!.<>]*>, tensor<([\dx]+xi\d\d)>", kernel.ttir)
        assert any(o.endswith("xi64") for o in offsets), kernel
        assert not any(o.endswith("x1xi32") for o in offsets), kernel
