"""The page of a report: one HTML file with everything in it, readable without a network."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Sequence
from html import escape
from typing import Any

from megatron_idea import config as configuration
from megatron_idea.estimate import human_count
from megatron_idea.report import charts, tables
from megatron_idea.report.chart import Figure, Table
from megatron_idea.report.cost import cost
from megatron_idea.report.run import Run, spread
from megatron_idea.report.svg import SIZE, figure

# The newest ones; a run that samples often would bury everything else.
MOST_SAMPLES = 12


def page(runs: Sequence[Run]) -> str:
    """One run with everything that is known of it, or several in the same charts."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{_asset('page.css')}</style></head><body>"
        '<svg width="0" height="0" style="position:absolute" aria-hidden="true">'
        f'<clipPath id="plot"><rect width="{SIZE}" height="{SIZE}"/></clipPath></svg>'
        f"<main>{body}{_footer(runs)}</main>"
        f"<script>\n{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (importlib.resources.files("megatron_idea.report") / name).read_text("utf-8")


def _one(run: Run) -> str:
    rows = _layers(run)
    return (
        f"<header><h1>{escape(run.name)}</h1><p>{escape(_subtitle(run))}</p></header>"
        f"{_tiles(run)}"
        f"<h2>Run</h2>{_charts([*charts.overview([run]), *charts.details([run])])}"
        f"{f'<h2>Layers and scores</h2>{rows}' if rows else ''}"
        f"<h2>Numbers</h2>{_tables(run)}"
        f"{_samples(run)}{_configuration(run)}"
    )


def _several(runs: Sequence[Run]) -> str:
    names = ", ".join(run.name for run in runs)
    return (
        f"<header><h1>{len(runs)} runs</h1><p>{escape(names)}</p></header>"
        f"<h2>Side by side</h2>{_card(tables.compared(runs))}"
        f"<h2>Curves</h2>{_charts([*charts.overview(runs), *charts.details(runs)])}"
        + "".join(
            f"<h2>{escape(run.name)}</h2><p>{escape(_subtitle(run))}</p>{_layers(run)}"
            f"{_tables(run)}{_samples(run)}{_configuration(run)}"
            for run in runs
        )
    )


def _subtitle(run: Run) -> str:
    total = human_count(run.config.schedule.total_tokens)
    steps = f"{run.records[-1]['step']:,} steps"
    if run.is_finished:
        return f"finished: {human_count(run.tokens)} tokens in {steps}"
    done = f"{human_count(run.tokens)} of {total} tokens ({tables.share(run):.0%}) in {steps}"
    return f"not finished: {done}, in phase {run.records[-1]['phase']}"


def _tiles(run: Run) -> str:
    """The answer in five numbers."""
    first, last = run.records[0], run.records[-1]
    sums, closing = cost(run), tables.closing(run)
    tiles = [
        ("parameters", run.parameters(last), f"began with {run.parameters(first)}"),
        ("FFN width", spread(last["ffn_live"]), f"began with {spread(first['ffn_live'])}"),
    ]
    losses = run.evaluations()
    if losses:
        at = f"after {human_count(losses[-1]['tokens'])} tokens"
        tiles.append(("held-out loss", f"{losses[-1]['val_loss']:.4f}", f"nats per token, {at}"))
    speeds = [row for row in closing.rows if row[0] == "training tokens/s"]
    if speeds:
        before = [cell for cell in speeds[0][1:-1] if cell]
        note = f"at full width {before[0]}" if before else "median"
        tiles.append(("tokens/s", speeds[0][-1] or "-", note))
    saved = 1 - sums.this_run[-1] / sums.masks_only[-1]
    note = f"{saved:.0%} less than at full width" if saved > 0 else "all at full width"
    tiles.append(("training FLOPs", f"{sums.this_run[-1]:.2e}", note))
    return f'<dl class="tiles">{"".join(_tile(*tile) for tile in tiles)}</dl>'


def _tile(name: str, value: str, note: str) -> str:
    return (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
    )


def _charts(figures: Sequence[Figure]) -> str:
    """Two in a row; one that would stand alone takes the row."""
    drawn = list(figures)
    if sum(not one.is_wide for one in drawn) % 2:
        last = max(i for i, one in enumerate(drawn) if not one.is_wide)
        drawn[last] = dataclasses.replace(drawn[last], is_wide=True)
    return f'<div class="charts">{"".join(map(figure, drawn))}</div>'


def _layers(run: Run) -> str:
    figures = charts.layers(run)
    return _charts(figures) if figures else ""


def _tables(run: Run) -> str:
    removed, environment = tables.removed(run), tables.environment(run)
    small = "".join(_card(table) for table in (tables.spent(run), environment) if table)
    return (
        f"{_card(tables.closing(run))}{_card(removed) if removed else ''}<br>"
        f'<div class="pair">{small}</div>'
    )


def _card(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    headers = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
    return (
        f'<section class="card"><h3>{escape(table.title)}</h3><div class="scroll">'
        f"<table>{headers}<tbody>{rows}</tbody></table></div>{note}</section>"
    )


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    shown = run.samples[-MOST_SAMPLES:]
    return f'<h2>Samples</h2><section class="card">{"".join(map(_sample, shown))}</section>'


def _sample(sample: dict[str, Any]) -> str:
    tokens = sample.get("tokens")
    when = f"after {human_count(tokens)} tokens" if isinstance(tokens, (int, float)) else ""
    prompt, text = (escape(str(sample.get(key, ""))) for key in ("prompt", "text"))
    return f'<h3>{when}</h3><div class="sample"><b>{prompt}</b>{text}</div>'


def _configuration(run: Run) -> str:
    text = escape(configuration.to_yaml(run.config))
    return (
        '<h2>Configuration</h2><section class="card"><details><summary>config.yaml, as used'
        f"</summary><pre>{text}</pre></details></section>"
    )


def _footer(runs: Sequence[Run]) -> str:
    folders = ", ".join(str(run.run_dir) for run in runs)
    return (
        f"<footer>Drawn from what the run recorded in {escape(folders)}. Move over a chart, or "
        "touch it, for its values.</footer>"
    )
