"""Who am I among the processes, from the variables of every launcher."""

from __future__ import annotations

import pytest

from polyzoo.training.errors import TrainingError
from polyzoo.training.launch import Launch, find_launch, first_host
from polyzoo.training.strategies.choose import check_launch, needs_group
from polyzoo.training.world import share_cores

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host0", "MASTER_PORT": "29511",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "41234",
}  # fmt: skip


def test_without_variables_a_process_is_alone() -> None:
    assert find_launch({}) == Launch()
    # A plain python inside a Slurm allocation is no task of several.
    assert find_launch({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) == Launch()


def test_torchrun_accelerate_and_deepspeed() -> None:
    launch = find_launch(TORCHRUN)
    assert (launch.rank, launch.world_size) == (5, 8)
    assert (launch.local_rank, launch.local_world_size) == (1, 4)
    assert (launch.address, launch.port, launch.launcher) == ("host0", 29511, "torchrun")


def test_slurm() -> None:
    launch = find_launch(SLURM)
    assert (launch.rank, launch.world_size, launch.local_rank) == (5, 6, 1)
    assert (launch.local_world_size, launch.address, launch.port) == (2, "gpu07", 21234)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-08]", "gpu07"), ("a,b", "a"), ("rack1-n[1,4-6]-ib", "rack1-n1-ib"), ("one", "one"),
    ],
)  # fmt: skip
def test_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "two"},
        {**TORCHRUN, "LOCAL_RANK": "4"},
    ],
)
def test_contradictions_are_refused(variables: dict[str, str]) -> None:
    with pytest.raises(TrainingError, match="E-WORLD"):
        find_launch(variables)


def test_a_share_of_the_cores() -> None:
    everything = share_cores(Launch())
    half = Launch(world_size=2, local_world_size=2)
    assert share_cores(half) == max(1, everything // 2)


def test_single_is_for_one_process() -> None:
    check_launch("single", Launch())
    check_launch("ddp", find_launch(TORCHRUN))
    with pytest.raises(TrainingError, match="E-WORLD: strategy=single cannot use 8"):
        check_launch("single", find_launch(TORCHRUN))
    assert not needs_group("auto")
    assert needs_group("zero3-cpu")
