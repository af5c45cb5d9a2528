"""The nine properties that make this the method of IDEA Prune (arXiv 2503.05920), in the live job.

Numbered as in the method's description: learning rate, budget, mask, compaction, gradients,
moving average, signed sums, Adam, no pruning. Where the paper leaves a choice, our reading is
tested.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jobs import backward, live_run, on_ranks, random_tokens, small, whole
from torch import Tensor

from megatron_idea.config import Config, ScheduleConfig, replace
from megatron_idea.course import removed_at
from megatron_idea.schedule import learning_rate, phase_ends
from megatron_idea.testing import TOLERANCE, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

STEPS = 16
BATCH_TOKENS = small().batch_tokens
# 4 steps enlarged, 8 in which neurons go (the first only measures), 4 to recover.
SCHEDULE = {
    "total_tokens": STEPS * BATCH_TOKENS, "lr": 1e-2, "min_lr": 1e-4,
    "enlarged_fraction": 0.25, "prune_fraction": 0.5, "recover_fraction": 0.25,
    "prune_warmup_fraction": 0.125,
}  # fmt: skip


def pruning(config: Config, **prune: Any) -> Config:
    return replace(config, schedule=SCHEDULE, prune=prune)


def run_steps(run: Any, state: Any, steps: int) -> list[dict[str, Any]]:
    from megatron_idea.train import step

    return [step(run, state)[0] for _ in range(steps)]


def logits(trainable: Any, seed: int = 100) -> Tensor:
    """[b, s, vocab_size] of the model as it is."""
    tokens = random_tokens(trainable.sections, seed)[:, :-1]
    (chunk,) = trainable.chunks
    with torch.no_grad():
        return chunk(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


NEURONS = "ffn_hidden_size"


def alive_of(run: Any, layer: int) -> Tensor:
    """bool [stored neurons of this rank's layer]."""
    return run.pruner.alive[NEURONS][layer][run.pruner.stored[NEURONS][layer]]


def parts_of(mlp: Any, neurons: Tensor) -> list[tuple[Tensor, Any]]:
    """(matrix, index of the marked neurons in it) for gate, up and down."""
    none = torch.zeros_like(neurons)
    fc1, fc2 = mlp.linear_fc1.weight, mlp.linear_fc2.weight
    return [
        (fc1, torch.cat([neurons, none])),
        (fc1, torch.cat([none, neurons])),
        (fc2, (slice(None), neurons)),
    ]


@pytest.mark.parametrize("boundary", ["enlarged", "prune"])
def test_1_the_learning_rate_falls_by_one_steps_decay_at_each_boundary(boundary: str) -> None:
    steps = 1000
    schedule = ScheduleConfig(total_tokens=steps * 2048, lr=0.01, min_lr=5e-5)
    at = phase_ends(schedule)[boundary] // 2048
    rates = [learning_rate(schedule, s * 2048) for s in range(at - 3, at + 5)]
    falls = [a - b for a, b in itertools.pairwise(rates)]
    # The cosine's own decay per step: it hardly changes over seven steps, boundary or not.
    assert max(falls) / min(falls) < 1.02
    steepest = math.pi / 2 * (schedule.lr - schedule.min_lr) / (0.99 * steps)
    assert 0 < min(falls) <= max(falls) <= steepest


def test_1_the_naive_restart_jumps_at_the_boundary() -> None:
    schedule = ScheduleConfig(total_tokens=1000 * 2048, lr=0.01, min_lr=5e-5, kind="restarted")
    at = phase_ends(schedule)["enlarged"] // 2048
    fully_annealed, warmed_up = (learning_rate(schedule, s * 2048) for s in (at, at + 10))
    assert (fully_annealed, warmed_up) == pytest.approx((5e-5, 0.01))


@pytest.mark.parametrize("compact", [True, False], ids=["compacted", "masked"])
@on_ranks(1)
def test_2_live_neurons_follow_the_schedule_in_every_layer_and_never_return(
    groups: ProcessGroups, config: Config, compact: bool
) -> None:
    run, state = live_run(groups, pruning(config, compact=compact))
    before = run.pruner.alive[NEURONS]
    counts = []
    for _ in range(STEPS):
        (record,) = run_steps(run, state, 1)
        share = removed_at(run.config, state.consumed_tokens)
        assert record.live["ffn_hidden_size"] == [round(24 - 12 * share)] * 2
        alive = run.pruner.alive[NEURONS]
        assert not (alive & ~before).any(), "a removed neuron came back"
        before = alive
        counts.append(record.live["ffn_hidden_size"][0])
        (average,) = run.pruner.scores.average.values()
        # Whatever a removed neuron's score says.
        average[NEURONS].masked_fill_(~alive[:, None], 1e9)
    assert counts[:5] == [24] * 5
    assert counts[11:] == [12] * 5
    assert len(set(counts)) > 4, "gradual"
    assert state.shape.counts(NEURONS) == ((12, 12) if compact else (24, 24))


@on_ranks(1)
def test_3_a_removed_neuron_is_gone_from_all_three_matrices(
    groups: ProcessGroups, config: Config
) -> None:
    run, state = live_run(groups, pruning(config, compact=False))
    run_steps(run, state, 9)
    trainable = run.trainable
    for layer, mlp in trainable.mlps:
        alive = alive_of(run, layer)
        assert 0 < int(alive.sum()) < 24
        for weight, removed in parts_of(mlp, ~alive):
            for what in ("main", "exp_avg", "exp_avg_sq"):
                assert not whole(trainable, weight, what).view_as(weight)[removed].any(), what
            assert not weight.data[removed].any()
    before = logits(trainable)
    for layer, mlp in trainable.mlps:
        for weight, live in parts_of(mlp, alive_of(run, layer)):
            weight.data[live] += 1.0
            after = logits(trainable)
            assert not torch.equal(after, before), "each matrix of a live neuron counts"
            before = after


def in_fp64(trainable: Any) -> Any:
    """A copy of the model in double precision, without masks: zeros are enough."""
    from megatron_idea.engine.model import build_model, named_parameters

    chunks = build_model(trainable.model, trainable.training, trainable.core, trainable.groups)
    weights = dict(named_parameters(trainable.chunks))
    for name, parameter in named_parameters(chunks):
        parameter.data.copy_(weights[name])
    (chunk,) = (chunk.double() for chunk in chunks)
    return chunk


@pytest.mark.parametrize("steps", [9, STEPS])
@on_ranks(1)
def test_4_zeroed_and_compacted_model_are_one_function(
    groups: ProcessGroups, config: Config, steps: int
) -> None:
    from megatron_idea.prune.plan import Plan

    run, state = live_run(groups, pruning(config, compact=False))
    run_steps(run, state, steps)
    trainable, pruner = run.trainable, run.pruner
    zeroed = in_fp64(trainable)
    live = max(pruner.alive[NEURONS].sum(1).tolist())
    shape = trainable.shape.with_counts(NEURONS, live)
    pruner.compact(trainable, Plan.of(pruner.alive, shape, pruner.memory))
    assert trainable.shape.counts(NEURONS) == (live, live) < (24, 24)
    compacted = in_fp64(trainable)
    tokens = random_tokens(config, seed=100)[:, :-1]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    a, b = (model(tokens, positions, None) for model in (zeroed, compacted))
    assert a.dtype == torch.float64
    assert_close(b, a, "logits", TOLERANCE[torch.float64])
    dy = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=a.dtype)
    for model, out in ((zeroed, a), (compacted, b)):
        out.backward(dy)
        model.seen = model.embedding.word_embeddings.weight.grad
    assert_close(compacted.seen, zeroed.seen, "gradients", TOLERANCE[torch.float64])


