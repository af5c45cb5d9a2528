"""Show how far a run is, in one line."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from megatron_idea.config import Config
from megatron_idea.course import own_teacher, remaining_flops, teacher_flops_between
from megatron_idea.records.readable import human_count, human_duration
from megatron_idea.records.record import Record
from megatron_idea.records.terminal import Console

# Steps that speed and time left are averaged over.
RECENT_STEPS = 20


def time_left_s(config: Config, recent: Sequence[Record]) -> float:
    """Estimate the seconds to the run's end from the FLOP/s of its last steps.

    Not from their tokens/s: the model that is left to train is smaller. A teacher of the run's own
    counts; the size of another one is not known here.
    """
    model, seq_length, teacher = config.model, config.training.seq_length, own_teacher(config)

    def per_token(record: Record) -> int:
        asked = teacher if record.kl is not None else None
        own = record.shape(model).flops_per_token(model, seq_length)
        return own + (asked.flops_per_token(seq_length) if asked else 0)

    flops = sum(record.tokens_per_s * record.step_s * per_token(record) for record in recent)
    if not flops:
        return math.inf
    seconds = sum(record.step_s for record in recent)
    tokens, total = recent[-1].tokens, config.schedule.total_tokens
    left = remaining_flops(config, tokens)
    left += teacher_flops_between(config, tokens, total, teacher) or 0
    return left * seconds / flops


class Progress:
    """Shows phase, loss, KL from a teacher, learning rate, share removed, speed and time left.

    It writes to standard error. In a terminal one line at its foot is kept up to date; elsewhere a
    line is printed at each phase change and about every ten seconds.
    """

    PLAIN_INTERVAL_S = 10.0

    def __init__(
        self,
        config: Config,
        enabled: bool,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start to show a run; says nothing unless ``enabled`` and ``logging.progress``."""
        self.config = config
        self.enabled = enabled and config.logging.progress
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._printed_at = float("-inf")
        self._phase = ""
        self._recent: deque[Record] = deque(maxlen=RECENT_STEPS)
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

    def update(self, record: Record) -> None:
        """Show the record of the step that has just ended."""
        if not self.enabled:
            return
        self._recent.append(record)
        phase, tokens = record.phase, record.tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=tokens, phase=phase, text=self._text(record))
        elif phase != self._phase or self._clock() - self._printed_at >= self.PLAIN_INTERVAL_S:
            self._printed_at = self._clock()
            share = tokens / self.config.schedule.total_tokens
            self._print(f"{phase:<8} {share:4.0%}  {self._text(record)}")
        self._phase = phase

    def note(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self.enabled:
            self._print(text)

    def close(self) -> None:
        """Stop the live line; what is printed next comes below it."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        # soft_wrap: a log line stays one line, however narrow rich believes the pipe to be.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _text(self, record: Record) -> str:
        left = human_duration(time_left_s(self.config, self._recent))
        kl = "" if record.kl is None else f"KL {record.kl:.3f}  "
        return (
            f"loss {record.loss:.3f}  {kl}lr {record.lr:.1e}  removed {record.removed:.0%}  "
            f"{human_count(record.tokens_per_s)} tok/s  ETA {left}"
        )
