"""The `eval` command: a file, a model, a protocol; the figures with their baselines beside them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from polyzoo.core.errors import ConfigError
from polyzoo.sea import evaluation
from polyzoo.sea.aggregation import Aggregation
from polyzoo.sea.baselines import TfIdf
from polyzoo.sea.caches import prepared_folder
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.metrics import Figures
from polyzoo.sea.model_sources import BARE
from polyzoo.sea.options import EvalConfig
from polyzoo.sea.pipeline import SeaPipeline, bare_config
from polyzoo.sea.prepare import Preparation, prepare_file
from polyzoo.sea.prepared import Prepared
from polyzoo.sea.records import Record, read_records

_UNTRAINED = ("mean", "max", "first", "maxsim", "soft_maxsim")


@dataclass(frozen=True)
class EvalReport:
    """Result of an evaluation. Shares are percentages, MRR lies in [0, 1]."""

    model: str
    model_id: str
    data: str
    protocol: str
    pool: int
    """Candidates each query is ranked against."""
    queries: int
    ties: str
    tied: int
    """Queries whose answer shares its score with another candidate."""
    mrr: float
    recall: dict[str, float]
    median_rank: float
    by_length: dict[str, Figures]
    """By length of the answer in encoder pieces."""
    baselines: dict[str, dict[str, Any]]
    """truncated: the same model on the first block's worth of the function. tfidf: words."""
    several_blocks: float
    """Share of the pool that has more than one block, percent."""
    split_fallbacks: int
    cut_queries: int
    seconds: float
    notes: list[str]


def main(config: EvalConfig) -> EvalReport:
    """Run the command."""
    began = time.perf_counter()
    pipeline = _pipeline(config)
    shape = pipeline.config
    preparation = Preparation(
        tokenizer_folder=str(pipeline.tokenizer_folder),
        split=shape.split,
        max_query_tokens=shape.max_query_tokens,
        split_identifiers=shape.split_identifiers,
    )
    cache = prepared_folder() if config.cache else None
    queries = prepare_file(
        config.data, preparation, language=config.language, cache_folder=cache,
        workers=config.workers, limit=config.limit, several_queries=config.codebase is not None,
    )  # fmt: skip
    codebase = queries
    if config.codebase is not None:
        codebase = prepare_file(
            config.codebase, preparation, need_query=False, language=config.language,
            cache_folder=cache, workers=config.workers,
        )  # fmt: skip
    answers = evaluation.find_answers(queries, codebase)
    lengths = codebase.lengths[answers]
    embedded = evaluation.embed(pipeline.model, queries, codebase)
    how: dict[str, Any] = {"protocol": config.protocol, "ties": config.ties}

    notes: list[str] = []
    if config.protocol == "released":
        evaluation.check_released(pipeline.model)
        scores = evaluation.released_scores(pipeline.model, embedded, answers)
        notes.append(
            "protocol released weighs answers above other candidates; its figures compare with "
            "nothing but the published ones"
        )
    else:
        scores = evaluation.model_scores(pipeline.model, embedded)
    rankings = {"model": evaluation.rank(scores, answers, lengths, **how)}
    if config.baselines and config.protocol != "released":
        if shape.whole_entry:
            rankings["truncated"] = evaluation.rank(
                evaluation.truncated_scores(embedded), answers, lengths, **how
            )
        if config.data.suffix == ".npz" or (config.codebase or config.data).suffix == ".npz":
            notes.append("no TF-IDF: a prepared file holds no text")
        else:
            table, asked = _tfidf(config, queries, codebase)
            rankings["tfidf"] = evaluation.rank(
                lambda first, last: table.scores(asked[first:last]), answers, lengths, **how
            )
    if config.ranks is not None:
        evaluation.write_ranks(config.ranks, queries.urls, rankings)
    own = rankings.pop("model")
    return EvalReport(
        model=config.model,
        model_id=pipeline.model_id,
        data=config.data.name,
        protocol=config.protocol,
        pool=1000 if config.protocol == "csn1000" else len(codebase),
        queries=own.all.n,
        ties=config.ties,
        tied=own.tied,
        mrr=own.all.mrr,
        recall=own.all.recall,
        median_rank=own.all.median_rank,
        by_length=own.by_length,
        baselines={
            name: {
                "mrr": ranking.all.mrr,
                "recall": ranking.all.recall,
                "median_rank": ranking.all.median_rank,
                "tied": ranking.tied,
                "by_length": ranking.by_length,
            }
            for name, ranking in rankings.items()
        },
        several_blocks=float((np.diff(codebase.first_block) > 1).mean() * 100),
        split_fallbacks=codebase.origin.split_fallbacks,
        cut_queries=queries.origin.cut_queries,
        seconds=round(time.perf_counter() - began, 1),
        notes=notes,
    )


