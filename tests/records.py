"""A step's record as ``train`` writes it, for tests of what reads records."""

from __future__ import annotations

from typing import Any

from megatron_idea.records.record import Record


def neurons(*counts: int) -> dict[str, list[int]]:
    """Counts of a record: neurons of every layer."""
    return {"ffn_hidden_size": list(counts)}


def record(step: int, **fields: Any) -> Record:
    known: dict[str, Any] = {
        "step": step,
        "tokens": step * 2048,
        "phase": "enlarged",
        "loss": 7.0 - step / 1000,
        "lr": 1e-3,
        "removed": 0.0,
        "live": neurons(*[1024] * 4),
        "stored": neurons(*[1024] * 4),
        "grad_norm": 0.5,
        "tokens_per_s": 4096.0,
        "step_s": 0.5,
        "memory_bytes": 2 * 10**9,
        "skipped": 0,
    }
    return Record(**known | fields)
