"""Stored results of the published RegionSpot, reproduced."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from polyzoo.core.weights import load_into
from polyzoo.regionspot import clip as clips
from polyzoo.regionspot import compat, geometry, names, postprocess
from polyzoo.regionspot import sam as sams
from polyzoo.regionspot.clip import resize_positions
from polyzoo.regionspot.config import (
    ClipConfig,
    ClipShape,
    IntegrationConfig,
    RegionSpotConfig,
    SamConfig,
)
from polyzoo.regionspot.integration import Integration, region_logits
from polyzoo.regionspot.losses import region_loss
from polyzoo.regionspot.mask_decoder import decode
from polyzoo.regionspot.model import RegionSpot, split_official
from polyzoo.regionspot.text import class_vectors
from support.parity import case_folders


@dataclass(frozen=True)
class Case:
    """One stored case."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def io(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "weights.safetensors")

    def close(self, found: Tensor, name: str, kind: str = "default") -> None:
        wanted = self.io[name]
        assert found.shape == wanted.shape, f"{name}: {found.shape} is not {wanted.shape}"
        if wanted.dtype == torch.bool:
            agreement = (found == wanted).float().mean()
            assert agreement >= self.about["tolerance"]["bool_masks_min_agreement"], name
        elif not wanted.is_floating_point():
            assert torch.equal(found.to(wanted.dtype), wanted), name
        else:
            rtol, atol = self.about["tolerance"][kind]
            torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, msg=lambda m: name + m)


def cases(config: pytest.Config) -> list[Path]:
    folders = case_folders(config, "regionspot")
    return sorted(path.parent for folder in folders for path in folder.rglob("config.json"))


def pytest_generate_tests(metafunc: pytest.Metafunc):
    if "case" in metafunc.fixturenames:
        found = cases(metafunc.config)
        metafunc.parametrize("case", [Case(path) for path in found], ids=[p.name for p in found])


def sam_config(about: dict[str, Any]) -> SamConfig:
    return SamConfig(
        image_size=about["image_size"],
        patch_size=about["patch_size"],
        width=about["encoder_embed_dim"],
        depth=about["encoder_depth"],
        heads=about["encoder_num_heads"],
        window=about["encoder_window_size"],
        global_layers=tuple(about["encoder_global_attn_indexes"]),
        prompt_dim=about["prompt_embed_dim"],
        decoder_depth=about["decoder_depth"],
        decoder_heads=about["decoder_num_heads"],
        decoder_mlp=about["decoder_mlp_dim"],
        mask_channels=about["mask_in_chans"],
        iou_hidden=about["iou_head_hidden_dim"],
    )


def clip_config(about: dict[str, Any]) -> ClipConfig:
    shared = {k: v for k, v in about.items() if k != "log_logit_scale"}
    return ClipConfig(shape=ClipShape(**shared))


def model_of(case: Case) -> RegionSpot:
    """The tiny model, loaded as a published checkpoint is."""
    about = case.about
    config = RegionSpotConfig(
        sam=sam_config(about["sam"]),
        clip=clip_config(about["clip"]),
        integration=IntegrationConfig(
            heads=about["decoder"]["nhead"],
            layers=about["decoder"]["num_layers"],
            mlp=about["decoder"]["dim_feedforward"],
            dropout=0.0,
        ),
    )
    model = RegionSpot(config)
    parts = split_official(case.weights)
    for name, tensors in parts.items():
        load_into(getattr(model, name), tensors, source=name)
    return model.eval()


def test_there_are_cases(pytestconfig: pytest.Config):
    kinds = {Case(path).about["kind"] for path in cases(pytestconfig)}
    assert {"sam_tokens_box", "clip_visual", "train_loss"} & kinds or len(kinds) > 3
    assert kinds <= set(CHECKS), f"no check for {kinds - set(CHECKS)}"


def test_case(case: Case):
    with torch.no_grad():
        CHECKS[case.about["kind"]](case)


