"""Make the tables of a report: closing table, removals, cost, comparison, environment."""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Group

from megatron_idea.config import Config
from megatron_idea.records.readable import (
    human_amount,
    human_count,
    human_duration,
    human_mean,
    scaled,
    spread,
)
from megatron_idea.records.record import Record, mean_count
from megatron_idea.records.terminal import table
from megatron_idea.report.chart import Table, colours_of
from megatron_idea.report.cost import cost
from megatron_idea.report.events import describe
from megatron_idea.report.recovery import WINDOW_STEPS, Removal, removals
from megatron_idea.report.run import Run, labels, named, smooth
from megatron_idea.schedule import phase_ends
from megatron_idea.shape import UNITS

# Steps at the start of a stretch whose speed says nothing: warm-up, allocation, first compilation.
SETTLING_STEPS = 5


def closing(run: Run) -> Table:
    """Sum up a run: the model and its held-out loss at the ends of the phases, and its speed.

    A phase that the run has not ended has no column, and what was not measured no row.
    """
    moments = _moments(run)
    rows = [
        ("consumed tokens", [human_count(moment.tokens) for moment in moments.values()]),
        ("parameters", [run.parameters(moment) for moment in moments.values()]),
        *((named(axis), [_units(m, axis) for m in moments.values()]) for axis in run.axes),
        ("held-out loss", [_held_out(run, moment) for moment in moments.values()]),
        ("training tokens/s", _speeds(run, len(moments))),
    ]
    shown = [(name, *cells) for name, cells in rows if any(cells)]
    return Table("At a glance", ("", *moments), shown, _compaction_check(run))


def _moments(run: Run) -> dict[str, Record]:
    """Choose the records to show side by side, by the name of their column, oldest first."""
    ends = phase_ends(run.config.schedule)
    moments = {"start": dataclasses.replace(run.records[0], step=0, tokens=0)}
    for phase, name in (("enlarged", "enlarged"), ("prune", "pruned")) if run.prunes else ():
        index = bisect.bisect_left(run.records, ends[phase], key=lambda record: record.tokens)
        for record in run.records[index : index + 1]:
            # One that began from another run's checkpoint may have been there before.
            if record.tokens - run.config.batch_tokens < ends[phase]:
                moments[name] = record
    moments["end" if run.is_finished else "so far"] = run.records[-1]
    return moments


def _units(moment: Record, axis: str) -> str:
    stored, live = _range(moment.stored[axis]), _range(moment.live[axis])
    return stored if live == stored else f"{stored} (live {live})"


def _range(counts: Sequence[int]) -> str:
    """Write the count of all layers that are there, or their mean and the extremes."""
    low, high = min(filter(None, counts), default=0), max(counts)
    return str(low) if low == high else f"{_mean(counts)} [{low}-{high}]"


def _mean(counts: Sequence[int]) -> str:
    return human_mean(mean_count(counts)).replace(",", "")


def _held_out(run: Run, moment: Record) -> str:
    for event in run.evaluations():
        if event["step"] == moment.step:
            return f"{event['val_loss']:.4f}"
    return ""


def _speeds(run: Run, columns: int) -> list[str]:
    """Write the median tokens/s at full size and at the last size, in their columns."""
    first, last = run.records[0], run.records[-1]
    cells = [""] * columns
    cells[-1] = speed(run, last)
    if first.stored != last.stored:
        cells[1] = speed(run, first)
    return cells


def speed(run: Run, like: Record) -> str:
    """Write the median tokens/s in the shape of ``like``; empty where it was held too shortly."""
    speeds = [record.tokens_per_s for record in run.records if record.stored == like.stored]
    settled = speeds[SETTLING_STEPS:]
    return human_count(statistics.median(settled)) if settled else ""


def _compaction_check(run: Run) -> str:
    """Say how much compactions changed the held-out loss at most, where that was measured."""
    before = {e["step"]: e for e in run.of_kind("evaluated") if e.get("why") == "compaction_before"}
    after = {e["step"]: e for e in run.of_kind("evaluated") if e.get("why") == "compaction_after"}
    changes = [
        abs(after[step]["val_loss"] - before[step]["val_loss"]) for step in before if step in after
    ]
    if not changes:
        return ""
    return f"held-out loss changed by at most {max(changes):.1e} in {len(changes)} compactions"


def removed(run: Run) -> Table | None:
    """List what each removal did to the training loss, and the work of each compaction."""
    rows = [
        (
            f"{removal.what}, step {removal.step:,}",
            _jump(removal),
            _recovery(removal),
            _gone(removal),
            human_count(removal.tokens),
            *_effort(removal),
        )
        for removal in removals(run)
    ]
    if not rows:
        return None
    return Table(
        "Removals, and how the loss took them",
        ("event", "loss jump (nats)", "tokens to recover", "removed", "at tokens",
         "time", "moved units", "peak memory"),
        rows,
        f"Loss jump: mean training loss of {WINDOW_STEPS} steps after minus {WINDOW_STEPS} before, "
        "± its standard error; it includes the loss's own fall. Recovered: as many steps are on "
        "average no worse than those before. ~ where the jump is within two standard errors of 0: "
        "there both say more about noise than about the removal.",
    )  # fmt: skip


