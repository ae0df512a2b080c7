"""Results as lines of JSON, one a run; what exists is not run again."""

import argparse
import fcntl
import hashlib
import json
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bernprune.errors import DataError
from bernprune.storage import write_bytes

Row = dict[str, Any]
ABLATED = "without-"  # before the name of an ingredient: the method that lacks it
KEY = ("model", "method", "settings", "sparsity", "sequences", "seed")
SIMULATED = ("method", "units", "sequences", "seed")  # what a row of the surrogate is known by


def read_rows(path: Path, key: Sequence[str] = KEY) -> list[Row]:
    """All rows of a file; none if there is no file. Raises ``DataError`` on a line that is no row."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            key_of(row, key)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}, is not a row of this benchmark: {error}") from None
        rows.append(row)
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row; the file is written beside and renamed, by one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = path.read_bytes() if path.is_file() else b""
        write_bytes(path, before + (json.dumps(row, allow_nan=False) + "\n").encode())


def key_of(row: Mapping[str, Any], key: Sequence[str] = KEY) -> str:
    """Equal for runs that are the same."""
    return json.dumps([row[name] for name in key], sort_keys=True)


def commit() -> str:
    """Of this checkout, with a plus if a Python file differs from it; ``unknown`` outside of git."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True).returncode
    return head.stdout.strip() + "+" * (changed == 1) or "unknown"


def removed_units(mask_U: torch.Tensor) -> Row:
    """What a mask removes: how many units, a digest of their sorted indices, and all of it as a bitmap in hex."""
    removed = (~mask_U).nonzero().flatten().numpy().astype("<i8")
    bits = np.packbits(~mask_U.numpy())
    return {
        "count": len(removed),
        "of": len(mask_U),
        "sha256": hashlib.sha256(removed.tobytes()).hexdigest()[:16],
        "bitmap": bits.tobytes().hex(),
    }


def kept_units(removed: Row) -> torch.Tensor:
    """The mask, bool ``[U]``, that ``removed_units`` recorded."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(removed["bitmap"]), np.uint8))
    return torch.tensor(bits[: removed["of"]] == 0)


def learned_mask(path: Path, *, units: int, **key: Any) -> torch.Tensor:
    """What the first row of ``path`` keeps that has these values and is of so many units, bool ``[U]``.

    Raises:
        DataError: there is none.
    """
    for row in read_rows(path):
        if all(row[name] == value for name, value in key.items()) and row["removed"]["of"] == units:
            return kept_units(row["removed"])
    wanted = ", ".join(f"{name} {value}" for name, value in key.items())
    raise DataError(f"{path} has no plan of {units} units for {wanted}")


def overlap(one: Row, other: Row) -> float:
    """Units that both rows remove, as a share of those that either does."""
    first_U, second_U = ~kept_units(one), ~kept_units(other)
    return float((first_U & second_U).sum() / max(1, (first_U | second_U).sum()))


def list_of(kind: type, known: Collection[str] = ()) -> Callable[[str], list[Any]]:
    """Parses comma-separated values, which must be among those known if any are."""

    def parse(text: str) -> list[Any]:
        parts = [kind(part) for part in text.split(",")]
        unknown = [part for part in parts if known and part not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; known are {', '.join(known)}")
        return parts

    return parse
