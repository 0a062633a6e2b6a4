"""What every test gets: seeds derived from its own name, and a skip with a reason where the hardware is missing."""

import random
import zlib

import hypothesis
import pytest
import torch

# Reproducible runs on slow machines: no deadline, the same examples every time.
hypothesis.settings.register_profile("repo", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("repo")
torch.set_num_threads(1)  # tests are many small tensors; threads that wait for each other only cost time


@pytest.fixture(autouse=True)
def seeded_by_name(request: pytest.FixtureRequest) -> None:
    """Unseeded random numbers of a test depend on its id alone, not on which tests ran before it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu or e2e are skipped, with the reason, where the GPU they need is missing."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        return
    for item in items:
        for marker in ("gpu", "e2e"):
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: no CUDA device of compute capability 9.0"))
