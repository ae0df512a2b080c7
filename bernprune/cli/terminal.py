"""What a command says, and how it ends: printing, logging, errors in one sentence, Ctrl-C."""

import io
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from types import FrameType

import torch
import typer
from transformers.utils import logging as transformers_logging

from bernprune.errors import BernpruneError
from bernprune.run.folder import RunFolder
from bernprune.run.recovering import RecoveryFolder

INTERRUPTED, READER_GONE = 130, 141  # as shells count SIGINT and SIGPIPE


class AtWork:
    """The folder at work, for the message after Ctrl-C: of a run, or of a recovery."""

    folder: RunFolder | None = None


def run_app(app: typer.Typer, arguments: list[str]) -> int:
    """Run a command. Exit codes: 0 done, 2 a mistake that the user can mend, 130 interrupted, 141 nobody reads on."""
    debug = "--debug" in arguments
    AtWork.folder = None
    _set_up_logging(debug)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a path may hold what it cannot encode
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # else it is ignored, as SIGHUP after nohup
            signal.signal(number, _interrupt)
    try:
        code = app([argument for argument in arguments if argument != "--debug"] or ["--help"], standalone_mode=False)
        if sys.stdout is not None:  # it is None if it was closed before Python began
            sys.stdout.flush()
    except BernpruneError as error:
        return _fail(str(error), debug)
    except SystemExit as error:
        if error.code != 1:
            raise
        _drop_stuck_output()  # of typer, whose help nobody reads on
        return READER_GONE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:  # a full disk behind stdout, a folder for temporary files that is gone
        _drop_stuck_output()
        return _fail(f"the system refused: {error}{_how_it_stands()}", debug)
    except torch.OutOfMemoryError:
        return _fail("the GPU's memory is full; another model.device, or a shorter model.dtype, may do", debug)
    except Exception as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's words, of a RuntimeError
            return _fail(f"the machine's memory is full{_how_it_stands()}", debug)
        if not hasattr(error, "format_message"):  # the usage errors of typer, whichever click it carries
            raise
        return _fail(error.format_message(), debug)
    if code == INTERRUPTED:  # what typer makes of Ctrl-C
        print(f"interrupted{_how_it_stands(or_finish=True)}", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _fail(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    one_line = re.sub(r"\s*\n\s*", " ", message.strip())  # other spaces may be those of a path
    print(f"error: {one_line}", file=sys.stderr)
    return 2


def show(text: str) -> None:
    """Print; a reader who has gone, as of `bernprune units | head -1`, ends the command quietly."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop_stuck_output()
        raise typer.Exit(READER_GONE) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM, and SIGHUP, when a terminal is closed, unwind as Ctrl-C does, so that nothing half-written is left."""
    raise KeyboardInterrupt


def _drop_stuck_output() -> None:
    """Drop what stdout cannot get rid of, or it would fail again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _how_it_stands(*, or_finish: bool = False) -> str:
    """How to go on with the work in the folder, or where its result lies, as the end of a sentence."""
    folder = AtWork.folder
    if folder is not None and folder.finished:
        return f"; the {folder.WORK} in {folder.path} is finished, and its result lies in {folder.model}"
    if folder is None or not folder.unfinished:
        return ""
    if isinstance(folder, RecoveryFolder):
        finishing = ", and with --finish ends early" if or_finish else ""
        return f"; the same command, without --overwrite, goes on{finishing}"
    finishing = ", or finish early by adding --finish," if or_finish and not folder.plan.exists() else ""
    return f"; continue{finishing} with: bernprune resume {shlex.quote(str(folder.path))}"


def _set_up_logging(debug: bool) -> None:
    """Show our messages on stderr; libraries' only to debug: they bury ours, and failures reach us as exceptions."""
    ours = logging.getLogger("bernprune")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    ours.handlers = [handler]
    ours.setLevel(logging.INFO if debug or sys.stderr.isatty() else logging.WARNING)
    if not debug:
        logging.root.addHandler(logging.NullHandler())  # else Python prints what nobody handles


def quiet_libraries() -> None:
    """Hide their progress bars and hints, which would bury ours."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
