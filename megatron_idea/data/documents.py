"""Read documents from lines of JSON, Parquet, text files and folders, one at a time.

Every document knows where it came from (``file:line``), so that an error can name it.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import itertools
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from megatron_idea.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSON_LINES = (".jsonl", ".json")
"""C4 and Dolma call their lines ``.json.gz``."""
FORMATS = (*JSON_LINES, ".parquet", *TEXT_SUFFIXES)
COMPRESSIONS = (".gz", ".zst")
_ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
_LEGAL = f"legal: {', '.join(FORMATS)}; all but .parquet also with {' or '.join(COMPRESSIONS)}"


class DataError(UserError):
    """Data that cannot be used; the message names the file, what is legal and how to mend it."""


class BadDocumentError(DataError):
    """One unusable document in an otherwise readable file; these can be skipped."""


@dataclass(frozen=True)
class Document:
    text: str
    where: str
    """``file:line`` (JSON), ``file:row`` from 0 (Parquet) or ``file`` (text)."""


@dataclass
class Documents:
    """Iterate over the documents of ``inputs``: files, or folders that are walked in sorted order.

    A line of JSON is a document, so is a Parquet row, so is a text file. A folder contributes its
    files of known format, as ``input_files`` says. Nothing is held in memory but the document at
    hand (Parquet: a batch of rows).

    Raises, while iterating: DataError for a missing or unreadable file; BadDocumentError for a
    line, row or text file without Unicode text, unless ``skip_bad_documents``.
    """

    inputs: Sequence[str | Path]
    text_key: str = "text"
    """Key of the text in a line of JSON, column of the text in a Parquet file."""
    skip_bad_documents: bool = False
    begin: tuple[int, int] = (0, 0)
    """Where to begin: at this one of ``input_files``, after so many of its lines or rows."""
    reached: tuple[int, int] = field(default=(0, 0), init=False)
    """Where another iteration would begin to go on after the latest document, or at the end."""
    skipped: int = field(default=0, init=False)
    """Bad documents left out so far by the latest iteration."""
    passed_over: list[Path] = field(default_factory=list, init=False)
    """What the latest iteration left aside in folders."""

    def __iter__(self) -> Iterator[Document]:
        self.skipped, self.passed_over, self.reached = 0, [], self.begin
        first, after = self.begin
        paths = input_files(self.inputs, self.passed_over)
        for index, path in enumerate(paths[first:], first):
            for number, document in _read(path, self.text_key, after if index == first else 0):
                if isinstance(document, Document):
                    self.reached = (index, number)
                    yield document
                elif self.skip_bad_documents:
                    self.skipped += 1
                else:
                    raise document
        self.reached = (len(paths), 0)


def input_files(inputs: Sequence[str | Path], passed_over: list[Path] | None = None) -> list[Path]:
    """Resolve files and folders to files of known format, in the order they will be read.

    A folder is walked with its links, to files and to folders, each target once. Left aside, and
    added to ``passed_over``, are names that begin with a dot (copies and metadata that editors and
    systems keep), other formats, JSON that is no text but what ``tokenize`` writes, and targets
    that were there before. What is named itself is read.

    Raises: DataError for a missing path, an unknown suffix, a folder with nothing to read, a link
        that leads nowhere.
    """
    files: list[Path] = []
    passed_over = [] if passed_over is None else passed_over
    for path in map(Path, inputs):
        if path.is_dir():
            aside: list[Path] = []
            found = list(_walk(path, {path.resolve()}, aside))
            if not found:
                held = f", only {by_suffix(aside)}" if aside else ""
                raise DataError(f"folder {path} holds no file of a known format{held}; {_LEGAL}")
            passed_over += aside
            files += found
        elif not path.is_file():
            raise DataError(f"no file or folder at {path}")
        elif _format(path) not in FORMATS:
            raise DataError(f"{path} is of no known format; {_LEGAL}")
        else:
            files.append(path)
    return files


def _walk(folder: Path, seen: set[Path], passed_over: list[Path]) -> Iterator[Path]:
    """``seen`` has the targets of links and files that were met."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read folder {folder}: {error.strerror}") from error
    for path in entries:
        is_folder = path.is_dir()
        if path.name.startswith(".") or not (is_folder or _is_text(path)):
            passed_over.append(path)
            continue
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to {path.readlink()}, which is not there")
        target = path.resolve()
        if target in seen or not (is_folder or path.is_file()):
            passed_over.append(path)
            continue
        seen.add(target)
        if is_folder:
            yield from _walk(path, seen, passed_over)
        else:
            yield path


