"""Measuring around compactions: the same loss on both sides, in every layout, and no other run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import train_job

from megatron_idea.config import Config, replace
from megatron_idea.records.read import read_events
from megatron_idea.testing import Workers

# Processes, how they share the work, and the alignment with which all have the same legal widths.
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one process": (1, {}, 8),
    "TP 2": (2, {"tensor_model_parallel_size": 2}, 4),
    # Weights are gathered when the next forward pass asks for them: here one that only measures.
    "DP 2": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, 8),
}


def trained(
    tiny: Config, workers: Workers, layout: str, around: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Steps and events of a run of 24 steps with five compactions."""
    world_size, parallel, alignment = LAYOUTS[layout]
    run_dir = f"{tiny.run_dir} {layout} {around}"
    config = replace(
        tiny,
        run_dir=run_dir,
        parallel=parallel,
        prune={"alignment": alignment},
        evaluation={"around_compaction": around, "num_samples": 6},
    )
    workers.run(train_job, world_size, config)
    steps = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return steps, read_events(Path(run_dir))


def losses(events: list[dict[str, Any]], why: str) -> list[float]:
    return [e["val_loss"] for e in events if e["kind"] == "evaluated" and e["why"] == why]


def test_a_compaction_keeps_the_held_out_loss_in_every_layout(
    tiny_halved: Config, workers: Workers
) -> None:
    curves = {}
    for layout in LAYOUTS:
        steps, events = trained(tiny_halved, workers, layout, around=True)
        before, after = (losses(events, f"compaction_{side}") for side in ("before", "after"))
        assert len(before) == len(after) == 5
        # Products over fewer neurons are summed in another order.
        assert after == pytest.approx(before, rel=1e-6), layout
        curves[layout] = before + after

        plain_steps, plain_events = trained(tiny_halved, workers, layout, around=False)
        for name in ("loss", "grad_norm", "stored", "live"):
            assert [s[name] for s in steps] == [s[name] for s in plain_steps], (layout, name)
        assert losses(events, "phase_end") == losses(plain_events, "phase_end")
        assert not losses(plain_events, "compaction_before")
    for layout in LAYOUTS:
        assert curves[layout] == pytest.approx(curves["one process"], rel=1e-6), layout
