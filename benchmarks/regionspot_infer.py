"""RegionSpot at full size against the same built plainly from segment_anything and open_clip.

    python benchmarks/regionspot_infer.py [--quick] [--batches 1 4] [--boxes 50]

SAM ViT-B, CLIP ViT-L/14 at 336 pixels and the integration module with random weights, 50 boxes an
image. Both sides hold the same weights, compute in bfloat16 on the same GPU in one process, and
start from pixels on the device. The plain side calls the published modules (a forward hook takes
the mask tokens, since the published decoder does not return them) and `torch.nn.
TransformerDecoder`; it is timed as it is, and with `torch.compile` on its image towers. Ours is
timed in eager mode, and as one CUDA graph with compiled blocks; with low-resolution masks too,
which the plain decoder always computes.

One JSON line per figure, milliseconds per batch, median of repeated runs by CUDA events.
`error` is the relative distance of the region embeddings to the plain side's in float32.
`floor_ms` is the necessary arithmetic at 40 % of 989 TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.regionspot.config import SAMS, ClipConfig, ClipShape, RegionSpotConfig, SamConfig
from polyzoo.regionspot.fast import GraphedRegions
from polyzoo.regionspot.model import RegionSpot

GFLOP = {"sam": 972.1, "clip": 381.9, "box": 3.62, "module50": 10.9}
PEAK = 989e12


def small() -> RegionSpotConfig:
    """A model that a CPU runs, to try this script."""
    return RegionSpotConfig(
        sam=SamConfig(image_size=128, width=64, depth=2, heads=2, global_layers=(1,), window=3),
        clip=ClipConfig(shape=ClipShape(vision_width=64, vocab_size=100)),
    )


def spread_weights(model: nn.Module) -> None:
    """Give random weights where the constructor leaves zeros, so that nothing is trivial."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class Plain(nn.Module):
    """The published modules, put together as a user would."""

    def __init__(self, model: RegionSpot) -> None:
        super().__init__()
        self.sam, self.clip = model.sam, model.clip
        config = model.config.integration
        width = model.integration.projector.in_features
        layer = nn.TransformerDecoderLayer(
            width, config.heads, config.mlp, config.dropout, batch_first=True
        )
        decoder = nn.TransformerDecoder(layer, config.layers, norm=nn.LayerNorm(width))
        decoder.load_state_dict(model.integration.decoder.state_dict())
        dtype = model.integration.to_clip.weight.dtype
        self.decoder = decoder.eval().to(next(model.parameters()).device, dtype)
        self.to_clip, self.projector = model.integration.to_clip, model.integration.projector
        self.tokens: Tensor | None = None
        self.sam.mask_decoder.transformer.register_forward_hook(self._keep)
        self.encoder: Callable[[Tensor], Tensor] = self.sam.image_encoder
        self.visual: Callable[[Tensor], Tensor] = self._visual

    def _keep(self, _module: nn.Module, _given: Any, out: tuple[Tensor, Tensor]) -> None:
        self.tokens = out[0]

    def _visual(self, pixels: Tensor) -> Tensor:
        out = self.clip.visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=False, intermediates_only=True,
            output_fmt="NLC", output_extra_tokens=True,
        )  # fmt: skip
        return torch.cat([out["image_intermediates_prefix"][-1], out["image_intermediates"][-1]], 1)

    def compile_towers(self) -> None:
        """Compile both image towers as wholes."""
        self.encoder = torch.compile(self.sam.image_encoder)  # pyright: ignore
        self.visual = torch.compile(self._visual)  # pyright: ignore

    def decode(self, embedding: Tensor, boxes: Tensor) -> Tensor:
        """Tokens of one image's boxes; the masks are computed on the way."""
        dtype = embedding.dtype
        sparse, dense = self.sam.prompt_encoder(points=None, boxes=boxes, masks=None)
        self.sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=self.sam.prompt_encoder.get_dense_pe().to(dtype),
            sparse_prompt_embeddings=sparse.to(dtype),
            dense_prompt_embeddings=dense.to(dtype),
            multimask_output=False,
        )
        assert self.tokens is not None
        return self.tokens[:, 1]

    def module(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """The trained part."""
        return self.projector(self.decoder(self.to_clip(tokens), memory))

    def forward(self, sam: Tensor, clip: Tensor, boxes: Tensor) -> Tensor:
        """Region embeddings."""
        embeddings = self.encoder(sam)
        memory = self.visual(clip)
        tokens = torch.stack([self.decode(e, b) for e, b in zip(embeddings, boxes, strict=True)])
        return self.module(tokens, memory)


def ours_forward(model: RegionSpot, sam: Tensor, clip: Tensor, boxes: Tensor) -> Tensor:
    """The same in our order of operations, without masks."""
    embeddings = model.encode_pixels(sam)
    memory = model.semantic_map(clip)
    tokens = torch.stack(
        [
            model.decode(e, boxes=b, want_masks=False).tokens[:, 0]
            for e, b in zip(embeddings, boxes, strict=True)
        ]
    )
    return model(tokens, memory)


def timed(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median milliseconds."""
    for _ in range(3):
        function()
    times: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def show(**row: Any) -> None:
    """One line."""
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a CPU")
    parser.add_argument("--eager-plain", action="store_true", help="do not compile the plain side")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--boxes", type=int, default=50)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        parser.error("no CUDA device here; --small runs a tiny model on the CPU")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = small() if options.small else RegionSpotConfig(
        sam=SAMS["vit_b"], clip=ClipConfig(name="ViT-L-14-336-quickgelu")
    )  # fmt: skip
    torch.manual_seed(0)
    model = RegionSpot(config).eval()
    spread_weights(model)
    model = model.to(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    show(device=name, torch=torch.__version__, boxes=options.boxes, dtype=str(dtype))
    side, repeats = config.sam.image_size, 10 if options.quick else 30
    clip_side = model.clip.visual.image_size
    size = (clip_side, clip_side) if isinstance(clip_side, int) else clip_side
    inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    exact: dict[int, Tensor] = {}
    reference = Plain(model)
    for batch in options.batches:
        sam = torch.randn(batch, 3, side, side, device=device)
        clip = torch.randn(batch, 3, *size, device=device)
        corner = torch.rand(batch, options.boxes, 2, device=device) * side * 0.6
        extent = (0.05 + 0.3 * torch.rand(batch, options.boxes, 2, device=device)) * side
        inputs[batch] = (sam, clip, torch.cat([corner, corner + extent], -1))
        exact[batch] = reference(*inputs[batch]).float()
    model.to(dtype)
    plain = Plain(model)

    def error(found: Tensor, batch: int) -> float:
        wanted = exact[batch]
        return float((found.float() - wanted).norm() / wanted.norm())

    def stages(side_name: str, batch: int, sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
        found = {stage: timed(call, device, repeats) for stage, call in sides.items()}
        for stage, ms in found.items():
            show(batch=batch, side=side_name, stage=stage, ms=round(ms, 3))
        return found

    def half(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        sam, clip, boxes = inputs[batch]
        return sam.to(dtype), clip.to(dtype), boxes

    def plain_stages(batch: int) -> dict[str, Callable[[], Any]]:
        sam, clip, boxes = half(batch)
        embedding, memory = plain.encoder(sam), plain.visual(clip)
        tokens = torch.stack([plain.decode(e, b) for e, b in zip(embedding, boxes, strict=True)])
        return {
            "sam": lambda: plain.encoder(sam),
            "clip": lambda: plain.visual(clip),
            "decoder": lambda: [plain.decode(e, b) for e, b in zip(embedding, boxes, strict=True)],
            "module": lambda: plain.module(tokens, memory),
            "all": lambda: plain(sam, clip, boxes),
        }

    def our_stages(batch: int) -> dict[str, Callable[[], Any]]:
        sam, clip, boxes = half(batch)
        embedding, memory = model.encode_pixels(sam), model.semantic_map(clip)

        def decode(masks: bool) -> list[Any]:
            return [
                model.decode(e, boxes=b, want_masks=masks)
                for e, b in zip(embedding, boxes, strict=True)
            ]

        tokens = torch.stack([part.tokens[:, 0] for part in decode(False)])
        return {
            "sam": lambda: model.encode_pixels(sam),
            "clip": lambda: model.semantic_map(clip),
            "decoder": lambda: decode(False),
            "decoder with masks": lambda: decode(True),
            "module": lambda: model(tokens, memory),
            "all": lambda: ours_forward(model, sam, clip, boxes),
        }

    best: dict[tuple[int, str], float] = {}
    for batch in options.batches:
        arguments_ = half(batch)
        show(batch=batch, side="plain", error=error(plain(*arguments_), batch))
        show(batch=batch, side="ours", error=error(ours_forward(model, *arguments_), batch))
        best[batch, "plain"] = stages("plain", batch, plain_stages(batch))["all"]
        best[batch, "ours"] = stages("ours", batch, our_stages(batch))["all"]
    if device.type == "cuda":
        for masks in (False, True):
            for batch in options.batches:
                begin = time.perf_counter()
                run = GraphedRegions(model, images=batch, boxes=options.boxes, want_masks=masks)
                wait = time.perf_counter() - begin
                arguments_ = half(batch)
                wrong = error(run(*arguments_), batch)
                ms = timed(lambda run=run, a=arguments_: run(*a), device, repeats)
                label = "ours, one graph" + (" with masks" if masks else "")
                best[batch, label] = ms
                show(batch=batch, side=label, stage="all", ms=round(ms, 3), error=wrong,
                     first_seconds=round(wait, 1))  # fmt: skip
                del run
        for batch in options.batches:
            stages("ours, compiled blocks", batch, our_stages(batch))
    if device.type == "cuda" and not options.eager_plain:
        plain.compile_towers()
        for batch in options.batches:
            begin = time.perf_counter()
            plain(*half(batch))
            torch.cuda.synchronize()
            wait = time.perf_counter() - begin
            found = stages("plain, towers compiled", batch, plain_stages(batch))
            best[batch, "plain, towers compiled"] = found["all"]
            show(batch=batch, side="plain, towers compiled", first_seconds=round(wait, 1))
    for batch in options.batches:
        work = batch * (
            GFLOP["sam"] + GFLOP["clip"] + GFLOP["box"] * options.boxes + GFLOP["module50"]
        )
        ours = min(ms for (b, side_name), ms in best.items() if b == batch and "ours" in side_name)
        show(
            batch=batch,
            plain_over_ours=round(best[batch, "plain"] / ours, 2),
            compiled_plain_over_ours=round(
                best.get((batch, "plain, towers compiled"), float("nan")) / ours, 2
            ),
            ours_ms_per_image=round(ours / batch, 3),
            floor_ms=None if options.small else round(work * 1e9 / (0.4 * PEAK) * 1e3, 2),
        )


if __name__ == "__main__":
    main()
