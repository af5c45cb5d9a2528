"""What a scaling law predicts of a run, where it may, and how one is fitted. Nothing is trained."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from records import record
from rich.console import Console
from typer.testing import CliRunner

from megatron_idea import cli
from megatron_idea import config as configs
from megatron_idea.checkpoint.folder import check_same_run
from megatron_idea.checkpoint.state import CheckpointError
from megatron_idea.config import Config, ConfigError, LawConfig
from megatron_idea.course import (
    flops_between,
    live_at_step,
    num_steps,
    own_teacher,
    shape_plan,
    target_shape,
)
from megatron_idea.law import average_parameters, in_range, parameter_steps, predict
from megatron_idea.planning.estimate import forecast, render
from megatron_idea.planning.law import Point, fit, outlook
from megatron_idea.report import closing_table
from megatron_idea.report.page import page
from megatron_idea.report.predicted import predicted, recorded_average
from megatron_idea.report.run import read_run
from megatron_idea.shape import Shape

EXAMPLES = Path(__file__).parent.parent / "examples" / "configs"
LAW = LawConfig()
MODEL = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8,
    "num_query_groups": 4, "kv_channels": 16, "vocab_size": 512,
}  # fmt: skip


def small(**sections: Any) -> Config:
    """128 steps of 16 tokens; neurons 96 to 40."""
    base = configs.from_dict(
        {
            "model": MODEL,
            "training": {"seq_length": 8, "global_batch_size": 2, "micro_batch_size": 2},
            "schedule": {"total_tokens": 128 * 16, "prune_warmup_fraction": 0.1},
            "prune": {"target": {"ffn_hidden_size": 40}, "channel_alignment": 8},
        }
    )
    return configs.replace(base, **sections)


def live_shape(config: Config, step: int) -> Shape:
    shape = Shape.full(config.model)
    for axis, count in live_at_step(config, step).items():
        shape = shape.with_counts(axis, count)
    return shape


ALL = configs.PruneTarget(40, 2, 32, 3)
CONFIGS = {
    "cubic": small(),
    "one_shot": small(schedule={"removal": "one_shot"}),
    "rounds": small(schedule={"removal": "rounds", "rounds": 3}),
    "every third step": small(prune={"mask_interval_steps": 3}),
    "all axes": small(prune={"target": ALL}),
    "in order": small(
        prune={"target": ALL, "order": ["num_layers", "ffn_hidden_size+num_query_groups",
                                        "hidden_size"]}
    ),
    "untied, QK norm": small(
        model={"share_embeddings_and_output_weights": False, "qk_layernorm": True},
        prune={"target": ALL},
    ),
    "parameters": small(
        prune={"strategy": "efficient_llm", "target": configs.PruneTarget(parameters=120_000)}
    ),
    "zeros only": small(prune={"compact": False}),
    "a last step that overshoots": small(schedule={"total_tokens": 128 * 16 - 9}),
    "nothing": small(prune={"strategy": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_average_is_that_of_the_live_units_before_each_step(config: Config) -> None:
    sizes = [
        live_shape(config, step).parameters(config.model).total for step in range(num_steps(config))
    ]
    assert average_parameters(config) == sum(sizes) / len(sizes)
    assert [parameter_steps(config, n) for n in (0, 1, 77)] == [0, sizes[0], sum(sizes[:77])]
    full, target = Shape.full(config.model), target_shape(config)
    assert sizes[0] == full.parameters(config.model).total
    assert sizes[-1] == target.parameters(config.model).total


def test_a_run_that_is_half_enlarged_lies_in_the_middle_of_both_sizes() -> None:
    config = small(schedule={"removal": "one_shot", "prune_warmup_fraction": 0.5})
    window = 0.5 + 0.15 * 0.5
    full, target = (
        shape.parameters(config.model).total
        for shape in (Shape.full(config.model), target_shape(config))
    )
    # Units go at the end of step 74, the first past 0.575 of 128 steps.
    assert -(-window * 128 // 1) == 74
    assert average_parameters(config) == (74 * full + 54 * target) / 128


def test_a_prediction_is_the_sum_of_three_terms() -> None:
    law = LawConfig(e=1.5, a=100.0, alpha=0.5, b=30.0, beta=0.25)
    assert predict(law, 10_000.0, 160_000.0) == 1.5 + 100 / 100 + 30 / 20
    # 70B parameters and 1.4T tokens: 1.8172 + 482.01 / 5929 + 2085.43 / 27703 (logs by hand).
    assert predict(LAW, 70e9, 1.4e12) == pytest.approx(1.973, abs=1e-3)


@pytest.mark.parametrize(
    ("parameters", "tokens", "valid"),
    [
        (58e6, 58e7, True),
        (468e6, 468e6 * 400, True),
        (57e6, 57e7, False),
        (470e6, 47e9, False),
        (1e8, 0.9e9, False),
        (1e8, 41e9, False),
    ],
)
def test_the_range_has_sizes_and_tokens_per_parameter(
    parameters: float, tokens: float, valid: bool
) -> None:
    assert in_range(LAW, parameters, tokens) is valid


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ({"a": 0}, "law.a is 0.0; it must be positive"),
        ({"beta": -0.3}, "law.beta is -0.3; it must be positive"),
        ({"alpha": ".inf"}, "law.alpha is inf"),
        ({"e": -1}, "law.e is -1.0; it must not be negative"),
        ({"parameters": [1e6]}, r"law.parameters is \[1000000.0\]; it must be \[least, most\]"),
        ({"parameters": [2e6, 1e6]}, "law.parameters"),
        ({"tokens_per_parameter": [0, 10]}, "law.tokens_per_parameter"),
    ],
)
def test_a_law_that_cannot_be_is_refused(law: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.from_dict({"law": law})


def test_a_law_survives_being_saved(tmp_path: Path) -> None:
    given = {"name": "ours", "a": "3e2", "parameters": ["1e6", "2_000_000"]}
    config = configs.from_dict({"law": given})
    assert config.law == LawConfig(name="ours", a=300.0, parameters=[1e6, 2e6])
    (tmp_path / "config.yaml").write_text(configs.to_yaml(config))
    assert configs.load(tmp_path / "config.yaml") == config


def test_a_resumed_run_may_take_another_law(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_00000001"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(configs.to_yaml(small()))
    check_same_run(path, small(law={"name": "ours", "e": 1.0}))
    with pytest.raises(CheckpointError, match=r"schedule\.lr"):
        check_same_run(path, small(law={"e": 1.0}, schedule={"lr": 0.5}))


def runs(noise: float = 0.0) -> list[Point]:
    rng = random.Random(0)
    return [
        Point(size, size * ratio, predict(LAW, size, size * ratio) + rng.gauss(0, noise))
        for size in (60e6, 120e6, 240e6, 460e6)
        for ratio in (10.0, 40.0, 160.0)
    ]


def test_a_fit_recovers_the_law_that_made_the_points() -> None:
    law = fit(runs())
    for name in ("e", "a", "alpha", "b", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(LAW, name), rel=1e-6)
    assert law.name == "fitted to 12 runs"
    assert (law.parameters, law.tokens_per_parameter) == ([60e6, 460e6], [10.0, 160.0])
    assert fit(runs()) == law


def test_with_noise_a_fit_predicts_as_well_as_the_noise_allows() -> None:
    law = fit(runs(noise=0.002))
    assert law.alpha == pytest.approx(LAW.alpha, abs=0.05)
    assert law.beta == pytest.approx(LAW.beta, abs=0.05)
    for point in runs():
        assert predict(law, point.parameters, point.tokens) == pytest.approx(point.loss, abs=0.005)


def test_one_run_that_went_wrong_does_not_bend_a_fit() -> None:
    points = runs()
    points[5] = dataclasses.replace(points[5], loss=points[5].loss + 1)
    law = fit(points)
    for point in runs():
        assert predict(law, point.parameters, point.tokens) == pytest.approx(point.loss, abs=0.005)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (runs()[:4], "4 different runs: .* from 5 on"),
        ([p for p in runs() if p.parameters < 200e6], "2 different average sizes"),
        ([Point(n * 1e6, 1e9, 3.0) for n in range(60, 70)], "1 different numbers of tokens:"),
        ([Point(n * 1e6, n * 2e7, 3.0) for n in range(60, 70)], "1 .* tokens per parameter"),
        ([], "0 different runs"),
    ],
)
def test_points_that_leave_exponents_open_are_refused(points: list[Point], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(points)


def test_an_outlook_compares_with_training_small_at_equal_tokens_and_at_equal_flops() -> None:
    config = small()
    found = outlook(config, None)
    assert found is not None
    total, target = 128 * 16, target_shape(config)
    size, per_token = (
        target.parameters(config.model).total,
        target.flops_per_token(config.model, 8),
    )
    this, same, more, full = found.predictions.values()
    assert (this.average_parameters, this.tokens) == (average_parameters(config), total)
    assert this.flops == flops_between(config, 0, total)
    assert (same.average_parameters, same.tokens, same.flops) == (size, total, total * per_token)
    assert (more.average_parameters, more.tokens) == (size, round(this.flops / per_token))
    assert more.flops == pytest.approx(this.flops, abs=per_token)
    assert full.average_parameters == Shape.full(config.model).parameters(config.model).total
    assert full.flops == total * Shape.full(config.model).flops_per_token(config.model, 8)
    for one in found.predictions.values():
        assert one.loss == predict(LAW, one.average_parameters, one.tokens)
        assert one.difference == this.loss - one.loss
        assert not one.in_range
    # Larger on average than the small model, smaller than the enlarged one.
    assert same.difference < 0 < full.difference
    assert not found.without_teacher


def test_nothing_is_said_where_nothing_is_pruned() -> None:
    config = small(prune={"strategy": "none"})
    assert outlook(config, None) is None
    assert forecast(config).outlook is None
    assert "Should it pay?" not in printed(render(forecast(config)))


def test_a_teachers_flops_buy_the_small_model_tokens() -> None:
    taught = small(distill={"teacher": "self"})
    teacher = own_teacher(taught)
    known, unknown, alone = (
        outlook(taught, teacher), outlook(taught, None), outlook(small(), None),
    )  # fmt: skip
    assert known and unknown and alone
    cost = forecast(taught).cost
    assert known.this_run.flops == cost.this_run + (cost.teacher or 0) > alone.this_run.flops
    assert known.small_for_the_flops.tokens > alone.small_for_the_flops.tokens
    assert unknown.without_teacher and unknown.this_run.flops == alone.this_run.flops


def printed(rendered: object) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(rendered)
    return capture.get()


def test_the_plan_says_whether_it_should_pay_and_when_that_is_an_extrapolation() -> None:
    text = printed(render(forecast(configs.load(EXAMPLES / "300m.yaml"))))
    _, _, shown = text.partition("Should it pay?")
    rows = [line.split() for line in shown.splitlines() if line[:5] in ("this ", "small", "enlar")]
    assert [row[-5:-1] for row in rows[1:2]] == [["336M", "500B", "1.31e+21", "2.4489*"]]
    assert rows[0] == ["this", "run", "541M", "500B", "1.93e+21", "2.3691*"]
    assert float(rows[1][-1]) == -0.0798
    assert "58M to 468M parameters, 10 to 400 tokens per parameter" in shown
    assert LAW.name in shown

    inside = printed(render(forecast(configs.load(EXAMPLES / "adapt_pruner_360m_to_125m.yaml"))))
    assert "Should it pay?" in inside and "an extrapolation" not in inside


def test_the_plans_json_has_the_outlook() -> None:
    path = str(EXAMPLES / "300m.yaml")
    done = CliRunner().invoke(cli.app, ["plan", path, "--json", "law.e=1"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)["outlook"]
    assert found["law"] == dataclasses.asdict(LawConfig(e=1.0))
    this, same = found["this_run"], found["small_for_the_tokens"]
    assert this["difference"] == 0
    assert same["difference"] == this["loss"] - same["loss"] < 0


def write_run(run_dir: Path, config: Config, first: int = 1, **last: Any) -> None:
    """What a run leaves that follows its plan, from step ``first`` on; held-out loss 3.25."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(configs.to_yaml(config))
    full, layers = Shape.full(config.model), config.model.num_layers
    changes = {change.tokens: change.shape for change in shape_plan(config)}
    lines, stored = [], full
    for step in range(1, num_steps(config) + 1):
        tokens = step * config.batch_tokens
        stored = changes.get(tokens, stored)
        live = live_shape(config, step).by_number(layers)
        fields = last if step == num_steps(config) else {}
        known = {"tokens": tokens, "live": live, "stored": stored.by_number(layers)}
        if step >= first:
            lines.append(json.dumps(record(step, **known, **fields).as_dict()))
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    event = {"kind": "evaluated", "step": step, "tokens": tokens, "val_loss": 3.25, "time": 0.0}
    (run_dir / "events.jsonl").write_text(json.dumps(event) + "\n")


