"""The self-check of a compaction: it is quiet about a sound one and finds every kind of damage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import live_run, on_ranks, whole

from megatron_idea.config import Config, replace


@settings(deadline=None)
@given(start=st.integers(0, 200), size=st.integers(0, 200), length=st.integers(1, 17))
def test_blocks_cover_a_range_once_and_in_order(start: int, size: int, length: int) -> None:
    from megatron_idea.prune.verify import _blocks

    covered = []
    for begin, row, column, rows, columns in _blocks(start, start + size, length):
        assert rows == 1 or (column, columns) == (0, length), "several rows are whole rows"
        assert column + columns <= length
        cells = [(row + r) * length + column + c for r in range(rows) for c in range(columns)]
        assert cells[0] == start + begin
        covered += cells
    assert covered == list(range(start, start + size))


def trained(groups: Any, config: Config) -> Any:
    from megatron_idea.train import step

    # Weights that matter: at 0.02 a whole layer of this model hardly changes a loss.
    run, state = live_run(groups, replace(config, model={"init_method_std": 0.3}))
    for _ in range(2):
        step(run, state)
    return run


@on_ranks(2, tensor_model_parallel_size=2)
def test_checksums_do_not_depend_on_the_tensor_parallel_split(groups: Any, config: Config) -> None:
    _equal_to_one_process(groups, config)


@on_ranks(3)
def test_checksums_do_not_depend_on_the_optimizers_shards(groups: Any, config: Config) -> None:
    _equal_to_one_process(groups, config)


def _equal_to_one_process(groups: Any, config: Config) -> None:
    """The distributed checksums, and those of whole tensors by the definition."""
    from megatron_idea.prune.verify import unit_checksums

    run = trained(groups, config)
    trainable, model, tp = run.trainable, config.model, groups.tp
    tables = unit_checksums(trainable, run.pruner.stored)
    assert all(table.any() for table in tables.values())
    f, g, kv = 24 // tp.size(), model.num_query_groups // tp.size(), model.kv_channels
    q = model.num_attention_heads // model.num_query_groups
    neurons = tp.rank() * f + torch.arange(f)
    heads = tp.rank() * g + torch.arange(g)
    channels = torch.arange(model.hidden_size)

    def lines(units: torch.Tensor, inner: int) -> torch.Tensor:
        return (units[:, None] * inner + torch.arange(inner)).flatten()

    for layer, mlp in trainable.mlps:
        attention = trainable.chunks[0].module.decoder.layers[layer].self_attention
        fc1 = states(trainable, mlp.linear_fc1.weight)
        fc2 = states(trainable, mlp.linear_fc2.weight)
        qkv = states(trainable, attention.linear_qkv.weight)
        proj = states(trainable, attention.linear_proj.weight)
        gate_up = torch.cat([neurons, 24 + neurons])
        expected = torch.zeros(24, dtype=torch.int64)
        expected.index_add_(0, neurons.repeat(2), _defined(fc1, gate_up, channels).sum(1))
        expected.index_add_(0, neurons, _defined(fc2, channels, neurons).sum(0))
        _agree(expected, tables["ffn_hidden_size"][layer], groups)
        expected = torch.zeros(model.num_query_groups, dtype=torch.int64)
        of_qkv = _defined(qkv, lines(heads, (q + 2) * kv), channels).sum(1)
        expected.index_add_(0, heads.repeat_interleave((q + 2) * kv), of_qkv)
        of_proj = _defined(proj, channels, lines(heads, q * kv)).sum(0)
        expected.index_add_(0, heads.repeat_interleave(q * kv), of_proj)
        _agree(expected, tables["num_query_groups"][layer], groups)


def _defined(owned: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[R, C] products of [3, R, C] main weight and moments, with places of rows and columns."""
    bits = owned.contiguous().view(torch.int32).long()
    states = 777_767_777 * torch.arange(3)[:, None, None]
    places = rows[:, None] * 1_000_003 + columns + states
    products = (bits * (2 * places + 1) + 2**31) % 2**32 - 2**31
    return products.sum(0)


def _agree(expected: torch.Tensor, table: torch.Tensor, groups: Any) -> None:
    torch.distributed.all_reduce(expected, group=groups.tp)
    assert torch.equal(expected, table)
    assert len(set(table.tolist())) == len(table)


