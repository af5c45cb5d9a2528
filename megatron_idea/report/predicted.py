"""Hold what a scaling law and the plan said of a run against what came."""

from __future__ import annotations

import math

from megatron_idea.config import LawConfig
from megatron_idea.course import flops_between, own_teacher, teacher_flops_between
from megatron_idea.law import average_parameters, in_range, parameter_steps, predict
from megatron_idea.records.readable import human_amount, human_count, human_range
from megatron_idea.report.chart import Table
from megatron_idea.report.cost import cost
from megatron_idea.report.run import Run


def predicted(run: Run) -> Table | None:
    """Compare loss, average size and FLOPs of a finished run; None for any other."""
    loss = _held_out(run)
    if not run.is_finished or loss is None:
        return None
    law, average = run.config.law, recorded_average(run)
    planned = average_parameters(run.config)
    rows = [
        ("held-out loss", f"{predict(law, average, run.tokens):.4f}", f"{loss:.4f}"),
        ("average parameters", human_count(planned), human_count(average)),
        ("training FLOPs", _flops(_planned_flops(run)), _flops(_recorded_flops(run))),
    ]
    valid = in_range(law, average, run.tokens)
    note = (
        f"Loss by the law of {law.name}, from the recorded average and tokens; the rest as "
        "planned. Its level is that of the text and the tokenizer that the law was fitted on."
    )
    if not valid:
        note = (
            f"Outside the range of {law.name} ({human_range(law.parameters)} parameters, "
            f"{human_range(law.tokens_per_parameter)} tokens per parameter). {note}"
        )
    return Table(
        "Predicted and measured", ("", "predicted", "measured"), rows, note, is_muted=not valid
    )


def prediction(run: Run) -> str:
    """Say in a line what the law predicted.

    Empty outside the range of the law that everybody has, where it says little; one that was set
    in the configuration was meant.
    """
    loss, law = _held_out(run), run.config.law
    if not run.is_finished or loss is None:
        return ""
    average = recorded_average(run)
    valid = in_range(law, average, run.tokens)
    if not valid and law == LawConfig():
        return ""
    expected = predict(law, average, run.tokens)
    outside = "" if valid else "outside its range, "
    return (
        f"Predicted by the law of {law.name}: {outside}held-out loss {expected:.4f} for "
        f"{human_count(average)} parameters on average; measured {loss:.4f} "
        f"({loss - expected:+.4f})."
    )


def recorded_average(run: Run) -> float:
    """Average the live parameters over the run's tokens, from its records.

    Of steps before the first record, in a run that began at another's checkpoint, as planned.
    """
    batch = run.config.batch_tokens
    before = run.records[0].tokens - batch
    unrecorded = parameter_steps(run.config, before // batch) * batch
    return (unrecorded + cost(run).parameter_tokens[-1]) / run.tokens


def _held_out(run: Run) -> float | None:
    """Return the loss that was measured after the last step."""
    losses = [e["val_loss"] for e in run.evaluations() if e["tokens"] == run.tokens]
    return losses[-1] if losses and math.isfinite(losses[-1]) else None


def _planned_flops(run: Run) -> float | None:
    config, total = run.config, run.config.schedule.total_tokens
    teaching = teacher_flops_between(config, 0, total, own_teacher(config))
    return None if teaching is None else flops_between(config, 0, total) + teaching


def _recorded_flops(run: Run) -> float | None:
    """Return the FLOPs of all steps; of records that do not have them, what their shapes cost."""
    if run.records[-1].flops is not None:
        return run.records[-1].flops
    sums = cost(run)
    is_whole = run.records[0].tokens == run.config.batch_tokens
    flops = sums.this_run[-1] + sums.teacher[-1]
    return flops if is_whole and math.isfinite(flops) else None


def _flops(flops: float | None) -> str:
    return "not known" if flops is None else human_amount(flops, "FLOPs")
