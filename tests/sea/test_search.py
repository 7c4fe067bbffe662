"""Ranking, filters, explanations, the command line."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.sea.search import results
from polyzoo.sea.search.config import SearchConfig, SearchRequest
from polyzoo.sea.search.fusion import FUSION_OFFSET
from polyzoo.sea.search.index import CodeIndex
from polyzoo.sea.search.searcher import Searcher
from polyzoo.sea.search.stores import Filter
from polyzoo.sea.search.vector_ranking import rank_vectors
from support.cli import run_cli, run_python
from support.identifier_encoder import IdentifierEncoder
from support.indexed_repo import IndexedRepo, small_repo

LONG = "def long_function(a):\n" + "".join(
    f"    value_{number} = a + {number}\n" for number in range(25)
)
LONG = LONG.replace("value_17", "zebra_crossing") + "    return a\n"


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    repo = small_repo(tmp_path_factory.mktemp("search"))
    repo.write("lib/long.py", LONG)
    repo.index()
    return repo


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A few hundred functions of random words."""
    generator = random.Random(3)
    vocabulary = [
        f"{a}{b}" for a in ("read", "write", "open", "parse") for b in ("er", "ing", "s", "x", "y")
    ]
    repo = IndexedRepo(tmp_path_factory.mktemp("many"))
    for number in range(30):
        lines = []
        for function in range(10):
            words = generator.choices(vocabulary, k=6)
            lines.append(
                f"def {words[0]}_{words[1]}_{function}():\n    return {', '.join(words[2:])}\n"
            )
        repo.write(f"d{number % 4}/m{number}.py", "\n".join(lines))
    repo.index(keep_blocks=True)
    return repo


def test_vector_ranks_are_exact(many):
    """Oracle: all vectors, multiplied and sorted here."""
    index = CodeIndex.open(many.out)
    ids = index.store().ids()
    _, vectors = index.store().get(ids)
    units = index.catalog.units(ids.tolist())
    index.close()
    for query in ("reader opens", "parsing y", "writes"):
        scores = vectors @ many.encoder.embed_queries([query])[0]
        order = np.lexsort((ids, -scores))[:50]
        hits = many.ask(query, mode="vector", top_k=50).hits
        assert [hit.symbol for hit in hits] == [units[ids[place]].symbol for place in order]
        np.testing.assert_allclose([hit.vector_score for hit in hits], scores[order], atol=1e-6)


def test_fusion_is_reciprocal_rank(many):
    query = "reader opening parse"
    vector = many.ask(query, mode="vector", top_k=200).hits
    words = many.ask(query, mode="lexical", top_k=200).hits
    for weights in ((1.0, 1.0), (2.5, 0.5), (1.0, 0.0), (0.0, 3.0)):
        scores: dict[tuple[str, int], float] = {}
        for ranking, weight in zip((vector, words), weights, strict=True):
            for rank, hit in enumerate(ranking, start=1):
                key = (hit.path, hit.first_line)
                if weight:
                    scores[key] = scores.get(key, 0) + weight / (FUSION_OFFSET + rank)
        found = many.ask(query, vector_weight=weights[0], lexical_weight=weights[1]).hits
        np.testing.assert_allclose(
            [hit.score for hit in found], sorted(scores.values(), reverse=True)[:10]
        )
        for hit in found:
            assert hit.score == pytest.approx(scores[hit.path, hit.first_line])
            expected = sum(
                weight / (FUSION_OFFSET + rank)
                for weight, rank in zip(weights, (hit.vector_rank, hit.lexical_rank), strict=True)
                if rank
            )
            assert hit.score == pytest.approx(expected)


