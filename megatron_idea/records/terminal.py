"""Text that somebody else wrote, shown where characters can be commands.

A model's text, a run's name or a line of its records may hold escape sequences: a terminal would
obey them, clear what stands above, or write into the clipboard.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

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
    """rich's, with a sign in place of every control character that is not rich's own."""

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for text, style, control in super().render(*arguments, **options):
            yield Segment(text if control else text.translate(CONTROL), style, control)
