"""Keeping an index true to its repository: edits, renames, interruptions, odd files."""

from __future__ import annotations

import dataclasses
import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polyzoo.core.errors import ConfigError, DataError, LockedError
from polyzoo.core.io import FolderLock
from polyzoo.sea.search.config import SearchRequest
from polyzoo.sea.search.index import CodeIndex
from polyzoo.sea.search.layout import default_folder, find_folder
from polyzoo.sea.search.searcher import Searcher
from support.cli import child_environment
from support.identifier_encoder import IdentifierEncoder
from support.indexed_repo import (
    NETWORK,
    SHAPES,
    IndexedRepo,
    assert_as_made_anew,
    contents,
    small_repo,
)

CHILD = Path(__file__).parents[1] / "support" / "index_child.py"


@pytest.fixture
def repo(tmp_path):
    return small_repo(tmp_path)


def test_first_index(repo):
    report = repo.index()
    assert (report.added, report.changed, report.unchanged) == (3, 0, 0)
    assert report.units == report.embedded == report.encoded + report.copied
    symbols = {row[1] for row in contents(repo)}
    assert {"Circle", "Circle.area", "triangle_area", "open_connection", "Queue.push"} <= symbols
    again = repo.index()
    assert (again.added, again.unchanged, again.encoded) == (0, 3, 0)


def test_only_changed_functions_are_encoded_again(repo, tmp_path):
    repo.index()
    before = repo.encoder.encoded
    repo.write("shapes.py", "# a comment above\n\n" + SHAPES.replace("/ 2", "* 0.5"))
    report = repo.index()
    assert (report.changed, report.unchanged) == (1, 2)
    assert repo.encoder.encoded - before == report.encoded
    # triangle_area, and the module whose comment is new.
    assert report.encoded <= 2
    assert repo.hit("half of base times height", "triangle_area").first_line == 19
    assert_as_made_anew(repo, tmp_path)


def test_editing_a_method_does_not_touch_its_class(repo, tmp_path):
    repo.index()
    longer = SHAPES.replace("        return math.pi", "        pi = math.pi\n        return pi")
    repo.write("shapes.py", longer)
    assert repo.index().encoded == 1
    assert_as_made_anew(repo, tmp_path)


def test_a_touched_file_is_not_read_into_units_again(repo):
    repo.index()
    repo.age("shapes.py")
    report = repo.index()
    assert (report.unchanged, report.changed, report.encoded) == (3, 0, 0)
    assert repo.ask("circle").stale_files == 0


def test_a_change_that_keeps_size_and_time_is_seen(repo, tmp_path):
    """A file written just before it was read may change again within one tick of the clock."""
    target = repo.root / "shapes.py"
    repo.age("shapes.py", seconds=0)
    status = target.stat()
    repo.index()
    target.write_text(SHAPES.replace("/ 2", "/ 3"))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert repo.ask("circle").stale_files == 1
    assert repo.index().changed == 1
    assert_as_made_anew(repo, tmp_path)


def test_deleted_files_and_functions_are_gone(repo, tmp_path):
    repo.index()
    assert repo.find("receive bytes until the peer closes")[0] == "read_all_bytes"
    (repo.root / "web" / "queue.js").unlink()
    repo.write("net/network.py", NETWORK[: NETWORK.index("def read_all")])
    report = repo.index()
    assert (report.removed, report.changed) == (1, 1)
    found = repo.find("receive bytes until the peer closes debounce callback", top_k=100)
    assert not {"read_all_bytes", "debounceCallback", "Queue.push"} & set(found)
    assert_as_made_anew(repo, tmp_path)


def test_renames_cost_no_encoding(repo, tmp_path):
    repo.index()
    (repo.root / "lib").mkdir()
    (repo.root / "net" / "network.py").rename(repo.root / "lib" / "tcp.py")
    report = repo.index()
    assert (report.renamed, report.added, report.removed, report.encoded) == (1, 0, 0, 0)
    assert repo.hit("connect to a server", "open_connection").path == "lib/tcp.py"
    assert repo.find("anything", paths=("net/",)) == []
    assert_as_made_anew(repo, tmp_path)


