"""Random pruning: the baseline that any importance has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_idea.config import AxisGoal, PruneConfig
from megatron_idea.prune.plan import Units
from megatron_idea.prune.strategy import Scheduled, Stats


class RandomPrune(Scheduled):
    """Every unit draws its importance once, from the run's seed: the same at every step."""

    def __init__(self, config: PruneConfig, goals: Mapping[str, AxisGoal], seed: int) -> None:
        super().__init__(config, goals)
        self._seed = seed

    def importance(self, stats: Stats) -> Units:
        """Draw; ``stats`` holds nothing."""
        return {axis: self._draw(axis, stats.alive[axis].shape) for axis in self.axes}

    def _draw(self, axis: str, shape: torch.Size) -> Tensor:
        seed = hashlib.sha256(f"{self._seed} {axis}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        return torch.rand(shape, generator=generator)
