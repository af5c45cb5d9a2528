"""Open files that somebody else may have written: plain names, regular files, bounded sizes.

Nothing here knows a format. Whoever reads one says in their own words which file was refused.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from megatron_idea.errors import UserError

MOST_TEXT_BYTES = 1 << 26
"""Of a file that is read whole: 64 MiB. A manifest of 100,000 files takes 8."""

MOST_YAML_VALUES = 20_000
"""Of a configuration, aliases spelled out; ours have about a hundred."""


class UnsafeFileError(UserError):
    """A file that is not read; the message says why, beginning with its name."""


def plain_name(name: Any) -> str:
    """``name``, which is a file's, without folders. Raises: UnsafeFileError."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable():
        raise UnsafeFileError(f"{name!r:.100} is no name of a file")
    if "/" in name or "\\" in name:
        raise UnsafeFileError(f"{name!r:.100} is a path; files lie in the folder itself")
    return name


def inside(folder: Path, name: Any) -> Path:
    """The path of the regular file ``name`` in ``folder``.

    A link counts where its target lies in ``folder`` too, and in the
    cache of the Hugging Face Hub, whose snapshots are links to its own ``blobs``.

    Raises: UnsafeFileError for anything else: a path, a link out of the folder, a pipe, a device.
    """
    path = folder / plain_name(name)
    if path.is_symlink():
        target = Path(os.path.realpath(path))  # of links in a circle: one of them
        homes = [folder.resolve()]
        if homes[0].parent.name == "snapshots":
            homes.append(homes[0].parent.parent / "blobs")
        if target.parent not in homes:
            raise UnsafeFileError(f"{name} is a link to a file outside of the folder")
    return regular(path)


def regular(path: Path) -> Path:
    """``path``, which is a regular file or a link to one.

    Raises: UnsafeFileError for a pipe, a device and the like, which need never end.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnsafeFileError(f"{path.name} cannot be read: {reason}") from error
    if not stat.S_ISREG(mode):
        raise UnsafeFileError(f"{path.name} is not a regular file")
    return path


def read_bytes(path: Path, most: int = MOST_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most ``most`` bytes. Raises: UnsafeFileError."""
    try:
        with regular(path).open("rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise UnsafeFileError(f"{path.name} cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise UnsafeFileError(f"{path.name} is larger than {most:,} bytes")
    return content


def read_json(path: Path, most: int = MOST_TEXT_BYTES) -> dict[str, Any]:
    """The JSON object in a regular file. Raises: UnsafeFileError for anything else."""
    try:
        content = json.loads(read_bytes(path, most))
    except UnsafeFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnsafeFileError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsafeFileError(f"{path.name} is not a JSON object")
    return content


def is_whole(value: Any, least: int = 0, most: int = 1 << 53) -> bool:
    """Whether a value of a JSON file is a whole number in [least, most]; ``true`` is none."""
    return type(value) is int and least <= value <= most


def is_number(value: Any, finite: bool = True) -> bool:
    """Whether a value of a JSON file is a number that a float holds; ``true`` is none.

    ``finite``: also not NaN or infinite, and below 1e30 in size, so that sums of them are finite.
    """
    if type(value) not in (int, float):
        return False
    return -1e30 < value < 1e30 or (not finite and type(value) is float)


def check_yaml(path: Path) -> None:
    """Make sure that a YAML file ends: that its aliases do not multiply, nor contain themselves.

    Raises: UnsafeFileError. YAML that is broken in another way is left to its reader.
    """
    check_yaml_text(read_bytes(path, most=1 << 20), path.name)


def check_yaml_text(text: bytes, name: str) -> None:
    """``check_yaml`` for what was read from a file of that name."""
    import yaml

    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeError, ValueError):
        return
    except RecursionError as error:
        raise UnsafeFileError(f"{name} is nested too deeply") from error
    if root is not None and _values(root, {}) > MOST_YAML_VALUES:
        raise UnsafeFileError(
            f"{name} has more than {MOST_YAML_VALUES:,} values, or aliases in a circle"
        )


def _values(node: Any, known: dict[int, float]) -> float:
    """Nodes below and with ``node`` when every alias is written out; infinite in a circle."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is known: what meets it again is a circle
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]
