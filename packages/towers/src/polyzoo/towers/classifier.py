"""EfficientNet-lite0: the thousand ImageNet classes of a picture.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.assets import asset_folder
from polyzoo.core.device import resolve_device
from polyzoo.core.weights import load_into, read_weights

ASSET = "efficientnet-lite0"
SIZE = 224
"""Side in pixels it was trained at."""
_ARCHITECTURE = "tf_efficientnet_lite0"


class Classifier(nn.Module):
    """Logits over the classes, and the features below them.

    Example:
        >>> classifier = load_classifier()
        >>> logits = classifier(image_batch(["cat.jpg"], size=(SIZE, SIZE), normalise=HALF))
        >>> classifier.names[int(logits.argmax())]
        'tiger cat'
    """

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.network: Any = timm.create_model(_ARCHITECTURE, pretrained=False)
        self.names = class_names()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits.

        Args:
            images: `(b, 3, H, W)`, -1 to 1 (`pictures.image_batch` with `HALF`), best 224 x 224.

        Returns:
            `(b, 1000)`.
        """
        return self.network(images)

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features below the classes: `(b, 1280)`."""
        maps = self.network.forward_features(images)
        return self.network.forward_head(maps, pre_logits=True)


def class_names() -> tuple[str, ...]:
    """Return the names of the 1000 classes, each with its synonyms: "tench, Tinca tinca"."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def load_classifier(
    *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Classifier:
    """Return the real network, frozen, from the fetched asset.

    Raises:
        AssetError: The asset has not been fetched; the message says how to.
    """
    folder = asset_folder(ASSET)
    with torch.random.fork_rng(devices=[]):  # its random weights must not move the caller's state
        model = Classifier()
    load_into(model.network, read_weights(folder), source=str(folder))
    return model.eval().requires_grad_(False).to(resolve_device(device), dtype)
