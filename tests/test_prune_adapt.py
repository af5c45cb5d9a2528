"""Adapt-Pruner: what layers give, when groups go, and whose scores count, alone and in a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jobs import backward, live_run, on_ranks, run_job, small, whole
from torch import Tensor

from megatron_idea import config as configuration
from megatron_idea.config import Config, ConfigError, replace, validate
from megatron_idea.prune.adapt_pruner import AdaptPruner
from megatron_idea.prune.strategy import Activation, Measure, Stats, select
from megatron_idea.shape import Shape
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

NEURONS, GROUPS, LAYERS = "ffn_hidden_size", "num_query_groups", "num_layers"
MODEL = {
    "num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 640, "num_attention_heads": 15,
    "num_query_groups": 5, "kv_channels": 16, "vocab_size": 1000,
}  # fmt: skip
PARAMETERS = 700_000
ROUNDS = 10
COSINES = torch.tensor([0.2, 0.5, 0.9, 0.97, 0.95, 0.93, 0.8, 0.4])


def method(model: dict[str, Any] | None = None, **prune: Any) -> AdaptPruner:
    prune = {"target": {"parameters": PARAMETERS}, **prune}
    given = {"model": MODEL | (model or {}), "prune": {"strategy": "adapt_pruner", **prune}}
    config = configuration.from_dict(given)
    return AdaptPruner(config.prune, config.goals, config.model, config.parameter_goal)


def everyone() -> dict[str, Tensor]:
    return {
        NEURONS: torch.ones(8, 640, dtype=torch.bool), GROUPS: torch.ones(8, 5, dtype=torch.bool),
    }  # fmt: skip


def importance(cosines: Tensor = COSINES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    units = {
        axis: torch.rand(alive.shape, generator=generator) for axis, alive in everyone().items()
    }
    return units | {LAYERS: -cosines}


def through_rounds(
    adapt: AdaptPruner, cosines: Tensor = COSINES, rounds: int = ROUNDS
) -> list[dict[str, Tensor]]:
    """Live counts after each round."""
    alive = {axis: rows for axis, rows in everyone().items() if axis in adapt.axes}
    memory, found = torch.empty(0), []
    scores = importance(cosines)
    for event in range(1, rounds + 1):
        removed = dict.fromkeys(adapt.axes, event / rounds)
        if adapt.is_due(alive, removed):
            counts, memory = adapt.budget(scores, alive, removed, memory)
            alive = {a: select(scores[a], alive[a], list(counts[a])) for a in counts}
        assert not adapt.is_due(alive, removed)
        found.append({axis: rows.sum(dim=1) for axis, rows in alive.items()})
    return found


def test_a_layer_s_importance_is_its_cosine_and_a_unit_s_a_plain_sum() -> None:
    adapt = method()
    sums, cosine = Measure("abs", "sum"), Activation("cosine")
    assert adapt.measures == (sums, cosine)
    tables = {NEURONS: torch.rand(8, 3, 640), GROUPS: torch.rand(8, 4, 5)}
    of_layers = {LAYERS: COSINES[None]}
    found = adapt.importance(Stats({sums: tables, cosine: of_layers}, {}, everyone()))
    assert_equal(found[NEURONS], tables[NEURONS].sum(1))
    assert_equal(found[GROUPS], tables[GROUPS].sum(1))
    assert_equal(found[LAYERS], -COSINES)
    assert method(skip_first_token=True).measures[1] == Activation("cosine", skip_first=True)


@pytest.mark.parametrize("amplitude", [0.0, 0.01, 0.02, 0.03])
def test_an_inner_step_adds_the_same_mean_whatever_the_amplitude(amplitude: float) -> None:
    adapt, every = method(amplitude=amplitude), torch.ones(8, dtype=torch.bool)
    added = adapt.step(-COSINES.double(), every)
    assert_close(added.mean(), torch.tensor(0.02, dtype=torch.float64), "", 1e-12)
    # I is centred and its largest size is 1.
    centred = COSINES.mean() - COSINES
    expected = 0.02 - amplitude * centred / centred.abs().max()
    assert_close(added, expected.double(), "", 1e-6)
    if amplitude:
        assert int(added.argmin()) == 0 and int(added.argmax()) == 3


def test_layers_that_are_alike_give_alike() -> None:
    added = method().step(torch.full((8,), -0.7).double(), torch.ones(8, dtype=torch.bool))
    assert_equal(added, torch.full((8,), 0.02, dtype=torch.float64))


def test_layers_with_nothing_left_to_give_are_out_of_the_mean() -> None:
    takes_part = torch.tensor([True] * 6 + [False] * 2)
    added = method().step(-COSINES.double(), takes_part)
    assert_close(added[:6].mean(), torch.tensor(0.02, dtype=torch.float64), "", 1e-12)
    assert_equal(added[6:], torch.zeros(2).double())


def test_the_most_important_layer_stays_when_the_amplitude_is_the_step() -> None:
    last = through_rounds(method(amplitude=0.02))[-1]
    assert (int(last[NEURONS][0]), int(last[GROUPS][0])) == (640, 5)
    assert int(last[NEURONS].argmin()) == 3
    order = COSINES.argsort()
    assert last[NEURONS][order].tolist() == sorted(last[NEURONS].tolist(), reverse=True)


def test_no_amplitude_is_uniform() -> None:
    for counts in through_rounds(method(amplitude=0.0)):
        for axis in (NEURONS, GROUPS):
            assert len(counts[axis].unique()) == 1
    target = {"ffn_hidden_size": 256, "num_query_groups": 2}
    last = through_rounds(method(amplitude=0.0, target=target))[-1]
    assert last[NEURONS].tolist() == [256] * 8 and last[GROUPS].tolist() == [2] * 8


@pytest.mark.parametrize("amplitude", [0.005, 0.02, 0.04])
@pytest.mark.parametrize("target", [
    {"parameters": 700_000}, {"parameters": 400_000}, {"ffn_hidden_size": 200},
    {"num_query_groups": 2}, {"ffn_hidden_size": 200, "num_query_groups": 3},
    {"parameters": 800_000, "ffn_hidden_size": 8},
])  # fmt: skip
def test_each_round_meets_its_goal_within_one_block(
    amplitude: float, target: dict[str, int]
) -> None:
    adapt = method(amplitude=amplitude, target=target)
    blocks = {NEURONS: 8 * 3 * 64, GROUPS: 64 * 16 * (2 * 3 + 2)}
    model = configuration.from_dict({"model": MODEL}).model
    full, before = Shape.full(model), everyone()
    for event, counts in enumerate(through_rounds(adapt), 1):
        shape = full
        for axis, live in counts.items():
            assert bool((live <= before[axis].long().sum(-1)).all()), "nobody comes back"
            assert bool((live % {NEURONS: 8, GROUPS: 1}[axis] == 0).all())
            shape = shape.with_counts(axis, live.tolist())
        size, goal = (
            shape.parameters(model).total,
            adapt.goal(dict.fromkeys(counts, event / ROUNDS)),
        )
        assert goal - max(blocks[axis] for axis in counts) < size <= goal
    if len(counts) == 2 or NEURONS in counts:  # what groups leave over neurons take
        assert size > goal - blocks[NEURONS]


def test_debts_are_kept_over_rounds_so_groups_go() -> None:
    counts = through_rounds(method(), rounds=40)
    assert all(int(c[GROUPS].sum()) > 0 for c in counts)
    first = next(i for i, c in enumerate(counts) if int(c[GROUPS].sum()) < 40)
    assert first > 0, "a group is not owed at once"
    groups, neurons = (
        counts[-1][axis].double().mean() / n for axis, n in ((GROUPS, 5), (NEURONS, 640))
    )
    assert abs(float(groups - neurons)) < 0.1, "both axes give alike"


def test_the_released_code_forgets_debts_so_groups_rarely_go() -> None:
    """The size of its 350M to 125M run: a group is a fifth, and no early round comes to that."""
    model = {
        "num_layers": 8, "hidden_size": 960, "ffn_hidden_size": 2560, "num_attention_heads": 15,
        "num_query_groups": 5, "kv_channels": 64,
    }  # fmt: skip

    def adapt(**prune: Any) -> AdaptPruner:
        full = Shape.full(configuration.from_dict({"model": MODEL | model}).model)
        blocks = full.parameters(configuration.from_dict({"model": MODEL | model}).model)
        goal = blocks.total - (blocks.attention + blocks.ffn) * 7 // 10
        return method(model, target={"parameters": goal}, **prune)

    def rounds(adapt: AdaptPruner) -> list[tuple[float, float]]:
        alive = everyone() | {NEURONS: torch.ones(8, 2560, dtype=torch.bool)}
        scores = {axis: torch.rand(rows.shape) for axis, rows in alive.items()}
        scores[LAYERS], memory, shares = -COSINES, torch.empty(0), []
        for event in range(1, 21):
            removed = dict.fromkeys(adapt.axes, event / 20)
            if adapt.is_due(alive, removed):
                counts, memory = adapt.budget(scores, alive, removed, memory)
                alive = {a: select(scores[a], alive[a], list(counts[a])) for a in counts}
            shares.append(tuple(float(alive[a].double().mean()) for a in (NEURONS, GROUPS)))
        return shares

    theirs, ours = rounds(adapt(as_released=True)), rounds(adapt())
    assert all(groups == 1 for _, groups in theirs[:10]), "no group in half of the rounds"
    assert theirs[-1][1] > 2 * theirs[-1][0], "neurons take nearly everything"
    assert ours[9][1] < 1 and abs(ours[-1][1] - ours[-1][0]) < 0.1
    assert adapt(as_released=True).budget(
        importance() | {NEURONS: torch.rand(8, 2560)},
        everyone() | {NEURONS: torch.ones(8, 2560, dtype=torch.bool)},
        {NEURONS: 0.1, GROUPS: 0.1}, torch.empty(0),
    )[1].numel() == 0, "nothing is remembered"  # fmt: skip


def test_an_amplitude_above_the_step_may_take_sparsity_back_and_ends_all_the_same() -> None:
    last = through_rounds(method(amplitude=1.0))[-1]
    assert int(last[NEURONS].min()) == 8 and int(last[NEURONS].max()) == 640


@pytest.mark.parametrize(
    ("prune", "says"),
    [
        ({"scope": "global"}, "prune.scope"),
        ({"order": ["ffn_hidden_size"]}, "prune.order"),
        ({"target": {"hidden_size": 64}}, "an axis of prune.strategy=adapt_pruner"),
        ({"strategy": "idea", "as_released": True}, "prune.as_released means nothing"),
        ({"amplitude": -0.1}, "prune.amplitude"),
        ({"sparsity_step": 0.0}, "prune.sparsity_step"),
        ({"moments": "forget"}, "legal values: keep, reset"),
    ],
)
def test_what_the_method_cannot_follow_is_refused(prune: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        prune = {"strategy": "adapt_pruner", "target": {"ffn_hidden_size": 384}} | prune
        validate(configuration.from_dict({"prune": prune}), 1)


@pytest.mark.parametrize(("removal", "legal"), [
    (None, True), ("rounds", True), ("one_shot", True), ("cubic", False), ("linear", False),
])  # fmt: skip
def test_adam_begins_anew_in_rounds_alone(removal: str | None, legal: bool) -> None:
    config = configuration.from_dict({
        "prune": {"strategy": "adapt_pruner", "moments": "reset"}, "schedule": {"removal": removal},
    })  # fmt: skip
    if legal:
        validate(config, 1)
        return
    with pytest.raises(ConfigError, match="to rounds or one_shot"):
        validate(config, 1)


# -- in a live model ---------------------------------------------------------------------------

TARGET = {NEURONS: 12, GROUPS: 2}
LOUD = small(
    model={"init_method_std": 0.3, "num_attention_heads": 8, "num_query_groups": 4},
    prune={"strategy": "adapt_pruner", "target": TARGET, "ema": 0.0},
    schedule={"rounds": 4},
)


def _observe(run: Any) -> None:
    from megatron_idea.prune.activations import watched

    with watched(run.trainable, run.pruner.scores.activations) as seen:
        backward(run.trainable)
    run.pruner.record(run.pruner.scores.observe(run.trainable, seen))


def _importance(run: Any) -> dict[str, Tensor]:
    """Of the gradients that are there, and the activations of a pass."""
    if run.pruner.pending_steps == 0:
        from megatron_idea.prune.activations import watched

        with watched(run.trainable, run.pruner.scores.activations) as seen:
            pass
        seen = {m: {(LAYERS, n): torch.zeros(1, 1) for n in range(2)} for m in seen}
        run.pruner.record(run.pruner.scores.observe(run.trainable, seen))
    run.pruner.scores.fold(run.trainable, run.pruner.stored)
    found: dict[str, Tensor] = run.pruner.strategy.importance(run.pruner.stats(run.trainable))
    return found


def _elements(trainable: Any) -> dict[str, Tensor]:
    """|w g|, fp64, of the whole matrices of one process."""
    from megatron_idea.engine.model import named_parameters

    return {
        name: (whole(trainable, p, "main").double() * whole(trainable, p, "grad")).abs().view_as(p)
        for name, p in named_parameters(trainable.chunks)
    }


def _by_hand(trainable: Any) -> dict[str, Tensor]:
    e, model = _elements(trainable), trainable.model
    neurons, groups = [], []
    for n in range(model.num_layers):
        at = f"decoder.layers.{n}."
        qkv, proj = (e[f"{at}self_attention.linear_{m}.weight"] for m in ("qkv", "proj"))
        fc1, fc2 = (e[f"{at}mlp.linear_{m}.weight"] for m in ("fc1", "fc2"))
        neurons.append(fc1.view(2, -1, fc1.shape[1]).sum((0, 2)) + fc2.sum(0))
        number = model.num_query_groups
        groups.append(qkv.reshape(number, -1).sum(1) + proj.T.reshape(number, -1).sum(1))
    return {NEURONS: torch.stack(neurons), GROUPS: torch.stack(groups)}


@on_ranks(1)
def test_scores_are_plain_sums_and_cosines(groups: ProcessGroups, config: Config) -> None:
    from megatron_idea.prune.activations import decoder_layers

    for skip in (False, True):
        run, _ = live_run(groups, replace(LOUD, prune={"skip_first_token": skip}))
        cosines: dict[int, list[Tensor]] = {0: [], 1: []}

        def look(
            layer: Any,
            _args: Any,
            inputs: Any,
            outputs: Any,
            cosines: Any = cosines,
            first: int = int(skip),
        ) -> None:
            x, y = inputs["hidden_states"].double(), outputs[0].double()
            cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
            cosines[layer.layer_number - 1].append(cosine[first:])

        for layer in decoder_layers(run.trainable):
            layer.register_forward_hook(look, with_kwargs=True)
        _observe(run)
        found = _importance(run)
        for axis, expected in _by_hand(run.trainable).items():
            assert_close(found[axis] / expected.max(), expected / expected.max(), axis, 2e-6)
        expected = -torch.stack([torch.cat(cosines[n]).mean() for n in range(2)])
        assert_close(found[LAYERS].double(), expected, "cosines", 1e-6)


@on_ranks(1)
def test_a_planted_query_head_counts_for_its_own_group(
    groups: ProcessGroups, config: Config
) -> None:
    """Head j belongs to group j // G; the released code credits it to j mod n."""
    owners = {}
    for released in (False, True):
        run, _ = live_run(groups, replace(LOUD, prune={"as_released": released}))
        owners[released] = []
        for head in range(8):
            backward(run.trainable)
            for layer in run.trainable.chunks[0].module.decoder.layers:
                attention = layer.self_attention
                gradient = attention.linear_qkv.weight.main_grad.view(4, 4, 4, -1)
                planted = gradient[head // 2, head % 2].clone()
                gradient.zero_()
                attention.linear_proj.weight.main_grad.zero_()
                gradient[head // 2, head % 2] = planted
            found = _importance(run)[GROUPS]
            (owner,) = found[0].nonzero().view(-1).tolist()
            owners[released].append(owner)
            expected = _by_hand(run.trainable)[GROUPS].sum(1)
            assert_close(found.double().sum(1) / expected, torch.ones(2).double(), "", 1e-5)
    assert owners == {False: [0, 0, 1, 1, 2, 2, 3, 3], True: [0, 1, 2, 3, 0, 1, 2, 3]}


def test_the_released_code_counts_living_heads() -> None:
    adapt = method(as_released=True)
    lines = torch.zeros(8, (2 * 3 + 2) * 16, 5)
    lines[:, 2 * 16, 3] = 1.0  # third head of group 3: number 11 of 15, 8 of the living 12
    alive = everyone() | {GROUPS: torch.tensor([True, False, True, True, True]).expand(8, 5)}
    stats = Stats(
        {
            Measure("abs", "sum", "line"): {NEURONS: torch.zeros(8, 3, 640), GROUPS: lines},
            Activation("cosine"): {LAYERS: COSINES[None]},
        }, {}, everyone(),
    )  # fmt: skip
    assert adapt.importance(stats)[GROUPS][0].tolist() == [0, 1, 0, 0, 0]  # 11 mod 5
    stats = dataclasses.replace(stats, alive=alive)
    assert adapt.importance(stats)[GROUPS][0].tolist() == [1, 0, 0, 0, 0]  # 8 mod 4


@on_ranks(1)
def test_a_layer_that_is_the_identity_is_least_important_and_gives_most(
    groups: ProcessGroups, config: Config
) -> None:
    run, _ = live_run(groups, LOUD)
    layer = run.trainable.chunks[0].module.decoder.layers[1]
    with torch.no_grad():
        for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
            linear.weight.zero_()
    _observe(run)
    pruner, strategy, found = run.pruner, run.pruner.strategy, _importance(run)
    assert_close(found[LAYERS][1], torch.tensor(-1.0), "a cosine of 1", 1e-6)
    assert float(found[LAYERS][0]) > -0.99
    alive = {axis: pruner.alive[axis] for axis in (NEURONS, GROUPS)}
    counts, memory = strategy.budget(found, alive, dict.fromkeys(alive, 0.5), torch.empty(0))
    assert (counts[NEURONS][0], counts[GROUPS][0]) == (24, 4) and float(memory[0]) == 0
    assert counts[NEURONS][1] < 24 and counts[GROUPS][1] < 4


@on_ranks(1)
def test_a_dead_unit_is_ranked_last(groups: ProcessGroups, config: Config) -> None:
    run, _ = live_run(groups, LOUD)
    with torch.no_grad():
        for layer in run.trainable.chunks[0].module.decoder.layers:
            layer.mlp.linear_fc1.weight.view(2, 24, -1)[:, 7] = 0
            layer.mlp.linear_fc2.weight[:, 7] = 0
            layer.self_attention.linear_proj.weight.view(16, 4, -1)[:, 2] = 0
            layer.self_attention.linear_qkv.weight.view(4, 16, -1)[2] = 0
    _observe(run)
    found = _importance(run)
    assert found[NEURONS].argmin(1).tolist() == [7, 7] and not bool(found[NEURONS][:, 7].any())
    assert found[GROUPS].argmin(1).tolist() == [2, 2]


LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
}
DEEP = replace(LOUD, model={"num_layers": 4}, prune={"moments": "reset"})
DEEP = replace(
    DEEP,
    schedule={
        "total_tokens": 24 * 96,
        "prune_fraction": 0.5,
        "enlarged_fraction": 0.2,
        "recover_fraction": 0.3,
    },
)
STEPS = 24


def _course(
    groups: ProcessGroups, config: Config, stop: int = 0, folder: str = ""
) -> dict[str, Any]:
    """Who lives and S step by step, and Adam's step count; saved after ``stop`` steps, if any."""
    from megatron_idea import checkpoint
    from megatron_idea.engine.optimizer import adam_step
    from megatron_idea.train import step

    run, state = live_run(groups, config)
    found: dict[str, Any] = {"alive": [], "memory": [], "adam": []}
    for number in range(1, STEPS + 1):
        step(run, state)
        _note(found, run)
        found["adam"].append(adam_step(run.trainable.optimizer, groups))
        if number == stop:
            checkpoint.save(replace(config, run_dir=folder), run.trainable, run.pruner, state)
    return found | _end(run, state)


def _note(found: dict[str, Any], run: Any) -> None:
    found["alive"].append({a: run.pruner.alive[a].tolist() for a in (NEURONS, GROUPS)})
    found["memory"].append(run.pruner.memory.tolist())


def _end(run: Any, state: Any) -> dict[str, Any]:
    from megatron_idea.engine.model import named_parameters

    weights = {}
    for name, parameter in named_parameters(run.trainable.chunks):
        weights[name] = [
            whole(run.trainable, parameter, what).numpy()
            for what in ("main", "exp_avg", "exp_avg_sq")
        ]
    return {"weights": weights, "shape": run.trainable.shape}


def _resumed(groups: ProcessGroups, config: Config, folder: str) -> dict[str, Any]:
    from megatron_idea import checkpoint
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.pruner import Pruner
    from megatron_idea.train import step

    path = checkpoint.latest(folder)
    assert path is not None
    run, _ = live_run(groups, config)
    state = checkpoint.read_state(path)
    run.trainable = assemble(config.sections, groups, state.shape, initialize=False)
    run.pruner = Pruner(config, run.trainable)
    checkpoint.load(run.trainable, run.pruner, path)
    found: dict[str, Any] = {"alive": [], "memory": []}
    while state.step < STEPS:
        step(run, state)
        _note(found, run)
    return found | _end(run, state)


@pytest.fixture(scope="module")
def alone(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, saved in the middle of the window and right after a reset."""
    folders = {stop: str(tmp_path_factory.mktemp("run")) for stop in RESUMED}
    for stop, folder in folders.items():
        (found,) = run_job(workers, _course, 1, DEEP, stop, folder)
    return found | {"folders": folders}


RESUMED = (7, 8)


def test_live_runs_end_at_the_goal_and_adam_begins_anew_each_round(alone: dict[str, Any]) -> None:
    sizes = [sum(map(sum, alive[NEURONS])) for alive in alone["alive"]]
    changed = [n for n in range(1, STEPS) if alone["alive"][n] != alone["alive"][n - 1]]
    assert 2 <= len(changed) <= 4 and sizes[-1] < sizes[0] == 96
    for n in range(STEPS):
        expected = 0 if n in changed else (alone["adam"][n - 1] if n else 0) + 1
        assert alone["adam"][n] == expected, (n, changed, alone["adam"])
    config = replace(DEEP)
    goal = Shape.full(config.model).with_counts(NEURONS, 12).with_counts(GROUPS, 2)
    left = goal.parameters(config.model).total - alone["shape"].parameters(config.model).total
    assert 0 <= left < 2 * 3 * 16


def _tables(groups: ProcessGroups, config: Config) -> list[tuple[dict[str, Tensor], Any]]:
    """Importance, as published and as released, and who of it would live on."""
    found = []
    for released in (False, True):
        run, _ = live_run(groups, replace(config, prune={"as_released": released}))
        _observe(run)
        scores = _importance(run)
        kept = run.pruner.keep(scores, {NEURONS: [12, 10, 8, 6], GROUPS: [3, 2, 1, 1]})
        found.append(
            ({axis: table.numpy() for axis, table in scores.items()}, kept[GROUPS].tolist())
        )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_sees_what_one_process_sees(
    workers: Workers, tables: Any, layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    for found in run_job(workers, _tables, world_size, replace(DEEP, parallel=parallel)):
        for (scores, kept), (expected, expected_kept) in zip(found, tables, strict=True):
            assert kept == expected_kept
            for axis, table in expected.items():
                scale = abs(table).max()
                assert_close(
                    torch.tensor(scores[axis] / scale), torch.tensor(table / scale), axis, 1e-5
                )


@pytest.fixture(scope="module")
def tables(workers: Workers) -> Any:
    return run_job(workers, _tables, 1, DEEP)[0]


# With more tensor-parallel ranks a block is another one, and layers owe it at another time.
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "tp2"])
def test_every_layout_takes_the_course_of_one_process(
    workers: Workers, alone: dict[str, Any], layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    for found in run_job(workers, _course, world_size, replace(DEEP, parallel=parallel)):
        assert found["adam"] == alone["adam"]
        for mine, theirs in zip(found["alive"], alone["alive"], strict=True):
            assert mine == theirs
        for mine, theirs in zip(found["memory"], alone["memory"], strict=True):
            assert_close(torch.tensor(mine), torch.tensor(theirs), "S", 1e-4)
        if layout != "dp2":
            continue
        for name, values in alone["weights"].items():
            for ours, expected in zip(found["weights"][name], values, strict=True):
                scale = max(float(abs(expected).max()), 1e-30)
                assert_close(torch.tensor(ours) / scale, torch.tensor(expected) / scale, name, 1e-3)


def test_tensor_parallel_ranks_get_whole_blocks(workers: Workers) -> None:
    world_size, parallel = LAYOUTS["tp2"]
    config = replace(DEEP, parallel=parallel)
    found, other = run_job(workers, _course, world_size, config)
    assert found["alive"] == other["alive"]
    shape = found["shape"]
    assert all(n % 4 == 0 for n in shape.counts(NEURONS))
    assert all(n % 2 == 0 for n in shape.counts(GROUPS))
    goal = Shape.full(config.model).with_counts(NEURONS, 12).with_counts(GROUPS, 2)
    left = goal.parameters(config.model).total - shape.parameters(config.model).total
    assert 0 <= left < 4 * 3 * 16


def _assert_same(found: dict[str, Any], expected: dict[str, Any], stop: int) -> None:
    assert any(expected["memory"][stop - 1])
    assert found["memory"] == expected["memory"][stop:]
    assert found["alive"] == expected["alive"][stop:]
    for name, values in expected["weights"].items():
        for ours, theirs in zip(found["weights"][name], values, strict=True):
            assert ours.tobytes() == theirs.tobytes(), name


@pytest.mark.parametrize("stop", RESUMED)
def test_a_resume_goes_on_bit_for_bit(workers: Workers, alone: dict[str, Any], stop: int) -> None:
    """With what layers owe, and right after Adam began anew."""
    assert (alone["adam"][stop - 1] == 0) == (stop == RESUMED[1]), alone["adam"]
    (found,) = run_job(workers, _resumed, 1, DEEP, alone["folders"][stop])
    _assert_same(found, alone, stop)


def test_main_weights_are_saved_where_adam_has_just_begun_anew(
    workers: Workers, tmp_path: Path
) -> None:
    config = replace(DEEP, training={"precision": "bf16"})
    stop = RESUMED[1]
    (expected,) = run_job(workers, _course, 1, config, stop, str(tmp_path))
    assert expected["adam"][stop - 1] == 0
    (found,) = run_job(workers, _resumed, 1, config, str(tmp_path))
    _assert_same(found, expected, stop)


def test_a_resume_in_another_layout_takes_the_same_course(
    workers: Workers, alone: dict[str, Any]
) -> None:
    config = replace(DEEP, parallel={"pipeline_model_parallel_size": 2})
    stop = RESUMED[0]
    for found in run_job(workers, _resumed, 2, config, alone["folders"][stop]):
        assert found["alive"] == alone["alive"][stop:]
        for mine, theirs in zip(found["memory"], alone["memory"][stop:], strict=True):
            assert_close(torch.tensor(mine), torch.tensor(theirs), "S", 1e-4)
