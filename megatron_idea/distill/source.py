"""Where a teacher comes from: the run's own snapshots, another run, a Hugging Face folder.

    <run>/teacher/
        snapshot_000000001234    weights of the enlarged model
        self                     their mean: written once, before the first removal

Neither is a checkpoint: no retention touches them, and no checkpoint has them in it. Snapshots
stay: a run that has to go on from before the last of them needs the others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_idea import checkpoint
from megatron_idea import config as configuration
from megatron_idea.checkpoint import CheckpointError, storage
from megatron_idea.config import Config, ConfigError
from megatron_idea.data.tokenizer import Tokenizer, load_tokenizer
from megatron_idea.distill.teacher import Teacher
from megatron_idea.engine.distributed import ProcessGroups, together
from megatron_idea.engine.trainable import Trainable
from megatron_idea.huggingface import import_
from megatron_idea.schedule import snapshot_tokens
from megatron_idea.shape import Shape


def folder_of(config: Config) -> Path:
    """Return where a run keeps its own teacher."""
    return Path(config.run_dir) / "teacher" / "self"


def _snapshot(config: Config, tokens: int) -> Path:
    return folder_of(config).with_name(f"snapshot_{tokens:012d}")


def due_snapshots(config: Config, tokens: int) -> list[int]:
    """List the snapshots to be taken after ``tokens`` consumed tokens: before the next step.

    The last of all is taken before the first step past the enlarged phase.
    """
    if not config.distill.teaches or config.distill.teacher != "self":
        return []
    marks = snapshot_tokens(config.schedule, config.distill)
    return [mark for mark in marks if tokens <= mark < tokens + config.batch_tokens]


def take_snapshot(config: Config, trainable: Trainable, mark: int) -> None:
    """Write the weights as they are; collective over all ranks. Raises: CheckpointError."""
    checkpoint.save_weights(trainable.chunks, _snapshot(config, mark), trainable.groups)


@torch.no_grad()
def average_snapshots(config: Config, groups: ProcessGroups) -> tuple[Teacher, str]:
    """Make the run's own teacher and write it; collective over all ranks.

    Returns: it, and the SHA-256 that the run's state keeps of it.
    Raises: CheckpointError when a snapshot is missing or damaged, or it cannot be written.
    """
    teacher = _build(config, config, Shape.full(config.model), groups)
    marks = snapshot_tokens(config.schedule, config.distill)
    parameters = [p for chunk in teacher.chunks for p in chunk.parameters()]
    sums = [torch.zeros(p.shape, dtype=torch.float32) for p in parameters]
    for mark in marks:
        path = _snapshot(config, mark)
        _verify(path, groups)
        checkpoint.load_weights(teacher.chunks, path, groups)
        for total, parameter in zip(sums, parameters, strict=True):
            total += parameter.float().cpu()
    for total, parameter in zip(sums, parameters, strict=True):
        parameter.copy_(total / len(marks))
    digest = checkpoint.save_weights(teacher.chunks, folder_of(config), groups)
    return teacher, digest


def open_teacher(
    config: Config, groups: ProcessGroups, tokenizer: Tokenizer, known: str
) -> tuple[Teacher, str]:
    """Build the teacher that ``distill.teacher`` names; collective over all ranks.

    Args:
        known: SHA-256 of the teacher that the run has had so far; empty at its start.
    Returns: it, and its SHA-256.
    Raises: CheckpointError when it is missing, damaged or another one; ConfigError when it cannot
        teach this run.
    """
    name = config.distill.teacher
    path = folder_of(config) if name == "self" else Path(name)
    if name != "self" and not (path / "config.json").is_file():
        path = checkpoint.resolve(path)
    digest = together(lambda: _digest(path, groups), groups)
    found = [digest]
    dist.broadcast_object_list(found, src=0)
    if known and found[0] != known:
        raise CheckpointError(
            f"the teacher {path} is not the one that this run has learnt from: its files have "
            "changed. Put them back, or begin a new run"
        )
    if name == "self":
        teacher = _build(config, config, Shape.full(config.model), groups)
        _verify(path, groups)
        checkpoint.load_weights(teacher.chunks, path, groups)
    elif (path / "config.json").is_file():
        model, shape = import_.read_model(path)
        of_teacher = configuration.replace(config, model=vars(model))
        file = path / "tokenizer.json"
        _check(config, of_teacher, tokenizer, str(path) if file.is_file() else None)
        teacher = _build(config, of_teacher, shape, groups)
        import_.load_folder_weights(teacher.chunks, path, of_teacher, groups)
    else:
        of_teacher = checkpoint.read_config(path)
        shape = checkpoint.read_state(
            path, configuration.replace(of_teacher, parallel=vars(config.parallel))
        ).shape
        _check(config, of_teacher, tokenizer, of_teacher.data.tokenizer)
        teacher = _build(config, of_teacher, shape, groups)
        _verify(path, groups)
        checkpoint.load_weights(teacher.chunks, path, groups)
    return teacher, found[0]


def _build(config: Config, of_teacher: Config, shape: Shape, groups: ProcessGroups) -> Teacher:
    return Teacher(
        of_teacher.model, shape, config.training, config.parallel, config.distill, groups
    )


def _digest(path: Path, groups: ProcessGroups) -> str:
    """Take the SHA-256 of a manifest, which has checksums of all files, or of a folder's files."""
    if not groups.is_writer:
        return ""
    manifest = path / storage.MANIFEST
    files = (
        [manifest] if not (path / "config.json").is_file() else sorted(path.glob("*.safetensors"))
    )
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        except OSError as error:
            raise CheckpointError(
                f"the teacher {path} cannot be read: {error}; the run needs it, and does not go "
                "on without"
            ) from error
    return digest.hexdigest()


def _verify(path: Path, groups: ProcessGroups) -> None:
    try:
        storage.verify(path, groups)
    except storage.DamagedError as error:
        raise CheckpointError(f"the teacher cannot be read: {error}") from error


def _check(config: Config, of_teacher: Config, tokenizer: Tokenizer, theirs: str | None) -> None:
    """Make sure that both speak of the same tokens. Raises: ConfigError."""
    name, mine = config.distill.teacher, config.model.vocab_size
    if of_teacher.model.vocab_size != mine:
        raise ConfigError(
            f"distill.teacher {name} has a vocabulary of {of_teacher.model.vocab_size} tokens and "
            f"this run's model one of {mine}: a teacher needs the same"
        )
    if theirs is not None and load_tokenizer(theirs).digest != tokenizer.digest:
        raise ConfigError(
            f"distill.teacher {name} has another tokenizer than data.tokenizer "
            f"({config.data.tokenizer}): the same id would be another token"
        )
