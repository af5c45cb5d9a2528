"""Results of a suite are put together from run folders, pair by pair within seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from records import record

from megatron_idea import config as configs
from megatron_idea.compare import page, tables
from megatron_idea.compare.results import as_json, collect, curves, fit
from megatron_idea.compare.statistics import Interval, interval, verdict
from megatron_idea.compare.suite import ArmRun, Suite
from megatron_idea.config import Config, LawConfig
from megatron_idea.errors import UserError
from megatron_idea.law import predict
from megatron_idea.records.terminal import Console
from megatron_idea.shape import Shape

BATCH = 4 * 32
STEPS = 20
WIDE, SMALL = 64, 32
VERSIONS = {"python": "3.11", "torch": "2.13"}

# ----------------------------------------------------------------------------------- statistics


def test_the_interval_is_students() -> None:
    """Mean -0.02, s = 0.01, and the table's t(0.975, 2) = 4.30265273: half is t s / sqrt(3)."""
    found = interval([-0.02, -0.03, -0.01])
    assert found.mean == pytest.approx(-0.02, abs=1e-15)
    assert found.half_width == pytest.approx(4.302652729911275 * 0.01 / math.sqrt(3), rel=1e-9)
    assert found.half_width == pytest.approx(0.0248414, abs=1e-7)
    assert (found.low, found.high) == pytest.approx((-0.0448414, 0.0048414), abs=1e-7)
    assert found.values == (-0.02, -0.03, -0.01)


def test_less_confidence_is_a_narrower_interval() -> None:
    """t(0.95, 1) = 6.313751515."""
    assert interval([1.0, 3.0], confidence=0.9).half_width == pytest.approx(6.313751515, rel=1e-9)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([-0.02, -0.03, -0.01], "cannot tell"),
        ([-0.02, -0.021, -0.019], "better"),
        ([0.02, 0.021, 0.019], "worse"),
        ([-0.02, -0.02], "better"),  # without spread
        ([0.0, 0.0, 0.0], "cannot tell"),
        ([-5.0], "cannot tell"),  # one seed, however far
        ([-5.0, math.nan], "cannot tell"),
        ([-5.0, -math.inf], "cannot tell"),
    ],
)
def test_the_verdict_goes_by_the_interval(differences: list[float], said: str) -> None:
    assert verdict(interval(differences)) == said


def test_one_value_has_no_interval() -> None:
    assert interval([2.5]) == Interval(2.5, None, None, (2.5,))


# -------------------------------------------------------------------------------------- a suite


def a_config(folder: Path, **sections: Any) -> Config:
    """A run of 20 steps that prunes 64 to 32 neurons from a quarter to a half of its tokens."""
    base = configs.from_dict(
        {
            "run_dir": str(folder),
            "model": {
                "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": WIDE, "vocab_size": 256,
                "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 8,
            },
            "training": {"seq_length": 32, "micro_batch_size": 4, "global_batch_size": 4},
            "schedule": {
                "total_tokens": STEPS * BATCH, "enlarged_fraction": 0.25, "prune_fraction": 0.25,
                "recover_fraction": 0.5, "prune_warmup_fraction": 0.2,
            },
            "prune": {"target": {"ffn_hidden_size": SMALL}, "alignment": 1, "compaction_block": 8},
            "evaluation": {"every_tokens": BATCH},
        }
    )  # fmt: skip
    return configs.replace(base, **sections)


PLAIN = {"prune": {"strategy": "none"}, "model": {"ffn_hidden_size": SMALL}}


def write_run(
    config: Config,
    losses: Mapping[int, float],
    *,
    steps: Sequence[int] | None = None,
    events: Sequence[dict[str, Any]] = (),
    **fields: Any,
) -> None:
    """A run folder with a record a step and an evaluation at each step of ``losses``.

    A run that prunes loses its neurons with the eighth step. ``fields``: of records; values, or
    functions of the step.
    """
    folder, total = Path(config.run_dir), config.schedule.total_tokens // BATCH
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    lines = []
    for step in range(1, total + 1) if steps is None else steps:
        full = Shape.full(config.model)
        gone = config.prune.strategy != "none" and step >= 8
        shape = full.with_counts("ffn_hidden_size", SMALL) if gone else full
        counts = shape.by_number(config.model.num_layers)
        known = {k: v(step) if callable(v) else v for k, v in fields.items()}
        known = {"tokens": step * BATCH, "live": counts, "stored": counts, "step_s": 0.5} | known
        lines.append(record(step, **known).as_dict())
    environment = {"device": "CPU", "processes": 1, "threads": 1, "versions": VERSIONS}
    written = [{"kind": "started", "time": 0.0, "step": 0, "environment": environment}, *events]
    written += [
        {"kind": "evaluated", "step": step, "tokens": step * BATCH, "val_loss": loss}
        for step, loss in losses.items()
    ]
    for name, each in (("metrics", lines), ("events", written)):
        text = "".join(json.dumps(line) + "\n" for line in each)
        (folder / f"{name}.jsonl").write_text(text)


