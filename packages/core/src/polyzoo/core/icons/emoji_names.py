"""Names, keywords and groups of emoji, from the Emojibase package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyzoo.core.errors import DataError

_DATA = re.compile(r"package/([a-z]{2}(?:-[a-z]+)?)/data\.json")
ENGLISH = "en"


@dataclass(frozen=True, kw_only=True, slots=True)
class EmojiName:
    """What an emoji is called."""

    hexcode: str
    """Code points in lower-case hexadecimal, joined by hyphens."""
    label: str
    tags: tuple[str, ...]
    group: int


def wanted(name: str) -> bool:
    """Tell whether a file of the package is read."""
    return _DATA.fullmatch(name) is not None


def read_names(files: Mapping[str, Path]) -> list[EmojiName]:
    """Return all emoji that belong to a group, in the package's order.

    Raises:
        DataError: The English data is missing or not what it should be.
    """
    entries = _grouped(files, ENGLISH)
    try:
        return [
            EmojiName(
                hexcode=entry["hexcode"].lower(),
                label=entry["label"],
                tags=tuple(entry.get("tags", ())),
                group=int(entry["group"]),
            )
            for entry in entries
        ]
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"the emoji names are not as expected: {error!r}") from error


def read_languages(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Return language to hexcode to the name in that language, English included."""
    languages = sorted(match[1] for name in files if (match := _DATA.fullmatch(name)))
    return {
        language: {
            entry["hexcode"].lower(): entry["label"]
            for entry in _grouped(files, language)
            if entry.get("label")
        }
        for language in languages
    }


def spellings(hexcode: str) -> Iterable[str]:
    """Return the code points as collections may write them: with or without variation selector."""
    return dict.fromkeys((hexcode, hexcode.replace("-fe0f", ""), f"{hexcode}-fe0f"))


def _grouped(files: Mapping[str, Path], language: str) -> list[dict[str, Any]]:
    name = f"package/{language}/data.json"
    if name not in files:
        raise DataError(f"the emoji names hold no {name}")
    try:
        entries = json.loads(files[name].read_bytes())
    except ValueError as error:
        raise DataError(f"{name}: is damaged: {error}") from error
    if not isinstance(entries, list):
        raise DataError(f"{name}: holds {type(entries).__name__}, not a list of emoji")
    return [entry for entry in entries if "group" in entry]
