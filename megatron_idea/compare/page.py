"""Write what a suite shows: a page with everything in it, and a file of numbers."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

import megatron_idea
from megatron_idea.compare import tables
from megatron_idea.compare.results import Curve, PairResult, Results, as_json, curves
from megatron_idea.compare.suite import Suite
from megatron_idea.records.readable import human_count, scaled
from megatron_idea.report.chart import (
    COLOURS,
    Axis,
    Band,
    Chart,
    Series,
    Table,
    colours_of,
    fitted,
    tokens_axis,
)
from megatron_idea.report.charts import loss_axis
from megatron_idea.report.page import ZOOM, card, document, gallery

PAGE, NUMBERS, MARKDOWN = "comparison.html", "comparison.json", "comparison.md"


def write(suite: Suite, results: Results, command: str = "") -> Path:
    """Write ``comparison.html``, ``.json`` and ``.md`` into the suite's folder.

    Args:
        command: how the comparison was called; folders are cut off absolute paths.

    Returns: the page.
    """
    suite.out.mkdir(parents=True, exist_ok=True)
    # Where things lie on this machine is nobody else's business.
    command = re.sub(r"(^|[\s='\"])~?/\S*/", r"\1", command)
    numbers = json.dumps(_head(command) | as_json(results), indent=1, allow_nan=False)
    (suite.out / NUMBERS).write_text(f"{numbers}\n", "utf-8")
    (suite.out / MARKDOWN).write_text(tables.markdown(results), "utf-8")
    (suite.out / PAGE).write_text(page(suite, results, command), "utf-8")
    return suite.out / PAGE


def _head(command: str) -> dict[str, Any]:
    """Say by which sources, when and how the numbers came about."""
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def _commit() -> str | None:
    """Describe the commit of the checkout that the package is imported from; None without one."""
    checkout = Path(megatron_idea.__file__).resolve().parents[1]
    if not (checkout / ".git").exists():  # an environment within somebody else's repository
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--tags", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def page(suite: Suite, results: Results, command: str = "") -> str:
    """Write the page: answers, intervals, tables, curves, and what all that does not show.

    Args:
        command: how the comparison was called, shown above the suite, whose keys it may replace.
    """
    body = (
        f"<header><h1>{escape(suite.path.stem)}</h1><p>{escape(_subtitle(results))}</p></header>"
        f"{_answers(results)}{_forest(results)}"
        f"<h2>Numbers</h2>{_cards([tables.arms(results), tables.pairs(results)])}"
        f"{_curves(results)}"
        f"{_cards([_predictions(results), tables.swept(results), tables.to_do(results)])}"
        f"<h2>What is not shown</h2><p>{escape(_not_shown(results))}</p>"
        f"{_suite(suite, command)}"
        f"<footer>Drawn from what the runs recorded{escape(_where(results))}. Move over a chart, "
        f"or touch it, for its values. {ZOOM}</footer>"
    )
    style = (importlib.resources.files("megatron_idea.compare") / "page.css").read_text("utf-8")
    return document(suite.path.stem, body, style)


def _subtitle(results: Results) -> str:
    by_seed = [each for values in results.runs.values() for each in values.values()]
    runs = [run for each in by_seed for run in each.values()]
    done = sum(run.finished for run in runs)
    seeds = ", ".join(map(str, results.seeds))
    swept = f", {results.sweep} swept" if results.sweep else ""
    return (
        f"{len(results.runs)} arms, seeds {seeds}{swept}; {done} of {len(runs)} runs finished; "
        f"held against {results.reference}"
    )


def _where(results: Results) -> str:
    return f" on {results.device}" if results.device else ""


def _cards(shown: Sequence[Table]) -> str:
    drawn = "".join(card(table) for table in shown if table.rows)
    return f'<div class="cards">{drawn}</div>' if drawn else ""


# ------------------------------------------------------------------------------------------ answers


def _answers(results: Results) -> str:
    if not results.pairs:
        return '<p class="warning">No two arms have finished a run of the same seed yet.</p>'
    return f'<ul class="answers">{"".join(map(_answer, results.pairs))}</ul>'


def _answer(pair: PairResult) -> str:
    who, verdict, found = map(escape, tables.answer(pair))
    return f'<li class="{_colour(pair)}">{who}: <b>{verdict}</b> ({found})</li>'


def _colour(pair: PairResult) -> str:
    return pair.verdict.partition(" ")[0]


def _forest(results: Results) -> str:
    """Draw each arm's difference from the reference, with its interval, in a lane of its own."""
    shown = [
        pair
        for pair in results.pairs
        if pair.right == results.reference and isfinite(pair.difference.mean)
    ]
    if not shown:
        return ""
    axis = _differences_axis(shown)
    ticks = "".join(
        f'<span style="left:{_place(axis, value)}">{text}</span>' for value, text in axis.ticks(4)
    )
    rows = "".join(_row(pair, axis) for pair in shown)
    return (
        f'<h2>Against {escape(results.reference)}</h2><section class="card forest">'
        "<p>Difference of held-out losses within seeds, nats per token: mean and 95 % t-interval. "
        f"Left of the line the arm's loss is lower than that of {escape(results.reference)}.</p>"
        f'{rows}<div class="row" aria-hidden="true"><div class="name"></div>'
        f'<div class="lane">{ticks}</div><div class="words"></div></div></section>'
    )


