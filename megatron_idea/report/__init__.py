"""Draw run folders: a page, pictures and the closing table, from what the runs recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.text import Text

from megatron_idea.report import charts, tables
from megatron_idea.report.page import page
from megatron_idea.report.picture import draw
from megatron_idea.report.predicted import prediction
from megatron_idea.report.run import Run, read_run


@dataclass(frozen=True)
class ReportPaths:
    """Names the files that were written."""

    page: Path
    """HTML with everything in it."""
    picture: Path
    """PNG of loss, schedules, live and stored units, and speed."""
    details: Path
    """PNG of the other charts."""


def report(run_dir: Path) -> ReportPaths:
    """Draw a run, finished or not, into ``<run_dir>/report``.

    Raises: UserError when it is no run folder, or when no step has been recorded yet.
    """
    run = read_run(Path(run_dir))
    folder = run.run_dir / "report"
    folder.mkdir(exist_ok=True)
    paths = ReportPaths(folder / "report.html", folder / "run.png", folder / "details.png")
    paths.page.write_text(page([run]), "utf-8")
    draw(charts.overview([run]), paths.picture, _title(run))
    rest = [*charts.details([run]), *charts.layers(run), *charts.distributions(run)]
    draw(rest, paths.details, _title(run), columns=2)
    return paths


def compare(run_dirs: Sequence[Path], out: Path | None = None) -> ReportPaths:
    """Draw several runs in the same charts, into ``out``; by default the first one's ``report``.

    Raises: UserError as ``report`` does.
    """
    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    folder = out or runs[0].run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(*(folder / f"comparison{end}" for end in (".html", ".png", "_details.png")))
    title = f"{len(runs)} runs"
    paths.page.write_text(page(runs), "utf-8")
    draw(charts.overview(runs), paths.picture, title)
    draw(charts.details(runs), paths.details, title, columns=2)
    return paths


def closing_table(run_dir: Path) -> Group:
    """Lay out a run's closing table for a terminal. Raises: UserError as ``report`` does."""
    run = read_run(Path(run_dir))
    said = (tables.passed_teacher(run), prediction(run))
    lines = [Text(f"\n{sentence}") for sentence in said if sentence]
    return Group(tables.in_terminal(tables.closing(run)), *lines)


def comparison_table(run_dirs: Sequence[Path]) -> Group:
    """Lay out a table with a row a run for a terminal. Raises: UserError as ``report`` does."""
    return tables.in_terminal(tables.compared([read_run(Path(run)) for run in run_dirs]))


def _title(run: Run) -> str:
    before, after = run.parameters(run.records[0]), run.parameters(run.records[-1])
    sizes = f"{before} → {after} parameters" if before != after else f"{before} parameters"
    return f"{run.name}:  {sizes}"
