"""Compiles ``device.cpp`` for the installed torch, and fetches Transformer Engine's Python.

Both are kept in the virtual environment, by version. ``python tests/cuda_stand_in/build.py`` does
it ahead of the tests.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(sys.prefix) / "cuda_stand_in"
TRANSFORMER_ENGINE = "2.18.0"


def library() -> Path:
    """The device, compiled: 18 s of one core the first time.

    Raises: subprocess.CalledProcessError with the compiler's output.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return _kept(f"torch-{version('torch')}-python-{python}-{digest}", _compile) / "device.so"


def transformer_engine() -> Path:
    """The folder with its Python: the wheel of that name on PyPI, 1 MB, without the compiled parts.

    Raises: subprocess.CalledProcessError where no registry has it.
    """
    return _kept(f"transformer_engine-{TRANSFORMER_ENGINE}", _install)


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name; made by one process, for which others wait."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / name).is_dir():
            part = CACHE / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(CACHE / name)
    return CACHE / name


def _compile(folder: Path) -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    # Only the headers that are needed and no optimization: 18 s instead of a minute.
    command = [
        "g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(SOURCE),
        f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include",
        f"-I{sysconfig.get_paths()['include']}",
        f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-ltorch_python", "-ltorch_cpu", "-lc10",
        "-o", str(folder / "device.so"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)


def _install(folder: Path) -> None:
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1",
        "--target", str(folder), f"transformer_engine=={TRANSFORMER_ENGINE}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    print(library())
    print(transformer_engine())
