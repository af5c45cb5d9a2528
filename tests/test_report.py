"""The report is drawn from what a run recorded, and from nothing else."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from megatron_idea import config as configs
from megatron_idea.config import Config
from megatron_idea.course import (
    flops_between,
    live_at_step,
    num_steps,
    removed_at,
    shape_plan,
    target_shape,
)
from megatron_idea.planning.estimate import forecast
from megatron_idea.records.readable import human_count
from megatron_idea.report import charts, closing_table, compare, comparison_table, report, tables
from megatron_idea.report import run as report_run
from megatron_idea.report.chart import (
    COLOURS,
    Axis,
    Chart,
    HeatMap,
    Series,
    fitted,
    shade,
    tokens_axis,
)
from megatron_idea.report.cost import cost
from megatron_idea.report.page import page
from megatron_idea.report.recovery import WINDOW_STEPS, removals
from megatron_idea.report.run import Run, read_run
from megatron_idea.report.svg import figure
from megatron_idea.schedule import learning_rate, phase, phase_ended
from megatron_idea.shape import AXES, LAYER_AXES, Shape

BATCH = 8 * 256


def synthetic_config(run_dir: Path, **sections: dict) -> Config:
    """A run of 400 steps over which 1024 FFN neurons per layer become 384."""
    base = configs.from_dict(
        {
            "run_dir": str(run_dir),
            "model": {"ffn_hidden_size": 1024, "vocab_size": 2048},
            "schedule": {"total_tokens": 400 * BATCH},
            "prune": {"target": {"ffn_hidden_size": 384}},
        }
    )
    return configs.replace(base, **sections)


def write_synthetic_run(run_dir: Path, config: Config, steps: int | None = None) -> None:
    """Records and events of a run as ``train`` leaves them, losses and speeds made up."""
    rng = random.Random(0)
    layers, schedule = config.model.num_layers, config.schedule
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(configs.to_yaml(config))
    changes = {change.tokens: change.shape for change in shape_plan(config)}
    full = stored = Shape.full(config.model)
    there = list(range(layers))
    events: list[dict] = [{"kind": "started", "time": 0.0, "step": 0}]

    def evaluated(step: int, loss: float, why: str) -> None:
        tokens = step * config.batch_tokens
        events.append(
            {"kind": "evaluated", "step": step, "tokens": tokens, "val_loss": loss, "why": why}
        )

    evaluated(0, 7.625, "start")
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, (steps or num_steps(config)) + 1):
            before, tokens = (step - 1) * config.batch_tokens, step * config.batch_tokens
            gone = removed_at(config, tokens) * 0.625
            loss = 2.4 + 5.2 * math.exp(-step / 40) + 0.12 * gone - 0.4 * step / 400
            width = stored.counts("ffn_hidden_size")[0]
            speed = 9.0e6 / (400 + width) * rng.uniform(0.94, 1.06)
            counts = live_at_step(config, step)
            while len(there) > counts.get("num_layers", layers):
                gone = there[len(there) // 2]  # from the middle
                losses = {str(n): loss + abs(n - gone) / 100 for n in there}
                events.append(
                    {"kind": "layer_removed", "step": step, "tokens": tokens, "layer": gone,
                     "losses": losses}
                )  # fmt: skip
                there.remove(gone)
            live = full.with_layers(there)
            for axis in set(counts) - {"num_layers"}:
                live = live.with_counts(axis, counts[axis])
            if tokens in changes:
                evaluated(step, loss, "compaction_before")
                events.append({"kind": "compacted", "step": step, "tokens": tokens})
                stored = full.with_layers(there)
                for axis in set(AXES) - {"num_layers"}:
                    stored = stored.with_counts(axis, changes[tokens].counts(axis))
                evaluated(step, loss + 2e-7, "compaction_after")
            record = {
                "step": step,
                "tokens": tokens,
                "phase": phase(schedule, tokens),
                "loss": loss + rng.gauss(0, 0.05),
                "lr": learning_rate(schedule, tokens),
                "removed": removed_at(config, tokens),
                "live": live.by_number(layers),
                "stored": stored.by_number(layers),
                "grad_norm": 0.5,
                "tokens_per_s": speed,
                "step_s": config.batch_tokens / speed,
                "memory_bytes": 10**9,
                "skipped": 0,
            }
            if phase_ended(schedule, before, tokens) or step % 50 == 0:
                evaluated(step, loss, "phase_end")
            file.write(json.dumps(record) + "\n")
    write_lines(run_dir / "events.jsonl", events)


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def change_records(run_dir: Path, **fields: Any) -> None:
    """Rewrite fields of all metrics: values, or functions of a record."""
    path = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record |= {k: v(record) if callable(v) else v for k, v in fields.items()}
    write_lines(path, records)


def uneven(record: dict[str, Any]) -> dict[str, list[int]]:
    """Stored neurons of which only the first layer's follow the plan."""
    stored = record["stored"]
    return stored | {"ffn_hidden_size": [stored["ffn_hidden_size"][0], 512, 256, 128]}


def write_scores(run_dir: Path, layers: int, count: int = 20) -> None:
    """Scores of neurons, a record every step from step 200 on."""
    write_lines(run_dir / "scores.jsonl", score_records("ffn_hidden_size", layers, count))


def score_records(axis: str, rows: int, count: int, gone: int = -1) -> list[dict[str, Any]]:
    """``gone``: a row that has none any more from the sixth record on."""

    def row(i: int, number: int, value: Any) -> Any:
        return None if number == gone and i > 4 else value

    return [
        {
            "step": 200 + i,
            "tokens": (200 + i) * BATCH,
            "axis": axis,
            "quantiles": [
                row(i, n, [1e-7 * (n + 1) * 4**q for q in range(7)]) for n in range(rows)
            ],
            "cut": [row(i, n, 3e-7) for n in range(rows)],
            "rank_correlation": [row(i, n, 0.9 - n / 100 if i else None) for n in range(rows)],
        }
        for i in range(count)
    ]


