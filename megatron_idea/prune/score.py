"""Importance gathered from the gradients that training makes anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.distributed import ProcessGroups
from megatron_idea.kernels import FfnShard, ffn_scores
from megatron_idea.layers import PrunableMLP
from megatron_idea.optim import Trainable, slot
from megatron_idea.prune.strategy import Strategy


class ScoreTracker:
    """Moving average of each local neuron's gradient x weight sums, [3, f] per layer.

    Every data-parallel rank adds up the sums over its own optimizer shard in ``window``; observing
    is one read of weights and gradients and no communication. When a plan is due the window is
    reduced over data-parallel ranks and folded into ``ema``, which is then equal on all of them:
    ``ema`` <- history * ema + (1 - history) * mean of the window.
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
    def observe(self, trainable: Trainable) -> list[Tensor]:
        """Sums of this step, [3, f] per layer, over this rank's shards.

        Call between the reduction of gradients and the optimizer's step: weights before their
        update, gradients before clipping.
        """
        mlps = trainable.mlps
        sums = ffn_scores(
            [self._shard(mlp, trainable) for _, mlp in mlps],
            self.strategy.element,
            self.strategy.reduction,
            device=trainable.groups.device,
            implementation=trainable.config.training.kernel_implementation,
        )
        if self.strategy.reduction == "max":  # not linear: the shards of a row must meet at once
            _all_reduce(sums, dist.ReduceOp.MAX, trainable.groups)
            if trainable.groups.dp.rank() > 0:
                sums = [torch.zeros_like(s) for s in sums]
        return sums

    def _shard(self, mlp: PrunableMLP, trainable: Trainable) -> FfnShard:
        """What this rank's optimizer holds of one FFN."""
        hidden = mlp.linear_fc2.weight.shape[0]
        sharded = trainable.config.parallel.use_distributed_optimizer
        # Without shards every rank holds the whole: one of them counts.
        if not sharded and trainable.groups.dp.rank() > 0:
            return FfnShard(mlp.width, hidden)
        fc1 = slot(trainable.optimizer, mlp.linear_fc1.weight)
        fc2 = slot(trainable.optimizer, mlp.linear_fc2.weight)
        return FfnShard(
            mlp.width,
            hidden,
            w1=fc1.main.detach().view(-1) if fc1 else None,
            g1=fc1.grad if fc1 else None,
            lo1=fc1.start if fc1 else 0,
            w2=fc2.main.detach().view(-1) if fc2 else None,
            g2=fc2.grad if fc2 else None,
            lo2=fc2.start if fc2 else 0,
        )

    def record(self, sums: Sequence[Tensor]) -> None:
        """Add a step's sums to the window."""
        torch._foreach_add_(self.window, list(sums))
        self.window_steps += 1

    def reduce_window(self, groups: ProcessGroups) -> None:
        """Sum the window over data-parallel ranks; the first of them carries it on."""
        _all_reduce(self.window, dist.ReduceOp.SUM, groups)
        if groups.dp.rank() > 0:
            torch._foreach_zero_(self.window)

    def fold(self, groups: ProcessGroups) -> None:
        """Let the window into the average and empty it; nothing when it is empty."""
        if self.window_steps == 0:
            return
        _all_reduce(self.window, dist.ReduceOp.SUM, groups)
        torch._foreach_mul_(self.ema, self.history)
        torch._foreach_add_(self.ema, self.window, alpha=(1 - self.history) / self.window_steps)
        torch._foreach_zero_(self.window)
        self.window_steps = 0


def _all_reduce(
    values: Sequence[Tensor], op: dist.ReduceOp.RedOpType, groups: ProcessGroups
) -> None:
    """Reduce small tensors over data-parallel ranks in place, in one message."""
    if groups.dp.size() == 1:
        return
    flat = torch.cat([v.flatten() for v in values])
    dist.all_reduce(flat, op=op, group=groups.dp)
    for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
        value.copy_(part.view_as(value))
