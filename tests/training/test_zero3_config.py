"""DeepSpeed's traps that settings avoid, one by one; none of this needs DeepSpeed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from polyzoo.core.errors import ConfigError
from polyzoo.training import TrainConfig
from polyzoo.training.config import TierConfig
from polyzoo.training.strategies.zero3 import mend_architectures
from polyzoo.training.strategies.zero3_config import OFFLOADS, ModelSizes, build_settings

GPT = ModelSizes(trainable=2_560_000_000, largest_parameter=26_214_400, largest_block=78_643_200)


def made(strategy: str, tier: TierConfig | None = None, world: int = 1, **changes: Any) -> Any:
    config = TrainConfig(run_dir=Path("runs/x"), batch_size=4, tier=tier or TierConfig())
    return build_settings(
        strategy, GPT, dataclasses.replace(config, **changes), world=world, dtype="bf16"
    )


def zero(strategy: str, **named: Any) -> Any:
    return made(strategy, **named)["zero_optimization"]


def test_gathered_parameters_never_hold_the_drives_buffers() -> None:  # 6
    assert zero("zero3-nvme")["stage3_max_live_parameters"] == 0
    assert zero("zero3-nvme")["stage3_max_reuse_distance"] == 0
    assert zero("zero3-cpu")["stage3_max_live_parameters"] > 0


@pytest.mark.parametrize("world", [1, 3])
def test_a_buffer_takes_the_largest_shard(world: int) -> None:  # 7
    shard = -(-GPT.largest_parameter // world)
    assert zero("zero3-nvme", world=world)["offload_param"]["buffer_size"] >= shard


def test_pipelined_drives_have_their_twelve_buffers() -> None:  # 8
    drive = zero("zero3-opt-nvme")["offload_optimizer"]
    assert drive["pipeline_read"]
    assert drive["pipeline_write"]
    assert drive["buffer_count"] >= 12
    assert not drive["fast_init"]


def test_nvme_means_nvme_for_small_models() -> None:  # 9
    assert zero("zero3-nvme")["offload_param"]["max_in_cpu"] == 0


@pytest.mark.parametrize("strategy", ["zero3-cpu", "zero3-nvme"])
def test_sub_groups_stay_small(strategy: str) -> None:  # 10
    assert zero(strategy)["sub_group_size"] <= 100_000_000
    small = dataclasses.replace(GPT, trainable=40_000_000)
    config = TrainConfig(run_dir=Path("runs/x"))
    settings = build_settings(strategy, small, config, world=1, dtype="bf16")
    assert settings["zero_optimization"]["sub_group_size"] == 10_000_000


def test_aio_threads_are_called_by_their_name(tmp_path: Path) -> None:  # 11
    settings = made("zero3-nvme")["aio"]
    assert settings["intra_op_parallelism"] > 1
    assert "thread_count" not in settings
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"aio": {"thread_count": 8}}))
    with pytest.raises(ConfigError, match=r"no thread_count \(its name is intra_op_parallelism"):
        made("zero3-nvme", TierConfig(extra=extra))


def test_pinning_can_be_switched_off() -> None:  # 17
    values = zero("zero3-cpu", tier=TierConfig(pin_memory=False))
    assert values["offload_optimizer"]["pin_memory"] is False
    assert values["offload_param"]["pin_memory"] is False


def test_architectures_with_letters_are_mended() -> None:
    assert mend_architectures("9.0a") == "9.0"
    assert mend_architectures("8.0;9.0a+PTX 10.0f") == "8.0;9.0+PTX;10.0"
    assert mend_architectures("7.5") == "7.5"


def test_sums_of_many_gradients_are_fp32() -> None:
    assert "data_types" not in made("zero3")
    assert made("zero3", grad_accum=4)["data_types"] == {"grad_accum_dtype": "fp32"}


def test_batches_add_up() -> None:
    settings = made("zero3", grad_accum=3, world=2)
    assert settings["train_batch_size"] == 4 * 3 * 2
    assert settings["gradient_clipping"] == 1.0
    assert made("zero3", grad_clip=None)["gradient_clipping"] == 0.0


@pytest.mark.parametrize("strategy", OFFLOADS)
def test_where_things_are(strategy: str) -> None:
    values = zero(strategy)
    assert values["stage"] == 3
    offload = OFFLOADS[strategy]
    assert values.get("offload_optimizer", {}).get("device", "none") == offload.optimizer
    assert values.get("offload_param", {}).get("device", "none") == offload.parameters
    assert ("aio" in made(strategy)) == offload.uses_drive


def test_extra_settings_go_over_ours(tmp_path: Path) -> None:
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"zero_optimization": {"overlap_comm": False}, "prescale": 1}))
    settings = made("zero3-cpu", TierConfig(extra=extra))
    assert settings["zero_optimization"]["overlap_comm"] is False
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["prescale"] == 1
    extra.write_text("[]")
    with pytest.raises(ConfigError, match="not an object"):
        made("zero3-cpu", TierConfig(extra=extra))
    extra.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        made("zero3-cpu", TierConfig(extra=extra))
