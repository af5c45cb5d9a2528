"""Scores against sums over whole weights and gradients, in any layout and over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jobs import backward, on_ranks, run_job, small, whole
from torch import Tensor

from megatron_idea.config import Config, replace
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

LAYOUTS = {
    "dp2": (2, {}),
    "dp2-replicated": (2, {"use_distributed_optimizer": False}),
    "dp3": (3, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-no-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": False}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2-buckets": (2, {"overlap_grad_reduce": True, "bucket_size": 100}),
}
METHODS = [
    {},
    {"element": "squared"},
    {"element": "signed"},
    {"row_reduce": "l2"},
    {"row_reduce": "max"},
]


def tracked(groups: ProcessGroups, config: Config, **prune: Any) -> tuple[Any, Any]:
    """A fresh model and its pruner."""
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.pruner import Pruner

    config = replace(config, prune=prune)
    trainable = assemble(config.sections, groups, Shape.full(config.model), initialize=True)
    return trainable, Pruner(config, trainable)


def observe(trainable: Any, pruner: Any, seed: int) -> list[Tensor]:
    """This rank's sums in the gradients of a batch; they count."""
    backward(trainable, seed)
    sums = pruner.scores.observe(trainable)
    pruner.record(sums)
    return sums


def dense(trainable: Any, element: str, row_reduce: str) -> Tensor:
    """[local layers, 3, f]: the definition, in fp64, over whole weights and gradients."""
    layers = []
    for _, mlp in trainable.mlps:
        rows = []
        for weight in (mlp.linear_fc1.weight, mlp.linear_fc2.weight):
            main, grad = (whole(trainable, weight, x).double() for x in ("main", "grad"))
            e = (main * grad).view_as(weight)
            e = {"abs": e.abs(), "squared": e**2, "signed": e}[element]
            rows += e.chunk(2) if weight is mlp.linear_fc1.weight else [e.T]
        reduce = {
            "mean": lambda r: r.sum(1), "l2": lambda r: (r**2).sum(1), "max": lambda r: r.amax(1),
        }[row_reduce]  # fmt: skip
        layers.append(torch.stack([reduce(r) for r in rows]))
    return torch.stack(layers)


