"""Batch tokenisation: shards, bad pictures, tars, and being killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from polyzoo.core.errors import DataError, LockedError, UsageError
from polyzoo.seed.commands import detokenize
from polyzoo.seed.options import DetokenizeConfig, TokenizeConfig
from polyzoo.seed.pipeline import SeedPipeline
from polyzoo.seed.shards import TokenWriter, read_tokens
from polyzoo.seed.sources import open_source
from polyzoo.seed.tokenizing import main, tokenize
from support.cli import child_environment, run_cli
from support.seed_models import shapes, write_folder, write_pairs

META = {"tokens_per_image": 4, "codes": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("seed") / "model")


def config(model: Path, images: Path, out: Path, **more: object) -> TokenizeConfig:
    given = {"model": str(model), "device": "cpu", "batch_size": 5, **more}
    return TokenizeConfig(images=images, out=out, **given)  # pyright: ignore[reportArgumentType]


class TestFolders:
    def test_codes_are_the_pipelines(self, model: Path, tmp_path: Path):
        _, images = write_pairs(tmp_path)
        report = main(config(model, images, tmp_path / "tokens"))
        assert (report.pictures, report.new, report.failed) == (12, 12, 0)
        found = read_tokens(tmp_path / "tokens")
        seed = SeedPipeline.from_pretrained(model, device="cpu")
        codes = seed.encode([images / name for name in found])
        assert np.array_equal(np.stack(list(found.values())), codes)
        assert (tmp_path / "tokens" / "codes.bin").stat().st_size == 12 * 4 * 2

    def test_batch_size_and_workers_change_nothing(self, model: Path, tmp_path: Path):
        _, images = write_pairs(tmp_path)
        main(config(model, images, tmp_path / "one", batch_size=1))
        main(config(model, images, tmp_path / "all", batch_size=64, workers=1))
        for name in ("codes.bin", "keys.jsonl"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()

    def test_a_broken_picture_is_counted_and_not_tried_again(self, model: Path, tmp_path: Path):
        _, images = write_pairs(tmp_path, broken=True)
        out = tmp_path / "tokens"
        assert main(config(model, images, out)).failed == 1
        row = json.loads((out / "failed.jsonl").read_text(encoding="utf-8"))
        assert row["key"] == "broken.png"
        assert "damaged" in row["error"]
        again = main(config(model, images, out))
        assert (again.new, again.failed, again.pictures) == (0, 1, 12)

    def test_nothing_but_broken_pictures(self, model: Path, tmp_path: Path):
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "a.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match="none of 1 pictures could be read"):
            main(config(model, tmp_path / "images", tmp_path / "tokens"))

    def test_other_settings_are_refused(self, model: Path, tmp_path: Path):
        _, images = write_pairs(tmp_path)
        main(config(model, images, tmp_path / "tokens"))
        other = write_folder(tmp_path / "other", codes=8)
        with pytest.raises(DataError, match="was begun with codes=16, now it is 8"):
            main(config(other, images, tmp_path / "tokens"))

    def test_parts_together_are_the_whole(self, model: Path, tmp_path: Path):
        _, images = write_pairs(tmp_path)
        main(config(model, images, tmp_path / "whole"))
        found: dict[str, np.ndarray] = {}
        for part in ("1/2", "2/2"):
            out = tmp_path / part[0]
            main(config(model, images, out, part=part))
            found |= read_tokens(out)
        whole = read_tokens(tmp_path / "whole")
        assert found.keys() == whole.keys()
        assert all(np.array_equal(found[key], whole[key]) for key in whole)
        with pytest.raises(UsageError, match="expected NUMBER/PARTS"):
            main(config(model, images, tmp_path / "x", part="3/2"))

    def test_two_processes_in_one_folder(self, tmp_path: Path):
        with (
            TokenWriter(tmp_path, meta=META),
            pytest.raises(LockedError, match="is in use by"),
            TokenWriter(tmp_path, meta=META),
        ):
            pass

    @pytest.mark.parametrize("name", ["missing", "empty"])
    def test_nowhere_to_read_from(self, tmp_path: Path, name: str):
        (tmp_path / "empty").mkdir()
        message = "no such file or folder" if name == "missing" else "holds no picture"
        with pytest.raises(DataError, match=message):
            open_source(tmp_path / name)


class TestTars:
    @staticmethod
    def write(path: Path, names: list[str]) -> None:
        with tarfile.open(path, "w") as archive:
            for name, (_, picture) in zip(names, shapes(), strict=False):
                data = io.BytesIO()
                picture.save(data, "PNG")
                member = tarfile.TarInfo(name)
                member.size = data.tell()
                data.seek(0)
                archive.addfile(member, data)
            note = tarfile.TarInfo("0.json")
            note.size = 2
            archive.addfile(note, io.BytesIO(b"{}"))

    def test_shards_give_the_codes_of_files(self, model: Path, tmp_path: Path):
        _, images = write_pairs(tmp_path)
        shards = tmp_path / "shards"
        shards.mkdir()
        self.write(shards / "a.tar", [f"{i:02d}.png" for i in range(12)])
        main(config(model, images, tmp_path / "files"))
        main(config(model, shards, tmp_path / "tars"))
        files, tars = read_tokens(tmp_path / "files"), read_tokens(tmp_path / "tars")
        assert list(tars) == [f"a.tar/{i:02d}.png" for i in range(12)]
        assert all(np.array_equal(tars[f"a.tar/{key}"], files[key]) for key in files)

    def test_two_pictures_of_one_name(self, tmp_path: Path):
        self.write(tmp_path / "a.tar", ["same.png", "same.png"])
        with pytest.raises(DataError, match="two pictures of one name"):
            open_source(tmp_path / "a.tar")

    def test_a_damaged_tar(self, tmp_path: Path):
        (tmp_path / "a.tar").write_bytes(b"x" * 2000)
        with pytest.raises(DataError, match="is no tar, or damaged"):
            open_source(tmp_path / "a.tar")


class TestResuming:
    def test_what_was_half_written_is_cut_off(self, tmp_path: Path):
        codes = np.arange(12).reshape(3, 4) % 16
        with TokenWriter(tmp_path, meta=META) as writer:
            writer.add(["a", "b"], codes[:2])
        with (tmp_path / "codes.bin").open("ab") as file:
            file.write(b"\1\2\3")
        with (tmp_path / "keys.jsonl").open("ab") as file:
            file.write(b'{"key": "c')
        with TokenWriter(tmp_path, meta=META) as writer:
            assert writer.done == {"a", "b"}
            writer.add(["c"], codes[2:])
        found = read_tokens(tmp_path)
        assert np.array_equal(np.stack([found[key] for key in "abc"]), codes)

    def test_codes_that_are_missing(self, tmp_path: Path):
        with TokenWriter(tmp_path, meta=META) as writer:
            writer.add(["a"], np.zeros((1, 4), np.int64))
        (tmp_path / "codes.bin").write_bytes(b"\0")
        with (
            pytest.raises(DataError, match="do not hold the 1 records"),
            TokenWriter(tmp_path, meta=META),
        ):
            pass
        with pytest.raises(DataError, match="holds fewer records"):
            read_tokens(tmp_path)

    def test_killed_in_the_middle(self, model: Path, tmp_path: Path):
        """A process is killed while it writes; the next goes on: no record lost or doubled."""
        _, images = write_pairs(tmp_path)
        for copy in range(12):
            for number in range(12):
                source = images / f"{number:02d}.png"
                (images / f"{copy:02d}-{number:02d}.png").write_bytes(source.read_bytes())
        code = (
            "import sys, time\n"
            "from pathlib import Path\n"
            "from polyzoo.seed import tokenizing\n"
            "from polyzoo.seed.options import TokenizeConfig\n"
            "tokenizing._FLUSH = 4\n"
            "config = TokenizeConfig(images=Path(sys.argv[1]), out=Path(sys.argv[2]),\n"
            "                        model=sys.argv[3], device='cpu', batch_size=2)\n"
            "tokenizing.main(config)\n"
        )
        out = tmp_path / "tokens"
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(images), str(out), str(model)],
            env=child_environment(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            if (out / "codes.bin").is_file() and (out / "codes.bin").stat().st_size >= 20 * 8:
                os.killpg(child.pid, signal.SIGKILL)
                break
        assert child.wait() == -signal.SIGKILL
        seed = SeedPipeline.from_pretrained(model, device="cpu")
        report = tokenize(open_source(images), seed, config(model, images, out))
        assert 0 < report.new < 156
        lines = (out / "keys.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(set(lines)) == 156
        assert (out / "codes.bin").stat().st_size == 156 * 8
        main(config(model, images, tmp_path / "unbroken"))
        whole, found = read_tokens(tmp_path / "unbroken"), read_tokens(out)
        assert all(np.array_equal(found[key], whole[key]) for key in whole)


class TestMemory:
    def test_a_batch_that_does_not_fit_is_halved_once(
        self, model: Path, caplog: pytest.LogCaptureFixture
    ):
        class Small(SeedPipeline):
            """A device that holds three pictures."""

            def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
                if len(pixels) > self.most:
                    raise torch.OutOfMemoryError("3 pictures at a time")
                return super()._encode(pixels)

            most = 3

        seed = Small.from_pretrained(model, device="cpu")
        pixels = torch.randn(6, 3, 32, 32)
        whole = SeedPipeline.from_pretrained(model, device="cpu").encode_pixels(pixels)
        assert np.array_equal(seed.encode_pixels(pixels), whole)
        assert "halving the batch once" in caplog.text
        seed.most = 1
        with pytest.raises(torch.OutOfMemoryError):
            seed.encode_pixels(pixels)


def test_on_the_command_line(model: Path, tmp_path: Path):
    _, images = write_pairs(tmp_path, broken=True)
    done = run_cli(
        "seed", "tokenize", images, "--out", tmp_path / "tokens", "--model", model,
        "--device", "cpu", "--json", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failed"] == 1
    assert json.loads(done.stdout)["new"] == 12


def test_detokenizing(model: Path, tmp_path: Path):
    _, images = write_pairs(tmp_path)
    main(config(model, images, tmp_path / "tokens"))
    drawn = detokenize(
        DetokenizeConfig(
            tokens=tmp_path / "tokens", out=tmp_path / "drawn", model=str(model), device="cpu",
            limit=2,
        )
    )  # fmt: skip
    assert [Path(file).name for file in drawn.files] == ["0000-00-png.png", "0001-01-png.png"]
    (tmp_path / "codes.json").write_text(json.dumps(drawn.codes[0]))
    again = detokenize(
        DetokenizeConfig(
            tokens=tmp_path / "codes.json", out=tmp_path / "again", model=str(model), device="cpu"
        )
    )
    assert Path(again.files[0]).read_bytes() == Path(drawn.files[0]).read_bytes()
    (tmp_path / "codes.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="must be a JSON list of codes"):
        detokenize(DetokenizeConfig(tokens=tmp_path / "codes.json", out=tmp_path, model=str(model)))
