"""One seed for every source of randomness, and states that can be put back bit for bit."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

from polyzoo.core.errors import ConfigError

RandomState = dict[str, Any]


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch (all devices).

    Args:
        seed: 0 to 2**32 - 1.
        deterministic: Also make torch refuse operations that give a different result each time.
            On a GPU this needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: must be 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global state is what third parties draw from
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def capture_random_state() -> RandomState:
    """Return the states of Python, NumPy and torch as tensors and plain values.

    The result holds nothing that `torch.load(..., weights_only=True)` would refuse.
    """
    version, numbers, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    state: RandomState = {
        "python": [version, list(numbers), gauss],
        "numpy": {
            "bit_generator": str(numpy["bit_generator"]),
            "key": torch.from_numpy(numpy["state"]["key"].copy()),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": [],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: RandomState) -> None:
    """Put back what `capture_random_state` returned.

    States of GPUs that this machine does not have are left out; the CPU's are always restored.
    """
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": numpy["bit_generator"],
            "state": {"key": numpy["key"].cpu().numpy(), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    torch.set_rng_state(state["torch"].cpu())
    for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state.cpu(), index)


def item_generator(seed: int, index: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a generator for one item, so that its draws do not depend on its batch neighbours.

    Args:
        seed: Of the run.
        index: Of the item.
        device: Where the generator draws.
    """
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    # 63 bits: manual_seed takes a signed integer.
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
