"""Pictures and their captions in memory, to train on: an icon pack, or a list of pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polyzoo.core.errors import DataError
from polyzoo.core.images import open_image
from polyzoo.core.log import get_logger, progress

if TYPE_CHECKING:
    from polyzoo.core.icons import IconRecord

_log = get_logger(__name__)

MOST_BYTES = 24 * 2**30


@dataclass(frozen=True, eq=False)
class ImageBank:
    """Square pictures of one size with captions; RGBA, so that backgrounds can vary.

    Example:
        >>> bank = ImageBank.from_pairs("pairs.jsonl", "pictures", size=64)
        >>> bank.captions[0]
        ('a red apple',)
    """

    images: NDArray[np.uint8]
    """(n, S, S, 4)."""
    captions: tuple[tuple[str, ...], ...]
    """Texts for each picture; the first is the plain one."""
    names: tuple[str, ...]
    """The concept where the data tells it, such as "red apple"; else the first caption."""
    meaning_texts: tuple[str, ...]
    """What each picture means, without its style: what a sentence encoder is asked about."""
    meanings: NDArray[np.int64]
    """(n,) number of the concept: equal numbers are no negatives of each other."""
    groups: NDArray[np.int64]
    """(n,) number of a coarser class, or -1."""
    keys: tuple[str, ...]
    """Identifier of each picture."""
    prompts: tuple[tuple[str, ...], ...] = ()
    """Further texts to draw each picture from, such as sentences; empty where there are none."""
    labelled: bool = False
    """Whether `meaning_texts` begin with the concept's name (icon packs)."""
    failed: tuple[str, ...] = ()
    """What could not be read, and why."""

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def from_pack(
        cls,
        folder: str | Path,
        *,
        size: int,
        split: str | Sequence[str] = "train",
        limit: int | None = None,
        captions: int = 6,
    ) -> ImageBank:
        """Read one split of an icon pack.

        Args:
            folder: As `polyzoo icons build` wrote it.
            size: Side the pictures are resized to.
            split: One split or several.
            limit: Use only so many, spread evenly.
            captions: Different captions drawn for each picture, at most.
        """
        from polyzoo.core.icons import IconPack

        pack = IconPack.open(folder)
        chosen: list[int] = pack.subset(split=split)  # pyright: ignore[reportArgumentType]
        if limit is not None and limit < len(chosen):
            chosen = [chosen[int(i * len(chosen) / limit)] for i in range(limit)]
        if not chosen:
            raise DataError(f"{folder}: no picture in split {split!r}")
        records = [pack.records[i] for i in chosen]
        images = np.stack([_square(pack.image(i), size) for i in chosen])
        concepts = {name: i for i, name in enumerate(dict.fromkeys(r.concept for r in records))}
        return cls(
            images=images,
            captions=tuple(_pack_captions(record, captions) for record in records),
            names=tuple(record.label for record in records),
            meaning_texts=tuple(", ".join((r.label, *r.tags[:6])) for r in records),
            meanings=np.array([concepts[record.concept] for record in records]),
            groups=np.array([-1 if r.group is None else r.group for r in records]),
            keys=tuple(record.id for record in records),
            prompts=tuple(_sentences(record.label, record.style) for record in records),
            labelled=True,
        )

    @classmethod
    def from_pairs(
        cls, pairs: str | Path, images: str | Path, *, size: int, limit: int | None = None
    ) -> ImageBank:
        """Read pairs: a JSON object a line, {"image": FILE, "caption": TEXT or a list of texts}.

        Optional fields: `label` (the concept's name) and `group` (an integer). Broken images are
        left out and named in `failed`.

        Args:
            pairs: The .jsonl file.
            images: Folder the files are in.
            size: Side the pictures are resized to.
            limit: Read only so many lines.

        Raises:
            DataError: A line is malformed, or no image can be read.
        """
        rows = read_pairs(pairs)[:limit]
        kept: list[dict[str, Any]] = []
        pictures: list[NDArray[np.uint8]] = []
        failed: list[str] = []
        if len(rows) * size * size * 4 > MOST_BYTES:
            raise DataError(
                f"{pairs}: {len(rows):,} pictures of {size} pixels need more than "
                f"{MOST_BYTES >> 30} GiB of memory; use limit, or a smaller size"
            )
        for row in progress(rows, description="Reading images", unit="image"):
            try:
                picture = open_image(Path(images) / row["image"])
            except DataError as error:
                failed.append(str(error))
                continue
            pictures.append(_square(picture.convert("RGBA"), size))
            kept.append(row)
        if not kept:
            raise DataError(
                f"{pairs}: none of {len(rows)} images could be read; the first: "
                f"{failed[0] if failed else 'the file is empty'}"
            )
        if failed:
            _log.warning("%d of %d images left out, first: %s", len(failed), len(rows), failed[0])
        names = [str(row.get("label") or row["caption"][0]) for row in kept]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return cls(
            images=np.stack(pictures),
            captions=tuple(tuple(row["caption"]) for row in kept),
            names=tuple(names),
            meaning_texts=tuple(row["caption"][0] for row in kept),
            meanings=np.array([numbers[name] for name in names]),
            groups=np.array([int(row.get("group", -1)) for row in kept]),
            keys=tuple(row["image"] for row in kept),
            failed=tuple(failed),
        )

    def pool_text(self, row: int) -> str:
        """Return the text a picture's concept is looked for with."""
        return self.meaning_texts[row].partition(",")[0] if self.labelled else self.captions[row][0]

    def texts(self) -> list[str]:
        """Return every caption once, in order of appearance."""
        return list(dict.fromkeys(text for texts in self.captions for text in texts))


def read_pairs(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of pairs; captions become lists.

    Raises:
        DataError: Names file, line and rule.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, caption = row["image"], row.get("caption", row.get("captions"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{path}, line {number}: expected {{"image": FILE, "caption": TEXT}} ({error!r})'
            ) from error
        texts = [caption] if isinstance(caption, str) else caption
        if not isinstance(image, str) or not isinstance(texts, list) or not texts:
            raise DataError(
                f'{path}, line {number}: "image" must be a file name and "caption" a text or a '
                "list of texts"
            )
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}, line {number}: a caption is no text")
        rows.append({**row, "image": image, "caption": texts})
    return rows


def _square(picture: Any, size: int) -> NDArray[np.uint8]:
    from PIL import Image

    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture.convert("RGBA"), dtype=np.uint8)


def _pack_captions(record: IconRecord, count: int) -> tuple[str, ...]:
    from polyzoo.core.icons import caption
    from polyzoo.core.icons.captions import prompt

    draws = random.Random(record.id)  # noqa: S311 - the same captions in every run
    plain = prompt(record.label, record.style)
    texts = [plain, *(caption(record, draws) for _ in range(3 * count))]
    return tuple(dict.fromkeys(texts))[:count]


def _sentences(label: str, style: str) -> tuple[str, ...]:
    """Other ways to ask for a picture than its caption."""
    from polyzoo.core.icons.captions import STYLE_WORDS

    word = STYLE_WORDS[style]
    article = "an" if label[:1].lower() in "aeiou" else "a"
    return (
        label,
        f"{article} {label}",
        f"{label} in {word} style",
        f"{'an' if word[:1] in 'aeiou' else 'a'} {word} picture of {article} {label}",
    )
