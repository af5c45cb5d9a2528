"""A short version of benchmarks/faults.py: one trial of each kind, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a user's rights away, which only root can")
def test_runs_that_were_broken_in_every_way_end_as_if_nothing_had_been() -> None:
    script = str(ROOT / "benchmarks" / "faults.py")
    command = [sys.executable, "-W", "ignore", script, "--trials", "8", "--no-file"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("8 trials, ") and lines[-1].endswith(" 0 lost")
    assert sum("same=True" in line for line in lines) == 8
