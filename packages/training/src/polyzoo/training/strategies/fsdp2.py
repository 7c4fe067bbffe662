"""Every parameter split by rows over the processes (torch's FSDP2), on GPUs or in host memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from polyzoo.training.checkpoint.flat import BUFFER, EMA, MASTER, FlatReader, Shard, whole
from polyzoo.training.config import TrainConfig
from polyzoo.training.ema import Master
from polyzoo.training.footprint import memory_report
from polyzoo.training.optim import ParamGroups, build_optimizer, set_learning_rate
from polyzoo.training.precision import compute_dtype, forward_context, keep_masters_fp32
from polyzoo.training.strategies.base import UpdateReport
from polyzoo.training.strategies.blocks import shard_blocks
from polyzoo.training.strategies.torch_state import (
    fits_optimizer,
    persistent_buffers,
    plain_state,
)
from polyzoo.training.world import World


class FullySharded:
    """FSDP2 over all processes; with `offload`, shards and optimizer live in host memory."""

    is_whole = False

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        world: World,
        param_groups: ParamGroups | None = None,
        *,
        offload: bool,
    ) -> None:
        self.name = "fsdp2-cpu" if offload else "fsdp2"
        self.world = world
        self.device = device
        self.dtype = compute_dtype(config.precision, device)
        self.grad_clip = config.grad_clip
        self.skips_bad_steps = config.nan_policy == "skip"
        self.scaler = torch.amp.GradScaler(device.type) if self.dtype == torch.float16 else None
        keep_masters_fp32(model)
        self._shard(model, config, offload=offload)
        self.model = self.module = model
        self.optimizer = build_optimizer(model, config.optim, param_groups)
        self._trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._methods: set[str] = set()

    def _shard(self, model: nn.Module, config: TrainConfig, *, offload: bool) -> None:
        mesh = init_device_mesh(self.device.type, (self.world.size,))
        pin = config.tier.pin_memory and self.device.type == "cuda"
        policy = CPUOffloadPolicy(pin_memory=pin) if offload else OffloadPolicy()
        if not offload:
            model.to(self.device)
        half = None if self.dtype == torch.float32 else self.dtype
        precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        for block in shard_blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=policy)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)

    def forward_context(self) -> AbstractContextManager[object]:
        """Return the autocast context of a forward pass."""
        return forward_context(self.dtype, self.device)

    def call_method(self, model: Any, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the model other than forward, with its parameters gathered."""
        if model is self.module and method not in self._methods:
            register_fsdp_forward_method(self.model, method)
            self._methods.add(method)
        return getattr(model, method)(*arguments, **named)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; with the last one they are summed and split."""
        assert isinstance(self.model, FSDPModule)  # noqa: S101 - made so above
        self.model.set_requires_gradient_sync(last)
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    @torch.no_grad()
    def optimizer_step(self, *, lr: float, loss: Tensor, divisor: Tensor | float) -> UpdateReport:
        """Divide the gradients, clip them, update the weights and clear the gradients."""
        gradients = [_local(p.grad) for p in self._trainable.values() if p.grad is not None]
        scale = self.scaler.get_scale() if self.scaler else 1.0
        norm = self._norm(gradients) / (divisor * scale)
        watched = loss if self.scaler else loss + norm
        bad = torch.isfinite(watched).logical_not().float()
        overflow = self.scaler is not None and not bool(torch.isfinite(norm))
        factor = 1 / (divisor * scale)
        if self.grad_clip is not None:
            factor = factor * torch.clamp(self.grad_clip / (norm + 1e-6), max=1.0)
        self._scale(gradients, factor)
        set_learning_rate(self.optimizer, lr)
        # Every process must take the same turn; the norm is the same in all of them.
        if not overflow and not bool(bad):
            self.optimizer.step()
        if self.scaler:
            self.scaler.update(scale * (0.5 if overflow else 1.0))
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateReport(norm, bad)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        squares = torch.zeros((), device=self.device)
        if gradients:
            squares += torch.nn.utils.get_total_norm(gradients).to(self.device).square()
        return self.world.total(squares).sqrt()

    def _scale(self, gradients: list[Tensor], factor: Tensor | float) -> None:
        if not gradients:
            return
        if isinstance(factor, Tensor):
            factor = factor.to(gradients[0].device)
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType, reportCallIssue]

    def parameters_without_gradient(self) -> list[str]:
        """Return the trainable parameters that the backward pass has not reached."""
        return [name for name, p in self._trainable.items() if p.grad is None]

    def master_groups(self) -> Iterator[list[Master]]:
        """Yield the rows of the fp32 weights held here."""
        yield [
            Master(name, local, start, tuple(parameter.shape))
            for name, parameter in self._trainable.items()
            for local, start in [_rows(parameter)]
        ]

    def local_shards(self) -> Iterator[Shard]:
        """Return rows of trainable parameters and of their optimizer state, and buffers, whole."""
        for name, parameter in self._trainable.items():
            local, start = _rows(parameter)
            shape = tuple(parameter.shape)
            yield Shard(MASTER, name, start, shape, local.reshape(-1))
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    yield Shard(key, name, start, shape, _local(value).reshape(-1))
        for name, value in persistent_buffers(self.model).items():
            yield whole(BUFFER, name, value)

    def plain_state(self) -> dict[str, Any]:
        """Return scalar optimizer state and the loss scale."""
        return plain_state(self.optimizer, self._trainable, self.scaler)

    @torch.no_grad()
    def load_shards(self, reader: FlatReader, state: dict[str, Any]) -> None:
        """Take the rows held here from a checkpoint that was found to fit."""
        for name, parameter in self._trainable.items():
            local, start = _rows(parameter)
            local.copy_(reader.values(MASTER, name, start, local.numel()).reshape(local.shape))
        for name, value in persistent_buffers(self.model).items():
            value.copy_(reader.tensor(BUFFER, name))
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if fits_optimizer(self.optimizer, state):
            for name, parameter in self._trainable.items():
                self._load_optimizer(reader, state, name, parameter)

    def _load_optimizer(
        self, reader: FlatReader, state: dict[str, Any], name: str, parameter: nn.Parameter
    ) -> None:
        local, start = _rows(parameter)
        entry: dict[str, Any] = {}
        for key in reader.states(name):
            if key in (MASTER, BUFFER, EMA):
                continue
            stored = reader.values(key, name, start, local.numel()).reshape(local.shape)
            values = torch.zeros_like(parameter)
            _local(values).copy_(stored)
            entry[key] = values
        for key, value in state["scalars"].get(name, {}).items():
            on_device = isinstance(value, Tensor) and local.device.type == "cuda"
            entry[key] = value.to(local.device) if on_device else value
        if entry:
            self.optimizer.state[parameter] = entry

    def memory_report(self) -> dict[str, float]:
        """Return peak bytes in use on the device and in host memory."""
        return memory_report(self.device)

    def close(self) -> None:
        """Nothing outlives the run."""


def _local(value: Tensor | None) -> Tensor:
    assert value is not None  # noqa: S101 - asked for before
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def _rows(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """Return the rows of a parameter held here, and the index of their first value."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    local = parameter.to_local().detach()
    rows = parameter.shape[0] if parameter.ndim else 1
    row = math.prod(parameter.shape[1:])
    # FSDP2 gives each process ceil(rows / processes) rows, the last ones fewer or none.
    each = -(-rows // parameter.device_mesh.size())
    return local, min(parameter.device_mesh.get_local_rank() * each, rows) * row
