"""Hold the settings of a run against those that it began with. PyTorch is not needed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection, Sequence
from typing import Any

from megatron_idea.config import BlendEntry, Config, ConfigError, flat
from megatron_idea.data.tokenizer import tokenizer_file

FIXED = (
    "model", "data.tokenizer", "training.seq_length", "training.global_batch_size",
    "training.precision", "training.seed",
)  # fmt: skip
"""What a branch has of the run that it leaves: what was trained, and what a step is."""


def differences(saved: Config, config: Config, tokenizer: str = "") -> list[tuple[str, Any, Any]]:
    """List what differs in meaning between two configurations: dotted key, value then, value now.

    A file is the same however its path is spelled, a tokenizer by its content, the weights of a
    blend by their shares. The order of a blend counts: it decides who comes first.

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
