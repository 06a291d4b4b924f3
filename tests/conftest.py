"""Fixtures and options of all tests.

Tests that need the training images are marked ``data``. Where SQDM_DATA is not set they are left
out of the collection, so that a clone passes without them; where it is set, the folder must exist.
"""

import os
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--fail-on-skip", action="store_true",
                     help="count a skipped test as a failure")


def pytest_configure(config):
    folder = os.environ.get("SQDM_DATA")
    if folder and not Path(folder).is_dir():
        raise pytest.UsageError(f"SQDM_DATA must be an existing folder, not {folder!r}")


def pytest_collection_modifyitems(config, items):
    if os.environ.get("SQDM_DATA"):
        return
    without = [item for item in items if item.get_closest_marker("data")]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if not item.get_closest_marker("data")]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and session.config.getoption("--fail-on-skip"):
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter.stats.get("skipped"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def data_folder():
    """The folder of the training images."""
    return Path(os.environ["SQDM_DATA"])


@pytest.fixture(scope="session")
def repository():
    """The root of the source tree."""
    return Path(__file__).parent.parent
