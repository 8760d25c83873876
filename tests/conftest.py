import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are loaded, and for the commands that tests start

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two cores and several test processes: one thread each is fastest, and the sums have one order.

    For the session, so that what a module builds for its tests is built with one thread as well.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """No power fails here, so waiting would show nothing; tests of what is synced, and when, put their own in place."""
    sync, os.fsync = os.fsync, lambda fd: os.fstat(fd) and None  # a descriptor that is none is still an error
    yield
    os.fsync = sync
