"""The command line: the only room that parses arguments or prints."""

import sys

from bernprune.backends import keep_freed_memory
from bernprune.cli.commands import app
from bernprune.cli.terminal import run_app


def main() -> None:
    """Run a command as the shell gave it."""
    keep_freed_memory()
    sys.exit(run_app(app, sys.argv[1:]))
