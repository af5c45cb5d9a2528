"""Write configuration.md, the reference of all keys, from megatron_idea/config.py.

    python docs/configuration.py

The words are the docstrings below the keys; a test holds the page to what this makes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from megatron_idea import config as configuration
from megatron_idea.config import Config

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """\
# Configuration

<!-- python docs/configuration.py writes this page from megatron_idea/config.py -->

A run is one YAML file of the sections below and overrides on the command line: `schedule.lr=2e-3`
is the key `lr` of the section `schedule`. What is left out has its default; an unknown key is an
error that names the nearest one. `megatron-idea train my_run.yaml --dry-run` prints all keys as
they are resolved.

The type says how a value is read: a text stays as it was typed, and numbers may be written as `4e6`
or `4_000_000`. A key without a word beside it has Megatron's name and meaning, or is a letter of
its section's formula.
"""
NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    name: str
    """Below its section, with dots: ``target.num_layers``."""
    kind: str
    default: str
    text: str
    """Its docstring, in one line; empty without one."""


def sections() -> dict[str, type]:
    """The sections of a configuration by name; that of the keys outside of any is empty."""
    kinds = get_type_hints(Config)
    found = {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}
    return {"": Config} | found


def keys(section: type) -> Iterator[Key]:
    """The keys of a section, in the order of the source; those of a section in it follow it."""
    texts, kinds = _docstrings()[section.__name__], get_type_hints(section)
    for field in dataclasses.fields(section):
        kind, text = kinds[field.name], texts.get(field.name, "")
        if section is Config and dataclasses.is_dataclass(kind):
            continue
        default = field.default
        if default is dataclasses.MISSING:
            assert field.default_factory is not dataclasses.MISSING
            default = field.default_factory()
        if dataclasses.is_dataclass(kind):
            default = {name: value for name, value in vars(default).items() if value is not None}
            yield Key(field.name, "keys", _written(default), text or _text_of(kind))
            for inner in keys(kind):
                yield dataclasses.replace(inner, name=f"{field.name}.{inner.name}")
            continue
        (item,) = get_args(kind) if get_origin(kind) is list else (None,)
        if dataclasses.is_dataclass(item):
            text = f"{text} {_text_of(item)}".strip()
        yield Key(field.name, _kind(kind), _written(default), text)


def page() -> str:
    """Return the text of configuration.md."""
    parts = [HEAD]
    for name, section in sections().items():
        parts.append(f"## {name or 'Outside of sections'}\n")
        if name:
            parts.append(_markdown(_text_of(section), "\n\n") + "\n")
        rows = ["| key | type | default | |", "|---|---|---|---|"]
        rows += [
            f"| `{key.name}` | {key.kind} | `{key.default}` | {_cell(key.text)} |"
            for key in keys(section)
        ]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _docstrings() -> dict[str, dict[str, str]]:
    """By class and field: the string that stands below a field, which Python itself forgets."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(configuration)).body:
        if isinstance(node, ast.ClassDef):
            texts = found[node.name] = {}
            for field, below in zip(node.body, node.body[1:], strict=False):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                        value=ast.Constant(value=str(text))
                    ):
                        texts[name] = inspect.cleandoc(text)
    return found


def _text_of(section: type) -> str:
    return inspect.cleandoc(section.__doc__ or "")


def _kind(kind: Any) -> str:
    if NoneType in get_args(kind):
        (inner,) = (option for option in get_args(kind) if option is not NoneType)
        alike = [name for name, section in sections().items() if section is inner]
        return f"{f'keys of `{alike[0]}`' if alike else _kind(inner)}, or null"
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return f"list of {_kind(item)}{'' if dataclasses.is_dataclass(item) else 's'}"
    if dataclasses.is_dataclass(kind):
        inner = (f"{key.name}: {key.kind}" for key in keys(kind))
        return f"`{{{', '.join(inner)}}}`"
    return NAMES[kind]


def _written(value: Any) -> str:
    """As it would stand in YAML, in one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, float):
        return f"{value:.12g}"
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1 << 20)
    return text.removesuffix("\n").removesuffix("\n...")


def _markdown(text: str, between: str) -> str:
    """From a docstring: single backticks, a line for each paragraph, links to other pages."""
    lines = [" ".join(part.split()) for part in text.split("\n\n")]
    text = between.join(lines).replace("``", "`")
    return re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", text)


def _cell(text: str) -> str:
    return _markdown(text, " ").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
