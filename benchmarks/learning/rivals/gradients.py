"""What methods that back-propagate into gates have in common."""

from benchmarks.learning.task import Settings, Task
from bernprune.errors import ConfigError


def learning_rates(task: Task, settings: Settings) -> list[float]:
    """A rate for every step that the meter has left: ``rate``, or falling along a line and in all ``travel``.

    Raises:
        ConfigError: not a step is left.
    """
    steps = task.meter.left // settings["windows"]
    if not steps:
        raise ConfigError(f"{task.meter.left} sequences are not enough for a step of {settings['windows']}")
    if "rate" in settings:
        return [settings["rate"]] * steps
    return [2 * settings["travel"] / (steps + 1) * (1 - step / steps) for step in range(steps)]
