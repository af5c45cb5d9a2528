"""Methods to compare with: each score against its formula in fp64, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jobs import backward, built, live_run, on_ranks, random_tokens, run_job, train_on
from test_all_axes import MODEL, TARGET, killed_after, pruned, whole_run
from test_checkpoint import checkpoint_at, curves, tensors
from test_prune_activations import CONFIG, LAYOUTS, UNITS, keeping
from test_prune_scores import MODEL_AXES, _by_hand, enlarge_second_moments, sums_of
from torch import Tensor

from megatron_idea.config import Config, PruneConfig, PruneTarget, replace
from megatron_idea.prune.flap import FlapScore
from megatron_idea.prune.strategy import COSINE, Activation, Measure, Stats, select
from megatron_idea.prune.taylor import Taylor
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "taylor": ({}, MODEL_AXES),
    "taylor, untied": ({}, MODEL_AXES),
    "llm_pruner": ({}, MODEL_AXES),
    "llm_pruner, vector": ({"element": "signed"}, MODEL_AXES),
    "llm_pruner, mixed": ({"element": "fisher"}, MODEL_AXES),
    "wanda": ({}, UNITS[:2]),
    "flap_score": ({}, UNITS[:2]),
    "minitron": ({}, MODEL_AXES),
    "minitron, norm": ({"aggregation": "sequence_norm"}, MODEL_AXES),
    "shortgpt": ({}, ("num_layers",)),
}
KEPT = {
    "ffn_hidden_size": [12] * 4,
    "num_query_groups": [2] * 4,
    "hidden_size": [8],
    "num_layers": [2],
}


def config_of(variant: str, base: Config = CONFIG) -> Config:
    settings, axes = VARIANTS[variant]
    counts = CONFIG.prune.target.counts
    target = PruneTarget(**{axis: counts[axis] for axis in axes})
    return replace(
        base,
        model={"share_embeddings_and_output_weights": "untied" not in variant},
        prune={"strategy": variant.partition(",")[0], "target": target, **settings},
    )


def measured(groups: ProcessGroups, config: Config, dead: bool = False) -> Any:
    """A run that has seen a step, and has Adam's moments of one before that changed no weight."""
    from megatron_idea.engine.optimizer import update
    from megatron_idea.prune.activations import watched

    run, _ = live_run(groups, config)
    trainable, pruner = run.trainable, run.pruner
    if dead:
        plant(run)
    backward(trainable, 1)
    update(trainable.optimizer, 0.0)
    enlarge_second_moments(trainable)
    seen_by_hand = keeping(run) if groups.world.size() == 1 else {}
    with watched(trainable, pruner.scores.activations) as seen:
        backward(trainable)
    pruner.record(pruner.scores.observe(trainable, seen))
    pruner.scores.fold(trainable, pruner.stored)
    return run, seen_by_hand


def importances(groups: ProcessGroups, config: Config) -> dict[Any, np.ndarray]:
    """Of each variant and axis, as a job of any layout has it."""
    found = {}
    for variant in VARIANTS:
        run, _ = measured(groups, config_of(variant, config))
        stats = run.pruner.stats(run.trainable)
        for axis, value in run.pruner.strategy.importance(stats).items():
            assert value.dtype == torch.float32
            found[variant, axis] = value.numpy()
    return found


def formulas(groups: ProcessGroups, config: Config) -> dict[Any, np.ndarray]:
    """The same in fp64, from whole weights, gradients, moments and activations."""
    found = {}
    for variant, (_, axes) in VARIANTS.items():
        run, seen = measured(groups, config_of(variant, config))
        x = {key: torch.cat(parts, dim=1) for key, parts in seen.items()}
        values = FORMULAS[variant.partition(",")[0]](variant, run.trainable, x)
        found |= {(variant, axis): values[axis].numpy() for axis in axes}
    return found


def _taylor(variant: str, trainable: Any, _x: Any) -> dict[str, Tensor]:
    sums = _by_hand(trainable, "signed")
    channels = sums["hidden_size"]
    table = channels[1] if "untied" in variant else channels[0]
    return {
        "ffn_hidden_size": -sums["ffn_hidden_size"][:, 2],
        "num_query_groups": -sums["num_query_groups"][:, 3],
        "hidden_size": -(table + channels[2] + channels[4]),
        "num_layers": -(sums["num_layers"][1] + sums["num_layers"][3]),
    }


def _llm_pruner(variant: str, trainable: Any, _x: Any) -> dict[str, Tensor]:
    element = {"vector": "signed", "mixed": "fisher"}.get(variant.rpartition(", ")[2], "abs")
    return {a: sums.abs().sum(dim=-2) for a, sums in _by_hand(trainable, element).items()}


