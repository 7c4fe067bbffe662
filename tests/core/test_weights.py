"""Weights come back as they were, fit exactly or are refused with a report, and never run code."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyzoo.core.errors import WeightsError
from polyzoo.core.weights import (
    convert_pickle,
    load_into,
    read_metadata,
    read_weights,
    write_weights,
)


def some_tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    table = torch.randn(6, 4, generator=draw)
    return {
        "table": table,
        "tied": table,
        "view": table[1:3],
        "turned": table.T,
        "bf16": torch.randn(3, 3, generator=draw).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.safetensors"
    write_weights(path, some_tensors(), metadata={"made": "here"})
    assert equal(read_weights(path), some_tensors())
    assert equal(read_weights(path.parent), some_tensors())
    assert equal(load_file(path), some_tensors()), "any safetensors reader can read it"
    assert read_metadata(path) == {"format": "pt", "made": "here"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_parameters_on_a_graph_can_be_written(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    write_weights(tmp_path / "a.safetensors", dict(model.named_parameters()))
    assert torch.equal(read_weights(tmp_path)["weight"], model.weight)


def test_dtype_changes_only_floating_point(tmp_path: Path) -> None:
    write_weights(tmp_path / "a.safetensors", some_tensors())
    got = read_weights(tmp_path / "a.safetensors", dtype=torch.float16)
    assert got["table"].dtype == got["bf16"].dtype == torch.float16
    assert got["count"].dtype == torch.int64
    assert got["flags"].dtype == torch.bool


@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 7),
    exponent=st.integers(-30, 6),
    seed=st.integers(0, 99),
)
def test_int8_rows_are_off_by_half_a_step_at_most(
    tmp_path_factory: Any, rows: int, columns: int, exponent: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("w") / "a.safetensors"
    exact = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    exact *= 10.0**exponent
    if rows > 2:
        exact[1] = 0
    write_weights(path, {"m": exact, "bias": exact}, int8_rows=["m"])
    got = read_weights(path)
    assert torch.equal(got["bias"], exact)
    assert got.keys() == {"m", "bias"}
    assert got["m"].shape == exact.shape
    if exact.numel():
        peaks = exact.abs().amax(1, keepdim=True)
        # 1/253 of the peak; below that, the smallest number float16 can hold per step
        bound = torch.maximum(peaks / 253, torch.full_like(peaks, 127 * 2.0**-24))
        assert ((got["m"] - exact).abs() <= bound).all()


def test_int8_rows_need_a_quarter_of_the_space_and_keep_higher_axes(tmp_path: Path) -> None:
    exact = torch.randn(64, 8, 8)
    write_weights(tmp_path / "a.safetensors", {"m": exact})
    write_weights(tmp_path / "b.safetensors", {"m": exact}, int8_rows={"m"})
    small, large = ((tmp_path / f"{n}.safetensors").stat().st_size for n in "ba")
    assert small < large * 0.3
    got = read_weights(tmp_path / "b.safetensors", dtype=torch.float16)["m"]
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), exact, atol=exact.abs().max().item() / 250, rtol=0)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3), "two or more axes"),
        (torch.zeros(3, 3, dtype=torch.int32), "must be floating point"),
        (torch.full((2, 2), float("nan")), "not finite"),
        (torch.full((2, 2), 3e38), "too large for a float16 scale"),
    ],
)
def test_int8_rows_refuse_what_they_cannot_hold(
    tmp_path: Path, tensor: Tensor, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        write_weights(tmp_path / "a.safetensors", {"m": tensor}, int8_rows=["m"])
    with pytest.raises(WeightsError, match="names 'x', which is not among"):
        write_weights(tmp_path / "a.safetensors", {"m": tensor}, int8_rows=["x"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "entry", ['["a"]', '["m", "m"]', '{"m": 1}', "[1]", "[", '["m", "b"]', "[" * 9999, "3"]
)
def test_damaged_int8_rows_are_refused(tmp_path: Path, entry: str) -> None:
    tensors = {
        "m": torch.zeros(2, 2, dtype=torch.int8),
        "m.int8_scale": torch.zeros(2, dtype=torch.float16),
        "b": torch.zeros(2, 2),
        "b.int8_scale": torch.zeros(3, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"polyzoo.int8_rows": entry})
    with pytest.raises(WeightsError, match=r"a\.safetensors: is damaged"):
        read_weights(tmp_path)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


def test_loading_fills_every_parameter_and_buffer() -> None:
    source, target = Small(), Small()
    load_into(target, source.state_dict(), source="here")
    assert equal(dict(target.state_dict()), dict(source.state_dict()))


def test_loading_into_the_meta_device_takes_the_tensors() -> None:
    with torch.device("meta"):
        target = Small()
    tensors = Small().state_dict()
    load_into(target, tensors, source="here")
    assert target.inner.weight.device.type == "cpu"
    assert equal(dict(target.state_dict()), dict(tensors))


def test_a_misfit_is_reported_once_and_changes_nothing() -> None:
    target = Small()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    tensors = {
        **{f"extra.{i}": torch.zeros(1) for i in range(5)},
        "inner.weight": torch.zeros(3, 2),
        "norm.weight": torch.ones(2),
    }
    with pytest.raises(WeightsError) as caught:
        load_into(target, tensors, source="x.safetensors")
    assert str(caught.value) == (
        "x.safetensors: does not fit Small: "
        "5 missing (inner.bias, norm.bias, norm.running_mean, ...); "
        "5 unexpected (extra.0, extra.1, extra.2, ...); "
        "1 misshaped (inner.weight (3, 2) in the file, (2, 3) in the model)"
    )
    assert equal(dict(target.state_dict()), before)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_a_known_prefix_is_pointed_out(prefix: str) -> None:
    tensors = {prefix + name: value for name, value in Small().state_dict().items()}
    with pytest.raises(WeightsError, match=rf"name starts with '{prefix}': strip it$"):
        load_into(Small(), tensors, source="x")
    with pytest.raises(WeightsError, match=r"7 unexpected \([^)]*\)$"):
        load_into(Small(), {f"{prefix}zzz{i}": torch.ones(1) for i in range(7)}, source="x")


def index_with(folder: Path, places: Any) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards_are_joined(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3), "c": torch.zeros(1)}, tmp_path / "two.safetensors")
    index = index_with(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    for path in (index, tmp_path):
        assert equal(read_weights(path), {"a": torch.ones(2), "b": torch.zeros(3)})


def test_shards_of_the_hub_cache_may_be_links_into_its_blobs(tmp_path: Path) -> None:
    blobs, revision = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    revision.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "0123")
    (revision / "one.safetensors").symlink_to("../../blobs/0123")
    index_with(revision, {"a": "one.safetensors"})
    assert equal(read_weights(revision), {"a": torch.ones(2)})


@pytest.mark.parametrize(
    "name",
    [
        "../out.safetensors",
        "/etc/out.safetensors",
        "sub/out.safetensors",
        "..\\out.safetensors",
        "out.bin",
        "",
        ".safetensors",
        "a\0.safetensors",
        3,
        None,
    ],
)
def test_shards_may_not_leave_the_folder(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file({"a": torch.ones(2)}, place / "out.safetensors")
    with pytest.raises(WeightsError, match=r"is not a \.safetensors file of the same folder"):
        read_weights(index_with(folder, {"a": name}))


def test_links_out_of_the_folder_and_missing_shards_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "out.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    with pytest.raises(WeightsError, match="outside its folder"):
        read_weights(index_with(folder, {"a": "link.safetensors"}))
    with pytest.raises(WeightsError, match=r"gone\.safetensors: no such file, though the index"):
        read_weights(index_with(folder, {"a": "gone.safetensors"}))
    save_file({"a": torch.ones(2)}, folder / "here.safetensors")
    with pytest.raises(WeightsError, match="the index promises 'b', which is not in it"):
        read_weights(index_with(folder, {"a": "here.safetensors", "b": "here.safetensors"}))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', "{}", "[" * 9999])
def test_damaged_indexes_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="is not an index of safetensors files"):
        read_weights(tmp_path)


def test_an_empty_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="names no files"):
        read_weights(index_with(tmp_path, {}))


def test_missing_files_are_called_missing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nope\.safetensors: no such file$"):
        read_weights(tmp_path / "nope.safetensors")
    with pytest.raises(WeightsError, match=r"holds neither model\.safetensors nor"):
        read_weights(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is a pickle, which must be"):
        read_weights(tmp_path)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_renamed_pickle_is_known_by_its_bytes(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightsError, match=r"is a pickle .* renaming does not make it safe"):
        read_weights(path)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50])
def test_a_header_as_long_as_a_pickle_begins_is_read(tmp_path: Path, length: int) -> None:
    tensors = {"a": torch.ones(2)}
    path = tmp_path / "model.safetensors"
    write_weights(path, tensors, metadata={"pad": ""})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    padded = header.replace(b'"pad":""', b'"pad":"' + b"x" * (length - len(header)) + b'"')
    path.write_bytes(length.to_bytes(8, "little") + padded + data[8 + size :])
    assert equal(read_weights(path), tensors)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = b"{" + entry + b"," + entry + b"}"
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="a name is given twice"):
        read_weights(tmp_path)


def test_checkpoints_of_plain_tensors_are_converted(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 2), "b": torch.arange(3)}
    wholes = (tensors, {"state_dict": tensors, "epoch": 3}, {"model": tensors, "args": {"x": 1}})
    for number, whole in enumerate(wholes):
        torch.save(whole, tmp_path / f"{number}.pt")
        assert equal(convert_pickle(tmp_path / f"{number}.pt"), tensors)


class Evil:
    """Its pickle calls whatever it is told to."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def evil_payloads(flag: Path) -> dict[str, Any]:
    import builtins
    import os
    import shutil
    import subprocess

    return {
        "system": Evil(os.system, f"touch {flag}"),
        "popen": Evil(subprocess.Popen, ["touch", str(flag)]),
        "eval": Evil(builtins.eval, f"open({str(flag)!r}, 'w')"),
        "exec": Evil(builtins.exec, f"open({str(flag)!r}, 'w')"),
        "open": Evil(builtins.open, str(flag), "w"),
        "mkdir": Evil(os.mkdir, str(flag)),
        "copy": Evil(shutil.copy, __file__, str(flag)),
        "path": Evil(Path.touch, flag),
        "getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "torch.load": Evil(torch.load, str(flag.with_suffix(".pt"))),
    }


