"""The version without torch: the same model, the same vectors, and nothing heavy imported."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyzoo.core.errors import ConfigError, DataError, WeightsError
from polyzoo.sea.encoding.numpy_encoder import gelu
from polyzoo.sea.folders import build_bare, save_folder
from polyzoo.sea.numpy_pipeline import NumpyPipeline
from polyzoo.sea.pipeline import SeaPipeline
from polyzoo.sea.search.embedder import load_embedder, load_light
from polyzoo.sea.search.embedding import PendingEmbedder
from polyzoo.sea.search.update import build_index
from support.indexed_repo import SHAPES, small_repo
from support.sea_models import encoder_folder, function, shape

CODES = [function("read", "file"), function("sort", "table", lines=40), "def f():\n    pass\n"]
QUERIES = ["how to read a file", "sort"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


def saved(folder: Path, encoder: Path, *, int8: bool = False, **changes: Any) -> Path:
    """A model's folder with an aggregation that is not uniform."""
    loaded = build_bare(shape(encoder, **changes))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in loaded.model.aggregation.parameters():
            parameter.normal_(std=2.0)
    return save_folder(folder, loaded.model, tokenizer_folder=encoder, int8=int8)


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregator": "attn1_mean", "raw": "whole", "int8": True},
        {"aggregator": "attn1_mean", "raw": "mean", "split_identifiers": True},
        {"aggregator": "attn1_mean", "raw": "max", "normalize": False},
        {"aggregator": "attn1", "include_whole": False},
        {"aggregator": "first"},
        {"aggregator": "mean"},
        {"aggregator": "max"},
        {"aggregator": "maxsim"},
    ],
)
def test_same_identity_and_vectors(tmp_path, encoder: Path, changes: dict[str, Any]):
    folder = saved(tmp_path / "model", encoder, **changes)
    light, full = NumpyPipeline.load(folder), SeaPipeline.from_pretrained(folder, device="cpu")
    assert light is not None
    assert (light.model_id, light.dim, light.config) == (full.model_id, full.dim, full.config)
    found, wanted = (one.embed_code(CODES, language="python") for one in (light, full))
    assert len(wanted.block_vectors[1]) > 1
    assert found.splits == wanted.splits
    np.testing.assert_allclose(found.vectors, wanted.vectors, atol=1e-5)
    for mine, theirs in zip(found.block_vectors, wanted.block_vectors, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    for mine, theirs in zip(found.weights, wanted.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    np.testing.assert_allclose(light.embed_queries(QUERIES), full.embed_queries(QUERIES), atol=1e-5)


@given(st.floats(-30, 30, width=32))
@settings(deadline=None, max_examples=300)
def test_gelu_is_the_exact_one(x: float):
    wanted = x * (1 + math.erf(x / math.sqrt(2))) / 2
    assert gelu(np.array([x], np.float32))[0] == pytest.approx(wanted, abs=2e-6)


def test_models_it_does_not_know_are_left_to_torch(tmp_path, encoder: Path):
    assert load_light(f"encoder:{encoder}") is None
    folder = saved(tmp_path / "two", encoder, aggregator="attn2")
    assert NumpyPipeline.load(folder) is None
    config = folder / "encoder" / "config.json"
    folder = saved(tmp_path / "one", encoder)
    config = folder / "encoder" / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    assert NumpyPipeline.load(folder) is None


def test_damage_is_named(tmp_path, encoder: Path):
    folder = saved(tmp_path / "model", encoder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        NumpyPipeline.load(folder)
    weights.unlink()
    with pytest.raises(WeightsError, match="no such file"):
        load_light(str(folder))
    weights.write_bytes(whole)
    config = folder / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "tokenizer_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match="tokenizer is not the one"):
        NumpyPipeline.load(folder)


def test_not_finite_is_refused(tmp_path, encoder: Path):
    light = NumpyPipeline.load(saved(tmp_path / "model", encoder))
    assert light is not None
    light._encoder._layers[0].up.bias[0] = np.nan
    with pytest.raises(DataError, match="NaN or inf"):
        light.embed_queries(QUERIES)


def test_half_precision_changes_no_ranking(tmp_path, encoder: Path):
    folder = saved(tmp_path / "model", encoder)
    exact, fast = load_embedder(str(folder)), load_embedder(str(folder), bulk=True)
    assert exact.model_id == fast.model_id
    a, b = (one.embed_code(CODES, language="python").vectors for one in (exact, fast))
    assert ((a * b).sum(1) > 0.999).all()


def test_a_few_units_never_load_the_full_model(tmp_path, encoder: Path):
    light = NumpyPipeline.load(saved(tmp_path / "model", encoder))
    calls: list[int] = []

    def load() -> SeaPipeline:
        calls.append(1)
        return SeaPipeline.from_pretrained(tmp_path / "model", device="cpu")

    pending = PendingEmbedder(load, light=light)
    assert pending.get() is light
    assert pending.get(5) is light
    assert not calls
    assert isinstance(pending.get(5000), SeaPipeline)
    assert pending.get(5) is light
    assert calls == [1]


def test_one_edited_file_and_one_question_need_no_torch(tmp_path, encoder: Path):
    repo = small_repo(tmp_path)
    model = str(saved(tmp_path / "model", encoder))
    assert build_index(repo.config(model=model)).encoded > 10
    repo.write("shapes.py", SHAPES.replace("/ 2", "* 0.5"))
    script = (
        "import sys; from pathlib import Path;"
        "from polyzoo.sea.search.update import build_index;"
        "from polyzoo.sea.search import searcher, config as c;"
        "repo, out = map(Path, sys.argv[1:]);"
        "report = build_index(c.IndexConfig(repo=repo, out=out));"
        "assert report.encoded == 1, report;"
        "found = searcher.main(c.SearchConfig(query='surface of a circle', index=out));"
        "assert found.hits[0].vector_rank, found;"
        "heavy = {'torch', 'transformers', 'scipy', 'sklearn'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(repo.root), str(repo.out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
