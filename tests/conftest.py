"""Fixtures and options of all tests.

Tests that need the training images are marked ``data``. Where SQDM_DATA is not set they are left
out of the collection, so that a clone passes without them; where it is set, the folder must exist.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Small tensors: a second thread costs more than it gives, far more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # not in xdist's workers
    if exitstatus == 0 and reporter and session.config.getoption("--fail-on-skip"):
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


@pytest.fixture(scope="session")
def small_model():
    """A quantized network with random weights and a schedule of 4 steps, 7 evaluations."""
    import torch

    from golden.network import Architecture, Precond
    from golden.quantize import quantize_model

    torch.manual_seed(0)
    network = Precond(Architecture(resolution=8, model_channels=16, channel_mult=(1, 1),
                                   num_blocks=1))
    for value in network.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.1)
    return quantize_model(network, {"recipe": "random"}, mxint8="paper", images=1, steps=4)


@pytest.fixture(scope="session")
def small_model_file(small_model, tmp_path_factory):
    """The file of `small_model`."""
    from golden.quantize import save

    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save(small_model, path)
    return path


@pytest.fixture(scope="session")
def wheel(repository, tmp_path_factory):
    """The built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder,
                    repository], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """Runs a command of the installed wheel in an empty folder.

    The environment has the wheel and, in place of a download, the packages of this one.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    subprocess.run([sys.executable, "-m", "pip", "--python", folder / "venv" / "bin" / "python",
                    "install", "--quiet", "--no-deps", "--no-index", wheel],
                   env=environment, check=True)
    here = next(path for path in sys.path if path.endswith("site-packages"))
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "packages.pth").write_text(f"{here}\n")
    empty = folder / "empty"
    empty.mkdir()

    def run(*arguments):
        return subprocess.run([folder / "venv" / "bin" / "sqdm", *map(str, arguments)], cwd=empty,
                              capture_output=True, text=True)

    run.folder = empty
    return run
