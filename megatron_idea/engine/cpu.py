"""All that megatron-core needs to run without CUDA; does nothing when CUDA is there.

megatron-core asks for CUDA in literal places: ``device="cuda"``, ``torch.cuda.current_device()``,
``tensor.type() == "torch.cuda.FloatTensor"``, the CUDA random-number generator. ``install`` gives
each loaded ``megatron.core`` module a view of torch in which those mean the CPU. torch itself, as
everybody else sees it, stays as it is, with one exception: ``Tensor.cuda``, which could only raise
on such a machine, returns the tensor.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros")


class _NoStream:
    """Stands for a CUDA stream or event: on the CPU work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Cuda(types.ModuleType):
    """``torch.cuda`` as megatron-core sees it: the CPU in place of the current device."""

    Stream = Event = _NoStream

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def current_stream(device: Any = None) -> _NoStream:
        return _NoStream()

    default_stream = current_stream

    @staticmethod
    def stream(stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch(types.ModuleType):
    """``torch`` as megatron-core sees it: factories take ``device="cuda"`` as the CPU."""

    cuda = _Cuda("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


def _torch_view() -> _Torch:
    view = _Torch("torch")
    for name in _FACTORIES:
        setattr(view, name, _on_cpu(getattr(torch, name)))
    return view


_VIEW = _torch_view()


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Inside, ``tensor.type()`` names CUDA types: the optimizer sorts parameters by that name."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """``CudaRNGStatesTracker.fork`` on the CPU generator."""
    outside = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
    return torch.get_rng_state()


def _set_rng_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


@functools.cache
def _patch_once() -> None:
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    random.CudaRNGStatesTracker.fork = _fork
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    named = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    optimizer.clip_grad_by_total_norm_fp32 = named
    clip_grads.clip_grad_by_total_norm_fp32 = named
    for owner, method in (
        (optimizer.Float16OptimizerWithFloat16Params, "__init__"),
        (distrib_optimizer.DistributedOptimizer, "__init__"),
    ):
        setattr(owner, method, _with_cuda_type_names(getattr(owner, method)))


def install() -> bool:
    """Let megatron-core run on the CPU. Returns whether this machine needed it.

    May be called again: modules of megatron-core that were loaded since are treated then.
    """
    if torch.cuda.is_available():
        return False
    _patch_once()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _VIEW  # type: ignore[attr-defined]
    return True