@on_ranks(1)
def test_5_gradients_of_removed_neurons_are_exactly_zero(
    groups: ProcessGroups, config: Config
) -> None:
    run, state = live_run(groups, pruning(config, compact=False))
    seen = 0
    for _ in range(STEPS):
        before = {layer: alive_of(run, layer) for layer, _ in run.trainable.mlps}
        run_steps(run, state, 1)  # its gradients were made before it removed more
        for layer, mlp in run.trainable.mlps:
            removed = ~before[layer]
            for weight, index in parts_of(mlp, removed):
                gradient = whole(run.trainable, weight, "grad").view_as(weight)
                assert not gradient[index].any()
                assert gradient.any()
            seen += int(removed.sum())
    assert seen > 0


@on_ranks(1)
def test_6_the_average_of_row_means_is_the_row_mean_of_the_average(
    groups: ProcessGroups, config: Config
) -> None:
    run, _ = live_run(groups, pruning(config, ema=0.4))
    trainable, scores, stored = run.trainable, run.pruner.scores, run.pruner.stored
    (_, mlp), _ = trainable.mlps
    weights = [mlp.linear_fc1.weight, mlp.linear_fc2.weight]
    elementwise = [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]
    for seed in range(5):
        backward(trainable, seed)
        for average, weight in zip(elementwise, weights, strict=True):
            grad = whole(trainable, weight, "grad").view_as(weight)
            average.mul_(0.4).add_((weight.detach().double() * grad.double()).abs(), alpha=0.6)
        scores.record(scores.observe(trainable))
        scores.fold(trainable, stored)
        for weight in weights:  # the weights move while the average runs
            weight.data.mul_(1.1)
    gate, up = elementwise[0].mean(1).chunk(2)
    expected = torch.stack([gate, up, elementwise[1].mean(0)])
    (average,) = scores.average.values()
    means = average[NEURONS][0] / config.model.hidden_size
    assert_close(means / expected.max(), expected / expected.max(), tolerance=1e-6)
    # The maximum over matrices does not commute: it comes after.
    assert len(set(expected.argmax(0).tolist())) > 1


