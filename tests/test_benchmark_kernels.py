"""The kernels' benchmark runs as a whole, and every contender is held against fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments: str, **environment: str) -> list[str]:
    """Printed lines; no file of results may change."""
    before = results()
    command = [sys.executable, "-W", "ignore", BENCHMARKS / "kernels.py", *arguments]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert results() == before
    return done.stdout.splitlines()


def results() -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}


def test_without_a_gpu_everything_runs_and_no_figure_is_kept() -> None:
    # Without a compiler here: what torch.compile would compile runs as it stands.
    lines = run(CUDA_VISIBLE_DEVICES="", TORCH_COMPILE_DISABLE="1")
    agree = {line.split()[0] for line in lines if line.endswith("agrees with fp64")}
    expected = {"ours", "ours_unmasked", "eager", "compile_static", "megatron", "megatron_mask"}
    assert expected <= agree
    # copy and every contender, forward and backward; read and three ways to score.
    medians = 2 * (1 + len(agree)) + 4
    assert lines[-1].startswith(f"the harness made {medians} medians, all thrown away")


@pytest.mark.gpu
def test_a_quick_run_measures_on_a_gpu() -> None:
    lines = run("--quick")
    judged = {line.split()[0] for line in lines if "'ratio'" in line}
    assert {"forward_to_copy", "to_megatron_mask", "scores_to_read"} <= judged
    assert "step_with_pruning_to_without" in judged
