"""From records to pieces: tokenise and split once, on all cores. Torch-free."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from polyzoo.core.errors import DataError, PolyzooError
from polyzoo.core.io import sha256_file
from polyzoo.core.log import get_logger, progress
from polyzoo.sea.config import Language, SplitConfig
from polyzoo.sea.encoding.tokenizer import SeaTokenizer
from polyzoo.sea.prepared import FORMAT, Origin, Prepared, Ragged
from polyzoo.sea.records import Record, read_records
from polyzoo.sea.splitting import split

_log = get_logger(__name__)
_CHUNK = 200
_POOL_FROM = 2_000


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that decides how a file becomes pieces."""

    tokenizer_folder: str
    """Folder with the encoder's tokenizer."""
    split: SplitConfig
    max_query_tokens: int = 128
    split_identifiers: bool = False


@dataclass(frozen=True)
class _Pieces:
    query: list[int]
    blocks: list[list[int]]
    whole: list[int]
    length: int
    cut: bool
    fallback: bool
    dropped: int
    query_hash: int
    code_hash: int


def prepare_file(
    path: str | Path,
    preparation: Preparation,
    *,
    need_query: bool = True,
    language: Language | None = None,
    cache_folder: Path | None = None,
    workers: int | None = None,
    limit: int | None = None,
    several_queries: bool = False,
) -> Prepared:
    """Read a jsonl(.gz) file or an already prepared .npz.

    Args:
        path: What to read.
        preparation: Tokenizer and splitter; a .npz made otherwise is refused.
        need_query: Refuse records without documentation.
        language: Of records that do not say.
        cache_folder: Keep the result here under the hash of all that decides it.
        workers: Processes; None for one per core on large files.
        limit: Read only so many records.
        several_queries: As in `read_records`.
    """
    path = Path(path)
    tokenizer = load_tokenizer(preparation)
    if path.suffix == ".npz":
        prepared = Prepared.load(path)
        check_origin(prepared, preparation, tokenizer, source=str(path))
        if need_query and (prepared.queries.lengths == 0).any():
            row = int(np.argmin(prepared.queries.lengths))
            raise DataError(f"{path}: {prepared.urls[row]!r} has no query, and queries are needed")
        return prepared.take(range(limit)) if limit and limit < len(prepared) else prepared

    cached: Path | None = None
    if cache_folder is not None and path.is_file():
        key = json.dumps(
            [FORMAT, sha256_file(path), asdict(_origin(preparation, tokenizer)), need_query,
             language, limit, several_queries]
        )  # fmt: skip
        cached = cache_folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        if cached.is_file():
            try:
                return Prepared.load(cached)
            except DataError as error:
                _log.warning("%s; preparing again", error)
    records = read_records(
        path,
        need_query=need_query,
        language=language,
        limit=limit,
        several_queries=several_queries,
    )
    prepared = prepare_records(records, preparation, workers=workers, source=path.name)
    if cached is not None:
        prepared.save(cached)
    return prepared


def prepare_records(
    records: Sequence[Record],
    preparation: Preparation,
    *,
    workers: int | None = None,
    source: str = "",
) -> Prepared:
    """Tokenise and split; the result does not depend on the number of workers."""
    tokenizer = load_tokenizer(preparation)
    chunks = [records[first : first + _CHUNK] for first in range(0, len(records), _CHUNK)]
    if workers is None:
        workers = min(os.cpu_count() or 1, 32) if len(records) >= _POOL_FROM else 1
    done: list[_Pieces] = []
    with progress(total=len(records), description=f"Splitting {source}", unit="functions") as bar:
        for part in _run(chunks, preparation, workers):
            done += part
            bar.update(len(part))
    origin = _origin(
        preparation,
        tokenizer,
        source=source,
        cut_queries=sum(item.cut for item in done),
        split_fallbacks=sum(item.fallback for item in done),
        dropped_blocks=sum(item.dropped for item in done),
        languages=dict(Counter(record.language for record in records)),
    )
    if origin.cut_queries:
        _log.info("%s: %d queries were cut", source, origin.cut_queries)
    if origin.dropped_blocks:
        _log.info("%s: %d blocks beyond max_blocks were dropped", source, origin.dropped_blocks)
    return Prepared(
        origin=origin,
        urls=[record.url for record in records],
        queries=Ragged.of([item.query for item in done]),
        blocks=Ragged.of([block for item in done for block in item.blocks]),
        first_block=np.concatenate([[0], np.cumsum([len(item.blocks) for item in done])]).astype(
            np.int64
        ),
        wholes=Ragged.of([item.whole for item in done]),
        lengths=np.asarray([item.length for item in done], dtype=np.int64),
        query_hash=np.asarray([item.query_hash for item in done], dtype=np.uint64),
        code_hash=np.asarray([item.code_hash for item in done], dtype=np.uint64),
    )


