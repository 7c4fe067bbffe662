"""Which text a picture shows, by a linear map fitted to icons: the judge of generated pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from polyzoo.core.errors import DataError, WeightsError
from polyzoo.core.icons.pack import IconPack
from polyzoo.core.icons.records import CORE_GROUPS
from polyzoo.core.weights import read_metadata, read_weights, write_weights
from polyzoo.towers.dinov2 import DinoV2
from polyzoo.towers.features import SIDE, picture_features
from polyzoo.towers.pictures import Picture
from polyzoo.towers.retrieval import recall_at
from polyzoo.towers.ridge import RidgeMap
from polyzoo.towers.text import TextTower

SHIPPED = Path(__file__).parent / "assets" / "judge.safetensors"
_FORMAT = "polyzoo prompt judge 1"


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How often a picture's own text is among the best k of all candidates."""

    pictures: int
    candidates: int
    recall: dict[str, float]
    """"1", "5", "10" to a share."""
    chance: dict[str, float]
    """The same for guessing."""


class PromptJudge:
    """Scores pictures against texts: DINOv2 features, mapped linearly to MiniLM's vectors.

    It was fitted on training pictures of the icon pack only. State its result beside that of real
    pictures of the same texts, never alone.

    Example:
        >>> judge = PromptJudge.load(load_dinov2(), load_text_tower("minilm"))
        >>> judge.retrieval(["apple.png", "dog.png"], ["red apple", "dog face"]).recall["1"]
        1.0
    """

    def __init__(self, ridge: RidgeMap, model: DinoV2, text: TextTower) -> None:
        self.ridge, self.model, self.text = ridge, model, text

    @classmethod
    def fit(
        cls,
        pack: IconPack,
        model: DinoV2,
        text: TextTower,
        *,
        penalty: float = 100.0,
    ) -> PromptJudge:
        """Fit to a pack's training pictures: emoji of things, and clip art.

        The target of a picture is the middle of two vectors: of its label, and of its label with
        its keywords.

        Raises:
            DataError: The pack holds too few training pictures.
        """
        chosen = pack.subset(split="train", groups=(*CORE_GROUPS, None))
        if len(chosen) < 2:
            raise DataError(f"{pack.folder}: {len(chosen)} training pictures; two are the least")
        features = picture_features([pack.rgb(index) for index in chosen], model)
        records = [pack.records[index] for index in chosen]
        labels = text.encode([record.label for record in records])
        words = text.encode([", ".join((record.label, *record.tags)) for record in records])
        targets = F.normalize(labels.cpu() + words.cpu(), dim=1)
        return cls(RidgeMap.fit(features, targets, penalty=penalty), model, text)

    @classmethod
    def load(cls, model: DinoV2, text: TextTower, *, path: Path = SHIPPED) -> PromptJudge:
        """Read a fitted map; the shipped one is for DINOv2 ViT-S/14 and MiniLM.

        Raises:
            WeightsError: The file is no such map, or the towers are of other widths.
        """
        tensors = read_weights(path)
        if read_metadata(path).get("polyzoo") != _FORMAT:
            raise WeightsError(f"{path}: is no prompt judge")
        features, dim = tensors["weight"].shape
        if (features, dim) != (2 * model.config.dim, text.dim):
            raise WeightsError(
                f"{path}: maps {features} features to {dim} channels; these towers have "
                f"{2 * model.config.dim} and {text.dim}"
            )
        return cls(RidgeMap(**tensors), model, text)

    def save(self, path: Path) -> None:
        """Write the map, as half floats."""
        tensors = {name: value.half() for name, value in self.ridge.tensors().items()}
        write_weights(path, tensors, metadata={"polyzoo": _FORMAT, "side": str(SIDE)})

    def scores(self, pictures: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """Return how well each picture shows each text: `(n, m)`, -1 to 1."""
        features = picture_features(pictures, self.model)
        return self.ridge.scores(features, self.text.encode(texts).cpu())

    def retrieval(
        self,
        pictures: Sequence[Picture],
        texts: Sequence[str],
        *,
        candidates: Sequence[str] | None = None,
        ks: Sequence[int] = (1, 5, 10),
    ) -> Retrieval:
        """Find each picture's text among candidates.

        Args:
            pictures: Pictures.
            texts: The text each was made from (or shows), in the same order.
            candidates: Texts to choose among; all different ones of `texts` where not given.
            ks: Numbers of guesses.

        Raises:
            DataError: The numbers differ, or a text is not among the candidates.
        """
        if len(pictures) != len(texts):
            raise DataError(f"{len(pictures)} pictures and {len(texts)} texts: one each is needed")
        names = list(dict.fromkeys(texts if candidates is None else candidates))
        places = {name: place for place, name in enumerate(names)}
        unknown = next((text for text in texts if text not in places), None)
        if unknown is not None:
            raise DataError(f"the text {unknown!r} is not among the candidates")
        truth = torch.tensor([places[text] for text in texts])
        found = recall_at(self.scores(pictures, names), truth, ks=ks)
        return Retrieval(
            pictures=len(pictures),
            candidates=len(names),
            recall={str(k): round(value, 4) for k, value in found.items()},
            chance={str(k): round(min(1.0, k / len(names)), 4) for k in ks},
        )


def read_prompts(path: Path) -> list[tuple[Path, str]]:
    """Read lines of `{"image": "a.png", "prompt": "red apple"}`; images lie beside the file.

    Raises:
        DataError: The file is missing, or a line is not of that form; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, prompt = row["image"], row["prompt"]
        except (ValueError, KeyError, TypeError):
            image, prompt = None, None
        if not isinstance(image, str) or not isinstance(prompt, str):
            raise DataError(f'{path}:{number}: must be {{"image": FILE, "prompt": TEXT}}')
        pairs.append((path.parent / image, prompt))
    if not pairs:
        raise DataError(f"{path}: holds no line")
    return pairs
