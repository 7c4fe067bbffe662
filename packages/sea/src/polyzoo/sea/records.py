"""CodeSearchNet-format files, read strictly: errors name file and line. Torch-free."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from polyzoo.core.errors import DataError
from polyzoo.sea.config import Language

LANGUAGES: tuple[Language, ...] = get_args(Language)


@dataclass(frozen=True)
class Record:
    """One function, and the query it answers if it has one."""

    url: str
    """Joins queries and codebase; unique in a codebase."""
    text: str
    """The function as it stands in its file, documentation included where the file has it."""
    language: Language
    query: str | None
    code: str = ""
    """The function without its documentation."""
    func_name: str = ""
    id: str = ""
    """Of the record itself; the url where the file has no id."""


def read_records(
    path: str | Path,
    *,
    need_query: bool = True,
    language: Language | None = None,
    limit: int | None = None,
    several_queries: bool = False,
) -> list[Record]:
    """Read a .jsonl or .jsonl.gz file.

    Args:
        path: One JSON object per line.
        need_query: Refuse records without documentation; False for a codebase.
        language: Of records that do not say; if the file says otherwise it is an error, because
            one splitter language was asked for.
        limit: Read only so many records.
        several_queries: Several records may have the same url, as queries with one answer do;
            their `id` must then be unique.
    """
    path = Path(path)
    records: list[Record] = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        if limit is not None and len(records) >= limit:
            break
        where = f"{path}, line {number}"
        record = parse_record(line, where=where, need_query=need_query, language=language)
        kind, key = ("id", record.id) if several_queries else ("url", record.url)
        if key in seen:
            raise DataError(
                f"{where}: {kind} {key!r} was already used in line {seen[key]}; "
                "every record needs its own"
            )
        seen[key] = number
        records.append(record)
    if not records:
        raise DataError(f"{path}: no records; one JSON object per line is wanted")
    return records


def parse_record(
    line: str, *, where: str, need_query: bool = True, language: Language | None = None
) -> Record:
    """Check and read one line.

    Args:
        line: A JSON object.
        where: File and line, for messages.
        need_query: Refuse a record without documentation.
        language: As in `read_records`.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{where}: a JSON object is wanted, this is {type(content).__name__}")
    url = content.get("url") or content.get("id")
    if not isinstance(url, str | int) or url == "":
        raise DataError(f"{where}: no url; a unique 'url' (or 'id') joins queries and code")
    text = content.get("original_string") or content.get("code")
    if not isinstance(text, str):
        raise DataError(f"{where}: neither 'original_string' nor 'code' holds the function's text")
    if not text.strip():
        raise DataError(f"{where}: the function {url!r} is empty")
    return Record(
        url=str(url),
        text=text,
        language=_language(content, where=where, default=language),
        query=_query(content, where=where, need=need_query),
        code=code if isinstance(code := content.get("code"), str) else text,
        func_name=str(content.get("func_name") or ""),
        id=str(content.get("id") or url),
    )


def _query(content: dict[str, Any], *, where: str, need: bool) -> str | None:
    tokens = content.get("docstring_tokens")
    if isinstance(tokens, list):
        if not all(isinstance(token, str) for token in tokens):
            raise DataError(f"{where}: docstring_tokens must be a list of strings")
        query = " ".join(tokens)
    else:
        query = tokens if isinstance(tokens, str) else content.get("docstring")
        if query is not None and not isinstance(query, str):
            raise DataError(f"{where}: docstring must be a string, not {type(query).__name__}")
    if query and query.strip():
        return query
    if need:
        what = (
            "docstring_tokens is empty" if "docstring_tokens" in content else "no docstring_tokens"
        )
        raise DataError(f"{where}: {what}; a query needs docstring_tokens (or docstring)")
    return None


def _language(content: dict[str, Any], *, where: str, default: Language | None) -> Language:
    given = content.get("language")
    known = ", ".join(LANGUAGES)
    if given is None:
        if default is None:
            raise DataError(f"{where}: no language, and none was given; known: {known}")
        return default
    name = str(given).lower()
    if name not in LANGUAGES:
        raise DataError(f"{where}: language {given!r} is unknown; known: {known}")
    if default is not None and name != default:
        raise DataError(
            f"{where}: language {name!r}, but {default!r} was asked for: leave the language out "
            "to split every record by its own"
        )
    return name  # pyright: ignore[reportReturnType]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as head:
        zipped = head.read(2) == b"\x1f\x8b"
    number = 0
    try:
        with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip file after line {number} ({error})") from error
