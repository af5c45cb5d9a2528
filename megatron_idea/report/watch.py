"""Show a run live in the terminal, from any machine that sees its folder."""

from __future__ import annotations

import itertools
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
from megatron_idea.records.progress import RECENT_STEPS, time_left_s
from megatron_idea.records.read import EVENTS, METRICS, SAMPLES, lines_of, metrics_of, read_events
from megatron_idea.records.readable import human_amount, human_count, human_duration, human_mean
from megatron_idea.records.record import Record, mean_count
from megatron_idea.records.terminal import Console
from megatron_idea.report.events import describe
from megatron_idea.report.run import pruned_axes
from megatron_idea.shape import LAYER_AXES, UNITS, Shape

# Losses that are kept for the sparkline; when there are more, every second one goes.
MOST_LOSSES = 4096

# A run that has written nothing for so many of its steps, or seconds if that is longer.
SILENT_STEPS, SILENT_S = 10, 120.0

# Wider frames are no easier to read.
MOST_COLUMNS = 110

SPARKS = "▁▂▃▄▅▆▇█"
PHASE_STYLE = {"enlarged": "blue", "prune": "dark_orange", "recover": "green"}


class View:
    """Keeps what is known of a run, and draws it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.config: Config | None = None
        self.recent: deque[Record] = deque(maxlen=RECENT_STEPS)
        self.losses: list[float] = []
        self.events: list[dict[str, Any]] = []
        self.sample: dict[str, Any] | None = None
        self._stride = 1
        self._metrics = metrics_of(run_dir, [])
        self._samples = lines_of(run_dir, SAMPLES, [])
        self._events_size = 0

    def refresh(self) -> None:
        """Read what the run has recorded since the last call."""
        if self.config is None:
            if not (self.run_dir / "config.yaml").is_file():
                return
            self.config = load(self.run_dir / "config.yaml")
        if self._metrics.begins_again():
            self.recent.clear()
            self.losses, self._stride = [], 1
        for record in self._metrics:
            if not record.is_of(self.config.model):
                continue
            self.recent.append(record)
            if record.step % self._stride == 0:
                self.losses.append(record.loss)
            if len(self.losses) > MOST_LOSSES:
                self.losses, self._stride = self.losses[1::2], 2 * self._stride
        events = self.run_dir / EVENTS
        if events.is_file() and events.stat().st_size != self._events_size:
            self.events, self._events_size = read_events(self.run_dir, []), events.stat().st_size
        self._samples.begins_again()
        texts = [one for one in self._samples if "text" in one]
        # Of several prompts the first: the same one at every look.
        first = [one for one in texts if one["step"] == texts[-1]["step"]]
        self.sample = first[0] if first else self.sample

    @property
    def is_finished(self) -> bool:
        """Tell whether the run has recorded its end."""
        return any(event["kind"] == "finished" for event in self.events)

    def render(self, now: float, width: int = 80, height: int = 40) -> RenderableType:
        """Draw one frame.

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
            sparks = Text(sparkline(self.losses, inside - 5), style="blue")
            parts += [self._progress(self.config, inside), Text(), self._numbers(inside), Text()]
            parts += [Text.assemble(("loss ", "bold"), sparks)]
            parts += self._units(self.config, inside, height)
        if self.sample and height >= 30:
            parts += [Text(), _written(self.sample, 2 * inside)]
        if self.events:
            parts += [Text(), self._last_events(now, most=6 if height >= 30 else 3)]
        title = Text.assemble((self.run_dir.resolve().name, "bold"), f"  {self._state(now)}")
        return Panel(Group(*parts), title=title, title_align="left", width=width)

    def _state(self, now: float) -> str:
        if self.is_finished:
            return "finished"
        if self.events and self.events[-1]["kind"] == "signal":
            return "stopped, can be resumed"
        metrics = self.run_dir / METRICS
        if not self.recent or not metrics.is_file():
            return "starting"
        silent_s = now - metrics.stat().st_mtime
        usual_s = statistics.median(record.step_s for record in self.recent)
        is_silent = silent_s > max(SILENT_S, SILENT_STEPS * usual_s)
        return f"silent for {human_duration(silent_s)}" if is_silent else "running"

    def _progress(self, config: Config, width: int) -> RenderableType:
        last, total = self.recent[-1], config.schedule.total_tokens
        done = min(last.tokens, total)
        style = PHASE_STYLE.get(last.phase, "blue")
        is_done = self.is_finished or done == total
        left = "" if is_done else f"ETA {human_duration(time_left_s(config, self.recent))}"
        tokens = f"{human_count(last.tokens)} of {human_count(total)} tokens  step {last.step:,}"
        phase, share = (last.phase, f"bold {style}"), f"  {done / total:.1%}  "
        head = Text.assemble(phase, share, f"{tokens}  ", (left, "bold"))
        if len(head) > width:
            head = Text.assemble(phase, share, (left, "bold"), f"\n{tokens}")
        bar = ProgressBar(total, done, width=width, complete_style=style, finished_style=style)
        return Group(head, bar)

    def _numbers(self, width: int) -> RenderableType:
        last = self.recent[-1]
        losses = [record.loss for record in self.recent if math.isfinite(record.loss)]
        held_out = [e for e in self.events if e["kind"] == "evaluated" and "val_loss" in e]
        cells = [
            ("loss", f"{statistics.fmean(losses):.4f}" if losses else "not a number"),
            ("held-out loss", f"{held_out[-1]['val_loss']:.4f}" if held_out else "-"),
            ("learning rate", f"{last.lr:.2e}"),
            ("removed", f"{last.removed:.1%}"),
            ("tokens/s", human_count(statistics.median(r.tokens_per_s for r in self.recent))),
            ("step", f"{statistics.median(r.step_s for r in self.recent):.3g} s"),
            ("memory", human_amount(last.memory_bytes, "B") if last.memory_bytes else "-"),
            ("MFU", f"{last.mfu:.1%}" if last.mfu else "-"),
            ("gradient norm", f"{last.grad_norm:.3g}"),
            ("skipped steps", f"{last.skipped:,}"),
            *(
                (name, f"{value:.4f}")
                for name, value in (
                    ("KL from teacher", last.kl),
                    ("teacher's loss", last.teacher_loss),
                    ("acceptance", last.acceptance),
                )
                if value is not None
            ),
        ]
        columns = 1 if width < 50 else 2 if width < 100 else 3
        grid = Table.grid(padding=(0, 2))
        for begin in range(0, len(cells), columns):
            row = cells[begin : begin + columns]
            grid.add_row(*(part for name, value in row for part in (Text(name, "dim"), value)))
        return grid

    def _units(self, config: Config, width: int, height: int) -> list[RenderableType]:
        """Draw the axes that are pruned: their layers where there is room, else a line each."""
        last = self.recent[-1]
        full = Shape.full(config.model)
        axes = pruned_axes(config, last)
        by_layer = sum(axis in LAYER_AXES for axis in axes)
        # What is left beside the rest of the frame, and a heading and a bar of each further axis.
        room = height - 26 - 3 * (len(axes) - 1)
        most = max(3, min(12, room // max(1, by_layer)))
        lines: list[RenderableType] = []
        if len(axes) > 1 and room < 2 * by_layer:
            lines += [Text(), Text("units, live and still stored", "bold")]
            for axis in axes:
                live, stored = mean_count(last.live[axis]), mean_count(last.stored[axis])
                lines.append(_bar(f"{UNITS[axis]}s", live, stored, full.counts(axis)[0], width))
            return lines
        for axis in axes:
            lines += [Text(), Text(f"{UNITS[axis]}s, live and still stored", "bold")]
            rows = zip(last.live[axis], last.stored[axis], strict=True)
            lines += _bars(axis, list(rows), full.counts(axis)[0], width, most)
            gone = [f"layer {number}" for number in _removed_layers(last)]
            if axis == "num_layers" and gone:
                named = Text(f"{'removed':<12}{', '.join(gone)}", "dim")
                named.truncate(width, overflow="ellipsis")
                lines.append(named)
        return lines

    def _last_events(self, now: float, most: int) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        for event in self.events[-most:]:
            ago = human_duration(max(0.0, now - event.get("time", now)))
            grid.add_row(Text(f"{ago} ago", "dim"), Text(describe(event)))
        return grid


def _removed_layers(record: Record) -> list[int]:
    rows = [record.live[axis] for axis in LAYER_AXES if axis in record.live]
    return [number for number, count in enumerate(rows[0]) if not count] if rows else []


def _bars(
    axis: str, pairs: Sequence[tuple[int, int]], full: int, width: int, most: int
) -> list[Text]:
    """Draw live and stored units as a bar a layer; one bar where layers are alike.

    ``most``: bars; of more layers so many are chosen evenly over the depth.
    """
    if axis not in LAYER_AXES:
        return [_bar("the model", *pairs[0], full, width)]
    there = [pair for pair in pairs if pair[0]]
    if len(set(there)) == 1:
        return [_bar("every layer", *there[0], full, width)]
    numbers = list(range(len(pairs)))
    if len(pairs) > most:
        numbers = [round(i * (len(pairs) - 1) / (most - 1)) for i in range(most)]
    return [
        _bar(f"layer {i}", *pairs[i], full, width)
        if pairs[i][0]
        else Text(f"{f'layer {i}':<12}removed", "dim")
        for i in numbers
    ]


def _bar(name: str, live: float, stored: float, full: int, width: int) -> Text:
    room = max(5, width - 12 - 24)
    bar = min(room, round(room * live / full))
    rest = max(0, min(room, round(room * stored / full)) - bar)
    return Text.assemble(
        f"{name:<12}", ("█" * bar, "green"), ("▒" * rest, "dark_orange"),
        ("·" * (room - bar - rest), "dim"), f" {human_mean(live)} of {human_mean(stored)}",
    )  # fmt: skip


def _written(sample: dict[str, Any], room: int) -> Text:
    """Cut the newest text to two lines."""
    prompt, text = (" ".join(str(sample.get(key, "")).split()) for key in ("prompt", "text"))
    begin = f"writes at step {sample['step']:,}: "
    shown = Text.assemble((begin, "bold"), (prompt, "dim"), " " if prompt else "", text)
    shown.truncate(room - 4, overflow="ellipsis")
    return shown


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values as a row of at most ``width`` blocks, means of neighbours; gaps are blanks.

    The scale leaves the highest tenth out: the first fall would hide everything after it.
    """
    if not values or width < 1:
        return ""
    edges = [i * len(values) // width for i in range(width + 1)]
    groups = [values[a:b] for a, b in itertools.pairwise(edges) if b > a]
    finite = [[v for v in group if math.isfinite(v)] for group in groups]
    means = [statistics.fmean(group) if group else math.nan for group in finite]
    known = sorted(v for v in means if math.isfinite(v)) or [0.0]
    low, high = known[0], known[int(0.9 * (len(known) - 1))]
    span = (high - low) or 1.0
    return "".join(
        SPARKS[round(7 * min(1.0, (v - low) / span))] if math.isfinite(v) else " " for v in means
    )


def watch(
    run_dir: Path,
    *,
    once: bool = False,
    every_s: float = 1.0,
    console: Console | None = None,
) -> None:
    """Show a run until it is finished or Ctrl-C is pressed; one frame with ``once``.

    Raises: ConfigError when there is no such folder.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a folder; give the run_dir of a run")
    console = console or Console()
    view = View(run_dir)
    view.refresh()
    if once:
        if not console.is_terminal:  # rich takes a file or a pipe to have 80 columns
            console.width = MOST_COLUMNS
        console.print(view.render(time.time(), console.width), soft_wrap=True)
        return

    def frame() -> RenderableType:
        return view.render(time.time(), console.width, console.height)

    try:
        with Live(frame(), console=console, auto_refresh=False) as live:
            while not view.is_finished:
                time.sleep(every_s)
                view.refresh()
                live.update(frame(), refresh=True)
    except KeyboardInterrupt:
        return
