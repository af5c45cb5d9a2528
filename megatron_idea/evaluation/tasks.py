"""Run tasks of lm-evaluation-harness on a Hugging Face folder, in one process.

Only what a user asks for is loaded, and all of it before the first model runs: data that cannot be
had is found out at once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idea import checkpoint
from megatron_idea.config import ConfigError
from megatron_idea.engine.distributed import world_size_from_environment
from megatron_idea.evaluation.held_out import Options, is_hugging_face
from megatron_idea.huggingface import names as huggingface
from megatron_idea.huggingface.export import export_checkpoint

logger = logging.getLogger(__name__)

INSTALL = "pip install 'megatron-idea[eval]'"
TASKS = Path(__file__).parent / "task_files"
"""Our own task files; their names can be given like the harness's."""
HELD_OUT = "held_out"

Results = dict[str, dict[str, float]]
"""Task or group -> metric -> value."""


@dataclass(frozen=True)
class Suite:
    """Measurements under one name."""

    tasks: tuple[str, ...]
    num_fewshot: int
    needs_data: str
    """What ``--data`` has to hold."""


SUITES = {"paper": Suite(("mmlu",), 5, "text of OpenWebText that the model has not seen")}


def tasks_of(
    suite: str, tasks: str, num_fewshot: int | None, data: Sequence[str]
) -> tuple[list[str], int | None]:
    """Names of tasks, and examples before each question, that options ask for.

    Raises: ConfigError for an unknown suite, one without its data, and a suite beside tasks.
    """
    if not suite:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        return list(dict.fromkeys(names)), num_fewshot
    if suite not in SUITES:
        raise ConfigError(f"--suite is {suite!r}; legal values: {', '.join(SUITES)}")
    if tasks or num_fewshot is not None:
        raise ConfigError(f"--suite {suite} says itself which tasks and how; leave the others out")
    chosen = SUITES[suite]
    if not data:
        raise ConfigError(f"--suite {suite} needs --data FILE with {chosen.needs_data}")
    return list(chosen.tasks), chosen.num_fewshot


def evaluate_tasks(
    path: Path,
    tasks: Sequence[str],
    data: Sequence[str],
    overrides: Sequence[str],
    options: Options,
    num_fewshot: int | None = None,
    task_folders: Sequence[Path] = (),
) -> Results:
    """Run the harness's tasks, or groups of them, on a folder, or on a checkpoint's export.

    Args:
        data: the JSONL that the task ``held_out`` reads, in place of the one it names.
        num_fewshot: examples before each question; None: as the task says.
        task_folders: where further task files lie.
    Returns: every task and group that was run, subtasks included.
    Raises: ConfigError for what has a meaning for our own measuring alone, a missing package, an
        unknown task, and tasks whose data cannot be had; all before the model is read.
    """
    if world_size_from_environment() > 1:
        raise ConfigError("tasks are run in one process: leave torchrun out")
    if overrides:
        raise ConfigError(
            f"tasks are run on an exported model: {overrides[0]} has no meaning there"
        )
    if HELD_OUT in tasks and len(data) > 1:
        raise ConfigError(f"task {HELD_OUT} reads one --data FILE.jsonl, not {len(data)}")
    held_out = Path(data[0]) if data and HELD_OUT in tasks else None
    if held_out is not None and (held_out.suffix != ".jsonl" or not held_out.is_file()):
        raise ConfigError(f"task {HELD_OUT} reads a .jsonl file; --data is {held_out}")
    if options.tokenizer and is_hugging_face(path):
        raise ConfigError("the harness reads a folder with the tokenizer in it")
    if not is_hugging_face(path):
        path = checkpoint.resolve(path)
    harness = _harness()
    manager = _task_manager(harness, tasks, [TASKS, *task_folders])
    with tempfile.TemporaryDirectory() as scratch:
        with _bars_on_a_terminal_only():
            loaded = _load(manager, tasks, held_out, Path(scratch) / "data")
        folder = path
        if is_hugging_face(path):
            huggingface.check_folder(path)
        else:
            folder = Path(scratch) / "model"
            export_checkpoint(path, folder, tokenizer=options.tokenizer)
        with _bars_on_a_terminal_only(), _counted_cuts() as cuts:
            model = _model(folder, options.batch_size or 8, options.seq_length)
            found = harness.simple_evaluate(
                model=model,
                tasks=loaded,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=options.limit or None,
                batch_size=options.batch_size or 8,
                bootstrap_iters=1000,  # means have a formula; 0 would leave theirs out, too
                log_samples=False,
            )
    if cuts.count:
        logger.warning(
            f"{cuts.count} prompts were longer than {model.max_length} tokens and lost their "
            "beginning, with some of the examples or of the question: their scores mean little"
        )
    return {name: dict(_metrics(values)) for name, values in found["results"].items()}


