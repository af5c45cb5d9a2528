"""The kernels' machine code, for GPUs that are not here: ``kernels.py --ahead-of-time``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from measure import write

from megatron_idea.kernels import FfnShard, ffn_scores, masked_swiglu, masked_swiglu_backward
from megatron_idea.kernels.ahead_of_time import ARCHITECTURES, compiling


def machine_code(architectures: tuple[int, ...]) -> dict[str, Any]:
    """Registers, spills and widths of loads and stores of every kernel, by architecture."""
    tokens, f, hidden, bf16 = 16, 1408, 512, torch.bfloat16
    triton = {"implementation": "triton"}
    x, dy = torch.zeros(tokens, 2 * f, dtype=bf16), torch.zeros(tokens, f, dtype=bf16)
    mask = torch.ones(f, dtype=bf16)
    weights = [torch.zeros(n * f * hidden, dtype=d) for n in (2, 1) for d in (bf16, torch.float32)]
    shard = FfnShard(f, hidden, *weights[:2], 0, *weights[2:], 0)
    # Names of the launches, with the bytes that each must move per element; 0 for the small ones.
    cases: tuple[tuple[dict[str, float], Callable[[], Any]], ...] = (
        ({"forward": 6}, lambda: masked_swiglu(x, None, **triton)),
        ({"forward, mask": 6}, lambda: masked_swiglu(x, mask, **triton)),
        ({"forward, skip": 6}, lambda: masked_swiglu(x, mask, skip_blocks=True, **triton)),
        ({"backward": 10}, lambda: masked_swiglu_backward(dy, x, None, **triton)),
        ({"backward, mask": 10}, lambda: masked_swiglu_backward(dy, x, mask, **triton)),
        (
            {"backward, skip": 10},
            lambda: masked_swiglu_backward(dy, x, mask, skip_blocks=True, **triton),
        ),
        (
            {"backward, h and dm": 12 + 8 / 64, "backward, dm's sums": 0},
            lambda: masked_swiglu_backward(dy, x, mask, with_h=True, with_dm=True, **triton),
        ),
        (
            {"scores, fc1 rows": 6, "scores, fc2 columns": 6, "scores, sums": 0},
            lambda: ffn_scores([shard], averages=[torch.zeros(3, f)], **triton),
        ),
    )
    found: dict[str, Any] = {}
    for architecture in architectures:
        for names, call in cases:
            with compiling(architecture) as kernels:
                call()
            for (name, moved), kernel in zip(names.items(), kernels, strict=True):
                case = found.setdefault(name, {"minimum_bytes_per_element": moved})
                case[f"sm_{architecture}"] = {
                    "registers": kernel.registers,
                    "spilled_bytes": kernel.spilled_bytes,
                    "loads_of_128_bits": kernel.loads,
                    "narrower_loads": kernel.narrow_loads,
                    "stores_of_128_bits": kernel.stores,
                    "narrower_stores": kernel.narrow_stores,
                }
    return found


def ahead_of_time() -> None:
    import triton

    found = machine_code(ARCHITECTURES)
    for name, targets in found.items():
        print(f"{name:<22}", json.dumps(targets))
    # Compiled, not run: the file names no device.
    path = write("kernels-compile", {"triton": triton.__version__, "kernels": found}, {})
    print("kept as", path.replace(path.with_name("kernels-compile.json")))
