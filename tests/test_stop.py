"""How a run that is told to stop ends, and one that loses a process, as its launcher sees it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.config import Config, replace
from megatron_idea.engine.launcher import STOPPED, PassOn
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.train import StopSignal

STEPS = 100_000  # more than will be made


@pytest.fixture
def endless(tiny_halved: Config, tmp_path: Path) -> Config:
    config = replace(tiny_halved, schedule={"total_tokens": STEPS * 128})
    (tmp_path / "run.yaml").write_text(configuration.to_yaml(config))
    return config


@pytest.fixture
def launcher(endless: Config, tmp_path: Path) -> Iterator[psutil.Popen]:
    """``megatron-idea train`` with two workers that have made some steps."""
    environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
    process = psutil.Popen(
        [
            sys.executable,
            "-m",
            "megatron_idea",
            "train",
            str(tmp_path / "run.yaml"),
            "--nproc",
            "2",
        ],
        # What it leaves a worker that does not react to the second signal; by default 30 s.
        env=environment | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    run_dir = Path(endless.run_dir)
    end = time.monotonic() + 120
    while not (run_dir.exists() and len(read_metrics(run_dir)) >= 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.1)
    workers = process.children()
    yield process
    for left in (process, *workers):
        if left.is_running():
            left.kill()
    process.wait()


def test_a_stopped_run_saves_its_step_and_ends_with_status_75(
    launcher: psutil.Popen, endless: Config
) -> None:
    # Only the launcher is told, as Slurm with cgroups does; then all again, as Slurm without.
    everyone = [launcher, *launcher.children()]
    assert len(everyone) == 3
    launcher.send_signal(signal.SIGUSR1)
    for process in everyone:
        process.send_signal(signal.SIGUSR1)
    launcher.send_signal(signal.SIGCONT)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == STOPPED, said
    assert "Traceback" not in said
    run_dir = Path(endless.run_dir)
    (event,) = (event for event in read_events(run_dir) if event["kind"] == "signal")
    assert event["name"] == "SIGUSR1"
    saved = checkpoint.latest(run_dir)
    assert saved is not None and saved.name == f"step_{event['step']:08d}"
    assert read_metrics(run_dir)[-1].step == event["step"]


def test_a_killed_rank_ends_the_job_at_once_and_is_named(launcher: psutil.Popen) -> None:
    victim = launcher.children()[0]
    rank = victim.environ()["RANK"]
    victim.kill()
    begin = time.monotonic()
    _, said = launcher.communicate(timeout=60)
    # Two seconds on an idle machine, of Python's exit; without care it is the collectives' timeout.
    assert time.monotonic() - begin < 40
    assert launcher.returncode != 0 and launcher.returncode != STOPPED
    assert re.search(rf"rank {rank} was killed by SIGKILL", said), said


def test_a_second_signal_ends_a_job_that_does_not_answer_the_first(
    launcher: psutil.Popen, endless: Config
) -> None:
    workers = launcher.children()
    workers[0].suspend()  # no step can be finished from here on
    launcher.send_signal(signal.SIGTERM)
    time.sleep(PassOn.ECHO_S + 0.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=60)
    assert launcher.returncode == STOPPED
    assert not any(worker.is_running() for worker in workers)
    assert "signal" not in {event["kind"] for event in read_events(Path(endless.run_dir))}


def test_an_echo_of_a_signal_is_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    try:
        stop = StopSignal()
        for after, number, ends in (
            (0.0, signal.SIGUSR1, False),
            (0.5, signal.SIGUSR1, False),  # through the launcher
            (9.0, signal.SIGTERM, False),  # the time limit: still saving
            (9.5, signal.SIGUSR1, True),
        ):
            clock[0] = 100.0 + after
            stop._note(number, None)
            assert stop.received == "SIGUSR1"
            assert bool(ended) == ends
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


DEAF = """
import ctypes, threading
from megatron_idea.engine.launcher import PassOn
with PassOn("no worker"):
    # Said by another thread once this one is in there: before, Python would run its own handler.
    threading.Timer(0.3, print, ["waiting"], {"flush": True}).start()
    mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # never returns, and runs no handler
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_launcher_that_waits_inside_torch_hears_a_signal(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (STOPPED, "stopped while waiting for the other nodes\n")


def test_a_failed_job_does_not_wait_for_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_idea.engine import distributed

    left: list[bool] = []
    monkeypatch.setattr(distributed, "stop_distributed", lambda: left.append(True))
    for cuda, expected in ((True, []), (False, [True])):
        monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda cuda=cuda: cuda)
        distributed.abandon_distributed()
        assert left == expected
