"""Run a function on several processes, and compare tensors: what the project's tests share.

Here rather than in ``tests/`` so that spawned workers can import it.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import sys
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_idea.engine.core_versions import quiet

# Largest accepted |a - b| / max(1, |b|). fp32 results of the same mathematics in another order of
# summation differ by a few units in the last place, 1.2e-7 each; bf16 keeps 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def assert_close(actual: Any, expected: Any, what: str = "values", tolerance: float = 0.0) -> None:
    """Compare numbers or tensors; ``tolerance`` overrides the table for the actual dtype.

    Raises: AssertionError naming the largest difference and where it is.
    """
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    limit = tolerance or TOLERANCE[actual.dtype]
    a, b = actual.detach().double(), expected.detach().double()
    error = (a - b).abs() / b.abs().clamp(min=1.0)
    if error.numel() and not bool((error <= limit).all()):
        at = int(error.nan_to_num(nan=float("inf")).argmax())
        raise AssertionError(
            f"{what} differ by {error.flatten()[at]:.3g} (accepted {limit:g}) at {at}: "
            f"{a.flatten()[at]:.9g} against {b.flatten()[at]:.9g}"
        )


def assert_equal(actual: Any, expected: Any, what: str = "values") -> None:
    """Compare bit for bit."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    different = int((actual != expected).sum())
    assert different == 0, f"{what}: {different} of {actual.numel()} elements differ"


class Workers:
    """Processes that stay alive between jobs: importing megatron-core takes each some seconds.

    ``run(function, world_size, *arguments)`` calls ``function(rendezvous, *arguments)`` in
    ``world_size`` of them, with RANK and WORLD_SIZE set, and returns the results by rank. The
    function hands ``rendezvous`` to ``start_distributed`` and ends with ``stop_distributed``. It
    must be importable: a module-level function of a test file.
    """

    def __init__(
        self,
        folder: Path,
        timeout_s: float = 240.0,
        serve: Callable[..., None] | None = None,
        forked: bool = False,
    ) -> None:
        """``serve(pipe, path)`` is a process's life; default: ``serve_jobs``.

        ``forked``: processes come from a server that has imported what a run needs, with the
        environment that was there when the first of them was started. Not where torch has CUDA:
        what is imported may initialize it, and no forked process could use it then.
        """
        forked = forked and not torch.version.cuda
        self._context: Any = mp.get_context("forkserver" if forked else "spawn")
        self._folder = folder
        self._serve = serve or serve_jobs
        self._timeout_s = timeout_s
        self._processes: list[mp.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """Results by rank. Raises: RuntimeError with every failing rank's traceback."""
        while len(self._processes) < world_size:
            self._start()
        rendezvous = f"file://{self._folder / uuid.uuid4().hex}"
        for rank, pipe in enumerate(self._pipes[:world_size]):
            pipe.send((function, rank, world_size, rendezvous, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes[:world_size]):
            # After one failure the others can only be waiting for it.
            if not pipe.poll(10.0 if failures else self._timeout_s):
                failures.append(f"rank {rank} gave no answer")
                continue
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process ended"
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}: {value}")
        if failures:
            self.close()  # their process groups cannot be trusted any more
            raise RuntimeError("\n".join(failures))
        return results

    def _start(self) -> None:
        self._context.set_forkserver_preload(["megatron_idea.train"])
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=self._serve, args=(theirs, sys.path))
        process.start()
        theirs.close()
        self._processes.append(process)
        self._pipes.append(ours)

    def close(self) -> None:
        """End the processes; the next run starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def serve_jobs(pipe: Connection, path: list[str]) -> None:
    """Run one job after another until the pipe is closed: a worker's life."""
    sys.path[:] = path
    torch.set_num_threads(1)
    quiet()
    import megatron_idea.train  # noqa: F401  what nearly every job needs

    gc.freeze()  # what is imported stays: collections look at a job's own objects only
    while True:
        try:
            function, rank, world_size, rendezvous, arguments = pipe.recv()
        except EOFError:
            gc.unfreeze()  # objects that outlive the interpreter make bindings report leaks
            return
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        try:
            pipe.send((True, function(rendezvous, *arguments)))
        except BaseException:  # the parent raises it
            pipe.send((False, traceback.format_exc()))
        # A model is a web of cycles; its process groups keep gloo's threads awake until it is gone.
        gc.collect()
        gc.freeze()  # what the job has imported
