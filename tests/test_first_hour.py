"""The script of a first GPU session, on tiny shapes: every part ends, and what it had is kept."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_stand_in import build

from megatron_idea.records.read import read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "first_hour.sh"


def first_hour(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(out), "SMALL": "1", "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(SCRIPT)], env=environment | variables, capture_output=True, text=True
    )


@pytest.fixture()
def python(tmp_path: Path) -> str:
    """A Python with the stand-in for CUDA devices; the tests' own where that cannot be built."""
    if torch.version.cuda or sys.platform != "linux" or shutil.which("g++") is None:
        return sys.executable
    try:
        build.transformer_engine()
    except subprocess.CalledProcessError:
        return sys.executable
    script = tmp_path / "python with cuda"
    stand_in = shlex.join([sys.executable, str(Path(build.__file__).with_name("python.py"))])
    script.write_text(f'#!/bin/sh\nexec {stand_in} "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_a_session_measures_and_trains(tmp_path: Path, python: str) -> None:
    out = tmp_path / "out"
    done = first_hour(out, PARTS="one_gpu train", PYTHON=python)
    logs = [(out / f"{part}.log").read_text() for part in ("one_gpu", "train")]
    assert done.returncode == 0, logs
    said = (out / "summary.txt").read_text()
    assert done.stdout == said
    assert [line[:17] for line in said.splitlines()] == ["one_gpu   done in", "train     done in"]
    measured = json.loads((out / "one_gpu.json").read_text())["measured"]
    layers = {name.partition(", ")[2] for name in measured if ", " in name}
    with_devices = python != sys.executable
    assert layers == {"megatron-core"} | ({"transformer-engine"} if with_devices else set())
    for each in layers:
        small, enlarged = (measured[f"{size}, {each}"] for size in ("small", "enlarged"))
        assert small["parameters"] < enlarged["parameters"] and small["step_s"] > 0
    assert measured["compaction"]["neurons"] == [128, 120]
    assert json.loads((out / "step.trace.json").read_text())["traceEvents"]
    assert read_metrics(out / "train")[-1].stored["ffn_hidden_size"] == [48, 48]
    assert (out / "export" / "model.safetensors").is_file()


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_part_that_fails_or_is_killed_is_named_and_the_next_one_begins(tmp_path: Path) -> None:
    """Killed as the kernel does when memory runs out: that is no end of its time."""
    fails = program(tmp_path / "python", 'echo "$@"; [[ $5 == doctor ]] && kill -9 $$; exit 3')
    done = first_hour(tmp_path / "out", PARTS="nothing doctor kernels", PYTHON=fails)
    assert done.returncode == 1
    ended = [line.split(" after")[0] for line in done.stdout.splitlines()]
    assert ended == [
        "nothing   failed with status 2", "doctor    failed with status 137",
        "kernels   failed with status 3",
    ]  # fmt: skip
    assert "kernels.py --quick" in (tmp_path / "out" / "kernels.log").read_text()


def test_a_part_ends_after_what_it_has_called_or_both_are_killed(tmp_path: Path) -> None:
    """Else a process that hangs would hold the GPU while the next part is measured."""
    hangs = program(tmp_path / "python", "trap '' TERM; sleep 60")
    environment = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": hangs}
    done = subprocess.run(
        ["timeout", "--kill-after=0.2", "0.2", "bash", str(SCRIPT), "doctor"],
        env=environment,
        capture_output=True,  # the pipes are open until the last process is gone
        timeout=30,
    )
    assert done.returncode in (137, -9)  # of timeout itself, which is in the group that it kills


def test_parts_without_time_are_named(tmp_path: Path) -> None:
    done = first_hour(tmp_path / "out", MINUTES="0")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and all(line.endswith("no time left") for line in lines)
    assert lines[0].startswith("build") and lines[-1].startswith("compare")
