"""Neurons, KV groups, channels and layers shrink together in a live job, in every layout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jobs import backward, live_run, run_job, small, train_on
from test_checkpoint import checkpoint_at, curves, tensors
from torch import Tensor

from megatron_idea.config import Config, ConfigError, PruneTarget, replace, validate
from megatron_idea.shape import AXES, LAYER_AXES, Shape
from megatron_idea.testing import Workers, assert_equal

if TYPE_CHECKING:
    from megatron_idea.engine.distributed import ProcessGroups

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TARGET = {"ffn_hidden_size": 12, "num_query_groups": 2, "hidden_size": 16, "num_layers": 3}
MODEL = {
    "num_layers": 4, "hidden_size": 32, "num_attention_heads": 8, "num_query_groups": 4,
    "init_method_std": 0.1,
}  # fmt: skip
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, TP2),
    "tp2_no_sp": (2, {**TP2, "sequence_parallel": False}),
    "pp2": (2, PP2),
    "vpp2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "dp2": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000}),
    "tp2_pp2": (4, {**TP2, **PP2}),
}


STEPS = 32


def pruned(target: dict[str, int], **sections: Any) -> Config:
    """32 steps; removal in steps 5 to 12, so that 20 more come after the last compaction."""
    config = small(
        model=MODEL,
        schedule={
            "total_tokens": STEPS * 96, "lr": 3e-3, "min_lr": 3e-5, "enlarged_fraction": 0.1,
            "prune_fraction": 0.25, "recover_fraction": 0.65, "prune_warmup_fraction": 0.2,
        },
        prune={"target": PruneTarget(**target), "channel_alignment": 4},
    )  # fmt: skip
    return replace(config, **sections)


# ------------------------------------------------------------------------------ silent = cut


def whole_run(groups: ProcessGroups, config: Config, steps: int = STEPS) -> dict[str, Any]:
    from megatron_idea.train import step

    run, state = live_run(groups, config)
    events: list[tuple[str, dict[str, Any]]] = []
    run.log.event = lambda kind, **fields: events.append((kind, fields))
    records = [step(run, state)[0] for _ in range(steps)]
    return {
        "losses": [record.loss for record in records],
        "stored": records[-1].stored,
        "alive": {axis: table.tolist() for axis, table in run.pruner.alive.items()},
        "compactions": [fields for kind, fields in events if kind == "compacted"],
        "removed": [fields for kind, fields in events if kind == "layer_removed"],
    }


@pytest.fixture(scope="module")
def alone(workers: Workers) -> dict[str, Any]:
    (found,) = run_job(workers, whole_run, 1, pruned(TARGET, prune={"compact": False}))
    return found


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp2_no_sp"])
def test_silent_units_and_cut_ones_train_alike_in_every_layout(
    workers: Workers, alone: dict[str, Any], layout: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    config = pruned(TARGET, parallel=parallel)
    if layout == "vpp2":  # of four stages none may be left without a layer
        config = pruned({**TARGET, "num_layers": 6}, model={**MODEL, "num_layers": 8})
        (alone,) = run_job(workers, whole_run, 1, replace(config, prune={"compact": False}))
        config = replace(config, parallel=parallel)
    validate(config, world_size)
    cut, *others = run_job(workers, whole_run, world_size, config)
    assert cut["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert cut["alive"] == alone["alive"]
    assert all(other["alive"] == cut["alive"] for other in others)
    gone = {layer["layer"] for layer in alone["removed"]}
    shape = Shape.full(config.model).with_layers(set(range(config.model.num_layers)) - gone)
    for axis in ("ffn_hidden_size", "num_query_groups", "hidden_size"):
        shape = shape.with_counts(axis, TARGET[axis])
    assert cut["stored"] == shape.by_number(config.model.num_layers)
    assert len(cut["compactions"]) >= 3
    for event in cut["removed"]:
        assert event["losses"][event["layer"]] == min(event["losses"].values())


@pytest.mark.parametrize("axis", AXES)
def test_one_axis_alone(workers: Workers, axis: str) -> None:
    # A gradient's norm is a sum over tensors, of which a layer that is gone has none.
    config = pruned({axis: TARGET[axis]}, optimizer={"clip_grad": 0.0})
    silent, cut = (
        run_job(workers, whole_run, 1, replace(config, prune={"compact": compact}))[0]
        for compact in (False, True)
    )
    assert cut["alive"] == silent["alive"]
    if axis in ("num_query_groups", "num_layers"):  # no sum has other terms
        assert cut["losses"] == silent["losses"]
    assert cut["losses"] == pytest.approx(silent["losses"], rel=1e-6)
    assert cut["compactions"]
    for event in cut["compactions"]:
        assert list(event["before"]) == list(event["after"]) == [axis]


# ------------------------------------------------------- survivors, bit for bit, by another reading


def lines(units: Tensor, inner: int) -> Tensor:
    """Indices of what units [n] have along a dimension [units, inner]."""
    return (units[:, None] * inner + torch.arange(inner)).flatten()


def in_enlarged(path: Path, config: Config) -> dict[str, Tensor]:
    """A checkpoint's weights and moments in the enlarged model, zeros where it stores nothing."""
    model, found = config.model, tensors(path)
    full = Shape.full(model)
    stored = {axis: found[f"pruner.stored.{axis}"] for axis in AXES}
    numbers = stored["num_layers"].tolist()
    per_layer = {axis: stored[axis].view(len(numbers), -1) for axis in LAYER_AXES}
    channels, kv = stored["hidden_size"], model.kv_channels
    q = model.num_attention_heads // model.num_query_groups
    widths = model.ffn_hidden_size, model.num_query_groups
    result = {}
    for key, value in found.items():
        if key.startswith("pruner."):
            continue
        layer = re.search(r"layers\.(\d+)\.", key)
        name, size = key, [model.hidden_size]
        where: Sequence[Tensor | None] = [channels]
        if layer:
            position = int(layer[1])
            name = key.replace(layer[0], f"layers.{numbers[position]}.")
            neurons, heads = (per_layer[axis][position] for axis in LAYER_AXES)
        if key.endswith(("q_layernorm.weight", "k_layernorm.weight")):
            size, where = [kv], [None]
        elif key.endswith("word_embeddings.weight"):
            size, where = [model.vocab_size, model.hidden_size], [None, channels]
        elif key.endswith("linear_fc1.weight"):
            gate_up = torch.cat([neurons, widths[0] + neurons])
            size, where = [2 * widths[0], model.hidden_size], [gate_up, channels]
        elif key.endswith("linear_fc2.weight"):
            size, where = [model.hidden_size, widths[0]], [channels, neurons]
        elif key.endswith("linear_qkv.weight"):
            rows = (q + 2) * kv
            size, where = [widths[1] * rows, model.hidden_size], [lines(heads, rows), channels]
        elif key.endswith("linear_proj.weight"):
            size, where = [model.hidden_size, widths[1] * q * kv], [channels, lines(heads, q * kv)]
        whole = torch.zeros(size, dtype=value.dtype)
        index = [torch.arange(n) if w is None else w for n, w in zip(size, where, strict=True)]
        whole[torch.meshgrid(*index, indexing="ij")] = value
        result[name] = whole
    gone = set(range(full.num_layers)) - set(numbers)
    for name in [name for name in result if f"layers.{numbers[0]}." in name]:
        for number in gone:
            other = name.replace(f"layers.{numbers[0]}.", f"layers.{number}.")
            result[other] = torch.zeros_like(result[name])
    return result


