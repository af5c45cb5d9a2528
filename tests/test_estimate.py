"""Counts against shapes written out by hand, planned shapes against the pruner's own rule."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megatron_idea import config as configs
from megatron_idea.checkpoint.state import FORMAT, TrainState
from megatron_idea.config import Config, ConfigError, ModelConfig
from megatron_idea.course import (
    ShapeChange,
    TeacherSize,
    finished_axes,
    flops_between,
    live_at_step,
    num_steps,
    remaining_flops,
    removed_at,
    shape_at,
    shape_plan,
    target_shape,
    taught_between,
    teacher_flops_between,
)
from megatron_idea.planning.estimate import forecast, render
from megatron_idea.records.readable import human_count
from megatron_idea.schedule import distillation_share, learning_rate, removal_window
from megatron_idea.shape import ParameterCount, Shape, due_shape

EXAMPLES = Path(__file__).parent.parent / "examples" / "configs"


@pytest.fixture(scope="module")
def paper() -> Config:
    return configs.load(EXAMPLES / "2p8b_to_1p3b.yaml")


def small(**sections: dict) -> Config:
    """64 steps of 16 tokens: prune phase in steps 33 to 41, FFN width 64 to 16, blocks of 8."""
    base = configs.from_dict(
        {
            "model": {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 64, "vocab_size": 32},
            "training": {"seq_length": 8, "global_batch_size": 2, "micro_batch_size": 2},
            "schedule": {"total_tokens": 1024, "prune_warmup_fraction": 0.0},
            "prune": {"target": {"ffn_hidden_size": 16}, "compaction_block": 8},
        }
    )
    return configs.replace(base, **sections)


def parameters(model: ModelConfig, neurons: int | list[int]) -> ParameterCount:
    return Shape.full(model).with_counts("ffn_hidden_size", neurons).parameters(model)


def flops(model: ModelConfig, neurons: int, seq_length: int) -> int:
    shape = Shape.full(model).with_counts("ffn_hidden_size", neurons)
    return shape.flops_per_token(model, seq_length)


def neurons(shape: Shape) -> int:
    (count,) = set(shape.counts("ffn_hidden_size"))
    return count


def test_the_paper_sizes_have_the_parameters_of_their_names(paper: Config) -> None:
    enlarged = parameters(paper.model, 16384)
    target = parameters(paper.model, 6144)
    assert round(enlarged.total / 1e9, 3) == 2.819
    assert round(target.total / 1e9, 3) == 1.309
    # embedding, attention (query, key, value, output), FFN, norms (2 a layer, final, QK)
    assert enlarged.embedding == 49152 * 2048
    assert enlarged.attention == 24 * (2048 + 2 * 1024 + 2048) * 2048
    assert enlarged.ffn == 24 * 3 * 2048 * 16384
    assert enlarged.norm == (2 * 24 + 1) * 2048 + 24 * 2 * 128


def test_the_300m_config_ships_302m_without_embeddings() -> None:
    model = configs.load(EXAMPLES / "300m.yaml").model
    count = parameters(model, 3072)
    assert round((count.total - count.embedding) / 1e6) == 302


def test_untied_embeddings_count_twice_and_qk_norm_only_when_on() -> None:
    tied = parameters(ModelConfig(), 384)
    untied = parameters(ModelConfig(share_embeddings_and_output_weights=False), 384)
    normed = parameters(ModelConfig(qk_layernorm=True), 384)
    assert untied.total - tied.total == 4096 * 128
    assert normed.total - tied.total == 4 * 2 * 32


def test_layers_may_differ_in_neurons() -> None:
    uneven = parameters(ModelConfig(), [128, 256, 512, 640])
    assert uneven.ffn == 3 * 128 * (128 + 256 + 512 + 640)


def test_flops_are_six_a_weight_plus_causal_attention() -> None:
    model = ModelConfig(num_layers=1)  # hidden 128, 4 query and 2 key/value heads of 32
    weights = (128 + 2 * 64 + 128) * 128 + 3 * 128 * 1024 + 4096 * 128
    # Two products of 2 x 128 FLOPs for each of 256 / 2 visible tokens, three times over.
    attention = 3 * 2 * 2 * 128 * 256 // 2
    assert flops(model, 1024, 256) == 6 * weights + attention


def test_an_untied_output_layer_costs_what_a_tied_one_costs() -> None:
    untied = ModelConfig(share_embeddings_and_output_weights=False)
    assert flops(untied, 8, 64) == flops(ModelConfig(), 8, 64)


def simulated_plan(config: Config) -> list[ShapeChange]:
    """What the pruner's own rule gives, step by step, when the last layers go first."""
    changes, shape = [], Shape.full(config.model)
    full = shape.num_layers
    for step in range(1, num_steps(config) + 1):
        tokens = step * config.batch_tokens
        if step % config.prune.mask_interval_steps and tokens < removal_window(config.schedule)[1]:
            continue
        live = live_at_step(config, step)
        layers = live.get("num_layers", full)
        rows = {axis: [count] * layers + [0] * (full - layers) for axis, count in live.items()}
        done = finished_axes(config, tokens)
        new = due_shape(shape, rows, range(layers), config.goals, done)
        if new != shape:
            shape = new
            changes.append(ShapeChange(tokens, shape))
    return changes


