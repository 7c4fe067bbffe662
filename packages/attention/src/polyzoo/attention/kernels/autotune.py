"""Measure tile sizes on this machine and keep them in a file of the user's cache."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from polyzoo.attention.kernels.problem import Problem, heads_last
from polyzoo.attention.kernels.tuning import Kind, TileConfig, as_list, case_key
from polyzoo.core.io import atomic_write
from polyzoo.core.log import get_logger

logger = get_logger(__name__)
_REPEATS = 10
CANDIDATES: dict[str, tuple[TileConfig, ...]] = {
    "forward": (
        TileConfig(16, 64, 4, 2),
        TileConfig(64, 32, 4, 3),
        TileConfig(64, 64, 4, 2),
        TileConfig(64, 64, 4, 3),
        TileConfig(128, 32, 4, 3),
        TileConfig(128, 64, 8, 2),
        TileConfig(128, 64, 8, 3),
        TileConfig(128, 128, 8, 2),
        TileConfig(64, 64, 4, 3, tma=True),
        TileConfig(128, 64, 8, 3, tma=True),
        TileConfig(128, 128, 8, 3, tma=True),
    ),
    "backward_kv": (
        TileConfig(32, 64, 4, 2),
        TileConfig(32, 64, 4, 3),
        TileConfig(64, 64, 4, 2),
        TileConfig(64, 64, 4, 3),
        TileConfig(64, 128, 8, 2),
        TileConfig(64, 128, 8, 3),
    ),
    "backward_q": (
        TileConfig(64, 32, 4, 3),
        TileConfig(64, 64, 4, 2),
        TileConfig(64, 64, 4, 3),
        TileConfig(128, 32, 8, 3),
        TileConfig(128, 64, 8, 2),
        TileConfig(128, 64, 8, 3),
    ),
}
"""What is tried: eight warps only with 128 rows, see `tuning.default_config`."""


def cache_file() -> Path:
    """Where measurements are kept: under $POLYZOO_HOME or ~/.cache/polyzoo."""
    home = os.environ.get("POLYZOO_HOME")
    folder = Path(home) if home else Path.home() / ".cache" / "polyzoo"
    return folder / "attention-tiles.json"


def machine(device: torch.device) -> str:
    """What a measurement holds for: this GPU model under these versions."""
    return f"{torch.cuda.get_device_name(device)}|torch {torch.__version__}|{triton.__version__}"


def kept_config(kind: Kind, problem: Problem) -> TileConfig | None:
    """What this machine measured for such calls before, if anything."""
    sizes = _kept(cache_file()).get(machine(problem.q.device), {}).get(case_key(kind, problem))
    return None if sizes is None else TileConfig(*sizes)


def tune(kind: Kind, problem: Problem) -> TileConfig | None:
    """Time the candidates on the call's own tensors and keep the fastest.

    Args:
        kind: Which kernel.
        problem: The call; its tensors are read only.

    Returns:
        The fastest sizes, or None where the kernel has no candidates or none ran.
    """
    found: tuple[float, TileConfig] | None = None
    for config in CANDIDATES.get(kind, ()):
        try:
            milliseconds = _time(kind, problem, config)
        except (triton.runtime.errors.OutOfResources, triton.CompilationError) as error:
            logger.debug("tile sizes %s do not fit: %s", config, error)
            continue
        if found is None or milliseconds < found[0]:
            found = milliseconds, config
    if found is None:
        return None
    _keep(machine(problem.q.device), case_key(kind, problem), found[1])
    return found[1]


def _time(kind: Kind, problem: Problem, config: TileConfig) -> float:
    from polyzoo.attention.kernels.launch import forward
    from polyzoo.attention.kernels.launch_backward import Wanted, backward

    out = heads_last(problem.q, problem.v.shape[-1])
    lse = torch.zeros(problem.q.shape[:3], dtype=torch.float32, device=problem.q.device)
    dout: Tensor = out.normal_()

    def run() -> None:
        if kind == "forward":
            forward(problem, config=config)
        elif kind == "backward_kv":
            wanted = Wanted(q=False, bias=False)
            backward(problem, out, lse, dout, wanted=wanted, config_kv=config)
        else:
            wanted = Wanted(kv=False, bias=False)
            backward(problem, out, lse, dout, wanted=wanted, config_q=config)

    for _ in range(3):
        run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPEATS):
        run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _keep(machine_name: str, key: str, config: TileConfig) -> None:
    path = cache_file()
    table = _read(path)
    table.setdefault(machine_name, {})[key] = as_list(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(table, file, indent=1)
    _kept.cache_clear()


@lru_cache(maxsize=4)
def _kept(path: Path) -> dict[str, dict[str, list]]:
    return _read(path)


def _read(path: Path) -> dict[str, dict[str, list]]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("cannot read the tile sizes in %s (%s); delete the file", path, error)
        return {}
    return table if isinstance(table, dict) else {}