def sam_tokens_box(case: Case) -> None:
    sam = sams.build_sam(sam_config(case.about["sam"])).eval()
    load_into(sam, case.weights, source="stored")
    count = case.about["num_images"]
    pixels = torch.stack([sams.preprocess(sam, case.io[f"in.{i}.image"]) for i in range(count)])
    case.close(pixels, "mid.preprocessed")
    embedding = sams.encode_image(sam.image_encoder, pixels)
    case.close(embedding, "mid.image_embeddings")
    positions = sam.prompt_encoder.get_dense_pe()
    case.close(positions, "mid.dense_pe")
    for i in range(count):
        sparse, dense = sams.encode_prompts(sam.prompt_encoder, boxes=case.io[f"in.{i}.boxes"])
        case.close(sparse, f"mid.{i}.sparse")
        case.close(dense, f"mid.{i}.dense_first")
        out = decode(sam.mask_decoder, embedding[i : i + 1], positions, sparse, dense)
        assert out.logits is not None
        assert out.iou is not None
        case.close(out.tokens, f"mid.{i}.mask_tokens_all4")
        case.close(out.logits, f"mid.{i}.masks_all4")
        case.close(out.iou, f"mid.{i}.iou_all4")
        fast = decode(sam.mask_decoder, embedding[i : i + 1], positions, sparse, dense, masks=False)
        assert torch.equal(fast.tokens, out.tokens)
        height, width = case.io[f"in.{i}.original_size"].tolist()
        shape = case.io[f"in.{i}.image"].shape
        frame = geometry.SamFrame(height, width, shape[1], shape[2])
        for kind, multimask in (("single", False), ("multi", True)):
            part = out.selected(multimask=multimask)
            assert part.logits is not None
            assert part.iou is not None
            case.close(part.tokens, f"out.{i}.{kind}.masks_token")
            case.close(part.logits, f"out.{i}.{kind}.low_res_logits")
            case.close(part.iou, f"out.{i}.{kind}.iou_predictions")
            masks = geometry.upscale_masks(part.logits, frame, case.about["sam"]["image_size"])
            case.close(masks, f"out.{i}.{kind}.masks")


def sam_tokens_prompts(case: Case) -> None:
    sam = sams.build_sam(sam_config(case.about["sam"])).eval()
    own = {name for name in sam.state_dict() if not name.startswith("image_encoder")}
    assert own == set(case.weights)
    sam.load_state_dict(case.weights, strict=False)
    io = case.io
    inputs = {
        "boxes": {"boxes": io["in.boxes"]},
        "points": {"points": io["in.point_coords"], "labels": io["in.point_labels"]},
        "masks": {"masks": io["in.mask_inputs"]},
    }
    for kinds in {name.split(".")[1] for name in io if name.startswith("out.")}:
        given = {k: v for kind in kinds.split("_") for k, v in inputs[kind].items()}
        sparse, dense = sams.encode_prompts(sam.prompt_encoder, **given)
        case.close(sparse, f"out.{kinds}.sparse")
        positions = sam.prompt_encoder.get_dense_pe()
        out = decode(sam.mask_decoder, io["in.image_embedding"], positions, sparse, dense)
        for kind, multimask in (("single", False), ("multi", True)):
            part = out.selected(multimask=multimask)
            assert part.iou is not None
            case.close(part.tokens, f"out.{kinds}.masks_token_{kind}")
            case.close(part.iou, f"out.{kinds}.iou_{kind}")
        single = out.selected(multimask=False).logits
        assert single is not None
        case.close(single, f"out.{kinds}.low_res_single")


def clip_of(case: Case) -> torch.nn.Module:
    clip = clips.build_clip(clip_config(case.about["clip"])).eval()
    present = dict(case.weights)
    wanted = clip.state_dict()
    assert set(present) <= set(wanted)
    clip.load_state_dict({**wanted, **present})
    return clip


def clip_visual(case: Case) -> None:
    clip = clip_of(case)
    image = case.io["in.resized_image"]
    case.close(clips.feature_map(clip, image), "out.featuremap")
    for depth in range(case.about["clip"]["vision_layers"] - 1, -1, -1):
        clip.visual.transformer.resblocks = clip.visual.transformer.resblocks[: depth + 1]
        case.close(clips.feature_map(clip, image), f"mid.block{depth}")


