"""Scores against sums over whole weights and gradients, in any layout and over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jobs import backward, live_run, on_ranks, run_job, small, whole
from torch import Tensor

from megatron_idea.config import Config, ModelConfig, replace
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
    {"element": "fisher"},
    {"row_reduce": "l2"},
    {"row_reduce": "max"},
]


NEURONS = "ffn_hidden_size"


def tracked(groups: ProcessGroups, config: Config, **prune: Any) -> tuple[Any, Any]:
    """A fresh model and its pruner."""
    run, _ = live_run(groups, replace(config, prune=prune))
    return run.trainable, run.pruner


def observe(trainable: Any, pruner: Any, seed: int) -> Tensor:
    """This rank's sums in the gradients of a batch, [local layers, 3, f]; they count."""
    backward(trainable, seed)
    observed = pruner.scores.observe(trainable)
    pruner.record(observed)
    return stacked(observed)


def stacked(observed: Mapping[Any, Mapping[tuple[str, int], Tensor]]) -> Tensor:
    """Sums of the one measure, [local layers, 3, f]."""
    (sums,) = observed.values()
    return torch.stack([sums[key].clone() for key in sorted(sums)])


def folded(trainable: Any, pruner: Any) -> Tensor:
    """The averages once pending steps are in them, [L, 3, F] in original numbering."""
    pruner.scores.fold(trainable, pruner.stored)
    return average(pruner)


def average(pruner: Any) -> Tensor:
    (table,) = pruner.scores.average.values()
    return table[NEURONS].clone()


def elements(trainable: Any, parameter: torch.nn.Parameter, element: str) -> Tensor:
    """The definition, in fp64, over a whole weight, gradient and second moment."""
    w, g = (whole(trainable, parameter, what).double() for what in ("main", "grad"))
    v = torch.zeros_like(w)
    if trainable.optimizer.optimizer.state:
        v = whole(trainable, parameter, "exp_avg_sq").double()
    e = {
        "abs": (w * g).abs(), "squared": (w * g) ** 2, "signed": w * g,
        "fisher": (w * g - w**2 * v / 2).abs(),
    }[element]  # fmt: skip
    return e.view_as(parameter)


def enlarge_second_moments(trainable: Any) -> None:
    """After a step: v is far below g on so small a model; make w^2 v as large as w g."""
    for state in trainable.optimizer.optimizer.state.values():
        state["exp_avg_sq"].sqrt_().mul_(50)


def dense(trainable: Any, element: str, row_reduce: str) -> Tensor:
    """[local layers, 3, f]: the definition, in fp64, over whole weights and gradients."""
    layers = []
    for _, mlp in trainable.mlps:
        rows = []
        for weight in (mlp.linear_fc1.weight, mlp.linear_fc2.weight):
            e = elements(trainable, weight, element)
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
        enlarge_second_moments(trainable)
        sums = observe(trainable, pruner, seed=1)
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
        # A maximum is taken in each step, then averaged; not the other way round.
        mean = torch.stack(expected).mean(0)
        assert_scores_close(folded(trainable, pruner), mean, 2e-6, str(method))
        assert not pruner.scores.pending and pruner.pending_steps == 0


def tables(groups: ProcessGroups, config: Config) -> list[np.ndarray]:
    """[L, 3, F] in original numbering, over two batches; with sums and with maxima."""
    found = []
    for method in ({}, {"row_reduce": "max"}):
        trainable, pruner = tracked(groups, config, ema=0.0, **method)
        for seed in range(2):
            observe(trainable, pruner, seed)
        found.append(folded(trainable, pruner).cpu().numpy())
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
        sums = observe(trainable, pruner, seed)
        expected = history * expected + (1 - history) * sums
        assert_scores_close(folded(trainable, pruner), expected.double(), 1e-6)


@on_ranks(1)
def test_steps_between_two_folds_count_alike(groups: ProcessGroups, config: Config) -> None:
    trainable, pruner = tracked(groups, config, ema=0.3)
    sums = [observe(trainable, pruner, seed) for seed in range(3)]
    after_three = 0.7 * torch.stack(sums).mean(0)
    assert_scores_close(folded(trainable, pruner), after_three.double(), 1e-6)
    last = observe(trainable, pruner, seed=3)
    expected = 0.3 * after_three + 0.7 * last
    assert_scores_close(folded(trainable, pruner), expected.double(), 1e-6)