@settings(deadline=None, max_examples=60)
@given(
    full=st.integers(2, 64),
    target=st.integers(1, 63),
    alignment=st.sampled_from((1, 2, 8)),
    block=st.integers(0, 16),
    interval=st.sampled_from((1, 3, 7)),
    removal=st.sampled_from(("cubic", "linear", "rounds", "one_shot")),
    rounds=st.integers(1, 30),
    steps=st.integers(1, 120),
)
def test_planned_shapes_are_those_of_the_pruner_step_by_step(
    full: int,
    target: int,
    alignment: int,
    block: int,
    interval: int,
    removal: str,
    rounds: int,
    steps: int,
) -> None:
    config = small(
        model={"ffn_hidden_size": full * alignment},
        schedule={"total_tokens": steps * 16, "removal": removal, "rounds": rounds},
        prune={
            "target": {"ffn_hidden_size": min(target, full - 1) * alignment},
            "alignment": alignment,
            "compaction_block": block * alignment,
            "mask_interval_steps": interval,
        },
    )
    changes = shape_plan(config)
    assert changes == simulated_plan(config)
    assert changes[-1].shape == target_shape(config)
    for step in range(steps + 1):
        live = live_at_step(config, step)["ffn_hidden_size"]
        assert neurons(shape_at(config, step * 16)) >= live


@pytest.mark.parametrize(
    "order", [[], ["num_layers", "hidden_size+ffn_hidden_size", "num_query_groups"]], ids=len
)
@pytest.mark.parametrize("interval", [1, 3])
def test_all_axes_are_planned_as_the_pruner_shrinks_them(order: list[str], interval: int) -> None:
    target = {"ffn_hidden_size": 16, "num_query_groups": 1, "hidden_size": 64, "num_layers": 2}
    config = small(
        model={"num_layers": 4, "hidden_size": 128},
        schedule={"total_tokens": 120 * 16},
        prune={"order": order, "channel_alignment": 16, "mask_interval_steps": interval}
        | {"target": target},
    )
    changes = shape_plan(config)
    assert changes == simulated_plan(config)
    assert changes[-1].shape == target_shape(config)
    assert target_shape(config).by_number(4) == {
        "ffn_hidden_size": [16, 16, 0, 0],
        "num_query_groups": [1, 1, 0, 0],
        "hidden_size": [64],
        "num_layers": [2],
    }
    # Whatever comes first in the order is all gone before the next begins.
    first = next(c.shape for c in changes if c.shape.num_layers == 2)
    assert (first.hidden_size == 128) == bool(order)


