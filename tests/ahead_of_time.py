"""Compile the kernels for GPUs that are not here, and read the machine code.

A stub stands in for the CUDA driver and a launch ends where the compiled kernel would be loaded. So
alignment is specialised as it is on a GPU: a launcher that loses it shows up as narrow loads. The
machine code is read with the disassembler that Triton brings.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_idea.kernels import dispatch, score, swiglu

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Compiled:
    """One launch's kernel: what decides whether it can run at the speed of memory."""

    name: str
    ttir: str = field(repr=False)
    registers: int
    spilled_bytes: int
    loads: int
    """Global loads of 128 bits."""
    narrow_loads: int
    stores: int
    narrow_stores: int


@contextlib.contextmanager
def compiling(architecture: int) -> Iterator[list[Compiled]]:
    """Inside, Triton launches on CPU tensors compile for ``architecture`` and run nothing.

    Yields: a list that gets one entry a launch, in order. Needs Triton with its NVIDIA tools.
    """
    import triton

    kernels: list[Compiled] = []

    def launch(kernel: Any, programs: int, _: torch.device, *args: Any, **meta: Any) -> None:
        done = kernel.run(*args, grid=(programs,), warmup=True, enable_fp_fusion=True, **meta)
        kernels.append(_read(done))

    replacements = (
        (triton.runtime.driver, "_active", _StubDriver(architecture)),
        (dispatch, "can_launch", lambda _: True),
        (swiglu, "launch", launch),
        (score, "launch", launch),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield kernels


class _StubDriver:
    """A CUDA driver as far as compiling asks for one; the device's number is its architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


def _read(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    size = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    assert "LDG" in sass and "STG" in sass, "not the disassembly that is counted below"
    spills = len(re.findall(r"\b(STL|LDL)\b", sass))
    return Compiled(
        kernel.metadata.name,
        kernel.asm["ttir"],
        size["REG"],
        max(size["STACK"] + size["LOCAL"], spills),
        *_count(sass, "LDG"),
        *_count(sass, "STG"),
    )


def _count(sass: str, instruction: str) -> tuple[int, int]:
    """128 bits wide, and narrower."""
    found = re.findall(rf"\b{instruction}\b[.\w]*", sass)
    wide = sum(".128" in name for name in found)
    return wide, len(found) - wide


def _tool(name: str, *arguments: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [folder / name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
