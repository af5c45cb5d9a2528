"""Runs of a suite: which are started and when, how a comparison ends, and how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from test_compare_suite import ARMS, BASE, SMALL
from typer.testing import CliRunner

from megatron_idea import cli
from megatron_idea import config as configuration
from megatron_idea.compare import jobs
from megatron_idea.compare.suite import ArmRun, Suite, read_suite
from megatron_idea.config import Config, ConfigError
from megatron_idea.engine.launcher import STOPPED
from megatron_idea.records.lock import NAME, RunFolderError, RunLock
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.train import train

REPOSITORY = Path(configuration.__file__).resolve().parents[1]
STEPS = 20
# What compare sees of a training: its files, signals and status.
TRAIN = f"""
import json, os, signal, sys, time, yaml
from pathlib import Path

config = yaml.safe_load(Path(sys.argv[1]).read_text())
run = Path(config["run_dir"])
told = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _frame: told.append(number))
run.mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text(Path(sys.argv[1]).read_text())

def event(kind, **fields):
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({{"kind": kind, "time": time.time(), **fields}}) + "\\n")

steps = run / "steps"
done = int(steps.read_text()) if steps.exists() else 0
event("resumed" if done else "started", step=done, threads=os.environ.get("OMP_NUM_THREADS"),
      safe=os.environ.get("PYTHONSAFEPATH"), arguments=sys.argv[2:], told=len(told))
arm = run.parent.name
if os.environ.get("FAILS") == arm:
    print("reading data\\nerror: no space left\\n")
    sys.exit(3)
if os.environ.get("STOPS") == arm:
    sys.exit({STOPPED})
while done < {STEPS}:
    time.sleep(float(os.environ.get("STEP_S", 0)))
    done += 1
    steps.write_text(str(done))
    if told:
        time.sleep(0.3)
        event("signal", step=done, numbers=told)
        sys.exit({STOPPED})
event("evaluated", step=done, val_loss=3 + config["training"]["seed"] / 4)
event("finished", step=done)
"""
# A comparison in a process of its own, which can be stopped and killed.
COMPARE = """
import sys
from megatron_idea.compare.jobs import run_missing
from megatron_idea.compare.suite import read_suite

command = [sys.executable, sys.argv[3]] if sys.argv[3:] else None
options = {"command": command} if command else {}
sys.exit(run_missing(read_suite(sys.argv[1]), int(sys.argv[2]), **options))
"""
BRANCHED = {
    "branch": {"from": "idea@enlarged", "schedule": {"removal": "one_shot"}},
    "scratch": SMALL,
    "idea": {},
}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for the ends of runs more often: here they take no time."""
    monkeypatch.setattr(jobs, "POLL_S", 0.01)


