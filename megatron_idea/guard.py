"""Is the loss what it should be? Pure functions: the same verdict on every rank and after a resume.

A step whose loss or gradient is not finite is not taken; too many in a row end the run. A loss far
above its moving average is a spike, and ``guard.on_spike`` says what follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_idea.config import GuardConfig
from megatron_idea.errors import UserError


class DivergedError(UserError):
    """The run cannot go on by itself; the message says what was seen and what to change."""


@dataclass(frozen=True)
class Watch:
    """What the guard remembers; part of a checkpoint."""

    average: float = 0.0
    """Moving average of the loss, in nats."""
    steps: int = 0
    """Losses in it, up to the window."""
    in_spike: bool = False
    bad_in_row: int = 0
    """Steps in a row that were not taken."""
    rollbacks: int = 0


def begins(before: Watch, after: Watch) -> bool:
    """Whether the step between the two began a spike."""
    return after.in_spike and not before.in_spike


def rolls_back(config: GuardConfig, before: Watch, after: Watch) -> bool:
    """Whether the run wants to go back behind the step between the two."""
    return config.on_spike == "rollback" and begins(before, after)


def pauses_pruning(config: GuardConfig, watch: Watch) -> bool:
    """Whether nothing is to be removed for now."""
    return config.on_spike == "pause_pruning" and watch.in_spike


def observe(config: GuardConfig, watch: Watch, loss: float, taken: bool) -> Watch:
    """The watch after a step with this loss; ``taken``: it and the gradient were finite.

    A spike begins when the loss is more than ``spike_increase`` above its average over the last
    ``spike_window_steps`` steps, and ends below half of that. The average goes on through a spike,
    so a level that stays becomes the new normal.

    Raises: DivergedError after ``max_skipped_in_row`` steps in a row that were not taken.
    """
    if not taken:
        bad = watch.bad_in_row + 1
        if config.max_skipped_in_row and bad >= config.max_skipped_in_row:
            raise DivergedError(
                f"{bad} steps in a row had a loss or gradient that is not finite, as many as "
                "guard.max_skipped_in_row allows; go on from an earlier checkpoint with a lower "
                "schedule.lr, or look at the data of these steps"
            )
        return replace(watch, bad_in_row=bad)
    window = config.spike_window_steps
    above = loss - watch.average
    limit = config.spike_increase / (2 if watch.in_spike else 1)
    spikes = bool(config.spike_increase) and watch.steps >= window and above > limit
    steps = min(watch.steps + 1, window)
    average = watch.average + above / steps
    assert math.isfinite(average), (watch, loss)
    return replace(watch, average=average, steps=steps, in_spike=spikes, bad_in_row=0)
