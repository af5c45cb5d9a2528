"""The progress line of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from megatron_idea.config import Config
from megatron_idea.course import flops_per_token, remaining_flops
from megatron_idea.records.readable import human_count, human_duration
from megatron_idea.records.terminal import Console


class Progress:
    """The run at a glance: phase, loss, learning rate, keep ratio, tokens/s, time left.

    One live line at the foot of a terminal. Where standard error is not a terminal: a plain line
    at each phase change and about every ten seconds.
    """

    PLAIN_INTERVAL_S = 10.0
    # Of the FLOP/s average, per step: about the last twenty steps count.
    SMOOTHING = 0.95

    def __init__(
        self,
        config: Config,
        enabled: bool,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``enabled``: this rank is the one that speaks. ``logging.progress`` is heeded too."""
        self.config = config
        self.enabled = enabled and config.logging.progress
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._printed_at = float("-inf")
        self._phase = ""
        self._flops = self._seconds = 0.0
        self._bar: RichProgress | None = None
        if self.enabled and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.fields[phase]:<8}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f} %  {task.fields[text]}"),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task(
                "", total=config.schedule.total_tokens, phase="", text="starting"
            )
            self._bar.start()

    def update(self, record: dict[str, Any]) -> None:
        """Show the record of the step that has just ended."""
        if not self.enabled:
            return
        self._measure(record)
        if self._bar is not None:
            text = self._text(record)
            self._bar.update(
                self._task, completed=record["tokens"], phase=record["phase"], text=text
            )
        elif (
            record["phase"] != self._phase
            or self._clock() - self._printed_at >= self.PLAIN_INTERVAL_S
        ):
            self._printed_at = self._clock()
            share = record["tokens"] / self.config.schedule.total_tokens
            self._print(f"{record['phase']:<8} {share:4.0%}  {self._text(record)}")
        self._phase = record["phase"]

    def note(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self.enabled:
            self._print(text)

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        # soft_wrap: a log line stays one line, however narrow rich believes the pipe to be.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _measure(self, record: dict[str, Any]) -> None:
        tokens = record["tokens_per_s"] * record["step_s"]
        per_token = flops_per_token(
            self.config.model, record["ffn_width"], self.config.training.seq_length
        )
        self._flops = self.SMOOTHING * self._flops + tokens * per_token
        self._seconds = self.SMOOTHING * self._seconds + record["step_s"]

    def _text(self, record: dict[str, Any]) -> str:
        left = remaining_flops(self.config, record["tokens"])
        eta_s = left * self._seconds / self._flops if self._flops else float("inf")
        return (
            f"loss {record['loss']:.3f}  lr {record['lr']:.1e}  keep {record['keep_ratio']:.2f}  "
            f"{human_count(record['tokens_per_s'])} tok/s  ETA {human_duration(eta_s)}"
        )
