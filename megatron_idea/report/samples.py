"""Show what the model generated while it was trained and shrank, prompt by prompt."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from html import escape
from typing import Any

from megatron_idea.records.readable import human_count, human_mean
from megatron_idea.report.run import Run, mean_of
from megatron_idea.shape import UNITS

# Prompts, those that were continued last, and texts of each, spread over the run: the first and
# the last are among them.
MOST_PROMPTS, MOST_TEXTS = 8, 24

# Characters of a text that are shown without asking.
MOST_CHARACTERS = 500


def samples(run: Run) -> str:
    """Write the samples' section of a page; nothing without samples."""
    prompts = _by_prompt(run.samples)
    if not prompts:
        return ""
    # The last ones continued come last.
    shown = list(prompts.items())[-MOST_PROMPTS:]
    rest = len(prompts) - len(shown)
    note = f'<p class="hint">{rest} more prompts in samples.jsonl.</p>' if rest else ""
    cards = "".join(_prompt(run, prompt, texts) for prompt, texts in shown)
    return f'<h2>Samples</h2>{note}<div class="cards">{cards}</div>'


def _by_prompt(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group records by prompt, oldest first; of two at one step the later, as after a resume."""
    prompts: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        if "text" in record:
            prompt = str(record.get("prompt", ""))
            prompts[prompt] = prompts.pop(prompt, {}) | {record["step"]: record}
    return {
        prompt: [by_step[step] for step in sorted(by_step)] for prompt, by_step in prompts.items()
    }


def _prompt(run: Run, prompt: str, texts: Sequence[dict[str, Any]]) -> str:
    shown = spread_over(texts, MOST_TEXTS)
    *older, newest = shown
    head = f"<q>{escape(prompt.rstrip())}</q>" if prompt.strip() else "Beginning of a document"
    folded = ""
    if older:
        of = f" of {len(texts) - 1}" if len(shown) < len(texts) else ""
        lines = "".join(_text(run, one) for one in reversed(older))
        folded = (
            f"<details><summary>{len(older)}{of} earlier, the newest first</summary>{lines}"
            "</details>"
        )
    return f'<section class="card sample"><h3>{head}</h3>{_text(run, newest)}{folded}</section>'


def spread_over(records: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Choose at most so many at equal distances, the first and the last among them."""
    if len(records) <= most:
        return list(records)
    return [records[round(i * (len(records) - 1) / (most - 1))] for i in range(most)]


def _text(run: Run, record: dict[str, Any]) -> str:
    text = str(record["text"])
    begin, rest = text[:MOST_CHARACTERS], text[MOST_CHARACTERS:]
    # The rest is shown where the beginning ends.
    more = (
        f"<details><summary>{len(rest):,} more characters</summary><span>{escape(rest)}</span>"
        "</details>"
        if rest
        else ""
    )
    return (
        f'<h4>{escape(_when(run, record))}</h4><div class="text" dir="auto">{escape(begin)}{more}'
        "</div>"
    )


def _when(run: Run, record: dict[str, Any]) -> str:
    """Name the tokens, and the size of the model at that time."""
    tokens = record.get("tokens")
    when = [f"{human_count(tokens)} tokens" if isinstance(tokens, (int, float)) else ""]
    # A sample is written after its step's record.
    index = bisect.bisect_right(run.records, record["step"], key=lambda one: one.step) - 1
    now = run.records[max(0, index)]
    when += [f"step {record['step']:,}"] if not when[0] else []
    if run.prunes:
        live = (f"{human_mean(mean_of('live', a)(now))} {UNITS[a]}s" for a in run.axes)
        when += [now.phase, *live]
    return ", ".join(part for part in when if part)