def columns(trainable: Any, axis: str, n: int) -> Tensor:
    """[H, columns] of what reads the activations of an axis in layer ``n``."""
    layer = trainable.chunks[0].module.decoder.layers[n]
    linear = layer.mlp.linear_fc2 if axis == "ffn_hidden_size" else layer.self_attention.linear_proj
    return linear.weight.detach().double()


def _wanda(_variant: str, trainable: Any, x: Any) -> dict[str, Tensor]:
    found = {}
    for axis, units in (("ffn_hidden_size", 24), ("num_query_groups", 4)):
        rows = []
        for n in range(4):
            norms = x[axis, n].square().mean((0, 1)).sqrt()
            of_column = (columns(trainable, axis, n).abs() * norms).mean(0)
            rows.append(of_column.view(units, -1).sum(1))
        found[axis] = torch.stack(rows)
    return found


def _flap(_variant: str, trainable: Any, x: Any) -> dict[str, Tensor]:
    found = {}
    for axis, units in (("ffn_hidden_size", 24), ("num_query_groups", 4)):
        rows = []
        for n in range(4):
            variance = x[axis, n].flatten(0, 1).var(0, unbiased=False)
            score = variance * columns(trainable, axis, n).square().sum(0)
            rows.append(((score - score.mean()) / score.std()).view(units, -1).mean(1))
        found[axis] = torch.stack(rows)
    return found


def _minitron(variant: str, _trainable: Any, x: Any) -> dict[str, Tensor]:
    def size(a: Tensor) -> Tensor:
        """[s, samples, units, lines] to [units]."""
        if "norm" in variant:
            return a.square().sum((0, 3)).sqrt().mean(0)
        return a.abs().mean(0).square().sum(-1).mean(0).sqrt()

    neurons, groups = ([x[axis, n] for n in range(4)] for axis in UNITS[:2])
    return {
        "ffn_hidden_size": torch.stack([size(a[..., None]) for a in neurons]),
        "num_query_groups": torch.stack([size(a.unflatten(-1, (4, -1))) for a in groups]),
        "hidden_size": sum(size(x["hidden_size", row][..., None]) for row in range(9)),
        **_shortgpt(variant, _trainable, x),
    }


def _shortgpt(_variant: str, _trainable: Any, x: Any) -> dict[str, Tensor]:
    return {"num_layers": torch.stack([1 - x["num_layers", n].mean() for n in range(4)])}


