"""Which implementation of an op runs, and what the Triton files share.

Triton is optional: CUDA builds of torch bring it, CPU builds do not, and without it the files with
Triton kernels still import. ``TRITON_INTERPRET=1`` in the environment at import time lets Triton's
interpreter run the kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ImportError:
    triton = tl = None

    def jit(function: Any = None, **_: Any) -> Any:
        """Leave the function alone: without Triton nobody launches it."""
        return function if function is not None else lambda f: f


IMPLEMENTATIONS = ("auto", "triton", "reference")

logger = logging.getLogger("megatron_idea.kernels")

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(op: str, implementation: str, device: torch.device) -> bool:
    """Whether ``op`` runs in Triton on ``device``; the first answer of each kind goes to the log.

    ``auto`` takes Triton on CUDA where it is installed, and plain PyTorch elsewhere.
    Raises: ValueError for an unknown name, and for ``triton`` where it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; legal values: {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "triton" and triton is None:
        raise ValueError("implementation is 'triton', which is not installed; legal: 'reference'")
    if implementation == "triton" and not can_launch(device):
        raise ValueError(
            f"implementation is 'triton' and the tensors are on {device}; legal: tensors on CUDA, "
            "or implementation 'reference'"
        )
    chosen = implementation
    if chosen == "auto":
        chosen = "triton" if triton is not None and device.type == "cuda" else "reference"
    _say_once(op, chosen, implementation, device.type)
    return chosen == "triton"


def can_launch(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of ``device``."""
    return device.type == "cuda" or _INTERPRETED


@functools.cache
def _say_once(op: str, chosen: str, asked: str, device_type: str) -> None:
    surprise = chosen == "reference" and asked == "auto" and device_type == "cuda"
    because = "triton is not installed" if surprise else f"implementation {asked!r}"
    logger.log(
        logging.WARNING if surprise else logging.INFO,
        "%s: %s on %s (%s)",
        op,
        chosen,
        device_type,
        because,
    )


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **meta: Any) -> None:
    """Launch ``kernel`` on a 1-D grid (the others end at 65535), on the tensors' own device."""
    if programs == 0:
        return
    # Named, because Triton 3.10 turns the default off.
    meta["enable_fp_fusion"] = True
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **meta)
    else:
        kernel[(programs,)](*arguments, **meta)
