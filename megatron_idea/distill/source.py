"""Where a teacher comes from: the run's own snapshots, another run, a Hugging Face folder.

    <run>/teacher/
        snapshot_000000001234    weights of the enlarged model
        self                     their mean: written once, before the first removal

Neither is a checkpoint: no retention touches them, and no checkpoint has them in it. Snapshots
stay: a run that has to go on from before the last of them needs the others.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_idea import checkpoint, files
from megatron_idea import config as configuration
from megatron_idea.checkpoint import CheckpointError, storage
from megatron_idea.checkpoint.index import ForeignError, read_index
from megatron_idea.config import Config, ConfigError, ModelConfig
from megatron_idea.data.tokenizer import Tokenizer, load_tokenizer
from megatron_idea.distill.teacher import Teacher
from megatron_idea.engine.distributed import ProcessGroups, together
from megatron_idea.engine.trainable import Trainable
from megatron_idea.huggingface import import_
from megatron_idea.huggingface import names as huggingface
from megatron_idea.huggingface.export import plain_tokenizer
from megatron_idea.huggingface.names import is_hugging_face
from megatron_idea.records.settings import is_its_own_teacher, keeps_teacher, missed_teacher
from megatron_idea.schedule import snapshot_tokens
from megatron_idea.shape import LAYER_AXES, Shape


def folder_of(config: Config) -> Path:
    """Return where a run keeps its own teacher."""
    return Path(config.run_dir) / "teacher" / "self"


def _snapshot(teacher: Path, tokens: int) -> Path:
    """Return where a snapshot lies, beside the teacher that is made of it."""
    return teacher.with_name(f"snapshot_{tokens:012d}")


def due_snapshots(config: Config, tokens: int) -> list[int]:
    """List the snapshots to be taken after ``tokens`` consumed tokens: before the next step.

    The last of all is taken before the first step past the enlarged phase.
    """
    if not is_its_own_teacher(config):
        return []
    marks = snapshot_tokens(config.schedule, config.distill)
    return [mark for mark in marks if tokens <= mark < tokens + config.batch_tokens]


def take_snapshot(config: Config, trainable: Trainable, mark: int) -> None:
    """Write the weights as they are; collective over all ranks. Raises: CheckpointError."""
    checkpoint.save_weights(trainable.chunks, _snapshot(folder_of(config), mark), trainable.groups)


@torch.no_grad()
def average_snapshots(config: Config, groups: ProcessGroups) -> tuple[Teacher, str]:
    """Make the run's own teacher and write it; collective over all ranks.

    Returns: it, and the SHA-256 that the run's state keeps of it.
    Raises: CheckpointError when a snapshot is missing or damaged, or it cannot be written.
    """
    marks = snapshot_tokens(config.schedule, config.distill)
    last = _snapshot(folder_of(config), marks[-1])
    shape = together(lambda: own_shape(last, config.model), groups)
    teacher = _build(config, config, shape, groups)
    parameters = [p for chunk in teacher.chunks for p in chunk.parameters()]
    sums = [torch.zeros(p.shape, dtype=torch.float32) for p in parameters]
    for mark in marks:
        path = _snapshot(folder_of(config), mark)
        _verify(path, groups)
        checkpoint.load_weights(teacher.chunks, path, groups)
        for total, parameter in zip(sums, parameters, strict=True):
            total += parameter.float().cpu()
    for total, parameter in zip(sums, parameters, strict=True):
        parameter.copy_(total / len(marks))
    digest = checkpoint.save_weights(teacher.chunks, folder_of(config), groups)
    return teacher, digest


def inherit_teacher(config: Config, source: Path) -> None:
    """Bring along what checkpoint ``source`` of another run has of this run's ``self``.

    Snapshots that this run would have taken before that checkpoint, or the teacher that was made of
    them. Writes to this run's folder; one rank alone calls it.

    Raises: ConfigError when one is needed and not there.
    """
    if not is_its_own_teacher(config):
        return
    before = checkpoint.read_config(source)
    state = checkpoint.read_state(source)
    there = source.absolute().parents[1] / "teacher" / "self"
    marks = snapshot_tokens(config.schedule, config.distill)
    needed = [_snapshot(there, mark) for mark in marks if mark < state.consumed_tokens]
    if has_one := bool(state.teacher) and keeps_teacher(before, config):
        needed.append(there)
    missing = [path for path in needed if not (path / storage.MANIFEST).is_file()]
    if missing or (state.consumed_tokens > marks[-1] and not has_one):
        raise ConfigError(missed_teacher(marks, str(source), state.consumed_tokens))
    for path in needed:
        copy = folder_of(config).parent / path.name
        if not (copy / storage.MANIFEST).is_file():
            partial = copy.with_name(f"{copy.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(path, partial, copy_function=storage.link)
            partial.rename(copy)


def open_teacher(
    config: Config, groups: ProcessGroups, tokenizer: Tokenizer, known: str
) -> tuple[Teacher, str]:
    """Build the teacher that ``distill.teacher`` names; collective over all ranks.

    Nothing of it runs: a checkpoint's files are verified, a folder's weights are safetensors.

    Args:
        known: SHA-256 of the teacher that the run has had so far; empty at its start.
    Returns: it, and its SHA-256.
    Raises: CheckpointError when it is missing, damaged or another one; ConfigError when it cannot
        teach this run.
    """
    # As rank 0 sees it: another run may be writing its next checkpoint.
    found = [together(lambda: find_teacher(config, known) if groups.is_writer else None, groups)]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    path, digest = found[0]
    of_teacher, shape = together(lambda: _read(config, path, tokenizer), groups)
    teacher = _build(config, of_teacher, shape, groups)
    if is_hugging_face(path):
        load = import_.load_folder_weights
        together(lambda: load(teacher.chunks, path, of_teacher, groups), groups)
    else:
        _verify(path, groups)
        checkpoint.load_weights(teacher.chunks, path, groups)
    together(lambda: _check_numbers(teacher, path), groups)
    return teacher, digest


def find_teacher(config: Config, known: str) -> tuple[Path, str]:
    """Find the files of the teacher that ``distill.teacher`` names.

    Args:
        known: SHA-256 of the teacher that the run has had so far; empty at its start. Of another
            run it is then the checkpoint of that sum, else the latest.
    Returns: its folder, and its SHA-256.
    Raises: CheckpointError when it cannot be read or is not ``known``, ConfigError without any.
    """
    name = config.distill.teacher
    path = folder_of(config) if name == "self" else Path(name)
    candidates = [path]
    if name != "self" and not is_hugging_face(path) and not (path / "state.json").is_file():
        candidates = checkpoint.complete(path)[::-1]
    if not candidates:
        raise ConfigError(
            f"distill.teacher {name} is neither a checkpoint, nor a run with a complete one, nor a "
            "Hugging Face folder"
        )
    for candidate in candidates:
        digest = _digest(candidate)
        if known in ("", digest):
            return candidate, digest
    raise CheckpointError(
        f"the teacher {path} is not the one that this run has learnt from: its files have "
        "changed. Put them back, or begin a new run"
    )


def _read(config: Config, path: Path, tokenizer: Tokenizer) -> tuple[Config, Shape]:
    """Read what model a teacher is, and make sure that it can teach this run."""
    if config.distill.teacher == "self":
        return config, own_shape(path, config.model)
    if is_hugging_face(path):
        model, shape = import_.read_model(path)
        of_teacher, words = configuration.replace(config, model=vars(model)), ""
        if (path / "tokenizer.json").is_file():
            words = str(path)
    else:
        of_teacher = checkpoint.read_config(path, checkpoint.ONE_PROCESS)
        shape = checkpoint.read_state(path, of_teacher).shape
        words = of_teacher.data.tokenizer
    _check_words(config, of_teacher, tokenizer, words)
    _check_split(config, shape)
    return of_teacher, shape


def own_shape(path: Path, model: ModelConfig) -> Shape:
    """Read which shape weights of the enlarged phase are of; an imported model's layers may differ.

    Raises: CheckpointError when they are missing, or of another model.
    """
    per_group = model.num_attention_heads // model.num_query_groups * model.kv_channels
    shape = Shape.full(model)
    try:
        sizes, _ = read_index(path)
        for axis, tensor, columns in (
            ("ffn_hidden_size", huggingface.FC2, 1),
            ("num_query_groups", huggingface.PROJ, per_group),
        ):
            names = [f"decoder.layers.{n}.{tensor}" for n in range(model.num_layers)]
            shape = shape.with_counts(axis, [sizes[name][1] // columns for name in names])
    except (OSError, LookupError, ForeignError, files.UnsafeFileError) as error:
        raise CheckpointError(f"the teacher {path} cannot be read: {error}") from error
    return shape


def _build(config: Config, of_teacher: Config, shape: Shape, groups: ProcessGroups) -> Teacher:
    return Teacher(
        of_teacher.model, shape, config.training, config.parallel, config.distill, groups
    )


def _digest(path: Path) -> str:
    """Take the SHA-256 of a manifest, which has checksums of all files, or of a folder's files."""
    names = [path / storage.MANIFEST]
    if is_hugging_face(path):
        names = [path / "config.json", *huggingface.check_folder(path)[1]]
    digest = hashlib.sha256()
    for name in names:
        try:
            with files.regular(name).open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        except (OSError, files.UnsafeFileError) as error:
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


