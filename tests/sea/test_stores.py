"""One contract for every vector engine, run against the real engines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyzoo.core.errors import DataError
from polyzoo.sea.search.stores import Filter, Points, StorePlace, open_store
from polyzoo.sea.search.stores.local import LocalStore

DIM = 8
ON_DISK = ("local", "local16", "qdrant", "lancedb")


def place(folder: Path, kind: str, **changes: object) -> StorePlace:
    engine = kind.removesuffix("16").removesuffix("-memory")
    settings = {
        "kind": engine,
        "location": ":memory:" if kind.endswith("memory") else str(folder / engine),
        "name": "polyzoo-test",
        "generation": 1,
        "dim": DIM,
        "dtype": "float16" if kind.endswith("16") else "float32",
        "model_id": "model-1",
    }
    return StorePlace(**{**settings, **changes})


@pytest.fixture(params=[*ON_DISK, "qdrant-memory"])
def kind(request):
    return _available(request)


@pytest.fixture(params=ON_DISK)
def kind_on_disk(request):
    return _available(request)


def _available(request):
    if request.param.startswith("qdrant"):
        pytest.importorskip("qdrant_client", reason="needs polyzoo-sea[qdrant]")
    if request.param == "lancedb":
        pytest.importorskip("lancedb", reason="needs polyzoo-sea[lancedb]")
    return request.param


@pytest.fixture
def store(tmp_path, kind):
    store = open_store(place(tmp_path, kind), create=True)
    yield store
    store.close()


def points(ids, *, seed=0, languages=("python", "go"), kinds=("function", "class"), scale=1.0):
    ids = np.asarray(ids, np.int64)
    vectors = np.random.default_rng(seed).standard_normal((len(ids), DIM)) * scale
    return Points(
        # Multiples of 1/16 are exact in every format, so that engines can be compared exactly.
        vectors=(np.round(vectors * 16) / 16).astype(np.float32),
        ids=ids,
        files=ids % 5,
        languages=[languages[i % len(languages)] for i in ids],
        kinds=[kinds[(i // 2) % len(kinds)] for i in ids],
    )


def expected(given: Points, query, limit, where=None):
    """Slow and obvious: score everything, filter, sort."""
    rows = []
    for i in range(len(given.ids)):
        if where and where.languages and given.languages[i] not in where.languages:
            continue
        if where and where.kinds and given.kinds[i] not in where.kinds:
            continue
        if where and where.files is not None and given.files[i] not in where.files:
            continue
        rows.append((-float(given.vectors[i] @ query), int(given.ids[i])))
    rows.sort()
    return [number for _, number in rows[:limit]], [-score for score, _ in rows[:limit]]


QUERY = (np.arange(DIM, dtype=np.float32) - 3.25) / 4


FILTERS = (
    None,
    Filter(),
    Filter(languages=("go",)),
    Filter(kinds=("class",), languages=("python", "go")),
    Filter(files=(0, 3)),
    Filter(files=()),
    Filter(languages=("ruby",)),
    Filter(languages=("python",), kinds=("function",), files=(1, 2, 4)),
)


def test_search_is_exact_under_every_filter(store):
    given = points(range(1, 201))
    store.upsert(given)
    for where in FILTERS:
        ids, scores = store.search(QUERY, limit=25, where=where)
        wanted_ids, wanted_scores = expected(given, QUERY, 25, where)
        np.testing.assert_allclose(scores, wanted_scores, rtol=0, atol=1e-5, err_msg=str(where))
        assert ids.tolist() == wanted_ids, where
        assert ids.dtype == np.int64
        assert scores.dtype == np.float32


def test_empty_store(store):
    assert store.ids().tolist() == []
    assert store.search(QUERY, limit=3)[0].tolist() == []
    found, vectors = store.get(np.array([1, 2]))
    assert found.tolist() == []
    assert vectors.shape == (0, DIM)
    store.delete(np.array([1, 2]))
    store.upsert(points([]))


def test_upsert_replaces_delete_removes_get_returns_in_order(store):
    store.upsert(points([1, 2, 3]))
    again = points([2, 7], seed=9)
    store.upsert(again)
    store.delete(np.array([3, 99]))
    assert store.ids().tolist() == [1, 2, 7]
    found, vectors = store.get(np.array([7, 3, 2]))
    assert found.tolist() == [7, 2]
    np.testing.assert_array_equal(vectors, again.vectors[::-1])
    store.upsert(points([3], seed=4))
    assert store.ids().tolist() == [1, 2, 3, 7]


def test_what_is_written_is_there_when_opened_again(tmp_path, kind_on_disk):
    kind = kind_on_disk
    given = points(range(1, 40))
    first = open_store(place(tmp_path, kind), create=True)
    first.upsert(given)
    first.delete(np.array([5, 6]))
    first.close()
    second = open_store(place(tmp_path, kind))
    assert second.ids().tolist() == [i for i in range(1, 40) if i not in (5, 6)]
    np.testing.assert_array_equal(second.get(given.ids[:3])[1], given.vectors[:3])
    second.close()


def test_generations_are_apart_and_drop_removes_one(tmp_path, kind_on_disk):
    for generation in (1, 2):  # one after the other: Qdrant's local mode has one client at a time
        store = open_store(place(tmp_path, kind_on_disk, generation=generation), create=True)
        store.upsert(points([generation, 10 * generation]))
        store.close()
    open_store(place(tmp_path, kind_on_disk)).drop()
    with pytest.raises(DataError, match="build the index again"):
        open_store(place(tmp_path, kind_on_disk))
    new = open_store(place(tmp_path, kind_on_disk, generation=2))
    assert new.ids().tolist() == [2, 20]
    new.close()


def test_a_store_that_is_not_there_says_so(tmp_path, kind):
    with pytest.raises(DataError, match="build the index again"):
        open_store(place(tmp_path, kind))


def test_another_dimension_is_refused(tmp_path, kind_on_disk):
    kind = kind_on_disk
    open_store(place(tmp_path, kind), create=True).close()
    with pytest.raises(DataError, match=r"(8 .*16|16 .*8)"):
        open_store(place(tmp_path, kind, dim=16))


def test_bad_points_and_queries_are_refused(store):
    good = points([1, 2])
    wrong = good.vectors.copy()
    wrong[1, 3] = np.nan

    def with_vectors(vectors):
        return Points(
            ids=good.ids, vectors=vectors, files=good.files, languages=["go"] * 2, kinds=["x"] * 2
        )

    with pytest.raises(DataError, match="id 2 holds NaN"):
        store.upsert(with_vectors(wrong))
    with pytest.raises(DataError, match="do not fit a store of 8 channels"):
        store.upsert(with_vectors(good.vectors[:, :4]))
    with pytest.raises(DataError, match="id 0 must be positive"):
        store.upsert(points([0, 1]))
    with pytest.raises(DataError, match="does not fit a store of 8 channels"):
        store.search(QUERY[:4], limit=3)
    with pytest.raises(DataError, match="NaN"):
        store.search(QUERY * np.inf, limit=3)
    with pytest.raises(DataError, match="limit=0"):
        store.search(QUERY, limit=0)
    assert store.ids().tolist() == []


def test_qdrant_keeps_the_model_and_moves_the_alias(tmp_path):
    pytest.importorskip("qdrant_client", reason="needs polyzoo-sea[qdrant]")
    from qdrant_client import QdrantClient

    for generation in (1, 2):
        store = open_store(place(tmp_path, "qdrant", generation=generation), create=True)
        store.upsert(points([generation]))
        store.publish()
        store.close()
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    aliases = {alias.alias_name: alias.collection_name for alias in client.get_aliases().aliases}
    assert aliases == {"polyzoo-test": "polyzoo-test-g2"}
    assert client.get_collection("polyzoo-test").config.metadata == {"model_id": "model-1"}
    payload = client.retrieve("polyzoo-test", [2])[0].payload
    assert payload == {"file": 2, "language": "python", "kind": "class"}
    client.close()


# The client leaves its lock file open when it refuses a second one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_second_client_of_a_qdrant_folder_is_told_why(tmp_path):
    pytest.importorskip("qdrant_client", reason="needs polyzoo-sea[qdrant]")
    from polyzoo.core.errors import LockedError

    first = open_store(place(tmp_path, "qdrant"), create=True)
    with pytest.raises(LockedError, match="use a Qdrant server"):
        open_store(place(tmp_path, "qdrant"))
    first.close()


def test_a_qdrant_server_that_does_not_answer(tmp_path):
    pytest.importorskip("qdrant_client", reason="needs polyzoo-sea[qdrant]")
    import socket

    from polyzoo.core.errors import PolyzooError

    with socket.socket() as taken:  # bound and not listening: nothing else can answer there
        taken.bind(("127.0.0.1", 0))
        location = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PolyzooError, match=f"{location} does not answer"):
            open_store(place(tmp_path, "qdrant", location=location), create=True)


class TestLocalFiles:
    """What only the local store promises: its files survive anything."""

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        steps=st.lists(
            st.tuples(st.booleans(), st.lists(st.integers(1, 30), min_size=1, max_size=6)),
            max_size=12,
        ),
        cut=st.integers(0, 200),
        cut_matrix=st.integers(0, 100),
    )
    def test_any_torn_tail_leaves_a_prefix_of_the_history(
        self, tmp_path_factory, steps, cut, cut_matrix
    ):
        folder = tmp_path_factory.mktemp("store")
        store = LocalStore(folder, dim=DIM, create=True)
        states = [{}]
        log, matrix = folder / "log-000001.bin", folder / "matrix-000001.bin"
        sizes = [(0, 0)]
        for number, (add, ids) in enumerate(steps):
            state = dict(states[-1])
            if add:
                given = points(sorted(set(ids)), seed=number)
                store.upsert(given)
                state |= dict(zip(given.ids.tolist(), given.vectors, strict=True))
            else:
                store.delete(np.array(ids))
                state = {i: v for i, v in state.items() if i not in ids}
            states.append(state)
            sizes.append((log.stat().st_size, matrix.stat().st_size))
        store.close()
        # A writer was killed in the next append: rows first, then entries, each perhaps in part.
        with matrix.open("ab") as file:
            file.write(b"\x01" * cut_matrix)
        with log.open("ab") as file:
            file.write(b"\x01" * (cut % 40))
        reader = LocalStore(folder, dim=DIM)
        assert reader.ids().tolist() == sorted(states[-1])
        writer = LocalStore(folder, dim=DIM)
        writer.upsert(points([77], seed=77))
        found, vectors = writer.get(np.array([*sorted(states[-1]), 77]))
        wanted = {**states[-1], 77: points([77], seed=77).vectors[0]}
        assert found.tolist() == sorted(wanted)
        for number, vector in zip(found.tolist(), vectors, strict=True):
            np.testing.assert_array_equal(vector, wanted[number])
        writer.close()
        reader.close()

    def test_compaction_keeps_what_lives_and_open_readers(self, tmp_path):
        store = LocalStore(tmp_path / "s", dim=DIM, create=True)
        reader = LocalStore(tmp_path / "s", dim=DIM)
        given = points(range(1, 10_001))
        store.upsert(given)
        before = reader.search(QUERY, limit=5)
        size = store.disk_bytes()
        store.delete(np.arange(1, 9_001))
        assert store.disk_bytes() < size / 5
        assert store.ids().tolist() == list(range(9_001, 10_001))
        np.testing.assert_array_equal(store.get(given.ids[9_000:])[1], given.vectors[9_000:])
        assert before[0].tolist() == expected(given, QUERY, 5)[0]
        left = points(range(1, 10_001))
        kept = Points(
            ids=left.ids[9_000:],
            vectors=left.vectors[9_000:],
            files=left.files[9_000:],
            languages=left.languages[9_000:],
            kinds=left.kinds[9_000:],
        )
        assert reader.search(QUERY, limit=5)[0].tolist() == expected(kept, QUERY, 5)[0]
        store.upsert(points([20_000], seed=5))
        assert reader.ids()[-1] == 20_000
        store.close()
        reader.close()

    def test_damage_is_named(self, tmp_path):
        LocalStore(tmp_path / "s", dim=DIM, create=True).close()
        (tmp_path / "s" / "current.json").write_text("{")
        with pytest.raises(DataError, match=r"current\.json is damaged"):
            LocalStore(tmp_path / "s", dim=DIM)

    def test_half_precision_refuses_what_it_cannot_hold(self, tmp_path):
        store = LocalStore(tmp_path / "s", dim=DIM, dtype="float16", create=True)
        with (
            np.errstate(over="ignore"),
            pytest.raises(DataError, match="too large for float16"),
        ):
            store.upsert(points([1], scale=1e6))
        store.close()


def test_importing_the_interface_imports_no_engine():
    code = (
        "import sys, polyzoo.sea.search.stores, polyzoo.sea.search.index;"
        "assert not {'lancedb', 'qdrant_client', 'pyarrow', 'torch'} & set(sys.modules)"
    )
    from support.cli import child_environment

    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), check=False)
    assert done.returncode == 0
