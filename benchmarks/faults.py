"""Break runs in every way we know, start them again, compare the end with an undisturbed run's.

    python -W ignore benchmarks/faults.py [--trials 120] [--seed 0]

Each trial is a small run over two tensor-parallel ranks, pruned and compacted on the way, that
meets one fault, is started again without it and must end with the same tensors, bit for bit, and
the same losses. Processes are forked from this one, which has imported everything, and end by real
signals; a disk is full by RLIMIT_FSIZE, a folder read-only for a user without rights.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea import train as training
from megatron_idea.checkpoint import saving, storage
from megatron_idea.config import Config
from megatron_idea.data.tokenizer import load_tokenizer
from megatron_idea.data.tokenizing import tokenize
from megatron_idea.engine.core_versions import quiet
from megatron_idea.prune import compact, pruner
from megatron_idea.records.read import read_metrics

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

from measure import result_file, write

RANKS = 2
NOBODY = 65534
PATIENCE_S = 120.0
"""A job that has not ended by then hangs: the trial is lost."""
Fault = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    kind: str
    detail: str
    statuses: tuple[int, ...]
    """Of the disturbed job's ranks; negative for a signal."""
    survivors_s: float
    """From the first rank's end to the last one's, before anybody is killed for it."""
    resumed_from: int
    """Step of the checkpoint that was there; 0 for none."""
    same: bool


def small_config(folder: Path, run: str) -> Config:
    """24 steps; saved every third, compacted five times."""
    return configuration.from_dict(
        {
            "run_dir": str(folder / run),
            "model": {
                "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64,
                "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8,
                "vocab_size": 264, "qk_layernorm": True,
            },
            "data": {
                "train": [{"prefix": str(folder / "text_train")}],
                "cache_dir": str(folder / "cache"),
            },
            "training": {"seq_length": 32, "micro_batch_size": 4, "global_batch_size": 4,
                         "precision": "bf16"},
            "parallel": {"tensor_model_parallel_size": RANKS, "distributed_timeout_minutes": 1.0},
            "schedule": {
                "total_tokens": 24 * 128, "lr": 3e-3, "min_lr": 3e-5, "enlarged_fraction": 0.25,
                "prune_fraction": 5 / 12, "recover_fraction": 1 / 3, "prune_warmup_fraction": 0.2,
            },
            "prune": {"target": {"ffn_hidden_size": 24}, "alignment": 4, "compaction_block": 8},
            "checkpoint": {"every_tokens": 3 * 128, "keep_last": 3, "on_damage": "previous"},
            "logging": {"tensorboard": False, "progress": False},
        }
    )  # fmt: skip


# ------------------------------------------------------------------------------------- a job


def _rank(config: Config, rendezvous: str, rank: int, fault: Fault | None) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.setpgrp()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        if fault is not None:
            fault()
        training.train(config, rendezvous)
    except ValueError:
        os._exit(2)
    except BaseException:
        os._exit(1)
    os._exit(0)


def run_job(
    config: Config,
    folder: Path,
    faults: dict[int, Fault] | None = None,
    kill: tuple[int, float] | None = None,
    rendezvous: str = "",
) -> tuple[tuple[int, ...], float]:
    """Run all ranks to their end; ``kill``: SIGKILL to a rank after so many seconds.

    As a launcher does, the others are ended when one has failed and they do not follow.

    Returns: exit statuses, and seconds from the first failed rank's end to the last rank's.
    """
    fork = multiprocessing.get_context("fork")
    rendezvous = rendezvous or f"file://{folder / uuid.uuid4().hex}"
    ranks = [
        fork.Process(target=_rank, args=(config, rendezvous, rank, (faults or {}).get(rank)))
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    begin, first_end = time.monotonic(), None
    while any(process.is_alive() for process in ranks):
        now = time.monotonic()
        if kill is not None and now - begin >= kill[1]:
            ranks[kill[0]].kill()  # unless it has ended by then
            kill = None
        if first_end is None and any(p.exitcode not in (None, 0) for p in ranks):
            first_end = now
        late = now - begin > PATIENCE_S or (first_end is not None and now - first_end > 20)
        if late:
            for process in ranks:
                process.kill()
        time.sleep(0.01)
    for process in ranks:
        process.join()
    survivors_s = time.monotonic() - first_end if first_end is not None else 0.0
    return tuple(process.exitcode or 0 for process in ranks), survivors_s


def ending(config: Config) -> dict[str, Any]:
    """What must be the same: every tensor's checksum, widths, steps, losses."""
    last = checkpoint.resolve(Path(config.run_dir))
    storage.verify(last)
    files = json.loads((last / storage.MANIFEST).read_text())["files"]
    state = checkpoint.read_state(last)
    return {
        "tensors": {name: entry for name, entry in files.items() if name.endswith(".distcp")},
        "state": (state.step, state.consumed_tokens, state.shape, state.adam_step),
        "losses": [record.loss for record in read_metrics(Path(config.run_dir))],
    }


# ------------------------------------------------------------------------------------ faults


def die_at(owner: Any, name: str, call: int, after: bool) -> Fault:
    """SIGKILL to itself right before or after the n-th call of a function."""

    def arm() -> None:
        function, calls = getattr(owner, name), [0]

        def deadly(*arguments: Any, **settings: Any) -> Any:
            calls[0] += 1
            if calls[0] == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **settings)
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, deadly)

    return arm


