"""What a run begins with: versions of libraries, contents of custom files, fingerprints of what it reads."""

import platform
from collections.abc import Mapping
from importlib.metadata import version

import bernprune
from bernprune.backends import find_device
from bernprune.config import RunConfig
from bernprune.custom import code_digest
from bernprune.evaluation.latency import machine
from bernprune.run.methods import custom_places

CHANGED = "changed on the way"  # beside the versions: in which others a run went on, if it did

# Fingerprints beside the versions, and what to say where one has changed.
INPUTS = {
    "weights": "the model's weights are not those",
    "dense": "the dense model's weights are not those",
    "text": "the training text is not the one",
    "evaluation": "the evaluation text is not the one",
    "scores": "the score files are not those",
}


def versions() -> dict[str, str]:
    """Versions of this package, of the libraries that decide what it computes, and of Python."""
    libraries = {name: version(name) for name in ("torch", "transformers", "numpy", "datasets")}
    return {"bernprune": bernprune.__version__, **libraries, "python": platform.python_version()}


def surroundings(config: RunConfig) -> dict[str, str]:
    """Versions of libraries, and the machine: sums of other threads or of another GPU are rounded otherwise."""
    return versions() | {"machine": machine(find_device(config.model.device))}


def origin_of(config: RunConfig) -> dict[str, str]:
    """``surroundings``, and digests of the custom Python files that a run takes from."""
    files = {place.rpartition(":")[0]: what for what, place in custom_places(config)}
    return surroundings(config) | {file: code_digest(what, file) for file, what in sorted(files.items())}


def changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What a run began with in another version than is here, in words; empty if none, or if that is not known."""
    known = [name for name in now if name in before]
    return ", ".join(f"{name} {before[name]} and not {now[name]}" for name in known if before[name] != now[name])
