"""Suites: how arms become runs, and what is refused before any of them starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megatron_idea import cli
from megatron_idea import config as configuration
from megatron_idea.compare.forecast import costs, render
from megatron_idea.compare.suite import ArmRun, Suite, check_ready, end_of, flops, read_suite
from megatron_idea.config import Config, ConfigError
from megatron_idea.engine.gpus import gpu_named
from megatron_idea.planning.estimate import forecast
from megatron_idea.records.settings import differences
from megatron_idea.records.terminal import Console
from megatron_idea.shape import Shape

BASE: dict[str, Any] = {
    "model": {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
        "num_query_groups": 2, "kv_channels": 8, "vocab_size": 264,
    },
    "training": {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4},
    "schedule": {"total_tokens": 240 * 128, "prune_warmup_fraction": 0.2},
    "prune": {"target": {"ffn_hidden_size": 24}, "alignment": 4},
}  # fmt: skip
BATCH = 128
SMALL = {"prune": {"strategy": "none"}, "model": {"ffn_hidden_size": 24}}
ARMS: dict[str, Any] = {"scratch": SMALL, "idea": {}}


def written(tmp_path: Path, **keys: Any) -> Path:
    """A suite's file: two arms, two seeds, but for ``keys``; a key that is None is left out."""
    suite = {"out": str(tmp_path / "out"), "base": BASE, "seeds": [0, 1], "reference": "scratch"}
    suite = suite | {"arms": ARMS} | keys
    path = tmp_path / "suite.yaml"
    kept = {key: value for key, value in suite.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
    return path


def suite_of(tmp_path: Path, **keys: Any) -> Suite:
    return read_suite(written(tmp_path, **keys))


def run_of(suite: Suite, key: str) -> ArmRun:
    (found,) = (run for run in suite.runs if run.key == key)
    return found


def test_runs_come_seed_after_seed_and_sources_before_their_branches(tmp_path: Path) -> None:
    arms = {
        "late": {"from": "branch@prune"},
        "branch": {"from": "idea@enlarged", "schedule": {"removal": "one_shot"}},
        "scratch": SMALL,
        "idea": {},
    }
    suite = suite_of(tmp_path, arms=arms)
    assert suite.arms == ("late", "branch", "scratch", "idea")
    order = [
        f"{arm}/seed{seed}" for seed in (0, 1) for arm in ("scratch", "idea", "branch", "late")
    ]
    assert [run.key for run in suite.runs] == order
    assert suite.seeds == (0, 1) and suite.sweep is None
    for run in suite.runs:
        assert run.config.training.seed == run.seed
        assert run.run_dir == tmp_path / "out" / run.arm / f"seed{run.seed}"
        assert run.file == run.run_dir.parent / f"seed{run.seed}.yaml"
        assert run.log == run.run_dir.parent / f"seed{run.seed}.log"
        assert configuration.from_dict(yaml.safe_load(configuration.to_yaml(run.config)))


def test_a_branch_has_its_sources_sections_under_its_own(tmp_path: Path) -> None:
    arms = {
        "scratch": SMALL,
        "idea": {"schedule": {"lr": 5e-3, "removal": "linear"}, "prune": {"ema": 0.25}},
        "branch": {"from": "idea@enlarged", "schedule": {"removal": "one_shot"}},
    }
    suite = suite_of(tmp_path, arms=arms)
    source, branch = run_of(suite, "idea/seed1"), run_of(suite, "branch/seed1")
    assert branch.source is source
    assert branch.config.start_from == f"{source.run_dir}@enlarged"
    assert (branch.config.schedule.lr, branch.config.prune.ema) == (5e-3, 0.25)
    assert branch.config.removal == "one_shot" and source.config.removal == "linear"
    assert source.config.checkpoint.keep_phase_ends
    assert not branch.config.checkpoint.keep_phase_ends  # nobody starts from it
    assert branch.begins == 120 * BATCH and source.begins == 0


def test_a_source_keeps_the_checkpoints_that_others_start_from(tmp_path: Path) -> None:
    arms = {
        "scratch": SMALL,
        "idea": {"checkpoint": {"every_tokens": 9000}},
        "early": {"from": "idea@6e3"},
        "later": {"from": "idea@15_000", "schedule": {"removal": "linear"}},
    }
    suite = suite_of(tmp_path, arms=arms)
    keep = run_of(suite, "idea/seed0").config.checkpoint
    assert (keep.every_tokens, keep.keep_every_tokens) == (3000, 3000)
    assert run_of(suite, "early/seed0").begins == 47 * BATCH  # the first step at or after 6,000
    assert run_of(suite, "later/seed0").config.start_from.endswith("idea/seed0@15_000")


def test_a_sweep_runs_every_arm_with_each_value_as_it_is_written(tmp_path: Path) -> None:
    path = written(tmp_path, arms=ARMS | {"branch": {"from": "idea@enlarged", "guard": {}}})
    path.write_text(path.read_text() + "sweep: {schedule.lr: [1e-3, 0.0020]}\n")
    suite = read_suite(path, seeds=[7])
    assert suite.sweep == ("schedule.lr", ("1e-3", "0.0020"))
    assert [run.key for run in suite.runs] == [
        f"{arm}/{value}/seed7" for value in ("lr=1e-3", "lr=0.0020") for arm in ARMS | {"branch": 0}
    ]
    assert {run.value: run.config.schedule.lr for run in suite.runs} == {
        "lr=1e-3": 1e-3, "lr=0.0020": 2e-3,
    }  # fmt: skip
    branch = run_of(suite, "branch/lr=0.0020/seed7")
    assert branch.source is run_of(suite, "idea/lr=0.0020/seed7")
    assert branch.config.start_from == f"{tmp_path}/out/idea/lr=0.0020/seed7@enlarged"


def total_flops(config: Config) -> int:
    cost = forecast(configuration.replace(config, schedule={"total_tokens": end_of(config)})).cost
    assert cost.teacher is not None
    return cost.this_run + cost.teacher


@pytest.mark.parametrize(
    ("like", "longer"),
    [
        ({}, {"equal": "flops@idea", **SMALL}),
        ({"distill": {"teacher": "self"}}, {"equal": "flops@idea", **SMALL}),
        (SMALL, {"equal": "flops@idea"}),  # it prunes: compactions move with its tokens
        ({"schedule": {"total_tokens": 240 * 128 + 1}}, {"equal": "flops@idea", **SMALL}),
    ],
)
def test_equal_flops_are_those_of_the_arm_within_a_batch(
    tmp_path: Path, like: dict[str, Any], longer: dict[str, Any]
) -> None:
    suite = suite_of(tmp_path, arms={"scratch": SMALL, "longer": longer, "idea": like})
    other, made = (run_of(suite, f"{arm}/seed0").config for arm in ("idea", "longer"))
    assert made.schedule.total_tokens % BATCH == 0
    assert made.schedule.total_tokens != other.schedule.total_tokens
    per_batch = total_flops(made) / (made.schedule.total_tokens / BATCH)
    assert abs(total_flops(made) - total_flops(other)) <= per_batch


def test_equal_flops_alone_means_the_reference_and_branches_inherit_the_tokens(
    tmp_path: Path,
) -> None:
    arms = {
        "scratch": SMALL,
        "idea": {"equal": "flops"},
        "branch": {"from": "idea@enlarged", "schedule": {"removal": "linear"}},
    }
    suite = suite_of(tmp_path, arms=arms)
    tokens = {run.arm: run.config.schedule.total_tokens for run in suite.runs}
    assert tokens["idea"] < tokens["scratch"] and tokens["branch"] == tokens["idea"]
    assert suite.pairs == (("idea", "scratch"), ("branch", "scratch"))


def test_an_arm_learns_from_the_model_that_another_one_ends_with(tmp_path: Path) -> None:
    arms = {
        "longer": {"equal": "flops@taught", **SMALL},
        "late": {"from": "taught@enlarged", "schedule": {"removal": "linear"}},
        "taught": {"teacher": "wide", "distill": {"alpha": 0.5, "alpha_end": 0.5}},
        "own": {"from": "taught@enlarged", "distill": {"teacher": "self", "average_last": 1}},
        "scratch": SMALL,
        "wide": {"prune": {"strategy": "none"}},
    }
    suite = suite_of(tmp_path, arms=arms)
    wide, taught, late = (run_of(suite, f"{arm}/seed1") for arm in ("wide", "taught", "late"))
    assert taught.teacher is late.teacher is wide and taught.needs == [wide]
    assert late.needs == [taught, wide]
    own = run_of(suite, "own/seed1")
    assert own.needs == [taught] and own.config.distill.teacher == "self"
    for run in (taught, late):
        assert run.config.distill.teacher == str(wide.run_dir)
        assert (run.config.distill.alpha, run.config.distill.alpha_end) == (0.5, 0.5)
    order = [run.arm for run in suite.runs if run.seed == 0]
    assert order.index("wide") < order.index("taught") < order.index("longer")
    # Its FLOPs are known before the teacher is there: a forward pass of its model for each token.
    end, plain = end_of(taught.config), suite_of(tmp_path, arms=ARMS)
    passes = Shape.full(wide.config.model).flops_per_token(wide.config.model, 32) // 3 * end
    assert flops(taught, 0, end) == flops(run_of(plain, "idea/seed1"), 0, end) + passes
    longer = run_of(suite, "longer/seed1")
    within = flops(longer, 0, BATCH)
    assert within and abs(flops(longer, 0, end_of(longer.config)) - flops(taught, 0, end)) <= within


def test_pairs_are_against_the_reference_then_flops_then_the_files_none_twice(
    tmp_path: Path,
) -> None:
    arms = ARMS | {"naive": {"schedule": {"kind": "restarted"}}, "longer": {"equal": "flops@idea"}}
    arms["longer"] |= SMALL
    pairs = [["idea", "naive"], ["naive", "idea"], ["scratch", "idea"]]
    assert suite_of(tmp_path, arms=arms, pairs=pairs).pairs == (
        ("idea", "scratch"), ("naive", "scratch"), ("longer", "scratch"), ("idea", "longer"),
        ("idea", "naive"),
    )  # fmt: skip


def test_overrides_lie_over_the_base_and_under_the_arms(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    under = {
        "run_dir": "elsewhere",
        "schedule": {"lr": 1e-2, "min_lr": 1e-4},
        "prune": {"ema": 0.1},
    }
    (tmp_path / "configs" / "x.yaml").write_text(yaml.safe_dump(under))
    arms = {"scratch": SMALL, "idea": {"prune": {"ema": 0.9}}}
    path = written(tmp_path, config="configs/x.yaml", arms=arms)
    suite = read_suite(path, ["prune.ema=0.5", "schedule.lr=4e-3"], out=tmp_path / "other")
    scratch, idea = run_of(suite, "scratch/seed0").config, run_of(suite, "idea/seed0").config
    assert (scratch.prune.ema, idea.prune.ema) == (0.5, 0.9)
    assert scratch.schedule.lr == 4e-3 and scratch.schedule.min_lr == 1e-4
    assert scratch.schedule.total_tokens == 240 * BATCH  # the suite's base is over the file
    assert idea.run_dir == str(tmp_path / "other" / "idea" / "seed0")


def test_a_branchs_flops_leave_out_what_its_source_did(tmp_path: Path) -> None:
    arms = ARMS | {"branch": {"from": "idea@enlarged", "schedule": {"removal": "one_shot"}}}
    suite = suite_of(tmp_path, arms=arms)
    idea, branch = run_of(suite, "idea/seed0"), run_of(suite, "branch/seed0")
    end = end_of(idea.config)
    own = flops(branch, branch.begins, end)
    shared = flops(idea, 0, branch.begins)
    assert own is not None and shared is not None
    assert flops(branch, 0, end) == shared + own
    assert flops(idea, 0, end) == total_flops(idea.config)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such key": ({"refrence": "idea"}, "unknown key 'refrence'; did you mean 'reference'"),
    "no such key in base": ({"base": {"modle": {}}}, "'base.modle'; did you mean 'base.model'"),
    "no such section": ({"arms": ARMS | {"x": {"prun": {}}}}, "'arms.x.prun'; did you mean"),
    "no such word": ({"arms": ARMS | {"x": {"form": "idea@prune"}}}, "did you mean 'arms.x.from'"),
    "no such key in arm": (
        {"arms": ARMS | {"x": {"prune": {"emma": 1}}}},
        "'arms.x.prune.emma'; did you mean 'arms.x.prune.ema'",
    ),
    "no arms": ({"arms": {}}, "needs arms"),
    "no out": ({"out": None}, "--out"),
    "no reference": ({"reference": None}, "reference is ''; arms: scratch, idea"),
    "unknown reference": ({"reference": "scrach"}, "did you mean 'scratch'?"),
    "unknown source": ({"arms": ARMS | {"x": {"from": "idee@prune"}}}, "did you mean 'idea'?"),
    "unknown equal": ({"arms": ARMS | {"x": {"equal": "flops@ida"}}}, "did you mean 'idea'?"),
    "unknown in pair": ({"pairs": [["idea", "naive"]]}, "pairs is 'naive'; did you mean"),
    "pair of one": ({"pairs": [["idea", "idea"]]}, "two different arms"),
    "pair of three": ({"pairs": [["idea", "scratch", "idea"]]}, "two different arms"),
    "from without place": ({"arms": ARMS | {"x": {"from": "idea"}}}, "ARM@PHASE or ARM@TOKENS"),
    "from nowhere": ({"arms": ARMS | {"x": {"from": "idea@pruned"}}}, "enlarged, prune, recover"),
    "from no token": ({"arms": ARMS | {"x": {"from": "idea@0"}}}, "ARM@PHASE or ARM@TOKENS"),
    "from past the end": (
        {"arms": ARMS | {"x": {"from": "idea@recover"}}},
        "something left to train",
    ),
    "from an empty phase": (
        {
            "arms": ARMS | {"x": {"from": "idea@enlarged", "guard": {}}},
            "base": BASE | {"schedule": {
                "total_tokens": 30720, "enlarged_fraction": 0.0, "prune_fraction": 0.65,
            }},
        },
        "idea@enlarged is after 0 tokens",
    ),
    "circle": (
        {"arms": ARMS | {"x": {"from": "y@prune"}, "y": {"from": "x@prune"}}}, "circle.*: x, y"
    ),
    "circle of both words": (
        {"arms": ARMS | {"x": {"equal": "flops@y"}, "y": {"from": "x@prune"}}}, "circle.*: x, y"
    ),
    "circle with a teacher": (
        {"arms": ARMS | {"x": {"teacher": "y"}, "y": {"from": "x@prune"}}}, "circle.*: x, y"
    ),
    "unknown teacher": ({"arms": ARMS | {"x": {"teacher": "ida"}}}, "did you mean 'idea'?"),
    "from itself": ({"arms": ARMS | {"x": {"from": "x@prune"}}}, "circle.*: x"),
    "equal to itself": ({"arms": ARMS | {"x": {"equal": "flops@x"}}}, "names the arm itself"),
    "reference equal to itself": ({"arms": ARMS | {"scratch": {"equal": "flops"}}}, "arm itself"),
    "chain of equals": (
        {"arms": ARMS | {"x": {"equal": "flops@idea"}, "y": {"equal": "flops@x"}}},
        "equal: flops@idea",
    ),
    "equal what": ({"arms": ARMS | {"x": {"equal": "tokens"}}}, "must be flops"),
    "from where only saving every step would lead": (
        {
            "base": BASE | {"checkpoint": {"every_tokens": 9000}},
            "arms": ARMS | {"x": {"from": "idea@6001"}},
        },
        "arm idea: others begin after 6,001 .*every_tokens is 9,000: .* no more than 1, so that",
    ),
    "two teachers": (
        {"arms": ARMS | {"x": {"teacher": "idea", "distill": {"teacher": "self"}}}},
        "arms.x sets distill.teacher.*; its teacher is idea",
    ),
    "from and equal": (
        {"arms": ARMS | {"x": {"from": "idea@prune", "equal": "flops"}}}, "leave one of the two out"
    ),
    "arm with run_dir": ({"arms": ARMS | {"x": {"run_dir": "r"}}}, "arms.x sets run_dir.*out: "),
    "arm with start_from": ({"arms": ARMS | {"x": {"start_from": "r"}}}, "sets start_from.*from: "),
    "arm with seed": (
        {"arms": ARMS | {"x": {"training": {"seed": 3}}}}, "sets training.seed.*seeds: "
    ),
    "base with seed": ({"base": {"training": {"seed": 3}}}, "base sets training.seed"),
    "illegal arm": (
        {"arms": ARMS | {"x": {"prune": {"target": {"ffn_hidden_size": 30}}}}},
        r"arm x, seed 0: prune.target.ffn_hidden_size \(30\) must be a multiple",
    ),
    "illegal value in arm": ({"arms": ARMS | {"x": {"prune": {"ema": 2}}}}, "x: prune.ema is 2"),
    "layout": (
        {"arms": ARMS | {"x": {"parallel": {"tensor_model_parallel_size": 3}}}},
        "arm x, seed 0: .*TP",
    ),
    "branch of another model": (
        {"arms": ARMS | {"x": {"from": "idea@enlarged", "model": {"num_layers": 4}}}},
        "arm x, seed 0: .*cannot change.*model.num_layers",
    ),
    "branch to more than is left": (
        {"arms": ARMS | {"x": {
            "from": "idea@prune", "prune": {"target": {"ffn_hidden_size": 32}},
        }}},
        "arm x, seed 0: .*from: idea@prune has 24 left of model.ffn_hidden_size",
    ),
    "branch of a branch to more than is left": (
        {"arms": ARMS | {
            "y": {"from": "idea@prune", "prune": {"strategy": "none"}},
            "x": {"from": "y@25600", "prune": {
                "strategy": "idea", "target": {"ffn_hidden_size": 32},
            }},
        }},
        "arm x, seed 0: .*from: y@25600 has 24 left of model.ffn_hidden_size",
    ),
    "branch of a branch from before it": (
        {"arms": ARMS | {"y": {"from": "idea@prune"}, "x": {"from": "y@enlarged"}}},
        "arm x, seed 0: from: y@enlarged is after 15,360 tokens, and y itself begins at idea",
    ),
    "branch that would have to teach itself from before": (
        {"arms": ARMS | {"x": {"from": "idea@enlarged", "distill": {"teacher": "self"}}}},
        "arm x, seed 0: distill.teacher=self .* idea@enlarged is from 15,360, of a run that has",
    ),
    "branch after the model that is to teach": (
        {"arms": ARMS | {"x": {
            "from": "idea@prune", "distill": {"teacher": "self", "average_last": 1},
        }}},
        "arm x, seed 0: distill.teacher=self .* with distill.average_last=1",
    ),
    "arm is a path": ({"arms": ARMS | {"a/b": {}}}, "name of an arm is 'a/b'"),
    "arm is hidden": ({"arms": ARMS | {".x": {}}}, "name of an arm is '.x'"),
    "arm with an at": ({"arms": ARMS | {"a@b": {}}}, "name of an arm is 'a@b'"),
    "arm is a text": ({"arms": ARMS | {"x": "idea"}}, "arms.x must be sections"),
    "no seeds": ({"seeds": []}, "at least one whole number"),
    "a seed twice": ({"seeds": [1, 1]}, "none twice"),
    "a seed below 0": ({"seeds": [-1]}, "none below 0"),
    "a seed of text": ({"seeds": ["one"]}, r"seeds\[0\] is 'one'; it must be a whole number"),
    "sweep of two keys": ({"sweep": {"schedule.lr": [1, 2], "prune.ema": [1]}}, "one key"),
    "sweep of nothing known": ({"sweep": {"schedule.lrr": [1, 2]}}, "did you mean.*schedule.lr'"),
    "sweep of one value": ({"sweep": {"prune.ema": [0.5]}}, "at least two values"),
    "a value twice": ({"sweep": {"prune.ema": [0.5, 0.50]}}, "at least two values"),
    "a value in two spellings": (
        {"sweep": {"schedule.lr": ["1e-3", "0.001"]}}, "one value twice: lr=1e-3 and lr=0.001"
    ),
    "an illegal value": ({"sweep": {"prune.ema": [0.5, 2]}}, "arm scratch, ema=2: prune.ema is 2"),
    "a value with a slash": ({"sweep": {"data.tokenizer": ["a/b", "c"]}}, "value of sweep.data"),
    "sweep of no list": ({"sweep": {"prune.mask_interval_steps": 25}}, "must be a list"),
    "sweep of the seed": ({"sweep": {"training.seed": [1, 2]}}, "sweep sets training.seed"),
    "arm sets what is swept": (
        {"sweep": {"prune.ema": [0.1, 0.2]}, "arms": ARMS | {"x": {"prune": {"ema": 0.3}}}},
        "arms.x sets prune.ema.*sweep",
    ),
    "arm sets what is swept to null": (
        {
            "sweep": {"schedule.removal": ["cubic", "linear"]},
            "arms": ARMS | {"x": {"schedule": {"removal": None}}},
        },
        "arms.x sets schedule.removal.*sweep",
    ),
    "config is missing": ({"config": "nowhere.yaml"}, "no configuration file at"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compared_is_refused_with_words(tmp_path: Path, name: str) -> None:
    keys, says = BAD[name]
    path = written(tmp_path, **keys)
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        read_suite(path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.seed=3", "sets training.seed"),
        ("run_dir=x", "sets run_dir"),
        ("schedule.lrr=1", "did you mean 'schedule.lr'"),
        ("schedule.lr", "not of the form"),
        ("prune.ema=0.3", "prune.ema, which it cannot; every value of sweep"),
    ],
)
def test_an_override_is_refused_like_a_key(tmp_path: Path, override: str, says: str) -> None:
    path = written(tmp_path, sweep={"prune.ema": [0.1, 0.2]})
    with pytest.raises(ConfigError, match=says):
        read_suite(path, [override])


@pytest.fixture
def ready(tmp_path: Path, dataset: Path) -> Path:
    data = {
        "train": [{"prefix": f"{dataset}_train"}],
        "validation": [{"prefix": f"{dataset}_heldout"}],
    }
    arms = ARMS | {"branch": {"from": "idea@enlarged", "schedule": {"removal": "one_shot"}}}
    return written(tmp_path, base=BASE | {"data": data}, arms=arms)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train=[{prefix: d/web_train}]", "no d/web_train.idx.*tokenize TEXT.* --out d/web "),
        ("data.validation=[]", "data.validation is empty"),
    ],
)
def test_data_that_is_not_there_is_said_before_anything_runs(
    ready: Path, override: str, says: str
) -> None:
    check_ready(read_suite(ready))
    with pytest.raises(ConfigError, match=says):
        check_ready(read_suite(ready, [override]))


