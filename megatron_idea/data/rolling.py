"""Whole documents as rows of tokens, to measure a model on: every token is predicted once.

A document is read after an end-of-document token, as in training. One that is longer than
``seq_length`` takes several rows; the last of them looks back as far as a row allows. These are the
windows of lm-evaluation-harness's ``loglikelihood_rolling``, so both give the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_idea.data.batches import Rows
from megatron_idea.data.documents import DataError, Documents
from megatron_idea.data.tokenizer import Tokenizer

_DOCUMENTS_AT_ONCE = 256


class Row(NamedTuple):
    """Inputs are tokens [begin, end) of a document after its leading end-of-document token."""

    document: int
    begin: int
    end: int
    scored: int
    """The last so many labels count; the others are context."""


def rows_of(document: int, tokens: int, seq_length: int) -> Iterator[Row]:
    """The rows of a document of ``tokens`` tokens, each of which is a scored label once."""
    end = 0
    while end < tokens:
        scored = min(tokens - end, seq_length)
        end += scored
        yield Row(document, max(0, end - seq_length), end, scored)


class RollingBatches(Rows):
    """Micro-batches of one data-parallel rank, as ``Batches`` gives them, of whole documents.

    Rows come longest first, so that those of one step are of about one length: a step is as long as
    its longest row. The order does not depend on the batch size or on the layout.

    Args:
        inputs: text, JSONL or Parquet files, or folders of them.
        limit: documents to take; 0: all.
        multiple: the length of a step is a multiple of this.
    Raises: DataError for files that cannot be read, a tokenizer larger than the model's
        vocabulary, and inputs without text.
    Cost: memory for all token ids, 4 bytes each.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        tokenizer: Tokenizer,
        *,
        seq_length: int,
        limit: int = 0,
        text_key: str = "text",
        multiple: int = 1,
        **layout: Any,
    ) -> None:
        """``layout``: the other arguments of ``Rows``."""
        super().__init__(tokenizer, seq_length=seq_length, **layout)
        self._multiple = multiple
        self._documents: list[np.ndarray] = []
        self._text_bytes: list[int] = []
        for texts in _in_groups(Documents(inputs, text_key), limit):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                self._documents.append(np.array([tokenizer.eod, *ids], dtype=np.int32))
                self._text_bytes.append(len(text.encode()))
        lengths = (len(ids) - 1 for ids in self._documents)
        rows = [row for d, n in enumerate(lengths) for row in rows_of(d, n, seq_length)]
        if not rows:
            raise DataError(f"no text in {', '.join(map(str, inputs))}: nothing to measure on")
        self._rows = sorted(rows, key=lambda row: row.begin - row.end)  # equal ones stay in order
        self.num_samples = len(self._rows)

    def length(self, begin: int) -> int:
        """Those of the longest row."""
        longest = self._rows[begin]
        return -(-(longest.end - longest.begin) // self._multiple) * self._multiple

    def step(self, begin: int) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's micro-batches of the step that starts at row ``begin``.

        Yields: as ``Batches.step``, and ``text_bytes`` [micro_batch_size], int64: the size of a
        document at its first row, 0 at the others.
        """
        length = self.length(begin)
        for index in range(self.num_microbatches):
            rows = [self._row(row, length) for row in self._of_micro_batch(begin, index)]
            yield {key: torch.stack([r[key] for r in rows]).to(self.device) for key in rows[0]}

    def _row(self, index: int, length: int) -> dict[str, Tensor]:
        tokens = torch.zeros(length + 1, dtype=torch.int64)
        mask = torch.zeros(length)
        text_bytes = 0
        if index < self.num_samples:
            document, begin, end, scored = self._rows[index]
            count = end - begin
            tokens[: count + 1] = torch.from_numpy(self._documents[document][begin : end + 1])
            mask[count - scored : count] = 1.0
            text_bytes = self._text_bytes[document] if end == scored else 0
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "position_ids": torch.arange(length),
            "loss_mask": mask,
            "text_bytes": torch.tensor(text_bytes),
        }


def _in_groups(documents: Documents, limit: int) -> Iterator[list[str]]:
    texts: list[str] = []
    for count, document in enumerate(documents, 1):
        texts.append(document.text)
        if len(texts) == _DOCUMENTS_AT_ONCE or count == limit:
            yield texts
            texts = []
        if count == limit:
            return
    if texts:
        yield texts
