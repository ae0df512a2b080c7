"""What a run begins with: versions of libraries, contents of custom files, fingerprints of what it reads."""

import platform
from collections.abc import Mapping
from importlib.metadata import version

import bernprune
from bernprune.config import RunConfig
from bernprune.custom import digest_of
from bernprune.run.methods import custom_places

# Fingerprints beside the versions, and what to say where one has changed.
INPUTS = {
    "weights": "the model's weights are not those",
    "dense": "the dense model's weights are not those",
    "text": "the training text is not the one",
    "evaluation": "the evaluation text is not the one",
}


def versions() -> dict[str, str]:
    """Versions of this package, of the libraries that decide what it computes, and of Python."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {"bernprune": bernprune.__version__, **libraries, "python": platform.python_version()}


def versions_of(config: RunConfig) -> dict[str, str]:
    """Those, and the contents of custom Python files that a run takes from."""
    files = {place.rpartition(":")[0]: what for what, place in custom_places(config)}
    return versions() | {file: digest_of(what, file) for file, what in sorted(files.items())}


def changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What a run began with in another version than is here, in words; empty if none, or if that is not known."""
    if not before:
        return ""
    return ", ".join(f"{name} {before.get(name)} and not {now[name]}" for name in now if before.get(name) != now[name])
