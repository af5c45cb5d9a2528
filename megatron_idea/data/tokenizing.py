"""Documents to Megatron's ``.bin`` and ``.idx``, in steps that a kill does not undo.

Finished shards wait in a working folder beside the prefix, ``.<prefix>.tokenizing``:

    made_of.json         files with sizes and times, tokenizer, options
    {train,heldout}.bin  tokens of the shards so far, and .lengths of their documents
    finished.jsonl       a line for each shard: counts, checksum, where the next one begins
    complete             all shards are there; what remains is to move files to their names

A shard counts when its line is written and its checksum is right, whatever killed the process or
the machine. An interrupted call cuts the files back to there and goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_idea import files
from megatron_idea.data.documents import DataError, Documents, by_suffix, input_files
from megatron_idea.data.indexed import token_type, write_index
from megatron_idea.data.shards import Encoded, Encoder, Shard, encode_all, shards_of
from megatron_idea.data.tokenizer import Tokenizer
from megatron_idea.records.lock import RunLock
from megatron_idea.records.readable import megabytes

SIDES = ("train", "heldout")
_MADE_OF, _FINISHED, _COMPLETE = "made_of.json", "finished.jsonl", "complete"
_FORMAT = 1
"""Of the working folder."""


@dataclass(frozen=True)
class TokenizeSummary:
    train_prefix: Path
    held_out_prefix: Path | None
    """None when nothing was held out."""
    documents: int
    """Written, on both sides."""
    held_out_documents: int
    skipped_documents: int
    """Bad or empty."""
    train_tokens: int
    held_out_tokens: int
    text_bytes: int
    """UTF-8, on both sides."""
    passed_over: list[Path]
    """Left aside in folders: hidden names, other formats, targets of links that were read."""
    earlier_bytes: int
    """Of ``text_bytes``, what interrupted calls had finished."""
    seconds: float
    """That this call took."""

    def as_text(self) -> str:
        now = self.text_bytes - self.earlier_bytes
        lines = [
            f"{self.documents:,} documents: {self.train_tokens:,} tokens to train on, "
            f"{self.held_out_tokens:,} held out",
            f"{megabytes(now)} of text in {self.seconds:.1f} s: {now / 1e6 / self.seconds:.2f} MB/s"
            + (f", after {megabytes(self.earlier_bytes)} before" if self.earlier_bytes else ""),
        ]
        if self.skipped_documents:
            lines.append(f"{self.skipped_documents:,} documents left out: empty or unreadable")
        if self.passed_over:
            lines.append(f"passed over in folders: {by_suffix(self.passed_over)}")
        return "\n".join(lines)


def tokenize(
    inputs: Sequence[str | Path],
    out_prefix: str | Path,
    tokenizer: Tokenizer,
    held_out: float = 0.05,
    text_key: str = "text",
    skip_bad_documents: bool = False,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> TokenizeSummary:
    """Write ``<out_prefix>_train`` and ``<out_prefix>_heldout``, each document ending with eod.

    A document is held out if a hash of its text, as a number in [0, 1), is below ``held_out``. So
    a text lands on the same side in every corpus and order, and a copy never on the other side.
    Files appear complete or not at all; those of an earlier call are replaced. Empty documents are
    left out. After a kill the same call goes on: where it was, but not behind the first file that
    has changed since; from the beginning if the tokenizer or an option has.

    ``workers`` is the number of processes that encode, 1 for this one; the files do not depend on
    it. ``progress`` is called with the bytes of text done so far, first with those of interrupted
    calls; ``notice`` with a sentence on what is left of such calls.

    Raises: DataError for unreadable inputs, a bad document (unless ``skip_bad_documents``), a
    share outside [0, 1), a side of the split that would be empty, a worker that was killed;
    RunFolderError when another process writes to the same prefix.
    Cost: memory for two shards and their tokens per worker, about 30 MB, beside the 0.2 GB that a
        worker process takes.
    """
    begin = time.perf_counter()
    if not 0 <= held_out < 1:
        raise DataError(f"held_out is {held_out}; legal: a share of the documents in [0, 1)")
    if workers < 1:
        raise DataError(f"workers is {workers}; it must be at least 1")
    encoder = Encoder(tokenizer, token_type(tokenizer).name, held_out)
    passed_over: list[Path] = []
    paths = input_files(inputs, passed_over)
    made_of = {
        "format": _FORMAT,
        "tokenizer": tokenizer.digest,
        "text_key": text_key,
        "held_out": held_out,
        "files": [_identity(path) for path in paths],
    }
    prefix = Path(out_prefix)
    folder = Path(f"{prefix}_train").with_name(f".{prefix.name}.tokenizing")
    try:
        with (
            RunLock(folder, "working folder"),
            _Work(folder, np.dtype(encoder.dtype), made_of, skip_bad_documents) as work,
        ):
            if notice is not None and work.notice:
                notice(work.notice)
            earlier = work.text_bytes
            if progress is not None:
                progress(earlier)
            if not work.is_complete:
                documents = Documents(paths, text_key, skip_bad_documents, work.reached)
                shards = encode_all(shards_of(documents), encoder, workers)
                with contextlib.closing(shards):
                    for shard, encoded in shards:
                        work.add(shard, encoded)
                        if progress is not None:
                            progress(work.text_bytes)
                work.require_both_sides(inputs, held_out)
                work.complete(tokenizer)
            work.publish(prefix, SIDES if held_out > 0 else SIDES[:1])
            if held_out == 0:  # of an earlier call: its documents are training data now
                _remove(Path(f"{prefix}_heldout"))
            work.remove()
    finally:
        with contextlib.suppress(OSError):  # only what is finished and may be gone on from stays
            folder.rmdir()
    train, held = work.sides
    return TokenizeSummary(
        train_prefix=Path(f"{prefix}_train"),
        held_out_prefix=Path(f"{prefix}_heldout") if held_out > 0 else None,
        documents=train.documents + held.documents,
        held_out_documents=held.documents,
        skipped_documents=work.left_out,
        passed_over=passed_over,
        train_tokens=train.tokens,
        held_out_tokens=held.tokens,
        text_bytes=work.text_bytes,
        earlier_bytes=earlier,
        seconds=time.perf_counter() - begin,
    )


@dataclass
class _Side:
    """What is there of one side of the split."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


