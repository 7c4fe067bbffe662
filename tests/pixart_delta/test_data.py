"""Feature files of both formats, and the order they are read in."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.pixart_delta.data import (
    OfficialFeatures,
    ShardedFeatures,
    collate_features,
    latent_batch,
)
from polyzoo.pixart_delta.extract import main as extract
from polyzoo.pixart_delta.options import ExtractConfig
from polyzoo.pixart_delta.sampler import BucketSampler, BucketStream
from support.pixart_folders import picture, write_model


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and seven pictures of two shapes with captions."""
    folder = tmp_path_factory.mktemp("material")
    write_model(folder / "model")
    (folder / "images").mkdir()
    rows = []
    for index in range(7):
        size = (64, 64) if index % 2 else (96, 48)
        picture(index, size).save(folder / "images" / f"{index}.png")
        rows.append({"path": f"{index}.png", "prompt": f"red apple {index}", "height": size[1],
                     "width": size[0], "ratio": size[1] / size[0]})  # fmt: skip
    rows.append({"path": "long.png", "prompt": "", "height": 10, "width": 90, "ratio": 9.0})
    (folder / "data_info.json").write_text(json.dumps(rows))
    return folder


def config(material: Path, out: Path, **changes) -> ExtractConfig:
    values = {
        "data": material / "data_info.json", "images": material / "images", "out": out,
        "model": str(material / "model"), "resolution": 32, "shard_size": 3, "device": "cpu",
        "control": "edges",
    }  # fmt: skip
    return ExtractConfig(**{**values, **changes})


class TestExtraction:
    """Shards, written once and gone on with."""

    def test_resumed_equals_in_one_go(self, material, tmp_path):
        whole = extract(config(material, tmp_path / "whole"))
        assert (whole.images, whole.new, whole.too_long, whole.bad) == (7, 7, 1, 0)
        cut = tmp_path / "cut"
        extract(config(material, cut))
        for name in ("shard-00001.jsonl", "shard-00002.jsonl", "manifest.jsonl"):
            (cut / name).unlink()  # as if it had been killed before these were written
        again = extract(config(material, cut))
        assert (again.images, again.new) == (7, 4)
        one, other = (ShardedFeatures(folder) for folder in (tmp_path / "whole", cut))
        for index in range(7):
            a, b = one[index], other[index]
            assert one.name(index) == other.name(index)
            assert torch.equal(a.mean, b.mean)
            assert torch.equal(a.caption, b.caption)
            assert a.control is not None
            assert b.control is not None
            assert torch.equal(a.control, b.control)

    def test_buckets_and_conditions(self, material, tmp_path):
        extract(config(material, tmp_path, resolution=256, control="none", shard_size=8))
        found = ShardedFeatures(tmp_path)
        assert Counter(found.keys) == {"0.5": 4, "1.0": 3}
        wide = found[found.keys.index("0.5")]
        assert wide.mean.shape == (4, 44, 88)  # 176 x 352 at four pixels a latent pixel
        assert wide.size.tolist() == [48, 96]
        assert wide.ratio.tolist() == [0.5]
        assert wide.control is None
        assert found.empty() is not None

    def test_bad_pictures_are_named_and_limited(self, material, tmp_path, caplog):
        images = tmp_path / "images"
        images.mkdir()
        for index in range(3):
            (images / f"{index}.png").write_bytes(b"no picture")
        rows = [{"path": f"{index}.png", "prompt": "cat"} for index in range(3)]
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given = config(material, tmp_path / "out", data=tmp_path / "list.jsonl", images=images,
                       bad_limit=2)  # fmt: skip
        with (
            caplog.at_level(logging.WARNING, logger="polyzoo"),
            pytest.raises(DataError, match=r"3 images cannot be read, above bad_limit=2"),
        ):
            extract(given)
        assert "0.png" in caplog.text

    def test_lists(self, material, tmp_path):
        with pytest.raises(DataError, match=r"no such file"):
            extract(config(material, tmp_path, data=tmp_path / "none.json"))
        (tmp_path / "bad.json").write_text('[{"prompt": "cat"}]')
        with pytest.raises(DataError, match=r"entry 1: needs an object with a text 'path'"):
            extract(config(material, tmp_path, data=tmp_path / "bad.json"))
        with pytest.raises(ConfigError, match=r"control='hed' needs hed"):
            config(material, tmp_path, control="hed")

    def test_a_folder_with_one_prompt(self, material, tmp_path):
        images = material / "images"
        report = extract(config(material, tmp_path, data=images, prompt="red cat"))
        assert report.images == 7
        captions = {ShardedFeatures(tmp_path).rows[i]["prompt"] for i in range(7)}
        assert captions == {"red cat"}


