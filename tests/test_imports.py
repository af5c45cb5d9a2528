"""Who may import whom: the package's sources are read, nothing is imported."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_idea"

# A part may import parts of its own rank or below. A folder has one rank, but for single files.
LAYERS = (
    {"config", "errors", "schedule", "shape", "course", "law", "guard", "files", "kernels", "_C",
     "__init__", "engine.core_versions", "huggingface.names", "prune.axis"},
    {"engine"},
    {"data", "records", "prune", "distill.loss", "distill.teacher"},
    {"checkpoint", "report", "library"},
    {"huggingface", "planning"},
    {"evaluation", "distill", "compare"},
    {"train"},
    {"cli", "__main__", "testing", "planning.doctor", "examples"},
)  # fmt: skip
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

MAY_IMPORT_MEGATRON_CORE = {
    "engine", "data", "checkpoint", "library",
    "planning.dry_run",
}  # fmt: skip
MAY_PRINT = {"cli"}

# Every other file in prune/ is a strategy: one method, which knows the protocol and nothing else.
PRUNE_MACHINERY = {
    "activations", "axis", "plan", "strategy", "pruner", "units", "measures", "probe", "scores",
    "silence", "refit", "rotate", "relocate", "compact", "verify", "distribution",
}  # fmt: skip
STRATEGY_MAY_IMPORT = {"prune.strategy", "prune.plan", "config", "schedule", "shape"}


@dataclass(frozen=True)
class Import:
    target: str
    """Dotted module; of ours without the package's name: ``prune.idea``."""
    ours: bool
    line: int
    at_load: bool
    """Runs when the module is loaded: not in a function, not under TYPE_CHECKING."""


def sources(root: Path) -> dict[str, Path]:
    """Module name without the package's own -> file. ``kernels/`` is ``megatron_idea.kernels``."""
    files = {p.relative_to(root / PACKAGE): p for p in (root / PACKAGE).rglob("*.py")}
    files |= {p.relative_to(root): p for p in (root / "kernels").rglob("*.py")}
    return {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): file
        for path, file in files.items()
    }


def imports(name: str, file: Path, modules: dict[str, Path]) -> Iterator[Import]:
    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield resolve(alias.name, node.lineno, at_load)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = file.name == "__init__.py"
                package = [PACKAGE, *([] if name == "__init__" else name.split("."))]
                package = package[: len(package) + is_package - node.level]
                base = ".".join([*package, *([base] if base else [])])
            for alias in node.names:
                yield resolve(f"{base}.{alias.name}", node.lineno, at_load)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in [*node.body, *node.orelse]:
                yield from visit(child, False)
        else:
            in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_load and not in_function)

    def resolve(dotted: str, line: int, at_load: bool) -> Import:
        head, _, rest = dotted.partition(".")
        if head != PACKAGE:
            return Import(dotted, False, line, at_load)
        while rest and rest not in modules and rest != "_C":
            rest = rest.rpartition(".")[0]  # the last part is a name inside a module
        return Import(rest or "__init__", True, line, at_load)

    yield from visit(ast.parse(file.read_text(), str(file)), True)


def violations(root: Path) -> list[str]:
    """One line for each import (and print) that breaks a rule, and one for a cycle."""
    modules = sources(root)
    found: list[str] = []
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, file in modules.items():
        part = name.split(".")[0]
        if _rank(name) is None:
            found.append(f"{file.relative_to(root)}: {part!r} has no rank; add it to LAYERS")
            continue
        for item in imports(name, file, modules):
            if item.ours and item.at_load and item.target != name:
                graph[name].add(item.target)
            if fault := _fault(name, item):
                found.append(f"{file.relative_to(root)}:{item.line}: {fault}")
        if part not in MAY_PRINT:
            found += [
                f"{file.relative_to(root)}:{node.lineno}: print() outside of {sorted(MAY_PRINT)}"
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
            ]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("import cycle: " + " <- ".join(error.args[1]))
    return found


def _rank(module: str) -> int | None:
    return RANK.get(module, RANK.get(module.split(".")[0]))


