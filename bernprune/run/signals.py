"""Ctrl-C and SIGTERM, taken between two pieces of work: a step of the search, a forward pass of the final choice."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after what was done so far was saved."""


@contextmanager
def signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that a step is never cut in half; the second acts at once.

    Raises:
        Interrupted: the block ended with the flag up.
    """
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()
        logger.warning("stopping after the piece of work at hand; a second Ctrl-C or SIGTERM stops at once")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopping.is_set():
        raise Interrupted
