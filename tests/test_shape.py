"""Counts of a shape against megatron-core's own model and against hand-counted numbers."""

from __future__ import annotations

import json

import pytest

from megatron_idea.config import ModelConfig
from megatron_idea.shape import AXES, Shape

MODEL = ModelConfig(
    num_layers=3, hidden_size=32, ffn_hidden_size=64, num_attention_heads=6,
    num_query_groups=3, kv_channels=8, vocab_size=264, qk_layernorm=True,
)  # fmt: skip
FULL = Shape.full(MODEL)


def test_the_full_shape_has_what_the_configuration_says() -> None:
    assert [FULL.counts(axis) for axis in AXES] == [(64, 64, 64), (3, 3, 3), (32,), (3,)]
    assert [layer.heads_per_group for layer in FULL.layers] == [2, 2, 2]


def test_parameters_are_those_of_the_tensors() -> None:
    layer = 4 * 32 * 6 * 8 // 2 + 2 * 32 * 3 * 8 + 3 * 32 * 64 + 2 * 32 + 2 * 8
    assert FULL.parameters(MODEL).total == 264 * 32 + 3 * layer + 32


@pytest.mark.parametrize(
    ("axis", "counts", "fewer"),
    [
        ("ffn_hidden_size", 40, 3 * 24 * 3 * 32),
        ("ffn_hidden_size", (64, 40, 64), 24 * 3 * 32),
        ("num_query_groups", 2, 3 * (2 * 2 + 2) * 8 * 32),
    ],
)
def test_units_of_a_layer_take_their_weights_along(axis: str, counts: object, fewer: int) -> None:
    small = FULL.with_counts(axis, counts)  # type: ignore[arg-type]
    assert FULL.parameters(MODEL).total - small.parameters(MODEL).total == fewer


def test_a_smaller_hidden_size_shrinks_every_tensor_but_norms_of_heads() -> None:
    small = FULL.with_counts("hidden_size", 16)
    of_heads = 3 * 2 * 8
    assert 2 * (small.parameters(MODEL).total - of_heads) == FULL.parameters(MODEL).total - of_heads


def test_layers_keep_their_number_when_others_go() -> None:
    small = FULL.with_layers([0, 2])
    assert [layer.number for layer in small.layers] == [0, 2]
    assert small.num_layers == 2 and small.counts("num_layers") == (2,)
    with pytest.raises(AssertionError, match="no layers"):
        small.with_layers([1])


def test_flops_are_six_a_weight_and_six_a_head_element_and_token() -> None:
    count = FULL.parameters(MODEL)
    heads = 3 * 6 * 8 * 128
    expected = 6 * (count.attention + count.ffn + 264 * 32) + 6 * heads
    assert FULL.flops_per_token(MODEL, 128) == expected


def test_a_shape_survives_json() -> None:
    shape = FULL.with_counts("ffn_hidden_size", (8, 16, 24)).with_layers([1, 2])
    assert Shape.from_dict(json.loads(json.dumps(shape.as_dict()))) == shape
