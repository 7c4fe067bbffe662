"""Licence statements of packages, as SPDX names, and whether a list allows them. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable

UNKNOWN = "unknown"

_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "zlib/libpng License": "Zlib",
}
# Free-text statements, the first that matches: LGPL before GPL, BSD-2 before BSD.
_STATEMENTS = (
    (r"\bagpl|affero", "AGPL-3.0"),
    (r"\blgpl|lesser general", "LGPL-3.0"),
    (r"\bgpl|general public licen", "GPL-3.0"),
    (r"\bmpl|mozilla public", "MPL-2.0"),
    (r"\bapache", "Apache-2.0"),
    (r"\bbsd.{0,10}\b2\b|\b2.clause|freebsd|simplified bsd", "BSD-2-Clause"),
    (r"\bbsd|\b3.clause", "BSD-3-Clause"),
    (r"\bisc\b", "ISC"),
    (r"\bmit.?0\b|mit no attribution", "MIT-0"),
    (r"\bmit\b|\bexpat\b", "MIT"),
    (r"\bpsf\b|python software foundation", "PSF-2.0"),
    (r"\bunlicense\b", "Unlicense"),
    (r"\bzlib\b", "Zlib"),
    (r"\bcc0\b", "CC0-1.0"),
    (r"\b0bsd\b", "0BSD"),
)


def from_statements(
    *, expression: str | None, classifiers: Iterable[str] = (), text: str | None = None
) -> str:
    """The SPDX expression of a package, from the most to the least exact statement it makes.

    Args:
        expression: An SPDX expression, taken as it is.
        classifiers: Python trove classifiers.
        text: A free-text licence field; only its first line is read.

    Returns:
        The expression, or "unknown".
    """
    if expression and expression.strip():
        return expression.strip()
    names = {
        _CLASSIFIERS.get(line.rsplit(" :: ", 1)[-1]) or _statement(line.rsplit(" :: ", 1)[-1])
        for line in classifiers
        if line.startswith("License :: ") and not line.endswith(":: OSI Approved")
    }
    if names and UNKNOWN not in names:
        # Classifiers do not say whether one or all hold: the careful reading.
        return " AND ".join(sorted(names))
    first = (text or "").strip().splitlines()[:1]
    return _statement(first[0]) if first else UNKNOWN


def is_allowed(expression: str, allowed: Iterable[str]) -> bool:
    """Whether a licence expression can be met with allowed licences only.

    `A AND B` needs both, `A OR B` one of them; an exception (`WITH`) only ever permits more.

    Example:
        >>> is_allowed("MIT OR GPL-3.0", ["MIT"]), is_allowed("MIT AND GPL-3.0", ["MIT"])
        (True, False)
    """
    known = {name.lower() for name in allowed}
    tokens = re.findall(r"\(|\)|[^\s()]+", expression)
    position = 0

    def disjunction() -> bool:
        nonlocal position
        value = conjunction()
        while position < len(tokens) and tokens[position].upper() == "OR":
            position += 1
            value = conjunction() or value
        return value

    def conjunction() -> bool:
        nonlocal position
        value = term()
        while position < len(tokens) and tokens[position].upper() in ("AND", "WITH"):
            if tokens[position].upper() == "WITH":
                position += 2
                continue
            position += 1
            value = term() and value
        return value

    def term() -> bool:
        nonlocal position
        if position >= len(tokens):
            return False
        token = tokens[position]
        position += 1
        if token == "(":  # noqa: S105  (a bracket, not a password)
            value = disjunction()
            position += 1
            return value
        return token.lower() in known

    if len(tokens) > 200:
        return False
    value = disjunction()
    return value and position >= len(tokens)


def _statement(text: str) -> str:
    lowered = text.lower()
    for pattern, name in _STATEMENTS:
        if re.search(pattern, lowered):
            return name
    return UNKNOWN
