"""Runs ``kernels_on_device.py`` where it can run: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("kernels_on_device.py")


def run_cases(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="the triton extra brings it")
def test_kernels_are_right_in_the_interpreter() -> None:
    run_cases({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.gpu
def test_kernels_are_right_on_the_gpu() -> None:
    run_cases({})
