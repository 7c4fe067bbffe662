"""The commands: convert, infer, help."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from polyzoo.core.errors import ConfigError, DataError, UsageError, WeightsError
from polyzoo.pixart_delta import layout
from polyzoo.pixart_delta.convert import main as convert
from polyzoo.pixart_delta.folders import draw_null, load_control, load_null, load_transformer
from polyzoo.pixart_delta.hed import HedNetwork, load_hed
from polyzoo.pixart_delta.infer import main as infer
from polyzoo.pixart_delta.options import ConvertConfig, InferConfig
from polyzoo.pixart_delta.record import read_record
from support.cli import run_cli, run_python
from support.pixart_folders import write_model
from support.pixart_models import tiny_branch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")


class TestConvert:
    """Official files to folders and back."""

    def official(self, path: Path):
        model = tiny_model(sample_size=128)
        null = draw_null(model.shape)
        weights = layout.to_official(model.state_dict(), null_caption=null)
        weights[layout.POSITIONS] = torch.zeros(1, 4, 48)
        torch.save({"state_dict": weights, "epoch": 3}, path)
        return model, weights, null

    def test_there_and_back(self, tmp_path):
        model, weights, null = self.official(tmp_path / "model.pth")
        report = convert(ConvertConfig(source=tmp_path / "model.pth", out=tmp_path / "m", heads=2))
        assert "3 blocks of 48, with size conditions" in report.found
        found, kind = load_transformer(tmp_path / "m" / "transformer")
        assert kind == "base"
        assert all(torch.equal(found.state_dict()[n], x) for n, x in model.state_dict().items())
        stored = load_null(tmp_path / "m")
        assert stored is not None
        assert torch.equal(stored, null)
        convert(ConvertConfig(source=tmp_path / "m", out=tmp_path / "back.safetensors"))
        back = load_file(tmp_path / "back.safetensors")
        assert back.keys() == weights.keys() - {layout.POSITIONS}
        assert all(torch.equal(back[name], weights[name]) for name in back)

    def test_control(self, tmp_path):
        model, _, null = self.official(tmp_path / "model.pth")
        branch = tiny_branch(model)
        both = layout.join_control(branch.state_dict(), model.state_dict())
        both[f"base_model.{layout.NULL_CAPTION}"] = null
        torch.save({"state_dict": both}, tmp_path / "control.pth")
        given = ConvertConfig(
            source=tmp_path / "control.pth", out=tmp_path / "c", heads=2, full=True
        )
        convert(given)
        found = load_control(tmp_path / "c" / "controlnet")
        assert all(torch.equal(found.state_dict()[n], x) for n, x in branch.state_dict().items())
        convert(ConvertConfig(source=tmp_path / "c", out=tmp_path / "b.safetensors", full=True))
        back = load_file(tmp_path / "b.safetensors")
        assert all(torch.equal(back[name], both[name]) for name in back)

    def test_hed(self, tmp_path):
        network = HedNetwork()
        torch.save(network.state_dict(), tmp_path / "hed.pth")
        convert(ConvertConfig(source=tmp_path / "hed.pth", out=tmp_path / "hed.safetensors",
                              dtype="fp16"))  # fmt: skip
        found = load_hed(tmp_path / "hed.safetensors", dtype=torch.float32)
        assert torch.allclose(
            found.block1.convs[0].weight, network.block1.convs[0].weight, atol=1e-3
        )

    def test_refusals(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
        with pytest.raises(WeightsError, match=r"damaged, or no PyTorch|could run code"):
            convert(ConvertConfig(source=tmp_path / "evil.pth", out=tmp_path / "x"))
        torch.save({"state_dict": Evil()}, tmp_path / "evil2.pth")
        with pytest.raises(WeightsError, match=r"could run code of its author"):
            convert(ConvertConfig(source=tmp_path / "evil2.pth", out=tmp_path / "x"))
        assert not (tmp_path / "ran").exists()
        torch.save({"state_dict": {"x_embedder.what": torch.zeros(1)}}, tmp_path / "odd.pth")
        with pytest.raises(WeightsError, match=r"no part of an official PixArt transformer"):
            convert(ConvertConfig(source=tmp_path / "odd.pth", out=tmp_path / "x"))
        with pytest.raises(WeightsError, match=r"no such file"):
            convert(ConvertConfig(source=tmp_path / "none.pth", out=tmp_path / "x"))


class TestInfer:
    """Images on disk."""

    def test_prompts_file(self, tmp_path):
        write_model(tmp_path / "m")
        rows = [{"prompt": "red apple", "name": "one"}, {"prompt": "cat face", "seed": 7},
                {"prompt": "house", "height": 32, "width": 48}]  # fmt: skip
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
        report = infer(InferConfig(
            prompts=tmp_path / "p.jsonl", out=tmp_path / "out", model=str(tmp_path / "m"), steps=2,
            scheduler="lcm", device="cpu", profile=True,
        ))  # fmt: skip
        names = [Path(path).name for path in report.images]
        assert names == ["one.png", "0001-cat-face.png", "0002-house.png"]
        with Image.open(report.images[2]) as made:
            assert made.size == (48, 32)
        assert read_record(report.images[1])["seed"] == 7
        assert report.seconds["transformer"] > 0

    def test_errors(self, tmp_path):
        with pytest.raises(ConfigError, match=r"give a prompt or --prompts"):
            InferConfig()
        with pytest.raises(ConfigError, match=r"--mask needs --image"):
            InferConfig(prompt="cat", mask=tmp_path)
        with pytest.raises(UsageError, match=r"several images go into a folder"):
            infer(InferConfig(prompt="cat", count=2, out=tmp_path / "a.png"))
        with pytest.raises(UsageError, match=r"the name must end in .png"):
            infer(InferConfig(prompt="cat", out=tmp_path / "a.jpg"))
        for text, match in (
            ('{"prompt": 3}', "line 1: needs an object with a text 'prompt'"),
            ('{"prompt": "a", "sed": 3}', "unknown field 'sed'"),
            ('{"prompt": "a", "name": "../x"}', "must be a plain file name"),
            ("", "holds no prompt"),
        ):
            (tmp_path / "p.jsonl").write_text(text)
            with pytest.raises(DataError, match=match):
                infer(InferConfig(prompts=tmp_path / "p.jsonl", out=tmp_path / "o"))


def test_help_without_torch():
    code = (
        "import sys\nfrom polyzoo.core.cli import main\n"
        "assert main(['pixart-delta', 'train', '--help']) == 0\n"
        "assert main(['pixart-delta', 'infer', '--help']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "PRESET" in done.stdout


def test_usage_error_is_one_line():
    done = run_cli("pixart-delta", "infer", "cat", "--stepz", "3")
    assert done.returncode == 2
    assert "steps" in done.stderr