@on_ranks(1)
def test_observing_alone_does_not_count_and_nothing_pending_changes_nothing(
    groups: ProcessGroups, config: Config
) -> None:
    trainable, pruner = tracked(groups, config)
    sums = observe(trainable, pruner, seed=0)
    backward(trainable, seed=1)
    pruner.scores.observe(trainable)  # its step was skipped: never recorded
    assert pruner.pending_steps == 1
    before = folded(trainable, pruner)
    assert_scores_close(before, 0.5 * sums.double(), 1e-6)
    assert_equal(folded(trainable, pruner), before)


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
def test_saving_in_the_middle_of_an_interval_changes_no_score(
    groups: ProcessGroups, config: Config
) -> None:
    def after_three_steps(saved_after: int | None) -> Tensor:
        trainable, pruner = tracked(groups, config)
        for seed in range(3):
            observe(trainable, pruner, seed)
            if seed == saved_after:
                pruner.state(trainable)
        return folded(trainable, pruner)

    assert_scores_close(after_three_steps(1), after_three_steps(None).double(), 1e-6)


@on_ranks(2, tensor_model_parallel_size=2)
def test_original_numbering_follows_where_units_are_stored(
    groups: ProcessGroups, config: Config
) -> None:
    trainable, pruner = tracked(groups, config, ema=0.0)
    # As compaction may leave them: odd ones backwards on rank 0, even ones on rank 1.
    ids = torch.cat([torch.arange(23, 0, -2), torch.arange(0, 24, 2)])
    pruner.stored = {**pruner.stored, NEURONS: (ids, ids)}
    mine = ids.chunk(2)[groups.tp.rank()].float()
    (measure,) = pruner.scores.average
    sums = {
        (NEURONS, layer): torch.stack([1000.0 * layer + mine, -mine, mine]) for layer in range(2)
    }
    pruner.scores.record({measure: sums})
    table = folded(trainable, pruner)
    assert table.shape == (2, 3, 24)
    numbers = torch.arange(24.0)
    for layer in range(2):
        assert_equal(table[layer], torch.stack([1000.0 * layer + numbers, -numbers, numbers]))


@on_ranks(2, tensor_model_parallel_size=2)
def test_what_is_read_back_goes_on_as_what_was_saved(groups: ProcessGroups, config: Config) -> None:
    """Averages, and sums of steps since the last plan; whoever is stored where."""
    trainable, pruner = tracked(groups, config, ema=0.3)
    observe(trainable, pruner, seed=0)
    folded(trainable, pruner)
    observe(trainable, pruner, seed=1)
    saved = {name: tensor.clone() for name, tensor in pruner.state(trainable).items()}
    sizes = {name: (t.shape, t.dtype) for name, t in pruner.blank_state(due=False).items()}
    assert sizes == {name: (t.shape, t.dtype) for name, t in saved.items()}
    expected = folded(trainable, pruner)

    again, other = tracked(groups, config, ema=0.3)
    other.load_state(again, saved, pending_steps=1, memory=[])
    assert_equal(folded(again, other), expected)


MODEL_AXES = ("ffn_hidden_size", "num_query_groups", "hidden_size", "num_layers")


def _by_hand(trainable: Any, element: str) -> dict[str, torch.Tensor]:
    """Sums over each matrix of each unit, fp64, from the whole tensors of one process."""
    from megatron_idea.engine.model import named_parameters

    e = {
        name: elements(trainable, parameter, element)
        for name, parameter in named_parameters(trainable.chunks)
    }
    return sums_of(e, trainable.model)