def cut_once(groups: ProcessGroups, config: Config, folder: str) -> None:
    """Silence units of all axes and save; cut them and save elsewhere."""
    from megatron_idea import checkpoint
    from megatron_idea.engine.optimizer import update
    from megatron_idea.prune.plan import Plan

    run, state = live_run(groups, config)
    for seed in range(2):
        backward(run.trainable, seed)
        update(run.trainable.optimizer, 1e-2)
    full, draw = run.trainable.shape, torch.Generator().manual_seed(3)
    keep = {"ffn_hidden_size": 14, "num_query_groups": 2, "hidden_size": 22}
    alive = {
        axis: torch.rand(run.pruner.alive[axis].shape, generator=draw).argsort(-1).argsort(-1) < n
        for axis, n in keep.items()
    }
    # Of the first stage, and of one in the middle: the others get layers from their neighbours.
    alive["num_layers"] = torch.ones(full.num_layers, dtype=torch.bool)
    alive["num_layers"][[0, 5] if full.num_layers == 8 else 0] = False
    for axis in LAYER_AXES:
        alive[axis] &= alive["num_layers"][:, None]
    # Zeros stay among the neurons and channels: 14 of 16 live, 22 of 24.
    shape = full.with_layers(alive["num_layers"].nonzero().view(-1).tolist())
    for axis, count in (("ffn_hidden_size", 16), ("num_query_groups", 2), ("hidden_size", 24)):
        shape = shape.with_counts(axis, count)
    plan = Plan.of(alive, shape, run.pruner.memory)
    run.pruner.silence(run.trainable, plan)
    for name in ("before", "after"):
        where = replace(config, run_dir=f"{folder}/{name}")
        checkpoint.save(where, run.trainable, run.pruner, state)
        if name == "before":
            report = run.pruner.compact(run.trainable, plan)
            assert (report.moved_layers > 0) == (groups.pp.size() > 1)