def test_shapes_change_at_the_steps_worked_out_by_hand() -> None:
    # Removal from token 512 to 666 (0.65 x 1024). After steps 33, 34, ... the cubic keeps
    # 16 + 48 (1 - 16 (s - 32) / 154)^3 neurons, rounded: 51, 40, 32, 26, 21, 19, 17, 16.
    plan = [(change.tokens // 16, neurons(change.shape)) for change in shape_plan(small())]
    assert plan == [(33, 56), (34, 40), (35, 32), (37, 24), (40, 16)]


def test_linear_shapes_change_at_the_steps_worked_out_by_hand() -> None:
    # 64 - 48 (16 (s - 32) / 154) after steps 33, 34, ...: 59, 54, 49, 44, 39, 34, 29, 24, 19, 16.
    plan = shape_plan(small(schedule={"removal": "linear"}))
    assert [(change.tokens // 16, neurons(change.shape)) for change in plan] == [
        (34, 56), (36, 48), (37, 40), (39, 32), (40, 24), (42, 16),
    ]  # fmt: skip


def test_rounds_change_the_shape_when_they_happen() -> None:
    # Removal from token 512 to 832 in 5 rounds: at 0, 1, 3, 6, 10 tenths of the window.
    config = small(
        schedule={
            "removal": "rounds", "rounds": 5, "prune_fraction": 0.3125, "recover_fraction": 0.1875
        }
    )  # fmt: skip
    live = [live_at_step(config, step)["ffn_hidden_size"] for step in (31, 32, 33, 34, 38, 44, 52)]
    assert live == [64, 54, 54, 45, 35, 26, 16]
    plan = [(change.tokens // 16, neurons(change.shape)) for change in shape_plan(config)]
    assert plan == [(32, 56), (34, 48), (38, 40), (44, 32), (52, 16)]


def test_the_plan_names_the_curves_and_shows_where_wsd_decays() -> None:
    schedule = {"lr_decay_style": "WSD", "removal": "rounds", "prune_warmup_fraction": 0.2}
    config = small(schedule=schedule)
    run = forecast(config)
    (begins,) = [point for point in run.points if point.label == "LR decay begins"]
    assert (begins.step, begins.lr) == (58, learning_rate(config.schedule, 928))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(run))
    assert "Curves: learning rate WSD, removal 20 rounds" in capture.get()
    twice = forecast(small(schedule=schedule | {"kind": "restarted"}))
    labels = [point.label for point in twice.points]
    assert labels.index("LR decay begins") < labels.index("LR decay begins again")


def test_zeros_alone_never_change_the_shape() -> None:
    config = small(prune={"compact": False})
    assert shape_plan(config) == []
    assert shape_at(config, 1024) == Shape.full(config.model)


def test_the_share_removed_is_what_live_neurons_follow() -> None:
    config = small()
    for step in range(65):
        removed = removed_at(config, step * 16)
        assert live_at_step(config, step) == {"ffn_hidden_size": round(64 - 48 * removed)}
    assert (removed_at(config, 512), removed_at(config, 1024)) == (0, 1)
    assert removed_at(small(prune={"strategy": "none"}), 1024) == 0


def test_the_paper_run_is_planned_with_ten_compactions(paper: Config) -> None:
    changes = shape_plan(paper)
    assert len(changes) == 10
    assert neurons(changes[-1].shape) == 6144


def test_flops_are_the_sum_over_steps_in_the_shape_of_each() -> None:
    config = small()
    total = 0
    for step in range(64):
        total += 16 * flops(config.model, neurons(shape_at(config, step * 16)), 8)
    assert remaining_flops(config, 0) == total
    assert remaining_flops(config, 1024) == 0
    assert flops_between(config, 0, 600) + remaining_flops(config, 600) == total


@pytest.mark.parametrize(
    "distill",
    [
        {"teacher": "self"},
        {"teacher": "self", "alpha": 0.0},
        {"teacher": "elsewhere", "alpha_end": 0.0},
        {"teacher": "self", "alpha_end": 0.0, "alpha_shape": "cosine"},
        {"teacher": "self", "alpha": 0.0, "alpha_end": 0.0},
        {"teacher": "none"},
    ],
)
@pytest.mark.parametrize("total", [1024, 1000])
def test_the_teacher_costs_a_forward_pass_in_each_step_that_asks_it(
    distill: dict[str, Any], total: int
) -> None:
    phases = {"enlarged_fraction": 0.47, "prune_fraction": 0.18}
    config = small(schedule={"total_tokens": total, **phases}, distill=distill)
    teacher = TeacherSize(config.model, Shape.full(config.model))
    asked = [
        distillation_share(config.schedule, config.distill, tokens) > 0
        for tokens in range(16, total + 16, 16)
    ]
    steps = [taught_between(config, 16 * i, 16 * i + 16) for i in range(len(asked))]
    assert steps == [16 * each for each in asked]
    forward = flops(config.model, 64, 8) // 3
    assert teacher_flops_between(config, 0, 16 * len(asked), teacher) == 16 * sum(asked) * forward
    unknown = teacher_flops_between(config, 0, total, None)
    assert unknown is None if any(asked) else unknown == 0


def printed(config: Config) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(forecast(config)))
    return capture.get()


def test_the_plan_shows_the_teachers_flops_apart(tmp_path: Path) -> None:
    base = small(schedule={"prune_warmup_fraction": 0.2})
    own = configs.replace(base, distill={"teacher": "self"})
    plain, taught = forecast(base), forecast(own)
    forward = flops(base.model, 64, 8) // 3
    assert taught.cost.teacher == 512 * forward and plain.cost.teacher == 0
    assert [phase.teacher_flops for phase in taught.phases] == [
        0, *(phase.tokens * forward for phase in taught.phases[1:]),
    ]  # fmt: skip
    assert taught.cost.this_run == plain.cost.this_run
    assert "its teacher, forward passes" in printed(own)
    assert "its teacher" not in printed(base)

    other = small(distill={"teacher": str(tmp_path)}, prune={"strategy": "none"})
    assert forecast(other).cost.teacher is None and "not known" in printed(other)
    # A pruned run's checkpoint: its shape is in its state.
    shape = Shape.full(base.model).with_counts("ffn_hidden_size", 32)
    state = TrainState(1, 16, shape)
    (tmp_path / "config.yaml").write_text(configs.to_yaml(base))
    (tmp_path / "state.json").write_text(json.dumps(dataclasses.asdict(state) | {"format": FORMAT}))
    assert forecast(other).cost.teacher == 1024 * (flops(base.model, 32, 8) // 3)


def test_the_plan_of_the_paper_run_shows_its_headline_numbers(paper: Config) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(forecast(paper, 16)))
    text = capture.get()
    for shown in ("2.8B", "1.3B", "2T tokens", "16 processes: TP 2 x PP 1 x DP 8", "16384", "6144"):
        assert shown in text


def test_the_plans_phases_add_up(paper: Config) -> None:
    plan = forecast(paper, 2)
    assert [part.name for part in plan.phases] == ["enlarged", "prune", "recover"]
    assert [part.tokens for part in plan.phases] == [10**12, 3 * 10**11, 7 * 10**11]
    assert sum(part.steps for part in plan.phases) == plan.steps == 476838
    assert sum(part.flops for part in plan.phases) == plan.cost.this_run
    assert plan.cost.target_from_scratch < plan.cost.this_run < plan.cost.zeros_only
    # 2.8B over half of the tokens and mostly 1.3B over the rest: about (2.8 + 1.3) / (2 x 1.3).
    assert plan.cost.this_run / plan.cost.target_from_scratch == pytest.approx(1.55, abs=0.01)


def test_the_plan_of_plain_training_compares_nothing() -> None:
    config = small(prune={"strategy": "none"})
    plan = forecast(config)
    assert plan.enlarged == plan.target
    assert plan.compactions == []
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(plan))
    assert "from scratch" not in capture.get()


def test_a_plan_for_a_wrong_number_of_processes_is_refused(paper: Config) -> None:
    with pytest.raises(ConfigError, match="start a multiple of 2"):
        forecast(paper, 3)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (977, "977"),
        (2048, "2.05K"),
        (33_554_432, "33.6M"),
        (680e6, "680M"),
        (100e9, "100B"),
        (2e12, "2T"),
    ],
)
def test_counts_are_written_as_people_say_them(number: float, text: str) -> None:
    assert human_count(number) == text