def assert_scores_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Relative to the largest: scores are far below 1."""
    scale = expected.abs().max()
    assert scale > 0
    assert_close(actual.double() / scale, expected / scale, what, tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
@on_ranks(1)
def test_sums_are_those_of_main_weights_and_reduced_gradients(
    groups: ProcessGroups, config: Config, sharded: bool, precision: str
) -> None:
    from megatron_idea.engine.optimizer import update

    config = replace(
        config,
        training={"precision": precision},
        parallel={"use_distributed_optimizer": sharded},
    )
    for method in METHODS:
        trainable, pruner = tracked(groups, config, **method)
        backward(trainable, seed=0)
        # Before the first step bf16 weights and their main weights are the same numbers.
        update(trainable.optimizer, 1e-3)
        sums = torch.stack(observe(trainable, pruner, seed=1))
        prune = pruner.config.prune
        expected = dense(trainable, prune.element, prune.row_reduce)
        assert_scores_close(sums, expected, 2e-6, str(method))


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
@on_ranks(2)
def test_shards_of_data_parallel_ranks_add_up_to_whole_rows(
    groups: ProcessGroups, config: Config, sharded: bool
) -> None:
    config = replace(config, parallel={"use_distributed_optimizer": sharded})
    for method in METHODS:
        trainable, pruner = tracked(groups, config, ema=0.0, **method)
        prune = pruner.config.prune
        expected = []
        for seed in range(2):
            observe(trainable, pruner, seed)
            expected.append(dense(trainable, prune.element, prune.row_reduce))
        pruner.scores.fold(groups)
        # A maximum is taken in each step, then averaged; not the other way round.
        mean = torch.stack(expected).mean(0)
        assert_scores_close(torch.stack(pruner.scores.ema), mean, 2e-6, str(method))
        assert not any(window.any() for window in pruner.scores.window)


def tables(groups: ProcessGroups, config: Config) -> list[np.ndarray]:
    """[L, 3, F] in original numbering, over two batches; with sums and with maxima."""
    found = []
    for method in ({}, {"row_reduce": "max"}):
        trainable, pruner = tracked(groups, config, ema=0.0, **method)
        for seed in range(2):
            observe(trainable, pruner, seed)
        pruner.scores.fold(groups)
        table = pruner.in_original_numbering(trainable, pruner.scores.ema)
        found.append(table.cpu().numpy())
    return found


# Weights far from the start's: attention and FFN matter, rows differ.
LOUD = small(model={"init_method_std": 0.3})


@pytest.fixture(scope="module")
def of_one_process(workers: Workers) -> list[np.ndarray]:
    (found,) = run_job(workers, tables, 1, LOUD)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_sees_what_one_process_sees(
    workers: Workers, of_one_process: list[np.ndarray], layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    by_rank = run_job(workers, tables, world_size, replace(LOUD, parallel=parallel))
    for index, expected in enumerate(of_one_process):
        first, *others = (tables_of_rank[index] for tables_of_rank in by_rank)
        for other in others:
            np.testing.assert_array_equal(other, first)
        # Gradients are summed in another order.
        assert_scores_close(torch.from_numpy(first), torch.from_numpy(expected).double(), 1e-5)


@pytest.mark.parametrize(("ema", "ema_on", "history"), [
    (0.5, "history", 0.5), (0.3, "history", 0.3), (0.3, "new", 0.7), (0.0, "history", 0.0),
])  # fmt: skip
@on_ranks(1)
def test_the_average_keeps_the_stated_share_of_its_history(
    groups: ProcessGroups, config: Config, ema: float, ema_on: str, history: float
) -> None:
    trainable, pruner = tracked(groups, config, ema=ema, ema_on=ema_on)
    expected = torch.zeros(2, 3, 24)
    for seed in range(4):
        sums = torch.stack(observe(trainable, pruner, seed))
        pruner.scores.fold(groups)
        expected = history * expected + (1 - history) * sums
        assert_scores_close(torch.stack(pruner.scores.ema), expected.double(), 1e-6)


@on_ranks(1)
def test_steps_between_two_folds_count_alike(groups: ProcessGroups, config: Config) -> None:
    trainable, pruner = tracked(groups, config, ema=0.3)
    sums = [torch.stack(observe(trainable, pruner, seed)) for seed in range(3)]
    pruner.scores.fold(groups)
    after_three = 0.7 * torch.stack(sums).mean(0)
    assert_scores_close(torch.stack(pruner.scores.ema), after_three.double(), 1e-6)
    last = torch.stack(observe(trainable, pruner, seed=3))
    pruner.scores.fold(groups)
    expected = 0.3 * after_three + 0.7 * last
    assert_scores_close(torch.stack(pruner.scores.ema), expected.double(), 1e-6)


@on_ranks(1)
def test_observing_alone_does_not_count_and_an_empty_window_changes_nothing(
    groups: ProcessGroups, config: Config
) -> None:
    trainable, pruner = tracked(groups, config)
    observe(trainable, pruner, seed=0)
    backward(trainable, seed=1)
    pruner.scores.observe(trainable)  # its step was skipped: never recorded
    assert pruner.scores.window_steps == 1
    pruner.scores.fold(groups)
    before = [ema.clone() for ema in pruner.scores.ema]
    pruner.scores.fold(groups)
    for ema, old in zip(pruner.scores.ema, before, strict=True):
        assert_equal(ema, old)


@on_ranks(1)
def test_observing_leaves_weights_and_gradients_alone(
    groups: ProcessGroups, config: Config
) -> None:
    trainable, pruner = tracked(groups, config)
    backward(trainable)
    tensors = [t for p in trainable.parameters for t in (p.detach(), p.main_grad)]
    before = [t.clone() for t in tensors]
    pruner.scores.observe(trainable)
    for tensor, old in zip(tensors, before, strict=True):
        assert_equal(tensor, old)


@on_ranks(2)
def test_reducing_the_window_early_changes_no_score(groups: ProcessGroups, config: Config) -> None:
    trainable, pruner = tracked(groups, config)
    for seed in range(3):
        observe(trainable, pruner, seed)
        if seed == 1:  # a checkpoint in the middle of an interval
            pruner.scores.reduce_window(groups)
    pruner.scores.fold(groups)
    interrupted = torch.stack(pruner.scores.ema)
    again, other = tracked(groups, config)
    for seed in range(3):
        observe(again, other, seed)
    other.scores.fold(groups)
    assert_scores_close(interrupted, torch.stack(other.scores.ema).double(), 1e-6)


@on_ranks(2, tensor_model_parallel_size=2)
def test_original_numbering_follows_neuron_ids(groups: ProcessGroups, config: Config) -> None:
    trainable, pruner = tracked(groups, config)
    rank = groups.tp.rank()
    values = []
    for layer, mlp in trainable.mlps:
        # As compaction may leave them: odd ones backwards on rank 0, even ones on rank 1.
        ids = torch.arange(23, 0, -2) if rank == 0 else torch.arange(0, 24, 2)
        mlp.neuron_ids.copy_(ids)
        values.append(torch.stack([1000.0 * layer + ids, -ids.float()]))
    expected = torch.arange(24).float()
    together = pruner.in_original_numbering(trainable, values)
    assert together.shape == (2, 2, 24)
    for layer in range(2):
        assert_equal(together[layer], torch.stack([1000.0 * layer + expected, -expected]))