@on_ranks(1)
def test_7_signed_sums_of_up_and_down_are_the_same_number_and_gates_is_another(
    groups: ProcessGroups, config: Config
) -> None:
    config = replace(config, model={"init_method_std": 0.3})
    run, _ = live_run(groups, pruning(config, element="signed"))
    backward(run.trainable)
    (sums,) = run.pruner.scores.observe(run.trainable).values()
    assert len(sums) == 2
    for gate, up, down in sums.values():
        scale = up.abs().max()
        assert_close(up / scale, down / scale, tolerance=1e-5)
        # silu is not linear: the gate's sum is off by far more than rounding.
        assert float((gate - up).abs().median() / scale) > 1e-2


@on_ranks(1)
def test_8_removed_neurons_stay_removed_through_fifty_steps_of_adam(
    groups: ProcessGroups, config: Config
) -> None:
    """Momentum and weight decay move every live weight; zeros stay zeros."""
    from megatron_idea.engine.optimizer import update

    run, state = live_run(groups, pruning(config, compact=False))
    run_steps(run, state, STEPS)
    trainable = run.trainable
    removed = [
        part for layer, mlp in trainable.mlps for part in parts_of(mlp, ~alive_of(run, layer))
    ]
    start = [weight.detach().clone() for weight, _ in removed]
    for seed in range(50):
        backward(trainable, 1000 + seed)
        update(trainable.optimizer, 1e-2)
    assert run.pruner.alive[NEURONS].sum(1).tolist() == [12, 12]
    for (weight, dead), before in zip(removed, start, strict=True):
        assert not torch.equal(weight, before)
        for what in ("main", "exp_avg", "exp_avg_sq"):
            state_of = whole(trainable, weight, what).view_as(weight)
            assert not state_of[dead].any() and state_of.any(), what
        assert not weight[dead].any()


@on_ranks(1)
def test_9_keeping_every_neuron_is_plain_training_bit_for_bit(
    groups: ProcessGroups, config: Config
) -> None:
    def trained(**prune: Any) -> tuple[list[Any], list[Tensor]]:
        run, state = live_run(groups, pruning(config, **prune))
        records = run_steps(run, state, STEPS)
        assert state.shape.counts(NEURONS) == (24, 24)
        tensors = [
            whole(run.trainable, parameter, what)
            for parameter in run.trainable.parameters
            for what in ("main", "exp_avg", "exp_avg_sq")
        ]
        return [(r.loss, r.grad_norm, r.lr) for r in records], tensors

    curve, tensors = trained(strategy="idea", target={"ffn_hidden_size": 24})
    plain_curve, plain_tensors = trained(strategy="none")
    assert curve == plain_curve
    for ours, plain in zip(tensors, plain_tensors, strict=True):
        assert_equal(ours, plain)