def test_two_figures_are_enough_for_a_models_name() -> None:
    assert human_count(2.819e9, digits=2) == "2.8B"
    assert human_count(302e6, digits=2) == "302M"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_can_be_planned(path: Path) -> None:
    config = configs.load(path)
    parallel = config.parallel
    size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    plan = forecast(config, size)
    assert plan.target.parameters.total < plan.enlarged.parameters.total
    last = plan.points[-1]
    assert last.removed == 1 and last.live == last.stored == plan.target.stored
    for axis, goal in config.goals.items():
        assert last.stored[axis] == goal.target


@pytest.fixture(scope="module")
def all_axes() -> Config:
    return configs.load(EXAMPLES / "2p8b_to_1p3b_all_axes.yaml")


def test_all_axes_reach_the_size_that_neurons_alone_reach(paper: Config, all_axes: Config) -> None:
    assert all_axes.model == paper.model
    neurons, together = (forecast(config, 2).target for config in (paper, all_axes))
    assert together.parameters.total == pytest.approx(neurons.parameters.total, rel=0.005)
    # bf16 keys and values of 128 channels.
    assert neurons.kv_cache_bytes_per_token == 2 * 8 * 128 * 24 * 2
    assert together.kv_cache_bytes_per_token == 2 * 4 * 128 * 20 * 2


def test_each_axis_is_shown_alone_and_together(all_axes: Config) -> None:
    run = forecast(all_axes, 2)
    assert list(run.alone) == ["ffn_hidden_size", "num_query_groups", "num_layers"]
    for axis, size in run.alone.items():
        others = {name: run.enlarged.stored[name] for name in run.enlarged.stored if name != axis}
        assert size.stored == others | {axis: run.target.stored[axis]}
        assert run.target.parameters.total < size.parameters.total < run.enlarged.parameters.total
        assert run.target.flops_per_token < size.flops_per_token < run.enlarged.flops_per_token
    assert [part.parameters for part in run.phases] == [
        run.enlarged.parameters.total,
        run.target.parameters.total,
        run.target.parameters.total,
    ]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(run))
    text = capture.get()
    for shown in ("neurons alone", "KV groups alone", "layers alone", "98.3K", "81.9K", "1.3B"):
        assert shown in text


