"""`polyzoo sea search`: vectors and words, each ranked exactly, fused by reciprocal rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from polyzoo.core.errors import DataError
from polyzoo.sea.search.config import Mode, SearchConfig, SearchRequest
from polyzoo.sea.search.embedder import Embedder, load_embedder, load_light
from polyzoo.sea.search.excerpts import excerpt
from polyzoo.sea.search.fusion import Ranking, fuse
from polyzoo.sea.search.ignores import compile_patterns
from polyzoo.sea.search.index import CodeIndex, Freshness, IndexState
from polyzoo.sea.search.layout import find_folder
from polyzoo.sea.search.lexical import query_terms
from polyzoo.sea.search.locating import Locator
from polyzoo.sea.search.results import Hit, SearchResult
from polyzoo.sea.search.schema import UnitRow
from polyzoo.sea.search.stores import Filter, Vectors
from polyzoo.sea.search.vector_ranking import DEPTH, rank_vectors

_TRIES = 3


class Searcher:
    """Answers questions about one index; sees every change that an indexing run makes visible.

    Not for several threads at a time.

    Example:
        >>> with Searcher(find_folder(Path("."))) as searcher:
        ...     hits = searcher.search(SearchRequest(query="open an index")).hits
    """

    def __init__(
        self,
        folder: Path,
        *,
        embedder: Embedder | None = None,
        model: str | None = None,
        light: bool = False,
    ) -> None:
        """Open an index.

        Args:
            folder: Of the index.
            embedder: Its model, loaded already.
            model: Where to load it from; by default where the index says.
            light: For a question or two: do without torch if the model allows it.
        """
        self.folder, self._model, self._embedder = folder, model, embedder
        self._light = light
        self.index = CodeIndex.open(folder)
        self._checked = False
        self._paths: dict[tuple[int, tuple[str, ...]], tuple[int, ...]] = {}

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the index."""
        self.index.close()

    def load(self) -> Embedder:
        """Load the model now rather than at the first question, and check that it is the index's.

        Raises:
            ConfigError: it is another model; names the command that rebuilds.
        """
        self._refresh()
        if self._embedder is None:
            name = self._model or self.index.settings.model
            light = load_light(name) if self._light else None
            self._embedder = light or load_embedder(name)
        if not self._checked:
            self.index.check_model(self._embedder)
            self._checked = True
        return self._embedder

    def search(self, request: SearchRequest, *, freshness: Freshness | None = None) -> SearchResult:
        """Answer a question.

        Args:
            request: The question.
            freshness: What `freshness()` found, to be told in the result.

        Raises:
            DataError: the query is empty, or the index is damaged.
            ConfigError: the model is another one, or maxsim is asked of an index without blocks.
        """
        if not request.query.strip():
            raise DataError("the query is empty; say in words what the code does")
        clock = _Clock()
        for attempt in range(_TRIES):
            result, revision = self._try(request, freshness, clock)
            # Vectors have no snapshots: an update that became visible meanwhile may have removed
            # some that the answer's state still names.
            if attempt == _TRIES - 1 or (self._revision() == revision and self.index.is_current()):
                return replace(result, took_ms=clock.milliseconds())
        raise AssertionError("unreachable")

    def _try(
        self, request: SearchRequest, freshness: Freshness | None, clock: _Clock
    ) -> tuple[SearchResult, int]:
        self._refresh()
        revision = self._revision()
        mode, query = self._mode(request), None
        if mode != "lexical":
            with clock.measure("encode"):
                query = self.load().embed_queries([request.query])[0]
        with self.index.catalog.snapshot():
            state = self.index.state()
            hits = self._answer(request, mode, query, clock)
        settings = self.index.settings
        result = SearchResult(
            query=request.query,
            mode=mode,
            index=str(self.folder),
            repo=settings.repo,
            model_id=settings.model_id,
            units=state.units,
            coverage=state.coverage,
            stale_files=freshness.count if freshness else None,
            notices=_notices(state, freshness, settings.repo, self.folder),
            took_ms={},
            hits=hits,
        )
        return result, revision

    def freshness(self) -> Freshness:
        """Compare the repository with the index."""
        self._refresh()
        return self.index.freshness()

    def _refresh(self) -> None:
        if not self.index.is_current():
            self.index.close()
            self.index = CodeIndex.open(self.folder)
            self._checked = False
            self._paths.clear()

    def _revision(self) -> int:
        return int(self.index.catalog.get_meta("revision", 0))

    def _mode(self, request: SearchRequest) -> Mode:
        """Words only, while there are no vectors at all."""
        if request.mode == "hybrid" and not self.index.state().embedded:
            return "lexical"
        return request.mode

    def _answer(
        self, request: SearchRequest, mode: Mode, query: Vectors | None, clock: _Clock
    ) -> tuple[Hit, ...]:
        where = self._filter(request)
        vector: Ranking = []
        words: Ranking = []
        if query is not None:
            with clock.measure("vectors"):
                vector = rank_vectors(self.index, query, request, where)
        if mode != "vector":
            with clock.measure("words"):
                terms = query_terms(request.query)
                depth = max(DEPTH, 4 * request.top_k)
                words = self.index.catalog.match(terms, limit=depth, where=where)
        best = fuse(vector, words, request, mode)
        with clock.measure("blocks"):
            return self._hits(best, vector, words, query, request)

    def _filter(self, request: SearchRequest) -> Filter:
        files = None
        if request.paths:
            key = (self._revision(), request.paths)
            if key not in self._paths:
                patterns = compile_patterns(request.paths, option="path")
                rows = self.index.catalog.rows("SELECT id, path FROM files ORDER BY id")
                self._paths = {key: tuple(row[0] for row in rows if patterns.match_file(row[1]))}
            files = self._paths[key]
        return Filter(languages=request.languages, kinds=request.kinds, files=files)

    def _hits(
        self,
        best: Ranking,
        vector: Ranking,
        words: Ranking,
        query: Vectors | None,
        request: SearchRequest,
    ) -> tuple[Hit, ...]:
        units = self.index.catalog.units([number for number, _ in best])
        by_vector = {number: place for place, (number, _) in enumerate(vector)}
        by_words = {number: place for place, (number, _) in enumerate(words)}
        locator = Locator(Path(self.index.settings.repo), self.index.catalog)
        shown = [(number, score) for number, score in best if number in units]
        places = [locator.locate(units[number]) for number, _ in shown]
        hits = []
        for rank, ((number, score), place) in enumerate(zip(shown, places, strict=True), start=1):
            unit, v, w = place.unit, by_vector.get(number), by_words.get(number)
            block = None
            if request.blocks:
                block = excerpt(unit, request.query, query, request.context)
            hits.append(
                Hit(
                    rank=rank,
                    path=unit.path,
                    first_line=unit.first_line,
                    last_line=unit.last_line,
                    symbol=unit.symbol,
                    kind=unit.kind,
                    language=unit.language,
                    signature=unit.signature,
                    summary=_summary(unit),
                    score=score,
                    vector_rank=None if v is None else v + 1,
                    vector_score=None if v is None else vector[v][1],
                    lexical_rank=None if w is None else w + 1,
                    lexical_score=None if w is None else words[w][1],
                    block=block,
                    drift=place.drift,
                )
            )
        return tuple(hits)


