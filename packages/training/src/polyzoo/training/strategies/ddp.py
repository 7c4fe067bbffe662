"""The whole model in every process; gradients are averaged."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyzoo.training.config import TrainConfig
from polyzoo.training.optim import ParamGroups
from polyzoo.training.strategies.base import UpdateReport
from polyzoo.training.strategies.buckets import BUCKET_ELEMENTS, GradientBuckets
from polyzoo.training.strategies.single import SingleDevice
from polyzoo.training.world import World


class DataParallel(SingleDevice):
    """One device's training in several processes at once, on different samples."""

    name = "ddp"

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        world: World,
        param_groups: ParamGroups | None = None,
    ) -> None:
        super().__init__(model, config, device, world, param_groups)
        self._unreached: list[str] = []
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                dist.broadcast(tensor, src=0)
        self.buckets = GradientBuckets(
            self._trainable.values(), elements=config.tier.bucket_size or BUCKET_ELEMENTS
        )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; with the last one they are averaged."""
        if last:
            self.buckets.expect()
        super().backward(loss, last=last)
        if last:
            self._unreached = super().parameters_without_gradient()
            self.buckets.finish()

    def parameters_without_gradient(self) -> list[str]:
        """Return the trainable parameters that the backward pass has not reached here."""
        return self._unreached

    def optimizer_step(self, *, lr: float, loss: Tensor, divisor: Tensor | float) -> UpdateReport:
        """Divide the gradients, clip them, update the weights and clear the gradients."""
        report = super().optimizer_step(lr=lr, loss=loss, divisor=divisor)
        if self._running_statistics:
            # Each process has seen other samples; all go on with the first one's.
            for buffer in self._running_statistics:
                dist.broadcast(buffer, src=0)
        return report

    @property
    def _running_statistics(self) -> list[Tensor]:
        return [buffer for buffer in self.model.buffers() if buffer.numel()]

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        self.buckets.close()
