"""PIXART-delta at full size, stage by stage: diffusers and polyzoo on the same random weights.

    python benchmarks/pixart_infer.py --peers eager compiled --out benchmarks/results/pixart.jsonl

Needs a GPU of 40 GB. Weights are random: times and memory do not depend on them, and the outputs of
both are compared on the same ones. The first image of a shape warms up; that is not timed but told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from polyzoo.pixart_delta.captions import RowCaptions
from polyzoo.pixart_delta.config import ControlConfig, xl
from polyzoo.pixart_delta.control import ControlBranch
from polyzoo.pixart_delta.decoding import decode
from polyzoo.pixart_delta.fast import FastTransformer
from polyzoo.pixart_delta.int8 import Int8Linear
from polyzoo.pixart_delta.loading import fast_decoder, fast_text
from polyzoo.pixart_delta.model import Conditions, PixArtTransformer, diffusers_config
from polyzoo.pixart_delta.scheduler import PixArtLCMScheduler
from polyzoo.pixart_delta.t5 import T5Config, T5Encoder
from polyzoo.pixart_delta.vae import LATENT_SCALE, MidAttention

DTYPE = torch.bfloat16
TOKENS = 120
FLOPS = {1024: 6.510e12, 512: 1.236e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="*", default=["eager", "compiled"])
    parser.add_argument("--sizes", nargs="*", type=int, default=[1024, 512])
    parser.add_argument(
        "--stages", nargs="*", default=["step", "vae", "text", "image", "memory", "control"]
    )
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which it ends")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(given)
    with torch.no_grad():
        for stage in given.stages:
            getattr(bench, stage)()


class Bench:
    """Runs stages and writes a line for each figure."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.begun = time.perf_counter()
        self.device = torch.device("cuda")
        self.totals: dict[str, dict[str, float]] = {}

    def late(self) -> bool:
        """Whether the time is over."""
        return time.perf_counter() - self.begun > self.given.limit

    def report(self, stage: str, who: str, seconds: float, **more: object) -> None:
        """Print and keep a figure."""
        self.totals.setdefault(stage, {})[who] = seconds
        row = {
            "stage": stage, "who": who, "ms": round(seconds * 1e3, 3),
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, **more,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        if self.given.out:
            with self.given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def time(self, call: Callable[[], object]) -> float:
        """Median seconds of a call, by device events."""
        for _ in range(3):
            call()
        spent = []
        for _ in range(self.given.repeat):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            spent.append(start.elapsed_time(end) / 1e3)
        return statistics.median(spent)

    def transformer(self, size: int) -> PixArtTransformer:
        """A published shape with random weights."""
        with torch.device("meta"):
            model = PixArtTransformer(xl(size))
        return randomised(model.to_empty(device=self.device).to(DTYPE)).eval()

    def inputs(self, model: PixArtTransformer) -> tuple[torch.Tensor, Conditions, RowCaptions]:
        """Latents, conditions and a caption of 120 tokens."""
        side = model.shape.sample_size
        latents = torch.randn(1, 4, side, side, device=self.device, dtype=DTYPE)
        size = torch.tensor([[side * 8.0, side * 8.0]], device=self.device)
        conditions = Conditions(
            timestep=torch.tensor([759.0], device=self.device), size=size,
            ratio=torch.ones(1, 1, device=self.device),
        )  # fmt: skip
        states = torch.randn(1, TOKENS, 4096, device=self.device, dtype=DTYPE)
        lens = torch.tensor([TOKENS], dtype=torch.int32, device=self.device)
        return latents, conditions, RowCaptions(states, lens)

    def step(self) -> None:
        """One evaluation of the transformer."""
        for size in self.given.sizes:
            if self.late():
                return
            model = self.transformer(size)
            latents, conditions, captions = self.inputs(model)
            other = PixArtTransformer2DModel.from_config(diffusers_config(model.shape))
            other = other.to(self.device, DTYPE).eval()
            other.load_state_dict(model.state_dict())
            extra = {"resolution": conditions.size, "aspect_ratio": conditions.ratio}

            def theirs(net=other, x=latents, c=conditions, t=captions, extra=extra):
                return net(
                    x, encoder_hidden_states=t.states, timestep=c.timestep,
                    encoder_attention_mask=torch.ones(1, TOKENS, device=x.device, dtype=x.dtype),
                    added_cond_kwargs=extra, return_dict=False,
                )[0]  # fmt: skip

            wanted = theirs().float()
            if "eager" in self.given.peers:
                self.report(f"step {size}", "diffusers eager", self.time(theirs))
            if "compiled" in self.given.peers and not self.late():
                warm = time.perf_counter()
                other.compile(mode="reduce-overhead", fullgraph=True)
                theirs()
                warm = time.perf_counter() - warm
                self.report(
                    f"step {size}", "diffusers compiled", self.time(theirs), warm_up=round(warm, 1)
                )
            del other
            warm = time.perf_counter()
            fast = FastTransformer(model)
            kept = fast.remember(captions)
            out = fast.step(latents, conditions, kept).float()
            warm = time.perf_counter() - warm
            error = float((out - wanted).norm() / wanted.norm())
            seconds = self.time(lambda f=fast, x=latents, c=conditions, k=kept: f.step(x, c, k))
            self.report(
                f"step {size}", "polyzoo", seconds, warm_up=round(warm, 1), error=error,
                tflops=round(FLOPS[size] / seconds / 1e12, 1),
            )  # fmt: skip
            torch.cuda.empty_cache()

    def control(self) -> None:
        """One evaluation with the control branch."""
        if self.late():
            return
        model = self.transformer(1024)
        latents, conditions, captions = self.inputs(model)
        branch = randomised(ControlBranch.copy_of(model, ControlConfig()))
        fast = FastTransformer(model, branch)
        kept = fast.remember(captions)
        scale = torch.ones((), device=self.device, dtype=DTYPE)
        seconds = self.time(
            lambda: fast.step(latents, conditions, kept, control=latents, scale=scale)
        )
        self.report("step 1024 with control", "polyzoo", seconds)
        torch.cuda.empty_cache()

    def vae(self) -> None:
        """Decoding of a 1024 image."""
        if self.late():
            return
        vae = full_vae()
        vae = vae.to(self.device, DTYPE).eval()
        latents = torch.randn(1, 4, 128, 128, device=self.device, dtype=DTYPE)

        def theirs() -> torch.Tensor:
            return vae.decode(latents / LATENT_SCALE, return_dict=False)[0]

        for block in vae.modules():
            if isinstance(block, Attention):
                block.set_processor(AttnProcessor2_0())
        wanted = theirs().float()
        if "eager" in self.given.peers:
            self.report("vae 1024", "diffusers eager", self.time(theirs))
        if "compiled" in self.given.peers and not self.late():
            decoder = torch.compile(vae.decode, mode="reduce-overhead")
            self.report(
                "vae 1024", "diffusers compiled",
                self.time(lambda: decoder(latents / LATENT_SCALE, return_dict=False)[0]),
            )  # fmt: skip
        warm = time.perf_counter()
        fast = fast_decoder(vae)
        out = fast(latents).float()
        warm = time.perf_counter() - warm
        error = float((out - wanted).norm() / wanted.norm())
        seconds = self.time(lambda: fast(latents))
        self.report("vae 1024", "polyzoo", seconds, error=error, warm_up=round(warm, 1))
        torch.cuda.empty_cache()

    def text(self) -> None:
        """T5-XXL on 120 tokens."""
        if self.late():
            return
        from transformers import T5Config as TheirConfig
        from transformers import T5EncoderModel

        with torch.device("meta"):
            encoder = T5Encoder(T5Config())
            own = TheirConfig(
                d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64,
                feed_forward_proj="gated-gelu", vocab_size=32128, tie_word_embeddings=False,
            )  # fmt: skip
            other = T5EncoderModel(own)
        encoder = randomised(encoder.to(DTYPE).to_empty(device=self.device)).eval()
        ids = torch.randint(0, 32000, (1, TOKENS), device=self.device)
        lens = torch.tensor([TOKENS], dtype=torch.int32, device=self.device)
        wanted = None
        if "eager" in self.given.peers:
            tensors = dict(encoder.state_dict())
            tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
            other.load_state_dict(tensors, assign=True, strict=False)
            other.eval()
            mask = torch.ones_like(ids)
            wanted = other(ids, attention_mask=mask, return_dict=False)[0].float()
            self.report(
                "text 120", "transformers eager",
                self.time(lambda: other(ids, attention_mask=mask, return_dict=False)[0]),
            )  # fmt: skip
        fast_text(encoder)
        out = encoder(ids, lens).float()
        error = None if wanted is None else float((out - wanted).norm() / wanted.norm())
        self.report("text 120", "polyzoo", self.time(lambda: encoder(ids, lens)), error=error)
        torch.cuda.empty_cache()

    def memory(self) -> None:
        """Peak memory of each part alone on the GPU, as memory="8gb" has them, and of all."""
        if self.late():
            return
        torch.cuda.empty_cache()
        peaks: dict[str, float] = {}
        held: dict[str, float] = {}

        def measure(name: str, build: Callable[[], Callable[[], object]]) -> None:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call = build()
            held[name] = (torch.cuda.memory_allocated() - before) / 2**30
            with torch.no_grad():
                call()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            del call
            torch.cuda.empty_cache()

        def text() -> Callable[[], object]:
            with torch.device("meta"):
                encoder = T5Encoder(T5Config()).to(DTYPE)
            for parent in list(encoder.modules()):
                for name, layer in list(parent.named_children()):
                    if type(layer) is torch.nn.Linear:
                        steps = torch.randint(
                            -127, 128, layer.weight.shape, dtype=torch.int8, device=self.device
                        )
                        scales = torch.full((len(steps),), 1e-4, device=self.device, dtype=DTYPE)
                        setattr(parent, name, Int8Linear(steps, scales, None))
            for parent in encoder.modules():
                for name, parameter in list(parent._parameters.items()):
                    if parameter is not None:
                        value = torch.ones(parameter.shape, dtype=DTYPE, device=self.device)
                        parent._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
            ids = torch.randint(0, 32000, (1, TOKENS), device=self.device)
            return lambda: encoder(ids)

        def transformer() -> Callable[[], object]:
            model = self.transformer(1024)
            latents, conditions, captions = self.inputs(model)
            return lambda: model(latents, captions, conditions)

        def autoencoder() -> Callable[[], object]:
            with torch.device(self.device):
                vae = full_vae().to(DTYPE).eval()
            for block in vae.modules():
                if isinstance(block, Attention):
                    block.set_processor(MidAttention())
            latents = torch.randn(1, 4, 128, 128, device=self.device, dtype=DTYPE)
            return lambda: decode(vae, latents)

        def tiles() -> Callable[[], object]:
            with torch.device(self.device):
                vae = full_vae().to(DTYPE).eval()
            latents = torch.randn(1, 4, 128, 128, device=self.device, dtype=DTYPE)
            return lambda: decode(vae, latents, tiling=True)

        for name, build in (
            ("text int8", text), ("transformer", transformer), ("vae", autoencoder),
            ("vae in tiles", tiles),
        ):  # fmt: skip
            measure(name, build)
        worst = max(peaks["text int8"], peaks["transformer"], peaks["vae"])
        row = {
            "stage": "memory 1024", "peak_gib": {k: round(v, 2) for k, v in peaks.items()},
            "weights_gib": {k: round(v, 2) for k, v in held.items()},
            "recipe_8gb_peak_gib": round(worst, 2), "device": torch.cuda.get_device_name(),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        if self.given.out:
            with self.given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def image(self) -> None:
        """Text to image in 4 steps: the sum of its stages, and what the scheduler adds."""
        scheduler = PixArtLCMScheduler()
        scheduler.set_timesteps(4)
        x = torch.randn(1, 4, 128, 128, device=self.device)
        generator = torch.Generator("cuda").manual_seed(0)
        between = self.time(lambda: scheduler.step(x, 759, x, generator))
        self.report("scheduler step", "polyzoo", between)
        for who, text in (("diffusers eager", "transformers eager"), ("polyzoo", "polyzoo")):
            parts = [
                self.totals.get("text 120", {}).get(text),
                self.totals.get("step 1024", {}).get(who),
                self.totals.get("vae 1024", {}).get(who),
            ]
            if all(part is not None for part in parts):
                a, b, c = (part or 0.0 for part in parts)
                self.report("image 1024, 4 steps", who, a + 4 * (b + between) + c, sum_of=parts)


def full_vae() -> AutoencoderKL:
    """Stable Diffusion's autoencoder, with random weights."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=LATENT_SCALE,
    )


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter small random values, those that start at zero too."""
    generator = torch.Generator("cuda").manual_seed(0)
    for name, parameter in module.named_parameters():
        std = 0.5 if "table" in name else 0.02
        parameter.data.normal_(0, std, generator=generator)
        if "norm.weight" in name:
            parameter.data.fill_(1)
    return module


if __name__ == "__main__":
    main()