@pytest.mark.parametrize("config", [CONFIGS["cubic"], CONFIGS["all axes"]], ids=["cubic", "all"])
def test_a_run_that_went_as_planned_has_the_planned_average_and_flops(
    config: Config, tmp_path: Path
) -> None:
    write_run(tmp_path, config)
    run = read_run(tmp_path)
    assert recorded_average(run) == average_parameters(config)
    table = predicted(run)
    assert table is not None
    loss, average, flops = table.rows
    expected = predict(LAW, average_parameters(config), 128 * 16)
    assert loss == ("held-out loss", f"{expected:.4f}", "3.2500")
    assert average[1] == average[2] and flops[1] == flops[2]


def test_what_came_before_a_branch_counts_as_planned(tmp_path: Path) -> None:
    config = CONFIGS["all axes"]
    write_run(tmp_path, config, first=75)
    run = read_run(tmp_path)
    # Units that its first step took are gone before it, for what its own records know.
    sizes = [live_shape(config, step).parameters(config.model).total for step in (74, 75)]
    assert sizes[0] != sizes[1]
    missing = (sizes[0] - sizes[1]) / 128
    assert recorded_average(run) == pytest.approx(average_parameters(config) - missing, rel=1e-12)
    assert predicted(run).rows[2][2] == "not known"


