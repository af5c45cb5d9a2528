"""The second-order update: its formula, where it acts, in every layout, and runs with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jobs import RandomBatches, live_run, run_job, small, train_on, whole
from test_all_axes import LAYOUTS, MODEL, TP2, killed_after, pruned, whole_run
from test_checkpoint import checkpoint_at, curves, tensors
from torch import Tensor

from megatron_idea.config import Config, ConfigError, PruneTarget, replace, validate
from megatron_idea.prune.refit import regression
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.testing import Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

NEURONS, GROUPS, CHANNELS = "ffn_hidden_size", "num_query_groups", "hidden_size"
TARGET = {NEURONS: 12, GROUPS: 2, CHANNELS: 16}

# ------------------------------------------------------------------------------ the formula, fp64


def problem(inputs: int = 24, outputs: int = 7, tokens: int = 100) -> tuple[Tensor, Tensor]:
    """A matrix and what goes into it, correlated."""
    generator = torch.Generator().manual_seed(0)
    mix, noise, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((inputs, inputs), (inputs, tokens), (outputs, inputs))
    )
    return weight, mix @ noise


def masks(lost: list[int], inputs: int = 24) -> tuple[Tensor, Tensor]:
    gone = torch.zeros(inputs, dtype=torch.bool)
    gone[lost] = True
    return gone, ~gone


def updated(weight: Tensor, gram: Tensor, gone: Tensor, stay: Tensor, damping: float) -> Tensor:
    after = weight + weight[:, gone] @ regression(gram, gone, stay, damping).T
    after[:, gone] = 0
    return after


def test_the_update_is_that_of_optimal_brain_surgeon_and_of_ridge_regression() -> None:
    weight, x = problem()
    gone, stay = masks([3, 4, 17])
    gram = x @ x.T
    after = updated(weight, gram, gone, stay, 0.01)
    ridge = 0.01 * gram.diagonal().mean()
    inverse = torch.linalg.inv(gram + ridge * torch.eye(24, dtype=torch.float64))
    of_lost = torch.linalg.inv(inverse[gone][:, gone])
    expected = weight - weight[:, gone] @ of_lost @ inverse[gone]
    assert_close(after, expected, "OBS", 1e-10)
    # Squares of outputs' and weights' changes, half of them: what the formula predicts.
    change = after - weight
    error = 0.5 * ((change @ x).square().sum() + ridge * change.square().sum())
    lost = weight[:, gone]
    assert_close(error, 0.5 * torch.trace(lost @ of_lost @ lost.T), "error", 1e-10)
    stacked = torch.cat([x[stay].T, ridge.sqrt() * torch.eye(21, dtype=torch.float64)])
    wanted = torch.cat([(lost @ x[gone]).T, torch.zeros(21, 7, dtype=torch.float64)])
    solved = torch.linalg.lstsq(stacked, wanted).solution.T
    assert_close(after[:, stay], weight[:, stay] + solved, "ridge", 1e-10)
    plain = weight * stay
    assert ((after - weight) @ x).square().sum() < ((plain - weight) @ x).square().sum()


def test_one_column_after_the_other_is_all_at_once() -> None:
    weight, x = problem()
    gram, alive = x @ x.T, torch.ones(24, dtype=torch.bool)
    # The same lambda all along: the mean is over those that still live.
    ridge = 0.01 * gram.diagonal().mean()
    one_by_one = weight
    for column in (17, 3, 4):
        gone, _ = masks([column])
        stay = alive & ~gone
        mean = gram.diagonal()[alive].mean()
        one_by_one = updated(one_by_one, gram, gone, stay, float(ridge / mean))
        alive = stay
    assert_close(one_by_one, updated(weight, gram, *masks([3, 4, 17]), 0.01), "at once", 1e-10)


def test_blocks_are_exact_when_their_inputs_have_nothing_in_common() -> None:
    weight, x = problem()
    gram = torch.block_diag(x[:12] @ x[:12].T, x[12:] @ x[12:].T)
    gone, stay = masks([3, 4, 17])
    beta = regression(gram, gone, stay, 1e-300)
    parts = []
    for half in (slice(0, 12), slice(12, 24)):
        block = gram[half, half]
        mine = regression(block, gone[half], stay[half], 1e-300)
        parts.append(weight[:, half] + weight[:, half][:, gone[half]] @ mine.T)
    assert_close(torch.cat(parts, dim=1), weight + weight[:, gone] @ beta.T, "blocks", 1e-10)


def test_a_factorisation_that_fails_gets_more_damping_and_silence_none() -> None:
    x = torch.ones(4, 9, dtype=torch.float64)  # four inputs that are one
    gone, stay = masks([1], 4)
    beta = regression(x @ x.T, gone, stay, 1e-30)
    assert_close(beta[stay].sum(), torch.tensor(1.0, dtype=torch.float64), "one of three", 1e-6)
    assert beta[1] == 0
    assert not regression(torch.zeros(4, 4, dtype=torch.float64), gone, stay, 0.01).any()


# --------------------------------------------------------------------------------- in the engine


def refitting(target: dict[str, int] = TARGET, **sections: Any) -> Config:
    """A run over all axes with the update, untied, by every second of a step's 12 x 8 tokens.

    The first steps remove nothing.
    """
    model = {**MODEL, "share_embeddings_and_output_weights": False}
    config = pruned(target, model=model, **sections)
    return replace(
        config,
        prune={
            "strategy": "efficient_llm",
            "update": "obs",
            "compaction_block": 4,
            "update_tokens": 12 * 4 + 11,
        },
    )


def mains(trainable: Any) -> dict[str, Tensor]:
    from megatron_idea.engine.model import named_parameters

    return {
        name: whole(trainable, p, "main").view(p.shape).clone()
        for name, p in named_parameters(trainable.chunks)
    }


def moments(trainable: Any) -> list[Tensor]:
    return [
        whole(trainable, p, what).clone()
        for p in trainable.parameters
        for what in ("exp_avg", "exp_avg_sq")
    ]


LOST = {
    NEURONS: lambda layer: [1, 4 + layer, 13, 22],
    GROUPS: lambda layer: [layer % 4],
    CHANNELS: lambda _: [2, 3, 10, 17, 31],
}


def keep_all_but_lost(pruner: Any) -> dict[str, Tensor]:
    kept = {axis: alive.clone() for axis, alive in pruner.alive.items()}
    for axis, units in LOST.items():
        for layer, row in enumerate(torch.atleast_2d(kept[axis])):
            row[units(layer)] = False
    return kept


def refitted(groups: ProcessGroups, config: Config, by_hand: bool) -> dict[str, Any]:
    """Main weights of this rank, whole over DP, before and after the update alone."""
    from megatron_idea.prune.plan import Plan
    from megatron_idea.train import probe, step

    run, state = live_run(groups, config)
    step(run, state)
    trainable, pruner = run.trainable, run.pruner
    plan = Plan.of(keep_all_but_lost(pruner), trainable.shape, pruner.memory)
    before, kept_moments = mains(trainable), moments(trainable)
    expected = expected_by_hand(trainable, pruner, probe(run, state)) if by_hand else {}
    pruner.mend(trainable, plan, probe(run, state))
    after = mains(trainable)
    for ours, theirs in zip(moments(trainable), kept_moments, strict=True):
        assert_equal(ours, theirs, "moments")
    for name, parameter in trainable_names(trainable):
        assert_equal(parameter.data.float(), after[name].to(parameter.dtype).float(), name)
        if name in expected:
            scale = (expected[name] - before[name]).abs().max()
            assert scale > 1e-4, name
            moved = (after[name] - before[name]) / scale
            assert_close(moved.double(), (expected[name] - before[name]) / scale, name, 2e-3)
            assert_close(after[name].double(), expected[name], name, 1e-6)
    reads = ("fc1.weight", "fc2.weight", "qkv.weight", "proj.weight", "output_layer.weight")
    for name, value in after.items():
        if not name.endswith(reads):
            assert_equal(value, before[name], name)
        elif groups.tp.size() == 1 or config.prune.update_form == "exact":
            assert not torch.equal(value, before[name]), name
    pruner.silence(trainable, plan)
    final = mains(trainable)
    for name, parameter in trainable_names(trainable):
        assert_equal(parameter.data.float(), final[name].to(parameter.dtype).float(), name)
    for layer, mlp in trainable.mlps:
        assert not mlp.linear_fc2.weight[:, lost_neurons(pruner, groups, layer)].any()
    return {
        "after": {name: value.numpy() for name, value in after.items()},
        "final": {name: value.numpy() for name, value in final.items()},
        "tp": groups.tp.rank(),
    }


def lost_neurons(pruner: Any, groups: Any, layer: int) -> list[int]:
    """Their places on this rank."""
    numbers = pruner.stored[NEURONS][layer].chunk(groups.tp.size())[groups.tp.rank()].tolist()
    return [place for place, number in enumerate(numbers) if number in LOST[NEURONS](layer)]


def trainable_names(trainable: Any) -> list[tuple[str, Any]]:
    from megatron_idea.engine.model import named_parameters

    return list(named_parameters(trainable.chunks))


def expected_by_hand(trainable: Any, pruner: Any, probe: Any) -> dict[str, Tensor]:
    """Ridge regressions of what this rank's linear layers read, by hooks on them, in fp64."""
    from megatron_idea.engine.model import unwrap

    seen: dict[str, list[Tensor]] = {}
    linears: dict[str, tuple[Any, list[int]]] = {}
    model = unwrap(trainable.chunks[0])
    tp = trainable.groups.tp
    for layer in range(4):
        block, place = model.decoder.layers[layer], f"decoder.layers.{layer}"
        neurons = lost_neurons(pruner, trainable.groups, layer)
        width = 4 // tp.size()
        here = range(tp.rank() * width, (tp.rank() + 1) * width)
        heads = [here.index(g) * 8 + i for g in LOST[GROUPS](layer) if g in here for i in range(8)]
        linears[f"{place}.mlp.linear_fc1.weight"] = block.mlp.linear_fc1, LOST[CHANNELS](0)
        linears[f"{place}.mlp.linear_fc2.weight"] = block.mlp.linear_fc2, neurons
        attention = f"{place}.self_attention"
        linears[f"{attention}.linear_qkv.weight"] = (
            block.self_attention.linear_qkv, LOST[CHANNELS](0),
        )  # fmt: skip
        linears[f"{attention}.linear_proj.weight"] = block.self_attention.linear_proj, heads
    linears["output_layer.weight"] = model.output_layer, LOST[CHANNELS](0)
    hooks = []
    for name, (linear, _) in linears.items():

        def look(_linear: Any, inputs: Any, name: str = name) -> None:
            seen.setdefault(name, []).append(inputs[0][1::2].detach().double().flatten(0, 1))

        hooks.append(linear.register_forward_pre_hook(look))
    probe.loss()
    for hook in hooks:
        hook.remove()
    expected = {}
    for name, (linear, lost) in linears.items():
        if not lost:
            continue
        x, weight = torch.cat(seen[name]), linear.weight.detach().double()
        gone, stay = masks(lost, x.shape[1])
        ridge = 0.01 * x.square().sum(0).mean()
        size = int(stay.sum())
        stacked = torch.cat([x[:, stay], ridge.sqrt() * torch.eye(size, dtype=torch.float64)])
        wanted = torch.cat([x[:, gone] @ weight[:, gone].T, torch.zeros(size, len(weight))])
        after = weight.clone()
        after[:, stay] += torch.linalg.lstsq(stacked, wanted).solution.T
        expected[name] = after
    return expected


