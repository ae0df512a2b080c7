"""One family of errors for what a user can put right. Everything else is our own fault and keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class BernpruneError(Exception):
    """Something the caller can mend; the message says what was wrong, what was given and what is allowed."""


class ConfigError(BernpruneError):
    """A setting that is unknown, of the wrong type or out of range."""


class ModelError(BernpruneError):
    """A model that cannot be read, is not of a known family, or does not fit a plan."""


class DataError(BernpruneError):
    """Text that is missing, empty, too short, or not text."""


class BudgetError(BernpruneError):
    """A budget that no selection can meet."""


class BackendError(BernpruneError):
    """A device or a kernel backend that cannot run here."""


class RunError(BernpruneError):
    """A run folder that cannot be written, resumed or trusted."""


class LossError(BernpruneError):
    """A loss that is not finite."""


@contextmanager
def prefixed(what: str, kind: type[BernpruneError]) -> Iterator[None]:
    """Begin the messages of errors of a kind that the block raises with ``what: ``."""
    try:
        yield
    except kind as error:
        raise kind(f"{what}: {error}") from None
