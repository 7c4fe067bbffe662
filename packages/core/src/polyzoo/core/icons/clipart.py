"""Clip art of the Open Clip Art Library: which drawings are taken, and what they are called."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = "usr/share/openclipart/svg/"
FOLDERS = (
    "animals",
    "buildings",
    "containers",
    "education",
    "electronics",
    "food",
    "office",
    "people",
    "plants",
    "recreation",
    "science",
    "tools",
    "transportation",
)
_LEFT_OUT = ("recreation/games/cards/", "people/stickmen/")
MAX_BYTES = 150_000
MOST_OF_A_TITLE = 4

_TITLE = re.compile(r"<dc:title[^>]*>([^<]*)<")
_KEYWORD = re.compile(r"<rdf:li[^>]*>([^<]*)<")
_CREATOR = re.compile(r"<dc:creator>.{0,200}?<dc:title[^>]*>([^<]*)<", re.DOTALL)
_COLLECTION = re.compile(
    r"\b(clip ?arts?|nicu buculei|architetto|submission|sibmission|icons|presentation|svg|"
    r"illustration|card)\b|^\W*\w?\W*$",
    re.IGNORECASE,
)
_EMPTY_KEYWORD = re.compile(r"hash(\(.*\))?|unsorted|clip ?art|\W*\d*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One piece of clip art."""

    path: str
    """Inside the collection."""
    svg: str
    title: str
    keywords: tuple[str, ...]


def wanted(name: str) -> bool:
    """Tell whether a file of the package is read."""
    path = name.removeprefix(_ROOT)
    return (
        name.startswith(_ROOT)
        and path.split("/")[0] in FOLDERS
        and path.endswith(".svg")
        and not path.startswith(_LEFT_OUT)
    )


def read_drawings(files: Mapping[str, Path]) -> Iterator[Drawing]:
    """Yield the drawings taken, sorted by path.

    Left out are large files (photographs traced by machine), drawings that embed images, and the
    fifth and later ones of a title.
    """
    seen: Counter[str] = Counter()
    for name, file in sorted(files.items()):
        if not wanted(name) or file.stat().st_size >= MAX_BYTES:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if "<image" in text or "<svg" not in text:
            continue
        path = name.removeprefix(_ROOT)
        title = _title(path, text)
        seen[title.lower()] += 1
        if seen[title.lower()] > MOST_OF_A_TITLE:
            continue
        yield Drawing(path=path, svg=text, title=title, keywords=_keywords(text, title))


def _title(path: str, text: str) -> str:
    creator = _CREATOR.search(text)
    author = _words(creator[1]) if creator else []
    match = _TITLE.search(text)
    title = _plain(match[1]) if match else ""
    if _COLLECTION.search(title) or (author and _words(title) == author):
        title = _from_file_name(path, author)
    return title


def _from_file_name(path: str, author: list[str]) -> str:
    """Return the file's name without number and without its maker's (often cut) name."""
    words = _words(PurePosixPath(path).stem)
    while len(words) > 1 and (
        words[-1].isdigit() or any(name.startswith(words[-1]) for name in author)
    ):
        words.pop()
    return " ".join(words)


def _keywords(text: str, title: str) -> tuple[str, ...]:
    creator = _CREATOR.search(text)
    unwanted = {title.lower(), creator[1].strip().lower() if creator else ""}
    found = (_plain(match).lower() for match in _KEYWORD.findall(text))
    return tuple(
        dict.fromkeys(
            word for word in found if word not in unwanted and not _EMPTY_KEYWORD.fullmatch(word)
        )
    )


def _plain(text: str) -> str:
    return " ".join(html.unescape(text).replace("_", " ").split())


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