FORMULAS = {
    "taylor": _taylor, "llm_pruner": _llm_pruner, "wanda": _wanda, "flap_score": _flap,
    "minitron": _minitron, "shortgpt": _shortgpt,
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(workers: Workers) -> dict[Any, np.ndarray]:
    (found,) = run_job(workers, formulas, 1, CONFIG)
    return found


@pytest.mark.parametrize("layout", ["one process", "tp2", "pp2", "dp2", "vpp2"])
def test_every_score_is_its_formula_in_every_layout(
    workers: Workers, expected: dict[Any, np.ndarray], layout: str
) -> None:
    world_size, parallel = LAYOUTS.get(layout, (1, {}))
    first, *others = run_job(workers, importances, world_size, replace(CONFIG, parallel=parallel))
    for other in others:
        for key, value in first.items():
            np.testing.assert_array_equal(other[key], value)
    assert first.keys() == expected.keys()
    for (variant, axis), value in expected.items():
        scale = np.abs(value).max()
        found = torch.from_numpy(first[variant, axis])
        what = f"{variant} {axis}"
        assert_close(found.double() / scale, torch.from_numpy(value / scale), what, 1e-5)
        alive = torch.ones(value.shape, dtype=torch.bool)
        wanted = select(torch.from_numpy(value).float(), alive, KEPT[axis])
        assert_equal(select(found, alive, KEPT[axis]), wanted, what)


DEAD = {
    "ffn_hidden_size": (1, 5), "num_query_groups": (0, 2), "hidden_size": (7,), "num_layers": (2,),
}  # fmt: skip


def plant(run: Any) -> None:
    """Zero a unit of every axis that is pruned, and let it be a candidate all the same."""
    from megatron_idea.prune.plan import Plan

    pruner = run.pruner
    everything = pruner.alive
    alive = {axis: units.clone() for axis, units in everything.items()}
    for axis in pruner.goals:
        alive[axis][DEAD[axis]] = False
    pruner.silence(run.trainable, Plan.of(alive, run.trainable.shape, pruner.memory))
    pruner.alive = everything


@on_ranks(1)
def test_a_dead_unit_is_the_least_important(groups: ProcessGroups, _config: Config) -> None:
    for variant in VARIANTS:
        run, _ = measured(groups, config_of(variant), dead=True)
        found = run.pruner.strategy.importance(run.pruner.stats(run.trainable))
        for axis, value in found.items():
            *row, unit = DEAD[axis]
            units = value[tuple(row)]
            if variant.startswith("taylor"):  # what is below does harm
                assert units[unit] == 0, (variant, axis)
                continue
            rest = torch.cat([units[:unit], units[unit + 1 :]])
            assert units[unit] < rest.min(), (variant, axis, units)


def alive_units(config: Config) -> dict[str, Tensor]:
    model = config.model
    layers, ones = model.num_layers, torch.ones
    return {
        "ffn_hidden_size": ones(layers, model.ffn_hidden_size, dtype=torch.bool),
        "num_query_groups": ones(layers, model.num_query_groups, dtype=torch.bool),
        "hidden_size": ones(model.hidden_size, dtype=torch.bool),
        "num_layers": ones(layers, dtype=torch.bool),
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@on_ranks(1)
def test_taylor_is_the_derivative_by_a_mask(
    groups: ProcessGroups, _config: Config, tied: bool
) -> None:
    """In fp64, with masks that are parameters, on what units compute."""
    config = config_of("taylor" if tied else "taylor, untied")
    (chunk,) = built(groups, config)
    chunk.double()
    masks = {
        axis: torch.ones(units.shape, dtype=torch.float64, requires_grad=True)
        for axis, units in alive_units(config).items()
    }
    of_channels = masks["hidden_size"]
    if tied:
        chunk.embedding.word_embeddings.register_forward_hook(lambda _m, _x, y: y * of_channels)
    for n, layer in enumerate(chunk.decoder.layers):
        layer.mlp.linear_fc2.register_forward_pre_hook(
            lambda _m, x, n=n: (x[0] * masks["ffn_hidden_size"][n],)
        )
        layer.self_attention.linear_proj.register_forward_pre_hook(
            lambda _m, x, n=n: (x[0] * masks["num_query_groups"][n].repeat_interleave(8),)
        )
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            norm.register_forward_hook(lambda _m, _x, y: y * of_channels)
        for part in (layer.self_attention, layer.mlp):
            part.register_forward_hook(lambda _m, _x, y, n=n: (y[0] * masks["num_layers"][n], y[1]))
    chunk.decoder.final_layernorm.register_forward_hook(lambda _m, _x, y: y * of_channels)
    tokens = random_tokens(config, seed=0)
    positions = torch.arange(8).expand(12, -1)
    logits = chunk(tokens[:, :-1], positions, None)
    assert logits.dtype == torch.float64
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    e = {name: p.detach() * p.grad for name, p in chunk.named_parameters()}
    sums = sums_of(e, config.model)
    method = Taylor(config.prune, config.goals, tied)
    stats = Stats({Measure("signed", "sum"): sums}, {}, alive_units(config))
    for axis, value in method.importance(stats).items():
        assert masks[axis].grad.abs().max() > 1e-4
        assert_close(value, -masks[axis].grad, axis, 1e-13)


def test_a_constant_activation_has_no_fluctuation_however_large_it_is() -> None:
    """Where E[x^2] - E[x]^2 in fp32 would be noise."""
    axis = "ffn_hidden_size"
    method = FlapScore(PruneConfig(strategy="flap_score"), {axis: None})  # type: ignore[dict-item]
    mean = torch.tensor([[[3000.1, 1.0, 1.0, 0.0]]])
    square = (mean.double() ** 2 + torch.tensor([0.0, 1.0, 2.0, 9.0]).double()).float()
    weights, means, squares = method.measures
    alive = {axis: torch.tensor([[True, True, True, False]])}
    stats = Stats(
        {weights: {axis: torch.ones(1, 3, 4)}, means: {axis: mean}, squares: {axis: square}},
        {},
        alive,
    )
    found = method.importance(stats)[axis]
    assert found[0, 3] == 0, "no candidate, and no part of the mean"
    assert torch.isfinite(found).all()
    without = replace_first(stats, axis)
    assert_close(method.importance(without)[axis], torch.tensor([[-1.0, 0.0, 1.0, 0.0]]))


def replace_first(stats: Stats, axis: str) -> Stats:
    """The same with a first activation that is 0."""
    sums = {m: {axis: of[axis].clone()} for m, of in stats.sums.items()}
    for measure, of in sums.items():
        if isinstance(measure, Activation):
            of[axis][0, 0, 0] = 0
    return Stats(sums, {}, stats.alive)


def test_a_layer_with_one_column_left_has_a_score() -> None:
    axis = "ffn_hidden_size"
    method = FlapScore(PruneConfig(strategy="flap_score"), {axis: None})  # type: ignore[dict-item]
    sums = {
        m: {axis: torch.ones(2, 3 if isinstance(m, Measure) else 1, 3)} for m in method.measures
    }
    alive = {axis: torch.tensor([[True, False, False], [False] * 3])}
    assert_equal(method.importance(Stats(sums, {}, alive))[axis], torch.zeros(2, 3))


def test_methods_ask_for_what_they_read_alone() -> None:
    from megatron_idea.prune.pruner import build_strategy

    def asked(axes: tuple[str, ...]) -> tuple[Any, ...]:
        config = config_of("minitron")
        target = PruneTarget(**{axis: CONFIG.prune.target.counts[axis] for axis in axes})
        return build_strategy(replace(config, prune={"target": target})).measures

    assert asked(("num_layers",)) == (COSINE,)
    assert asked(UNITS) == (Activation("sequence_mean"),)
    assert asked(MODEL_AXES) == (Activation("sequence_mean"), COSINE)


@pytest.mark.parametrize("variant", ["taylor", "flap_score", "minitron"])
def test_cutting_zeros_away_changes_nobodys_fate(workers: Workers, variant: str) -> None:
    _, axes = VARIANTS[variant]
    config = pruned({axis: TARGET[axis] for axis in axes})
    runs = []
    for compact in (True, False):
        asked = replace(config, prune={"strategy": variant, "compact": compact})
        runs.append(run_job(workers, whole_run, 1, asked, 14)[0])
    cut, silent = runs
    assert cut["stored"] != silent["stored"]
    assert cut["alive"] == silent["alive"]
    assert cut["losses"] == pytest.approx(silent["losses"], abs=1e-5)


def test_a_run_stopped_between_plans_goes_on_bit_for_bit(
    tiny: Config, workers: Workers, tmp_path: Path
) -> None:
    config = replace(
        tiny,
        model={**MODEL, "qk_layernorm": True},
        prune={
            "strategy": "minitron", "channel_alignment": 4, "mask_interval_steps": 4,
            "target": PruneTarget(**{**TARGET, "ffn_hidden_size": 24}),
        },
        checkpoint={"keep_last": 0, "every_tokens": 128},
    )  # fmt: skip
    from megatron_idea.checkpoint import read_state

    workers.run(train_on, 1, config)
    expected = curves(config.run_dir, 0)
    again = killed_after(config, 10, tmp_path / "again")
    state = read_state(checkpoint_at(again.run_dir, 10))
    assert state.pending_steps == 2, "of the interval"
    workers.run(train_on, 1, again)
    assert curves(again.run_dir, 0) == expected
    ours, theirs = (tensors(checkpoint_at(one.run_dir, 24)) for one in (again, config))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal(ours[name], theirs[name], name)
    tp2 = LAYOUTS["tp2-no-sp"][1]
    elsewhere = killed_after(config, 10, tmp_path / "elsewhere", parallel=tp2)
    workers.run(train_on, 2, elsewhere)
    found = curves(elsewhere.run_dir, 10)
    assert [r["loss"] for r in found] == pytest.approx(
        [r["loss"] for r in expected if r["step"] > 10], rel=2e-5
    )


def calibrated(groups: ProcessGroups, config: Config) -> dict[str, Any]:
    """Losses, and who lives on after each step, of a run whose scores are drawn for each plan."""
    from megatron_idea.train import step

    run, state = live_run(groups, config)
    drawn = []
    batches = run.data.step
    run.data.step = lambda begin: drawn.append(begin) or batches(begin)
    steps = [(step(run, state)[0].loss, run.pruner.alive) for _ in range(12)]
    assert run.pruner.pending_steps == 0
    return {
        "losses": [loss for loss, _ in steps],
        "alive": [{axis: t.tolist() for axis, t in alive.items()} for _, alive in steps],
        "drawn": drawn,
    }


def test_scores_can_come_from_batches_of_their_own(workers: Workers) -> None:
    """Gradients and activations, in one process and over two that share the optimizer's state."""
    target = PruneTarget(ffn_hidden_size=12, num_query_groups=2)
    config = replace(
        pruned({}), prune={"strategy": "adapt_pruner", "target": target, "calibration_steps": 2}
    )
    (alone,) = run_job(workers, calibrated, 1, config)
    (plain,) = run_job(workers, calibrated, 1, replace(config, prune={"calibration_steps": 0}))
    first = next(n for n, alive in enumerate(alone["alive"]) if alive != alone["alive"][0])
    assert alone["losses"][: first + 1] == plain["losses"][: first + 1], "nothing is learnt of them"
    learnt = {n * config.training.global_batch_size for n in range(12)}
    assert len(set(alone["drawn"]) - learnt) >= 2 > len(set(plain["drawn"]) - learnt)
    assert alone["alive"][-1] != plain["alive"][-1], "another draw, other scores"
    other, *_ = run_job(workers, calibrated, 2, config)
    assert (other["drawn"], other["alive"]) == (alone["drawn"], alone["alive"])
