"""DeepSpeed's ZeRO-3 optimizer with a faster host side. All use of its private parts is here.

For optimizer states in host memory, DeepSpeed 0.19 moves every gradient to the host in 16 bits,
back to the GPU, and to the host again in 32 bits; there it is scaled in one pass over memory, used
in a second, and the new weights are rounded in a third. Here gradients cross once in 16 bits, and
one pass does the rest, beside the next forward pass; host memory falls from about 20 bytes a
parameter, rounded up, to 16.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from polyzoo.training.strategies.host_adamw import HostAdamW
from polyzoo.training.strategies.hostmemory import HostMemory

if importlib.util.find_spec("deepspeed") is None:  # to be looked at, not used
    hooks: Any = None
    deepspeed_stage3: Any = None
    DeepSpeedZeroOptimizer_Stage3: Any = object
else:
    hooks = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    deepspeed_stage3 = importlib.import_module("deepspeed.runtime.zero.stage3")
    DeepSpeedZeroOptimizer_Stage3 = deepspeed_stage3.DeepSpeedZeroOptimizer_Stage3


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter's range in a flat sub-group."""

    name: str
    offset: int
    """Of the range in the sub-group."""
    length: int
    start: int
    """Of the range in the flattened parameter."""
    full_shape: tuple[int, ...]


