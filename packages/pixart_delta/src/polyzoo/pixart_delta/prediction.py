"""The guided noise prediction of a run: text kept, control switched on and off, fast or plain."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.pixart_delta.captions import PackedCaptions, RowCaptions
from polyzoo.pixart_delta.control import Control, ControlBranch
from polyzoo.pixart_delta.fast import FastTransformer
from polyzoo.pixart_delta.model import Conditions, PixArtTransformer
from polyzoo.pixart_delta.request import Plan
from polyzoo.pixart_delta.text import LENGTH_STEP


class Predictor:
    """Predicts noise for a batch of images, step after step.

    Keys and values of the text are worked out once. With guidance the first half of the network's
    batch has the prompts, the second the negative prompts.
    """

    def __init__(
        self,
        model: PixArtTransformer,
        plan: Plan,
        captions: PackedCaptions,
        control: Tensor | None,
        branch: ControlBranch | None,
        fast: FastTransformer | None,
        steps: int,
        device: torch.device,
        latent_size: tuple[int, int],
    ) -> None:
        self.model = model
        self.plan = plan
        self.steps = steps
        self.fast = fast
        self.branch = branch if control is not None else None
        b = len(captions)
        sizes = plan.sizes
        self.size = torch.tensor([sizes.size] * b, device=device, dtype=torch.float32)
        self.ratio = torch.full((b, 1), sizes.ratio, device=device)
        self.control = None
        if control is not None:
            control = control.to(model.dtype)
            self.control = torch.cat([control, control]) if plan.guided else control
        if fast is not None:
            n = -(-captions.longest // LENGTH_STEP) * LENGTH_STEP
            states, _ = captions.padded(n)
            lens = torch.tensor(captions.lengths, dtype=torch.int32, device=device)
            self.kept = fast.remember(RowCaptions(states, lens))
        else:
            p = model.shape.patch_size
            queries = (latent_size[0] // p) * (latent_size[1] // p)
            self.memory = model.remember(captions, queries=queries, branch=self.branch)

    def __call__(self, latents: Tensor, timestep: Tensor, index: int) -> Tensor:
        """`(b, 4, h, w)` float32, guided."""
        channels = latents.shape[1]
        doubled = torch.cat([latents, latents]) if self.plan.guided else latents
        doubled = doubled.to(self.model.dtype)
        conditions = Conditions(
            timestep=timestep.float().expand(len(doubled)).contiguous(),
            size=self.size if self.model.shape.multi_scale else None,
            ratio=self.ratio if self.model.shape.multi_scale else None,
        )
        out = self._network(doubled, conditions, index)[:, :channels].float()
        if not self.plan.guided:
            return out
        cond, uncond = out.chunk(2)
        return uncond + self.plan.guidance * (cond - uncond)

    def _network(self, latents: Tensor, conditions: Conditions, index: int) -> Tensor:
        request = self.plan.control
        active = (
            self.control is not None and request is not None and request.active(index, self.steps)
        )
        if self.fast is not None:
            if not active:
                return self.fast.step(latents, conditions, self.kept)
            assert request is not None  # noqa: S101 - active says so
            scale = torch.tensor(request.scale, device=latents.device, dtype=latents.dtype)
            return self.fast.step(latents, conditions, self.kept, control=self.control, scale=scale)
        control = None
        if active:
            assert self.branch is not None and self.control is not None  # noqa: S101, PT018
            assert request is not None  # noqa: S101 - active says so
            control = Control(self.branch, self.control, request.scale)
        return self.model(latents, self.memory, conditions, control=control)