def test_a_function_moved_to_another_file_keeps_its_vector(repo, tmp_path):
    repo.index()
    start = NETWORK.index("def read_all")
    repo.write("net/network.py", NETWORK[:start])
    repo.write("net/reading.py", NETWORK[start:])
    report = repo.index()
    assert (report.encoded, report.copied) == (0, 1)
    assert_as_made_anew(repo, tmp_path)


def test_swapped_names_copies_and_empty_files(repo, tmp_path):
    repo.write("copy.py", SHAPES)
    repo.write("empty.py", "")
    repo.write("comment.py", "# nothing here\n")
    report = repo.index()
    assert report.copied > 0
    assert report.units == report.embedded
    a, b = repo.root / "shapes.py", repo.root / "net" / "network.py"
    a.rename(repo.root / "tmp")
    b.rename(a)
    (repo.root / "tmp").rename(b)
    repo.index()
    assert_as_made_anew(repo, tmp_path)
    repo.write("empty.py", "def no_longer():\n    return 'empty'\n")
    repo.index()
    assert_as_made_anew(repo, tmp_path)


def test_new_rules_remove_what_they_exclude_and_stay(repo, tmp_path):
    repo.index()
    assert repo.index(exclude=("web/",)).removed == 1
    assert repo.index().removed == 0
    assert repo.ask("queue").stale_files == 0
    assert "Queue.push" not in repo.find("add an item at the end", top_k=100)
    assert repo.index(include=("*",)).added == 1
    assert_as_made_anew(repo, tmp_path)


def test_line_numbers_are_right_at_once_after_an_edit(repo):
    """A hit's file is looked at; nobody is sent to the wrong line between edit and index."""
    repo.index()
    assert repo.hit("half of base times height", "triangle_area").first_line == 17
    repo.write("shapes.py", "\n" * 7 + SHAPES)
    hit = repo.hit("half of base times height", "triangle_area")
    assert (hit.first_line, hit.drift) == (24, "moved")
    assert hit.block.lines[0].number == 24
    repo.write("shapes.py", "\n" * 3 + SHAPES.replace("/ 2", "/ 3"))
    hit = repo.hit("half of base times height", "triangle_area")
    assert (hit.first_line, hit.drift) == (20, "changed")
    assert "/ 3" in hit.block.lines[-1].text
    repo.write("shapes.py", SHAPES[: SHAPES.index("def triangle")])
    assert repo.hit("half of base times height", "triangle_area").drift == "gone"
    result = repo.ask("circle")
    assert result.stale_files == 1
    assert any("files have changed since indexing (1 changed)" in note for note in result.notices)
    repo.index()
    assert repo.ask("circle").notices == ()


LINES = ["def first_one():", "    return 1", "", "", "def second_one():", "    return 'é'", ""]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("crlf", "\r\n".join(LINES).encode()),
        ("bom", b"\xef\xbb\xbf" + "\n".join(LINES).encode()),
        ("tabs", "\n".join(LINES).replace("    ", "\t").encode()),
        ("no newline at end", "\n".join(LINES).rstrip().encode()),
        ("latin-1, declared", ("# coding: latin-1\n" + "\n".join(LINES[1:])).encode("latin-1")),
        ("form feed", "\n".join(LINES).replace("\n\n\n", "\n\x0c\n\n").encode()),
    ],
)
def test_lines_are_counted_as_editors_count_them(tmp_path, name, data):
    repo = IndexedRepo(tmp_path)
    repo.write("odd.py", data)
    report = repo.index()
    assert report.problems == ()
    hit = repo.hit("second one", "second_one")
    assert (hit.first_line, hit.last_line) == (5, 6)
    assert hit.block.lines[0].text == "def second_one():"
    assert hit.block.lines[1].number == 6
    assert "é" in hit.block.lines[1].text


def test_bytes_that_are_no_utf8_are_reported_and_the_file_still_found(tmp_path):
    repo = IndexedRepo(tmp_path)
    repo.write("latin.py", "def greet():\n    return 'Gr\xfc\xdfe'\n".encode("latin-1"))
    repo.write("nul.py", b"x = 1\n\0\n")
    repo.write("fine.py", "def fine(): pass\n")
    report = repo.index()
    assert len(report.problems) == 1
    assert "latin.py: byte 27 is not utf-8" in report.problems[0]
    assert report.skipped == {"binary (NUL bytes)": 1}
    assert "greet" in repo.find("greet")
    again = repo.index()
    assert (again.skipped, again.problems) == (report.skipped, report.problems)


