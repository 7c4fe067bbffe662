"""Which process of how many this is, whoever launched it. Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from polyzoo.training.errors import TrainingError

_RENDEZVOUS_PORT = 29500


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A process's place among those that train together."""

    rank: int = 0
    """Of this process, from 0."""
    world_size: int = 1
    """Processes in all."""
    local_rank: int = 0
    """Of this process on its node; its GPU."""
    local_world_size: int = 1
    """Processes on its node."""
    address: str = "127.0.0.1"
    """Host of process 0."""
    port: int = _RENDEZVOUS_PORT
    """Where process 0 listens."""
    launcher: str = "python"
    """python, torchrun (as accelerate and deepspeed, which set the same variables), or slurm."""

    def __post_init__(self) -> None:
        fits = 0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size
        if not fits or self.local_world_size > self.world_size:
            raise TrainingError(
                "E-WORLD",
                "the launcher's variables contradict each other",
                f"rank {self.rank} of {self.world_size}, local rank {self.local_rank} of "
                f"{self.local_world_size}",
                "start all processes through one launcher: torchrun, accelerate launch, "
                "deepspeed or srun",
            )


def find_launch(variables: Mapping[str, str] | None = None) -> Launch:
    """Return this process's place from the variables its launcher has set.

    torchrun, `accelerate launch` and `deepspeed` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT; `srun` sets SLURM_PROCID and others for its tasks. Without any of them the process
    is alone.

    Args:
        variables: The environment; that of the process where not given.

    Raises:
        TrainingError: E-WORLD if a variable is missing or two contradict each other.

    Example:
        >>> find_launch({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}).local_world_size
        2
    """
    env = os.environ if variables is None else variables
    if "RANK" in env or "WORLD_SIZE" in env:
        return _torchrun(env)
    # A plain `python` inside an allocation has these too, but only srun sets a step's task count.
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _slurm(env)
    return Launch()


def _torchrun(env: Mapping[str, str]) -> Launch:
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    local = int(env.get("LOCAL_RANK", "0" if size == 1 else str(rank)))
    return Launch(
        rank=rank,
        world_size=size,
        local_rank=local,
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", str(size))),
        address=env.get("MASTER_ADDR", "127.0.0.1"),
        port=int(env.get("MASTER_PORT", str(_RENDEZVOUS_PORT))),
        launcher="torchrun",
    )


def _slurm(env: Mapping[str, str]) -> Launch:
    size = _number(env, "SLURM_STEP_NUM_TASKS")
    nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    first = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
    # Two jobs on one node must not meet: the job's number decides the port where none is given.
    port = 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
    return Launch(
        rank=_number(env, "SLURM_PROCID"),
        world_size=size,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_world_size=_tasks_here(env, size, nodes),
        address=env.get("MASTER_ADDR", first_host(first)),
        port=int(env.get("MASTER_PORT", str(port))),
        launcher="slurm",
    )


def _tasks_here(env: Mapping[str, str], size: int, nodes: int) -> int:
    """Return the tasks on this node from a list such as "4(x2),3"."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else -(-size // nodes)


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm list.

    Example:
        >>> first_host("gpu[003-007,012],login1")
        'gpu003'
    """
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^,]*)", nodes)
    if match is None:
        return nodes
    name, ranges, rest = match[1], match[2], match[3]
    return name + (re.split(r"[-,]", ranges)[0] + rest if ranges else "")


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError) as error:
        raise TrainingError(
            "E-WORLD",
            "the launcher's variables are incomplete",
            f"{name}={env.get(name)!r} is not a number",
            "start all processes through one launcher: torchrun, accelerate launch, deepspeed or "
            "srun; for a single process unset RANK and WORLD_SIZE",
        ) from error