def _fault(name: str, item: Import) -> str | None:
    part, target = name.split(".")[0], item.target.split(".")
    if not item.ours:
        if target[0] == "kernels":
            return "top-level kernels; it is megatron_idea.kernels"
        if target[0] != "megatron":
            return None
        if target[1:2] != ["core"]:
            return f"{item.target}: of Megatron, only megatron.core"
        if not any(f"{name}.".startswith(f"{allowed}.") for allowed in MAY_IMPORT_MEGATRON_CORE):
            return f"{name} must not import megatron.core"
        return None
    if part == "kernels" and target[0] != "kernels":
        return f"kernels know nothing of {item.target}"
    mine, its = _rank(name), _rank(item.target)
    assert mine is not None, name
    if its is not None and its > mine:
        return f"{name} (rank {mine}) imports {item.target} (rank {its})"
    is_strategy = part == "prune" and name.partition(".")[2] not in PRUNE_MACHINERY | {""}
    if is_strategy and item.target not in STRATEGY_MAY_IMPORT:
        return f"strategy {name} imports {item.target}, not only {sorted(STRATEGY_MAY_IMPORT)}"
    return None


def test_imports_go_down_only():
    assert violations(ROOT) == []


@pytest.mark.parametrize("folder", ["tests", "examples", "benchmarks"])
def test_nothing_imports_a_top_level_kernels(folder):
    for file in (ROOT / folder).rglob("*.py"):
        targets = {item.target.split(".")[0] for item in imports("", file, {}) if not item.ours}
        assert "kernels" not in targets, file


GOOD = {
    "megatron_idea/__init__.py": "__version__ = '0'",
    "megatron_idea/config.py": "import dataclasses",
    "megatron_idea/engine/model.py": "import megatron.core\nfrom ..config import Config",
    "megatron_idea/schedule.py": "from megatron_idea.config import Config",
    "megatron_idea/records/log.py": "from megatron_idea import __version__, schedule",
    "megatron_idea/prune/__init__.py": "",
    "megatron_idea/prune/strategy.py": "from megatron_idea.config import PruneConfig",
    "megatron_idea/prune/idea.py": "from megatron_idea.prune.strategy import Stats",
    "megatron_idea/cli.py": "from megatron_idea.engine import model\n\nprint(model)",
    "kernels/__init__.py": "",
    "kernels/swiglu.py": "import torch\n\nfrom megatron_idea.kernels import score",
    "kernels/score.py": "import torch",
}


def write(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_a_good_tree_passes(tmp_path):
    assert violations(write(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("megatron_idea/config.py", "from megatron_idea.engine.model import GPT", "rank 1"),
        ("megatron_idea/config.py", "from . import cli", "rank 7"),
        ("megatron_idea/prune/units.py", "from ..cli import main", "rank 7"),
        ("megatron_idea/config.py", "def f():\n    import megatron_idea.cli", "rank 7"),
        (
            "megatron_idea/config.py",
            "if TYPE_CHECKING:\n    from .engine.model import GPT",
            "rank 1",
        ),
        ("megatron_idea/config.py", "import megatron.core", "must not import megatron.core"),
        ("megatron_idea/prune/idea.py", "import megatron.core", "must not import megatron.core"),
        (
            "megatron_idea/engine/model.py",
            "from megatron.training import get_args",
            "only megatron.core",
        ),
        ("megatron_idea/engine/model.py", "from kernels import swiglu", "megatron_idea.kernels"),
        ("kernels/score.py", "import megatron_idea.config", "know nothing of config"),
        ("megatron_idea/prune/other.py", "from .idea import Idea", "strategy prune.other"),
        ("megatron_idea/prune/idea.py", "from megatron_idea.prune import silence", "prune.idea"),
        ("megatron_idea/config.py", "from megatron_idea import schedule", "import cycle"),
        ("megatron_idea/engine/model.py", "print(1)", "print()"),
        ("megatron_idea/utils.py", "", "has no rank"),
    ],
)
def test_a_bad_import_is_named(tmp_path, path, text, complaint):
    found = violations(write(tmp_path, GOOD | {path: text}))
    assert any(complaint in line for line in found), found
