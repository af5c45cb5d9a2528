"""The tables of a report: closing table, removals, cost, comparison, environment."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import rich.table

from megatron_idea.estimate import human_count
from megatron_idea.metrics import human_duration
from megatron_idea.report.chart import Table
from megatron_idea.report.cost import cost
from megatron_idea.report.recovery import WINDOW_STEPS, Removal, removals
from megatron_idea.report.run import Run, smooth, spread
from megatron_idea.schedule import PHASES, phase_ended

# Steps at the start of a stretch whose speed says nothing: warm-up, allocation, first compilation.
SETTLING_STEPS = 5


def closing(run: Run) -> Table:
    """Sum up a run: the model and its held-out loss at the ends of the phases, and its speed.

    Only what was measured is shown: a moment that the run has not reached has no column.
    """
    moments = _moments(run)
    rows = [
        ("consumed tokens", [human_count(moment["tokens"]) for moment in moments.values()]),
        ("parameters", [run.parameters(moment) for moment in moments.values()]),
        ("FFN width", [_width(moment) for moment in moments.values()]),
        ("held-out loss", [_held_out(run, moment) for moment in moments.values()]),
        ("training tokens/s", _speeds(run, len(moments))),
    ]
    shown = [(name, *cells) for name, cells in rows if any(cells)]
    return Table("At a glance", ("", *moments), shown, _compaction_check(run))


def _moments(run: Run) -> dict[str, dict[str, Any]]:
    """The records a reader wants side by side, by the name of their column, oldest first."""
    schedule, batch = run.config.schedule, run.config.batch_tokens
    moments = {"start": {**run.records[0], "step": 0, "tokens": 0}}
    if run.prunes:
        names = dict(zip(PHASES[:2], ("enlarged", "pruned"), strict=True))
        for record in run.records:
            ended = phase_ended(schedule, record["tokens"] - batch, record["tokens"])
            if ended in names:
                moments[names[ended]] = record
    moments["end" if run.is_finished else "so far"] = run.records[-1]
    return moments


def _width(moment: dict[str, Any]) -> str:
    width, live = _range(moment["ffn_width"]), _range(moment["ffn_live"])
    return width if live == width else f"{width} ({live} live)"


def _range(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low}-{high}"


def _held_out(run: Run, moment: dict[str, Any]) -> str:
    for event in run.evaluations():
        if event["step"] == moment["step"]:
            return f"{event['val_loss']:.4f}"
    return ""


def _speeds(run: Run, columns: int) -> list[str]:
    """Median tokens/s at the full width under the column in which it ends, and at the last one."""
    cells = [""] * columns
    cells[-1] = speed(run, run.records[-1]["ffn_width"])
    if run.records[0]["ffn_width"] != run.records[-1]["ffn_width"]:
        cells[1] = speed(run, run.records[0]["ffn_width"])
    return cells


def speed(run: Run, ffn_width: Sequence[int]) -> str:
    """Median tokens/s at these widths; nothing when they were not held for long enough."""
    speeds = [r["tokens_per_s"] for r in run.records if r["ffn_width"] == ffn_width]
    settled = speeds[SETTLING_STEPS:]
    return human_count(statistics.median(settled)) if settled else ""


def _compaction_check(run: Run) -> str:
    """The largest change of held-out loss by a compaction, where it was measured on both sides."""
    before = {e["step"]: e for e in run.of_kind("evaluated") if e["why"] == "compaction_before"}
    after = {e["step"]: e for e in run.of_kind("evaluated") if e["why"] == "compaction_after"}
    changes = [
        abs(after[step]["val_loss"] - before[step]["val_loss"]) for step in before if step in after
    ]
    if not changes:
        return ""
    return f"held-out loss changed by at most {max(changes):.1e} in {len(changes)} compactions"


def removed(run: Run) -> Table | None:
    """What each removal did to the training loss, and what it took."""
    rows = [
        (
            f"{removal.what}, step {removal.step:,}",
            human_count(removal.tokens),
            f"{spread(removal.before)} → {spread(removal.after)}",
            _jump(removal),
            _recovery(removal),
            *_effort(removal),
        )
        for removal in removals(run)
    ]
    if not rows:
        return None
    return Table(
        "Removals, and how the loss took them",
        ("event", "tokens", "FFN neurons per layer", "loss jump (nats)", "tokens to recover",
         "time", "moved neurons", "peak memory"),
        rows,
        f"Loss jump: mean training loss of {WINDOW_STEPS} steps after minus {WINDOW_STEPS} before, "
        "± its standard error; it includes the loss's own fall. Recovered: as many steps are on "
        "average no worse than those before.",
    )  # fmt: skip


def _jump(removal: Removal) -> str:
    if removal.loss_jump is None or removal.noise is None:
        return "-"
    return f"{removal.loss_jump:+.3f} ± {removal.noise:.3f}"


def _recovery(removal: Removal) -> str:
    if removal.loss_jump is None:
        return "-"
    if removal.recovery_tokens is None:
        return "not yet"
    return human_count(removal.recovery_tokens) if removal.recovery_tokens else "none needed"


def _effort(removal: Removal) -> tuple[str, str, str]:
    event = removal.compaction or {}
    return (
        f"{event['seconds']:.2f} s" if "seconds" in event else "",
        f"{event['moved_neurons']:,}" if "moved_neurons" in event else "",
        _bytes(event["peak_bytes"]) if "peak_bytes" in event else "",
    )


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def spent(run: Run) -> Table:
    """Training FLOPs so far, against runs over the same tokens."""
    sums = cost(run)
    scratch = sums.from_scratch[-1]
    lines = [("this run", sums.this_run[-1])]
    if run.prunes:
        lines += [
            ("masks only, nothing compacted", sums.masks_only[-1]),
            ("ideal: masked is not computed", sums.ideal[-1]),
            ("target width from scratch", scratch),
        ]
    rows = [(name, f"{value:.2e}", f"{value / scratch:.2f}") for name, value in lines]
    processes = _processes(run)
    note = ""
    if processes:
        seconds = sum(record.get("step_s", 0.0) for record in run.records)
        note = (
            f"Training steps took {human_duration(seconds)} on {processes} "
            f"{'process' if processes == 1 else 'processes'}."
        )
    return Table(
        f"Compute for {human_count(run.tokens)} tokens",
        ("training run", "FLOPs", "x target from scratch"),
        rows,
        note,
    )


def _processes(run: Run) -> int | None:
    return _environment(run).get("processes")


def _environment(run: Run) -> dict[str, Any]:
    """Of the last process that worked on the run; empty for records from before it was noted."""
    for event in reversed(run.events):
        if event["kind"] in ("started", "resumed"):
            return event.get("environment", {})
    return {}


def environment(run: Run) -> Table | None:
    """What the run runs on."""
    found = _environment(run)
    if not found:
        return None
    rows = [(name, str(found[name])) for name in ("device", "processes", "threads")]
    rows += [(name, str(version)) for name, version in found["versions"].items()]
    return Table("Environment", ("", ""), rows)


def compared(runs: Sequence[Run]) -> Table:
    """One row a run, to hold them against each other."""
    rows = []
    for run in runs:
        last = run.records[-1]
        losses = [event["val_loss"] for event in run.evaluations()]
        done = "" if run.is_finished else f" ({share(run):.0%})"
        rows.append(
            (
                run.name,
                human_count(run.tokens) + done,
                run.parameters(last),
                _range(last["ffn_live"]),
                f"{losses[-1]:.4f}" if losses else "-",
                f"{smooth([record['loss'] for record in run.records[-200:]])[-1]:.4f}",
                speed(run, last["ffn_width"]) or "-",
                f"{cost(run).this_run[-1]:.2e}",
            )
        )
    return Table(
        "Runs side by side",
        ("run", "tokens", "parameters", "FFN", "held-out", "training", "tokens/s", "FLOPs"),
        rows,
        "As the runs are now. FFN: live neurons per layer. Held-out and training loss in nats per "
        "token, the training loss smoothed.",
    )


def share(run: Run) -> float:
    """How much of the run is done."""
    return min(1.0, run.tokens / run.config.schedule.total_tokens)


def in_terminal(table: Table) -> rich.table.Table:
    """For a console: without a title, the first column to the left."""
    drawn = rich.table.Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(table.columns):
        drawn.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    if table.note:
        # A table is as wide as its cells, and its caption no wider: up to a line give it room.
        drawn.caption, drawn.caption_justify = table.note, "left"
        drawn.min_width = min(len(table.note), 76)
    return drawn
