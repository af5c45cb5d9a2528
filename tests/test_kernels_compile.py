"""Every Triton kernel is compiled for 8.0, 9.0 and 10.0, without a GPU, by the real launchers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idea.kernels import FfnShard, ffn_scores, masked_swiglu, masked_swiglu_backward

pytest.importorskip("triton", reason="the triton extra brings it")

from megatron_idea.kernels.ahead_of_time import ARCHITECTURES, Compiled, compiling

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
    kernel: Compiled,
    loads: int,
    stores: int | None,
    registers: int,
    narrow: tuple[int, int] = (0, 0),
) -> None:
    """``loads`` and ``stores`` of 128 bits a loop turn, ``narrow`` others besides at most.

    ``stores`` is None where the assembler may write out another loop than that of the loads.
    """
    assert kernel.spilled_bytes == 0, kernel
    assert kernel.registers <= registers, kernel
    turns = kernel.loads // loads if loads else 0  # that the assembler wrote out
    assert (turns > 0) == (loads > 0), kernel
    assert kernel.loads == turns * loads, kernel
    assert stores is None or kernel.stores == turns * stores, kernel
    assert kernel.narrow_loads <= narrow[0] and kernel.narrow_stores <= narrow[1], kernel


# 40 registers leave room for 12 programs of 4 warps on a multiprocessor, 64 for 8.
@pytest.mark.parametrize(
    ("dtype", "masked"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)],
    ids=str,
)
def test_swiglu_moves_128_bits_at_a_time(
    compiled: Compile, dtype: torch.dtype, masked: bool
) -> None:
    x, dy = torch.zeros(TOKENS, 2 * WIDTH, dtype=dtype), torch.zeros(TOKENS, WIDTH, dtype=dtype)
    mask = torch.ones(WIDTH, dtype=dtype) if masked else None
    # The mask's own load may be narrow: it is one a program.
    (forward,) = compiled(lambda: masked_swiglu(x, mask, **TRITON))
    gate(forward, loads=2, stores=1, registers=40, narrow=(masked, 0))
    (backward,) = compiled(lambda: masked_swiglu_backward(dy, x, mask, **TRITON))
    gate(backward, loads=3, stores=2, registers=56, narrow=(masked, 0))


def test_what_the_backward_makes_besides_costs_one_store(compiled: Compile) -> None:
    x, dy = (torch.zeros(TOKENS, n * WIDTH, dtype=torch.bfloat16) for n in (2, 1))
    mask = torch.ones(WIDTH, dtype=torch.bfloat16)
    backward, reduction = compiled(
        lambda: masked_swiglu_backward(dy, x, mask, with_h=True, with_dm=True, **TRITON)
    )
    # The last store is that of dm's partial sums, one a program.
    gate(backward, loads=3, stores=3, registers=80, narrow=(1, 1))
    gate(reduction, loads=4, stores=0, registers=48, narrow=(0, 1))


def test_skipping_keeps_the_vectors(compiled: Compile) -> None:
    x, dy = (torch.zeros(TOKENS, n * WIDTH, dtype=torch.bfloat16) for n in (2, 1))
    mask = torch.ones(WIDTH, dtype=torch.bfloat16)
    (forward,) = compiled(lambda: masked_swiglu(x, mask, skip_blocks=True, **TRITON))
    gate(forward, loads=2, stores=None, registers=48, narrow=(1, 0))
    (backward,) = compiled(lambda: masked_swiglu_backward(dy, x, mask, skip_blocks=True, **TRITON))
    gate(backward, loads=3, stores=None, registers=64, narrow=(1, 0))


@pytest.mark.parametrize("compiled", [90], indirect=True)
@pytest.mark.parametrize("width", [24, 264, 14848])
def test_any_multiple_of_eight_is_a_width_of_full_vectors(compiled: Compile, width: int) -> None:
    x, dy = (torch.zeros(TOKENS, n * width, dtype=torch.bfloat16) for n in (2, 1))
    (forward,) = compiled(lambda: masked_swiglu(x, None, **TRITON))
    gate(forward, loads=2, stores=1, registers=40)
    (backward,) = compiled(lambda: masked_swiglu_backward(dy, x, None, **TRITON))
    gate(backward, loads=3, stores=2, registers=56)


def shard(dtype: torch.dtype, skipped: int = 0) -> FfnShard:
    """An FFN without its first elements, on which its addresses are aligned or not."""
    w1, g1, w2, g2 = (
        torch.zeros(n * WIDTH * HIDDEN, dtype=d)[skipped:]
        for n, d in ((2, dtype), (2, torch.float32), (1, dtype), (1, torch.float32))
    )
    return FfnShard(WIDTH, HIDDEN, w1, g1, skipped, w2, g2, skipped)


@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [(torch.bfloat16, "sum"), (torch.bfloat16, "max"), (torch.float32, "sum")],
    ids=str,
)
def test_scores_are_three_launches_with_full_vectors(
    compiled: Compile, dtype: torch.dtype, reduction: str
) -> None:
    # 1 vector of bf16 weights or 2 of fp32, 2 of gradients.
    loads = (1 if dtype == torch.bfloat16 else 2) + 2
    layers = [shard(dtype), FfnShard(64, HIDDEN), shard(dtype, skipped=16)]
    averages = [torch.zeros(3, layer.f) for layer in layers]
    rows, columns, finalise = compiled(
        lambda: ffn_scores(layers, "abs", reduction, averages=averages, **TRITON)
    )
    # Narrow: the table's row, and the results.
    gate(rows, loads, 0, registers=56, narrow=(7, 1))
    gate(columns, loads, 0, registers=56, narrow=(8, 1))
    gate(finalise, 0, 0, registers=48, narrow=(32, 6))


def test_an_unaligned_shard_compiles_too(compiled: Compile) -> None:
    for kernel in compiled(lambda: ffn_scores([shard(torch.bfloat16, skipped=3)], **TRITON)):
        gate(kernel, 0, 0, registers=80, narrow=(64, 3))


@pytest.mark.parametrize("compiled", [90], indirect=True)
def test_the_gates_notice_lost_alignment(compiled: Compile) -> None:
    shifted = torch.zeros(TOKENS * 2 * WIDTH + 1, dtype=torch.bfloat16)[1:].view(TOKENS, -1)
    (forward,) = compiled(lambda: masked_swiglu(shifted, None, **TRITON))
    assert forward.loads == 0
    (forward,) = compiled(
        lambda: masked_swiglu(torch.zeros(TOKENS, 2 * 1404, dtype=torch.bfloat16), None, **TRITON)
    )
    assert forward.loads == forward.stores == 0


@pytest.mark.parametrize("compiled", [90], indirect=True)
def test_offsets_of_rows_have_64_bits(compiled: Compile) -> None:
    """2^31 elements are 72k tokens of F = 14848; 32 bits would wrap without an error."""
    x, dy = torch.zeros(TOKENS, 2 * WIDTH), torch.zeros(TOKENS, WIDTH)
    kernels = compiled(
        lambda: (
            masked_swiglu(x, None, **TRITON),
            masked_swiglu_backward(dy, x, torch.ones(WIDTH), with_h=True, with_dm=True, **TRITON),
            ffn_scores([shard(torch.bfloat16)], **TRITON),
        )
    )
    assert len(kernels) == 6
    for kernel in kernels:
        # Columns within a row may have 32 bits, whole tiles and rows (one column wide) may not.
        offsets = re.findall(r"tt\.addptr .*<[\w!.<>]*>, tensor<([\dx]+xi\d\d)>", kernel.ttir)
        assert any(o.endswith("xi64") for o in offsets), kernel
        assert not any(o.endswith("x1xi32") for o in offsets), kernel