def a_suite(
    out: Path,
    arms: Mapping[str, Mapping[str, Any]],
    losses: Mapping[str, Sequence[float | None]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    pairs: Sequence[tuple[str, str]] = (),
    **fields: Any,
) -> Suite:
    """Finished runs that end with these losses, one a seed; None: not there.

    The first arm is the reference.
    """
    runs = []
    for place, seed in enumerate(seeds):
        for arm, sections in arms.items():
            config = a_config(out / arm / f"seed{seed}", **sections)
            runs.append(ArmRun(arm, "", seed, config, None))
            loss = losses[arm][place]
            if loss is not None:
                end = config.schedule.total_tokens // BATCH
                write_run(config, {0: 5.5, 4: 3.0, end: loss}, **fields)
    reference, *others = arms
    return make_suite(out, runs, [*((arm, reference) for arm in others), *pairs])


def make_suite(
    out: Path,
    runs: Sequence[ArmRun],
    pairs: Sequence[tuple[str, str]] = (),
    sweep: tuple[str, tuple[str, ...]] | None = None,
) -> Suite:
    out.mkdir(exist_ok=True)
    path = out / "laptop.yaml"
    text = "arms: {plain: {}}  # <b>\n"
    arms, seeds = (tuple(dict.fromkeys(of(run) for run in runs)) for of in (_arm, _seed))
    return Suite(path, out, arms[0], seeds, sweep, tuple(pairs), arms, tuple(runs), text)


def _arm(run: ArmRun) -> str:
    return run.arm


def _seed(run: ArmRun) -> int:
    return run.seed


TWO = {"plain": PLAIN, "idea": {}}


def parameters(config: Config, neurons: int) -> int:
    shape = Shape.full(config.model).with_counts("ffn_hidden_size", neurons)
    return shape.parameters(config.model).total


# ---------------------------------------------------------------------------- arms and their pairs


def test_losses_are_compared_within_seeds_that_both_have(tmp_path: Path) -> None:
    losses = {"plain": [3.0, None, 2.0, 2.5], "idea": [2.98, 9.0, 1.97, 2.49]}
    results = collect(a_suite(tmp_path, TWO, losses, seeds=(0, 1, 2, 7)))
    (pair,) = results.pairs
    assert pair.difference.values == pytest.approx((-0.02, -0.03, -0.01), abs=1e-12)
    assert pair.difference.half_width == pytest.approx(0.0248414, abs=1e-7)
    assert (pair.agree, pair.of, pair.verdict) == (3, 3, "cannot tell")
    assert results.arms["plain"].seeds == [0, 2, 7]
    assert results.arms["idea"].seeds == [0, 1, 2, 7]
    assert results.arms["idea"].loss.mean == pytest.approx((2.98 + 9.0 + 1.97 + 2.49) / 4)


def test_a_run_that_is_not_finished_counts_for_progress_only(tmp_path: Path) -> None:
    losses = {"plain": [3.0, 2.0], "idea": [2.0, None]}
    suite = a_suite(tmp_path, TWO, losses, seeds=(0, 1))
    unfinished = next(run.config for run in suite.runs if (run.arm, run.seed) == ("idea", 1))
    write_run(unfinished, {0: 5.5, 4: 1.0}, steps=range(1, 6))
    results = collect(suite)
    assert results.arms["idea"].seeds == [0]
    run = results.runs["idea"][""][1]
    assert (run.finished, run.loss, run.tokens, run.total_tokens) == (
        False, None, 5 * BATCH, STEPS * BATCH,
    )  # fmt: skip
    assert tables.to_do(results).rows == [("idea", "1 of 2", "seed 1: 25%")]


def test_the_last_step_without_its_evaluation_is_not_the_end(tmp_path: Path) -> None:
    config = a_config(tmp_path / "idea" / "seed0")
    write_run(config, {0: 5.5, 19: 2.0})
    results = collect(make_suite(tmp_path, [ArmRun("idea", "", 0, config, None)]))
    assert not results.runs["idea"][""][0].finished
    assert results.arms == {}


def test_a_suite_without_runs_is_all_to_do(tmp_path: Path) -> None:
    suite = a_suite(tmp_path, TWO, {"plain": [None], "idea": [None]}, seeds=(0,))
    results = collect(suite)
    assert (results.arms, results.pairs, results.device) == ({}, [], "")
    assert [row[:2] for row in tables.to_do(results).rows] == [
        ("plain", "0 of 1"),
        ("idea", "0 of 1"),
    ]
    assert "No two arms" in page.write(suite, results).read_text()


def test_equal_is_what_both_arms_had_as_much_of(tmp_path: Path) -> None:
    longer = {"schedule": {"total_tokens": 2 * STEPS * BATCH}}
    arms = TWO | {"same": PLAIN, "more": PLAIN | longer, "exact": PLAIN | longer}
    losses = {arm: [2.0] for arm in arms}
    suite = a_suite(tmp_path, arms, losses, seeds=(0,), pairs=[("idea", "exact")])
    spent = {"plain": 100.0, "idea": 150.0, "same": 100.9, "more": 151.6, "exact": 151.4}
    for arm, flops in spent.items():
        metrics = tmp_path / arm / "seed0" / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines[-1]["flops"] = flops
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = collect(dataclasses.replace(suite, pairs=(*suite.pairs, ("idea", "more"))))
    found = {(pair.left, pair.right): pair for pair in results.pairs}
    assert {sides: pair.equal for sides, pair in found.items()} == {
        ("idea", "plain"): "tokens",
        ("same", "plain"): "tokens and FLOPs",
        ("more", "plain"): "neither",
        ("exact", "plain"): "neither",
        ("idea", "exact"): "FLOPs",  # 0.92 % apart
        ("idea", "more"): "neither",  # 1.06 % apart
    }
    assert found["idea", "exact"].tokens_ratio == 0.5
    assert found["idea", "plain"].flops_ratio == 1.5
    said = tables.answer(found["idea", "exact"])
    assert said[0] == "idea against exact, equal FLOPs, 0.50 x tokens"


def test_numbers_of_a_run_come_from_its_records(tmp_path: Path) -> None:
    losses = {"plain": [2.0], "idea": [1.9]}
    results = collect(a_suite(tmp_path, TWO, losses, seeds=(0,)))
    config = a_config(tmp_path)
    wide, small = parameters(config, WIDE), parameters(config, SMALL)
    idea, plain = results.arms["idea"], results.arms["plain"]
    assert (plain.average_parameters, plain.parameters) == (small, [small])
    # The eighth step still computes with what it then removes.
    assert idea.average_parameters == pytest.approx((8 * wide + 12 * small) / 20, rel=1e-12)
    assert idea.parameters == [small]
    assert idea.wall_s.values == (10.0,)
    # Of older folders, from shapes.
    rates = [
        Shape.full(config.model).with_counts("ffn_hidden_size", n).flops_per_token(config.model, 32)
        for n in (WIDE, SMALL)
    ]
    assert idea.flops == BATCH * (8 * rates[0] + 12 * rates[1])
    assert (idea.shapes, plain.shapes) == (["32 neurons"], ["32 neurons"])
    assert (results.device, results.versions) == ("CPU", VERSIONS)


def test_layers_that_differ_are_listed(tmp_path: Path) -> None:
    uneven = Shape.full(a_config(tmp_path).model).with_counts("ffn_hidden_size", [40, 24])
    counts = uneven.by_number(2)
    suite = a_suite(tmp_path, {"idea": {}}, {"idea": [2.0]}, seeds=(0,), live=counts)
    results = collect(suite)
    idea = results.arms["idea"]
    assert idea.shapes == ["40 24 neurons"]
    assert tables.arms(results).rows[0][-1] == "40 24 neurons"
    other = dataclasses.replace(idea, shapes=[*idea.shapes, "24 40 neurons"], seeds=[0, 1])
    shown = tables.arms(dataclasses.replace(results, arms={"idea": other}))
    assert shown.rows[0][-1] == "40 24 neurons (seed 0)"


def test_recorded_flops_count_and_not_the_shapes(tmp_path: Path) -> None:
    suite = a_suite(tmp_path, TWO, {"plain": [2.0], "idea": [1.9]}, seeds=(0,), flops=_million)
    results = collect(suite)
    assert results.arms["idea"].flops == 20e6
    curve = curves(results)["idea"]
    assert (curve.tokens, curve.flops) == ([0, 4 * BATCH, 20 * BATCH], [0.0, 4e6, 20e6])


def _million(step: int) -> float:
    return 1e6 * step


def test_a_teacher_of_unknown_size_leaves_flops_unknown(tmp_path: Path) -> None:
    suite = a_suite(tmp_path, TWO, {"plain": [2.0], "idea": [1.9]}, seeds=(0,), kl=0.5)
    results = collect(suite)
    assert results.arms["idea"].flops is None
    assert (results.pairs[0].flops_ratio, results.pairs[0].equal) == (None, "tokens")
    assert "FLOPs not known" in tables.answer(results.pairs[0])[0]
    assert "Loss over training compute" not in page.page(suite, results)


def test_the_rise_is_from_before_the_first_removal_on(tmp_path: Path) -> None:
    """The window begins at 5 + 0.2 * 5 = 6 of 20 steps."""
    losses = {0: 5.5, 4: 3.0, 5: 2.9, 6: 3.1, 10: 3.4, 20: 2.5}
    often, seldom = (
        a_config(tmp_path / name / "seed0", evaluation={"every_tokens": every})
        for name, every in (("often", BATCH), ("seldom", 0))
    )
    plain = a_config(tmp_path / "plain" / "seed0", **PLAIN)
    for config in (often, seldom, plain):
        write_run(config, losses)
    runs = [
        ArmRun(name, "", 0, config, None)
        for name, config in (("often", often), ("seldom", seldom), ("plain", plain))
    ]
    arms = collect(make_suite(tmp_path, runs)).arms
    assert arms["often"].rise is not None
    assert arms["often"].rise.mean == pytest.approx(3.4 - 2.9)
    # Evaluations at the ends of phases do not show how high it rose.
    assert (arms["seldom"].rise, arms["plain"].rise) == (None, None)


# -------------------------------------------------------------------------------- through a branch


def test_time_flops_and_losses_before_a_branch_are_the_sources(tmp_path: Path) -> None:
    first = a_config(tmp_path / "idea" / "seed0")
    second = configs.replace(
        a_config(tmp_path / "second" / "seed0"), start_from=f"{first.run_dir}@{6 * BATCH}"
    )
    third = configs.replace(
        a_config(tmp_path / "third" / "seed0"), start_from=f"{second.run_dir}@{15 * BATCH}"
    )
    write_run(first, {0: 5.5, 4: 3.0, 5: 2.9, 7: 1.0, 20: 2.5}, step_s=1.0)
    write_run(second, {10: 3.0, 20: 2.4}, steps=range(7, 21), step_s=10.0)
    write_run(third, {20: 2.3}, steps=range(16, 21), step_s=100.0)
    one = ArmRun("idea", "", 0, first, None)
    two = ArmRun("second", "", 0, second, one)
    three = ArmRun("third", "", 0, third, two)
    results = collect(make_suite(tmp_path, [one, two, three], [("second", "idea")]))
    arms = results.arms
    assert arms["second"].wall_s.mean == 6 * 1.0 + 14 * 10.0
    assert arms["third"].wall_s.mean == 6 * 1.0 + 9 * 10.0 + 5 * 100.0
    # All went from wide to small at the eighth step, whoever made it.
    assert arms["second"].average_parameters == arms["idea"].average_parameters
    assert arms["third"].average_parameters == arms["idea"].average_parameters
    assert arms["third"].flops == arms["second"].flops == arms["idea"].flops
    assert results.pairs[0].equal == "tokens and FLOPs"
    assert curves(results)["third"].tokens == [n * BATCH for n in (0, 4, 5, 10, 20)]
    # The loss of 1.0 at step 7 is not in the second one's past.
    assert arms["second"].rise is not None
    assert arms["second"].rise.mean == pytest.approx(3.0 - 2.9)


def test_a_branch_whose_source_is_gone_is_to_do(tmp_path: Path) -> None:
    source = ArmRun("idea", "", 0, a_config(tmp_path / "idea" / "seed0"), None)
    config = configs.replace(
        a_config(tmp_path / "second" / "seed0"), start_from=f"{source.run_dir}@{6 * BATCH}"
    )
    write_run(config, {20: 2.4}, steps=range(7, 21))
    results = collect(make_suite(tmp_path, [source, ArmRun("second", "", 0, config, source)]))
    assert results.arms == {}


def test_flops_before_a_checkpoint_from_elsewhere_are_not_guessed(tmp_path: Path) -> None:
    config = a_config(tmp_path / "idea" / "seed0")
    events = [{"kind": "branched", "source": "x", "step": 6, "tokens": 6 * BATCH}]
    write_run(config, {20: 2.4}, steps=range(7, 21), events=events)
    suite = make_suite(tmp_path, [ArmRun("idea", "", 0, config, None)])
    assert collect(suite).arms["idea"].flops is None


# ------------------------------------------------------------------------------------------ a sweep


def swept_suite(out: Path, losses: Mapping[tuple[str, str], Sequence[float | None]]) -> Suite:
    """Runs of arms at values of ``schedule.lr``, one a seed."""
    runs = []
    for (arm, value), each in losses.items():
        for seed, loss in enumerate(each):
            sections = TWO[arm] | {"schedule": {"lr": float(value)}}
            config = a_config(out / arm / f"lr={value}" / f"seed{seed}", **sections)
            runs.append(ArmRun(arm, f"lr={value}", seed, config, None))
            if loss is not None:
                write_run(config, {0: 5.5, 20: loss})
    values = tuple(dict.fromkeys(value for _, value in losses))
    return make_suite(out, runs, [("idea", "plain")], ("schedule.lr", values))


def test_each_arm_stands_with_its_best_value(tmp_path: Path) -> None:
    suite = swept_suite(
        tmp_path,
        {
            ("plain", "1e-2"): [3.0, 3.2], ("plain", "4e-2"): [2.9, 3.4],
            ("plain", "2e-2"): [2.0, 2.2],
            ("idea", "1e-2"): [2.5, 2.6], ("idea", "4e-2"): [1.8, 1.9],
            ("idea", "2e-2"): [2.0, 2.1],
        },
    )  # fmt: skip
    results = collect(suite)
    plain, idea = results.arms["plain"], results.arms["idea"]
    assert (plain.value, plain.at_edge) == ("lr=2e-2", False)  # the middle one, though written last
    assert (idea.value, idea.at_edge) == ("lr=4e-2", True)
    assert plain.swept == pytest.approx({"lr=1e-2": 3.1, "lr=4e-2": 3.15, "lr=2e-2": 2.1})
    assert results.pairs[0].difference.values == pytest.approx((1.8 - 2.0, 1.9 - 2.2))
    rows = {row[0]: row for row in tables.arms(results).rows}
    assert set(rows) == {"plain [lr=2e-2]", "idea [lr=4e-2, edge]"}
    assert "an end of the sweep" in tables.arms(results).note
    assert tables.swept(results).rows[1] == ("idea", "2.5500", "1.8500 *", "2.0500")


def test_a_value_with_fewer_seeds_or_a_diverged_one_is_not_the_best(tmp_path: Path) -> None:
    suite = swept_suite(
        tmp_path,
        {
            ("idea", "1e-2"): [2.5, 2.6], ("idea", "2e-2"): [1.0, None],
            ("idea", "4e-2"): [1.0, math.nan],
        },
    )  # fmt: skip
    found = collect(suite).arms["idea"]
    assert (found.value, found.seeds) == ("lr=1e-2", [0, 1])
    assert found.swept == {"lr=1e-2": 2.55, "lr=2e-2": 1.0, "lr=4e-2": math.inf}


def test_words_have_no_edge(tmp_path: Path) -> None:
    runs = []
    for value in ("cosine", "linear"):
        config = a_config(tmp_path / value, schedule={"lr_decay_style": value})
        write_run(config, {20: 2.0})
        runs.append(ArmRun("idea", f"lr_decay_style={value}", 0, config, None))
    suite = make_suite(tmp_path, runs, sweep=("schedule.lr_decay_style", ("cosine", "linear")))
    assert not collect(suite).arms["idea"].at_edge


# ------------------------------------------------------------------------------------- the law


def test_a_prediction_is_from_the_recorded_average(tmp_path: Path) -> None:
    law = {"law": {"parameters": [1e3, 1e6], "tokens_per_parameter": [0.01, 10.0]}}
    arms = {"plain": PLAIN | law, "idea": law}
    suite = a_suite(tmp_path, arms, {"plain": [2.0], "idea": [1.9]}, seeds=(0,))
    results = collect(suite)
    (pair,) = results.pairs
    plain, idea = (results.arms[arm].average_parameters for arm in arms)
    assert pair.in_range
    ours, theirs = (predict(LawConfig(), size, STEPS * BATCH) for size in (idea, plain))
    assert pair.predicted == ours - theirs < 0
    assert [row[0] for row in page._predictions(results).rows] == ["idea against plain"]
    assert "Predicted and measured" in page.page(suite, results)


def test_a_law_out_of_its_range_is_not_shown(tmp_path: Path) -> None:
    suite = a_suite(tmp_path, TWO, {"plain": [2.0], "idea": [1.9]}, seeds=(0,))
    results = collect(suite)
    assert not results.pairs[0].in_range
    assert "Predicted and measured" not in page.page(suite, results)


def test_a_law_is_fitted_to_the_arms(tmp_path: Path) -> None:
    law = LawConfig(e=1.0, a=50.0, alpha=0.4, b=40.0, beta=0.5)
    arms, losses = {}, {}
    for neurons in (16, 64, 128):
        for times in (1, 4):
            arm = f"{neurons} x {times}"
            total = times * STEPS * BATCH
            arms[arm] = {
                "prune": {"strategy": "none"},
                "model": {"ffn_hidden_size": neurons},
                "schedule": {"total_tokens": total},
            }
            losses[arm] = [predict(law, parameters(a_config(tmp_path), neurons), total)]
    arms["16 x 2"] = arms["16 x 1"] | {"schedule": {"total_tokens": 2 * STEPS * BATCH}}
    losses["16 x 2"] = [predict(law, parameters(a_config(tmp_path), 16), 2 * STEPS * BATCH)]
    text = printed(fit(collect(a_suite(tmp_path, arms, losses, seeds=(0,)))))
    assert text.startswith("law:\n")
    fitted = configs.from_dict(configs._read_yaml(text.partition("\n\n")[0], "text")).law
    assert fitted.name == "fitted to 7 runs"
    for neurons in (16, 128):
        size = parameters(a_config(tmp_path), neurons)
        assert predict(fitted, size, 3000) == pytest.approx(predict(law, size, 3000), abs=1e-6)
    assert text.count("warning") == 1
    assert "warning: parameters span a factor of 2." in text
    with pytest.raises(UserError, match="cannot be fitted"):
        fit(collect(a_suite(tmp_path / "two", TWO, {"plain": [2.0], "idea": [1.9]}, seeds=(0,))))


def printed(shown: object) -> str:
    console = Console(width=200, record=True)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


# ------------------------------------------------------------------------ what is written and shown


def test_the_file_of_numbers_is_plain_and_has_no_folders(tmp_path: Path) -> None:
    losses = {"plain": [2.0, 2.1], "idea": [1.9, math.nan]}
    suite = a_suite(tmp_path, TWO, losses, seeds=(0, 1))
    results = collect(suite)
    command = f"/opt/bin/megatron-idea compare {tmp_path}/laptop.yaml --out={tmp_path}/x ~/y/z"
    page.write(suite, results, command)
    text = (tmp_path / "comparison.json").read_text()
    found = json.loads(text)
    assert {key: found[key] for key in as_json(results)} == as_json(results)
    assert found["command"] == "megatron-idea compare laptop.yaml --out=x z"
    assert (found["suite"], found["device"], found["versions"]) == ("laptop.yaml", "CPU", VERSIONS)
    assert {"commit", "date"} <= found.keys()
    assert found["arms"]["idea"]["loss"] == {
        "mean": None, "low": None, "high": None, "values": [1.9, None],
    }  # fmt: skip
    assert found["runs"]["idea"][""]["0"]["loss"] == 1.9
    assert "evaluations" not in text
    assert str(tmp_path) not in text


def test_a_loss_that_is_not_finite_decides_nothing(tmp_path: Path) -> None:
    losses = {"plain": [2.0, 2.1], "idea": [1.9, math.nan]}
    suite = a_suite(tmp_path, TWO, losses, seeds=(0, 1))
    results = collect(suite)
    assert tables.answer(results.pairs[0]) == (
        "idea against plain, equal tokens, 1.10 x FLOPs", "cannot tell", "a loss is not finite",
    )  # fmt: skip
    assert "not finite" in page.page(suite, results)
    printed(tables.render(results))


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([2.976, 2.988, 3.003], "-0.0110 ± 0.0336 nats per token, 2 of 3 seeds lower"),
        ([3.1], "+0.1000 nats per token, 1 of 1 seed higher"),
        ([3.0, 3.0], "+0.0000 ± 0.0000 nats per token, 2 of 2 seeds equal"),
    ],
)
def test_an_answer_is_a_sentence(tmp_path: Path, losses: list[float], said: str) -> None:
    seeds = range(len(losses))
    suite = a_suite(tmp_path, TWO, {"plain": [3.0] * len(losses), "idea": losses}, seeds=seeds)
    assert tables.answer(collect(suite).pairs[0])[1:] == ("cannot tell", said)


