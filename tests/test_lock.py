"""One writer in a run folder: others are refused in a sentence, holders that are gone replaced."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_idea.config import Config
from megatron_idea.records import lock as locks
from megatron_idea.records.lock import NAME, Holder, RunFolderError, RunLock
from megatron_idea.testing import Workers
from megatron_idea.train import train

FAR = {"host": "node-7", "machine": "another boot", "pid": 4242}


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.4)
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def left_behind(run_dir: Path, **fields: Any) -> Path:
    """A lock as this process would write it, but for ``fields``."""
    run_dir.mkdir(exist_ok=True)
    path = run_dir / NAME
    path.write_text(json.dumps(dataclasses.asdict(Holder.this_process()) | fields))
    return path


def test_a_second_writer_is_told_who_is_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunLock(run):
        who = rf"{run} is in use by process {os.getpid()} on \S+, for \d+s: wait until it has ended"
        with pytest.raises(RunFolderError, match=who), RunLock(run):
            pass
        assert (run / NAME).exists()
    assert not run.exists()  # it was not there before
    run.mkdir()
    with RunLock(run), RunLock(tmp_path / "other"):
        pass
    assert list(run.iterdir()) == []


def test_a_killed_process_is_replaced_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        f"import time; from megatron_idea.records.lock import RunLock; RunLock({str(tmp_path)!r})"
    )
    code += ".acquire(); print('held', flush=True); time.sleep(60)"
    environment = os.environ | {"SLURM_JOB_ID": "77"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match=rf"process {other.pid} on \S+, Slurm job 77, for"):
            RunLock(tmp_path).acquire()
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # not reaped: a zombie
        with RunLock(tmp_path):
            pass
    assert f"from process {other.pid} on" in caplog.text and "process has ended" in caplog.text


def test_a_process_with_the_id_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    left_behind(tmp_path, started=1.0)
    with RunLock(tmp_path):
        pass


def test_a_holder_on_another_machine_is_watched_for_a_sign_of_life(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = left_behind(tmp_path, **FAR)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.02):
            os.utime(path)

    alive = threading.Thread(target=beat)
    alive.start()
    try:
        with pytest.raises(RunFolderError, match="in use by process 4242 on node-7"):
            RunLock(tmp_path).acquire()
    finally:
        ended.set()
        alive.join()
    assert "from process" not in caplog.text
    with RunLock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "from process 4242 on node-7" in caplog.text and "no sign of life" in caplog.text


def test_a_requeued_job_replaces_its_former_self_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 600.0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    left_behind(tmp_path, **FAR, restarts=0)
    begin = time.monotonic()
    with RunLock(tmp_path):
        pass
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"pid": 1}', json.dumps(FAR), "\x00" * 99, "[" * 65536],
    ids=range(7),
)
def test_a_lock_that_says_nothing_is_watched_and_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(content)
    with RunLock(tmp_path):
        pass


def test_a_lock_that_is_released_while_it_is_watched_is_free(tmp_path: Path) -> None:
    path = left_behind(tmp_path, **FAR)
    threading.Timer(0.1, path.unlink).start()
    with RunLock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with RunLock(tmp_path):
        pass


def test_a_holder_that_was_replaced_while_it_slept_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []
    ended = threading.Event()

    def leave(status: int) -> None:
        statuses.append(status)
        ended.set()
        time.sleep(60)  # as a process that is gone, it does nothing more

    monkeypatch.setattr(locks, "BEAT_S", 0.02)
    monkeypatch.setattr(locks.os, "_exit", leave)
    mine = RunLock(tmp_path)
    mine.acquire()
    time.sleep(0.1)
    assert not statuses
    path = left_behind(tmp_path, **FAR)
    assert ended.wait(20)
    mine.release()
    assert path.exists(), "somebody else's lock was removed"
    (line,) = capfd.readouterr().err.splitlines()
    assert "was taken over by process 4242 on node-7" in line and statuses == [1]


def test_a_folder_that_cannot_be_written_to_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"cannot write to run folder .*file/run: Not a dir"):
        RunLock(tmp_path / "file" / "run").acquire()


def run_locked(rendezvous: str, config: Config) -> str:
    with RunLock(config.run_dir):
        try:
            train(config, rendezvous)
        except RunFolderError as error:
            return str(error)
    return "trained"


def test_a_run_that_another_process_writes_is_not_trained(workers: Workers, tiny: Config) -> None:
    (said,) = workers.run(run_locked, 1, tiny)
    assert f"{tiny.run_dir} is in use by process" in said
    assert not Path(tiny.run_dir).exists()
