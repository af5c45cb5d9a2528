"""Megatron's ``.bin`` and ``.idx``: writing an index, and the check of such files before a run.

A side of the split is three files: ``.bin`` holds the tokens, ``.idx`` their lengths, and ``.json``
(ours, optional) says which tokenizer made them and how many bytes of text they stand for.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from megatron_idea import files
from megatron_idea.data.documents import DataError
from megatron_idea.data.tokenizer import Tokenizer

_HEADER = struct.Struct("<9sQBQQ")
"""Of an index: magic, version, token type, sequences, documents + 1."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class DatasetInfo:
    """What ``check_dataset`` found out about one ``.bin`` and ``.idx``."""

    prefix: Path
    documents: int
    tokens: int
    """End-of-document tokens included."""
    text_bytes: int | None
    """UTF-8 bytes of text behind the tokens; None without a sidecar."""
    lengths_digest: str
    """Of the document lengths: all that an order of samples depends on."""


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """Return the smallest token type of Megatron that holds the tokenizer's ids.

    Raises: DataError when none does.
    """
    dtype = np.dtype(DType.optimal_dtype(tokenizer.vocab_size))
    if tokenizer.vocab_size > np.iinfo(dtype).max + 1:
        raise DataError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, Megatron's token "
            f"type {dtype.name} has {np.iinfo(dtype).max + 1}; remove added tokens with ids that "
            "far out"
        )
    return dtype


def write_index(path: Path, dtype: np.dtype, lengths_path: Path) -> None:
    """Write the ``.idx`` of documents whose lengths, in tokens, a file holds as int32.

    Bit for bit what megatron-core's own builder writes, which keeps all lengths as Python's
    integers until the end.
    """
    count = os.path.getsize(lengths_path) // 4
    lengths = np.memmap(lengths_path, np.int32, "r") if count else np.zeros(0, np.int32)
    with path.open("wb") as stream:
        code = DType.code_from_dtype(dtype.type)
        stream.write(_HEADER.pack(b"MMIDIDX", 1, code, count, count + 1))
        for part in _blocks(count):
            stream.write(lengths[part].tobytes())
        end = 0
        for part in _blocks(count):
            sizes = lengths[part].astype(np.int64) * dtype.itemsize
            stream.write((end + np.cumsum(sizes) - sizes).tobytes())
            end += int(sizes.sum())
        for part in _blocks(count + 1):
            stream.write(np.arange(part.start, part.stop, dtype=np.int64).tobytes())


def _file(prefix: Path, suffix: str) -> str:
    """Append to the name; ``with_suffix`` would cut a prefix such as ``corpus.v2``."""
    return f"{prefix}{suffix}"


def check_dataset(prefix: str | Path, tokenizer: Tokenizer) -> DatasetInfo:
    """Verify that a Megatron dataset is whole, has tokens, and was made with ``tokenizer``.

    Datasets made elsewhere have no sidecar; of those a sample of the tokens must lie inside the
    vocabulary.

    Raises: DataError for missing, damaged, truncated or empty files and for another tokenizer.
    Cost: reads the document lengths once (4 bytes a document) and, without a sidecar, 1M tokens.
    """
    prefix = Path(prefix)
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(_file(prefix, suffix)):
            raise DataError(
                f"no {_file(prefix, suffix)}; a dataset is given as its path without .bin and .idx"
            )
    dtype, lengths = _read_index(prefix)
    _check_places(prefix, dtype, lengths)
    tokens = int(lengths.sum(dtype=np.int64))
    promised, found = tokens * dtype.itemsize, os.path.getsize(_file(prefix, ".bin"))
    if found != promised:
        raise DataError(
            f"{prefix}.bin has {found} bytes, its index promises {promised} ({tokens} tokens of "
            f"{dtype.name}): it is truncated or belongs to another index; copy or tokenize it again"
        )
    if tokens == 0:
        raise DataError(f"{prefix} is empty: {len(lengths)} documents, 0 tokens")
    sidecar = _read_sidecar(prefix)
    if sidecar is None:
        _check_vocabulary(prefix, dtype, tokens, tokenizer)
    elif sidecar["tokenizer_digest"] != tokenizer.digest:
        raise DataError(
            f"{prefix} was made with tokenizer {sidecar.get('tokenizer')!r} "
            f"({str(sidecar['tokenizer_digest'])[:12]}), this run has {tokenizer.name!r} "
            f"({tokenizer.digest[:12]}): train with the former, or tokenize the text again"
        )
    elif sidecar.get("tokens") != tokens:
        raise DataError(
            f"{prefix}.json tells of {sidecar.get('tokens')} tokens, {prefix}.idx of {tokens}: "
            "they are of two datasets; delete the .json if you trust the other two files"
        )
    return DatasetInfo(
        prefix=prefix,
        documents=len(lengths),
        tokens=tokens,
        text_bytes=None if sidecar is None else sidecar.get("text_bytes"),
        lengths_digest=f"{zlib.crc32(lengths.data):08x}",
    )


