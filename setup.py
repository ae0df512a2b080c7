"""Packaging. ``kernels/`` is installed as ``bernprune.kernels``; it has no ``__init__.py`` of its own, because Hugging
Face ships a package called ``kernels`` that a folder with one would shadow."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "bernprune/__init__.py").read_text(encoding="utf-8"), re.M)
PACKAGES = [*find_packages(include=["bernprune*"], exclude=["bernprune.cli.command"]), "bernprune_command"]
RECOVER, GGUF = ["peft>=0.15", "accelerate>=1"], ["gguf>=0.17"]
QUANTISED = ["torchao>=0.9"]  # not for all tests: where it finds no GPU, it says so in every command
TEST = ["pytest>=8", "pytest-xdist>=3.6", *RECOVER, *GGUF]

setup(
    name="bernprune",
    version=VERSION[1],
    description="Structured pruning of language models that learns what to remove, with forward passes only",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={"bernprune": ["py.typed", "kernels/__init__.py"], "bernprune.embedded": ["model/*"]},
    install_requires=[
        "torch>=2.6,<2.14",
        "transformers>=5.14",
        "datasets>=3",
        "triton>=3; platform_system == 'Linux'",
        "numpy>=1.26",
        "tqdm>=4.66",
        "safetensors>=0.5",
        "pydantic>=2.7",
        "PyYAML>=6",
        "typer>=0.12",
        "matplotlib>=3.8",
    ],
    extras_require={
        "gguf": GGUF,
        "quantised": QUANTISED,
        "recover": RECOVER,
        "test": TEST,
        "dev": [*TEST, "mypy>=1.11", "ruff>=0.6", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["bernprune = bernprune_command:main"]},
    package_dir={"bernprune.kernels": "kernels", "bernprune_command": "bernprune/cli/command"},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
