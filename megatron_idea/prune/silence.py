"""Removal is a value: zeros in all that a unit owns.

A unit of zeros computes exactly 0, so its gradients are exactly 0, so Adam moves it by 0 and decay
keeps it 0: it cannot come back, and cutting it out later changes nothing. No layer has to know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_idea.engine.distributed import on_device
from megatron_idea.engine.shards import MOMENTS, has_main_copy, shard_of
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.axis import Share, blocks
from megatron_idea.prune.units import LocalUnits, named_shares, norm_row


@torch.no_grad()
def silence(trainable: Trainable, gone: LocalUnits) -> None:
    """Zero units in weights, fp32 main weights and both moments, where this rank holds them.

    Call at a step boundary, on all ranks. Where weights are gathered only when the next forward
    pass needs them, every rank zeroes its copy, and the gather brings zeros of the others' shards.

    Args:
        gone: bool, as ``on_this_rank`` returns it.
    """
    device = trainable.groups.device
    for _, parameter, shares in named_shares(trainable):
        shard = shard_of(trainable.optimizer, parameter)
        for share in shares:
            of_axis = gone.get(share.axis, {})
            mask = of_axis.get(share.layer, of_axis.get(None))
            if mask is None or not bool(mask.any()):
                continue
            _zero([parameter.data], share, 0, mask, device)
            if shard is not None:
                states = [shard.state[name] for name in MOMENTS if name in shard.state]
                if has_main_copy(parameter):
                    states.append(shard.main.data)
                _zero(states, share, shard.start, mask, device)


@torch.no_grad()
def rescale_norms(trainable: Trainable, gains: Tensor) -> None:
    """Multiply the gains of the residual stream's norms, and bring their moments along.

    Call as ``silence``. With f the factor, gradients of a gain become g / f: so do exp_avg, and
    exp_avg_sq becomes v / f^2.

    Args:
        gains: as in ``Plan``.
    """
    for name, parameter, _ in named_shares(trainable):
        row = norm_row(name, trainable)
        if parameter.dim() > 1 or row is None:
            continue
        factor = float(gains[row])
        if factor == 1.0:
            continue
        parameter.data.mul_(factor)
        shard = shard_of(trainable.optimizer, parameter)
        if shard is None:
            continue
        if has_main_copy(parameter):
            shard.main.data.mul_(factor)
        for moment, power in zip(MOMENTS, (1, 2), strict=True):
            if moment in shard.state:
                shard.state[moment].div_(factor**power)


def _zero(
    states: list[Tensor], share: Share, start: int, gone: Tensor, device: torch.device
) -> None:
    """Zero units in elements of a tensor from ``start`` on, in every one of its states."""
    if not states:
        return
    for block in blocks(share, start, start + states[0].numel()):
        units = gone[block.unit : block.unit + block.units].nonzero().view(-1)
        if len(units):
            index = on_device(units, device)
            for state in states:
                block.of(state.view(-1)).index_fill_(1, index, 0.0)