class Texts(HTMLParser):
    """Collects the tags and texts of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


HOSTILE = "<script>alert('x')</script>|`\x1b[2J"


def test_the_page_has_every_arm_and_obeys_none(tmp_path: Path) -> None:
    losses = {"plain": [3.0, 3.1, 3.2], "idea": [2.9, 3.0, 3.1], HOSTILE: [3.2, 3.3, 3.41]}
    runs = []
    for seed in range(3):
        for number, arm in enumerate(losses):
            config = a_config(tmp_path / str(number) / f"seed{seed}", **TWO.get(arm, {}))
            write_run(config, {0: 5.5, 4: 3.0, 20: losses[arm][seed]})
            runs.append(ArmRun(arm, "", seed, config, None))
    pairs = [("idea", "plain"), (HOSTILE, "plain"), ("idea", HOSTILE)]
    suite = make_suite(tmp_path, runs, pairs)
    results = collect(suite)
    assert not suite.path.exists()  # gone while the runs took their hours
    content = page.write(suite, results, f"compare {suite.path} training.seed=1").read_text()
    found = Texts(content)
    assert found.tags.count("script") == 1  # the page's own
    assert "\x1b" not in content
    assert "http" not in content
    shown = HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    for arm in ("plain", "idea", shown):
        assert any(arm in text for text in found.texts)
    # A word beside each colour, in the answers and beside the intervals.
    assert found.texts.count("better") >= 3
    assert found.texts.count("worse") >= 2
    assert 'class="row better"' in content
    for heading in ("Loss over tokens", "Loss over training compute", "What is not shown", "Suite"):
        assert heading in found.texts
    assert any("# compare laptop.yaml training.seed=1\narms:" in text for text in found.texts)
    assert any("# <b>" in text for text in found.texts)
    assert "\x1b" not in printed(tables.render(results))


def test_markdown_is_a_table_whatever_the_arms_are_called(tmp_path: Path) -> None:
    losses = {"plain": [3.0, 3.1], "idea": [2.9, 3.0], "a|b <i>": [3.2, None]}
    arms = {"plain": PLAIN, "idea": {}, "a|b <i>": {}}
    suite = a_suite(tmp_path, arms, losses, seeds=(0, 1), pairs=[("a|b <i>", "idea")])
    blocks = tables.markdown(collect(suite)).split("\n\n")
    titles = [block for block in blocks if block.startswith("**")]
    assert titles == ["**Arms**", "**Further pairs**", "**Still to do**"]
    arms_table = blocks[1].splitlines()
    assert arms_table[0].startswith("| arm | seeds | loss | to plain | verdict |")
    assert arms_table[1].startswith("| --- | ---: |")
    assert arms_table[3].startswith("| idea | 2 | 2.9500 ± 0.6353 | -0.1000 ± 0.0000 | better |")
    assert arms_table[4].startswith(r"| a\|b &lt;i&gt; | 1 | 3.2000 | +0.2000 | cannot tell |")
    widths = {line.replace(r"\|", "").count("|") for line in arms_table}
    assert len(widths) == 1


def test_curves_are_means_where_every_seed_was_evaluated(tmp_path: Path) -> None:
    runs = []
    for seed, losses in enumerate(({0: 5.0, 4: 3.0, 20: 2.0}, {0: 5.5, 6: 2.8, 20: 2.5})):
        config = a_config(tmp_path / f"seed{seed}")
        write_run(config, losses)
        runs.append(ArmRun("idea", "", seed, config, None))
    curve = curves(collect(make_suite(tmp_path, runs)))["idea"]
    assert curve.tokens == [0, 20 * BATCH]
    assert (curve.mean, curve.low, curve.high) == ([5.25, 2.25], [5.0, 2.0], [5.5, 2.5])