@pytest.fixture
def trainer(tmp_path: Path) -> list[str]:
    path = tmp_path / "train.py"
    path.write_text(TRAIN)
    return [sys.executable, str(path)]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Four runs."""
    return read_suite(written(tmp_path, ARMS))


@pytest.fixture
def branched(tmp_path: Path) -> Suite:
    """Six runs, of which two start from another one."""
    return read_suite(written(tmp_path, BRANCHED))


def written(tmp_path: Path, arms: dict[str, Any], **keys: Any) -> Path:
    given = {"out": str(tmp_path / "out"), "base": BASE, "seeds": [0, 1], "reference": "scratch"}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(given | {"arms": arms} | keys, sort_keys=False))
    return path


def events_of(suite: Suite) -> dict[str, list[dict[str, Any]]]:
    return {run.key: read_events(run.run_dir) for run in suite.runs if run.run_dir.exists()}


def starts(suite: Suite) -> list[str]:
    """Keys of runs in the order in which they were started; one twice that was started twice."""
    kinds = ("started", "resumed")
    found = [(e["time"], k) for k, es in events_of(suite).items() for e in es if e["kind"] in kinds]
    return [key for _, key in sorted(found)]


def test_runs_are_started_in_order_and_the_second_call_starts_none(
    branched: Suite, trainer: list[str]
) -> None:
    lines: list[str] = []
    assert jobs.run_missing(branched, nproc=2, command=trainer, tell=lines.append) == 0
    assert starts(branched) == [run.key for run in branched.runs]
    assert [line.partition(":")[0] for line in lines] == [str(run) for run in branched.runs]
    assert lines[0].startswith("scratch, seed 0: held-out loss 3.0000, ")
    assert lines[0].endswith("; 5 runs to go") and lines[-1].endswith("; 0 runs to go")
    for run in branched.runs:
        assert configuration.load(run.file) == run.config
        first = read_events(run.run_dir)[0]
        assert (first["arguments"], first["threads"], first["safe"]) == (
            ["--nproc", "2"],
            None,
            "1",
        )
    assert jobs.run_missing(branched, command=trainer, tell=lines.append) == 0
    assert len(starts(branched)) == len(lines) == 6
    assert not (branched.out / NAME).exists()


def test_runs_side_by_side_are_no_more_than_asked_and_branches_wait(
    branched: Suite, trainer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEP_S", "0.01")
    assert jobs.run_missing(branched, parallel=2, command=trainer) == 0
    at_work, most = 0, 0
    changes = [
        (event["time"], 1 if event["kind"] == "started" else -1)
        for events in events_of(branched).values()
        for event in events
        if event["kind"] in ("started", "finished")
    ]
    for _, change in sorted(changes):
        at_work += change
        most = max(most, at_work)
    assert most == 2
    for run in branched.runs:
        events = events_of(branched)
        assert events[run.key][0]["threads"] == "1"
        if run.source is not None:
            assert events[run.key][0]["time"] > events[run.source.key][-1]["time"]


def test_a_failed_run_keeps_only_its_branches_from_running(
    branched: Suite, trainer: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("FAILS", "idea")
    lines: list[str] = []
    assert jobs.run_missing(branched, command=trainer, tell=lines.append) == jobs.FAILED
    assert starts(branched) == ["scratch/seed0", "idea/seed0", "scratch/seed1", "idea/seed1"]
    said = capsys.readouterr().err
    log = branched.out / "idea" / "seed0.log"
    assert f"idea, seed 0 ended with status 3: error: no space left ({log})" in said
    assert "branch, seed 0 is not run: it needs idea, seed 0, which failed" in said
    assert lines[-1].startswith("scratch, seed 1: ") and lines[-1].endswith("; 4 runs to go")
    monkeypatch.delenv("FAILS")
    assert jobs.run_missing(branched, command=trainer) == 0
    assert sorted(set(starts(branched))) == sorted(run.key for run in branched.runs)
    assert log.read_text().count("reading data") == 1  # appended to


def test_a_run_that_was_stopped_alone_has_not_failed(
    branched: Suite, trainer: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("STOPS", "idea")
    assert jobs.run_missing(branched, command=trainer) == STOPPED
    assert starts(branched) == ["scratch/seed0", "idea/seed0", "scratch/seed1", "idea/seed1"]
    assert "error" not in capsys.readouterr().err
    monkeypatch.setenv("FAILS", "scratch")  # the others are finished: nothing fails
    monkeypatch.delenv("STOPS")
    assert jobs.run_missing(branched, command=trainer) == 0


def test_a_run_that_says_it_ended_well_must_have_said_so_in_its_folder(
    suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "idle.py").write_text("")
    command = [sys.executable, str(tmp_path / "idle.py")]
    assert jobs.run_missing(suite, command=command) == jobs.FAILED
    assert "scratch, seed 0 ended with status 0: it said nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kinds", "finished"),
    [
        ([], False),
        (["started", "evaluated"], False),
        (["started", "finished"], True),
        (["branched", "resumed", "evaluated", "finished"], True),
        (["started", "finished", "resumed"], False),
        (["started", "finished", "resumed", "saved", "finished"], True),
    ],
)
def test_finished_is_what_says_so_last(suite: Suite, kinds: list[str], finished: bool) -> None:
    run = suite.runs[0]
    run.run_dir.mkdir(parents=True)
    lines = "".join(json.dumps({"kind": kind}) + "\n" for kind in kinds)
    (run.run_dir / "events.jsonl").write_text(lines + '{"kind": "fin')  # a kill cut the last short
    assert jobs.is_finished(run) == finished


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., psutil.Popen]]:
    """Start a comparison in a process of its own."""
    processes: list[psutil.Popen] = []
    (tmp_path / "compare.py").write_text(COMPARE)

    def start(suite: Suite, *command: str, parallel: int = 1, **variables: str) -> psutil.Popen:
        process = psutil.Popen(
            [sys.executable, tmp_path / "compare.py", suite.path, str(parallel), *command],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.is_running():
            for child in process.children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], Any], process: psutil.Popen) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_is_passed_on_once_to_every_run_and_the_same_call_goes_on(
    suite: Suite, trainer: list[str], started: Callable[..., psutil.Popen], number: signal.Signals
) -> None:
    process = started(suite, trainer[1], parallel=2, STEP_S="0.1")
    wait_for(lambda: len(list(suite.out.glob("*/seed*/steps"))) == 2, process)
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)  # an echo
    said, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED, said
    assert "4 runs to go: the same call goes on" in said and "error" not in said
    told = [e for events in events_of(suite).values() for e in events if e["kind"] == "signal"]
    assert [event["numbers"] for event in told] == [[number], [number]]
    assert jobs.run_missing(suite, command=trainer) == 0
    for run in suite.runs:
        assert jobs.is_finished(run)
    assert len(starts(suite)) == 6


def test_after_a_kill_the_same_call_goes_on(
    suite: Suite, trainer: list[str], started: Callable[..., psutil.Popen]
) -> None:
    process = started(suite, trainer[1], STEP_S="0.1")
    wait_for(lambda: (suite.runs[0].run_dir / "steps").exists(), process)
    (child,) = process.children()
    process.kill()
    child.kill()
    process.wait()
    assert (suite.out / NAME).exists()
    assert jobs.run_missing(suite, command=trainer) == 0
    assert starts(suite) == [suite.runs[0].key, *(run.key for run in suite.runs)]


HOLD = """
import json, sys, time
from megatron_idea.records.lock import RunLock

