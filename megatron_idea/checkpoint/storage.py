"""A checkpoint's files: written by a thread, listed with their checksums, verified, thrown away."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_idea import files
from megatron_idea.checkpoint.index import (
    COMMON,
    INDEX,
    ForeignError,
    Piece,
    check_common,
    check_pieces,
    read_index,
)
from megatron_idea.engine.distributed import ProcessGroups, together
from megatron_idea.errors import UserError

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22


class DamagedError(UserError):
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


_BACKENDS = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip
"""What megatron-core's ``metadata.json`` may say; other backends are other readers."""


def verify(path: Path, groups: ProcessGroups | None = None) -> None:
    """Compare every file of a checkpoint with the manifest, shared out over the ranks.

    What is loaded afterwards is made sure to be data: the index runs nothing and names nothing but
    tensors inside these files, and there each is what the index says.

    Raises: DamagedError on every rank, naming the first file that is missing, not what it was, or
        nothing that a checkpoint has.
    Cost: reads all files once; about 1 ms a piece of a tensor for the index, on every rank.
    """

    def compare() -> None:
        rank, size = (groups.world.rank(), groups.world.size()) if groups else (0, 1)
        with _named(path, MANIFEST):
            expected = _read_manifest(path)
        with _named(path, INDEX):
            pieces = _by_file(read_index(path)[1])
            strange = sorted(pieces.keys() - expected.keys())
            if strange:
                raise ForeignError(f"it names {strange[0]!r:.100}, which {MANIFEST} does not")
        with _named(path, COMMON):
            check_common(path)
        with _named(path, "metadata.json"):
            said = files.read_json(files.inside(path, "metadata.json"))
            if not said.items() <= _BACKENDS.items():
                raise ForeignError("it asks for another format than torch_dist")
        for name in sorted(expected)[rank::size]:
            with _named(path, name):
                _compare(files.inside(path, name), expected[name])
                check_pieces(path / name, pieces.get(name, []))

    if groups is None:
        compare()
    else:
        together(compare, groups)


def _by_file(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.file, []).append(piece)
    return grouped


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    found = files.read_json(files.inside(path, MANIFEST)).get("files")
    if not isinstance(found, dict):
        raise ForeignError("it lists no files")
    for name, entry in found.items():
        files.plain_name(name)
        if not (
            isinstance(entry, dict)
            and files.is_whole(entry.get("bytes"), most=1 << 62)
            and isinstance(entry.get("crc32"), str)
        ):
            raise ForeignError(f"it says neither size nor checksum of {name}")
    return found


def _compare(file: Path, expected: dict[str, Any]) -> None:
    size = file.stat().st_size
    if size != expected["bytes"]:  # known without reading it
        raise ForeignError(f"it has {size} bytes, {expected['bytes']} were written")
    crc = describe(file)["crc32"]
    if crc != expected["crc32"]:
        raise ForeignError(f"it has crc32 {crc}, {expected['crc32']!r:.20} was written")


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ForeignError, files.UnsafeFileError) as error:
        raise DamagedError(f"{path} is damaged: {name}: {error}") from error


def superfluous(
    checkpoints: Sequence[tuple[Path, int]],
    last: int,
    every_tokens: int,
    marks: Sequence[int] = (),
) -> list[Path]:
    """Checkpoints that may go, of those given with their tokens, oldest first.

    The ``last`` newest stay (0: all), the first at or after each multiple of ``every_tokens``, and
    the first at or after each of ``marks``.
    """
    if not last:
        return []
    milestones, reached = set(), 0
    for mark in marks:
        milestones |= set([path for path, tokens in checkpoints if tokens >= mark][:1])
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


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name; copy it where a disk or a file system does not let us.

    Files of checkpoints are written once: two names of one never disagree.
    """
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())
