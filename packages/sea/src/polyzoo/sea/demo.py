"""What SEA shows in `make demo`: questions to an installed library and to polyzoo itself."""

from __future__ import annotations

import html
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from polyzoo.core.demo import DemoSection
from polyzoo.core.errors import PolyzooError
from polyzoo.sea.pipeline import SeaPipeline
from polyzoo.sea.search.config import IndexConfig, SearchRequest
from polyzoo.sea.search.results import Hit, SearchResult
from polyzoo.sea.search.searcher import Searcher
from polyzoo.sea.search.update import build_index

_ACCEPTED = 3
"""An answer counts among the first so many, which are what the page shows."""


@dataclass(frozen=True)
class Question:
    """A query, and the functions any of which is the right answer."""

    text: str
    answers: tuple[str, ...]


LIBRARY = "huggingface_hub"
"""Installed with polyzoo.core; the model was not trained on it."""
LIBRARY_QUESTIONS = (
    Question(
        "download every file of a repository at some revision",
        ("snapshot_download", "HfApi.snapshot_download"),
    ),
    Question(
        "cut a large state dict into shards below a maximum size",
        ("split_torch_state_dict_into_shards", "split_state_dict_into_shards_factory"),
    ),
    Question(
        "retry an HTTP request with growing pauses when the server is busy",
        ("http_backoff", "http_stream_backoff", "_http_backoff_base"),
    ),
    Question("upload a folder in one commit", ("HfApi.upload_folder",)),
)
OWN_QUESTIONS = (
    Question("join attention results over disjoint sets of keys", ("merge_states",)),
    Question(
        "refuse a picture with too many pixels before it is decoded",
        ("open_image", "_check_size"),
    ),
    Question("walk a repository and obey gitignore", ("walk",)),
    Question("rank of the right answer when scores tie", ("answer_ranks",)),
)


def run(out: Path) -> DemoSection:
    """Index both, ask, and check the answers; the indexes stay in `out`."""
    pipeline = SeaPipeline.from_pretrained("embedded", device="cpu")
    indexing = SeaPipeline.from_pretrained("embedded", device="cpu", dtype=SeaPipeline.bulk_dtype())
    # The parent of every installed part of the namespace: packages/ in a clone.
    own = Path(__file__).parents[4]
    parts = [
        _ask(pipeline, indexing, _installed(LIBRARY), LIBRARY, LIBRARY_QUESTIONS, out / LIBRARY),
        _ask(pipeline, indexing, own, "polyzoo", OWN_QUESTIONS, out / "polyzoo"),
    ]
    latency = statistics.median(ms for part in parts for ms in part.milliseconds)
    units = " and ".join(f"{part.units:,} units of {part.name}" for part in parts)
    seconds = " and ".join(f"{part.seconds:.0f} s" for part in parts)
    return DemoSection(
        title="SEA: find code by saying what it does",
        summary=(
            f"Indexed {units} in {seconds} with the model in this repository, then asked in plain "
            f"words; the median answer took {latency:.0f} ms. The block of each function that fits "
            "the question best is marked."
        ),
        body="".join(part.body for part in parts),
        checks=[check for part in parts for check in part.checks],
    )


@dataclass(frozen=True)
class _Part:
    name: str
    units: int
    seconds: float
    milliseconds: list[float]
    body: str
    checks: list[tuple[str, bool]]


def _ask(
    pipeline: SeaPipeline,
    indexing: SeaPipeline,
    repo: Path,
    name: str,
    questions: Sequence[Question],
    folder: Path,
) -> _Part:
    start = time.perf_counter()
    report = build_index(IndexConfig(repo=repo, out=folder), embedder=indexing)
    seconds = time.perf_counter() - start
    body, checks, milliseconds = [f"<h3>{html.escape(name)}</h3>"], [], []
    with Searcher(folder, embedder=pipeline) as searcher:
        searcher.search(SearchRequest(query=questions[0].text))  # reads the vectors in
        for question in questions:
            result = searcher.search(
                SearchRequest(query=question.text, top_k=_ACCEPTED, context=10)
            )
            milliseconds.append(sum(result.took_ms.values()))
            found = next((hit.rank for hit in result.hits if hit.symbol in question.answers), None)
            place = f"is answer {found}" if found else "was not found"
            checks.append((f"“{question.text}”: {question.answers[0]} {place}", found is not None))
            body.append(_answers(question, result))
    return _Part(
        name=name,
        units=report.units,
        seconds=seconds,
        milliseconds=milliseconds,
        body="".join(body),
        checks=checks,
    )


def _answers(question: Question, result: SearchResult) -> str:
    hits = "".join(_hit(hit, opened=hit.symbol in question.answers) for hit in result.hits)
    return f'<p class="query">{html.escape(question.text)}</p>{hits}'


def _hit(hit: Hit, *, opened: bool) -> str:
    head = (
        f'<span class="where"><b>{html.escape(hit.symbol)}</b> '
        f"{html.escape(hit.path)}:{hit.first_line}</span>"
        f'<span class="score">{html.escape(_why(hit))}</span>'
    )
    return (
        f'<details class="hit"{" open" if opened else ""}><summary>{head}</summary>'
        f"{_code(hit)}</details>"
    )


def _why(hit: Hit) -> str:
    meaning = f"meaning #{hit.vector_rank}" if hit.vector_rank else ""
    words = f"words #{hit.lexical_rank}" if hit.lexical_rank else ""
    return ", ".join(part for part in (meaning, words) if part)


def _code(hit: Hit) -> str:
    if hit.block is None:
        return ""
    rows = []
    for line in hit.block.lines:
        best = hit.block.first_line <= line.number <= hit.block.last_line
        rows.append(
            f'<span class="row{" best" if best else ""}"><span class="number">{line.number}</span>'
            f"{html.escape(line.text)}</span>"
        )
    return f"<pre>{''.join(rows)}</pre>"


def _installed(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise PolyzooError(
            f"{package} is not installed; the demo indexes it: pip install {package}"
        )
    return Path(spec.origin).parent
