"""YAML as people expect it: JSON's data model, YAML 1.2 scalars, no aliases, tags or twins."""

from __future__ import annotations

import re
from typing import Any

import yaml

from polyzoo.core.errors import ConfigError

# PyYAML follows YAML 1.1, where `1e-4` is text, `no` is false and `1:30` is 90. YAML 1.2's are:
_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(
                f"line {event.start_mark.line + 1}: anchors and aliases are not allowed"
            )
        if getattr(event, "tag", None):
            raise ConfigError(
                f"line {event.start_mark.line + 1}: tags ({event.tag}) are not allowed"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                line = key_node.start_mark.line + 1
                raise ConfigError(f"line {line}: key {key!r} must be text; quote it")
            if key in seen:
                raise ConfigError(f"{key}: given twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `_Loader` would take for something else."""

    def represent_text(self, value: str) -> yaml.Node:
        # Some of Unicode's line ends do not survive unless they are escaped.
        style = None if value.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def read(text: str) -> Any:
    """Return the plain values of one YAML document; ConfigError names the line."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a stricter child of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{line}{problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(" ".join(str(error).split())) from None


def write(values: dict[str, Any]) -> str:
    """Return plain values as YAML that `read` gives back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
