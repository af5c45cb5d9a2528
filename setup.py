"""Says what pyproject.toml cannot: the folder ``kernels`` is the package ``megatron_idea.kernels``.

As a top-level package it would pass for the ``kernels`` that ``transformers`` looks for, and break
its imports.
"""

from setuptools import find_packages, setup

packages = find_packages(include=["megatron_idea", "megatron_idea.*"])

setup(
    packages=[*packages, "megatron_idea.kernels"],
    package_dir={"megatron_idea.kernels": "kernels"},
)
