"""How near the Triton kernels come to the memory's bandwidth, and what else computes the same.

    python benchmarks/kernels.py                  laid out for 8 minutes of an H100 or H200
    python benchmarks/kernels.py --quick          one shape and few rounds: does it run?
    python benchmarks/kernels.py --ahead-of-time  what is known without a GPU: the machine code

First every contender is compared with fp64, values and gradients. Then each is timed with CUDA
events, in rounds that alternate, over buffers that do not fit the cache together; forward and
backward apart, dy made beforehand. Clock ``queued`` fills the GPU's queue behind a wait, so the
kernels alone count; clock ``called`` counts what Python, autograd and launches cost as well.
GB/s are of the bytes that the mathematics must move, whatever a contender moves.

Without a GPU the comparison and the whole harness run on small shapes, and no figure is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor

from megatron_idea import config as configuration
from megatron_idea.cli import quiet
from megatron_idea.distributed import joined
from megatron_idea.kernels import FfnShard, ffn_scores
from megatron_idea.kernels.dispatch import can_launch, jit, launch, tl
from megatron_idea.optim import assemble
from megatron_idea.schedule import phase_ends
from megatron_idea.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's folder out

from gpu_clock import Call, Clock
from kernel_contenders import (
    PASSES,
    Contender,
    Inputs,
    Pass,
    contenders,
    runnable,
    score_formula,
)
from kernel_goals import Findings, Row
from machine_code import ahead_of_time
from measure import alternate, ratio
from training import FixedBatch, full_widths, stepper

# Out again: transformers looks for a package `kernels`, and would find this file.
sys.path[:] = [folder for folder in sys.path if folder != str(Path(__file__).parent)]


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
MODEL_2P8B = (32, 2560, 6912)
FULL = Protocol(
    shapes=tuple((tokens, width) for tokens in (16384, 4096, 65536) for width in WIDTHS),
    slow_shapes=(*((16384, width) for width in WIDTHS), (4096, 6912), (65536, 6912)),
    ffn=MODEL_2P8B,
)
QUICK = dataclasses.replace(
    FULL, shapes=((16384, 6912),), slow_shapes=((16384, 6912),), rounds=2, iterations=10
)
TINY = Protocol(((32, 24),), ((32, 24),), (2, 16, 24), rounds=2, iterations=2, buffer_bytes=2**17)


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
    """Rows of every shape, for as long as the budget of time lasts; those with baselines first."""
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
            rows = rows_of(inputs, here, clock, protocol, findings.bandwidth_gb_per_s["copy"])
        except torch.cuda.OutOfMemoryError as error:
            findings.left_out[name] = str(error).splitlines()[0]
            continue
        findings.rows += rows
        print(f"{name}: {len(rows)} medians", flush=True)


def rows_of(
    inputs: Inputs, here: list[Contender], clock: Clock, protocol: Protocol, copy_gb_per_s: float
) -> list[Row]:
    """Time every pass of every contender on one shape, by both clocks."""
    tokens, width = inputs.dys[0].shape
    itemsize = inputs.dys[0].element_size()
    calls: dict[Pass, dict[str, Call]] = {each: {} for each in PASSES}
    for contender in here:
        for each, call in inputs.calls(contender):
            for i in range(3):  # compiles
                call(i)
            calls[each][contender.name] = call
    alive = {contender.name: contender.alive for contender in here}
    counts = (protocol.rounds, protocol.iterations)
    rows = []
    for each, of_pass in calls.items():
        moved = each.bytes(tokens, width, itemsize, 1.0)
        ideal_ms = moved / copy_gb_per_s / 1e6
        rows.append(Row("copy", each.name, "queued", tokens, width, ideal_ms, copy_gb_per_s))
        for kind in ("queued", "called"):
            medians = clock.medians(of_pass, *counts, queued=kind == "queued")
            for name, s in medians.items():
                moved = each.bytes(tokens, width, itemsize, alive[name])
                rows.append(Row(name, each.name, kind, tokens, width, 1e3 * s, moved / s / 1e9))
    return rows


def draw_ffns(layers: int, hidden: int, f: int, device: torch.device) -> list[FfnShard]:
    """bf16 weights and fp32 gradients."""
    bf16 = {"dtype": torch.bfloat16, "device": device}
    return [
        FfnShard(
            f, hidden,
            torch.randn(2 * f * hidden, **bf16), torch.randn(2 * f * hidden, device=device), 0,
            torch.randn(f * hidden, **bf16), torch.randn(f * hidden, device=device), 0,
        )
        for _ in range(layers)
    ]  # fmt: skip


def measure_scores(
    implementation: str, clock: Clock, protocol: Protocol, findings: Findings, device: torch.device
) -> None:
    """One pass over the FFN weights of a rank: one table of all layers, or layer by layer."""
    layers, hidden, f = protocol.ffn
    layer_bytes = 3 * f * hidden * 6
    if clock.on_gpu:
        layers = min(layers, int(0.8 * torch.cuda.mem_get_info()[0] / layer_bytes))
    shards = draw_ffns(layers, hidden, f, device)
    compiled = torch.compile(score_formula, dynamic=False)

    def one_by_one(formula: Callable[..., Tensor]) -> Call:
        return lambda _: [formula(s.w1, s.g1, s.w2, s.g2, f) for s in shards]

    calls: dict[str, Call] = {
        "ours": lambda _: ffn_scores(shards, implementation=implementation),
        "eager": one_by_one(score_formula),
        "compile_static": one_by_one(compiled),
    }
    first = (t.double() for t in (shards[0].w1, shards[0].g1, shards[0].w2, shards[0].g2))
    law = score_formula(*first, f, torch.float64)
    for name, call in calls.items():
        assert_close(call(0)[0] / law, torch.ones_like(law), f"scores of {name}", 1e-5)
    # A pass lasts longer than its launches: the host is ahead without a wait.
    medians = clock.medians(calls, protocol.rounds, max(1, protocol.iterations // 5), queued=False)
    moved, read = layers * layer_bytes, findings.bandwidth_gb_per_s["read"]
    shape = (0, 3 * f * hidden * layers)
    findings.rows.append(Row("read", "scores", "queued", *shape, moved / read / 1e6, read))
    for name, s in medians.items():
        findings.rows.append(Row(name, "scores", "queued", *shape, 1e3 * s, moved / s / 1e9))
        if name == "ours" and (layers, hidden, f) == MODEL_2P8B:
            findings.figures["scores_ms"] = 1e3 * s
    for name, call in calls.items() if clock.on_gpu else ():
        suffix = "" if name == "ours" else f"_{name}"
        findings.figures[f"scores_launches{suffix}"] = count_launches(call)


def count_launches(call: Call) -> int:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call(0)
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


STEP = {
    "model": {"num_layers": 4, "hidden_size": 2560, "ffn_hidden_size": 6912,
              "num_attention_heads": 20, "num_query_groups": 4, "kv_channels": 128,
              "vocab_size": 32768},
    "training": {"seq_length": 4096, "micro_batch_size": 4, "global_batch_size": 4,
                 "precision": "bf16"},
    "schedule": {"total_tokens": 10**9},
    "prune": {"target_ffn_hidden_size": 3456, "compact": False},
}  # fmt: skip
TINY_STEP = {
    "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
              "num_query_groups": 2, "kv_channels": 8, "vocab_size": 264},
    "training": {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 2},
    "schedule": {"total_tokens": 10**6},
    "prune": {"target_ffn_hidden_size": 32, "compact": False},
}  # fmt: skip


def measure_step(protocol: Protocol, findings: Findings, on_gpu: bool) -> None:
    """Share of a training step that scores, plans and masks take, in the middle of pruning."""
    config = configuration.from_dict(STEP if on_gpu else TINY_STEP)
    with joined(config.parallel, config.training.seed) as groups:
        data = FixedBatch(config, groups.device)
        ends = phase_ends(config.schedule)
        middle = (ends["enlarged"] + ends["prune"]) // 2
        # Two models: each keeps its place in the schedule, and its masks.
        pruning, none = (
            assemble(config, groups, full_widths(config), initialize=True) for _ in range(2)
        )
        calls = {"pruning": stepper(pruning, data, middle, True),
                 "none": stepper(none, data, 0, False)}  # fmt: skip
        seconds = alternate(calls, rounds=4 * protocol.rounds)
    findings.figures["step_share"] = ratio(seconds["pruning"], seconds["none"])["ratio"] - 1


def measure(protocol: Protocol, device: torch.device, keep: bool) -> Findings:
    """Everything; ``keep`` writes what there is after each stage, as the next one may fail."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    implementation = "triton" if tl is not None and can_launch(device) else "reference"
    if on_gpu and implementation != "triton":
        raise SystemExit("there is a GPU but no Triton: pip install triton")
    # A graph is used many times: its buffers are not the compiler's to overwrite.
    torch._functorch.config.donated_buffer = False
    fuser = importlib.import_module("megatron.core.jit").jit_fuser
    found, left_out = contenders(implementation)
    clock = Clock(device)
    findings = Findings(left_out=left_out, fuser=f"{fuser.__module__}.{fuser.__qualname__}")
    print(f"ours: {implementation}; Megatron's fuser: {findings.fuser}")
    good = runnable(found, dtype, device, left_out)
    findings.bandwidth_gb_per_s = measure_bandwidth(clock, protocol, device)
    for stage in (
        lambda: measure_swiglu(good, clock, protocol, findings, dtype, device),
        lambda: measure_scores(implementation, clock, protocol, findings, device),
        lambda: measure_step(protocol, findings, on_gpu),
    ):
        stage()
        if keep:
            findings.save()
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds, no file")
    parser.add_argument("--ahead-of-time", action="store_true", help="compile, do not run")
    arguments = parser.parse_args()
    quiet()
    if arguments.ahead_of_time:
        ahead_of_time()
    elif torch.cuda.is_available():
        protocol = QUICK if arguments.quick else FULL
        findings = measure(protocol, torch.device("cuda", 0), keep=not arguments.quick)
        findings.show()
    else:
        findings = measure(TINY, torch.device("cpu"), keep=False)
        print(f"the harness made {len(findings.rows)} rows, all thrown away: there is no GPU")
        Findings(left_out=findings.left_out).show()


if __name__ == "__main__":
    main()
