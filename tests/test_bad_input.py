"""What a user gets wrong is one line and exit status 2, whichever part finds it.

Checks of single options are in ``test_config.py`` and ``test_cli.py``, of datasets and documents in
``test_data_*.py``. Here the whole command runs, as far as the mistake lets it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_idea import cli
from megatron_idea.config import Config, replace, to_yaml
from megatron_idea.testing import Workers

runner = CliRunner()
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SHORT = {
    "total_tokens": 8 * 128, "enlarged_fraction": 0.25, "prune_fraction": 0.5,
    "recover_fraction": 0.25, "prune_warmup_fraction": 0.25,
}  # fmt: skip


def command(rendezvous: str, arguments: list[str]) -> tuple[int, str, str]:
    """Run the command in a worker, where megatron-core is loaded, as if no launcher were there."""
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    result = CliRunner().invoke(cli.app, arguments)
    return result.exit_code, result.stdout, result.stderr


def refused(given: tuple[int, str, str], *parts: str) -> None:
    code, out, err = given
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    for part in parts:
        assert part in line


@pytest.fixture
def config(tiny_halved: Config, tmp_path: Path) -> Path:
    """The tiny run as a file, with 8 steps."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(replace(tiny_halved, schedule=SHORT)))
    return path


@pytest.fixture
def train(workers: Workers, config: Path) -> Any:
    def run(*overrides: Any) -> tuple[int, str, str]:
        arguments = ["train", str(config), *map(str, overrides)]
        (result,) = workers.run(command, 1, arguments)
        return result

    return run


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage: its prefix."""
    folder = tmp_path / "copy"
    shutil.copytree(dataset.parent, folder)
    return folder / f"{dataset.name}_train"


def data(prefix: Path) -> str:
    return f"data.train=[{{prefix: {prefix}}}]"


def test_a_configuration_that_fits_nothing_names_what_fits(train: Any) -> None:
    refused(train("model.ffn_hiden_size=128"), "did you mean 'model.ffn_hidden_size'?")
    refused(train("prune.target.ffn_hidden_size=22"), "TP x prune.alignment = 4", "20, 24")
    refused(
        train("prune.target.ffn_hidden_size=64"),
        "(64) must be below model.ffn_hidden_size (64)",
        "prune.strategy=none",
    )
    refused(train("schedule.recover_fraction=0.5"), "0.25 + 0.5 + 0.5 = 1.25")
    refused(train("schedule.prune_warmup_fraction=0.1"), "at least one step")
    refused(train("training.global_batch_size=5"), "a multiple of micro_batch_size x DP")


def test_another_number_of_processes_is_refused_before_any_starts(train: Any) -> None:
    refused(
        train("parallel.tensor_model_parallel_size=2", "--nproc", 3),
        "3 processes cannot be split into TP 2 x PP 1 x DP",
        "a multiple of 2",
    )


def test_data_that_is_not_there_or_not_whole_is_named(train: Any, copy: Path) -> None:
    refused(train("data.train=[]"), "data.train is empty")
    refused(train(data(copy.with_name("nowhere"))), "nowhere")
    index, tokens = Path(f"{copy}.idx"), Path(f"{copy}.bin")
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[: len(whole) // 2])
    refused(train(data(copy)), str(tokens), f"{len(whole) // 2}")
    tokens.write_bytes(whole)
    index.write_bytes(index.read_bytes()[:50])
    refused(train(data(copy)), str(index))


def test_data_too_short_for_a_sequence_is_refused(train: Any) -> None:
    long = ["training.seq_length=1000000", "schedule.total_tokens=32e6"]
    refused(train(*long), "one sequence takes seq_length + 1 = 1000001", "shorter")


def test_a_vocabulary_that_does_not_fit_names_both_sizes(train: Any) -> None:
    refused(train("model.vocab_size=200"), "257 ids", "model.vocab_size is 200", "at least 257")


def test_another_tokenizer_than_the_datasets_is_refused(
    train: Any, tmp_path: Path, dataset: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 50)
    bpe = tmp_path / "tokenizer.json"
    arguments = ["tokenize", text, "--out", tmp_path / "own", "--tokenizer", bpe]
    arguments += ["--train-tokenizer", 264, "--held-out", 0]
    assert runner.invoke(cli.app, [str(a) for a in arguments]).exit_code == 0
    refused(train(f"data.tokenizer={bpe}"), f"{dataset}_train", "tokenizer")
    refused(train("data.tokenizer=nowhere.json"), "nowhere.json")


def test_a_corrupt_line_is_named_or_left_out_and_counted(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {n}, long enough"}) for n in range(40)]
    lines[6] = '{"text": "cut'
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(lines) + "\n")
    arguments = ["tokenize", str(text), "--out", str(tmp_path / "t"), "--tokenizer", "byte"]
    result = runner.invoke(cli.app, arguments)
    refused((result.exit_code, result.stdout, result.stderr), f"{text}:7 is not a line of JSON")
    assert not list(tmp_path.glob("t_*"))
    result = runner.invoke(cli.app, [*arguments, "--skip-bad-documents"])
    assert result.exit_code == 0
    assert "39 documents" in result.stdout
    assert "1 documents left out" in result.stdout


def test_a_run_folder_is_not_continued_by_another_run(train: Any, tmp_path: Path) -> None:
    code, _out, err = train()
    assert (code, err) == (0, "")
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step_00000008")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    refused(
        train("model.hidden_size=64"),
        f"{checkpoint} is a checkpoint of another model",
        "model.hidden_size: 32 in the checkpoint, 64 now",
        "another run_dir",
    )
    refused(
        train("schedule.lr=0.01", "schedule.total_tokens=2048"),
        "was written by another run",
        "schedule.lr: 0.003 in the checkpoint, 0.01 now",
        "schedule.total_tokens: 1024 in the checkpoint, 2048 now",
    )
    state = Path(checkpoint) / "state.json"
    state.write_text(state.read_text()[:20])
    refused(train(), checkpoint, "is damaged: state.json", "goes on from")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_of_two_processes_one_speaks_and_the_launcher_is_silent(config: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    arguments = ["train", config, "--nproc", 2, "data.train=[{prefix: nowhere}]"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_idea", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment | {"FORCE_COLOR": "1", "PYTHONSAFEPATH": "1"},
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("\x1b[1;31merror: ")  # bold red
    assert "nowhere" in line
