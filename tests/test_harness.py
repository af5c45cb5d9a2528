"""lm-evaluation-harness runs on our models, and its bits per byte are ours."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_data
import torch
from hf import trained
from typer.testing import CliRunner

from megatron_idea.config import ConfigError
from megatron_idea.evaluation.tasks import TASKS, _load, tasks_of
from megatron_idea.testing import Workers

pytest.importorskip("transformers", reason="needs the extra eval: transformers is missing")
pytest.importorskip("lm_eval", reason="needs the extra eval: lm_eval is missing")

runner = CliRunner()
# Short and longer than a row of 8 tokens; what looks like a list, ends in spaces, is not ASCII, has
# a byte order mark, lines of Windows, nothing at all.
TEXTS = [
    "def main(x):\n    return x + 1\n", "[1, 2]", "a  ", "Grüße, 世界", "x", "import os",
    "\ufeffbom", "a\r\nb\r\n", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``HF_HOME``, to be filled."""
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def workers(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Processes of this file alone: libraries read where the cache is when they are imported."""
    pool = Workers(tmp_path_factory.mktemp("rendezvous"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HOME", str(home))
        environment.setenv("HF_HUB_OFFLINE", "1")
        for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):  # each would be taken in its place
            environment.delenv(name, raising=False)
        yield pool
    pool.close()


def command(rendezvous: str, arguments: list[str]) -> tuple[int, str, str]:
    """As a user does: one process, no launcher; no network is asked."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
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


LONG = 1024
"""Tokens, which are bytes, that five examples and a question stay below."""


Asked = list[tuple[list[tuple[str, str]], int]]
"""Questions: the choices, as context and continuation, and which of them is right."""


def log_likelihoods(rendezvous: str, path: Path, asked: list[tuple[str, str]]) -> list[float]:
    """log p(continuation | context) of each pair, by our own model, of a checkpoint."""
    from megatron_idea.evaluation.generate import open_model

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    found = []
    with open_model(path) as (forward, _):
        for context, more in asked:
            row, begin = [*f"{context}{more}".encode()], len(context.encode())
            assert len(row) <= LONG
            logprobs = forward(torch.tensor([row[:-1]]))[0].double().log_softmax(-1)
            found.append(sum(logprobs[i - 1, row[i]].item() for i in range(begin, len(row))))
    return found


def right_answers(
    workers: Workers, path: Path, asked: dict[str, Asked]
) -> dict[str, list[tuple[bool, bool]]]:
    """Of each question, whether its answer is the likeliest choice: as it is, per character."""
    pairs = [p for questions in asked.values() for choices, _ in questions for p in choices]
    (found,) = workers.run(log_likelihoods, 1, path, pairs)
    scores = iter(found)
    right: dict[str, list[tuple[bool, bool]]] = {name: [] for name in asked}
    for name, questions in asked.items():
        for choices, answer in questions:
            whole = [next(scores) for _ in choices]
            lengths = [len(more.removeprefix(" ")) for _, more in choices]
            each = [score / length for score, length in zip(whole, lengths, strict=True)]
            likeliest = whole.index(max(whole)), each.index(max(each))
            right[name].append((likeliest[0] == answer, likeliest[1] == answer))
    return right


@pytest.fixture(scope="module")
def questions(home: Path) -> dict[str, list[dict[str, Any]]]:
    return task_data.build(home)


def asked_by_mmlu(
    subject: str, examples: list[dict[str, Any]], questions: list[dict[str, Any]]
) -> Asked:
    """Hendrycks' prompt: what it is about, five examples with their answers, the question."""

    def block(one: dict[str, Any]) -> str:
        lines = (
            f"{letter}. {choice}" for letter, choice in zip("ABCD", one["choices"], strict=True)
        )
        return "\n".join([one["question"], *lines, "Answer:"])

    about = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    shots = "".join(f"{block(one)} {'ABCD'[one['answer']]}\n\n" for one in examples)
    return [
        ([(head + shots + block(one), f" {letter}") for letter in "ABCD"], one["answer"])
        for one in questions
    ]


def test_the_paper_suite_asks_mmlu_with_five_examples_as_we_would(
    run_dir: Path, texts: Path, questions: dict[str, list[dict[str, Any]]], workers: Workers
) -> None:
    arguments = ["--suite", "paper", "--data", str(texts), "--seq-length", str(LONG), "--json"]
    ((code, out, err),) = workers.run(command, 1, [str(run_dir), *arguments])
    assert code == 0, err
    found = json.loads(out)
    (ours,) = found["held_out"]
    assert ours["tokens"] == sum(len(text.encode()) for text in TEXTS)
    tasks = found["tasks"]
    asked = {
        f"mmlu_{subject}": asked_by_mmlu(
            subject, questions[f"mmlu_{subject}/dev"], questions[f"mmlu_{subject}"]
        )
        for subject in task_data.subjects()
    }
    assert len(asked) == 57
    right = right_answers(workers, run_dir, asked)
    for name, answers in right.items():
        assert tasks[name]["acc"] == pytest.approx(np.mean(answers, axis=0)[0]), name
    everything = [plain for answers in right.values() for plain, _ in answers]
    assert tasks["mmlu"]["acc"] == pytest.approx(np.mean(everything))
    assert 0 < sum(everything) < len(everything)
    assert "lost their beginning" not in err


def test_the_usual_tasks_count_the_likeliest_choice(
    run_dir: Path, questions: dict[str, list[dict[str, Any]]], workers: Workers
) -> None:
    names = ["arc_easy", "hellaswag", "piqa", "winogrande"]
    arguments = [str(run_dir), "--tasks", ",".join(names), "--seq-length", str(LONG), "--json"]
    ((code, out, err),) = workers.run(command, 1, arguments)
    assert code == 0, err
    tasks = json.loads(out)["tasks"]
    assert list(tasks) == names
    asked: dict[str, Asked] = {name: [] for name in names}
    for one in questions["arc_easy"]:
        choices = [
            (f"Question: {one['question']}\nAnswer:", f" {x}") for x in one["choices"]["text"]
        ]
        asked["arc_easy"].append((choices, "ABCD".index(one["answerKey"])))
    for one in questions["hellaswag"]:
        said = f"{one['activity_label']}: {one['ctx_a']} {one['ctx_b'].capitalize()}"
        asked["hellaswag"].append(([(said, f" {x}") for x in one["endings"]], int(one["label"])))
    for one in questions["piqa"]:
        said = f"Question: {one['goal']}\nAnswer:"
        asked["piqa"].append(([(said, f" {one[x]}") for x in ("sol1", "sol2")], one["label"]))
    for one in questions["winogrande"]:
        before, after = one["sentence"].split("_")
        choices = [(before + one[x], after) for x in ("option1", "option2")]
        asked["winogrande"].append((choices, int(one["answer"]) - 1))
    for name, answers in right_answers(workers, run_dir, asked).items():
        plain, per_character = np.mean(answers, axis=0)
        assert tasks[name]["acc"] == pytest.approx(plain), name
        error = (plain * (1 - plain) / (len(asked[name]) - 1)) ** 0.5
        assert tasks[name]["acc_stderr"] == pytest.approx(error), name
        if name != "winogrande":
            assert tasks[name]["acc_norm"] == pytest.approx(per_character), name


def test_prompts_that_do_not_fit_are_counted(
    run_dir: Path, questions: dict[str, list[dict[str, Any]]], workers: Workers
) -> None:
    """The run's own rows have 8 tokens: of four choices to each of three questions nothing fits."""
    arguments = [str(run_dir), "--tasks", "arc_easy", "--limit", "3", "--seq-length", "20"]
    ((code, _, err),) = workers.run(command, 1, arguments)
    assert code == 0, err
    assert "12 prompts were longer than 20 tokens and lost their beginning" in err


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


def test_a_task_and_its_group_are_refused_before_a_model_is_read(
    texts: Path, tmp_path: Path
) -> None:
    import yaml
    from lm_eval.tasks import TaskManager

    own = yaml.safe_load((TASKS / "held_out.yaml").read_text())
    files = {"data_files": {"test": str(texts)}, "cache_dir": str(tmp_path / "cache")}
    own |= {"task": "own", "dataset_kwargs": files}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "all.yaml").write_text("group: all_of_it\ntask: [own]\n")
    manager = TaskManager(include_path=[tmp_path], include_defaults=False)
    (group,) = _load(manager, ["all_of_it"], None, tmp_path)
    assert group.name == "all_of_it"
    with pytest.raises(ConfigError, match=r"--tasks own,all_of_it: Duplicate task 'own'"):
        _load(manager, ["own", "all_of_it"], None, tmp_path)


def test_the_task_file_is_one_that_the_harness_can_read_by_itself() -> None:
    import yaml

    config: dict[str, Any] = yaml.safe_load((TASKS / "held_out.yaml").read_text())
    assert config["task"] == "held_out" and config["doc_to_target"] == "text"