SURVIVAL = [(layout, "fp32") for layout in LAYOUTS if layout != "tp2_no_sp"]


# In bf16 main weights of their own take the same way.
@pytest.mark.parametrize(("layout", "precision"), [*SURVIVAL, ("dp2", "bf16"), ("tp2_pp2", "bf16")])
def test_every_survivor_arrives_bit_for_bit(
    workers: Workers, tmp_path: Path, layout: str, precision: str
) -> None:
    world_size, parallel = LAYOUTS[layout]
    layers = 8 if layout == "vpp2" else 4
    config = pruned(TARGET, model={**MODEL, "num_layers": layers}, parallel=parallel)
    config = replace(config, training={"precision": precision})
    run_job(workers, cut_once, world_size, config, str(tmp_path))
    before, after = (
        in_enlarged(checkpoint_at(tmp_path / name, 0), config) for name in ("before", "after")
    )
    assert before.keys() == after.keys()
    assert any("exp_avg_sq" in name for name in before)
    for name in before:
        assert_equal(after[name], before[name], name)


# --------------------------------------------------------------- stopping, going on, and on disk


@pytest.fixture()
def real(tiny: Config) -> Config:
    """A run on text: 24 steps, all axes shrink in steps 9 to 16."""
    return replace(
        tiny,
        model={**MODEL, "qk_layernorm": True},
        prune={"target": PruneTarget(**{**TARGET, "ffn_hidden_size": 24}), "channel_alignment": 4},
        checkpoint={"before_compaction": True, "keep_last": 0, "every_tokens": 2 * 128},
    )


def killed_after(config: Config, step: int, run_dir: Path, **sections: Any) -> Config:
    """A copy of a run's folder without the checkpoints after ``step``."""
    shutil.copytree(config.run_dir, run_dir)
    for path in sorted((run_dir / "checkpoints").iterdir()):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return replace(config, run_dir=str(run_dir), **sections)


@pytest.mark.parametrize("layout", ["tp1", "pp2"])
def test_a_resumed_run_is_the_uninterrupted_one(
    real: Config, workers: Workers, tmp_path: Path, layout: str
) -> None:
    from megatron_idea.checkpoint import read_state

    world_size, parallel = LAYOUTS[layout]
    config = replace(real, parallel=parallel)
    workers.run(train_on, world_size, config)
    folder = Path(config.run_dir) / "checkpoints"
    steps = [int(path.name.removeprefix("step_")) for path in sorted(folder.iterdir())]
    due = [step for step in steps if read_state(checkpoint_at(config.run_dir, step)).plan_due]
    between = [step for step in steps if due[0] < step < due[-1] and step not in due]
    assert due and between
    last = checkpoint_at(config.run_dir, 24)
    for step in (due[1], between[0]):
        again = killed_after(config, step, tmp_path / f"after_{step}")
        workers.run(train_on, world_size, again)
        assert curves(again.run_dir, 0) == curves(config.run_dir, 0)
        ours, theirs = tensors(checkpoint_at(again.run_dir, 24)), tensors(last)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_equal(ours[name], theirs[name], name)
    # In another layout, from a plan that the first one decided on.
    size, other = LAYOUTS["tp1" if layout == "pp2" else "pp2"]
    one = {"pipeline_model_parallel_size": 1}
    elsewhere = killed_after(config, due[1], tmp_path / "elsewhere", parallel=one | other)
    workers.run(train_on, size, elsewhere)
    found, expected = curves(elsewhere.run_dir, due[1]), curves(config.run_dir, due[1])
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=2e-5)
    assert [r["live"] for r in found] == [r["live"] for r in expected]


