"""Which checkpoints a run has, and which one to go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_idea import config as configuration
from megatron_idea import files
from megatron_idea.checkpoint import storage
from megatron_idea.checkpoint.state import CheckpointError
from megatron_idea.config import Config, ConfigError
from megatron_idea.engine.distributed import ProcessGroups, together
from megatron_idea.records.saved import checkpoints_of, complete, latest
from megatron_idea.records.settings import differences, is_among

TOKENIZER = "tokenizer"
"""Folder of a run that has a copy of its tokenizer: a run can be moved, and read from anywhere."""
ORIGIN = "origin.json"
"""File of an imported run, and of what branched from it: name and license of the model it was."""


def complete_for_all(run_dir: str | Path, groups: ProcessGroups) -> list[Path]:
    """``complete`` as rank 0 sees it; a shared disk may still show others an older state."""
    found = [complete(run_dir) if groups.is_writer else []]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _tidy(run_dir: str | Path) -> None:
    """Undo what a kill cut short: put back what was being replaced, drop what is half written."""
    for rest in checkpoints_of(run_dir).glob("step_*.replaced"):
        if rest.with_suffix("").exists():
            shutil.rmtree(rest, ignore_errors=True)
        else:
            rest.rename(rest.with_suffix(""))
    for rest in checkpoints_of(run_dir).glob("step_*.partial"):
        shutil.rmtree(rest, ignore_errors=True)


def resolve(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the latest one of the run folder.

    Raises: ConfigError when it is neither.
    """
    found = path if (path / "state.json").is_file() else latest(path)
    if found is None:
        raise ConfigError(f"{path} is neither a checkpoint nor a run with a complete one")
    return found


ONE_PROCESS = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=1",
    "parallel.overlap_grad_reduce=false",
    "parallel.overlap_param_gather=false",
    "parallel_after_prune=null",
)
"""Overrides for a checkpoint's configuration when one process works on it."""


def tokenizer_beside(path: Path) -> str | None:
    """The copy of its tokenizer in the run of checkpoint ``path``; older runs have none."""
    kept = path.absolute().parents[1] / TOKENIZER
    return str(kept) if (kept / "tokenizer.json").is_file() else None


def copy_origin(path: Path, run_dir: str | Path, **words: str) -> None:
    """Let run ``run_dir`` say what that of checkpoint ``path`` began with, and ``words``."""
    kept = path.absolute().parents[1] / ORIGIN
    said = files.read_json(kept) if kept.is_file() else {}
    if said | words:
        (Path(run_dir) / ORIGIN).write_text(json.dumps(said | words, indent=2) + "\n")


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that wrote a checkpoint, with the tokenizer that is kept beside it.

    Raises: CheckpointError when the file is none of the folder's, ConfigError as ``config.load``.
    """
    try:
        file = files.inside(path, "config.yaml")
    except files.UnsafeFileError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error
    kept = tokenizer_beside(path)
    if kept is not None and configuration.load(file).data.tokenizer != "byte":
        overrides = [f"data.tokenizer={kept}", *overrides]
    return configuration.load(file, list(overrides))


# What a resumed run may change: where and how it runs, not what it computes.
_FREE = {
    "run_dir", "parallel", "parallel_after_prune", "nodes_after_prune", "checkpoint", "guard",
    "evaluation", "logging", "law", "data.cache_dir", "training.micro_batch_size",
    "training.kernel_implementation", "prune.compaction_block", "prune.placement",
}  # fmt: skip


def check_same_run(path: Path, config: Config) -> None:
    """Make sure that ``config`` continues what the checkpoint was computing.

    Raises: CheckpointError that names every differing value, for another model, schedule, data,
        batch or optimizer.
    """
    try:
        saved = read_config(path)
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be resumed: {error}") from error
    changed = [
        f"{key}: {was!r} in the checkpoint, {now!r} now"
        for key, was, now in differences(saved, config, tokenizer_beside(path) or "")
        if not is_among(key, _FREE)
    ]
    if changed:
        other = any(line.startswith("model.") for line in changed)
        what = "is a checkpoint of another model" if other else "was written by another run"
        raise CheckpointError(
            f"{path} {what}:\n  " + "\n  ".join(changed) + "\n"
            "Resume with the same values, or give the new run another run_dir."
        )


def choose(config: Config, groups: ProcessGroups) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from: the newest one, whose files are what was written.

    Collective over all ranks. Returns: it, or None at the start of a run; and what was found
    damaged and passed over, which only ``checkpoint.on_damage=previous`` allows.
    Raises: CheckpointError on every rank, saying which other checkpoint there is.
    """
    damage: list[str] = []
    together(lambda: _tidy(config.run_dir) if groups.is_writer else None, groups)
    found = complete_for_all(config.run_dir, groups)
    while found:
        path, older = found.pop(), found[-1] if found else None
        try:
            storage.verify(path, groups)
            return path, damage
        except storage.DamagedError as error:
            hint = (
                f"checkpoint.on_damage=previous goes on from {older}"
                if older
                else "there is no older one"
            )
            if config.checkpoint.on_damage == "stop" or older is None:
                raise CheckpointError(f"{error}; {hint}") from error
            damage.append(str(error))
    return None, damage
