"""The `prepare` command: everything that scenes are composed of and learned from, in one folder."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from polyzoo.core.assets import asset_folder
from polyzoo.core.errors import DataError
from polyzoo.core.icons import IconPack, IconRecord
from polyzoo.core.io import atomic_path
from polyzoo.core.log import get_logger, progress
from polyzoo.core.weights import read_weights, write_weights
from polyzoo.regionspot import scene_material as material
from polyzoo.regionspot.lite0 import fold
from polyzoo.regionspot.options import PrepareConfig
from polyzoo.regionspot.word_fit import choose_words, fit_table

_log = get_logger(__name__)
CHANCES = {0: 0.12, 1: 0.15, 3: 1.0, 4: 1.0, 5: 1.0, 6: 1.0, 7: 1.0, None: 0.6}
"""How often training draws a cut-out, by its emojibase group; None is clip art. Smileys and
people are near-duplicates of one another, symbols and flags teach lettering."""
_FEW_STYLES = {0: ("fluent-3d", "noto"), 1: ("fluent-3d", "noto")}
_SOLID = 1.5
_SALIENCY = 112
EXTRA_WORDS = Path(__file__).parent / "assets" / "extra_words.txt"
"""Things that people name and that MiniLM's vocabulary does not hold as whole words."""


@dataclass(frozen=True)
class PrepareReport:
    """What the folder holds."""

    out: str
    cutouts: int
    reserved: int
    """Of these, cut-outs of concepts that training never sees."""
    names: int
    backgrounds: int
    words: int
    megabytes: float


def main(config: PrepareConfig) -> PrepareReport:
    """Run the command; it needs the assets minilm, efficientnet-lite0 and dinov2-small."""
    from polyzoo.towers import load_text_tower
    from polyzoo.towers.classifier import class_names

    folders = {
        name: asset_folder(name) for name in ("minilm", "efficientnet-lite0", "dinov2-small")
    }
    pack = IconPack.open(config.icons)
    chosen = [i for i, record in enumerate(pack.records) if _fits(record)]
    if not chosen:
        raise DataError(f"{config.icons}: holds no cut-outs to train on")
    records = [pack.records[i] for i in chosen]
    config.out.mkdir(parents=True, exist_ok=True)
    _write_cutouts(config.out / material.CUTOUTS, pack, chosen, config.cutout)
    tower = fold(read_weights(folders["efficientnet-lite0"]))
    rows = [name for name, tensor in tower.items() if tensor.ndim > 1]
    write_weights(config.out / material.TOWER, tower, int8_rows=rows)
    backgrounds = _write_backgrounds(config.out, config.backgrounds, config.side)
    _write_saliency(config.out)
    text = load_text_tower("minilm")
    names = sorted({plain(record.label) for record in records})
    classes = _class_vectors(text, class_names())
    vectors, texts = _name_vectors(text, records, names)
    basis = _basis(torch.cat([classes, texts]), config.text_dim)
    row_of = {name: row for row, name in enumerate(names)}
    write_weights(
        config.out / material.NAMES,
        {
            "vocabulary": (vectors @ basis).half(),
            "label": torch.tensor([row_of[plain(record.label)] for record in records]),
            "split": torch.tensor([int(record.split == "reserved-concept") for record in records]),
            "chance": torch.tensor([_chance(record) for record in records]),
            "classes": (classes @ basis).half(),
            "basis": basis,
        },
        metadata={"names": json.dumps(names)},
    )
    words = _write_words(config, text, basis, records, class_names(), classes, vectors)
    files = [file for file in config.out.iterdir() if file.is_file()]
    return PrepareReport(
        out=str(config.out),
        cutouts=len(records),
        reserved=sum(record.split == "reserved-concept" for record in records),
        names=len(names),
        backgrounds=backgrounds,
        words=words,
        megabytes=round(sum(file.stat().st_size for file in files) / 2**20, 1),
    )


def plain(label: str) -> str:
    """Return a label as a name: lower case, without digits and signs of file names."""
    text = re.sub(r"\s+", " ", re.sub(r"\d+", "", re.sub(r"[_\-]+", " ", label)))
    return text.strip(" .,#()").lower() or "thing"


def _fits(record: IconRecord) -> bool:
    return (
        record.group in CHANCES
        and record.split in ("train", "reserved-concept")
        and record.style in _FEW_STYLES.get(record.group or -1, (record.style,))
        and "skin tone" not in record.label
    )


def _chance(record: IconRecord) -> float:
    return CHANCES[record.group] * (_SOLID if record.style == "fluent-3d" else 1.0)


def _described(record: IconRecord) -> str:
    return ", ".join([plain(record.label), *(plain(tag) for tag in record.tags[:4])])


def _class_vectors(text: object, names: Sequence[str]) -> Tensor:
    """Mean of the first name and of the whole list of synonyms."""
    first = text.encode([name.split(",")[0] for name in names]).float()  # pyright: ignore
    whole = text.encode(list(names)).float()  # pyright: ignore
    return F.normalize(0.6 * first + 0.4 * whole, dim=-1)


