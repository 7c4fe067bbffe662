"""PIXART-delta training steps at full size: memory, samples a second, share of the peak.

    python benchmarks/pixart_train.py --out benchmarks/results/pixart_train.jsonl

The same step is written twice: with polyzoo's transformer, and with diffusers' and torch's own
attention. Random weights and data; a step is forward, backward, clipping and AdamW.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from polyzoo.pixart_delta.batches import LatentBatch
from polyzoo.pixart_delta.captions import RowCaptions
from polyzoo.pixart_delta.config import ControlConfig, xl
from polyzoo.pixart_delta.control import ControlBranch
from polyzoo.pixart_delta.fast import compile_repeated
from polyzoo.pixart_delta.model import Conditions, PixArtTransformer, diffusers_config
from polyzoo.pixart_delta.objectives import Draws, draw, lcm_objective, noise_objective
from polyzoo.pixart_delta.recipe import LcmRecipe, NoiseRecipe
from polyzoo.pixart_delta.train import network_of

TOKENS = 120
EVALUATION = {512: 1.236e12, 1024: 6.510e12}
BRANCH = {512: 0.611e12, 1024: 3.174e12}
PEAK = 989e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", type=int, default=[512, 1024])
    parser.add_argument("--tasks", nargs="*", default=["lcm", "controlnet"])
    parser.add_argument("--batch", nargs="*", type=int, default=[8, 2], help="one for each size")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="512 px, without checkpointing")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which it ends")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.sizes, given.batch = given.sizes[:1], given.batch[:1]
    begun = time.perf_counter()
    for size, batch in zip(given.sizes, given.batch, strict=True):
        for task in given.tasks:
            for checkpointing in (False,) if given.quick else (False, True):
                for who in ("diffusers", "polyzoo"):
                    if time.perf_counter() - begun > given.limit:
                        return
                    row = measure(who, task, size, batch, checkpointing, given.repeat)
                    print(json.dumps(row), flush=True)
                    if given.out:
                        with given.out.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                    torch.cuda.empty_cache()


def measure(
    who: str, task: str, size: int, batch: int, checkpointing: bool, repeat: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    step = build(who, task, size, batch, checkpointing)
    warm = time.perf_counter()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    warm = time.perf_counter() - warm
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / repeat
    flops = batch * needed(task, size)
    return {
        "task": task, "who": who, "size": size, "batch": batch, "checkpointing": checkpointing,
        "seconds": round(seconds, 4), "samples_per_second": round(batch / seconds, 3),
        "mfu": round(flops / seconds / PEAK, 3), "warm_up": round(warm, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
    }  # fmt: skip


def needed(task: str, size: int) -> float:
    """Operations of a sample, recomputation not counted."""
    if task == "lcm":  # student three times, teacher twice, target once
        return 6 * EVALUATION[size]
    # Frozen blocks pass gradients on (twice), the branch has weight gradients too (three times).
    return 2 * EVALUATION[size] + 3 * BRANCH[size]


def build(who: str, task: str, size: int, batch: int, checkpointing: bool) -> Callable[[], None]:
    device = torch.device("cuda")
    side = size // 8
    data = LatentBatch(
        torch.randn(batch, 4, side, side, device=device),
        RowCaptions(
            torch.randn(batch, TOKENS, 4096, device=device),
            torch.full((batch,), TOKENS, dtype=torch.int32, device=device),
        ),
        size=torch.full((batch, 2), float(size), device=device),
        ratio=torch.ones(batch, 1, device=device),
        control=torch.randn(batch, 4, side, side, device=device) if task == "controlnet" else None,
    )
    generator = torch.Generator(device).manual_seed(0)
    null = torch.randn(TOKENS, 4096, device=device)
    if task == "controlnet":
        return _control_step(who, size, data, null, generator, checkpointing)
    student = _model(who, size).train()
    frozen = [_model(who, size).to(torch.bfloat16).requires_grad_(False) for _ in range(2)]
    _checkpoint(student, checkpointing)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    networks = [_network(who, model) for model in (student, *frozen)]
    recipe = LcmRecipe()

    def step() -> None:
        draws = draw(data, generator, positions=50, caption_dropout=0.0)
        with torch.autocast("cuda", torch.bfloat16):
            objective = lcm_objective(*networks, data, draws, recipe, null)
        _update(objective.loss, student, optimizer)

    return step


def _control_step(
    who: str, size: int, data: LatentBatch, null: Tensor, generator: torch.Generator,
    checkpointing: bool,
) -> Callable[[], None]:  # fmt: skip
    base = _model(who, size).to(torch.bfloat16).requires_grad_(False)
    if who == "polyzoo":
        branch: Any = ControlBranch.copy_of(base, ControlConfig()).float().train()
        compile_repeated(branch, type(next(branch.copies())))
        network = network_of(base, branch)
    else:
        branch = TheirControl(base).train()
        network = branch.network
    _checkpoint(base, checkpointing)
    optimizer = torch.optim.AdamW(branch.parameters(), lr=1e-5, weight_decay=0.03, fused=True)
    recipe = NoiseRecipe()

    def step() -> None:
        draws: Draws = draw(data, generator, positions=1000, caption_dropout=0.1)
        with torch.autocast("cuda", torch.bfloat16):
            objective = noise_objective(network, data, draws, recipe, null)
        _update(objective.loss, branch, optimizer)

    return step


class TheirControl(nn.Module):
    """The control branch over diffusers' transformer, as its research project writes it."""

    def __init__(self, base: Any, copies: int = 13) -> None:
        super().__init__()
        import copy

        width = base.inner_dim
        self.base = [base]
        blocks = [copy.deepcopy(block).float() for block in base.transformer_blocks[:copies]]
        self.copies = nn.ModuleList(blocks).requires_grad_(True)
        self.before = nn.Linear(width, width)
        self.after = nn.ModuleList([nn.Linear(width, width) for _ in range(copies)])
        self.to(base.device)
        for layer in (self.before, *self.after):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def network(self, x: Tensor, captions: Any, conditions: Conditions, control: Any) -> Tensor:
        """The controlled prediction."""
        base = self.base[0]
        b, _, height, width = x.shape
        hidden, state = base.pos_embed(x.to(base.dtype)), base.pos_embed(control.to(base.dtype))
        extra = {"resolution": conditions.size, "aspect_ratio": conditions.ratio}
        if not base.use_additional_conditions:
            extra = {"resolution": None, "aspect_ratio": None}
        t, embedded = base.adaln_single(
            conditions.timestep, extra, batch_size=b, hidden_dtype=hidden.dtype
        )
        text = base.caption_projection(captions.states.to(base.dtype))
        places = torch.arange(text.shape[1], device=x.device)
        mask = (places[None] < captions.kv_lens[:, None]).to(x.dtype)
        mask = ((1 - mask) * -10000.0).unsqueeze(1)
        for index, block in enumerate(base.transformer_blocks):
            if 0 < index <= len(self.copies):
                if index == 1:
                    state = hidden + self.before(state)
                state = self._run(self.copies[index - 1], state, text, mask, t)
                hidden = hidden + self.after[index - 1](state)
            hidden = self._run(block, hidden, text, mask, t)
        shift, scale = (base.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        out = base.proj_out(base.norm_out(hidden) * (1 + scale) + shift)
        p = base.config.patch_size
        grid = out.reshape(b, height // p, width // p, p, p, 8)
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(b, 8, height, width)

    def _run(self, block: Any, hidden: Tensor, text: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        def call(x: Tensor) -> Tensor:
            return block(
                x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t,
                attention_mask=None, cross_attention_kwargs=None, class_labels=None,
            )  # fmt: skip

        if self.base[0].gradient_checkpointing:
            return torch.utils.checkpoint.checkpoint(call, hidden, use_reentrant=False)
        return call(hidden)


def _model(who: str, size: int) -> Any:
    shape = xl(size)
    with torch.device("cuda"):
        if who == "diffusers":
            return PixArtTransformer2DModel.from_config(diffusers_config(shape))
        model = PixArtTransformer(shape)
    compile_repeated(model, type(model.transformer_blocks[0]))
    return model


def _network(who: str, model: Any) -> Any:
    if who == "polyzoo":
        return network_of(model)

    def network(x: Tensor, captions: Any, conditions: Conditions, control: Any) -> Tensor:
        del control
        places = torch.arange(captions.states.shape[1], device=x.device)
        mask = (places[None] < captions.kv_lens[:, None]).to(x.dtype)
        return model(
            x.to(model.dtype), encoder_hidden_states=captions.states.to(model.dtype),
            timestep=conditions.timestep, encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": conditions.size, "aspect_ratio": conditions.ratio},
            return_dict=False,
        )[0]  # fmt: skip

    return network


def _checkpoint(model: Any, on: bool) -> None:
    if on:
        model.enable_gradient_checkpointing()


def _update(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
