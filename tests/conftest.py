import os

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start, as `one_thread` here


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def one_thread():
    """Two cores and several test processes: one thread each is fastest, and the sums have one order."""
    torch.set_num_threads(1)