def sums_of(e: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Sums over each matrix of each unit of one value a weight, by the names of parameters."""
    groups = model.num_query_groups
    q = model.num_attention_heads // groups
    neurons, heads, layers = [], [], []
    channels = {"linear_qkv": 0, "linear_proj": 0, "linear_fc1": 0, "linear_fc2": 0}
    for n in range(model.num_layers):
        at = f"decoder.layers.{n}."
        qkv, proj = (e[f"{at}self_attention.linear_{m}.weight"] for m in ("qkv", "proj"))
        fc1, fc2 = (e[f"{at}mlp.linear_{m}.weight"] for m in ("fc1", "fc2"))
        gate, up = fc1.chunk(2)
        neurons.append(torch.stack([gate.sum(1), up.sum(1), fc2.sum(0)]))
        of_group = qkv.view(groups, q + 2, -1)
        parts = [of_group[:, :q].sum((1, 2)), of_group[:, q].sum(1), of_group[:, q + 1].sum(1)]
        heads.append(torch.stack([*parts, proj.T.reshape(groups, -1).sum(1)]))
        layers.append(torch.stack([qkv.sum(), proj.sum(), fc1.sum(), fc2.sum()]))
        for name, sums in (
            ("linear_qkv", qkv.sum(0)), ("linear_proj", proj.sum(1)),
            ("linear_fc1", fc1.sum(0)), ("linear_fc2", fc2.sum(1)),
        ):  # fmt: skip
            channels[name] = channels[name] + sums
    embedding = e["embedding.word_embeddings.weight"].sum(0)
    output = e["output_layer.weight"].sum(0) if "output_layer.weight" in e else 0 * embedding
    return {
        "ffn_hidden_size": torch.stack(neurons),
        "num_query_groups": torch.stack(heads),
        "hidden_size": torch.stack([embedding, output, *channels.values()]),
        "num_layers": torch.stack(layers, dim=1),
    }


def _all_axes(groups: ProcessGroups, config: Config, stepped: bool) -> dict[str, Any]:
    """Tables of every axis as a job of any layout has them, and of one process by hand."""
    from megatron_idea.engine.optimizer import update
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.pruner import Pruner
    from megatron_idea.shape import Shape

    trainable = assemble(config.sections, groups, Shape.full(config.model), initialize=True)
    pruner = Pruner(config, trainable)
    if stepped:
        backward(trainable, seed=1)
        update(trainable.optimizer, 0.0)  # weights stay, whatever the order of sums
        enlarge_second_moments(trainable)
    backward(trainable)
    pruner.record(pruner.scores.observe(trainable))
    pruner.scores.fold(trainable, pruner.stored)
    (average,) = pruner.scores.average.values()
    found = {axis: table.double().numpy() for axis, table in average.items()}
    if groups.world.size() == 1:
        by_hand = _by_hand(trainable, config.prune.element)
        found["by hand"] = {axis: table.numpy() for axis, table in by_hand.items()}
    return found


@pytest.mark.parametrize(
    ("tied", "element", "stepped"),
    [(True, "abs", False), (False, "abs", False), (True, "fisher", True)],
    ids=["tied", "untied", "fisher"],
)
def test_units_of_every_axis_are_measured_and_alike_in_every_layout(
    workers: Workers, tied: bool, element: str, stepped: bool
) -> None:
    target = {"ffn_hidden_size": 12, "num_query_groups": 2, "hidden_size": 8, "num_layers": 2}
    config = replace(
        LOUD,
        model={
            "num_layers": 4, "num_attention_heads": 8, "num_query_groups": 4,
            "share_embeddings_and_output_weights": tied,
        },
        prune={"target": target, "channel_alignment": 8, "ema": 0.0, "element": element},
    )  # fmt: skip
    (alone,) = run_job(workers, _all_axes, 1, config, stepped)
    expected = {axis: torch.from_numpy(alone["by hand"][axis]) for axis in MODEL_AXES}
    for axis in MODEL_AXES:
        assert_scores_close(torch.from_numpy(alone[axis]), expected[axis], 2e-6)
    for layout in ("tp2", "pp2", "dp2"):
        world_size, parallel = LAYOUTS[layout]
        laid_out = replace(config, parallel=parallel)
        for found in run_job(workers, _all_axes, world_size, laid_out, stepped):
            for axis in MODEL_AXES:
                assert_scores_close(torch.from_numpy(found[axis]), expected[axis], 1e-5)


@on_ranks(2)
def test_fisher_is_abs_before_the_first_step_and_not_after(
    groups: ProcessGroups, config: Config
) -> None:
    from megatron_idea.engine.optimizer import update
    from megatron_idea.prune.measures import unit_sums
    from megatron_idea.prune.strategy import Measure

    def difference() -> float:
        backward(trainable)
        fisher, abs_ = (
            unit_sums(trainable, [NEURONS], Measure(element, "sum"))
            for element in ("fisher", "abs")
        )
        return max(float((fisher[key] - abs_[key]).abs().max()) for key in abs_)

    trainable, _ = tracked(groups, config)
    assert difference() == 0
    update(trainable.optimizer, 1e-3)
    enlarge_second_moments(trainable)
    assert difference() > 0


def test_sizes_are_those_of_living_units_alone() -> None:
    from megatron_idea.prune.measures import unit_sizes

    model = small(model={"num_layers": 3}).model  # hidden 16, 24 neurons, 2 groups of 2 heads of 4
    alive = {
        "ffn_hidden_size": torch.arange(24) < torch.tensor([24, 10, 0])[:, None],
        "num_query_groups": torch.arange(2) < torch.tensor([2, 1, 0])[:, None],
        "hidden_size": torch.arange(16) < 12,
        "num_layers": torch.tensor([True, True, False]),
    }
    sizes = {axis: size.tolist() for axis, size in unit_sizes(model, alive, MODEL_AXES).items()}
    assert sizes == {
        "ffn_hidden_size": [[12], [12], [12]],
        "num_query_groups": [[8 * 12], [4 * 12], [4 * 12], [8 * 12]],
        # Embedding, no output layer of its own; 3 groups and 34 neurons over both layers.
        "hidden_size": [[32], [0], [3 * 16], [3 * 8], [68], [34]],
        "num_layers": [[384, 192, 1], [192, 96, 1], [576, 240, 1], [288, 120, 1]],
    }
