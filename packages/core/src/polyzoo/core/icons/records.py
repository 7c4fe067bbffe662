"""One picture's facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "val", "reserved-concept", "reserved-combination"]
SPLITS: tuple[Split, ...] = ("train", "val", "reserved-concept", "reserved-combination")

CORE_GROUPS = (0, 3, 4, 5, 6, 7)
"""Emojibase groups of things one can draw: smileys, animals and nature, food, travel and places,
activities, objects. People are near-duplicates of each other; symbols and flags teach lettering."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IconRecord:
    """A picture: what it shows, in which style, and what it may be used for."""

    id: str
    """Style and concept, unique in the pack."""
    concept: str
    """Emojibase hexcode in lower case, or the path inside the clip-art collection."""
    style: str
    """fluent-3d, fluent-emoji-flat, noto, twemoji, openmoji or clipart."""
    label: str
    """English name."""
    tags: tuple[str, ...]
    """English keywords."""
    group: int | None
    """Emojibase group, 0 to 9; None for clip art."""
    split: Split
    """What it may be used for; the same in every pack."""
    licence: str
    """Of the picture, as an SPDX identifier."""
