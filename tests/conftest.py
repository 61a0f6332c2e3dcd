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
    place = tmp_path_factory.mktemp("scratch")
    tempfile.tempdir = str(place)
    yield
    for made in place.iterdir():
        if not made.name.startswith("pymp-"):  # multiprocessing's, which takes them away at the very end
            shutil.rmtree(made) if made.is_dir() else made.unlink()


@pytest.fixture(autouse=True)
def no_recipe_before():
    """Commands are given in this process, and a new process knows of no recipe that another was given."""
    words._IN_RECIPE.clear()


def pytest_xdist_auto_num_workers():
    """One more than the cores: many tests wait, for a process, a page or a time limit, and use no core meanwhile."""
    return (os.cpu_count() or 1) + 1
