"""Hold the settings of a run against those that it began with. PyTorch is not needed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection, Sequence
from typing import Any

from megatron_idea.config import BlendEntry, Config, ConfigError, flat
from megatron_idea.data.tokenizer import tokenizer_file
from megatron_idea.schedule import snapshot_tokens

FIXED = (
    "model", "data.tokenizer", "training.seq_length", "training.global_batch_size",
    "training.precision", "training.seed",
)  # fmt: skip
"""What a branch has of the run that it leaves: what was trained, and what a step is."""

_OTHER_RUNS = ("start_from", "distill.teacher")


def differences(saved: Config, config: Config, tokenizer: str = "") -> list[tuple[str, Any, Any]]:
    """List what differs in meaning between two configurations: dotted key, value then, value now.

    A file is the same however its path is spelled, a tokenizer by its content, the weights of a
    blend by their shares, another run by where it lies from this one. The order of a blend counts:
    it decides who comes first.

    Args:
        tokenizer: the copy that the saved one's run has; empty without any.
    """
    was, now = (flat(dataclasses.asdict(each)) for each in (saved, config))
    kept = "" if saved.data.tokenizer == "byte" else tokenizer
    meant_then, meant_now = was | _meant(saved, kept), now | _meant(config)
    # A section that may be null has keys of its own only where it is there.
    return [
        (key, was.get(key), now.get(key))
        for key in sorted(was.keys() | now.keys())
        if meant_then.get(key) != meant_now.get(key)
        and not (key in _OTHER_RUNS and _lies_alike(saved, was[key], config, now[key]))
    ]


def is_among(key: str, keys: Collection[str]) -> bool:
    """Tell whether a dotted key is one of ``keys``, or lies in a section that is."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def check_may_branch(source: Config, config: Config, tokenizer: str = "", where: str = "") -> None:
    """Make sure that one run may go on as another. Raises: ConfigError that names what cannot.

    Args:
        tokenizer: the copy that the source's run has; empty without any.
        where: the checkpoint, for the message; by default the source's run folder.
    """
    fixed = [
        f"{key}: {was!r} in the checkpoint, {now!r} now"
        for key, was, now in differences(source, config, tokenizer)
        if is_among(key, FIXED)
    ]
    if fixed:
        raise ConfigError(
            f"a run that starts from {where or source.run_dir} cannot change\n  "
            + "\n  ".join(fixed)
            + "\nSchedule, pruning, distillation, optimizer, data and layout may change."
        )


def check_targets(config: Config, live: dict[str, list[int]], where: str) -> None:
    """Make sure that no axis is to end with more units than there are. Raises: ConfigError.

    A run without pruning keeps what there is.

    Args:
        live: units by axis, of every layer that is there, or one number.
    """
    if config.prune.strategy == "none":
        return
    goals = config.goals
    for axis, counts in live.items():
        there = [count for count in counts if count]
        least = goals[axis].least if axis in goals else getattr(config.model, axis)
        if sum(there) < least * len(there):
            asked = f"prune.target.{axis} is {least}"
            if axis not in goals:
                asked = f"prune.target does not name {axis}, which keeps all {least}"
            raise ConfigError(
                f"start_from: {where} has {sum(there) / len(there):g} left of model.{axis}, and "
                f"{asked}: what was removed does not come back. Ask for at most so many, start "
                "from an earlier checkpoint, or set prune.strategy=none to keep what there is"
            )


def check_own_teacher(source: Config, config: Config, begin: int, where: str) -> None:
    """Make sure that a branch finds what its teacher ``self`` was, or is to be, made of.

    Args:
        begin: consumed tokens at which it leaves ``source``.
        where: what the message calls that checkpoint.
    Raises: ConfigError.
    """
    if not is_its_own_teacher(config):
        return
    marks = snapshot_tokens(config.schedule, config.distill)
    taken = snapshot_tokens(source.schedule, source.distill) if is_its_own_teacher(source) else []
    is_missed = any(mark < begin and mark not in taken for mark in marks)
    if is_missed or (begin > marks[-1] and not keeps_teacher(source, config)):
        raise ConfigError(missed_teacher(marks, where, begin))


def missed_teacher(marks: Sequence[int], where: str, begin: int) -> str:
    """Say why a branch cannot be its own teacher.

    Args:
        marks: consumed tokens of the snapshots that the teacher is the mean of.
        where, begin: the checkpoint, and its consumed tokens.
    """
    return (
        f"distill.teacher=self is the mean of weights at {', '.join(f'{m:,}' for m in marks)} "
        f"consumed tokens, and {where} is from {begin:,}, of a run that has not kept those before. "
        f"Start from an earlier checkpoint, or from one of at most {marks[-1]:,} tokens with "
        "distill.average_last=1, or name a checkpoint that is to teach: distill.teacher=PATH"
    )


def keeps_teacher(before: Config, config: Config) -> bool:
    """Tell whether a branch has the same teacher: by name; the run's own, by its snapshots, too."""
    if before.distill.teacher != config.distill.teacher:
        return False
    marks = [snapshot_tokens(each.schedule, each.distill) for each in (before, config)]
    return config.distill.teacher != "self" or marks[0] == marks[1]


def is_its_own_teacher(config: Config) -> bool:
    """Tell whether a run learns from the enlarged model that it was."""
    return config.distill.teaches and config.distill.teacher == "self"


def _lies_alike(one: Config, path: str, other: Config, other_path: str) -> bool:
    """Tell whether two paths are one as seen from their runs: all may have been moved together."""
    if "" in (path, other_path) or "self" in (path, other_path):
        return False
    seen = [os.path.relpath(p, run.run_dir) for run, p in ((one, path), (other, other_path))]
    return seen[0] == seen[1]


def _meant(config: Config, tokenizer: str = "") -> dict[str, Any]:
    """Keys whose value can be spelled in several ways, and what they stand for."""

    def shares(entries: Sequence[BlendEntry]) -> list[tuple[str, float]]:
        total = sum(entry.weight for entry in entries)
        return [(os.path.realpath(entry.prefix), entry.weight / total) for entry in entries]

    return {
        "data.train": shares(config.data.train),
        "data.validation": shares(config.data.validation),
        "data.tokenizer": _content(tokenizer or config.data.tokenizer),
    }


def _content(tokenizer: str) -> str:
    """What a tokenizer's name stands for; of a file that is not there, its place."""
    file = tokenizer_file(tokenizer)
    if tokenizer == "byte":
        return tokenizer
    if not file.is_file():
        return os.path.realpath(file)
    return hashlib.sha256(file.read_bytes()).hexdigest()
