"""What each unit owns of each tensor. The only place that knows how megatron-core packs weights.

A unit is what is removed as a whole: a neuron, a KV group with its query heads, a channel of the
residual stream, a layer. Its share of a tensor is two integers: in row-major order, element p
belongs to unit

    p // stride % count

Scores, zeros, cuts, checksums and the copies between ranks all follow from that line. As a view the
tensor is [outer, count, stride], and a unit is [outer, 1, stride] of it, its slice.

Shapes on one rank: f neurons, g groups of q query heads, H channels, kv = kv_channels.

    linear_fc1    [2 f, H]             gate rows, then up rows
    linear_fc2    [H, f]
    linear_qkv    [g (q + 2) kv, H]    per group: its query heads, key, value
    linear_proj   [H, g q kv]
    embedding, output layer [vocabulary / TP, H]; norms [H]; norms of queries and keys [kv]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_idea.config import ModelConfig
from megatron_idea.shape import LayerShape, Shape


@dataclass(frozen=True)
class Axis:
    """A kind of unit."""

    name: str
    """As in the model's configuration."""
    is_split: bool
    """Whether a unit lives on one tensor-parallel rank; else every rank has a piece of it."""
    matrices: tuple[str, ...]
    """What is measured of a unit, in the order of every table of measurements. Norms are not: a
    gain is one weight, and would drown any mean over a matrix."""


LAYER_MATRICES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

AXES = {
    axis.name: axis
    for axis in (
        Axis(
            "ffn_hidden_size",
            is_split=True,
            matrices=("gate", "up", "down"),
        ),
        Axis(
            "num_query_groups",
            is_split=True,
            matrices=("query", "key", "value", "projection"),
        ),
        Axis(
            "hidden_size",
            is_split=False,
            # Those of the layers are one matrix each, over all layers.
            matrices=("word_embeddings", "output_layer", *LAYER_MATRICES),
        ),
        Axis("num_layers", is_split=False, matrices=LAYER_MATRICES),
    )
}

EMBEDDING = "embedding.word_embeddings.weight"
"""Also the name of the output layer where the two are tied."""
LAYER_TENSORS = (
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "input_layernorm.weight",
    "pre_mlp_layernorm.weight",
)
"""A layer's parameters that units own something of."""
HEAD_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
"""Of queries and keys, shared by all heads of a layer: they belong to the layer alone."""


@dataclass(frozen=True)
class Share:
    """What the units of one axis own of one tensor on this rank."""

    axis: str
    layer: int | None
    """Position of the tensor's layer in the model; None outside of the layers."""
    dim: int
    """The dimension that gets shorter when units are cut."""
    stride: int
    count: int
    matrices: tuple[tuple[str, int], ...]
    """Parts of a unit's slice that a method may tell apart, in order: name, number of weights."""

    @property
    def unit_numel(self) -> int:
        """Weights of one unit in this tensor."""
        return sum(weights for _, weights in self.matrices)


