"""lm-evaluation-harness runs on our models, and its bits per byte are ours."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hf import trained
from typer.testing import CliRunner

from megatron_idea.config import ConfigError
from megatron_idea.harness import TASKS, tasks_of
from megatron_idea.testing import Workers

pytest.importorskip("transformers", reason="needs the extra eval: transformers is missing")
pytest.importorskip("lm_eval", reason="needs the extra eval: lm_eval is missing")

runner = CliRunner()
# Short and longer than a row of 8 tokens; what looks like a list, ends in spaces, is not ASCII.
TEXTS = ["def main(x):\n    return x + 1\n", "[1, 2]", "a  ", "Grüße, 世界", "x", "import os"]


def command(rendezvous: str, arguments: list[str]) -> tuple[int, str, str]:
    """As a user does: one process, no launcher; no network is asked."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from megatron_idea import cli

    result = runner.invoke(cli.app, ["evaluate", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run_dir(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "run"
    trained(workers, folder, 1, 6)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def test_a_checkpoint_and_the_harness_agree_on_bits_per_byte(
    run_dir: Path, texts: Path, workers: Workers
) -> None:
    arguments = [str(run_dir), "--data", str(texts), "--tasks", "held_out", "--json"]
    ((code, out, err),) = workers.run(command, 1, arguments)
    assert code == 0, err
    found = json.loads(out[out.index("{") :])
    (ours,) = found["held_out"]
    theirs = found["tasks"]["held_out"]
    assert ours["bytes"] == sum(len(text.encode()) for text in TEXTS)
    # The same windows, in another order and precision of summation.
    assert theirs["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], abs=1e-5)
    assert theirs["byte_perplexity"] == pytest.approx(2 ** theirs["bits_per_byte"], rel=1e-6)


def test_data_and_tasks_out_of_reach_are_named_before_anything_runs(
    run_dir: Path, workers: Workers
) -> None:
    ((code, out, err),) = workers.run(command, 1, [str(run_dir), "--tasks", "piqa,arc_easy"])
    assert (code, out) == (2, "")
    assert re.search(r"error: the data of these tasks could not be had: piqa \(.*arc_easy \(", err)
    assert "HF_HOME" in err
    ((code, out, err),) = workers.run(command, 1, [str(run_dir), "--tasks", "held_out,picqa"])
    assert (code, out) == (2, "")
    assert "error: no task picqa in lm-evaluation-harness" in err and "--task-path" in err


def test_options_that_contradict_are_refused() -> None:
    assert tasks_of("", "piqa, arc_easy", None, []) == (["piqa", "arc_easy"], None)
    assert tasks_of("paper", "", None, ["text.jsonl"]) == (["mmlu"], 5)
    for given, says in (
        (("book", "", None, []), "--suite is 'book'; legal values: paper"),
        (("paper", "", None, []), "needs --data FILE with text of OpenWebText"),
        (("paper", "piqa", None, ["x"]), "leave the others out"),
        (("paper", "", 3, ["x"]), "leave the others out"),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            tasks_of(*given)


def test_the_task_file_is_one_that_the_harness_can_read_by_itself() -> None:
    import yaml

    config: dict[str, Any] = yaml.safe_load((TASKS / "held_out.yaml").read_text())
    assert config["task"] == "held_out" and config["doc_to_target"] == "text"