def test_files_nobody_wrote(tmp_path):
    repo = IndexedRepo(tmp_path)
    repo.write("one_line.js", b"var a=1;" * 100_000)
    repo.write("huge_line.py", b"x = 1;" * 9_000_000)  # 54 MB
    repo.write("deep.py", "x = " + "(" * 3000 + "1" + ")" * 3000 + "\n")
    repo.write("python2.py", "def old():\n    print 'hello'\n    exec code in d\n")
    repo.write("broken.go", "package a\nfunc Half( {\n")
    repo.write("loose.php", "function loose() { return 1; }")
    report = repo.index()
    assert report.skipped["above 1,000,000 bytes"] == 1
    assert sum(count for reason, count in report.skipped.items() if "minified" in reason) >= 1
    assert "old" in repo.find("old print hello")
    assert report.units == report.embedded


def test_a_unit_without_vector_does_not_stop_the_others(tmp_path, caplog):
    class Picky(IdentifierEncoder):
        def embed_code(self, codes, *, language):
            result = super().embed_code(codes, language=language)
            for row, code in enumerate(codes):
                if "poison" in code:
                    result.vectors[row] = np.nan
            return result

    repo = small_repo(tmp_path, encoder=Picky())
    repo.write("bad.py", "def poison():\n    return 0\n")
    report = repo.index()
    assert report.units == report.embedded
    assert "python function 'poison' has no vector: the model's vector holds NaN" in caplog.text
    assert repo.find("poison")[0] == "poison"
    assert repo.index().encoded == 0

    only = IndexedRepo(tmp_path / "only", encoder=Picky())
    only.write("bad.py", "def poison():\n    return 0\n")
    with pytest.raises(DataError, match="'poison' has no vector"):
        only.index()


def test_another_model_is_refused_with_the_way_out(repo, tmp_path):
    repo.index()
    before = contents(repo)
    other = IdentifierEncoder(seed=1)
    right, repo.encoder = repo.encoder, other
    repo.write("shapes.py", SHAPES + "\n\ndef added():\n    return 1\n")
    with pytest.raises(ConfigError, match=r"identifiers-64-1.*polyzoo sea index .* --rebuild"):
        repo.index()
    assert contents(repo) == before
    with pytest.raises(ConfigError, match="their vectors cannot be compared"):
        repo.ask("circle")
    assert repo.ask("circle", mode="lexical").hits  # words need no model
    other_dim = IdentifierEncoder(dim=32)
    repo.encoder = other_dim
    with pytest.raises(ConfigError, match="dim 32 instead of 64"):
        repo.index()
    pooled = IdentifierEncoder()
    pooled.config = dataclasses.replace(pooled.config, pooling="cls")
    repo.encoder = pooled
    with pytest.raises(ConfigError, match="pooling 'cls' instead of 'mean'"):
        repo.index()

    repo.encoder = other
    assert repo.index(rebuild=True).model_id == "identifiers-64-1"
    assert repo.ask("circle").hits
    assert_as_made_anew(repo, tmp_path)
    repo.encoder = right
    with pytest.raises(ConfigError, match="identifiers-64-0"):
        repo.index()


def test_settings_of_the_index_cannot_change_by_the_way(repo):
    repo.index()
    with pytest.raises(ConfigError, match="keep_blocks=False, not True; build it again with"):
        repo.index(keep_blocks=True)
    with pytest.raises(ConfigError, match="store='local', not 'lancedb'"):
        repo.index(store="lancedb")
    repo.index(keep_blocks=True, rebuild=True)
    repo.index()
    index = CodeIndex.open(repo.out)
    assert index.settings.keep_blocks
    assert index.generation == 2
    index.close()
    assert sorted(path.name for path in repo.out.iterdir() if "-1" in path.name) == []


