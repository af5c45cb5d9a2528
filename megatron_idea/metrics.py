"""What a run leaves behind and shows while it works.

``RunLog`` appends to ``metrics.jsonl`` (one record per optimizer step) and ``events.jsonl`` (things
that happen now and then), and mirrors the scalars to ``trackers``. JSONL is the truth: the report
is drawn from it. ``Progress`` is the line a person watches; it stores nothing.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from megatron_idea import files
from megatron_idea.config import Config
from megatron_idea.estimate import flops_per_token, human_count, remaining_flops
from megatron_idea.terminal import Console
from megatron_idea.trackers import Tracker, open_trackers, require_trackers, still_works

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SCORES = "scores.jsonl"
SAMPLES = "samples.jsonl"

VERSIONS_OF = ("megatron-idea", "torch", "megatron-core", "transformer-engine", "triton", "numpy")

# Dense bf16 FLOP/s of one device, by a part of its name; from NVIDIA's data sheets, SXM parts,
# without sparsity. The first match counts: names of one family contain each other.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device from its name (``torch.cuda.get_device_name``), if known."""
    for part, peak in PEAK_FLOPS.items():
        if part in device_name:
            return peak
    return None


class RecordError(ValueError):
    """A record that cannot be written; the message names the folder and what was saved last."""

    @staticmethod
    def of(run_dir: Path, error: OSError) -> RecordError:
        saved = sorted(run_dir.glob("checkpoints/step_[0-9]*[0-9]/state.json"))
        stands = f"the last checkpoint is {saved[-1].parent}" if saved else "nothing was saved yet"
        why = error.strerror or error
        return RecordError(f"cannot write the records of run folder {run_dir}: {why}; {stands}")


class RunLog:
    """Writer of a run folder's records; does nothing on ranks that do not write."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        is_writer: bool,
        *,
        step: int = 0,
        peak_flops: float | None = None,
    ) -> None:
        """Open the records of ``run_dir``, as a run that has ``step`` optimizer steps behind it.

        A process that was killed may have recorded steps that no checkpoint holds. They will be
        run again, so their metrics are dropped; events stay, followed by ``resumed``.

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
            for name in (METRICS, SCORES, SAMPLES):
                _truncate(run_dir / name, keep=lambda record: record["step"] <= step)
            _truncate(run_dir / EVENTS, keep=lambda event: True)
        except OSError as error:
            raise RecordError.of(run_dir, error) from error
        self.event("resumed" if step else "started", step=step, environment=environment())
        self.check()
        started = [event["time"] for event in read_events(run_dir) if event["kind"] == "started"]
        # A run that a checkpoint of another one began has no start of its own.
        self._trackers = open_trackers(run_dir, config, step, started[-1] if started else 0.0)

    def check(self) -> None:
        """Raises: RecordError when a record could not be written."""
        if self.failure is not None:
            raise self.failure

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append the record of one step.

        Returns: the record, with ``mfu`` when the devices' peak is known.
        """
        if self.peak_flops and record.get("tokens_per_s"):
            per_token = flops_per_token(
                self.config.model, record["ffn_width"], self.config.training.seq_length
            )
            record = {**record, "mfu": record["tokens_per_s"] * per_token / self.peak_flops}
        if self.is_writer:
            self._append(METRICS, record)
            self._track(record)
        return record

    def scores(self, record: dict[str, Any]) -> None:
        """Append how importances were spread at a mask update."""
        self._append(SCORES, record)

    def sample(self, record: dict[str, Any]) -> None:
        """Append what the model wrote after a prompt."""
        self._append(SAMPLES, record)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        """A record is with the operating system before the next step begins."""
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
        """Append something that happened, with the time of day in seconds since 1970."""
        if self.is_writer:
            self._append(EVENTS, {"kind": kind, "time": time.time(), **fields})
            if kind == "evaluated" and not fields.get("why", "").startswith("compaction"):
                shown = ("step", "tokens", "val_loss")
                self._track({name: fields[name] for name in shown if name in fields})

    def _track(self, record: dict[str, Any]) -> None:
        values = dict(_scalars(record))
        self._trackers = [
            tracker
            for tracker in self._trackers
            if still_works(tracker, lambda t: t.scalars(record["step"], values))
        ]

    def close(self) -> None:
        """Let everything arrive; the log takes no records afterwards."""
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            still_works(tracker, lambda t: t.close())


def environment() -> dict[str, Any]:
    """What a run runs on: device, processes, and the versions of what computes."""
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


# Of these readers: ``broken`` takes the names of lines that are no record, for those who look at a
# run; without it such a line raises ValueError. A last line that a kill cut short is left out.


def read_scores(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the score records of a run, oldest first; none where nothing was pruned."""
    return [record for record, _ in _lines(run_dir / SCORES, broken)]


