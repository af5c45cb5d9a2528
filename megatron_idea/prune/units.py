"""What this rank's units own, and where they are."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_idea.config import ModelConfig
from megatron_idea.engine.model import named_parameters
from megatron_idea.engine.trainable import Trainable
from megatron_idea.prune.axis import Share, shares_of
from megatron_idea.prune.plan import StoredUnits, Units, local_part
from megatron_idea.shape import LAYER_AXES, Shape

LocalUnits = Mapping[str, Mapping[int | None, Tensor]]
"""Axis -> position of a layer on this rank, None for channels -> one value a unit in memory here,
on the CPU; a layer's own value is [1]."""


def named_shares(
    trainable: Trainable,
) -> Iterator[tuple[str, torch.nn.Parameter, tuple[Share, ...]]]:
    """Iterate over this rank's parameters with their names and who owns what of them."""
    model, shape, tp = trainable.model, trainable.shape, trainable.groups.tp.size()
    known = _known_shares(model, shape, tp)
    for name, parameter in named_parameters(trainable.chunks):
        if name not in known:
            known[name] = shares_of(name, model, shape, tp)
        yield name, parameter, known[name]


# The same at every step between two compactions, and 2 ms to work out for 32 layers.
@functools.lru_cache(maxsize=2)
def _known_shares(model: ModelConfig, shape: Shape, tp: int) -> dict[str, tuple[Share, ...]]:
    return {}


def norm_row(name: str, trainable: Trainable) -> int | None:
    """Number the norm of the residual stream that a tensor is the gain of, or reads from.

    Two a layer of the enlarged model, in the order of layers, and the final one. None for the
    embedding, norms of queries and keys, and what writes to the stream.
    """
    if name in ("decoder.final_layernorm.weight", "output_layer.weight"):
        return 2 * trainable.model.num_layers
    if not name.startswith("decoder.layers."):
        return None
    position, _, tensor = name.removeprefix("decoder.layers.").partition(".")
    row = 2 * trainable.shape.layers[int(position)].number
    rows = {
        "input_layernorm.weight": row,
        "self_attention.linear_qkv.weight": row,
        "pre_mlp_layernorm.weight": row + 1,
        "mlp.linear_fc1.weight": row + 1,
    }
    return rows.get(tensor)


def local_layers(trainable: Trainable, axes: Sequence[str]) -> list[tuple[str, int | None]]:
    """List (axis, position of a layer) for the layers of this rank; position None for channels."""
    layers = sorted({n for n, _ in trainable.mlps})
    return [
        (axis, layer) for axis in axes for layer in ([None] if axis == "hidden_size" else layers)
    ]


def on_this_rank(units: Units, trainable: Trainable, stored: StoredUnits) -> LocalUnits:
    """Bring values of units into the order in which this rank stores them."""
    found: dict[str, dict[int | None, Tensor]] = {
        "hidden_size": {None: units["hidden_size"][stored["hidden_size"][0]]}
    }
    for axis, layer in local_layers(trainable, LAYER_AXES):
        assert layer is not None
        ids = local_part(stored[axis][layer], trainable.groups.tp)
        number = trainable.shape.layers[layer].number
        found.setdefault(axis, {})[layer] = units[axis][number][ids]
        found.setdefault("num_layers", {})[layer] = units["num_layers"][number : number + 1]
    return found
