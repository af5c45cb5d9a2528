"""A student and its teacher as two model folders: the small one drafts, the large one verifies.

Speculative decoding lets a small model write a few tokens ahead and a large one, which looks at all
of them in one pass, take those that it could have written itself. Both need the same tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.checkpoint.state import TrainState
from megatron_idea.config import Config, ConfigError
from megatron_idea.distill.source import find_teacher, own_shape
from megatron_idea.huggingface.export import (
    Exported,
    Form,
    check_free,
    export_checkpoint,
    export_weights,
)
from megatron_idea.huggingface.names import is_hugging_face
from megatron_idea.records.read import read_metrics
from megatron_idea.schedule import teaching_begins

DRAFTED_TOKENS = 4
"""Tokens that the model cards let a draft write ahead."""


def export_draft(path: Path, out: Path, draft_of: Path, form: Form) -> list[Exported]:
    """Write a checkpoint, or a run's latest, as ``out`` and the teacher it had as ``draft_of``.

    Both get the run's tokenizer, and model cards that say how the one is served as the draft of the
    other. The teacher's layout is always padded. A teacher that is a Hugging Face folder is what
    ``draft_of`` has to name: it is not written again.

    Returns: what was written, the student first.
    Raises: ConfigError without a teacher, CheckpointError when it is missing, damaged or another
        one; else as ``export_checkpoint``.
    """
    if form.format != "huggingface":
        raise ConfigError("--draft-of writes Hugging Face folders; export each --format gguf alone")
    if form.optimizer:
        raise ConfigError("--draft-of writes weights to serve; export with --optimizer alone")
    found = checkpoint.resolve(path)
    run_dir = found.absolute().parents[1]
    # A run can be moved, and its own teacher with it.
    config = configuration.replace(checkpoint.read_config(found), run_dir=str(run_dir))
    state = checkpoint.read_state(found)
    if not state.teacher:
        raise ConfigError(
            f"{found} has learnt from no teacher (distill.teacher={config.distill.teacher}): "
            "without --draft-of it is exported alone"
        )
    teacher, _ = find_teacher(config, state.teacher)
    is_there = is_hugging_face(teacher)
    if is_there and draft_of.resolve() != teacher.resolve():
        raise ConfigError(
            f"the teacher of {found} is a Hugging Face folder already: give --draft-of {teacher}"
        )
    if out.resolve() == draft_of.resolve():
        raise ConfigError(f"{out} and --draft-of {draft_of} are one folder; name two")
    check_free(out)
    remark = _remark(run_dir, state, out, draft_of, form)
    written = []
    if not is_there:
        check_free(draft_of)
        of_teacher = dataclasses.replace(
            form, layout="padded", tokenizer=form.tokenizer or config.data.tokenizer
        )
        written.append(_export_teacher(config, teacher, draft_of, of_teacher, remark))
    written.insert(0, export_checkpoint(found, out, **vars(form), remark=remark))
    return written


def _export_teacher(config: Config, teacher: Path, out: Path, form: Form, remark: str) -> Exported:
    if config.distill.teacher != "self":
        return export_checkpoint(teacher, out, **vars(form), remark=remark)
    step = teaching_begins(config.schedule, config.distill) // config.batch_tokens
    tokens = step * config.batch_tokens
    state = TrainState(step, tokens, own_shape(teacher, config.model))
    about = (
        "The enlarged model of a run that pruned it while it trained: the mean of its last weights "
        "before anything was removed, which the run then learnt from."
    )
    return export_weights(teacher, config, state, out, form, about, remark)


def _remark(run_dir: Path, state: TrainState, out: Path, draft_of: Path, form: Form) -> str:
    """Say in a model card how the two are served, and how often the large one would agree."""
    how = {
        "method": "draft_model", "model": str(out), "num_speculative_tokens": DRAFTED_TOKENS,
    }  # fmt: skip
    command = ["vllm", "serve", str(draft_of), "--speculative-config", json.dumps(how)]
    if form.layout == "compact":
        command.append("--trust-remote-code")
    lines = [
        "## As a draft",
        "",
        f"`{out}` learnt from `{draft_of}` and has its tokenizer, so it can draft for it in "
        "speculative decoding. vLLM's documentation gives this form; it was not run:",
        "",
        "```",
        shlex.join(command),
        "```",
        "",
    ]
    asked = [
        record
        for record in read_metrics(run_dir, broken=[])
        if record.acceptance is not None and record.tokens <= state.consumed_tokens
    ]
    if asked:
        lines += [
            f"In training, after {asked[-1].tokens:,} tokens, the sum of min(p, q) over the "
            f"vocabulary was {asked[-1].acceptance:.4f} on average over a batch: the share of "
            "drafted tokens that the large model would take at temperature 1.",
            "",
        ]
    return "\n".join(lines)
