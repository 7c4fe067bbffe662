"""index, search and status as typed, with a real pipeline over a tiny random encoder."""

from __future__ import annotations

import json

import pytest

from polyzoo.core.errors import ConfigError
from polyzoo.sea.search.config import SearchRequest
from polyzoo.sea.search.searcher import Searcher
from polyzoo.sea.search.update import build_index
from support.cli import run_cli
from support.indexed_repo import SHAPES, IndexedRepo, small_repo
from support.sea_models import encoder_folder


def run(*arguments, status: int = 0, env=None) -> str:
    done = run_cli("sea", *arguments, env=env)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 or done.stdout else done.stderr


def test_index_and_search_as_typed(tmp_path):
    repo = small_repo(tmp_path)
    repo.write("long.py", "def long_one():\n" + "".join(f"    v{i} = {i}\n" for i in range(300)))
    model = f"encoder:{encoder_folder(tmp_path / 'encoder')}"
    home = {"POLYZOO_HOME": str(tmp_path / "home")}

    report = json.loads(run("index", repo.root, "--model", model, "--json", env=home))
    assert report["units"] == report["embedded"] > 10
    assert report["folder"].startswith(str(tmp_path / "home"))

    repo.write("shapes.py", SHAPES.replace("/ 2", "* 0.5"))
    arguments = ("search", "surface of a circle", "--repo", repo.root / "net", "--top-k", "99")
    found = json.loads(run(*arguments, "--json", env=home))
    assert found["coverage"] == 1.0
    assert found["stale_files"] == 1
    assert all(hit["vector_rank"] for hit in found["hits"])
    by_symbol = {hit["symbol"]: hit for hit in found["hits"]}
    assert by_symbol["long_one"]["block"]["score"] is not None  # it has several blocks
    assert by_symbol["triangle_area"]["drift"] == "changed"
    status = json.loads(run("status", repo.root, "--json", env=home))
    assert status["model_id"] == report["model_id"] == found["model_id"]


def test_a_real_pipeline_updates_and_is_told_apart(tmp_path):
    repo = small_repo(tmp_path)
    model = f"encoder:{encoder_folder(tmp_path / 'encoder')}"
    assert build_index(repo.config(model=model)).encoded > 10
    repo.write("shapes.py", SHAPES.replace("/ 2", "* 0.5"))
    report = build_index(repo.config(model=None))
    assert (report.changed, report.encoded, report.model) == (1, 1, model)
    other = f"encoder:{encoder_folder(tmp_path / 'other', hidden=32)}"
    with pytest.raises(ConfigError, match=r"their vectors cannot be compared.*--rebuild"):
        build_index(repo.config(model=other))
    with (
        Searcher(repo.out, model=other) as searcher,
        pytest.raises(ConfigError, match="--rebuild"),
    ):
        searcher.search(SearchRequest(query="area"))


def test_mistakes_are_one_line(tmp_path):
    empty = IndexedRepo(tmp_path)
    assert "holds no source file to index" in run("index", empty.root, status=1)
    assert "does not exist" in run("index", tmp_path / "missing", status=1)
    home = {"POLYZOO_HOME": str(tmp_path / "home")}
    assert "is not indexed" in run("search", "x", "--repo", empty.root, status=1, env=home)
    assert "--store" in run("index", empty.root, "--store", "redis", status=2)
    small = small_repo(tmp_path / "small")
    message = run("index", small.root, "--out", small.out, "--model", "./nowhere", status=1)
    assert "no such folder" in message
