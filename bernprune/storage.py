"""Files that are there whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from bernprune.errors import RunError


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A path beside ``path``, to be written to, which takes its place at the end, synced, or goes if anything fails."""
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises ``RunError`` if what is done within fails to write; ``path`` is where it was to be."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # full disks reach us as either
        raise RunError(f"{path} cannot be written: {reason(error)}") from error


def reason(error: OSError | SafetensorError) -> str:
    """The reason of a failure to write, in a few words."""
    return getattr(error, "strerror", None) or str(error)


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside, sync, rename: a crash leaves the old file or the new one, and nothing beside it."""
    with written_file(path) as beside:
        beside.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """As ``write_bytes``; readable, keys in the given order, no NaN."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def sync_stream(file: TextIO) -> None:
    """Flush what was written to an open file so far to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a closed file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
