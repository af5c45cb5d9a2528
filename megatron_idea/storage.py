"""A checkpoint's files: written by a thread, listed with their checksums, verified, thrown away."""

from __future__ import annotations

import contextlib
import json
import pickle
import queue
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_idea.distributed import ProcessGroups, together

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22


class DamagedError(ValueError):
    """Files of a checkpoint are not what was written; the message names one."""


class Writing(threading.Thread):
    """Writes this rank's tensors of a checkpoint and takes the checksums of what it wrote.

    A thread and not megatron-core's forked process: for one that is killed the save would wait
    for ever, and a fork beside CUDA and gloo's threads is a risk of its own. The tensors must not
    change until ``done``.
    """

    def __init__(self, request: AsyncRequest) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.files: dict[str, dict[str, Any]] = {}
        """What it wrote, as in the manifest."""
        self.seconds = 0.0
        self._write: Callable[[], None] | None = None
        if request.async_fn is not None:
            _rank, buckets, results = request.async_fn_args
            buckets = request.preload_fn() if request.preload_fn else buckets
            transforms = request.async_fn.args[0]  # of a functools.partial
            self._write = lambda: self._write_buckets(transforms, buckets, results)
        self.start()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not; the results' queue tells which."""
        return not self.is_alive()

    def run(self) -> None:
        begin = time.perf_counter()
        if self._write is not None:
            self._write()
            self._write = None  # holds the tensors
        self.seconds = time.perf_counter() - begin

    def _write_buckets(self, transforms: list[Any], buckets: Sequence[Any], results: Any) -> None:
        written: dict[int, Any] = {}
        try:
            for number, bucket in enumerate(buckets):
                ended: queue.Queue[tuple[int, Any]] = queue.Queue()
                counted: queue.Queue[int] = queue.Queue()
                counted.put(number)
                FileSystemWriterAsync.write_preloaded_data(
                    transforms, number, bucket, ended, counted, True
                )
                _, outcome = ended.get_nowait()
                if isinstance(outcome, Exception):
                    raise outcome
                written[number] = outcome
                file = Path(bucket[0])
                self.files[file.name] = describe(file)
            results.put(written)
        except Exception as error:  # raised by megatron-core on every rank
            results.put(error)


def describe(file: Path) -> dict[str, Any]:
    """Size and CRC-32 of a file."""
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return {"bytes": file.stat().st_size, "crc32": f"{crc:08x}"}


_INDEX_FUNCTIONS = {("torch", "Size"), ("torch.serialization", "_get_layout")}


class _IndexReader(pickle.Unpickler):
    """Reads torch's ``.metadata``, a pickle, and refuses whatever torch does not write there."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _INDEX_FUNCTIONS or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if module.startswith("torch.distributed.checkpoint.") and "." not in name:
            known = isinstance(super().find_class(module, name), type)
        if not known:
            raise DamagedError(f"it would run {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def check_index(path: Path) -> None:
    """Make sure that reading a checkpoint's index runs nothing: torch unpickles it as it is.

    Raises: DamagedError when it holds anything but torch's own records.
    """
    try:
        with (path / ".metadata").open("rb") as stream:
            _IndexReader(stream).load()
    except Exception as error:  # of a pickle: any type
        raise DamagedError(f"{path} is damaged: .metadata: {error}") from error


def verify(path: Path, groups: ProcessGroups | None = None) -> None:
    """Compare every file of a checkpoint with the manifest, shared out over the ranks.

    Raises: DamagedError on every rank, naming the first file that is missing or not what it was.
    """

    def compare() -> None:
        check_index(path)
        try:
            expected = json.loads((path / MANIFEST).read_text())["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{path} is damaged: {MANIFEST}: {error}") from error
        names = sorted(expected)
        rank, size = (groups.world.rank(), groups.world.size()) if groups else (0, 1)
        for name in names[rank::size]:
            try:
                found = describe(path / name)
            except OSError as error:
                raise DamagedError(f"{path} is damaged: {name}: {error}") from error
            for what, value in found.items():
                if value != expected[name][what]:
                    raise DamagedError(
                        f"{path} is damaged: {name} has {what} {value}, {expected[name][what]} "
                        "was written"
                    )

    if groups is None:
        compare()
    else:
        together(compare, groups)


def superfluous(
    checkpoints: Sequence[tuple[Path, int]], last: int, every_tokens: int
) -> list[Path]:
    """Checkpoints that may go, of those given with their tokens, oldest first.

    The ``last`` newest stay (0: all), and the first at or after each multiple of ``every_tokens``.
    """
    if not last:
        return []
    milestones, reached = set(), 0
    for path, tokens in checkpoints:
        if every_tokens and tokens // every_tokens > reached:
            milestones.add(path)
            reached = tokens // every_tokens
    return [path for path, _ in checkpoints[:-last] if path not in milestones]


def remove(paths: Sequence[Path]) -> None:
    """Delete checkpoints; one that cannot be deleted is left.

    A kill in between leaves none that looks complete: what makes it so goes first.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            (path / "state.json").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