run = sys.argv[1]
with RunLock(run):
    print("held", flush=True)
    sys.stdin.readline()
    with open(f"{run}/events.jsonl", "a") as file:
        file.write(json.dumps({"kind": sys.argv[2], "time": time.time(), "val_loss": 1.5}) + "\\n")
"""


@pytest.mark.parametrize("kind", ["finished", "signal"])
def test_a_run_that_outlived_its_comparison_is_waited_for(
    suite: Suite, trainer: list[str], kind: str
) -> None:
    """Killed alone, a comparison leaves its run at work."""
    first = suite.runs[0]
    command = [sys.executable, "-c", HOLD, str(first.run_dir), kind]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin and holder.stdout and holder.stdout.readline() == "held\n"
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        assert starts(suite) == [] or holder.poll() is not None
        if "at work already" in text and holder.stdin:
            holder.stdin.write("\n")
            holder.stdin.flush()
            holder.wait()

    assert jobs.run_missing(suite, command=trainer, tell=tell) == 0
    assert f"{first} is at work already, in process {holder.pid}" in said[0]
    assert said[1].startswith(f"{first}: held-out loss") and len(said) == 5
    runs = suite.runs[1:] if kind == "finished" else suite.runs
    assert starts(suite) == [run.key for run in runs]
    holder.communicate()


def test_a_run_that_another_one_has_just_begun_is_waited_for(
    suite: Suite, trainer: list[str]
) -> None:
    """Both start at the same moment, and the lock is the other one's."""
    first = suite.runs[0]
    steal = f"""
import subprocess, sys
run = {str(first.run_dir)!r}
if "scratch/seed0" in sys.argv[1] and not __import__("os").path.exists(run):
    other = subprocess.Popen(
        [sys.executable, "-c", {HOLD!r}, run, "finished"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, start_new_session=True,
    )
    other.stdout.readline()
    subprocess.Popen(["sh", "-c", "sleep 0.3; echo"], stdout=other.stdin)
    sys.exit("error: in use")
"""
    script = Path(trainer[1])
    script.write_text(steal + script.read_text())
    said: list[str] = []
    assert jobs.run_missing(suite, command=trainer, tell=said.append) == 0
    assert f"{first} is at work already" in said[0]
    assert starts(suite) == [run.key for run in suite.runs[1:]]


def test_two_comparisons_in_one_folder_are_refused(
    suite: Suite, trainer: list[str], started: Callable[..., psutil.Popen]
) -> None:
    with RunLock(suite.out, "comparison"):
        process = started(suite, trainer[1])
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 1
        assert f"RunFolderError: comparison {suite.out} is in use by process {os.getpid()}" in said
    with (
        RunLock(suite.out, "comparison"),
        pytest.raises(RunFolderError, match=r"comparison .* is in use"),
    ):
        jobs.submit_missing(suite)
    assert starts(suite) == []


