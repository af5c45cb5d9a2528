"""A corpus on any machine: the text that a Python installation brings along.

Library sources, their tests, and Python's documentation where a distribution installed it. Enough
to train a small model and to see every part of the pipeline work, without a download.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_idea.data.documents import DataError

MAX_FILE_BYTES = 200_000
"""Larger files in a standard library are tables and test vectors, not text."""
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "encodings", "__pycache__"})
"""Other people's packages, whose presence differs by machine; character tables; byte code."""
_DOC_FOLDER = re.compile(r"python3(\.\d+)?(-doc)?")
_DOC_SUFFIXES = (".rst", ".txt", ".rst.gz", ".txt.gz")


@dataclass(frozen=True)
class CorpusSummary:
    documents: int
    bytes: int
    """Of text, in UTF-8."""
    path: Path


def build_corpus(out: Path, doc_root: Path = Path("/usr/share/doc")) -> CorpusSummary:
    """Write a JSONL corpus (``text``, ``source``) from the running Python's installed text.

    One document a file, in a fixed order, exact duplicates once. The same installation gives the
    same bytes; another Python version or distribution gives another corpus.

    ``doc_root`` is where a distribution keeps documentation; Python's own is taken if it is there.

    Raises: DataError when this Python has no library sources (a frozen or stripped build).
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    seen: set[bytes] = set()
    text_bytes = 0
    try:
        with part.open("w", encoding="utf-8") as stream:
            for source, text in _sources(Path(sysconfig.get_path("stdlib")), doc_root):
                encoded = text.encode("utf-8")
                digest = hashlib.sha256(encoded).digest()
                if digest in seen or text.isspace() or not text:
                    continue
                seen.add(digest)
                text_bytes += len(encoded)
                record = {"text": text, "source": source}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        if not seen:
            raise DataError(
                f"no library sources under {sysconfig.get_path('stdlib')}: this Python was "
                "installed without them; give your own text instead"
            )
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return CorpusSummary(documents=len(seen), bytes=text_bytes, path=out)


def _sources(stdlib: Path, doc_root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name relative to its root, text), library first."""
    for path in _walk(stdlib, (".py",)):
        try:
            with tokenize.open(path) as stream:  # honours the encoding a source file declares
                yield f"lib/{path.relative_to(stdlib).as_posix()}", stream.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # the test suite has files that are undecodable on purpose
    for folder in sorted(doc_root.glob("python3*")):
        if not _DOC_FOLDER.fullmatch(folder.name):
            continue
        for path in _walk(folder, _DOC_SUFFIXES):
            raw = path.read_bytes()
            try:
                text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
            except (OSError, EOFError, UnicodeDecodeError):
                continue
            yield f"doc/{path.relative_to(doc_root).as_posix()}", text


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the readable files below ``root`` that can hold text, in sorted order."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            if (
                name.endswith(suffixes)
                and path.is_file()
                and path.stat().st_size <= MAX_FILE_BYTES
                and os.access(path, os.R_OK)
            ):
                yield path
