"""A family from one trajectory: branches begin where the trunk is, and end as small as asked."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jobs import train_on

from megatron_idea.config import Config, load, replace, to_yaml
from megatron_idea.records.read import read_metrics
from megatron_idea.schedule import learning_rate
from megatron_idea.testing import Workers

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def trunk(tiny: Config, tmp_path: Path) -> Path:
    """The file of a run of 24 steps that shrinks in steps 9 to 20 at a constant learning rate."""
    config = replace(
        tiny,
        run_dir=str(tmp_path / "trunk"),
        schedule={
            "lr_decay_style": "WSD", "lr_wsd_decay_fraction": 1 / 8, "lr_warmup_fraction": 1 / 12,
            "enlarged_fraction": 0.25, "prune_fraction": 0.5, "recover_fraction": 0.25,
            "removal": "linear",
        },
        checkpoint={"every_tokens": 256, "keep_every_tokens": 256, "keep_last": 1},
    )  # fmt: skip
    path = tmp_path / "trunk.yaml"
    path.write_text(to_yaml(config))
    return path


def family(config: Path, sizes: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / "family.py", config, "--sizes", sizes, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_branches_have_their_size_and_the_learning_rate_has_no_step(
    trunk: Path, workers: Workers
) -> None:
    whole = load(trunk)
    workers.run(train_on, 1, whole)
    model = whole.model
    sizes = ("25_000", "23_000")
    done = family(trunk, ",".join(sizes), "--cooldown", "0.3")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [*sizes]
    for size, *overrides in lines:
        config = load(trunk, overrides)
        workers.run(train_on, 1, config)
        records = read_metrics(Path(config.run_dir))
        first, last = records[0], records[-1]
        begin = first.tokens - whole.batch_tokens
        assert f"@{begin}" in config.start_from and begin % 256 == 0
        # The trunk was larger there; the branch is at its size after the first step, to the end.
        before = {r.tokens: r for r in read_metrics(Path(whole.run_dir))}[begin]
        parameters = [r.shape(model).parameters(model).total for r in (before, last)]
        assert parameters[1] <= int(size) < parameters[0]
        assert first.live == last.live == last.stored
        assert int(size) - parameters[1] < 4 * 2 * 3 * model.hidden_size, "a block of neurons"
        # One clock: as if the trunk had gone on, until the branch anneals.
        assert abs(first.lr - whole.schedule.lr) < 0.35 * whole.schedule.lr
        assert learning_rate(config.schedule, begin) == pytest.approx(whole.schedule.lr)
        assert last.lr == pytest.approx(whole.schedule.min_lr)
        assert {r.phase for r in records} == {"recover"}
        assert last.tokens == pytest.approx(1.3 * begin, abs=whole.batch_tokens)


@pytest.mark.parametrize(
    ("sizes", "arguments", "words"),
    [
        ("1e9", [], "must be a number of parameters between"),
        ("small", [], "a size of the family is small"),
        ("25_000", ["--cooldown", "0"], "--cooldown is 0.0; it must be above 0"),
        # Scores are gathered until the end of step 12, which a checkpoint follows.
        ("27_000", ["schedule.prune_warmup_fraction=0.5"], "must be after removal begins"),
        ("25_000", ["schedule.lr_decay_style=cosine"], "lr_decay_style=WSD"),
        ("25_000", ["checkpoint.keep_every_tokens=0"], "checkpoints that the trunk keeps"),
        (
            "25_000",
            ["schedule.lr_wsd_decay_fraction=0.7"],
            "before the trunk's learning rate falls",
        ),
    ],
)
def test_what_no_family_can_come_of_is_refused(
    trunk: Path, sizes: str, arguments: list[str], words: str
) -> None:
    done = family(trunk, sizes, *arguments)
    assert done.returncode == 1 and words in done.stderr, done.stderr


def test_the_script_says_what_it_would_start() -> None:
    environment = {**os.environ, "MEGATRON_IDEA_VENV": sys.prefix}
    done = subprocess.run(
        ["bash", EXAMPLES / "family.sh", "--dry-run", "run_dir=runs/none at all"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    trunk, *branches = done.stdout.splitlines()
    assert shlex.split(trunk)[-1] == "run_dir=runs/none at all"
    runs = ("runs/none at all-2.4e9", "runs/none at all-2.0e9", "runs/none at all-1.6e9")
    assert [shlex.split(line)[4] for line in branches] == [f"run_dir={run}" for run in runs]
    assert (
        yaml.safe_load((EXAMPLES / "configs/family.yaml").read_text())["run_dir"] == "runs/family"
    )