def read_samples(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read what a run's model wrote, oldest first: ``step``, ``tokens``, ``prompt``, ``text``."""
    return [record for record, _ in _lines(run_dir / SAMPLES, broken)]


def read_metrics(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the records of a run, oldest first.

    Neighbours with equal widths share the list: of half a million steps of 24 layers most of the
    memory would be these.
    """
    records = []
    last: dict[str, Any] = {}
    for record, _ in _lines(run_dir / METRICS, broken):
        for key in ("ffn_live", "ffn_width"):
            if key in record:
                if record[key] == last.get(key):
                    record[key] = last[key]
                last[key] = record[key]
        records.append(record)
    return records


def read_events(run_dir: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the events that belong to the run as it stands, oldest first.

    What a killed process did after the step from which the next one resumed is left out; the file
    itself keeps everything.
    """
    events: list[dict[str, Any]] = []
    for event, _ in _lines(run_dir / EVENTS, broken):
        if event["kind"] in ("started", "resumed") and "step" in event:
            events = [earlier for earlier in events if earlier.get("step", 0) <= event["step"]]
        events.append(event)
    return events


# What every record of a file has, whatever else it has: a line without them is no record.
FIELDS = {METRICS: {"step", "tokens"}, EVENTS: {"kind"}, SCORES: {"step"}, SAMPLES: {"step"}}


def _is_word(value: Any) -> bool:
    return isinstance(value, str)


def _is_measured(value: Any) -> bool:
    """Of a step that went wrong it is NaN or infinite."""
    return files.is_number(value, finite=False)


def _is_amount(value: Any) -> bool:
    return files.is_number(value) and value >= 0


def _are_widths(values: Any) -> bool:
    return (
        type(values) is list
        and set(map(type, values)) == {int}
        and min(values) >= 0
        and max(values) < 1 << 53
    )


def _are_scores(values: Any) -> bool:
    return type(values) is list and bool(values) and all(map(_is_measured, values))


def _are_of_layers(values: Any) -> bool:
    return type(values) is list and bool(values) and all(map(_are_scores, values))


def _are_correlations(values: Any) -> bool:
    return type(values) is list and all(v is None or files.is_number(v) for v in values)


def _is_environment(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("versions"), dict)
        and all(map(_is_word, value["versions"].values()))
        and _is_word(value.get("device"))
        and files.is_whole(value.get("processes"))
        and files.is_whole(value.get("threads"))
    )


# What the fields that somebody reads hold, in whichever file they are.
TYPES: dict[str, Callable[[Any], bool]] = (
    dict.fromkeys(
        ("step", "tokens", "skipped", "from_step", "skipped_samples", "moved_neurons"),
        files.is_whole,
    )
    | dict.fromkeys(("loss", "grad_norm", "val_loss", "average"), _is_measured)
    | dict.fromkeys(
        ("lr", "keep_ratio", "tokens_per_s", "step_s", "time", "seconds", "waited_s"), _is_amount
    )
    | dict.fromkeys(
        ("memory_bytes", "mfu", "peak_bytes"), lambda value: value is None or _is_amount(value)
    )
    | dict.fromkeys(("phase", "kind", "why", "path", "reason", "prompt", "text"), _is_word)
    | dict.fromkeys(("ffn_live", "ffn_width", "widths_before", "widths_after"), _are_widths)
    | {
        "name": lambda value: value is None or _is_word(value),
        "environment": _is_environment,
        "quantiles": _are_of_layers,
        "cut": _are_scores,
        "rank_correlation": _are_correlations,
    }
)


def is_record(name: str, record: Any) -> bool:
    """Whether a line of the file ``name`` is one of its records, every field of its type."""
    return (
        isinstance(record, dict)
        and record.keys() >= FIELDS[name]
        and all(TYPES[key](value) for key, value in record.items() if key in TYPES)
    )


def _lines(path: Path, broken: list[str] | None = None) -> Iterator[tuple[dict[str, Any], int]]:
    """Each record of a JSONL file, with the byte offset of its end."""
    if not path.is_file():
        return
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # the writer was killed in the middle of this line
            end += len(line)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if broken is None:
                    message = f"{path}, line {number} is not JSON; remove that line"
                    raise ValueError(message) from error
                record = None
            if is_record(path.name, record):
                yield record, end
            elif broken is None:
                raise ValueError(f"{path}, line {number} is not a record; remove that line")
            else:
                broken.append(f"{path.name}, line {number}")


def _truncate(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Cut a JSONL file before its first record that is not kept, and before a half-written line.

    One ``truncate`` of the file: a kill leaves it either as it was or as it should be.
    """
    kept = 0
    for record, end in _lines(path):
        if not keep(record):
            break
        kept = end
    if path.is_file() and path.stat().st_size > kept:
        os.truncate(path, kept)


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name == "step" or isinstance(value, str) or value is None:
            continue
        yield name, sum(value) / len(value) if isinstance(value, list) else value


class Progress:
    """The run at a glance: phase, loss, learning rate, keep ratio, tokens/s, time left.

    One live line at the foot of a terminal. Where standard error is not a terminal: a plain line
    at each phase change and about every ten seconds.
    """

    PLAIN_INTERVAL_S = 10.0
    # Of the FLOP/s average, per step: about the last twenty steps count.
    SMOOTHING = 0.95

    def __init__(
        self,
        config: Config,
        enabled: bool,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``enabled``: this rank is the one that speaks. ``logging.progress`` is heeded too."""
        self.config = config
        self.enabled = enabled and config.logging.progress
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._printed_at = float("-inf")
        self._phase = ""
        self._flops = self._seconds = 0.0
        self._bar: RichProgress | None = None
        if self.enabled and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.fields[phase]:<8}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f} %  {task.fields[text]}"),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task(
                "", total=config.schedule.total_tokens, phase="", text="starting"
            )
            self._bar.start()

    def update(self, record: dict[str, Any]) -> None:
        """Show the record of the step that has just ended."""
        if not self.enabled:
            return
        self._measure(record)
        if self._bar is not None:
            text = self._text(record)
            self._bar.update(
                self._task, completed=record["tokens"], phase=record["phase"], text=text
            )
        elif (
            record["phase"] != self._phase
            or self._clock() - self._printed_at >= self.PLAIN_INTERVAL_S
        ):
            self._printed_at = self._clock()
            share = record["tokens"] / self.config.schedule.total_tokens
            self._print(f"{record['phase']:<8} {share:4.0%}  {self._text(record)}")
        self._phase = record["phase"]

    def note(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self.enabled:
            self._print(text)

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        # soft_wrap: a log line stays one line, however narrow rich believes the pipe to be.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _measure(self, record: dict[str, Any]) -> None:
        tokens = record["tokens_per_s"] * record["step_s"]
        per_token = flops_per_token(
            self.config.model, record["ffn_width"], self.config.training.seq_length
        )
        self._flops = self.SMOOTHING * self._flops + tokens * per_token
        self._seconds = self.SMOOTHING * self._seconds + record["step_s"]

    def _text(self, record: dict[str, Any]) -> str:
        left = remaining_flops(self.config, record["tokens"])
        eta_s = left * self._seconds / self._flops if self._flops else float("inf")
        return (
            f"loss {record['loss']:.3f}  lr {record['lr']:.1e}  keep {record['keep_ratio']:.2f}  "
            f"{human_count(record['tokens_per_s'])} tok/s  ETA {human_duration(eta_s)}"
        )


def human_duration(seconds: float) -> str:
    """Write a duration with its two largest units: 42s, 3m10s, 7h05m, 12d03h."""
    if seconds == float("inf"):
        return "unknown"
    units: Sequence[tuple[str, int]] = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    whole = round(seconds)
    for (large, size), (small, small_size) in itertools.pairwise(units):
        if whole >= size:
            return f"{whole // size}{large}{whole % size // small_size:02d}{small}"
    return f"{whole}s"
