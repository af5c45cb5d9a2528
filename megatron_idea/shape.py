"""How many units of each kind a model stores. A model is built from its config and its shape.

The axes carry the names that the model's configuration has for them:

    ffn_hidden_size    neurons of a layer's FFN
    num_query_groups   key/value heads of a layer, each with its query heads
    hidden_size        channels of the residual stream, one number for the whole model
    num_layers         decoder layers

No torch here: planning, training and reports count parameters and FLOPs with the same functions.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_idea.config import AxisGoal, ModelConfig

UNITS = {
    "ffn_hidden_size": "neuron",
    "num_query_groups": "KV group",
    "hidden_size": "channel",
    "num_layers": "layer",
}
"""What one unit of each axis is called."""
AXES = tuple(UNITS)
LAYER_AXES = ("ffn_hidden_size", "num_query_groups")
"""Axes with a count for each layer."""


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer stores."""

    number: int
    """The layer's number in the enlarged model, from 0; it stays when other layers are removed."""
    ffn_hidden_size: int
    num_query_groups: int
    heads_per_group: int
    """Query heads that share one key/value head."""


@dataclass(frozen=True)
class ParameterCount:
    """Weights of a model by where they are; a tied embedding counts once."""

    total: int
    embedding: int
    attention: int
    ffn: int
    norm: int


