"""What the launch scripts would run, on machines with and without Slurm and GPUs, in pretence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idea import config as configuration

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY))
    for folder in ("benchmarks", "examples", "tests", ".ci")
    for path in (REPOSITORY / folder).iterdir()
    if path.suffix == ".sh" or path.name == "run"
)
BIG = "examples/idea_2p8b_to_1p3b.sh"
DATA = "data.train=[{prefix: data/web}]"
# Programs of the machine that the scripts and their interpreter need; no Slurm, no nvidia-smi.
BASIC = ("bash", "basename", "cat", "date", "dirname", "env", "grep", "mkdir", "sed", "uname")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder that is all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in BASIC:
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return folder


def program(machine: Path, name: str, body: str) -> None:
    path = machine / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def add_slurm(machine: Path, tmp_path: Path) -> None:
    """Programs that write down what they are given."""
    program(machine, "sbatch", f'cat >"{tmp_path}/job.sh"; echo "41;cluster"')
    program(
        machine, "srun", f'printf \'%s\\n\' "$@" >"{tmp_path}/srun"; exit "${{SRUN_STATUS:-0}}"'
    )
    body = (
        f'echo "$*" >>"{tmp_path}/scontrol"\n'
        'case "$1 $2" in\n'
        '"show hostnames") printf "a1\\na2\\n" ;;\n'
        '"show node") echo "NodeName=$4 NodeAddr=10.0.0.7 NodeHostName=$4" ;;\n'
        '"show job") echo "JobId=41 JobState=${JOB_STATE:-RUNNING} Reason=None" ;;\n'
        "esac"
    )
    program(machine, "scontrol", body)


def add_gpus(machine: Path, number: int) -> None:
    lines = "\n".join(f"echo 'GPU {index}: NVIDIA X'" for index in range(number))
    program(machine, "nvidia-smi", lines)


def call(
    machine: Path, *arguments: str, script: str = BIG, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(machine), "HOME": str(machine), "MEGATRON_IDEA_VENV": sys.prefix}
    return subprocess.run(
        ["bash", script, *arguments],
        cwd=REPOSITORY,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def commented_config(text: str, tmp_path: Path) -> configuration.Config:
    _, _, yaml = text.partition("# The configuration, resolved:\n")
    path = tmp_path / "resolved.yaml"
    path.write_text("\n".join(line.removeprefix("# ") for line in yaml.splitlines()))
    return configuration.load(path)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_scripts_pass_shellcheck() -> None:
    done = subprocess.run(["shellcheck", *SCRIPTS], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_with_neither_slurm_nor_gpu_the_plan_is_printed(machine: Path) -> None:
    done = call(machine)
    assert done.returncode == 0, done.stderr
    assert "nothing is started" in done.stderr
    assert "256 processes: TP 2 x PP 1 x DP 128" in done.stdout


def test_with_gpus_and_no_slurm_it_trains_on_all_of_them(machine: Path, tmp_path: Path) -> None:
    add_gpus(machine, 2)
    program(machine, "megatron-idea", f'printf \'%s\\n\' "$@" >"{tmp_path}/trained"; exit 75')
    done = call(machine, DATA, MEGATRON_IDEA_VENV="/nowhere")
    assert done.returncode == 75, done.stderr  # the run's own status
    assert (tmp_path / "trained").read_text().splitlines() == [
        "train", "examples/configs/2p8b_to_1p3b.yaml", "--nproc", "2", DATA,
    ]  # fmt: skip


def test_with_slurm_it_submits_a_job_that_calls_it_again(machine: Path, tmp_path: Path) -> None:
    add_slurm(machine, tmp_path)
    hostile = "run_dir=runs/a b'$(touch oops)"
    done = call(
        machine, DATA, hostile, NODES="4", PARTITION="gpu", ACCOUNT="me", TIME_LIMIT="1-12",
        STOP_BEFORE_S="900", LOG_DIR=str(tmp_path / "logs"), CONTAINER="repo#image:1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "41\n"
    assert (tmp_path / "logs").is_dir()
    job = (tmp_path / "job.sh").read_text()
    for line in (
        "--partition=gpu", "--account=me", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8",
        "--time=1-12", "--signal=B:USR1@900", "--requeue", "--open-mode=append", "--exclusive",
        f"--output={tmp_path}/logs/%x-%j.log",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in job
    # The job, run where srun only writes down: every value arrives as it was given.
    inside = subprocess.run(
        ["bash", str(tmp_path / "job.sh")],
        env={"PATH": str(machine), "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "a[1-2]"},
        capture_output=True,
        text=True,
    )
    assert inside.returncode == 0, inside.stderr
    given = (tmp_path / "srun").read_text().splitlines()
    assert given[-2:] == [DATA, hostile]
    assert "--container-image=repo#image:1" in given
    assert f"--container-mounts={REPOSITORY}:{REPOSITORY}" in given
    assert not (REPOSITORY / "oops").exists()


def test_a_pruned_run_goes_on_in_a_job_on_fewer_nodes(machine: Path, tmp_path: Path) -> None:
    add_slurm(machine, tmp_path)
    settings = {"NODES": "4", "NODES_AFTER_PRUNE": "2", "PARTITION": "gpu", "TIME_LIMIT": "1-12"}
    assert call(machine, DATA, **settings, LOG_DIR=str(tmp_path / "logs")).returncode == 0
    first = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --nodes=4\n" in first
    inside = subprocess.run(
        ["bash", str(tmp_path / "job.sh")],
        env={
            "PATH": str(machine), "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "a[1-2]",
            "SRUN_STATUS": "76",
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert inside.returncode == 0, inside.stderr
    assert "pruned: going on on 2 nodes" in inside.stderr
    given = (tmp_path / "srun").read_text().splitlines()
    assert given[-2:] == ["nodes_after_prune=2", DATA]
    assert (tmp_path / "job.sh").read_text() == first.replace("--nodes=4", "--nodes=2")
    assert "requeue" not in (tmp_path / "scontrol").read_text()
    # The configuration's key does the same.
    (tmp_path / "job.sh").unlink()
    settings |= {"NODES_AFTER_PRUNE": "", "LOG_DIR": str(tmp_path / "logs")}
    assert call(machine, "nodes_after_prune=2", DATA, **settings).returncode == 0
    assert "export NODES_AFTER_PRUNE=2\n" in (tmp_path / "job.sh").read_text()
    refused = call(machine, DATA, NODES="4", NODES_AFTER_PRUNE="few")
    assert refused.returncode == 2 and "NODES_AFTER_PRUNE is 'few'" in refused.stderr
    refused = call(machine, DATA, LAUNCH="local", NODES="1", NODES_AFTER_PRUNE="1")
    assert refused.returncode == 2 and "leave it out here" in refused.stderr


def test_inside_a_job_every_node_gets_one_launcher(machine: Path, tmp_path: Path) -> None:
    add_slurm(machine, tmp_path)
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "a[1-2]"}
    ports = []
    for restart in ("0", "1"):
        done = call(machine, DATA, **job, SLURM_RESTART_COUNT=restart)
        assert done.returncode == 0, done.stderr
        given = (tmp_path / "srun").read_text().splitlines()
        for option in ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1"):
            assert option in given
        command = given[given.index("megatron-idea") :]
        assert command[1:3] == ["train", "examples/configs/2p8b_to_1p3b.yaml"]
        assert command[3:7] == ["--nproc", "8", "--nnodes", "2"]
        host, _, port = command[command.index("--master") + 1].partition(":")
        assert host == "10.0.0.7"
        ports.append(port)
    assert ports[0] != ports[1]
    done = call(machine, CONTAINER="image.sif", CONTAINER_RUNTIME="apptainer", **job)
    given = (tmp_path / "srun").read_text()
    assert (
        f"apptainer\nexec\n--bind\n{REPOSITORY}:{REPOSITORY}\n--pwd\n{REPOSITORY}\n--nv\n" in given
    )


@pytest.mark.parametrize(
    ("status", "state", "requeue", "ends_with", "is_requeued"),
    [
        ("0", "RUNNING", "1", 0, False),
        ("75", "RUNNING", "1", 0, True),
        ("75", "COMPLETING", "1", 75, False),  # scancel: it must not come back
        ("75", "RUNNING", "0", 75, False),  # salloc: there is no job script to start again
        ("1", "RUNNING", "1", 1, False),
        ("137", "RUNNING", "1", 137, False),
    ],
)
def test_only_a_stopped_run_is_requeued(
    machine: Path, tmp_path: Path, status: str, state: str, requeue: str, ends_with: int,
    is_requeued: bool,
) -> None:  # fmt: skip
    add_slurm(machine, tmp_path)
    done = call(
        machine, SLURM_JOB_ID="41", SLURM_JOB_NODELIST="a[1-2]", SRUN_STATUS=status,
        JOB_STATE=state, REQUEUE=requeue,
    )  # fmt: skip
    assert done.returncode == ends_with, done.stderr
    assert ("requeue 41" in (tmp_path / "scontrol").read_text()) == is_requeued


def test_a_dry_run_prints_the_job_and_the_resolved_configuration(
    machine: Path, tmp_path: Path
) -> None:
    add_slurm(machine, tmp_path)
    done = call(machine, "--dry-run", "schedule.total_tokens=1e12", NODES="16")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=16\n" in done.stdout
    config = commented_config(done.stdout, tmp_path)
    assert config.schedule.total_tokens == 10**12
    assert config.model.ffn_hidden_size == 16384
    assert not (tmp_path / "job.sh").exists()
    # All of it is a script that can be kept and submitted.
    checked = subprocess.run(["bash", "-n"], input=done.stdout, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("variables", "arguments", "says"),
    [
        ({"NODES": "0"}, [DATA], r"NODES is '0'; it must be a whole number, at least 1"),
        ({"NODES": "two"}, [DATA], r"NODES is 'two'"),
        ({"NPROC_PER_NODE": "-1"}, [DATA], r"NPROC_PER_NODE is '-1'"),
        ({"TIME_LIMIT": "soon"}, [DATA], r"TIME_LIMIT is 'soon'"),
        ({"TIME_LIMIT": "5"}, [DATA], r"STOP_BEFORE_S \(600\) must be below TIME_LIMIT"),
        ({"PARTITION": "gpu\n#SBATCH --nodes=900"}, [DATA], r"PARTITION is"),
        ({"LOG_DIR": "a;b"}, [DATA], r"LOG_DIR is"),
        ({"DEPENDENCY": "afterok:41 42"}, [DATA], r"DEPENDENCY is"),
        ({"CONFIG": "nowhere.yaml"}, [DATA], r"no configuration file at nowhere.yaml"),
        ({"LAUNCH": "cloud"}, [DATA], r"it is auto, slurm, local or plan"),
        ({"CONTAINER_RUNTIME": "docker"}, [DATA], r"it is pyxis or apptainer"),
        ({}, ["--dryrun"], r"unknown option --dryrun"),
        ({}, ["word"], r"'word' is not of the form"),
        ({}, [], r"data.train is empty"),
        ({}, [DATA, "model.hiden_size=1"], r"did you mean 'model.hidden_size'"),
        ({"NODES": "3"}, [DATA], r"global_batch_size \(1024\) must be a multiple"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(
    machine: Path, tmp_path: Path, variables: dict[str, str], arguments: list[str], says: str
) -> None:
    add_slurm(machine, tmp_path)
    done = call(machine, *arguments, **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(says, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "job.sh").exists()


def test_help_is_the_head_of_the_script(machine: Path) -> None:
    done = call(machine, "--help", script="examples/launch.sh")
    assert done.returncode == 0
    for name in ("NODES", "PARTITION", "ACCOUNT", "TIME_LIMIT", "CONTAINER", "--dry-run"):
        assert name in done.stdout
    assert "set -e" not in done.stdout
    assert os.linesep in done.stdout
