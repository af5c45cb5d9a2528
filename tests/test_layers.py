"""Norm, attention core and prunable MLP against their formulas, values and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from jobs import built, core_config, ffn_shape, on_ranks
from torch import Tensor

from megatron_idea.config import Config, replace
from megatron_idea.testing import assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups
    from megatron_idea.engine.layers import PrunableMLP
    from megatron_idea.shape import Shape


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(y: Tensor, dy: Tensor, of: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, of, dy))


@on_ranks(1)
def test_rmsnorm_is_its_formula_and_torchs(groups: ProcessGroups, config: Config) -> None:
    from megatron_idea.engine.layers import RMSNorm

    core = core_config(config)
    norm = RMSNorm(core, 24, eps=1e-3).to("cpu")
    norm.weight.data.copy_(1 + draw(24, seed=1))
    # The smallest rows are those that feel eps.
    x = (draw(5, 3, 24) * torch.logspace(-3, 2, 5)[:, None, None]).requires_grad_()
    dy = draw(5, 3, 24, seed=2)
    y = norm(x)
    dx, d_weight = gradients(y, dy, [x, norm.weight])

    theirs = torch.nn.RMSNorm(24, eps=1e-3)
    theirs.weight.data.copy_(norm.weight.data)
    assert_equal(y, theirs(x), "y against torch's")

    x64 = x.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    formula = x64 / torch.sqrt((x64**2).mean(-1, keepdim=True) + 1e-3) * weight
    expected_dx, expected_d_weight = gradients(formula, dy.double(), [x64, weight])
    assert_close(y, formula, "y")
    assert_close(dx, expected_dx, "dx")
    assert_close(d_weight, expected_d_weight, "dweight")


@on_ranks(1)
def test_a_norm_starts_at_one_and_says_whether_tokens_are_split(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron_idea.engine.layers import RMSNorm

    core = core_config(config)
    for split in (False, True):
        core.sequence_parallel = split
        norm = RMSNorm(core, 24)
        assert norm.weight.sequence_parallel is split
        assert bool((norm.weight == 1).all())


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v under a causal mask, one head at a time: [s, b, heads, c] tensors."""
    s, b, heads, _ = q.shape
    per_group = heads // k.shape[2]
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    out = torch.empty_like(q)
    for batch in range(b):
        for head in range(heads):
            keys, values = (x[:, batch, head // per_group] for x in (k, v))
            scores = (q[:, batch, head] @ keys.T) * scale
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            out[:, batch, head] = weights @ values
    return out.reshape(s, b, -1)


@pytest.mark.parametrize(
    ("seq", "groups_kv", "scale"),
    # Multi-head, grouped, one key head for all; an odd length; a single token; a scale of its own.
    [(8, 4, None), (8, 2, None), (8, 1, None), (7, 2, None), (1, 2, None), (8, 2, 0.3)],
)
@on_ranks(1)
def test_attention_is_explicit_causal_softmax(
    groups: ProcessGroups, config: Config, seq: int, groups_kv: int, scale: float | None
) -> None:
    from megatron_idea.engine.layers import ScaledDotProductAttention

    attention = ScaledDotProductAttention(core_config(config), 1, None, "self", softmax_scale=scale)
    inputs = [
        draw(seq, 3, heads, 6, seed=i).requires_grad_()
        for i, heads in enumerate((4, groups_kv, groups_kv))
    ]
    dy = draw(seq, 3, 24, seed=9)
    y = attention(*inputs, None)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = explicit_attention(*doubles, scale or 6**-0.5)
    assert_close(y, expected, "y")
    names = ("dquery", "dkey", "dvalue")
    pairs = zip(
        gradients(y, dy, inputs), gradients(expected, dy.double(), doubles), names, strict=True
    )
    for ours, theirs, name in pairs:
        # Up to seq x heads terms of either sign add up.
        assert_close(ours, theirs, name, tolerance=3e-6)


@on_ranks(1)
def test_attention_drops_out_in_training_only(groups: ProcessGroups, config: Config) -> None:
    from megatron_idea.engine.layers import ScaledDotProductAttention

    core = core_config(replace(config, model={"attention_dropout": 0.5}))
    attention = ScaledDotProductAttention(core, 1, None, "self")
    q = draw(8, 2, 2, 4)
    assert not torch.equal(attention(q, q, q, None), attention(q, q, q, None))
    attention.eval()
    assert_equal(attention(q, q, q, None), attention(q, q, q, None))


def first_mlp(groups: ProcessGroups, config: Config, shape: Shape | None = None) -> Any:
    """The first layer's MLP of a fresh model."""
    from megatron_idea.engine.model import prunable_mlps

    return next(prunable_mlps(built(groups, config, shape)))[1]


def run(mlp: PrunableMLP, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Activation, output and all gradients of one forward and backward."""
    seen: dict[str, Tensor] = {}
    hook = mlp.linear_fc2.register_forward_pre_hook(
        lambda _, args: seen.update(activation=args[0].detach().clone())
    )
    x = x.clone().requires_grad_()
    y, bias = mlp(x)
    hook.remove()
    assert bias is None
    fc1, fc2 = mlp.linear_fc1.weight, mlp.linear_fc2.weight
    names = ("dx", "dfc1", "dfc2")
    return seen | {"y": y.detach()} | dict(zip(names, gradients(y, dy, [x, fc1, fc2]), strict=True))


def rows(mask: Tensor) -> Tensor:
    """fc1's rows of the marked neurons."""
    return torch.cat([mask, mask])


@on_ranks(1)
def test_the_mlp_is_its_formula(groups: ProcessGroups, config: Config) -> None:
    mlp, x, dy = first_mlp(groups, config), draw(5, 2, 16), draw(5, 2, 16, seed=1)
    mlp.linear_fc1.weight.data.mul_(20)  # far from where silu is linear
    ours = run(mlp, x, dy)
    x64, fc1, fc2 = (
        t.detach().double().requires_grad_()
        for t in (x, mlp.linear_fc1.weight, mlp.linear_fc2.weight)
    )
    gate, up = x64 @ fc1[:24].T, x64 @ fc1[24:].T
    y = (gate * torch.sigmoid(gate) * up) @ fc2.T
    assert_close(ours["y"], y, "y")
    expected = gradients(y, dy.double(), [x64, fc1, fc2])
    for name, gradient in zip(("dx", "dfc1", "dfc2"), expected, strict=True):
        # Sums of terms of either sign, larger than what is left of them.
        assert_close(ours[name], gradient, name, tolerance=3e-6)


@on_ranks(1)
def test_a_masked_neuron_is_silent_and_has_no_gradient(
    groups: ProcessGroups, config: Config
) -> None:
    mlp, x, dy = first_mlp(groups, config), draw(5, 2, 16), draw(5, 2, 16, seed=1)
    alive = torch.arange(24) % 3 > 0
    mlp.set_alive(alive)
    result = run(mlp, x, dy)
    assert not result["activation"][..., ~alive].any()
    assert not result["dfc1"][rows(~alive)].any()
    assert not result["dfc2"][:, ~alive].any()
    # The living are heard in all three matrices.
    assert result["activation"][..., alive].any(dim=(0, 1)).all()
    assert result["dfc1"][rows(alive)].any(dim=1).all()
    assert result["dfc2"][:, alive].any(dim=0).all()


@on_ranks(1)
def test_garbage_in_a_masked_neuron_changes_nothing_bit_for_bit(
    groups: ProcessGroups, config: Config
) -> None:
    mlp, x, dy = first_mlp(groups, config), draw(5, 2, 16), draw(5, 2, 16, seed=1)
    dead = torch.arange(24) % 3 == 0
    mlp.set_alive(~dead)
    before = run(mlp, x, dy)
    mlp.linear_fc1.weight.data[rows(dead)] = 1e4 * draw(16, 16, seed=2)
    mlp.linear_fc2.weight.data[:, dead] = 1e4 * draw(16, 8, seed=3)
    after = run(mlp, x, dy)
    for name, value in before.items():
        assert_equal(after[name], value, name)


@on_ranks(1)
def test_masking_is_computing_without_those_neurons(groups: ProcessGroups, config: Config) -> None:
    mlp, x, dy = first_mlp(groups, config), draw(5, 2, 16), draw(5, 2, 16, seed=1)
    alive = torch.arange(24) < 14
    narrow = first_mlp(groups, config, ffn_shape(config, (14, 24)))
    narrow.linear_fc1.weight.data.copy_(mlp.linear_fc1.weight.data[rows(alive)])
    narrow.linear_fc2.weight.data.copy_(mlp.linear_fc2.weight.data[:, alive])
    mlp.set_alive(alive)
    masked, cut = run(mlp, x, dy), run(narrow, x, dy)
    assert_close(masked["y"], cut["y"], "y")
    assert_close(masked["dx"], cut["dx"], "dx")
    assert_close(masked["dfc1"][rows(alive)], cut["dfc1"], "dfc1")
    assert_close(masked["dfc2"][:, alive], cut["dfc2"], "dfc2")


@on_ranks(1)
def test_who_is_alive_is_not_the_layers_to_keep(groups: ProcessGroups, config: Config) -> None:
    mlp, x = first_mlp(groups, config), draw(5, 2, 16)
    whole, _ = mlp(x)
    stored = set(mlp.state_dict())
    alive = torch.arange(24) > 3
    mlp.set_alive(alive)
    masked, _ = mlp(x)
    assert not torch.equal(masked, whole)
    assert set(mlp.state_dict()) == stored and not list(mlp.buffers()), "a checkpoint knows of it"
    mlp.set_alive(torch.ones(24, dtype=torch.bool))
    assert_equal(mlp(x)[0], whole, "with all alive")
    mlp.set_alive(torch.zeros(24, dtype=torch.bool))
    assert not mlp(x)[0].any()
    with pytest.raises(AssertionError):
        mlp.set_alive(alive[1:])


@on_ranks(1)
def test_each_layers_width_is_its_own_not_the_configs(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron_idea.engine.model import prunable_mlps

    chunks = built(groups, config, ffn_shape(config, (10, 18)))
    mlps = [mlp for _, mlp in prunable_mlps(chunks)]
    assert chunks[0].config.ffn_hidden_size == 24
    assert [mlp.width for mlp in mlps] == [10, 18]
    assert [tuple(mlp.linear_fc1.weight.shape) for mlp in mlps] == [(20, 16), (36, 16)]
    assert [tuple(mlp.linear_fc2.weight.shape) for mlp in mlps] == [(16, 10), (16, 18)]


@on_ranks(2, tensor_model_parallel_size=2)
def test_each_tensor_parallel_rank_silences_its_own_neurons(
    groups: ProcessGroups, config: Config
) -> None:
    mlp = first_mlp(groups, config)
    rank = groups.tp.rank()
    assert mlp.width == 12
    x, dy = draw(4, 2, 16, seed=rank), draw(4, 2, 16, seed=2 + rank)  # each has its own tokens
    dead = torch.arange(12 * rank, 12 * rank + 12) % 5 == 0
    mlp.set_alive(~dead)
    before = run(mlp, x, dy)
    assert not before["dfc1"][rows(dead)].any()
    assert not before["dfc2"][:, dead].any()
    mlp.linear_fc1.weight.data[rows(dead)] = 1e4
    mlp.linear_fc2.weight.data[:, dead] = -1e4
    after = run(mlp, x, dy)
    for name, value in before.items():
        assert_equal(after[name], value, name)
