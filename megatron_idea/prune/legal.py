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

    A run that was resumed with more TP ranks may have widths that are no multiple any more; they
    stay until there is something to shed.
    """
    assert all(n <= w for n, w in zip(live, widths, strict=True)), (widths, live)
    needed = tuple(min(round_up(n, multiple), w) for n, w in zip(live, widths, strict=True))
    gain = max(w - n for w, n in zip(widths, needed, strict=True))
    return needed if gain >= block or (final and gain > 0) else tuple(widths)
