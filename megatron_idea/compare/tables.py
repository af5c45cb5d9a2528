"""Put results into tables and sentences, for a terminal, for Markdown and for the page."""

from __future__ import annotations

import math
import re
from html import escape

from rich.console import Group
from rich.text import Text

from megatron_idea.compare.results import ArmResult, PairResult, Results
from megatron_idea.compare.statistics import Interval
from megatron_idea.records.readable import human_amount, human_count, human_duration
from megatron_idea.records.terminal import CONTROL
from megatron_idea.report.chart import Table, colours_of
from megatron_idea.report.tables import in_terminal

OWN_ROW = (
    "± is half of the 95 % t-interval over seeds. Each interval holds for its own row: of twenty "
    "such rows one is expected to be wrong."
)


def render(results: Results) -> Group:
    """Lay out arms, further pairs, the sweep and what is still to do for a terminal."""
    titled = (
        Group(Text(f"\n{shown.title}", style="bold"), in_terminal(shown)) for shown in _all(results)
    )
    return Group(*titled)


def markdown(results: Results) -> str:
    """Write the same tables as GitHub Markdown."""
    return "\n\n".join(map(_markdown, _all(results))) + "\n"


def _all(results: Results) -> list[Table]:
    every = (arms(results), pairs(results), swept(results), to_do(results))
    return [shown for shown in every if shown.rows]


def arms(results: Results) -> Table:
    """List the arms with a finished run: what they reach, and how that differs from the reference.

    A column that says nothing of any arm is left out.
    """
    against = {pair.left: pair for pair in results.pairs if pair.right == results.reference}
    columns = (
        "arm", "seeds", "loss", f"to {results.reference}", "verdict", "agree", "tokens", "FLOPs",
        "time", "rise", "average parameters", "shape",
    )  # fmt: skip
    rows = [
        (
            named(arm, found),
            str(len(found.seeds)),
            plus_minus(found.loss),
            *(_outcome(against[arm]) if arm in against else _own(found)),
            human_duration(found.wall_s.mean),
            plus_minus(found.rise, "+") if found.rise else "",
            human_count(found.average_parameters),
            _shape(found),
        )
        for arm, found in results.arms.items()
    ]
    shown = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return Table(
        "Arms",
        [columns[i] for i in shown],
        [[row[i] or "-" for i in shown] for row in rows],
        f"Held-out loss in nats per token. {OWN_ROW} {_explained(results)}",
        colours_of(len(rows)),
    )


def _own(found: ArmResult) -> list[str]:
    """Write what the reference has where others have what they differ by."""
    flops = "not known" if found.flops is None else human_amount(found.flops, "FLOPs")
    return ["", "", "", human_count(found.tokens), flops]


def _explained(results: Results) -> str:
    reference = results.reference
    texts = [f"tokens, FLOPs: those of {reference}; of the others, times those."]
    texts.append("time: of training steps.")
    if any(found.rise for found in results.arms.values()):
        texts.append("rise: highest loss since the first removal minus the last one before.")
    texts.append("average parameters: those alive, mean over tokens.")
    if any(found.at_edge for found in results.arms.values()):
        texts.append(
            f"edge: the best {results.sweep} is an end of the sweep; a better one may lie beyond."
        )
    return " ".join(texts)


def _shape(found: ArmResult) -> str:
    """Write the live units at the end; where a method decides by seed, those of the first one."""
    first = found.shapes[0]
    return first if len(set(found.shapes)) == 1 else f"{first} (seed {found.seeds[0]})"


def pairs(results: Results) -> Table:
    """List the pairs beyond those with the reference."""
    rows = [
        (f"{pair.left} against {pair.right}", _equality(pair), *_outcome(pair))
        for pair in results.pairs
        if pair.right != results.reference
    ]
    columns = ("pair", "", "difference", "verdict", "agree", "tokens", "FLOPs")
    note = f"Left minus right in nats per token; tokens and FLOPs: left to right. {OWN_ROW}"
    return Table("Further pairs", columns, rows, note)


def _outcome(pair: PairResult) -> list[str]:
    return [
        plus_minus(pair.difference, "+"),
        pair.verdict,
        _agreement(pair),
        f"{pair.tokens_ratio:.2f}",
        _ratio(pair.flops_ratio),
    ]