def test_a_reader_sees_a_rebuild_when_it_is_done(repo):
    repo.index()
    with Searcher(repo.out, embedder=repo.encoder) as searcher:
        assert searcher.search(SearchRequest(query="circle area")).hits
        repo.write("shapes.py", SHAPES.replace("Circle", "Disc"))
        repo.index(rebuild=True)
        found = [hit.symbol for hit in searcher.search(SearchRequest(query="disc area")).hits]
    assert "Disc.area" in found


@pytest.mark.parametrize("store", ["qdrant", "lancedb"])
def test_other_engines_behind_the_same_index(tmp_path, store):
    pytest.importorskip("qdrant_client" if store == "qdrant" else store, reason="needs its extra")
    repo = small_repo(tmp_path)
    repo.index(store=store, keep_blocks=True)
    local = small_repo(tmp_path / "local")
    local.index()
    repo.write("shapes.py", SHAPES.replace("/ 2", "* 0.5"))
    local.write("shapes.py", SHAPES.replace("/ 2", "* 0.5"))
    (repo.root / "web" / "queue.js").unlink()
    (local.root / "web" / "queue.js").unlink()
    assert repo.index().encoded == local.index().encoded
    for query in ("area of a circle", "open a socket to a server", "base times height"):
        ours, theirs = repo.ask(query, mode="vector"), local.ask(query, mode="vector")
        assert [hit.symbol for hit in ours.hits] == [hit.symbol for hit in theirs.hits]
        np.testing.assert_allclose(
            [hit.score for hit in ours.hits], [hit.score for hit in theirs.hits], atol=1e-5
        )
    assert repo.ask("area", languages=("javascript",)).hits == ()
    assert repo.ask("area", maxsim=True).hits


def test_half_precision_ranks_the_same(tmp_path):
    repo, half = small_repo(tmp_path / "a"), small_repo(tmp_path / "b")
    repo.index()
    half.index(dtype="float16")
    ours, theirs = (
        half.ask("area of a circle", mode="vector"),
        repo.ask("area of a circle", mode="vector"),
    )
    assert [hit.symbol for hit in ours.hits] == [hit.symbol for hit in theirs.hits]
    for our, their in zip(ours.hits, theirs.hits, strict=True):
        assert our.score == pytest.approx(their.score, abs=2e-3)


def test_where_an_index_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYZOO_HOME", str(tmp_path / "home"))
    repo = small_repo(tmp_path)
    with pytest.raises(DataError, match=r"is not indexed; make an index with: polyzoo sea index"):
        find_folder(repo.root)
    repo.index(out=None)
    assert find_folder(repo.root / "net") == default_folder(repo.root)
    assert default_folder(repo.root).parent == tmp_path / "home" / "sea" / "index"
    assert default_folder(tmp_path / "other" / "repo") != default_folder(repo.root)
    assert sorted(path.name for path in repo.root.iterdir()) == ["net", "shapes.py", "web"]


def test_an_index_can_be_moved_and_searching_changes_nothing(repo, tmp_path):
    repo.index()
    moved = repo.out.rename(tmp_path / "elsewhere")
    repo.out = moved
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    assert repo.find("area of a circle")
    assert {path: path.read_bytes() for path in before} == before


def test_wrong_places_say_what_to_do(tmp_path):
    repo = IndexedRepo(tmp_path)
    with pytest.raises(DataError, match=r"holds no source file to index .*it is empty.*python"):
        repo.index()
    repo.write("notes.txt", "hello")
    with pytest.raises(DataError, match=r"left out: 1 not a known language"):
        repo.index()
    assert not repo.out.exists()
    with pytest.raises(DataError, match=r"missing does not exist; give the folder of a repository"):
        repo.index(repo=tmp_path / "missing")
    with pytest.raises(DataError, match=r"holds no index; make one with: polyzoo sea index"):
        Searcher(tmp_path / "nothing")
    repo.write("a.py", "x = 1\n")
    repo.index()
    other = small_repo(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"is the index of .*/repo, not of .*/other/repo"):
        repo.index(repo=other.root)


def test_everything_may_go(repo):
    repo.index()
    for path in list(repo.root.rglob("*.*")):
        path.unlink()
    report = repo.index()
    assert (report.removed, report.units) == (3, 0)
    assert repo.ask("circle").hits == ()