@pytest.mark.parametrize("name", list(evil_payloads(Path("x"))))
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_malicious_pickles_never_run(tmp_path: Path, name: str, form: str) -> None:
    flag, path = tmp_path / "flag", tmp_path / "bad.pt"
    payload = {"a": torch.ones(1), "b": evil_payloads(flag)[name]}
    if form == "bare":
        path.write_bytes(pickle.dumps(payload["b"]))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        WeightsError, match=r"bad\.pt: (refused, since reading it could run|is dam)"
    ):
        convert_pickle(path)
    assert not flag.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"\x80\x02", "is damaged|refused"),
        (b"PK\x03\x04 no", "is damaged|refused"),
        (b"hello there", "is damaged|refused"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        convert_pickle(tmp_path / "a.pt")


def test_checkpoints_of_other_things_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for whole, message in (
        ([1], "holds list; expected names with tensors"),
        ({}, "holds dict; expected"),
        ({"a": 3}, "'a' holds int; expected a tensor"),
        ({1: torch.ones(1)}, "1 holds Tensor; expected"),
    ):
        torch.save(whole, path)
        with pytest.raises(WeightsError, match=message):
            convert_pickle(path)
    with pytest.raises(WeightsError, match="no such file"):
        convert_pickle(tmp_path / "none.pt")


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10_000_000))
    with pytest.raises(WeightsError, match="is compressed"):
        convert_pickle(path)


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_weights(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    assert (tmp_path / "x.safetensors").stat().st_mode == plain.stat().st_mode


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """Its first byte is then 0x80, as a pickle's; one file in 32 is like that."""
    tensors = {"a": torch.arange(3.0)}
    path = tmp_path / "model.safetensors"
    seen = False
    for length in range(0, 400, 8):
        write_weights(path, tensors, metadata={"note": "x" * length})
        seen = seen or path.read_bytes()[0] == 0x80
        assert equal(read_weights(path), tensors)
    assert seen
