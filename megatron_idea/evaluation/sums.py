"""Add up nats, tokens and bytes over rows of text, with a bar.

What scores a step of rows is a function: our own model over all ranks, or one of transformers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

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

    def as_text(self) -> str:
        return "\n".join(
            f"{name:<14}{value:,}" if isinstance(value, int) else f"{name:<14}{value:.4f}"
            for name, value in self.as_dict().items()
        )


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
def add_up(step: Step, rows: Rows, bar: Progress | None = None, name: str = "") -> list[float]:
    """Add up nats, tokens and bytes of all rows; the bar shows how far it is, and the loss."""
    total = torch.zeros(3, dtype=torch.float64, device=rows.device)
    if bar:
        bar.add_task(name, total=rows.num_samples)
    for first in range(0, rows.num_samples, rows.global_batch_size):
        total += step(rows, first)
        if bar:
            nats, tokens, _ = total.tolist()
            text = f"{name}  loss {nats / max(tokens, 1):.4f}"
            bar.update(bar.task_ids[-1], advance=rows.global_batch_size, description=text)
    return total.tolist()


@contextlib.contextmanager
def progress_bar(speaks: bool) -> Iterator[Progress | None]:
    """Show a bar on standard error if that is a terminal and this rank is the one that speaks."""
    console = Console(stderr=True)
    if not (speaks and console.is_terminal):
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        yield bar
