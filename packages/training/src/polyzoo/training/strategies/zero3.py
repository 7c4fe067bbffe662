"""ZeRO-3 through DeepSpeed: everything in pieces, on the GPU, in host memory or on a drive."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.log import get_logger
from polyzoo.core.seeding import capture_random_state, restore_random_state
from polyzoo.training.checkpoint.flat import BUFFER, MASTER, FlatReader, Shard, whole
from polyzoo.training.config import TrainConfig
from polyzoo.training.doctor import check_libaio
from polyzoo.training.drive import check_drive
from polyzoo.training.ema import Master
from polyzoo.training.errors import TrainingError
from polyzoo.training.footprint import memory_report
from polyzoo.training.optim import ParamGroups, build_optimizer, set_learning_rate
from polyzoo.training.precision import compute_dtype, forward_context
from polyzoo.training.strategies.base import UpdateReport
from polyzoo.training.strategies.blocks import full_size, shard_blocks
from polyzoo.training.strategies.host_adamw import HostAdamW
from polyzoo.training.strategies.zero3_config import OFFLOADS, ModelSizes, build_settings
from polyzoo.training.world import World, share_cores

logger = get_logger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SUPPORTED = ("0.19.",)
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_LIVE_SHARE = 0.25  # of the GPU, for parameters that stay gathered between their uses


def import_deepspeed(device: torch.device) -> Any:
    """Return DeepSpeed, set up so that it neither guesses the device nor talks on stdout.

    Raises:
        TrainingError: E-DS-MISSING or E-DS-VERSION.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise TrainingError(
            "E-DS-MISSING",
            "the zero3 strategies need DeepSpeed, which is not installed",
            "no module named deepspeed",
            'pip install "polyzoo-training[deepspeed]", or use fsdp2 or fsdp2-cpu',
        )
    version = metadata.version("deepspeed")
    if not version.startswith(_SUPPORTED):
        raise TrainingError(
            "E-DS-VERSION",
            f"DeepSpeed {version} is not supported",
            f"its inner parts are known for {', '.join(_SUPPORTED)}x",
            'pip install "deepspeed>=0.19,<0.20"',
        )
    if device.type != "cuda":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    _mend_architectures()
    # DeepSpeed calls what newer versions of torch have renamed, at every reduction.
    warnings.filterwarnings("ignore", message=".*_tensor.? is deprecated", category=FutureWarning)
    import deepspeed  # pyright: ignore[reportMissingImports]
    import deepspeed.runtime.torch_autocast as autocast  # pyright: ignore[reportMissingImports]

    autocast._WARNED_NESTED_AUTOCAST = True  # we enter it again inside of the engine

    deepspeed.utils.logger.setLevel(os.environ["DEEPSPEED_LOG_LEVEL"].upper())
    if device.type != "cuda":
        # Collectives over shared memory would compile for minutes; gloo is there already.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _mend_architectures() -> None:
    """Drop the letters of TORCH_CUDA_ARCH_LIST=9.0a, which DeepSpeed's op builder cannot read."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        mended = mend_architectures(given)
        if mended != given:
            logger.info("TORCH_CUDA_ARCH_LIST: %s in place of %s, for DeepSpeed", mended, given)
            os.environ["TORCH_CUDA_ARCH_LIST"] = mended


def mend_architectures(given: str) -> str:
    """Return a list of CUDA architectures without the letters of their variants.

    Example:
        >>> mend_architectures("8.0;9.0a+PTX")
        '8.0;9.0+PTX'
    """
    parts = given.replace(" ", ";").split(";")
    plain = []
    for part in parts:
        number, plus, rest = part.partition("+")
        plain.append(number.rstrip("abcdefghijklmnopqrstuvwxyz") + plus + rest)
    return ";".join(part for part in plain if part)


class Handle:
    """What a step function calls in the model's place; attributes are the model's."""

    def __init__(self, engine: Any, model: nn.Module) -> None:
        self._engine = engine
        self._model = model

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run the model's forward pass."""
        return self._engine(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model."""
        return getattr(self._model, name)


class ZeroThree:
    """A DeepSpeed engine; what it offloads is in its name."""

    is_whole = False

    def __init__(
        self,
        build: Callable[[], nn.Module],
        name: str,
        config: TrainConfig,
        device: torch.device,
        world: World,
        param_groups: ParamGroups | None = None,
    ) -> None:
        deepspeed = import_deepspeed(device)
        self.name = name
        self.config = config
        self.world = world
        self.device = device
        self.dtype = compute_dtype(config.precision, device)
        self.offload = OFFLOADS[name]
        _refuse_other_optimizer(config, name)
        os.environ.setdefault("LOCAL_RANK", str(world.launch.local_rank))  # it insists
        deepspeed.init_distributed(verbose=False)
        self.drive = self._prepare_drive()
        model, first_weights = self._build(deepspeed, build)
        self.model = model
        self._names = {p: n for n, p in model.named_parameters()}
        self._forward = model.forward
        self._route: str | None = None
        model.forward = self._dispatch
        self.engine = self._start(deepspeed, model, param_groups)
        self.optimizer = self.engine.optimizer
        self._ids = {p.ds_id: n for p, n in self._names.items()}  # pyright: ignore[reportAttributeAccessIssue]
        self.module = Handle(self.engine, model)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        if first_weights:
            self._set_masters(first_weights)

    # --- construction ---------------------------------------------------------------------------

    def _build(
        self, deepspeed: Any, build: Callable[[], nn.Module]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the model, and its weights before they were rounded to the compute dtype."""
        if self.config.tier.sharded_init:
            states = capture_random_state()
            with torch.device("meta"):
                settings = self._settings(sizes_of(build()))
            restore_random_state(states)
            with deepspeed.zero.Init(config_dict_or_path=settings):
                return build(), {}
        model = build()
        rounded = self.dtype != torch.float32
        kept = {
            name: parameter.detach().float().cpu().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and rounded
        }
        return model, kept

    def _settings(self, sizes: ModelSizes) -> dict[str, Any]:
        live = None
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            live = int(min(sizes.trainable, _LIVE_SHARE * total / 2))
        return build_settings(
            self.name, sizes, self.config,
            world=self.world.size, dtype=_DTYPE_NAMES[self.dtype], live_parameters=live,
        )  # fmt: skip

    def _start(self, deepspeed: Any, model: nn.Module, param_groups: ParamGroups | None) -> Any:
        from polyzoo.training.strategies.stage3 import in_place_of_deepspeeds

        optimizer = self._build_optimizer(model, param_groups)
        sizes = sizes_of(model)
        if self.drive is not None:
            drive, needed = self.drive, self._drive_bytes(sizes)
            self.world.main_only(lambda: check_drive(drive, needed=needed))
        tier = self.config.tier
        with in_place_of_deepspeeds(overlap=tier.overlap):
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=self._settings(sizes)
            )
        return engine

    def _build_optimizer(
        self, model: nn.Module, param_groups: ParamGroups | None
    ) -> torch.optim.Optimizer:
        optim = self.config.optim
        plain = build_optimizer(model, optim, param_groups)
        if self.offload.optimizer == "none":
            return plain
        groups = [
            {key: group[key] for key in ("params", "weight_decay", "lr_scale")}
            for group in plain.param_groups
        ]
        if self.config.tier.host_optimizer == "deepspeed":
            from deepspeed.ops.adam import (  # pyright: ignore[reportMissingImports]
                DeepSpeedCPUAdam,
            )

            return DeepSpeedCPUAdam(
                groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True
            )
        threads = self.config.tier.host_threads or share_cores(self.world.launch)
        return HostAdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, threads=threads)

    def _drive_bytes(self, sizes: ModelSizes) -> int:
        """Return what this node's drive takes: weights, moments and gradients in fp32, and more."""
        each = 16 + (self.dtype.itemsize if self.offload.parameters == "nvme" else 0)
        return each * sizes.trainable * self.world.launch.local_world_size // self.world.size

    def _prepare_drive(self) -> Path | None:
        if not self.offload.uses_drive:
            return None
        folder = Path(self.config.tier.nvme_path or Path(self.config.run_dir) / "nvme")

        def check() -> None:
            check_libaio()
            check_drive(folder)

        self.world.main_only(check)
        return folder

    # --- steps ----------------------------------------------------------------------------------

    def _dispatch(self, *arguments: Any, **named: Any) -> Any:
        route, self._route = self._route, None
        # The engine switches autocast off, and would then refuse fp32 inputs beside 16-bit weights.
        with forward_context(self.dtype, self.device):
            if route is None:
                return self._forward(*arguments, **named)
            return getattr(self.model, route)(*arguments, **named)

    def call_method(self, model: Any, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the model other than forward, with the hooks of a forward pass."""
        if model is not self.module:
            return getattr(model, method)(*arguments, **named)
        self._route = method
        return self.engine(*arguments, **named)

    def forward_context(self) -> AbstractContextManager[object]:
        """Return the autocast context of a forward pass."""
        # A step that calls only methods of submodules must still count as a new micro-batch.
        self.optimizer.clear_backward_seen_flag()
        return forward_context(self.dtype, self.device)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; the last one brings them to the optimizer."""
        self.optimizer.finish()  # of what no layer has asked for; its gradients come next
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def optimizer_step(self, *, lr: float, loss: Tensor, divisor: Tensor | float) -> UpdateReport:
        """Divide the gradients, clip them, update the weights and clear the gradients."""
        self.optimizer.divisor = float(divisor)
        set_learning_rate(self.optimizer.optimizer, lr)
        self.engine.step()
        norm = float(self.optimizer._global_grad_norm) / self.optimizer.divisor
        skipped = bool(self.optimizer.overflow)
        norm = float("nan") if skipped and self.dtype != torch.float16 else norm
        bad = (torch.isfinite(loss.detach().float()).logical_not()).float()
        if skipped and self.dtype != torch.float16:
            bad = torch.ones_like(bad)
        return UpdateReport(torch.tensor(norm), bad)

    def parameters_without_gradient(self) -> list[str]:
        """Return nothing: gradients leave the parameters as they come."""
        return []

    # --- weights --------------------------------------------------------------------------------

    def _set_masters(self, weights: dict[str, Tensor]) -> None:
        """Put fp32 weights where DeepSpeed has taken them from rounded ones."""
        for index in range(self.optimizer.sub_groups):
            with self.optimizer.resident(index, changes=True) as flat:
                for piece in self.optimizer.pieces(index, self._ids):
                    source = weights[piece.name].reshape(-1)[piece.start :][: piece.length]
                    flat.data[piece.offset :][: piece.length].copy_(source)
        self.optimizer.gather_persistent()

    def master_groups(self) -> Iterator[list[Master]]:
        """Yield the fp32 weights of one sub-group after another."""
        for index in range(self.optimizer.sub_groups):
            with self.optimizer.resident(index) as flat:
                yield [
                    Master(p.name, flat.data[p.offset :][: p.length], p.start, p.full_shape)
                    for p in self.optimizer.pieces(index, self._ids)
                ]

    def local_shards(self) -> Iterator[Shard]:
        """Return the ranges of weights and moments held here; what is on a drive is read late."""
        reading = _Reading(self.optimizer)
        for index in range(self.optimizer.sub_groups):
            pieces = self.optimizer.pieces(index, self._ids)
            states = [MASTER, *(_MOMENTS if self._has_moments(index) else ())]
            for state in states:
                for piece in pieces:
                    values = torch.empty(piece.length, dtype=torch.float32, device="meta")
                    yield Shard(
                        state, piece.name, piece.start, piece.full_shape, values,
                        read=reading.of(index, state, piece),
                    )  # fmt: skip
        for name, value in self._buffers().items():
            yield whole(BUFFER, name, value)

    def _has_moments(self, index: int) -> bool:
        weights = self.optimizer.fp32_partitioned_groups_flat[index]
        return bool(self.optimizer.state_of(weights))

    def plain_state(self) -> dict[str, Any]:
        """Return the step count of every parameter, and the loss scale."""
        scalars: dict[str, dict[str, Any]] = {}
        for index in range(self.optimizer.sub_groups):
            weights = self.optimizer.fp32_partitioned_groups_flat[index]
            step = self.optimizer.state_of(weights).get("step")
            if step is not None:
                for piece in self.optimizer.pieces(index, self._ids):
                    scalars[piece.name] = {"step": torch.tensor(float(step))}
        scaler = {"scale": float(self.optimizer.loss_scale)} if self.dtype == torch.float16 else {}
        groups = [{} for _ in self.optimizer.optimizer.param_groups]
        return {"optimizer": "AdamW", "scalars": scalars, "groups": groups, "scaler": scaler}

    @torch.no_grad()
    def load_shards(self, reader: FlatReader, state: dict[str, Any]) -> None:
        """Take the ranges held here from a checkpoint that was found to fit."""
        scalars = state["scalars"] if state["optimizer"] == "AdamW" else {}
        for index in range(self.optimizer.sub_groups):
            with self.optimizer.resident(index, changes=True) as flat:
                pieces = self.optimizer.pieces(index, self._ids)
                flat.data.copy_(_flat(reader, MASTER, pieces, flat))
                step = scalars.get(pieces[0].name, {}).get("step")
                if step is not None:
                    moments = {key: _flat(reader, key, pieces, flat) for key in _MOMENTS}
                    self.optimizer.set_state(flat, float(step), moments)
        self.optimizer.gather_persistent()
        for name, value in self._buffers().items():
            value.copy_(reader.tensor(BUFFER, name))
        if state["scaler"] and self.dtype == torch.float16:
            self.optimizer.loss_scaler.cur_scale = state["scaler"]["scale"]

    def _buffers(self) -> dict[str, Tensor]:
        persistent = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.model.named_modules()
            for name in module._buffers
            if name not in module._non_persistent_buffers_set
        }
        return {n: b for n, b in self.model.named_buffers() if n in persistent}

    def memory_report(self) -> dict[str, float]:
        """Return peak bytes on the GPU and in host memory, and bytes on the drive."""
        report = memory_report(self.device)
        if self.drive is not None:
            files = [f for f in self.drive.rglob("*") if f.is_file()]
            report["drive_bytes"] = float(sum(f.stat().st_size for f in files))
        return report

    def close(self) -> None:
        """Give back pinned memory, remove hooks and the files on the drive."""
        self.engine.destroy()
        self.optimizer.close()
        self.model.forward = self._forward
        if self.drive is not None:
            self.world.barrier()
            if self.world.is_main:
                for part in self.drive.glob("zero_stage_3*"):
                    shutil.rmtree(part, ignore_errors=True)


