"""The whole model on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.training.checkpoint.flat import BUFFER, EMA, MASTER, FlatReader, Shard, whole
from polyzoo.training.config import TrainConfig
from polyzoo.training.ema import Master
from polyzoo.training.footprint import memory_report
from polyzoo.training.optim import ParamGroups, build_optimizer, set_learning_rate
from polyzoo.training.precision import compute_dtype, forward_context, keep_masters_fp32
from polyzoo.training.strategies.base import UpdateReport
from polyzoo.training.strategies.torch_state import (
    fits_optimizer,
    persistent_buffers,
    plain_state,
)
from polyzoo.training.world import World


class SingleDevice:
    """Trains in one process on one device; autocast in front of fp32 weights."""

    name = "single"
    is_whole = True

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        world: World,
        param_groups: ParamGroups | None = None,
    ) -> None:
        self.world = world
        self.device = device
        self.dtype = compute_dtype(config.precision, device)
        self.grad_clip = config.grad_clip
        self.skips_bad_steps = config.nan_policy == "skip"
        keep_masters_fp32(model)
        self.model = self.module = model.to(device)
        self.optimizer = build_optimizer(self.module, config.optim, param_groups)
        self.scaler = torch.amp.GradScaler(device.type) if self.dtype == torch.float16 else None
        self._trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def forward_context(self) -> AbstractContextManager[object]:
        """Return the autocast context of a forward pass."""
        return forward_context(self.dtype, self.device)

    def call_method(self, model: Any, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the model other than forward."""
        return getattr(model, method)(*arguments, **named)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; nothing is exchanged, so `last` changes nothing."""
        del last
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    @torch.no_grad()
    def optimizer_step(self, *, lr: float, loss: Tensor, divisor: Tensor | float) -> UpdateReport:
        """Divide the gradients, clip them, update the weights and clear the gradients."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._trainable.values() if p.grad is not None]
        norm = self._rescale(gradients, divisor)
        # With a loss scaler, gradients overflow now and then by design and the scaler skips them.
        watched = loss if self.scaler else loss + norm
        bad = torch.isfinite(watched).logical_not().float()
        set_learning_rate(self.optimizer, lr)
        self._update(bad)
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateReport(norm, bad)

    def _rescale(self, gradients: list[Tensor], divisor: Tensor | float) -> Tensor:
        """Divide and clip in one pass over the gradients; return the norm before clipping."""
        norm = torch.nn.utils.get_total_norm(gradients).to(self.device) / divisor
        if self.grad_clip is not None:
            scale = torch.clamp(self.grad_clip / (norm + 1e-6), max=1.0) / divisor
        elif isinstance(divisor, Tensor) or divisor != 1.0:
            scale = torch.as_tensor(1 / divisor, device=self.device)
        else:
            return norm
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def _update(self, bad: Tensor) -> None:
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # Fused optimizers leave weights and moments alone where found_inf is 1, on the device,
            # so a bad step costs no wait and does no harm before it is reported.
            self.optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        elif not (self.skips_bad_steps and bad.item()):
            # Others can only skip by decision of the host: one wait per step, if asked for.
            self.optimizer.step()

    def parameters_without_gradient(self) -> list[str]:
        """Return the trainable parameters that the backward pass has not reached."""
        return [name for name, p in self._trainable.items() if p.grad is None]

    def master_groups(self) -> Iterator[list[Master]]:
        """Yield the fp32 weights: here the parameters themselves, at once."""
        yield [Master(name, parameter) for name, parameter in self._trainable.items()]

    def local_shards(self) -> Iterator[Shard]:
        """Return trainable parameters, their optimizer state, and persistent buffers, whole."""
        for name, parameter in self._trainable.items():
            yield whole(MASTER, name, parameter)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    yield whole(key, name, value)
        for name, value in persistent_buffers(self.module).items():
            yield whole(BUFFER, name, value)

    def plain_state(self) -> dict[str, Any]:
        """Return scalar optimizer state, values of the optimizer's groups, and the loss scale."""
        return plain_state(self.optimizer, self._trainable, self.scaler)

    @torch.no_grad()
    def load_shards(self, reader: FlatReader, state: dict[str, Any]) -> None:
        """Take weights, optimizer state and buffers from a checkpoint that was found to fit."""
        for name, parameter in self._trainable.items():
            parameter.copy_(reader.tensor(MASTER, name))
        for name, value in persistent_buffers(self.module).items():
            value.copy_(reader.tensor(BUFFER, name))
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if fits_optimizer(self.optimizer, state):
            self._load_optimizer(reader, state)

    def _load_optimizer(self, reader: FlatReader, state: dict[str, Any]) -> None:
        own = self.optimizer.state_dict()
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = {parameter: name for name, parameter in self._trainable.items()}
        loaded: dict[int, dict[str, Any]] = {}
        for index, parameter in enumerate(order):
            name = names[parameter]
            keys = [key for key in reader.states(name) if key not in (MASTER, BUFFER, EMA)]
            entry = {key: reader.tensor(key, name) for key in keys}
            entry.update(state["scalars"].get(name, {}))
            if entry:
                loaded[index] = entry
        for group, values in zip(own["param_groups"], state["groups"], strict=True):
            group.update(values)
        self.optimizer.load_state_dict({"state": loaded, "param_groups": own["param_groups"]})

    def memory_report(self) -> dict[str, float]:
        """Return peak bytes in use on the device and in host memory."""
        return memory_report(self.device)

    def close(self) -> None:
        """Nothing outlives the run."""
