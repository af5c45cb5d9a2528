"""Hold the settings of a run against those that it began with. PyTorch is not needed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection, Sequence
from typing import Any

from megatron_idea.config import BlendEntry, Config, flat
from megatron_idea.data.tokenizer import tokenizer_file


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
