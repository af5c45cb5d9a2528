"""Write the page of a report: one HTML file with everything in it, readable offline."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Sequence
from html import escape

from megatron_idea import config as configuration
from megatron_idea.records.readable import (
    human_amount,
    human_count,
    human_duration,
    human_mean,
    spread,
)
from megatron_idea.records.record import Record
from megatron_idea.records.terminal import CONTROL
from megatron_idea.report import charts, tables
from megatron_idea.report.chart import SHADES, Figure, Table
from megatron_idea.report.cost import cost
from megatron_idea.report.predicted import predicted
from megatron_idea.report.run import Run, mean_of, named
from megatron_idea.report.samples import samples
from megatron_idea.report.svg import SIZE, figure

ZOOM = "Drag over a chart with the mouse to see a part of it, double-click to see all."


def page(runs: Sequence[Run]) -> str:
    """Write the page of one run with all its numbers, or of several in the same charts."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    return document(title, f"{body}{_footer(runs)}")


def document(title: str, body: str, style: str = "") -> str:
    """Write a page with all that its charts and tables need, and ``style``, around its body."""
    whole = (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n:root {{ --shades: linear-gradient(90deg, {', '.join(SHADES)}); }}\n"
        f"{_asset('page.css')}{style}</style></head><body>"
        '<svg width="0" height="0" style="position:absolute" aria-hidden="true">'
        f'<clipPath id="plot"><rect width="{SIZE}" height="{SIZE}"/></clipPath></svg>'
        f"<main>{body}</main>"
        f"<script>\n{_asset('page.js')}</script></body></html>\n"
    )
    return whole.translate(CONTROL)  # which a browser hides, or takes for the end of the text


def _asset(name: str) -> str:
    return (importlib.resources.files("megatron_idea.report") / name).read_text("utf-8")


def _one(run: Run) -> str:
    return (
        f"<header><h1>{escape(run.name)}</h1><p>{escape(_subtitle(run))}</p></header>"
        f"{_broken(run)}{_passed(run)}{_tiles(run)}"
        f'<h2>Run</h2><p class="hint">{ZOOM}</p>'
        f"{gallery([*charts.overview([run]), *charts.details([run])])}"
        f"{_layers(run)}"
        f"<h2>Numbers</h2>{_tables(run)}"
        f"{samples(run)}{_configuration(run)}"
    )


def _several(runs: Sequence[Run]) -> str:
    differences = tables.differences(runs)
    drawn = gallery([*charts.overview(runs), *charts.details(runs)])
    return (
        f"<header><h1>{len(runs)} runs</h1></header>"
        f"<h2>Side by side</h2>{card(tables.compared(runs))}"
        f"{card(differences) if differences else ''}"
        '<h2>Curves</h2><p class="hint">A run in a legend: touch it to hide it in every chart, '
        f"move over it to see it alone. {ZOOM}</p>{drawn}<h2>Each run</h2>"
        + "".join(map(_folded, runs))
    )


def _folded(run: Run) -> str:
    """Write what a page of one run has beyond the charts that are drawn for all together."""
    return (
        f'<details class="run"><summary>{escape(run.name)}<small>{escape(_subtitle(run))}</small>'
        f"</summary>{_broken(run)}{_passed(run)}{_layers(run)}<h2>Numbers</h2>{_tables(run)}{samples(run)}"
        f"{_configuration(run)}</details>"
    )


def _broken(run: Run) -> str:
    if not run.broken:
        return ""
    shown = ", ".join(run.broken[:3]) + (" and others" if len(run.broken) > 3 else "")
    count = "1 line" if len(run.broken) == 1 else f"{len(run.broken):,} lines"
    return f'<p class="warning">Left out {count} that could not be read: {escape(shown)}.</p>'


def _passed(run: Run) -> str:
    passed = tables.passed_teacher(run)
    return f'<p class="warning">{escape(passed)}</p>' if passed else ""


def _subtitle(run: Run) -> str:
    total = human_count(run.config.schedule.total_tokens)
    steps = f"{run.records[-1].step:,} steps"
    if run.is_finished:
        return f"finished: {human_count(run.tokens)} tokens in {steps}"
    done = f"{human_count(run.tokens)} of {total} tokens ({tables.share(run):.0%}) in {steps}"
    return f"not finished: {done}; in phase {run.records[-1].phase}"