def clip_posinterp(case: Case) -> None:
    about = {**case.about["clip"], "image_size": case.about["new_image_size"]}
    clip = clips.build_clip(clip_config(about)).eval()
    side = about["image_size"] // about["patch_size"]
    table = resize_positions(case.weights["visual.positional_embedding"], side)
    case.close(table, "out.positional_embedding_new")
    clip.load_state_dict(
        {**clip.state_dict(), **case.weights, "visual.positional_embedding": table}
    )
    case.close(clips.feature_map(clip, case.io["in.resized_image"]), "out.featuremap")


def text_classifier(case: Case) -> None:
    clip = clip_of(case)
    tokens = case.io["in.tokens"].long()
    case.close(class_vectors(clip, tokens, batch=100), "out.text_feats")
    first = clips.encode_text(clip, tokens[:2].flatten(0, 1)).unflatten(0, (2, -1))
    case.close(first, "mid.template_embeds_first2")


def tokenizer(case: Case) -> None:
    import open_clip

    tokenize = open_clip.get_tokenizer("ViT-B-16-quickgelu")
    case.close(tokenize(case.about["texts"]).int(), "out.token_ids")
    made = [
        template.format(names.clean_name(name, "official"))
        for name in case.about["class_names"]
        for template in case.about["templates"]
    ]
    assert made == case.about["texts"]


def integration(case: Case) -> None:
    about = case.about
    config = IntegrationConfig(
        heads=about["nhead"], layers=about["num_layers"], mlp=about["dim_feedforward"], dropout=0.0
    )
    module = Integration(about["sam_dim"], about["d_model"], about["text_dim"], config).eval()
    load_into(module, case.weights, source="stored")
    tokens, memory = case.io["in.mask_tokens"], case.io["in.clip_feat"]
    x = module.to_clip(tokens)
    case.close(x, "mid.to_clip")
    for place, layer in enumerate(module.decoder.layers):
        attended = layer.self_attn(x)
        case.close(attended, f"mid.layer{place}.self_attn")
        first = layer.norm1(x + attended)
        case.close(first, f"mid.layer{place}.norm1")
        crossed = layer.multihead_attn(first, memory)
        case.close(crossed, f"mid.layer{place}.cross_attn")
        case.close(layer.norm2(first + crossed), f"mid.layer{place}.norm2")
        x = layer(x, memory, None)
        case.close(x, f"mid.layer{place}.out")
    case.close(module.decoder.norm(x), "mid.decoder_out")
    out = module(tokens, memory)
    case.close(out, "out.semantic_token")
    half = module(tokens[:, : about["first_half"]], memory)
    case.close(half, "out.semantic_token_first_half_only")
    logits = region_logits(out, case.io["in.text_feats"], case.io["in.logit_scale"])
    case.close(logits, "out.logits", "logits")


def full_eval(case: Case) -> None:
    model = model_of(case)
    io, count = case.io, case.about["num_images"]
    embeddings = torch.cat([model.image_embedding(io[f"in.{i}.image"][None]) for i in range(count)])
    case.close(embeddings, "mid.image_embeddings")
    out = [model.decode(embeddings[i], boxes=io[f"in.{i}.boxes"], chunk=2) for i in range(count)]
    tokens = torch.stack([part.selected(multimask=False).tokens[:, 0] for part in out])
    memory = model.semantic_map(torch.stack([io[f"in.{i}.resized_image"] for i in range(count)]))
    case.close(memory, "mid.clip_feat")
    case.close(model.integration.to_clip(tokens), "mid.to_clip")
    regions = model(tokens, memory)
    case.close(regions, "mid.semantic_token")
    logits = region_logits(regions, io["in.text_feats"], io["in.logit_scale"])
    case.close(logits, "out.logits", "logits")
    case.close(logits.softmax(-1), "out.probs")
    for i, part in enumerate(out):
        height, width = io[f"in.{i}.original_size"].tolist()
        shape = io[f"in.{i}.image"].shape
        frame = geometry.SamFrame(height, width, shape[1], shape[2])
        assert part.logits is not None
        masks = geometry.upscale_masks(part.logits[:, :1], frame, case.about["sam"]["image_size"])
        agreement = (masks == io["out.pred_mask"][i]).float().mean()
        assert agreement >= case.about["tolerance"]["bool_masks_min_agreement"]


