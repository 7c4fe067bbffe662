"""Drawings of the Iconify packages: SVG fragments in one JSON file, found by code point."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyzoo.core.errors import DataError
from polyzoo.core.icons.emoji_names import spellings

_ICONS, _CODE_POINTS = "package/icons.json", "package/chars.json"


def wanted(name: str) -> bool:
    """Tell whether a file of the package is read."""
    return name in (_ICONS, _CODE_POINTS)


class IconifySet:
    """One collection.

    Example:
        >>> IconifySet(files).svg("1f34e")
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">...</svg>'
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._set = _read(files, _ICONS)
        self._names = _read(files, _CODE_POINTS)
        if not isinstance(self._set.get("icons"), dict):
            raise DataError(f"{_ICONS}: holds no icons")

    def svg(self, hexcode: str) -> str | None:
        """Return the drawing of an emoji as an SVG document; None where the set has none."""
        for code in spellings(hexcode):
            if code in self._names:
                icon = self._icon(self._names[code])
                return None if icon is None else self._document(icon)
        return None

    def _icon(self, name: str) -> dict[str, Any] | None:
        aliases = self._set.get("aliases", {})
        for _ in range(8):  # an alias may lead to another
            if name in self._set["icons"]:
                return self._set["icons"][name]
            if name not in aliases:
                return None
            name = aliases[name]["parent"]
        return None

    def _document(self, icon: Mapping[str, Any]) -> str:
        usual = {"left": 0, "top": 0, "width": 16, "height": 16}
        box = " ".join(str(icon.get(key, self._set.get(key, usual[key]))) for key in usual)
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def _read(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    if name not in files:
        raise DataError(f"the package holds no {name}")
    try:
        content = json.loads(files[name].read_bytes())
    except ValueError as error:
        raise DataError(f"{name}: is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{name}: holds {type(content).__name__}, not an object")
    return content