class _Reading:
    """Reads pieces of sub-groups, one sub-group in memory at a time."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._index: int | None = None
        self._held: dict[str, Tensor] = {}

    def of(self, index: int, state: str, piece: Any) -> Callable[[], Tensor]:
        """Return what reads a piece when its turn comes."""

        def read() -> Tensor:
            if self._index != index:
                self._take(index)
            return self._held[state][piece.offset :][: piece.length]

        return read

    def _take(self, index: int) -> None:
        with self.optimizer.resident(index) as weights:
            state = self.optimizer.state_of(weights)
            on_drive = self.optimizer._swappable_optimizer_subgroup(index)
            tensors = {
                MASTER: weights.data,
                **{key: state[key] for key in _MOMENTS if key in state},
            }
            # Buffers of the drive are lent; memory of its own can be read in place.
            self._held = {
                key: value.detach().clone() if on_drive else value.detach()
                for key, value in tensors.items()
            }
        self._index = index


def _flat(reader: FlatReader, state: str, pieces: list[Any], like: Tensor) -> Tensor:
    flat = torch.zeros(like.numel(), dtype=torch.float32)
    for piece in pieces:
        if piece.length:
            flat[piece.offset :][: piece.length] = reader.values(
                state, piece.name, piece.start, piece.length
            )
    return flat


def sizes_of(model: nn.Module) -> ModelSizes:
    """Return the sizes of a model on which DeepSpeed's settings depend."""
    parameters = list(model.parameters())
    blocks = [sum(full_size(p) for p in block.parameters()) for block in shard_blocks(model)]
    return ModelSizes(
        trainable=sum(full_size(p) for p in parameters if p.requires_grad),
        largest_parameter=max(full_size(p) for p in parameters),
        largest_block=max(blocks, default=sum(full_size(p) for p in parameters)),
    )


def _refuse_other_optimizer(config: TrainConfig, name: str) -> None:
    if config.optim.name != "adamw":
        raise TrainingError(
            "E-CONFIG-OPTIMIZER",
            f"strategy={name} cannot use optim.name={config.optim.name!r}",
            "zero3 flattens parameters into groups, and its host step is AdamW's",
            "use optim.name=adamw, or a strategy that is not zero3",
        )
