"""Random pruning: the baseline that any importance has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_idea.config import PruneConfig
from megatron_idea.prune.plan import Units
from megatron_idea.prune.strategy import (
    Counts,
    Goal,
    Measure,
    Stats,
    scheduled_counts,
    scheduled_removal_is_due,
)


class RandomPrune:
    """Every unit draws its importance once, from the run's seed: the same at every step."""

    measures: tuple[Measure, ...] = ()

    def __init__(self, config: PruneConfig, goals: Mapping[str, Goal], seed: int) -> None:
        self.axes = tuple(goals)
        self._config = config
        self._goals = goals
        self._seed = seed

    def is_due(self, alive: Units, removed: float) -> bool:
        """Follow the schedule."""
        return scheduled_removal_is_due(alive, self._goals, removed)

    def importance(self, stats: Stats) -> Units:
        """Draw; ``stats`` holds nothing."""
        return {axis: self._draw(axis, stats.alive[axis].shape) for axis in self.axes}

    def _draw(self, axis: str, shape: torch.Size) -> Tensor:
        seed = hashlib.sha256(f"{self._seed} {axis}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        return torch.rand(shape, generator=generator)

    def budget(
        self, importance: Units, alive: Units, removed: float, memory: Tensor
    ) -> tuple[Counts, Tensor]:
        """Follow the schedule."""
        scope = self._config.scope
        return scheduled_counts(importance, alive, self._goals, removed, scope), memory
