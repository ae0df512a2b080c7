"""Where tests are run, and not only shared out, what they start from is imported."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """A process that hands tests to workers needs none of it, and they wait until it is ready."""
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("shared_fixtures")
