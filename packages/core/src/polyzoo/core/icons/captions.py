"""From a record to the words a text-to-image model is given."""

from __future__ import annotations

import random

from polyzoo.core.icons.records import IconRecord
from polyzoo.core.icons.sources import CLIP_ART

STYLE_WORDS = {
    "fluent-3d": "3d render",
    "fluent-emoji-flat": "flat",
    "noto": "noto",
    "twemoji": "twemoji",
    "openmoji": "outline",
    CLIP_ART: "clipart",
}
"""Style to what captions call it."""

_MOST_TAGS = 3


def prompt(label: str, style: str) -> str:
    """Return the plain caption of a name in a style, as used in evaluation.

    Example:
        >>> prompt("red apple", "fluent-3d")
        'red apple, 3d render style'
    """
    return f"{label}, {STYLE_WORDS[style]} style"


def caption(record: IconRecord, generator: random.Random) -> str:
    """Return a caption to train on: the plain one, half of the time with up to three keywords.

    Clip art, whose titles say less, always gets what keywords it has.

    Args:
        record: The picture's record.
        generator: Draws the keywords.
    """
    with_tags = generator.random() < 0.5 or record.style == CLIP_ART
    most = min(_MOST_TAGS, len(record.tags)) if with_tags else 0
    count = most if record.style == CLIP_ART else generator.randint(0, most)
    return ", ".join((prompt(record.label, record.style), *generator.sample(record.tags, count)))
