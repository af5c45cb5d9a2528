"""What the site needs beyond docs/: pages from elsewhere in the repository, and links out of docs/.

The Markdown files are written for the repository: a link to ``../examples/setup.sh`` works on a
server of Git repositories. Here it leads to the page that is made of its target, else to the
address in ``extra.repository``, and without one it is no link but the target's path.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "readme.md",
    "docs/tour.ipynb": "tour.md",
}
"""File of the repository -> page of the site."""

log = logging.getLogger("mkdocs.hooks")

# A fenced block, in which nothing is a link; or the text and the target of a link within the site.
_LINK = re.compile(
    r"^```.*?^```|\[(?P<text>[^\]\[]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages that are made of files outside of docs/, and of the notebook."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        content = _of_notebook(text) if source.endswith(".ipynb") else text
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, **_: Any) -> str:
    """Lead links out of docs/ to where their targets are; a missing target fails a strict build."""
    name = page.file.src_uri
    made_of = {made: source for source, made in PAGES.items()}
    folder = (ROOT / made_of.get(name, f"docs/{name}")).parent

    def lead(link: re.Match[str]) -> str:
        if link["target"] is None:
            return link[0]
        path = Path(os.path.normpath(folder / link["target"]))
        if not path.is_relative_to(ROOT) or not path.exists():
            log.warning(f"{name}: the link {link[0]} leads nowhere")
            return link[0]
        source, text, anchor = path.relative_to(ROOT).as_posix(), link["text"], link["anchor"] or ""
        if source in PAGES:
            return f"[{text}]({PAGES[source]}{anchor})"
        if path.parent == ROOT / "docs" and path.suffix != ".py":
            return f"[{text}]({path.name}{anchor})"
        if config.extra["repository"]:
            return f"[{text}]({config.extra['repository'].rstrip('/')}/{source}{anchor})"
        named = text.strip("`") in source
        return f"`{source}`" if named else f"{text} (`{source}`)"

    return _LINK.sub(lead, markdown)


def _of_notebook(text: str) -> str:
    """Write the cells of a notebook as Markdown; outputs are not kept in it."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        parts.append(f"```python\n{source}\n```" if is_code else source)
    return "\n\n".join(parts) + "\n"