def main(config: SearchConfig) -> SearchResult:
    """Run the command."""
    folder = config.index or find_folder(config.repo)
    with Searcher(folder, model=config.model, light=True) as searcher:
        freshness = None
        if config.check and Path(searcher.index.settings.repo).is_dir():
            freshness = searcher.freshness()
        return searcher.search(config.request(), freshness=freshness)


def _summary(unit: UnitRow) -> str:
    lines = (line.strip() for line in (unit.docstring or "").split("\n"))
    return next((line for line in lines if line), "")[:200]


def _notices(
    state: IndexState, freshness: Freshness | None, repo: str, folder: Path
) -> tuple[str, ...]:
    again = f"polyzoo sea index {repo} --out {folder}"
    found = []
    if state.writer is not None:
        found.append(f"the index is being written by process {state.writer}")
    elif state.interrupted:
        found.append(f"the last indexing was interrupted; continue it with: {again}")
    if not state.complete:
        found.append("not all files have been read yet")
    if state.embedded < state.units:
        found.append(
            f"{state.units - state.embedded:,} of {state.units:,} units have no vector yet "
            f"(coverage {state.coverage:.0%}); only their words are searched"
        )
    if freshness and freshness.count:
        kinds = ("changed", "added", "removed")
        parts = [f"{len(names):,} {kind}" for kind in kinds if (names := getattr(freshness, kind))]
        found.append(
            f"files have changed since indexing ({', '.join(parts)}); update with: {again}"
        )
    return tuple(found)


class _Clock:
    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._parts[name] = time.perf_counter() - start

    def milliseconds(self) -> dict[str, float]:
        parts = {**self._parts, "total": time.perf_counter() - self._start}
        return {name: round(seconds * 1000, 2) for name, seconds in parts.items()}
