"""The live view reads a run's folder in whatever state it finds it."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from records import neurons, record
from rich.console import Console
from typer.testing import CliRunner

from megatron_idea import cli
from megatron_idea import config as configs
from megatron_idea.config import ConfigError
from megatron_idea.records.record import Record
from megatron_idea.report.events import describe
from megatron_idea.report.watch import SPARKS, View, sparkline, watch
from megatron_idea.shape import Shape

CONFIG = configs.from_dict(
    {"model": {"ffn_hidden_size": 1024}, "schedule": {"total_tokens": 100 * 2048}}
)


def append(run_dir: Path, name: str, *records: dict[str, Any] | Record) -> None:
    lines = (one.as_dict() if isinstance(one, Record) else one for one in records)
    with open(run_dir / name, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def config_of(num_layers: int, ffn_hidden_size: int) -> str:
    model = {"num_layers": num_layers, "ffn_hidden_size": ffn_hidden_size}
    return configs.to_yaml(configs.replace(CONFIG, model=model))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(configs.to_yaml(CONFIG))
    append(tmp_path, "events.jsonl", {"kind": "started", "time": time.time(), "step": 0})
    append(tmp_path, "metrics.jsonl", *(record(step) for step in range(1, 41)))
    return tmp_path


def frame(run_dir: Path, width: int = 80, now: float | None = None, height: int = 40) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    view = View(run_dir)
    view.refresh()
    console.print(view.render(time.time() if now is None else now, width, height))
    return out.getvalue()


def test_a_running_run_shows_where_it_is(run_dir: Path) -> None:
    text = frame(run_dir)
    for shown in (
        "running", "enlarged", "40.0%", "81.9K of 205K tokens", "step 40", "ETA ", "4.1K",
        "every layer", "1,024 of 1,024", "2 GB", "started at step 0",
    ):  # fmt: skip
        assert shown in text, shown
    assert set(SPARKS) & set(text)


def test_a_taught_run_shows_what_its_teacher_says(run_dir: Path) -> None:
    assert "KL" not in frame(run_dir)
    append(run_dir, "metrics.jsonl", record(41, kl=0.125, teacher_loss=6.5))
    text = frame(run_dir)
    assert "KL from teacher" in text and "0.1250" in text and "6.5000" in text
    assert "acceptance" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_frame_is_no_wider_than_the_terminal(run_dir: Path, width: int) -> None:
    assert max(map(len, frame(run_dir, width).splitlines())) <= width


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_bar_and_no_heading_is_broken_in_two(run_dir: Path, width: int) -> None:
    counts = neurons(*(10_000 + 8 * i for i in range(48)))
    (run_dir / "config.yaml").write_text(config_of(48, 10_376))
    append(run_dir, "metrics.jsonl", record(41, live=counts, stored=counts))
    lines = frame(run_dir, width).splitlines()
    bars = [line for line in lines if line.startswith("│ layer")]
    assert len(bars) == 12 and all(" of 10," in line for line in bars)
    (sparks,) = [line for line in lines if set(SPARKS) - {"█"} & set(line) and "layer" not in line]
    assert "loss " in sparks
    assert any("ETA " in line and not line.rstrip(" │").endswith("ETA") for line in lines)


def test_a_low_terminal_shows_fewer_layers(run_dir: Path) -> None:
    counts = neurons(*(512 + 8 * i for i in range(48)))
    (run_dir / "config.yaml").write_text(config_of(48, 1024))
    append(run_dir, "metrics.jsonl", record(41, live=counts, stored=counts))
    text = frame(run_dir, height=24)
    assert text.count("layer ") == 3 and "layer 0" in text and "layer 47" in text
    assert len(text.splitlines()) <= 24


def test_the_newest_sample_is_shown(run_dir: Path) -> None:
    texts = [
        {"step": step, "tokens": 1, "prompt": prompt, "text": f"\tx = {step}\n{'y ' * 200}"}
        for step in (10, 20)
        for prompt in ("def f():", "another")
    ]
    append(run_dir, "samples.jsonl", *texts)
    with open(run_dir / "samples.jsonl", "a") as file:
        file.write('{"step": 30, "tex')
    text = frame(run_dir)
    assert "writes at step 20: def f(): x = 20 y y" in text and "another" not in text


def test_layers_of_different_counts_get_a_bar_each(run_dir: Path) -> None:
    counts = {"live": neurons(100, 300, 500, 512), "stored": neurons(128, 384, 512, 512)}
    append(run_dir, "metrics.jsonl", record(41, phase="prune", **counts))
    text = frame(run_dir)
    assert "layer 0" in text and "100 of 128" in text and "layer 3" in text and "▒" in text


def test_every_axis_of_a_run_has_its_bars(run_dir: Path) -> None:
    counts = neurons(*[512] * 4) | {"num_query_groups": [1, 2, 2, 2], "hidden_size": [96]}
    append(run_dir, "metrics.jsonl", record(41, live=counts, stored=counts))
    text = frame(run_dir)
    assert "every layer" in text and "512 of 512" in text
    assert "KV groups, live" in text and "1 of 1" in text and "2 of 2" in text
    assert "channels, live" in text and "the model" in text and "96 of 96" in text


OF_ALL_AXES = configs.replace(
    CONFIG,
    model={"num_layers": 8, "num_query_groups": 4, "hidden_size": 256},
    prune={"target": dict(ffn_hidden_size=384, num_query_groups=2, hidden_size=192, num_layers=6)},
)


@pytest.fixture
def of_all_axes(run_dir: Path) -> Path:
    """A run in which layer 3 is removed and still stored, and layer 5 is gone."""
    (run_dir / "config.yaml").write_text(configs.to_yaml(OF_ALL_AXES))
    live = neurons(400, 500, 512, 0, 512, 0, 512, 512) | {
        "num_query_groups": [3, 2, 2, 0, 2, 0, 2, 2], "hidden_size": [200], "num_layers": [6],
    }  # fmt: skip
    stored = neurons(*[512] * 5, 0, 512, 512) | {
        "num_query_groups": [*[3] * 5, 0, 3, 3], "hidden_size": [256], "num_layers": [7],
    }  # fmt: skip
    append(run_dir, "metrics.jsonl", record(41, live=live, stored=stored))
    trial = {"step": 41, "tokens": 41 * 2048, "layer": 3, "losses": {"3": 5.0, "6": 5.1}}
    append(run_dir, "events.jsonl", {"kind": "layer_removed", "time": time.time(), **trial})
    return run_dir


def test_a_run_of_all_axes_shows_each_and_marks_layers_that_are_gone(of_all_axes: Path) -> None:
    text = frame(of_all_axes, height=60)
    for shown in (
        "neurons, live", "400 of 512", "KV groups, live", "3 of 3", "2 of 3", "channels, live",
        "200 of 256", "layers, live", "6 of 7", "removed layer 3 at step 41",
    ):  # fmt: skip
        assert shown in text, shown
    lines = [" ".join(line.strip("│ ").split()) for line in text.splitlines()]
    assert lines.count("layer 3 removed") == lines.count("layer 5 removed") == 2
    assert lines.count("removed layer 3, layer 5") == 1


@pytest.mark.parametrize("width", [60, 80])
def test_a_low_terminal_shows_a_line_for_each_of_several_axes(
    of_all_axes: Path, width: int
) -> None:
    lines = frame(of_all_axes, width, height=24).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= width
    ends = [line.split()[-4:-1] for line in lines if " of " in line and "tokens" not in line]
    assert ends == [
        ["491", "of", "512"], ["2.17", "of", "3"], ["200", "of", "256"], ["6", "of", "7"]
    ]  # fmt: skip


def test_a_run_of_neurons_alone_shows_neurons_alone(run_dir: Path) -> None:
    counts = Shape.full(CONFIG.model).by_number(4)
    append(run_dir, "metrics.jsonl", record(41, live=counts, stored=counts))
    text = frame(run_dir)
    assert "neurons, live" in text and "KV groups" not in text and "layers, live" not in text


def test_a_deep_model_shows_twelve_of_its_layers(run_dir: Path) -> None:
    counts = neurons(*(512 + 8 * i for i in range(48)))
    (run_dir / "config.yaml").write_text(config_of(48, 1024))
    append(run_dir, "metrics.jsonl", record(41, live=counts, stored=counts))
    text = frame(run_dir)
    assert text.count("layer ") == 12 and "layer 0" in text and "layer 47" in text


def test_a_finished_run_says_so_and_has_no_time_left(run_dir: Path) -> None:
    append(run_dir, "metrics.jsonl", record(100, phase="recover"))
    append(run_dir, "events.jsonl", {"kind": "finished", "time": 1.0, "step": 100})
    text = frame(run_dir)
    assert "finished" in text and "100.0%" in text and "ETA" not in text


def test_a_stopped_and_a_silent_run_are_told_from_a_running_one(run_dir: Path) -> None:
    assert "silent for 16m40s" in frame(run_dir, now=time.time() + 1000)
    append(run_dir, "events.jsonl", {"kind": "signal", "time": 1.0, "step": 40, "name": "SIGTERM"})
    assert "stopped, can be resumed" in frame(run_dir)


@pytest.mark.parametrize("has_config", [False, True])
def test_a_folder_without_records_is_waited_for(tmp_path: Path, has_config: bool) -> None:
    if has_config:
        (tmp_path / "config.yaml").write_text(configs.to_yaml(CONFIG))
    assert "waiting for " + ("its first step" if has_config else "config.yaml") in frame(tmp_path)


@pytest.mark.parametrize(
    "tail", ['{"step": 41, "lo', '{"step": 41}', '{"step": 41}\n', "rubbish\n", "[1]\n"]
)
def test_a_half_written_or_broken_line_does_no_harm(run_dir: Path, tail: str) -> None:
    before = frame(run_dir, now=1e9)
    for name in ("metrics.jsonl", "events.jsonl", "scores.jsonl", "samples.jsonl"):
        with open(run_dir / name, "a") as file:
            file.write(tail)
    assert frame(run_dir, now=1e9) == before


def test_an_event_without_its_fields_does_no_harm(run_dir: Path) -> None:
    append(run_dir, "events.jsonl", {"kind": "evaluated"}, {"kind": "compacted", "step": 3})
    assert "evaluated" in frame(run_dir)


def test_a_loss_that_is_not_a_number_is_said(run_dir: Path) -> None:
    append(run_dir, "metrics.jsonl", *(record(40 + i, loss=float("nan")) for i in range(1, 21)))
    assert "not a number" in frame(run_dir)


def test_what_a_resumed_run_dropped_is_forgotten(run_dir: Path) -> None:
    view = View(run_dir)
    view.refresh()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    os.truncate(run_dir / "metrics.jsonl", len("".join(lines[:30])))
    view.refresh()
    assert view.recent[-1].step == 30 and len(view.losses) == 30


def test_a_long_run_keeps_a_bounded_number_of_losses(run_dir: Path) -> None:
    steps = range(41, 20_001)
    append(run_dir, "metrics.jsonl", *(record(s, loss=float(s)) for s in steps))
    view = View(run_dir)
    view.refresh()
    assert 1000 < len(view.losses) <= 4096
    assert view.losses[-1] > 19_990


def test_a_sparkline_falls_with_the_loss() -> None:
    line = sparkline([8.0 - i / 100 for i in range(600)], 20)
    assert len(line) == 20 and line[0] == "█" and line[-1] == "▁"
    assert sorted(line, reverse=True) == list(line)
    assert sparkline([], 10) == "" and sparkline([1.0], 10) == "▁"
    assert sparkline([1.0, float("nan")], 2)[1] == " "


def test_every_kind_of_event_has_its_words() -> None:
    compacted = {
        "kind": "compacted",
        "step": 6,
        "before": neurons(64, 64) | {"num_query_groups": [2, 2]},
        "after": neurons(48, 40) | {"num_query_groups": [2, 2]},
    }
    assert describe(compacted) == "compacted 64 to 44 neurons per layer at step 6"
    compacted["before"] = {"num_query_groups": [2, 2, 2, 2], "num_layers": [4]}
    compacted["after"] = {"num_query_groups": [2, 1, 2], "num_layers": [3]}
    assert describe(compacted) == "compacted 2 to 1.67 KV groups per layer, 4 to 3 layers at step 6"
    gone = {"kind": "layer_removed", "step": 6, "layer": 2, "losses": {"2": 3.1}}
    assert describe(gone) == "removed layer 2 at step 6"
    assert describe({"kind": "layer_removed", "step": 6}) == "layer_removed at step 6"
    assert describe({"kind": "saved", "step": 6, "seconds": 0.21}) == "saved step 6 in 0.2 s"
    assert describe({"kind": "damaged", "reason": "x"}) == "damaged checkpoint: x"
    assert describe({"kind": "saved", "step": 6}) == "saved at step 6"
    assert (
        describe({"kind": "signal", "step": 6, "name": None}) == "stopped by a signal after step 6"
    )
    taught = {"kind": "teacher", "step": 6, "digest": "ab", "val_loss": 3.25}
    assert describe(taught) == "teacher made at step 6, held-out loss 3.2500"
    del taught["val_loss"]
    assert describe(taught) == "teacher at step 6"
    stopped = {"kind": "signal", "step": 6, "name": "SIGTERM"}
    assert describe(stopped) == "stopped by SIGTERM after step 6"
    rolled = {"kind": "rolled_back", "step": 4, "from_step": 9}
    assert describe(rolled) == "rolled back from step 9 to step 4"


def test_watching_ends_with_the_run(run_dir: Path) -> None:
    def finish() -> None:
        append(run_dir, "metrics.jsonl", record(100))
        append(run_dir, "events.jsonl", {"kind": "finished", "time": 1.0, "step": 100})

    timer = threading.Timer(0.3, finish)
    timer.start()
    out = io.StringIO()
    watch(run_dir, every_s=0.1, console=Console(file=out, force_terminal=True, width=80))
    timer.join()
    assert "finished" in out.getvalue()


def test_the_command_looks_once(run_dir: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["watch", str(run_dir), "--once"])
    assert result.exit_code == 0 and "step 40" in result.output
    assert "1,024 of 1,024" in result.output
    with pytest.raises(ConfigError, match="is not a folder"):
        watch(tmp_path / "nowhere", once=True)
