"""Both stages, the codebook's care, the picture decoder, and the commands, on tiny data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.seed.augment import beside, views
from polyzoo.seed.bank import ImageBank, read_pairs
from polyzoo.seed.codebook import CodebookCare, CodebookHealth, plot_usage
from polyzoo.seed.codebook_config import CodebookConfig
from polyzoo.seed.decoder import PixelDecoder, draw, flow_loss
from polyzoo.seed.decoder_config import DecoderConfig
from polyzoo.seed.evaluation import main as evaluate
from polyzoo.seed.evaluation import render
from polyzoo.seed.folders import load_parts
from polyzoo.seed.material import Material, PictureBatches
from polyzoo.seed.metrics import chance, named, recall, share_grouped, share_named
from polyzoo.seed.objective import Stage1, Stage2, normalise
from polyzoo.seed.options import EvalConfig
from polyzoo.seed.pipeline import SeedPipeline
from polyzoo.seed.presets import (
    LANGUAGE_PRESETS,
    TOKENIZER_PRESETS,
    LanguageDataConfig,
    LanguageTrainConfig,
    SeedDataConfig,
    SmallLanguageConfig,
    TokenizerTrainConfig,
)
from polyzoo.seed.text_pieces import TextPieces
from polyzoo.seed.tokenizer_stages import codes_of
from polyzoo.seed.train import train_language, train_stage, train_tokenizer
from polyzoo.training.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from support.seed_models import tiny_config, tiny_model, tokenizer_json, write_folder, write_pairs


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> ImageBank:
    pairs, images = write_pairs(tmp_path_factory.mktemp("pairs"))
    return ImageBank.from_pairs(pairs, images, size=32)


def run(folder: Path, *, steps: int, **more: Any) -> TrainConfig:
    return TrainConfig(
        run_dir=folder,
        steps=steps,
        batch_size=12,
        device="cpu",
        optim=OptimConfig(lr=2e-3, weight_decay=0.0),
        schedule=ScheduleConfig(kind="constant"),
        checkpoint=CheckpointConfig(every=None),
        data=DataConfig(drop_last=True),
        log=LogConfig(progress=False, plots=False, every=1),
        **more,
    )


def prepared(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    return folder


def stage1_config(tmp_path: Path, *, steps: int) -> TokenizerTrainConfig:
    pairs, images = write_pairs(tmp_path)
    return TokenizerTrainConfig(
        out=tmp_path / "stage1",
        stage="stage1",
        model=tiny_config(),
        data=SeedDataConfig(
            pairs=pairs, images=images, prepared=prepared(tmp_path / "prepared"), size=32
        ),
        augment="none",
        train=run(tmp_path / "run", steps=steps, eval_every=steps),
    )


class TestStages:
    def test_stage_1_learns_to_match(self, tmp_path: Path):
        report = train_tokenizer(stage1_config(tmp_path, steps=60))
        lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        losses = [row["metrics"]["contrast"] for row in rows if row["event"] == "train"]
        # Six captions, two pictures each: pairs of one meaning are no negatives.
        assert losses[0] == pytest.approx(np.log(11), abs=1.5)
        assert losses[-1] < 0.75 * losses[0]
        # By chance it would be a sixth.
        assert report.metrics["embeddings_recall_1"] > 0.3

    def test_stage_1_as_the_paper_trains_no_other_part(self, bank: ImageBank, tmp_path: Path):
        model = tiny_model()
        stage = Stage1(model, teacher=0.0, generation=0.0).train()
        pieces = TextPieces.load(prepared(tmp_path))
        batch = PictureBatches(Material(bank, None, pieces, None), texts=True).collate([0, 3, 6])
        rgb = views(batch["images"], strength="none", generator=torch.Generator())
        loss, _ = stage(rgb, batch, None)
        loss.backward()
        trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {"queries", "vision_norm", "qformer", "contrast"}
        assert not model.vision.training  # pyright: ignore[reportOptionalMemberAccess]
        assert model.qformer.training

    def test_stage_2_on_one_batch(self, bank: ImageBank):
        """Losses fall, most entries are used, and what is frozen does not move."""
        torch.manual_seed(0)
        model = tiny_model(seed=3)
        stage = Stage2(model, codebook=CodebookConfig(), weighting="legacy").train()
        frozen = {
            name: p.detach().clone()
            for name, p in model.named_parameters()
            if name.startswith(("vision", "qformer", "queries"))
        }
        optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=3e-3)
        generator = torch.Generator().manual_seed(0)
        rgb = views(torch.from_numpy(bank.images), strength="none", generator=generator)
        target = torch.randn(12, 24, generator=generator)
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for step in range(100):
            loss, parts = stage(rgb, target, step=step, total=100, generator=generator)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            last = {name: float(value) for name, value in parts.items()}
            first = first or last
        assert last["reconstruction"] < 0.2 * first["reconstruction"]
        assert last["generation"] < 0.9 * first["generation"]
        codes = codes_of(model, bank)
        assert CodebookHealth.of(codes, entries=16).used_share >= 0.4
        for name, before in frozen.items():
            assert torch.equal(dict(model.named_parameters())[name], before), name

    def test_stage_2_and_the_decoder_by_command(self, bank: ImageBank, tmp_path: Path):
        """The generator's target needs DINOv2; here the tokenizer's own tower stands for it."""
        config = stage1_config(tmp_path, steps=2)
        train_tokenizer(config)
        with pytest.raises(ConfigError, match="needs start: the folder of the stage before"):
            replace(config, stage="stage2")
        decoder = TokenizerTrainConfig(
            out=tmp_path / "decoder",
            stage="decoder",
            start=config.out,
            data=replace(config.data, prepared=None),
            decoder=DecoderConfig(size=16, widths=(16, 16, 16), context_width=32, embedding=16),
            augment="none",
            train=run(tmp_path / "run2", steps=3, eval_every=3),
        )
        report = train_stage(decoder, Material(bank, None, None, None))
        assert set(report.metrics) == {"picture"}
        parts = load_parts(decoder.out)
        assert parts.decoder is not None
        # The tokenizer came along unchanged, byte for byte.
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (decoder.out / name).read_bytes() == (config.out / name).read_bytes()

    def test_resuming_is_bit_equal(self, tmp_path: Path):
        whole = stage1_config(tmp_path / "a", steps=6)
        train_tokenizer(whole)
        half = stage1_config(tmp_path / "b", steps=6)
        first = replace(half, train=replace(half.train, steps=3, eval_every=None))
        train_tokenizer(first)
        train_tokenizer(half)
        found, wanted = (load_parts(c.out).model.state_dict() for c in (half, whole))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class TestCodebook:
    def test_dead_entries_come_back_and_the_reference_loses_them(self):
        """Uniform start without restarts against ours, on the same vectors (section 3.4)."""
        used = {}
        for name, config in {
            "ours": CodebookConfig(restart_every=5, memory=0.8),
            "reference": CodebookConfig(start="uniform", restart_every=None),
        }.items():
            generator = torch.Generator().manual_seed(0)
            torch.manual_seed(0)
            book = torch.empty(64, 4).uniform_(-1 / 64, 1 / 64).requires_grad_()
            optimizer = torch.optim.SGD([book], lr=2.0)
            care = CodebookCare(64, config)
            centres = torch.randn(40, 4, generator=generator) * 3
            for step in range(60):
                rows = torch.randint(0, 40, (256,), generator=generator)
                z = centres[rows] + 0.1 * torch.randn(256, 4, generator=generator)
                care.before(book.data, z, generator=generator)
                codes = torch.cdist(z, book.detach()).argmin(1)
                (book[codes] - z).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                care.after(book.data, z, codes, step=step, total=60, generator=generator)
            rows = torch.randint(0, 40, (2000,), generator=generator)
            z = centres[rows] + 0.1 * torch.randn(2000, 4, generator=generator)
            codes = torch.cdist(z, book.detach()).argmin(1)
            used[name] = CodebookHealth.of(codes[:, None], entries=64)
        assert used["ours"].used_share > 0.9
        assert used["ours"].verdict == "good"
        assert used["reference"].used_share < 0.6
        assert "train with codebook.start=data" in used["reference"].verdict

    def test_health_counts(self, tmp_path: Path):
        codes = np.array([[0, 1], [0, 2], [0, 1], [0, 2]])
        health = CodebookHealth.of(codes, entries=8)
        assert (health.used, health.dead, health.images) == (3, 5, 4)
        shares = np.array([0.5, 0.25, 0.25])
        assert health.perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        assert health.by_position == pytest.approx([1.0, 2.0])
        plot_usage(codes, tmp_path / "usage.png", entries=8)
        assert (tmp_path / "usage.png").stat().st_size > 1000


class TestDecoder:
    def test_learns_to_draw_two_pictures(self):
        torch.manual_seed(0)
        shape = DecoderConfig(size=8, widths=(16, 16, 16), context_width=8, embedding=16, steps=12)
        decoder = PixelDecoder(shape)
        context = torch.eye(8)[:2, None].repeat(1, 3, 1) * 4
        pictures = torch.stack((torch.full((3, 8, 8), 0.1), torch.full((3, 8, 8), 0.9)))
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=4e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            loss = flow_loss(
                decoder, pictures.repeat(8, 1, 1, 1), context.repeat(8, 1, 1), generator=generator
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found = draw(decoder.eval(), context, seeds=[1, 2], guidance=1.0)
        assert float(found[1].mean() - found[0].mean()) > 0.3
        assert float((found - pictures).abs().mean()) < 0.3

    def test_guidance_1_is_the_conditional_velocity(self):
        decoder = PixelDecoder(DecoderConfig(size=8, widths=(16, 16, 16), context_width=8,
                                             embedding=16)).eval()  # fmt: skip
        context = torch.randn(2, 3, 8)
        plain = draw(decoder, context, seeds=[1, 2], steps=2, guidance=1.0)
        same = draw(decoder, context, seeds=[1, 2], steps=2, guidance=1.0 + 1e-9)
        torch.testing.assert_close(plain, same, atol=1e-4, rtol=1e-4)


class TestViews:
    def test_none_lays_on_white(self, bank: ImageBank):
        images = torch.from_numpy(bank.images[:2].copy())
        images[0, ..., 3] = 0
        rgb = views(images, strength="none", generator=torch.Generator())
        assert bool((rgb[0] == 1).all())
        wanted = images[1, ..., :3].permute(2, 0, 1).float() / 255
        torch.testing.assert_close(rgb[1], wanted)

    @pytest.mark.parametrize("strength", ["light", "strong"])
    def test_the_same_generator_gives_the_same_views(self, bank: ImageBank, strength: Any):
        images = torch.from_numpy(bank.images)
        made = [
            views(images, strength=strength, generator=torch.Generator().manual_seed(s))
            for s in (1, 1, 2)
        ]
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])
        assert 0 <= float(made[0].min()) <= float(made[0].max()) <= 1

    def test_pictures_beside_fill_a_quarter(self, bank: ImageBank):
        clear = torch.zeros(64, 32, 32, 4, dtype=torch.uint8)
        clear[..., 3] = 0
        full = torch.full((64, 32, 32, 4), 255, dtype=torch.uint8)
        mixed = beside(torch.cat((clear, full)), generator=torch.Generator(), share=1.0)[:64]
        share = (mixed[..., 3] > 0).float().mean((1, 2))
        assert {round(float(s), 2) for s in share} <= {0.0, 0.25}
        assert 0.25 in {round(float(s), 2) for s in share}
        kept = beside(full, generator=torch.Generator(), share=0.0)
        assert torch.equal(kept, full)


class TestBank:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{}", r"line 1: expected .*KeyError"),
            ("[]", "line 1: expected"),
            ('{"image": "a.png"}', '"caption" a text or a list'),
            ('{"image": 3, "caption": "x"}', '"image" must be a file name'),
            ('{"image": "a.png", "caption": [1]}', "a caption is no text"),
        ],
    )
    def test_bad_pairs(self, tmp_path: Path, line: str, message: str):
        (tmp_path / "pairs.jsonl").write_text(line)
        with pytest.raises(DataError, match=message):
            read_pairs(tmp_path / "pairs.jsonl")

    def test_no_image_at_all(self, tmp_path: Path):
        (tmp_path / "pairs.jsonl").write_text('{"image": "no.png", "caption": "x"}')
        with pytest.raises(DataError, match="none of 1 images could be read"):
            ImageBank.from_pairs(tmp_path / "pairs.jsonl", tmp_path, size=8)

    def test_broken_ones_are_named(self, tmp_path: Path):
        pairs, images = write_pairs(tmp_path, broken=True)
        bank = ImageBank.from_pairs(pairs, images, size=8)
        assert (len(bank), len(bank.failed)) == (12, 1)
        assert "broken.png" in bank.failed[0]


class TestMetrics:
    def test_recall_against_a_loop(self):
        draws = np.random.default_rng(0)
        scores = draws.normal(size=(20, 15))
        right = draws.random((20, 15)) < 0.15
        right[np.arange(20), draws.integers(0, 15, 20)] = True
        found = recall(scores, right)
        for cut, share in ((1, found.r1), (5, found.r5), (10, found.r10)):
            hits = 0
            for row in range(20):
                best = sorted(range(15), key=lambda c, row=row: -scores[row, c])[:cut]
                hits += any(right[row, c] for c in best)
            assert share == pytest.approx(hits / 20)

    def test_equal_scores_count_against_the_answer(self):
        assert recall(np.zeros((1, 3)), np.array([[True, False, False]])).r1 == 0

    def test_chance_is_what_random_scores_reach(self):
        draws = np.random.default_rng(1)
        right = np.zeros((4000, 12), bool)
        right[np.arange(4000), draws.integers(0, 12, 4000)] = True
        right[:, 0] = True
        found, expected = recall(draws.random((4000, 12)), right), chance(right)
        for name in ("r1", "r5", "r10"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=0.03)

    def test_bad_tables(self):
        with pytest.raises(DataError, match="query 1 has no right candidate"):
            recall(np.zeros((2, 2)), np.array([[True, False], [False, False]]))
        with pytest.raises(DataError, match="not a finite number"):
            recall(np.array([[np.nan]]), np.array([[True]]))

    def test_captions(self):
        assert named("Red  Apple, flat style, fruit") == "red apple"
        assert share_named(["red apple, x", "cat"], ["Red apple", "dog"]) == 0.5
        known = {"cat": 3, "car": 5}
        assert share_grouped(["cat, x", "car", "??"], [3, 3, -1], known) == (0.5, 2)


class TestLanguageCommand:
    def test_train_then_caption_draw_and_measure(self, tmp_path: Path):
        model = write_folder(tmp_path / "model")
        pairs, images = write_pairs(tmp_path)
        config = LanguageTrainConfig(
            out=model / "language",
            tokenizer=str(model),
            small=SmallLanguageConfig(width=32, layers=2, heads=2, ffn=64, dropout=0.0),
            data=LanguageDataConfig(pairs=pairs, images=images, max_length=24, views=2),
            train=replace(run(tmp_path / "run", steps=60), optim=OptimConfig(lr=1e-2)),
        )
        report = train_language(config)
        assert report.trained_parameters == report.parameters
        lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        assert losses[-1] < 0.75 * losses[0]
        seed = SeedPipeline.from_pretrained(model, device="cpu")
        assert len(seed.caption([images / "00.png", images / "03.png"])) == 2
        drawn = seed.draw(["red circle", "blue square"], seed=1)
        assert [picture.size for picture in drawn] == [(16, 16)] * 2
        again = seed.write_codes(["red circle", "blue square"], seed=1)
        assert np.array_equal(again, seed.write_codes(["red circle", "blue square"], seed=1))
        found = evaluate(
            EvalConfig(pairs=pairs, images=images, model=str(model), device="cpu", drawings=4)
        )
        split = found.splits[0]
        assert (split.pictures, split.concepts) == (12, 6)
        assert split.chance.to_text.r1 == pytest.approx(1 / 6)
        assert split.detokenised is not None
        assert split.drawn is not None
        assert 0 <= (split.captions_named or 0) <= 1
        assert "codes keep" in render(found)
        other = write_folder(tmp_path / "other", codes=8)
        wrong = SeedPipeline.from_pretrained(other, device="cpu")
        with pytest.raises(ConfigError, match="the language model writes 4 codes of 16, this tok"):
            wrong.use_language(model / "language")


class TestRecipes:
    @pytest.mark.parametrize("name", list(TOKENIZER_PRESETS))
    def test_tokenizer_presets_build(self, name: str):
        TOKENIZER_PRESETS[name]()

    @pytest.mark.parametrize("name", list(LANGUAGE_PRESETS))
    def test_language_presets_build(self, name: str):
        LANGUAGE_PRESETS[name]()

    def test_bad_recipes(self):
        with pytest.raises(ConfigError, match="teacher_size=100 must be a multiple of 14"):
            TokenizerTrainConfig(teacher_size=100)
        with pytest.raises(ConfigError, match="base='small' starts from nothing"):
            replace(LANGUAGE_PRESETS["smollm2"](), base="small")
        with pytest.raises(ConfigError, match="needs text, a file of plain text"):
            LanguageDataConfig(text_share=0.5)
        with pytest.raises(ConfigError, match="heads=3 must divide width=160"):
            SmallLanguageConfig(heads=3)

    def test_normalise_resizes(self):
        rgb = torch.rand(1, 3, 64, 64)
        assert normalise(rgb, tiny_model()).shape == (1, 3, 32, 32)
