"""Tell what this machine offers, and which implementations a run will use because of it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from rich.console import Group
from rich.text import Text

from megatron_idea.records.terminal import table

Status = Literal["ok", "absent", "broken", "missing"]
_STYLE = {"ok": "green", "absent": "yellow", "broken": "red", "missing": "red"}


@dataclass(frozen=True)
class Row:
    """One finding. ``missing`` and ``broken`` stop a run when ``required``; ``absent`` does not."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    required: bool = False

    @property
    def is_fatal(self) -> bool:
        return self.required and self.status != "ok"


def collect() -> list[Row]:
    """Look at what can be imported and used here; an import that breaks becomes a row."""
    return [
        Row("Python", "ok", platform.python_version(), required=True),
        *_torch(),
        _package("megatron-core", "megatron.core", "pip install megatron-core", required=True),
        *_accelerators(),
        _communication(),
        *_in_use(),
        _trial(),
    ]


def render(rows: list[Row]) -> Group:
    """Lay the findings out for a terminal."""
    return table(("", "state", "what"), map(_cells, rows), left=3)


def _cells(row: Row) -> tuple[str, Text, Text]:
    what = Text(row.detail)
    if row.remedy:
        what.append(f"; {row.remedy}", "dim")
    return row.name, Text(row.status, _STYLE[row.status]), what


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence imports of accelerators, which talk a lot about what they miss; the table says it."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _import(name: str) -> ModuleType | Exception | None:
    """Return the module; None if it is not installed; the exception if it does not import."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
        with _quiet():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A dependency of an installed package is a broken package; its parent, an absent one.
        absent = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        return None if absent else error
    except Exception as error:  # a broken binary package can raise anything
        return error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _package(
    label: str, name: str, remedy: str, *, required: bool = False, without: str = "not installed"
) -> Row:
    module = _import(name)
    if module is None:
        return Row(label, "missing" if required else "absent", without, remedy, required)
    if isinstance(module, Exception):
        return Row(label, "broken", _reason(module), f"reinstall: {remedy}", required)
    return Row(label, "ok", str(getattr(module, "__version__", "installed")), required=required)


def _torch() -> list[Row]:
    row = _package("torch", "torch", "pip install torch", required=True)
    if row.status != "ok":
        return [row]
    import torch

    cuda = torch.version.cuda
    built = f"{torch.__version__}, " + (f"CUDA {cuda}" if cuda else "built without CUDA")
    if torch.cuda.is_available():
        devices = Row("devices", "ok", _gpus(torch))
    else:
        remedy = (
            "to use a GPU: a driver that fits this torch"
            if cuda
            else "to use a GPU: a CUDA build of torch"
        )
        devices = Row("devices", "ok", f"CPU, {os.cpu_count()} cores, no GPU", remedy)
    return [Row("torch", "ok", built, required=True), devices]


def _gpus(torch: Any) -> str:
    counts: dict[str, int] = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        counts[name] = counts.get(name, 0) + 1
    return "; ".join(f"{count} x {name}" for name, count in counts.items())


def _accelerators() -> list[Row]:
    return [
        _package(
            "Transformer Engine",
            "transformer_engine.pytorch",
            "with CUDA: pip install --no-build-isolation 'transformer_engine[pytorch]'",
        ),
        _package(
            "apex", "apex", "not needed beside Transformer Engine; else built from its source"
        ),
        _package("Triton", "triton", "comes with CUDA builds of torch"),
        _package(
            "C++ extension",
            "megatron_idea._C",
            "pip install . with a C++17 compiler at hand",
            without="not built",
        ),
    ]


def _communication() -> Row:
    module = _import("torch.distributed")
    if not isinstance(module, ModuleType) or not module.is_available():
        remedy = "a torch build with torch.distributed"
        return Row("communication", "missing", "no torch.distributed", remedy, required=True)
    backends = [
        name
        for name, present in (
            ("NCCL", module.is_nccl_available()),
            ("gloo", module.is_gloo_available()),
        )
        if present
    ]
    return Row("communication", "ok", " and ".join(backends))


def _in_use() -> list[Row]:
    """Name the implementations that follow, asked of the code that chooses them."""
    model, optimizer = _import("megatron_idea.engine.model"), _import("megatron.core.optimizer")
    if not isinstance(model, ModuleType) or not isinstance(optimizer, ModuleType):
        culprit = optimizer if isinstance(model, ModuleType) else model
        why = _reason(culprit) if isinstance(culprit, Exception) else "megatron-core is missing"
        return [Row("the model", "broken", why, "mend the rows above", required=True)]
    fused = model.uses_transformer_engine()
    adam = optimizer.Adam
    return [
        Row(
            "-> attention",
            "ok",
            "Transformer Engine DotProductAttention"
            if fused
            else "torch scaled_dot_product_attention",
        ),
        Row("-> activation, scores", "ok", _kernels()),
        Row("-> RMSNorm", "ok", "Transformer Engine" if fused else "torch rms_norm"),
        _compaction(),
        Row("-> optimizer", "ok", f"{adam.__module__.split('.')[0]} {adam.__name__}"),
        Row("-> collectives", "ok", "NCCL" if _has_cuda() else "gloo"),
    ]


# Sizes that every kernel takes, before and after.
_TRIAL = {
    "model": {"num_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2,
              "kv_channels": 32, "ffn_hidden_size": 64, "vocab_size": 64, "qk_layernorm": True},
    "training": {"seq_length": 32},
    "prune": {"target": {"ffn_hidden_size": 32, "num_query_groups": 1, "hidden_size": 64,
                         "num_layers": 2}, "alignment": 32},
}  # fmt: skip


def _trial() -> Row:
    """Build a tiny model, step, compact it on every axis, save and read it again, as in a run."""
    try:
        with _quiet(), tempfile.TemporaryDirectory() as folder:
            _train_save_resume(folder)
    except Exception as error:  # whatever would end a run
        remedy = "training would end like this; versions that work together are in pyproject.toml"
        return Row("a tiny run", "broken", _reason(error), remedy, required=True)
    return Row("a tiny run", "ok", "built, stepped, compacted, saved, read again", required=True)


def _train_save_resume(folder: str) -> None:
    import megatron_idea.train  # noqa: F401  all that a run imports
    from megatron_idea import checkpoint, config
    from megatron_idea.course import target_shape
    from megatron_idea.engine.distributed import joined
    from megatron_idea.engine.optimizer import update
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.plan import Plan
    from megatron_idea.prune.pruner import Pruner
    from megatron_idea.shape import LAYER_AXES

    tiny = config.from_dict({"run_dir": folder, **_TRIAL})
    with joined(tiny.parallel, tiny.training.seed) as groups:
        state = checkpoint.TrainState.fresh(tiny)
        trainable = assemble(tiny.sections, groups, state.shape, initialize=True)
        update(trainable.optimizer, lr=0.0)  # on gradients that are zero
        pruner = Pruner(tiny, trainable)
        alive = {name: units.clone() for name, units in pruner.alive.items()}
        for axis, goal in tiny.goals.items():
            alive[axis][..., goal.target :] = False
        for axis in LAYER_AXES:
            alive[axis][~alive["num_layers"]] = False
        plan = Plan.of(alive, target_shape(tiny), pruner.memory)
        pruner.silence(trainable, plan)
        pruner.compact(trainable, plan)
        checkpoint.load(trainable, pruner, checkpoint.save(tiny, trainable, pruner, state))


def _compaction() -> Row:
    """Name who plans and copies units on the CPU; on a GPU PyTorch does the copies."""
    from megatron_idea.config import ConfigError
    from megatron_idea.prune.relocate import extension

    try:
        with _quiet():
            native = extension()
    except ConfigError as error:
        return Row("-> compaction", "broken", str(error), required=True)
    return Row("-> compaction", "ok", "PyTorch" if native is None else "C++ extension")


def _kernels() -> str:
    import torch

    from megatron_idea.kernels.dispatch import uses_triton

    device = torch.device("cuda" if _has_cuda() else "cpu")
    return "Triton" if uses_triton("masked_swiglu", "auto", device) else "PyTorch"


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
