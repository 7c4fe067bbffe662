"""A causal language model that reads and writes images: loading, growing, generating."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.assets import asset_folder
from polyzoo.core.assets.table import ASSETS
from polyzoo.core.errors import ConfigError, WeightsError
from polyzoo.core.io import atomic_path
from polyzoo.core.weights import FILE_NAME, load_into, read_weights, write_weights
from polyzoo.seed.constraint import WellFormedImages
from polyzoo.seed.vocabulary import ImageVocabulary

ATTENTION = "polyzoo"


@dataclass
class Language:
    """A model with its tokenizer and image vocabulary."""

    model: Any
    """A transformers causal LM, with adapters or without."""
    tokenizer: Any
    """Extended by the image words."""
    vocabulary: ImageVocabulary

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        images: bool = True,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Continue prompts of ids; what is returned are the new ids, up to the end of text.

        A prompt that ends in `<img>` forces an image.

        Args:
            prompts: One list of ids each.
            new_tokens: At most so many.
            images: Whether images may be begun.
            temperature: 0 takes the likeliest token.
            top_p: Sample from the smallest set of tokens with this much probability.
            seed: Of the sampling.
        """
        if not prompts:
            raise ConfigError("no prompt was given")
        if temperature < 0 or not 0 < top_p <= 1:
            raise ConfigError(
                f"temperature={temperature} must not be negative, and top_p={top_p} must lie "
                "above 0 and not above 1"
            )
        longest = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, longest - len(prompt) :] = 1
        rules = WellFormedImages(self.vocabulary, max_length=longest + new_tokens, images=images)
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=new_tokens,
                logits_processor=[rules],
                # From the tokenizer: the published model config names the wrong ones.
                eos_token_id=self.tokenizer.eos_token_id,
                bos_token_id=self.tokenizer.bos_token_id,
                pad_token_id=pad,
                **sampling,
            )
        answers = []
        for row in out[:, longest:].tolist():
            stop = self.tokenizer.eos_token_id
            answers.append(row[: row.index(stop)] if stop in row else row)
        return answers

    def words(self, ids: Sequence[int]) -> str:
        """Return text of ids, without image words and markers."""
        own = [i for i in ids if not self.vocabulary.is_code(i)
               and i not in (self.vocabulary.begin, self.vocabulary.end)]  # fmt: skip
        return self.tokenizer.decode(own, skip_special_tokens=True).strip()


def load_base(name: str | Path, *, local_files_only: bool = False) -> tuple[Any, Any]:
    """Return a plain causal LM and its tokenizer: an asset's name, a folder, or a hub id.

    Raises:
        WeightsError: There is none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    register_attention()
    source = str(asset_folder(str(name))) if str(name) in ASSETS else str(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
        options: dict[str, Any] = {"attn_implementation": ATTENTION, "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(
            source, local_files_only=local_files_only, **options
        )
    except (OSError, ValueError) as error:
        raise WeightsError(f"{name}: is no causal language model: {_line(error)}") from error
    return model, tokenizer


def grow(model: Any, tokenizer: Any, *, codes: int, tokens_per_image: int) -> ImageVocabulary:
    """Give a language model the image words, in place; new rows start near the old ones' mean.

    Raises:
        ConfigError: See ImageVocabulary.extend.
    """
    vocabulary = ImageVocabulary.extend(tokenizer, codes=codes, tokens_per_image=tokens_per_image)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = model.get_input_embeddings().weight.data
        output = model.get_output_embeddings()
        tables = [table]
        if output is not None and output.weight is not model.get_input_embeddings().weight:
            tables.append(output.weight.data)
        for weight in tables:
            old = weight[:rows].float()
            noise = torch.randn(len(tokenizer) - rows, weight.shape[1]) * old.std(0).cpu() * 0.5
            weight[rows:] = (old.mean(0).cpu() + noise).to(weight.dtype)
    check_markers(model, tokenizer)
    vocabulary.check(tokenizer, rows=model.get_input_embeddings().weight.shape[0])
    return vocabulary


def check_markers(model: Any, tokenizer: Any) -> None:
    """Make the model's config agree with its tokenizer on where text begins and ends."""
    from polyzoo.core.log import get_logger

    for name in ("bos_token_id", "eos_token_id"):
        own = getattr(tokenizer, name)
        for config in (model.config, model.generation_config):
            given = getattr(config, name, None)
            if own is not None and given is not None and given != own:
                get_logger(__name__).warning(
                    "the model's config says %s=%s and its tokenizer %s; the tokenizer's is used",
                    name, given, own,
                )  # fmt: skip
            setattr(config, name, own)


