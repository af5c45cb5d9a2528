"""Records survive kills and resumes; the progress line says what is going on."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import io
import json
import math
import os
import re
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from records import neurons, record
from rich.console import Console

from megatron_idea import config as configs
from megatron_idea.config import Config, ConfigError
from megatron_idea.course import remaining_flops
from megatron_idea.engine.gpus import peak_flops
from megatron_idea.records import trackers
from megatron_idea.records.log import RecordError, RunLog
from megatron_idea.records.progress import Progress, time_left_s
from megatron_idea.records.read import lines_of, read_events, read_metrics, read_scores
from megatron_idea.records.readable import human_amount, human_duration
from megatron_idea.records.record import Record
from megatron_idea.shape import Shape

QUIET = configs.from_dict({"logging": {"tensorboard": False}})


def write_steps(run_dir: Path, first: int, last: int, *, close: bool = True) -> None:
    log = RunLog(run_dir, QUIET, is_writer=True, step=first - 1)
    for step in range(first, last + 1):
        log.write(record(step))
    if close:
        log.close()


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    assert read_metrics(tmp_path) == [record(1), record(2), record(3)]


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, close=False)
    assert len(read_metrics(tmp_path)) == 2


def test_a_resumed_run_leaves_the_metrics_of_an_undisturbed_one(tmp_path: Path) -> None:
    write_steps(tmp_path / "undisturbed", 1, 9)
    write_steps(tmp_path / "killed", 1, 7)  # the last checkpoint is of step 4
    write_steps(tmp_path / "killed", 5, 9)
    undisturbed, killed = (
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("undisturbed", "killed")
    )
    assert killed == undisturbed


def test_a_run_killed_before_its_first_checkpoint_starts_clean(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    write_steps(tmp_path, 1, 2)
    assert [r.step for r in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3', '{"step": 3, "loss": 1.0}'])
def test_a_half_written_last_line_does_no_harm(tmp_path: Path, tail: str) -> None:
    write_steps(tmp_path, 1, 2)
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write(tail)
    assert [r.step for r in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, 3, 4)
    assert [r.step for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert [e["kind"] for e in read_events(tmp_path)] == ["started", "resumed"]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + "rubbish\n" + json.dumps(record(2).as_dict()) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_metrics(tmp_path)
    broken: list[str] = []
    assert [one.step for one in read_metrics(tmp_path, broken)] == [1, 2]
    assert broken == ["metrics.jsonl, line 2"]


OLDER = record(1).as_dict() | {"keep_ratio": 1.0, "ffn_live": [8], "ffn_width": [8]}
del OLDER["live"], OLDER["stored"], OLDER["removed"]


@pytest.mark.parametrize("line", ["[1]", "3", '{"loss": 1.0}', json.dumps(OLDER)])
def test_json_that_is_not_a_record_is_a_broken_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not a record"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("live", "stored"),
    [
        (neurons(8, 8), neurons(8)),
        (neurons(8), {"hidden_size": [8]}),
        ({}, {}),
        ({"neurons": [8]}, {"neurons": [8]}),
        (neurons(-1), neurons(8)),
    ],
)
def test_counts_that_do_not_belong_together_are_no_record(live: Any, stored: Any) -> None:
    assert Record.parse(record(1).as_dict()) == record(1)
    assert Record.parse(record(1, live=live, stored=stored).as_dict()) is None


def test_neighbours_with_equal_counts_share_them(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    log = RunLog(tmp_path, QUIET, is_writer=True, step=2)
    log.write(record(3, live=neurons(8, 8, 8, 8)))
    log.close()
    first, second, third = read_metrics(tmp_path)
    assert first.stored is second.stored is third.stored and first.live is second.live
    assert third.live == neurons(8, 8, 8, 8)


def test_a_record_knows_the_shape_of_its_model() -> None:
    of_groups = record(1, live={"num_query_groups": [1] * 4}, stored={"num_query_groups": [1] * 4})
    full = Shape.full(QUIET.model)
    assert record(1).shape(QUIET.model) == full
    assert of_groups.shape(QUIET.model) == full.with_counts("num_query_groups", 1)
    assert of_groups.is_of(QUIET.model)
    assert not record(1, live=neurons(8), stored=neurons(8)).is_of(QUIET.model)


def of_all_axes(**changes: list[int]) -> dict[str, list[int]]:
    """Counts of four layers, the third of which is gone."""
    counts = {"num_query_groups": [2, 2, 0, 1], "hidden_size": [64], "num_layers": [3]}
    return neurons(512, 256, 0, 512) | counts | changes


def test_layers_that_are_gone_are_not_in_the_shape() -> None:
    shape = record(1, stored=of_all_axes()).shape(QUIET.model)
    assert shape.by_number(4) == of_all_axes()
    assert [layer.number for layer in shape.layers] == [0, 1, 3]
    layers = record(1, live={"num_layers": [3]}, stored={"num_layers": [3]})
    full = Shape.full(QUIET.model)
    assert layers.shape(QUIET.model) == full.with_counts("num_layers", 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"ffn_hidden_size": [512, 256, 0]},
        {"ffn_hidden_size": [512, 256, 0, 1025]},
        {"ffn_hidden_size": [512, 256, 8, 512]},
        {"num_query_groups": [2, 0, 0, 1]},
        {"num_query_groups": [2, 2, 1, 1]},
        {"num_layers": [4]},
        {"num_layers": [3, 3]},
        {"hidden_size": [0]},
        {"hidden_size": [64, 64]},
        {"ffn_hidden_size": [0] * 4, "num_query_groups": [0] * 4, "num_layers": [0]},
    ],
)
def test_counts_that_no_model_can_have_are_of_none(changes: dict[str, list[int]]) -> None:
    sound, ill = of_all_axes(), of_all_axes(**changes)
    assert record(1, live=sound, stored=sound).is_of(QUIET.model)
    for counts in ({"live": ill, "stored": sound}, {"live": sound, "stored": ill}):
        assert not record(1, **counts).is_of(QUIET.model)


def test_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    reader = lines_of(tmp_path, "scores.jsonl")
    assert list(reader) == [] and not reader.begins_again()
    path.write_text('{"step": 1}\n{"st')
    assert list(reader) == [{"step": 1}]
    assert list(reader) == []
    with open(path, "a") as file:
        file.write('ep": 2}\n')
    assert list(reader) == [{"step": 2}]
    path.write_text('{"step": 1}\n')
    assert reader.begins_again() and list(reader) == [{"step": 1}]


def test_events_keep_everything_and_are_read_without_what_was_superseded(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET, is_writer=True)
    log.event("evaluated", step=0, val_loss=7.6)
    log.event("saved", step=4)
    log.event("compacted", step=6, digest="of the killed process")
    log.close()
    log = RunLog(tmp_path, QUIET, is_writer=True, step=4)
    log.event("compacted", step=6, digest="of the resumed one")
    log.close()
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 6
    events = read_events(tmp_path)
    assert [e["kind"] for e in events] == ["started", "evaluated", "saved", "resumed", "compacted"]
    assert events[-1]["digest"] == "of the resumed one"
    assert all(e["time"] > 1.6e9 for e in events)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET, is_writer=False)
    log.write(record(1))
    log.event("saved", step=1)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_records_reads_as_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert read_events(tmp_path) == []


def test_scalars_are_mirrored_to_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, Config(), is_writer=True)
    log.write(record(1, stored=neurons(512, 256, 512, 256)))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == pytest.approx(6.999)
    assert events.Scalars("stored/ffn_hidden_size")[0].value == 384  # the mean over layers
    assert "phase" not in events.Tags()["scalars"]


def test_what_a_teacher_says_is_recorded_and_mirrored_in_the_steps_that_ask_it(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    log = RunLog(tmp_path, TRACKED, is_writer=True)
    log.write(record(1))
    taught = record(2, kl=0.25, teacher_loss=6.5, acceptance=0.75)
    log.write(taught)
    log.close()
    before, after = (values[0] for name, values in wandb.calls if name == "log")
    assert not {"kl", "teacher_loss", "acceptance", "mfu"} & before.keys()
    assert (after["kl"], after["teacher_loss"], after["acceptance"]) == (0.25, 6.5, 0.75)
    assert "kl" not in (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert read_metrics(tmp_path) == [record(1), taught]


def test_without_tensorboard_no_folder_appears(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 1)
    assert not (tmp_path / "tensorboard").exists()


def test_asking_for_a_missing_tensorboard_fails_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for is_writer in (True, False):
        with pytest.raises(ConfigError, match=r"set logging\.tensorboard=false"):
            RunLog(tmp_path, Config(), is_writer)


def test_a_record_that_cannot_be_written_is_noted_and_told_when_asked(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 1)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, QUIET, is_writer=True)
    log.write(record(1))
    log.event("saved", step=1)  # nothing is added after a gap
    log.close()
    assert [event["kind"] for event in read_events(tmp_path)] == ["started"] * 2
    where = rf"cannot write the records of run folder {tmp_path}: No space left on device"
    with pytest.raises(RecordError, match=f"{where}; nothing was saved yet"):
        log.check()
    saved = tmp_path / "checkpoints" / "step_00000004"
    saved.mkdir(parents=True)
    (saved / "state.json").touch()
    log = RunLog(tmp_path, QUIET, is_writer=True)
    log.write(record(1))
    with pytest.raises(RecordError, match=f"the last checkpoint is {saved}"):
        log.check()


def test_a_tracker_that_cannot_write_is_left_out_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = RunLog(tmp_path, Config(), is_writer=True)
    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    for step in range(1, 30):
        log.write(record(step))
    log.close()
    log.check()
    assert len(read_metrics(tmp_path)) == 29
    (said,) = [line for line in caplog.messages if "TensorBoard" in line]
    assert said.startswith("TensorBoard cannot write and is left out") and "No space left" in said
    assert "Traceback" not in capfd.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").touch()  # where its folder should be
    RunLog(tmp_path / "other", Config(), is_writer=True).check()
    assert len([line for line in caplog.messages if "TensorBoard" in line]) == 2


class FakeWandb(ModuleType):
    """Stands for wandb: notes what it is told."""

    Error = type("Error", (Exception,), {})

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.fails = False

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **given: Any) -> Any:
        if self.fails:
            raise self.Error("no API key")
        self.calls.append(("init", given))
        note = lambda name: lambda *values, **_: self.calls.append((name, values))  # noqa: E731
        return SimpleNamespace(
            log=note("log"), finish=note("finish"), define_metric=note("define_metric")
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    fake.__spec__ = ModuleSpec("wandb", None)  # found, as if installed
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


TRACKED = configs.replace(QUIET, logging={"wandb": "a-project"})


def test_scalars_are_mirrored_to_weights_and_biases(tmp_path: Path, wandb: FakeWandb) -> None:
    log = RunLog(tmp_path, TRACKED, is_writer=True)
    full = Shape.full(QUIET.model).by_number(4)
    live = full | neurons(128, 64, 128, 64)
    log.write(record(1, stored=full | neurons(512, 256, 512, 256), live=live))
    log.event("evaluated", step=1, tokens=2048, val_loss=6.5, why="every")
    log.close()
    names = [name for name, _ in wandb.calls]
    assert names == ["init", "define_metric", "log", "log", "finish"]
    assert wandb.calls[0][1]["project"] == "a-project"
    assert wandb.calls[0][1]["config"]["model"]["hidden_size"] == 128
    first, second = (values[0] for name, values in wandb.calls if name == "log")
    assert (first["step"], first["stored/ffn_hidden_size"]) == (1, 384)
    assert first["live/ffn_hidden_size"] == 96 and first["removed"] == 0
    assert "live/num_query_groups" not in first  # this run prunes neurons
    assert (second["tokens"], second["val_loss"]) == (2048, 6.5)


def test_every_axis_that_is_pruned_is_mirrored_as_a_mean_over_layers(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    target = {"ffn_hidden_size": 384, "num_query_groups": 1, "num_layers": 3}
    config = configs.replace(TRACKED, prune={"target": target})
    log = RunLog(tmp_path, config, is_writer=True)
    log.write(record(1, live=of_all_axes(), stored=of_all_axes()))
    log.close()
    (values,) = (values[0] for name, values in wandb.calls if name == "log")
    live = {name: value for name, value in values.items() if name.startswith("live/")}
    assert live == {
        "live/ffn_hidden_size": pytest.approx(1280 / 3),
        "live/num_query_groups": pytest.approx(5 / 3),
        "live/num_layers": 3,
    }


def test_a_resumed_run_goes_on_in_its_own_curve(tmp_path: Path, wandb: FakeWandb) -> None:
    for first in (1, 4):
        log = RunLog(tmp_path, TRACKED, is_writer=True, step=first - 1)
        log.write(record(first))
        log.close()
    RunLog(tmp_path / f"lr: 1/2? {'x' * 200}".replace("/", "#"), TRACKED, is_writer=True).close()
    ids = [given["id"] for name, given in wandb.calls if name == "init"]
    assert ids[0] == ids[1] != ids[2]
    # wandb takes such letters, and makes a folder's name of them and of what it puts before.
    assert re.fullmatch(r"lr__1_2__x+-[0-9a-f]+", ids[2]) and len(ids[2]) <= 128


def test_a_tracker_that_does_not_start_is_explained(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.fails = True
    with pytest.raises(ConfigError, match="no API key; run wandb login, or set WANDB_MODE=offline"):
        RunLog(tmp_path, TRACKED, is_writer=True)


def test_asking_for_a_missing_wandb_fails_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for is_writer in (True, False):
        with pytest.raises(ConfigError, match="'a-project' but wandb is not installed"):
            RunLog(tmp_path, TRACKED, is_writer)


def test_nobody_who_did_not_ask_imports_wandb(tmp_path: Path, wandb: FakeWandb) -> None:
    RunLog(tmp_path, QUIET, is_writer=True).close()
    assert wandb.calls == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = RunLog(tmp_path, TRACKED, is_writer=True)
    log.write(record(1))
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


class FakeMLflow:
    """Stands for an MLflow client and what its server keeps; the tests below ask the real one, too,
    where it is installed."""

    runs: ClassVar[dict[tuple[str, str], SimpleNamespace]] = {}

    def __init__(self, tracking_uri: str) -> None:
        self.uri = tracking_uri

    def create_experiment(self, name: str) -> str:
        if any(uri == self.uri and run.experiment == name for (uri, _), run in self.runs.items()):
            raise self.Exception("it exists", "RESOURCE_ALREADY_EXISTS")
        return name

    def get_experiment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id=name)

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> SimpleNamespace:
        metrics: list[SimpleNamespace] = []
        info = SimpleNamespace(run_id=str(len(self.runs)), status="RUNNING", run_name=run_name)
        data = SimpleNamespace(params={}, tags=tags, points=metrics)
        data.to_proto = lambda: SimpleNamespace(metrics=metrics)
        run = SimpleNamespace(info=info, data=data, experiment=experiment)
        self.runs[self.uri, info.run_id] = run
        return run

    def search_runs(self, experiments: list[str], query: str = "") -> list[SimpleNamespace]:
        return [
            run for (uri, _), run in self.runs.items()
            if uri == self.uri and run.experiment in experiments
            and all(f"tags.`{k}` = '{v}'" == query for k, v in run.data.tags.items() if query)
        ]  # fmt: skip

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000 and len(params) <= 100
        data = self.runs[self.uri, run_id].data
        data.points.extend(metrics)
        data.params.update((param.key, param.value) for param in params)

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[self.uri, run_id].info.status = status

    def set_terminated(self, run_id: str) -> None:
        self.update_run(run_id, "FINISHED")

    def get_metric_history(self, run_id: str, key: str) -> list[SimpleNamespace]:
        return [point for point in self.runs[self.uri, run_id].data.points if point.key == key]

    class Exception(Exception):
        def __init__(self, message: str, error_code: str = "INTERNAL_ERROR") -> None:
            super().__init__(message)
            self.error_code = error_code


@pytest.fixture(params=["stand-in", "real"])
def mlflow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of MLflow's clients."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # to be as it was afterwards
        monkeypatch.delenv(name)
    if request.param == "real":
        pytest.importorskip("mlflow")
        from mlflow import MlflowClient

        return MlflowClient
    entity = lambda *names: lambda *v: SimpleNamespace(**dict(zip(names, v, strict=True)))  # noqa: E731
    made = {
        "mlflow": {"MlflowClient": FakeMLflow},
        "mlflow.exceptions": {"MlflowException": FakeMLflow.Exception},
        "mlflow.entities": {
            "Metric": entity("key", "value", "timestamp", "step"), "Param": entity("key", "value")
        },
    }  # fmt: skip
    for name, members in made.items():
        module = ModuleType(name)
        vars(module).update(members, __spec__=ModuleSpec(name, None))  # found, as if installed
        monkeypatch.setitem(sys.modules, name, module)
    return FakeMLflow


TO_MLFLOW = configs.replace(QUIET, logging={"mlflow": "an experiment"})


def mlflow_runs(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("an experiment").experiment_id
    found: list[Any] = client.search_runs([experiment])
    return found


def points(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    history = client.get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in history)


def test_scalars_and_the_configuration_are_mirrored_to_mlflow(tmp_path: Path, mlflow: Any) -> None:
    run_dir = tmp_path / "it's a #1 run"
    log = RunLog(run_dir, TO_MLFLOW, is_writer=True)
    log.write(record(1, stored=neurons(512, 256, 512, 256)))
    log.event("evaluated", step=1, tokens=2048, val_loss=6.5, why="every")
    log.write(record(2, loss=math.nan))
    log.close()
    client = mlflow(tracking_uri=(run_dir / "mlruns").as_uri())
    (run,) = mlflow_runs(client)
    assert (run.info.run_name, run.info.status) == (run_dir.name, "FINISHED")
    assert points(client, run, "tokens") == [(1, 2048), (2, 4096)]
    assert points(client, run, "stored/ffn_hidden_size") == [(1, 384), (2, 1024)]
    assert points(client, run, "val_loss") == [(1, 6.5)]
    (_, first), (_, second) = points(client, run, "loss")
    assert first == 6.999 and math.isnan(second)
    given = configs.flat(dataclasses.asdict(TO_MLFLOW))
    assert run.data.params == {key: str(value) for key, value in given.items()}


def test_a_resumed_run_goes_on_in_its_own_mlflow_run_without_points_twice(
    tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for first, last in ((1, 7), (5, 9)):  # the last checkpoint is of step 4
        log = RunLog(tmp_path / "a", TO_MLFLOW, is_writer=True, step=first - 1)
        for step in range(first, last + 1):
            log.write(record(step))
        if last > 7:  # it was killed before step 7 was evaluated
            log.event("evaluated", step=7, tokens=7 * 2048, val_loss=6.5)
        log.close()
    for branch in ("one", "other"):  # folders of one name, begun at a checkpoint of another run
        log = RunLog(tmp_path / branch / "seed_0", TO_MLFLOW, is_writer=True, step=4)
        log.write(record(5))
        log.close()
    client = mlflow(tracking_uri=(tmp_path / "server").as_uri())
    runs = mlflow_runs(client)
    assert sorted(run.info.run_name for run in runs) == ["a", "seed_0", "seed_0"]
    (run,) = [run for run in runs if run.info.run_name == "a"]
    assert points(client, run, "loss") == [(step, record(step).loss) for step in range(1, 10)]
    assert points(client, run, "val_loss") == [(7, 6.5)]
    assert not (tmp_path / "a" / "mlruns").exists()


def test_an_mlflow_that_fails_is_left_out_with_one_line(
    tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(tmp_path, TO_MLFLOW, is_writer=True)

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is gone\nand more")

    monkeypatch.setattr(mlflow, "log_batch", gone)
    for step in range(1, 4):
        log.write(record(step))
        time.sleep(0.05)  # for the thread that sends
    log.close()
    log.check()
    assert len(read_metrics(tmp_path)) == 3
    (said,) = [line for line in caplog.messages if "MLflow" in line]
    assert said == "MLflow cannot write and is left out from here on: the server is gone"


def test_an_mlflow_that_never_answers_does_not_hold_a_run_that_ends(
    tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(tmp_path, TO_MLFLOW, is_writer=True)
    answered = threading.Event()
    monkeypatch.setattr(mlflow, "log_batch", lambda *_, **__: answered.wait(60))
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.01)
    log.write(record(1))
    log.close()
    answered.set()
    (said,) = [line for line in caplog.messages if "MLflow" in line]
    assert said.endswith("the server has not answered for 0.01 s")


def test_an_mlflow_that_does_not_start_is_explained(
    tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise sys.modules["mlflow.exceptions"].MlflowException("no access\nand more")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a-server")
    monkeypatch.setattr(mlflow, "create_experiment", refused)
    with pytest.raises(
        ConfigError, match="start at http://a-server: no access; check MLFLOW_TRACK"
    ):
        RunLog(tmp_path, TO_MLFLOW, is_writer=True)
    # A run that goes on does so without: its job must not end with the server.
    log = RunLog(tmp_path, TO_MLFLOW, is_writer=True, step=3)
    log.write(record(4))
    log.close()
    (said,) = [line for line in caplog.messages if "MLflow" in line]
    assert "MLflow cannot write and is left out" in said
    assert [one.step for one in read_metrics(tmp_path)] == [4]


def test_an_address_that_mlflow_does_not_know_is_explained(
    tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise sys.modules["mlflow.exceptions"].MlflowException("no such scheme")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "my-server:5000")
    if mlflow is FakeMLflow:
        monkeypatch.setattr(mlflow, "__init__", refused)
    with pytest.raises(ConfigError, match="MLflow does not start at my-server:5000: "):
        RunLog(tmp_path, TO_MLFLOW, is_writer=True)


def test_asking_for_a_missing_mlflow_fails_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for is_writer in (True, False):
        with pytest.raises(ConfigError, match="'an experiment' but mlflow is not installed"):
            RunLog(tmp_path, TO_MLFLOW, is_writer)


def test_scores_of_steps_that_are_run_again_are_dropped(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    assert read_scores(tmp_path) == []
    log = RunLog(tmp_path, QUIET, is_writer=True, step=3)
    for step in (4, 5, 6):
        log.scores({"step": step, "cut": [0.1]})
    log.close()
    RunLog(tmp_path, QUIET, is_writer=True, step=5).close()
    assert [r["step"] for r in read_scores(tmp_path)] == [4, 5]


def test_a_start_says_what_the_run_runs_on(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 1)
    environment = read_events(tmp_path)[0]["environment"]
    assert environment["device"] and environment["processes"] == 1
    assert {"python", "torch", "megatron-core"} <= set(environment["versions"])


def test_mfu_is_recorded_when_the_peak_is_known(tmp_path: Path) -> None:
    per_token = Shape.full(QUIET.model).flops_per_token(QUIET.model, 256)
    log = RunLog(tmp_path, QUIET, is_writer=True, peak_flops=4096.0 * per_token * 2)
    assert log.write(record(1)).mfu == pytest.approx(0.5)
    log.close()
    assert read_metrics(tmp_path)[0].mfu == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_known_by_the_devices_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_progress(config: Config = QUIET) -> tuple[Progress, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return Progress(config, True, console=Console(file=out, width=60), clock=clock), out, clock


def test_where_nobody_watches_a_line_comes_every_ten_seconds() -> None:
    progress, out, clock = plain_progress()
    for step in range(1, 31):
        clock.now = float(step)
        progress.update(record(step))
    progress.close()
    assert len(out.getvalue().splitlines()) == 3


def test_a_new_phase_gets_its_line_at_once() -> None:
    progress, out, _ = plain_progress()
    for step, phase in enumerate(("enlarged", "enlarged", "prune", "prune", "recover"), start=1):
        progress.update(record(step, phase=phase))
    assert [line.split()[0] for line in out.getvalue().splitlines()] == [
        "enlarged",
        "prune",
        "recover",
    ]


def test_the_time_left_knows_that_the_model_will_shrink() -> None:
    progress, out, _ = plain_progress()
    progress.update(record(1))
    rate = 4096.0 * Shape.full(QUIET.model).flops_per_token(QUIET.model, 256)
    expected = human_duration(remaining_flops(QUIET, 2048) / rate)
    assert f"ETA {expected}" in out.getvalue()
    # At the speed of the full width, had it stayed: (4e6 - 2048) / 4096 s = 16m16s.
    assert expected < "16m16s"


def test_the_teachers_passes_count_in_the_time_left() -> None:
    config = configs.replace(QUIET, distill={"teacher": "self"})
    total, batch = config.schedule.total_tokens, config.batch_tokens
    own = Shape.full(config.model).flops_per_token(config.model, 256)
    taught = [record(step, tokens=total // 2 + step * batch, kl=0.1) for step in (1, 2)]
    left = remaining_flops(config, taught[-1].tokens) + (total - taught[-1].tokens) * own // 3
    assert time_left_s(config, taught) == pytest.approx(left / (4096 * own * 4 / 3))
    progress, out, _ = plain_progress(config)
    progress.update(taught[0])
    assert "KL 0.100" in out.getvalue()


def test_a_terminal_gets_one_live_line_with_everything_on_it() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    progress = Progress(QUIET, True, console=console)
    progress.update(record(1))
    progress.note("compacted [0] 1024 -> 960")
    progress.close()
    for shown in ("enlarged", "loss 6.999", "lr 1.0e-03", "removed 0%", "4.1K tok/s", "ETA"):
        assert shown in out.getvalue()
    assert "compacted [0] 1024 -> 960" in out.getvalue()


@pytest.mark.parametrize(
    ("config", "enabled"),
    [(QUIET, False), (configs.replace(QUIET, logging={"progress": False}), True)],
)
def test_progress_that_is_off_says_nothing(config: Config, enabled: bool) -> None:
    out = io.StringIO()
    progress = Progress(config, enabled, console=Console(file=out))
    progress.update(record(1))
    progress.note("x")
    progress.close()
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (42, "42s"),
        (190, "3m10s"),
        (25_500, "7h05m"),
        (1_047_600, "12d03h"),
        (float("inf"), "unknown"),
    ],
)
def test_durations_show_their_two_largest_units(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (12_300_000, "12.3 MB"), (2e9, "2 GB"), (1.5e12, "1.5 TB")]
)
def test_amounts_have_three_figures_and_a_prefix(number: float, text: str) -> None:
    assert human_amount(number, "B") == text
