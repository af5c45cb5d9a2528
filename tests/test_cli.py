"""The commands, as a user meets them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from records import neurons, record
from rich.console import Console
from typer.testing import CliRunner

import megatron_idea
from megatron_idea import (
    cli,
    config,
)
from megatron_idea.config import Config
from megatron_idea.errors import UserError
from megatron_idea.records import terminal
from megatron_idea.records.log import RunLog

runner = CliRunner()
CONFIG = """
run_dir: {run_dir}
model: {{ffn_hidden_size: 1024}}
parallel: {{tensor_model_parallel_size: 2}}
prune: {{target: {{ffn_hidden_size: 384}}}}
"""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(run_dir=tmp_path / "run"))
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Replaces training by one that finishes a step; the configs it was called with."""
    calls: list[Config] = []

    def train(given: Config) -> Any:
        calls.append(given)
        run_dir = Path(given.run_dir)
        log = RunLog(run_dir, config.replace(given, logging={"tensorboard": False}), True)
        (run_dir / "config.yaml").write_text(config.to_yaml(given))
        counts = neurons(*[given.model.ffn_hidden_size] * given.model.num_layers)
        log.write(record(1, tokens=given.batch_tokens, live=counts, stored=counts))
        log.close()
        return types.SimpleNamespace(consumed_tokens=given.schedule.total_tokens)

    module = types.ModuleType("megatron_idea.train")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron_idea.train", module)
    return calls


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces torch's launcher, which would start workers; what it was given."""
    from torch.distributed.launcher import api

    commands: list[list[str]] = []

    def elastic_launch(settings: api.LaunchConfig, program: str) -> Any:
        return lambda *arguments: commands.append(
            [str(settings.nproc_per_node), program, *arguments]
        )

    monkeypatch.setattr(api, "elastic_launch", elastic_launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    return commands


def terminal_console() -> Console:
    return Console(force_terminal=True, color_system=None)


def run(*arguments: Any) -> Any:
    return runner.invoke(cli.app, [str(argument) for argument in arguments])


def assert_user_error(result: Any, *parts: str) -> None:
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in result.output
    for part in parts:
        assert part in line


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, megatron_idea.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'megatron.core', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("corpus", "tokenize", "train", "plan", "evaluate", "report", "doctor"):
        assert command in done.stdout


def test_plan_prints_the_run_without_running_it(config_path: Path, tmp_path: Path) -> None:
    result = run("plan", config_path, "schedule.total_tokens=1e6")
    assert result.exit_code == 0
    for shown in ("1M tokens", "Phases", "Compactions", "2 processes: TP 2 x PP 1 x DP 1"):
        assert shown in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("columns", ["20", "80", "300"])
def test_no_fact_of_a_plan_is_broken(
    config_path: Path, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipe at all; in a terminal, where tables may change, neither."""
    monkeypatch.setenv("COLUMNS", columns)
    run_dir = "runs/" + "a-long-name" * 20 + " with words in it"
    plans = [run("plan", config_path, f"run_dir={run_dir}").stdout]
    monkeypatch.setattr(
        terminal, "Console", lambda: Console(force_terminal=True, color_system=None)
    )
    plans.append(run("plan", config_path, f"run_dir={run_dir}").stdout)
    for plan in plans:
        lines = [line.rstrip() for line in plan.splitlines()]
        assert lines[0] == run_dir
        assert lines[1].startswith("4M tokens in 1,954 steps")
        assert lines[2].endswith("vocabulary 4096, sequence 256")
        assert "target from scratch" in plan and "…" not in plan


def test_a_table_of_sentences_fits_a_terminal_and_is_unbroken_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_idea.planning.doctor import Row, render

    monkeypatch.setenv("COLUMNS", "60")
    table = render([Row("a name", "ok", "words " * 20, "path/" * 20)])
    terminal.show(table)
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr(
        terminal, "Console", lambda: Console(force_terminal=True, color_system=None)
    )
    terminal.show(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2 and "path/" * 20 in "".join(lines)
    assert any("path/" * 20 in line for line in lines)


def test_the_version_is_said() -> None:
    assert run("--version").stdout == f"megatron-idea {megatron_idea.__version__}\n"


def test_plan_as_json_is_json(config_path: Path) -> None:
    result = run("plan", config_path, "training.micro_batch_size=4", "--json", "--nproc", 4)
    plan = json.loads(result.stdout)
    assert (plan["world_size"], plan["data_parallel"]) == (4, 2)
    assert plan["compactions"][-1]["stored"]["ffn_hidden_size"] == 384


def test_plan_for_gpus_adds_memory_and_hours(config_path: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    result = run("plan", config_path, "--gpus", 2, "--json", "--picture", picture)
    shown = json.loads(result.stdout)
    budget, after = shown["budget"], shown["after_prune"]
    assert after["best"]["tensor_parallel"] <= after["now"]["tensor_parallel"]
    assert (budget["gpus"], budget["gpu"], budget["refusal"]) == (2, "H100", "")
    assert picture.stat().st_size > 0


def test_plan_ends_with_an_error_when_the_run_does_not_fit(config_path: Path) -> None:
    large = ["model.hidden_size=65536", "model.vocab_size=262144"]
    result = run("plan", config_path, "--gpus", 2, *large)
    assert "Memory of the fullest GPU" in result.stdout and "The small model" in result.stdout
    assert_user_error(result, "GB too much")


def test_plan_wants_to_know_how_many_gpus(config_path: Path) -> None:
    result = run("plan", config_path, "--suggest")
    assert result.exit_code == 2 and "--gpus" in result.stderr
    result = run("plan", config_path, "--suggest", "--gpus", 2, "--picture", "layouts.png")
    assert result.exit_code == 2 and "a picture is of one layout" in result.stderr


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["model.hiden_size=1"], ["did you mean 'model.hidden_size'?"]),
        (["prune.target.ffn_hidden_size=390"], ["nearest legal values: 384, 400"]),
        (["schedule.prune_fraction=0.3"], ["must be 1; they are"]),
        (["--nproc", "3"], ["3 processes cannot be split", "a multiple of 2"]),
    ],
)
def test_a_mistake_is_one_line_and_no_process_starts(
    config_path: Path,
    launched: list[list[str]],
    command: str,
    arguments: list[str],
    parts: list[str],
) -> None:
    assert_user_error(run(command, config_path, *arguments), *parts)
    assert launched == []


def test_a_missing_configuration_is_one_line(tmp_path: Path) -> None:
    assert_user_error(run("train", tmp_path / "nowhere.yaml"), "no configuration file at")


def test_a_message_of_the_yaml_parser_is_one_line_too(config_path: Path) -> None:
    assert_user_error(run("plan", config_path, "data.train=[red]x"), "cannot read configuration")


def test_square_brackets_in_a_message_are_printed_as_they_are(tmp_path: Path) -> None:
    assert_user_error(run("report", tmp_path / "[red]x"), "[red]x is not a run folder")


def test_train_starts_as_many_processes_as_the_model_needs(
    config_path: Path, launched: list[list[str]]
) -> None:
    run("train", config_path, "prune.ema=0.3")
    (command,) = launched
    assert command[:2] == ["2", sys.executable]
    assert command[2:] == ["-m", "megatron_idea", "train", str(config_path), "prune.ema=0.3"]
    assert os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "3"  # the user's own setting stays


def test_one_process_trains_in_place_and_reports(
    config_path: Path, tmp_path: Path, trained: list[Config], launched: list[list[str]]
) -> None:
    result = run("train", config_path, "parallel.tensor_model_parallel_size=1")
    assert result.exit_code == 0, result.output
    assert launched == []
    assert [given.run_dir for given in trained] == [str(tmp_path / "run")]
    assert "consumed tokens" in result.stdout
    assert (tmp_path / "run" / "report" / "run.png").is_file()


@pytest.mark.parametrize("number", [0, 1])
def test_a_worker_of_a_launcher_trains_and_rank_0_reports(
    config_path: Path,
    trained: list[Config],
    launched: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("train", config_path)
    assert result.exit_code == 0, result.output
    assert (len(trained), launched) == (1, [])
    assert ("consumed tokens" in result.stdout) == (number == 0)


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_workers_only_rank_0_says_what_the_user_got_wrong(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, lines: int
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("train", config_path, "prune.ema=7")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == lines


def test_a_worker_refuses_to_start_processes_of_its_own(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("train", config_path, "--nproc", 2)
    assert result.exit_code == 2
    assert "launcher" in result.stderr


def raises(error: Exception) -> types.ModuleType:
    """``megatron_idea.train``, which raises in a frame of its own."""
    made = types.ModuleType("megatron_idea.train")
    made.error = error  # type: ignore[attr-defined]
    exec("def train(config): raise error", made.__dict__)
    return made


@pytest.mark.parametrize("error", [ValueError("too many values"), RuntimeError("x"), KeyError("x")])
def test_a_bug_of_our_own_keeps_its_traceback(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setitem(sys.modules, "megatron_idea.train", raises(error))
    result = run("train", config_path, "parallel.tensor_model_parallel_size=1")
    assert result.exit_code == 1
    assert result.exception is error


def kinds_of(kind: type[UserError]) -> list[type[UserError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in kinds_of(child))]


def test_every_error_of_the_user_is_one_line_and_can_be_carried_to_other_ranks(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_idea.checkpoint
    import megatron_idea.records.lock  # noqa: F401  with these all are there

    kinds = [kind for kind in kinds_of(UserError) if kind.__module__.startswith("megatron_idea.")]
    assert {
        "ConfigError", "DataError", "BadDocumentError", "CheckpointError", "DamagedError",
        "ForeignError", "DivergedError", "UnsafeFileError", "RunFolderError", "RecordError",
    } <= {kind.__name__ for kind in kinds}  # fmt: skip
    for kind in kinds:
        error = kind("rank 1: what to do")  # as agree_or_raise makes it
        monkeypatch.setitem(sys.modules, "megatron_idea.train", raises(error))
        result = run("train", config_path, "parallel.tensor_model_parallel_size=1")
        assert_user_error(result, "error: rank 1: what to do")


def test_report_refuses_another_folder(tmp_path: Path) -> None:
    assert_user_error(run("report", tmp_path), "is not a run folder")


def test_doctor_finds_this_machine_fit() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for shown in ("torch", "megatron-core", "Transformer Engine", "attention", "optimizer"):
        assert shown in result.stdout


def test_doctor_fails_when_something_required_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_idea.planning import doctor

    missing = doctor.Row("torch", "missing", "not installed", "pip install torch", required=True)
    monkeypatch.setattr(doctor, "collect", lambda: [missing])
    assert run("doctor").exit_code == 1


def test_evaluate_prints_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from megatron_idea.evaluation import held_out

    calls = []

    def evaluate_model(path: Path, data: list[str], overrides: list[str], options: object) -> list:
        calls.append((path, data, overrides, options))
        return [held_out.Measured("data.validation", 2.5, 16384, 0)]

    monkeypatch.setattr(held_out, "evaluate_model", evaluate_model)
    result = run("evaluate", tmp_path, "evaluation.num_samples=8")
    assert calls == [(tmp_path, [], ["evaluation.num_samples=8"], held_out.Options())]
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["loss", "2.5000"],
        ["perplexity", "12.1825"],
        ["tokens", "16,384"],
    ]


def test_text_becomes_token_files_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    sentences = (f"the quick brown fox number {n} jumps over the lazy dog" for n in range(200))
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences))
    tokenizer = tmp_path / "tokenizer.json"
    arguments = ["tokenize", text, "--out", tmp_path / "t", "--tokenizer", tokenizer]
    arguments += ["--train-tokenizer", 300, "--held-out", 0.2]
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert "200 documents" in first.stdout
    for name in ("t_train.bin", "t_train.idx", "t_heldout.bin", "t_heldout.idx"):
        assert (tmp_path / name).is_file()
    written = tokenizer.read_bytes()
    second = run(*arguments)
    assert second.exit_code == 0
    assert "which exists" in second.stdout.replace("\n", "")
    assert tokenizer.read_bytes() == written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_tokenizing_that_a_signal_stops_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    from megatron_idea.data import shards

    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(40):
        (texts / f"{n:02}.txt").write_text(f"text {n}")
    (texts / "picture.png").touch()
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 20)
    encode, calls = shards.Encoder.__call__, []

    def stopped(self: Any, batch: list[str]) -> Any:
        calls.append(batch)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return encode(self, batch)

    arguments = ["tokenize", texts, "--out", tmp_path / "t", "--tokenizer", "byte"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker's train has changed it
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(shards.Encoder, "__call__", stopped)
    first = run(*arguments, "--held-out", 0.2)
    assert first.exit_code == 75
    assert "stopped after 0.0 MB of text; the same call goes on there" in first.stderr
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    second = run(*arguments, "--held-out", 0.2)
    assert second.exit_code == 0
    assert "going on after 15 documents" in second.stdout and "40 documents:" in second.stdout
    assert "passed over in folders: 1 .png" in second.stdout and "MB/s" in second.stdout


def test_the_byte_tokenizer_cannot_be_trained(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    result = run(
        "tokenize", text, "--out", tmp_path / "t", "--tokenizer", "byte", "--train-tokenizer", 300
    )
    assert_user_error(result, "--tokenizer data/tokenizer.json")


def test_a_full_disk_is_one_line_in_any_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(out: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))

    monkeypatch.setattr("megatron_idea.data.corpus.build_corpus", full)
    assert_user_error(run("corpus", "out.jsonl"), "No space left on device for out.jsonl")


def test_workers_of_one_machine_meet_without_a_name(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.launcher import api

    given: list[api.LaunchConfig] = []
    monkeypatch.setattr(api, "elastic_launch", lambda settings, _: given.append(settings) or print)
    assert run("train", config_path).exit_code == 0
    assert (given[0].local_addr, given[0].rdzv_endpoint) == ("127.0.0.1", "127.0.0.1:0")


def test_a_first_node_without_an_address_is_named_at_once(config_path: Path) -> None:
    nodes = ("--nnodes", 2, "--nproc", 1, "--master", "no-such-host.invalid:29500")
    assert_user_error(run("train", config_path, *nodes), "'no-such-host.invalid'", "no address")


def test_an_example_is_written_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*arguments: str) -> tuple[int, str]:
        result = runner.invoke(cli.app, ["init", *arguments])
        return result.exit_code, result.output

    monkeypatch.chdir(tmp_path)
    examples = Path(cli.__file__).parent.parent / "examples"
    assert init("quickstart") == (0, "written: quickstart.yaml\n")
    source = (examples / "configs" / "quickstart.yaml").read_text()
    assert Path("quickstart.yaml").read_text() == source
    code, said = init("quickstart")
    assert code == 2 and "quickstart.yaml is there already, and nothing is overwritten" in said
    code, said = init("quickstart", "quickstart.yaml/mine.yaml")
    assert code == 2 and "cannot write quickstart.yaml/mine.yaml: File exists" in said
    code, said = init("quikstart", "mine.yaml")
    assert code == 2 and "did you mean 'quickstart'?" in said

    written = "written: suites/micro.yaml\nwritten: suites/mine.yaml\n"
    assert init("laptop", "suites/mine.yaml") == (0, written)
    assert "\nconfig: micro.yaml\n" in Path("suites/mine.yaml").read_text()
    assert init("axes", "suites/other.yaml") == (0, "written: suites/other.yaml\n")
    code, said = init("axes", "micro.yaml")
    assert code == 2 and "name another file" in said and not Path("micro.yaml").exists()
    Path("suites/micro.yaml").write_text("mine: true\n")
    code, said = init("methods", "suites/third.yaml")
    assert code == 2 and "suites/micro.yaml is there already" in said
    assert not Path("suites/third.yaml").exists()