def as_text(scores: Results, asked: Sequence[str]) -> str:
    """Write a line for each metric of the tasks that were asked for."""
    # A tag stands for several tasks and has no figure of its own.
    names = asked if set(asked) <= set(scores) else scores
    return "\n".join(
        f"{name:<14}{metric:<18}{value:.4f}"
        for name in names
        for metric, value in scores[name].items()
    )


def _harness() -> Any:
    try:
        import lm_eval.evaluator
        import lm_eval.tasks
        import transformers  # noqa: F401  before an hour of exporting
    except ImportError as error:
        raise ConfigError(f"tasks are run by lm-evaluation-harness: {INSTALL}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a process for every core, for a bootstrap
    # It would note the commit of whatever repository the working directory is in, and complain.
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    return lm_eval


def _task_manager(harness: Any, tasks: Sequence[str], folders: Sequence[Path]) -> Any:
    """Reading the harness's own task files takes six seconds: only when one is wanted."""
    manager = harness.tasks.TaskManager(include_path=folders, include_defaults=False)
    if set(tasks) <= set(manager.all_tasks):
        return manager
    return harness.tasks.TaskManager(include_path=folders)


@contextlib.contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    """The harness draws a bar for every batch; in a log file that is a line for every batch."""
    stderr = sys.stderr if sys.stderr.isatty() else io.StringIO()
    # It prints, too: standard output is for results.
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stderr):
        yield


class _Cuts(logging.Filter):
    """Counts what the harness says of each prompt that it cuts, and lets only errors through."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += "maximum length" in record.getMessage()
        return record.levelno >= logging.ERROR


@contextlib.contextmanager
def _counted_cuts() -> Iterator[_Cuts]:
    source = logging.getLogger("lm_eval.models.huggingface")
    level, cuts = source.level, _Cuts()
    source.setLevel(logging.WARNING)
    source.addFilter(cuts)
    try:
        yield cuts
    finally:
        source.removeFilter(cuts)
        source.setLevel(level)


def _model(folder: Path, batch_size: int, seq_length: int) -> Any:
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # that a document is longer than a window
    return HFLM(
        pretrained=str(folder),
        trust_remote_code=False,
        use_safetensors=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=batch_size,
        max_length=seq_length or None,
    )


def _load(manager: Any, tasks: Sequence[str], held_out: Path | None, cache: Path) -> list[Any]:
    """The tasks with their data.

    Raises: ConfigError that names all tasks that are unknown, else all whose data is out of reach,
        else one that is asked for twice.
    """
    known = set(manager.all_tasks)
    unknown = [name for name in tasks if name not in known]
    if unknown:
        raise ConfigError(
            f"no task {', '.join(unknown)} in lm-evaluation-harness or {TASKS}; "
            "`lm_eval ls tasks` lists all, --task-path names a folder of further ones"
        )
    loaded, missing = [], []
    for name in tasks:
        spec = _held_out_task(held_out, cache) if name == HELD_OUT and held_out else name
        try:
            found = manager.load([spec])
        except Exception as error:  # of the hub's client, datasets, or a task's own code: any type
            missing.append(f"{name} ({_first_line(error)})")
            continue
        group = found["groups"].get(name)
        loaded += [group] if group is not None else list(found["tasks"].values())
    if missing:
        raise ConfigError(
            f"the data of these tasks could not be had: {'; '.join(missing)}. Where there is no "
            "network, copy the Hugging Face cache of a machine that has it and name it in HF_HOME, "
            "or leave the tasks out"
        )
    try:
        manager.load(loaded)
    except ValueError as error:  # one of them, and a group with it
        raise ConfigError(f"--tasks {','.join(tasks)}: {_first_line(error)}") from error
    return loaded


def _held_out_task(data: Path, cache: Path) -> dict[str, Any]:
    import yaml

    config = yaml.safe_load((TASKS / f"{HELD_OUT}.yaml").read_text())
    config["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(cache)}
    return config


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _metrics(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """``acc,none`` is called ``acc``; another filter stays in the name."""
    for key, value in values.items():
        if isinstance(value, float):
            yield key.removesuffix(",none"), value
