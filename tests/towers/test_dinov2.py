"""DINOv2 against timm's network with the same weights, and against the published graph's output."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from polyzoo.core.assets import is_present
from polyzoo.core.errors import AssetError
from polyzoo.towers import DinoV2, DinoV2Config, image_batch, load_dinov2
from support.tower_samples import SMALL, randomised, scene, small_dinov2

needs_asset = pytest.mark.skipif(
    not is_present("dinov2-small"),
    reason="asset dinov2-small is not fetched; lifted by: polyzoo assets fetch dinov2-small",
)


def backbone(model: DinoV2) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}


def timm_twin(model: DinoV2, h: int, w: int) -> VisionTransformer:
    """timm's network for h x w patches, with the model's weights and its table of positions."""
    config = model.config
    twin = VisionTransformer(
        img_size=(h * config.patch, w * config.patch),
        patch_size=config.patch,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        init_values=1e-5,
        num_classes=0,
    )
    twin.load_state_dict(backbone(model) | {"pos_embed": model.position_table(h, w)}, strict=True)
    return twin.eval()


@pytest.mark.parametrize(("h", "w"), [(5, 5), (2, 3), (7, 4), (1, 1)])
def test_equals_timm(h: int, w: int) -> None:
    model = small_dinov2()
    images = torch.randn(2, 3, 14 * h, 14 * w, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(images), timm_twin(model, h, w).forward_features(images)
    assert ours.patches.shape == (2, h, w, SMALL.dim)
    torch.testing.assert_close(ours.cls, theirs[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.patches.flatten(1, 2), theirs[:, 1:], rtol=1e-5, atol=1e-5)
    pooled = torch.cat([theirs[:, 0], theirs[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(ours.pooled, pooled, rtol=1e-5, atol=1e-5)


def test_the_stored_table_is_used_as_it_is_at_its_own_size() -> None:
    model = small_dinov2()
    assert model.position_table(5, 5) is model.pos_embed


def cubic_matrix(out: int, length: int) -> Tensor:
    """Cubic convolution (Keys, 1981) with a = -0.75 and clamped edges, as a matrix `(out, in)`."""
    matrix = torch.zeros(out, length)
    for i in range(out):
        place = (i + 0.5) * length / out - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            t = abs(place - j)
            near = 1.25 * t**3 - 2.25 * t**2 + 1
            far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[i, min(max(j, 0), length - 1)] += near if t <= 1 else far
    return matrix


@pytest.mark.parametrize(("h", "w"), [(3, 2), (8, 5), (11, 1)])
def test_positions_are_resampled_by_cubic_convolution(h: int, w: int) -> None:
    model = small_dinov2()
    table = model.pos_embed[0, 1:].unflatten(0, (5, 5))
    expected = torch.einsum("yi,xj,ijd->yxd", cubic_matrix(h, 5), cubic_matrix(w, 5), table)
    with torch.no_grad():
        found = model.position_table(h, w)
    torch.testing.assert_close(found[0, 1:], expected.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[:, :1], model.pos_embed[:, :1])


def test_a_batch_equals_its_singles_and_a_repeat_itself() -> None:
    model = small_dinov2()
    images = torch.randn(3, 3, 28, 42, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together = model(images)
        assert torch.equal(model(images).patches, together.patches)
        for row in range(3):
            alone = model(images[row : row + 1])
            torch.testing.assert_close(alone.cls[0], together.cls[row], rtol=1e-5, atol=1e-5)


def test_saliency_is_a_map_of_the_images_size() -> None:
    model = small_dinov2()
    images = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        saliency = model.saliency(images)
        again = model.saliency_of(model(images), size=(28, 42))
    assert saliency.shape == (2, 1, 28, 42)
    assert 0 <= saliency.min() < saliency.max() <= 1
    torch.testing.assert_close(saliency, again, rtol=0, atol=0)


def test_the_head_is_three_upsamplings() -> None:
    """Written out with torch's own layers."""
    head = small_dinov2().head
    patches = torch.randn(1, SMALL.dim, 2, 3, generator=torch.Generator().manual_seed(4))
    state, x = head.state_dict(), patches
    for step in (1, 2, 3):
        up, norm = f"upconv{step}", f"bn{step}"
        x = F.conv_transpose2d(x, state[f"{up}.weight"], state[f"{up}.bias"], 2, 1)
        width = (-1, 1, 1)
        deviation = (state[f"{norm}.running_var"] + 1e-5).sqrt()
        x = (x - state[f"{norm}.running_mean"].view(width)) / deviation.view(width)
        x = (x * state[f"{norm}.weight"].view(width) + state[f"{norm}.bias"].view(width)).relu()
    expected = F.conv2d(x, state["final_conv.weight"], state["final_conv.bias"])
    with torch.no_grad():
        out = head.train()(patches)  # it has no training mode
    assert out.shape == (1, 1, 16, 24)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 28, 30), "28 x 30; both sides must be multiples of 14"),
        ((1, 3, 0, 28), "0 x 28; both sides must be multiples of 14"),
        ((3, 28, 28), r"\(3, 28, 28\); they must be \(b, 3, H, W\)"),
        ((1, 4, 28, 28), r"must be \(b, 3, H, W\)"),
    ],
)
def test_bad_shapes_are_named(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_dinov2()(torch.zeros(shape))


def test_bad_configs_are_named() -> None:
    with pytest.raises(ValueError, match="heads=5 must divide dim=48"):
        DinoV2Config(dim=48, heads=5)
    with pytest.raises(ValueError, match="every number must be at least 1"):
        DinoV2Config(depth=0)


def test_an_absent_asset_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYZOO_HOME", str(tmp_path))
    with pytest.raises(AssetError, match="run: polyzoo assets fetch dinov2-small"):
        load_dinov2()


def test_half_precision_stays_near() -> None:
    model, half = small_dinov2(), small_dinov2().to(torch.bfloat16)
    images = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact, rough = model(images).cls, half(images.bfloat16()).cls.float()
    assert F.cosine_similarity(exact, rough).item() > 0.99


@needs_asset
def test_the_real_network_equals_timm() -> None:
    model = load_dinov2()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    twin = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=98
    ).eval()
    twin.load_state_dict(backbone(model) | {"pos_embed": model.position_table(7, 7)}, strict=True)
    images = image_batch([scene()], size=(98, 98))
    with torch.no_grad():
        ours, theirs = model(images), twin.forward_features(images)
    torch.testing.assert_close(ours.cls, theirs[:, 0], rtol=1e-4, atol=1e-4)


@needs_asset
def test_the_real_saliency_equals_the_published_graph() -> None:
    """Stored: what onnxruntime 1.32 computes of the asset's ONNX file, averaged over 8 x 8 pixels.

    Three values are those of single pixels.
    """
    stored = json.loads((Path(__file__).parent / "saliency.json").read_text())
    with torch.no_grad():
        saliency = load_dinov2().saliency(image_batch([scene()], size=(224, 224)))
    coarse = F.avg_pool2d(saliency, 8)[0, 0]
    torch.testing.assert_close(coarse, torch.tensor(stored["mean_8x8"]), rtol=0, atol=2e-5)
    for y, x, value in stored["pixels"]:
        assert abs(saliency[0, 0, y, x].item() - value) < 2e-5


def test_randomised_reaches_everything() -> None:
    """The comparisons above would pass a layer that is never used if its weights were neutral."""
    model = small_dinov2()
    images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        before = model.saliency(images)
        for name, value in model.state_dict().items():
            kept = value.clone()
            randomised(_Holder(value), seed=9)
            assert not torch.equal(model.saliency(images), before), name
            value.copy_(kept)


class _Holder(torch.nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("running_var", value)
