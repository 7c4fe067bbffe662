"""The user's way in: pictures to codes and back, captions and drawings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from polyzoo.core.device import resolve_device, resolve_dtype
from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.log import get_logger
from polyzoo.seed.asset_tower import load_dino
from polyzoo.seed.augment import views
from polyzoo.seed.bank import ImageBank
from polyzoo.seed.config import SeedConfig
from polyzoo.seed.decoder import draw as draw_pictures
from polyzoo.seed.folders import LANGUAGE, SeedParts, find_folder, load_parts
from polyzoo.seed.language import Language, load_language
from polyzoo.seed.objective import normalise
from polyzoo.seed.preprocessing import Picture, check_pixels, from_bytes, to_pixels
from polyzoo.seed.quantizer import check_codes
from polyzoo.seed.sketch import SketchDecoder, sketch

_log = get_logger(__name__)
_EXACT = ("quantizer", "to_code", "vision_norm")
"""Stay fp32 in every precision: codes are decided there."""


class SeedPipeline:
    """A tokenizer with, where its folder has them, a picture decoder and a language model.

    Example:
        >>> seed = SeedPipeline.from_pretrained("embedded")
        >>> codes = seed.encode("apple.png")
        >>> seed.decode(codes)[0].save("again.png")
        >>> seed.caption("apple.png")[0], seed.draw("a red apple")[0].size
    """

    def __init__(
        self, parts: SeedParts, *, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.parts = parts
        self.device, self.dtype = device, dtype
        self.model = parts.model
        self.pieces = parts.pieces
        if self.model.vision is None:
            self.model.use_tower(load_dino(device=device))
        for name, child in self.model.named_children():
            child.to(device=device, dtype=None if name in _EXACT else dtype)
        self.model.queries.data = self.model.queries.data.to(device=device, dtype=dtype)
        self.model.eval().requires_grad_(False)
        if parts.decoder is not None:
            parts.decoder.to(device).eval().requires_grad_(False)
        self.generator: Any = None
        """A diffusers de-tokeniser, where `use_detokenizer` gave one."""
        self._language: Language | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "embedded",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = "float32",
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | None = None,
    ) -> Self:
        """Load a tokenizer: `embedded`, a folder, or a repository on the hub.

        Args:
            name: Which.
            device: auto, cpu, cuda, cuda:1, mps.
            dtype: Of the tower and the Q-Former; the codebook search is fp32 always.
            revision: Branch, tag or commit on the hub.
            local_files_only: Never use the network.
            token: For private repositories.

        Raises:
            WeightsError: It is not there, or incomplete.
            ConfigError: No such device or dtype, or half precision on a CPU.
        """
        folder = find_folder(
            name, revision=revision, local_files_only=local_files_only, token=token
        )
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        if where.type == "cpu" and kind == torch.float16:
            raise ConfigError("dtype=float16: CPU kernels lack it; use float32 or bfloat16")
        return cls(load_parts(folder), device=where, dtype=kind)

    @property
    def config(self) -> SeedConfig:
        """The tokenizer's shape."""
        return self.model.config

    def use_detokenizer(self, detokenizer: Any) -> None:
        """Let `decode` draw with a diffusers pipeline (see polyzoo.seed.detokenizer)."""
        self.generator = detokenizer

    # --- pictures to codes -----------------------------------------------------------------

    def encode(
        self, images: Picture | Sequence[Picture], *, batch_size: int = 64
    ) -> NDArray[np.int64]:
        """Return codes (b, tokens_per_image) of one picture or of a list.

        Args:
            images: Paths, PIL images, uint8 arrays (H, W, 3), or normalised tensors (3, S, S).
            batch_size: Pictures at a time; where memory runs out it is halved once.

        Raises:
            DataError: A picture is broken, or the list is empty.
        """
        given = images if isinstance(images, list | tuple) else [images]
        if not given:
            raise DataError("no picture was given; encode needs at least one")
        found = []
        for start in range(0, len(given), batch_size):
            pixels = torch.stack(
                [to_pixels(image, self.config) for image in given[start : start + batch_size]]
            )
            found.append(self.encode_pixels(pixels))
        return np.concatenate(found)

    def encode_pixels(self, pixels: Tensor) -> NDArray[np.int64]:
        """Return codes (b, n) of normalised pixels (b, 3, S, S).

        Raises:
            DataError: Wrong rank, channels, size, dtype or range.
        """
        check_pixels(pixels, self.config)
        return self._halving(pixels).cpu().numpy()

    def encode_bytes(self, values: Tensor) -> Tensor:
        """Return codes (b, n), still on the device, of uint8 pictures (b, S, S, 3)."""
        moved = values.to(self.device, non_blocking=True)
        return self._halving(from_bytes(moved, self.config))

    def _halving(self, pixels: Tensor) -> Tensor:
        """Encode; where memory runs out, in two halves, once."""
        try:
            return self._encode(pixels)
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
            _log.warning("out of memory with %d pictures; halving the batch once", len(pixels))
        torch.cuda.empty_cache()
        half = len(pixels) // 2
        return torch.cat([self._encode(pixels[:half]), self._encode(pixels[half:])])

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels.to(self.device, self.dtype, non_blocking=True))

    @torch.no_grad()
    def encode_bank(
        self, bank: ImageBank, *, batch_size: int = 256, moved: int | None = None
    ) -> NDArray[np.int64]:
        """Return codes (n, tokens) of a bank's pictures, laid on white.

        Args:
            bank: The pictures.
            batch_size: At a time.
            moved: Seed of a slight move and tint of each; None leaves them as they are.
        """
        found = []
        generator = torch.Generator(self.device)
        for start in range(0, len(bank), batch_size):
            rgb = self.bank_rgb(bank, slice(start, start + batch_size))
            if moved is not None:
                images = torch.from_numpy(bank.images[start : start + batch_size])
                generator.manual_seed((moved << 32) + start)
                rgb = views(images.to(self.device), strength="light", generator=generator)
            found.append(self._encode(normalise(rgb, self.model)).cpu().numpy())
        return np.concatenate(found)

    def bank_rgb(self, bank: ImageBank, rows: slice | list[int]) -> Tensor:
        """Return some of a bank's pictures, (b, 3, S, S) in 0 to 1, laid on white."""
        images = torch.from_numpy(bank.images[rows]).to(self.device)
        return views(images, strength="none", generator=torch.Generator(self.device))

    # --- codes to pictures -----------------------------------------------------------------

    def decode(
        self,
        codes: NDArray[np.integer] | Tensor | Sequence[Any],
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        negative: NDArray[np.integer] | Tensor | Sequence[Any] | None = None,
        batch_size: int = 16,
    ) -> list[Image.Image]:
        """Draw codes (b, n), or one image's codes (n,).

        Args:
            codes: In 0 to codes - 1.
            seed: Of the noise; one number gives picture i the seed `seed + i`. A sketch decoder
                draws nothing at random.
            steps: Of the drawing; a sketch decoder has none.
            guidance: How far it is pushed from the unconditional drawing; a sketch's sharpness.
            negative: Codes to push away from instead; diffusers de-tokenisers only.
            batch_size: Pictures at a time.

        Raises:
            DataError: Codes of a wrong shape or value.
            ConfigError: There is no de-tokeniser.
        """
        table = self.check(codes)
        seeds = [seed + i for i in range(len(table))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(table):
            raise ConfigError(f"{len(seeds)} seeds for {len(table)} pictures; give one for each")
        if self.generator is None and self.parts.decoder is None:
            raise ConfigError(
                f"{self.parts.folder}: has no de-tokeniser, so codes cannot become pixels; train "
                "one (train-tokenizer decoder), or give a diffusers one (use_detokenizer)"
            )
        if negative is not None:
            other = self.check(negative)
            if other.shape not in (table.shape, (1, table.shape[1])):
                raise DataError(
                    f"negative codes {tuple(other.shape)} do not go with codes "
                    f"{tuple(table.shape)}: give as many, or one image's"
                )
            negative = other.expand_as(table)
        pictures: list[Image.Image] = []
        for start in range(0, len(table), batch_size):
            part = slice(start, start + batch_size)
            if self.generator is not None:
                away = None if negative is None else negative[part]  # pyright: ignore[reportArgumentType, reportCallIssue]
                pictures += self.generator(
                    self.model, table[part], seeds=seeds[part], steps=steps, guidance=guidance,
                    negative=away,
                )  # fmt: skip
                continue
            if negative is not None:
                raise ConfigError("negative codes need a diffusers de-tokeniser")
            pictures += self._draw(table[part], seeds[part], steps, guidance)
        return pictures

    @torch.no_grad()
    def _draw(
        self, codes: Tensor, seeds: list[int], steps: int | None, guidance: float | None
    ) -> list[Image.Image]:
        assert self.parts.decoder is not None  # noqa: S101 - decode has checked
        context = self.model.context_of(codes).float()
        if isinstance(self.parts.decoder, SketchDecoder):
            if steps is not None:
                raise ConfigError(f"steps={steps}: this folder's decoder draws in one pass")
            found = sketch(self.parts.decoder, context, sharpness=guidance)
        else:
            found = draw_pictures(
                self.parts.decoder, context, seeds=seeds, steps=steps, guidance=guidance
            )
        arrays = (found * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in arrays]

    def check(self, codes: NDArray[np.integer] | Tensor | Sequence[Any]) -> Tensor:
        """Return codes as (b, n) int64 on the device, checked.

        Raises:
            DataError: Wrong shape, dtype or value.
        """
        table = torch.as_tensor(np.asarray(codes) if not isinstance(codes, Tensor) else codes)
        if table.ndim == 1:
            table = table[None]
        n = self.config.tokens_per_image
        if table.ndim != 2 or table.shape[1] != n or not len(table):
            raise DataError(
                f"codes are {tuple(table.shape)}; this tokenizer writes {n} an image: (b, {n})"
            )
        check_codes(table, self.config.codes)
        return table.to(self.device, torch.int64)

    # --- with a language model -------------------------------------------------------------

    @property
    def language(self) -> Language:
        """The language model in the tokenizer's folder, or the one given to `use_language`."""
        if self._language is None:
            folder = self.parts.folder / LANGUAGE
            if not folder.is_dir():
                raise ConfigError(
                    f"{self.parts.folder}: has no language model; train one (train-lm) and give "
                    "its folder"
                )
            self.use_language(folder)
        assert self._language is not None  # noqa: S101 - set just now
        return self._language

    def use_language(
        self, language: Language | str | Path, *, base: str | Path | None = None
    ) -> None:
        """Caption and draw with this language model.

        Args:
            language: A folder of train-lm or export, or a loaded one.
            base: Of adapters, where it lies elsewhere than when they were trained.

        Raises:
            ConfigError: It was trained with another codebook.
        """
        found = language if isinstance(language, Language) else load_language(language, base=base)
        own = (self.config.codes, self.config.tokens_per_image)
        its = (found.vocabulary.codes, found.vocabulary.tokens_per_image)
        if own != its:
            raise ConfigError(
                f"the language model writes {its[1]} codes of {its[0]}, this tokenizer {own[1]} "
                f"of {own[0]}: they were not trained together"
            )
        found.model.to(self.device)
        self._language = found

    def caption(
        self, images: Picture | Sequence[Picture], *, new_tokens: int = 40, seed: int = 0
    ) -> list[str]:
        """Return a caption of each picture."""
        return self.caption_codes(self.encode(images), new_tokens=new_tokens, seed=seed)

    def caption_codes(
        self, codes: NDArray[np.integer], *, new_tokens: int = 40, seed: int = 0,
        batch_size: int = 64,
    ) -> list[str]:  # fmt: skip
        """Return a caption of each row of codes (b, n)."""
        language = self.language
        begin = _beginning(language)
        prompts = [[*begin, *language.vocabulary.to_ids(row)] for row in codes.tolist()]
        texts: list[str] = []
        for start in range(0, len(prompts), batch_size):
            answers = language.generate(
                prompts[start : start + batch_size], new_tokens=new_tokens, images=False, seed=seed
            )
            texts += [language.words(answer) for answer in answers]
        return texts

    def draw(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        temperature: float = 0.7,
        top_p: float = 0.9,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[Image.Image]:
        """Draw texts: the language model writes codes, the de-tokeniser draws them."""
        codes = self.write_codes(prompts, seed=seed, temperature=temperature, top_p=top_p)
        return self.decode(codes, seed=seed, steps=steps, guidance=guidance)

    def write_codes(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        temperature: float = 0.7,
        top_p: float = 0.9,
        batch_size: int = 64,
    ) -> NDArray[np.int64]:
        """Return codes (b, n) that the language model writes for texts.

        Raises:
            DataError: No prompt, or an empty one.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(text.strip() for text in texts):
            raise DataError("no prompt was given; draw needs at least one text that is not empty")
        language = self.language
        begin, v = _beginning(language), self.language.vocabulary
        ids = [
            [*begin, *language.tokenizer(text, add_special_tokens=False).input_ids, v.begin]
            for text in texts
        ]
        rows: list[tuple[int, ...]] = []
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            answers = language.generate(
                part,
                new_tokens=v.tokens_per_image + 1,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
            rows += [v.images([v.begin, *answer])[0] for answer in answers]
        return np.array(rows, dtype=np.int64)

    # --- retrieval -------------------------------------------------------------------------

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Return (b, d) unit vectors of texts from the text branch, on the CPU.

        Raises:
            ConfigError: The tokenizer was stored without its text branch.
        """
        if self.pieces is None or not self.config.qformer.vocabulary:
            raise ConfigError(
                f"{self.parts.folder}: has no text branch (stage 1); retrieval needs it"
            )
        found = []
        for start in range(0, len(texts), batch_size):
            ids, mask = self.pieces.encode(
                texts[start : start + batch_size], length=self.config.qformer.max_text
            )
            found.append(
                self.model.text_vectors(ids.to(self.device), mask.to(self.device)).float().cpu()
            )
        return torch.cat(found)


def _beginning(language: Language) -> list[int]:
    bos = language.tokenizer.bos_token_id
    return [] if bos is None else [bos]