def predictor(case: Case) -> None:
    model = model_of(case)
    io = case.io
    image = Image.fromarray(io["in.image_hwc_uint8"].numpy())
    side = case.about["sam"]["image_size"]
    frame = geometry.sam_frame(image.height, image.width, side)
    pixels = geometry.sam_pixels(image, frame)
    case.close(pixels.permute(1, 2, 0), "mid.sam_input_uint8")
    boxes = frame.boxes(io["in.boxes_xyxy_original_px"])
    case.close(boxes, "mid.boxes_sam_frame")
    embedding = model.image_embedding(pixels[None].float())
    case.close(embedding, "mid.image_embedding")
    squashed = geometry.clip_pixels(image, clips.input_size(model.clip), antialias=False)
    case.close(squashed[None], "mid.clip_resized_image")
    memory = model.semantic_map(squashed[None])
    case.close(memory, "mid.clip_feat")

    def logits_of(tokens: Tensor) -> Tensor:
        """Of `(boxes, j, c)` tokens: the j-th of all boxes are one sequence."""
        regions = model(tokens.transpose(0, 1), memory.expand(tokens.shape[1], -1, -1))
        return region_logits(regions, io["in.text_feats"], io["in.logit_scale"]).transpose(0, 1)

    out = model.decode(embedding[0], boxes=boxes)
    single = out.selected(multimask=False)
    case.close(single.tokens, "out.single.masks_token")
    logits = logits_of(single.tokens).transpose(0, 1)
    case.close(logits, "out.single.logits", "logits")
    best = logits[0].softmax(-1).max(-1)
    case.close(best.values, "out.single.class_score")
    case.close(best.indices, "out.single.class_index")
    assert single.iou is not None
    assert single.logits is not None
    case.close(single.iou, "out.single.iou")
    case.close(geometry.upscale_masks(single.logits, frame, side), "out.single.masks")
    multi = out.selected(multimask=True)
    case.close(multi.tokens, "out.multi_all.masks_token")
    case.close(logits_of(multi.tokens), "out.multi_all.logits", "logits")
    labels = io["in.point_labels"][None]
    points = frame.boxes(io["in.point_coords_original_px"])[None]
    pointed = model.decode(embedding[0], points=points, labels=labels).selected(multimask=True)
    assert pointed.logits is not None
    case.close(logits_of(pointed.tokens), "out.points.logits", "logits")
    case.close(geometry.upscale_masks(pointed.logits, frame, side), "out.points.masks")


def train_loss(case: Case) -> None:
    model = model_of(case)
    io, recipe = case.io, case.about["adamw"]
    memory = model.semantic_map(io["in.resized_image"])
    tokens = io["in.mask_tokens"][:, :, 0]
    with torch.enable_grad():

        def loss_now() -> Tensor:
            regions = model(tokens, memory)
            logits = region_logits(regions, io["in.text_feats"], io["in.logit_scale"])
            return region_loss(
                logits,
                io["in.label"],
                alpha=case.about["focal_alpha"],
                gamma=case.about["focal_gamma"],
            )

        regions = model(tokens, memory)
        case.close(regions.detach(), "mid.semantic_token")
        logits = region_logits(regions, io["in.text_feats"], io["in.logit_scale"])
        case.close(logits.detach(), "mid.logits", "logits")
        loss = loss_now()
        case.close(loss.detach(), "out.loss", "grad")
        loss.backward()
        trained = dict(model.integration.named_parameters())
        assert len(trained) == 60
        for name, parameter in trained.items():
            assert parameter.grad is not None
            case.close(parameter.grad, f"out.grad.{name}", "grad")
        assert all(p.grad is None for part in (model.sam, model.clip) for p in part.parameters())
        optimizer = torch.optim.AdamW(
            trained.values(),
            lr=recipe["lr"],
            weight_decay=recipe["weight_decay"],
            betas=tuple(recipe["betas"]),
            eps=recipe["eps"],
        )
        norm = torch.nn.utils.get_total_norm(p.grad for p in trained.values())  # pyright: ignore
        case.close(norm, "out.grad_norm", "grad")
        losses = []
        for _ in range(recipe["steps"]):
            optimizer.zero_grad()
            loss = loss_now()
            losses.append(loss.detach())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), recipe["clip_norm"])
            optimizer.step()
        losses.append(loss_now().detach())
    case.close(torch.stack(losses), "out.adamw.losses", "adamw")
    for name in case.io:
        if name.startswith("out.adamw.final."):
            case.close(trained[name.removeprefix("out.adamw.final.")].detach(), name, "adamw")


