"""Gradient sums over processes that overlap with the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyzoo.training.errors import TrainingError

BUCKET_ELEMENTS = 8 * 2**20  # 32 MiB in fp32: large enough for full bandwidth, small enough to hide


class _Bucket:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = len(parameters)
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None


class GradientBuckets:
    """Averages gradients over processes, bucket by bucket as the backward pass completes them.

    Unlike torch's DistributedDataParallel it wraps nothing: a step may call the model any number of
    times and through any method, and parameters that a step does not reach count as zeros.

    Example:
        >>> buckets = GradientBuckets(model.parameters())
        >>> buckets.expect()
        >>> loss.backward()
        >>> buckets.finish()
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, elements: int = BUCKET_ELEMENTS
    ) -> None:
        self.buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._reached: set[nn.Parameter] = set()
        self._expecting = False
        self._next = 0
        group: list[nn.Parameter] = []
        # Gradients arrive about in reverse order of the forward pass.
        for parameter in reversed(list(parameters)):
            if group and sum(p.numel() for p in group) + parameter.numel() > elements:
                self._add(group)
                group = []
            group.append(parameter)
        if group:
            self._add(group)
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(GradientBuckets._arrived, self))
            for p in self._bucket_of
        ]

    def _add(self, parameters: list[nn.Parameter]) -> None:
        bucket = _Bucket(parameters)
        self.buckets.append(bucket)
        self._bucket_of.update(dict.fromkeys(parameters, bucket))

    def expect(self) -> None:
        """Begin: the next backward pass is the last before the optimizer step."""
        self._expecting = True
        self._next = 0
        self._reached.clear()
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._expecting:
            return
        bucket = self._bucket_of[parameter]
        if parameter in self._reached:
            if bucket.work is not None:
                raise TrainingError(
                    "E-LATE-GRADIENT",
                    "a gradient changed after it had been sent to the other processes",
                    "the step function uses reentrant activation checkpointing",
                    "use torch.utils.checkpoint with use_reentrant=False, or "
                    "activation_checkpointing with checkpoint_blocks",
                )
            return
        self._reached.add(parameter)
        bucket.missing -= 1
        # In order, so that all processes send the same bucket at the same time.
        while self._next < len(self.buckets) and not self.buckets[self._next].missing:
            self._send(self.buckets[self._next])
            self._next += 1

    def _send(self, bucket: _Bucket) -> None:
        flat = torch.cat([_gradient(p).reshape(-1) for p in bucket.parameters])
        bucket.flat = flat.div_(dist.get_world_size())
        bucket.work = dist.all_reduce(flat, async_op=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is left, wait for all, and put the averages into the gradients."""
        self._expecting = False
        for bucket in self.buckets[self._next :]:
            self._send(bucket)
        for bucket in self.buckets:
            assert bucket.work is not None  # noqa: S101 - sent above
            assert bucket.flat is not None  # noqa: S101 - with its values
            bucket.work.wait()
            offset = 0
            for parameter in bucket.parameters:
                length = parameter.numel()
                parameter.grad = bucket.flat[offset : offset + length].view_as(parameter)
                offset += length
            bucket.work = bucket.flat = None

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
