"""Turn the residual stream into its principal directions, without changing what a model computes.

With x a row of the stream, Q orthogonal and g the gain of a norm,

    norm(x) g W^T  =  norm(x Q) (W diag(g) Q)^T      since a norm divides by |x|, and |x Q| = |x|

so gains are folded into the matrices that read the stream, linear_qkv, linear_fc1 and the output
layer, and become 1; those are multiplied by Q from the right, as is the embedding, and those that
write to it, linear_proj and linear_fc2, by Q^T from the left.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idea.engine.distributed import ProcessGroups
from megatron_idea.engine.optimizer import finish_main_update, reset_moments
from megatron_idea.engine.shards import shard_of
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.units import named_shares, norm_row

WRITERS = ("linear_proj.weight", "linear_fc2.weight")


def principal_directions(gram: Tensor, groups: ProcessGroups) -> Tensor:
    """Return the eigenvectors of ``gram`` as columns, those of most energy first.

    Args:
        gram: fp64 [H, H]: sum of x^T x over tokens and norms, equal on every rank.
    Returns: fp64 [H, H] on the CPU, to the bit the same on every rank.
    """
    _values, vectors = torch.linalg.eigh(gram)  # ascending
    directions = vectors.flip(-1).contiguous().to(groups.device)
    dist.broadcast(directions, 0)  # a sign or a near tie may differ between machines
    return directions.cpu()


@torch.no_grad()
def rotate(trainable: Trainable, directions: Tensor) -> None:
    """Turn the whole model, in its fp32 main weights; Adam begins anew.

    Its first moment would turn with the weights, its second would not: it is a mean of squares of
    other numbers.

    Call at a step boundary, on all ranks, while all channels are alive and the embedding is untied.

    Args:
        directions: fp64 [H, H], orthogonal; column k becomes channel k.
    """
    gains = _gains(trainable)
    turn = directions.to(trainable.groups.device)
    exchange = trainable.exchange()
    for name, parameter, _ in named_shares(trainable):
        row = norm_row(name, trainable)
        gain = None if row is None else gains[row]
        exchange.change_main(
            parameter, functools.partial(_turned, name.endswith(WRITERS), gain, turn)
        )
    finish_main_update(trainable.optimizer, trainable.chunks)
    reset_moments(trainable.optimizer)


def _turned(writes: bool, gain: Tensor | None, turn: Tensor, main: Tensor) -> Tensor:
    """Return a turned main weight; ``gain``: of the norm that it is, or reads from."""
    if main.dim() == 1:
        return main if gain is None else torch.ones_like(main)
    if writes:
        return turn.T @ main.double()
    return (main.double() if gain is None else main * gain) @ turn


def _gains(trainable: Trainable) -> Tensor:
    """Return the gains of all norms of the residual stream, fp64 [2 layers + 1, H], everywhere."""
    groups = trainable.groups
    rows = 2 * trainable.model.num_layers + 1
    gains = torch.zeros(
        rows, trainable.shape.hidden_size, dtype=torch.float64, device=groups.device
    )
    sharded = trainable.parallel.use_distributed_optimizer
    for name, parameter, _ in named_shares(trainable):
        row = norm_row(name, trainable)
        if parameter.dim() > 1 or row is None or groups.tp.rank() > 0:
            continue
        shard = shard_of(trainable.optimizer, parameter)
        if shard is not None and (sharded or groups.shards.rank() == 0):
            gains[row, shard.start : shard.end] = shard.main.detach().view(-1).double()
    dist.all_reduce(gains)
    return gains