def shares_of(name: str, model: ModelConfig, shape: Shape, tp: int) -> tuple[Share, ...]:
    """Say who owns what of a parameter.

    Args:
        name: as ``named_parameters`` gives it, with the layer's position in the model.
        shape: of the whole model as it is stored.
        tp: ranks that neurons, groups and the vocabulary are split over.
    Returns: one share an axis, for the axes that the tensor has.
    """
    found = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if found is None:
        return _shares(name, _model_tensor(name, model.vocab_size // tp, shape.hidden_size), None)
    position, tensor = int(found[1]), found[2]
    layer = shape.layers[position]
    dims = _layer_tensor(tensor, layer, shape.hidden_size, model.kv_channels, tp)
    numel = math.prod(dim.size for dim in dims)
    whole = Share("num_layers", position, 0, numel, 1, ((_plain(tensor), numel),))
    return (*_shares(tensor, dims, position), whole)


def whole_shapes(model: ModelConfig, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name every parameter of a model with its shape over all tensor-parallel ranks."""
    names = [EMBEDDING, "decoder.final_layernorm.weight"]
    if not model.share_embeddings_and_output_weights:
        names.append("output_layer.weight")
    for name in names:
        dims = _model_tensor(name, model.vocab_size, shape.hidden_size)
        yield name, tuple(dim.size for dim in dims)
    tensors = [*LAYER_TENSORS, *(HEAD_NORMS if model.qk_layernorm else ())]
    for position, layer in enumerate(shape.layers):
        for tensor in tensors:
            dims = _layer_tensor(tensor, layer, shape.hidden_size, model.kv_channels, tp=1)
            yield f"decoder.layers.{position}.{tensor}", tuple(dim.size for dim in dims)


def cut(whole: Tensor, share: Share, keep: Tensor, count: int | None = None) -> Tensor:
    """Keep the units ``keep`` (int64, indices on this rank) of a tensor, in that order.

    Where a tensor has several axes, they are cut in the order of its dimensions.

    Args:
        count: units to return; what ``keep`` does not fill is zeros. None: as many as are kept.
    Returns: a tensor of another length in dimension ``share.dim``.
    """
    parts = whole.reshape(-1, share.count, share.stride).index_select(1, keep)
    if count is not None and count > len(keep):
        parts = F.pad(parts, (0, 0, 0, count - len(keep)))
    shape = list(whole.shape)
    shape[share.dim] = shape[share.dim] // share.count * parts.shape[1]
    return parts.reshape(shape)


def lines(sums: Tensor, share: Share) -> Tensor:
    """Bring one number a row of a tensor, or one a column, to the units that have them.

    Args:
        sums: [rows] of the tensor if ``share.dim`` is 0, else [columns].
    Returns: [lines of a unit, count], in their order in the tensor.
    """
    length = share.unit_numel * share.count // sums.numel()  # of a row, or of a column
    inner = share.stride // length if share.dim == 0 else share.stride
    return sums.view(-1, share.count, inner).transpose(1, 2).reshape(-1, share.count)


def fold(sums: Tensor, share: Share, reduction: str = "sum") -> Tensor:
    """Reduce what ``lines`` takes to one number for each matrix of each unit.

    Args:
        reduction: ``max`` takes the largest, any other adds up.
    Returns: [matrices, count], in the order of ``share.matrices``.
    """
    of_units = lines(sums, share)
    if len(of_units) == len(share.matrices):
        return of_units
    length = share.unit_numel // len(of_units)
    parts = of_units.split([number // length for _, number in share.matrices])
    return torch.stack([part.amax(0) if reduction == "max" else part.sum(0) for part in parts])


@dataclass(frozen=True)
class Block:
    """A piece of a flat shard that is a view [rows, units, width] of whole or broken units."""

    begin: int
    """Of the shard's elements, the first."""
    rows: int
    units: int
    width: int
    unit: int
    """The first of ``units``, which follow each other."""
    row: int
    """Outer index of the first row in a unit's slice [outer, stride]."""
    column: int
    """Index of the first of ``width`` elements in a row of the slice."""

    def of(self, flat: Tensor) -> Tensor:
        """View this piece of a shard [end - start] as [rows, units, width]."""
        n = self.rows * self.units * self.width
        return flat[self.begin : self.begin + n].view(self.rows, self.units, self.width)


def blocks(share: Share, start: int, end: int) -> list[Block]:
    """Cut the flat shard [start, end) of a tensor into at most five pieces.

    In order: the rest of a broken unit, whole units to the end of a row of all units, whole rows,
    whole units, the beginning of a unit. What is done to units of a shard is done to each piece.
    """
    period = share.stride * share.count
    found = []
    at = start
    while at < end:
        row, in_row = divmod(at, period)
        unit, column = divmod(in_row, share.stride)
        left = end - at
        if column or left < share.stride:  # a broken unit
            rows, units, width = 1, 1, min(share.stride - column, left)
        elif unit or left < period:
            rows, units, width = 1, min(share.count - unit, left // share.stride), share.stride
        else:
            rows, units, width = left // period, share.count, share.stride
        found.append(Block(at - start, rows, units, width, unit, row, column))
        at += rows * units * width
    return found


@dataclass(frozen=True)
class _Dim:
    """A dimension [outer, count, inner] of which the middle are the units of ``axis``."""

    axis: str | None
    count: int
    outer: int = 1
    inner: int = 1
    parts: tuple[tuple[str, int], ...] = ()
    """Of a unit's slice: name and relative size; none where a method can tell nothing apart."""

    @property
    def size(self) -> int:
        return self.outer * self.count * self.inner


def _plain(tensor: str) -> str:
    """Return the last word of a parameter's name."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def _model_tensor(name: str, vocabulary: int, hidden_size: int) -> list[_Dim]:
    channels = _Dim("hidden_size", hidden_size)
    if name in (EMBEDDING, "output_layer.weight"):
        return [_Dim(None, vocabulary), channels]
    assert name == "decoder.final_layernorm.weight", f"who owns {name}?"
    return [channels]


def _layer_tensor(tensor: str, layer: LayerShape, hidden_size: int, kv: int, tp: int) -> list[_Dim]:
    f, g, q = layer.ffn_hidden_size // tp, layer.num_query_groups // tp, layer.heads_per_group
    channels = _Dim("hidden_size", hidden_size)
    neurons, groups = "ffn_hidden_size", "num_query_groups"
    match tensor.removesuffix(".weight"):
        case "mlp.linear_fc1":
            return [_Dim(neurons, f, outer=2, parts=(("gate", 1), ("up", 1))), channels]
        case "mlp.linear_fc2":
            return [channels, _Dim(neurons, f, parts=(("down", 1),))]
        case "self_attention.linear_qkv":
            parts = (("query", q), ("key", 1), ("value", 1))
            return [_Dim(groups, g, inner=(q + 2) * kv, parts=parts), channels]
        case "self_attention.linear_proj":
            return [channels, _Dim(groups, g, inner=q * kv, parts=(("projection", 1),))]
        case "self_attention.q_layernorm" | "self_attention.k_layernorm":
            return [_Dim(None, kv)]
        case "input_layernorm" | "pre_mlp_layernorm":
            return [channels]
    raise AssertionError(f"who owns {tensor} of a layer?")


def _shares(name: str, dims: list[_Dim], layer: int | None) -> tuple[Share, ...]:
    shares = []
    numel = math.prod(dim.size for dim in dims)
    for index, dim in enumerate(dims):
        if dim.axis is None:
            continue
        stride = dim.inner * math.prod(later.size for later in dims[index + 1 :])
        parts = dim.parts or ((_plain(name), 1),)
        unit = numel // dim.count // sum(size for _, size in parts)
        matrices = tuple((part, size * unit) for part, size in parts)
        shares.append(Share(dim.axis, layer, index, stride, dim.count, matrices))
    return tuple(shares)