def test_a_compaction_on_disk_is_the_live_one(
    real: Config, workers: Workers, tmp_path: Path
) -> None:
    from test_offline import online_job

    from megatron_idea.checkpoint.compact import compact_checkpoint

    pairs = workers.run(online_job, 2, replace(real, parallel=PP2))[0]
    assert len(pairs) >= 3
    for number, (before, after) in enumerate(pairs):
        offline = tensors(compact_checkpoint(Path(before), tmp_path / f"offline_{number}"))
        live = tensors(Path(after))
        assert offline.keys() == live.keys()
        for name in live:
            assert_equal(offline[name], live[name], name)


def test_smaller_sizes_are_cut_on_disk_when_asked(
    real: Config, workers: Workers, tmp_path: Path
) -> None:
    from megatron_idea.checkpoint import read_state
    from megatron_idea.checkpoint.compact import compact_checkpoint, read_sizes

    config = replace(real, checkpoint={"every_tokens": 10 * 128, "before_compaction": False})
    workers.run(train_on, 1, config)
    found = checkpoint_at(config.run_dir, 10)
    sizes = read_sizes("16 num_query_groups=1 hidden_size=12 num_layers=2")
    state = read_state(compact_checkpoint(found, tmp_path / "small", sizes))
    assert {axis: set(state.shape.counts(axis)) for axis in AXES} == {
        "ffn_hidden_size": {16}, "num_query_groups": {1}, "hidden_size": {12}, "num_layers": {2},
    }  # fmt: skip
    for text, message in (
        ("hidden_size=10", "multiple of prune.channel_alignment = 4; nearest legal values: 8, 12"),
        ("num_layers=1", "at least two layers stay"),
        ("num_query_groups=5", "is 5, and there are 3"),
        ("num_query_groups=1,2", "give one, or one for each of the 3 layers"),
        ("hidden_size=16,16", "has 2 values for hidden_size; give one"),
    ):
        with pytest.raises(ConfigError, match=message):
            compact_checkpoint(found, tmp_path / "refused", read_sizes(text))
    for text, message in (("heads=2", "'heads'; axes are"), ("16 16", "twice"), ("x", "whole")):
        with pytest.raises(ConfigError, match=message):
            read_sizes(text)


