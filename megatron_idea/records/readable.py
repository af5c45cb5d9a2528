"""Write numbers the way people say them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_PREFIXES = tuple(
    (10.0**power, prefix) for power, prefix in zip(range(24, 5, -3), "YZEPTGM", strict=True)
)


def human_count(number: float, digits: int = 3) -> str:
    """Write a count with a suffix, to ``digits`` figures: 2.82B, 680M, 2T."""
    for size, suffix in _COUNTS:
        if number >= size:
            value = number / size
            text = f"{value:.{max(0, digits - len(str(int(value))))}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + suffix
    return f"{number:.{digits}g}"


def scaled(largest: float, unit: str) -> tuple[float, str]:
    """Choose the prefix of ``unit`` that suits ``largest``; return its divisor and the unit."""
    for size, prefix in _PREFIXES:
        if largest >= size:
            return size, prefix + unit
    return 1.0, unit


def human_amount(number: float, unit: str) -> str:
    """Write an amount with its unit's prefix, to three figures: 12.4 TFLOPs, 1.2 GB."""
    divisor, prefixed = scaled(number, unit)
    return f"{number / divisor:.3g} {prefixed}"


def gigabytes(size: float) -> str:
    """Write bytes in GB without the unit, for columns."""
    return f"{size / 1e9:.2f}"


def spread(counts: Sequence[int]) -> str:
    """Write the counts of the layers that are there in a few characters: 384, or 128 to 512."""
    low, high = min(filter(None, counts), default=0), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def human_range(ends: Sequence[float]) -> str:
    """Write a range of counts: 58M to 468M."""
    return " to ".join(map(human_count, ends))


def human_mean(mean: float) -> str:
    """Write a mean of counts: whole, but with two decimals where that would hide a difference."""
    return f"{mean:,.0f}" if mean >= 100 or mean == int(mean) else f"{mean:.2f}"


def human_duration(seconds: float) -> str:
    """Write a duration with its two largest units: 42s, 3m10s, 7h05m, 12d03h."""
    if seconds == float("inf"):
        return "unknown"
    units: Sequence[tuple[str, int]] = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    whole = round(seconds)
    for (large, size), (small, small_size) in itertools.pairwise(units):
        if whole >= size:
            return f"{whole // size}{large}{whole % size // small_size:02d}{small}"
    return f"{whole}s"


def megabytes(number: int) -> str:
    """Write a number of bytes in megabytes: 12.3 MB."""
    return f"{number / 1e6:.1f} MB"


def human_widths(widths: Sequence[int]) -> str:
    """Write the widths of all layers: 384 when they are equal, else 384, 256, 384."""
    return ", ".join(map(str, widths if len(set(widths)) > 1 else widths[:1]))