def test_recorded_flops_are_those_of_the_records(tmp_path: Path) -> None:
    write_run(tmp_path, CONFIGS["cubic"], flops=2.5e12)
    assert predicted(read_run(tmp_path)).rows[2][2] == "2.5 TFLOPs"


def test_outside_the_range_the_page_is_muted_and_the_terminal_silent(tmp_path: Path) -> None:
    config = CONFIGS["cubic"]
    write_run(tmp_path / "far", config)
    run = read_run(tmp_path / "far")
    table = predicted(run)
    assert table.is_muted and table.note.startswith(f"Outside the range of {LAW.name} (58M to")
    assert '<section class="card muted"><h3>Predicted and measured' in page([run])
    assert "Predicted" not in printed(closing_table(tmp_path / "far"))

    average = average_parameters(config)
    near = {"name": "ours", "parameters": [1e3, 1e9], "tokens_per_parameter": [1e-6, 1.0]}
    write_run(tmp_path / "near", configs.replace(config, law=near))
    run = read_run(tmp_path / "near")
    assert not predicted(run).is_muted
    assert '<section class="card"><h3>Predicted and measured' in page([run])
    expected = predict(LAW, average, 128 * 16)
    line = printed(closing_table(tmp_path / "near"))
    assert f"by the law of ours: held-out loss {expected:.4f}" in line
    assert f"measured 3.2500 ({3.25 - expected:+.4f})" in " ".join(line.split())

    # A law that was set was meant, in its range or not.
    write_run(tmp_path / "set", configs.replace(config, law={"name": "ours"}))
    assert "outside its range, held-out loss" in printed(closing_table(tmp_path / "set"))


def test_before_the_end_nothing_is_compared(tmp_path: Path) -> None:
    config = small(law={"name": "ours"})
    write_run(tmp_path, config)
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert predicted(read_run(tmp_path)) is None
    assert "Predicted" not in printed(closing_table(tmp_path))


def test_a_larger_average_is_predicted_better() -> None:
    losses = [predict(LAW, size, 1e10) for size in (60e6, 100e6, 400e6)]
    assert all(more > less for more, less in pairwise(losses))