def shrinking_job(groups: ProcessGroups, config: Config) -> list[int]:
    """How many models are in memory after each of twenty compactions over all axes."""
    import gc

    from megatron.core.models.gpt import GPTModel

    from megatron_idea.engine.optimizer import update
    from megatron_idea.prune.plan import Plan, live_layers

    run, _ = live_run(groups, config)
    backward(run.trainable, 0)
    update(run.trainable.optimizer, 1e-2)
    alive, models = dict(run.pruner.alive), []
    for event in range(20):
        alive = {axis: table.clone() for axis, table in alive.items()}
        alive["ffn_hidden_size"][:, event] = False
        alive["hidden_size"][event] = False
        if event in (5, 15):
            alive["num_query_groups"][:, event // 5] = False
        if event in (3, 9):
            layer = event // 3
            for axis in ("num_layers", *LAYER_AXES):
                alive[axis][layer] = False
        shape = run.trainable.shape.with_layers(live_layers(alive))
        kept = shape.layers[0].number
        for axis in LAYER_AXES:
            shape = shape.with_counts(axis, int(alive[axis][kept].sum()))
        shape = shape.with_counts("hidden_size", int(alive["hidden_size"].sum()))
        plan = Plan.of(alive, shape, run.pruner.memory)
        run.pruner.silence(run.trainable, plan)
        run.pruner.compact(run.trainable, plan)
        gc.collect()
        models.append(sum(isinstance(one, GPTModel) for one in gc.get_objects()))
    assert shape.by_number(4) == {
        "ffn_hidden_size": [4, 0, 4, 0], "num_query_groups": [2, 0, 2, 0],
        "hidden_size": [12], "num_layers": [2],
    }  # fmt: skip
    return models


def test_twenty_compactions_leave_no_model_behind(workers: Workers) -> None:
    (models,) = run_job(workers, shrinking_job, 1, pruned(TARGET))
    assert models == [1] * 20


def test_a_plan_from_a_stranger_is_looked_at() -> None:
    from megatron_idea.prune.plan import unfit_plan

    alive = {
        "ffn_hidden_size": torch.ones(3, 4, dtype=torch.bool),
        "num_query_groups": torch.ones(3, 2, dtype=torch.bool),
        "hidden_size": torch.arange(4) < 3,
        "num_layers": torch.ones(3, dtype=torch.bool),
    }
    gains = torch.ones(7)
    assert unfit_plan(alive, alive, gains) == ""
    layers = torch.tensor([True, True, False])
    gone = {axis: alive[axis] & layers[:, None] for axis in LAYER_AXES}
    assert unfit_plan(alive, {**alive, **gone, "num_layers": layers}, gains) == ""
    everyone, nobody = torch.ones(4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    for changed, message in (
        ({"hidden_size": everyone}, "revives units of hidden_size"),
        ({"ffn_hidden_size": nobody}, "leaves nothing of ffn_hidden_size"),
        ({"num_layers": nobody[:, 0]}, "keeps units of ffn_hidden_size in a layer that goes"),
        ({"num_layers": layers}, "keeps units of ffn_hidden_size in a layer that goes"),
    ):
        assert message in unfit_plan(alive, {**alive, **changed}, gains)
    for gain in (0.0, -1.0, float("nan"), float("inf")):
        assert "no positive number" in unfit_plan(alive, alive, gains * gain)


# ------------------------------------------------------------------------- who goes, and why


def planted(groups: ProcessGroups, config: Config) -> dict[str, list[Any]]:
    """Who goes of a model in which one unit of each axis hardly matters; and of one query head."""
    from megatron_idea.engine.model import named_parameters
    from megatron_idea.prune.plan import live_counts
    from megatron_idea.prune.units import named_shares
    from megatron_idea.train import step

    dead = {"ffn_hidden_size": 5, "num_query_groups": 2, "hidden_size": 9, "num_layers": 1}
    run, state = live_run(groups, config)
    for _, parameter, shares in named_shares(run.trainable):
        for share in shares:
            view = parameter.data.view(-1, share.count, share.stride)
            if share.axis == "num_layers":
                if share.layer == dead[share.axis] and parameter.dim() == 2:
                    view *= 1e-3
            else:
                view[:, dead[share.axis]] *= 1e-3
    run.trainable.optimizer.reload_model_params()
    first: dict[str, list[Any]] = {}
    while len(first) < len(dead):
        before = run.pruner.alive
        step(run, state)
        for axis in dead:
            if axis not in first and not torch.equal(before[axis], run.pruner.alive[axis]):
                rows = before["num_layers"] & run.pruner.alive["num_layers"]
                gone = before[axis] & ~run.pruner.alive[axis]
                gone = gone[rows] if axis in LAYER_AXES else gone
                first[axis] = [row.nonzero().view(-1).tolist() for row in torch.atleast_2d(gone)]
    assert live_counts(run.pruner.alive["num_layers"]) == [3]
    # A gradient that one query head alone has: its group matters, and no other.
    for _, parameter in named_parameters(run.trainable.chunks):
        parameter.main_grad.zero_()
    layer = run.trainable.chunks[0].module.decoder.layers[0].self_attention.linear_qkv.weight
    q, kv = 2, config.model.kv_channels
    of_group = layer.main_grad.view(-1, (q + 2) * kv, layer.shape[1])
    of_group[1, kv : 2 * kv] = 1.0  # the second query head of the second group in memory
    (sums,) = run.pruner.scores.observe(run.trainable).values()
    first["group"] = [sums["num_query_groups", 0].bool().tolist()]
    return first


def test_a_unit_that_does_not_matter_goes_first(workers: Workers) -> None:
    target = {"ffn_hidden_size": 20, "num_query_groups": 3, "hidden_size": 28, "num_layers": 3}
    config = pruned(target, prune={"compact": False}, optimizer={"clip_grad": 0.0})
    (first,) = run_job(workers, planted, 1, config)
    for axis, unit in (("ffn_hidden_size", 5), ("num_query_groups", 2), ("hidden_size", 9)):
        assert all(unit in row for row in first[axis]), (axis, first[axis])
    assert first["num_layers"] == [[1]]
    query, key, value, projection = first["group"][0]
    assert query == [False, True, False, False]
    assert not any((*key, *value, *projection))


def gains_job(groups: ProcessGroups, config: Config) -> dict[str, Any]:
    """What gains are multiplied with, and should be, as channels go."""
    from megatron_idea.prune.probe import Probe
    from megatron_idea.train import step

    run, state = live_run(groups, config)
    while state.step < 8:
        step(run, state)
    probe = Probe(run.trainable, run.data, 0)
    before = probe.norm_inputs(run.pruner.stored, 32)
    norms = [x for name, x in run.trainable.chunks[0].named_parameters() if "layernorm" in name]
    gains = [x.detach().clone() for x in norms if len(x) == 32]
    plan = run.pruner.plan(run.trainable, 12 * config.batch_tokens, probe)
    run.pruner.silence(run.trainable, plan)
    alive = plan.alive["hidden_size"]
    factor = (before[:, alive].sum(1) / before.sum(1)).sqrt().float()
    found = [x.detach() for x in norms if len(x) == 32]
    ratio = [float((x[alive] / g[alive]).mean()) for x, g in zip(found, gains, strict=True)]
    # Parameters lie layer by layer, the final norm's last.
    return {"expected": factor.tolist(), "found": ratio, "plan": plan.gains.tolist()}


def test_norms_keep_their_output_when_asked(workers: Workers) -> None:
    config = pruned({"hidden_size": 16}, prune={"norm_rescale": "mean_square", "compact": False})
    (kept,) = run_job(workers, gains_job, 1, config)
    assert kept["found"] == pytest.approx(kept["expected"], rel=1e-6)
    assert all(gain < 1 for gain in kept["plan"])
    (as_is,) = run_job(workers, gains_job, 1, replace(config, prune={"norm_rescale": "none"}))
    assert set(as_is["plan"]) == {1.0} == set(as_is["found"])
    runs = [
        run_job(
            workers, whole_run, size, replace(config, parallel=where, prune={"compact": cut}), 14
        )
        for size, where, cut in ((1, {}, False), (2, TP2, True))
    ]
    for run, *_ in runs:
        assert run["losses"] == pytest.approx(runs[0][0]["losses"], rel=1e-6)


VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("target", "parallel", "servers", "message"),
    [
        ({"num_query_groups": 1}, TP2, 0, "multiple of the TP size .2.; nearest legal values: 2"),
        ({"num_query_groups": 2}, TP2, 4, "together 4; nearest legal values: 4"),
        ({"hidden_size": 18}, {}, 0, "channel_alignment = 4; nearest legal values: 16, 20"),
        ({"hidden_size": 32}, {}, 0, "must be below model.hidden_size .32."),
        ({"num_layers": 1}, {}, 0, "at least two layers stay"),
        ({"num_layers": 3}, VPP2, 0, "one for each of the 4 stages"),
        ({}, {}, 0, "names nothing to prune"),
    ],
)
def test_targets_that_cannot_be_are_refused(
    target: dict[str, int], parallel: dict[str, Any], servers: int, message: str
) -> None:
    config = pruned(target, parallel=parallel)
    config = replace(config, prune={"serve_tensor_model_parallel_size": servers})
    with pytest.raises(ConfigError, match=message):
        validate(config, config.parallel.model_parallel_size)


def test_an_order_names_every_axis_once() -> None:
    both = {"target": PruneTarget(ffn_hidden_size=12, hidden_size=16)}
    for order, message in (
        (["num_layers"], "legal values: ffn_hidden_size, hidden_size"),
        (["hidden_size"], "each axis of prune.target once"),
        (["hidden_size", "ffn_hidden_size+hidden_size"], "each axis of prune.target once"),
    ):
        with pytest.raises(ConfigError, match=message):
            pruned(TARGET, prune={**both, "order": order})


def test_axes_shrink_in_the_order_asked_for(workers: Workers) -> None:
    order = ["num_layers", "hidden_size+ffn_hidden_size", "num_query_groups"]
    (run,) = run_job(workers, whole_run, 1, pruned(TARGET, prune={"order": order}))
    shrank = [set(event["before"]) for event in run["compactions"]]
    assert shrank[0] == {"num_layers"} and shrank[-1] == {"num_query_groups"}
    assert {axis for axes in shrank[1:-1] for axis in axes} >= {"hidden_size", "ffn_hidden_size"}
    assert run["stored"]["num_query_groups"].count(2) == 3