def check_origin(
    prepared: Prepared, preparation: Preparation, tokenizer: SeaTokenizer, *, source: str
) -> None:
    """Refuse pieces made with another tokenizer or splitter."""
    wanted = _origin(preparation, tokenizer)
    for name, what in (
        ("tokenizer_sha256", "another tokenizer"),
        ("split", "other splitter settings"),
        ("max_query_tokens", "another query limit"),
    ):
        if getattr(prepared.origin, name) != getattr(wanted, name):
            raise DataError(
                f"{source}: prepared with {what} ({getattr(prepared.origin, name)} instead of "
                f"{getattr(wanted, name)}): run `polyzoo sea prepare` again with these settings"
            )


@lru_cache(maxsize=4)
def load_tokenizer(preparation: Preparation) -> SeaTokenizer:
    """The tokenizer of a preparation; kept, since every worker asks for each chunk."""
    return SeaTokenizer.from_folder(
        preparation.tokenizer_folder, split_identifiers=preparation.split_identifiers
    )


def _run(
    chunks: Sequence[Sequence[Record]], preparation: Preparation, workers: int
) -> Iterator[list[_Pieces]]:
    jobs: Iterable[tuple[Sequence[Record], Preparation]]
    jobs = ((chunk, preparation) for chunk in chunks)
    if workers <= 1:
        yield from map(_prepare_chunk, jobs)
        return
    # spawn: forking a process that runs torch threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_prepare_chunk, jobs)


def _prepare_chunk(job: tuple[Sequence[Record], Preparation]) -> list[_Pieces]:
    records, preparation = job
    return [_prepare_record(record, preparation) for record in records]


def _prepare_record(record: Record, preparation: Preparation) -> _Pieces:
    tokenizer = load_tokenizer(preparation)
    query, cut = [], False
    try:
        if record.query is not None:
            wrapped, cut = tokenizer.query(record.query, limit=preparation.max_query_tokens)
            special = tokenizer.special
            query = wrapped[len(special.prefix) : len(wrapped) - len(special.suffix)]
        parts = split(
            record.text, language=record.language, config=preparation.split, tokenize=tokenizer
        )
    except PolyzooError as error:
        raise type(error)(f"{record.url}: {error}") from error
    if not parts.blocks or not parts.whole:
        raise DataError(f"{record.url}: nothing but blanks and comments; leave the record out")
    blocks = [list(block.ids) for block in parts.blocks]
    whole = list(parts.whole)
    return _Pieces(
        query=query,
        blocks=blocks,
        whole=whole[: preparation.split.whole_pieces] if len(blocks) > 1 else [],
        length=len(whole),
        cut=cut,
        fallback=parts.fallback is not None,
        dropped=parts.dropped_blocks,
        query_hash=_hash(" ".join((record.query or record.url).lower().split()).encode()),
        code_hash=_hash(np.asarray(whole, dtype=np.int32).tobytes()),
    )


def _origin(
    preparation: Preparation,
    tokenizer: SeaTokenizer,
    *,
    source: str = "",
    cut_queries: int = 0,
    split_fallbacks: int = 0,
    dropped_blocks: int = 0,
    languages: dict[str, int] | None = None,
) -> Origin:
    return Origin(
        tokenizer_sha256=tokenizer.sha256,
        prefix=tokenizer.special.prefix,
        suffix=tokenizer.special.suffix,
        vocab_size=tokenizer.vocab_size,
        split=asdict(preparation.split),
        max_query_tokens=preparation.max_query_tokens,
        source=source,
        cut_queries=cut_queries,
        split_fallbacks=split_fallbacks,
        dropped_blocks=dropped_blocks,
        languages=languages or {},
    )


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
