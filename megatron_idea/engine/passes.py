"""Passes of micro-batches through a model: the one place that calls megatron-core's schedules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.engine.trainable import Trainable

Forward = Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, Any]]
"""Takes the next micro-batch through one chunk. Returns: its output, and a function that makes
(loss, whatever ``through`` shall return) of the last chunk's output."""


class MicroBatches(Protocol):
    """What training reads: ``data.batches.Batches``."""

    num_microbatches: int
    micro_batch_size: int
    seq_length: int

    def step(self, consumed_samples: int) -> Iterator[dict[str, Tensor]]: ...


def through(
    chunks: Sequence[torch.nn.Module],
    batches: Callable[[], Iterator[Any]],
    forward: Forward,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    backward: bool = False,
) -> list[Any]:
    """Run micro-batches through all chunks of the pipeline; collective over its ranks.

    Args:
        batches: makes an iterator over the micro-batches; every chunk gets one of its own.
        num_microbatches: as ``at_least`` says, for interleaved pipelining.
        backward: also backward; gradients are then in ``main_grad``, reduced over data-parallel
            ranks.
    Returns: what ``forward`` made of each micro-batch, on the last stage; elsewhere nothing.
    """
    iterators = [batches() for _ in chunks]
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=not backward,
    )
    return results


def at_least(chunks: Sequence[torch.nn.Module], groups: ProcessGroups) -> int:
    """Return what the number of micro-batches must be a multiple of: PP if interleaved, or 1."""
    return groups.pp.size() if len(chunks) > 1 else 1


@contextlib.contextmanager
def evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Turn dropout off, and on again where it was."""
    training = [chunk for chunk in chunks if chunk.training]
    for chunk in training:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in training:
            chunk.train()


def forward_backward(trainable: Trainable, data: MicroBatches, samples: int) -> list[Tensor]:
    """Run all micro-batches of a step; gradients are then in ``main_grad``, reduced over DP.

    ``samples``: how many of ``data`` come before this step.
    Returns: the mean loss of each micro-batch, on the last pipeline stage; elsewhere nothing.
    """
    for chunk in trainable.chunks:
        chunk.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    results = through(
        trainable.chunks,
        lambda: data.step(samples),
        forward_loss,
        data.num_microbatches,
        data.seq_length,
        data.micro_batch_size,
        backward=True,
    )
    return [result["loss"] for result in results]


def forward_loss(
    batches: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    """Take the next micro-batch through this chunk; the last one's output becomes a mean loss."""
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch["loss_mask"]
        loss = (losses.float() * mask).sum() / mask.sum()
        # megatron-core divides the loss in place by the number of micro-batches: log a copy.
        return loss, {"loss": loss.detach().clone()}

    return output, mean_loss
