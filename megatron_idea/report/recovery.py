"""Measure what removing units did to the training loss, and how long it took to recover."""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_idea.records.record import Counts, Record
from megatron_idea.report.run import Run, mean_of
from megatron_idea.schedule import removal_window
from megatron_idea.shape import Shape

# Steps that are averaged on each side of a removal. More of them are less noisy and mix in more of
# the loss's own fall.
WINDOW_STEPS = 16

# Share of an axis' units that must go in one step for it to be an event of its own.
SUDDEN = 0.02


@dataclass(frozen=True)
class Removal:
    """Describes units that went at the end of a step, and the loss around it."""

    what: str
    step: int
    tokens: int
    before: Counts
    """Stored units for a compaction, else live ones."""
    after: Counts
    loss_jump: float | None
    """Mean training loss of the steps after it minus that of the steps before; nats."""
    noise: float | None
    """Standard error of that difference."""
    recovery_tokens: int | None
    """Until as many steps as the window has are on average no worse than those before it; 0 when
    they never were worse; None: not yet, or not known."""
    compaction: dict[str, Any] | None = None
    """The event, of a compaction."""

    @property
    def is_noise(self) -> bool:
        """Tell whether losses that only scatter would jump as far."""
        return self.noise is not None and abs(self.loss_jump or 0.0) <= 2.0 * self.noise


def removals(run: Run) -> list[Removal]:
    """List the whole removal window, then compactions and sudden removals in order of steps."""
    whole = _whole_window(run)
    return [*([whole] if whole else []), *_moments(run)]


def _moments(run: Run) -> Iterator[Removal]:
    compacted = {event["step"] for event in run.compactions()}
    full = Shape.full(run.config.model)
    axes = [(mean_of("live", axis), SUDDEN * full.counts(axis)[0]) for axis in run.axes]
    means = [mean(run.records[0]) for mean, _ in axes]
    live: Counts = run.records[0].live
    stored: Counts = {axis: full.counts(axis) for axis in run.axes}
    for index, record in enumerate(run.records):
        now = [mean(record) for mean, _ in axes]
        drops = zip(means, now, axes, strict=True)
        if record.step in compacted:
            yield _measure(run, index, index, "compaction", stored, record.stored)
        elif any(old - new >= least for old, new, (_, least) in drops):
            yield _measure(run, index, index, "removal", live, record.live)
        live, stored, means = record.live, record.stored, now


def _whole_window(run: Run) -> Removal | None:
    """Take all of the pruning as one removal: from its first token to its last."""
    begin, end = removal_window(run.config.schedule)
    tokens = [record.tokens for record in run.records]
    first, last = bisect.bisect_left(tokens, begin), bisect.bisect_right(tokens, end) - 1
    if not run.prunes or last <= first:
        return None
    before, after = run.records[max(0, first - 1)].live, run.records[last].live
    return _measure(run, first, last, "all of the pruning", before, after)


def _measure(run: Run, begin: int, end: int, what: str, before: Counts, after: Counts) -> Removal:
    """Compare the losses of the steps up to ``begin`` with those after ``end``.

    The step of a removal computes its loss before units go.
    """
    earlier = _losses(run.records[max(0, begin + 1 - WINDOW_STEPS) : begin + 1])
    later = _losses(run.records[end + 1 : end + 1 + WINDOW_STEPS])
    record = run.records[end]
    jump = noise = recovered = None
    if len(earlier) == len(later) == WINDOW_STEPS:
        level = statistics.fmean(earlier)
        jump = statistics.fmean(later) - level
        variances = statistics.variance(earlier) + statistics.variance(later)
        noise = math.sqrt(variances / WINDOW_STEPS)
        recovered = _recovery(run, end, level)
    compactions = {event["step"]: event for event in run.compactions()}
    event = compactions.get(record.step) if what == "compaction" else None
    return Removal(what, record.step, record.tokens, before, after, jump, noise, recovered, event)


def _recovery(run: Run, index: int, level: float) -> int | None:
    """Count the tokens from the removal until the mean of a window is at the level again."""
    begin = run.records[index].tokens
    window: deque[float] = deque(maxlen=WINDOW_STEPS)
    # Not a slice: there may be very many of them, and mostly the first few decide.
    for place in range(index + 1, len(run.records)):
        record = run.records[place]
        window += _losses([record])
        if len(window) == WINDOW_STEPS and statistics.fmean(window) <= level:
            # The window right behind the removal: the loss never rose.
            return 0 if place == index + WINDOW_STEPS else record.tokens - begin
    return None


def _losses(records: Iterable[Record]) -> list[float]:
    return [record.loss for record in records if math.isfinite(record.loss)]
