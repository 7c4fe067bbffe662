"""Evaluation from file to figures: protocols, baselines, conversion, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from polyzoo.core.errors import ConfigError, DataError, WeightsError
from polyzoo.sea import evaluation
from polyzoo.sea.convert import convert_checkpoint, convert_cosqa
from polyzoo.sea.evaluate import main
from polyzoo.sea.folders import build_bare, load_folder, save_folder
from polyzoo.sea.options import EvalConfig
from polyzoo.sea.pipeline import SeaPipeline
from polyzoo.sea.prepare import Preparation, prepare_file
from support.cli import run_cli, run_python
from support.sea_models import encoder_folder, records, shape, write_jsonl


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, queries and a codebase."""
    folder = tmp_path_factory.mktemp("eval")
    encoder = encoder_folder(folder / "encoder", hidden=32)
    loaded = build_bare(shape(encoder, raw="whole"))
    save_folder(folder / "model", loaded.model, tokenizer_folder=encoder)
    write_jsonl(folder / "queries.jsonl", records()[:30])
    write_jsonl(folder / "codebase.jsonl", records())
    return folder


def config(work: Path, **changes: object) -> EvalConfig:
    given = {
        "data": work / "queries.jsonl", "codebase": work / "codebase.jsonl",
        "model": str(work / "model"), "device": "cpu", "cache": False, **changes,
    }  # fmt: skip
    return EvalConfig(**given)  # pyright: ignore[reportArgumentType]


