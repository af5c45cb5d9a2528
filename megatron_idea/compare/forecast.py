"""Say what a suite will cost before any of it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Group

from megatron_idea.compare.suite import ArmRun, Suite, end_of, flops
from megatron_idea.course import shape_at
from megatron_idea.engine.gpus import Gpu
from megatron_idea.records.readable import human_count
from megatron_idea.records.terminal import table


@dataclass(frozen=True)
class ArmCost:
    """An arm: what each of its runs is, and what all of them cost, without what another arm did."""

    arm: str
    starts_from: str
    """An arm and where it leaves it; empty for the seed."""
    parameters: tuple[int, ...]
    """Where it begins; several where the sweep changes them."""
    parameters_at_end: tuple[int, ...]
    runs: int
    tokens: int
    """Of all runs."""
    flops: float | None
    """Of all runs, teacher included; None where its size is not known."""
    gpu_hours: float | None


def costs(suite: Suite, gpu: Gpu, mfu: float) -> list[ArmCost]:
    """Work out what each arm costs, over all seeds and values of the sweep.

    Args:
        mfu: share of the GPU's peak bf16 FLOP/s, an assumption.
    """
    return [_cost([run for run in suite.runs if run.arm == arm], gpu, mfu) for arm in suite.arms]


def _cost(runs: list[ArmRun], gpu: Gpu, mfu: float) -> ArmCost:
    first = runs[0]
    total = _sum(flops(run, run.begins, end_of(run.config)) for run in runs)
    at = first.config.start_from.rpartition("@")[2]
    return ArmCost(
        arm=first.arm,
        starts_from=f"{first.source.arm}@{at}" if first.source else "",
        parameters=_distinct(_parameters(run.source or run, run.begins) for run in runs),
        parameters_at_end=_distinct(_parameters(run, end_of(run.config)) for run in runs),
        runs=len(runs),
        tokens=sum(end_of(run.config) - run.begins for run in runs),
        flops=total,
        gpu_hours=None if total is None else total / (gpu.peak_flops * mfu) / 3600,
    )


def _parameters(run: ArmRun, tokens: int) -> int:
    return shape_at(run.config, tokens).parameters(run.config.model).total


def _distinct(counts: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(counts)))


def render(suite: Suite, arms: list[ArmCost], gpu: Gpu, mfu: float) -> Group:
    """Lay the costs out for a terminal, with their sum."""
    rows = [
        (
            one.arm,
            one.starts_from or "seed",
            " to ".join(map(human_count, one.parameters)),
            " to ".join(map(human_count, one.parameters_at_end)),
            str(one.runs),
            human_count(one.tokens / one.runs),
            _flops(None if one.flops is None else one.flops / one.runs),
            _flops(one.flops),
            _hours(one.gpu_hours),
        )
        for one in arms
    ]
    runs = str(len(suite.runs))
    tokens = human_count(sum(one.tokens for one in arms) / len(suite.runs))
    total, hours = _sum(one.flops for one in arms), _sum(one.gpu_hours for one in arms)
    rows.append(("all", "", "", "", runs, tokens, "", _flops(total), _hours(hours)))
    columns = (
        "arm", "starts from", "parameters", "at the end", "runs", "tokens a run", "FLOPs a run",
        "FLOPs", "GPU-hours",
    )  # fmt: skip
    values = f"; {suite.sweep[0]} {', '.join(suite.sweep[1])}" if suite.sweep else ""
    note = (
        f"seeds {', '.join(map(str, suite.seeds))}{values}. FLOPs are an arm's own, "
        f"teacher included, without what it takes over. GPU-hours: {gpu.name} at {mfu:.0%} of "
        f"{gpu.peak_flops / 1e12:g} TFLOP/s, an assumption."
    )
    return table(columns, rows, title=str(suite.path), note=note, left=2)


def _sum(amounts: Iterable[float | None]) -> float | None:
    """Add up; None where one is not known."""
    each = list(amounts)
    known = [one for one in each if one is not None]
    return sum(known) if len(known) == len(each) else None


def _flops(count: float | None) -> str:
    return "not known" if count is None else f"{count:.2e}"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "not known"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