def _differences_axis(pairs: Sequence[PairResult]) -> Axis:
    ends = [0.0]
    for pair in pairs:
        found = pair.difference
        ends += [end for end in (found.low, found.mean, found.high) if end is not None]
    return fitted("", ends, from_zero=False)


def _row(pair: PairResult, axis: Axis) -> str:
    found = pair.difference
    whisker = ""
    if found.low is not None and found.high is not None:
        width = 100 * (axis.place(found.high) - axis.place(found.low))
        place = f"left:{_place(axis, found.low)};width:{width:.2f}%"
        whisker = f'<i class="whisker" style="{place}"></i>'
    grid = "".join(
        f'<i class="grid" style="left:{_place(axis, value)}"></i>' for value, _ in axis.ticks(4)
    )
    return (
        f'<div class="row {_colour(pair)}"><div class="name">{escape(pair.left)}</div>'
        f'<div class="lane" aria-hidden="true">{grid}'
        f'<i class="zero" style="left:{_place(axis, 0.0)}"></i>{whisker}'
        f'<i class="mean" style="left:{_place(axis, found.mean)}"></i></div>'
        f'<div class="words">{tables.plus_minus(found, "+")} <b>{pair.verdict}</b></div></div>'
    )


def _place(axis: Axis, value: float) -> str:
    return f"{100 * axis.place(value):.2f}%"


# ------------------------------------------------------------------------------------------- curves


def _curves(results: Results) -> str:
    """Draw each arm's loss over tokens, and over FLOPs where they are known."""
    every = curves(results)
    if not every:
        return ""
    over_tokens = _chart(
        "loss-over-tokens",
        "Loss over tokens",
        every,
        tokens_axis(0, max(at for curve in every.values() for at in curve.tokens)),
        {arm: curve.tokens for arm, curve in every.items()},
    )
    known = {arm: curve.flops for arm, curve in every.items() if all(map(isfinite, curve.flops))}
    largest = max((value for flops in known.values() for value in flops), default=0.0)
    divisor, unit = scaled(largest, "FLOPs")
    over_flops = _chart(
        "loss-over-flops",
        "Loss over training compute",
        every,
        Axis(f"{unit} of training", 0.0, largest / divisor or 1.0),
        {arm: [value / divisor for value in flops] for arm, flops in known.items()},
    )
    return (
        '<h2>Curves</h2><p class="hint">An arm in a legend: touch it to hide it in every chart, '
        "move over it to see it alone.</p>"
        f"{gallery([over_tokens, over_flops] if known else [over_tokens])}"
    )


