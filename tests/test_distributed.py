"""How the processes of a job find each other."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobs import small

from megatron_idea.config import Config, ConfigError
from megatron_idea.engine import distributed
from megatron_idea.engine.distributed import choose_interface
from megatron_idea.testing import Workers


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets a launcher's variables, and what names resolve to (None: nothing)."""

    def set_up(world_size: int, local: int, master: str, **addresses: str | None) -> str:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        monkeypatch.setenv("MASTER_ADDR", master)
        resolve = socket.getaddrinfo

        def getaddrinfo(host: str, *arguments: Any, **options: Any) -> Any:
            known = addresses.get(host, host)
            if known is None:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return resolve(known, *arguments, **options)

        monkeypatch.setattr(distributed.socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(distributed.socket, "gethostname", lambda: "here")
        choose_interface()
        return os.environ.get("GLOO_SOCKET_IFNAME", "")

    yield set_up
    os.environ.pop("GLOO_SOCKET_IFNAME", None)


def loopback() -> str:
    found = psutil.net_if_addrs().items()
    return next(n for n, addresses in found if any(a.address == "127.0.0.1" for a in addresses))


def test_one_machine_needs_no_name(job: Any) -> None:
    assert job(4, 4, "here", here=None) == loopback()


@pytest.mark.parametrize("address", [None, "127.0.1.1"])
def test_nodes_whose_name_is_of_no_use_take_the_way_to_the_first(
    job: Any, address: str | None
) -> None:
    assert job(4, 2, "first", here=address, first="127.0.0.1") == loopback()


def test_nodes_with_a_name_are_left_to_gloo(job: Any) -> None:
    assert job(4, 2, "first", here="192.0.2.1", first="192.0.2.2") == ""


def test_a_host_without_name_or_way_is_named(job: Any) -> None:
    with pytest.raises(ConfigError, match=r"host here has no address .* the first node, first"):
        job(4, 2, "first", here=None, first=None)


def policies_of_gloos_threads(rendezvous: str, config: Config) -> set[int]:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # tests have the other one
    distributed.start_distributed(config.parallel, config.training.seed, rendezvous)
    try:
        tasks = list(Path("/proc/self/task").iterdir())
        talking = [task for task in tasks if "gloo" in (task / "comm").read_text()]
        return {os.sched_getscheduler(int(task.name)) for task in talking}
    finally:
        distributed.stop_distributed()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a policy of Linux")
def test_gloos_threads_let_others_finish(workers: Workers) -> None:
    found = workers.run(policies_of_gloos_threads, 2, small())
    assert found == [{os.SCHED_BATCH}] * 2
