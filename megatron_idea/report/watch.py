"""A run in the terminal, live: read from its folder, so from any machine that sees the disk."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_idea.config import Config, ConfigError, load
from megatron_idea.course import flops_per_token, remaining_flops
from megatron_idea.records.read import EVENTS, METRICS, SAMPLES, is_record, read_events
from megatron_idea.records.readable import human_count, human_duration
from megatron_idea.records.terminal import Console

# Steps that speed and time left are averaged over.
RECENT_STEPS = 20

# Losses that are kept for the sparkline; when there are more, every second one goes.
MOST_LOSSES = 4096

# A run that has written nothing for so many of its steps, or seconds if that is longer.
SILENT_STEPS, SILENT_S = 10, 120.0

# Wider frames are no easier to read.
MOST_COLUMNS = 110

# What a frame needs of a record; a line without it is none.
NEEDED = {
    "step", "tokens", "phase", "loss", "lr", "keep_ratio", "ffn_live", "ffn_width", "grad_norm",
    "tokens_per_s", "step_s",
}  # fmt: skip

SPARKS = "▁▂▃▄▅▆▇█"
PHASE_STYLE = {"enlarged": "blue", "prune": "dark_orange", "recover": "green"}


class Tail:
    """The lines that a JSONL file has gained; a half-written last one waits for its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The new records, and whether the file was cut: a resumed run drops what it runs again.

        After a cut the records are all that the file has.
        """
        size = self.path.stat().st_size if self.path.is_file() else 0
        was_cut = size < self._offset
        if was_cut:
            self._offset = 0
        if size == self._offset:
            return [], was_cut
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = map(_parsed, whole.splitlines())
        return [record for record in records if is_record(self.path.name, record)], was_cut


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # another process cut the file while it was read
        return None


class View:
    """What is known of a run, and how it looks."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.config: Config | None = None
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        self.losses: list[float] = []
        self.events: list[dict[str, Any]] = []
        self.sample: dict[str, Any] | None = None
        self._stride = 1
        self._metrics = Tail(run_dir / METRICS)
        self._samples = Tail(run_dir / SAMPLES)
        self._events_size = -1

    def refresh(self) -> None:
        """Read what the run has written since."""
        if self.config is None and (self.run_dir / "config.yaml").is_file():
            self.config = load(self.run_dir / "config.yaml")
        records, was_cut = self._metrics.read()
        if was_cut:
            self.recent.clear()
            self.losses, self._stride = [], 1
        for record in records:
            if not record.keys() >= NEEDED:
                continue
            if len(record["ffn_live"]) != len(record["ffn_width"]):
                continue
            self.recent.append(record)
            if record["step"] % self._stride == 0:
                self.losses.append(record["loss"])
            if len(self.losses) > MOST_LOSSES:
                self.losses, self._stride = self.losses[1::2], 2 * self._stride
        events = self.run_dir / EVENTS
        size = events.stat().st_size if events.is_file() else 0
        if size != self._events_size:
            self.events, self._events_size = read_events(self.run_dir, []), size
        texts = [one for one in self._samples.read()[0] if "text" in one]
        # Of several prompts the first: the same one at every look.
        first = [one for one in texts if one.get("step") == texts[-1].get("step")]
        self.sample = first[0] if first else self.sample

    @property
    def is_finished(self) -> bool:
        return bool(self.events) and any(e["kind"] == "finished" for e in self.events)

    def render(self, now: float, width: int = 80, height: int = 40) -> RenderableType:
        """One frame.

        Args:
            now: seconds since 1970.
            width: columns of the terminal.
            height: its rows; where there are few, layers and events are left out.
        """
        width = min(width, MOST_COLUMNS)
        inside = max(20, width - 4)
        parts: list[RenderableType] = []
        if self.config is None or not self.recent:
            waiting = "its first step" if self.config else "config.yaml"
            parts.append(Text(f"waiting for {waiting}", style="dim"))
        else:
            parts += [
                self._progress(self.config, inside),
                Text(),
                self._numbers(inside),
                Text(),
                Text.assemble(("loss ", "bold"), self._sparkline(inside - 5)),
                *self._widths(self.config, inside, most=max(3, min(12, height - 26))),
            ]
        if self.sample and height >= 30:
            parts += [Text(), self._sample(self.sample, 2 * inside)]
        if self.events:
            parts += [Text(), self._last_events(now, most=6 if height >= 30 else 3)]
        return Panel(
            Group(*parts),
            title=Text.assemble((self.run_dir.resolve().name, "bold"), f"  {self._state(now)}"),
            title_align="left",
            width=width,
        )

    def _state(self, now: float) -> str:
        if self.is_finished:
            return "finished"
        if self.events and self.events[-1]["kind"] == "signal":
            return "stopped, can be resumed"
        metrics = self.run_dir / METRICS
        if not self.recent or not metrics.is_file():
            return "starting"
        silent_s = now - metrics.stat().st_mtime
        usual_s = statistics.median(record["step_s"] for record in self.recent)
        if silent_s > max(SILENT_S, SILENT_STEPS * usual_s):
            return f"silent for {human_duration(silent_s)}"
        return "running"

    def _progress(self, config: Config, width: int) -> RenderableType:
        last, total = self.recent[-1], config.schedule.total_tokens
        style = PHASE_STYLE.get(last["phase"], "blue")
        tokens = f"{human_count(last['tokens'])} of {human_count(total)} tokens"
        is_done = self.is_finished or last["tokens"] >= total
        left = "" if is_done else f"ETA {human_duration(self._eta_s(config))}"
        share = f"  {min(1.0, last['tokens'] / total):.1%}  "
        phase, more = (last["phase"], f"bold {style}"), f"{tokens}  step {last['step']:,}"
        head = Text.assemble(phase, share, f"{more}  ", (left, "bold"))
        if len(head) > width:
            head = Text.assemble(phase, share, (left, "bold"), f"\n{more}")
        bar = ProgressBar(
            total, min(last["tokens"], total), width=width, complete_style=style,
            finished_style=style,
        )  # fmt: skip
        return Group(head, bar)

    def _eta_s(self, config: Config) -> float:
        """From the FLOP/s of the last steps: the model that is left to train is smaller."""
        seconds = sum(record["step_s"] for record in self.recent)
        flops = sum(
            record["tokens_per_s"]
            * record["step_s"]
            * flops_per_token(config.model, record["ffn_width"], config.training.seq_length)
            for record in self.recent
        )
        if not flops:
            return math.inf
        return remaining_flops(config, self.recent[-1]["tokens"]) * seconds / flops

    def _numbers(self, width: int) -> RenderableType:
        last = self.recent[-1]
        losses = [r["loss"] for r in self.recent if math.isfinite(r["loss"])]
        held_out = [e for e in self.events if e["kind"] == "evaluated" and "val_loss" in e]
        speed = statistics.median(record["tokens_per_s"] for record in self.recent)
        step_s = statistics.median(record["step_s"] for record in self.recent)
        cells = [
            ("loss", f"{statistics.fmean(losses):.4f}" if losses else "not a number"),
            ("held-out loss", f"{held_out[-1]['val_loss']:.4f}" if held_out else "-"),
            ("learning rate", f"{last['lr']:.2e}"),
            ("keep ratio", f"{last['keep_ratio']:.3f}"),
            ("tokens/s", human_count(speed)),
            ("step", f"{step_s:.3g} s"),
            ("memory", f"{(last.get('memory_bytes') or math.nan) / 1e9:.2f} GB"),
            ("MFU", f"{last['mfu']:.1%}" if last.get("mfu") else "-"),
            ("gradient norm", f"{last['grad_norm']:.3g}"),
            ("skipped steps", f"{last.get('skipped', 0):d}"),
        ]
        columns = 1 if width < 50 else 2 if width < 100 else 3
        table = Table.grid(padding=(0, 2))
        for row in _rows(cells, columns):
            table.add_row(*(part for name, value in row for part in (Text(name, "dim"), value)))
        return table

    def _sparkline(self, width: int) -> Text:
        return Text(sparkline(self.losses, width), style="blue")

    def _widths(self, config: Config, width: int, most: int) -> list[RenderableType]:
        """Live and masked neurons of each layer as bars; one bar where all layers are alike.

        ``most``: bars; of more layers so many are chosen evenly over the depth.
        """
        last, full = self.recent[-1], config.model.ffn_hidden_size
        pairs = list(zip(last["ffn_live"], last["ffn_width"], strict=True))
        names = [f"layer {i}" for i in range(len(pairs))]
        if len(set(pairs)) == 1:
            pairs, names = pairs[:1], ["every layer"]
        elif len(pairs) > most:
            chosen = [round(i * (len(pairs) - 1) / (most - 1)) for i in range(most)]
            pairs, names = [pairs[i] for i in chosen], [names[i] for i in chosen]
        room = max(5, width - 12 - 24)
        lines = [Text("FFN neurons, live and masked", "bold")]
        for name, (live, physical) in zip(names, pairs, strict=True):
            bars = min(room, round(room * live / full))
            masked = min(room, round(room * physical / full)) - bars
            gone = room - bars - masked
            lines.append(
                Text.assemble(
                    f"{name:<12}", ("█" * bars, "green"), ("▒" * masked, "dark_orange"),
                    ("·" * gone, "dim"), f" {live:,} of {physical:,}",
                )
            )  # fmt: skip
        return [Text(), *lines]

    def _sample(self, sample: dict[str, Any], room: int) -> Text:
        """The newest text on two lines."""
        prompt, text = (" ".join(str(sample.get(key, "")).split()) for key in ("prompt", "text"))
        begin = f"writes at step {sample.get('step', 0):,}: "
        shown = Text.assemble((begin, "bold"), (prompt, "dim"), " " if prompt else "", text)
        shown.truncate(room - 4, overflow="ellipsis")
        return shown

    def _last_events(self, now: float, most: int) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for event in self.events[-most:]:
            ago = human_duration(max(0.0, now - event.get("time", now)))
            table.add_row(Text(f"{ago} ago", "dim"), Text(describe(event)))
        return table


