"""Token strings, prompts and training samples against the stored facts of the reference."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.seed.samples import DRAW_ANSWERS, DRAW_REQUESTS, IGNORED, Sample, SampleBuilder
from polyzoo.seed.vocabulary import ImageVocabulary
from support.parity import case_folders


@cache
def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))


@cache
def extended(folder: Path) -> tuple[Any, ImageVocabulary]:
    stored = facts(folder)
    # legacy: every stretch of text between added tokens gets its own leading blank, as published.
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), legacy=True, add_bos_token=True)
    assert len(tokenizer) == stored["base_vocab_size"]
    vocabulary = ImageVocabulary.extend(
        tokenizer,
        codes=stored["num_image_codes"],
        tokens_per_image=stored["tokens_per_image"],
    )
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer, vocabulary


def folders(config: pytest.Config) -> list[Path]:
    return [
        path.parent
        for folder in case_folders(config, "seed")
        for path in sorted(Path(folder).rglob("facts.json"))
        if (path.parent / "tokenizer.model").is_file()
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = folders(metafunc.config)
    if "facts_folder" in metafunc.fixturenames:
        metafunc.parametrize("facts_folder", found, ids=[folder.name for folder in found])
    if "stored_sample" in metafunc.fixturenames:
        samples = [(f, sample) for f in found for sample in facts(f)["training_samples"]]
        metafunc.parametrize("stored_sample", samples, ids=[s["kind"] for _, s in samples])


def test_a_case_is_stored(pytestconfig: pytest.Config):
    if not pytestconfig.getoption("--parity-dir"):
        assert folders(pytestconfig)


class TestIds:
    def test_where_codes_and_brackets_are(self, facts_folder: Path):
        stored, (tokenizer, vocabulary) = facts(facts_folder), extended(facts_folder)
        assert vocabulary.shift == stored["image_id_shift"] == stored["first_code_id"]
        assert vocabulary.shift + vocabulary.codes - 1 == stored["last_code_id"]
        assert (vocabulary.begin, vocabulary.end) == (stored["boi_id"], stored["eoi_id"])
        assert len(tokenizer) == stored["tokenizer_length"]
        for name in ("bos", "eos", "unk"):
            assert getattr(tokenizer, f"{name}_token_id") == stored[f"{name}_id"]

    def test_prompts(self, facts_folder: Path):
        tokenizer, _ = extended(facts_folder)
        for case in facts(facts_folder)["encode_no_special"]:
            assert tokenizer(case["text"], add_special_tokens=False).input_ids == case["ids"]
        default = facts(facts_folder)["encode_default"]
        assert tokenizer(default["text"]).input_ids == default["ids"]

    def test_reading_an_answer(self, facts_folder: Path):
        _, vocabulary = extended(facts_folder)
        case = facts(facts_folder)["parse_generated"]
        spans = vocabulary.parse(case["ids"])
        assert [span.kind for span in spans] == ["text", "image", "text"]
        assert list(spans[1].ids) == case["codes"]
        assert len(spans[0].ids) == case["boi_pos"]

    def test_a_second_extension_changes_nothing(self, facts_folder: Path):
        tokenizer, vocabulary = extended(facts_folder)
        again = ImageVocabulary.extend(
            tokenizer, codes=vocabulary.codes, tokens_per_image=vocabulary.tokens_per_image
        )
        assert again == vocabulary

    def test_saved_and_read_again(self, facts_folder: Path, tmp_path: Path):
        tokenizer, vocabulary = extended(facts_folder)
        vocabulary.save(tmp_path)
        assert ImageVocabulary.load(tmp_path) == vocabulary
        vocabulary.check(tokenizer, rows=len(tokenizer))


def built(builder: SampleBuilder, stored: dict[str, Any]) -> list[Sample]:
    """Our sample, or every one that a random choice of the reference allows."""
    kind, sample, arguments = stored["kind"], stored["sample"], stored["args"]
    reverse = arguments.get("reverse_ratio", 0.0) == 1.0
    if "text->image" in kind and kind.startswith("sft"):
        return [
            builder.draw(sample["image_ids"], sample["text"], request=request, answer=answer)
            for request in DRAW_REQUESTS
            for answer in DRAW_ANSWERS
        ]
    if kind.startswith("pretrain_caption"):
        return [
            builder.caption(
                sample["image_ids"],
                sample["text"],
                image_first=reverse,
                mask_left=arguments.get("mask_left_label", False),
            )
        ]
    if kind.startswith("interleaved"):
        return [
            builder.interleaved(
                sample["image_ids"],
                sample["texts"],
                reverse=reverse,
                max_images=arguments["max_images"],
            )
        ]
    return [builder.record(sample, draw=0.0, generator=random.Random(0))]


class TestTrainingSamples:
    def test_ids_labels_and_filter(self, stored_sample: tuple[Path, dict[str, Any]]):
        folder, stored = stored_sample
        tokenizer, vocabulary = extended(folder)
        wanted = stored["out"]
        builder = SampleBuilder(
            tokenizer,
            vocabulary,
            max_length=stored["args"]["max_length"],
            truncation="reference",
        )
        real = sum(wanted["attention_mask"])
        ids, labels = wanted["input_ids"][:real], wanted["labels"][:real]
        candidates = built(builder, stored)
        assert any(s.ids == ids and s.labels == labels for s in candidates)
        assert set(wanted["labels"][real:]) <= {IGNORED}
        if wanted.get("filter_flag") is not None:
            assert {s.keep for s in candidates} == {wanted["filter_flag"]}


class TestTruncation:
    """Ours drops an image that does not fit, and counts it."""

    @pytest.mark.parametrize("length", range(8, 60, 5))
    def test_no_half_image_is_left(self, facts_folder: Path, length: int):
        tokenizer, vocabulary = extended(facts_folder)
        builder = SampleBuilder(tokenizer, vocabulary, max_length=length)
        codes = list(range(vocabulary.tokens_per_image))
        sample = builder.caption(codes, "a red car near the house", image_first=False)
        assert len(sample.ids) <= length
        vocabulary.parse(sample.ids)
        whole = vocabulary.end in sample.ids
        assert sample.cut == (0 if whole or vocabulary.begin not in _cut_at(builder, codes, length)
                              else 1)  # fmt: skip


def _cut_at(builder: SampleBuilder, codes: list[int], length: int) -> list[int]:
    long = SampleBuilder(builder.tokenizer, builder.vocabulary, max_length=10_000)
    return long.caption(codes, "a red car near the house", image_first=False).ids[:length]


def plain_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder))


class TestErrors:
    vocabulary = ImageVocabulary(shift=100, codes=64, tokens_per_image=4, begin=164, end=165)

    def test_a_language_models_ids_given_for_codes(self):
        with pytest.raises(DataError, match=r"code 130 lies outside 0 to 63.*subtract the shift"):
            self.vocabulary.to_ids([1, 2, 130, 3])

    def test_another_number_of_codes(self):
        with pytest.raises(DataError, match="an image has 4 codes, not 3"):
            self.vocabulary.to_ids([1, 2, 3])

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([164, 101, 102], "has 2 codes and then the end"),
            ([164, 101, 102, 103, 104], "has 4 codes and then the end; it must have 4"),
            ([164, 101, 102, 165], "has 2 codes and then id 165"),
            ([164, 101, 102, 103, 104, 105, 165], "has 4 codes and then id 105"),
            ([5, 101], "<img_00001> at position 1 stands outside an image"),
            ([5, 165], "</img> at position 1 stands outside an image"),
        ],
    )
    def test_malformed_images(self, ids: list[int], message: str):
        with pytest.raises(DataError, match=message):
            self.vocabulary.parse(ids)

    def test_a_tokenizer_of_another_codebook(self):
        tokenizer = small()
        ImageVocabulary.extend(tokenizer, codes=8, tokens_per_image=4)
        with pytest.raises(ConfigError, match="extended for another codebook"):
            ImageVocabulary.extend(tokenizer, codes=16, tokens_per_image=4)

    def test_a_tokenizer_changed_after_training(self):
        tokenizer = small()
        vocabulary = ImageVocabulary.extend(tokenizer, codes=8, tokens_per_image=4)
        tokenizer.add_tokens(["more"])
        with pytest.raises(ConfigError, match="changed after training"):
            vocabulary.check(tokenizer)

    def test_a_model_smaller_than_its_tokenizer(self):
        tokenizer = small()
        vocabulary = ImageVocabulary.extend(tokenizer, codes=8, tokens_per_image=4)
        with pytest.raises(ConfigError, match="has 5 embeddings and the tokenizer"):
            vocabulary.check(tokenizer, rows=5)


def small() -> Any:
    from tokenizers import Tokenizer, models

    table = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, "a": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(table, unk_token="[UNK]")),
        bos_token="[BOS]",
        eos_token="[EOS]",
    )
