"""What this rank's units own, and their original numbering, in which plans and scores speak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.engine.layers import PrunableMLP
from megatron_idea.engine.model import named_parameters
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.axis import Share, shares_of


def named_shares(
    trainable: Trainable,
) -> Iterator[tuple[str, torch.nn.Parameter, tuple[Share, ...]]]:
    """Iterate over this rank's parameters with their names and who owns what of them."""
    model, shape, tp = trainable.config.model, trainable.shape, trainable.groups.tp.size()
    for name, parameter in named_parameters(trainable.chunks):
        yield name, parameter, shares_of(name, model, shape, tp)


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