def _tiles(run: Run) -> str:
    """Write the outcome in a few numbers."""
    first, last = run.records[0], run.records[-1]
    sums, closing = cost(run), tables.closing(run)
    tiles = [
        ("parameters", run.parameters(last), f"began with {run.parameters(first)}"),
        *(_units(axis, first, last) for axis in run.axes),
    ]
    losses = run.evaluations()
    if losses:
        at = f"after {human_count(losses[-1]['tokens'])} tokens"
        tiles.append(("held-out loss", f"{losses[-1]['val_loss']:.4f}", f"nats per token, {at}"))
    speeds = [row for row in closing.rows if row[0] == "training tokens/s"]
    if speeds:
        before = [cell for cell in speeds[0][1:-1] if cell]
        note = f"at full size {before[0]}" if before else "of training steps"
        tiles.append(("tokens/s, median", speeds[0][-1] or "-", note))
    saved = 1 - sums.this_run[-1] / sums.zeros_only[-1]
    note = f"{saved:.0%} less than at full size" if saved > 0 else "all at full size"
    tiles.append(("training compute", human_amount(sums.this_run[-1], "FLOPs"), note))
    seconds = sum(record.step_s for record in run.records)
    if seconds:
        tiles.append(("time of training steps", human_duration(seconds), tables.on_processes(run)))
    return f'<dl class="tiles">{"".join(_tile(*tile) for tile in tiles)}</dl>'


def _units(axis: str, first: Record, last: Record) -> tuple[str, str, str]:
    """Name the live units of an axis, now and at first."""
    mean, live = mean_of("live", axis), last.live[axis]
    by_layer = f"{spread(live)} by layer, " if "to" in spread(live) else ""
    return named(axis), human_mean(mean(last)), f"{by_layer}began with {human_mean(mean(first))}"


def _tile(name: str, value: str, note: str) -> str:
    return (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
    )


def gallery(figures: Sequence[Figure]) -> str:
    """Draw charts two in a row; one that would stand alone takes the row."""
    drawn = list(figures)
    if sum(not one.is_wide for one in drawn) % 2:
        last = max(i for i, one in enumerate(drawn) if not one.is_wide)
        drawn[last] = dataclasses.replace(drawn[last], is_wide=True)
    return f'<div class="charts">{"".join(map(figure, drawn))}</div>'


def _layers(run: Run) -> str:
    """Draw maps of all layers; and the scores of single ones, which a phone lets slide."""
    figures, scores = charts.layers(run), charts.distributions(run)
    row = "".join(map(figure, scores))
    return (
        ("<h2>Layers</h2>" if figures or scores else "")
        + (gallery(figures) if figures else "")
        + (f'<h2>Importance</h2><div class="charts slides">{row}</div>' if row else "")
    )


def _tables(run: Run) -> str:
    every = (
        tables.closing(run), tables.spent(run), tables.environment(run), tables.removed(run),
        tables.removed_layers(run), predicted(run), tables.incidents(run),
    )  # fmt: skip
    return f'<div class="cards">{"".join(card(table) for table in every if table)}</div>'


# Rows of a table that are shown without asking.
MOST_ROWS = 14


def card(table: Table) -> str:
    """Write a table; of a long one that no colour ties to charts the end is folded."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    firsts = [
        f'<th scope="row" class="keyed"><i class="dot {colour}"></i>' for colour in table.colours
    ] or ['<th scope="row">'] * len(table.rows)
    rows = [
        f"<tr>{first}{escape(row[0])}</th>{''.join(map(_cell, row[1:]))}</tr>"
        for first, row in zip(firsts, table.rows, strict=True)
    ]
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    headers = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
    body = _scroll(headers + "".join(rows))
    if len(rows) > MOST_ROWS + 2 and not table.colours:
        body = (
            f"{_scroll(headers + ''.join(rows[:MOST_ROWS]))}<details><summary>all {len(rows):,} "
            f"rows</summary>{body}</details>"
        )
    wide = " wide" if len(table.columns) > 5 else ""
    muted = " muted" if table.is_muted else ""
    return (
        f'<section class="card{wide}{muted}"><h3>{escape(table.title)}</h3>{body}{note}</section>'
    )


def _cell(text: str) -> str:
    """Write a cell; extremes in brackets go below their mean."""
    return f"<td>{escape(text).replace(' [', '<br>[')}</td>"


def _scroll(rows: str) -> str:
    return f'<div class="scroll"><table>{rows}</table></div>'


def _configuration(run: Run) -> str:
    text = escape(configuration.to_yaml(run.config))
    return (
        '<h2>Configuration</h2><section class="card"><details><summary>config.yaml, resolved'
        f"</summary><pre>{text}</pre></details></section>"
    )


def _footer(runs: Sequence[Run]) -> str:
    folders = ", ".join(str(run.run_dir) for run in runs)
    return (
        f"<footer>Drawn from what the run recorded in {escape(folders)}. Move over a chart, or "
        "touch it, for its values.</footer>"
    )
