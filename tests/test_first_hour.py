"""The script of a first GPU session, on tiny shapes: every part ends, and what it had is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "first_hour.sh"


def first_hour(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(out), "SMALL": "1", "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(SCRIPT)], env=environment | variables, capture_output=True, text=True
    )


def test_steps_and_a_compaction_are_measured_and_parts_follow_each_other(tmp_path: Path) -> None:
    done = first_hour(tmp_path / "out", PARTS="nothing one_gpu doctor")
    assert done.returncode == 1  # of the part that there is not; the others were begun
    said = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert done.stdout.splitlines() == said
    assert [line.split()[0] for line in said] == ["nothing", "one_gpu", "doctor"]
    assert "failed with status 2" in said[0] and "done in" in said[1] and "done in" in said[2]
    measured = json.loads((tmp_path / "out" / "one_gpu.json").read_text())["measured"]
    small, enlarged = (measured[f"{size}, megatron-core"] for size in ("small", "enlarged"))
    assert small["parameters"] < enlarged["parameters"] and small["step_s"] > 0
    assert measured["compaction"]["neurons"] == [128, 120]
    assert json.loads((tmp_path / "out" / "step.trace.json").read_text())["traceEvents"]
    assert "megatron-core" in (tmp_path / "out" / "doctor.log").read_text()


def test_parts_without_time_are_named(tmp_path: Path) -> None:
    done = first_hour(tmp_path / "out", MINUTES="0")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and all(line.endswith("no time left") for line in lines)
    assert lines[0].startswith("build") and lines[-1].startswith("compare")
