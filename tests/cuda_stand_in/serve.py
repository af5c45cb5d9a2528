"""A worker of ``megatron_idea.testing.Workers`` that has CUDA devices, and Transformer Engine."""

from __future__ import annotations

import ctypes
import sys
from multiprocessing.connection import Connection
from pathlib import Path

DEVICES = 2


def install(library: Path, transformer_engine: Path | None) -> None:
    """Give this process the devices, before it imports torch: that asks for CUDA once."""
    ctypes.CDLL(str(library))
    from cuda_stand_in import device

    device.install(library, DEVICES)
    if transformer_engine is not None:
        from cuda_stand_in import transformer_engine as engine

        engine.install(transformer_engine)


def serve(
    library: Path, transformer_engine: Path | None, pipe: Connection, path: list[str]
) -> None:
    """Run one job after another until the pipe is closed."""
    sys.path[:] = path
    install(library, transformer_engine)
    from megatron_idea.testing import serve_jobs

    serve_jobs(pipe, path)