def _gone(removal: Removal) -> str:
    """Name the units before and after, along the axes that changed.

    A layer that goes is counted as a layer, and not as the neurons that it had.
    """
    pairs = ((axis, removal.before[axis], after) for axis, after in removal.after.items())
    return ", ".join(
        f"{spread(before)} → {spread(after)} {named(axis)}"
        for axis, before, after in pairs
        if any(now and was != now for was, now in zip(before, after, strict=True))
    )


def _jump(removal: Removal) -> str:
    if removal.loss_jump is None or removal.noise is None:
        return "-"
    return f"{removal.loss_jump:+.3f} ± {removal.noise:.3f}"


def _recovery(removal: Removal) -> str:
    if removal.loss_jump is None:
        return "-"
    if removal.recovery_tokens is None:
        return "~ not yet" if removal.is_noise else "not yet"
    if not removal.recovery_tokens:
        return "none needed"
    return f"{'~ ' if removal.is_noise else ''}{human_count(removal.recovery_tokens)}"


def _effort(removal: Removal) -> tuple[str, str, str]:
    event = removal.compaction or {}
    moved = [f"{event['moved_units']:,}"] if "moved_units" in event else []
    if layers := event.get("moved_layers"):
        moved.append(f"{layers:,} {'layer' if layers == 1 else 'layers'}")
    return (
        f"{event['seconds']:.2f} s" if "seconds" in event else "",
        ", ".join(moved),
        human_amount(event["peak_bytes"], "B") if event.get("peak_bytes") else "",
    )


def removed_layers(run: Run) -> Table | None:
    """List the layers that went, and the losses that decided it."""
    rows = []
    for event in run.removed_layers():
        losses = {int(number): loss for number, loss in event["losses"].items()}
        own = losses.pop(event["layer"], None)
        others = sorted(losses.items(), key=lambda item: (item[1], item[0]))[:MOST_CANDIDATES]
        rows.append(
            (
                f"layer {event['layer']}, step {event['step']:,}",
                "-" if own is None else f"{own:.4f}",
                ", ".join(f"{number}: {loss:.4f}" for number, loss in others) or "-",
                human_count(event["tokens"]),
            )
        )
    if not rows:
        return None
    return Table(
        "Layers removed, and the loss without each candidate",
        ("removed", "loss without it", "without another candidate", "at tokens"),
        rows,
        "Candidates are the layers of the least importance. Each is left out for one pass over the "
        "step's batch, and the one without which the loss is lowest goes; nats per token.",
    )


# Shown of a layer's rivals; prune.layer_candidates is 4 by default.
MOST_CANDIDATES = 8


def spent(run: Run) -> Table:
    """Sum up the training FLOPs so far, against runs over the same tokens, and the time."""
    sums = cost(run)
    scratch = sums.from_scratch[-1]
    lines = [("this run", sums.this_run[-1])]
    if run.is_taught:
        lines.append(("its teacher, forward passes", sums.teacher[-1]))
    if run.prunes:
        lines += [
            ("zeros only, nothing compacted", sums.zeros_only[-1]),
            ("ideal: removed is not computed", sums.ideal[-1]),
            ("target from scratch", scratch),
        ]
    rows = [
        (name, "not known", "-")
        if math.isnan(value)
        else (name, human_amount(value, "FLOPs"), f"{value / scratch:.2f}")
        for name, value in lines
    ]
    return Table(
        f"Compute for {human_count(run.tokens)} tokens",
        ("training run", "FLOPs", "x from scratch"),
        rows,
        _time(run),
    )


def _time(run: Run) -> str:
    """Say how long steps, compactions and saves took; the time of evaluations is not recorded."""
    seconds = sum(record.step_s for record in run.records)
    if not seconds:
        return ""
    parts = [f"Training steps took {human_duration(seconds)} {on_processes(run)}".rstrip()]
    compacting = sum(event.get("seconds", 0.0) for event in run.compactions())
    saving = sum(event.get("waited_s", 0.0) for event in run.of_kind("saved"))
    parts += [f"compactions {compacting:.1f} s"] if compacting else []
    parts += [f"waiting for checkpoints {saving:.1f} s"] if saving else []
    return ", ".join(parts) + "."


def on_processes(run: Run) -> str:
    """Say on how many processes the run trains, where it was recorded."""
    count = environment_of(run).get("processes")
    return f"on {count} {'process' if count == 1 else 'processes'}" if count else ""


