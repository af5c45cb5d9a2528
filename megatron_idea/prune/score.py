"""Importance gathered from the gradients that training makes anyway."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.config import ModelConfig
from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.engine.layers import PrunableMLP
from megatron_idea.engine.shards import slot
from megatron_idea.engine.trainable import Trainable
from megatron_idea.kernels import MatrixShard, matrix_scores
from megatron_idea.prune.axis import Share, fold, shares_of
from megatron_idea.prune.strategy import Strategy
from megatron_idea.shape import Shape


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
        shares = _shares(trainable)
        totals = matrix_scores(
            [_shard(weight, share, trainable) for weight, share in shares],
            self.strategy.element,
            self.strategy.reduction,
            device=trainable.groups.device,
            implementation=trainable.config.training.kernel_implementation,
        )
        rows = [
            fold(total, share, self.strategy.reduction)
            for total, (_, share) in zip(totals, shares, strict=True)
        ]
        # fc1 has a neuron's gate and up, fc2 its down.
        sums = [torch.cat(pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
        if self.strategy.reduction == "max":  # not linear: the shards of a row must meet at once
            _all_reduce(sums, dist.ReduceOp.MAX, trainable.groups)
            if trainable.groups.shards.rank() > 0:
                sums = [torch.zeros_like(s) for s in sums]
        return sums

    def record(self, sums: Sequence[Tensor]) -> None:
        """Add a step's sums to the window."""
        torch._foreach_add_(self.window, list(sums))
        self.window_steps += 1

    def reduce_window(self, groups: ProcessGroups) -> None:
        """Sum the window over data-parallel ranks; the first of them carries it on."""
        _all_reduce(self.window, dist.ReduceOp.SUM, groups)
        if groups.shards.rank() > 0:
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


def _shares(trainable: Trainable) -> list[tuple[torch.nn.Parameter, Share]]:
    """This rank's fc1 and fc2 of every layer, with what neurons own of them."""
    model, tp = trainable.config.model, trainable.groups.tp.size()
    by_layer = _neuron_shares(model, trainable.widths, tp)
    return [
        (linear.weight, share)
        for layer, mlp in trainable.mlps
        for linear, share in zip((mlp.linear_fc1, mlp.linear_fc2), by_layer[layer], strict=True)
    ]


@functools.lru_cache(maxsize=4)  # the same at every step between two compactions
def _neuron_shares(model: ModelConfig, widths: tuple[int, ...], tp: int) -> list[tuple[Share, ...]]:
    shape = Shape.full(model).with_counts("ffn_hidden_size", widths)
    return [
        tuple(
            share
            for name in ("linear_fc1", "linear_fc2")
            for share in shares_of(f"decoder.layers.{layer}.mlp.{name}.weight", model, shape, tp)
            if share.axis == "ffn_hidden_size"
        )
        for layer in range(len(widths))
    ]


def _shard(weight: torch.nn.Parameter, share: Share, trainable: Trainable) -> MatrixShard:
    """What this rank's optimizer holds of a matrix, per row or column as its units lie."""
    rows, columns = weight.shape
    whole = MatrixShard((rows, columns), "row" if share.dim == 0 else "column")
    sharded = trainable.config.parallel.use_distributed_optimizer
    # Without shards every rank holds the whole: one of them counts.
    if not sharded and trainable.groups.shards.rank() > 0:
        return whole
    held = slot(trainable.optimizer, weight)
    if held is None:
        return whole
    return replace(whole, w=held.main.detach().view(-1), g=held.grad, lo=held.start)


def _all_reduce(
    values: Sequence[Tensor], op: dist.ReduceOp.RedOpType, groups: ProcessGroups
) -> None:
    """Reduce small tensors over data-parallel ranks in place, in one message."""
    if groups.shards.size() == 1:
        return
    flat = torch.cat([v.flatten() for v in values])
    dist.all_reduce(flat, op=op, group=groups.shards)
    for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
        value.copy_(part.view_as(value))
