"""Add up nats, tokens and bytes over rows of text, with a bar, and from where it was left.

What scores a step of rows is a function: our own model over all ranks, or one of transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from megatron_idea.config import ConfigError
from megatron_idea.data.batches import Rows

Step = Callable[[Rows, int], Tensor]
"""Scores the step of rows that starts at an index; returns fp64 (nats, tokens, bytes)."""


@dataclass(frozen=True)
class Measured:
    """Held-out loss on one set of data."""

    data: str
    loss: float
    """Nats per token."""
    tokens: int
    """Scored; the end of a document is one of them in an indexed dataset, and not in text."""
    bytes: int
    """UTF-8 of the text that those tokens stand for; 0 when the tokenizer cannot tell."""

    @property
    def perplexity(self) -> float:
        """Per token: comparable only between models with the same tokenizer."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def as_dict(self) -> dict[str, float | int]:
        values: dict[str, float | int] = {
            "loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens,
        }  # fmt: skip
        if self.bits_per_byte is not None:
            values |= {"bytes": self.bytes, "bits_per_byte": self.bits_per_byte}
        return values


def sums_of(losses: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(nats, tokens, bytes), fp64, of losses [b, s]."""
    mask = batch["loss_mask"]
    parts = (losses.float() * mask).sum(), mask.sum(), batch["text_bytes"].sum()
    return torch.stack([part.double() for part in parts])


def micro_batches(
    rows: Rows, begin: int, token_bytes: Tensor | None
) -> Iterator[dict[str, Tensor]]:
    """Those of one step, with ``text_bytes``: of whole documents, or of each label."""
    for batch in rows.step(begin):
        if "text_bytes" not in batch:
            labels = batch["labels"]
            batch["text_bytes"] = (
                labels.new_zeros(1)
                if token_bytes is None
                else token_bytes[labels] * (batch["loss_mask"] > 0)
            )
        yield batch


@torch.no_grad()
def add_up(step: Step, rows: Rows, ledger: Ledger | None = None, name: str = "") -> list[float]:
    """Nats, tokens and bytes of all rows; from where the ledger says that it was left."""
    begin, sums = ledger.begin(name, rows.num_samples) if ledger else (0, [0.0, 0.0, 0.0])
    total = torch.tensor(sums, dtype=torch.float64, device=rows.device)
    for first in range(begin, rows.num_samples, rows.global_batch_size):
        total += step(rows, first)
        if ledger:
            ledger.note(name, min(first + rows.global_batch_size, rows.num_samples), total.tolist())
    return total.tolist()


class Ledger:
    """How far an evaluation has come: in a file to go on from, and as a bar on a terminal.

    Rank 0 keeps the file; the others learn from it where to begin.
    """

    WRITE_EVERY_S = 5.0

    def __init__(self, path: Path | None, identity: dict[str, Any], speaks: bool) -> None:
        """Raises: ConfigError, on every rank, for a file of another measurement."""
        self._path = path
        self._speaks = speaks
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._state: dict[str, Any] = {"identity": digest, "done": {}}
        self._written_at = time.monotonic()
        self._bar: Progress | None = None
        if path is None:
            return
        found = [path.read_text() if speaks and path.is_file() else ""]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        if found[0]:
            try:
                state = json.loads(found[0])
                same = state["identity"] == digest
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path} is no partial result of an evaluation") from error
            if not same:
                raise ConfigError(
                    f"{path} is of another model, of other data or settings; name another file, or "
                    "delete it to begin anew"
                )
            self._state = state

    def __enter__(self) -> Ledger:
        console = Console(stderr=True)
        if self._speaks and console.is_terminal:
            self._bar = Progress(console=console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._write()
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str, num_rows: int) -> tuple[int, list[float]]:
        """Rows that are done, and their sums."""
        done = self._state["done"].get(name, {"rows": 0, "sums": [0.0, 0.0, 0.0]})
        if self._bar is not None:
            self._bar.add_task(name, total=num_rows, completed=done["rows"])
        return done["rows"], done["sums"]

    def note(self, name: str, rows: int, sums: list[float]) -> None:
        self._state["done"][name] = {"rows": rows, "sums": sums}
        if self._bar is not None:
            task = self._bar.tasks[-1]
            text = f"{name}  loss {sums[0] / sums[1]:.4f}"
            self._bar.update(task.id, completed=rows, description=text)
        if time.monotonic() - self._written_at >= self.WRITE_EVERY_S:
            self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        if self._path is None or not self._speaks:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(self._state))
        part.replace(self._path)