def _check_words(config: Config, of_teacher: Config, tokenizer: Tokenizer, theirs: str) -> None:
    """Make sure that both speak of the same tokens. Raises: ConfigError."""
    name, mine = config.distill.teacher, config.model.vocab_size
    if of_teacher.model.vocab_size != mine:
        raise ConfigError(
            f"distill.teacher {name} has a vocabulary of {of_teacher.model.vocab_size} tokens and "
            f"this run's model one of {mine}: a teacher needs the same"
        )
    if not theirs:
        raise ConfigError(
            f"distill.teacher {name} has no tokenizer.json, so nothing says what its tokens are: "
            "put the file that it was trained with there"
        )
    both = [load_tokenizer(plain_tokenizer(each)) for each in (theirs, tokenizer.name)]
    if both[0].digest != both[1].digest:
        raise ConfigError(
            f"distill.teacher {name} has another tokenizer than data.tokenizer "
            f"({config.data.tokenizer}): the same id would be another token"
        )


def _check_split(config: Config, shape: Shape) -> None:
    """Make sure that the student's layout can hold a teacher. Raises: ConfigError."""
    name, parallel = config.distill.teacher, config.parallel
    tp, stages = parallel.tensor_model_parallel_size, parallel.num_stages
    if shape.num_layers < stages:
        raise ConfigError(
            f"distill.teacher {name} has {shape.num_layers} layers, fewer than the {stages} stages "
            "of PP x virtual PP: it runs in this run's layout, with a layer for each stage"
        )
    for axis in LAYER_AXES:
        uneven = [count for count in shape.counts(axis) if count % tp]
        if uneven:
            raise ConfigError(
                f"distill.teacher {name} has layers with {axis} {uneven[0]}, which cannot be split "
                f"over parallel.tensor_model_parallel_size={tp}: it runs in this run's layout"
            )


def _check_numbers(teacher: Teacher, path: Path) -> None:
    if not all(bool(p.isfinite().all()) for chunk in teacher.chunks for p in chunk.parameters()):
        raise CheckpointError(
            f"the teacher {path} holds NaN or infinity: it had diverged, or overflows this run's "
            "training.precision"
        )