def swept(results: Results) -> Table:
    """List the mean loss of each arm at each value of the sweep; no rows without a sweep."""
    values = list(dict.fromkeys(value for of_arm in results.runs.values() for value in of_arm))
    rows = [
        (arm, *(_at(found, value) for value in values))
        for arm, found in results.arms.items()
        if results.sweep
    ]
    note = "Mean held-out loss over the finished seeds; * the best value, which stands for the arm."
    return Table(f"Sweep of {results.sweep}", ("arm", *values), rows, note)


def _at(found: ArmResult, value: str) -> str:
    if value not in found.swept:
        return "-"
    return f"{_loss(found.swept[value])}{' *' if value == found.value else ''}"


def to_do(results: Results) -> Table:
    """List the arms with runs that are missing or unfinished."""
    rows = []
    for arm, values in results.runs.items():
        runs = [(value, seed, run) for value, each in values.items() for seed, run in each.items()]
        done = sum(run.finished for *_, run in runs)
        begun = [
            f"{value} seed {seed}: {min(1.0, run.tokens / run.total_tokens):.0%}".strip()
            for value, seed, run in runs
            if run.tokens and not run.finished
        ]
        if done < len(runs):
            rows.append((arm, f"{done} of {len(runs)}", ", ".join(begun) or "-"))
    return Table("Still to do", ("arm", "runs finished", "begun"), rows)


def named(arm: str, found: ArmResult) -> str:
    """Name an arm and its best value of the sweep: ``idea [lr=0.01]``."""
    if not found.value:
        return arm
    return f"{arm} [{found.value}{', edge' if found.at_edge else ''}]"


def plus_minus(found: Interval, sign: str = "") -> str:
    """Write a mean and half of its interval, if it has one; ``sign`` as ``format`` has it."""
    mean = _loss(found.mean, sign)
    return mean if found.half_width is None else f"{mean} ± {found.half_width:.4f}"


def _loss(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if math.isfinite(value) else "not finite"


def _ratio(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f}"


def _agreement(pair: PairResult) -> str:
    """Say in how many seeds the difference has the mean's sign, and which: ``2 of 3 lower``."""
    mean = pair.difference.mean
    way = "lower" if mean < 0 else "higher" if mean > 0 else "equal"
    return f"{pair.agree} of {pair.of} {way}" if math.isfinite(mean) else "-"


def _equality(pair: PairResult) -> str:
    return f"equal {pair.equal}" if pair.equal != "neither" else "neither equal"


def answer(pair: PairResult) -> tuple[str, str, str]:
    """Say in the three parts of a sentence how a pair came out.

    Returns: ``idea against scratch, equal tokens, 1.41 x FLOPs``, the verdict, and
        ``-0.0040 ± 0.0120 nats per token, 2 of 3 seeds lower``.
    """
    terms = [f"{pair.left} against {pair.right}"]
    if pair.equal != "neither":
        terms.append(f"equal {pair.equal}")
    if "tokens" not in pair.equal:
        terms.append(f"{pair.tokens_ratio:.2f} x tokens")
    if "FLOPs" not in pair.equal:
        known = pair.flops_ratio is not None
        terms.append(f"{pair.flops_ratio:.2f} x FLOPs" if known else "FLOPs not known")
    found = "a loss is not finite"
    if math.isfinite(pair.difference.mean):
        count, way = _agreement(pair).rsplit(" ", 1)
        seeds = "seed" if pair.of == 1 else "seeds"
        found = f"{plus_minus(pair.difference, '+')} nats per token, {count} {seeds} {way}"
    return ", ".join(terms), pair.verdict, found


def _markdown(shown: Table) -> str:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [line([_plain(cell) for cell in row]) for row in (shown.columns, *shown.rows)]
    rows.insert(1, line(["---", *["---:"] * (len(shown.columns) - 1)]))
    parts = [f"**{_plain(shown.title)}**", "\n".join(rows)]
    return "\n\n".join([*parts, _plain(shown.note)] if shown.note else parts)


def _plain(text: str) -> str:
    """Write text so that neither Markdown nor HTML sees anything in it."""
    text = " ".join(text.translate(CONTROL).split())
    return escape(re.sub(r"([\\|`*\[\]~])", r"\\\1", text), quote=False)
