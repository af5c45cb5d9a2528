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


def test_a_session_trains_measures_and_goes_on_after_a_part_that_failed(
    tmp_path: Path, python: str
) -> None:
    out = tmp_path / "out"
    done = first_hour(out, PARTS="nothing one_gpu train", PYTHON=python)
    assert done.returncode == 1  # of the part that there is not; the others were begun
    said = (out / "summary.txt").read_text().splitlines()
    assert done.stdout.splitlines() == said
    assert [line.split()[0] for line in said] == ["nothing", "one_gpu", "train"]
    assert "failed with status 2" in said[0], said
    assert "done in" in said[1], (out / "one_gpu.log").read_text()
    assert "done in" in said[2], (out / "train.log").read_text()
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


def test_a_part_that_fails_fails_alone_too(tmp_path: Path) -> None:
    done = first_hour(tmp_path / "out", PARTS="doctor one_gpu", PYTHON="false")
    assert done.returncode == 1
    assert all("failed with status 1" in line for line in done.stdout.splitlines())


def test_parts_without_time_are_named(tmp_path: Path) -> None:
    done = first_hour(tmp_path / "out", MINUTES="0")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and all(line.endswith("no time left") for line in lines)
    assert lines[0].startswith("build") and lines[-1].startswith("compare")
