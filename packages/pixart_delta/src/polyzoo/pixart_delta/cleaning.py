"""Prompt cleaning as PixArt's captions were cleaned in training (section 3.1)."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from urllib.parse import unquote_plus

from polyzoo.core.errors import MissingExtraError
from polyzoo.core.lazy import import_extra
from polyzoo.core.log import get_logger

_log = get_logger(__name__)
_EXTENSIONS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAINS = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)"


def _link(scheme: str) -> re.Pattern[str]:
    """A scheme followed by slashes or one sign, or a bare domain, and what follows it."""
    return re.compile(rf"\b((?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{_DOMAINS}))", re.IGNORECASE)


_DASHES = re.compile(
    "[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d]+"
)
_CJK = re.compile(
    "[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+"
)
_BAD_PUNCTUATION = re.compile(
    "[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\\[\\]{}|\\\\/*]+"
)

_BEFORE_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile("<person>"), "person"),
    (_link("https?"), ""),
    (_link("www"), ""),
)
_AFTER_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"@[\w\d]+\b"), ""),
    (_CJK, ""),
    (_DASHES, "-"),
    (re.compile("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]"), '"'),
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile("&quot;?"), ""),
    (re.compile("&amp"), ""),
    (re.compile(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}"), " "),
    (re.compile(r"\d:\d\d\s+$"), ""),
    (re.compile(r"\\n"), " "),
    (re.compile(r"#\d{1,3}\b"), ""),
    (re.compile(r"#\d{5,}\b"), ""),
    (re.compile(r"\b\d{6,}\b"), ""),
    (re.compile(rf"\S+\.(?:{_EXTENSIONS})"), ""),
    (re.compile("[\"']{2,}"), '"'),
    (re.compile(r"\.{2,}"), " "),
    (_BAD_PUNCTUATION, " "),
    (re.compile(r"\s+\.\s+"), " "),
)
_AFTER_REPAIR: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b[a-zA-Z]{1,3}\d{3,15}\b"), ""),
    (re.compile(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"), ""),
    (re.compile(r"\b\d+[a-zA-Z]+\d+\b"), ""),
    (re.compile(r"(worldwide\s+)?(free\s+)?shipping"), ""),
    (re.compile(r"(free\s)?download(\sfree)?"), ""),
    (re.compile(r"\bclick\b\s(?:for|on)\s\w+"), ""),
    (re.compile(rf"\b(?:{_EXTENSIONS})(\simages?)?"), ""),
    (re.compile(r"\bpage\s+\d+\b"), ""),
    (re.compile(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b"), " "),
    (re.compile("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b"), ""),
    (re.compile(r"\b\s+:\s+"), ": "),
    (re.compile(r"(\D[,./])\b"), r"\1 "),
    (re.compile(r"\s+"), " "),
)
_AT_THE_END: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile("^[\"']([\\w\\W]+)[\"']$"), r"\1"),
    (re.compile(r"^['_,\-:;]"), ""),
    (re.compile(r"['_,\-:+]$"), ""),
    (re.compile(r"^\.\S+$"), ""),
)


def clean_prompt(prompt: str, *, cleaning: bool = True) -> str:
    """Clean a prompt twice, as training did; without cleaning only lower-case and strip it."""
    if not cleaning:
        return prompt.lower().strip()
    try:
        return clean_once(clean_once(prompt))
    except MissingExtraError as error:
        _log.warning("the prompt is used as it is, in lower case: %s", error)
        return prompt.lower().strip()


def clean_once(text: str) -> str:
    """One pass."""
    text = unquote_plus(text).strip().lower()
    text = _replaced(text, _BEFORE_MARKUP)
    text = _replaced(_text_of(text), _AFTER_MARKUP)
    if len(re.findall("[-_]", text)) > 3:
        text = re.sub("[-_]", " ", text)
    ftfy = import_extra("ftfy", install="ftfy")
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = _replaced(text, _AFTER_REPAIR)
    return _replaced(text, _AT_THE_END).strip()


def _replaced(text: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def _text_of(markup: str) -> str:
    """The text between tags, with character references resolved."""
    parser = _Text()
    parser.feed(markup)
    parser.close()
    return "".join(parser.parts)