def prep_train(case: Case) -> None:
    size = tuple(case.about["target_size"])
    most = max(case.about["counts"])
    for i in range(len(case.about["counts"])):
        shifted = compat.shift_labels(case.io[f"in.{i}.classes_1based"])
        case.close(compat.repeat_rows(shifted, most), f"out.{i}.label")
        tokens = compat.repeat_rows(case.io[f"in.{i}.mask_tokens"], most)
        case.close(tokens, f"out.{i}.mask_tokens")
        check_squash(case, case.io[f"in.{i}.image_uint8"], size, f"out.{i}.resized_image")


def check_squash(case: Case, image: Tensor, size: tuple[int, ...], name: str) -> None:
    pixels = image[None].float() / 255
    for kind, antialias in (("no_antialias", False), ("antialias", True)):
        found = geometry.squash(pixels, (size[0], size[1]), antialias=antialias)[0]
        case.close(found, f"{name}.{kind}")


def prep_eval(case: Case) -> None:
    io, about = case.io, case.about
    current = tuple(about["current_size"])
    image = Image.fromarray(np.ascontiguousarray(io["in.image_uint8"].permute(1, 2, 0).numpy()))
    frame = geometry.sam_frame(*current, about["sam_long_side"])
    case.close(geometry.sam_pixels(image, frame), "out.sam_image_uint8")
    check_squash(case, io["in.image_uint8"], tuple(about["target_size"]), "out.resized_image")
    case.close(frame.boxes(io["in.gt_boxes_current_frame"]), "out.gt.boxes_sam_frame")
    raw = tuple(about["raw_size"])
    size = (frame.sam_height, frame.sam_width)
    proposals = io["in.proposal_boxes_raw_xyxy"]
    case.close(compat.scale_proposals(proposals, raw, current, size), "out.boxes_sam_frame")
    own = geometry.sam_frame(*raw, about["sam_long_side"]).boxes(proposals)
    assert (own - io["out.boxes_sam_frame"]).abs().max() < 0.02 * about["sam_long_side"]
    swapped = compat.whole_image(*current)
    case.close(frame.boxes(swapped), "out.gt_empty.boxes_sam_frame")


def post_eval(case: Case) -> None:
    io = case.io
    size = tuple(io["in.image_size_hw"].tolist())
    raw = tuple(io["in.raw_size_hw"].tolist())
    for kind, scores in (("gt", None), ("pred", io["in.scores"][0])):
        found = postprocess.best_pairs(
            io["in.logits"][0], io["in.boxes"][0], scores, top=case.about["top_k"], rank="class"
        )
        for name in ("boxes", "scores", "classes"):
            case.close(getattr(found, name), f"out.{kind}.{name}")
        final = postprocess.to_image(found, size, raw)
        for name in ("boxes", "scores", "classes"):
            case.close(getattr(final, name), f"out.{kind}.final.{name}")
        assert len(final.boxes) == int(io[f"out.{kind}.final.num"])
        masks = postprocess.resize_masks(io["in.pred_mask"][0, :, 0][final.rows[:20]], raw)
        case.close(masks, f"out.{kind}.final.masks_first20")


CHECKS = {
    check.__name__: check
    for check in (
        sam_tokens_box, sam_tokens_prompts, clip_visual, clip_posinterp, text_classifier,
        tokenizer, integration, full_eval, predictor, train_loss, prep_train, prep_eval, post_eval,
    )
}  # fmt: skip
CHECKS["integration_defaults"] = integration
