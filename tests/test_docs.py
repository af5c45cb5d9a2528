"""The documentation: links and commands that are there, the reference of keys, the site."""

from __future__ import annotations

import dataclasses
import html.parser
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from megatron_idea import config as configuration
from megatron_idea.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "examples/README.md",
    ROOT / "benchmarks/README.md",
]
NOTEBOOK = ROOT / "docs/tour.ipynb"
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)

# Megatron's own names, and the letters of a formula that its section's docstring has.
OBVIOUS = {
    "model.num_layers", "model.hidden_size", "model.num_attention_heads",
    "model.share_embeddings_and_output_weights", "model.rotary_base", "model.layernorm_epsilon",
    "model.init_method_std", "model.hidden_dropout", "model.attention_dropout",
    "training.seq_length", "training.seed",
    "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size",
    "optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_eps",
    "prune.target.num_layers",
    "law.name", "law.e", "law.a", "law.alpha", "law.b", "law.beta",
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """What docs/configuration.py defines."""
    return runpy.run_path(str(ROOT / "docs/configuration.py"))


def test_the_reference_of_keys_is_what_its_script_makes(reference: dict[str, Any]) -> None:
    written = (ROOT / "docs/configuration.md").read_text()
    assert written == reference["page"](), "run: python docs/configuration.py"


def test_the_reference_has_every_key_with_its_default(reference: dict[str, Any]) -> None:
    described = {
        f"{name}.{key.name}".removeprefix("."): key
        for name, section in reference["sections"]().items()
        for key in reference["keys"](section)
    }
    named = {key: value for key, value in described.items() if value.kind != "keys"}
    assert set(named) == set(configuration.flat(dataclasses.asdict(configuration.Config())))
    given: dict[str, Any] = {}
    for name, key in named.items():
        if not name.startswith("prune.target."):
            value = yaml.safe_load(key.default)
            for part in reversed(name.split(".")):
                value = {part: value}
            given = configuration.merge(given, value)
    assert configuration.from_dict(given) == configuration.Config()


def test_every_key_has_a_docstring_or_an_obvious_name(reference: dict[str, Any]) -> None:
    silent = {
        f"{name}.{key.name}"
        for name, section in reference["sections"]().items()
        for key in reference["keys"](section)
        if not key.text
    }
    assert silent == OBVIOUS


def text_of(page: Path) -> str:
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by on GitHub."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), re.M
    )
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", text_of(page))):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target}: no such file"
        assert path.is_relative_to(ROOT), f"{target} is outside of the repository"
        assert not anchor or anchor in anchors(path), f"{target}: no such heading"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each call of the program in a block of code: its page and its words."""
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S):
            joined = block.replace("\\\n", " ")
            for call in re.findall(r"^(?:.*? )?megatron-idea ([a-z].*)$", joined, re.M):
                yield page.name, call.split("  #")[0].split()


def test_commands_of_the_documentation_exist() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = set()
    for page, (name, *words) in commands():
        assert name in known, f"{page}: megatron-idea {name}"
        options = {option for parameter in known[name].params for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options, f"{page}: megatron-idea {name} {' '.join(words)}"
        seen.add(name)
    assert seen == set(known)


@pytest.mark.parametrize("page", ["own_data", "from_hugging_face"])
def test_configurations_in_the_documentation_can_be_run(page: str, tmp_path: Path) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    (block,) = re.findall(r"loads this block -->\n```yaml\n(.*?)```", text, re.DOTALL)
    file = tmp_path / "my_run.yaml"
    file.write_text(block)
    configuration.validate(configuration.load(file), world_size=2)


def test_the_notebook_keeps_no_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert cell["cell_type"] == "markdown" or not cell["outputs"]


class Loaded(html.parser.HTMLParser):
    """Collects what a browser loads with a page, and not what it can be led to."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        found = [given.get("src"), given.get("href") if tag == "link" else None]
        self.addresses += [address for address in found if address]


@pytest.mark.skipif(
    not importlib.util.find_spec("material"),
    reason="the site needs the extra docs: pip install -e '.[docs]'",
)
@pytest.mark.parametrize("repository", ["", "https://git.example/owner/name/blob/main"])
def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(
    repository: str, tmp_path: Path
) -> None:
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    environment = {"MEGATRON_IDEA_REPOSITORY": repository, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=os.environ | nowhere | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    pages = sorted(tmp_path.glob("*.html"))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in pages}
    for page in pages:
        text = page.read_text()
        loaded = Loaded()
        loaded.feed(text)
        assert loaded.addresses and not [a for a in loaded.addresses if "//" in a], page.name
        assert 'href="../' not in text
    suite = "examples/suites/laptop.yaml"
    linked = f'href="{repository}/{suite}"' if repository else f"<code>{suite}</code>"
    assert linked in (tmp_path / "comparing.html").read_text()
    index = json.loads((tmp_path / "search/search_index.json").read_text())
    assert any("relocate" in entry["text"] for entry in index["docs"])