def by_suffix(paths: Iterable[Path], most: int = 8) -> str:
    """Count what a walk left aside: 12 .png, 3 .csv.gz, 1 hidden; the commonest ``most``."""
    counts = Counter(_kind(path) for path in paths).most_common()
    rest = sum(count for _, count in counts[most:])
    said = [f"{count:,} {kind}" for kind, count in counts[:most]]
    return ", ".join(said + ([f"{rest:,} of other kinds"] if rest else []))


def _kind(path: Path) -> str:
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir() or (path.is_file() and _is_text(path)):
        return "read already"  # by another way
    compressed = path.suffix in COMPRESSIONS
    return "".join(path.suffixes[-2:] if compressed else path.suffixes[-1:]) or "without suffix"


def _is_text(path: Path) -> bool:
    if path.suffix == ".json" and (
        path.name == "tokenizer.json" or path.with_suffix(".idx").exists()
    ):
        return False
    return _format(path) in FORMATS


def hash_fraction(text: str, salt: bytes) -> float:
    """Map a text to [0, 1), evenly and for ever; another salt gives an independent value."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, salt=salt).digest()
    # 53 bits: as many as a float holds, so the result stays below 1.
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _format(path: Path) -> str:
    """Return the suffix without the compression; empty for a combination that is not legal."""
    if path.suffix not in COMPRESSIONS:
        return path.suffix
    inner = Path(path.stem).suffix
    return "" if inner == ".parquet" else inner


def _read(
    path: Path, text_key: str, after: int
) -> Iterator[tuple[int, Document | BadDocumentError]]:
    """Yield each document past the first ``after``, or in its place the error that it is.

    With it comes how many lines or rows of the file end with it. Raises when the file breaks.
    """
    where = str(path)
    try:
        for number, where, record in _records(path, text_key, after):
            yield number, _document(record, text_key, where)
    except _read_errors(path) as error:
        raise DataError(f"cannot read {path}, reached {where}: {error}") from error


def _records(path: Path, text_key: str, after: int) -> Iterator[tuple[int, str, Any]]:
    """Yield (number from 1, where, record); an error may stand in the place of a record."""
    kind = _format(path)
    if kind == ".parquet":
        rows = enumerate(_parquet_column(path, text_key))
        for row, text in itertools.islice(rows, after, None):
            yield row + 1, f"{path}:{row}", {text_key: text}
        return
    with _open(path) as stream:
        if kind in TEXT_SUFFIXES:
            if after:
                return
            try:
                yield 1, str(path), {text_key: stream.read().decode("utf-8")}
            except UnicodeDecodeError as error:
                yield 1, str(path), error
            return
        for number, line in itertools.islice(enumerate(stream, 1), after, None):
            if line.isspace():
                continue
            try:
                yield number, f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, f"{path}:{number}", error


def _document(record: Any, text_key: str, where: str) -> Document | BadDocumentError:
    if isinstance(record, Exception):
        what = "UTF-8 text" if isinstance(record, UnicodeDecodeError) else "a line of JSON"
        return BadDocumentError(f"{where} is not {what}: {record}; mend it or skip bad documents")
    if not isinstance(record, dict):
        return BadDocumentError(f"{where} holds a {type(record).__name__}, not a JSON object")
    if text_key not in record:
        return BadDocumentError(
            f"{where} has no key {text_key!r}, only {', '.join(map(repr, record)) or 'nothing'}; "
            "name the key that holds the text, or skip bad documents"
        )
    text = record[text_key]
    if not isinstance(text, str):
        return BadDocumentError(f"{where}: {text_key!r} is a {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")  # JSON can escape half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        return BadDocumentError(f"{where}: {text_key!r} is not Unicode text: {error}")
    return Document(text, where)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        # Not the zstandard package: it takes a truncated stream for a short one. Nor pyarrow: it
        # refuses what zstd --long wrote. The largest window takes 2 GiB while the file is read.
        zstd = _module(_ZSTD, path)
        window = zstd.DecompressionParameter.window_log_max
        return cast(IO[bytes], zstd.open(path, options={window: window.bounds()[1]}))
    return path.open("rb")


def _parquet_column(path: Path, column: str) -> Iterator[Any]:
    with _module("pyarrow.parquet", path).ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise DataError(
                f"{path} has no column {column!r}, only {', '.join(map(repr, names))}; "
                "name the column that holds the text"
            )
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            yield from batch.column(0).to_pylist()


def _read_errors(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged file of this format raises."""
    errors = (OSError, EOFError, zlib.error)
    if path.suffix == ".zst":
        return (*errors, _module(_ZSTD, path).ZstdError, MemoryError)
    if path.suffix == ".parquet":
        return (*errors, _module("pyarrow", path).ArrowException)
    return errors


def _module(name: str, path: Path) -> Any:
    """Import a format's reader when the first file needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"reading {path} needs the Python module {name}") from error
