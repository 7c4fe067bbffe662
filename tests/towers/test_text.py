"""Text towers: the same vectors as the published way of computing them, whatever the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

from polyzoo.attention.integrations.transformers import register
from polyzoo.core.assets import is_present
from polyzoo.core.errors import ConfigError, DataError
from polyzoo.towers import load_text_tower
from polyzoo.towers.text import MiniLM, WordLlama
from support.tower_samples import WORDS, randomised, word_tokenizer

TEXTS = ["a photo of a cat", "kitten", "a racing car a racing car of a cat", "zebra"]
PAIRS = [
    "a photo of a cat",
    "a kitten",
    "a racing car",
    "how do I sort a list in python?",
    "def sort_list(xs): return sorted(xs)",
]


def bert(attention: str) -> BertModel:
    register()
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    config._attn_implementation = attention
    model = randomised(BertModel(config, add_pooling_layer=False))
    assert isinstance(model, BertModel)
    return model


def minilm() -> MiniLM:
    return MiniLM(bert("polyzoo"), word_tokenizer()).eval()


def wordllama() -> WordLlama:
    table = torch.randn(len(WORDS), 8, generator=torch.Generator().manual_seed(0))
    return WordLlama(table, word_tokenizer())


def test_minilm_is_the_mean_of_berts_states() -> None:
    """Each text alone through transformers' own attention, without any padding."""
    tower, plain = minilm(), bert("eager")
    vectors, (states, lens) = tower.encode(TEXTS), tower.states(TEXTS)
    assert vectors.dtype == torch.float32
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([word_tokenizer().encode(text).ids])
        with torch.no_grad():
            alone = plain(input_ids=ids).last_hidden_state[0]
        n = len(alone)
        assert lens[row] == n
        torch.testing.assert_close(states[row, :n], alone, rtol=1e-4, atol=1e-5)
        assert not states[row, n:].any()
        expected = F.normalize(alone.mean(0), dim=0)
        torch.testing.assert_close(vectors[row], expected, rtol=1e-4, atol=1e-5)


def test_wordllama_is_the_mean_of_its_rows() -> None:
    tower = wordllama()
    vectors, (states, lens) = tower.encode(TEXTS), tower.states(TEXTS)
    for row, text in enumerate(TEXTS):
        known = [WORDS.index(w) if w in WORDS else 1 for w in text.split()]
        rows = tower.table[known]
        assert lens[row] == len(known)
        torch.testing.assert_close(states[row, : len(known)], rows, rtol=0, atol=0)
        assert not states[row, len(known) :].any()
        expected = rows.mean(0) / rows.mean(0).norm()
        torch.testing.assert_close(vectors[row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [minilm, wordllama])
def test_a_text_does_not_depend_on_the_others(make: type) -> None:
    tower = make()
    many = [TEXTS[i % 4] + " a" * (i % 7) for i in range(150)]  # more than one batch
    together = tower.encode(many)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(150), rtol=1e-5, atol=1e-5)
    for i in (0, 1, 77, 149):
        torch.testing.assert_close(together[i], tower.encode([many[i]])[0], rtol=1e-4, atol=1e-5)


def test_texts_without_words() -> None:
    assert not wordllama().encode(["", "cat"])[0].any()
    states, lens = minilm().states([""])
    assert lens.tolist() == [2]  # its own two marks
    assert states.isfinite().all()


def test_long_texts_are_cut() -> None:
    tower = MiniLM(bert("polyzoo"), word_tokenizer(), max_pieces=8)
    assert tower.states(["cat " * 50])[1].tolist() == [8]


@pytest.mark.parametrize("make", [minilm, wordllama])
def test_bad_texts_are_named(make: type) -> None:
    with pytest.raises(DataError, match=r"texts is one string \('cat'\); give a list"):
        make().encode("cat")
    with pytest.raises(DataError, match="no texts: give at least one"):
        make().encode([])


def test_an_unknown_tower_is_named() -> None:
    with pytest.raises(ConfigError, match="no text tower 'clip'; there are minilm and wordllama"):
        load_text_tower("clip")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dim", "cosines"),
    [("minilm", 384, (0.6125, 0.1683, 0.7343)), ("wordllama", 256, (0.5185, 0.0718, 0.5283))],
)
def test_the_real_towers_give_the_known_cosines(
    name: str, dim: int, cosines: tuple[float, ...]
) -> None:
    """To two places they are those measured with the packages' own code."""
    if not is_present(name):
        pytest.skip(f"asset {name} is not fetched; lifted by: polyzoo assets fetch {name}")
    state = torch.get_rng_state()
    tower = load_text_tower(name)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    vectors = tower.encode(PAIRS)
    assert vectors.shape == (5, dim)
    assert tower.dim == dim
    found = torch.stack([vectors[0] @ vectors[1], vectors[0] @ vectors[2], vectors[3] @ vectors[4]])
    torch.testing.assert_close(found, torch.tensor(cosines), rtol=0, atol=2e-4)
