"""Which picture is for training: decided by hash, so that every machine decides alike."""

from __future__ import annotations

import hashlib

from polyzoo.core.icons.records import Split
from polyzoo.core.icons.sources import CLIP_ART


def split_of(concept: str, style: str) -> Split:
    """Return the split of a picture.

    A tenth of all concepts is never trained on in any style. Of the other emoji a twentieth of the
    pairs of concept and style is left out: both are seen, the pair is not.

    Args:
        concept: Lower-case hexcode, or clip-art path.
        style: Name of the style.
    """
    if _hash(concept) % 10 == 7:
        return "reserved-concept"
    if style != CLIP_ART and _hash(f"{concept}|{style}") % 20 == 3:
        return "reserved-combination"
    if _hash(f"val{concept}") % 20 == 0:
        return "val"
    return "train"


def _hash(text: str) -> int:
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), 16)
