"""DeepSpeed's ZeRO-3 optimizer with a faster host side. All use of its private parts is here.

For optimizer states in host memory, DeepSpeed 0.19 moves every gradient to the host in 16 bits, back
to the GPU, and to the host again in 32 bits; there it is scaled in one pass over memory, used in a
second, and the new weights are rounded in a third. Here gradients cross once in 16 bits, and one pass
does the rest; host memory falls from about 24 to 16 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import deepspeed.runtime.zero.stage3 as deepspeed_stage3
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from polyzoo.training.strategies.host_adamw import HostAdamW
from polyzoo.training.strategies.hostmemory import HostMemory



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

    gpu_share: ClassVar[float] = 0.0
    """Share of the sub-groups whose optimizer stays on the GPU; set around the construction."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.divisor: float = 1.0
        self.memory = HostMemory()
        self._scale = 1.0
        self._host_gradients: dict[int, Tensor] = {}
        self._on_gpu: torch.optim.Optimizer | None = None
        super().__init__(*arguments, **named)

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
        self.partial_offload = 1.0 - type(self).gpu_share
        if torch.cuda.is_available():
            torch._C._host_emptyCache()  # the parameters' first, single pinned buffers
        super()._create_fp32_partitions()
        for index, weights in enumerate(self.fp32_partitioned_groups_flat):
            if self.subgroup_to_device[index] == "cpu":
                held = self.memory.empty(weights.numel(), weights.dtype, pinned=False)
                # The old storage goes; the tensor stays the one that others know.
                weights.data = held.copy_(weights.data)

    def initialize_optimizer_states(self) -> None:
        if not self.is_fused:
            super().initialize_optimizer_states()

    def _setup_for_real_optimizer(self) -> None:
        if not self.is_fused:
            super()._setup_for_real_optimizer()
            return
        self._create_fp32_partitions()
        dist.barrier()
        self._create_next_swappable_fp32_groups()
        device = deepspeed_stage3.get_accelerator().current_device_name()
        for bucket in self.ipg_buckets.values() if self.contiguous_gradients else ():
            dtype = next(key for key, value in self.ipg_buckets.items() if value is bucket)
            bucket.buffer = torch.empty(self.reduce_bucket_size, dtype=dtype, device=device)
        self.grad_partitions_flat_buffer = None
        partitions: dict[int, Tensor] = {}
        for index, group in enumerate(self.fp16_groups):
            numel = int(self.fp16_partitioned_groups_flat_numel[index])
            flat = self._gradient_buffer(index, numel, device)
            self._host_gradients[index] = flat
            offset = 0
            for parameter in group:
                length = parameter.partition_numel()
                partitions[parameter.ds_id] = flat.narrow(0, offset, length)
                offset += length
        self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition = partitions

    def _gradient_buffer(self, index: int, numel: int, device: str) -> Tensor:
        if self.subgroup_to_device[index] != "cpu":
            return torch.zeros(numel, dtype=self.gradient_accumulation_dtype, device=device)
        dtype, pinned = self.gradient_accumulation_dtype, self.offload_optimizer_pin_memory
        return self.memory.empty(numel, dtype, pinned=pinned)

    # --- backward -------------------------------------------------------------------------------

    def partition_grads(
        self, params_to_release: list[Any], grad_partitions: list[Tensor]
    ) -> list[Tensor]:
        """Bring reduced gradients to where they are updated, and note their norms on the way."""
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

    # --- step -----------------------------------------------------------------------------------

    def _constant_buffered_norm2(self, input: Tensor, buffer_size: int = 0) -> Tensor:  # noqa: A002, ARG002
        # The same arithmetic in every tier, so that they agree to the last bit.
        return torch.linalg.vector_norm(input, dtype=torch.float32)

    def _get_norm_groups(self) -> list[Tensor]:
        if not (self.offload_optimizer and isinstance(self.optimizer, HostAdamW)):
            return super()._get_norm_groups()
        device = deepspeed_stage3.get_accelerator().current_device_name()
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
        if not isinstance(self.optimizer, HostAdamW):
            gradient.mul_(self._scale)
        elif not self.is_fused and not self._is_on_host(sub_group_id):
            gradient.mul_(self._scale)

    def _is_on_host(self, sub_group_id: int) -> bool:
        return self.fp32_partitioned_groups_flat[sub_group_id].device.type == "cpu"

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
        if self.subgroup_to_device[sub_group_id] != "cpu":
            self._step_on_gpu(weights, gradients, group)
            self.fp16_partitioned_groups_flat[sub_group_id].copy_(weights, non_blocking=True)
            return
        target = self.fp16_partitioned_groups_flat[sub_group_id]
        # 16-bit weights on the GPU take the way back through the buffer their gradients came in.
        through = gradients if target.device.type != "cpu" else target
        self.optimizer.update(weights, gradients, group=group, scale=self._scale, copy=through)
        if through is not target:
            target.copy_(through, non_blocking=True)

    def _step_on_gpu(self, weights: Tensor, gradients: Tensor, group: dict[str, Any]) -> None:
        if self._on_gpu is None:
            self._on_gpu = torch.optim.AdamW([torch.zeros(1, device=weights.device)], fused=True)
            self._on_gpu.param_groups.clear()
        held = next((g for g in self._on_gpu.param_groups if g["params"][0] is weights), None)
        if held is None:
            self._on_gpu.add_param_group({"params": [weights]})
            held = self._on_gpu.param_groups[-1]
        held |= {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        weights.grad = gradients.float().mul_(self._scale)
        self._on_gpu.step()
        weights.grad = None

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
        if self._on_gpu is not None and weights in self._on_gpu.state:
            return self._on_gpu.state[weights]
        return self.optimizer.state.get(weights, {})

    def set_state(self, weights: Tensor, step: float, moments: dict[str, Tensor]) -> None:
        """Give a sub-group its optimizer state; the drive takes it with the next writing."""
        if isinstance(self.optimizer, HostAdamW) and weights.device.type == "cpu":
            state = self.optimizer.state_of(weights)
            state["step"] = int(step)
        elif isinstance(self.optimizer, HostAdamW):
            self._step_on_gpu_state(weights)
            state = self._on_gpu.state[weights]  # pyright: ignore[reportOptionalMemberAccess]
            state["step"] = torch.tensor(float(step), device=weights.device)
        else:
            state = self.optimizer.state[weights]
            fused = not hasattr(self.optimizer, "ds_opt_adam")
            state["step"] = (
                torch.tensor(float(step), device=weights.device) if fused else int(step)
            )
        for key, values in moments.items():
            if key in state:
                state[key].copy_(values)
            else:
                state[key] = values.to(weights.device)

    def _step_on_gpu_state(self, weights: Tensor) -> None:
        """Make sure that the GPU's own optimizer knows these weights."""
        if self._on_gpu is None:
            self._on_gpu = torch.optim.AdamW([torch.zeros(1, device=weights.device)], fused=True)
            self._on_gpu.param_groups.clear()
        if not any(group["params"][0] is weights for group in self._on_gpu.param_groups):
            self._on_gpu.add_param_group({"params": [weights]})

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
        self.memory.close()


@contextmanager
def in_place_of_deepspeeds(gpu_share: float) -> Iterator[None]:
    """Let `deepspeed.initialize` build our ZeRO-3 optimizer inside the block."""
    original = deepspeed_stage3.DeepSpeedZeroOptimizer_Stage3
    former, Stage3.gpu_share = Stage3.gpu_share, gpu_share
    deepspeed_stage3.DeepSpeedZeroOptimizer_Stage3 = Stage3  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        deepspeed_stage3.DeepSpeedZeroOptimizer_Stage3 = original  # pyright: ignore[reportAttributeAccessIssue]
        Stage3.gpu_share = former


