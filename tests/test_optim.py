"""What the optimizer holds of a parameter, how it travels between shards, and the update itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from jobs import backward, on_ranks, run_job, small, whole
from torch import Tensor

from megatron_idea.config import Config, replace
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

LR = 1e-2


def fresh(groups: ProcessGroups, config: Config, **sections: Any) -> Any:
    """A model that took no step."""
    from megatron_idea.engine.trainable import assemble

    config = replace(config, schedule={"lr": LR}, **sections)
    return assemble(config.sections, groups, Shape.full(config.model), initialize=True)


def take_steps(trainable: Any, steps: int) -> None:
    from megatron_idea.engine.optimizer import update

    for seed in range(steps):
        backward(trainable, seed)
        assert math.isfinite(update(trainable.optimizer, LR))


def slots(trainable: Any) -> list[Any]:
    """This rank's part of every parameter that it has a part of."""
    from megatron_idea.engine.shards import shard_of

    parts = (shard_of(trainable.optimizer, parameter) for parameter in trainable.parameters)
    return [part for part in parts if part is not None]


def snapshot(trainable: Any) -> list[Tensor]:
    """Every weight, main weight, moment and step count on this rank."""
    values = [p.detach() for p in trainable.parameters]
    for part in slots(trainable):
        values += [part.main.detach(), *(torch.as_tensor(v) for v in part.state.values())]
    return [value.clone() for value in values]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
@on_ranks(2)
def test_a_slot_shows_the_optimizers_own_tensors(
    groups: ProcessGroups, config: Config, sharded: bool, precision: str
) -> None:
    trainable = fresh(
        groups,
        config,
        training={"precision": precision},
        parallel={"use_distributed_optimizer": sharded},
    )
    assert all(not part.state for part in slots(trainable))
    take_steps(trainable, 1)
    for part in slots(trainable):
        size = part.end - part.start
        assert part.main.numel() == part.grad.numel() == size
        assert all(part.state[name].numel() == size for name in ("exp_avg", "exp_avg_sq"))
        assert {part.main.dtype, part.grad.dtype, part.state["exp_avg"].dtype} == {torch.float32}
        # The model's weight is the main weight, rounded to the model's precision.
        weight = part.parameter.detach().view(-1)[part.start : part.end]
        assert_equal(weight, part.main.detach().view(-1).to(weight.dtype), "weight")
        part.grad.fill_(7.0)
        shown = part.parameter.main_grad.view(-1)
        assert bool((shown[part.start : part.end] == 7).all())
        part.grad.zero_()
        assert not shown[part.start : part.end].any()


@pytest.mark.parametrize("dp", [2, 3])
def test_shards_of_data_parallel_ranks_tile_every_parameter_once(workers: Workers, dp: int) -> None:
    by_rank = run_job(workers, owned_ranges, dp, small())
    sizes = [size for size, _ in by_rank[0]]
    for index, size in enumerate(sizes):
        ranges = [ranks[index][1] for ranks in by_rank]
        covered = [i for start, end in filter(None, ranges) for i in range(start, end)]
        assert covered == list(range(size)), "in rank order, without gap or overlap"
    # The claim needs parameters that are cut and some that lie on one rank.
    absent = [ranks[index][1] is None for ranks in by_rank for index in range(len(sizes))]
    assert any(absent) and not all(absent)


def owned_ranges(groups: ProcessGroups, config: Config) -> list[tuple[int, tuple[int, int] | None]]:
    from megatron_idea.engine.shards import shard_of

    trainable = fresh(groups, config)
    parts = [(p.numel(), shard_of(trainable.optimizer, p)) for p in trainable.parameters]
    return [(size, (part.start, part.end) if part else None) for size, part in parts]