# ---- the whole


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for what is made of finished runs, which has tests of its own."""
    made = {
        "results": {
            "collect": lambda suite: [run.key for run in suite.runs if jobs.is_finished(run)],
            "as_json": lambda found: {"finished": found},
            "fit": lambda found: "fitted",
        },
        "tables": {"render": lambda found: f"{len(found)} finished"},
        "page": {"write": lambda suite, found, command: suite.out / "comparison.html"},
    }
    for name, functions in made.items():
        module = types.ModuleType(f"megatron_idea.compare.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(f"megatron_idea.compare.{name}", module, raising=False)


@pytest.fixture
def with_data(tiny_halved: Config, tmp_path: Path) -> Path:
    base = yaml.safe_load(configuration.to_yaml(tiny_halved))
    del base["run_dir"], base["start_from"], base["training"]["seed"]
    return written(tmp_path, ARMS, base=base, seeds=[3])


def test_the_command_runs_what_is_missing_and_shows_what_came_out(
    with_data: Path, trainer: list[str], results: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, runner = ["compare", str(with_data)], CliRunner()
    run_missing = jobs.run_missing

    def run(*arguments: Any, **options: Any) -> int:
        return run_missing(*arguments, command=trainer, **options)

    monkeypatch.setattr(jobs, "run_missing", run)
    monkeypatch.setenv("FAILS", "idea")
    failed = runner.invoke(cli.app, [*call, "--fit"])
    assert failed.exit_code == jobs.FAILED and "fitted" not in failed.stdout
    assert "1 finished" in failed.stdout and "comparison.html" in failed.stdout
    monkeypatch.delenv("FAILS")
    done = runner.invoke(cli.app, [*call, "--json", "--parallel", "2"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"finished": ["scratch/seed3", "idea/seed3"]}
    assert "idea, seed 3: held-out loss" in done.stderr
    again = runner.invoke(cli.app, [*call, "--fit"])
    assert again.exit_code == 0 and again.stdout.endswith("\nfitted\n")
    for wrong in (
        ["--fit", "--json"], ["--fit", "--dry-run"], ["--fit", "--slurm"],
        ["--slurm", "--parallel", "2"],
    ):  # fmt: skip
        assert runner.invoke(cli.app, [*call, *wrong]).exit_code == 2


def test_a_mistake_is_one_line_and_nothing_is_started(
    with_data: Path, results: None, tmp_path: Path
) -> None:
    for wrong in (["data.train=[]"], ["--nproc", "3"], ["prune.emma=1"], ["--seeds", "a"]):
        called = CliRunner().invoke(cli.app, ["compare", str(with_data), *wrong])
        assert called.exit_code == 2
        assert called.stderr.startswith("error: ") and called.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_was_stopped_and_killed_ends_as_an_undisturbed_one(
    with_data: Path, started: Callable[..., psutil.Popen], tmp_path: Path
) -> None:
    arms = {"idea": {}, "branch": {"from": "idea@enlarged", "schedule": {"removal": "one_shot"}}}
    given = yaml.safe_load(with_data.read_text()) | {"arms": arms, "reference": "idea"}
    given["base"]["evaluation"]["every_tokens"] = 512
    given["base"]["checkpoint"]["every_tokens"] = 1024
    with_data.write_text(yaml.safe_dump(given, sort_keys=False))
    suite = read_suite(with_data)
    idea, branch = suite.runs

    def begun(run: ArmRun, steps: int) -> psutil.Popen:
        """Start the comparison, and wait until a run has recorded so many steps."""
        process = started(suite)
        made = run.run_dir
        wait_for(lambda: made.exists() and len(read_metrics(made)) >= steps, process)
        return process

    process = begun(idea, steps=1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED, said
    process = begun(branch, steps=4)
    children = process.children()
    process.kill()
    for child in children:
        child.kill()
    process.wait()
    assert [jobs.is_finished(run) for run in suite.runs] == [True, False]
    process = started(suite)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said

    for run in suite.runs:
        alone = str(tmp_path / "alone" / run.arm)
        begins_at = f"{tmp_path / 'alone' / 'idea'}@enlarged" if run.source else ""
        train(configuration.replace(run.config, run_dir=alone, start_from=begins_at))
        ours, theirs = read_metrics(run.run_dir), read_metrics(Path(alone))
        assert [(r.step, r.tokens, r.loss, r.live) for r in ours] == [
            (r.step, r.tokens, r.loss, r.live) for r in theirs
        ]
        assert evaluations(run.run_dir) == evaluations(Path(alone))
    shown = CliRunner().invoke(cli.app, ["compare", str(with_data), "--json"])
    assert shown.exit_code == 0, shown.output
    for run in suite.runs:
        result = json.loads(shown.stdout)["runs"][run.arm][""]["3"]
        assert result["finished"] and result["loss"] == evaluations(run.run_dir)[-1][1]
    assert (suite.out / "comparison.html").is_file() and not shown.stderr


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    events = [event for event in read_events(run_dir) if event["kind"] == "evaluated"]
    return [(event["tokens"], event["val_loss"]) for event in events]


# ---- a cluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch and squeue that only write down: files ``job41``, ``queued41``, and so on."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    programs = {
        "sbatch": f'n=$((41 + $(ls "{folder}" | grep -c job)))\ncat >"{folder}/job$n"\n'
        f'touch "{folder}/queued$n"\necho "$n;cluster"',
        "squeue": 'case "$3" in -*) exit 9 ;; esac\n'
        f'if [[ -e "{folder}/queued$3" ]]; then echo "$3 gpu job R"; '
        "else echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; fi",
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("MEGATRON_IDEA_VENV", sys.prefix)
    monkeypatch.setenv("GPUS_PER_NODE", "0")
    monkeypatch.setenv("LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.chdir(REPOSITORY)
    return folder


def test_each_missing_run_becomes_a_job_and_a_branch_waits_for_its_source(
    with_data: Path, trainer: list[str], cluster: Path, tmp_path: Path
) -> None:
    arms = {"idea": {}, "branch": {"from": "idea@enlarged", "schedule": {"removal": "one_shot"}}}
    given = yaml.safe_load(with_data.read_text()) | {"arms": arms, "reference": "idea"}
    with_data.write_text(yaml.safe_dump(given, sort_keys=False))
    suite = read_suite(with_data)
    idea, branch = suite.runs
    lines: list[str] = []
    jobs.submit_missing(suite, 2, lines.append)
    assert lines == [
        "idea, seed 3: submitted job 41", "branch, seed 3: submitted job 42, afterok:41",
    ]  # fmt: skip
    first, second = (cluster / f"job{n}" for n in (41, 42))
    assert "--dependency" not in first.read_text()
    text = second.read_text()
    assert "#SBATCH --dependency=afterok:41\n#SBATCH --kill-on-invalid-dep=yes\n" in text
    assert "#SBATCH --job-name=branch-seed3\n" in text
    assert f"export CONFIG={branch.file}\n" in text and "export NPROC_PER_NODE=2\n" in text
    assert configuration.load(branch.file) == branch.config
    assert json.loads((suite.out / jobs.JOBS).read_text()) == {idea.key: "41", branch.key: "42"}

    # While they are in the queue nothing is submitted again; of what is gone and not done, all is.
    lines.clear()
    jobs.submit_missing(suite, 2, lines.append)
    assert lines == [
        "idea, seed 3: job 41 is in the queue",
        "branch, seed 3: job 42 is in the queue",
    ]
    (cluster / "queued42").unlink()
    subprocess.run([*trainer, str(idea.file)], check=True)
    lines.clear()
    jobs.submit_missing(suite, 2, lines.append)
    assert lines == ["branch, seed 3: submitted job 43"]  # its source is done: nothing to wait for
    assert "--dependency" not in (cluster / "job43").read_text()


def test_what_cannot_be_submitted_is_said(
    with_data: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = read_suite(with_data)
    with pytest.raises(ConfigError, match=r"scratch, seed 3 could not be submitted: .*NODES is"):
        monkeypatch.setenv("NODES", "none")
        jobs.submit_missing(suite)
    monkeypatch.delenv("NODES")
    with pytest.raises(ConfigError, match="leave NODES_AFTER_PRUNE and nodes_after_prune out"):
        monkeypatch.setenv("NODES_AFTER_PRUNE", "1")
        jobs.submit_missing(suite)
    monkeypatch.delenv("NODES_AFTER_PRUNE")
    # Of all arms before the first is submitted: this one needs a multiple of two processes.
    arms = ARMS | {"wide": {"parallel": {"tensor_model_parallel_size": 2}}}
    wide = written(tmp_path, arms, base=yaml.safe_load(with_data.read_text())["base"], seeds=[3])
    with pytest.raises(ConfigError, match=r"wide, seed 3 could not be submitted: .*multiple of 2"):
        jobs.submit_missing(read_suite(wide), 1)
    assert not list(cluster.glob("job*"))
    jobs.submit_missing(suite, 1)
    (cluster / "squeue").write_text(
        "#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1"
    )
    with pytest.raises(ConfigError, match="job 41: Unable to contact"):
        jobs.submit_missing(suite, 1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ConfigError, match="outside of a job"):
        jobs.submit_missing(suite, 1)
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="call compare there"):
        jobs.submit_missing(suite, 1)
    shutil.copytree(REPOSITORY / "megatron_idea", tmp_path / "installed" / "megatron_idea")
    moved = tmp_path / "installed" / "megatron_idea" / "config.py"
    monkeypatch.setattr(configuration, "__file__", str(moved))
    with pytest.raises(ConfigError, match=r"examples/launch.sh, which is not at"):
        jobs.submit_missing(suite, 1)
