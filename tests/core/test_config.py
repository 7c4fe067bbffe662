"""Configs are read strictly, JSON and YAML alike; every fault names field, value and rule."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyzoo.core import plain_yaml
from polyzoo.core.config import MAX_BYTES, dump, load, merge, overlay, read_mapping, save
from polyzoo.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    folder: Path
    steps: int = 10
    heads: int = 2
    dim: int = 8
    shuffle: bool = True
    title: str = ""
    names: tuple[str, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)
    optim: Optim = field(default_factory=Optim)
    warm: Optim | None = None

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} must divide dim={self.dim}")


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
floats = st.floats(allow_nan=False)
optims = st.builds(
    Optim, name=st.sampled_from(["adamw", "sgd"]), lr=floats, betas=st.tuples(floats, floats)
)
runs = st.builds(
    Run,
    folder=texts.filter(bool).map(Path),
    steps=st.integers(-(2**63), 2**63 - 1),
    shuffle=st.booleans(),
    title=texts,
    names=st.lists(texts, max_size=3).map(tuple),
    limits=st.dictionaries(texts, st.integers(0, 9), max_size=3),
    optim=optims,
    warm=st.none() | optims,
)


@given(run=runs)
def test_dump_then_load_is_the_same(run: Run) -> None:
    plain = dump(run)
    assert load(Run, plain) == run
    assert load(Run, json.loads(json.dumps(plain))) == run


@given(run=runs, suffix=st.sampled_from([".json", ".yaml", ".yml"]))
def test_save_then_load_is_the_same(tmp_path_factory: Any, run: Run, suffix: str) -> None:
    path = tmp_path_factory.mktemp("config") / f"run{suffix}"
    save(run, path)
    assert load(Run, path) == run


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(values=st.dictionaries(texts, plain_values, max_size=4))
def test_yaml_gives_back_what_it_was_given(values: dict[str, Any]) -> None:
    assert plain_yaml.read(plain_yaml.write(values)) == values


@given(value=texts | st.sampled_from(["1e-4", "no", "on", "1:30", "0o17", "~", "-", "#", "1_000"]))
def test_yaml_keeps_texts_texts(value: str) -> None:
    assert plain_yaml.read(plain_yaml.write({"k": value})) == {"k": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2", -2),
        ("no", "no"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("010", 10.0),
        (".inf", float("inf")),
        ("true", True),
        ("", None),
        ("<<", "<<"),
    ],
)
def test_yaml_scalars_are_those_of_version_1_2(text: str, value: Any) -> None:
    got = plain_yaml.read(f"k: {text}")["k"]
    assert got == value
    assert type(got) is type(value)


FAULTS = [
    ({"folder": "x", "stepps": 1}, r"stepps: unknown field; did you mean 'steps'\?"),
    ({"folder": "x", "zzz": 1}, r"zzz: unknown field; known are folder, steps"),
    ({"folder": "x", "optim": {"lrr": 1}}, r"optim\.lrr: unknown field; did you mean 'lr'\?"),
    ({"folder": "x", "warm": {"lrr": 1}}, r"warm\.lrr: unknown field"),
    ({"steps": 1}, r"folder: a value is required"),
    ({"folder": "x", "steps": "1"}, r'steps="1": must be a valid integer'),
    ({"folder": "x", "steps": 1.5}, r"steps=1\.5: must be a valid integer"),
    ({"folder": "x", "steps": True}, r"steps=true: must be a valid integer"),
    ({"folder": "x", "steps": 2**70}, r"steps: the integer does not fit 64 bits"),
    ({"folder": "x", "shuffle": 1}, r"shuffle=1: must be a valid boolean"),
    ({"folder": "x", "optim": {"name": "adm"}}, r'optim\.name="adm": must be \'adamw\' or \'sgd\''),
    ({"folder": "x", "optim": 3}, r"optim=3: must be"),
    ({"folder": "x", "optim": {"betas": [1]}}, r"optim\.betas"),
    ({"folder": "x", "names": ["a", 1]}, r"names\.1=1: must be a valid string"),
    ({"folder": "x", "limits": {"a": None}}, r"limits\.a=null"),
    ({"folder": "x", "title": "a\0b"}, r"title=.*: NUL characters are not allowed"),
    ({"folder": "x", "heads": 3}, r"heads=3 must divide dim=8"),
    ({"folder": "x", 3: 1}, r"key 3 must be text"),
    ({"folder": object()}, r"not a plain value"),
    ({"folder": "x", "title": "\ud800"}, r"not a plain value"),
]


@pytest.mark.parametrize(("values", "message"), FAULTS)
def test_faults_name_field_value_and_rule(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^Run: .*{message}"):
        load(Run, values)


def test_several_faults_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"\(and 2 more\)$"):
        load(Run, {"folder": 1, "steps": "a", "shuffle": 0})


DEEP = "[" * 3000 + "]" * 3000
FILES = [
    ("a.json", b'{"folder": "x", "folder": "y"}', "folder: given twice"),
    ("a.yaml", b"folder: x\nfolder: y\n", r"folder: given twice \(line 2\)"),
    ("a.json", b"{", "Expecting"),
    ("a.yaml", b"folder: [", "line 1: "),
    ("a.json", b"[1]", r"holds \[1\]; expected a mapping"),
    ("a.yaml", b"", "holds null; expected a mapping"),
    ("a.yaml", b"a: 1\n---\nb: 2\n", "single document"),
    ("a.json", b'{"folder": "\xff"}', "byte 12 is not UTF-8"),
    ("a.yaml", b"folder: x\0y", "null byte|not allowed|special characters"),
    ("a.json", f'{{"names": {DEEP}}}'.encode(), "nested too deeply"),
    ("a.yaml", f"names: {DEEP}".encode(), "nested too deeply"),
    ("a.json", b'{"steps": ' + b"9" * 5000 + b"}", "digit"),
    ("a.yaml", b"steps: " + b"9" * 5000, "digit"),
    ("a.yaml", b"a: &a [x, x]\nb: [*a, *a]\n", "line 1: anchors and aliases are not allowed"),
    ("a.yaml", b"b: *a\n", "anchors and aliases are not allowed"),
    ("a.yaml", b"a: !!python/object/apply:os.system [x]", r"line 1: tags \(.*\) are not allowed"),
    ("a.yaml", b"1: x", "key 1 must be text; quote it"),
    ("a.yaml", b"{[a]: x}", "must be text"),
    ("a.toml", b"", r"ends in \.json, \.yaml or \.yml"),
    ("a.json", b" " * (MAX_BYTES + 1), "more than the 1,048,576 bytes allowed"),
]


@pytest.mark.parametrize(("name", "data", "message"), FILES, ids=[message for *_, message in FILES])
def test_broken_files_are_explained(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        load(Run, path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < len(str(path)) + 300


def test_missing_files_and_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: no such file"):
        load(Run, tmp_path / "none.json")
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(ConfigError, match=r"dir\.json: cannot be read"):
        load(Run, str(tmp_path / "dir.json"))
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load(Run, "a\0.json")


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"steps": 1}')
    assert read_mapping(tmp_path / "a.json") == {"steps": 1}


def test_merge_replaces_nested_fields_and_checks_them() -> None:
    run = Run(folder=Path("x"), optim=Optim(lr=0.5), limits={"a": 1})
    merged = merge(run, {"optim": {"name": "sgd"}, "warm": {"lr": 2}, "limits": {"b": 2}})
    assert merged.optim == Optim(lr=0.5, name="sgd")
    assert merged.warm == Optim(lr=2.0)
    assert merged.limits == {"b": 2}, "a plain mapping is a value: replaced whole"
    assert merge(merged, {"warm": None}).warm is None
    assert run.optim.name == "adamw"
    with pytest.raises(ConfigError, match=r"optim\.nam: unknown field"):
        merge(run, {"optim": {"nam": "sgd"}})
    with pytest.raises(ConfigError, match=r"heads=3 must divide"):
        merge(run, {"heads": 3})


def test_overlay_checks_what_is_given_and_leaves_the_rest_open() -> None:
    values: dict[str, Any] = {"optim": Optim(lr=0.5)}
    overlay(Run, values, {"steps": 3, "optim": {"name": "sgd"}}, where="run.yaml")
    assert values == {"steps": 3, "optim": Optim(lr=0.5, name="sgd")}
    with pytest.raises(ConfigError, match=r"^run\.yaml: stepps: unknown field; did you mean"):
        overlay(Run, values, {"stepps": 3}, where="run.yaml")
    with pytest.raises(ConfigError, match=r'^run\.yaml: optim\.lr="a": must be'):
        overlay(Run, values, {"optim": {"lr": "a"}}, where="run.yaml")


def test_only_configs_are_dumped() -> None:
    for thing in (Run, {"steps": 1}, 3):
        with pytest.raises(TypeError, match="expected a dataclass instance"):
            dump(thing)
