"""What is encoded for a function: the same in training, evaluation and the pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from polyzoo.sea.config import SeaConfig, SplitConfig
from polyzoo.sea.encoding.tokenizer import SeaTokenizer
from polyzoo.sea.entries import Entries, split_code
from polyzoo.sea.prepare import Preparation, prepare_file
from polyzoo.sea.prepared import Prepared
from support.sea_models import encoder_folder, records, write_jsonl

FINE = SplitConfig(
    budget=30, whole_budget=62, min_tokens=4, repeat_signature=True, signature_pieces=6
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


def prepared(folder: Path, tmp_path: Path, split: SplitConfig) -> Prepared:
    preparation = Preparation(tokenizer_folder=str(folder), split=split, max_query_tokens=16)
    return prepare_file(write_jsonl(tmp_path / "d.jsonl", records()), preparation)


@pytest.mark.parametrize("aggregator", ["soft_maxsim", "maxsim", "attn1_mean", "first"])
@pytest.mark.parametrize("head", [0, 8])
def test_training_and_pipeline_encode_the_same(
    folder: Path, tmp_path: Path, aggregator: str, head: int
):
    config = SeaConfig(aggregator=aggregator, split=FINE, head_pieces=head)  # pyright: ignore[reportArgumentType]
    tokenizer = SeaTokenizer.from_folder(folder)
    file = prepared(folder, tmp_path, FINE)
    codes = [row["code"] for row in records()]
    splits = split_code(codes, language="python", config=config, tokenizer=tokenizer)
    ours = Entries.of(splits, config=config, tokenizer=tokenizer)
    rows, starts = file.all_entries(include_whole=config.whole_entry, head_pieces=head)
    if aggregator == "first":  # has no use for a head
        rows, starts = file.all_entries(include_whole=config.whole_entry)
    assert ours.starts == starts.tolist()
    for mine, theirs in zip(ours.sequences, rows, strict=True):
        assert mine == theirs.tolist()


def test_whole_head_and_blocks_have_their_sizes(folder: Path, tmp_path: Path):
    file = prepared(folder, tmp_path, replace(FINE, budget=50))
    special = len(file.origin.prefix) + len(file.origin.suffix)
    seen = set()
    for index in range(len(file)):
        length, count = file.lengths[index], int(np.diff(file.first_block)[index])
        rows = [row[1:-1] for row in file.entries(index, head_pieces=30)]
        has_head = length > 30 + 16
        seen.add((count > 1, has_head))
        assert len(rows) == count + (count > 1) + has_head
        if count > 1:
            assert len(rows[0]) == min(length, 62)
            for block in rows[2 : 1 + count]:
                assert block[:6].tolist() == rows[0][:6].tolist()
        if has_head:
            assert rows[-1].tolist() == rows[0][:30].tolist()
        assert all(len(row) <= 50 for row in rows[count > 1 :])
        (only,) = file.entries(index, only_whole=True, head_pieces=30)
        assert only.tolist() == file.entries(index)[0].tolist()
    assert special == 2
    assert len(seen) >= 2, seen


def test_vectors_find_their_entries(folder: Path):
    config = SeaConfig(aggregator="soft_maxsim", split=FINE, head_pieces=8)
    tokenizer = SeaTokenizer.from_folder(folder)
    codes = [row["code"] for row in records()[:12]]
    splits = split_code(codes, language="python", config=config, tokenizer=tokenizer)
    entries = Entries.of(splits, config=config, tokenizer=tokenizer)
    # Every sequence's vector says which it is.
    own = np.arange(len(entries.sequences), dtype=np.float32)[:, None]
    found = entries.embeddings(np.zeros((len(codes), 1), np.float32), own, own[:, 0], config=config)
    for row, parts in enumerate(splits):
        start, end = entries.starts[row], entries.starts[row + 1]
        blocks = found.block_vectors[row][:, 0].astype(int).tolist()
        assert [entries.sequences[place][1:-1] for place in blocks] == [
            block.ids for block in parts.blocks
        ]
        every = found.entry_vectors[row][:, 0].astype(int).tolist()
        assert every[: len(blocks)] == blocks
        assert sorted(every) == list(range(start, end))
        assert found.weights[row].tolist() == found.block_vectors[row][:, 0].tolist()
