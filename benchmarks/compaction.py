"""What a live compaction costs: time against a training step and against the way over the disk.

    python -W ignore benchmarks/compaction.py [--config CONFIG]

In one process: a series of compactions from the enlarged width to the target, each compared with
the training step right before it, and one with saving, compacting on disk and loading again. Memory
comes from a process of its own in which malloc gives back what is freed: highest resident memory
during a compaction, against before it and against the highest in a training step. Then seconds
over layers, widths and tensor-parallel ranks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.checkpoint.state import TrainState
from megatron_idea.config import Config
from megatron_idea.engine.core_versions import quiet
from megatron_idea.engine.distributed import PeakMemory, ProcessGroups, joined, memory_bytes
from megatron_idea.engine.trainable import Trainable, assemble
from megatron_idea.prune.plan import Plan, live_layers
from megatron_idea.prune.pruner import Pruner
from megatron_idea.prune.relocate import extension
from megatron_idea.shape import LAYER_AXES, Shape
from megatron_idea.testing import Workers

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

from measure import ratio, result_file, write
from training import FixedBatch, stepper

GOALS = {
    "compaction_to_step": 3.0,
    "all_axes_to_step": 3.0,
    "live_to_disk": 0.1,
    "extra_peak_to_state": 0.10,
    "all_axes_extra_peak_to_state": 0.10,
    "peak_to_training_peak": 1.0,
}
MEMORY_PROCESS = {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONSAFEPATH": "1"}


def trained(config: Config, groups: ProcessGroups) -> tuple[Trainable, Pruner, Any]:
    """A model that has taken three steps, and what takes another."""
    extension()  # loaded at the start of a run
    trainable = assemble(config.sections, groups, Shape.full(config.model), initialize=True)
    step = stepper(config, trainable, FixedBatch(config, groups.device), 0, False)
    for _ in range(3):
        step()
    return trainable, Pruner(config, trainable), step


def shrink(trainable: Trainable, pruner: Pruner, width: int) -> Any:
    """Compact every layer to ``width`` neurons, chosen at random as training would scatter them."""
    axis = "ffn_hidden_size"
    alive = torch.zeros_like(pruner.alive[axis])
    generator = torch.Generator().manual_seed(width)
    for layer, present in enumerate(pruner.alive[axis]):
        ids = present.nonzero().view(-1)
        alive[layer, ids[torch.randperm(len(ids), generator=generator)[:width]]] = True
    shape = trainable.shape.with_counts(axis, width)
    plan = Plan.of({**pruner.alive, axis: alive}, shape, pruner.memory)
    pruner.silence(trainable, plan)
    return pruner.compact(trainable, plan)


def widths_of(config: Config) -> list[int]:
    """Physical widths after each compaction of a run."""
    goal = config.goals["ffn_hidden_size"]
    return [*range(goal.full - goal.block, goal.target, -goal.block), goal.target]


def shrink_all(trainable: Trainable, pruner: Pruner, left: Shape) -> Any:
    """Compact along every axis at once, to what ``left`` stores; units are chosen at random."""
    draw = torch.Generator().manual_seed(0)
    alive = {}
    for axis, table in pruner.alive.items():
        count = left.counts(axis)[0]
        alive[axis] = torch.rand(table.shape, generator=draw).argsort(-1).argsort(-1) < count
    for axis in LAYER_AXES:
        alive[axis] &= alive["num_layers"][:, None]
    numbers = live_layers(alive)
    shape = trainable.shape.with_layers(numbers)
    for axis in (*LAYER_AXES, "hidden_size"):
        shape = shape.with_counts(axis, left.counts(axis)[0])
    plan = Plan.of(alive, shape, pruner.memory)
    pruner.silence(trainable, plan)
    return pruner.compact(trainable, plan)


def block_of_all(config: Config) -> Shape:
    """The enlarged shape less a layer, and less a sixteenth of every other axis."""
    left = Shape.full(config.model)
    left = left.with_counts("num_layers", left.num_layers - 1)
    for axis in (*LAYER_AXES, "hidden_size"):
        full = left.counts(axis)[0]
        left = left.with_counts(axis, full - max(1, full // 16))
    return left


def all_axes_against_steps(config: Config, groups: ProcessGroups, rounds: int) -> dict[str, float]:
    """One compaction that takes a block of every axis, against the step right before it."""
    left = block_of_all(config)
    steps, compactions = [], []
    for _ in range(rounds):
        trainable, pruner, step = trained(config, groups)
        begin = synchronized()
        step()
        between = synchronized()
        shrink_all(trainable, pruner, left)
        compactions.append(synchronized() - between)
        steps.append(between - begin)
        del trainable, pruner, step
        gc.collect()
    return ratio(compactions, steps)


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def against_steps(config: Config, groups: ProcessGroups) -> dict[str, float]:
    """Each compaction of the series against the step right before it."""
    trainable, pruner, step = trained(config, groups)
    steps, compactions = [], []
    for width in widths_of(config):
        begin = synchronized()
        step()
        between = synchronized()
        shrink(trainable, pruner, width)
        compactions.append(synchronized() - between)
        steps.append(between - begin)
        step = stepper(config, trainable, FixedBatch(config, groups.device), 0, False)
        step()  # the first one at a new width prepares buffers and kernels
    return ratio(compactions, steps)


OFFLINE = """
import sys, time
from pathlib import Path
from megatron_idea.checkpoint.compact import compact_checkpoint
begin = time.perf_counter()
compact_checkpoint(
    Path(sys.argv[1]), Path(sys.argv[2]), {"ffn_hidden_size": [int(sys.argv[3])]}
)
print(time.perf_counter() - begin)
"""


def against_disk(config: Config, groups: ProcessGroups, rounds: int) -> dict[str, Any]:
    """A live compaction against saving, compacting on disk (imports not counted) and loading."""
    width = widths_of(config)[0]
    live, disk, parts = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            here = configuration.replace(config, run_dir=folder)
            trainable, pruner, _ = trained(here, groups)
            state = TrainState.fresh(here)
            state.step = 3
            # Scores: without any it is not known which neurons matter.
            for averages in pruner.scores.average.values():
                averages["ffn_hidden_size"].uniform_()
            begin = synchronized()
            saved = checkpoint.save(here, trainable, pruner, state)
            save_s = synchronized() - begin
            out = Path(folder) / "compacted"
            command = [sys.executable, "-W", "ignore", "-c", OFFLINE, saved, out, width]
            done = subprocess.run(
                [str(c) for c in command],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
            )
            begin = synchronized()
            small = checkpoint.resolve(out)
            shape = checkpoint.read_state(small).shape
            again = assemble(here.sections, groups, shape, initialize=False)
            checkpoint.load(again, Pruner(here, again), small)
            load_s = synchronized() - begin
            del again
            gc.collect()  # what this round left is not the compaction's to collect
            begin = synchronized()
            shrink(trainable, pruner, width)
            live.append(synchronized() - begin)
            parts.append((save_s, float(done.stdout.split()[-1]), load_s))
            disk.append(sum(parts[-1]))
    medians = [statistics.median(part) for part in zip(*parts, strict=True)]
    names = ("save_ms", "compact_on_disk_ms", "load_ms")
    return ratio(live, disk) | {
        name: round(1e3 * s, 1) for name, s in zip(names, medians, strict=True)
    }


def memory(config: Config, groups: ProcessGroups) -> dict[str, Any]:
    """Highest memory of a training step and of each compaction of the series, in bytes."""
    # A rehearsal: code that is read in from libraries for the first time is resident memory too.
    small = configuration.replace(config, model={"num_layers": 1})
    rehearsed, pruner, _ = trained(small, groups)
    shrink(rehearsed, pruner, widths_of(small)[0])
    del rehearsed, pruner
    gc.collect()
    trainable, pruner, step = trained(config, groups)
    peak = PeakMemory()
    step()
    training_peak = peak.bytes
    state = sum(p.numel() for p in trainable.parameters) * (18 if trainable.core.bf16 else 16)
    events = []
    for width in widths_of(config):
        before = memory_bytes()
        report = shrink(trainable, pruner, width)
        events.append({"width": width, "before": before, "peak": report.peak_bytes})
    del trainable, pruner, step
    gc.collect()
    trainable, pruner, _ = trained(config, groups)
    before = memory_bytes()
    report = shrink_all(trainable, pruner, block_of_all(config))
    all_axes = report.peak_bytes - before
    return {
        "training_peak": training_peak,
        "state": state,
        "events": events,
        "all_axes_extra": all_axes,
    }


def memory_ratios(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Measured in a process of its own; the worst compaction counts."""
    command = [sys.executable, "-W", "ignore", __file__, "--memory", "--config", config_path]
    done = subprocess.run(
        [*command, *overrides],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | MEMORY_PROCESS,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    state, training_peak = measured["state"], measured["training_peak"]
    extra = max(e["peak"] - e["before"] for e in measured["events"])
    highest = max(e["peak"] for e in measured["events"])
    return {
        "extra_peak_to_state": {"ratio": round(extra / state, 4), "extra": extra, "state": state},
        "all_axes_extra_peak_to_state": {
            "ratio": round(measured["all_axes_extra"] / state, 4),
            "extra": measured["all_axes_extra"],
            "state": state,
        },
        "peak_to_training_peak": {
            "ratio": round(highest / training_peak, 4),
            "peak": highest,
            "training_peak": training_peak,
        },
    }


def growth_job(rendezvous: str, config: Config, width: int) -> dict[str, Any]:
    """Seconds and moved neurons of one compaction to ``width`` neurons."""
    quiet()
    with joined(config.parallel, config.training.seed, rendezvous) as groups:
        trainable, pruner, _ = trained(config, groups)
        report = shrink(trainable, pruner, width)
        parameters = sum(p.numel() for p in trainable.parameters)
        return {"parameters": parameters, "seconds": report.seconds, "moved": report.moved_units}


def growth(config: Config, folder: Path) -> list[dict[str, Any]]:
    """One factor at a time: twice and four times the layers, the width, the hidden size; TP."""
    model = config.model
    cases: list[tuple[str, dict[str, Any], int]] = [("base", {}, 1)]
    for factor in (2, 4):
        cases.append((f"layers x {factor}", {"num_layers": factor * model.num_layers}, 1))
        cases.append((f"width x {factor}", {"ffn_hidden_size": factor * model.ffn_hidden_size}, 1))
        cases.append((f"hidden x {factor}", {"hidden_size": factor * model.hidden_size}, 1))
    cases.append(("TP 2", {}, 2))
    cases.append(("TP 2, layers x 4", {"num_layers": 4 * model.num_layers}, 2))
    pool, rows = Workers(folder), []
    try:
        for name, changes, tp in cases:
            # Short sequences: the compaction is measured, not the steps before it.
            case = configuration.replace(
                config,
                model=changes,
                training={"seq_length": 32, "micro_batch_size": 1, "global_batch_size": 1},
                parallel={"tensor_model_parallel_size": tp},
            )
            width = 15 * case.model.ffn_hidden_size // 16
            measured = [pool.run(growth_job, tp, case, width)[0] for _ in range(3)]
            middle = statistics.median(m["seconds"] for m in measured)
            rows.append({"case": name, **measured[0], "seconds": round(middle, 4)})
            print(rows[-1], flush=True)
    finally:
        pool.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="examples/configs/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="print the memory's figures alone")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    gc.freeze()  # as in a run: collections do not visit what was imported
    overrides = ["parallel.tensor_model_parallel_size=1", "schedule.total_tokens=1e9"]
    config = configuration.load(arguments.config, [*overrides, *arguments.overrides])
    try:
        with joined(config.parallel, config.training.seed) as groups:
            if arguments.memory:
                print(json.dumps(memory(config, groups)))
                return
            measured: dict[str, Any] = {"compaction_to_step": against_steps(config, groups)}
            measured["all_axes_to_step"] = all_axes_against_steps(config, groups, arguments.rounds)
            measured["live_to_disk"] = against_disk(config, groups, arguments.rounds)
    finally:
        gc.unfreeze()
    measured |= memory_ratios(arguments.config, arguments.overrides)
    with tempfile.TemporaryDirectory() as folder:
        measured["growth"] = growth(config, Path(folder))
    write(result_file("compaction"), measured, GOALS)


if __name__ == "__main__":
    main()