def render(report: EvalReport) -> str:
    """The report for people."""
    lines = [
        f"{report.model} on {report.data}: protocol {report.protocol}, {report.queries} queries, "
        f"pool {report.pool}, ties {report.ties} ({report.tied} tied)",
        f"{'':12}{'MRR':>8}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'R@100':>8}"
        f"{'<=256':>9}{'257-512':>9}{'>512':>9}{'>256':>9}",
    ]
    rows: dict[str, Any] = {"model": vars(report), **report.baselines}
    for name, row in rows.items():
        recalls = "".join(f"{row['recall'][k]:8.1f}" for k in ("1", "5", "10", "100"))
        buckets = "".join(f"{figures.mrr:9.4f}" for figures in row["by_length"].values())
        lines.append(f"{name:12}{row['mrr']:8.4f}{recalls}{buckets}")
    counts = "".join(f"{figures.n:9d}" for figures in report.by_length.values())
    lines.append(f"{'queries':12}{report.queries:8d}{'':32}{counts}")
    lines.append(
        f"{report.several_blocks:.1f} % of the pool has several blocks, "
        f"{report.split_fallbacks} functions fell back to lines, "
        f"{report.cut_queries} queries were cut; {report.seconds} s"
    )
    return "\n".join([*lines, *report.notes])


def _pipeline(config: EvalConfig) -> SeaPipeline:
    dtype = None if config.dtype == "auto" else config.dtype
    if config.model.startswith(BARE):
        shape = bare_config(config.model.removeprefix(BARE))
        if config.aggregator:
            raw = "mean" if config.aggregator in _UNTRAINED else shape.raw
            shape = replace(shape, aggregator=config.aggregator, raw=raw)
        shape = _with_docstrings(shape, config.keep_docstrings)
        return SeaPipeline.from_pretrained(
            config.model, device=config.device, dtype=dtype, config=shape
        )
    pipeline = SeaPipeline.from_pretrained(config.model, device=config.device, dtype=dtype)
    if config.aggregator:
        if config.aggregator not in _UNTRAINED:
            raise ConfigError(
                f"aggregator={config.aggregator!r} has weights of its own, which {config.model!r} "
                f"was not trained with; without training: {', '.join(_UNTRAINED)}"
            )
        model = pipeline.model
        model.config = replace(model.config, aggregator=config.aggregator, raw="mean")
        model.aggregation = Aggregation(model.dim, kind=config.aggregator).to(pipeline.device)
        pipeline.config = model.config
    pipeline.config = _with_docstrings(pipeline.config, config.keep_docstrings)
    return pipeline


def _with_docstrings(shape: SeaConfig, keep: bool) -> SeaConfig:
    if not keep:
        return shape
    return replace(shape, split=replace(shape.split, keep_docstrings=True))


def _tfidf(config: EvalConfig, queries: Prepared, codebase: Prepared) -> tuple[TfIdf, list[str]]:
    asked: list[Record] = read_records(
        config.data,
        language=config.language,
        limit=config.limit,
        several_queries=config.codebase is not None,
    )
    pool = asked
    if config.codebase is not None:
        pool = read_records(config.codebase, need_query=False, language=config.language)
    assert [record.url for record in pool] == codebase.urls  # noqa: S101 - our own promise
    assert [record.url for record in asked] == queries.urls  # noqa: S101 - our own promise
    return TfIdf([record.code for record in pool]), [record.query or "" for record in asked]
