"""DeepSpeed's settings from the model and the machine, past what its defaults do. Torch-free.

Each rule names the trap of DeepSpeed 0.19 that it avoids; the README lists them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyzoo.core.errors import ConfigError
from polyzoo.training.config import TrainConfig

SUB_GROUP = 100_000_000  # DeepSpeed's 1e9 takes 16 to 24 GB of pinned buffers with a drive
BUCKET, MOST_BUCKET = 50_000_000, 200_000_000
LIVE_DEFAULT = 1_000_000_000
PARAMETER_BUFFERS = 16
PIPELINED_BUFFERS = 12  # fewer fail with a bare AssertionError
_AIO_MINIMUM = 1 << 20  # smaller tensors stay in host memory
_AIO_KEYS = {
    "block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events",
    "use_gds",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """What the settings depend on, in elements."""

    trainable: int
    largest_parameter: int
    largest_block: int
    """Parameters of the largest part that is gathered as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """Where a zero3 strategy keeps things."""

    parameters: str
    optimizer: str

    @property
    def uses_drive(self) -> bool:
        """Whether anything is on a drive."""
        return "nvme" in (self.parameters, self.optimizer)


OFFLOADS: Mapping[str, Offload] = {
    "zero3": Offload(parameters="none", optimizer="none"),
    "zero3-opt-cpu": Offload(parameters="none", optimizer="cpu"),
    "zero3-cpu": Offload(parameters="cpu", optimizer="cpu"),
    "zero3-opt-nvme": Offload(parameters="none", optimizer="nvme"),
    "zero3-nvme": Offload(parameters="nvme", optimizer="nvme"),
}


def build_settings(
    strategy: str,
    sizes: ModelSizes,
    config: TrainConfig,
    *,
    world: int,
    dtype: str,
    live_parameters: int | None = None,
) -> dict[str, Any]:
    """Return DeepSpeed's settings.

    Args:
        strategy: One of OFFLOADS.
        sizes: Of the model.
        config: Of the run.
        world: Number of processes.
        dtype: bf16, fp16 or fp32.
        live_parameters: Elements that may stay gathered on the GPU between their uses.
    """
    offload = OFFLOADS[strategy]
    bucket = config.tier.bucket_size or bucket_elements(sizes.largest_parameter)
    live = 0 if offload.parameters == "nvme" else (live_parameters or LIVE_DEFAULT)
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket_elements(sizes.largest_block),
        "stage3_param_persistence_threshold": 100_000,
        # With parameters on a drive, whatever stays gathered keeps its swap buffer, and they run
        # out: "Not enough buffers 0 for swapping 1".
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
    }
    if offload.optimizer != "none":
        zero["sub_group_size"] = _sub_group(sizes, config, world)
        zero["offload_optimizer"] = _optimizer_settings(offload, config)
    if offload.parameters != "none":
        zero["offload_param"] = _parameter_settings(offload, sizes, config, world)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.grad_accum,
        "train_batch_size": config.batch_size * config.grad_accum * world,
        "gradient_clipping": config.grad_clip or 0.0,
        "zero_optimization": zero,
        # Our optimizers are not on DeepSpeed's lists.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
    }
    if config.grad_accum > 1 and dtype == "bf16":
        # Sums of many bf16 gradients would lose their last bits.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if offload.uses_drive:
        settings["aio"] = {
            "block_size": 8 << 20,
            "queue_depth": 32,
            # Recipes say thread_count, which is ignored without a word.
            "intra_op_parallelism": 4,
            "single_submit": False,
            "overlap_events": True,
        }
    return merged(settings, config.tier.extra)


def bucket_elements(wanted: int) -> int:
    """Return elements gathered or reduced at a time: what is wanted, within bounds."""
    return min(max(BUCKET, wanted), MOST_BUCKET)


def _sub_group(sizes: ModelSizes, config: TrainConfig, world: int) -> int:
    if config.tier.sub_group_size is not None:
        return config.tier.sub_group_size
    share = -(-sizes.trainable // world)
    return max(_AIO_MINIMUM, min(SUB_GROUP, share // 4))


def _drive_folder(config: TrainConfig) -> str:
    folder = config.tier.nvme_path or Path(config.run_dir) / "nvme"
    return str(Path(folder).absolute())


def _optimizer_settings(offload: Offload, config: TrainConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"device": offload.optimizer, "pin_memory": config.tier.pin_memory}
    if offload.optimizer == "nvme":
        values |= {
            "nvme_path": _drive_folder(config),
            "buffer_count": PIPELINED_BUFFERS,
            "pipeline_read": True,
            "pipeline_write": True,
            "fast_init": False,
        }
    return values


def _parameter_settings(
    offload: Offload, sizes: ModelSizes, config: TrainConfig, world: int
) -> dict[str, Any]:
    values: dict[str, Any] = {"device": offload.parameters, "pin_memory": config.tier.pin_memory}
    if offload.parameters == "nvme":
        shard = -(-sizes.largest_parameter // world)
        values |= {
            "nvme_path": _drive_folder(config),
            # A gathered layer and those behind it; each buffer takes the largest shard.
            "buffer_count": PARAMETER_BUFFERS,
            "buffer_size": max(shard + 1024, _AIO_MINIMUM),
            # The default keeps models below 1e9 parameters in host memory in spite of "nvme".
            "max_in_cpu": 0,
        }
    return values


def merged(settings: dict[str, Any], extra: Path | None) -> dict[str, Any]:
    """Return the settings with those of a JSON file over them.

    Raises:
        ConfigError: The file is not an object, or names an aio setting that DeepSpeed would drop
            without a word.
    """
    if extra is None:
        return settings
    try:
        given = json.loads(Path(extra).read_bytes())
    except ValueError as error:
        raise ConfigError(f"tier.extra={extra}: not JSON ({error})") from error
    if not isinstance(given, dict):
        raise ConfigError(f"tier.extra={extra}: holds a {type(given).__name__}, not an object")
    unknown = sorted(set(given.get("aio", {})) - _AIO_KEYS)
    if unknown:
        hint = " (its name is intra_op_parallelism)" if "thread_count" in unknown else ""
        raise ConfigError(
            f"tier.extra={extra}: aio has no {', '.join(unknown)}{hint}; "
            f"known: {', '.join(sorted(_AIO_KEYS))}"
        )
    return _over(settings, given)


def _over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _over(result[key], value) if nested else value
    return result
