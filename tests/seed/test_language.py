"""Constrained decoding, growing a language model, adapters, and samples of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from polyzoo.core.errors import ConfigError, DataError, WeightsError
from polyzoo.seed import adapters
from polyzoo.seed.constraint import WellFormedImages
from polyzoo.seed.convert import merge_adapters
from polyzoo.seed.language import (
    Language,
    check_markers,
    grow,
    load_language,
    perplexity,
    register_attention,
    save_language,
    save_tokenizer,
)
from polyzoo.seed.language_data import CaptionSamples, Padding, read_records
from polyzoo.seed.presets import AdapterConfig, LanguageDataConfig
from polyzoo.seed.processor import SeedProcessor
from polyzoo.seed.samples import IGNORED, SampleBuilder, split_turns
from polyzoo.seed.small_tokenizer import small_tokenizer
from polyzoo.seed.text_pieces import TextPieces
from polyzoo.seed.vocabulary import ImageVocabulary
from support.seed_models import WORDS, tokenizer_json

CODES, TOKENS = 16, 4


def words() -> Any:
    return small_tokenizer(TextPieces(Tokenizer.from_str(tokenizer_json())))


def llama(rows: int, *, tied: bool) -> Any:
    register_attention()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48, max_position_embeddings=64,
        tie_word_embeddings=tied, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    shape._attn_implementation = "polyzoo"
    return LlamaForCausalLM(shape).eval()


def opt(rows: int) -> Any:
    torch.manual_seed(0)
    shape = OPTConfig(
        vocab_size=rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48,
        max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=2, eos_token_id=3,
        pad_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(shape).eval()


def language(*, tied: bool = True) -> Language:
    tokenizer, model = words(), llama(len(WORDS), tied=tied)
    vocabulary = grow(model, tokenizer, codes=CODES, tokens_per_image=TOKENS)
    return Language(model.eval(), tokenizer, vocabulary)


class TestGrowing:
    @pytest.mark.parametrize("tied", [True, False])
    def test_old_rows_stay_and_new_ones_are_like_them(self, tied: bool):
        tokenizer, model = words(), llama(len(WORDS), tied=tied)
        before = model.get_input_embeddings().weight.detach().clone()
        vocabulary = grow(model, tokenizer, codes=CODES, tokens_per_image=TOKENS)
        after = model.get_input_embeddings().weight.detach()
        assert vocabulary.shift == len(WORDS)
        assert after.shape[0] == len(tokenizer) == len(WORDS) + CODES + 2
        assert torch.equal(after[: len(WORDS)], before)
        assert float(after[len(WORDS) :].std() / before.std()) == pytest.approx(0.55, abs=0.3)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied

    def test_markers_of_the_tokenizer_win(self, caplog: pytest.LogCaptureFixture):
        model, tokenizer = llama(len(WORDS), tied=True), words()
        model.config.bos_token_id, model.config.eos_token_id = 0, 1
        check_markers(model, tokenizer)
        assert (model.config.bos_token_id, model.generation_config.eos_token_id) == (2, 3)
        assert "the tokenizer's is used" in caplog.text


class TestConstraint:
    """Whatever the model prefers, what it writes can be read."""

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
    def test_every_image_is_well_formed(self, seed: int, temperature: float):
        own = language()
        with torch.no_grad():  # a model that likes brackets and codes
            table = own.model.get_input_embeddings().weight
            table[own.vocabulary.shift :] *= 3
        prompts = [[2, 5, 8], [2, 4, own.vocabulary.begin]]
        answers = own.generate(prompts, new_tokens=29, temperature=temperature, seed=seed)
        for prompt, answer in zip(prompts, answers, strict=True):
            own.vocabulary.parse([*prompt, *answer])
        assert own.vocabulary.images([*prompts[1], *answers[1]])

    def test_none_where_none_is_wanted(self):
        own = language()
        answer = own.generate([[2, 5]], new_tokens=20, images=False, temperature=3.0)[0]
        assert all(token < own.vocabulary.shift for token in answer)

    def test_an_image_that_would_not_fit_is_not_begun(self):
        rules = WellFormedImages(language().vocabulary, max_length=10)
        v = rules.vocabulary
        scores = torch.zeros(1, len(WORDS) + CODES + 2)
        # begin + 4 codes + end need 6 of the 10 places.
        fits = rules(torch.zeros(1, 4, dtype=torch.int64), scores)
        late = rules(torch.zeros(1, 5, dtype=torch.int64), scores)
        assert bool(fits[0, v.begin].isfinite())
        assert not bool(late[0, v.begin].isfinite())

    def test_each_row_has_its_own_state(self):
        v = language().vocabulary
        rules = WellFormedImages(v, max_length=40)
        c = v.shift + 1
        ids = torch.tensor(
            [[5, 5, 5, 5, 5, v.begin], [5, 5, v.begin, c, c, c], [5, v.begin, c, c, c, c],
             [v.begin, c, c, c, c, v.end]]
        )  # fmt: skip
        allowed = rules(ids, torch.zeros(4, len(WORDS) + CODES + 2)).isfinite()
        code = slice(v.shift, v.shift + CODES)
        for row in (0, 1):
            assert bool(allowed[row, code].all())
            assert int(allowed[row].sum()) == CODES
        assert allowed[2].nonzero().flatten().tolist() == [v.end]
        assert not bool(allowed[3, code].any())
        assert bool(allowed[3, v.begin])
        assert not bool(allowed[3, v.end])

    def test_a_model_too_small_for_its_vocabulary(self):
        rules = WellFormedImages(language().vocabulary, max_length=40)
        with pytest.raises(ConfigError, match="the model scores 20 tokens and the vocabulary"):
            rules(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 20))

    def test_bad_sampling(self):
        with pytest.raises(ConfigError, match="must not be negative"):
            language().generate([[2]], new_tokens=4, temperature=-1)
        with pytest.raises(ConfigError, match="no prompt was given"):
            language().generate([], new_tokens=4)


PICTURES = ("red circle", "green square", "blue circle")


def train_pairs(own: Language, *, steps: int, lr: float) -> list[list[int]]:
    """Teach a model three pictures in both directions; return their codes."""
    draws = random.Random(0)
    codes = [[draws.randrange(CODES) for _ in range(TOKENS)] for _ in PICTURES]
    builder = SampleBuilder(own.tokenizer, own.vocabulary, max_length=32)
    batch = Padding(0)(
        [
            builder.caption(c, text, image_first=first, mask_left=True)
            for c, text in zip(codes, PICTURES, strict=True)
            for first in (True, False)
        ]
    )
    parameters = [p for p in own.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    own.model.train()
    for _ in range(steps):
        out = own.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    own.model.eval()
    return codes


def check_pairs(own: Language, codes: list[list[int]]) -> None:
    v = own.vocabulary
    prompts = [[2, *own.tokenizer(text, add_special_tokens=False).input_ids, v.begin]
               for text in PICTURES]  # fmt: skip
    for answer, wanted in zip(own.generate(prompts, new_tokens=8), codes, strict=True):
        assert list(v.images([v.begin, *answer])[0]) == wanted
    told = own.generate([[2, *v.to_ids(c)] for c in codes], new_tokens=6, images=False)
    assert [own.words(answer) for answer in told] == list(PICTURES)


# peft asks transformers for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
class TestAdapters:
    """Learn, write, read, merge: for tied and untied models of two families."""

    @pytest.mark.parametrize("rows", ["new", "all"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_end_to_end(self, tmp_path: Path, tied: bool, rows: Any):
        base = tmp_path / "base"
        tokenizer, plain = words(), llama(len(WORDS), tied=tied)
        plain.save_pretrained(base)
        tokenizer.save_pretrained(base)
        own = language(tied=tied)
        # The grown rows are drawn: the same seed gives load_language the same ones.
        config = AdapterConfig(rank=8, alpha=16.0, dropout=0.0, rows=rows)
        own.model = adapters.adapt(own.model, config, own.vocabulary)
        codes = train_pairs(own, steps=100, lr=2e-2)
        check_pairs(own, codes)
        adapters.save_adapters(tmp_path / "adapters", own.model, base=str(base))
        save_tokenizer(tmp_path / "adapters", own)
        ids = torch.tensor([[2, 5, 8, own.vocabulary.begin, own.vocabulary.shift + 3]])
        with torch.no_grad():
            wanted = own.model(input_ids=ids).logits
            first = load_language(tmp_path / "adapters")
            found = first.model(input_ids=ids).logits
            assert torch.equal(found, load_language(tmp_path / "adapters").model(ids).logits)
        assert torch.equal(found, wanted)
        check_pairs(first, codes)
        merge_adapters(tmp_path / "adapters", tmp_path / "merged")
        merged = load_language(tmp_path / "merged")
        with torch.no_grad():
            torch.testing.assert_close(merged.model(input_ids=ids).logits, wanted, atol=1e-4,
                                       rtol=1e-4)  # fmt: skip
        check_pairs(merged, codes)

    def test_new_rows_only_move_nothing_else(self):
        own = language()
        before = {name: p.detach().clone() for name, p in own.model.named_parameters()}
        config = AdapterConfig(rank=4, dropout=0.0)
        own.model = adapters.adapt(own.model, config, own.vocabulary)
        trained = sum(p.numel() for p in own.model.parameters() if p.requires_grad)
        assert trained < 0.6 * sum(p.numel() for p in before.values())
        train_pairs(own, steps=3, lr=1e-2)
        base = own.model.get_base_model()
        for name, parameter in base.named_parameters():
            plain = name.replace(".base_layer", "").replace(".token_adapter", "")
            if plain in before and not parameter.requires_grad:
                assert torch.equal(parameter, before[plain]), name

    def test_the_opt_family(self):
        model, tokenizer = opt(len(WORDS)), words()
        assert adapters.linear_names(model) == [
            "fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"
        ]  # fmt: skip
        vocabulary = grow(model, tokenizer, codes=CODES, tokens_per_image=TOKENS)
        config = AdapterConfig(rank=8, alpha=16.0, dropout=0.0, rows="all")
        own = Language(adapters.adapt(model, config, vocabulary), tokenizer, vocabulary)
        check_pairs(own, train_pairs(own, steps=250, lr=1e-2))

    def test_a_target_that_names_no_layer(self):
        own = language()
        config = AdapterConfig(targets=("q_proj", "query"))
        with pytest.raises(ConfigError, match="no linear layer is called 'query'; there are down_"):
            adapters.adapt(own.model, config, own.vocabulary)

    def test_another_base(self, tmp_path: Path):
        own = language()
        own.model = adapters.adapt(own.model, AdapterConfig(), own.vocabulary)
        adapters.save_adapters(tmp_path / "adapters", own.model, base="x")
        save_tokenizer(tmp_path / "adapters", own)
        other = words()
        other.add_tokens(["more", "words"])
        llama(len(other), tied=True).save_pretrained(tmp_path / "base")
        other.save_pretrained(tmp_path / "base")
        with pytest.raises(ConfigError, match="it is another base model, or its tokenizer"):
            load_language(tmp_path / "adapters", base=tmp_path / "base")
        with pytest.raises(WeightsError, match="is no causal language model"):
            load_language(tmp_path / "adapters", base=tmp_path / "nothing")


class TestFolders:
    def test_int8_and_back(self, tmp_path: Path):
        own = language()
        save_language(tmp_path, own, int8=True)
        again = load_language(tmp_path)
        ids = torch.tensor([[2, 5, 8]])
        with torch.no_grad():
            found, wanted = (m.model(input_ids=ids).logits for m in (again, own))
        assert float((found - wanted).abs().max()) < 0.05
        assert again.vocabulary == own.vocabulary

    def test_a_model_that_never_saw_images(self, tmp_path: Path):
        llama(len(WORDS), tied=True).save_pretrained(tmp_path)
        with pytest.raises(DataError, match="this language model has not learned images"):
            load_language(tmp_path)

    def test_a_changed_tokenizer(self, tmp_path: Path):
        own = language()
        save_language(tmp_path, own)
        own.tokenizer.add_tokens(["more"])
        own.tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="the tokenizer was changed after training"):
            load_language(tmp_path)

    def test_perplexity_is_that_of_the_slow_way(self):
        own, text = language(), "a red circle in a blue square , the flat style of a picture"
        ids = own.tokenizer(text, add_special_tokens=False).input_ids
        total = 0.0
        with torch.no_grad():
            for place in range(1, len(ids)):
                logits = own.model(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
                total -= float(logits.log_softmax(0)[ids[place]])
        wanted = float(np.exp(total / (len(ids) - 1)))
        assert perplexity(own, text) == pytest.approx(wanted, rel=1e-4)


class TestSamples:
    def builder(self, **more: Any) -> SampleBuilder:
        own = language()
        return SampleBuilder(own.tokenizer, own.vocabulary, max_length=more.pop("length", 32))

    def test_both_directions_and_views(self):
        builder = self.builder()
        codes = np.arange(16).reshape(2, 2, 4)
        config = LanguageDataConfig(draw=0.5)
        samples = CaptionSamples(codes, [["red"], ["blue"]], builder, config, prompts=[["a"], []])
        seen = {tuple(samples[0].ids) for _ in range(200)}
        v = builder.vocabulary
        told = {ids for ids in seen if ids[1] == v.begin}
        drawn = seen - told
        assert {v.images(ids)[0] for ids in told} == {(0, 1, 2, 3), (4, 5, 6, 7)}
        assert {v.images(ids)[0] for ids in drawn} == {(0, 1, 2, 3)}
        assert len(drawn) == 2  # its caption, and the further prompt

    def test_plain_text_keeps_its_share(self, tmp_path: Path):
        (tmp_path / "text.txt").write_text("a red circle in a blue square\n\nshort")
        config = LanguageDataConfig(text=tmp_path / "text.txt", text_share=0.5)
        samples = CaptionSamples(np.zeros((1, 1, 4), int), [["red"]], self.builder(), config)
        plain = [samples[0] for _ in range(200)]
        share = sum(samples.builder.vocabulary.begin not in s.ids for s in plain) / 200
        assert 0.35 < share < 0.65

    def test_filtered_samples_count_nothing(self):
        builder = self.builder()
        sample = builder.caption([0, 1, 2, 3], " .,", image_first=True)
        assert not sample.keep
        batch = Padding(0)([sample, builder.caption([0, 1, 2, 3], "red", image_first=True)])
        assert bool((batch["labels"][0] == IGNORED).all())
        assert int(batch["filtered"]) == 1
        assert bool((batch["labels"][1] != IGNORED).any())

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"image_ids": [0, 1, 2, 3]}, "needs the text field 'text'; image_ids alone"),
            ({"image_ids": [0, 1, 2, 3], "question": "a"}, "needs the text field 'answer'"),
            ({"image_ids": [0, 1, 2], "text": "red"}, "an image has 4 codes, not 3"),
            ({"image_ids": [0, 1, 2, 99], "text": "red"}, "code 99 lies outside 0 to 15; this"),
            ({"image_ids": [0, 1, 2], "answer": "red"}, "3 codes are no whole number of images"),
            ({"image_ids": [None, None], "texts": ["a", None]}, "exactly one of image and text"),
            ({"image_ids": [0, 1, 2, 3], "question": "Question: a Question: b",
              "answer": "Answer: c"}, "2 questions and 1 answers do not pair up"),
        ],
    )  # fmt: skip
    def test_bad_records(self, record: dict[str, Any], message: str):
        with pytest.raises(DataError, match=message):
            self.builder().record(record, draw=0.5, generator=random.Random(0))

    def test_turns(self):
        assert split_turns("Question: a? Question: b?", "Answer: c Answer: d") == [
            ("a?", "c"), ("b?", "d")
        ]  # fmt: skip
        assert split_turns("a?", "c") == [("a?", "c")]

    def test_records_on_disk(self, tmp_path: Path):
        path = tmp_path / "records.jsonl"
        path.write_text('{"text": "a"}\n[1]\n')
        with pytest.raises(DataError, match="line 2: expected an object"):
            read_records(path)
        path.write_text("{")
        with pytest.raises(DataError, match="line 1: not JSON"):
            read_records(path)


class TestProcessor:
    def test_text_and_images_there_and_back(self, tmp_path: Path):
        own = language()
        processor = SeedProcessor(own.tokenizer, own.vocabulary)
        ids = processor.ids(["a red circle", [1, 2, 3, 4], "in the picture", [5, 6, 7, 8]])
        assert processor.decode(ids) == ["a red circle", (1, 2, 3, 4), "in the picture",
                                         (5, 6, 7, 8)]  # fmt: skip
        batch = processor([["red"], ["a red circle", [1, 2, 3, 4]]], labels=True)
        assert batch["input_ids"].shape == batch["labels"].shape == (2, 10)
        assert int((batch["labels"] != IGNORED).sum()) == int(batch["attention_mask"].sum()) == 12
        assert processor([["red"], ["a red"]])["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
        processor.save_pretrained(tmp_path)
        assert SeedProcessor.from_pretrained(tmp_path).ids(["red", [1, 2, 3, 4]]) == (
            processor.ids(["red", [1, 2, 3, 4]])
        )

    @pytest.mark.parametrize("template", ["plain", "vicuna", "llama2"])
    def test_turns_continue(self, template: Any):
        own = language()
        processor = SeedProcessor(own.tokenizer, own.vocabulary)
        first = processor.turn(["a", [1, 2, 3, 4]], template=template)
        second = processor.turn(["a"], template=template, first=False)
        assert first[0] == own.tokenizer.bos_token_id
        assert own.tokenizer.bos_token_id not in second
        assert own.vocabulary.images(first) == [(1, 2, 3, 4)]

    def test_what_it_cannot_do(self):
        own = language()
        processor = SeedProcessor(own.tokenizer, own.vocabulary)
        with pytest.raises(DataError, match="this processor has no image tokenizer"):
            processor.ids([Path("a.png")])
        with pytest.raises(DataError, match="the batch is empty"):
            processor([])


def test_vocabulary_survives_as_json(tmp_path: Path):
    vocabulary = language().vocabulary
    vocabulary.save(tmp_path)
    stored = json.loads((tmp_path / "image_vocabulary.json").read_text(encoding="utf-8"))
    assert stored["shift"] == len(WORDS)
    assert ImageVocabulary.load(tmp_path) == vocabulary
