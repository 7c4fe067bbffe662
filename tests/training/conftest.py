"""Training tests compare runs bit by bit, in this process and in forks, which have one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tqdm import tqdm

# Its thread may hold tqdm's lock at the moment of a fork, and the child would wait for ever.
tqdm.monitor_interval = 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "deepspeed: needs DeepSpeed, g++ and libaio; left out unless asked for by -m"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "deepspeed" in (config.getoption("markexpr") or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("deepspeed")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="module")  # before the runs a module shares
def _one_thread() -> Iterator[None]:
    """Sums are made in another order on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