class Stage3(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3 whose divisor, host step and sub-groups are ours to see."""

    overlap: ClassVar[bool] = False
    """Let host updates go on beside the next forward pass; set around the construction."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.divisor: float = 1.0
        self.memory = HostMemory()
        self._scale = 1.0
        self._host_gradients: dict[int, Tensor] = {}
        self._worker = ThreadPoolExecutor(1, "host-adamw")
        self._jobs: list[tuple[int, dict[str, Any], float]] = []
        self._pending: dict[int, Future[None]] = {}
        super().__init__(*arguments, **named)
        self.overlaps = type(self).overlap and self.is_fused and self.offload_param
        if self.overlaps:
            self._let_gathering_wait()

    # --- construction ---------------------------------------------------------------------------

    @property
    def is_fused(self) -> bool:
        """Whether our host step is in charge: states in host memory, gradients fp32 or bf16."""
        return (
            self.offload_optimizer
            and not self.swap_optimizer
            and isinstance(self.optimizer, HostAdamW)
            and self.dtype in (torch.bfloat16, torch.float32)
            and self.gradient_accumulation_dtype in (torch.bfloat16, torch.float32)
        )

    @property
    def goes_without_sums(self) -> bool:
        """Whether gradients go to the drive at once: a single micro-batch, nothing to rescale."""
        single = self.gradient_accumulation_steps == 1
        return self.swap_optimizer and single and self.dtype != torch.float16

    def _create_param_groups_fp16_flat_cpu_memory(self) -> None:
        if self.params_in_nvme_and_cpu or not self.offload_param_pin_memory:
            super()._create_param_groups_fp16_flat_cpu_memory()
            return
        for group in self.trainable_param_groups:
            numel = sum(parameter.partition_numel() for parameter in group["params"])
            # torch's own pinned memory is rounded up to a power of two.
            flat = self.memory.empty(numel, self.dtype, pinned=True)
            self.param_groups_fp16_flat_cpu_memory.append(flat)

    def _create_fp32_partitions(self) -> None:
        if not self.is_fused:
            super()._create_fp32_partitions()
            return
        if torch.cuda.is_available():
            torch._C._host_emptyCache()  # the parameters' first, single pinned buffers
        super()._create_fp32_partitions()
        for weights in self.fp32_partitioned_groups_flat:
            held = self.memory.empty(weights.numel(), weights.dtype, pinned=False)
            # The old storage goes; the tensor stays the one that others know.
            weights.data = held.copy_(weights.data)

    def initialize_optimizer_states(self) -> None:
        """Make gradient buffers where DeepSpeed's own step needs them."""
        if not self.is_fused:
            super().initialize_optimizer_states()

    def _setup_for_real_optimizer(self) -> None:
        if self.goes_without_sums:
            # DeepSpeed keeps a 16-bit copy of all gradients in host memory to add up several.
            self._set_up_without_sums()
            return
        if not self.is_fused:
            super()._setup_for_real_optimizer()
            return
        self._create_fp32_partitions()
        dist.barrier()
        self._create_next_swappable_fp32_groups()
        self._make_buckets()
        self.grad_partitions_flat_buffer = None  # pyright: ignore[reportAttributeAccessIssue]
        partitions: dict[int, Tensor] = {}
        for index, group in enumerate(self.fp16_groups):
            numel = int(self.fp16_partitioned_groups_flat_numel[index])
            flat = self._gradient_buffer(numel)
            self._host_gradients[index] = flat
            offset = 0
            for parameter in group:
                length = parameter.partition_numel()
                partitions[parameter.ds_id] = flat.narrow(0, offset, length)
                offset += length
        self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition = partitions

    def _set_up_without_sums(self) -> None:
        self._create_fp32_partitions()
        dist.barrier()
        self._create_next_swappable_fp32_groups()
        self.initialize_optimizer_states()
        dist.barrier()
        self._make_buckets()
        self.grad_partitions_flat_buffer = None  # pyright: ignore[reportAttributeAccessIssue]
        self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition = {}

    def _make_buckets(self) -> None:
        device = _device()
        for dtype, bucket in self.ipg_buckets.items() if self.contiguous_gradients else ():
            bucket.buffer = torch.empty(self.reduce_bucket_size, dtype=dtype, device=device)

    def _gradient_buffer(self, numel: int) -> Tensor:
        dtype, pinned = self.gradient_accumulation_dtype, self.offload_optimizer_pin_memory
        return self.memory.empty(numel, dtype, pinned=pinned)

    def _let_gathering_wait(self) -> None:
        """Make every gathering of a parameter wait until its sub-group has been updated."""
        self._group_of = {p: i for i, group in enumerate(self.fp16_groups) for p in group}

        def waiting(gather: Callable[..., Any], own: Any) -> Callable[..., Any]:
            def gather_updated(params: Any = None, *arguments: Any, **named: Any) -> Any:
                # Some callers hand over an iterator, some name the argument otherwise.
                given = params if params is not None else named.pop("param_list", None)
                members = [own] if given is None else list(given)
                self.wait_for(members)
                return gather(members, *arguments, **named)

            return gather_updated

        for parameter in self.module.parameters():
            parameter.all_gather = waiting(parameter.all_gather, parameter)
            parameter.all_gather_coalesced = waiting(parameter.all_gather_coalesced, parameter)

    def wait_for(self, parameters: Iterable[Any]) -> None:
        """Wait until the host has updated these parameters."""
        if self._pending:
            for index in {self._group_of.get(p, -1) for p in parameters}:
                if index in self._pending:
                    self._pending.pop(index).result()

    def finish(self) -> None:
        """Wait until the host has updated everything."""
        for index in list(self._pending):
            self._pending.pop(index).result()

    def _begin_updates(self) -> None:
        """Hand the noted sub-groups to the worker: first what is gathered at once."""
        kept = {self._group_of.get(parameter) for parameter in self.persistent_parameters}
        self._jobs.sort(key=lambda job: job[0] not in kept)
        for index, group, scale in self._jobs:
            self._pending[index] = self._worker.submit(self._update_on_host, index, group, scale)
        self._jobs.clear()

    def _update_on_host(self, index: int, group: dict[str, Any], scale: float) -> None:
        assert isinstance(self.optimizer, HostAdamW)  # noqa: S101 - else nothing is noted
        self.optimizer.update(
            self.fp32_partitioned_groups_flat[index], self._host_gradients[index],
            group=group, scale=scale, copy=self.fp16_partitioned_groups_flat[index],
        )  # fmt: skip

    def _post_step(self, timer_names: set[str]) -> None:
        if self._jobs:
            self._begin_updates()
        super()._post_step(timer_names)

    # --- backward -------------------------------------------------------------------------------

    def partition_grads(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params_to_release: list[Any], grad_partitions: list[Tensor]
    ) -> Any:
        """Bring reduced gradients to where they are updated, and note their norms on the way."""
        if self.goes_without_sums:
            return self._send_to_drive(params_to_release, grad_partitions)
        if not self.is_fused:
            return super().partition_grads(params_to_release, grad_partitions)
        partitions = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        last = self.is_gradient_accumulation_boundary()
        for parameter, partition in zip(params_to_release, grad_partitions, strict=True):
            first = parameter.partition_numel() * self._get_param_partition_rank(parameter)
            if first < parameter.ds_numel:
                self._offload_boundary_param_ids.add(parameter.ds_id)
                target = partitions[parameter.ds_id].narrow(0, 0, partition.numel())
                values = partition.reshape(-1)
                if self.micro_step_id > 0:
                    values = values.to(target.dtype) + target.to(values.device, non_blocking=True)
                if last:
                    norm = torch.linalg.vector_norm(values, dtype=torch.float32)
                    self.norm_for_param_grads[self.get_param_id(parameter)] = norm
                target.copy_(values, non_blocking=True)
                if parameter.grad is not None and parameter.grad.is_cuda:
                    parameter.grad.record_stream(torch.cuda.current_stream())
            parameter.grad = None
        return []

    def _send_to_drive(
        self, params_to_release: list[Any], grad_partitions: list[Tensor]
    ) -> list[Tensor]:
        """Hand gradients to the drive's writer, without a copy of all in host memory."""
        gradients: dict[int, list[Tensor]] = {}
        offsets: dict[int, list[int]] = {}
        for parameter, partition in zip(params_to_release, grad_partitions, strict=True):
            first = parameter.partition_numel() * self._get_param_partition_rank(parameter)
            if first < parameter.ds_numel:
                self._offload_boundary_param_ids.add(parameter.ds_id)
                self._offload_grad_partition_at_boundary(
                    parameter, partition.reshape(-1), gradients, offsets
                )
            parameter.grad = None
        self._swap_out_offload_fp32_gradients(gradients, offsets)
        return []

    # --- step -----------------------------------------------------------------------------------

    def _constant_buffered_norm2(self, input: Tensor, buffer_size: int = 0) -> Tensor:  # noqa: ARG002
        # The same arithmetic in every tier, so that they agree to the last bit.
        return torch.linalg.vector_norm(input, dtype=torch.float32)

    def _get_norm_groups(self) -> list[Tensor]:
        if not (self.offload_optimizer and isinstance(self.optimizer, HostAdamW)):
            return super()._get_norm_groups()
        device = _device()
        norms = list(self.norm_for_param_grads.values())
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
        dist.all_reduce(square, group=self.dp_process_group)
        norm = square.sqrt().cpu()
        return [norm if bool(torch.isfinite(norm)) else torch.tensor(-1.0)]

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor | float) -> None:
        """Note what this sub-group's gradients are multiplied by; ours are scaled on the fly."""
        scale = float(self.loss_scale) * self.divisor
        norm = float(total_norm) / scale
        if self.clip_grad > 0.0:
            scale *= max((norm + 1e-6) / self.clip_grad, 1.0)
        self._scale = 1.0 / scale
        gradient = self.fp32_partitioned_groups_flat[sub_group_id].grad
        if not isinstance(self.optimizer, HostAdamW) or (
            not self.is_fused and not self._is_on_host(sub_group_id)
        ):
            gradient.mul_(self._scale)

    def _is_on_host(self, sub_group_id: int) -> bool:
        return self.fp32_partitioned_groups_flat[sub_group_id].device.type == "cpu"

    @torch.no_grad()
    def _optimizer_step(self, sub_group_id: int) -> None:
        if not isinstance(self.optimizer, HostAdamW):
            super()._optimizer_step(sub_group_id)
            return
        group = self.optimizer.param_groups[self.sub_group_to_group_id[sub_group_id]]
        weights = self.fp32_partitioned_groups_flat[sub_group_id]
        if not self.is_fused:
            self.optimizer.update(weights, weights.grad, group=group, scale=self._scale)
            return
        gradients = self._host_gradients[sub_group_id]
        if self.overlaps:
            held = {key: value for key, value in group.items() if key != "params"}
            self._jobs.append((sub_group_id, held, self._scale))
            return
        target = self.fp16_partitioned_groups_flat[sub_group_id]
        # 16-bit weights on the GPU take the way back through the buffer their gradients came in.
        through = gradients if target.device.type != "cpu" else target
        self.optimizer.update(weights, gradients, group=group, scale=self._scale, copy=through)
        if through is not target:
            target.copy_(through, non_blocking=True)

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        if not self.is_fused:
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)

    # --- sub-groups, for checkpoints and averages ------------------------------------------------

    def pieces(self, index: int, names: dict[int, str]) -> list[Piece]:
        """Return where each parameter lies in a sub-group; `names` by ds_id."""
        pieces: list[Piece] = []
        offset = 0
        for parameter in self.fp16_groups[index]:
            each = parameter.partition_numel()
            start = min(each * self._get_param_partition_rank(parameter), parameter.ds_numel)
            length = min(each, parameter.ds_numel - start)
            shape = tuple(parameter.ds_shape)
            pieces.append(Piece(names[parameter.ds_id], offset, length, start, shape))
            offset += each
        return pieces

    @contextmanager
    def resident(self, index: int, *, changes: bool = False) -> Iterator[Tensor]:
        """Give a sub-group's fp32 weights, with its moments in `state_of`, read from the drive.

        Args:
            index: Of the sub-group.
            changes: Write everything back, and refresh the 16-bit weights.
        """
        self.finish()
        swapped = self._swappable_optimizer_subgroup(index)
        if swapped:
            self._optimizer_states_and_gradient_swap_in(index)
        weights = self.fp32_partitioned_groups_flat[index]
        try:
            yield weights
            if changes:
                DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters(
                    self, index
                )
        finally:
            if swapped and changes:
                self._optimizer_states_and_gradient_swap_out(index)
            elif swapped:
                self._release_swap_buffers(index)

    def state_of(self, weights: Tensor) -> dict[str, Any]:
        """Return a sub-group's optimizer state; empty before the first step."""
        self.finish()
        return self.optimizer.state.get(weights, {})

    def set_state(self, weights: Tensor, step: float, moments: dict[str, Tensor]) -> None:
        """Give a sub-group its optimizer state; the drive takes it with the next writing."""
        if isinstance(self.optimizer, HostAdamW):
            state = self.optimizer.state_of(weights)
            state["step"] = int(step)
        else:
            state = self.optimizer.state[weights]
            fused = not hasattr(self.optimizer, "ds_opt_adam")
            state["step"] = torch.tensor(float(step), device=weights.device) if fused else int(step)
        for key, values in moments.items():
            if key in state:
                state[key].copy_(values)
            else:
                state[key] = values.to(weights.device)

    def gather_persistent(self) -> None:
        """Refresh the small parameters that stay whole on the GPU."""
        if self.persistent_parameters:
            self.persistent_parameters[0].partition(self.persistent_parameters)
            self.persistent_parameters[0].all_gather(self.persistent_parameters)

    @property
    def sub_groups(self) -> int:
        """Number of sub-groups."""
        return len(self.fp16_groups)

    def close(self) -> None:
        """Give back page-locked memory."""
        self.finish()
        self._worker.shutdown()
        self.memory.close()


