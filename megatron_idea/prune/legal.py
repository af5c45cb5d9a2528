"""Integer widths that tensor parallelism, GEMMs and serving accept."""

from __future__ import annotations

from collections.abc import Sequence


def round_up(width: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``width``; never zero."""
    return max(1, -(-width // multiple)) * multiple


def due_widths(
    widths: Sequence[int], live: Sequence[int], multiple: int, block: int, final: bool
) -> tuple[int, ...]:
    """Physical widths after this step: the present ones, or the next smaller legal ones.

    A compaction is due when some layer could shed a whole block, and at the end of pruning when it
    could shed anything. All layers then shrink to what their live neurons need, so that between
    two compactions at most one block of neurons is computed in vain.
    """
    needed = tuple(round_up(n, multiple) for n in live)
    assert all(n <= w for n, w in zip(needed, widths, strict=True)), (widths, live)
    gain = max(w - n for w, n in zip(widths, needed, strict=True))
    return needed if gain >= block or (final and gain > 0) else tuple(widths)
