"""Learning rate, share of the removal and phase: pure functions of consumed tokens.

Tokens are the clock of a run. Nothing here is stored, so a resume, another parallel layout or a
compaction cannot bend a curve. An optimizer step is governed by the tokens that are consumed once
its batch is: the first step has a learning rate above zero, the last one ends at ``min_lr``.
"""

from __future__ import annotations

import math

from megatron_idea.config import ScheduleConfig

PHASES = ("enlarged", "prune", "recover")


def phase_ends(schedule: ScheduleConfig) -> dict[str, int]:
    """Last consumed token of each phase; the last value is ``total_tokens``."""
    total = schedule.total_tokens
    enlarged = round(total * schedule.enlarged_fraction)
    prune = round(total * (schedule.enlarged_fraction + schedule.prune_fraction))
    return {"enlarged": enlarged, "prune": prune, "recover": total}


def phase(schedule: ScheduleConfig, tokens: int) -> str:
    """Name of the phase that token number ``tokens`` (counted from 1) belongs to."""
    for name, end in phase_ends(schedule).items():
        if tokens <= end:
            return name
    return "recover"


def _warmup_cosine(
    lr: float, min_lr: float, warmup_tokens: float, span: float, tokens: float
) -> float:
    if tokens < warmup_tokens:
        return lr * tokens / warmup_tokens
    progress = min(1.0, (tokens - warmup_tokens) / max(span - warmup_tokens, 1.0))
    return min_lr + 0.5 * (lr - min_lr) * (1.0 + math.cos(math.pi * progress))


def learning_rate(schedule: ScheduleConfig, tokens: int) -> float:
    """Learning rate of the step that brings the run to ``tokens`` consumed tokens.

    Integrated: lr * t / w for t < w, then the cosine
    min_lr + (lr - min_lr) (1 + cos(pi (t - w) / (T - w))) / 2 over all T tokens.
    Restarted: the same curve twice, over the enlarged phase and over the rest.

    Returns: in [0, schedule.lr].
    Source: IDEA Prune (arXiv 2503.05920), one cosine over the three stages; the warm-up is ours.
    """
    total = schedule.total_tokens
    warmup = schedule.lr_warmup_fraction * total
    if schedule.kind == "integrated":
        return _warmup_cosine(schedule.lr, schedule.min_lr, warmup, total, tokens)
    start = phase_ends(schedule)["enlarged"]
    if tokens <= start:
        return _warmup_cosine(schedule.lr, schedule.min_lr, warmup, start, tokens)
    return _warmup_cosine(schedule.lr, schedule.min_lr, warmup, total - start, tokens - start)


def removal_window(schedule: ScheduleConfig) -> tuple[float, int]:
    """Tokens at which removal begins and ends; scores are gathered from the prune phase's start."""
    ends = phase_ends(schedule)
    length = ends["prune"] - ends["enlarged"]
    return ends["enlarged"] + schedule.prune_warmup_fraction * length, ends["prune"]


def part_of_window(
    schedule: ScheduleConfig, begin: float = 0.0, end: float = 1.0
) -> tuple[float, float]:
    """Tokens at which a part of the removal window begins and ends, given in shares of it."""
    first, last = removal_window(schedule)
    return first + begin * (last - first), last if end == 1 else first + end * (last - first)


def removed(schedule: ScheduleConfig, tokens: int, begin: float = 0.0, end: float = 1.0) -> float:
    """Share of all that is to be removed that is gone once ``tokens`` tokens are consumed.

    1 - (1 - (t - start) / (stop - start))^3 in the removal window, or in the part of it from
    ``begin`` to ``end``; 0 before, 1 after.

    Returns: in [0, 1]; never decreases with ``tokens``.
    Source: Zhu and Gupta 2017, eq. 1; the window is our reading of IDEA Prune.
    """
    start, stop = part_of_window(schedule, begin, end)
    if tokens >= stop:
        return 1.0
    if tokens < start:
        return 0.0
    if schedule.removal == "one_shot":
        return 1.0
    return 1.0 - (1.0 - (tokens - start) / (stop - start)) ** 3


def gathers_scores(schedule: ScheduleConfig, tokens: int) -> bool:
    """Whether importance is observed in the step that ends at ``tokens``: the prune phase."""
    ends = phase_ends(schedule)
    return ends["enlarged"] < tokens <= ends["prune"]


def crossed(every_tokens: int, before: int, after: int) -> bool:
    """Whether a multiple of ``every_tokens`` lies in (before, after]; never when it is 0."""
    return every_tokens > 0 and after // every_tokens > before // every_tokens


def phase_ended(schedule: ScheduleConfig, before: int, after: int) -> str | None:
    """The last phase whose final token lies in (before, after], if any."""
    ended = [name for name, end in phase_ends(schedule).items() if before < end <= after]
    return ended[-1] if ended else None
