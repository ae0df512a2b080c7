"""Bars of long work, on a terminal alone, or as whoever began the work says."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_hidden: ContextVar[bool | None] = ContextVar("hidden", default=None)  # None: tqdm hides itself without a terminal
_DELAY = 1.0  # seconds: what is done by then needs no bar


@contextmanager
def bars(shown: bool | None) -> Iterator[None]:
    """For the length of the block, show bars or do not; None shows them on a terminal only."""
    before = _hidden.set(None if shown is None else not shown)
    try:
        yield
    finally:
        _hidden.reset(before)


def bar(name: str, *, total: int | None, unit: str, done: int = 0) -> Any:
    """A bar for work whose steps are told to it, of which some may have been done before."""
    return tqdm(total=total, initial=done, unit=unit, desc=name, disable=_hidden.get())


def followed(items: Iterable[Item], name: str, *, unit: str) -> Iterator[Item]:
    """The items, with a bar that goes on with each and is gone after the last."""
    yield from tqdm(items, unit=unit, desc=name, disable=_hidden.get(), delay=_DELAY, leave=False)
