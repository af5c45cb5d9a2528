"""Learning rate, share of the removal and phase: pure functions of consumed tokens.

Tokens are the clock of a run. Nothing here is stored, so a resume, another parallel layout or a
compaction cannot bend a curve. An optimizer step is governed by the tokens that are consumed once
its batch is: the first step has a learning rate above zero, the last one ends at ``min_lr``.
"""

from __future__ import annotations

import math

from megatron_idea.config import DistillConfig, ScheduleConfig

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


def lr_curves(schedule: ScheduleConfig) -> list[tuple[int, int]]:
    """First (excluded) and last token of each learning-rate curve: one, or two if restarted."""
    ends = phase_ends(schedule)
    if schedule.kind == "integrated":
        return [(0, ends["recover"])]
    return [(0, ends["enlarged"]), (ends["enlarged"], ends["recover"])]


def lr_decay_begins(schedule: ScheduleConfig) -> list[float]:
    """Tokens at which each learning-rate curve of style ``WSD`` leaves its peak."""
    share = 1.0 - schedule.lr_wsd_decay_fraction
    return [begin + share * (end - begin) for begin, end in lr_curves(schedule)]


def learning_rate(schedule: ScheduleConfig, tokens: int) -> float:
    """Learning rate of the step that brings the run to ``tokens`` consumed tokens.

    Integrated: lr * t / w for t < w, then with p = (t - w) / (T - w), over all T tokens,

    - cosine: min_lr + (lr - min_lr) (1 + cos(pi p)) / 2
    - linear: lr (1 - p) + min_lr p
    - WSD: as linear, with p = 1 - (T - t) / (f T), and 0 before the last share f of the tokens
    - constant: lr, whatever min_lr is; the last learning rate is lr, too

    Restarted: the same curve twice, over the enlarged phase and over the rest. Each warms up over
    w tokens; in each, the decay of WSD is the share f of the curve's own span.

    Returns: in [0, schedule.lr].
    Source: IDEA Prune (arXiv 2503.05920), one cosine over the three stages; the warm-up is ours.
    The names are Megatron-LM's; Adapt-Pruner (arXiv 2502.03460) releases a linear warm-up of 5 %
    and WSD with a linear decay over the last 10 %.
    """
    curves = lr_curves(schedule)
    begin, end = curves[0] if tokens <= curves[0][1] else curves[-1]
    tokens, span = tokens - begin, end - begin
    lr, min_lr, style = schedule.lr, schedule.min_lr, schedule.lr_decay_style
    warmup = schedule.lr_warmup_fraction * schedule.total_tokens
    if tokens < warmup:
        return lr * tokens / warmup
    if style == "constant":
        return lr
    progress = min(1.0, (tokens - warmup) / max(span - warmup, 1.0))
    if style == "cosine":
        return min_lr + 0.5 * (lr - min_lr) * (1.0 + math.cos(math.pi * progress))
    if style == "WSD":
        decay = max(schedule.lr_wsd_decay_fraction * span, 1.0)
        progress = min(1.0, max(0.0, 1.0 - (span - tokens) / decay))
    return lr * (1.0 - progress) + min_lr * progress


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


def removed(
    schedule: ScheduleConfig, curve: str, tokens: int, begin: float = 0.0, end: float = 1.0
) -> float:
    """Share of all that is to be removed that is gone once ``tokens`` tokens are consumed.

    0 before the removal window, or the part of it from ``begin`` to ``end``; 1 after; in it, with
    p = (t - start) / (stop - start), by ``curve``, which is ``Config.removal``:

    - cubic: 1 - (1 - p)^3
    - linear: p
    - rounds: n / N, where n of the N = ``schedule.rounds`` events have happened by t. Event i
      comes once p = i (i - 1) / (N (N - 1)): the first at the window's start, the last at its end
    - one_shot: 1, that is one round

    Returns: in [0, 1]; never decreases with ``tokens``.
    Source: cubic: Zhu and Gupta 2017, eq. 1; the window is our reading of IDEA Prune. rounds:
    Adapt-Pruner (arXiv 2502.03460), where the tokens after event i are 2 i / (N (N + 1)) of all
    from the first event on: so it is here when prune : recover is (N - 1) : 2, the prune warm-up
    left aside.
    """
    start, stop = part_of_window(schedule, begin, end)
    if tokens >= stop:
        return 1.0
    if curve in ("rounds", "one_shot"):
        count = schedule.rounds if curve == "rounds" else 1
        return _rounds_begun(count, round(start), round(stop), tokens) / count
    if tokens < start:
        return 0.0
    progress = (tokens - start) / (stop - start)
    return progress if curve == "linear" else 1.0 - (1.0 - progress) ** 3


def _rounds_begun(count: int, start: int, stop: int, tokens: int) -> int:
    """Count the i in 1 ... ``count`` with i (i - 1) (stop - start) <= (t - start) n (n - 1).

    In whole numbers: 0.07 of 100 tokens are more than 7 in floats, and an event a step too late.
    """
    if tokens < start:
        return 0
    most = (tokens - start) * count * (count - 1) // max(1, stop - start)
    return min(count, (1 + math.isqrt(1 + 4 * most)) // 2)


def gathers_scores(schedule: ScheduleConfig, tokens: int) -> bool:
    """Whether importance is observed in the step that ends at ``tokens``: the prune phase."""
    ends = phase_ends(schedule)
    return ends["enlarged"] < tokens <= ends["prune"]


def teaching_begins(schedule: ScheduleConfig, distill: DistillConfig) -> int:
    """Last token before the teacher is heard: that of the enlarged phase for ``self``, else 0."""
    return phase_ends(schedule)["enlarged"] if distill.teacher == "self" else 0


def distillation_share(schedule: ScheduleConfig, distill: DistillConfig, tokens: int) -> float:
    """Share alpha of the teacher in the loss of the step that ends at ``tokens`` consumed tokens.

    From ``distill.alpha`` to ``distill.alpha_end`` over the tokens from where teaching begins to
    the last one, with p the part of them that is consumed:

    - linear: alpha (1 - p) + alpha_end p
    - cosine: alpha_end + (alpha - alpha_end) (1 + cos(pi p)) / 2

    Returns: in [0, 1]; 0 before teaching begins and without a teacher.
    """
    begin = teaching_begins(schedule, distill)
    if not distill.teaches or tokens <= begin:
        return 0.0
    progress = min(1.0, (tokens - begin) / (schedule.total_tokens - begin))
    if distill.alpha_shape == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return distill.alpha * (1.0 - progress) + distill.alpha_end * progress


def snapshot_tokens(schedule: ScheduleConfig, distill: DistillConfig) -> list[int]:
    """Consumed tokens at which snapshots of the enlarged model are due, ascending.

    The last is the end of the enlarged phase; those that would lie before the first token are left
    out.
    """
    end = phase_ends(schedule)["enlarged"]
    spacing = distill.average_spacing * schedule.total_tokens
    marks = {round(end - number * spacing) for number in range(distill.average_last)}
    return sorted({mark for mark in marks if mark > 0} | {end})


def crossed(every_tokens: int, before: int, after: int) -> bool:
    """Whether a multiple of ``every_tokens`` lies in (before, after]; never when it is 0."""
    return every_tokens > 0 and after // every_tokens > before // every_tokens


def phase_ended(schedule: ScheduleConfig, before: int, after: int) -> str | None:
    """The last phase whose final token lies in (before, after], if any."""
    ended = [name for name, end in phase_ends(schedule).items() if before < end <= after]
    return ended[-1] if ended else None
