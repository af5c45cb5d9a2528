"""The doctor looks at anything without falling ill."""

from __future__ import annotations

import importlib
import platform
import sys
import types
from pathlib import Path

import pytest
from extension import using
from rich.console import Console

from megatron_idea.planning import doctor
from megatron_idea.planning.doctor import Row, collect, render


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.name: row for row in collect()}


def test_what_a_run_needs_is_here(rows: dict[str, Row]) -> None:
    assert not any(row.is_fatal for row in rows.values())
    assert rows["Python"].detail == platform.python_version()
    assert rows["megatron-core"].status == "ok"


def test_the_implementations_in_use_are_named(rows: dict[str, Row]) -> None:
    names = ("attention", "activation, scores", "RMSNorm", "compaction", "optimizer", "collectives")
    for name in names:
        assert rows[f"-> {name}"].detail


@pytest.mark.parametrize(
    ("switch", "built", "detail", "fatal"),
    [
        ("auto", True, "C++ extension", False),
        ("off", True, "PyTorch", False),
        ("auto", False, "PyTorch", False),
        ("require", False, "C++17 compiler", True),
        ("perhaps", True, "legal values: auto, require, off", True),
    ],
)
def test_the_implementation_of_compaction_is_named(
    switch: str, built: bool, detail: str, fatal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_idea

    stub = types.ModuleType("megatron_idea._C") if built else None
    monkeypatch.setattr(megatron_idea, "_C", stub, raising=False)
    if not built:
        monkeypatch.delattr(megatron_idea, "_C")
    monkeypatch.setitem(sys.modules, "megatron_idea._C", stub)
    with using(switch):
        row = doctor._compaction()
    assert detail in row.detail and row.is_fatal == fatal


@pytest.mark.parametrize(
    "part", ["engine.trainable.assemble", "checkpoint.load", "prune.pruner.compact"]
)
def test_what_would_end_a_run_is_fatal(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise TypeError("async_save() missing 1 required positional argument")

    monkeypatch.setattr(f"megatron_idea.{part}", breaks)
    row = doctor._trial()
    assert row.is_fatal
    assert row.detail == "TypeError: async_save() missing 1 required positional argument"


def test_a_name_that_megatron_core_has_lost_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.dist_checkpointing.strategies import common

    monkeypatch.delattr(common, "COMMON_STATE_FNAME")
    for name in ("megatron_idea.train", "megatron_idea.checkpoint"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    row = doctor._trial()
    assert row.is_fatal and "COMMON_STATE_FNAME" in row.detail


def test_what_is_absent_says_how_to_get_it(rows: dict[str, Row]) -> None:
    assert all(row.remedy for row in rows.values() if row.status != "ok")


def test_the_table_shows_remedies_unchanged() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render([Row("TE", "absent", "not installed", "pip install 'x[pytorch]'")]))
    assert "pip install 'x[pytorch]'" in capture.get()


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("__version__ = '1.2'", "ok"),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "broken"),
        ("import a_dependency_that_is_not_there", "broken"),
        ("raise RuntimeError", "broken"),
    ],
)
def test_a_broken_import_is_reported_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, status: str
) -> None:
    name = "doctors_patient"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, name, raising=False)
    row = doctor._package("patient", name, "pip install patient", required=True)
    assert row.status == status
    assert row.is_fatal == (status != "ok")
    monkeypatch.delitem(importlib.sys.modules, name, raising=False)


def test_an_absent_package_is_fatal_only_when_required() -> None:
    for name in ("no_such_package", "no_such_package.inside"):
        optional = doctor._package("x", name, "get it")
        required = doctor._package("x", name, "get it", required=True)
        assert (optional.status, optional.is_fatal) == ("absent", False)
        assert (required.status, required.is_fatal) == ("missing", True)
