"""A run's events in words."""

from __future__ import annotations

import statistics
from typing import Any

from megatron_idea.report.run import named

_WORDS = {
    "evaluated": "held-out loss {val_loss:.4f} at step {step:,}",
    "compacted": "compacted {change} at step {step:,}",
    "saved": "saved step {step:,} in {seconds:.1f} s",
    "spike": "loss spike at step {step:,}: {loss:.3f}, usual {average:.3f}",
    "signal": "stopped by {name} after step {step:,}",
    "rolled_back": "rolled back from step {from_step:,} to step {step:,}",
    "damaged": "damaged checkpoint: {reason}",
}


def describe(event: dict[str, Any]) -> str:
    """Say in a few words what happened; of an event that lacks something, its kind and step."""
    kind = str(event["kind"])
    known = {"name": "a signal"} | {key: value for key, value in event.items() if value is not None}
    try:
        if change := _change(event):
            known["change"] = change
        return _WORDS[kind].format(**known)
    except (KeyError, TypeError, ValueError):
        return f"{kind} at step {event['step']:,}" if "step" in event else kind


def _change(event: dict[str, Any]) -> str:
    """Mean units before and after a compaction, along the axes that changed."""
    before, after = event.get("before", {}), event.get("after", {})
    return ", ".join(
        f"{statistics.fmean(before[axis]):,.0f} to {statistics.fmean(now):,.0f} {named(axis)}"
        for axis, now in after.items()
        if axis in before and before[axis] != now
    )
