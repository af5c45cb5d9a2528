"""Put a run's events into words."""

from __future__ import annotations

from typing import Any

from megatron_idea.records.readable import human_mean
from megatron_idea.records.record import mean_count
from megatron_idea.report.run import named

_WORDS = {
    "branched": "began at step {step:,} of {source}",
    "evaluated": "held-out loss {val_loss:.4f} at step {step:,}",
    "compacted": "compacted {change} at step {step:,}",
    "layer_removed": "removed layer {layer} at step {step:,}",
    "fewer_nodes": "saved step {step:,}, to go on on fewer nodes",
    "layout_changed": "from {was} to {now} at step {step:,}",
    "saved": "saved step {step:,} in {seconds:.1f} s",
    "teacher": "teacher made at step {step:,}, held-out loss {val_loss:.4f}",
    "spike": "loss spike at step {step:,}: {loss:.3f}, usual {average:.3f}",
    "signal": "stopped by {name} after step {step:,}",
    "rolled_back": "rolled back from step {from_step:,} to step {step:,}",
    "damaged": "damaged checkpoint: {reason}",
}


def describe(event: dict[str, Any]) -> str:
    """Say in a few words what happened; where fields are missing, only the kind and step."""
    kind = str(event["kind"])
    known = {"name": "a signal"} | {key: value for key, value in event.items() if value is not None}
    try:
        if change := _change(event):
            known["change"] = change
        return _WORDS[kind].format(**known)
    except (KeyError, TypeError, ValueError):
        return f"{kind} at step {event['step']:,}" if "step" in event else kind


def _change(event: dict[str, Any]) -> str:
    """Name the mean units before and after a compaction, along the axes that changed."""
    before, after = event.get("before", {}), event.get("after", {})
    means = {
        axis: [mean_count(part[axis]) for part in (before, after)]
        for axis in after
        if axis in before
    }
    return ", ".join(
        f"{human_mean(was)} to {human_mean(now)} {named(axis)}"
        for axis, (was, now) in means.items()
        if before[axis] != after[axis]
    )