def over_ranks(found: list[dict[str, Any]], what: str) -> dict[str, np.ndarray]:
    """Whole matrices, of TP and PP ranks; those of DP ranks are the same."""
    by_tp: dict[int, dict[str, np.ndarray]] = {}
    for rank in found:
        mine = by_tp.setdefault(rank["tp"], {})
        for name, value in rank[what].items():
            assert np.array_equal(mine.setdefault(name, value), value), name
    if len(by_tp) == 1:
        return by_tp[0]
    joined = {}
    for name in by_tp[0]:
        parts = [by_tp[rank][name] for rank in sorted(by_tp)]
        if parts[0].ndim == 1:
            joined[name] = parts[0]
        elif "fc1" in name:
            halves = [np.split(part, 2) for part in parts]
            joined[name] = np.concatenate([half[i] for i in range(2) for half in halves])
        else:
            joined[name] = np.concatenate(parts, axis=int("fc2" in name or "proj" in name))
    return joined


@pytest.fixture(scope="module")
def of_one_process(workers: Workers) -> dict[str, np.ndarray]:
    (found,) = run_job(workers, refitted, 1, refitting(), True)
    return over_ranks([found], "final")


@pytest.mark.parametrize("layout", ["tp2", "tp2_no_sp", "pp2", "vpp2", "dp2", "replicated"])
def test_the_exact_update_does_not_depend_on_the_layout(
    workers: Workers, of_one_process: dict[str, np.ndarray], layout: str
) -> None:
    world_size, parallel = LAYOUTS.get(layout, (2, {"use_distributed_optimizer": False}))
    config = replace(refitting(parallel=parallel), prune={"update_form": "exact"})
    final = over_ranks(run_job(workers, refitted, world_size, config, False), "final")
    assert final.keys() == of_one_process.keys()
    for name, expected in of_one_process.items():
        scale = np.abs(expected).max()
        ours, theirs = (torch.from_numpy(x / scale) for x in (final[name], expected))
        assert_close(ours, theirs, name, 1e-5)


