"""Checkpoints that are whole or not used: one safetensors file each, with a digest of all it holds.

Written beside and renamed; the newest two are kept, so that damage to one costs a few minutes and not the run.
"""

import hashlib
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bernprune.errors import RunError
from bernprune.storage import sync, write_bytes

logger = logging.getLogger(__name__)

KEPT = 2
_PATTERN = "step-*.safetensors"


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Save plain data in which tensors may stand wherever dictionaries name them.

    Raises:
        RunError: there is something else in it.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_without_tensors(state, "", tensors), sort_keys=True)
    write_bytes(path, save(tensors, metadata={"state": text, "sha256": _digest(text, tensors)}))


def write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Save the state after ``step`` steps, and forget all but the newest two. Later ones could not be read: they go.

    So does what a process left that was killed while writing one.
    """
    if not folder.is_dir():
        folder.mkdir()
        sync(folder.parent)
    path = checkpoint_at(folder, step)
    write_state(path, state)
    for left in folder.glob(".*.part"):
        left.unlink()
    written = sorted(folder.glob(_PATTERN))
    last = written.index(path) + 1
    for other in (*written[last:], *written[: max(0, last - KEPT)]):
        other.unlink()


def checkpoint_at(folder: Path, step: int) -> Path:
    """The file of the state after ``step`` steps."""
    return folder / f"step-{step:08d}.safetensors"


def read_latest(folder: Path) -> dict[str, Any] | None:
    """The newest state that is whole; None if there is no checkpoint. A damaged one is skipped, and that is logged.

    Raises:
        RunError: there are checkpoints, but none can be read.
    """
    paths = sorted(folder.glob(_PATTERN), reverse=True)
    for path in paths:
        try:
            state = read_state(path)
        except RunError as error:
            logger.warning("%s; trying an older one", error)
            continue
        if path != paths[0]:
            logger.warning("continuing from the older checkpoint %s", path.name)
        return state
    if paths:
        raise RunError(
            f"none of the {len(paths)} checkpoints in {folder} can be read; delete that folder to start over"
        )
    return None


def read_checkpoint(folder: Path, keys: Collection[str], text_sha256: str) -> dict[str, Any] | None:
    """As ``read_latest``. Raises ``RunError`` also for one with other ``keys``, or made on another text."""
    state = read_latest(folder)
    if state is not None and state.keys() != set(keys):
        raise RunError(f"the checkpoints in {folder} are of another version; delete that folder to start over")
    if state is not None and state["text_sha256"] != text_sha256:
        raise RunError(f"the text is not the one that the checkpoints in {folder} were made with")
    return state


def read_state(path: Path) -> dict[str, Any]:
    """What ``write_state`` saved. Raises ``RunError`` if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if metadata["sha256"] != _digest(metadata["state"], tensors):
            raise ValueError("its content does not match its digest")
        state: dict[str, Any] = _with_tensors(json.loads(metadata["state"]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RunError(f"{path} is damaged ({error})") from None
    return state


def check_state(state: Any) -> None:
    """Raises ``RunError`` if ``write_state`` would."""
    _without_tensors(state, "", {})


def _without_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor) and name not in tensors:
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
        return {"tensor": name}
    if isinstance(value, dict) and value.keys() != {"tensor"} and all(isinstance(key, str) for key in value):
        return {key: _without_tensors(item, f"{name}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if not _is_plain(value):
        raise RunError(
            f"{name or 'a state'} is {value!r:.100}, which cannot be saved: only tensors by name, numbers, words and "
            "None can, and lists and dictionaries of these"
        )
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return value.keys() != {"tensor"} and all(isinstance(k, str) and _is_plain(item) for k, item in value.items())
    return value is None or isinstance(value, str | int | float)


def _with_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    return value


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
