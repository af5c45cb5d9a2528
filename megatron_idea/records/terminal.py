"""Print to the terminal without obeying control characters.

A model's text, a run's name or a line of its records may hold escape sequences, with which a
terminal would clear what stands above or write into the clipboard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import rich.console
import rich.table
from rich.console import RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

# C0 and C1 but tab and line feed; what turns the direction of the text around it; and halves of
# surrogate pairs, which JSON can spell and names of files have, and no output can encode.
CONTROL = dict.fromkeys(
    (
        *range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F),
        *range(0x2066, 0x206A), *range(0xD800, 0xE000),
    ),
    "\N{REPLACEMENT CHARACTER}",
)  # fmt: skip


class Console(rich.console.Console):
    """Prints as rich's Console does, with U+FFFD for each control character in the text."""

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for text, style, control in super().render(*arguments, **options):
            yield Segment(text if control else text.translate(CONTROL), style, control)


UNBROKEN = 100_000
"""Columns of a line that is not to be broken."""


def say(text: str) -> None:
    """Print text as it is: no markup, no colours, lines of any length."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def say_progress(text: str) -> None:
    """Print text as ``say`` does, on standard error: standard output is for the result."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def say_error(text: str) -> None:
    """Print a red line on standard error."""
    line = Text.assemble(("error: ", "bold"), text, style="red")
    Console(stderr=True).print(line, soft_wrap=True)


def show(rendered: RenderableType) -> None:
    """Print tables and sentences. In a terminal tables fit its width as far as no word is cut.

    Sentences are left to the terminal to wrap; lines in a file or a pipe are not broken.
    """
    console = Console()
    roomy = console.options.update(width=UNBROKEN)
    # rich measures a table without its edges' padding, and then takes that off once more.
    needed = Measurement.get(console, roomy, rendered).minimum + 2
    console.width = max(console.width, needed) if console.is_terminal else UNBROKEN
    console.print(rendered, soft_wrap=True)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str = "",
    note: str = "",
    left: int = 1,
) -> rich.console.Group:
    """Lay out cells under their headers: the first ``left`` columns are text, the rest numbers.

    Where the terminal is narrow the last column of text gives way, numbers do not.
    """
    drawn = rich.table.Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False,
        header_style="bold",
    )  # fmt: skip
    for number, name in enumerate(columns, start=1):
        drawn.add_column(
            Text(name),
            justify="left" if number <= left else "right",
            no_wrap=number != left,
            overflow="fold" if number == left else "ellipsis",
            min_width=10 if number == left else None,
        )
    for row in rows:
        # A string would be read as rich's markup.
        drawn.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    # Not the table's caption: that would be broken where the cells end.
    parts = [drawn, Text(note, style="dim")] if note else [drawn]
    return rich.console.Group(*parts)
