"""Zeros stay zeros, and a silent unit is one that was cut out: every axis, in a real model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jobs import backward, live_run, on_ranks, random_tokens, run_job, small
from torch import Tensor

from megatron_idea.config import Config, replace
from megatron_idea.shape import Shape
from megatron_idea.testing import TOLERANCE, Workers, assert_close, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

# Units whose zeros would be heard if they were not zeros: weights are far from the start's.
LOUD = small(
    model={
        "num_layers": 4, "num_attention_heads": 8, "num_query_groups": 4, "init_method_std": 0.3,
    },
    training={"micro_batch_size": 2, "global_batch_size": 4},
    optimizer={"clip_grad": 0.1},
)  # fmt: skip
# By original numbers; neurons and groups go in every layer, on every rank.
GONE = {
    "ffn_hidden_size": [0, 3, 4, 11, 12, 17, 22, 23],
    "num_query_groups": [1, 2],
    "hidden_size": [0, 5, 6, 15],
    "num_layers": [1],
}
LAYOUTS = {
    "alone": (1, {}),
    "dp2-overlap": (
        2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 1000}
    ),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}  # fmt: skip
STEPS, LR = 20, 1e-2


def take_steps(run: Any, seeds: range) -> list[float]:
    """Gradient norms before clipping."""
    from megatron_idea.engine.optimizer import update

    norms = []
    for seed in seeds:
        backward(run.trainable, seed)
        norms.append(update(run.trainable.optimizer, LR))
    return norms


def silenced(groups: ProcessGroups, config: Config, axes: list[str]) -> Any:
    """A run whose units were trained for three steps, those of ``GONE`` on ``axes`` zeroed then."""
    from megatron_idea.prune.plan import Plan

    run, _ = live_run(groups, config)
    take_steps(run, range(3))
    pruner = run.pruner
    alive = {axis: units.clone() for axis, units in pruner.alive.items()}
    for axis in axes:
        alive[axis][..., GONE[axis]] = False
    pruner.silence(run.trainable, Plan.of(alive, run.trainable.shape, pruner.memory))
    return run


def states(trainable: Any) -> dict[str, list[tuple[str, Tensor, int]]]:
    """By parameter: (what, flat elements, place of the first) of all that this rank holds."""
    from megatron_idea.engine.model import named_parameters
    from megatron_idea.engine.shards import shard_of

    found = {}
    for name, parameter in named_parameters(trainable.chunks):
        of_one = [("weight", parameter.detach(), 0), ("gradient", parameter.main_grad, 0)]
        shard = shard_of(trainable.optimizer, parameter)
        if shard is not None:
            held = {"main": shard.main.detach()} | shard.state
            of_one += [(n, held[n], shard.start) for n in ("main", "exp_avg", "exp_avg_sq")]
        found[name] = [(what, value.view(-1), start) for what, value, start in of_one]
    return found


def dead_of(trainable: Any, axes: list[str]) -> dict[str, Tensor]:
    """By parameter: which of its flat elements on this rank belong to silent units, bool."""
    from megatron_idea.prune.units import named_shares

    tp = trainable.groups.tp
    found = {}
    for name, parameter, shares in named_shares(trainable):
        place = torch.arange(parameter.numel())
        dead = torch.zeros(parameter.numel(), dtype=torch.bool)
        for share in shares:
            if share.axis not in axes:
                continue
            if share.axis == "num_layers":
                dead |= share.layer in GONE["num_layers"]
                continue
            first = 0 if share.axis == "hidden_size" else share.count * tp.rank()
            owner = place // share.stride % share.count + first
            dead |= torch.isin(owner, torch.tensor(GONE[share.axis]))
        found[name] = dead
    return found


def assert_zeros(trainable: Any, dead: Mapping[str, Tensor], kinds: tuple[str, ...]) -> None:
    for name, of_one in states(trainable).items():
        for what, value, start in of_one:
            if what in kinds:
                mine = dead[name][start : start + len(value)]
                assert not value[mine].any(), f"{what} of {name} is not 0 where units are silent"


def stay_silent(groups: ProcessGroups, config: Config, axes: list[str]) -> None:
    run = silenced(groups, config, axes)
    dead = dead_of(run.trainable, axes)
    assert any(mine.any() and not mine.all() for mine in dead.values()) or axes == ["num_layers"]
    assert_zeros(run.trainable, dead, ("main", "exp_avg", "exp_avg_sq"))
    before = {name: of[0][1].clone() for name, of in states(run.trainable).items()}
    for seed in range(100, 100 + STEPS):
        (norm,) = take_steps(run, range(seed, seed + 1))
        assert norm > config.optimizer.clip_grad, "a step that clips nothing"
        assert_zeros(run.trainable, dead, ("gradient",))
    assert_zeros(run.trainable, dead, ("weight", "main", "exp_avg", "exp_avg_sq"))
    for name, of_one in states(run.trainable).items():
        live = ~dead[name]
        moved = not torch.equal(of_one[0][1][live], before[name][live])
        assert moved or not live.any(), f"nothing of {name} moved"


AXES = list(GONE)
CASES = [("alone", "fp32", [axis]) for axis in AXES]
CASES += [(layout, "fp32", AXES) for layout in LAYOUTS] + [("alone", "bf16", AXES)]
CASES += [("dp2-overlap", "bf16", AXES), ("tp2", "bf16", AXES), ("pp2", "bf16", AXES)]


@pytest.mark.parametrize(
    ("layout", "precision", "axes"), CASES, ids=lambda x: x if isinstance(x, str) else "+".join(x)
)
def test_silent_units_have_no_gradient_and_never_move(
    workers: Workers, layout: str, precision: str, axes: list[str]
) -> None:
    """Through 20 steps with weight decay, clipping and the momentum of the steps before."""
    world_size, parallel = LAYOUTS[layout]
    config = replace(LOUD, parallel=parallel, training={"precision": precision})
    run_job(workers, stay_silent, world_size, config, axes)


def smaller(config: Config, axes: list[str]) -> Shape:
    """The shape of what is left when ``GONE`` is cut out on ``axes``."""
    shape = Shape.full(config.model)
    for axis in axes:
        if axis == "num_layers":
            shape = shape.with_layers(set(range(shape.num_layers)) - set(GONE[axis]))
        else:
            shape = shape.with_counts(axis, shape.counts(axis)[0] - len(GONE[axis]))
    return shape


def cut_out(groups: ProcessGroups, run: Any, axes: list[str]) -> Any:
    """A model built in the smaller shape, with the survivors' weights."""
    from megatron_idea.engine.model import named_parameters
    from megatron_idea.engine.trainable import assemble
    from megatron_idea.prune.axis import cut
    from megatron_idea.prune.units import named_shares

    left = assemble(run.config.sections, groups, smaller(run.config, axes), initialize=True)
    fresh = dict(named_parameters(left.chunks))
    keep = {
        axis: torch.tensor([n for n in range(getattr(run.config.model, axis)) if n not in gone])
        for axis, gone in GONE.items()
    }
    for name, parameter, shares in named_shares(run.trainable):
        weight = parameter.detach()
        for share in shares:  # along earlier dimensions first: strides count the later ones whole
            if share.axis not in axes or share.axis == "num_layers":
                continue
            weight = cut(weight, share, keep[share.axis])
        if "num_layers" in axes and (found := re.match(r"decoder\.layers\.(\d+)\.", name)):
            layer = int(found[1])
            if layer in GONE["num_layers"]:
                continue
            before = int((keep["num_layers"] < layer).sum())
            name = name.replace(found[0], f"decoder.layers.{before}.")
        fresh.pop(name).data.copy_(weight)
    assert not fresh, f"nothing was copied to {list(fresh)}"
    return left


def logits(trainable: Any, text: Tensor) -> Tensor:
    """[b, s, vocab_size]; the model is one of double precision from then on."""
    (chunk,) = trainable.chunks
    positions = torch.arange(text.shape[1]).expand_as(text)
    with torch.no_grad():
        return chunk.module.double()(text, positions, None)


@pytest.mark.parametrize("axes", [*([axis] for axis in AXES), AXES], ids="+".join)
@on_ranks(1)
def test_a_silent_unit_is_a_unit_that_was_cut_out(
    groups: ProcessGroups, config: Config, axes: list[str]
) -> None:
    run = silenced(groups, LOUD, axes)
    take_steps(run, range(3, 6))
    left = cut_out(groups, run, axes)
    text = random_tokens(LOUD, seed=9)
    silent, cut = logits(run.trainable, text), logits(left, text)
    assert float(silent.std()) > 0.1
    if axes == ["num_layers"]:  # no sum has another length
        assert_equal(cut, silent, "logits")
    else:
        assert_close(cut, silent, "logits", TOLERANCE[torch.float64])
