"""Commands in processes of their own, to be killed, or left by who reads what they print.

They are copies of this process, which has imported all that they need: that takes most of the time of a short command.
"""

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from tiny_run import Outcome
from tqdm import tqdm

from bernprune import cli

FORKING = multiprocessing.get_context("fork")
tqdm.monitor_interval = 0  # no thread that may hold a lock of bars while this process is copied


class Child:
    """A command at work in ``folder``, of which stdout goes to ``out``, or nowhere if that is closed."""

    def __init__(self, arguments: Sequence[str], folder: Path, out: IO[bytes] | None = None) -> None:
        self.out, self.err = out or TemporaryFile(), TemporaryFile()  # noqa: SIM115
        self.process = FORKING.Process(target=_command, args=(arguments, folder, self.out, self.err))
        self.process.start()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until that is so, which must come before the command's end."""
        deadline = time.monotonic() + 90
        while not condition():
            assert self.process.is_alive(), f"it ended before its time: {self.ended()}"
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ended(self) -> Outcome:
        """Wait until it has; what went elsewhere is not read."""
        self.process.join(120)
        assert self.process.exitcode is not None, "it does not end"
        return Outcome(self.process.exitcode, *(_written(file) for file in (self.out, self.err)))


def _written(file: IO[bytes]) -> str:
    if file.closed or not file.readable() or not file.seekable():
        return ""
    file.seek(0)
    return file.read().decode()


def _command(arguments: Sequence[str], folder: Path, out: IO[bytes], err: IO[bytes]) -> None:
    os.chdir(folder)
    os.dup2(err.fileno(), 2)
    if out.closed:
        os.close(1)
    else:
        os.dup2(out.fileno(), 1)
    sys.stdout = None if out.closed else open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    logging.root.handlers = []  # pytest's
    sys.argv = ["bernprune", *arguments]
    cli.main()