def _chart(
    slug: str, title: str, every: Mapping[str, Curve], x: Axis, spent: Mapping[str, Sequence[float]]
) -> Chart:
    """Draw the arms of which it is known what they have spent, by the place of each among all."""
    colours = colours_of(len(every))
    places = {arm: i for i, arm in enumerate(every)}
    left_out = [arm for arm in every if arm not in spent]
    shown = [(every[arm], at, colours[places[arm]], places[arm]) for arm, at in spent.items()]
    # Of more arms than there are colours, bands would hide the curves.
    banded = shown if len(every) <= len(COLOURS) else []
    last = [loss for curve in every.values() for loss in curve.mean[-1:]]
    losses = [value for curve in every.values() for value in curve.mean if isfinite(value)]
    return Chart(
        slug,
        title,
        "Held-out loss where every seed was evaluated: mean over the seeds"
        f"{', and their extremes as a band' if banded else ''}. The first fall is cut off."
        + (f" Not known of {', '.join(left_out)}." if left_out else ""),
        x,
        loss_axis(losses, last, []),
        [Series("held-out", at, curve.mean, colour, run=i) for curve, at, colour, i in shown],
        bands=[Band(at, c.low, c.high, colour, run=i) for c, at, colour, i in banded],
        is_wide=True,
        runs=list(every),
    )


# ------------------------------------------------------------------------------- around the numbers


def _predictions(results: Results) -> Table:
    """Hold the law's differences against the measured ones, of pairs within its range."""
    rows = [
        (
            f"{pair.left} against {pair.right}",
            f"{pair.predicted:+.4f}",
            tables.plus_minus(pair.difference, "+"),
            _holds(pair, pair.predicted),
        )
        for pair in results.pairs
        if pair.in_range and pair.predicted is not None
    ]
    return Table(
        "Predicted and measured",
        ("pair", "predicted", "measured", "in the interval"),
        rows,
        "Differences in nats per token. The scaling law knows average parameters and tokens, and "
        "nothing of methods, teachers or learning rates. Pairs out of its range are left out.",
    )


def _holds(pair: PairResult, predicted: float) -> str:
    low, high = pair.difference.low, pair.difference.high
    return "-" if low is None or high is None else "yes" if low <= predicted <= high else "no"


def _not_shown(results: Results) -> str:
    """Say what the numbers do not tell."""
    found = list(results.arms.values())
    texts = []
    if found:
        sizes = _range([count for one in found for count in one.parameters])
        tokens = _range([one.tokens for one in found])
        texts.append(
            f"These models end with {sizes} parameters after {tokens} tokens; nothing here says "
            "that the order is the same at other sizes."
        )
    texts.append(
        "Seeds change the first weights, the order of the data and what a method leaves to chance: "
        "an interval says how far other seeds may differ, not other data, models or settings. With "
        "few seeds it is wide, and it takes their differences as normally distributed. Each "
        "interval holds for its own row: of twenty rows one is expected to be wrong, and the best "
        "of many arms looks better than it is."
    )
    if results.sweep:
        texts.append(
            f"Each arm stands with the best of {_count_values(results)} values of {results.sweep}, "
            "chosen by the same held-out data and seeds: its loss is a little too low, and more so "
            "where values differ little."
        )
    else:
        texts.append(
            "All arms have the settings that the suite gives them, tuned or not: another learning "
            "rate may favour another arm."
        )
    return " ".join(texts)


def _count_values(results: Results) -> int:
    return len({value for values in results.runs.values() for value in values})


def _range(counts: Sequence[float]) -> str:
    low, high = human_count(min(counts)), human_count(max(counts))
    return low if low == high else f"{low} to {high}"


def _suite(suite: Suite, command: str) -> str:
    text = f"# {command}\n{suite.text}" if command else suite.text
    return (
        f'<h2>Suite</h2><section class="card"><details><summary>{escape(suite.path.name)}</summary>'
        f"<pre>{escape(text)}</pre></details></section>"
    )
