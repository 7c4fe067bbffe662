"""Causality, invariances, and the losses against slow versions of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from polyzoo.attention import backends, use_backend
from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.weights import load_into
from polyzoo.seed.config import HeadConfig, QFormerConfig, VisionConfig, v1, v2
from polyzoo.seed.losses import contrastive_loss, generation_loss, reconstruction_loss
from polyzoo.seed.model import SeedModel
from polyzoo.seed.qformer import QFormer
from polyzoo.seed.quantizer import Quantizer
from support.seed_models import tiny_config, tiny_model


def pixels(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class TestCausality:
    """Code i depends on nothing after it."""

    @pytest.mark.parametrize("tokens", [4, 7, 32])
    def test_a_changed_query_changes_nothing_before_it(self, tokens: int):
        model = tiny_model(tokens_per_image=tokens)
        images = pixels()
        with torch.no_grad():
            before = model.embed(model.features(images))
            codes = model.encode(images)
            for place in (0, tokens // 2, tokens - 1):
                changed = tiny_model(tokens_per_image=tokens)
                # A constant would be taken off again by the layer norm; the sign is not.
                changed.queries[:, place] *= -1
                after = changed.embed(changed.features(images))
                assert torch.equal(after[:, :place], before[:, :place])
                assert torch.equal(changed.encode(images)[:, :place], codes[:, :place])
                assert bool((after[:, place:] != before[:, place:]).any(-1).all())

    def test_without_the_flag_it_is_bidirectional(self):
        with torch.no_grad():
            free, changed = tiny_model(causal=False), tiny_model(causal=False)
            changed.queries[:, 3] *= -1
            before, after = (m.embed(m.features(pixels())) for m in (free, changed))
        assert bool((before[:, 0] != after[:, 0]).any())

    def test_the_image_reaches_every_position(self):
        model = tiny_model()
        with torch.no_grad():
            first, second = (model.embed(model.features(pixels(seed=s))) for s in (0, 1))
        assert bool((first != second).any(-1).all())

    @pytest.mark.parametrize("name", ["reference", "sdpa"])
    def test_on_every_attention_of_the_cpu(self, name: str):
        if name not in {backend.name for backend in backends()}:
            pytest.skip(f"no attention backend is called {name} here")
        with use_backend(name), torch.no_grad():
            model, changed = tiny_model(), tiny_model()
            changed.queries[:, 2] *= -1
            before, after = (m.embed(m.features(pixels())) for m in (model, changed))
        assert torch.equal(before[:, :2], after[:, :2])

    def test_a_bidirectional_tokenizer_is_refused_for_language(self):
        with pytest.raises(ConfigError, match="cannot predict them from left to right"):
            tiny_config(causal=False).require_causal()

    def test_a_causal_prefix_is_the_whole_of_a_shorter_one(self):
        former = QFormer(
            QFormerConfig(width=32, layers=2, heads=2, ffn=64, dropout=0.0), context_width=16
        ).eval()
        queries, context = torch.randn(2, 6, 32), torch.randn(2, 5, 16)
        whole = former(queries, context=context, causal=True)
        part = former(queries[:, :3], context=context, causal=True)
        torch.testing.assert_close(whole[:, :3], part)


class TestInvariances:
    def test_codes_do_not_depend_on_the_batch(self):
        model, images = tiny_model(), pixels(5)
        codes = model.encode(images)
        assert torch.equal(codes, torch.cat([model.encode(image[None]) for image in images]))
        order = torch.tensor([3, 0, 4, 1, 2])
        assert torch.equal(model.encode(images[order]), codes[order])

    def test_a_state_dict_brings_everything_back(self):
        model, other = tiny_model(), tiny_model(seed=5)
        load_into(other, model.state_dict(), source="memory")
        assert torch.equal(other.encode(pixels()), model.encode(pixels()))
        codes = model.encode(pixels())
        assert torch.equal(other.decode(codes).condition, model.decode(codes).condition)

    def test_codes_of_bf16_embeddings_are_searched_in_fp32(self):
        model = tiny_model()
        causal = model.embed(model.features(pixels(64)))
        exact = model.quantise(causal).codes
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = model.quantise(causal).codes
        assert torch.equal(exact, inside)

    @pytest.mark.parametrize(
        "head",
        [
            HeadConfig(dim=24, mlp=(16, 16, 8)),
            HeadConfig(kind="reverse", dim=24, layers=2, ffn=64),
            HeadConfig(kind="reverse", target="text", dim=24, queries=5, layers=2, ffn=64),
        ],
    )
    def test_shape_of_the_condition(self, head: HeadConfig):
        model = SeedModel(tiny_config(head=head)).eval()
        codes = torch.zeros(2, 4, dtype=torch.int64)
        wanted = (2, 24) if head.queries == 1 else (2, 5, 24)
        assert model.decode(codes).condition.shape == wanted

    def test_full_sizes(self):
        """Parameter counts of section 2.5, counted on the meta device."""
        with torch.device("meta"):
            model, first = SeedModel(v2()), SeedModel(v1())

        def count(part: torch.nn.Module | None) -> int:
            assert part is not None
            return sum(p.numel() for p in part.parameters())

        assert count(model.vision) == 985_894_528
        assert count(model.qformer) == 105_137_664
        assert count(model.reconstruct) == count(model.prepare_head) == 28_376_064
        assert count(model.head) == 1_283_072
        assert count(model.to_code) == 615_200
        assert count(model.from_code) == 26_400
        reverse = first.head.qformer  # pyright: ignore[reportAttributeAccessIssue]
        assert count(reverse) == 33_080_832  # pyright: ignore[reportArgumentType]


class TestQuantizer:
    def test_search_is_the_slow_search(self):
        quantizer = Quantizer(50, 6)
        z = torch.randn(7, 3, 6)
        quantizer.codebook.data.normal_()
        slow = (z[:, :, None] - quantizer.codebook).square().sum(-1).argmin(-1)
        assert torch.equal(quantizer.search(z), slow)

    def test_half_precision_inputs(self):
        quantizer = Quantizer(50, 6)
        quantizer.codebook.data.normal_()
        z = torch.randn(7, 3, 6).bfloat16()
        assert torch.equal(quantizer.search(z), quantizer.search(z.float()))

    @pytest.mark.parametrize(
        ("codes", "message"),
        [
            (torch.tensor([[0, 50]]), "codes lie in 0 to 50, and the codebook has 0 to 49; if th"),
            (torch.tensor([[-1, 3]]), "codes lie in -1 to 3"),
            (torch.tensor([[0.0, 1.0]]), "must be integers in 0 to 49"),
            (torch.zeros(0, 2, dtype=torch.int64), "no codes were given"),
        ],
    )
    def test_bad_codes(self, codes: torch.Tensor, message: str):
        with pytest.raises(DataError, match=message):
            Quantizer(50, 6).lookup(codes)


class TestLosses:
    def test_contrast_against_a_loop(self):
        torch.manual_seed(0)
        image, text = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
        temperature = torch.tensor(0.2)
        total = 0.0
        for rows, columns in ((image, text), (text, image)):
            for i in range(5):
                logs = F.log_softmax(rows[i] @ columns.T / temperature, dim=0)
                total -= float(0.9 * logs[i] + 0.1 * logs.mean())
        found = contrastive_loss(image, text, temperature)
        assert float(found) == pytest.approx(total / 10, rel=1e-5)

    def test_gradients_flow_through_the_rows_only(self):
        torch.manual_seed(0)
        image = F.normalize(torch.randn(4, 8), dim=1).requires_grad_()
        text = F.normalize(torch.randn(4, 8), dim=1).requires_grad_()
        contrastive_loss(image, text, torch.tensor(0.1)).backward()
        both = [image.grad, text.grad]
        image.grad = text.grad = None
        logits = image @ text.detach().T / 0.1
        other = text @ image.detach().T / 0.1
        own = torch.arange(4)
        loss = F.cross_entropy(logits, own, label_smoothing=0.1)
        ((loss + F.cross_entropy(other, own, label_smoothing=0.1)) / 2).backward()
        for found, wanted in zip(both, (image.grad, text.grad), strict=True):
            torch.testing.assert_close(found, wanted)

    def test_pairs_of_one_meaning_are_no_negatives(self):
        image = F.normalize(torch.randn(3, 8), dim=1)
        same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
        with_mask = contrastive_loss(image, image, torch.tensor(0.1), same=same, smoothing=0.0)
        total = 0.0
        logits = image @ image.T / 0.1
        for row, others in ((0, [0, 2]), (1, [1, 2]), (2, [0, 1, 2])):
            total -= float(logits[row, row] - logits[row, others].logsumexp(0))
        assert float(with_mask) == pytest.approx(total / 3, abs=1e-5)

    def test_two_processes_equal_one(self):
        """The gathered negatives of another process enter as they would from the own batch."""
        torch.manual_seed(0)
        image, text = (F.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
        temperature = torch.tensor(0.1)
        whole = contrastive_loss(image, text, temperature)
        parts = [
            contrastive_loss(
                image[i : i + 3],
                text[i : i + 3],
                temperature,
                all_images=image,
                all_texts=text,
                first=i,
            )
            for i in (0, 3)
        ]
        assert float(sum(parts) / 2) == pytest.approx(float(whole), rel=1e-6)

    def test_reconstruction_and_generation(self):
        a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        cosine = sum(
            float(a[i, j] @ b[i, j] / a[i, j].norm() / b[i, j].norm())
            for i in range(2)
            for j in range(3)
        )
        assert float(reconstruction_loss(a, b)) == pytest.approx(1 - cosine / 6, rel=1e-5)
        assert float(generation_loss(a, b)) == pytest.approx(float(((a - b) ** 2).mean()), rel=1e-6)


class TestConfigErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"codes": 70000}, "codes=70000: at most 65536"),
            ({"decode_heads": 3}, "decode_heads=3 must divide qformer.width=32"),
            ({"tokens_per_image": 0}, "tokens_per_image=0 must be at least 1"),
        ],
    )
    def test_tokenizer(self, change: dict[str, int], message: str):
        with pytest.raises(ConfigError, match=message):
            tiny_config(**change)

    def test_parts(self):
        with pytest.raises(ConfigError, match="patch_size=9 must divide image_size=32"):
            replace(tiny_config().vision, patch_size=9)
        with pytest.raises(ConfigError, match="an mlp head gives one vector"):
            HeadConfig(queries=77)
        with pytest.raises(ConfigError, match="has width 384"):
            VisionConfig(kind="dinov2")

    def test_pixels_that_do_not_fall_into_patches(self):
        with pytest.raises(DataError, match="must be multiples of the patch size 8"):
            tiny_model().features(torch.zeros(1, 3, 30, 32))

    def test_a_tower_that_was_not_loaded(self):
        shape = replace(
            tiny_config().vision, kind="dinov2", width=384, patch_size=14, image_size=28
        )
        model = SeedModel(tiny_config(vision=shape))
        with pytest.raises(ConfigError, match="the tower is an asset and not loaded"):
            model.features(torch.zeros(1, 3, 28, 28))
        with pytest.raises(ConfigError, match="the model has its tower"):
            tiny_model().use_tower(torch.nn.Identity())

    def test_no_projections_of_stage_1(self):
        with pytest.raises(ConfigError, match="no projections of stage 1"):
            tiny_model(contrast_dim=0).image_vectors(torch.zeros(1, 4, 32))