def environment_of(run: Run) -> dict[str, Any]:
    """Return what the last process of the run recorded of its environment; empty without it."""
    for event in reversed(run.events):
        if event["kind"] in ("started", "resumed"):
            return event.get("environment", {})
    return {}


def passed_teacher(run: Run) -> str:
    """Say since when the model knows better than its teacher; empty where it does not."""
    passed = run.passed_teacher()
    if passed is None:
        return ""
    since, its_loss = passed
    return (
        f"The model has passed its teacher: from token {human_count(since['tokens'])} on its "
        f"held-out loss ({run.evaluations()[-1]['val_loss']:.4f} at last) is below the teacher's "
        f"({its_loss:.4f}). A lower distill.alpha_end lets go of the teacher earlier."
    )


def environment(run: Run) -> Table | None:
    """List the device, the processes and the versions that the run runs on."""
    found = environment_of(run)
    if not found:
        return None
    rows = [(name, str(found[name])) for name in ("device", "processes", "threads")]
    rows += [(name, str(version)) for name, version in found["versions"].items()]
    return Table("Environment", ("", ""), rows)


def incidents(run: Run) -> Table | None:
    """List what disturbed the run: stops, resumes, spikes, rollbacks, skipped steps."""
    rows = [(describe(event),) for event in run.events if event["kind"] in INCIDENTS]
    if skipped := run.records[-1].skipped:
        rows.append((f"{skipped:,} steps skipped in all",))
    left_out = len(rows) - MOST_INCIDENTS
    note = f"The last {MOST_INCIDENTS}; {left_out:,} more in events.jsonl." if left_out > 0 else ""
    return Table("Incidents", ("",), rows[-MOST_INCIDENTS:], note) if rows else None


INCIDENTS = {"resumed", "signal", "spike", "rolled_back", "damaged"}
MOST_INCIDENTS = 20


def compared(runs: Sequence[Run]) -> Table:
    """Compare runs, a row each."""
    every = [cost(run) for run in runs]
    totals = [sums.this_run[-1] for sums in every]
    divisor, unit = scaled(max(totals), "FLOPs")
    # One unit for all makes them comparable at a glance; not where it would leave nothing of some.
    alike = max(totals) < 1e4 * min(totals)
    axes = list(dict.fromkeys(axis for run in runs for axis in run.axes))
    rows = []
    for run, name, total in zip(runs, labels(runs), totals, strict=True):
        last = run.records[-1]
        losses = [event["val_loss"] for event in run.evaluations()]
        done = "" if run.is_finished else f" ({share(run):.0%})"
        training = smooth([record.loss for record in run.records[-200:]], window=99)[-1]
        rows.append(
            (
                name,
                human_count(run.tokens) + done,
                run.parameters(last),
                *(_mean(last.live[axis]) if axis in last.live else "-" for axis in axes),
                f"{losses[-1]:.4f}" if losses else "-",
                f"{training:.4f}",
                speed(run, last) or "-",
                f"{total / divisor:.3g}" if alike else human_amount(total, "FLOPs"),
            )
        )
    columns = ("run", "tokens", "params", *(f"{UNITS[axis]}s" for axis in axes))
    columns += ("held-out", "training", "tokens/s", unit if alike else "compute")
    return Table(
        "Runs side by side",
        columns,
        rows,
        "As the runs are now. Units are those alive, mean over layers. Held-out and training loss "
        "in nats per token; training: mean of the last 100 steps.",
        colours_of(len(runs)),
    )


def differences(runs: Sequence[Run]) -> Table | None:
    """List the settings in which runs differ, a row a run or, if these are fewer, a column."""
    every = [_flat(run.config) for run in runs]
    keys = [key for key in every[0] if len({str(settings[key]) for settings in every}) > 1]
    keys = [key for key in keys if key not in ("run_dir", "name")]
    if not keys:
        return None
    title, names = "What differs in their settings", labels(runs)
    cells = [[_setting(settings[key]) for settings in every] for key in keys]
    if len(keys) > len(runs):
        rows = [(key, *row) for key, row in zip(keys, cells, strict=True)]
        return Table(title, ("setting", *names), rows)
    rows = list(zip(names, *cells, strict=True))
    return Table(title, ("run", *keys), rows, "", colours_of(len(runs)))


def _flat(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in dataclasses.asdict(config).items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat


def _setting(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 100_000:
        return human_count(value)
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def share(run: Run) -> float:
    """Return how much of the run is done, in [0, 1]."""
    return min(1.0, run.tokens / run.config.schedule.total_tokens)


def in_terminal(given: Table) -> Group:
    """Lay out a table for a terminal, without its title."""
    return table(given.columns, given.rows, note=given.note)
