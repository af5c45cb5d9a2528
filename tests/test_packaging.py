"""What is installed: one top-level name, and a wheel that works away from the repository."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
SHIPPED = ("pyproject.toml", "setup.py", "LICENSE", "README.md", "megatron_idea", "kernels", "csrc",
           "examples")  # fmt: skip


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build/ folder in the repository could lend it files of yesterday."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    built_here = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=built_here)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=copy)
    (built,) = out.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so what it lacks is missed."""
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", out, sdist, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_no_top_level_kernels_of_ours():
    spec = importlib.util.find_spec("kernels")
    where = [*(spec.submodule_search_locations or []), spec.origin or ""] if spec else []
    assert not any(Path(p).is_relative_to(ROOT / "kernels") for p in where if p), (
        "the repository's root is on sys.path: set PYTHONSAFEPATH=1 and unset PYTHONPATH"
    )


def test_the_wheel_has_one_top_level_name_and_every_module(wheel):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in shipped} == {"megatron_idea"}
    package = {p.relative_to(ROOT) for p in (ROOT / "megatron_idea").rglob("*.py")}
    kernels = {"megatron_idea" / p.relative_to(ROOT) for p in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in shipped if name.endswith(".py")} == {
        path.as_posix() for path in package | kernels
    }
    assert {f"megatron_idea/report/page.{kind}" for kind in ("css", "js")} <= shipped
    assert "megatron_idea/compare/page.css" in shipped
    examples = {p.relative_to(ROOT / "examples") for p in (ROOT / "examples").glob("*/*.yaml")}
    assert {name for name in shipped if name.split("/")[1] in ("configs", "suites")} == {
        f"megatron_idea/{path.as_posix()}" for path in examples
    }


def test_the_sdist_has_all_that_the_extension_is_compiled_from(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob("*.*")}
    assert len(sources) >= 5 and sources <= names


@pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")),
    reason="no C++ compiler",
)
def test_the_wheel_brings_the_extension_without_a_need_for_torch(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (extension,) = (tmp_path / "megatron_idea").glob("_C.*")
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("megatron_idea._C", {str(extension)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.relocate.__name__, "torch" in sys.modules)
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == ["relocate", "False"]


def test_the_wheel_imports_outside_of_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import sys; sys.path.insert(0, "site")
import importlib.util, megatron_idea.config, megatron_idea.kernels
print(megatron_idea.config.__file__, megatron_idea.kernels.__file__, sep="\\n")
"""
    origins = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONSAFEPATH="1").split()
    assert len(origins) == 2
    assert all((tmp_path / origin).is_relative_to(tmp_path / "site") for origin in origins)


def test_the_wheel_lists_and_writes_every_example_and_they_are_read(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    start = "import sys; sys.path.insert(0, 'site'); "
    listed = run(
        sys.executable, "-c", f"{start}from megatron_idea.cli import main; main()", "init",
        cwd=tmp_path, PYTHONSAFEPATH="1",
    )  # fmt: skip
    shipped = {path.stem for path in (ROOT / "examples").glob("*/*.yaml")}
    assert (
        set(re.findall(r"^(\w+) +(?:train|compare) +[A-Z].*\. *$", listed, re.MULTILINE)) == shipped
    )
    code = f"""{start}
from pathlib import Path
from megatron_idea.compare.suite import read_suite
from megatron_idea.config import load
from megatron_idea.examples import examples, write_example
for example in examples():
    out = Path("written", f"my_{{example.name}}.yaml")
    write_example(example.name, out)
    print(example.path, len(read_suite(out).runs) if example.is_suite else load(out).run_dir)
"""
    read = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONSAFEPATH="1").splitlines()
    assert {Path(line.split()[0]).stem for line in read} == shipped
    assert all((tmp_path / line.split()[0]).is_relative_to(tmp_path / "site") for line in read)


@pytest.mark.parametrize(
    "command",
    [[Path(sys.executable).with_name("megatron-idea")], [sys.executable, "-m", "megatron_idea"]],
    ids=["console script", "python -m"],
)
def test_the_command_line_answers(command, tmp_path):
    assert "train" in run(*command, "--help", cwd=tmp_path)


def test_every_dependency_has_a_bound_and_a_reason():
    project = tomllib.loads(PYPROJECT)["project"]
    extras = project.get("optional-dependencies", {}).values()
    for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]:
        assert re.search(r"[<>=]", requirement), f"{requirement}: no version range"
        lines = re.findall(rf'^ *"{re.escape(requirement)}",  # \w.*$', PYPROJECT, re.MULTILINE)
        assert lines, f"{requirement}: no comment that says what it is for"


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        ("2.9.0a0+50eac811a6.nv25.09", False),
        ("2.9.1", False),
        ("2.10.0a0+b558c986e8.nv25.11", True),
        ("2.11.0a0+eb65b36914.nv26.2", True),
        ("2.10.0", True),
        ("2.13.0+cpu", True),
        ("3.0.0", False),
    ],
)
def test_torch_may_be_what_nvidias_images_bring(version, taken):
    project = tomllib.loads(PYPROJECT)["project"]
    (torch,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    assert (version in torch.specifier) == taken