def test_maxsim_is_the_best_block(many):
    index = CodeIndex.open(many.out)
    blocks = index.store(blocks=True)
    numbers = blocks.ids()
    _, vectors = blocks.get(numbers)
    units = index.catalog.units(sorted({int(number) >> 12 for number in numbers}))
    index.close()
    query = "writer parses"
    best: dict[int, float] = {}
    for number, score in zip(
        numbers, vectors @ many.encoder.embed_queries([query])[0], strict=True
    ):
        unit = int(number) >> 12
        best[unit] = max(best.get(unit, -2.0), float(score))
    order = sorted(best, key=lambda unit: (-best[unit], unit))[:20]
    hits = many.ask(query, mode="vector", maxsim=True, top_k=20).hits
    np.testing.assert_allclose(
        [hit.score for hit in hits], [best[unit] for unit in order], atol=1e-6
    )
    assert {hit.symbol for hit in hits[:5]} <= {units[unit].symbol for unit in order[:8]}


@pytest.fixture(scope="module", params=["local", "qdrant"])
def soft(tmp_path_factory, request):
    """Functions of one to five blocks, some of them copies, under a model that keeps entries."""
    if request.param == "qdrant":
        pytest.importorskip("qdrant_client", reason="needs its extra")
    generator = random.Random(4)
    vocabulary = [f"{a}{b}" for a in ("read", "write", "open", "sort") for b in ("er", "s", "x")]
    encoder = IdentifierEncoder(aggregator="soft_maxsim")
    repo = IndexedRepo(tmp_path_factory.mktemp("soft"), encoder=encoder)
    for number in range(40):
        lines = generator.choice((3, 12, 25, 45))
        body = "".join(
            f"    {' + '.join(generator.choices(vocabulary, k=3))}\n" for _ in range(lines)
        )
        repo.write(f"m{number}.py", f"def {generator.choice(vocabulary)}_{number}():\n{body}")
    repo.index(store=request.param)
    for number in range(0, 40, 5):  # copied from what is there, not encoded
        repo.write(f"copy{number}.py", (repo.root / f"m{number}.py").read_text())
    assert repo.index().copied == 8
    return repo


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_soft_scores_use_all_entries(soft, discount):
    """Oracle: every entry of every unit, multiplied and summed here."""
    index = CodeIndex.open(soft.out)
    index.settings = replace(
        index.settings, sea=replace(index.settings.sea, count_discount=discount)
    )
    numbers = index.store(blocks=True).ids()
    _, vectors = index.store(blocks=True).get(numbers)
    query = soft.encoder.embed_queries(["reader sorts"])[0]
    entries: dict[int, list[float]] = {}
    for number, score in zip(numbers.tolist(), (vectors @ query).tolist(), strict=True):
        entries.setdefault(number >> 12, []).append(score)
    assert {len(found) for found in entries.values()} >= {1, 3, 4, 6}
    t = index.settings.sea.soft_temperature
    scores = {
        unit: t * (math.log(sum(math.exp(s / t) for s in found)) - discount * math.log(len(found)))
        for unit, found in entries.items()
    }
    order = sorted(scores, key=lambda unit: -scores[unit])
    request = SearchRequest(query="reader sorts", mode="vector", top_k=1)
    ranking = rank_vectors(index, query, request, Filter())
    index.close()
    np.testing.assert_allclose(
        [score for _, score in ranking], [scores[unit] for unit in order], atol=1e-5
    )
    assert [unit for unit, _ in ranking[:5]] == order[:5]


def test_maxsim_needs_blocks(repo):
    with pytest.raises(ConfigError, match=r"holds no block vectors.*--rebuild --keep-blocks"):
        repo.ask("area", maxsim=True)


def test_filters(repo):
    assert "Queue.push" in repo.find("push an item", languages=("javascript",))[:2]
    for hit in repo.ask("area", languages=("python",), top_k=50).hits:
        assert hit.language == "python"
    for hit in repo.ask("area", kinds=("class", "module"), top_k=50).hits:
        assert hit.kind in ("class", "module")
    assert {hit.path for hit in repo.ask("area", paths=("net/",), top_k=50).hits} == {
        "net/network.py"
    }
    both = repo.ask("area", paths=("*.py", "!lib/**"), kinds=("function",), top_k=50).hits
    assert {hit.path for hit in both} == {"shapes.py", "net/network.py"}
    for mode in ("vector", "lexical", "hybrid"):
        assert repo.ask("area", mode=mode, paths=("nowhere/",)).hits == ()
    with pytest.raises(ConfigError, match="path='!' is not a pattern"):
        repo.ask("area", paths=("!",))


