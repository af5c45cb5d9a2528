"""Documents to Megatron's ``.bin`` and ``.idx``, and the check of such files before a run.

A side of the split is three files: ``.bin`` holds the tokens, ``.idx`` their lengths, and ``.json``
(ours, optional) says which tokenizer made them and how many bytes of text they stand for.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_idea import files
from megatron_idea.data.documents import DataError, Documents, hash_fraction
from megatron_idea.data.tokenizer import Tokenizer

_HEADER = struct.Struct("<9sQBQQ")
"""Of an index: magic, version, token type, sequences, documents + 1."""
_BLOCK = 1 << 20
_BATCH_CHARACTERS = 4_000_000
"""Text encoded at once: enough to keep the tokenizer's threads busy, little enough to forget."""


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

    def as_text(self) -> str:
        lines = [
            f"{self.documents:,} documents: {self.train_tokens:,} tokens to train on, "
            f"{self.held_out_tokens:,} held out"
        ]
        if self.skipped_documents:
            lines.append(f"{self.skipped_documents:,} documents left out: empty or unreadable")
        if self.passed_over:
            first = ", ".join(map(str, self.passed_over[:5]))
            more = f" and {len(self.passed_over) - 5:,} more" if len(self.passed_over) > 5 else ""
            lines.append(f"passed over in folders: {first}{more}")
        return "\n".join(lines)


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


def tokenize(
    inputs: Sequence[str | Path],
    out_prefix: str | Path,
    tokenizer: Tokenizer,
    held_out: float = 0.05,
    text_key: str = "text",
    skip_bad_documents: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TokenizeSummary:
    """Write ``<out_prefix>_train`` and ``<out_prefix>_heldout``, each document ending with eod.

    A document is held out if a hash of its text, as a number in [0, 1), is below ``held_out``. So
    a text lands on the same side in every corpus and order, and a copy never on the other side.
    Files appear complete or not at all; those of an earlier call are replaced. Empty documents are
    left out.

    ``progress`` is called now and then with the bytes of text done so far.

    Raises: DataError for unreadable inputs, a bad document (unless ``skip_bad_documents``), a
    share outside [0, 1), and a side of the split that would be empty.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"held_out is {held_out}; legal: a share of the documents in [0, 1)")
    documents = Documents(inputs, text_key, skip_bad_documents)
    prefixes = Path(f"{out_prefix}_train"), Path(f"{out_prefix}_heldout")
    train, held = (_Writer(prefix, tokenizer) for prefix in prefixes)
    empty = 0
    try:
        for texts in _batches(documents):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                if not ids:
                    empty += 1
                elif hash_fraction(text, salt=b"held out") < held_out:
                    held.add(text, ids)
                else:
                    train.add(text, ids)
            if progress is not None:
                progress(train.text_bytes + held.text_bytes)
        _require_both_sides(inputs, train.documents, held.documents, held_out)
        train.publish()
        if held_out > 0:
            held.publish()
        else:
            _remove(held.prefix)  # of an earlier call: its documents are training data now
    finally:
        train.discard()
        held.discard()
    return TokenizeSummary(
        train_prefix=train.prefix,
        held_out_prefix=held.prefix if held_out > 0 else None,
        documents=train.documents + held.documents,
        held_out_documents=held.documents,
        skipped_documents=documents.skipped + empty,
        passed_over=documents.passed_over,
        train_tokens=train.tokens,
        held_out_tokens=held.tokens,
        text_bytes=train.text_bytes + held.text_bytes,
    )


def _batches(documents: Documents) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _require_both_sides(
    inputs: Sequence[str | Path], train: int, held: int, held_out: float
) -> None:
    if train + held == 0:
        raise DataError(f"no text in {', '.join(map(str, inputs))}: nothing to tokenize")
    for side, count, wanted in (("training", train, True), ("held-out", held, held_out > 0)):
        if wanted and count == 0:
            raise DataError(
                f"none of {train + held} documents fell on the {side} side of held_out={held_out}; "
                "each document is drawn by a hash of its text: give more documents, or another "
                "share (0 holds nothing out)"
            )


class _Writer:
    """One side of the split, under a temporary name until it is published."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self.prefix = prefix
        self.documents = self.tokens = self.text_bytes = 0
        self._tokenizer = tokenizer
        self._dtype = DType.optimal_dtype(tokenizer.vocab_size)
        if tokenizer.vocab_size > np.iinfo(self._dtype).max + 1:
            raise DataError(
                f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, Megatron's token "
                f"type {self._dtype.__name__} has {np.iinfo(self._dtype).max + 1}; remove "
                "added tokens with ids that far out"
            )
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._part = prefix.with_name(f".{prefix.name}.{os.getpid()}.part")
        self._builder = IndexedDatasetBuilder(_file(self._part, ".bin"), self._dtype)

    def add(self, text: str, ids: list[int]) -> None:
        tokens = np.array([*ids, self._tokenizer.eod], dtype=self._dtype)
        self._builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)
        self.text_bytes += len(text.encode("utf-8"))

    def publish(self) -> None:
        self._builder.finalize(_file(self._part, ".idx"))
        sidecar = {
            "tokenizer": self._tokenizer.name,
            "tokenizer_digest": self._tokenizer.digest,
            "vocab_size": self._tokenizer.vocab_size,
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
        }
        with open(_file(self._part, ".json"), "w", encoding="utf-8") as stream:
            json.dump(sidecar, stream, indent=2)
        _remove(self.prefix)
        for suffix in (".bin", ".json", ".idx"):  # the index last: with it the dataset exists
            os.replace(_file(self._part, suffix), _file(self.prefix, suffix))

    def discard(self) -> None:
        """Drop what was not published; nothing is left after ``publish``."""
        self._builder.data_file.close()
        _remove(self._part)


def _file(prefix: Path, suffix: str) -> str:
    """Append to the name; ``with_suffix`` would cut a prefix such as ``corpus.v2``."""
    return f"{prefix}{suffix}"


def _remove(prefix: Path) -> None:
    for suffix in (".idx", ".json", ".bin"):  # the index first: without it there is no dataset
        Path(_file(prefix, suffix)).unlink(missing_ok=True)


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
