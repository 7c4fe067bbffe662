"""Bad training and evaluation files: each fault has its message."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from polyzoo.core.errors import DataError
from polyzoo.sea.config import SplitConfig
from polyzoo.sea.data import read_negatives
from polyzoo.sea.evaluation import find_answers
from polyzoo.sea.prepare import Preparation, prepare_file, prepare_records
from polyzoo.sea.prepared import Prepared
from polyzoo.sea.records import read_records
from support.sea_models import encoder_folder, records, write_jsonl

GOOD = {
    "url": "a", "language": "python", "original_string": "def f():\n    return 1\n",
    "docstring_tokens": ["gives", "one"],
}  # fmt: skip


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.fixture(scope="module")
def preparation(tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    folder = encoder_folder(tmp_path_factory.mktemp("encoder") / "e")
    return Preparation(
        tokenizer_folder=str(folder), split=SplitConfig(budget=62), max_query_tokens=16
    )


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{not json", "line 2: not valid JSON"),
        ("[1]", "line 2: a JSON object is wanted, this is list"),
        (without("url"), "line 2: no url"),
        (GOOD, "line 2: url 'a' was already used in line 1"),
        ({**GOOD, "url": "b", "docstring_tokens": []}, "line 2: docstring_tokens is empty"),
        ({**without("docstring_tokens"), "url": "b"}, "line 2: no docstring_tokens"),
        ({**GOOD, "url": "b", "docstring_tokens": [1]}, "line 2: docstring_tokens must be"),
        ({**without("original_string"), "url": "b"}, "line 2: neither 'original_string' nor"),
        ({**GOOD, "url": "b", "original_string": " \n"}, "line 2: the function 'b' is empty"),
        ({**without("language"), "url": "b"}, "line 2: no language, and none was given; known"),
        ({**GOOD, "url": "b", "language": "cobol"}, "language 'cobol' is unknown; known: python"),
    ],
)
def test_fault_and_line(tmp_path: Path, second: object, message: str):
    line = second if isinstance(second, str) else json.dumps(second)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_one_language_asked_for_and_another_found(tmp_path: Path):
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD, {**GOOD, "url": "b", "language": "go"}])
    with pytest.raises(DataError, match="line 2: language 'go', but 'python' was asked for"):
        read_records(path, language="python")
    assert [record.language for record in read_records(path)] == ["python", "go"]


def test_files_that_are_not_what_they_say(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "absent.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="no records"):
        read_records(empty)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(GOOD).encode() + b'\n{"url": "\xe9"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_records(latin)
    cut = tmp_path / "cut.jsonl.gz"
    rows = "".join(json.dumps({**GOOD, "url": str(row)}) + "\n" for row in range(100))
    cut.write_bytes(gzip.compress(rows.encode())[:-20])
    with pytest.raises(DataError, match="broken gzip file"):
        read_records(cut)


def test_bom_blank_lines_crlf_and_gzip(tmp_path: Path):
    path = tmp_path / "odd.jsonl"
    content = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n"
    path.write_bytes(content)
    (tmp_path / "odd.jsonl.gz").write_bytes(gzip.compress(content))
    assert read_records(path) == read_records(tmp_path / "odd.jsonl.gz")
    assert read_records(path)[0].query == "gives one"


def test_comment_only_function_is_named(tmp_path: Path, preparation: Preparation):
    path = write_jsonl(tmp_path / "d.jsonl", [{**GOOD, "original_string": "# nothing\n"}])
    with pytest.raises(DataError, match=r"^a: "):
        prepare_file(path, preparation)


def test_query_without_answer(tmp_path: Path, preparation: Preparation):
    rows = records()
    everything = prepare_file(write_jsonl(tmp_path / "all.jsonl", rows), preparation)
    with pytest.raises(DataError) as caught:
        find_answers(everything, everything.take(range(4, 100)))
    assert "4 queries have no function in the codebase" in str(caught.value)
    assert "u/read/file" in str(caught.value)
    assert "u/read/image" not in str(caught.value)  # only the first three


def test_hard_negatives(tmp_path: Path, preparation: Preparation):
    prepared = prepare_file(write_jsonl(tmp_path / "all.jsonl", records()[:5]), preparation)
    row = {"url": "u/read/file", "negatives": ["u/read/list", "u/read/table"]}
    assert read_negatives(write_jsonl(tmp_path / "n.jsonl", [row]), prepared)[0] == [1, 2]
    bad = write_jsonl(tmp_path / "m.jsonl", [{**row, "negatives": ["nowhere"]}])
    with pytest.raises(
        DataError, match=r"1 urls are not in the training file, first \['nowhere'\]"
    ):
        read_negatives(bad, prepared)
    with pytest.raises(DataError, match="line 1"):
        read_negatives(write_jsonl(tmp_path / "o.jsonl", [{"url": 1}]), prepared)


class TestPreparedFile:
    def test_round_trip_and_workers(self, tmp_path: Path, preparation: Preparation):
        rows = read_records(write_jsonl(tmp_path / "d.jsonl", records()))
        one = prepare_records(rows, preparation, workers=1)
        two = prepare_records(rows, preparation, workers=2)
        one.save(tmp_path / "p.npz")
        read = Prepared.load(tmp_path / "p.npz")
        for other in (two, read):
            assert other.urls == one.urls
            assert other.origin.split == one.origin.split
            for name in ("queries", "blocks", "wholes"):
                assert np.array_equal(getattr(other, name).flat, getattr(one, name).flat)
                assert np.array_equal(getattr(other, name).starts, getattr(one, name).starts)
            for name in ("first_block", "lengths", "query_hash", "code_hash"):
                assert np.array_equal(getattr(other, name), getattr(one, name))

    def test_blocks_are_the_function(self, tmp_path: Path, preparation: Preparation):
        prepared = prepare_file(write_jsonl(tmp_path / "d.jsonl", records()), preparation)
        several = 0
        for index in range(len(prepared)):
            first, last = prepared.first_block[index : index + 2]
            blocks = [prepared.blocks[row] for row in range(first, last)]
            assert sum(map(len, blocks)) == prepared.lengths[index]
            if len(blocks) > 1:
                several += 1
                joined = np.concatenate(blocks)
                assert np.array_equal(prepared.wholes[index], joined[:62])
            assert len(prepared.entries(index)) == len(blocks) + (len(blocks) > 1)
            assert len(prepared.entries(index, only_whole=True)) == 1
        assert several == 20

    def test_cache_follows_content_and_settings(self, tmp_path: Path, preparation: Preparation):
        cache = tmp_path / "cache"
        path = write_jsonl(tmp_path / "d.jsonl", records()[:10])
        prepare_file(path, preparation, cache_folder=cache)
        (first,) = cache.iterdir()
        stamp = first.stat().st_mtime_ns
        prepare_file(path, preparation, cache_folder=cache)
        assert first.stat().st_mtime_ns == stamp
        write_jsonl(path, records()[:11])
        assert len(prepare_file(path, preparation, cache_folder=cache)) == 11
        other = Preparation(
            tokenizer_folder=preparation.tokenizer_folder, split=SplitConfig(budget=30)
        )
        prepare_file(path, other, cache_folder=cache)
        assert len(list(cache.iterdir())) == 3
        first.write_bytes(b"damaged")
        write_jsonl(path, records()[:10])
        assert len(prepare_file(path, preparation, cache_folder=cache)) == 10

    def test_other_settings_and_damage_are_refused(self, tmp_path: Path, preparation: Preparation):
        path = tmp_path / "p.npz"
        prepare_file(write_jsonl(tmp_path / "d.jsonl", records()[:5]), preparation).save(path)
        other = Preparation(
            tokenizer_folder=preparation.tokenizer_folder, split=SplitConfig(budget=30),
            max_query_tokens=16,
        )  # fmt: skip
        with pytest.raises(DataError, match="prepared with other splitter settings"):
            prepare_file(path, other)
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(DataError, match="or a broken one"):
            prepare_file(path, preparation)
