"""SIGKILL at any instant, readers at work meanwhile: never broken, never stale in silence."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from polyzoo.core.errors import DataError, PolyzooError
from polyzoo.sea.search.config import SearchRequest
from polyzoo.sea.search.index import CodeIndex
from polyzoo.sea.search.layout import current_generation
from polyzoo.sea.search.searcher import Searcher
from support.cli import child_environment
from support.indexed_repo import SHAPES, IndexedRepo, assert_as_made_anew

CHILD = Path(__file__).parents[1] / "support" / "index_child.py"


def start(repo: IndexedRepo, seconds: float, *flags: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, str(CHILD), str(repo.root), str(repo.out), str(seconds), *flags],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    return child


def kill_after(child: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the child was still at work when it was killed."""
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL


def fill(repo: IndexedRepo, generator: random.Random, files: int) -> None:
    """Write, rewrite or delete some files, each with its number of this moment in its text."""
    for _ in range(files):
        path = f"pkg{generator.randrange(5)}/module{generator.randrange(12)}.py"
        if generator.random() < 0.15 and (repo.root / path).exists():
            (repo.root / path).unlink()
            continue
        number = generator.randrange(10**6)
        text = SHAPES.replace("Circle", f"Circle{number}").replace("2\n", f"2 + {number % 7}\n")
        repo.write(path, text)


def symbols_on_disk(repo: IndexedRepo) -> set[str]:
    found = set()
    for path in repo.root.rglob("*.py"):
        text = path.read_text()
        found |= {line.split()[1].rstrip(":") for line in text.split("\n") if line[:5] == "class"}
    return found


def symbols_in_index(repo: IndexedRepo) -> set[str]:
    index = CodeIndex.open(repo.out)
    rows = index.catalog.rows("SELECT symbol FROM units WHERE live = 1 AND kind = 'class'")
    index.close()
    return {row[0] for row in rows}


def check_reader(repo: IndexedRepo, complete_before: set[str] | None) -> None:
    """What must hold at any instant.

    Args:
        repo: The repository and its index.
        complete_before: The state a reader must still see whole, if there was a complete one.
    """
    try:
        result = repo.ask("area of a circle", top_k=50)
    except DataError as error:
        # Only before the first catalog was begun: there is nothing to be stale or broken.
        assert "holds no index" in str(error)
        assert complete_before is None
        assert current_generation(repo.out) is None
        return
    seen, wanted = symbols_in_index(repo), symbols_on_disk(repo)
    if complete_before is not None:
        assert seen in (complete_before, wanted)
    if seen != wanted or result.coverage < 1:
        assert result.notices, "stale or partial without saying so"
        assert any(
            word in " ".join(result.notices)
            for word in ("interrupted", "have changed since", "no vector yet", "not all files")
        )
    assert all(hit.vector_score is None or -1.001 < hit.vector_score < 1.001 for hit in result.hits)


@pytest.fixture
def kills(request) -> int:
    """Half of --kills: 10 by default, 50 with --kills 100."""
    return max(1, request.config.getoption("--kills") // 2)


def test_killed_while_updating(tmp_path, kills):
    generator = random.Random(20)
    repo = IndexedRepo(tmp_path)
    fill(repo, generator, 40)
    hits = 0
    complete: set[str] | None = None
    for attempt in range(kills):
        child = start(repo, 0.01)
        hits += kill_after(child, generator.uniform(0.0, 0.35))
        check_reader(repo, complete)
        index_complete = False
        if current_generation(repo.out) is not None:
            index = CodeIndex.open(repo.out)
            state = index.state()
            index_complete = state.complete and state.coverage == 1
            index.close()
        if index_complete:
            complete = symbols_in_index(repo)
        if attempt % 3 == 2:  # sometimes the next run finds other files than the killed one
            fill(repo, generator, 6)
    assert hits >= kills // 4, "the children ended before they could be killed"
    child = start(repo, 0.0)
    _, errors = child.communicate()
    assert child.returncode == 0, errors
    assert symbols_in_index(repo) == symbols_on_disk(repo)
    result = repo.ask("area of a circle")
    assert result.notices == ()
    assert result.coverage == 1
    assert_as_made_anew(repo, tmp_path)


def test_a_killed_first_index_goes_on_where_it_was(tmp_path):
    repo = IndexedRepo(tmp_path)
    for number in range(60):
        repo.write(
            f"m{number}.py", SHAPES.replace("Circle", f"Circle{number}").replace("2", str(number))
        )
    child = start(repo, 0.3)
    deadline = time.monotonic() + 60
    embedded = 0
    while not embedded and time.monotonic() < deadline:
        time.sleep(0.02)
        try:
            index = CodeIndex.open(repo.out)
        except PolyzooError:  # not begun yet
            continue
        embedded = index.state().embedded
        index.close()
    result = repo.ask("area of circle 7")
    assert result.hits, "words can be searched while vectors are missing"
    assert any("no vector yet" in notice for notice in result.notices)
    assert any("is being written by process" in notice for notice in result.notices)
    child.kill()
    child.communicate()
    index = CodeIndex.open(repo.out)
    state = index.state()
    index.close()
    assert 0 < state.embedded < state.units
    assert state.interrupted
    report = repo.index()
    assert report.encoded + report.copied <= state.units - state.embedded
    assert report.added == 0
    assert report.embedded == report.units


def test_killed_while_rebuilding(tmp_path, kills):
    generator = random.Random(30)
    repo = IndexedRepo(tmp_path)
    fill(repo, generator, 30)
    repo.index()
    complete = symbols_in_index(repo)
    for _ in range(max(2, kills // 4)):
        child = start(repo, 0.01, "--rebuild")
        kill_after(child, generator.uniform(0.0, 0.6))
        assert symbols_in_index(repo) == complete
        result = repo.ask("area of a circle")
        assert result.hits
        assert result.coverage == 1
    repo.index(rebuild=True)
    assert symbols_in_index(repo) == complete
    assert len(list(repo.out.glob("catalog-*.sqlite"))) == 1


def test_searching_while_indexing(tmp_path):
    """Readers in threads, a writer process, several updates; every answer is of one state."""
    repo = IndexedRepo(tmp_path)
    for number in range(20):
        repo.write(f"m{number}.py", f"def marker_{number}_0():\n    return {number}\n")
    repo.index()
    stop = threading.Event()
    problems: list[str] = []
    asked = [0]

    def read() -> None:
        with Searcher(repo.out, embedder=repo.encoder.__class__()) as searcher:
            while not stop.is_set():
                try:
                    result = searcher.search(SearchRequest(query="marker", top_k=100, blocks=False))
                except Exception as error:  # any at all is a failure of the test
                    problems.append(repr(error))
                    return
                versions = {
                    hit.symbol.rsplit("_", 1)[1] for hit in result.hits if hit.kind != "module"
                }
                count = sum(hit.kind == "function" for hit in result.hits)
                if len(versions) != 1 or count != 20:
                    problems.append(f"{count} functions of versions {versions}")
                asked[0] += 1

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for version in range(1, 4):
        for number in range(20):
            repo.write(f"m{number}.py", f"def marker_{number}_{version}():\n    return {number}\n")
        child = start(repo, 0.0)
        _, errors = child.communicate()
        assert child.returncode == 0, errors
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert asked[0] >= 10
