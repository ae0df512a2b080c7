"""Ctrl-C, SIGTERM and SIGHUP, taken between two pieces of work: steps of the search, passes of the final choice."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

_STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP, after what was done so far was saved."""


@contextmanager
def signals() -> Iterator[threading.Event]:
    """Turn the first of them into a flag, so that a step is never cut in half; the second acts at once.

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

    # What is ignored stays so: SIGHUP after nohup, SIGINT of what a script runs in the background.
    heard = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heard}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopping.is_set():
        raise Interrupted
