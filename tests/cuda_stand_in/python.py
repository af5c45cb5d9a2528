"""A Python with CUDA devices and Transformer Engine, for whole programs.

python tests/cuda_stand_in/python.py [-W ACTION] (-c CODE | -m MODULE | FILE) [ARGUMENT ...]

``PYTHON`` names the command that the program starts further processes with; default: this file.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # PYTHONSAFEPATH leaves a script's folder out

from cuda_stand_in import build, serve


def main() -> None:
    library = build.library()
    serve.install(library, build.transformer_engine())
    from megatron_idea.kernels import dispatch

    dispatch.triton = None  # it compiles for real devices only
    sys.executable = os.environ.get("PYTHON", sys.executable)
    arguments = sys.argv[1:]
    if arguments[0] == "-W":
        warnings.simplefilter(arguments[1])  # type: ignore[arg-type]
        arguments = arguments[2:]
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
