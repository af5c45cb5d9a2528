"""Importance gathered from the gradients that training makes anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_idea.distributed import ProcessGroups
from megatron_idea.kernels import matrix_scores
from megatron_idea.layers import PrunableMLP
from megatron_idea.optim import slot
from megatron_idea.prune.strategy import DOWN, GATE, UP, Strategy


class ScoreTracker:
    """Moving average of each local neuron's gradient x weight sums, [3, f] per layer.

    Every data-parallel rank averages the sums over its own optimizer shard: the average is linear,
    so adding the ranks up when a plan is due gives the average of the whole, and observing costs
    one read of weights and gradients and no communication. (``max`` is not linear: it is reduced
    at once.)

    ``ema`` <- history * ema + (1 - history) * mean of the window; the window is the steps since
    the last update of the average.
    """

    def __init__(
        self, mlps: Sequence[tuple[int, PrunableMLP]], strategy: Strategy, history: float
    ) -> None:
        self.strategy = strategy
        self.history = history
        self.window_steps = 0
        self.ema: list[Tensor] = []
        self.window: list[Tensor] = []
        self.resize(mlps)

    def resize(self, mlps: Sequence[tuple[int, PrunableMLP]]) -> None:
        """Start at zero for MLPs of new widths."""
        self.ema = [torch.zeros(3, mlp.width, device=mlp.mask.device) for _, mlp in mlps]
        self.window = [torch.zeros_like(e) for e in self.ema]

    @torch.no_grad()
    def observe(
        self,
        mlps: Sequence[tuple[int, PrunableMLP]],
        optimizer: MegatronOptimizer,
        groups: ProcessGroups,
    ) -> list[Tensor]:
        """Sums of this step, [3, f] per layer, over this rank's shards.

        Call between the reduction of gradients and the optimizer's step: weights before their
        update, gradients before clipping.
        """
        sums = [self._layer_sums(mlp, optimizer, groups) for _, mlp in mlps]
        if self.strategy.reduction == "max" and groups.dp.size() > 1:
            flat = torch.cat([s.flatten() for s in sums])
            dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=groups.dp)
            flat *= groups.dp.rank() == 0
            sums = [
                part.view_as(s)
                for part, s in zip(flat.split([s.numel() for s in sums]), sums, strict=True)
            ]
        return sums

    def _layer_sums(
        self, mlp: PrunableMLP, optimizer: MegatronOptimizer, groups: ProcessGroups
    ) -> Tensor:
        sums = torch.zeros(3, mlp.width, device=mlp.mask.device)
        sharded = optimizer.config.use_distributed_optimizer
        for linear, per in ((mlp.linear_fc1, "row"), (mlp.linear_fc2, "column")):
            part = slot(optimizer, linear.weight)
            # Without shards every rank holds the whole: one of them counts.
            if part is None or (not sharded and groups.dp.rank() > 0):
                continue
            scores = matrix_scores(
                part.main.detach().view(-1),
                part.grad,
                part.start,
                tuple(linear.weight.shape),
                per,
                self.strategy.element,
                self.strategy.reduction,
            )
            if per == "row":
                sums[GATE], sums[UP] = scores.view(2, mlp.width)
            else:
                sums[DOWN] = scores
        return sums

    def record(self, sums: Sequence[Tensor]) -> None:
        """Add a step's sums to the window."""
        for window, value in zip(self.window, sums, strict=True):
            window += value
        self.window_steps += 1

    def fold(self) -> None:
        """Let the window into the average and empty it; nothing when it is empty."""
        if self.window_steps == 0:
            return
        for ema, window in zip(self.ema, self.window, strict=True):
            ema.mul_(self.history).add_(window, alpha=(1 - self.history) / self.window_steps)
            window.zero_()
        self.window_steps = 0
