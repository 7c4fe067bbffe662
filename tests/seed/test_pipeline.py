"""Pictures in, pictures out; and what is said to input that cannot be used."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyzoo.core.errors import ConfigError, DataError, WeightsError
from polyzoo.core.weights import read_weights, write_weights
from polyzoo.seed.folders import load_parts, save_parts
from polyzoo.seed.pipeline import SeedPipeline
from polyzoo.seed.preprocessing import to_pixels
from support.cli import run_cli, run_python
from support.seed_models import shapes, tiny_model, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("seed") / "model")


@pytest.fixture(scope="module")
def seed(folder: Path) -> SeedPipeline:
    return SeedPipeline.from_pretrained(folder, device="cpu")


class TestPictures:
    def test_path_image_array_and_tensor_agree(self, seed: SeedPipeline, tmp_path: Path):
        picture = shapes()[0][1]
        picture.save(tmp_path / "a.png")
        given = [
            tmp_path / "a.png", str(tmp_path / "a.png"), picture, np.asarray(picture),
            to_pixels(picture, seed.config), (tmp_path / "a.png").read_bytes(),
        ]  # fmt: skip
        codes = seed.encode(given)
        assert codes.shape == (6, 4)
        assert (codes == codes[0]).all()

    def test_one_picture_and_a_list(self, seed: SeedPipeline):
        pictures = [picture for _, picture in shapes()]
        alone = np.concatenate([seed.encode(picture) for picture in pictures])
        assert np.array_equal(seed.encode(pictures, batch_size=5), alone)

    @pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "I;16", "1"])
    def test_every_kind_of_picture(self, seed: SeedPipeline, mode: str):
        picture = Image.new("L" if mode == "I;16" else mode, (40, 20))
        picture = picture.convert("I").convert("I;16") if mode == "I;16" else picture
        assert seed.encode(picture).shape == (1, 4)

    def test_transparency_lies_on_white(self, seed: SeedPipeline):
        clear = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
        white = Image.new("RGB", (32, 32), (255, 255, 255))
        assert np.array_equal(seed.encode(clear), seed.encode(white))

    def test_rotation_and_first_frame(self, seed: SeedPipeline, tmp_path: Path):
        picture = shapes()[1][1]
        exif = Image.Exif()
        exif[0x0112] = 3
        picture.rotate(180).save(tmp_path / "turned.png", exif=exif)
        assert np.array_equal(seed.encode(tmp_path / "turned.png"), seed.encode(picture))
        picture.save(tmp_path / "two.webp", save_all=True, lossless=True,
                     append_images=[shapes()[5][1]])  # fmt: skip
        assert np.array_equal(seed.encode(tmp_path / "two.webp"), seed.encode(picture))

    def test_the_resize_filter_is_part_of_the_tokenizer(self, tmp_path: Path):
        noise = np.random.default_rng(0).integers(0, 255, (90, 50, 3), dtype=np.uint8)
        smooth = tiny_model().config
        from dataclasses import replace

        other = replace(smooth, preprocess=replace(smooth.preprocess, resample="bilinear"))
        assert not torch.equal(to_pixels(noise, smooth), to_pixels(noise, other))


def png(size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size).save(data, "PNG")
    return data.getvalue()


class TestBadPictures:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (b"", "is not one of PNG"),
            (b"GIF89a and then nothing", "damaged|is not one of"),
            (png((40, 40))[:60], "damaged|is not one of"),
            (np.zeros((4, 4), np.float32), "an array of float32 and shape .4, 4. is no picture"),
            (np.zeros((4, 4, 2), np.uint8), "has no 3 or 4 channels"),
            (np.zeros((0, 4, 3), np.uint8), "holds no pixels"),
            (torch.zeros(3, 32, 32, dtype=torch.uint8), "pixels are uint8; wanted are normalised"),
            (torch.zeros(3, 32, 32, dtype=torch.int64), "pixels are torch.int64; wanted are"),
            (torch.zeros(4, 32, 32), r"pixels have shape \(1, 4, 32, 32\); wanted are"),
            (torch.zeros(3, 16, 32), r"pixels have shape \(1, 3, 16, 32\)"),
            (torch.zeros(32, 32), r"pixels have shape \(32, 32\)"),
            (torch.full((3, 32, 32), float("nan")), "pixels hold NaN or infinity"),
            (torch.full((3, 32, 32), float("inf")), "pixels hold NaN or infinity"),
            (torch.full((3, 32, 32), 255.0), "which no normalised picture does: divide by 255"),
        ],
    )
    def test_message(self, seed: SeedPipeline, given: object, message: str):
        with pytest.raises(DataError, match=message):
            seed.encode([given])  # pyright: ignore[reportArgumentType]

    def test_a_decompression_bomb(self, seed: SeedPipeline, tmp_path: Path):
        Image.new("1", (9_000, 9_000)).save(tmp_path / "bomb.png")
        with pytest.raises(DataError, match="more than 64,000,000 pixels"):
            seed.encode(tmp_path / "bomb.png")

    def test_no_picture_at_all(self, seed: SeedPipeline):
        with pytest.raises(DataError, match="no picture was given"):
            seed.encode([])
        with pytest.raises(DataError, match="the batch is empty"):
            seed.encode_pixels(torch.zeros(0, 3, 32, 32))

    def test_pictures_of_several_sizes_in_a_list(self, seed: SeedPipeline):
        small, large = torch.zeros(3, 32, 32), torch.zeros(3, 40, 40)
        with pytest.raises(DataError, match=r"pixels have shape \(1, 3, 40, 40\)"):
            seed.encode([small, large])


class TestDrawing:
    def test_each_picture_depends_on_its_own_seed(self, seed: SeedPipeline):
        codes = seed.encode([shapes()[0][1], shapes()[6][1]])
        both = seed.decode(codes, seed=[3, 4])
        assert [picture.size for picture in both] == [(16, 16)] * 2
        alone = seed.decode(codes[1], seed=4)[0]
        close = np.abs(np.asarray(both[1], int) - np.asarray(alone, int)).max()
        assert close <= 1
        other = seed.decode(codes[1], seed=5)[0]
        assert np.abs(np.asarray(other, int) - np.asarray(alone, int)).max() > 8

    @pytest.mark.parametrize(
        ("codes", "message"),
        [
            ([0, 1, 2], r"codes are \(1, 3\); this tokenizer writes 4 an image"),
            ([[0, 1, 2, 16]], "codes lie in 0 to 16, and the codebook has 0 to 15; if these are"),
            ([[0.0, 1.0, 2.0, 3.0]], "must be integers"),
            ([[[0, 1, 2, 3]]], r"codes are \(1, 1, 4\)"),
            (np.zeros((0, 4), int), r"codes are \(0, 4\)"),
        ],
    )
    def test_bad_codes(self, seed: SeedPipeline, codes: object, message: str):
        with pytest.raises(DataError, match=message):
            seed.decode(codes)  # pyright: ignore[reportArgumentType]

    def test_bad_numbers(self, seed: SeedPipeline):
        codes = [0, 1, 2, 3]
        with pytest.raises(ConfigError, match="2 seeds for 1 pictures"):
            seed.decode(codes, seed=[1, 2])
        with pytest.raises(ConfigError, match="steps=0 must be at least 1"):
            seed.decode(codes, steps=0)
        with pytest.raises(ConfigError, match="need a diffusers de-tokeniser"):
            seed.decode(codes, negative=codes)
        with pytest.raises(DataError, match=r"negative codes \(2, 4\) do not go with codes"):
            seed.decode(codes, negative=[codes, codes])

    def test_no_detokeniser(self, tmp_path: Path):
        bare = SeedPipeline.from_pretrained(write_folder(tmp_path, decoder=False), device="cpu")
        with pytest.raises(ConfigError, match="has no de-tokeniser, so codes cannot become pixels"):
            bare.decode([0, 1, 2, 3])

    def test_no_language_model(self, seed: SeedPipeline):
        with pytest.raises(ConfigError, match="has no language model; train one"):
            seed.caption(shapes()[0][1])
        with pytest.raises(DataError, match="at least one text that is not empty"):
            seed.draw([" "])


class TestFolders:
    def test_int8_is_read_back(self, folder: Path, tmp_path: Path):
        parts = load_parts(folder)
        save_parts(tmp_path, parts.model, pieces=folder / "tokenizer.json", int8=True)
        again = load_parts(tmp_path).model
        assert torch.equal(again.quantizer.codebook, parts.model.quantizer.codebook)
        small = (tmp_path / "model.safetensors").stat().st_size
        assert small < (folder / "model.safetensors").stat().st_size

    def test_a_tokenizer_changed_after_training(self, folder: Path, tmp_path: Path):
        save_parts(tmp_path, tiny_model(), pieces=folder / "tokenizer.json")
        text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
        (tmp_path / "tokenizer.json").write_text(text.replace('"flat":16', '"flat":16,"x":17'))
        with pytest.raises(WeightsError, match="has 18 pieces and the text branch 17"):
            load_parts(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(WeightsError, match=r"has a text branch and no tokenizer\.json"):
            load_parts(tmp_path)

    def test_weights_that_do_not_fit(self, folder: Path, tmp_path: Path):
        save_parts(tmp_path, tiny_model(), pieces=folder / "tokenizer.json")
        tensors = read_weights(tmp_path)
        tensors["quantizer.codebook"] = tensors["quantizer.codebook"][:8].clone()
        del tensors["queries"]
        write_weights(tmp_path / "model.safetensors", tensors)
        with pytest.raises(WeightsError, match=r"1 missing .queries.*1 misshaped .quantizer"):
            load_parts(tmp_path)

    def test_half_precision_where_the_cpu_lacks_it(self, folder: Path):
        with pytest.raises(ConfigError, match="dtype=float16: CPU kernels lack it"):
            SeedPipeline.from_pretrained(folder, device="cpu", dtype="float16")

    def test_bf16_keeps_the_codebook(self, folder: Path, seed: SeedPipeline):
        half = SeedPipeline.from_pretrained(folder, device="cpu", dtype="bfloat16")
        assert half.model.quantizer.codebook.dtype == torch.float32
        assert torch.equal(half.model.quantizer.codebook, seed.model.quantizer.codebook)
        assert half.encode(shapes()[0][1]).shape == (1, 4)


class TestCommandLine:
    def test_there_is_help_without_torch(self):
        code = (
            "import sys\n"
            "from polyzoo.core.cli import main\n"
            "from polyzoo.seed.cli import GROUP\n"
            "assert main(['seed', '--help']) == 0\n"
            "for name in GROUP.commands:\n"
            "    assert main(['seed', name, '--help']) == 0\n"
            "assert 'torch' not in sys.modules\n"
        )
        done = run_python(code)
        assert done.returncode == 0, done.stderr
        for name in ("train-tokenizer", "train-lm", "tokenize", "detokenize", "caption", "draw",
                     "chat", "convert", "eval"):  # fmt: skip
            assert f"polyzoo seed {name}" in done.stdout

    def test_wrong_usage(self):
        done = run_cli("seed", "caption", "--modell", "x")
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1

    def test_importing_the_package_is_cheap(self):
        done = run_python(
            "import sys, polyzoo.seed\nassert 'torch' not in sys.modules\n"
            "assert 'SeedPipeline' in dir(polyzoo.seed)\n"
        )
        assert done.returncode == 0, done.stderr
