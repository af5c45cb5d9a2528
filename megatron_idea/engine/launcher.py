"""Start the processes of a job on this node, pass stop signals on to them, and say how they ended.

torchrun's agent as a library. The command itself ends with 1 whatever its workers said, and cuts
their saving short.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from megatron_idea.config import ConfigError

STOPPED = 75
"""Exit status of a run that a signal stopped before its last token: EX_TEMPFAIL of sysexits.h, not
an error, try again later."""

FEWER_NODES = 76
"""Exit status of a run that is to go on on ``nodes_after_prune`` nodes."""

LOOPBACK = "127.0.0.1"


def nodes_from_environment() -> int:
    """Nodes of the job that this process is a worker of: its launchers, else 1."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Job:
    """Processes to start here, and where this node's place is in the job."""

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    master: str = ""
    """HOST:PORT of node 0; empty when there is no other."""

    def check(self) -> None:
        """Raises: ConfigError for a place that does not exist or a node 0 without an address."""
        if self.node_rank >= self.nnodes:
            raise ConfigError(
                f"--node-rank is {self.node_rank}; with --nnodes {self.nnodes} it is below that"
            )
        host, _, port = self.master.rpartition(":")
        if self.nnodes == 1 and not self.master:
            return
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(
                f"--master is {self.master!r}; several nodes need HOST:PORT of node 0, the same "
                "everywhere"
            )
        try:
            socket.getaddrinfo(host.strip("[]"), port)
        except OSError as error:
            raise ConfigError(
                f"--master names host {host!r}, which has no address here ({error.strerror}); give "
                "its address, or add the name to /etc/hosts"
            ) from error


class PassOn:
    """Passes stop signals to the workers, who save and leave on their own.

    torch's agent would kill them 30 s after a signal (a constant up to torch 2.11), a large
    checkpoint unfinished. The same signal again is left to it: then 30 s are enough.
    """

    ECHO_S = 2.0  # as train.StopSignal's: what comes sooner is the same request
    DEAF_S = 1.0  # a main thread that runs Python has handled a signal long before

    def __init__(self, run_id: str) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._run_id = run_id
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> PassOn:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._writer_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        signal.set_wakeup_fd(self._writer_before)
        os.close(self._writer)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _watch(self, reader: int) -> None:
        """Hear a signal while the main thread waits inside torch, which runs no handler there.

        So it is as long as other nodes are waited for, minutes; then there is no worker yet.
        """
        while number := os.read(reader, 1):
            time.sleep(self.DEAF_S)
            is_heard = self.received is not None or number[0] not in self._before
            if not is_heard and not self._tell_workers(number[0]):
                os.write(2, b"stopped while waiting for the other nodes\n")
                os._exit(STOPPED)
        os.close(reader)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        now = time.monotonic()
        again = number == self.received and now - self._received_at > self.ECHO_S
        if self.received is None:
            self.received, self._received_at = number, now
            again = not self._tell_workers(number)
        if again:
            name = signal.Signals(number)
            raise SignalException(f"got {name.name}", name)

    def _tell_workers(self, number: int) -> bool:
        """Whether there was one to tell."""
        import psutil

        told = False
        for child in psutil.Process().children():
            try:
                if child.environ().get("TORCHELASTIC_RUN_ID") == self._run_id:
                    child.send_signal(number)
                    told = True
            except psutil.Error:  # it has just ended
                continue
        return told


@dataclass(frozen=True)
class Ended:
    """How the processes of this node ended."""

    status: int
    """Exit status: the first failed worker's if one failed."""
    reason: str = ""
    """What no worker could say itself."""


def launch(job: Job, arguments: list[str]) -> Ended:
    """Run this program with ``arguments`` in the job's processes on this node; wait for them."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    set_defaults(os.environ)
    # The working directory is not searched for modules: a folder there must not hide a package.
    os.environ["PYTHONSAFEPATH"] = "1"
    # A rank says itself what went wrong; torchrun's account of it would only push that away.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=job.nnodes,
        max_nodes=job.nnodes,
        nproc_per_node=job.nproc,
        max_restarts=0,  # its default is 3: a mistake of the user would be made four times
        # Several nodes: ranks in the order of the nodes, node 0 at an address that all know.
        rdzv_backend="static" if job.master else "c10d",
        rdzv_endpoint=job.master or f"{LOOPBACK}:0",
        # What workers are told to meet at; by default this machine's name, which need not resolve.
        local_addr=None if job.master else LOOPBACK,
        rdzv_configs={"rank": job.node_rank} if job.master else {},
        run_id=job.master or uuid.uuid4().hex,
        monitor_interval=0.1,
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are ours
    )
    with PassOn(settings.run_id) as pass_on:
        try:
            elastic_launch(settings, sys.executable)("-m", "megatron_idea", *arguments)
        except ChildFailedError as error:
            return _ended(*error.get_first_failure(), stopped_by=pass_on.received)
        except SignalException as stopped:  # the workers have got it too
            asked = stopped.sigval == pass_on.received
            return Ended(STOPPED if asked else 128 + stopped.sigval)
        except DistError as error:
            if not job.master:
                raise
            reason = str(error).splitlines()[0]
            return Ended(
                1, f"node {job.node_rank} cannot meet the others at {job.master}: {reason}"
            )
    return Ended(0)


def set_defaults(environment: MutableMapping[str, str]) -> None:
    """Put into the workers' environment what a run needs and nobody has set.

    CUDA, its allocator and gloo read it when a process starts to use them.
    """
    # As torchrun would, without its warning: ranks that share cores must not each take them all.
    environment.setdefault("OMP_NUM_THREADS", "1")
    # gloo would take the interface of the host's name, which may be the loopback. NCCL's variable
    # may also have a prefix of names or a list, which gloo does not know.
    name = environment.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if name in (known for _, known in socket.if_nameindex()):
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
    capability = _compute_capability()
    if capability is None:
        return
    # Each compaction gives all buffers back and takes smaller ones.
    if "PYTORCH_ALLOC_CONF" not in environment:
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # One queue: megatron-core's tensor-parallel layers count on the order in which they launch a
    # collective and a GEMM. From Blackwell on it asks for no such thing.
    if capability < 10:
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _compute_capability() -> float | None:
    """The least of this node's GPUs, None without any; asked of the driver, not of CUDA.

    A CUDA context in this process would hold memory of a GPU during the whole run.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return min((float(line) for line in said.split()), default=None)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def _ended(rank: int, failure: Any, stopped_by: int | None) -> Ended:
    """How a worker ended."""
    if failure.exitcode > 0:
        return Ended(failure.exitcode)
    if -failure.exitcode == stopped_by:  # asked before it could save, or asked twice
        return Ended(STOPPED)
    reason = f"rank {rank} was killed by {failure.signal_name()}"
    if -failure.exitcode == signal.SIGKILL:
        reason += ", as the kernel does when memory runs out"
    return Ended(128 - failure.exitcode, reason)
