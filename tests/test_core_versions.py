"""Versions of megatron-core: what it needs that we can do without, and what it says in our log."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import pytest

from megatron_idea.engine import core_versions
from megatron_idea.engine.core_versions import async_save, import_without_triton, quiet

TRITON_ONLY = "megatron.core.transformer.moe.paged_stash"


def test_without_triton_a_stand_in_takes_the_place_of_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = dict(sys.modules)
    loaded.pop(TRITON_ONLY, None)
    monkeypatch.setattr(core_versions.sys, "modules", loaded | {"triton": None})
    import_without_triton()
    stand_in = core_versions.sys.modules[TRITON_ONLY]
    assert stand_in.paged_stash_reset is None
    assert not hasattr(stand_in, "__path__")


def test_where_triton_is_megatron_core_keeps_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_loader("triton", loader=None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.delitem(sys.modules, TRITON_ONLY, raising=False)
    import_without_triton()
    assert TRITON_ONLY not in sys.modules


@pytest.mark.skipif(
    importlib.util.find_spec(TRITON_ONLY) is None, reason="megatron-core 0.18 began to need Triton"
)
def test_a_run_can_be_imported_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import megatron_idea.train"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


class Before:
    def async_save(self, state: str, folder: str) -> tuple[str, ...]:
        return (state, folder)


class Since017:
    def async_save(self, state: str, folder: str, async_strategy: str = "nvrx") -> tuple[str, ...]:
        return (state, folder, async_strategy)


@pytest.mark.parametrize(("strategy", "writer"), [(Before(), ()), (Since017(), ("mcore",))])
def test_the_writer_is_megatron_cores_own(strategy: object, writer: tuple[str, ...]) -> None:
    assert async_save(strategy, "state", "folder") == ("state", "folder", *writer)


def test_notes_to_developers_stay_out_of_the_log_and_warnings_do_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quiet()
    gpt = logging.getLogger("megatron.core.models.gpt.gpt_model")
    ddp = logging.getLogger("megatron.core.distributed.distributed_data_parallel")
    gpt.warning("GPTModel IS DEPRECATED. Please reference the migration guide")
    ddp.warning("DistributedDataParallel: full_param_layout not provided with %s", "x")
    ddp.warning("a bucket is larger than the buffer")
    assert caplog.messages == ["a bucket is larger than the buffer"]
