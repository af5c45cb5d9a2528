"""Time calls with CUDA events, with or without what the host takes to launch them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[int], Any]
"""Takes the iteration's number, which says the buffer."""


class Clock:
    """Seconds per call, from CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._wait_cycles = 2**24

    def seconds(self, call: Call, iterations: int, queued: bool) -> float:
        """Of one window; ``queued``: all calls are in the GPU's queue before the first begins."""
        if not self.on_gpu:
            begin = time.perf_counter()
            for i in range(iterations):
                call(i)
            return (time.perf_counter() - begin) / iterations
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if queued:
                torch.cuda._sleep(self._wait_cycles)
            start.record()
            for i in range(iterations):
                call(i)
            host_was_ahead = not start.query()
            end.record()
            torch.cuda.synchronize()
            if not queued or host_was_ahead:
                return start.elapsed_time(end) / 1e3 / iterations
            self._wait_cycles *= 2
            assert self._wait_cycles < 2**33, "a call waits for the GPU: it cannot be queued"

    def medians(
        self, calls: dict[str, Call], rounds: int, iterations: int, queued: bool
    ) -> dict[str, float]:
        """By name; every round runs in the opposite order of the last."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(rounds):
            for name in calls if index % 2 else reversed(calls):
                samples[name].append(self.seconds(calls[name], iterations, queued))
        return {name: statistics.median(taken) for name, taken in samples.items()}
