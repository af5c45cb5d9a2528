"""Time functions in alternation and keep the result with commit, device and command."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def alternate(
    functions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Call every function once a round, each round in the opposite order of the last.

    Returns: seconds of each call, by name, in round order. On the CPU that is this process's CPU
    time, which other jobs on the machine disturb least; on a GPU wall time up to a synchronize.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        for name in names if index % 2 else reversed(names):
            begin = _clock()
            functions[name]()
            elapsed = _clock() - begin
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within rounds, and both medians in milliseconds."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(median, 4),
        "quartile_low": round(low, 4),
        "quartile_high": round(high, 4),
        "numerator_ms": round(1e3 * statistics.median(numerator), 3),
        "denominator_ms": round(1e3 * statistics.median(denominator), 3),
        "rounds": len(ratios),
    }


def device_name() -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def result_file(name: str) -> Path:
    """``results/<name>-<device>.json``."""
    return RESULTS / f"{name}-{device_name().lower().replace(' ', '-')}.json"


def write(path: Path, measured: dict[str, Any], goals: dict[str, float]) -> None:
    """Print goals against ratios and keep both."""
    for key, goal in goals.items():
        value = measured[key]["ratio"]
        verdict = "reached" if value <= goal else f"missed by {value - goal:.3f}"
        print(f"{key:<28} {value:6.3f}   goal <= {goal:.2f}   {verdict}")
    keep(path, {"goals": goals, "measured": measured})


def keep(path: Path, found: dict[str, Any]) -> None:
    """Write what was found, headed by commit, date, command and device."""
    head = {
        "commit": _git("rev-parse", "HEAD") + (" + changes" if _git("status", "-s") else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -W ignore", *sys.argv]),
        "device": device_name(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | found, indent=1) + "\n")
    print(path)


def _git(*arguments: str) -> str:
    run = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip()
