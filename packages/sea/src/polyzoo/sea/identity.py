"""What a model is: tells whether two sets of vectors compare. Torch-free."""

from __future__ import annotations

import hashlib
from pathlib import Path

from polyzoo.core import config as configs
from polyzoo.core.weight_files import FILE_NAME
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.model_sources import CONFIG_NAME, encoder_folder


def fingerprint(config: SeaConfig, folder: Path | None, *, probe: bytes = b"") -> str:
    """Hash of configuration and weights.

    Args:
        config: The model's, which may differ from what its folder says.
        folder: With the model's files; None for an encoder without SEA training.
        probe: A few weights of an encoder that lies elsewhere.
    """
    digest = hashlib.sha256(str(sorted(configs.dump(config).items())).encode())
    if folder is not None:
        digest.update((folder / CONFIG_NAME).read_bytes())
        digest.update((folder / FILE_NAME).read_bytes())
        if config.encoder == "self":
            shape = encoder_folder("self", beside=folder) / CONFIG_NAME
            digest.update(shape.read_bytes())
    digest.update(probe)
    return digest.hexdigest()


def model_id(name: str, found: str) -> str:
    """Identity for people and for indexes.

    Args:
        name: Of the model.
        found: Its fingerprint.
    """
    return f"{name}-{found[:16]}"
