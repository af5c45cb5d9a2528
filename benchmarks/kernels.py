"""How near the Triton kernels come to the memory's bandwidth, and what else computes the same.

    python benchmarks/kernels.py            laid out for 8 minutes of an H100 or H200
    python benchmarks/kernels.py --quick    one shape and few rounds, keeps nothing: does it run?

Writes `results/kernels-DEVICE.json`, or what ``--json`` names, after every shape.

First every contender is compared with fp64, values and gradients. Then each is timed with CUDA
events, in rounds that alternate, over buffers that do not fit the cache together; forward and
backward apart, dy made beforehand. The GPU's queue is filled behind a wait, so that the kernels
alone count. GB/s are of the bytes that the mathematics must move, whatever a contender moves.

Without a GPU the comparison and the whole harness run on small shapes, and no figure is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._functorch.config

from megatron_idea import config as configuration
from megatron_idea.engine.core_versions import quiet
from megatron_idea.engine.distributed import joined
from megatron_idea.engine.trainable import assemble
from megatron_idea.kernels.dispatch import can_launch, jit, launch, tl
from megatron_idea.schedule import phase_ends
from megatron_idea.shape import Shape

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

from gpu_clock import Call, Clock
from kernel_contenders import (
    PASSES,
    Contender,
    Inputs,
    contenders,
    draw_ffns,
    runnable,
    score_calls,
)
from measure import alternate, ratio, result_file, write
from training import FixedBatch, stepper

# Out again: transformers looks for a package `kernels`, and would find this file.
sys.path[:] = [folder for folder in sys.path if folder != str(Path(__file__).parent)]

BOTH = tuple(PASSES)
# Name: ours, the other, passes taken together, and how much of the other's time ours may take.
GOALS = {
    "forward_to_copy": ("ours", "copy", ("forward",), 1.09),
    "backward_to_copy": ("ours", "copy", ("backward",), 1.11),
    "to_compile_static": ("ours", "compile_static", BOTH, 1.02),
    "to_compile_dynamic": ("ours", "compile_dynamic", BOTH, 0.83),
    "to_megatron_mask": ("ours", "megatron_mask", BOTH, 0.74),
    "to_eager": ("ours", "eager", BOTH, 0.25),
    "unmasked_to_liger": ("ours_unmasked", "liger", BOTH, 1.00),
    "to_liger_mask": ("ours", "liger_mask", BOTH, 0.74),
    "scores_to_read": ("ours", "read", ("scores",), 1.14),
    "scores_to_compile": ("ours", "compile_static", ("scores",), 0.91),
    "scores_to_eager": ("ours", "eager", ("scores",), 0.25),
}
STEP_GOAL = {"step_with_pruning_to_without": 1.01}
LARGE = 64 * 2**20
"""Tokens x width: smaller launches cannot fill an H200, and are not judged."""


@dataclass(frozen=True)
class Protocol:
    shapes: tuple[tuple[int, int], ...]
    """Tokens, width."""
    slow_shapes: tuple[tuple[int, int], ...]
    ffn: tuple[int, int, int]
    """Layers, hidden size and width whose scores are taken."""
    rounds: int = 5
    iterations: int = 50
    buffer_bytes: int = 2**30
    """For the bandwidth; a quarter of it is the least that the rotating buffers hold together."""
    budget_s: float = 330.0
    """After which no further shape is begun: scores and step need two minutes more."""


WIDTHS = (704, 1408, 5632, 6912, 14336, 14848)
FULL = Protocol(
    shapes=tuple((tokens, width) for tokens in (16384, 4096, 65536) for width in WIDTHS),
    slow_shapes=(*((16384, width) for width in WIDTHS), (4096, 6912), (65536, 6912)),
    ffn=(32, 2560, 6912),
)
QUICK = dataclasses.replace(
    FULL, shapes=((16384, 6912),), slow_shapes=((16384, 6912),), rounds=2, iterations=10
)
TINY = Protocol(((32, 24),), ((32, 24),), (2, 16, 24), rounds=2, iterations=2, buffer_bytes=2**17)


@dataclass
class Findings:
    """Medians, and what there is none of."""

    bandwidth_gb_per_s: dict[str, float]
    left_out: dict[str, str]
    fuser: str
    file: Path | None
    """Where they are kept; None: nowhere."""
    rows: dict[tuple[str, str, int, int], tuple[float, float]] = field(default_factory=dict)
    """Contender, pass, tokens, width (for scores: 0, number of weights): ms, GB/s."""
    step: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, contender: str, what: str, shape: tuple[int, int], s: float, moved: int) -> None:
        self.rows[contender, what, *shape] = (1e3 * s, moved / s / 1e9)

    def judged(self) -> dict[str, dict[str, object]]:
        """Of every goal the worst ratio over the large shapes on which both were measured."""
        found: dict[str, dict[str, object]] = dict(self.step)
        shapes = {(tokens, width) for _, _, tokens, width in self.rows}
        for name, (ours, other, passes, _) in GOALS.items():
            ratios = {}
            for shape in shapes:
                keys = [[(who, what, *shape) for what in passes] for who in (ours, other)]
                large = shape[0] == 0 or math.prod(shape) >= LARGE
                if large and all(key in self.rows for pair in keys for key in pair):
                    mine, theirs = (sum(self.rows[key][0] for key in pair) for pair in keys)
                    ratios[shape] = mine / theirs
            if ratios:
                worst = max(ratios, key=ratios.__getitem__)
                found[name] = {"ratio": round(ratios[worst], 4), "tokens x width": list(worst)}
        return found

    def save(self) -> None:
        if self.file is None:
            return
        limits = {name: at_most for name, (*_, at_most) in GOALS.items()} | STEP_GOAL
        judged = self.judged()
        content = {
            "bandwidth_gb_per_s": self.bandwidth_gb_per_s,
            "left_out": self.left_out,
            "fuser": self.fuser,
            **judged,
            "columns": "contender pass tokens width ms gb_per_s",
            "rows": [
                " ".join([*map(str, key), f"{ms:.5g}", f"{gb_per_s:.5g}"])
                for key, (ms, gb_per_s) in self.rows.items()
            ],
        }
        write(self.file, content, {name: limits[name] for name in limits if name in judged})


@jit
def _read_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """One number a program, of BLOCK * STEPS."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        total += tl.load(x_ptr + first + step * BLOCK)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def measure_bandwidth(clock: Clock, protocol: Protocol, device: torch.device) -> dict[str, float]:
    """GB/s of a copy and of a read, of each the fastest way there is."""
    size = protocol.buffer_bytes
    sources, sinks = ([torch.zeros(size // 4, device=device) for _ in range(2)] for _ in range(2))
    calls: dict[str, Call] = {
        "copy engine": lambda i: sinks[i % 2].copy_(sources[i % 2]),
        "copy kernel": lambda i: torch.neg(sources[i % 2], out=sinks[i % 2]),
        "read, torch": lambda i: sources[i % 2].sum(),
    }
    if can_launch(device):
        programs = size // 4 // (2048 * 8)
        shape = {"BLOCK": 2048, "STEPS": 8, "num_warps": 4}
        calls["read, triton"] = lambda i: launch(
            _read_kernel, programs, device, sources[i % 2], sinks[0], **shape
        )
    for call in calls.values():
        call(0)
    took = clock.medians(calls, protocol.rounds, protocol.iterations, queued=True)
    fastest = {
        kind: min(s for name, s in took.items() if name.startswith(kind))
        for kind in ("copy", "read")
    }
    return {
        "copy": round(2 * size / fastest["copy"] / 1e9, 3),
        "read": round(size / fastest["read"] / 1e9, 3),
    }


def measure_swiglu(
    good: list[Contender],
    clock: Clock,
    protocol: Protocol,
    findings: Findings,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Every shape, for as long as the budget of time lasts; those with baselines first."""
    deadline = time.monotonic() + protocol.budget_s
    for shape in sorted(protocol.shapes, key=lambda shape: shape not in protocol.slow_shapes):
        name = "{} x {}".format(*shape)
        if time.monotonic() > deadline:
            findings.left_out[name] = f"more than {protocol.budget_s:g} s had passed"
            continue
        here = [c for c in good if not c.slow or shape in protocol.slow_shapes]
        torch.compiler.reset()  # else torch.compile would go dynamic at the second shape
        try:
            inputs = Inputs.draw(*shape, dtype, device, protocol.buffer_bytes // 4)
            measure_shape(inputs, here, clock, protocol, findings)
        except torch.cuda.OutOfMemoryError as error:
            findings.left_out[name] = str(error).splitlines()[0]
        findings.save()
        print(f"{name}: {len(findings.rows)} medians", flush=True)


def measure_shape(
    inputs: Inputs, here: list[Contender], clock: Clock, protocol: Protocol, findings: Findings
) -> None:
    calls = {contender.name: inputs.calls(contender) for contender in here}
    shape = (tokens, width) = tuple(inputs.dys[0].shape)
    for what, elements in PASSES.items():
        of_pass = {name: by_pass[what] for name, by_pass in calls.items()}
        for call in of_pass.values():
            for i in range(3):  # compiles
                call(i)
        medians = clock.medians(of_pass, protocol.rounds, protocol.iterations, queued=True)
        moved = elements * tokens * width * inputs.dys[0].element_size()
        ideal = moved / findings.bandwidth_gb_per_s["copy"] / 1e9
        for name, s in {"copy": ideal, **medians}.items():
            findings.add(name, what, shape, s, moved)


def measure_scores(
    implementation: str, clock: Clock, protocol: Protocol, findings: Findings, device: torch.device
) -> None:
    """One pass over the FFN weights of a rank."""
    layers, hidden, f = protocol.ffn
    layer_bytes = 3 * f * hidden * 6
    if clock.on_gpu:
        layers = min(layers, int(0.8 * torch.cuda.mem_get_info()[0] / layer_bytes))
    calls = score_calls(draw_ffns(layers, hidden, f, device), implementation)
    # A pass lasts longer than its launches: the host is ahead without a wait.
    medians = clock.medians(calls, protocol.rounds, max(1, protocol.iterations // 5), queued=False)
    moved = layers * layer_bytes
    ideal = moved / findings.bandwidth_gb_per_s["read"] / 1e9
    for name, s in {"read": ideal, **medians}.items():
        findings.add(name, "scores", (0, 3 * f * hidden * layers), s, moved)


STEP = {
    "model": {"num_layers": 4, "hidden_size": 2560, "ffn_hidden_size": 6912,
              "num_attention_heads": 20, "num_query_groups": 4, "kv_channels": 128,
              "vocab_size": 32768},
    "training": {"seq_length": 4096, "micro_batch_size": 4, "global_batch_size": 4,
                 "precision": "bf16"},
    "schedule": {"total_tokens": 10**9},
    "prune": {"target": {"ffn_hidden_size": 3456}, "compact": False},
}  # fmt: skip
TINY_STEP = {
    "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
              "num_query_groups": 2, "kv_channels": 8, "vocab_size": 264},
    "training": {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 2},
    "schedule": {"total_tokens": 10**6},
    "prune": {"target": {"ffn_hidden_size": 32}, "compact": False},
}  # fmt: skip


def measure_step(protocol: Protocol, findings: Findings, on_gpu: bool) -> None:
    """A training step with scores, plans and masks, in the middle of pruning, to one without."""
    config = configuration.from_dict(STEP if on_gpu else TINY_STEP)
    with joined(config.parallel, config.training.seed) as groups:
        data = FixedBatch(config, groups.device)
        ends = phase_ends(config.schedule)
        middle = (ends["enlarged"] + ends["prune"]) // 2
        # Two models: each keeps its place in the schedule, and its masks.
        pruning, none = (
            assemble(config.sections, groups, Shape.full(config.model), initialize=True)
            for _ in range(2)
        )
        calls = {"pruning": stepper(config, pruning, data, middle, True),
                 "none": stepper(config, none, data, 0, False)}  # fmt: skip
        seconds = alternate(calls, rounds=4 * protocol.rounds)
    (name,) = STEP_GOAL
    findings.step[name] = ratio(seconds["pruning"], seconds["none"])


def measure(protocol: Protocol, device: torch.device, file: Path | None) -> Findings:
    """Everything; what there is is kept after each stage and shape, as the next one may fail."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    implementation = "triton" if tl is not None and can_launch(device) else "reference"
    if on_gpu and implementation != "triton":
        raise SystemExit("there is a GPU but no Triton: pip install triton")
    # A graph is used many times: its buffers are not the compiler's to overwrite.
    torch._functorch.config.donated_buffer = False
    fuser = importlib.import_module("megatron.core.jit").jit_fuser
    clock = Clock(device)
    found, left_out = contenders(implementation)
    fuser_name = f"{fuser.__module__}.{fuser.__qualname__}"
    findings = Findings(measure_bandwidth(clock, protocol, device), left_out, fuser_name, file)
    print(f"ours: {implementation}; Megatron's fuser: {findings.fuser}")
    good = runnable(found, dtype, device, left_out)
    for stage in (
        lambda: measure_swiglu(good, clock, protocol, findings, dtype, device),
        lambda: measure_scores(implementation, clock, protocol, findings, device),
        lambda: measure_step(protocol, findings, on_gpu),
    ):
        stage()
        findings.save()
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds, no file")
    parser.add_argument("--json", type=Path, help="file to write; default: in results/")
    arguments = parser.parse_args()
    quiet()
    on_gpu = torch.cuda.is_available()
    protocol = TINY if not on_gpu else QUICK if arguments.quick else FULL
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    file = (arguments.json or result_file("kernels")) if protocol is FULL else None
    findings = measure(protocol, device, file)
    for name, reason in findings.left_out.items():
        print("left out:", name, "-", reason)
    if not on_gpu:
        print(f"the harness made {len(findings.rows)} medians, all thrown away: there is no GPU")
    elif arguments.quick:
        for name, found in findings.judged().items():
            print(f"{name:<30}", found)


if __name__ == "__main__":
    main()