def test_a_layout_that_the_processes_do_not_fit_is_refused(ready: Path) -> None:
    check_ready(read_suite(ready), processes=2)
    with pytest.raises(ConfigError, match=r"arm scratch, seed 0: .*micro_batch_size x DP"):
        check_ready(read_suite(ready), processes=3)


def test_a_folder_of_other_settings_is_refused_by_key(ready: Path, tmp_path: Path) -> None:
    suite = read_suite(ready)
    for run in suite.runs:
        run.run_dir.mkdir(parents=True)
        (run.run_dir / "config.yaml").write_text(configuration.to_yaml(run.config))
    check_ready(suite)
    free = ("logging.progress=false", "parallel.bucket_size=8", "checkpoint.keep_last=1")
    free += ("training.micro_batch_size=1", f"data.cache_dir={tmp_path}")
    check_ready(read_suite(ready, free))
    with pytest.raises(
        ConfigError, match=r"scratch/seed0 was begun with other settings: "
    ) as error:
        check_ready(read_suite(ready, ["schedule.lr=0.5", "prune.ema=0.25"]))
    assert "prune.ema (was 0.5, is 0.25), schedule.lr (was 0.001, is 0.5)" in str(error.value)
    assert "delete that folder, or give another --out" in str(error.value)
    # Spelled otherwise it is the same data; the layout after pruning is a layout, too.
    given = yaml.safe_load(ready.read_text())
    (data,) = given["base"]["data"]["train"]
    data |= {"prefix": os.path.relpath(data["prefix"]), "weight": 2.0}
    given["arms"]["idea"] = {"parallel_after_prune": {"bucket_size": 8}}
    ready.write_text(yaml.safe_dump(given, sort_keys=False))
    check_ready(read_suite(ready))
    # All of it moved elsewhere is the same; a branch that began elsewhere is not.
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    check_ready(read_suite(ready, out=moved))
    branch = run_of(suite, "branch/seed1").config
    other = configuration.replace(branch, start_from=f"{tmp_path}/out/idea/seed1@prune")
    (moved / "branch" / "seed1" / "config.yaml").write_text(configuration.to_yaml(other))
    with pytest.raises(ConfigError, match=r"branch, seed 1: .*start_from \(was .*idea/seed1@prune"):
        check_ready(read_suite(ready, out=moved))


