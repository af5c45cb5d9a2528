"""The GPT against plain PyTorch, its initial weights, names, widths and parameter count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import (
    backward,
    built,
    core_config,
    ffn_shape,
    on_ranks,
    random_tokens,
    run_job,
    small,
    whole,
)
from torch import Tensor

from megatron_idea.config import Config, ModelConfig, replace
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


def layer_names(layer: int, qk_layernorm: bool = True) -> list[str]:
    parts = [
        "input_layernorm",
        "self_attention.linear_proj",
        "self_attention.linear_qkv",
        "pre_mlp_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    ]
    if qk_layernorm:
        parts += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    return [f"decoder.layers.{layer}.{part}.weight" for part in parts]


def all_names(layers: int) -> set[str]:
    inner = {name for layer in range(layers) for name in layer_names(layer)}
    return inner | {EMBEDDING, "decoder.final_layernorm.weight"}


def weights(
    groups: ProcessGroups, config: Config, widths: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """This rank's initial weights by canonical name."""
    from megatron_idea.engine.model import named_parameters

    shape = ffn_shape(config, widths) if widths else None
    named = named_parameters(built(groups, config, shape))
    return {name: parameter.detach().float().cpu().numpy() for name, parameter in named}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@on_ranks(1)
def test_initial_weights_are_a_function_of_the_seed(groups: ProcessGroups, config: Config) -> None:
    first = weights(groups, config)
    torch.manual_seed(99)  # whatever else drew random numbers
    torch.randn(5)
    assert same(weights(groups, config), first)
    other = weights(groups, replace(config, training={"seed": 4321}))
    assert not any(np.array_equal(other[n], w) for n, w in first.items() if w.ndim > 1)


@on_ranks(1)
def test_initial_weights_are_a_function_of_the_name(groups: ProcessGroups, config: Config) -> None:
    two = weights(groups, config)
    three = weights(groups, replace(config, model={"num_layers": 3}))
    # The scale of what writes to the residual stream depends on the depth, its direction does not.
    for name, weight in two.items():
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        factor = math.sqrt(3 / 2) if residual else 1.0
        np.testing.assert_allclose(three[name] * factor, weight, rtol=1e-5)
    qkv = [two[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] for i in (0, 1)]
    assert not np.array_equal(*qkv)


@on_ranks(1)
def test_matrices_have_the_stated_deviation_and_norms_are_one(
    groups: ProcessGroups, config: Config
) -> None:
    config = replace(config, model={"hidden_size": 128, "vocab_size": 512, "init_method_std": 0.05})
    for name, weight in weights(groups, config, [200, 200]).items():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = 0.05 / math.sqrt(2 * 2) if residual else 0.05
        # Five standard errors: of a deviation 1 / sqrt(2 n), of a mean 1 / sqrt(n).
        assert abs(weight.std() / std - 1) < 5 / math.sqrt(2 * weight.size), name
        assert abs(weight.mean()) < 5 * std / math.sqrt(weight.size), name


@on_ranks(1)
def test_bf16_weights_are_the_fp32_ones_rounded(groups: ProcessGroups, config: Config) -> None:
    fp32 = weights(groups, config)
    bf16 = weights(groups, replace(config, training={"precision": "bf16"}))
    assert bf16.keys() == fp32.keys()
    for name, weight in fp32.items():
        rounded = torch.from_numpy(weight).bfloat16().float().numpy()
        assert np.array_equal(bf16[name], rounded), name


def test_tensor_parallel_shards_concatenate_to_the_whole(workers: Workers) -> None:
    config = small(model={"share_embeddings_and_output_weights": False})
    (whole,) = run_job(workers, weights, 1, config)
    split = replace(config, parallel={"tensor_model_parallel_size": 2})
    shards = run_job(workers, weights, 2, split)
    assert all(shard.keys() == whole.keys() for shard in shards)
    for name, expected in whole.items():
        left, right = (shard[name] for shard in shards)
        if expected.ndim == 1:
            assert np.array_equal(left, expected), name
            assert np.array_equal(right, expected), name
            continue
        if name.endswith("linear_fc1.weight"):  # gate rows, then up rows, on each rank
            (gate0, up0), (gate1, up1) = np.split(left, 2), np.split(right, 2)
            joined = np.concatenate([gate0, gate1, up0, up1])
        else:
            inner = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            joined = np.concatenate([left, right], axis=1 if inner else 0)
        assert np.array_equal(joined, expected), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("virtual", [1, 2])
def test_names_and_weights_are_the_whole_models_on_every_pipeline_stage(
    workers: Workers, virtual: int, tied: bool
) -> None:
    config = small(model={"num_layers": 4, "share_embeddings_and_output_weights": tied})
    widths = [24, 10, 18, 6]
    (whole,) = run_job(workers, weights, 1, config, widths)
    assert whole.keys() == all_names(4) | (set() if tied else {OUTPUT})
    pipeline = {
        "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": virtual,
    }  # fmt: skip
    first, last = run_job(workers, weights, 2, replace(config, parallel=pipeline), widths)
    for stage in (first, last):
        assert same(stage, {name: whole[name] for name in stage})
    owned = {1: ([0, 1], [2, 3]), 2: ([0, 2], [1, 3])}[virtual]
    for stage, layers in zip((first, last), owned, strict=True):
        present = {int(name.split(".")[2]) for name in stage if ".layers." in name}
        assert sorted(present) == layers
    # The last stage's output layer is the embedding when the two are tied.
    assert first.keys() & last.keys() == ({EMBEDDING} if tied else set())
    assert first.keys() | last.keys() == whole.keys()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qk_layernorm", [True, False], ids=["qk-norm", "no-qk-norm"])