def small_model(
    tokenizer: Any, *, width: int, layers: int, heads: int, ffn: int, positions: int
) -> Any:
    """Return an untrained LLaMA of a few layers for a tokenizer, embeddings tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    register_attention()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=ffn,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = ATTENTION
    return LlamaForCausalLM(config)


def save_language(folder: str | Path, language: Language, *, int8: bool = False) -> None:
    """Write a whole model (no adapters): weights, config, tokenizer and image vocabulary.

    Args:
        folder: Made where missing.
        language: The model; merge adapters first.
        int8: Store matrices as int8 with one scale a row, which only this package reads.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = language.model
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_tokenizer(folder, language)
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # the embedding, once more
    large = [name for name, t in tensors.items() if t.ndim >= 2] if int8 else []
    write_weights(folder / FILE_NAME, tensors, int8_rows=large)


def save_tokenizer(folder: Path, language: Language) -> None:
    """Write tokenizer and image vocabulary beside a model or its adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    language.tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    if file.is_file():  # without its indentation: half the size
        content = json.loads(file.read_text(encoding="utf-8"))
        with atomic_path(file) as temporary:
            temporary.write_text(
                json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
            )
    language.vocabulary.save(folder)


def load_language(
    folder: str | Path, *, base: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> Language:
    """Read a model folder, or a folder of adapters (then their base is read and grown first).

    Args:
        folder: As train-lm or export wrote it.
        base: Of adapters, where it lies elsewhere than when they were trained.
        dtype: Of the weights.

    Raises:
        WeightsError: Something is missing or does not fit.
        ConfigError: Tokenizer and vocabulary do not belong together.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    register_attention()
    vocabulary = ImageVocabulary.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    vocabulary.check(tokenizer)
    if (folder / "adapter_config.json").is_file():
        from polyzoo.seed.adapters import load_adapters

        model: Any = load_adapters(folder, tokenizer=tokenizer, vocabulary=vocabulary, base=base)
    else:
        model = _read_model(folder)
        vocabulary.check(tokenizer, rows=model.get_input_embeddings().weight.shape[0])
    return Language(model.to(dtype).eval(), tokenizer, vocabulary)


def _read_model(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    config._attn_implementation = ATTENTION
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = read_weights(folder, dtype=torch.float32)
    if getattr(config, "tie_word_embeddings", False):
        head = "lm_head.weight"
        if head in model.state_dict() and head not in tensors:
            tensors[head] = tensors["model.embed_tokens.weight"]
    load_into(model, tensors, source=str(folder))
    return model


def register_attention() -> None:
    """Let transformers find this zoo's attention by name."""
    from polyzoo.attention.integrations.transformers import register

    register()


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def perplexity(language: Language, text: str, *, window: int = 512) -> float:
    """Return exp of the mean loss of plain text, in windows of ids that do not overlap.

    Raises:
        ConfigError: The text has fewer than two ids.
    """
    ids: list[int] = language.tokenizer(text, add_special_tokens=False).input_ids
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, window):
            piece = torch.tensor([ids[start : start + window + 1]], device=language.device)
            if piece.shape[1] < 2:
                continue
            logits: Tensor = language.model(input_ids=piece[:, :-1]).logits
            losses = nn.functional.cross_entropy(logits[0].float(), piece[0, 1:], reduction="sum")
            total, count = total + float(losses), count + piece.shape[1] - 1
    if not count:
        raise ConfigError("perplexity needs a text of at least two tokens")
    return float(torch.tensor(total / count).exp())
