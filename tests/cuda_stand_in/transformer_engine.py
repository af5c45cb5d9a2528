"""Loads Transformer Engine's own Python over kernels in plain PyTorch."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any


class _Absent(types.ModuleType):
    """A package that Transformer Engine imports and this project's use of it never calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _Absent(self.__name__)


def install(tree: Path) -> None:
    """Make ``transformer_engine`` of the unpacked wheel in ``tree`` importable."""
    from cuda_stand_in import transformer_engine_torch as kernels

    for package in ("onnx", "onnxscript", "einops"):
        if importlib.util.find_spec(package) is None:
            sys.modules[package] = _Absent(package)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its C++ is not looked for
    sys.path.insert(0, str(tree))
    sys.modules["transformer_engine_torch"] = kernels
    # The package's own __init__ loads the C++: its part that does so is replaced before.
    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(tree / "transformer_engine")]
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda _framework: None  # type: ignore[attr-defined]
    del sys.modules["transformer_engine"]
    importlib.import_module("transformer_engine.pytorch")
    sys.modules["transformer_engine"].common = common  # type: ignore[attr-defined]
