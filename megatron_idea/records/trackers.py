"""Mirror a run's numbers to TensorBoard, Weights & Biases and MLflow.

The records in the run folder do not depend on them: a tracker is imported only when it is asked
for, and one that fails is left out from then on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_idea.config import Config, ConfigError, flat

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""For one request to a server at the end of a run, which a job's time limit may have stopped."""


class Tracker(Protocol):
    """Takes scalars by name."""

    name: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take over the values of one optimizer step."""
        ...

    def close(self) -> None:
        """Send what is still waiting, and end."""
        ...


def require_trackers(config: Config) -> None:
    """Check that the trackers asked for are installed. Raises: ConfigError."""
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "logging.tensorboard is true but tensorboard is not installed: "
            "pip install tensorboard, or set logging.tensorboard=false"
        )
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb is {config.logging.wandb!r} but wandb is not installed: "
            'pip install wandb, or set logging.wandb=""'
        )
    if config.logging.mlflow and importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            f"logging.mlflow is {config.logging.mlflow!r} but mlflow is not installed: "
            'pip install mlflow-skinny, or set logging.mlflow=""'
        )


def open_trackers(run_dir: Path, config: Config, step: int, started_at: float) -> list[Tracker]:
    """Open the trackers that ``config.logging`` asks for, to go on after ``step`` steps.

    ``started_at``: seconds since 1970; the same for a run however often it is resumed.

    Raises: ConfigError when a server cannot be reached at the start of a run. One that goes on does
        so without it: a job that runs for weeks must not end with somebody's server.
    """
    wanted: list[tuple[str, Callable[[], Tracker]]] = []
    if config.logging.tensorboard:
        wanted.append((_TensorBoard.name, lambda: _TensorBoard(run_dir, step)))
    if config.logging.wandb:
        wanted.append(
            (_WeightsAndBiases.name, lambda: _WeightsAndBiases(run_dir, config, started_at))
        )
    if config.logging.mlflow:
        wanted.append((_MLflow.name, lambda: _MLflow(run_dir, config, started_at)))
    trackers = []
    for name, opened in wanted:
        try:
            trackers.append(opened())
        except OSError as error:
            _leave_out(name, error)
        except ConfigError as error:
            if not step:
                raise
            _leave_out(name, error)
    return trackers


def still_works(tracker: Tracker, action: Callable[[Tracker], None]) -> bool:
    """Do ``action``; return whether it worked, and log a warning where it did not."""
    try:
        action(tracker)
    except Exception as error:  # of somebody else's client: any type
        _leave_out(tracker.name, error)
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _identity(run_dir: Path, started_at: float) -> str:
    """By which a resumed run finds its own curve.

    Plain letters: ids of Weights & Biases have no ``:/#?``, and MLflow's filters know no escapes.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", run_dir.name)[:100]
    return f"{name}-{round(started_at * 1000):x}"


def _leave_out(name: str, error: Exception) -> None:
    logger.warning(f"{name} cannot write and is left out from here on: {_first_line(error)}")


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import; not all want it

        # Its thread fails with a traceback of its own; the next call raises the same again.
        threading.excepthook = _silent_about_tensorboard
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _silent_about_tensorboard(failed: threading.ExceptHookArgs) -> None:
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


class _WeightsAndBiases:
    name = "Weights & Biases"

    def __init__(self, run_dir: Path, config: Config, started_at: float) -> None:
        import wandb  # heavy, and it starts a process

        try:
            self._run = wandb.init(
                project=config.logging.wandb,
                name=run_dir.name,
                dir=str(run_dir),
                config=dataclasses.asdict(config),
                id=_identity(run_dir, started_at),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases does not start: {error}; run wandb login, "
                "or set WANDB_MODE=offline in the environment"
            ) from error
        # Not wandb's own step, which must not go back: after a kill some steps are run again.
        self._run.define_metric("*", step_metric="tokens")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    name = "MLflow"
    # What any server takes: metrics and parameters in one request, characters of one parameter.
    MOST_METRICS, MOST_PARAMS, MOST_CHARACTERS = 1000, 100, 500

    def __init__(self, run_dir: Path, config: Config, started_at: float) -> None:
        # Users asked for a mirror of their numbers, nothing else.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        where = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not where:
            where = (run_dir.resolve() / "mlruns").as_uri()
            # A database, which MLflow prefers, would take two more packages.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient  # takes a second
        from mlflow.exceptions import MlflowException

        try:
            self._client = MlflowClient(tracking_uri=where)
            run = self._open(config, run_dir.name, _identity(run_dir, started_at))
        except (MlflowException, OSError) as error:
            raise ConfigError(
                f"MLflow does not start at {where}: {_first_line(error)}; check "
                'MLFLOW_TRACKING_URI in the environment, or set logging.mlflow=""'
            ) from error
        self._run_id = run.info.run_id
        # MLflow takes nothing back: of steps that are run again it keeps the first values.
        self._known = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._waiting: list[Metric] = []
        # One request at a time, which no step waits for: a slow server gets fewer and larger ones.
        self._sending: Future[None] | None = None

    def _open(self, config: Config, name: str, identity: str) -> Run:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        client, tag = self._client, "megatron_idea.run"
        try:
            experiment = client.create_experiment(config.logging.mlflow)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(config.logging.mlflow).experiment_id
        for run in client.search_runs([experiment], f"tags.`{tag}` = '{identity}'"):
            client.update_run(run.info.run_id, status="RUNNING")
            return run
        run = client.create_run(experiment, run_name=name, tags={tag: identity})
        values = flat(dataclasses.asdict(config)).items()
        params = (Param(key, str(value)[: self.MOST_CHARACTERS]) for key, value in values)
        while some := list(itertools.islice(params, self.MOST_PARAMS)):
            client.log_batch(run.info.run_id, params=some)
        return run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        for name, value in values.items():
            if step > self._known.get(name, -1):
                self._known[name] = step
                self._waiting.append(Metric(name, value, now, step))
        if self._sending is None or self._sending.done():
            self._send()

    def _send(self) -> None:
        """Send some of what waits, after the last request; raise what that one raised."""
        self._wait()
        some, self._waiting = (
            self._waiting[: self.MOST_METRICS],
            self._waiting[self.MOST_METRICS :],
        )
        sending = self._sending = Future()

        def send() -> None:
            try:
                sending.set_result(self._client.log_batch(self._run_id, some))
            except Exception as error:
                sending.set_exception(error)

        # Not an executor's thread, for which Python waits when it ends: MLflow tries for minutes.
        threading.Thread(target=send, name="MLflow", daemon=True).start()

    def _wait(self) -> None:
        if self._sending is None:
            return
        try:
            self._sending.result(PATIENCE_S)
        except TimeoutError as error:
            raise TimeoutError(f"the server has not answered for {PATIENCE_S:g} s") from error

    def close(self) -> None:
        while self._waiting:
            self._send()
        self._wait()
        self._client.set_terminated(self._run_id)
