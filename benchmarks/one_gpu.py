"""Steps and a compaction of a large shape on one GPU: speed, memory, a trace.

    python -W ignore benchmarks/one_gpu.py examples/configs/2p8b_to_1p3b.yaml [key.sub=value ...]

The step of the enlarged model and of the small one (on random tokens, one micro-batch), with the
model FLOPs utilization where the device's peak is known; the same with megatron-core's own layers
where Transformer Engine's are the ones that a run uses; and one compaction of the enlarged model by
a block, against the step before it. What does not fit the memory is said and left out. What is
measured is written at once, to `results/one-gpu-DEVICE.json` or what ``--json`` names; ``--trace
FILE`` writes a trace of one step, too, for chrome://tracing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_idea import config as configuration
from megatron_idea.config import Config
from megatron_idea.course import target_shape
from megatron_idea.engine import model as engine_model
from megatron_idea.engine.core_versions import quiet
from megatron_idea.engine.distributed import PeakMemory, ProcessGroups, joined
from megatron_idea.engine.gpus import peak_flops
from megatron_idea.engine.trainable import assemble
from megatron_idea.shape import Shape

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

from compaction import shrink, synchronized, trained
from measure import keep, result_file
from training import FixedBatch, stepper

ONE_GPU = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=1",
    "training.micro_batch_size=1",
    "training.global_batch_size=1",
    "schedule.total_tokens=1e12",
)


def steps(
    config: Config, groups: ProcessGroups, shape: Shape, rounds: int, trace: Path | None = None
) -> dict[str, Any]:
    """Time whole optimizer steps of one shape; memory is the highest while they ran."""
    peak = PeakMemory()
    trainable = assemble(config.sections, groups, shape, initialize=True)
    step = stepper(config, trainable, FixedBatch(config, groups.device), 0, False)
    for _ in range(3):
        step()
    seconds = []
    for _ in range(rounds):
        begin = synchronized()
        step()
        seconds.append(synchronized() - begin)
    if trace is not None:
        with torch.profiler.profile() as profiled:
            step()
            synchronized()
        profiled.export_chrome_trace(str(trace))
        print(trace)
    median = statistics.median(seconds)
    flops = config.batch_tokens * shape.flops_per_token(config.model, config.training.seq_length)
    most = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    found = {
        "parameters": shape.parameters(config.model).total,
        "step_s": round(median, 5),
        "tokens_per_s": round(config.batch_tokens / median),
        "mfu": None if most is None else round(flops / median / most, 4),
        "peak_bytes": peak.bytes,
    }
    trainable.release()
    return found


def compaction(config: Config, groups: ProcessGroups) -> dict[str, Any]:
    """Time the compaction by one block of neurons in every layer, and the step before it."""
    trainable, pruner, step = trained(config, groups)
    begin = synchronized()
    step()
    between = synchronized()
    goal = config.goals["ffn_hidden_size"]
    report = shrink(trainable, pruner, goal.full - goal.block)
    seconds = synchronized() - between
    found = {
        "seconds": round(seconds, 5),
        "to_step": round(seconds / (between - begin), 4),
        "peak_bytes": report.peak_bytes,
        "neurons": [goal.full, goal.full - goal.block],
    }
    trainable.release()
    return found


def tried(name: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call, print and return; of what fails, or does not fit the memory, say so."""
    try:
        found = call()
    except torch.OutOfMemoryError as error:
        found = {"does_not_fit": str(error).splitlines()[0]}
    except Exception as error:  # of any part of the engine: the others can still be measured
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{name:<44} {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_intermixed_args()
    quiet()
    config = configuration.load(given.config, [*ONE_GPU, *given.overrides])
    full, small = Shape.full(config.model), target_shape(config)
    file = given.json or result_file("one-gpu")
    measured: dict[str, dict[str, Any]] = {}

    def measure(name: str, call: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        measured[name] = tried(name, lambda: call(config, groups, *arguments))
        keep(file, {"measured": measured})

    with joined(config.parallel, config.training.seed) as groups:
        with_engine = engine_model.uses_transformer_engine()
        layers = {"transformer-engine" if with_engine else "megatron-core": lambda: with_engine}
        if with_engine:
            layers["megatron-core"] = lambda: False
        trace = given.trace
        for name, uses in layers.items():
            engine_model.uses_transformer_engine = uses
            measure(f"small, {name}", steps, small, given.rounds)
            measure(f"enlarged, {name}", steps, full, given.rounds, trace)
            trace = None
        engine_model.uses_transformer_engine = lambda: with_engine
        measure("compaction", compaction)
    sys.exit(any("failed" in found for found in measured.values()))


if __name__ == "__main__":
    main()
