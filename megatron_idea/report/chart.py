"""Say what a chart shows, in which units; ``svg`` and ``picture`` draw it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_idea.records.readable import human_count

# Names of colours; each renderer has its own shades of them, the page one set for light and dark.
COLOURS = ("blue", "orange", "green", "red", "violet", "teal", "pink", "olive")


def colours_of(count: int) -> list[str]:
    """Give each of several runs its colour, the same one in charts and tables."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


POINTS = ("points", "specks")
"""Styles that no line joins."""


@dataclass(frozen=True)
class Series:
    """Describes a curve, or points."""

    name: str
    """In the legend and at the pointer; empty: in neither."""
    x: Sequence[float]
    y: Sequence[float]
    """NaN leaves a gap."""
    colour: str
    style: str = "line"
    """``line``, ``thin`` (faint, behind), ``dashed``, ``dotted``, ``mixed`` (dashes and dots),
    ``steps`` (bold, holds until the next point), ``count`` (the same, fine), ``points``,
    ``specks`` (small, for many)."""
    is_right: bool = False
    """Measured on the axis at the right."""
    run: int | None = None
    """Which of several runs."""


@dataclass(frozen=True)
class Band:
    """Describes the area between two curves over the same x."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str
    name: str = ""
    steps: bool = False
    is_inner: bool = False
    """Lies within another one, whose shade adds to its own."""
    run: int | None = None
    """Which of several runs."""


@dataclass(frozen=True)
class Axis:
    """Describes a range, its unit, and how its numbers are written."""

    label: str
    low: float
    high: float
    kind: str = "plain"
    """``plain``, ``count`` (2.8M), ``whole`` (18,432) or ``scientific`` (2e-3)."""
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high one; NaN stays NaN."""
        if not self.is_log:
            return (value - self.low) / (self.high - self.low)
        if not value > 0:
            return 0.0 if value == value else math.nan
        low = math.log(self.low)
        return (math.log(value) - low) / (math.log(self.high) - low)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """List round values inside the range, and how they are written."""
        values = _log_ticks(self, most) if self.is_log else _linear_ticks(self, most)
        return [(value, self.write(value)) for value in values]

    def write(self, value: float) -> str:
        """Write a value as its kind asks for."""
        if self.kind == "count":
            return human_count(value)
        if self.kind == "whole":
            return f"{value:,.0f}"
        if self.kind == "scientific" and value:
            mantissa, exponent = f"{value:.1e}".split("e")
            return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
        return f"{value:.4g}"


def _linear_ticks(axis: Axis, most: int) -> list[float]:
    rough = (axis.high - axis.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9)]
    if axis.kind == "whole":  # there is no half of a layer
        steps = [step for step in steps if step == int(step)] or [1.0]
    step = steps[0]
    first = math.ceil(axis.low / step - 1e-9)
    return [i * step for i in range(first, math.floor(axis.high / step + 1e-9) + 1)]


def _log_ticks(axis: Axis, most: int) -> list[float]:
    exponents = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        values = [m * 10.0**e for e in exponents for m in mantissas]
        inside = [v for v in values if axis.low <= v * (1 + 1e-9) and v <= axis.high * (1 + 1e-9)]
        if len(inside) <= most:
            return inside
    return inside[:: -(-len(inside) // most)]


@dataclass(frozen=True)
class Chart:
    """Describes curves over consumed tokens."""

    slug: str
    """Its name in the page, and in other pictures."""
    title: str
    note: str
    """A sentence on how to read it."""
    x: Axis
    y: Axis
    series: Sequence[Series]
    right: Axis | None = None
    bands: Sequence[Band] = ()
    phases: Sequence[tuple[str, float, float]] = ()
    """Shaded stretches: name, first and last token."""
    marks: Sequence[float] = ()
    """Tokens at which the model was compacted."""
    is_wide: bool = False
    runs: Sequence[str] = ()
    """Names of several runs, in the order of ``Series.run``; empty for one."""

    def entries(self) -> list[tuple[str, str, str]]:
        """List name, style and colour of what the legend explains, beside the runs' colours.

        With several runs each kind of curve has one entry, in ink.
        """
        if not self.runs:
            return [(one.name, one.style, one.colour) for one in self.series if one.name]
        kinds = {one.name: (one.name, one.style, "ink") for one in self.series if one.name}
        return list(kinds.values())


@dataclass(frozen=True)
class HeatMap:
    """Describes a value of each layer over consumed tokens, drawn as shades."""

    slug: str
    title: str
    note: str
    x: Axis
    values: Axis
    """Range and unit of the shades."""
    edges: Sequence[float]
    """Tokens at which columns begin, and the end of the last one."""
    rows: Sequence[Sequence[float]]
    """A row a layer, from the first; NaN is hatched."""
    gap: str = "no value"
    """What NaN means, for the legend."""
    phases: Sequence[tuple[str, float, float]] = ()
    is_wide: bool = False

    @property
    def has_gaps(self) -> bool:
        """Tell whether a value is missing anywhere."""
        return any(value != value for row in self.rows for value in row)


# Shades of a heat map from its low end to its high one: viridis, which also reads in grey and by
# the colour-blind, cut at its darkest and brightest.
SHADES = ("#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#e2e418")


def shade(share: float) -> tuple[int, int, int]:
    """Mix the shade of a place between the two ends, 0 to 1; returns red, green and blue."""
    at = min(1.0, max(0.0, share)) * (len(SHADES) - 1)
    first = min(int(at), len(SHADES) - 2)
    low, high = (
        [int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in SHADES[first : first + 2]
    )
    red, green, blue = (round(a + (at - first) * (b - a)) for a, b in zip(low, high, strict=True))
    return red, green, blue


@dataclass(frozen=True)
class Table:
    """Describes cells of text under headers; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    colours: Sequence[str] = ()
    """Of each row's curves elsewhere."""
    is_muted: bool = False
    """Says less than it seems to."""


def tokens_axis(low: float, high: float) -> Axis:
    """Make the axis of consumed tokens."""
    return Axis("consumed tokens", low, high if high > low else low + 1, "count")


def fitted(
    label: str,
    values: Sequence[float],
    *,
    kind: str = "plain",
    from_zero: bool = True,
    is_log: bool = False,
    headroom: float = 0.08,
) -> Axis:
    """Make an axis that holds the finite values."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not is_log)]
    low, high = min(finite, default=1.0 if is_log else 0.0), max(finite, default=1.0)
    if is_log:
        if high / low < 1.5:
            low, high = low / 1.5, high * 1.5
        return Axis(label, low / 1.1, high * 1.1, kind, True)
    if from_zero:
        low = min(0.0, low)
    span = (high - low) or abs(high) or 1.0
    return Axis(label, low if from_zero else low - headroom * span, high + headroom * span, kind)


Figure = Chart | HeatMap
