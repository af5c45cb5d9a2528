"""The table of axes against slices written by hand, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_idea.config import ModelConfig
from megatron_idea.prune.axis import AXES, Share, blocks, cut, fold, shares_of
from megatron_idea.shape import LAYER_AXES, Shape

H, F, GROUPS, HEADS, KV, TP, VOCABULARY = 6, 8, 4, 2, 3, 2, 10
MODEL = ModelConfig(
    num_layers=2, hidden_size=H, ffn_hidden_size=F, num_attention_heads=GROUPS * HEADS,
    num_query_groups=GROUPS, kv_channels=2 * KV, vocab_size=VOCABULARY,
)  # fmt: skip
f, g, kv = F // TP, GROUPS // TP, 2 * KV
SHAPE = Shape.full(MODEL)
LAYER = "decoder.layers.1."


def _rows(whole: Tensor, keep: list[int], size: int) -> Tensor:
    return torch.cat([whole[size * unit : size * (unit + 1)] for unit in keep])


def _columns(whole: Tensor, keep: list[int], size: int) -> Tensor:
    return torch.cat([whole[:, size * unit : size * (unit + 1)] for unit in keep], dim=1)


CASES: list[tuple[str, tuple[int, ...], str, Callable[[Tensor, list[int]], Tensor]]] = [
    ("mlp.linear_fc1.weight", (2 * f, H), "ffn_hidden_size",
     lambda w, keep: torch.cat([_rows(w[:f], keep, 1), _rows(w[f:], keep, 1)])),
    ("mlp.linear_fc1.weight", (2 * f, H), "hidden_size", lambda w, keep: _columns(w, keep, 1)),
    ("mlp.linear_fc2.weight", (H, f), "ffn_hidden_size", lambda w, keep: _columns(w, keep, 1)),
    ("mlp.linear_fc2.weight", (H, f), "hidden_size", lambda w, keep: _rows(w, keep, 1)),
    ("self_attention.linear_qkv.weight", (g * (HEADS + 2) * kv, H), "num_query_groups",
     lambda w, keep: _rows(w, keep, (HEADS + 2) * kv)),
    ("self_attention.linear_qkv.weight", (g * (HEADS + 2) * kv, H), "hidden_size",
     lambda w, keep: _columns(w, keep, 1)),
    ("self_attention.linear_proj.weight", (H, g * HEADS * kv), "num_query_groups",
     lambda w, keep: _columns(w, keep, HEADS * kv)),
    ("self_attention.linear_proj.weight", (H, g * HEADS * kv), "hidden_size",
     lambda w, keep: _rows(w, keep, 1)),
    ("input_layernorm.weight", (H,), "hidden_size", lambda w, keep: w[keep]),
    ("pre_mlp_layernorm.weight", (H,), "hidden_size", lambda w, keep: w[keep]),
    ("embedding.word_embeddings.weight", (VOCABULARY // TP, H), "hidden_size",
     lambda w, keep: _columns(w, keep, 1)),
    ("output_layer.weight", (VOCABULARY // TP, H), "hidden_size",
     lambda w, keep: _columns(w, keep, 1)),
    ("decoder.final_layernorm.weight", (H,), "hidden_size", lambda w, keep: w[keep]),
]  # fmt: skip
OF_THE_MODEL = ("embedding", "output_layer", "decoder.final")


def _share(tensor: str, axis: str) -> Share:
    name = tensor if tensor.startswith(OF_THE_MODEL) else LAYER + tensor
    (share,) = [s for s in shares_of(name, MODEL, SHAPE, TP) if s.axis == axis]
    return share


@pytest.mark.parametrize(("tensor", "size", "axis", "by_hand"), CASES)
def test_the_generic_cut_is_the_one_by_hand(
    tensor: str, size: tuple[int, ...], axis: str, by_hand: Callable[[Tensor, list[int]], Tensor]
) -> None:
    share = _share(tensor, axis)
    whole = torch.randn(size)
    keep = [share.count - 1, 0]  # in this order
    expected = by_hand(whole, keep)
    assert torch.equal(cut(whole, share, torch.tensor(keep)), expected)
    assert share.count * share.stride <= whole.numel() and whole.numel() % share.count == 0
    # What is a unit's by the formula is what the cut keeps of it.
    owner = torch.arange(whole.numel()) // share.stride % share.count
    alone = cut(whole, share, torch.tensor(keep[:1]))
    assert sorted(whole.flatten()[owner == keep[0]].tolist()) == sorted(alone.flatten().tolist())


@pytest.mark.parametrize(("tensor", "size", "axis", "by_hand"), CASES)
def test_matrices_add_up_to_a_units_weights(
    tensor: str, size: tuple[int, ...], axis: str, by_hand: object
) -> None:
    share = _share(tensor, axis)
    weights = torch.Size(size).numel() // share.count
    assert sum(number for _, number in share.matrices) == weights


def _sums_by_hand(whole: Tensor, share: Share, reduction: str) -> Tensor:
    """[matrices, count] from the weights of one unit after the other."""
    owner = torch.arange(whole.numel()) // share.stride % share.count
    reduce = torch.amax if reduction == "max" else torch.sum
    units = [
        [reduce(part, 0) for part in whole.flatten()[owner == unit].split(sizes)]
        for unit in range(share.count)
        for sizes in ([number for _, number in share.matrices],)
    ]
    return torch.tensor(units, dtype=whole.dtype).t()


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("axis", AXES)
def test_folded_rows_or_columns_are_the_sums_over_what_units_own(axis: str, reduction: str) -> None:
    found = 0
    for tensor, size, *_ in CASES:
        name = tensor if tensor.startswith(OF_THE_MODEL) else LAYER + tensor
        for share in [s for s in shares_of(name, MODEL, SHAPE, TP) if s.axis == axis]:
            whole = torch.rand(size, dtype=torch.float64)
            lines = whole.view(-1, 1) if whole.dim() == 1 else whole.movedim(share.dim, 0)
            lines = lines.amax(1) if reduction == "max" else lines.sum(1)
            expected = _sums_by_hand(whole, share, reduction)
            torch.testing.assert_close(fold(lines, share, reduction), expected, msg=tensor)
            found += 1
    assert found >= 2


def test_parts_of_a_slice_are_in_the_order_of_memory() -> None:
    # A group's slice of linear_qkv: its query heads, then its key, then its value.
    share = _share("self_attention.linear_qkv.weight", "num_query_groups")
    assert share.matrices == (("query", HEADS * kv * H), ("key", kv * H), ("value", kv * H))
    share = _share("mlp.linear_fc1.weight", "ffn_hidden_size")
    assert share.matrices == (("gate", H), ("up", H))


def test_a_layer_owns_all_of_its_tensors_and_nothing_else() -> None:
    norms = ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    for tensor in [case[0] for case in CASES] + norms:
        name = tensor if tensor.startswith(OF_THE_MODEL) else LAYER + tensor
        wholes = [s for s in shares_of(name, MODEL, SHAPE, TP) if s.axis == "num_layers"]
        assert [(s.layer, s.count) for s in wholes] == ([] if name == tensor else [(1, 1)])


def test_norms_of_heads_belong_to_no_group() -> None:
    shares = shares_of(LAYER + "self_attention.q_layernorm.weight", MODEL, SHAPE, TP)
    assert [share.axis for share in shares] == ["num_layers"]


def test_every_share_is_of_a_known_axis_and_of_one_layer_where_units_are_per_layer() -> None:
    for tensor, _, axis, _ in CASES:
        share = _share(tensor, axis)
        assert (share.layer is not None) or axis not in LAYER_AXES


def test_an_unknown_tensor_is_refused() -> None:
    for name in (LAYER + "mlp.router.weight", "vision.weight"):
        with pytest.raises(AssertionError, match="who owns"):
            shares_of(name, MODEL, SHAPE, TP)


@pytest.mark.parametrize(("tensor", "size", "axis", "by_hand"), CASES)
def test_blocks_of_any_shard_say_whose_each_element_is(
    tensor: str, size: tuple[int, ...], axis: str, by_hand: object
) -> None:
    share = _share(tensor, axis)
    numel = torch.Size(size).numel()
    places = torch.arange(numel)
    for start in range(0, numel, 5):
        for end in range(start, numel + 1, 7):
            pieces = blocks(share, start, end)
            assert len(pieces) <= 5
            covered = []
            for piece in pieces:
                view = piece.of(places[start:end])
                covered += view.flatten().tolist()
                units = torch.arange(piece.unit, piece.unit + piece.units)[None, :, None]
                assert bool((view // share.stride % share.count == units).all())
                rows = torch.arange(piece.row, piece.row + piece.rows)[:, None, None]
                columns = torch.arange(piece.column, piece.column + piece.width)
                expected = (rows * share.count + units) * share.stride + columns
                assert torch.equal(view, expected)
            assert covered == list(range(start, end))
