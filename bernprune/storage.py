"""Files that are there whole or not at all, and folders that are made for them."""

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


def check_writable(path: Path) -> None:
    """Raises ``RunError`` where no folder of this path can be, or the file formats of a result cannot name it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RunError(f"output {str(path)!r} cannot be written: its name is not UTF-8 (or set PYTHONUTF8=1)") from None
    try:
        if path.exists() and not path.is_dir():
            raise RunError(f"output {path} is a file, but a folder is needed")
        parent = nearest_parent(path)
    except OSError as error:  # a name too long for the file system
        raise RunError(f"output {path} cannot be written: {error.strerror}") from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(f"output {path} cannot be written: {parent} is not a writable folder")


@contextmanager
def no_empty_folders(path: Path) -> Iterator[None]:
    """On an error within, remove the folder ``path`` and those above it that were made for it, as far as empty."""
    existed = nearest_parent(path)
    try:
        yield
    except BaseException:
        remove_empty(path, existed)
        raise


def nearest_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    while not path.exists() and not path.is_symlink():
        path = path.parent
    return path


def remove_empty(path: Path, existed: Path) -> None:
    """Remove the folders from ``path`` up to ``existed``, which stays, as far as they are empty."""
    while path != existed and path != path.parent:
        try:
            path.rmdir()
        except OSError:
            return
        path = path.parent
