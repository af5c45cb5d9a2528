"""What was measured of the kernels, and which of their goals it reaches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from measure import write


@dataclass(frozen=True)
class Goal:
    """``ours`` takes ``at_least`` times less than ``over``, or a figure is ``at_most`` so much."""

    name: str
    at_least: float = 0.0
    ours: str = ""
    over: str = ""
    passes: tuple[str, ...] = ("forward", "backward")
    at_most: float = 0.0
    figure: str = ""


# Smaller launches cannot fill an H200.
LARGE = 64 * 2**20
GOALS = (
    Goal("forward, of copy", 0.92, "ours", "copy", ("forward",)),
    Goal("backward, of copy", 0.90, "ours", "copy", ("backward",)),
    Goal("over torch.compile, static", 0.98, "ours", "compile_static"),
    Goal("over torch.compile, dynamic", 1.20, "ours", "compile_dynamic"),
    Goal("over Megatron and a mask", 1.35, "ours", "megatron_mask"),
    Goal("over eager", 4.00, "ours", "eager"),
    Goal("over Liger, unmasked", 1.00, "ours_unmasked", "liger"),
    Goal("over Liger and a mask", 1.35, "ours", "liger_mask"),
    Goal("backward with h and dm, of copy", 0.88, "ours_h_dm", "copy", ("backward_h_dm",)),
    Goal("with h and dm, over compile", 1.30, "ours_h_dm", "compile_h_dm", ("backward_h_dm",)),
    Goal("half skipped, over compile", 1.35, "ours_skip", "compile_static"),
    Goal("scores, of read", 0.88, "ours", "read", ("scores",)),
    Goal("scores, over eager", 4.00, "ours", "eager", ("scores",)),
    Goal("scores, over compile", 1.10, "ours", "compile_static", ("scores",)),
    Goal("scores of the 2.8B model, ms", at_most=2.8, figure="scores_ms"),
    Goal("scores, launches", at_most=3, figure="scores_launches"),
    Goal("scores and masks, of a step", at_most=0.01, figure="step_share"),
    # Nothing in kernels/ gathers live neurons within a step yet.
    Goal("gather, of copy", 0.80, "gather", "copy", ("gather",)),
    Goal("gathered FFN, half dead, over dense", 1.80, "gather", "dense", ("ffn_half",)),
    Goal("gathered FFN, a quarter dead", 1.25, "gather", "dense", ("ffn_quarter",)),
)


@dataclass(frozen=True)
class Row:
    """A median; ``tokens`` is 0 for the scores, whose ``width`` counts their weights."""

    contender: str
    what: str
    clock: str
    tokens: int
    width: int
    ms: float
    gb_per_s: float

    def __str__(self) -> str:
        values = dataclasses.astuple(self)
        return " ".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in values)


@dataclass
class Findings:
    bandwidth_gb_per_s: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    fuser: str = ""

    def ms(self, contender: str, passes: tuple[str, ...], shape: tuple[int, int]) -> float:
        """Kernel time of the passes together; NaN where one was not measured."""
        taken = {
            row.what: row.ms
            for row in self.rows
            if (row.contender, row.clock, (row.tokens, row.width)) == (contender, "queued", shape)
        }
        return sum(taken.get(name, math.nan) for name in passes)

    def speedups(self, goal: Goal) -> dict[tuple[int, int], float]:
        """Of every large shape on which both were measured."""
        shapes = {(row.tokens, row.width) for row in self.rows if row.what in goal.passes}
        ratios = {
            shape: self.ms(goal.over, goal.passes, shape) / self.ms(goal.ours, goal.passes, shape)
            for shape in sorted(shapes)
            if shape[0] == 0 or math.prod(shape) >= LARGE
        }
        return {shape: value for shape, value in ratios.items() if not math.isnan(value)}

    def judge(self, goal: Goal) -> dict[str, Any]:
        """The verdict; of several shapes the worst counts."""
        at = ""
        if goal.figure:
            value, limit = self.figures.get(goal.figure), f"<= {goal.at_most:g}"
            reached = value is not None and value <= goal.at_most
        else:
            speedups, limit = self.speedups(goal), f">= {goal.at_least:g}"
            worst = min(speedups, key=speedups.__getitem__, default=None)
            value = None if worst is None else speedups[worst]
            at = "{} x {}".format(*worst) if worst and worst[0] else ""
            reached = value is not None and value >= goal.at_least
        return {
            "goal": goal.name,
            "limit": limit,
            "value": None if value is None else round(value, 4),
            "verdict": "not measured" if value is None else "reached" if reached else "not reached",
            "worst_at": at,
        }

    def show(self) -> None:
        for name, reason in self.left_out.items():
            print("left out:", name, "-", reason)
        for goal in GOALS:
            verdict = {k: "" if v is None else v for k, v in self.judge(goal).items()}
            line = "{goal:<36} {limit:<8} {value:<8} {verdict:<13} {worst_at}"
            print(line.format(**verdict).rstrip())

    def save(self) -> None:
        content = {name: value for name, value in vars(self).items() if name != "rows"}
        content["goals"] = [self.judge(goal) for goal in GOALS]
        content["columns"] = " ".join(field.name for field in dataclasses.fields(Row))
        content["rows"] = [str(row) for row in self.rows]
        write("kernels", content, {})
