"""Let only one process write to a run folder, on whatever machine, also after a kill.

``<run>/lock.json`` says who writes. It is created with O_EXCL, which shared file systems keep as
local ones do, and flock does not. Its holder touches it every few seconds. Whoever finds it looks:

    same machine           is that process still there?
    same Slurm job, which  Slurm ended the holder before it started this one
    was requeued since
    else                   does the file's time change while we watch? No two clocks are compared

A holder that is gone is replaced. One that was only stopped for a while finds another name in the
file when it wakes, and ends before it writes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_idea.errors import UserError
from megatron_idea.records.readable import human_duration

NAME = "lock.json"
BEAT_S = 5.0
PATIENCE_S = 60.0
"""Without a beat for so long a holder on another machine is gone. Long: code that keeps Python's
threads from running, as building the indices of a large corpus does, must not look like death."""
SETTLE_S = 1.0

logger = logging.getLogger(__name__)


class RunFolderError(UserError):
    """Says that another process writes to a run folder, or why nothing can be written to it."""


@dataclass(frozen=True)
class Holder:
    """Names the process that writes to a run folder."""

    host: str
    pid: int
    started: float
    """When the process was created, in seconds since 1970: process ids are used again."""
    since: float
    machine: str
    """Boot and process namespace: where ``pid`` means this process, and only there."""
    job: str
    """Cluster and id of the Slurm job; empty without one."""
    restarts: int
    """How often that job had been requeued."""
    token: str

    @staticmethod
    def this_process() -> Holder:
        job = os.environ.get("SLURM_JOB_ID", "")
        return Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            since=time.time(),
            machine=_machine(),
            job=f"{os.environ.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else "",
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        age = human_duration(max(0.0, time.time() - self.since))
        job = f", Slurm job {self.job.rpartition('/')[2]}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, for {age}"


class RunLock:
    """Keeps other writers out of ``folder`` while it is held; a context manager.

    ``what``: what errors call the folder.
    """

    def __init__(self, folder: str | Path, what: str = "run folder") -> None:
        self.path, self._what = Path(folder) / NAME, what
        self._me: Holder | None = None
        self._made_folder = False
        self._released = threading.Event()

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, also from a holder that is gone.

        Waits up to ``PATIENCE_S`` to see whether a holder on another machine is gone.

        Raises: RunFolderError that names the holder, or says why the folder cannot be written to.
        """
        me = Holder.this_process()
        try:
            self._made_folder = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create(me):
                found = self._look()
                if found is not None and self._replace(me, *found):
                    break
        except OSError as error:
            self._remove_folder()
            why = error.strerror or error
            raise RunFolderError(
                f"cannot write to {self._what} {self.path.parent}: {why}"
            ) from error
        self._me = me
        self._released.clear()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock back; does nothing where it was not taken."""
        if self._me is None:
            return
        self._released.set()
        with contextlib.suppress(OSError):
            if not self.is_lost():
                self.path.unlink()
        self._remove_folder()
        self._me = None

    def is_lost(self) -> bool:
        """Tell whether another process has taken the lock, believing this one to be gone."""
        found = self._look()
        holder = _parse(found[0]) if found else None
        return holder is not None and holder != self._me

    def holder_here(self) -> Holder | None:
        """Return the holder if it is a process of this machine, and still there."""
        found = self._look()
        holder = _parse(found[0]) if found else None
        is_here = holder is not None and holder.machine == _machine() and _is_running(holder)
        return holder if is_here else None

    def _create(self, me: Holder) -> bool:
        """Take the lock if nobody has it; return whether that was so."""
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(handle, "w") as file:
                file.write(json.dumps(asdict(me)))
                file.flush()
                os.fsync(file.fileno())
        except OSError:  # no space: nobody shall wait for a lock without a holder
            self.path.unlink()
            raise
        return True

    def _look(self) -> tuple[Any, int] | None:
        """Return what the file says and its time; None when there is no file any more.

        It is opened: over NFS only that makes sure that the time is the server's.
        """
        try:
            # A pipe in its place, as in a stranger's folder, must not make us wait.
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                content, time_ns = file.read(1 << 16), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        try:
            return json.loads(content), time_ns
        except (
            ValueError,
            RecursionError,
        ):  # just being written, or by a process that was killed at that moment
            return {}, time_ns

    def _replace(self, me: Holder, said: Any, time_ns: int) -> bool:
        """Take the lock from a holder that is gone; False when it was released meanwhile."""
        holder = _parse(said)
        why = _why_gone(holder, me) if holder is not None else None
        if why is None:
            self._require_silence(holder, said, time_ns)
            why = f"it gave no sign of life for {PATIENCE_S:.0f} s"
        now = self._look()
        if now is None:
            return False
        if now != (said, time_ns):
            raise RunFolderError(self._in_use(_parse(now[0])))
        logger.warning(f"taking over {self.path.parent} from {holder or 'a writer'}: {why}")
        mine = self.path.with_name(f".{NAME}.{me.token}")
        try:
            mine.write_text(json.dumps(asdict(me)))
            mine.replace(self.path)
        finally:
            mine.unlink(missing_ok=True)
        time.sleep(SETTLE_S)  # of two that take over in the same moment, one is the last
        found = self._look()
        if found is None or found[0] != asdict(me):
            raise RunFolderError(self._in_use(_parse(found[0]) if found else None))
        return True

    def _require_silence(self, holder: Holder | None, said: Any, time_ns: int) -> None:
        """Watch for a beat. Raises: RunFolderError when there is one."""
        if holder is not None and holder.machine == _machine():
            raise RunFolderError(self._in_use(holder))  # it is there: ``_why_gone`` has looked
        logger.warning(
            f"{self.path.parent} was last written to by {holder or 'an unknown process'}; looking "
            f"for {PATIENCE_S:.0f} s whether it is still there"
        )
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            time.sleep(min(1.0, PATIENCE_S / 10))
            found = self._look()
            if found is None:
                return
            if found != (said, time_ns):
                raise RunFolderError(self._in_use(_parse(found[0])))

    def _in_use(self, holder: Holder | None) -> str:
        return (
            f"{self._what} {self.path.parent} is in use by {holder or 'another process'}: wait "
            "until it has ended, stop it, or name another folder "
            f"({NAME} of a copied one can be deleted)"
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a disk that is out of reach for a moment
                if self.is_lost() and not self._released.is_set():
                    self._end()
                os.utime(self.path)

    def _end(self) -> None:
        """End this process at once: another one writes to the folder now."""
        found = self._look()
        holder = _parse(found[0]) if found else None
        sys.stderr.write(
            f"error: {self._what} {self.path.parent} was taken over by "
            f"{holder or 'another process'} while this one gave no sign of life; this one ends\n"
        )
        sys.stderr.flush()
        os._exit(1)

    def _remove_folder(self) -> None:
        """Leave no empty folder behind where there was none."""
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()


def _parse(said: Any) -> Holder | None:
    """Return the holder; None where the file is half written or another program's."""
    kinds = {"host": str, "pid": int, "started": float, "since": float, "machine": str}
    kinds |= {"job": str, "restarts": int, "token": str}
    if not isinstance(said, dict) or said.keys() != kinds.keys():
        return None
    if any(type(said[name]) is not kind for name, kind in kinds.items()):
        return None
    holder = Holder(**said)
    is_sound = math.isfinite(holder.started + holder.since) and 0 < holder.pid < 1 << 31
    return holder if is_sound and (holder.host + holder.job).isprintable() else None


def _why_gone(holder: Holder, me: Holder) -> str | None:
    """Say why the holder is certainly gone; None if it is there or that cannot be known."""
    if holder.machine == me.machine:
        return None if _is_running(holder) else "that process has ended"
    if holder.job and holder.job == me.job and holder.restarts < me.restarts:
        return "its job was requeued since"
    return None


def _is_running(holder: Holder) -> bool:
    if not psutil.pid_exists(holder.pid):
        return False
    try:
        process = psutil.Process(holder.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # Within 5 s: it is worked out from the time of the boot, which clock corrections shift.
        return abs(process.create_time() - holder.started) < 5.0
    except psutil.Error:  # another user's, hidden from us
        return True


def _machine() -> str:
    """Name the boot and the container within which a process id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"