def _name_vectors(
    text: object, records: Sequence[IconRecord], names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """One vector a name, from the name alone and with keywords; and every text's own."""
    described = sorted({_described(record) for record in records})
    alone = text.encode(list(names)).float()  # pyright: ignore[reportAttributeAccessIssue]
    whole = text.encode(described).float()  # pyright: ignore[reportAttributeAccessIssue]
    row_of = {value: row for row, value in enumerate(described)}
    groups: dict[str, list[int]] = {name: [] for name in names}
    for record in records:
        groups[plain(record.label)].append(row_of[_described(record)])
    with_keywords = torch.stack([whole[groups[name]].mean(0) for name in names])
    vectors = F.normalize(0.65 * alone + 0.35 * with_keywords, dim=-1)
    return vectors, torch.cat([alone, whole])


def _basis(vectors: Tensor, size: int) -> Tensor:
    """Directions that hold most of the vectors' energy; the mean stays, so cosines survive."""
    return torch.linalg.svd(vectors, full_matrices=False)[2][:size].T.contiguous()


def _write_cutouts(path: Path, pack: IconPack, chosen: Sequence[int], size: int) -> None:
    def pictures() -> Iterator[bytes]:
        for index in progress(chosen, description="cut-outs", unit="image"):
            image = pack.image(index).resize((size, size), Image.Resampling.LANCZOS)
            data = io.BytesIO()
            image.save(data, "WEBP", quality=62, alpha_quality=40, method=4)
            yield data.getvalue()

    _write_zip(path, ((f"{n:05d}.webp", data) for n, data in enumerate(pictures())))


def _write_backgrounds(out: Path, folder: Path, side: int) -> int:
    """Two squares of each photograph: its beginning and its end."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise DataError(f"{folder}: holds no photographs")
    parts: list[tuple[str, bytes]] = []
    for file in files:
        image = Image.open(file).convert("RGB")
        width, height = image.size
        least = min(width, height)
        for place, (x, y) in enumerate(((0, 0), (width - least, height - least))):
            cut = image.crop((x, y, x + least, y + least)).resize((side, side))
            data = io.BytesIO()
            cut.save(data, "JPEG", quality=85)
            parts.append((f"{file.stem}-{place}.jpg", data.getvalue()))
    _write_zip(out / material.BACKGROUNDS, iter(parts))
    return len(parts)


def _write_saliency(out: Path) -> None:
    """What DINOv2's head finds salient in each background."""
    from polyzoo.towers import image_batch, load_dinov2
    from polyzoo.towers.pictures import IMAGENET

    model = load_dinov2(device="cpu", dtype=torch.float32)
    found: list[Tensor] = []
    with zipfile.ZipFile(out / material.BACKGROUNDS) as archive, torch.inference_mode():
        for name in progress(sorted(archive.namelist()), description="saliency", unit="image"):
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            pixels = image_batch([image], size=(224, 224), normalise=IMAGENET)
            small = F.interpolate(model.saliency(pixels), (_SALIENCY, _SALIENCY), mode="area")
            found.append((small[0, 0] * 255).round().to(torch.uint8))
    write_weights(out / material.SALIENCY, {"saliency": torch.stack(found)})


def _write_words(
    config: PrepareConfig,
    text: object,
    basis: Tensor,
    records: Sequence[IconRecord],
    class_names: Sequence[str],
    classes: Tensor,
    vectors: Tensor,
) -> int:
    def encode(texts: Sequence[str]) -> Tensor:
        found = text.encode(list(texts)).float()  # pyright: ignore[reportAttributeAccessIssue]
        return F.normalize(found @ basis, dim=-1)

    named: dict[str, float] = {}
    for name in class_names:
        named[name] = named.get(name, 0) + 30
    for record in records:
        named[record.label] = named.get(record.label, 0) + (4 if record.group is not None else 1)
        for tag in record.tags:
            named[tag] = named.get(tag, 0) + 1
    reference = F.normalize(torch.cat([classes, vectors]) @ basis, dim=-1)
    extra = EXTRA_WORDS.read_text(encoding="utf-8").split()
    words = choose_words(named, _common_words(), encode, reference, count=config.words, extra=extra)
    phrases = sorted(
        {part.strip() for name in named for part in name.split(",") if 1 < len(part.split()) < 5}
    )
    table = fit_table(words, encode(words), phrases, encode(phrases), steps=config.fit_steps)
    table.save(config.out)
    return len(table)


def _common_words() -> list[str]:
    """Whole words of MiniLM's vocabulary, which is ordered by frequency."""
    data = json.loads((asset_folder("minilm") / "tokenizer.json").read_bytes())
    vocabulary = sorted(data["model"]["vocab"].items(), key=lambda item: item[1])
    return [
        word for word, place in vocabulary
        if place > 1995 and len(word) > 2 and word.isascii() and word.isalpha()
    ]  # fmt: skip


def _write_zip(path: Path, parts: Iterator[tuple[str, bytes]]) -> None:
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, data in parts:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
