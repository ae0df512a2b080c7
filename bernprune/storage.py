"""Files that are there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside, sync, rename: a crash leaves the old file or the new one, and nothing beside it."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, data: Any) -> None:
    """As ``write_bytes``; readable, keys in the given order, no NaN."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
