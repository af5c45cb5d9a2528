"""Every Triton kernel is compiled for 8.0, 9.0 and 10.0, without a GPU, by the real launchers.

A stub stands in for the CUDA driver and a launch ends where the compiled kernel would be loaded. So
alignment is specialised as it is on a GPU: a launcher that loses it shows up as narrow loads. The
machine code is read with the disassembler that Triton brings.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the dev extra brings it")

from megatron_idea.kernels import (  # noqa: E402
    FfnShard,
    dispatch,
    ffn_scores,
    masked_swiglu,
    masked_swiglu_backward,
    score,
    swiglu,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
WIDTH, TOKENS, HIDDEN = 1408, 16, 2560


class StubDriver:
    """A CUDA driver as far as compiling asks for one; the device's number is its architecture."""

    architecture = 80

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.architecture, 32)


@dataclass(frozen=True)
class Compiled:
    """What the gates look at."""

    ttir: str
    sass: str
    registers: int
    spilled_bytes: int

    def wide(self, instruction: str) -> int:
        """128-bit (on Blackwell also 256-bit) global loads or stores."""
        return len(re.findall(rf"\b{instruction}[.\w]*\.(?:ENL2\.256|128)\b", self.sass))

    def narrow(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.sass)) - self.wide(instruction)


def read(kernel: Any, path: Path) -> Compiled:
    path.write_bytes(kernel.asm["cubin"])
    usage = run("cuobjdump", "-res-usage", path)
    sizes = {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        kernel.asm["ttir"], run("nvdisasm", "-c", path), sizes["REG"],
        sizes["STACK"] + sizes["LOCAL"],
    )  # fmt: skip


def run(tool: str, *arguments: str | Path) -> str:
    command = [TOOLS / tool, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def compile_launches(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., list[Compiled]]]:
    """``compile_launches(call)``: what each launch within ``call`` compiles to."""
    driver = StubDriver()
    driver.architecture = request.param
    compiled: list[Any] = []

    def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **meta: Any) -> None:
        compiled.append(
            kernel.run(*args, grid=(programs,), warmup=True, enable_fp_fusion=True, **meta)
        )

    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(dispatch, "can_launch", lambda device: True)
    for module in (swiglu, score):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(swiglu, "architecture", lambda device: request.param)

    def compile_all(call: Callable[[], Any]) -> list[Compiled]:
        compiled.clear()
        call()
        return [read(k, tmp_path / f"{i}.cubin") for i, k in enumerate(compiled)]

    yield compile_all