@on_ranks(2)
def test_without_the_distributed_optimizer_each_rank_has_everything(
    groups: ProcessGroups, config: Config
) -> None:
    trainable = fresh(groups, config, parallel={"use_distributed_optimizer": False})
    parts = slots(trainable)
    assert len(parts) == len(trainable.parameters)
    assert all((p.start, p.end) == (0, p.parameter.numel()) for p in parts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@on_ranks(2)
def test_main_weights_set_by_hand_reach_every_ranks_model(
    groups: ProcessGroups, config: Config, precision: str
) -> None:
    from megatron_idea.engine.optimizer import finish_main_update, set_state
    from megatron_idea.engine.shards import has_main_copy

    trainable = fresh(groups, config, training={"precision": precision})
    take_steps(trainable, 1)
    numbers = {id(p): torch.arange(p.numel()) / p.numel() for p in trainable.parameters}
    for part in slots(trainable):
        main = numbers[id(part.parameter)][part.start : part.end]
        moments = {"exp_avg": main + 1, "exp_avg_sq": main + 2}
        set_state(trainable.optimizer, part.parameter, 7, main, moments)
    finish_main_update(trainable.optimizer, trainable.chunks)
    for parameter in trainable.parameters:
        assert has_main_copy(parameter) is (precision == "bf16")
        expected = numbers[id(parameter)]
        assert_equal(parameter.detach().view(-1), expected.to(parameter.dtype), "weight")
        assert_equal(whole(trainable, parameter, "main"), expected, "main")
        assert_equal(whole(trainable, parameter, "exp_avg"), expected + 1, "exp_avg")
        assert_equal(whole(trainable, parameter, "exp_avg_sq"), expected + 2, "exp_avg_sq")


@on_ranks(3)
def test_the_step_count_is_that_of_the_steps_taken(groups: ProcessGroups, config: Config) -> None:
    from megatron_idea.engine.optimizer import adam_step, set_state, update

    trainable = fresh(groups, config)
    assert adam_step(trainable.optimizer, groups) == 0
    take_steps(trainable, 3)
    assert adam_step(trainable.optimizer, groups) == 3
    backward(trainable)
    trainable.parameters[0].main_grad.fill_(math.nan)
    update(trainable.optimizer, LR)
    assert adam_step(trainable.optimizer, groups) == 3
    for part in slots(trainable):
        moments = {name: part.state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")}
        set_state(trainable.optimizer, part.parameter, 41, None, moments)
    take_steps(trainable, 1)  # a step tensor shared by parameters would count all of them
    assert adam_step(trainable.optimizer, groups) == 42


@pytest.mark.parametrize(("dp", "precision"), [(1, "fp32"), (2, "fp32"), (3, "bf16")])
def test_state_gathers_whole_and_scatters_back_bit_for_bit(
    workers: Workers, dp: int, precision: str
) -> None:
    run_job(workers, gather_and_scatter, dp, small(training={"precision": precision}))


def gather_and_scatter(groups: ProcessGroups, config: Config) -> None:
    from megatron_idea.engine.shards import shard_of

    trainable = fresh(groups, config)
    take_steps(trainable, 2)
    shards = trainable.exchange()
    for parameter in trainable.parameters:
        together = shards.gather(parameter)
        assert (together is not None) == shards.owns(parameter)
        if together is not None:
            assert together.shape == (3, parameter.numel())
        for row, what in enumerate(("main", "exp_avg", "exp_avg_sq")):
            expected = whole(trainable, parameter, what)
            if together is not None:
                assert_equal(together[row], expected, what)
        back = shards.scatter(parameter, together)
        part = shard_of(trainable.optimizer, parameter)
        assert (back is None) == (part is None)
        if part is not None and back is not None:
            mine = [part.main.detach(), part.state["exp_avg"], part.state["exp_avg_sq"]]
            assert_equal(back, torch.stack([value.view(-1) for value in mine]), "scattered")


@on_ranks(3)
def test_each_parameter_has_one_owner_and_the_load_is_shared(
    groups: ProcessGroups, config: Config
) -> None:

    trainable = fresh(groups, config)
    shards = trainable.exchange()
    owned = torch.tensor([shards.owns(p) for p in trainable.parameters]).int()
    saved = torch.tensor([shards.is_saver(p) for p in trainable.parameters]).int()
    assert_equal(saved, owned, "saver and owner")
    load = sum(p.numel() for p in trainable.parameters if shards.owns(p))
    dist.all_reduce(owned)
    assert bool((owned == 1).all())
    # Dealt by size to the rank that has least: none exceeds its share by more than a parameter.
    largest = max(p.numel() for p in trainable.parameters)
    assert 0 < load <= sum(p.numel() for p in trainable.parameters) / 3 + largest


@on_ranks(2)
def test_without_shards_nothing_travels_and_one_rank_saves(
    groups: ProcessGroups, config: Config
) -> None:

    trainable = fresh(groups, config, parallel={"use_distributed_optimizer": False})
    take_steps(trainable, 1)
    shards = trainable.exchange()
    saved = torch.tensor([shards.is_saver(p) for p in trainable.parameters]).int()
    for parameter in trainable.parameters:
        assert shards.owns(parameter)
        together = shards.gather(parameter)
        assert_equal(together[0], parameter.detach().view(-1), "main")
        assert shards.scatter(parameter, together) is together
    dist.all_reduce(saved)
    assert bool((saved == 1).all())


def step_by_ones(trainable: Any, lr: float) -> dict[str, tuple[Tensor, Tensor]]:
    """One first step with every gradient 1: Adam's direction is then 1. Weights before, after."""
    from megatron_idea.engine.model import named_parameters
    from megatron_idea.engine.optimizer import update

    before = {n: p.detach().clone() for n, p in named_parameters(trainable.chunks)}
    for parameter in trainable.parameters:
        parameter.main_grad.fill_(1.0)
    update(trainable.optimizer, lr)
    after = {n: p.detach().clone() for n, p in named_parameters(trainable.chunks)}
    return {name: (before[name], after[name]) for name in before}


@on_ranks(2)
def test_a_step_is_adamw_with_the_given_rate_and_spares_norms_from_decay(
    groups: ProcessGroups, config: Config
) -> None:
    trainable = fresh(groups, config, optimizer={"clip_grad": 0.0, "weight_decay": 0.5})
    for name, (before, after) in step_by_ones(trainable, lr=3e-3).items():
        decay = 0.0 if before.dim() == 1 else 0.5
        assert_close(after, before * (1 - 3e-3 * decay) - 3e-3, name, tolerance=2e-7)


@pytest.mark.parametrize("channels", [1536, 24])
@on_ranks(1)
def test_mup_simple_scales_the_rate_of_matrices_and_leaves_their_decay(
    groups: ProcessGroups, config: Config, channels: int
) -> None:
    """By the enlarged model's hidden size, however many channels are left."""
    from megatron_idea.engine.trainable import assemble

    config = replace(
        config,
        model={"hidden_size": 1536},
        optimizer={"clip_grad": 0.0, "weight_decay": 0.5, "lr_scaling": "mup_simple"},
    )
    shape = Shape.full(config.model).with_counts("hidden_size", channels)
    trainable = assemble(config.sections, groups, shape, initialize=True)
    halved = 0
    for name, (before, after) in step_by_ones(trainable, lr=3e-3).items():
        matrix = before.dim() > 1 and name.startswith("decoder.")
        halved += matrix
        decay = 0.0 if before.dim() == 1 else 0.5
        rate = 3e-3 * (0.5 if matrix else 1.0)
        assert_close(after, before * (1 - 3e-3 * decay) - rate, name, tolerance=2e-7)
    assert halved == 2 * 4, "fc1, fc2, qkv and proj of two layers; not the embedding"


@on_ranks(1)
def test_mup_simple_does_not_raise_the_rate_of_narrow_models(
    groups: ProcessGroups, config: Config
) -> None:
    trainable = fresh(
        groups,
        config,
        optimizer={"clip_grad": 0.0, "weight_decay": 0.0, "lr_scaling": "mup_simple"},
    )
    for name, (before, after) in step_by_ones(trainable, lr=3e-3).items():
        assert_close(after, before - 3e-3, name, tolerance=2e-7)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
@on_ranks(2)
def test_the_norm_is_that_before_clipping_and_clipping_reaches_the_moments(
    groups: ProcessGroups, config: Config, clip: float
) -> None:
    from megatron_idea.engine.optimizer import update

    trainable = fresh(groups, config, optimizer={"clip_grad": clip})
    backward(trainable)
    grads = [whole(trainable, p, "grad") for p in trainable.parameters]
    norm = update(trainable.optimizer, LR)
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert norm == pytest.approx(expected, rel=1e-6)
    factor = clip / norm if 0 < clip < norm else 1.0
    assert (factor < 1) == (clip == 1e-3)
    for parameter, grad in zip(trainable.parameters, grads, strict=True):
        first = whole(trainable, parameter, "exp_avg")
        scale = grad.abs().max().clamp(min=1e-30) * 0.1 * factor
        # megatron-core divides by norm + 1e-6.
        assert_close(first / scale, 0.1 * factor * grad / scale, "exp_avg", tolerance=1e-5)


@pytest.mark.parametrize(("clip", "precision"), [(1.0, "fp32"), (0.0, "bf16")])
@on_ranks(2)
def test_a_non_finite_gradient_on_one_rank_changes_nothing_on_any(
    groups: ProcessGroups, config: Config, clip: float, precision: str
) -> None:
    from megatron_idea.engine.optimizer import update

    trainable = fresh(
        groups, config, optimizer={"clip_grad": clip}, training={"precision": precision}
    )
    for steps, broken in ((0, math.nan), (1, math.inf), (0, -math.inf)):
        take_steps(trainable, steps)
        before = snapshot(trainable)
        backward(trainable)
        if groups.dp.rank() == 1:
            slots(trainable)[0].grad[0] = broken
        assert not math.isfinite(update(trainable.optimizer, LR))
        after = snapshot(trainable)
        assert len(after) == len(before)
        for one, other in zip(after, before, strict=True):
            assert_equal(one, other)
    take_steps(trainable, 1)  # and the next step is an ordinary one


@on_ranks(2)
def test_a_group_of_which_a_rank_holds_nothing_does_not_count_steps(
    groups: ProcessGroups, config: Config
) -> None:
    """As the fused Adam of Transformer Engine 2.9 keeps it: empty groups are passed over."""
    from types import SimpleNamespace

    from megatron_idea.engine.optimizer import adam_step

    held = [{"params": ["weight"], "step": 7}, {"params": [], "step": 3}]
    inner = SimpleNamespace(state={}, param_groups=held if groups.dp.rank() else held[1:])
    assert adam_step(SimpleNamespace(optimizer=inner), groups) == 7  # type: ignore[arg-type]
