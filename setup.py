"""Says what pyproject.toml cannot: the folder ``kernels`` is the package ``megatron_idea.kernels``,
the YAML files of ``examples`` lie in the package too, and ``csrc`` is compiled into
``megatron_idea._C``.

As a top-level package ``kernels`` would pass for the one that ``transformers`` looks for, and break
its imports.
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

packages = find_packages(include=["megatron_idea", "megatron_idea.*"])

extension = Pybind11Extension(
    "megatron_idea._C",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    cxx_std=17,
    # No -march=native: what is built on a login node runs on every compute node.
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
    # Without a compiler the package installs all the same; PyTorch does the extension's work.
    optional=True,
)

folders = {
    "megatron_idea.kernels": "kernels",
    # Side by side, as in examples/: a suite names ../configs/x.yaml.
    "megatron_idea.configs": "examples/configs",
    "megatron_idea.suites": "examples/suites",
}

setup(
    packages=[*packages, *folders],
    package_dir=folders,
    ext_modules=[extension],
)
