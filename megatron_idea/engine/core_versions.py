"""What differs between the versions of megatron-core that pyproject.toml allows, 0.16.1 to 0.19.

All else runs the same on each of them; ``bash tests/run.sh`` tries the oldest and the newest.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import warnings
from types import ModuleType
from typing import Any

_NEEDS_TRITON = "megatron.core.transformer.moe.paged_stash"


class _Unused(ModuleType):
    """Stands for a module whose names are imported and not used."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def import_without_triton() -> None:
    """Let megatron-core be imported where Triton is not installed; call before it is.

    Since 0.18 it imports Triton kernels of mixture-of-experts layers, whatever the model.
    """
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(_NEEDS_TRITON, _Unused(_NEEDS_TRITON))


def async_save(strategy: Any, *arguments: Any) -> Any:
    """Call ``strategy.async_save`` so that megatron-core's own writer saves.

    Since 0.17 the writer is another package's, nvidia-resiliency-ext, unless it is told otherwise.
    """
    has_choice = "async_strategy" in inspect.signature(strategy.async_save).parameters
    own = {"async_strategy": "mcore"} if has_choice else {}
    return strategy.async_save(*arguments, **own)


def grads_for_norm(optimizer: Any) -> list[Any]:
    """Return the gradients that count for the global norm; 0.19 has another name for it."""
    renamed = getattr(optimizer, "get_grads_for_grad_norm", None)
    found: list[Any] = (renamed or optimizer.get_main_grads_for_grad_norm)()
    return found


def quiet() -> None:
    """Keep megatron-core's and torch's notes to developers out of a run's log."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", module=r"torch\.distributed", category=FutureWarning)
    for module in _TELLS_DEVELOPERS:
        logging.getLogger(f"megatron.core.{module}").addFilter(_is_for_users)


# Since 0.18 these log at each rebuild or save what callers of megatron-core should do otherwise.
_TELLS_DEVELOPERS = (
    "models.gpt.gpt_model",
    "distributed.distributed_data_parallel",
    "dist_checkpointing.strategies.common",
    "dist_checkpointing.strategies.torch",
)


def _is_for_users(record: logging.LogRecord) -> bool:
    text = record.getMessage().lower()
    return "deprecated" not in text and "full_param_layout" not in text
