"""The Dockerfile as it is read; ``tests/build_image.sh`` builds and runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
HADOLINT = shutil.which(
    "hadolint", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_the_dockerfile_passes_hadolint() -> None:
    done = subprocess.run(
        [str(HADOLINT), "Dockerfile"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_image_depends_on_no_entry_point_and_no_root() -> None:
    assert "ENTRYPOINT" not in DOCKERFILE
    users = re.findall(r"^USER (.+)$", DOCKERFILE, re.M)
    assert users and users[-1].isdecimal() and users[-1] != "0"
    assert re.search(r"PYTHONSAFEPATH=1", DOCKERFILE)


@pytest.mark.parametrize(
    ("line", "stays"),
    [
        ("torch==2.12.0a0+0123456.nv26.6", True),
        ("transformer_engine==2.18.0", True),
        ("transformer-engine-cu13==2.18.0", True),
        ("apex==0.1", True),
        ("pytorch-triton==3.7.0", True),
        ("triton==3.7.0", True),
        ("flash_attn==2.7.4", True),
        ("nvidia-nccl-cu13==2.29", True),
        ("torchmetrics==1.0", False),
        ("numpy==2.1.0", False),
    ],
)
def test_what_the_base_was_built_for_is_held(line: str, stays: bool) -> None:
    pattern = re.search(r"grep -iE '(.+)'", DOCKERFILE)
    assert pattern
    found = subprocess.run(["grep", "-iE", pattern[1]], input=line, text=True, capture_output=True)
    assert (found.returncode == 0) == stays


def test_the_image_gets_all_that_setup_needs() -> None:
    allowed = re.findall(r"^!(.+)$", (REPOSITORY / ".dockerignore").read_text(), re.M)
    for name in allowed:
        assert (REPOSITORY / name).exists(), name
    for name in (
        "csrc", "examples", "kernels", "megatron_idea", "pyproject.toml", "setup.py", "README.md",
    ):  # fmt: skip
        assert name in allowed