def _device() -> str:
    accelerator: Any = deepspeed_stage3.get_accelerator()
    return accelerator.current_device_name()


def _look_into_dataclasses() -> None:
    """Let ZeRO's hooks find tensors in dataclasses that modules take and return.

    DeepSpeed looks into tuples, lists and dicts only; past a dataclass it would not gather a
    module's parameters for the backward pass, and then fail.
    """
    original = hooks.apply_to_tensors_only
    if getattr(original, "looks_into_dataclasses", False):
        return

    def apply(function: Callable[..., Any], value: Any, warning_msg_fn: Any = None) -> Any:
        if isinstance(value, Tensor):
            return original(function, value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(apply(function, item, warning_msg_fn) for item in value))
        if isinstance(value, list | tuple):
            return type(value)(apply(function, item, warning_msg_fn) for item in value)
        if isinstance(value, dict):
            for key, item in value.items():
                value[key] = apply(function, item, warning_msg_fn)
            return value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                item = getattr(value, field.name)
                changed = apply(function, item, warning_msg_fn)
                if changed is not item:
                    # In place, frozen or not: a copy would lose what is computed after init.
                    object.__setattr__(value, field.name, changed)
            return value
        return value

    apply.looks_into_dataclasses = True  # pyright: ignore[reportFunctionMemberAccess]
    hooks.apply_to_tensors_only = apply  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def in_place_of_deepspeeds(*, overlap: bool) -> Iterator[None]:
    """Let `deepspeed.initialize` build our ZeRO-3 optimizer inside the block."""
    _look_into_dataclasses()
    original = deepspeed_stage3.DeepSpeedZeroOptimizer_Stage3
    former, Stage3.overlap = Stage3.overlap, overlap
    deepspeed_stage3.DeepSpeedZeroOptimizer_Stage3 = Stage3  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        deepspeed_stage3.DeepSpeedZeroOptimizer_Stage3 = original  # pyright: ignore[reportAttributeAccessIssue]
        Stage3.overlap = former
