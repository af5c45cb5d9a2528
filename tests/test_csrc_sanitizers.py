"""The C++ tests in csrc/tests, with AddressSanitizer and UndefinedBehaviorSanitizer watching."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A C++ compiler whose sanitized programs start."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), "")
    if not found:
        pytest.skip("no C++ compiler")
    command = [found, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *SANITIZE]
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}\n")
    built = subprocess.run([*command, "empty.cpp", "-o", "empty"], cwd=folder, capture_output=True)
    if built.returncode or subprocess.run([folder / "empty"], capture_output=True).returncode:
        pytest.skip(f"{found} has no working sanitizers")
    return command


@pytest.mark.parametrize("subject", ["relocate", "move"])
def test_nothing_is_undefined_or_out_of_bounds(
    subject: str, compiler: list[str], tmp_path: Path
) -> None:
    sources = [CSRC / f"{subject}.cpp", CSRC / "tests" / f"{subject}_test.cpp"]
    program = tmp_path / subject
    for command in ([*compiler, *sources, "-o", program], [program]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_sanitizers_would_notice(compiler: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.cpp").write_text(
        "#include <vector>\nint main(int n, char**) { std::vector<char> x(1); return x.data()[n]; }"
    )
    subprocess.run([*compiler, "bad.cpp", "-o", "bad"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "bad"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
