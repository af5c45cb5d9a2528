"""Write a run's records."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from megatron_idea.config import Config
from megatron_idea.errors import UserError
from megatron_idea.records.read import (
    EVENTS,
    METRICS,
    SAMPLES,
    SCORES,
    Reader,
    lines_of,
    metrics_of,
    read_events,
)
from megatron_idea.records.record import Record, mean_count
from megatron_idea.records.saved import latest
from megatron_idea.records.trackers import Tracker, open_trackers, require_trackers, still_works

T = TypeVar("T")
VERSIONS_OF = ("megatron-idea", "torch", "megatron-core", "transformer-engine", "triton", "numpy")


class RecordError(UserError):
    """Says why a record cannot be written, and which checkpoint was the last."""

    @staticmethod
    def of(run_dir: Path, error: OSError) -> RecordError:
        saved = latest(run_dir)
        stands = f"the last checkpoint is {saved}" if saved else "nothing was saved yet"
        why = error.strerror or error
        return RecordError(f"cannot write the records of run folder {run_dir}: {why}; {stands}")


class RunLog:
    """Writes the records of a run folder; does nothing on ranks that are no writers."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        is_writer: bool,
        *,
        step: int = 0,
        peak_flops: float | None = None,
    ) -> None:
        """Open the records of ``run_dir``, to go on after ``step`` optimizer steps.

        A killed process may have recorded steps after its last checkpoint. They will be run again,
        so their metrics, scores and samples are dropped; events stay, followed by ``resumed``.

        Args:
            peak_flops: FLOP/s of all devices of the job together; None: no ``mfu`` is recorded.
        Raises: ConfigError, on every rank, when a tracker is asked for and not installed;
            RecordError when nothing can be written to ``run_dir``.
        """
        require_trackers(config)
        self.config = config
        self.is_writer = is_writer
        self.peak_flops = peak_flops
        self.failure: RecordError | None = None
        """Why a record could not be written; none is written after it."""
        self._run_dir = run_dir
        self._files: dict[str, FileIO] = {}
        self._trackers: list[Tracker] = []
        if not is_writer:
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _truncate(run_dir / METRICS, metrics_of(run_dir), lambda record: record.step <= step)
            for name in (SCORES, SAMPLES):
                _truncate(run_dir / name, lines_of(run_dir, name), lambda r: r["step"] <= step)
            _truncate(run_dir / EVENTS, lines_of(run_dir, EVENTS), lambda event: True)
        except OSError as error:
            raise RecordError.of(run_dir, error) from error
        self.event("resumed" if step else "started", step=step, environment=environment())
        self.check()
        events = read_events(run_dir)
        started = [event["time"] for event in events if event["kind"] == "started"]
        # A run that a checkpoint of another one began has no start: its first event stands for it.
        started_at = started[-1] if started else events[0]["time"]
        self._trackers = open_trackers(run_dir, config, step, started_at)

    def check(self) -> None:
        """Raise RecordError if a record could not be written."""
        if self.failure is not None:
            raise self.failure

    def write(self, record: Record) -> Record:
        """Append the record of one step.

        Returns: the record, with ``mfu`` when the devices' peak is known.
        """
        if self.peak_flops:
            model, seq_length = self.config.model, self.config.training.seq_length
            per_token = record.shape(model).flops_per_token(model, seq_length)
            record = replace(record, mfu=record.tokens_per_s * per_token / self.peak_flops)
        if self.is_writer:
            values = record.as_dict()
            self._append(METRICS, values)
            self._track(values)
        return record

    def scores(self, record: dict[str, Any]) -> None:
        """Append the spread of importances along one axis when a plan was made."""
        self._append(SCORES, record)

    def sample(self, record: dict[str, Any]) -> None:
        """Append the text that the model generated after a prompt."""
        self._append(SAMPLES, record)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        """Hand a record to the operating system before the next step begins."""
        if self.is_writer and self.failure is None:
            try:
                if name not in self._files:
                    # Unbuffered: what cannot be written is not tried again when the file is closed.
                    self._files[name] = open(self._run_dir / name, "ab", buffering=0)  # noqa: SIM115
                line = memoryview(json.dumps(record).encode() + b"\n")
                while line:  # a disk that becomes full takes a part
                    line = line[self._files[name].write(line) :]
            except OSError as error:  # raised by ``check``, when all ranks are there to hear it
                self.failure = RecordError.of(self._run_dir, error)

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event, with the time in seconds since 1970."""
        if self.is_writer:
            self._append(EVENTS, {"kind": kind, "time": time.time(), **fields})
            if kind == "evaluated" and not fields.get("why", "").startswith("compaction"):
                shown = ("step", "tokens", "val_loss")
                self._track({name: fields[name] for name in shown if name in fields})

    def _track(self, record: dict[str, Any]) -> None:
        values = dict(_scalars(record, self.config.goals))
        self._trackers = [
            tracker
            for tracker in self._trackers
            if still_works(tracker, lambda t: t.scalars(record["step"], values))
        ]

    def close(self) -> None:
        """Close files and trackers; the log takes no records afterwards."""
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            still_works(tracker, lambda t: t.close())


def environment() -> dict[str, Any]:
    """Name the device, the number of processes and threads, and versions of libraries."""
    import torch  # metrics are also read where nothing is computed
    import torch.distributed as dist

    versions = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _truncate(path: Path, records: Reader[T], keep: Callable[[T], bool]) -> None:
    """Cut a JSONL file before its first record that is not kept, and before a half-written line.

    The file is cut once: a kill leaves it either as it was or as it should be.
    """
    kept = 0
    for record in records:
        if not keep(record):
            break
        kept = records.end
    if path.is_file() and path.stat().st_size > kept:
        os.truncate(path, kept)


def _scalars(record: dict[str, Any], axes: Collection[str]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record by name; of units those of ``axes``, averaged over layers."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{a}", mean_count(value[a])) for a in axes if a in value)
        elif name != "step" and not isinstance(value, str):
            yield name, value