def test_a_run_that_came_of_what_was_made_anew_since_is_refused(ready: Path) -> None:
    suite = read_suite(ready)
    idea, branch = run_of(suite, "idea/seed0"), run_of(suite, "branch/seed0")

    def began(run: ArmRun, time: float) -> None:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        events = [{"kind": "started", "time": time}, {"kind": "finished", "time": time + 9}]
        text = "".join(json.dumps(event) + "\n" for event in events)
        (run.run_dir / "events.jsonl").write_text(text)

    began(idea, 10.0)
    began(branch, 20.0)
    check_ready(suite)
    began(idea, 30.0)
    with pytest.raises(
        ConfigError, match=r"branch, seed 0: .*another idea, seed 0 than the one that is there"
    ):
        check_ready(suite)
    shutil.rmtree(idea.run_dir)
    with pytest.raises(
        ConfigError, match=r"than the one that is still to be made; delete that folder"
    ):
        check_ready(suite)
    shutil.rmtree(branch.run_dir)
    check_ready(suite)


def test_a_branch_does_not_begin_at_what_its_source_has_not_kept(ready: Path) -> None:
    suite = read_suite(ready)
    idea, branch = run_of(suite, "idea/seed0"), run_of(suite, "branch/seed0")

    def has(run: ArmRun, *tokens: int) -> None:
        for each in tokens:
            folder = run.run_dir / "checkpoints" / f"step_{each // BATCH:08d}"
            folder.mkdir(parents=True)
            (folder / "state.json").write_text(json.dumps({"consumed_tokens": each}))

    has(idea, branch.begins - BATCH)
    check_ready(suite)  # it will come there
    has(idea, branch.begins + BATCH)
    with pytest.raises(
        ConfigError,
        match=r"branch, seed 0: it begins after 15,360 tokens of idea, seed 0, which is past them "
        rf"and has kept checkpoints at 15,232, 15,488 alone: delete {idea.run_dir}",
    ):
        check_ready(suite)
    has(branch, branch.begins)
    check_ready(suite)  # it has its own
    shutil.rmtree(branch.run_dir)
    has(idea, branch.begins)
    check_ready(suite)