def printed(table: object) -> str:
    console = Console(width=120, record=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def row(table: object, name: str) -> list[str]:
    line = next(line for line in printed(table).splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    write_synthetic_run(run_dir, synthetic_config(run_dir))
    return run_dir


@pytest.fixture
def of_all_axes(tmp_path: Path) -> Path:
    """A run of 400 steps in which every axis shrinks, and two of eight layers go."""
    run_dir = tmp_path / "all"
    model = {"num_layers": 8, "num_attention_heads": 16, "num_query_groups": 8, "hidden_size": 512}
    target = {
        "ffn_hidden_size": 384, "num_query_groups": 5, "hidden_size": 384, "num_layers": 6,
    }  # fmt: skip
    config = synthetic_config(run_dir, model=model, prune={"target": target})
    write_synthetic_run(run_dir, config)
    records = [
        record
        for axis in AXES
        for record in score_records(axis, 8 if axis in LAYER_AXES else 1, 20, gone=4)
    ]
    write_lines(run_dir / "scores.jsonl", sorted(records, key=lambda record: record["step"]))
    return run_dir


def test_the_picture_is_an_image_at_readme_width(run_dir: Path) -> None:
    picture = report(run_dir).picture
    assert picture == run_dir / "report" / "run.png"
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == 1800  # 900 pixels at twice the density


def test_the_closing_table_shows_the_model_before_and_after(run_dir: Path) -> None:
    table = closing_table(run_dir)
    assert printed(table).split()[:4] == ["start", "enlarged", "pruned", "end"]
    assert row(table, "neurons per layer") == ["1024", "1024", "384", "384"]
    assert row(table, "parameters") == ["2.03M", "2.03M", "1.05M", "1.05M"]
    assert row(table, "consumed tokens") == ["0", "410K", "532K", "819K"]


def test_the_closing_table_shows_the_recorded_held_out_losses(run_dir: Path) -> None:
    losses = {
        event["step"]: f"{event['val_loss']:.4f}"
        for event in map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
        if event["kind"] == "evaluated"
    }
    # Half of 400 steps, 65 % of them, all of them.
    assert row(closing_table(run_dir), "held-out loss") == [losses[s] for s in (0, 200, 260, 400)]


def test_speeds_are_medians_at_the_first_and_at_the_last_width(run_dir: Path) -> None:
    enlarged, end = row(closing_table(run_dir), "training tokens/s")
    # The made-up speed is 9e6 / (400 + width), give or take 6 %.
    assert float(enlarged.removesuffix("K")) == pytest.approx(6.32, rel=0.03)
    assert float(end.removesuffix("K")) == pytest.approx(11.5, rel=0.03)


def test_slow_first_steps_do_not_count_as_speed(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    records = [r for r in records if r["step"] <= 9]
    for record in records:
        record["tokens_per_s"] = 1.0 if record["step"] <= 5 else 1000.0
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert row(closing_table(run_dir), "training tokens/s") == ["1K"]


def test_the_effect_of_compactions_is_shown_where_it_was_measured(run_dir: Path) -> None:
    assert "at most 2.0e-07" in printed(closing_table(run_dir))


def test_without_evaluations_no_held_out_loss_is_shown(run_dir: Path) -> None:
    (run_dir / "events.jsonl").unlink()
    text = printed(closing_table(run_dir))
    assert "held-out" not in text
    report(run_dir)


def test_an_unfinished_run_shows_only_what_it_has_reached(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, synthetic_config(tmp_path), steps=230)
    report(tmp_path)
    assert printed(closing_table(tmp_path)).split()[:4] == ["start", "enlarged", "so", "far"]


def test_a_run_of_one_step_can_be_drawn(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, synthetic_config(tmp_path), steps=1)
    report(tmp_path)
    assert row(closing_table(tmp_path), "neurons per layer") == ["1024", "1024"]
    assert "KV groups" not in printed(closing_table(tmp_path))


def test_masks_alone_are_told_apart_from_a_smaller_model(tmp_path: Path) -> None:
    config = synthetic_config(tmp_path, prune={"compact": False})
    write_synthetic_run(tmp_path, config)
    assert "1024 (live 384)" in printed(closing_table(tmp_path))
    assert row(closing_table(tmp_path), "parameters") == ["2.03M"] * 4


def test_plain_training_has_no_columns_of_pruning(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, synthetic_config(tmp_path, prune={"strategy": "none"}))
    report(tmp_path)
    assert printed(closing_table(tmp_path)).split()[:2] == ["start", "end"]


def test_a_long_run_is_thinned_and_ends_where_it_ends(run_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(report_run, "MOST_POINTS", 50)
    thinned = report_run.curve(read_run(run_dir), report_run.number("step"))
    assert thinned.is_thinned and len(thinned.tokens) == 50
    assert thinned.tokens[-1] == 400 * BATCH
    assert (thinned.low[-1], thinned.middle[-1], thinned.high[-1]) == (393, 396.5, 400)


def test_a_spike_survives_thinning(run_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(report_run, "MOST_POINTS", 20)
    change_records(run_dir, grad_norm=lambda r: 77.0 if r["step"] == 300 else 0.5)
    drawn = charts.gradients([read_run(run_dir)])
    assert max(v for band in drawn.bands for v in band.high) == 77.0
    assert drawn.y.high > 77.0


def test_a_page_of_100_000_steps_is_small(run_dir: Path) -> None:
    run = read_run(run_dir)
    many = [
        dataclasses.replace(run.records[min(i // 250, 399)], step=i + 1, tokens=(i + 1) * 2048)
        for i in range(100_000)
    ]
    total = {"total_tokens": 100_000 * 2048}
    config = configs.replace(run.config, schedule=total)
    assert len(page([dataclasses.replace(run, records=many, config=config)])) < 600_000


def test_a_loss_that_is_not_a_number_leaves_a_gap(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    lines[100] = json.dumps({**json.loads(lines[100]), "loss": math.nan})
    metrics.write_text("\n".join(lines) + "\n")
    report(run_dir)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a run folder: it has no config\.yaml"):
        report(tmp_path)


def test_a_run_without_a_finished_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(configs.to_yaml(synthetic_config(tmp_path)))
    with pytest.raises(ValueError, match="has not finished a step"):
        closing_table(tmp_path)


# The page


class Tags(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags do not nest"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data


def slugs(text: str) -> list[str]:
    return re.findall(r'data-slug="([^"]+)"', text)


EVERY_CHART = [
    "loss", "schedules", "ffn_hidden_size", "speed", "cost", "step-time", "memory", "gradients",
    "ffn_hidden_size-by-layer",
]  # fmt: skip


def test_the_page_has_every_chart_and_needs_no_network(run_dir: Path) -> None:
    text = report(run_dir).page.read_text()
    assert slugs(text) == EVERY_CHART
    assert "key gap" not in text and "KV group" not in Tags(text.split("<h2>Config")[0]).text
    parsed = Tags(text)
    assert parsed.open == []
    for _, attributes in parsed.tags:
        assert not {"href", "srcset", "data"} & set(attributes)
        assert str(attributes.get("src", "data:image/png;base64,")).startswith("data:image/png;")
    assert "url(" not in text.replace("url(#plot)", "")
    assert "http" not in text


def test_every_axis_has_a_label_and_loss_its_unit(run_dir: Path) -> None:
    write_scores(run_dir, layers=4)
    run = read_run(run_dir)
    drawn = [*charts.overview([run]), *charts.details([run])]
    drawn += [*charts.layers(run), *charts.distributions(run)]
    for chart in drawn:
        assert chart.title and chart.note and chart.x.label
        for axis in (chart.values,) if isinstance(chart, HeatMap) else (chart.y, chart.right):
            assert axis is None or axis.label
    labels = {chart.slug: chart.y.label for chart in drawn if isinstance(chart, Chart)}
    assert labels["loss"] == "loss (nats per token)"
    assert labels["memory"] == "memory (GB)"
    assert labels["cost"] == "compute (TFLOPs)"


def test_what_a_run_says_cannot_become_markup(tmp_path: Path) -> None:
    evil = tmp_path / "<img src=x onerror=alert(1)>"
    write_synthetic_run(evil, synthetic_config(Path("<script>alert(2)</script>")), steps=40)
    write_lines(
        evil / "samples.jsonl",
        [{"step": 1, "tokens": 5, "prompt": "<b>", "text": "</div><script>alert(3)</script>"}],
    )
    events = evil / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    lines[0]["environment"] = {
        "device": "<i>GPU</i>", "processes": 2, "threads": 1, "versions": {"<u>": "</table>"},
    }  # fmt: skip
    write_lines(events, lines)
    run = read_run(evil)
    for text in (page([run]), page([run, run])):
        parsed = Tags(text)
        names = [tag for tag, _ in parsed.tags]
        sources = [str(a["src"]) for tag, a in parsed.tags if tag == "img"]
        assert "u" not in names and all(source.startswith("data:") for source in sources)
        assert names.count("script") == 1
        assert "</div><script>alert(3)</script>" in parsed.text
        assert "<i>GPU</i>" in parsed.text


def test_samples_and_configuration_are_shown(run_dir: Path) -> None:
    write_lines(run_dir / "samples.jsonl", [sample(9, "def f", "(x):\n\treturn")])
    text = Tags(page([read_run(run_dir)])).text
    assert "def f" in text and "(x):\n\treturn" in text and "18.4K tokens, enlarged" in text
    assert "ffn_hidden_size: 384" in text


def sample(step: int, prompt: str, text: str) -> dict[str, Any]:
    return {"step": step, "tokens": step * BATCH, "prompt": prompt, "text": text}


def test_of_each_prompt_the_newest_text_is_open_and_the_others_are_folded(run_dir: Path) -> None:
    texts = [sample(s, p, f"{p}-{s}") for s in (0, 100, 230, 400) for p in ("a", "b")]
    # Run again after a resume; and from a checkpoint that the run has not reached again.
    texts += [sample(230, "a", "a-again"), sample(999, "a", "a-gone")]
    write_lines(run_dir / "samples.jsonl", texts)
    text = page([read_run(run_dir)])
    for prompt in ("a", "b"):
        begin = text.index(f"<q>{prompt}</q>")
        card = text[begin : text.index("</section>", begin)]
        newest, folded = card.split("<details>")
        assert f"{prompt}-400" in newest and "recover, 384 neurons" in newest
        assert "3 earlier" in folded
        assert folded.index(f"{prompt}-100") < folded.index(f"{prompt}-0")
    assert "a-again" in text and "a-230" not in text and "a-gone" not in text


def test_many_and_long_samples_do_not_bury_the_page(run_dir: Path) -> None:
    long = "x" * 700
    texts = [sample(step, "p", f"{long}{step:03}") for step in range(1, 401)]
    texts += [sample(1, f"other {i}", "text") for i in range(20)]
    write_lines(run_dir / "samples.jsonl", texts)
    text = Tags(page([read_run(run_dir)])).text
    assert "13 more prompts in samples.jsonl" in text
    assert text.count("other ") == 8
    write_lines(run_dir / "samples.jsonl", texts[:400])
    text = Tags(page([read_run(run_dir)])).text
    assert "23 of 399 earlier" in text and "203 more characters" in text
    assert "x001" in text and "x400" in text and text.count("more characters") == 24


@pytest.mark.parametrize(
    "line", ['{"step": 3, "to', "rubbish\n", '{"step": 3, "tok{"step": 4}\n', "[1]\n", "{}\n"]
)
@pytest.mark.parametrize("name", ["metrics", "events", "scores", "samples"])
def test_a_broken_line_is_left_out_and_named(run_dir: Path, name: str, line: str) -> None:
    write_scores(run_dir, layers=4)
    write_lines(run_dir / "samples.jsonl", [sample(9, "def f", "(x):")])
    path = run_dir / f"{name}.jsonl"
    before = page([read_run(run_dir)])
    path.write_text(path.read_text() + line)
    text = page([read_run(run_dir)])
    if line.endswith("\n"):
        last = len(path.read_text().splitlines())
        warning = f"Left out 1 line that could not be read: {name}.jsonl, line {last}."
        assert warning in text
        text = text.replace(f'<p class="warning">{warning}</p>', "")
    assert text == before


def test_importances_below_zero_are_drawn(run_dir: Path) -> None:
    write_scores(run_dir, layers=4)
    path = run_dir / "scores.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(chart.y.is_log for chart in charts.distributions(read_run(run_dir)))
    for record in records:
        record["quantiles"] = [[q - 1 for q in row] for row in record["quantiles"]]
    write_lines(path, records)
    for chart in charts.distributions(read_run(run_dir)):
        lowest = min(chart.bands[0].low)
        assert not chart.y.is_log and chart.y.low < lowest < 0
    assert "Importance of what is alive" in page([read_run(run_dir)])


def test_scores_of_a_deep_model_are_drawn_for_a_few_layers(run_dir: Path) -> None:
    deep = run_dir.parent / "deep"
    write_synthetic_run(deep, synthetic_config(deep, model={"num_layers": 48}), steps=20)
    write_scores(deep, layers=48)
    run = read_run(deep)
    fans = [chart.slug for chart in charts.distributions(run)]
    assert len(fans) == 8
    assert fans[0] == "ffn_hidden_size-importance-0" and fans[-1] == "ffn_hidden_size-importance-47"
    (churn,) = [c for c in charts.layers(run) if c.slug == "ffn_hidden_size-churn-by-layer"]
    assert isinstance(churn, HeatMap) and len(churn.rows) == 48 and len(churn.rows[0]) == 19
    write_scores(deep, layers=4)  # of another model
    assert charts.distributions(read_run(deep)) == []


def test_a_ranking_that_never_changes_is_drawn_too(run_dir: Path) -> None:
    """Chance ranks units once: the correlation is 1 from beginning to end."""
    records = score_records("ffn_hidden_size", 4, 20)
    for i, record in enumerate(records):
        record["rank_correlation"] = [1.0 if i else None] * 4
    write_lines(run_dir / "scores.jsonl", records)
    churn = charts.churn_map(read_run(run_dir), "ffn_hidden_size")
    assert churn is not None and (churn.values.low, churn.values.high) == (0.9, 1.0)
    assert churn.title in page([read_run(run_dir)])


def test_layers_of_different_sizes_are_told_apart(run_dir: Path) -> None:
    change_records(run_dir, stored=uneven)
    run = read_run(run_dir)
    drawn = charts.units_map(run, "ffn_hidden_size")
    assert drawn is not None and [row[-1] for row in drawn.rows] == [384, 512, 256, 128]
    text = Tags(page([run])).text
    assert "320[128-512] (live 384)" in text


def test_skipped_steps_and_mfu_are_drawn_when_there_are_any(run_dir: Path) -> None:
    change_records(
        run_dir,
        skipped=lambda r: int(r["step"] > 100),
        grad_norm=lambda r: math.nan if r["step"] == 101 else 0.5,
        mfu=0.41,
    )
    run = read_run(run_dir)
    assert charts.gradients([run]).right is not None
    (mfu,) = [chart for chart in charts.details([run]) if chart.slug == "mfu"]
    assert mfu.series[-1].y[-1] == pytest.approx(41)


@pytest.mark.parametrize("loss", [math.nan, 0.0, 3.0])
def test_a_flat_or_broken_loss_can_be_drawn(run_dir: Path, loss: float) -> None:
    change_records(run_dir, loss=loss, grad_norm=0.0)
    report(run_dir)


# Numbers


def test_flops_so_far_are_those_of_the_plan(run_dir: Path) -> None:
    run = read_run(run_dir)
    sums, plan = cost(run), forecast(run.config)
    assert sums.this_run[-1] == flops_between(run.config, 0, run.tokens)
    assert sums.zeros_only[-1] == plan.cost.zeros_only
    assert sums.from_scratch[-1] == plan.cost.target_from_scratch
    assert sums.from_scratch[-1] < sums.ideal[-1] < sums.this_run[-1] < sums.zeros_only[-1]
    model, seq_length = run.config.model, run.config.training.seq_length
    full = Shape.full(model).flops_per_token(model, seq_length)
    assert sums.this_run[0] == BATCH * full


def test_where_the_method_finds_the_shape_it_is_the_one_trained_from_scratch(run_dir: Path) -> None:
    run = read_run(run_dir)
    model, seq_length = run.config.model, run.config.training.seq_length
    target = configs.PruneTarget(parameters=Shape.full(model).parameters(model).total // 2)
    prune = {"strategy": "adapt_pruner", "target": target}
    other = dataclasses.replace(run, config=configs.replace(run.config, prune=prune))
    forecast_rate = target_shape(other.config).flops_per_token(model, seq_length)
    assert forecast_rate != target_shape(run.config).flops_per_token(model, seq_length)
    assert cost(other).from_scratch == cost(run).from_scratch, "the run ended with its target"
    early = dataclasses.replace(other, records=run.records[: len(run.records) // 2])
    assert cost(early).from_scratch[0] == BATCH * forecast_rate


@pytest.fixture
def taught(tmp_path: Path) -> Path:
    """A run that its own enlarged model teaches from step 200 on, and that passes it."""
    run_dir = tmp_path / "taught"
    config = synthetic_config(run_dir, distill={"teacher": "self", "acceptance": True})
    write_synthetic_run(run_dir, config)
    change_records(run_dir, **TAUGHT)
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    teacher = {"step": 200, "tokens": 200 * BATCH, "digest": "ab", "val_loss": 2.15}
    write_lines(run_dir / "events.jsonl", [*lines, {"kind": "teacher", "time": 1.0, **teacher}])
    return run_dir


def in_taught_steps(value: float) -> Any:
    return lambda record: value if record["step"] > 200 else None


TAUGHT = {
    "kl": in_taught_steps(0.25),
    "teacher_loss": in_taught_steps(2.2),
    "acceptance": in_taught_steps(0.8),
}


def test_what_a_teacher_says_is_drawn(taught: Path) -> None:
    run = read_run(taught)
    drawn = {chart.slug: chart for chart in charts.details([run])}
    assert list(drawn)[:2] == ["teacher", "kl"] and slugs(page([run])) != EVERY_CHART
    both = {one.name: one for one in drawn["teacher"].series}
    assert list(both) == ["student", "teacher"]
    assert both["teacher"].y[-1] == pytest.approx(2.2)
    assert both["student"].y[-1] == pytest.approx(run.records[-1].loss, abs=0.1)
    assert math.isnan(both["student"].y[0])
    shown = {one.name: one for one in drawn["kl"].series}
    assert list(shown) == ["each step", "KL, smoothed", "alpha", "acceptance"]
    assert shown["KL, smoothed"].y[-1] == pytest.approx(0.25)
    assert shown["alpha"].y[0] == 0 and shown["alpha"].y[-1] == pytest.approx(0.5)
    assert max(shown["alpha"].y) == pytest.approx(0.9, abs=0.01)
    assert shown["acceptance"].y[-1] == pytest.approx(0.8)


def test_only_taught_runs_are_in_the_charts_of_teachers(run_dir: Path, taught: Path) -> None:
    runs = [read_run(run_dir), read_run(taught)]
    assert not read_run(run_dir).is_taught
    drawn = {chart.slug: chart for chart in charts.details(runs)}
    assert {one.run for slug in ("teacher", "kl") for one in drawn[slug].series} == {1}
    assert not {"teacher", "kl"} & {chart.slug for chart in charts.details(runs[:1])}


def test_the_teachers_flops_are_counted_apart(run_dir: Path, taught: Path) -> None:
    run, plain = read_run(taught), read_run(run_dir)
    sums, plan = cost(run), forecast(run.config)
    assert sums.this_run == cost(plain).this_run
    assert sums.teacher[199] == 0 and sums.teacher[-1] == plan.cost.teacher > 0
    assert (
        sums.teacher[200]
        == BATCH * Shape.full(run.config.model).flops_per_token(run.config.model, 256) / 3
    )
    rows = {row[0]: row[1:] for row in tables.spent(run).rows}
    ratio = plan.cost.teacher / plan.cost.target_from_scratch
    assert rows["its teacher, forward passes"][1] == f"{ratio:.2f}"
    assert "its teacher, forward passes" not in {row[0] for row in tables.spent(plain).rows}
    other = configs.replace(run.config, distill={"teacher": "another"})
    rows = {row[0]: row[1:] for row in tables.spent(dataclasses.replace(run, config=other)).rows}
    assert rows["its teacher, forward passes"] == ("not known", "-")


def test_a_run_that_has_passed_its_teacher_is_warned(run_dir: Path, taught: Path) -> None:
    run = read_run(taught)
    passed = run.passed_teacher()
    assert passed is not None and passed[1] == 2.15
    since = passed[0]["tokens"]
    assert all((e["val_loss"] < 2.15) == (e["tokens"] >= since)
               for e in run.evaluations() if e["tokens"] > 200 * BATCH)  # fmt: skip
    warning = f"passed its teacher: from token {human_count(since)} on"
    assert warning in page([run]) and "distill.alpha_end" in page([run])
    assert warning in " ".join(printed(closing_table(taught)).split())
    assert warning in page([read_run(run_dir), run])
    better = [
        event | ({"val_loss": 1.5} if event["kind"] == "teacher" else {}) for event in run.events
    ]
    assert dataclasses.replace(run, events=better).passed_teacher() is None
    unmeasured = [event for event in run.events if event["kind"] != "teacher"]
    unmeasured.append({"kind": "teacher", "step": 200, "tokens": 200 * BATCH})
    assert dataclasses.replace(run, events=unmeasured).passed_teacher() is None
    assert "passed its teacher" not in page([read_run(run_dir)])


def test_a_jump_within_its_noise_is_marked(run_dir: Path) -> None:
    step = read_run(run_dir).compactions()[-1]["step"]
    change_records(
        run_dir, loss=lambda r: 3.0 + 0.01 * (r["step"] > step) + 0.1 * (-1) ** r["step"]
    )
    assert removals(read_run(run_dir))[-1].is_noise
    change_records(run_dir, loss=lambda r: 3.0 + (step < r["step"] < step + 50))
    assert not removals(read_run(run_dir))[-1].is_noise


def test_a_loss_that_rises_at_a_compaction_and_comes_back_is_measured(run_dir: Path) -> None:
    compacted = read_run(run_dir).compactions()
    step = compacted[-1]["step"]
    # 3.0 before, 3.5 for 30 steps after, then below: never mind the earlier compactions.
    change_records(
        run_dir, loss=lambda r: 3.0 if r["step"] <= step else 3.5 if r["step"] <= step + 30 else 2.9
    )
    found = removals(read_run(run_dir))
    assert found[0].what == "all of the pruning"
    assert [r.step for r in found if r.what == "compaction"] == [e["step"] for e in compacted]
    last = found[-1]
    assert last.loss_jump == pytest.approx(0.5) and last.noise == 0
    # So many of the 16 steps of a window must be of 2.9 for its mean to be 3.0.
    below = next(n for n in range(16) if (n * 2.9 + (16 - n) * 3.5) / 16 <= 3.0)
    assert last.recovery_tokens == (30 + below) * BATCH
    assert found[1].recovery_tokens == 0


def test_a_loss_that_has_not_come_back_says_so(run_dir: Path) -> None:
    step = read_run(run_dir).compactions()[-1]["step"]
    change_records(run_dir, loss=lambda r: 3.0 + (r["step"] > step))
    assert removals(read_run(run_dir))[-1].recovery_tokens is None
    assert "not yet" in page([read_run(run_dir)])


def test_a_removal_in_the_last_steps_is_not_judged(tmp_path: Path) -> None:
    config = synthetic_config(tmp_path)
    step = shape_plan(config)[0].tokens // BATCH
    write_synthetic_run(tmp_path, config, steps=step + WINDOW_STEPS - 1)
    assert removals(read_run(tmp_path))[-1].loss_jump is None


def test_a_removal_at_once_is_an_event(tmp_path: Path) -> None:
    config = synthetic_config(tmp_path, schedule={"removal": "one_shot"}, prune={"compact": False})
    write_synthetic_run(tmp_path, config)
    found = [r for r in removals(read_run(tmp_path)) if r.what == "removal"]
    counts = [(r.before["ffn_hidden_size"], r.after["ffn_hidden_size"]) for r in found]
    assert counts == [([1024] * 4, [384] * 4)]


def test_many_evaluations_do_not_hide_the_curve(run_dir: Path) -> None:
    before = page([read_run(run_dir)])
    assert 'class="points' in before and 'class="specks' not in before
    event = {"kind": "evaluated", "val_loss": 6.0, "why": "every"}
    with (run_dir / "events.jsonl").open("a") as file:
        for step in range(1, 101):
            file.write(
                json.dumps(event | {"time": 0.0, "step": step, "tokens": step * BATCH}) + "\n"
            )
    text = page([read_run(run_dir)])
    assert re.search(r'<path class="specks [^"]*" data-name="held-out"', text)
    assert re.search(r'<i class="key specks', text)


def test_two_runs_are_drawn_in_the_same_charts(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "small"
    write_synthetic_run(other, synthetic_config(other, prune={"strategy": "none"}), steps=90)
    paths = compare([run_dir, other])
    assert paths.page == run_dir / "report" / "comparison.html"
    text = paths.page.read_text()
    for number, name in enumerate(("run", "small")):
        assert f'data-name="training, smoothed" data-run="{number}"' in text
        assert re.search(
            rf'<li data-run="{number}" tabindex="0"><i class="[^"]+"></i>{name}</li>', text
        )
    assert row(comparison_table([run_dir, other]), "small")[:3] == ["184K", "(22%)", "2.03M"]
    for picture, columns in ((paths.picture, 1), (paths.details, 2)):
        with Image.open(picture) as image:
            assert image.width == 1800 * columns
    assert compare([run_dir, other], tmp_path / "out").page.parent == tmp_path / "out"


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    def names(*folders: str) -> list[str]:
        return report_run.labels([fake(tmp_path / folder) for folder in folders])

    def fake(run_dir: Path) -> Run:
        return Run(run_dir, Config(), [], [], [], [])

    assert names("a", "b") == ["a", "b"]
    assert names("x/run", "y/run", "z") == ["x/run", "y/run", "z"]
    assert names("x/a/run", "x/b/run") == ["a/run", "b/run"]
    assert names("quickstart", "quickstart") == ["quickstart", "quickstart"]
    assert names("2p8b_wide_lr1e-3_seed1", "2p8b_wide_lr2e-3_seed1") == ["…lr1e…", "…lr2e…"]
    assert names("idea_prune_long_name", "idea_prune_long_name_2") == ["…name", "…name_2"]
    assert names("run_1", "run_2") == ["run_1", "run_2"]  # too little in common to save anything


def test_what_differs_between_runs_is_a_table(run_dir: Path, tmp_path: Path) -> None:
    others = []
    for name, sections in {
        "masks": {"prune": {"compact": False}},
        "short": {"prune": {"compact": True}, "optimizer": {"clip_grad": 0.5}},
    }.items():
        others.append(tmp_path / name)
        write_synthetic_run(others[-1], synthetic_config(others[-1], **sections), steps=20)
    runs = [read_run(path) for path in (run_dir, *others)]
    table = tables.differences(runs)
    assert table is not None
    assert table.columns == ("run", "optimizer.clip_grad", "prune.compact")
    assert [row[2] for row in table.rows] == ["True", "False", "True"]
    assert tables.differences([runs[0], runs[0]]) is None
    # More settings than runs: a column a run.
    assert tables.differences(runs[:2]) is not None
    plain = synthetic_config(tmp_path / "plain", prune={"strategy": "none", "scope": "global"})
    write_synthetic_run(tmp_path / "plain", plain, steps=20)
    turned = tables.differences([runs[0], read_run(tmp_path / "plain"), runs[2]])
    assert turned is not None and turned.columns[0] in ("run", "setting")


def test_colours_of_runs_are_told_apart_by_the_colour_blind() -> None:
    css = (Path(report_run.__file__).parent / "page.css").read_text()
    for theme in (css.split("@media")[0], css.split("@media")[1]):
        shades = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        paper = shades["card"]
        shown = [shades[name] for name in COLOURS]
        # WCAG 1.4.11: graphics stand out from their ground by 3 to 1.
        assert all(contrast(one, paper) >= 3.0 for one in shown)
        for i, one in enumerate(shown):
            for other in shown[:i]:
                for sight in SIGHTS.values():
                    # 2.3 is a difference that is just noticed; the colours before had 1.3.
                    assert math.dist(lab(one, sight), lab(other, sight)) > 10.0


# Linear RGB as it is seen: Machado, Oliveira and Fernandes 2009, severity 1.
SIGHTS = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "tritan": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def linear(shade: str) -> list[float]:
    values = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def contrast(one: str, other: str) -> float:
    weights = (0.2126, 0.7152, 0.0722)
    low, high = sorted(
        sum(w * v for w, v in zip(weights, linear(shade), strict=True)) for shade in (one, other)
    )
    return (high + 0.05) / (low + 0.05)


def lab(shade: str, sight: tuple[tuple[float, ...], ...]) -> tuple[float, float, float]:
    """CIELAB of a colour as it is seen."""
    r, g, b = (
        min(1.0, max(0.0, sum(m * v for m, v in zip(row, linear(shade), strict=True))))
        for row in sight
    )
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def test_every_axis_of_a_run_is_drawn_in_its_own_units(run_dir: Path) -> None:
    def with_groups_and_channels(counts: str) -> Any:
        def change(record: dict[str, Any]) -> dict[str, list[int]]:
            late = record["step"] > 300
            more = {"num_query_groups": [2, 2, 1, 2 - late], "hidden_size": [128 - 32 * late]}
            del record[counts]["num_layers"]
            return record[counts] | more

        return change

    change_records(run_dir, **{key: with_groups_and_channels(key) for key in ("live", "stored")})
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "compacted", "step": 301, "tokens": 301 * BATCH}) + "\n")
    run = read_run(run_dir)
    titles = {chart.slug: chart.title for chart in charts.overview([run])}
    assert titles["num_query_groups"] == "KV groups: live and stored"
    assert titles["hidden_size"] == "Channels: live and stored"
    maps = {chart.slug for chart in charts.layers(run)}
    assert maps == {"ffn_hidden_size-by-layer", "num_query_groups-by-layer"}
    table = closing_table(run_dir)
    assert row(table, "KV groups per layer")[-1] == "[1-2]"
    assert row(table, "channels") == ["128", "128", "128", "96"]
    text = Tags(page([run])).text
    assert "1 to 2 → 1 to 2 KV groups per layer, 128 → 96 channels" in text
    model = run.config.model
    small = Shape.full(model).with_counts("ffn_hidden_size", 384).with_counts("hidden_size", 96)
    small = small.with_counts("num_query_groups", [2, 2, 1, 1])
    sums = cost(run).this_run
    assert sums[-1] - sums[-2] == BATCH * small.flops_per_token(model, 256)
    assert tables.compared([run, run]).columns[3:6] == ("neurons", "KV groups", "channels")


def test_a_run_of_all_axes_has_a_band_and_its_scores_for_each(of_all_axes: Path) -> None:
    run = read_run(of_all_axes)
    overview = {chart.slug: chart for chart in charts.overview([run])}
    assert list(overview) == ["loss", "schedules", *AXES, "speed"]
    ends = {axis: [series.y[-1] for series in overview[axis].series] for axis in AXES}
    assert ends == {
        "ffn_hidden_size": [384, 384], "num_query_groups": [5, 5], "hidden_size": [384, 384],
        "num_layers": [6, 6],
    }  # fmt: skip
    assert all(overview[axis].bands[0].name == "removed, still stored" for axis in AXES)
    assert [text for _, text in overview["num_layers"].y.ticks()] == ["0", "2", "4", "6", "8"]
    titles = [chart.title for chart in charts.distributions(run)]
    assert len(titles) == len(set(titles)) == 8 + 8 + 1 + 1
    assert titles[8] == "Importance of KV groups, layer 0"
    assert titles[-1] == "Importance of layers"
    fan = charts.distributions(run)[12]  # of groups, in the layer that goes
    assert math.isfinite(fan.series[0].y[4]) and math.isnan(fan.series[0].y[5])
    stable = {c.slug: c for c in charts.layers(run) if isinstance(c, Chart)}
    assert stable["num_query_groups-churn"].series[1].y[-1] == pytest.approx(0.83)
    assert [len(stable[f"{axis}-churn"].series) for axis in AXES] == [2, 2, 1, 1]


def test_layers_that_went_are_hatched_in_maps_and_explained_in_a_table(of_all_axes: Path) -> None:
    run = read_run(of_all_axes)
    for axis in LAYER_AXES:
        drawn = charts.units_map(run, axis)
        assert drawn is not None and drawn.has_gaps
        gone = [number for number, row in enumerate(drawn.rows) if math.isnan(row[-1])]
        assert gone == [3, 4] and all(row[0] > 0 for row in drawn.rows)
        text = figure(drawn)
        assert '<i class="key gap"></i>layer removed' in text and 'data-gap="layer removed"' in text
    first, second = run.removed_layers()
    table = tables.removed_layers(run)
    assert table is not None
    assert [row[0] for row in table.rows] == [
        f"layer {event['layer']}, step {event['step']}" for event in (first, second)
    ]
    name, loss, others, _ = table.rows[0]
    assert name.startswith("layer 4") and loss == f"{first['losses']['4']:.4f}"
    assert others.startswith(f"3: {first['losses']['3']:.4f}, 5: ") and others.count(":") == 7
    assert "layer 4, step" in Tags(page([run])).text


def test_the_tables_of_a_run_of_all_axes_count_what_is_there(of_all_axes: Path) -> None:
    lines = (of_all_axes / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    moved = {"moved_units": 7, "moved_layers": 1, "seconds": 0.5}
    write_lines(
        of_all_axes / "events.jsonl",
        [e | moved if e["kind"] == "compacted" else e for e in events],
    )
    table = closing_table(of_all_axes)
    assert row(table, "neurons per layer") == ["1024", "1024", "384", "384"]
    assert row(table, "KV groups per layer") == ["8", "8", "5", "5"]
    assert row(table, "channels") == ["512", "512", "384", "384"]
    assert row(table, "layers") == ["8", "8", "6", "6"]
    run = read_run(of_all_axes)
    sizes = target_shape(run.config).parameters(run.config.model).total
    assert run.parameters(run.records[-1]) == human_count(sizes)
    removals_table = tables.removed(run)
    assert removals_table is not None
    cells = [row[3] for row in removals_table.rows]
    assert cells[0] == (
        "1,024 → 384 neurons per layer, 8 → 5 KV groups per layer, 512 → 384 channels, 8 → 6 layers"
    )
    assert any("layers" in cell and "channels" not in cell for cell in cells)
    assert removals_table.rows[-1][6] == "7, 1 layer"
    last = run.records[-1]
    per_token = target_shape(run.config).flops_per_token(run.config.model, 256)
    sums = cost(run)
    assert sums.this_run[-1] - sums.this_run[-2] == sums.ideal[-1] - sums.ideal[-2]
    assert sums.this_run[-1] - sums.this_run[-2] == BATCH * per_token
    assert last.live == last.stored


def test_layers_alone_have_a_map_of_who_is_there(tmp_path: Path) -> None:
    config = synthetic_config(
        tmp_path, prune={"target": {"ffn_hidden_size": None, "num_layers": 3}}
    )
    write_synthetic_run(tmp_path, config)
    run = read_run(tmp_path)
    assert run.axes == ["num_layers"]
    (drawn,) = charts.layers(run)
    assert (
        isinstance(drawn, HeatMap) and [math.isnan(row[-1]) for row in drawn.rows].count(True) == 1
    )
    report(tmp_path)


def test_a_comparison_shows_every_axis_that_one_of_the_runs_prunes(
    run_dir: Path, of_all_axes: Path
) -> None:
    runs = [read_run(run_dir), read_run(of_all_axes)]
    assert [chart.slug for chart in charts.overview(runs)][2:-1] == list(AXES)
    table = tables.compared(runs)
    assert table.columns[3:7] == ("neurons", "KV groups", "channels", "layers")
    assert [row[3:7] for row in table.rows] == [("384", "2", "128", "4"), ("384", "5", "384", "6")]


def test_a_heat_map_is_a_picture_whose_values_can_be_read_back(run_dir: Path) -> None:
    change_records(run_dir, stored=uneven)
    drawn = charts.units_map(read_run(run_dir), "ffn_hidden_size")
    assert drawn is not None
    text = figure(drawn)
    (source,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    with Image.open(io.BytesIO(base64.b64decode(source))) as image:
        assert image.height == 4
        pixels = image.convert("RGB").load()
        width = image.width
    assert pixels is not None
    levels = [float(v) for v in re.findall(r'data-levels="([^"]+)"', text)[0].split()]
    (packed,) = re.findall(r'data-cells="([^"]+)"', text)
    cells = base64.b64decode(packed)
    assert len(cells) == 4 * width
    assert [levels[cells[row * width + width - 1]] for row in range(4)] == [384, 512, 256, 128]
    assert levels[cells[0]] == 1024 and pixels[0, 0] == shade(1.0)
    assert "data-gap" not in text
    assert pixels[width - 1, 3] == shade(128 / 1024)


def test_incidents_are_listed(run_dir: Path) -> None:
    with open(run_dir / "events.jsonl", "a") as file:
        for event in (
            {"kind": "spike", "step": 41, "loss": 9.5, "average": 4.2},
            {"kind": "rolled_back", "step": 30, "from_step": 41},
            {"kind": "signal", "step": 99, "name": "SIGTERM"},
            {"kind": "resumed", "step": 99},
        ):
            file.write(json.dumps({"time": 1.0, **event}) + "\n")
    change_records(run_dir, skipped=lambda r: 3 * (r["step"] > 200))
    table = tables.incidents(read_run(run_dir))
    assert table is not None
    assert [row[0] for row in table.rows] == [
        "loss spike at step 41: 9.500, usual 4.200", "rolled back from step 41 to step 30",
        "stopped by SIGTERM after step 99", "resumed at step 99", "3 steps skipped in all",
    ]  # fmt: skip


def test_every_chart_of_the_page_has_title_unit_and_legend(run_dir: Path) -> None:
    write_scores(run_dir, layers=4)
    other = run_dir.parent / "other"
    write_synthetic_run(other, synthetic_config(other), steps=90)
    for text in (page([read_run(run_dir)]), page([read_run(run_dir), read_run(other)])):
        figures = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
        assert len(figures) == len(slugs(text)) >= 8
        for one in figures:
            assert re.search(r"<h3>[^<]+</h3><p>[^<]+</p>", one)
            assert re.search(r'<ul class="legend">.*?<li>', one)
            for label in re.findall(r'<div class="label \w+">(.*?)</div>', one):
                assert label
            assert 'class="label y"' in one and ">consumed tokens<" in one
            assert one.count('<div class="ticks') >= 2


@pytest.mark.parametrize(
    ("axis", "texts"),
    [
        (tokens_axis(0, 1_200_000), ["0", "200K", "400K", "600K", "800K", "1M", "1.2M"]),
        (Axis("", 0, 2.3e-3, "scientific"), ["0", "5e-4", "1e-3", "1.5e-3", "2e-3"]),
        (Axis("", 0, 20_000, "whole"), ["0", "5,000", "10,000", "15,000", "20,000"]),
        (Axis("", 0, 2.2, "whole"), ["0", "1", "2"]),
        (Axis("", 0, 13, "whole"), ["0", "5", "10"]),
        (fitted("", [0.5, 30.0], is_log=True), ["0.5", "1", "2", "5", "10", "20"]),
        (fitted("", [1e-7, 1e3], is_log=True), ["1e-07", "1e-05", "0.001", "0.1", "10", "1000"]),
    ],
)
def test_ticks_are_round_numbers(axis: Axis, texts: list[str]) -> None:
    assert [text for _, text in axis.ticks()] == texts


def test_a_gap_in_a_curve_stays_a_gap() -> None:
    axis = Axis("", 0, 4)
    drawn = Chart(
        "x", "x", "x", axis, axis, [Series("x", [0, 1, 2, 3], [1.0, math.nan, 2.0, 3.0], "blue")]
    )
    assert 'd="M0 7500M5000 5000L7500 2500"' in figure(drawn)


# In a browser

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PROBE = """<!doctype html><title>-</title><iframe id="f" width="WIDTH" height="800" src="PAGE">
</iframe><script>
f.onload = () => {
  const page = f.contentDocument, root = page.documentElement;
  const charts = [...page.querySelectorAll(".chart")];
  const words = (chart, what) => [...chart.querySelectorAll(what)].map((e) => e.innerText.trim());
  const plot = page.querySelector(".plot"), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove",
    { clientX: box.left + box.width / 2, clientY: box.top + 5, bubbles: true }));
  document.title = JSON.stringify({
    overflow: root.scrollWidth - root.clientWidth,
    titles: charts.flatMap((chart) => words(chart, "h3")),
    labels: charts.map((chart) => words(chart, ".label")),
    heights: charts.map((chart) => chart.querySelector(".plot").clientHeight),
    tip: page.querySelector(".tip").innerText,
    cursors: page.querySelectorAll(".cursor").length,
  });
};
</script>"""


# Plots by their place on the page: of the same tokens, of the same, of scores, a map of layers.
ZOOMS = """<!doctype html><title>-</title><iframe id="f" width="1280" height="800" src="PAGE">
</iframe><script>
f.onload = () => {
  const page = f.contentDocument, root = page.documentElement;
  const plots = [...page.querySelectorAll(".plot")], figures = [...page.querySelectorAll(".chart")];
  const send = (target, kind, x, pointerType) => {
    const box = plots[0].getBoundingClientRect();
    target.dispatchEvent(new PointerEvent(kind,
      { clientX: box.left + box.width * x, clientY: box.top + 9, pointerType, bubbles: true }));
  };
  const drag = (from, to, kind = "mouse") => {
    send(plots[0], "pointerdown", from, kind);
    send(plots[0], "pointermove", (from + to) / 2, kind);
    const shown = page.querySelectorAll(".range").length;
    send(plots[0], "pointermove", to, kind);
    send(plots[0], "pointerup", to, kind);
    return shown;
  };
  const look = () => {
    send(plots[0], "pointermove", 0.5, "mouse");
    return {
      boxes: figures.map((chart) => chart.querySelector(".plot svg")?.getAttribute("viewBox")),
      images: figures.map((chart) => chart.querySelector(".plot img")?.style.cssText),
      ticks: [...figures[0].querySelectorAll(".ticks.x span")].map((label) => label.textContent),
      ends: [...figures[0].querySelectorAll(".ticks.x span")].map((label) => label.style.left),
      phases: [...figures[0].querySelectorAll(".phase")].map((name) => name.style.cssText),
      buttons: page.querySelectorAll("button.whole").length,
      tip: page.querySelector(".tip").innerText,
      overflow: root.scrollWidth - root.clientWidth,
      ranges: page.querySelectorAll(".range").length,
    };
  };
  const seen = { axes: figures.map((chart) => chart.dataset.x), before: look() };
  drag(0.2, 0.7, "touch");
  seen.touched = look();
  drag(0.5, 0.501);
  seen.clicked = look();
  send(plots[0], "pointerdown", 0.2, "mouse");
  send(plots[0], "pointermove", 0.6, "mouse");
  page.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
  send(plots[0], "pointerup", 0.6, "mouse");
  seen.escaped = look();
  seen.range = drag(0.7, 0.2);
  seen.zoomed = look();
  drag(0, 0.5);
  seen.deeper = look();
  plots[0].dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
  seen.reset = look();
  for (let i = 0; i < 20; i++) drag(0.4, 0.6);
  seen.deepest = look();
  page.querySelector("button.whole").click();
  seen.again = look();
  seen.focus = page.activeElement.className;
  document.title = JSON.stringify(seen);
};
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return found[0]


def probed(browser: str, page: Path, probe: str) -> Any:
    """What a probe's script has found on a page; nothing may be on the browser's console."""
    file = page.parent / "probe.html"
    file.write_text(probe.replace("PAGE", page.as_uri()))
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--allow-file-access-from-files", f"--user-data-dir={page.parent / 'profile'}",
            "--virtual-time-budget=5000", "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title and title[1] != "-", done.stderr
    return json.loads(html.unescape(title[1]))


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_complaint(
    run_dir: Path, browser: str, width: int
) -> None:
    write_scores(run_dir, layers=4)
    written = report(run_dir).page
    seen = probed(browser, written, PROBE.replace("WIDTH", str(width)))
    assert seen["overflow"] == 0
    assert len(seen["titles"]) == len(EVERY_CHART) + 2 + 4 and all(seen["titles"])
    assert all(len(labels) >= 2 and all(labels) for labels in seen["labels"])
    assert min(seen["heights"]) >= 100
    assert (
        seen["tip"].startswith("409.6K consumed tokens") and "training, smoothed: 2." in seen["tip"]
    )
    assert seen["cursors"] == len(EVERY_CHART)  # scores are over tokens of their own


def test_a_drag_zooms_all_charts_over_the_same_axis(run_dir: Path, browser: str) -> None:
    write_scores(run_dir, layers=4)
    seen = probed(browser, report(run_dir).page, ZOOMS)
    assert seen["before"]["overflow"] == seen["before"]["buttons"] == 0
    for still in ("touched", "clicked", "escaped", "reset", "again"):
        assert seen[still] == seen["before"], still
    assert seen["range"] == 1  # of the drag that did zoom

    for name, begin, end in (("zoomed", 0.2, 0.7), ("deeper", 0.2, 0.45)):
        now, charts = seen[name], 0
        for axis, box, image in zip(seen["axes"], now["boxes"], now["images"], strict=True):
            same = axis == seen["axes"][0]
            charts += same
            if box is not None:
                left, top, width, height = map(float, box.split())
                wanted = (1e4 * begin, 1e4 * (end - begin)) if same else (0, 1e4)
                assert (left, width) == pytest.approx(wanted, abs=20)
                assert (top, height) == (0, 1e4)
            elif same:
                assert f"width: {100 / (end - begin):.0f}" in image
        assert now["buttons"] == charts > 3
        assert now["overflow"] == now["ranges"] == 0
    assert seen["zoomed"]["ticks"] == ["200K", "300K", "400K", "500K"]
    places = [float(end[:-1]) for end in seen["zoomed"]["ends"]]
    assert places == pytest.approx([8.8, 33.2, 57.7, 82.1], abs=0.5)
    assert seen["zoomed"]["tip"].startswith("368.")  # the middle of 0.2 and 0.7 of 819.2K
    assert float(seen["deepest"]["boxes"][0].split()[2]) == pytest.approx(50)  # and no less
    assert len(set(seen["deepest"]["ticks"])) == len(seen["deepest"]["ticks"]) >= 3
    assert "training, smoothed" in seen["deepest"]["tip"]
    assert seen["focus"].startswith("chart")