def test_a_symbol_typed_as_it_is_comes_first(repo):
    for query in ("triangle_area", "debounceCallback", "Circle.area"):
        assert repo.find(query, mode="lexical")[0] == query
    assert repo.find("debounce callback", mode="lexical")[0] == "debounceCallback"


@pytest.mark.parametrize("keep", [False, True])
def test_the_best_block_is_the_one_that_answers(tmp_path, keep):
    repo = IndexedRepo(tmp_path)
    repo.write("long.py", "x = 1\n\n\n" + LONG)
    repo.index(keep_blocks=keep)
    block = repo.hit("zebra crossing", "long_function").block
    assert (block.first_line, block.last_line) == (14, 23)  # the second ten of its lines
    shown = {line.number: line.text for line in block.lines}
    assert shown[4] == "def long_function(a):"
    assert block.score > 0
    words = repo.hit("zebra crossing", "long_function", mode="lexical").block
    assert (words.first_line, words.score) == (14, None)
    assert repo.hit("zebra crossing", "long_function", blocks=False).block is None
    assert len(repo.hit("zebra crossing", "long_function", context=3).block.lines) == 3


def test_words_are_searched_without_a_model(repo):
    with Searcher(repo.out) as searcher:
        found = searcher.search(SearchRequest(query="area of circle", mode="lexical"))
    assert found.hits[0].symbol == "Circle.area"
    code = (
        "import sys; from pathlib import Path; from polyzoo.sea.search.searcher import Searcher;"
        "from polyzoo.sea.search.config import SearchRequest;"
        "s = Searcher(Path(sys.argv[1]));"
        "r = s.search(SearchRequest(query='area of circle', mode='lexical'));"
        "assert r.hits and 'torch' not in sys.modules"
    )
    done = run_python(code, str(repo.out))
    assert done.returncode == 0, done.stderr


def test_rare_words_decide_what_is_scored(tmp_path, monkeypatch):
    """With more matches than the limit, the rarest words still find their units."""
    repo = IndexedRepo(tmp_path)
    for number in range(40):
        lines = [f"def common_word_{number}_{i}():\n    return {i}\n" for i in range(250)]
        repo.write(f"m{number}.py", "\n".join(lines))
    repo.write("rare.py", "def common_word_zebra():\n    return 0\n")
    repo.index()
    found = repo.find("common word zebra", mode="lexical", kinds=("function",))
    assert found[0] == "common_word_zebra"
    assert repo.find("common word", mode="lexical"), "words that occur everywhere still match"


def test_odd_queries(repo):
    for query in ("", "  \n"):
        with pytest.raises(DataError, match="the query is empty"):
            repo.ask(query)
    assert repo.ask("?!").hits, "no word to look for, but a vector"
    assert repo.ask("?!", mode="lexical").hits == ()
    assert repo.ask('"quoted" AND (area OR NOT) * ^ :', mode="lexical").hits
    assert repo.ask("x" * 5000).exit_code == 0
    assert repo.ask("Fläche des Kreises 面積 \x00 \ud800").hits is not None


def test_nothing_found_is_status_1(repo):
    result = repo.ask("zzzunknownword", mode="lexical")
    assert (result.hits, result.exit_code) == ((), 1)
    assert "no hit for 'zzzunknownword' among" in results.render(result)
    assert repo.ask("area").exit_code == 0


def test_rendering_names_place_symbol_and_reasons(repo):
    text = results.render(repo.ask("area of a circle", top_k=3))
    assert "shapes.py:12" in text
    assert "Circle.area" in text
    assert "meaning #" in text
    assert "words #" in text
    assert "\x1b[" not in text  # not a terminal


