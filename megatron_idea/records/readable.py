"""Numbers as people say them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def human_count(number: float, digits: int = 3) -> str:
    """Write a count as people say it, to ``digits`` figures: 2.82B, 680M, 2T."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            value = number / size
            text = f"{value:.{max(0, digits - len(str(int(value))))}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + suffix
    return f"{number:.{digits}g}"


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
