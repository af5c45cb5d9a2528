"""The kernels' benchmark: its harness runs, its verdicts are right, its baselines are checked."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Modules beside the runner: only the runner's process has their folder in its path."""

    def load(name: str) -> ModuleType:
        with monkeypatch.context() as patch:
            patch.syspath_prepend(BENCHMARKS)
            return importlib.import_module(name)

    return load


def run(*arguments: str, **environment: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", BENCHMARKS / "kernels.py", *arguments]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout.splitlines()


def results() -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}


def test_without_a_gpu_everything_runs_and_no_figure_is_kept(load) -> None:
    before = results()
    # Without a compiler here: what torch.compile would compile runs as it stands.
    lines = run(CUDA_VISIBLE_DEVICES="", TORCH_COMPILE_DISABLE="1")
    assert results() == before
    agree = {line.split()[0] for line in lines if line.endswith("agrees with fp64")}
    left_out = {line.split()[2] for line in lines if line.startswith("left out:")}
    assert {"ours", "ours_skip", "ours_h_dm", "eager", "megatron_mask", "compile_static"} <= agree
    goals = load("kernel_goals").GOALS
    assert sum("not measured" in line for line in lines) == len(goals)
    # A name that nobody bears would stay "not measured" for ever.
    names = {name for goal in goals for name in (goal.ours, goal.over) if name}
    assert names - agree - left_out == {"copy", "read", "gather", "dense"}


@pytest.mark.gpu
def test_a_quick_run_measures_on_a_gpu() -> None:
    before = results()
    lines = run("--quick")
    assert results() == before
    unknown = [line for line in lines if "not measured" in line]
    assert all(line.startswith(("over Liger", "gather")) for line in unknown), lines


def test_the_wait_grows_until_every_call_is_queued_behind_it(load, monkeypatch) -> None:
    """A GPU of one cycle a microsecond, a host that takes 10 s to launch a call."""
    now = 0

    class Event:
        def __init__(self, **_: bool) -> None:
            self.due = 0

        def record(self) -> None:
            self.due = gpu_free

        def query(self) -> bool:
            return now >= self.due

        def elapsed_time(self, end: Event) -> float:
            return (end.due - self.due) / 1e3

    gpu_free, waits = 0, []

    def wait(cycles: int) -> None:
        nonlocal gpu_free
        waits.append(cycles)
        gpu_free = now + cycles

    def call(_: int) -> None:
        nonlocal now, gpu_free
        now += host_us
        gpu_free = max(gpu_free, now) + 100

    def synchronize() -> None:
        nonlocal now
        now = max(now, gpu_free)

    for name, fake in (("Event", Event), ("_sleep", wait), ("synchronize", synchronize)):
        monkeypatch.setattr(torch.cuda, name, fake)
    clock, host_us = load("gpu_clock").Clock(torch.device("cuda")), 10_000_000
    assert clock.seconds(call, 10, queued=True) == pytest.approx(100e-6)
    assert waits == [2**24 * 2**i for i in range(4)]
    assert clock.seconds(call, 10, queued=True) == pytest.approx(100e-6)
    assert len(waits) == 5, "what was learnt is kept"
    assert clock.seconds(call, 10, queued=False) == pytest.approx(10.0, rel=1e-3)
    assert len(waits) == 5


def test_the_worst_large_shape_decides(load) -> None:
    goals = load("kernel_goals")
    goal = goals.Goal("twice as fast", 2.0, "ours", "theirs")

    def rows(shape: tuple[int, int], ours_ms: tuple[float, float], clock: str = "queued") -> list:
        passes = zip(goal.passes, ours_ms, strict=True)
        return [
            goals.Row(name, each, clock, *shape, ms, 1.0)
            for each, taken in passes
            for name, ms in (("ours", taken), ("theirs", 2.0))
        ]

    findings = goals.Findings(rows=rows((16384, 6912), (0.5, 0.5)))
    assert findings.judge(goal)["value"] == 4.0  # forward and backward together
    findings.rows += rows((65536, 6912), (1.0, 0.6))
    assert findings.judge(goal) == {
        "goal": "twice as fast",
        "limit": ">= 2",
        "value": 2.5,
        "verdict": "reached",
        "worst_at": "65536 x 6912",
    }
    findings.rows += rows((4096, 704), (9.0, 9.0))  # small
    findings.rows += rows((16384, 14336), (9.0, 9.0), "called")  # with the host's time
    findings.rows += rows((16384, 14848), (9.0, 9.0))[:2]  # without the backward
    assert findings.judge(goal)["value"] == 2.5
    findings.rows += rows((65536, 14848), (1.0, 1.5))
    verdict = findings.judge(goal)
    assert (verdict["value"], verdict["verdict"]) == (1.6, "not reached")


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [({}, "not measured"), ({"ms": 2.8}, "reached"), ({"ms": 2.81}, "not reached")],
)
def test_a_figure_is_held_against_its_limit(load, figures: dict, verdict: str) -> None:
    goals = load("kernel_goals")
    goal = goals.Goal("milliseconds", at_most=2.8, figure="ms")
    assert goals.Findings(figures=figures).judge(goal)["verdict"] == verdict


def test_a_wrong_baseline_stops_the_run_and_one_that_cannot_run_is_left_out(load) -> None:
    module = load("kernel_contenders")
    cpu, left_out = torch.device("cpu"), {}

    def silu_of_up(x: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
        up, gate = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up * m

    def no_compiler(x: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
        raise OSError("no compiler\nat all")

    missing = module.Contender("theirs", no_compiler)
    assert module.runnable([missing], torch.float32, cpu, left_out) == []
    assert left_out == {"theirs": "OSError: no compiler"}
    with pytest.raises(AssertionError, match="h of theirs differ"):
        wrong = module.Contender("theirs", silu_of_up)
        module.runnable([wrong], torch.float32, cpu, left_out)
    with pytest.raises(OSError, match="no compiler"):
        module.runnable([module.Contender("ours", no_compiler)], torch.float32, cpu, left_out)


def test_the_bytes_of_a_pass_are_what_the_mathematics_must_move(load) -> None:
    forward, backward, with_h = load("kernel_contenders").PASSES
    per_element = [each.bytes(1, 1, 2, 1.0) for each in (forward, backward, with_h)]
    assert per_element == [6, 10, 12]
    # What is skipped is not read, but its zeros are written.
    assert [forward.bytes(1, 1, 2, 0.5), backward.bytes(1, 1, 2, 0.5)] == [4, 7]


def test_the_kept_machine_code_spills_nothing_and_moves_full_vectors() -> None:
    kept = json.loads((BENCHMARKS / "results" / "kernels-compile.json").read_text())
    kernels = kept["measured"]["kernels"]
    assert len(kernels) == 11
    for name, kernel in kernels.items():
        codes = [kernel[f"sm_{architecture}"] for architecture in (80, 90, 100)]
        assert not any(code["spilled_bytes"] for code in codes), name
        if kernel["minimum_bytes_per_element"]:
            assert all(code["loads_of_128_bits"] >= 2 for code in codes), name
