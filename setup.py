"""The packages: minilora with its rooms, and kernels/ as minilora.kernels. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["minilora*"]), package_dir={"minilora.kernels": "kernels"})