def test_terminals_get_colour_unless_told(repo, capsys, monkeypatch):
    import sys

    result = repo.ask("area of a circle", top_k=1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in results.render(result)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in results.render(result)


SCHEMA = {
    "query": str, "mode": str, "index": str, "repo": str, "model_id": str, "units": int,
    "coverage": float, "stale_files": int, "notices": list, "took_ms": dict, "hits": list,
}  # fmt: skip
HIT = {
    "rank": int, "path": str, "first_line": int, "last_line": int, "symbol": str, "kind": str,
    "language": str, "signature": str, "summary": str, "score": float, "vector_rank": None,
    "vector_score": None, "lexical_rank": int, "lexical_score": float, "block": dict, "drift": None,
}  # fmt: skip


def test_json_of_the_command(repo):
    done = run_cli(
        "sea", "search", "surface inside the circle", "--index", repo.out, "--mode", "lexical",
        "--top-k", "2", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(SCHEMA)
    for name, kind in SCHEMA.items():
        assert isinstance(found[name], kind), name
    hit = found["hits"][0]
    assert list(hit) == list(HIT)
    for name, kind in HIT.items():
        assert hit[name] is None if kind is None else isinstance(hit[name], kind), name
    assert hit["symbol"] == "Circle.area"
    assert list(hit["block"]) == ["first_line", "last_line", "score", "lines"]
    assert list(hit["block"]["lines"][0]) == ["number", "text"]


def test_the_command_line(repo, tmp_path):
    done = run_cli("sea", "search", "surface circle", "--index", repo.out, "--mode", "lexical")
    assert done.returncode == 0, done.stderr
    assert "shapes.py:12" in done.stdout
    nothing = run_cli("sea", "search", "zzzz", "--index", repo.out, "--mode", "lexical", "--json")
    assert nothing.returncode == 1
    assert json.loads(nothing.stdout)["hits"] == []
    missing = run_cli("sea", "search", "x", "--index", tmp_path / "none")
    assert missing.returncode == 1
    assert "holds no index; make one with: polyzoo sea index" in missing.stderr
    assert "Traceback" not in missing.stderr
    wrong = run_cli("sea", "search", "x", "--index", repo.out, "--top-k", "0")
    assert wrong.returncode == 2
    assert "top_k=0 must be from 1 to 1000" in wrong.stderr


def test_status(repo):
    done = run_cli("sea", "status", "--index", repo.out, "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert status["coverage"] == 1.0
    assert status["model_id"] == "identifiers-64-0"
    assert status["stale_files"] == 0
    assert status["languages"]["javascript"]["files"] == 1
    assert status["languages"]["python"]["method"] == 2
    assert status["units"] == sum(
        count
        for counts in status["languages"].values()
        for kind, count in counts.items()
        if kind != "files"
    )
    assert (status["complete"], status["interrupted"], status["writer"]) == (True, False, None)
    text = run_cli("sea", "status", "--index", repo.out).stdout
    assert "100% with vectors" in text


def test_status_counts_stale_files(tmp_path):
    repo = small_repo(tmp_path)
    repo.index()
    repo.write("new.py", "x = 1\n")
    repo.write("shapes.py", "def other(): pass\n")
    (repo.root / "web" / "queue.js").unlink()
    status = json.loads(run_cli("sea", "status", "--index", repo.out, "--json").stdout)
    assert status["stale_files"] == 3
    assert status["stale_examples"] == [
        "changed: shapes.py",
        "added: new.py",
        "removed: web/queue.js",
    ]
    repo.root.rename(tmp_path / "gone")
    status = json.loads(run_cli("sea", "status", "--index", repo.out, "--json").stdout)
    assert status["stale_files"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be from 1 to 1000"),
        ({"context": -1}, "context=-1 must be 0 or more"),
        ({"vector_weight": -1.0}, "vector_weight=-1.0 must be from 0 to 1000"),
        ({"vector_weight": 0.0, "lexical_weight": 0.0}, "nothing is left to rank by"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(query="x", **settings)


def test_the_second_encoder_is_one(repo):
    """The tests' encoder gives what the protocol promises, so that the tests mean something."""
    encoder = IdentifierEncoder()
    result = encoder.embed_code(["def a(): pass", LONG], language=["python", "python"])
    assert result.vectors.shape == (2, encoder.dim)
    assert [len(rows) for rows in result.block_vectors] == [len(s.blocks) for s in result.splits]
    np.testing.assert_allclose(np.linalg.norm(result.vectors, axis=1), 1, atol=1e-6)