def _rows(cells: Sequence[tuple[str, str]], columns: int) -> list[Sequence[tuple[str, str]]]:
    return [cells[i : i + columns] for i in range(0, len(cells), columns)]


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a row of at most ``width`` blocks, means of neighbours; gaps are blanks.

    The scale leaves the highest tenth out: the first fall would hide everything after it.
    """
    if not values or width < 1:
        return ""
    edges = [i * len(values) // width for i in range(width + 1)]
    groups = [values[a:b] for a, b in itertools.pairwise(edges) if b > a]
    means = []
    for group in groups:
        finite = [v for v in group if math.isfinite(v)]
        means.append(statistics.fmean(finite) if finite else math.nan)
    known = sorted(v for v in means if math.isfinite(v))
    if not known:
        return " " * len(means)
    low, high = known[0], known[int(0.9 * (len(known) - 1))]
    span = (high - low) or 1.0
    return "".join(
        SPARKS[round(7 * min(1.0, (v - low) / span))] if math.isfinite(v) else " " for v in means
    )


def describe(event: dict[str, Any]) -> str:
    """An event in a few words; one of another version, or half of one, by its name."""
    try:
        return _describe(event)
    except (KeyError, TypeError, ValueError):
        return str(event["kind"])


def _describe(event: dict[str, Any]) -> str:
    kind, step = event["kind"], f"step {event.get('step', 0):,}"
    if kind == "evaluated":
        return f"held-out loss {event['val_loss']:.4f} at {step}"
    if kind == "compacted":
        before, after = (round(statistics.fmean(event[f"widths_{w}"])) for w in ("before", "after"))
        return f"compacted {before:,} to {after:,} neurons per layer at {step}"
    if kind == "saved":
        return f"saved {step} in {event['seconds']:.1f} s"
    if kind == "spike":
        return f"loss spike at {step}: {event['loss']:.3f}"
    if kind == "signal":
        return f"stopped by {event.get('name', 'a signal')} after {step}"
    if kind == "rolled_back":
        return f"rolled back from step {event['from_step']:,} to {step}"
    return f"{kind} at {step}" if "step" in event else kind


def watch(
    run_dir: Path,
    *,
    once: bool = False,
    every_s: float = 1.0,
    console: Console | None = None,
) -> None:
    """Show a run until it is finished or the reader leaves; one frame with ``once``.

    Raises: ConfigError when there is no such folder.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a folder; give the run_dir of a run")
    console = console or Console()
    view = View(run_dir)
    view.refresh()
    if once:
        width = console.width if console.is_terminal else MOST_COLUMNS
        console.print(view.render(time.time(), width), soft_wrap=True)
        return
    # Ctrl-C is how one leaves.
    try:
        with Live(
            view.render(time.time(), console.width, console.height),
            console=console,
            auto_refresh=False,
        ) as live:
            while not view.is_finished:
                time.sleep(every_s)
                view.refresh()
                live.update(view.render(time.time(), console.width, console.height), refresh=True)
    except KeyboardInterrupt:
        return
