"""Typed configurations on disk: strict, nested, JSON or YAML, and one kind of error."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pydantic
import pydantic_core

from polyzoo.core import plain_yaml
from polyzoo.core.errors import ConfigError
from polyzoo.core.io import atomic_write

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_INTEGER = 2**63

T = TypeVar("T")


def load(cls: type[T], source: Path | str | Mapping[str, Any]) -> T:
    """Build a config from a .json, .yaml or .yml file, or from a mapping.

    Nothing is guessed: unknown fields, wrong types ("1" is not 1), duplicate keys, YAML aliases and
    tags are errors. Lists become tuples and texts become paths where the field says so.

    Args:
        cls: A dataclass; its fields may be dataclasses in turn.
        source: The file, or plain values.

    Raises:
        ConfigError: Names the field, the value and the rule.

    Example:
        >>> load(SeaConfig, {"split": {"budget": 126}}).split.budget
        126
    """
    if isinstance(source, Mapping):
        return validate(cls, source, where=cls.__name__)
    return validate(cls, read_mapping(source), where=str(source))


def dump(config: Any) -> dict[str, Any]:
    """Return a config as plain values (dicts, lists, texts, numbers); `load` inverts it."""
    return pydantic_core.to_jsonable_python(_fields_of(config), inf_nan_mode="constants")


def save(config: Any, path: str | Path) -> None:
    """Write a config to a .json, .yaml or .yml file, atomically."""
    path, plain = Path(path), dump(config)
    text = plain_yaml.write(plain) if _is_yaml(path) else json.dumps(plain, indent=2) + "\n"
    with atomic_write(path, "w") as file:
        file.write(text)


def merge(config: T, overrides: Mapping[str, Any]) -> T:
    """Return the config with some fields replaced; nested mappings replace nested fields.

    Example:
        >>> merge(SeaConfig(), {"split": {"budget": 126}}).split.budget
        126
    """
    return validate(type(config), _merged(config, overrides), where=type(config).__name__)


def overlay(cls: type, values: dict[str, Any], overrides: Mapping[str, Any], *, where: str) -> None:
    """Put checked overrides over some of the fields of a config that is not complete yet.

    Args:
        cls: The dataclass whose fields these are.
        values: Field values so far; changed in place.
        overrides: Plain values, nested where the fields are.
        where: File or object the overrides come from, for the error.
    """
    hints = _hints(cls)
    for name, value in overrides.items():
        if name not in hints:
            raise ConfigError(f"{where}: {_unknown(name, hints)}")
        if dataclasses.is_dataclass(values.get(name)) and isinstance(value, Mapping):
            value = _merged(values[name], value)
            values[name] = validate(type(values[name]), value, where=where, prefix=name)
        else:
            values[name] = validate(hints[name], value, where=where, prefix=name)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a .json, .yaml or .yml file that holds one mapping; its fields are not checked yet."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: more than the {MAX_BYTES:,} bytes allowed")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        data = plain_yaml.read(text) if _is_yaml(path) else _read_json(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; at most {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {_shown(data)}; expected a mapping of fields to values")
    return data


def validate(kind: Any, value: Any, *, where: str, prefix: str = "") -> Any:
    """Check plain values against a type, strictly; `where` and `prefix` place the error."""
    _refuse_odd(value, where, prefix)
    try:
        # Through JSON: only there does a strict check take lists as tuples and texts as paths.
        text = pydantic_core.to_json(value, inf_nan_mode="constants")
        return _adapter(kind).validate_json(b"[" + text + b"]", strict=True)[0]
    except pydantic.ValidationError as error:
        first, *others = error.errors(include_url=False)
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{where}: {_explain(kind, first, prefix)}{more}") from None
    except pydantic_core.PydanticSerializationError as error:
        raise ConfigError(f"{where}: {prefix or 'value'}: not a plain value: {error}") from None


def _explain(kind: Any, problem: Any, prefix: str) -> str:
    steps = problem["loc"][1:]  # the first is the tuple's index
    path = [*([prefix] if prefix else []), *steps]
    place = ".".join(str(step) for step in path)
    if problem["type"] == "unexpected_keyword_argument":
        parent = kind
        for step in steps[:-1]:
            parent = _hints(parent).get(step) if dataclasses.is_dataclass(parent) else None
        known = _hints(parent) if dataclasses.is_dataclass(parent) else ()
        return _unknown(place, known)
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{place}: a value is required"
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    if problem["type"] == "value_error" and not steps:
        return f"{prefix}: {message}" if prefix else message
    return f"{place}={_shown(problem['input'])}: {message}"


def _unknown(place: str, known: Iterable[str]) -> str:
    *_, name = place.rpartition(".")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known) or 'none'}"
    return f"{place}: unknown field; {hint}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_odd(value: Any, where: str, place: str, depth: int = 0) -> None:
    """Refuse what a parser lets through and later code trips over: NUL, giant integers, depth."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: {place}: nested too deeply; at most {MAX_DEPTH} levels")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where}: {place}={_shown(value)}: NUL characters are not allowed")
    if isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
        raise ConfigError(f"{where}: {place}: the integer does not fit 64 bits")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where}: {place}: key {_shown(key)} must be text")
            _refuse_odd(key, where, place, depth)
            _refuse_odd(item, where, f"{place}.{key}" if place else key, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_odd(item, where, f"{place}.{index}" if place else str(index), depth + 1)


def _merged(config: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    values = _fields_of(config)
    for name, value in overrides.items():
        nested = dataclasses.is_dataclass(values.get(name)) and isinstance(value, Mapping)
        values[name] = _merged(values[name], value) if nested else value
    return values


def _fields_of(config: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"expected a dataclass instance, got {config!r}")
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _read_json(text: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(f"{key}: given twice")
            seen[key] = value
        return seen

    return json.loads(text, object_pairs_hook=mapping)


def _is_yaml(path: Path) -> bool:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"{path}: a config file ends in .json, .yaml or .yml")
    return path.suffix != ".json"


@lru_cache(maxsize=256)
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    # pydantic takes no configuration beside a dataclass, but hands it down to one inside a tuple.
    inside: Any = tuple.__class_getitem__((kind,))
    return pydantic.TypeAdapter(inside, config=pydantic.ConfigDict(extra="forbid"))


@lru_cache(maxsize=256)
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