def test_a_second_writer_is_turned_away(repo):
    repo.index()
    with (
        FolderLock(repo.out, purpose="indexing"),
        pytest.raises(LockedError, match=rf"in use by process {os.getpid()} \(indexing\)"),
    ):
        repo.index()
    with FolderLock(repo.out, purpose="indexing"):
        notices = repo.ask("circle").notices
    assert f"the index is being written by process {os.getpid()}" in notices


def test_damage_is_named(repo):
    repo.index()
    catalog = repo.out / "catalog-1.sqlite"
    data = bytearray(catalog.read_bytes())
    data[:100] = b"x" * 100
    catalog.write_bytes(data)
    with pytest.raises(DataError, match=r"catalog-1\.sqlite is damaged .*--rebuild"):
        repo.ask("circle")
    with pytest.raises(DataError, match=r"catalog-1\.sqlite is damaged .*--rebuild"):
        repo.index()
    assert repo.index(rebuild=True).embedded
    assert repo.find("area of a circle")
    (repo.out / "catalog-2.sqlite").unlink()
    with pytest.raises(DataError, match=r"catalog-2\.sqlite is missing.*--rebuild"):
        repo.ask("circle")
    with pytest.raises(DataError, match=r"catalog-2\.sqlite is missing.*--rebuild"):
        repo.index()
    assert repo.index(rebuild=True).embedded
    assert repo.find("area of a circle")
    (repo.out / "index.json").write_text('{"format": 99, "generation": 1}')
    with pytest.raises(DataError, match="format 99, this version reads 1"):
        repo.ask("circle")


def test_lost_vectors_are_not_passed_over_in_silence(repo):
    repo.index()
    import shutil

    shutil.rmtree(repo.out / "vectors-1")
    with pytest.raises(DataError, match="no vectors here; build the index again"):
        repo.ask("circle")
    with pytest.raises(DataError, match="no vectors here; build the index again"):
        repo.index()
    repo.index(rebuild=True)
    assert repo.find("area of a circle")


def _limit_file_size(limit: int):
    def apply() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return apply


@pytest.mark.parametrize("kilobytes", [40, 100, 160])
def test_a_full_disk_is_one_clear_line_and_costs_nothing(tmp_path, kilobytes):
    repo = small_repo(tmp_path)
    repo.index()
    before = contents(repo)
    for number in range(60):
        repo.write(f"more/m{number}.py", SHAPES.replace("Circle", f"Circle{number}") * 3)
    done = subprocess.run(
        [sys.executable, str(CHILD), str(repo.root), str(repo.out), "0"],
        env=child_environment(),
        capture_output=True,
        text=True,
        preexec_fn=_limit_file_size(kilobytes * 1024),
        check=False,
    )
    assert done.returncode == 1, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("PolyzooError")]
    assert len(message) == 1
    assert "run the same command again" in message[0]
    assert str(repo.out) in message[0]
    assert "Traceback" not in done.stderr
    assert contents(repo) == before
    result = repo.ask("circle")
    assert any("interrupted" in notice for notice in result.notices)
    repo.index()
    assert_as_made_anew(repo, tmp_path)


def test_writes_are_one_transaction_readers_never_see_half_an_update(repo):
    """A reader that began before the switch goes on seeing the old state."""
    repo.index()
    reader = sqlite3.connect(f"file:{repo.out}/catalog-1.sqlite?mode=ro", uri=True)
    reader.execute("BEGIN")
    count = reader.execute("SELECT count(*) FROM units WHERE live = 1").fetchone()
    repo.write("new.py", "def brand_new():\n    return 1\n")
    (repo.root / "shapes.py").unlink()
    repo.index()
    assert reader.execute("SELECT count(*) FROM units WHERE live = 1").fetchone() == count
    reader.close()
    assert "brand_new" in repo.find("brand new")


def test_several_processes_read_the_same(tmp_path):
    repo = IndexedRepo(tmp_path)
    for number in range(230):
        repo.write(f"p{number % 7}/m{number}.py", SHAPES.replace("Circle", f"Circle{number}"))
    repo.write("bad.py", b"x = '\xff'\n")
    report = repo.index(jobs=2)
    assert report.added == 231
    assert len(report.problems) == 1
    assert_as_made_anew(repo, tmp_path)
