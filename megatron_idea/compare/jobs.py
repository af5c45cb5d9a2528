"""Run what is missing of a suite: here, some at a time, or as jobs of a Slurm cluster.

A run is one process, ``megatron-idea train``, which goes on wherever it was. So whatever ended a
comparison, the same call completes it: nothing is remembered but the runs' own folders, and in
``jobs.json`` which job of the cluster was given which run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_idea import config as configuration
from megatron_idea import files
from megatron_idea.compare.suite import ArmRun, Suite
from megatron_idea.config import ConfigError
from megatron_idea.engine.launcher import STOPPED
from megatron_idea.records.lock import RunLock
from megatron_idea.records.read import read_events
from megatron_idea.records.readable import human_duration
from megatron_idea.records.terminal import say, say_error

TRAIN = (sys.executable, "-m", "megatron_idea", "train")
FAILED = 1
"""Exit status when a run failed."""

JOBS = "jobs.json"
POLL_S = 0.1


def is_finished(run: ArmRun) -> bool:
    """Tell whether a run has written down that its last token is consumed.

    It does so once its last checkpoint is complete. A run that was started again since has to say
    so again.
    """
    kinds = [event["kind"] for event in read_events(run.run_dir, broken=[])]
    turns = [kind for kind in kinds if kind in ("started", "branched", "resumed", "finished")]
    return turns[-1:] == ["finished"]


def run_missing(
    suite: Suite,
    parallel: int = 1,
    nproc: int | None = None,
    command: Sequence[str] = TRAIN,
    tell: Callable[[str], None] = say,
) -> int:
    """Run what is not finished, each run in a process of its own, and wait for all of them.

    SIGTERM, SIGINT and SIGUSR1 are passed on to the runs, which finish their step and save.

    Args:
        parallel: runs at a time.
        nproc: processes of each run; None: TP x PP.
        command: what trains; the configuration's file follows.
    Returns: the exit status: 0, ``STOPPED`` when a signal ended it, ``FAILED`` when a run did
        otherwise.
    Raises: RunFolderError when another comparison is at work in the folder.
    """
    options = [] if nproc is None else ["--nproc", str(nproc)]
    with RunLock(suite.out, "comparison"), _Stop() as stop:
        here = _Here(suite, [*command], options, parallel, tell)
        try:
            return here.work(stop)
        finally:
            here.end()


@dataclass
class _Child:
    """A run at work."""

    run: ArmRun
    process: subprocess.Popen[bytes]
    begun: float


class _Stop:
    """Notes the signals that are to be passed on.

    The first one, and the same one again, as ``train`` understands them; an echo is not again.
    """

    ECHO_S = 2.0  # as train.StopSignal's

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._to_pass_on: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at, self._to_pass_on = number, now, number
        elif number == self.received and now - self._received_at > self.ECHO_S:
            self._to_pass_on = number

    def take(self) -> int | None:
        """Return the signal that is to be passed on now, if there is one."""
        number, self._to_pass_on = self._to_pass_on, None
        return number


class _Here:
    """Runs of a suite as processes of this machine."""

    def __init__(
        self, suite: Suite, command: list[str], options: list[str], parallel: int,
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._command, self._options, self._parallel, self._tell = command, options, parallel, tell
        self._waiting = [run for run in suite.runs if not is_finished(run)]
        self._finished = {run.key for run in suite.runs} - {run.key for run in self._waiting}
        self._children: list[_Child] = []
        self._failed: set[str] = set()
        self._stopped: set[str] = set()
        self._elsewhere: set[str] = set()
        """At work already, as those are whose comparison was killed."""

    def work(self, stop: _Stop) -> int:
        """Start runs as places become free, until none is left. Returns: the exit status."""
        while True:
            if stop.received is None:
                self._start_those_that_can()
            if not self._children and (stop.received is not None or not self._elsewhere):
                break
            time.sleep(POLL_S)
            number = stop.take()
            for child in list(self._children):
                if number is not None:
                    child.process.send_signal(number)
                if child.process.poll() is not None:
                    self._children.remove(child)
                    self._note_end(child, stop.received is not None)
        if self._stopped or (self._waiting and stop.received is not None):
            self._tell(f"stopped; {self._left()} to go: the same call goes on")
            if stop.received is not None or not self._failed:
                return STOPPED
        return FAILED if self._failed else 0

    def end(self) -> None:
        """Stop what is still at work, after an error of our own."""
        for child in self._children:
            child.process.terminate()
        for child in self._children:
            child.process.wait()

    def _start_those_that_can(self) -> None:
        if len(self._children) >= self._parallel:
            return
        self._look_elsewhere()
        for run in list(self._waiting):
            if len(self._children) + len(self._elsewhere) >= self._parallel:
                return
            if run.key in self._elsewhere:
                continue
            failed = [needed for needed in run.needs if needed.key in self._failed]
            if failed:
                self._waiting.remove(run)
                self._failed.add(run.key)
                say_error(f"{run} is not run: it needs {failed[0]}, which failed")
            elif any(needed.key in self._stopped for needed in run.needs):
                self._waiting.remove(run)
                self._stopped.add(run.key)
            elif all(needed.key in self._finished for needed in run.needs):
                self._waiting.remove(run)
                self._children.append(self._start(run))

    def _look_elsewhere(self) -> None:
        """Find out which runs others are at work at; one that they have finished is done."""
        before, self._elsewhere = self._elsewhere, set()
        for run in list(self._waiting):
            if holder := RunLock(run.run_dir).holder_here():
                self._elsewhere.add(run.key)
                if run.key not in before:
                    self._tell(f"{run} is at work already, in {holder}: waiting for its end")
            elif run.key in before and is_finished(run):
                self._waiting.remove(run)
                self._finish(run)

    def _start(self, run: ArmRun) -> _Child:
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        if self._parallel > 1:  # runs that share cores must not each take them all
            environment.setdefault("OMP_NUM_THREADS", "1")
        _write_config(run)
        with run.log.open("ab") as log:
            process = subprocess.Popen(
                [*self._command, str(run.file), *self._options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        return _Child(run, process, time.monotonic())

    def _note_end(self, child: _Child, told_to_stop: bool) -> None:
        run, status = child.run, child.process.returncode
        if status == 0 and is_finished(run):
            self._finish(run, f", {human_duration(time.monotonic() - child.begun)}")
        elif status == STOPPED or told_to_stop:  # or before it could listen
            self._stopped.add(run.key)
        elif RunLock(run.run_dir).holder_here():  # which had not taken it when this one was started
            self._waiting.insert(0, run)
        else:
            self._failed.add(run.key)
            ended = f"status {status}" if status >= 0 else signal.Signals(-status).name
            say_error(f"{run} ended with {ended}: {_last_line(run.log)} ({run.log})")

    def _finish(self, run: ArmRun, took: str = "") -> None:
        self._finished.add(run.key)
        self._tell(f"{run}: {_held_out(run)}{took}; {self._left()} to go")

    def _left(self) -> str:
        left = len(self._waiting) + len(self._children) + len(self._failed) + len(self._stopped)
        return f"{left} run{'s' * (left != 1)}"


def _write_config(run: ArmRun) -> None:
    run.file.parent.mkdir(parents=True, exist_ok=True)
    run.file.write_text(configuration.to_yaml(run.config), "utf-8")


def _held_out(run: ArmRun) -> str:
    events = read_events(run.run_dir, broken=[])
    losses = [event["val_loss"] for event in events if "val_loss" in event]
    return f"held-out loss {losses[-1]:.4f}" if losses else "finished"


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


# ---- a cluster


def submit_missing(
    suite: Suite, nproc: int | None = None, tell: Callable[[str], None] = say
) -> None:
    """Submit a job of Slurm for each run that is neither finished nor known to the queue.

    Raises: ConfigError when nothing can be submitted from here, RunFolderError as ``run_missing``.
    """
    script = _launch_script()
    if os.environ.get("NODES_AFTER_PRUNE") or any(r.config.nodes_after_prune for r in suite.runs):
        raise ConfigError(
            "a run that goes on on fewer nodes does so in a job that no comparison knows of: leave "
            "NODES_AFTER_PRUNE and nodes_after_prune out"
        )
    with RunLock(suite.out, "comparison"):
        path = suite.out / JOBS
        jobs: dict[str, str] = files.read_json(path) if path.is_file() else {}
        missing = [run for run in suite.runs if not is_finished(run)]
        for run in missing:  # all are refused before one is submitted; seeds change nothing of it
            if run.seed == missing[0].seed:
                _launch(script, run, "", nproc, "--dry-run")
        for run in missing:
            job = jobs.get(run.key, "")
            if job and _is_queued(job):
                tell(f"{run}: job {job} is in the queue")
                continue
            waits = [jobs[needed.key] for needed in run.needs if not is_finished(needed)]
            after = f"afterok:{':'.join(waits)}" if waits else ""
            jobs[run.key] = _launch(script, run, after, nproc)
            _replace(path, json.dumps(jobs, indent=1))
            tell(f"{run}: submitted job {jobs[run.key]}{f', {after}' if after else ''}")


def _launch_script() -> Path:
    root = Path(configuration.__file__).resolve().parents[1]
    script = root / "examples" / "launch.sh"
    if not script.is_file():
        raise ConfigError(
            f"--slurm submits by examples/launch.sh, which is not at {script}: install the "
            "repository with pip install -e, or submit each run's seed*.yaml yourself"
        )
    if os.environ.get("SLURM_JOB_ID"):
        raise ConfigError("--slurm submits from outside of a job, and this is one: leave it out")
    if Path.cwd() != root:
        raise ConfigError(
            f"jobs run in {root}, and paths of a configuration count from there: call compare there"
        )
    return script


def _is_queued(job: str) -> bool:
    done = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True)
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise ConfigError(f"squeue does not say what became of job {job}: {done.stderr.strip()}")
    return done.returncode == 0 and bool(done.stdout.strip())


def _launch(script: Path, run: ArmRun, after: str, nproc: int | None, *options: str) -> str:
    """Call ``launch.sh`` for a run. Returns: what it printed, the job's id."""
    _write_config(run)
    environment = os.environ | {
        "CONFIG": str(run.file.absolute()),
        "LAUNCH": "slurm",
        "DEPENDENCY": after,
        "JOB_NAME": run.key.replace("/", "-"),
    }
    if nproc is not None:
        environment["NPROC_PER_NODE"] = str(nproc)
    called = ["bash", str(script), *options]
    done = subprocess.run(called, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ConfigError(f"{run} could not be submitted: {said[-1]}")
    return done.stdout.strip()


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)
