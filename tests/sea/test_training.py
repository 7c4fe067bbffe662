"""Training for real: small random encoders on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyzoo.core import config as configs
from polyzoo.core.errors import ConfigError, Interrupted, WeightsError
from polyzoo.core.weights import read_weights
from polyzoo.sea.config import StudentConfig
from polyzoo.sea.data import PairDataset, collate
from polyzoo.sea.encoding.student import build_student, choose_pieces, count_pieces, retokenize
from polyzoo.sea.encoding.tokenizer import SeaTokenizer
from polyzoo.sea.folders import build_bare, load_folder, save_folder
from polyzoo.sea.objective import DistillBatch, distill_objective, pair_objective
from polyzoo.sea.pipeline import SeaPipeline
from polyzoo.sea.prepare import Preparation, prepare_file
from polyzoo.sea.presets import PRESETS, DistillConfig, LossConfig, SeaTrainConfig, tiny
from polyzoo.sea.train import main
from support.sea_models import encoder_folder, records, shape, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = records()
    write_jsonl(folder / "train.jsonl", [row for i, row in enumerate(rows) if i % 7])
    write_jsonl(folder / "valid.jsonl", rows[::7])
    return folder


def recipe(data: Path, work: Path, **train: Any) -> SeaTrainConfig:
    settings = {
        "run_dir": work / "run", "steps": 30, "batch_size": 16, "eval_every": 15, "device": "cpu",
        **train,
    }  # fmt: skip
    return configs.merge(
        tiny(),
        {
            "out": work / "model",
            "data": {"train": data / "train.jsonl", "valid": data / "valid.jsonl", "cache": False},
            "random": {"hidden": 32, "vocab_size": 300},
            "train": settings,
        },
    )


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_tiny_learns_and_its_folder_is_the_model(data: Path, tmp_path: Path):
    report = main(recipe(data, tmp_path))
    curve = losses(tmp_path / "run")
    assert curve[max(curve)] < 0.7 * curve[min(curve)]
    chance = sum(1 / rank for rank in range(1, 16)) / 15
    assert report.valid["mrr"] > 1.5 * chance
    assert report.valid == report.valid_before_saving
    pipeline = SeaPipeline.from_pretrained(tmp_path / "model", device="cpu")
    code = pipeline.embed_code([row["code"] for row in records()[:10]], language="python")
    asked = pipeline.embed_queries(["how to read a file"])
    assert code.vectors.shape == (10, 32)
    assert np.linalg.norm(asked[0]) == pytest.approx(1, abs=1e-5)


def test_resumed_equals_uninterrupted(data: Path, tmp_path: Path):
    steps = {"steps": 12, "eval_every": None, "best_metric": None}
    every = {"checkpoint": {"every": 5}, "log": {"every": 1}}
    main(recipe(data, tmp_path / "whole", **steps, **every))
    first = recipe(data, tmp_path / "parts", **steps, **every)
    broken = replace(first, train=configs.merge(first.train, {"steps": 12}))
    with pytest.raises(Interrupted):
        _interrupt_after(broken, step=7)
    main(broken)
    one, two = (read_weights(tmp_path / name / "model") for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "whole/run") == losses(tmp_path / "parts/run")


def _interrupt_after(config: SeaTrainConfig, *, step: int) -> None:
    """Send the process the signal a cluster sends, once the log shows the step."""
    import os
    import signal
    import threading
    import time

    log = Path(config.train.run_dir) / "metrics.jsonl"

    def watch() -> None:
        while not log.is_file() or max(losses(log.parent), default=0) < step:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    main(config)


def test_adapters_are_saved_alone_and_added_again(data: Path, tmp_path: Path):
    encoder = encoder_folder(tmp_path / "encoder", hidden=32)
    base = recipe(data, tmp_path, steps=10, eval_every=5)
    lora = {
        "rank": 4, "alpha": 8.0, "targets": ("query", "value", "dense"),
        "modules_to_save": ("aggregation",),
    }  # fmt: skip
    split = {"budget": 62, "min_tokens": 4}
    config = configs.merge(
        replace(base, random=None),
        {"model": {"encoder": str(encoder), "split": split}, "train": {"lora": lora}},
    )
    report = main(config)
    assert report.valid["mrr"] == pytest.approx(report.valid_before_saving["mrr"], abs=0.02)
    stored = read_weights(tmp_path / "model")
    assert not any("word_embeddings" in name for name in stored)
    size = (tmp_path / "model/model.safetensors").stat().st_size
    assert size < (encoder / "model.safetensors").stat().st_size / 4
    other = encoder_folder(tmp_path / "other", hidden=32, layers=1)
    text = (tmp_path / "model/config.json").read_text().replace(str(encoder), str(other))
    (tmp_path / "model/config.json").write_text(text)
    with pytest.raises(WeightsError, match="is not the one this adapter was trained on"):
        load_folder(tmp_path / "model")


def test_recipes_that_contradict_themselves(data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="batch_size=1: one pair has no negatives"):
        recipe(data, tmp_path, batch_size=1)
    with pytest.raises(ConfigError, match="student needs distill"):
        SeaTrainConfig(student=StudentConfig())
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        main(replace(recipe(data, tmp_path), data=replace(recipe(data, tmp_path).data, train=None)))
    with pytest.raises(ConfigError, match="budget=126 plus 2 special tokens exceeds"):
        main(configs.merge(recipe(data, tmp_path), {"random": {"max_positions": 64}}))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_survive_a_file(name: str, tmp_path: Path):
    config = PRESETS[name]()
    configs.save(config, tmp_path / "recipe.yaml")
    assert configs.load(SeaTrainConfig, tmp_path / "recipe.yaml") == config


class TestFolders:
    @pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
    def test_saved_model_is_the_same_model(self, tmp_path: Path, pooling: str):
        loaded = self.model(tmp_path, pooling=pooling)
        save_folder(tmp_path / "m", loaded.model, tokenizer_folder=tmp_path / "encoder")
        again = load_folder(tmp_path / "m")
        ids = [[2, 9, 11, 3], [2, 30, 3]]
        assert torch.equal(again.model.embed_queries(ids), loaded.model.embed_queries(ids))
        assert again.tokenizer.sha256 == loaded.tokenizer.sha256

    def test_int8_is_a_quarter_and_close(self, tmp_path: Path):
        loaded = self.model(tmp_path, hidden=128)
        for name, int8 in (("plain", False), ("small", True)):
            save_folder(
                tmp_path / name, loaded.model, tokenizer_folder=tmp_path / "encoder", int8=int8
            )
        sizes = [
            (tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "small")
        ]
        assert sizes[1] < 0.3 * sizes[0]
        ids = [[2, 9, 11, 3], [2, 30, 3]]
        small = load_folder(tmp_path / "small").model.embed_queries(ids)
        cosine = (small * loaded.model.embed_queries(ids)).sum(1)
        assert bool((cosine > 0.999).all())

    def test_identity_changes_with_weights_and_settings(self, tmp_path: Path):
        loaded = self.model(tmp_path)
        ids = set()
        for step in range(3):
            if step == 1:
                loaded.model.encoder.model.get_parameter(
                    "encoder.layer.0.output.dense.bias"
                ).data += 1
            if step == 2:
                loaded.model.config = replace(loaded.model.config, max_query_tokens=12)
            save_folder(tmp_path / "m", loaded.model, tokenizer_folder=tmp_path / "encoder")
            ids.add(SeaPipeline.from_pretrained(tmp_path / "m", device="cpu").model_id)
        assert len(ids) == 3

    def test_broken_folders(self, tmp_path: Path):
        loaded = self.model(tmp_path)
        with pytest.raises(WeightsError, match="no such folder"):
            SeaPipeline.from_pretrained(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        with pytest.raises(WeightsError, match=r"no config\.json"):
            SeaPipeline.from_pretrained(tmp_path / "empty")
        save_folder(tmp_path / "m", loaded.model, tokenizer_folder=tmp_path / "encoder")
        path = tmp_path / "m/config.json"
        path.write_text(path.read_text().replace('"attn1_mean"', '"attn2_mean"'))
        with pytest.raises(WeightsError, match=r"aggregation\.score\.2"):
            load_folder(tmp_path / "m")
        text = path.read_text().replace('"attn2_mean"', '"attn1_mean"')
        path.write_text(text.replace('"split_identifiers": false', '"split_identifiers": true'))
        with pytest.raises(ConfigError, match="tokenizer is not the one the model was trained"):
            load_folder(tmp_path / "m")
        (tmp_path / "m/encoder/tokenizer.json").write_text("{}")
        with pytest.raises(WeightsError, match="not a readable tokenizer"):
            load_folder(tmp_path / "m")

    @staticmethod
    def model(work: Path, *, hidden: int = 32, pooling: str = "mean"):
        folder = encoder_folder(work / "encoder", hidden=hidden)
        if pooling == "pooler":  # the random encoder is written without one
            from transformers import BertConfig, BertModel

            BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)
        return build_bare(shape(folder, pooling=pooling, raw="whole"))


class TestStudent:
    @pytest.fixture
    def teacher(self, tmp_path: Path, data: Path):
        folder = encoder_folder(tmp_path / "teacher", layers=3, hidden=32)
        loaded = build_bare(shape(folder, raw="whole"))
        preparation = Preparation(
            tokenizer_folder=str(folder), split=loaded.config.split, max_query_tokens=16
        )
        return loaded, prepare_file(data / "train.jsonl", preparation)

    def build(self, work: Path, teacher: Any, prepared: Any, size: int) -> Path:
        return build_student(
            work / "student",
            teacher_folder=teacher.tokenizer_folder,
            teacher_weights=teacher.model.encoder.model.state_dict(),
            prepared=[prepared],
            config=StudentConfig(vocab_size=size, layers=(0, 2), max_positions=128),
        )

    def test_vocabulary_keeps_the_frequent_and_all_letters(self, teacher: Any):
        loaded, prepared = teacher
        vocab = loaded.tokenizer.vocabulary()
        counts = count_pieces([prepared], size=len(vocab))
        size = len(vocab) - 10
        kept = choose_pieces(vocab, counts, size=size)
        assert len(kept) == len(set(kept)) == size
        dropped = set(vocab) - set(kept)
        multi = [piece for piece in kept if len(piece.removeprefix("##")) > 1 and piece[0] != "["]
        assert max(counts[vocab[piece]] for piece in dropped) <= min(
            counts[vocab[piece]] for piece in multi
        )
        with pytest.raises(ConfigError, match="does not hold the"):
            choose_pieces(vocab, counts, size=20)

    def test_respelled_pieces_are_what_its_tokenizer_gives(self, tmp_path: Path, teacher: Any):
        loaded, prepared = teacher
        folder = self.build(tmp_path, loaded, prepared, 110)
        new = SeaTokenizer.from_folder(folder)
        found = retokenize(prepared, old=loaded.tokenizer, new=new, max_length=128)
        rows = [row for i, row in enumerate(records()) if i % 7]
        for index, row in enumerate(rows):
            text = " ".join(row["docstring_tokens"])
            assert found.queries[index].tolist() == new(text).ids
            first, last = found.first_block[index : index + 2]
            joined = [int(x) for line in range(first, last) for x in found.blocks[line]]
            if last - first == 1:  # a border inside a word may cost one piece
                assert joined == new(row["code"]).ids[:126]

    def test_rows_come_from_the_teacher(self, tmp_path: Path, teacher: Any):
        loaded, prepared = teacher
        folder = self.build(tmp_path, loaded, prepared, 110)
        old, new = loaded.tokenizer.vocabulary(), SeaTokenizer.from_folder(folder).vocabulary()
        weights = read_weights(folder)
        teacher_state = loaded.model.encoder.model.state_dict()
        for piece, row in new.items():
            wanted = teacher_state["embeddings.word_embeddings.weight"][old[piece]]
            assert torch.equal(weights["embeddings.word_embeddings.weight"][row], wanted)
        name = "encoder.layer.{}.output.dense.weight"
        assert torch.equal(weights[name.format(1)], teacher_state[name.format(2)])

    def test_a_step_towards_the_teacher(self, tmp_path: Path, teacher: Any):
        loaded, prepared = teacher
        folder = self.build(tmp_path, loaded, prepared, 110)
        student = build_bare(shape(folder, raw="whole", split=replace(
            loaded.config.split, budget=62)))  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for parameter in student.model.encoder.parameters():  # so that there is a way to go
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.3 * noise
        mine = retokenize(prepared, old=loaded.tokenizer, new=student.tokenizer, max_length=128)
        pairs = [PairDataset(part) for part in (mine, prepared)]
        batch = DistillBatch(*(collate([part[i] for i in range(24)]) for part in pairs))
        optimizer = torch.optim.AdamW(student.model.parameters(), lr=1e-3)
        history = []
        for _ in range(8):
            out = student.model(batch.student)
            scores = student.model.scores(out.queries, out.codes)
            found = distill_objective(
                out, scores, batch, loaded.model, LossConfig(), DistillConfig(contrastive=0)
            )
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
            history.append({name: float(value) for name, value in found.metrics.items()})
        assert history[-1]["vector_distance"] < 0.8 * history[0]["vector_distance"]
        assert history[-1]["block_distance"] < history[0]["block_distance"]
        assert history[-1]["ranking_divergence"] < history[0]["ranking_divergence"]
        assert all(parameter.grad is None for parameter in loaded.model.parameters())

    def test_its_own_teacher_is_perfect(self, teacher: Any):
        loaded, prepared = teacher
        pairs = PairDataset(prepared)
        batch = collate([pairs[i] for i in range(16)])
        out = loaded.model(batch)
        scores = loaded.model.scores(out.queries, out.codes)
        found = distill_objective(
            out, scores, DistillBatch(batch, batch), loaded.model, LossConfig(), DistillConfig()
        )
        plain = pair_objective(scores, batch, LossConfig())
        assert found.loss.item() == pytest.approx(plain.loss.item(), rel=1e-4)


class TestBatches:
    def test_extra_functions_and_negatives_are_columns(self, tmp_path: Path, data: Path):
        folder = encoder_folder(tmp_path / "encoder", hidden=32)
        preparation = Preparation(
            tokenizer_folder=str(folder), split=shape(folder).split, max_query_tokens=16
        )
        prepared = prepare_file(data / "train.jsonl", preparation)
        extra = prepare_file(data / "valid.jsonl", preparation)
        pairs = PairDataset(
            prepared, extra=extra, extra_per_pair=2, negatives=[[5]] * len(prepared)
        )
        batch = collate([pairs[0], pairs[1]])
        assert (batch.n, batch.f) == (2, 2 + 2 * 3)
        # Row 5 is a negative of both, so it is there twice, and nobody's answer.
        assert batch.duplicates.sum() == 0
        again = collate([pairs[0], pairs[5]])  # now it is pair 5's own answer
        assert again.duplicates[1].tolist() == [
            False,
            False,
            True,
            False,
            False,
            True,
            False,
            False,
        ]
        before = pairs[0].functions[2].code_hash
        pairs.set_epoch(1)
        assert pairs[0].functions[2].code_hash != before