def _read_index(prefix: Path) -> tuple[np.dtype, np.ndarray]:
    """Return the token type and the length of each document, memory-mapped.

    Megatron's own reader asserts, and maps whatever follows a damaged header.
    """
    path = _file(prefix, ".idx")
    header = _HEADER
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        raw = stream.read(header.size)
    if len(raw) < header.size or not raw.startswith(b"MMIDIDX\x00\x00"):
        raise DataError(f"{path} is not a Megatron index: it does not begin with MMIDIDX")
    _, version, code, sequences, documents = header.unpack(raw)
    legal = [dtype for dtype in DType if not dtype.name.startswith("float")]
    if version != 1 or code not in [dtype.value for dtype in legal]:
        raise DataError(
            f"{path} has version {version} and token type {code}; legal: version 1 and "
            f"{', '.join(f'{dtype.value} ({dtype.name})' for dtype in legal)}"
        )
    # A length and an offset for each sequence, a boundary for each document.
    promised = header.size + sequences * (4 + 8) + documents * 8
    if size < promised:
        raise DataError(f"{path} has {size} bytes, its header promises {promised}: truncated")
    if sequences == 0:
        raise DataError(f"{prefix} is empty: its index has no documents")
    lengths = np.memmap(path, np.int32, mode="r", offset=header.size, shape=(sequences,))
    ends = np.memmap(path, np.int64, "r", header.size + sequences * (4 + 8), shape=(documents,))
    if not (documents and ends[0] == 0 and ends[-1] == sequences and _ascend(ends)):
        raise DataError(
            f"{path} is damaged: its documents do not begin at 0 and end at its {sequences} "
            "sequences in order; copy or tokenize it again"
        )
    return np.dtype(DType.dtype_from_code(code)), lengths


def _blocks(count: int) -> Iterator[slice]:
    return (slice(i, min(i + _BLOCK, count)) for i in range(0, count, _BLOCK))


def _ascend(values: np.ndarray) -> bool:
    return all(
        bool((np.diff(values[max(0, part.start - 1) : part.stop]) >= 0).all())
        for part in _blocks(len(values))
    )


def _check_places(prefix: Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Make sure that each sequence begins where the one before it ends.

    megatron-core reads from wherever the index points, and its C++ adds the lengths up unchecked.
    """
    path = _file(prefix, ".idx")
    count, end = len(lengths), 0
    begins = np.memmap(path, np.int64, "r", _HEADER.size + count * 4, shape=(count,))
    for part in _blocks(count):
        sizes = lengths[part].astype(np.int64) * dtype.itemsize
        places = end + np.cumsum(sizes) - sizes
        wrong = np.flatnonzero((sizes < 0) | (begins[part] != places))
        if len(wrong):
            one = int(wrong[0])
            raise DataError(
                f"{path} is damaged: sequence {part.start + one} has {lengths[part][one]} tokens "
                f"at byte {begins[part][one]}, where byte {places[one]} would follow the others; "
                "copy or tokenize it again"
            )
        end += int(sizes.sum())


def _read_sidecar(prefix: Path) -> dict[str, Any] | None:
    path = Path(_file(prefix, ".json"))
    if not path.is_file():
        return None
    try:
        sidecar = files.read_json(path, most=1 << 20)
    except files.UnsafeFileError as error:
        raise DataError(f"{path.parent}: {error}; mend or delete it") from error
    if not isinstance(sidecar.get("tokenizer_digest"), str):
        raise DataError(f"{path} is not a dataset's sidecar: no tokenizer_digest; move it away")
    size = sidecar.get("text_bytes")
    if size is not None and not files.is_whole(size):
        raise DataError(f"{path}: text_bytes is {size!r:.100}, no number of bytes; delete it")
    return sidecar


def _check_vocabulary(prefix: Path, dtype: np.dtype, tokens: int, tokenizer: Tokenizer) -> None:
    """Look at up to 64 evenly spread blocks of 16,384 tokens."""
    stream = np.memmap(_file(prefix, ".bin"), dtype, mode="r")
    starts = np.linspace(0, max(tokens - 16_384, 0), 64, dtype=np.int64)
    blocks = [stream[start : start + 16_384] for start in np.unique(starts)]
    least, largest = min(int(x.min()) for x in blocks), max(int(x.max()) for x in blocks)
    if least < 0 or largest >= tokenizer.vocab_size:
        raise DataError(
            f"{prefix} holds token {least if least < 0 else largest}, tokenizer "
            f"{tokenizer.name!r} has ids below {tokenizer.vocab_size}: it was made with another "
            "tokenizer"
        )
