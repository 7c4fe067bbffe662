"""Training tests compare runs bit by bit, in this process and in forks, which have one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")  # before the runs a module shares
def _one_thread() -> Iterator[None]:
    """Sums are made in another order on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
