"""Every test starts from the same seed; one thread in each of the two processes that share the tests out."""

import os

import pytest
import torch

# Results and durations are then alike on all machines, and no two pools of threads wait for one core.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def own_inductor_cache(tmp_path_factory):
    """torch keeps what it compiled by the names of operators: that of another version of ours would run instead."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """`torch.set_num_threads` for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
