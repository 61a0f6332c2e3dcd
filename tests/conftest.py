"""One thread a process: tiny models gain nothing from more, and waiting for each other is what load slows."""

import os
import shutil
import tempfile

import pytest
import torch

from lossmith.cli import words

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def scratch(tmp_path_factory):
    """Where `tempfile` makes what no fixture takes away: it goes with the process, and a disk does not fill up."""
    tempfile.tempdir = str(tmp_path_factory.mktemp("scratch"))
    yield
    shutil.rmtree(tempfile.tempdir, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_recipe_before():
    """Commands are given in this process, and a new process knows of no recipe that another was given."""
    words._IN_RECIPE.clear()


def pytest_xdist_auto_num_workers():
    """One more than the cores: many tests wait, for a process, a page or a time limit, and use no core meanwhile."""
    return (os.cpu_count() or 1) + 1