def test_the_parameter_count_is_the_estimate_exactly(
    workers: Workers, qk_layernorm: bool, tied: bool
) -> None:
    config = small(
        model={
            "num_layers": 3, "qk_layernorm": qk_layernorm,
            "share_embeddings_and_output_weights": tied,
        }
    )  # fmt: skip
    for widths in ([24, 24, 24], [2, 24, 14]):
        (whole,) = run_job(workers, weights, 1, config, widths)
        shape = Shape.full(config.model).with_counts("ffn_hidden_size", widths)
        count = shape.parameters(config.model)
        assert sum(w.size for w in whole.values()) == count.total
        for part, marks in {
            "embedding": ("embedding", "output_layer"),
            "attention": ("linear_qkv", "linear_proj"),
            "ffn": ("linear_fc",),
            "norm": ("layernorm",),
        }.items():
            counted = sum(w.size for n, w in whole.items() if any(m in n for m in marks))
            assert counted == getattr(count, part), part


@on_ranks(2, tensor_model_parallel_size=2)
def test_layers_have_the_asked_widths_over_tensor_parallel_ranks(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron_idea.engine.model import prunable_mlps

    mlps = dict(prunable_mlps(built(groups, config, ffn_shape(config, [8, 20]))))
    assert {layer: mlp.width for layer, mlp in mlps.items()} == {0: 4, 1: 10}


def uneven(config: Config) -> Shape:
    """Other neurons and other KV groups in each layer, and fewer channels."""
    shape = ffn_shape(config, [24, 10]).with_counts("num_query_groups", [4, 2])
    return shape.with_counts("hidden_size", 12)


UNEVEN = {"num_attention_heads": 8, "num_query_groups": 4}


@on_ranks(2, tensor_model_parallel_size=2)
def test_layers_of_any_shape_train_over_tensor_parallel_ranks(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron_idea.engine.optimizer import update
    from megatron_idea.engine.trainable import assemble

    config = replace(config, model=UNEVEN)
    shape = uneven(config)
    trainable = assemble(config.sections, groups, shape, initialize=True)
    split = [p.numel() for p in trainable.parameters if p.tensor_model_parallel]
    common = [p.numel() for p in trainable.parameters if not p.tensor_model_parallel]
    assert 2 * sum(split) + sum(common) == shape.parameters(config.model).total
    for layer, stored in zip(trainable.chunks[0].module.decoder.layers, shape.layers, strict=True):
        attention = layer.self_attention
        assert attention.num_query_groups_per_partition == stored.num_query_groups // 2
        assert attention.num_attention_heads_per_partition == stored.num_query_groups
        assert layer.mlp.width == stored.ffn_hidden_size // 2
    backward(trainable)
    assert all(whole(trainable, p, "grad").any() for p in trainable.parameters)
    assert math.isfinite(update(trainable.optimizer, lr=1e-3))


class PlainGPT:
    """The model in plain PyTorch, one tensor per canonical name."""

    def __init__(self, model: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.model = model
        self.weights = weights

    def logits(self, tokens: Tensor) -> Tensor:
        """[b, s] token ids to [b, s, vocab_size]."""
        w = self.weights
        x = w[EMBEDDING][tokens]
        for layer in range(self.model.num_layers):
            x = x + self._attention(layer, self._norm(x, layer, "input_layernorm"))
            x = x + self._ffn(layer, self._norm(x, layer, "pre_mlp_layernorm"))
        x = self._rms(x, w["decoder.final_layernorm.weight"])
        return x @ w.get(OUTPUT, w[EMBEDDING]).T

    def _weight(self, layer: int, name: str) -> Tensor:
        return self.weights[f"decoder.layers.{layer}.{name}.weight"]

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return (
            x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.model.layernorm_epsilon) * weight
        )

    def _norm(self, x: Tensor, layer: int, name: str) -> Tensor:
        return self._rms(x, self._weight(layer, name))

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        m = self.model
        b, s, _ = x.shape
        per_group = m.num_attention_heads // m.num_query_groups
        # Rows of the fused projection: per group its queries, its key, its value.
        qkv = (x @ self._weight(layer, "self_attention.linear_qkv").T).view(
            b, s, m.num_query_groups, per_group + 2, m.kv_channels
        )
        q, k, v = qkv.split([per_group, 1, 1], dim=3)
        if m.qk_layernorm:
            q = self._norm(q, layer, "self_attention.q_layernorm")
            k = self._norm(k, layer, "self_attention.k_layernorm")
        q, k = self._rotate(q), self._rotate(k)
        scores = torch.einsum("bsgpc,btgc->bgpst", q, k[:, :, :, 0]) / math.sqrt(m.kv_channels)
        future = torch.ones(s, s, dtype=torch.bool).triu(1)
        attention = scores.masked_fill(future, -torch.inf).softmax(-1)
        out = torch.einsum("bgpst,btgc->bsgpc", attention, v[:, :, :, 0])
        return out.reshape(b, s, -1) @ self._weight(layer, "self_attention.linear_proj").T

    def _rotate(self, x: Tensor) -> Tensor:
        """RoPE on [b, s, ..., c]: channel i turns with channel c / 2 + i."""
        s, c = x.shape[1], x.shape[-1]
        frequency = 1.0 / self.model.rotary_base ** (torch.arange(0, c, 2) / c)
        angle = torch.outer(torch.arange(s).float(), frequency).view(1, s, 1, 1, c // 2)
        cos, sin = angle.cos(), angle.sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _ffn(self, layer: int, x: Tensor) -> Tensor:
        gate, up = (x @ self._weight(layer, "mlp.linear_fc1").T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self._weight(layer, "mlp.linear_fc2").T


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"share_embeddings_and_output_weights": False, "qk_layernorm": False},
        {"num_query_groups": 4, "rotary_base": 500},
        {"num_query_groups": 1, "layernorm_epsilon": 1e-2},
    ],
    ids=["tied", "untied", "multi-head", "multi-query"],
)
@on_ranks(1)
def test_logits_and_gradients_are_those_of_plain_pytorch(
    groups: ProcessGroups, config: Config, model: dict[str, Any]
) -> None:
    from megatron_idea.engine.model import named_parameters

    config = replace(config, model={"init_method_std": 0.3} | model)
    (chunk,) = built(groups, config, ffn_shape(config, [24, 10]))
    generator = torch.Generator().manual_seed(0)
    plain_weights = {}
    for name, parameter in named_parameters([chunk]):
        if parameter.dim() == 1:  # norms of one would hide a norm left out
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        plain_weights[name] = parameter.detach().clone().requires_grad_()
    plain = PlainGPT(config.model, plain_weights)
    tokens = random_tokens(config, seed=0)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)

    logits, expected = chunk(inputs, positions, None), plain.logits(inputs)
    assert logits.std() > 0.5, "too small to tell anything"
    assert_close(logits, expected, "logits", tolerance=1e-5)

    loss = chunk(inputs, positions, None, labels=labels).mean()
    expected_loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert_close(loss, expected_loss, "loss", tolerance=1e-5)
    loss.backward()
    expected_loss.backward()
    for name, parameter in named_parameters([chunk]):
        assert_close(parameter.grad, plain_weights[name].grad, name, tolerance=1e-5)


