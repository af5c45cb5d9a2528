"""Neuron <-> slices of Megatron's FFN tensors on one tensor-parallel rank.

fc1 is [2 f, H], gate rows above up rows; fc2 is [H, f]. Neuron ``c`` owns fc1 rows ``c`` and
``f + c`` and fc2 column ``c``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.distributed import ProcessGroups
from megatron_idea.layers import PrunableMLP


def pack(fc1: Tensor, fc2: Tensor) -> Tensor:
    """[..., 2 f, H] and [..., H, f] -> [f, ..., 3, H]: all that each neuron owns, in one row."""
    gate_up = fc1.unflatten(-2, (2, fc1.shape[-2] // 2))
    down = fc2.transpose(-1, -2).unsqueeze(-3)
    return torch.cat([gate_up, down], dim=-3).movedim(-2, 0).contiguous()


def unpack(neurons: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of ``pack``: [f, ..., 3, H] -> [..., 2 f, H] and [..., H, f], contiguous."""
    parts = neurons.movedim(0, -2)
    fc1 = parts[..., :2, :, :].flatten(-3, -2)
    return fc1.contiguous(), parts[..., 2, :, :].transpose(-1, -2).contiguous()


def to_original_numbering(
    mlps: Sequence[tuple[int, PrunableMLP]],
    values: Sequence[Tensor],
    num_layers: int,
    ffn_hidden_size: int,
    groups: ProcessGroups,
) -> Tensor:
    """Collect values of neurons over tensor and pipeline ranks into one table.

    Args:
        mlps: this rank's (layer, MLP) pairs.
        values: per MLP, [..., f] in local order, equal over data-parallel ranks.
    Returns: [L, ..., F] in original numbering, equal on every rank; 0 where a neuron is gone.
    """
    lead = values[0].shape[:-1]
    table = torch.zeros(
        num_layers, *lead, ffn_hidden_size, dtype=values[0].dtype, device=values[0].device
    )
    for (layer, mlp), value in zip(mlps, values, strict=True):
        table[layer][..., mlp.neuron_ids] = value
    if groups.collection.mp.size() > 1:
        dist.all_reduce(table, group=groups.collection.mp)  # each entry is on one rank only
    return table