def test_a_block_update_is_of_a_ranks_own_inputs(
    workers: Workers, of_one_process: dict[str, np.ndarray]
) -> None:
    size, parallel = LAYOUTS["tp2_no_sp"]
    found = run_job(workers, refitted, size, refitting(parallel=parallel), True)
    final = over_ranks(found, "final")
    for name, expected in of_one_process.items():
        differs = not np.allclose(final[name], expected, rtol=0, atol=1e-5)
        assert differs == name.endswith(("fc2.weight", "proj.weight")), name


def test_a_tied_output_layer_and_bf16(workers: Workers) -> None:
    config = refitting(training={"precision": "bf16"}, parallel=TP2)
    tied = replace(config, model={"share_embeddings_and_output_weights": True})
    for found in run_job(workers, refitted, 2, tied, False):
        assert "output_layer.weight" not in found["after"]


class OneBatch(RandomBatches):
    """The same tokens at every step: a model learns them by heart, and misses what is removed."""

    def step(self, consumed_samples: int) -> Iterator[dict[str, Tensor]]:
        return super().step(0)


def around_events(groups: ProcessGroups, config: Config) -> dict[str, list[float]]:
    """Loss of a step's batch, after an event of an axis without the update, and after one with."""
    from megatron_idea.prune.plan import Plan
    from megatron_idea.train import probe, step

    run, state = live_run(groups, config)
    run.data = OneBatch(config, groups)
    for _ in range(config.schedule.total_tokens // config.batch_tokens - 10):
        step(run, state)
    trainable, pruner, batch = run.trainable, run.pruner, probe(run, state)
    pruner.scores.fold(trainable, pruner.stored)
    importance = pruner.strategy.importance(pruner.stats(trainable))
    everyone = pruner.alive
    weights = [p.detach().clone() for p in trainable.parameters]
    found = {axis: [batch.loss()] for axis in pruner.goals}
    for axis, goal in pruner.goals.items():
        kept = pruner.keep(
            importance, {axis: [goal.target] * len(torch.atleast_2d(everyone[axis]))}
        )
        plan = Plan.of(kept, trainable.shape, pruner.memory, pruner._gains(kept, batch))
        for updates in (False, True):
            if updates:
                pruner.mend(trainable, plan, batch)
            pruner.silence(trainable, plan)
            found[axis].append(batch.loss())
            for parameter, weight in zip(trainable.parameters, weights, strict=True):
                parameter.data.copy_(weight)
            pruner.alive = everyone
            pruner.tell_layers(trainable)
    assert batch.loss() == found[NEURONS][0]
    return found


def test_an_event_costs_less_loss_with_the_update(workers: Workers) -> None:
    config = small(
        model={
            "hidden_size": 32, "ffn_hidden_size": 64, "num_query_groups": 4,
            "share_embeddings_and_output_weights": False,
        },
        prune={
            "strategy": "efficient_llm", "update": "obs", "channel_alignment": 4,
            "target": PruneTarget(**{NEURONS: 32, GROUPS: 2, CHANNELS: 24}),
            "norm_rescale": "mean_square",
        },
        schedule={
            "total_tokens": 120 * 96, "lr": 1e-2, "enlarged_fraction": 0.0, "prune_fraction": 1.0,
            "recover_fraction": 0.0, "prune_warmup_fraction": 0.95,
        },
    )  # fmt: skip
    for axis, losses in run_job(workers, around_events, 1, config)[0].items():
        before, plain, with_update = losses
        assert before < with_update < plain, (axis, losses)


@pytest.fixture()
def real(tiny: Config) -> Config:
    """A run on text: 24 steps, three axes shrink with the update in steps 9 to 16."""
    return replace(
        tiny,
        model={**MODEL, "qk_layernorm": True},
        prune={
            "strategy": "efficient_llm", "update": "obs", "channel_alignment": 4,
            "target": PruneTarget(**{**TARGET, NEURONS: 24}),
        },
        checkpoint={"before_compaction": True, "keep_last": 0},
        evaluation={"around_compaction": True},
    )  # fmt: skip


def test_a_run_with_the_update_goes_on_from_a_due_event_bit_for_bit(
    real: Config, workers: Workers, tmp_path: Path
) -> None:
    from megatron_idea.checkpoint import read_state
    from megatron_idea.checkpoint.compact import compact_checkpoint

    config = replace(real, parallel=TP2, prune={"alignment": 2, "compaction_block": 20})
    workers.run(train_on, 2, config)
    last = read_metrics(Path(config.run_dir))[-1]
    assert {axis: set(last.stored[axis]) for axis in TARGET} == {
        NEURONS: {24}, GROUPS: {2}, CHANNELS: {16},
    }  # fmt: skip
    events = read_events(Path(config.run_dir))
    losses = [
        [
            e["val_loss"]
            for e in events
            if e["kind"] == "evaluated" and e["why"] == f"compaction_{side}"
        ]
        for side in ("before", "after")
    ]
    assert len(losses[0]) >= 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-6), "silent is cut"
    folder = Path(config.run_dir) / "checkpoints"
    steps = [int(path.name.removeprefix("step_")) for path in sorted(folder.iterdir())]
    due = [step for step in steps if read_state(checkpoint_at(config.run_dir, step)).plan_due]
    again = killed_after(config, due[1], tmp_path / "again")
    workers.run(train_on, 2, again)
    assert curves(again.run_dir, 0) == curves(config.run_dir, 0)
    ours, theirs = (tensors(checkpoint_at(run, 24)) for run in (again.run_dir, config.run_dir))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal(ours[name], theirs[name], name)
    with pytest.raises(ConfigError, match="fits weights to the run's training data"):
        compact_checkpoint(checkpoint_at(config.run_dir, due[1]), tmp_path / "refused")


@pytest.mark.parametrize("layout", ["dp2"])
def test_silent_units_and_cut_ones_train_alike_with_the_update(
    workers: Workers, cut_later: dict[str, Any], layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    config = replace(refitting(parallel=parallel), prune={"update_form": "exact"})
    validate(config, world_size)
    cut, *others = run_job(workers, whole_run, world_size, config)
    assert cut["losses"] == pytest.approx(cut_later["losses"], rel=1e-6)
    assert all(other["alive"] == cut_later["alive"] for other in (cut, *others))
    assert cut["stored"][NEURONS] == [12] * 4 and cut["stored"][CHANNELS] == [16]
    assert len(cut["compactions"]) >= 3


@pytest.fixture(scope="module")
def cut_later(workers: Workers) -> dict[str, Any]:
    (found,) = run_job(workers, whole_run, 1, replace(refitting(), prune={"compact": False}))
    return dict(found)


def test_the_update_needs_a_token_of_each_sequence() -> None:
    config = replace(refitting(), prune={"update_tokens": 11})
    with pytest.raises(ConfigError, match=r"update_tokens \(11\) must be at least .* \(12\)"):
        validate(config, 1)
