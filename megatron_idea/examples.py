"""Configurations and suites to start from: ``examples/``, which is in the wheel as well."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_idea.config import ConfigError

# "config: ../configs/micro.yaml": the configuration that a suite starts from.
_CONFIG_OF_SUITE = re.compile(r"^config: \.\./configs/(\w+\.yaml)$", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A YAML file that ships with the package."""

    path: Path
    is_suite: bool

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def about(self) -> str:
        """The first sentence of the comment that the file begins with."""
        comment = re.match(r"(?:#.*\n)+", self.path.read_text("utf-8"))
        assert comment, f"{self.path} does not say what it is"
        text = " ".join(line.removeprefix("#").strip() for line in comment[0].splitlines())
        return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def examples() -> list[Example]:
    """List configurations, then suites, by name."""
    package = Path(__file__).parent
    # setup.py puts both folders into the package; in a clone they are where they belong.
    installed = (package / "configs").is_dir()
    folder = package if installed else package.parent / "examples"
    return [
        Example(path, kind == "suites")
        for kind in ("configs", "suites")
        for path in sorted((folder / kind).glob("*.yaml"))
    ]


def write_example(name: str, out: Path) -> list[Path]:
    """Write an example to ``out``, and beside a suite the configuration that it starts from.

    Returns: what was written; a configuration that is there already, as it is, is not.
    Raises: ConfigError for an unknown name, for a file that is there already, and where nothing can
        be written.
    """
    known = {example.name: example for example in examples()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"no example is called {name!r}; did you mean {near!r}? known: {', '.join(known)}"
        )
    path = known[name].path
    text = path.read_text("utf-8")
    files = {}
    if known[name].is_suite and (found := _CONFIG_OF_SUITE.search(text)):
        text = _CONFIG_OF_SUITE.sub(r"config: \1", text)
        config = out.with_name(found[1])
        if config == out:
            raise ConfigError(f"{out} is to be the suite's configuration: name another file")
        source = (path.parent.parent / "configs" / found[1]).read_text("utf-8")
        if not (config.is_file() and config.read_text("utf-8") == source):
            files[config] = source
    files[out] = text
    for there in files:
        if there.exists():
            raise ConfigError(f"{there} is there already, and nothing is overwritten")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for target, content in files.items():
            with open(target, "x", encoding="utf-8") as file:
                file.write(content)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error
    return list(files)