def full_disk(bytes_left: int, step: int) -> Fault:
    """From some step on no file may grow beyond ``bytes_left``."""

    def arm() -> None:
        take = training.step

        def stepping(run: Any, state: Any) -> Any:
            if state.step == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, resource.RLIM_INFINITY))
            return take(run, state)

        training.step = stepping

    return arm


SAVING = [
    (storage.Writing, "_write_buckets"), (saving, "_finish_tensors"), (saving, "_write"),
    (saving, "_sync_folder"), (storage, "remove"),
]  # fmt: skip
COMPACTING = [
    (pruner, "silence"), (compact, "fingerprint"), (compact, "free_gradients"), (compact, "stage"),
    (compact, "release"), (compact, "assemble"), (compact, "restore"), (compact, "check"),
]  # fmt: skip


def trial(kind: str, config: Config, folder: Path, dice: random.Random, run_s: float) -> Outcome:
    """One disturbed job; then the run is started again and must end by itself."""
    statuses: tuple[int, ...] = ()
    waited, detail, rank = 0.0, "", dice.randrange(RANKS)
    run_dir = Path(config.run_dir)
    if kind == "kill":
        moment = dice.uniform(0, run_s)
        statuses, waited = run_job(config, folder, kill=(rank, moment))
        detail = f"rank {rank} after {moment:.2f} of {run_s:.2f} s"
    elif kind in ("kill_saving", "kill_compacting"):
        owner, name = dice.choice(SAVING if kind == "kill_saving" else COMPACTING)
        rank = 0 if name in ("_write", "_sync_folder", "remove") else rank  # the writer's alone
        call, after = dice.randint(1, 4), dice.random() < 0.5
        statuses, waited = run_job(config, folder, {rank: die_at(owner, name, call, after)})
        detail = f"rank {rank} {'after' if after else 'before'} call {call} of {name}"
    elif kind == "full_disk":
        fault = full_disk(dice.randint(0, 60_000), dice.randrange(1, 22))
        statuses, waited = run_job(config, folder, dict.fromkeys(range(RANKS), fault))
    elif kind == "read_only":
        run_dir.mkdir()
        run_dir.chmod(0o555)
        statuses, waited = run_job(
            config, folder, {r: lambda: os.setuid(NOBODY) for r in range(RANKS)}
        )
        run_dir.chmod(0o755)
    elif kind == "unreachable":
        statuses, waited = run_job(
            configuration.replace(config, parallel={"distributed_timeout_minutes": 0.03}),
            folder,
            rendezvous="tcp://192.0.2.1:29500",
        )
    else:  # truncated, bit_flipped: an interrupted run, one file of its newest checkpoint
        statuses, waited = run_job(config, folder, kill=(rank, dice.uniform(0.5, 1) * run_s))
        found = checkpoint.complete(run_dir)
        if len(found) > 1:
            file = dice.choice(sorted(p for p in found[-1].iterdir() if p.stat().st_size))
            content = bytearray(file.read_bytes())
            if kind == "truncated":
                del content[dice.randrange(len(content)) :]
            else:
                content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            file.write_bytes(content)
            detail = f"{found[-1].name}/{file.name}"
    left = checkpoint.latest(run_dir)
    resumed_from = int(left.name.removeprefix("step_")) if left else 0
    again, _ = run_job(config, folder)
    same = again == (0,) * RANKS and ending(config) == EXPECTED
    return Outcome(kind, detail, statuses, round(waited, 2), resumed_from, same)


EXPECTED: dict[str, Any] = {}
SHARES = {
    "kill": 8, "kill_saving": 4, "kill_compacting": 4, "truncated": 2, "bit_flipped": 2,
    "full_disk": 2, "read_only": 1, "unreachable": 1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-file", action="store_true", help="print the outcome, keep nothing")
    arguments = parser.parse_args()
    quiet()
    logging.disable(logging.CRITICAL)
    dice = random.Random(arguments.seed)
    kinds = list(SHARES)
    wheel = [kind for kind, share in SHARES.items() for _ in range(share)]
    # Each kind once, then by their shares.
    order = kinds + [dice.choice(wheel) for _ in range(max(0, arguments.trials - len(kinds)))]
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        sources = sorted(Path(configuration.__file__).parent.glob("*.py"))
        tokenize(sources, folder / "text", load_tokenizer("byte"), held_out=0.1)
        undisturbed = small_config(folder, "undisturbed")
        begin = time.monotonic()
        statuses, _ = run_job(undisturbed, folder)
        run_s = time.monotonic() - begin
        assert statuses == (0,) * RANKS, statuses
        EXPECTED.update(ending(undisturbed))
        for number, kind in enumerate(order[: arguments.trials]):
            config = small_config(folder, f"trial_{number}")
            outcomes.append(trial(kind, config, folder, dice, run_s))
            print(f"{number + 1:4} {outcomes[-1]}", flush=True)
            shutil.rmtree(config.run_dir, ignore_errors=True)
    lost = [vars(o) for o in outcomes if not o.same]
    disturbed = [o for o in outcomes if any(o.statuses)]
    print(f"{len(outcomes)} trials, {len(disturbed)} disturbed, {len(lost)} lost")
    if not arguments.no_file:
        counts = {kind: Counter(o.kind for o in outcomes)[kind] for kind in kinds}
        measured = {
            "lost": {"ratio": len(lost), "trials": len(outcomes), "disturbed": len(disturbed)},
            "kinds": counts,
            "seed": arguments.seed,
            "survivors_end_s_max": max(o.survivors_s for o in outcomes),
            "lost_trials": lost,
            "outcomes": [vars(o) for o in outcomes],
        }
        write(result_file("faults"), measured, {"lost": 0})
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