class _Work:
    """The working folder of this process; a context manager that leaves what is finished."""

    def __init__(
        self, folder: Path, dtype: np.dtype, made_of: dict[str, Any], skip_bad_documents: bool
    ) -> None:
        self.folder, self._dtype, self._made_of = folder, dtype, made_of
        self._skips = skip_bad_documents
        self.sides = (_Side(), _Side())
        self.reached = (0, 0)
        """Where the next shard begins."""
        self.left_out = 0
        self.notice = ""
        """What is told of interrupted calls; empty when there were none."""
        self._files: list[IO[bytes]] = []
        """Tokens and lengths of both sides, and the record; none when all is complete."""

    @property
    def text_bytes(self) -> int:
        return sum(side.text_bytes for side in self.sides)

    @property
    def is_complete(self) -> bool:
        return (self.folder / _COMPLETE).exists()

    def __enter__(self) -> _Work:
        known = self._known()
        why, same_files = _difference(known, self._made_of)
        if why or known is None:  # without that record it is not known what is complete
            (self.folder / _COMPLETE).unlink(missing_ok=True)
        self._restore(same_files, why)
        part = self.folder / f"{_MADE_OF}.part"
        part.write_text(json.dumps(self._made_of), encoding="utf-8")
        part.replace(self.folder / _MADE_OF)  # after the cut: it says what all that is left is of
        return self

    def __exit__(self, *_error: object) -> None:
        for file in self._files:
            file.close()
        if self.reached == (0, 0):
            self.remove()

    def _known(self) -> dict[str, Any] | None:
        path = self.folder / _MADE_OF
        with contextlib.suppress(files.UnsafeFileError):
            return files.read_json(path, most=1 << 31)
        return None

    def _restore(self, same_files: int, why: str) -> None:
        """Count the finished shards of the first ``same_files`` inputs; cut off what follows."""
        complete, end, lines = self.is_complete, 0, 0
        if not complete:
            names = [f"{side}{suffix}" for side in SIDES for suffix in (".bin", ".lengths")]
            self._files = [(self.folder / name).open("ab+") for name in (*names, _FINISHED)]
            for file in self._files:
                file.seek(0)
        with (self.folder / _FINISHED).open("rb") as finished:
            for line in finished:
                lines += 1
                if not self._take(line, same_files):
                    break
                end += len(line)
        if not complete:
            sizes = [n for side in self.sides for n in self._sizes(side)]
            for file, size in zip(self._files, (*sizes, end), strict=True):
                file.truncate(size)
        documents = sum(side.documents for side in self.sides)
        if documents:
            self.notice = (
                f"going on after {documents:,} documents, {megabytes(self.text_bytes)}, of an "
                f"interrupted call{f'; {why}: read anew from there' if why else ''}"
            )
        elif lines:
            self.notice = f"starting anew: {why or f'what lies in {self.folder} is damaged'}"

    def _take(self, line: bytes, same_files: int) -> bool:
        """Count a finished shard, if it is whole and of use."""
        try:
            entry = json.loads(line)
            index, after = entry["reached"]
            left_out, skipped = entry["left_out"], entry["skipped"]
            counts = [_Side(**entry[side]) for side in SIDES]
            checksum = entry["crc32"]
        except (ValueError, KeyError, TypeError):
            return False
        numbers = [n for side in counts for n in asdict(side).values()]
        if not all(map(files.is_whole, (index, after, left_out, skipped, *numbers))):
            return False
        if self._files and (
            index + (after > 0) > same_files
            or (skipped and not self._skips)  # what was skipped then has to be named now
            or not line.endswith(b"\n")
            or self._checksum(counts) != checksum
        ):
            return False
        self._count(counts, (index, after), left_out)
        return True

    def _sizes(self, side: _Side) -> tuple[int, int]:
        """Bytes of tokens and of lengths."""
        return side.tokens * self._dtype.itemsize, side.documents * 4

    def _checksum(self, counts: Sequence[_Side]) -> int:
        """Of the next so many tokens and lengths in the files."""
        sizes = [size for side in counts for size in self._sizes(side)]
        value = 0
        for file, size in zip(self._files, sizes, strict=False):  # the last file is the record
            value = zlib.crc32(file.read(size), value)
        return value

    def _count(self, counts: Sequence[_Side], reached: tuple[int, int], left_out: int) -> None:
        for side, more in zip(self.sides, counts, strict=True):
            side.documents += more.documents
            side.tokens += more.tokens
            side.text_bytes += more.text_bytes
        self.reached = reached
        self.left_out += left_out

    def add(self, shard: Shard, encoded: Encoded) -> None:
        """Keep a finished shard."""
        sides = (encoded.train, encoded.held_out)
        lengths = [np.array(side.lengths, np.int32).tobytes() for side in sides]
        contents = (sides[0].ids, lengths[0], sides[1].ids, lengths[1])
        checksum = 0
        for content in contents:
            checksum = zlib.crc32(content, checksum)
        counts = [
            _Side(len(side.lengths), len(side.ids) // self._dtype.itemsize, side.text_bytes)
            for side in sides
        ]
        left_out = encoded.empty + shard.skipped
        entry = {
            "reached": shard.reached,
            **{name: asdict(count) for name, count in zip(SIDES, counts, strict=True)},
            "left_out": left_out,
            "skipped": shard.skipped,
            "crc32": checksum,
        }
        record = json.dumps(entry).encode() + b"\n"
        for file, content in zip(self._files, (*contents, record), strict=True):
            file.write(content)
            file.flush()  # in this order: the record of the shard comes last
        self._count(counts, shard.reached, left_out)

    def require_both_sides(self, inputs: Sequence[str | Path], held_out: float) -> None:
        """Raises: DataError when a side is empty; nothing is left to go on from then."""
        train, held = (side.documents for side in self.sides)
        error = None
        if train + held == 0:
            error = f"no text in {', '.join(map(str, inputs))}: nothing to tokenize"
        for side, count, wanted in (("training", train, True), ("held-out", held, held_out > 0)):
            if error is None and wanted and count == 0:
                error = (
                    f"none of {train + held} documents fell on the {side} side of "
                    f"held_out={held_out}; each document is drawn by a hash of its text: give more "
                    "documents, or another share (0 holds nothing out)"
                )
        if error is not None:
            self.remove()
            raise DataError(error)

    def complete(self, tokenizer: Tokenizer) -> None:
        """Write indices and sidecars: from now on files only have to be moved."""
        for name, side in zip(SIDES, self.sides, strict=True):
            write_index(self.folder / f"{name}.idx", self._dtype, self.folder / f"{name}.lengths")
            sidecar = {
                "tokenizer": tokenizer.name,
                "tokenizer_digest": tokenizer.digest,
                "vocab_size": tokenizer.vocab_size,
                "documents": side.documents,
                "tokens": side.tokens,
                "text_bytes": side.text_bytes,
            }
            (self.folder / f"{name}.json").write_text(json.dumps(sidecar, indent=2), "utf-8")
        (self.folder / _COMPLETE).touch()

    def publish(self, prefix: Path, sides: Sequence[str]) -> None:
        """Move files to their names; a second time, those that a kill has left."""
        for side in sides:
            if (self.folder / f"{side}.idx").exists():
                Path(f"{prefix}_{side}.idx").unlink(missing_ok=True)
            for suffix in (".bin", ".json", ".idx"):  # the index last: with it the dataset exists
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.folder / f"{side}{suffix}", f"{prefix}_{side}{suffix}")

    def remove(self) -> None:
        """Leave nothing in the folder but the lock."""
        for file in self._files:
            file.close()
        for name in (_MADE_OF, _FINISHED, _COMPLETE):
            (self.folder / name).unlink(missing_ok=True)
        for side in SIDES:
            for suffix in (".bin", ".lengths", ".idx", ".json"):
                (self.folder / f"{side}{suffix}").unlink(missing_ok=True)


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def _difference(known: dict[str, Any] | None, wanted: dict[str, Any]) -> tuple[str, int]:
    """Say what has changed since the interrupted call, and how many inputs before it are the same.

    Empty: nothing has, or there was no such call.
    """
    if known is None:
        return "", 0
    if known.get("format") != wanted["format"]:
        return "another version began it", 0
    if known.get("tokenizer") != wanted["tokenizer"]:
        return "the tokenizer is another one", 0
    for key, option in (("text_key", "--text-key"), ("held_out", "--held-out")):
        if known.get(key) != wanted[key]:
            return f"{option} was {known.get(key)}", 0
    before, now = known.get("files"), wanted["files"]
    assert isinstance(now, list)
    if not isinstance(before, list):
        return "its record is damaged", 0
    pairs = enumerate(zip(before, now, strict=False))
    same = next((index for index, (a, b) in pairs if a != b), min(len(before), len(now)))
    if same == len(before) == len(now):
        return "", same
    if same == len(now):
        return "there were more inputs", same
    path = now[same][0]
    if same == len(before) or before[same][:1] != [path]:
        return f"{path} is new or in another place among the inputs", same
    return f"{path} has changed", same


def _remove(prefix: Path) -> None:
    for suffix in (".idx", ".json", ".bin"):  # the index first: without it there is no dataset
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)
