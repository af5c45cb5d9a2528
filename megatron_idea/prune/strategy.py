"""What a pruning method decides, as values; one method a file implements the Protocol.

Neurons are spoken of in original numbering: row ``l``, column ``i`` of every [L, F] tensor here is
neuron ``i`` of the enlarged model's layer ``l``, alive or not, wherever it lies now.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_idea.engine.distributed import on_device

GATE, UP, DOWN = range(3)


@dataclass(frozen=True)
class Stats:
    """What was measured, reduced over all ranks and equal on all of them."""

    sums: Tensor
    """[L, 3, F] fp32: per neuron and matrix (gate, up, down), the moving average of the reduction
    that the strategy asked for; 0 for removed neurons."""
    row_length: int
    """Weights that a neuron has in one matrix: hidden_size."""


@dataclass(frozen=True)
class Plan:
    """Which neurons live on and how wide the layers are stored, the same on every rank."""

    alive: Tensor
    """[L, F] bool, on the CPU; a subset of the previous plan's."""
    widths: tuple[int, ...]
    """Physical neurons per layer; larger than the live count where masked ones stay for now."""
    digest: str
    """SHA-256 of the above, compared over all ranks before anything is applied."""

    @property
    def live(self) -> list[int]:
        """Live neurons per layer."""
        return live_counts(self.alive)


def live_counts(alive: Tensor) -> list[int]:
    """Live neurons per layer of a [L, F] bool tensor."""
    return alive.sum(dim=1).tolist()


class Strategy(Protocol):
    """A pruning method: pure functions of measured statistics and of who is alive."""

    element: str
    """Importance of one weight: ``abs``, ``squared``, ``signed``."""
    reduction: str
    """How a row is reduced while it is measured: ``sum``, ``sum_of_squares``, ``max``."""

    def importance(self, stats: Stats) -> Tensor:
        """One number per neuron, [L, F] fp32; larger is more important."""
        ...

    def allocate(self, importance: Tensor, alive: Tensor, keep_count: int) -> list[int]:
        """Neurons to keep in each layer when ``keep_count`` a layer may live on average.

        Never more than are alive in that layer. ``alive`` is on the CPU, ``importance`` where it
        was measured.
        """
        ...


def select(importance: Tensor, alive: Tensor, budget: list[int]) -> Tensor:
    """The ``budget[l]`` most important live neurons of each layer; ties go to the lower index.

    Importance is ranked where it is, and the order is the one thing that the host waits for.

    Returns: [L, F] bool on the CPU, as ``alive`` is, and a subset of it.
    Raises: ValueError when importance is not finite: a broken gradient must not pick neurons.
    """
    here = on_device(alive, importance.device)
    finite = (torch.isfinite(importance) | ~here).all()
    order = torch.where(finite, ranked(importance, here), -1).cpu()
    if int(order[0, 0]) < 0:
        raise ValueError("importance of a live neuron is not finite")
    keep = torch.zeros_like(alive)
    for layer, count in enumerate(budget):
        keep[layer, order[layer, :count]] = True
    assert not bool((keep & ~alive).any()), "a removed neuron was selected"
    return keep


def ranked(importance: Tensor, alive: Tensor) -> Tensor:
    """[L, F] neuron indices from most to least important, removed ones last, ties by index.

    On the device of ``importance``; ``alive`` may be on the CPU.
    """
    score = importance.masked_fill(~on_device(alive, importance.device), float("-inf"))
    return torch.sort(score, dim=1, descending=True, stable=True).indices
