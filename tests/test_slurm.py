"""The launch script on a real Slurm of two nodes on this host: submit, be stopped, be preempted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_idea import config as configuration
from megatron_idea.config import Config, replace
from megatron_idea.records.read import read_events, read_metrics
from megatron_idea.testing import Workers
from megatron_idea.train import train

REPOSITORY = Path(__file__).resolve().parent.parent
CLUSTER = REPOSITORY / "tests" / "mini_slurm.sh"
SEARCH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
MISSING = [
    name
    for name in ("slurmctld", "slurmd", "sbatch", "munged")
    if not shutil.which(name, path=SEARCH)
]
PATIENCE_S = 240  # for one thing to happen; on a quiet machine the slowest takes 15 s

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here: {', '.join(MISSING)} not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a Slurm of its own"),
]


class Slurm:
    """What a user of the cluster does."""

    def __init__(self, folder: Path) -> None:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "SBATCH"))}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            kept.pop(name, None)
        self.environment = kept | {
            "PATH": SEARCH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MEGATRON_IDEA_VENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command: str, **variables: str) -> str:
        done = subprocess.run(
            command,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", "-o", job))
        assert found, name
        return found[1]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    # Not in pytest's own folder, which munge's user cannot enter.
    folder = Path(tempfile.mkdtemp(prefix="mini_slurm_"))
    cluster = Slurm(folder)
    try:
        cluster.call("bash", str(CLUSTER), "start", str(folder))
        yield cluster
    finally:
        subprocess.run(["bash", str(CLUSTER), "stop", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def eventually(happened: Callable[[], bool], what: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        said = log.read_text() if log.exists() else "nothing"
        assert time.monotonic() < end, f"waited in vain for: {what}; the log says\n{said}"
        time.sleep(0.1)


def train_in_worker(rendezvous: str, config: Config) -> int:
    return train(config, rendezvous).step


def test_a_run_stopped_and_preempted_while_it_prunes_equals_an_undisturbed_one(
    slurm: Slurm, tiny_halved: Config, tmp_path: Path, workers: Workers
) -> None:
    steps, first_prune_step, last_prune_step = 400, 51, 350
    config = replace(
        tiny_halved,
        schedule={
            "total_tokens": steps * 128, "enlarged_fraction": 0.125, "prune_fraction": 0.75,
            "recover_fraction": 0.125,
        },
    )  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(configuration.to_yaml(config))
    run_dir = Path(config.run_dir)

    def has_made(step: int) -> bool:
        return bool(run_dir.exists() and read_metrics(run_dir)[-1:]) and (
            read_metrics(run_dir)[-1].step >= step
        )

    job = slurm.call(
        "bash", str(REPOSITORY / "examples" / "launch.sh"),
        CONFIG=str(path), NODES="2", NPROC_PER_NODE="1", GPUS_PER_NODE="0", EXCLUSIVE="0",
        PARTITION="batch", LOG_DIR=str(tmp_path / "logs"), TIME_LIMIT="20", STOP_BEFORE_S="60",
    )  # fmt: skip
    log = tmp_path / "logs" / f"tiny-{job}.log"

    def requeued(times: int) -> bool:
        waits = slurm.field(job, "JobState") == "PENDING"
        return waits and slurm.field(job, "Restarts") == str(times)

    def go_on() -> None:
        # By itself it would wait two minutes. At once is too early: slurmd has revoked the rights
        # of whatever was started up to the second of the requeue.
        time.sleep(2.5)
        slurm.call("scontrol", "update", f"jobid={job}", "starttime=now")
        eventually(lambda: slurm.field(job, "JobState") == "RUNNING", "another start", log)

    # What Slurm does before the time limit: the batch script alone is told.
    eventually(lambda: has_made(first_prune_step + 20), "the first steps that prune", log)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    eventually(lambda: requeued(1), "a requeue after the signal", log)
    go_on()

    stopped_at = read_metrics(run_dir)[-1].step
    eventually(lambda: has_made(stopped_at + 10), "steps after the requeue", log)
    urgent = slurm.call(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive",
        "--output=/dev/null", "--wrap=true",
    )  # fmt: skip
    eventually(lambda: requeued(2), "a requeue after the preemption", log)
    eventually(lambda: slurm.field(urgent, "JobState") == "COMPLETED", "the urgent job", log)
    go_on()
    eventually(lambda: slurm.field(job, "JobState") == "COMPLETED", "the end of the run", log)

    events = read_events(run_dir)
    signals = [(event["name"], event["step"]) for event in events if event["kind"] == "signal"]
    assert [name for name, _ in signals] == ["SIGUSR1", "SIGTERM"]
    assert all(first_prune_step <= step < last_prune_step for _, step in signals), signals
    text = log.read_text()
    assert text.count("requeued") == 2 and text.count("the run is finished") == 1
    addresses = re.findall(r"meeting at (\S+)", text)
    assert len(addresses) == len(set(addresses)) == 3  # a port of its own for every start

    undisturbed = replace(config, run_dir=str(tmp_path / "undisturbed"))
    assert workers.run(train_in_worker, 2, undisturbed) == [steps, steps]
    ours, theirs = read_metrics(run_dir), read_metrics(Path(undisturbed.run_dir))
    assert [record.step for record in ours] == list(range(1, steps + 1))
    for name in ("loss", "lr", "live", "stored", "grad_norm"):
        assert [getattr(r, name) for r in ours] == [getattr(r, name) for r in theirs], name


def test_a_cancelled_run_is_saved_and_stays_cancelled(
    slurm: Slurm, tiny_halved: Config, tmp_path: Path
) -> None:
    config = replace(tiny_halved, schedule={"total_tokens": 2000 * 128})
    path = tmp_path / "tiny.yaml"
    path.write_text(configuration.to_yaml(config))
    run_dir = Path(config.run_dir)
    job = slurm.call(
        "bash", str(REPOSITORY / "examples" / "launch.sh"),
        CONFIG=str(path), NODES="2", NPROC_PER_NODE="1", GPUS_PER_NODE="0", EXCLUSIVE="0",
        LOG_DIR=str(tmp_path / "logs"), TIME_LIMIT="20", STOP_BEFORE_S="60",
    )  # fmt: skip
    log = tmp_path / "logs" / f"tiny-{job}.log"
    eventually(lambda: run_dir.exists() and bool(read_metrics(run_dir)), "a step", log)
    slurm.call("scancel", job)
    eventually(lambda: slurm.field(job, "JobState") == "CANCELLED", "the end", log)
    (event,) = (event for event in read_events(run_dir) if event["kind"] == "signal")
    assert (run_dir / "checkpoints" / f"step_{event['step']:08d}").is_dir()
    assert slurm.field(job, "Restarts") == "0"


def test_a_pruned_run_goes_on_on_fewer_nodes_in_a_layout_of_its_own(
    slurm: Slurm, tiny_halved: Config, tmp_path: Path
) -> None:
    tp2 = replace(tiny_halved, parallel={"tensor_model_parallel_size": 2})
    config = replace(tp2, parallel_after_prune=tiny_halved.parallel)
    path = tmp_path / "tiny.yaml"
    path.write_text(configuration.to_yaml(config))
    run_dir, logs = Path(config.run_dir), tmp_path / "logs"
    job = slurm.call(
        "bash", str(REPOSITORY / "examples" / "launch.sh"),
        CONFIG=str(path), NODES="2", NODES_AFTER_PRUNE="1", NPROC_PER_NODE="1", GPUS_PER_NODE="0",
        EXCLUSIVE="0", PARTITION="batch", LOG_DIR=str(logs), TIME_LIMIT="20", STOP_BEFORE_S="60",
    )  # fmt: skip

    def is_finished() -> bool:
        return any(event["kind"] == "finished" for event in read_events(run_dir))

    eventually(is_finished, "the end of the run", logs / f"tiny-{job}.log")
    events = read_events(run_dir)
    starts = [e for e in events if e["kind"] in ("started", "resumed")]
    assert [(e["step"], e["environment"]["processes"]) for e in starts] == [(0, 2), (16, 1)]
    (left,) = (event for event in events if event["kind"] == "fewer_nodes")
    assert left["step"] == 16
    assert [record.step for record in read_metrics(run_dir)] == list(range(1, 25))
    assert f"job {int(job) + 1}, start 1" in (logs / f"tiny-{int(job) + 1}.log").read_text()
