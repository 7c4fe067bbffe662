"""From class names to the texts that CLIP reads. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence

from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger
from polyzoo.regionspot.config import Names

_log = get_logger(__name__)
_SUFFIXES = ("-other", "-merged", "-stuff")


def clean_name(name: str, how: Names = "readable") -> str:
    """Return a name as it is put into a template.

    Args:
        name: As the data set spells it.
        how: "official" only drops -other, -merged and -stuff, as published numbers do; "readable"
            also turns underscores into spaces and a trailing "(meaning)" into "meaning name".

    Example:
        >>> clean_name("bat_(animal)")
        'animal bat'
    """
    for suffix in _SUFFIXES:
        name = name.replace(suffix, "")
    if how == "official":
        return name
    name = " ".join(name.replace("_", " ").split())
    found = re.fullmatch(r"(.+?)\s*\(([^()]+)\)", name)
    return f"{found[2]} {found[1]}" if found else name


def check_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return distinct, stripped names in their order.

    Raises:
        DataError: No names, or an empty one.
    """
    given = names.split(",") if isinstance(names, str) else list(names)
    for name in given:
        if not isinstance(name, str):
            raise DataError(f"names: {name!r} is a {type(name).__name__}; give text")
    stripped = [name.strip() for name in given]
    if not [name for name in stripped if name]:
        raise DataError("names is empty; give at least one, such as names=['cat', 'dog']")
    empty = [place for place, name in enumerate(stripped) if not name]
    if empty:
        raise DataError(f"names[{empty[0]}] is empty; remove it or write a name")
    distinct = tuple(dict.fromkeys(stripped))
    if len(distinct) < len(stripped):
        double = sorted({name for name in stripped if stripped.count(name) > 1})
        _log.warning("names occur twice and are merged: %s", ", ".join(double[:5]))
    return distinct


def templates(kind: str) -> tuple[str, ...]:
    """Return sentence templates with a {} for the name.

    Args:
        kind: "imagenet81" (the plain name and open_clip's 80, as published), or "plain".
    """
    if kind == "plain":
        return ("{}.",)
    if kind != "imagenet81":
        raise DataError(f"templates={kind!r}; there are imagenet81 and plain")
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return ("{}.", *(template("{}") for template in OPENAI_IMAGENET_TEMPLATES))