@dataclass(frozen=True)
class Shape:
    """Stored units of every axis, over all tensor- and pipeline-parallel ranks."""

    hidden_size: int
    layers: tuple[LayerShape, ...]

    @staticmethod
    def full(model: ModelConfig) -> Shape:
        """Return the shape of the enlarged model, before anything is removed."""
        heads = model.num_attention_heads // model.num_query_groups
        layer = (model.ffn_hidden_size, model.num_query_groups, heads)
        return Shape(
            model.hidden_size, tuple(LayerShape(n, *layer) for n in range(model.num_layers))
        )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def counts(self, axis: str) -> tuple[int, ...]:
        """Return the stored units of an axis: one number a layer, or one for the model."""
        if axis in LAYER_AXES:
            return tuple(getattr(layer, axis) for layer in self.layers)
        return (getattr(self, axis),)

    def by_number(self, num_layers: int) -> dict[str, list[int]]:
        """Return the stored units of all axes, 0 for layers of the enlarged model that are gone."""
        layers = {layer.number: layer for layer in self.layers}
        counts = {
            axis: [getattr(layers[n], axis) if n in layers else 0 for n in range(num_layers)]
            for axis in LAYER_AXES
        }
        return counts | {"hidden_size": [self.hidden_size], "num_layers": [self.num_layers]}

    def with_counts(self, axis: str, counts: int | Sequence[int]) -> Shape:
        """Return a copy with other counts on ``axis``; an int stands for every layer.

        Fewer layers are the first ones: which go is not known where layers are only counted.
        """
        if axis == "num_layers":
            (num_layers,) = [counts] if isinstance(counts, int) else counts
            return dataclasses.replace(self, layers=self.layers[:num_layers])
        if axis == "hidden_size":
            (hidden_size,) = [counts] if isinstance(counts, int) else counts
            return dataclasses.replace(self, hidden_size=hidden_size)
        assert axis in LAYER_AXES, axis
        each = [counts] * self.num_layers if isinstance(counts, int) else counts
        layers = (
            dataclasses.replace(layer, **{axis: count})
            for layer, count in zip(self.layers, each, strict=True)
        )
        return dataclasses.replace(self, layers=tuple(layers))

    def with_layers(self, numbers: Iterable[int]) -> Shape:
        """Return a copy with only the layers of these original numbers, in their present order."""
        wanted = set(numbers)
        kept = tuple(layer for layer in self.layers if layer.number in wanted)
        assert len(kept) == len(wanted), f"no layers {wanted - {layer.number for layer in kept}}"
        return dataclasses.replace(self, layers=kept)

    def parameters(self, model: ModelConfig) -> ParameterCount:
        """Count the weights of a model of this shape; ``model`` says what no axis changes."""
        hidden, kv = self.hidden_size, model.kv_channels
        embedding = model.vocab_size * hidden
        if not model.share_embeddings_and_output_weights:
            embedding *= 2
        # Queries and output projection for each head, keys and values for each group.
        heads = sum(
            layer.num_query_groups * (2 * layer.heads_per_group + 2) for layer in self.layers
        )
        attention = heads * kv * hidden
        ffn = 3 * hidden * sum(self.counts("ffn_hidden_size"))
        norm = (2 * self.num_layers + 1) * hidden
        if model.qk_layernorm:
            norm += self.num_layers * 2 * kv
        return ParameterCount(
            total=embedding + attention + ffn + norm,
            embedding=embedding,
            attention=attention,
            ffn=ffn,
            norm=norm,
        )

    def kv_cache_values(self, model: ModelConfig) -> int:
        """Count the numbers that a server caches of one token: keys and values of all groups."""
        return 2 * sum(self.counts("num_query_groups")) * model.kv_channels

    def flops_per_token(self, model: ModelConfig, seq_length: int) -> int:
        """Count the FLOPs of training on one token: forward, and backward at twice the forward.

        6 x (attention + FFN + output layer weights) + 6 x query heads x kv_channels x seq_length.
        The second term is q k^T and the product with v; a causal token sees half of the sequence.
        """
        count = self.parameters(model)
        matmul = count.attention + count.ffn + model.vocab_size * self.hidden_size
        heads = sum(layer.num_query_groups * layer.heads_per_group for layer in self.layers)
        return 6 * matmul + 6 * heads * model.kv_channels * seq_length

    def is_within(self, full: Shape) -> bool:
        """Say whether an enlarged model of shape ``full`` can have become this."""
        numbers = [layer.number for layer in self.layers]
        return (
            self.hidden_size <= full.hidden_size
            and numbers == sorted(set(numbers))
            and 0 <= numbers[0] <= numbers[-1] < full.num_layers
            and all(
                0 < mine.ffn_hidden_size <= of_full.ffn_hidden_size
                and 0 < mine.num_query_groups <= of_full.num_query_groups
                and mine.heads_per_group == of_full.heads_per_group
                for mine in self.layers
                for of_full in [full.layers[mine.number]]
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a checkpoint's ``state.json`` keeps them."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Shape:
        """Read what ``as_dict`` wrote. Raises: KeyError, TypeError for anything else."""
        layers = tuple(LayerShape(**layer) for layer in values["layers"])
        return Shape(values["hidden_size"], layers)


def live_count(full: int, target: int, removed: float) -> int:
    """Count the units alive when ``removed`` of all that is to go has gone, rounded to nearest."""
    return round(full - removed * (full - target))


def round_up(count: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``count``; never zero."""
    return max(1, -(-count // multiple)) * multiple


def due_shape(
    shape: Shape,
    live: Mapping[str, Sequence[int]],
    layers: Sequence[int],
    goals: Mapping[str, AxisGoal],
    final: Collection[str],
) -> Shape:
    """Return what is to be stored after this step: ``shape``, or less where that is due.

    Shrinking is due when an axis could shed a whole block, and when one of ``final`` could shed
    anything. All axes then shrink together to what their live units need, so that between two
    compactions less than a block of each is computed in vain.

    A run that was resumed with more TP ranks may have counts that are no multiple any more; they
    stay until there is something to shed.

    Args:
        live: units by axis: one number for each layer of the enlarged model, or one.
        layers: numbers of the live layers, ascending.
        goals: of the axes that shrink.
        final: axes of which no more will be removed.
    """
    due, smaller = False, shape
    for axis, goal in goals.items():
        counts = shape.counts(axis)
        if axis == "num_layers":
            needed = (len(layers),)
        elif axis in LAYER_AXES:
            rows = [live[axis][layer.number] for layer in shape.layers]
            needed = tuple(
                min(round_up(n, goal.multiple), w) for n, w in zip(rows, counts, strict=True)
            )
        else:
            needed = (min(round_up(live[axis][0], goal.multiple), counts[0]),)
        gain = max(w - n for w, n in zip(counts, needed, strict=True))
        due |= gain >= goal.block or (axis in final and gain > 0)
        if axis != "num_layers":
            smaller = smaller.with_counts(axis, needed)
    return smaller.with_layers(layers) if due else shape


@lru_cache
def equal_shares(
    model: ModelConfig, parameters: int, legal: tuple[tuple[str, range], ...]
) -> Shape:
    """Shrink axes by one common share until at most ``parameters`` weights are left.

    The share is rounded to legal counts. What that leaves over goes to the axis whose legal counts
    differ least in weights. The size never falls when ``parameters`` grows.

    Args:
        legal: legal counts of each axis that shrinks, ascending, up to the enlarged one.

    Returns: the least shape, where that has more weights than ``parameters``.
    """
    full, counts_of = Shape.full(model), dict(legal)
    steps = max(1, *(len(counts) - 1 for counts in counts_of.values()))

    def resized(counts: Mapping[str, int]) -> Shape:
        shape = full
        for axis, count in counts.items():
            shape = shape.with_counts(axis, count)
        return shape

    def size(counts: Mapping[str, int]) -> int:
        return resized(counts).parameters(model).total

    def at(share: int) -> dict[str, int]:
        """Counts once ``share`` of ``steps`` have gone, to the nearest legal ones."""
        return {
            axis: counts[-1 - (2 * share * (len(counts) - 1) + steps) // (2 * steps)]
            for axis, counts in counts_of.items()
        }

    start = at(0)
    finest = min(
        (axis for axis, counts in counts_of.items() if len(counts) > 1),
        key=lambda axis: size(start) - size(start | {axis: counts_of[axis][-2]}),
        default=next(iter(counts_of)),
    )

    def filled(counts: Mapping[str, int]) -> dict[str, int]:
        choices = counts_of[finest]
        fit = bisect_right(choices, parameters, key=lambda count: size({**counts, finest: count}))
        return {**counts, finest: choices[max(0, fit - 1)]}

    share = bisect_left(range(steps), True, key=lambda share: size(at(share)) <= parameters)
    counts = filled(at(share))
    if counts[finest] == counts_of[finest][-1]:  # it has no more to give: less of the others goes
        before = filled(at(max(0, share - 1)))
        if size(counts) < size(before) <= parameters:
            counts = before
    return resized(counts)