class TestOfficialFiles:
    """What the official extraction scripts write."""

    def write(self, root: Path) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(0)
        rows = [
            {"path": f"a/{i}.png", "prompt": "x", "height": 1024, "width": 1024, "ratio": 1.0}
            for i in range(3)
        ]
        rows.append({"path": "a/9.png", "prompt": "x", "height": 1, "width": 9, "ratio": 9.0})
        (root / "partition").mkdir(parents=True)
        (root / "partition" / "data_info.json").write_text(json.dumps(rows))
        for name in ("caption_feature_wmask", "img_vae_fatures_1024_multiscale/ms",
                     "hed_feature_1024/a"):  # fmt: skip
            (root / name).mkdir(parents=True)
        made = {}
        for i in range(2):  # the third one's files are missing
            states = generator.normal(size=(1, 6, 5)).astype(np.float32)
            mask = np.array([[1] * (i + 2) + [0] * (4 - i)])
            np.savez(root / "caption_feature_wmask" / f"a_{i}.npz", caption_feature=states,
                     attention_mask=mask)  # fmt: skip
            latent = generator.normal(size=(8, 4, 6)).astype(np.float32)
            np.save(root / "img_vae_fatures_1024_multiscale/ms" / f"a_{i}.npy", latent)
            np.savez(root / "hed_feature_1024/a" / f"{i}.npz", latent[::-1])
            made[str(i)], made[f"c{i}"] = latent, states
        return made

    def test_values(self, tmp_path, caplog):
        made = self.write(tmp_path)
        files = OfficialFeatures(tmp_path, resolution=1024, multi_scale=True, control=True)
        assert len(files) == 3
        found = files[1]
        assert torch.equal(found.mean, torch.from_numpy(made["1"][:4]))
        assert torch.equal(found.std, torch.from_numpy(made["1"][4:]))
        assert torch.equal(found.caption, torch.from_numpy(made["c1"][0, :3]))
        assert found.control is not None
        assert found.control.shape == (2, 4, 4, 6)
        with caplog.at_level(logging.WARNING, logger="polyzoo"):
            replaced = files[2]
        assert torch.equal(replaced.mean, files[0].mean)
        assert "a/2.png cannot be read" in caplog.text
        batch = collate_features([files[0], files[1]])
        drawn = latent_batch(batch, torch.Generator().manual_seed(0), multi_scale=True)
        assert drawn.captions.lengths == (2, 3)
        assert drawn.size is not None
        assert drawn.size.tolist() == [[1024, 1024]] * 2
        strict = OfficialFeatures(tmp_path, resolution=1024, multi_scale=True, bad_limit=0)
        with pytest.raises(DataError, match=r"1 images cannot be read, above bad_limit=0"):
            strict[2]

    def test_missing_folders(self, tmp_path):
        with pytest.raises(DataError, match=r"holds no data_info.json"):
            OfficialFeatures(tmp_path / "none", resolution=512, multi_scale=False)
        self.write(tmp_path)
        with pytest.raises(
            DataError, match=r"no folder of image features: img_vae_features_512reso"
        ):
            OfficialFeatures(tmp_path, resolution=512, multi_scale=False)


class TestSampler:
    """One bucket a batch, each sample once, the same for the same seed."""

    KEYS = ("1.0",) * 11 + ("0.5",) * 6 + ("2.0",) * 1

    def test_rules(self):
        sampler = BucketSampler(self.KEYS, batch_size=2, seed=3)
        for epoch in range(3):
            batches = sampler.batches(epoch)
            assert len(batches) == sampler.per_rank == 8
            for batch in batches:
                assert len({self.KEYS[i] for i in batch}) == 1
            used = [i for batch in batches for i in batch]
            assert len(used) == len(set(used))
        assert sampler.batches(0) == BucketSampler(self.KEYS, batch_size=2, seed=3).batches(0)
        assert sampler.batches(0) != sampler.batches(1)
        assert sampler.batches(0) != BucketSampler(self.KEYS, batch_size=2, seed=4).batches(0)

    def test_ranks_share(self):
        parts = [
            BucketSampler(self.KEYS, batch_size=2, seed=0, rank=rank, world_size=3).batches(5)
            for rank in range(3)
        ]
        assert [len(part) for part in parts] == [2, 2, 2]
        used = [i for part in parts for batch in part for i in batch]
        assert len(used) == len(set(used)) == 12

    def test_options(self):
        balanced = BucketSampler(self.KEYS, batch_size=2, seed=0, balanced=True).batches(0)
        assert Counter(self.KEYS[b[0]] for b in balanced) == {"1.0": 3, "0.5": 3}
        large = BucketSampler(self.KEYS, batch_size=2, seed=0, min_per_bucket=7).batches(0)
        assert {self.KEYS[b[0]] for b in large} == {"1.0"}
        with pytest.raises(DataError, match=r"the largest of 3 buckets has 11 images; lower the"):
            BucketSampler(self.KEYS, batch_size=12, seed=0)

    def test_stream_goes_on(self):
        def stream() -> BucketStream:
            return BucketStream(
                list(range(len(self.KEYS))), BucketSampler(self.KEYS, batch_size=2, seed=0)
            )

        whole = list(stream())
        first = stream()
        reader = iter(first)
        head = [next(reader) for _ in range(5)]
        second = stream()
        second.load_state_dict(first.state_dict())
        assert head + list(second) == whole
        assert list(second) == whole
        second.set_epoch(1)
        assert list(second) != whole
