"""The report is drawn from what a run recorded, and from nothing else."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from megatron_idea import config as configs
from megatron_idea import report as reports
from megatron_idea.config import Config
from megatron_idea.estimate import live_at_step, num_steps, width_plan
from megatron_idea.report import closing_table, report
from megatron_idea.schedule import keep_ratio, learning_rate, phase, phase_ended

BATCH = 8 * 256


def synthetic_config(run_dir: Path, **sections: dict) -> Config:
    """A run of 400 steps over which 1024 FFN neurons per layer become 384."""
    base = configs.from_dict(
        {
            "run_dir": str(run_dir),
            "model": {"ffn_hidden_size": 1024, "vocab_size": 2048},
            "schedule": {"total_tokens": 400 * BATCH},
            "prune": {"target_ffn_hidden_size": 384},
        }
    )
    return configs.replace(base, **sections)


def write_synthetic_run(run_dir: Path, config: Config, steps: int | None = None) -> None:
    """Records and events of a run as ``train`` leaves them, losses and speeds made up."""
    rng = random.Random(0)
    layers, schedule = config.model.num_layers, config.schedule
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(configs.to_yaml(config))
    changes = {change.tokens: change.width for change in width_plan(config)}
    width = config.model.ffn_hidden_size
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
            keep = keep_ratio(schedule, tokens, config.final_keep_ratio)
            loss = 2.4 + 5.2 * math.exp(-step / 40) + 0.12 * (1 - keep) - 0.4 * step / 400
            speed = 9.0e6 / (400 + width) * rng.uniform(0.94, 1.06)
            if tokens in changes:
                evaluated(step, loss, "compaction_before")
                events.append(
                    {
                        "kind": "compacted",
                        "step": step,
                        "tokens": tokens,
                        "widths_before": [width] * layers,
                        "widths_after": [changes[tokens]] * layers,
                    }
                )
                width = changes[tokens]
                evaluated(step, loss + 2e-7, "compaction_after")
            record = {
                "step": step,
                "tokens": tokens,
                "phase": phase(schedule, tokens),
                "loss": loss + rng.gauss(0, 0.05),
                "lr": learning_rate(schedule, tokens),
                "keep_ratio": keep,
                "ffn_live": [live_at_step(config, step)] * layers,
                "ffn_width": [width] * layers,
                "grad_norm": 0.5,
                "tokens_per_s": speed,
                "step_s": config.batch_tokens / speed,
                "memory_bytes": 10**9,
                "skipped": False,
            }
            if phase_ended(schedule, before, tokens) or step % 50 == 0:
                evaluated(step, loss, "phase_end")
            file.write(json.dumps(record) + "\n")
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


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
    assert row(table, "FFN width") == ["1024", "1024", "384", "384"]
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
    assert row(closing_table(tmp_path), "FFN width") == ["1024", "1024"]


def test_masks_alone_are_told_apart_from_a_smaller_model(tmp_path: Path) -> None:
    config = synthetic_config(tmp_path, prune={"compact": False})
    write_synthetic_run(tmp_path, config)
    assert "1024 (384 live)" in printed(closing_table(tmp_path))
    assert row(closing_table(tmp_path), "parameters") == ["2.03M"] * 4


def test_plain_training_has_no_columns_of_pruning(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, synthetic_config(tmp_path, prune={"strategy": "none"}))
    report(tmp_path)
    assert printed(closing_table(tmp_path)).split()[:2] == ["start", "end"]


def test_a_long_run_is_drawn_from_every_nth_record(run_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(reports, "MOST_POINTS", 50)
    drawn = []
    monkeypatch.setattr(reports, "_draw", lambda run, path: drawn.extend(run.records))
    report(run_dir)
    assert [record["step"] for record in drawn] == list(range(8, 401, 8))


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