def test_a_run_is_the_same_from_wherever_it_is_called(tmp_path: Path) -> None:
    """As the run itself sees it, and as the comparison does."""
    there, here = (
        configuration.from_dict({
            "run_dir": f"{out}/x/seed0", "start_from": f"{out}/idea/seed0@prune",
            "distill": {"teacher": f"{out}/t/seed0"},
        })
        for out in ("out", os.path.abspath("out"))
    )  # fmt: skip
    assert [key for key, *_ in differences(there, here)] == ["run_dir"]
    moved = configuration.replace(there, run_dir="elsewhere")  # alone
    assert [key for key, *_ in differences(there, moved)] == ["run_dir"]
    other = configuration.replace(here, distill={"teacher": "self"})
    assert [key for key, *_ in differences(there, other)] == ["distill.teacher", "run_dir"]


SUITES = sorted((Path(__file__).parents[1] / "examples/suites").glob("*.yaml"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_that_ships_can_be_run(path: Path) -> None:
    assert read_suite(path, seeds=[0]).runs


def test_a_sum_with_something_unknown_in_it_is_not_known(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, arms=ARMS | {"taught": {"distill": {"teacher": "runs/none"}}})
    gpu = gpu_named("h100")
    arms = costs(suite, gpu, 0.5)
    assert [one.flops is None for one in arms] == [False, False, True]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(suite, arms, gpu, 0.5))
    for name in ("taught", "all"):
        (row,) = (line for line in capture.get().splitlines() if line.split()[:1] == [name])
        assert row.split()[-4:] == ["not", "known", "not", "known"]


def test_a_dry_run_adds_up_what_every_arm_costs(tmp_path: Path) -> None:
    arms = ARMS | {"branch": {"from": "idea@enlarged", "schedule": {"removal": "one_shot"}}}
    path = written(tmp_path, arms=arms, sweep={"prune.ema": [0.1, 0.2]})
    suite, gpu = read_suite(path), gpu_named("h100")
    scratch, idea, branch = costs(suite, gpu, 0.5)
    assert (scratch.runs, idea.starts_from, branch.starts_from) == (4, "", "idea@enlarged")
    one = run_of(suite, "idea/ema=0.1/seed0")
    assert idea.flops == 4 * total_flops(one.config)
    assert idea.gpu_hours == idea.flops / (gpu.peak_flops * 0.5) / 3600
    assert branch.tokens == 4 * 120 * BATCH and idea.tokens == 4 * 240 * BATCH
    (full,), (target,) = idea.parameters, idea.parameters_at_end
    assert branch.parameters == (full,) and scratch.parameters == (target,) and full > target
    called = CliRunner().invoke(
        cli.app, ["compare", str(path), "--dry-run", "--json", "--mfu", "0.5"]
    )
    assert called.exit_code == 0, called.output
    told = {one["arm"]: one for one in json.loads(called.stdout)["arms"]}
    assert told["idea"]["gpu_hours"] == idea.gpu_hours
    shown = CliRunner().invoke(cli.app, ["compare", str(path), "--dry-run", "--seeds", "5"])
    assert shown.exit_code == 0 and "seeds 5; prune.ema 0.1, 0.2. FLOPs" in shown.stdout
    assert "idea@enlarged" in shown.stdout and "GPU-hours" in shown.stdout
    assert not (tmp_path / "out").exists()


def test_a_suite_is_read_without_torch(tmp_path: Path) -> None:
    path = written(tmp_path, arms=ARMS | {"branch": {"from": "idea@enlarged"}})
    code = (
        "import sys; import megatron_idea.compare.jobs; "
        "from megatron_idea.compare.suite import read_suite; "
        f"read_suite({str(path)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