def states(trainable: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """[3, *shape] of main weight and moments, unsharded."""
    names = ("main", "exp_avg", "exp_avg_sq")
    return torch.stack([whole(trainable, parameter, name).view_as(parameter) for name in names])


def damages(run: Any) -> dict[str, Any]:
    """Ways in which a compaction could go wrong, as functions that do it to one rank."""
    from megatron_idea.engine.shards import shard_of

    trainable = run.trainable
    layer, mlp = trainable.mlps[0]
    fc2 = shard_of(trainable.optimizer, mlp.linear_fc2.weight)
    fc1 = shard_of(trainable.optimizer, mlp.linear_fc1.weight)

    def swap(x: torch.Tensor, i: int, j: int) -> None:
        x[[i, j]] = x[[j, i]]

    def flip_a_bit(x: torch.Tensor) -> None:
        x.view(-1).view(torch.int32)[5] ^= 1

    hidden = mlp.linear_fc2.weight.shape[0]
    return {
        "a bit of a main weight": lambda: flip_a_bit(fc2.main.data),
        "a bit of a moment": lambda: flip_a_bit(fc1.state["exp_avg_sq"]),
        "two neurons' gate rows": lambda: swap(fc1.main.data.view(-1, hidden), 1, 2),
        "gate and up": lambda: swap(fc1.state["exp_avg"].view(-1, hidden), 1, 1 + mlp.width),
        "the two moments": lambda: fc1.state.update(
            exp_avg=fc1.state["exp_avg_sq"], exp_avg_sq=fc1.state["exp_avg"]
        ),
        "the numbering": lambda: swap(run.pruner.stored["ffn_hidden_size"][layer], 0, 12),
        "a mask": lambda: mlp.set_alive(torch.arange(mlp.width) % 2 == 0),
        "another weight": lambda: mlp.linear_fc1.weight.data.zero_(),
    }


@pytest.mark.parametrize("what", range(8))
@on_ranks(2, tensor_model_parallel_size=2)
def test_damage_on_one_rank_stops_all_of_them(groups: Any, config: Config, what: int) -> None:
    from megatron_idea.prune.verify import check, fingerprint

    config = replace(config, training={"precision": "bf16"} if what % 2 else {})
    run = trained(groups, config)
    trainable, stored, alive = run.trainable, run.pruner.stored, run.pruner.alive
    before = fingerprint(trainable, stored)
    assert check(before, fingerprint(trainable, stored), alive, trainable) == 0.0
    kinds = damages(run)
    assert len(kinds) == 8
    if groups.tp.rank() == 1:
        list(kinds.values())[what]()
    with pytest.raises(RuntimeError, match="compaction changed the"):
        check(before, fingerprint(trainable, stored), alive, trainable)


@on_ranks(2, pipeline_model_parallel_size=2)
def test_the_check_works_over_pipeline_stages(groups: Any, config: Config) -> None:
    from megatron_idea.prune.verify import check, fingerprint

    run = trained(groups, config)
    trainable, stored, alive = run.trainable, run.pruner.stored, run.pruner.alive
    before = fingerprint(trainable, stored)
    assert float(before.losses.abs().min()) > 0 and before.losses.numel() == 8
    assert check(before, fingerprint(trainable, stored), alive, trainable) == 0.0
    if groups.pp.rank() == 0:
        damages(run)["a mask"]()
    with pytest.raises(RuntimeError, match="nats per token"):
        check(before, fingerprint(trainable, stored), alive, trainable)


@on_ranks(2, tensor_model_parallel_size=2)
def test_what_rounding_may_change_is_measured_and_the_model_stays_as_it_was(
    groups: Any, config: Config
) -> None:
    """In a deep bf16 model leaving masked neurons out changes losses by more than a fixed bound."""
    import dataclasses

    from megatron_idea.prune.verify import LAST_BITS, TOLERANCE, check, fingerprint

    run = trained(groups, replace(config, training={"precision": "bf16"}))
    trainable, stored, alive = run.trainable, run.pruner.stored, run.pruner.alive
    before = fingerprint(trainable, stored, last_bit=True)
    assert 0 < before.last_bit < 0.1
    assert check(before, fingerprint(trainable, stored), alive, trainable) == 0.0

    deep = dataclasses.replace(before, last_bit=0.03)
    for factor, fits in ((0.9, True), (1.1, False)):
        change = factor * LAST_BITS * 0.03
        assert change > TOLERANCE["bf16"]
        after = dataclasses.replace(before, losses=before.losses + change)
        if fits:
            assert check(deep, after, alive, trainable) == pytest.approx(change, rel=1e-4)
        else:
            with pytest.raises(RuntimeError, match="nats per token"):
                check(deep, after, alive, trainable)
