"""Say what a few values over seeds tell: mean, interval, and a verdict by the interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Holds the mean of values and the interval that it is known to lie in."""

    mean: float
    """NaN where a value is not finite."""
    low: float | None
    """None with fewer than two values, or where one is not finite."""
    high: float | None
    values: tuple[float, ...]
    """In order of seeds."""

    @property
    def half_width(self) -> float | None:
        """Return the distance from the mean to either end."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Compute Student's t-interval of the mean, mean ± t s / sqrt(n) with n - 1 degrees of freedom.

    It takes the values as independent draws from a normal distribution.

    Args:
        values: one or more.
        confidence: how often such intervals hold the true mean, in (0, 1).
    """
    from scipy.stats import t  # a second, which only a comparison is to wait for

    each = tuple(values)
    if not all(map(math.isfinite, each)):
        return Interval(math.nan, None, None, each)
    mean = statistics.fmean(each)
    if len(each) == 1:
        return Interval(mean, None, None, each)
    quantile = float(t.ppf((1 + confidence) / 2, len(each) - 1))
    half = quantile * statistics.stdev(each) / math.sqrt(len(each))
    return Interval(mean, mean - half, mean + half, each)


def verdict(differences: Interval) -> str:
    """Judge the left one's losses minus the right one's by their interval, never by their mean.

    Returns: ``better`` where the interval lies wholly below 0, ``worse`` wholly above, else, and
    without an interval, ``cannot tell``.
    """
    if differences.high is not None and differences.high < 0:
        return "better"
    if differences.low is not None and differences.low > 0:
        return "worse"
    return "cannot tell"
