"""Class vectors: names through templates and a text tower, kept on disk once made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.errors import DataError, WeightsError
from polyzoo.core.weights import read_metadata, read_weights, write_weights
from polyzoo.regionspot.clip import encode_text
from polyzoo.regionspot.config import Names
from polyzoo.regionspot.names import check_names, clean_name, templates

Tokenize = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class TextClassifier:
    """A vocabulary as unit vectors, and what made them.

    Example:
        >>> classifier = pipeline.classifier(["cat", "dog"])
        >>> classifier.save("pets.safetensors")
    """

    names: tuple[str, ...]
    vectors: Tensor
    """`(c, t)` float32, unit length."""
    scale: float
    """Multiplies the cosine."""
    source: str
    """Fingerprint of text tower, templates and cleaning."""
    bias: float = 0.0
    """Added to every logit; for towers trained with one."""
    offsets: Tensor | None = None
    """`(c,)`, subtracted from the cosines: how near a name is to everything."""

    def save(self, path: str | Path) -> None:
        """Write names and vectors to one safetensors file."""
        about = {
            "names": json.dumps(self.names), "scale": repr(self.scale), "source": self.source,
            "bias": repr(self.bias),
        }  # fmt: skip
        tensors = {"vectors": self.vectors}
        if self.offsets is not None:
            tensors["offsets"] = self.offsets
        write_weights(path, tensors, metadata=about)

    @classmethod
    def load(cls, path: str | Path, *, source: str | None = None) -> TextClassifier:
        """Read what `save` wrote.

        Args:
            path: The file.
            source: What it must have been made by; any where not given.

        Raises:
            WeightsError: Not such a file, or made by another text tower.
        """
        tensors, about = read_weights(path), read_metadata(path)
        if "vectors" not in tensors or not {"names", "scale", "source"} <= about.keys():
            raise WeightsError(f"{path}: is no file of TextClassifier.save")
        if source is not None and about["source"] != source:
            raise WeightsError(
                f"{path}: made by text tower and templates {about['source'][:12]}, this model has "
                f"{source[:12]}; make it again with this model's classifier()"
            )
        return cls(
            names=tuple(json.loads(about["names"])),
            vectors=tensors["vectors"],
            scale=float(about["scale"]),
            source=about["source"],
            bias=float(about.get("bias", "0")),
            offsets=tensors.get("offsets"),
        )

    def logits(self, similarity: Tensor) -> Tensor:
        """Return the logits of cosines `(..., c)`."""
        if self.offsets is not None:
            similarity = similarity - self.offsets
        return self.scale * similarity + self.bias


def class_vectors(clip: Any, tokens: Tensor, *, batch: int = 1024) -> Tensor:
    """Average over templates, then scale to length 1 (the published order of the two).

    Args:
        clip: open_clip model.
        tokens: `(c, templates, context)` ids.
        batch: Texts in one forward pass.

    Returns:
        `(c, t)` float32.
    """
    c, count, context = tokens.shape
    device = next(clip.parameters()).device
    flat = tokens.reshape(c * count, context)
    found = [encode_text(clip, part.to(device)).float() for part in flat.split(batch)]
    mean = torch.cat(found).view(c, count, -1).mean(1)
    return mean / mean.norm(dim=-1, keepdim=True)


def fingerprint(module: nn.Module) -> str:
    """Return a hash of names, shapes and a sample of every weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // 64)
        sample = flat[::step][:65].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample)
    return digest.hexdigest()


def text_source(clip: Any, kind: str, cleaning: Names) -> str:
    """Return the fingerprint of a text tower with its templates and name cleaning."""
    parts = [fingerprint(clip), kind, cleaning, *templates(kind)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@torch.no_grad()
def build_classifier(
    clip: Any,
    tokenize: Tokenize,
    names: str | Sequence[str],
    *,
    kind: str = "imagenet81",
    cleaning: Names = "readable",
    cache: Path | None = None,
) -> TextClassifier:
    """Turn names into class vectors, or read them where this was done before.

    Args:
        clip: open_clip model.
        tokenize: From texts to `(n, context)` ids.
        names: Distinct names, or one text with commas.
        kind: "imagenet81" or "plain".
        cleaning: See `clean_name`.
        cache: Folder of class vectors; nothing is kept where not given.

    Raises:
        DataError: No names, an empty one, or one too long for the text tower.
    """
    checked = check_names(names)
    source = text_source(clip, kind, cleaning)
    digest = hashlib.sha256("\n".join([source, *checked]).encode()).hexdigest()
    path = None if cache is None else cache / f"{digest[:32]}.safetensors"
    if path is not None and path.is_file():
        return TextClassifier.load(path, source=source)
    sentences = templates(kind)
    texts = [s.format(clean_name(name, cleaning)) for name in checked for s in sentences]
    tokens = tokenize(texts)
    _check_lengths(tokens, texts, checked, len(sentences))
    vectors = class_vectors(clip, tokens.view(len(checked), len(sentences), -1)).cpu()
    bias = getattr(clip, "logit_bias", None)
    made = TextClassifier(
        names=checked,
        vectors=vectors,
        scale=float(clip.logit_scale.detach().float().exp()),
        source=source,
        bias=0.0 if bias is None else float(bias.detach()),
    )
    if path is not None:
        made.save(path)
    return made


def _check_lengths(
    tokens: Tensor, texts: Sequence[str], names: Sequence[str], per_name: int
) -> None:
    """A text as long as the context was cut: it would name something else."""
    full = (tokens[:, -1] != 0).nonzero().flatten().tolist()
    if full:
        name = names[full[0] // per_name]
        raise DataError(
            f"names: {name[:60]!r} makes a text of {tokens.shape[1]} tokens or more "
            f"({texts[full[0]][:40]!r}...); shorten it, the text tower reads {tokens.shape[1]}"
        )