def test_figures_agree_with_the_ranks_file(work: Path, tmp_path: Path):
    report = main(config(work, ranks=tmp_path / "ranks.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert [row["url"] for row in rows] == [row["url"] for row in records()[:30]]
    for name, mrr in (
        ("model", report.mrr),
        ("truncated", report.baselines["truncated"]["mrr"]),
        ("tfidf", report.baselines["tfidf"]["mrr"]),
    ):
        assert np.mean([1 / row[name] for row in rows]) == pytest.approx(mrr)
    assert (report.pool, report.queries) == (100, 30)
    assert sum(report.by_length[name].n for name in ("<=256", ">256")) == 30
    assert report.baselines["tfidf"]["mrr"] > 0.5  # the words of the queries are in the names


def test_ranks_equal_the_pipelines_own_scores(work: Path):
    report = main(config(work, baselines=False))
    pipeline = SeaPipeline.from_pretrained(work / "model", device="cpu")
    rows = records()
    codes = pipeline.embed_code([row["code"] for row in rows], language="python")
    asked = pipeline.embed_queries([" ".join(row["docstring_tokens"]) for row in rows[:30]])
    scores = pipeline.score(asked, codes)
    ranks = [(line >= line[row]).sum() for row, line in enumerate(scores)]
    assert np.mean([1 / rank for rank in ranks]) == pytest.approx(report.mrr, abs=1e-3)


@pytest.mark.parametrize("aggregator", ["first", "maxsim", "mean"])
def test_other_combinations_of_the_blocks(work: Path, aggregator: str):
    report = main(config(work, aggregator=aggregator))
    if aggregator == "first":
        assert report.mrr == pytest.approx(report.baselines["truncated"]["mrr"])
    with pytest.raises(ConfigError, match="has weights of its own"):
        main(config(work, aggregator="attn2"))


def test_candidates_are_treated_alike_whoever_is_the_answer(work: Path):
    """Which functions are answers does not move any vector, but for the released protocol."""
    loaded = load_folder(work / "model")
    preparation = Preparation(
        tokenizer_folder=str(loaded.tokenizer_folder), split=loaded.config.split,
        max_query_tokens=loaded.config.max_query_tokens,
    )  # fmt: skip
    codebase = prepare_file(work / "codebase.jsonl", preparation)
    one = evaluation.embed(loaded.model, codebase.take(range(30)), codebase)
    two = evaluation.embed(loaded.model, codebase.take(range(99, 69, -1)), codebase)
    assert torch.equal(one.codes.vectors, two.codes.vectors)
    some, others = np.arange(30), np.arange(70, 100)
    plain = build_bare(shape(work / "encoder", normalize=False, aggregator="attn1_sum")).model
    embedded = evaluation.embed(plain, codebase.take(some), codebase)
    first = evaluation.released_scores(plain, embedded, some)(0, 30)
    second = evaluation.released_scores(plain, embedded, others)(0, 30)
    single = np.flatnonzero(np.diff(codebase.first_block) == 1)
    answer = next(row for row in single if row < 30)
    assert first[:, answer] == pytest.approx(1.5 * second[:, answer], rel=1e-5)


def test_released_protocol_is_only_for_models_it_was_published_with(work: Path):
    with pytest.raises(ConfigError, match="without normalisation"):
        main(config(work, protocol="released"))
    loaded = build_bare(shape(work / "encoder", normalize=False, aggregator="attn1_sum"))
    save_folder(work / "published", loaded.model, tokenizer_folder=work / "encoder")
    full = main(config(work, model=str(work / "published"), baselines=False))
    released = main(config(work, model=str(work / "published"), protocol="released"))
    assert released.mrr != full.mrr
    assert "compare with nothing but the published ones" in released.notes[0]
    assert not full.notes


def test_queries_may_share_an_answer_but_functions_not_a_url(work: Path, tmp_path: Path):
    rows = records()[:3]
    shared = [{**rows[0], "id": "q1"}, {**rows[0], "id": "q2"}, {**rows[1], "id": "q3"}]
    path = write_jsonl(tmp_path / "q.jsonl", shared)
    assert main(config(work, data=path, baselines=False)).queries == 3
    with pytest.raises(DataError, match="url 'u/read/file' was already used in line 1"):
        main(config(work, data=path, codebase=None))


def test_vector_that_is_not_finite_names_its_function(work: Path):
    loaded = load_folder(work / "model")
    name = "encoder.model.embeddings.word_embeddings.weight"
    table = loaded.model.get_parameter(name)
    row = loaded.tokenizer.vocabulary()["parse"]
    table.data[row] = float("nan")
    preparation = Preparation(
        tokenizer_folder=str(loaded.tokenizer_folder), split=loaded.config.split,
        max_query_tokens=loaded.config.max_query_tokens,
    )  # fmt: skip
    codebase = prepare_file(work / "codebase.jsonl", preparation)
    with pytest.raises(DataError, match="^u/parse/file: its vector holds NaN or inf"):
        evaluation.embed(loaded.model, codebase.take([0]), codebase)


class TestConvert:
    def test_official_checkpoint(self, work: Path, tmp_path: Path):
        folder = roberta_folder(tmp_path / "roberta")
        from transformers import RobertaModel

        torch.manual_seed(2)
        model = RobertaModel.from_pretrained(folder)
        state = {f"module.encoder.{k}": v for k, v in model.state_dict().items()}
        state["module.encoder.embeddings.position_ids"] = torch.arange(64)[None]
        fusion = {
            "module.fusion_layer.embedding_common.0.weight": torch.randn(1, 32),
            "module.fusion_layer.embedding_common.0.bias": torch.randn(1),
            "module.fusion_layer.global_emb_weight_net.weight": torch.ones(1, 1),
        }
        path = tmp_path / "model.best.bin"
        torch.save(state | fusion, path)
        convert_checkpoint(path, tmp_path / "out", encoder=str(folder), aggregator="attn1_sum")
        loaded = load_folder(tmp_path / "out")
        ids = [[0, 5, 7, 2], [0, 9, 2]]
        with torch.no_grad():
            wanted = [model.eval()(torch.tensor([row])).pooler_output[0] for row in ids]
        assert torch.allclose(loaded.model.embed_queries(ids), torch.stack(wanted), atol=1e-5)
        assert loaded.config.split.profile == "released"
        torch.save(state, path)
        with pytest.raises(WeightsError, match=r"holds no fusion_layer\.\*"):
            convert_checkpoint(path, tmp_path / "o", encoder=str(folder), aggregator="attn1_sum")
        convert_checkpoint(path, tmp_path / "o", encoder=str(folder), aggregator="mean")

    def test_cosqa_layout(self, tmp_path: Path):
        codes = {'def f():\n    """Doc."""\n    return 1': 0, "def g(x):\n    return x": 1}
        (tmp_path / "codes.txt").write_text(json.dumps(codes))
        asked = [{"doc": "one", "retrieval_idx": 0}, {"doc": "a unit", "retrieval_idx": 0}]
        (tmp_path / "q.json").write_text(json.dumps(asked))
        report = convert_cosqa(tmp_path / "codes.txt", tmp_path / "q.json", tmp_path / "out")
        assert (report.records, report.queries) == (2, 2)
        (tmp_path / "q.json").write_text(json.dumps([{"doc": "one", "retrieval_idx": 7}]))
        with pytest.raises(DataError, match="entry 0 points to code 7"):
            convert_cosqa(tmp_path / "codes.txt", tmp_path / "q.json", tmp_path / "out")


def roberta_folder(folder: Path) -> Path:
    """Config, weights and tokenizer of a tiny RoBERTa."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import RobertaConfig, RobertaModel

    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    shape = RobertaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=514, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(shape).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class TestCommandLine:
    def test_eval_json(self, work: Path, tmp_path: Path):
        done = run_cli(
            "sea", "eval", "--data", work / "queries.jsonl", "--model", work / "model",
            "--device", "cpu", "--json", "--quiet", env={"POLYZOO_HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["queries"] == report["pool"] == 30
        assert report["protocol"] == "full"
        assert set(report["baselines"]) == {"truncated", "tfidf"}
        assert set(report["by_length"]) == {"<=256", "257-512", ">512", ">256"}
        assert set(report["recall"]) == {"1", "5", "10", "100", "1000"}
        assert (tmp_path / "sea" / "prepared").is_dir()

    def test_embed_to_file_and_stdout(self, work: Path, tmp_path: Path):
        common = ["sea", "embed", "--model", work / "model", "--device", "cpu", "--quiet"]
        data = ["--data", work / "queries.jsonl"]
        done = run_cli(*common, *data, "--out", tmp_path / "v.npy")
        assert done.returncode == 0, done.stderr
        vectors = np.load(tmp_path / "v.npy")
        lines = run_cli(*common, *data, "--batch-size", "7").stdout.splitlines()
        assert [json.loads(line)["url"] for line in lines] == [r["url"] for r in records()[:30]]
        found = np.array([json.loads(line)["vector"] for line in lines])
        assert np.abs(found - vectors).max() < 1e-5
        asked = run_cli(*common, "--kind", "query", stdin="read a file\nsort a list\n")
        assert len(asked.stdout.splitlines()) == 2

    def test_train_prepare_and_errors(self, work: Path, tmp_path: Path):
        home = {"POLYZOO_HOME": str(tmp_path / "home")}
        done = run_cli(
            "sea", "train", "tiny", "--data.train", work / "codebase.jsonl", "--out",
            tmp_path / "m", "--train.run-dir", tmp_path / "run", "--train.steps", "2",
            "--train.batch-size", "8", "--train.device", "cpu", "--json", "--quiet", env=home,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == 2
        done = run_cli("sea", "train", "tinny")
        assert done.returncode == 2
        assert "tiny" in done.stderr
        done = run_cli("sea", "eval", "--data", tmp_path / "none.jsonl", "--model", tmp_path / "m",
                       "--device", "cpu")  # fmt: skip
        assert done.returncode == 1
        assert "none.jsonl: no such file" in done.stderr
        assert "Traceback" not in done.stderr
        done = run_cli("sea", "prepare", "--data", work / "queries.jsonl", "--out",
                       tmp_path / "q.npz", env=home)  # fmt: skip
        assert done.returncode == 1
        assert "polyzoo assets fetch minilm" in done.stderr

    @pytest.mark.parametrize("command", ["prepare", "train", "eval", "embed", "convert"])
    def test_help_does_not_import_torch(self, command: str):
        code = (
            "import sys\nfrom polyzoo.core.cli import main\n"
            f"status = main(['sea', '{command}', '--help'])\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
            "raise SystemExit(status)"
        )
        done = run_python(code)
        assert done.returncode == 0, done.stderr
        assert "--" in done.stdout
