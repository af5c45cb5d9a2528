"""A step's record as ``train`` writes it, for tests of what reads records."""

from __future__ import annotations

from typing import Any


def record(step: int, **fields: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 2048,
        "phase": "enlarged",
        "loss": 7.0 - step / 1000,
        "lr": 1e-3,
        "keep_ratio": 1.0,
        "ffn_live": [1024] * 4,
        "ffn_width": [1024] * 4,
        "grad_norm": 0.5,
        "tokens_per_s": 4096.0,
        "step_s": 0.5,
        "memory_bytes": 2 * 10**9,
        "skipped": 0,
        **fields,
    }
