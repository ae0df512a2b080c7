"""English technical prose that is already on the machine: the docstrings of our own dependencies.

The text is read from source files, never imported, so that extraction runs no foreign code. Documents are
split into ``train`` and ``held-out`` by a hash of their content: equal documents always fall on the same side,
whatever the versions installed and whichever files were read.
"""

import ast
import contextlib
import functools
import gc
import hashlib
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "held-out"]

PACKAGES = ("torch", "transformers", "numpy", "datasets")
MIN_CHARACTERS = 64
HELD_OUT_IN = 16  # one document in 16 is held out

_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


def documents(split: Split, *, one_file_in: int = 1) -> list[str]:
    """Distinct docstrings of the standard library, torch, transformers, numpy and datasets, and Python's manual.

    ``one_file_in`` reads only that share of the source files, chosen by a hash of their path: all of them take half a
    minute and give 15 MB of text, one in six takes a few seconds and gives 3 MB. The order is that of the content's
    hash, so it does not depend on the machine's folders.
    """
    wanted = split == "held-out"
    return [text for digest, text in _collected(one_file_in) if (digest[0] % HELD_OUT_IN == 0) == wanted]


@functools.lru_cache(maxsize=1)
def _collected(one_file_in: int) -> list[tuple[bytes, str]]:
    """All documents with their digests, in the order of those; kept, because both splits are wanted in turn."""
    with _no_cycles():  # half the time
        found = {_digest(text): text for text in _texts(one_file_in) if len(text) >= MIN_CHARACTERS}
    return sorted(found.items())


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _texts(one_file_in: int) -> Iterator[str]:
    topics = importlib.util.find_spec("pydoc_data.topics")
    if topics is not None and topics.origin is not None:
        yield from _string_constants(Path(topics.origin))
    for root in _roots():
        for path in _sources(root):
            if _digest(f"{root.name}/{path.relative_to(root).as_posix()}")[1] % one_file_in == 0:
                yield from _docstrings(path)


def _roots() -> Iterator[Path]:
    yield Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            yield Path(spec.submodule_search_locations[0])


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - _SKIPPED_FOLDERS  # where the walk goes on
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


@contextlib.contextmanager
def _no_cycles() -> Iterator[None]:
    """No search for cycles of garbage: syntax trees have none, and their many nodes would call for it all the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's sources are not our user's concern
            return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def _docstrings(path: Path) -> Iterator[str]:
    tree = _parse(path)
    nodes: list[ast.AST] = [tree] if tree else []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text.strip()
        # Definitions stand in lists of statements; expressions, most of a tree, need no visit.
        for field in ("body", "orelse", "handlers", "finalbody", "cases"):
            statements = getattr(node, field, ())
            nodes += statements if isinstance(statements, list) else ()


def _string_constants(path: Path) -> Iterator[str]:
    tree = _parse(path)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.strip()
