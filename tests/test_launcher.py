"""What the launcher puts into the environment of the processes that it starts."""

from __future__ import annotations

import socket
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_idea.engine import launcher


def defaults(
    monkeypatch: pytest.MonkeyPatch, smi: str | None, **given: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The environment after, and what is new in it, on a node where nvidia-smi says ``smi``."""

    def run(*_: Any, **__: Any) -> Any:
        if smi is None:
            raise FileNotFoundError("nvidia-smi")
        return SimpleNamespace(stdout=smi)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    environment = dict(given)
    launcher.set_defaults(environment)
    return environment, {k: v for k, v in environment.items() if k not in given}


SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.mark.parametrize(
    ("smi", "expected"),
    [
        ("9.0\n9.0\n", SEGMENTS | ONE_QUEUE),
        ("8.0\n", SEGMENTS | ONE_QUEUE),
        ("10.0\n10.0\n", SEGMENTS),  # Blackwell
        ("[N/A]\n", {}),
        ("", {}),
        (None, {}),
    ],
)
def test_gpus_get_the_settings_of_their_generation(
    monkeypatch: pytest.MonkeyPatch, smi: str | None, expected: dict[str, str]
) -> None:
    _, new = defaults(monkeypatch, smi)
    assert new == expected | {"OMP_NUM_THREADS": "1"}


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "OMP_NUM_THREADS": "4", "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "eth0",
    }  # fmt: skip
    environment, _ = defaults(monkeypatch, "9.0\n", **given)
    assert environment == given


@pytest.mark.parametrize(
    ("nccl", "gloo"),
    [("eth0", "eth0"), ("=eth0", "eth0"), ("eth", None), ("^lo", None), ("eth0,eth1", None)],
)
def test_gloo_takes_nccls_interface_when_it_is_one_of_this_node(
    monkeypatch: pytest.MonkeyPatch, nccl: str, gloo: str | None
) -> None:
    _, new = defaults(monkeypatch, None, NCCL_SOCKET_IFNAME=nccl)
    assert new.get("GLOO_SOCKET_IFNAME") == gloo