@on_ranks(1)
def test_a_token_does_not_see_later_ones(groups: ProcessGroups, config: Config) -> None:
    (chunk,) = built(groups, config)
    tokens = random_tokens(config, seed=0)[:, :-1]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % config.model.vocab_size
    before, after = chunk(tokens, positions, None), chunk(changed, positions, None)
    assert_equal(after[:, :5], before[:, :5])
    assert bool((after[:, 5:] != before[:, 5:]).any(-1).all())


def test_transformer_engines_norms_have_the_names_of_ours() -> None:
    """It keeps a layer's norms in the linear layers that follow them."""
    from megatron_idea.engine.model import named_parameters
    from megatron_idea.prune.axis import shares_of

    def weights(*names: str) -> torch.nn.Module:
        module = torch.nn.Module()
        for name in names:
            module.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
        return module

    layer = torch.nn.Module()
    layer.layer_number = 2
    layer.self_attention, layer.mlp = torch.nn.Module(), torch.nn.Module()
    layer.self_attention.linear_qkv = weights("layer_norm_weight", "weight")
    layer.self_attention.q_layernorm = weights("weight")
    layer.mlp.linear_fc1 = weights("layer_norm_weight", "weight")
    model = torch.nn.Module()
    model.share_embeddings_and_output_weights = True
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList([layer])
    names = {name for name, _ in named_parameters([model])}
    assert names == {
        f"decoder.layers.1.{tensor}.weight"
        for tensor in (
            "input_layernorm",
            "self_attention.linear_qkv",
            "self_attention.q_layernorm",
            "pre_mlp_layernorm",
            "mlp.linear_fc1",
        )
    }
    config = small().model
    assert all(shares_of(name, config, Shape.full(config), 1) for name in names)


@pytest.mark.parametrize("apex", [True, False])
def test_gradient_accumulation_is_fused_where_apex_is_and_not_by_transformer_engine_alone(
    apex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """megatron-core's output layer raises without apex, whatever else is installed."""
    from megatron_idea.engine import model

    installed = {"transformer_engine", *(["fused_weight_gradient_mlp_cuda"] if apex else [])}
    monkeypatch.setattr(model, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model, "ShapedTransformerConfig", dict)
    assert core_config(small())["gradient_accumulation_fusion"] is apex
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not core_config(small())["gradient_accumulation_fusion"]
