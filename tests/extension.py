"""Run with the C++ extension, or without it: what several test files share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from megatron_idea.prune import relocate


def needs_extension() -> None:
    """Skip where csrc/ was not built, unless the environment insists on it."""
    if os.environ.get(relocate.SWITCH) != "require":
        pytest.importorskip("megatron_idea._C", reason="csrc/ is not built")


@contextlib.contextmanager
def using(mode: str) -> Iterator[None]:
    """With the switch at ``mode``, asked anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(relocate.SWITCH, mode)
        relocate.extension.cache_clear()
        yield
    relocate.extension.cache_clear()


@pytest.fixture(
    name="implementation",
    scope="module",
    params=[pytest.param("off", id="pytorch"), pytest.param("require", id="extension")],
)
def each_implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """For test files that import this: with PyTorch, then with the extension."""
    if request.param == "require":
        needs_extension()
    with using(request.param):
        yield
