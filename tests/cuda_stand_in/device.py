"""Puts the device of ``device.cpp`` under ``torch.cuda`` and NCCL's name over gloo."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

NAME = "NVIDIA H100 80GB HBM3"
MEMORY_BYTES = 80 * 2**30


class Stream:
    """Work is done when a call returns: there is nothing to order."""

    device = torch.device("cuda", 0)
    cuda_stream = stream_id = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def nothing(self, *_: Any) -> None:
        pass

    wait_stream = wait_event = wait = record = nothing

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Event(Stream):
    def elapsed_time(self, _end: Event) -> float:
        return 0.0


def install(library: Path, count: int) -> Any:
    """Give this process ``count`` CUDA devices; before anything asks torch for one.

    Returns: the extension; ``take_waits()`` says what has made the host wait since it was asked.
    """
    spec = importlib.util.spec_from_file_location("_cuda_stand_in", library)
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    sys.modules["_cuda_stand_in"] = native
    native.set_device_count(count)
    _install_cuda(native, count)
    _install_storage(native)
    _install_nccl()
    return native


def _install_cuda(native: Any, count: int) -> None:
    cuda: Any = torch.cuda
    properties = types.SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=MEMORY_BYTES, multi_processor_count=132
    )

    def index(device: Any) -> int:
        return device if isinstance(device, int) else torch.device(device).index or 0

    @contextlib.contextmanager
    def on(device: Any) -> Iterator[None]:
        before = native.current_device()
        native.set_device(before if device is None else index(device))
        yield
        native.set_device(before)

    cuda.is_available = cuda.is_initialized = cuda.is_bf16_supported = lambda *_: True
    cuda.init = cuda._lazy_init = cuda.empty_cache = cuda.ipc_collect = lambda: None
    cuda.device_count = lambda: count
    cuda.current_device = native.current_device
    torch._C._cuda_getDevice = native.current_device  # type: ignore[attr-defined]
    cuda.set_device = lambda device: native.set_device(index(device))
    cuda.device = on
    cuda.get_device_name = lambda _device=None: NAME
    cuda.get_device_capability = lambda _device=None: (properties.major, properties.minor)
    cuda.get_device_properties = lambda _device=None: properties
    cuda.synchronize = lambda _device=None: native.count_wait("synchronize")
    cuda.is_current_stream_capturing = lambda: False

    cuda.memory_allocated = cuda.memory_reserved = lambda _device=None: native.memory_allocated()
    cuda.max_memory_allocated = lambda _device=None: native.max_memory_allocated()
    cuda.reset_peak_memory_stats = lambda _device=None: native.reset_peak_memory_stats()
    cuda.mem_get_info = lambda _device=None: (
        MEMORY_BYTES - native.memory_allocated(),
        MEMORY_BYTES,
    )

    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda _device=None: Stream()
    cuda.stream = lambda _stream: contextlib.nullcontext()
    cuda.default_generators = (native.default_generator(),) * count
    torch.version.cuda = "13.0"
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *_: None)


def _install_storage(native: Any) -> None:
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return resize(storage, size)
        view = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        native.resize_storage(view, size)
        return storage

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]


def _install_nccl() -> None:
    """Groups find a backend of that name; ``device.cpp`` sends their messages through gloo."""
    from torch.distributed import distributed_c10d as c10d

    class ProcessGroupNCCL(c10d.ProcessGroupGloo):
        class Options:
            pass

        def __init__(self, _store: Any, _rank: int, _size: int, _options: Any) -> None:
            super().__init__(dist.HashStore(), 0, 1, c10d.default_pg_timeout)

    # With a device id, a group is split from the first one. Of a group, C++ hands out the base.
    c10d.ProcessGroupGloo.perform_nocolor_split = lambda *_: None  # type: ignore[attr-defined]
    c10d._NCCL_AVAILABLE = True
    c10d.ProcessGroupNCCL = dist.ProcessGroupNCCL = ProcessGroupNCCL  # type: ignore[assignment]
    c10d.default_pg_nccl_timeout = c10d.default_pg_timeout