MODELS = {
    "tied": ({}, {}),
    "untied": ({"share_embeddings_and_output_weights": False}, {}),
    "with QK norm": ({"qk_layernorm": True, "num_query_groups": 4}, {}),
    "TP 2": ({"num_attention_heads": 8, "num_query_groups": 8}, {"tensor_model_parallel_size": 2}),
    "one group": ({"num_query_groups": 1}, {}),
}


def finds_shape(strategy: str, goal: int, of: str, **least: int) -> Config:
    model, parallel = MODELS[of]
    prune = {"strategy": strategy, "target": {"parameters": goal, **least}}
    return configs.from_dict({"model": model, "parallel": parallel, "prune": prune})


def total(config: Config, counts: dict[str, int]) -> int:
    shape = Shape.full(config.model)
    for axis, count in counts.items():
        shape = shape.with_counts(axis, count)
    return shape.parameters(config.model).total


@pytest.mark.parametrize("of", MODELS)
@pytest.mark.parametrize("strategy", ["adapt_pruner", "efficient_llm"])
@settings(max_examples=40, deadline=None)
@given(shares=st.tuples(*[st.floats(0, 0.999)] * 2), floor=st.booleans())
def test_a_forecast_meets_its_number_of_parameters_within_a_block(
    strategy: str, of: str, shares: tuple[float, float], floor: bool
) -> None:
    given_least = {"ffn_hidden_size": 256} if floor else {}
    any_goal = finds_shape(strategy, 1, of, **given_least)
    least = total(any_goal, {axis: goal.least for axis, goal in any_goal.goals.items()})
    full = total(any_goal, {})
    sizes = []
    for share in sorted(shares):
        number = int(least + share * (full - least))
        config = finds_shape(strategy, number, of, **given_least)
        configs.validate(config, config.parallel.model_parallel_size)
        goals = config.goals
        for goal in goals.values():
            assert goal.least <= goal.target <= goal.full
            assert goal.target % goal.final_multiple == 0
        assert not floor or goals["ffn_hidden_size"].least == 256
        targets = {axis: goal.target for axis, goal in goals.items()}
        size = target_shape(config).parameters(config.model).total
        neurons = goals["ffn_hidden_size"]
        more = targets | {"ffn_hidden_size": neurons.target + neurons.final_multiple}
        assert size == total(config, targets) <= number < total(config, more)
        sizes.append(size)
    assert sizes == sorted(sizes), "more parameters never make a smaller model"


def test_a_forecast_shrinks_all_axes_by_one_share_and_neurons_take_what_is_left() -> None:
    def targets(config: Config) -> list[int]:
        return [goal.target for goal in config.goals.values()]

    # 8 groups of one query head of 32, and 1024 neurons, in each of 4 layers.
    half = finds_shape("adapt_pruner", 1_600_000, "TP 2")
    assert total(half, {"ffn_hidden_size": 528, "num_query_groups": 4}) == 1_598_592
    assert targets(half) == [528, 4]
    # One weight less, and the neurons give it: 16 of 384 weights in 4 layers.
    assert targets(finds_shape("adapt_pruner", 1_598_591, "TP 2")) == [512, 4]
    assert targets(finds_shape("efficient_llm", 900_000, "TP 2")) == [656, 4, 64]


def test_a_plan_says_that_the_shape_is_a_forecast() -> None:
    config = finds_shape("efficient_llm", 1_200_000, "tied")
    run = forecast(config)
    assert run.parameter_goal == 1_200_000
    assert run.target.parameters.total <= 1_200_000
    assert run.points[-1].stored == run.target.stored
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(run))
    text = capture.get()
    assert "target: 1,200,000 parameters; the method finds the shape, below is a forecast" in text
    assert "\nforecast " in text and "\ntarget " not in text.partition("Compute for")[0]
    assert forecast(Config()).parameter_goal is None


def test_axes_in_order_begin_one_after_the_other(all_axes: Config) -> None:
    order = ["num_layers", "ffn_hidden_size+num_query_groups"]
    run = forecast(configs.replace(all_axes, prune={"order": order}), 2)
    (begin,) = [point for point in run.points if point.label == "neurons, KV groups begin"]
    (before,) = [point for point in run.points if point.label == "removal 25 %"]
    assert begin.live["num_layers"] == run.target.stored["num_layers"]
    assert before.live["num_query_groups"] == run.enlarged.stored["num_query_groups"]
    assert begin.removed == pytest.approx(1 / 3, abs=1e-3)
