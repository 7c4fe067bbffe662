"""Low-rank adapters on a language model that learns image words (peft)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyzoo.core.errors import ConfigError, WeightsError
from polyzoo.core.lazy import import_extra
from polyzoo.core.weights import read_weights, write_weights
from polyzoo.seed.presets import AdapterConfig
from polyzoo.seed.vocabulary import ImageVocabulary

WEIGHTS = "adapter_model.safetensors"
_EXTRA = "polyzoo-seed[train]"


def adapt(model: Any, config: AdapterConfig, vocabulary: ImageVocabulary) -> Any:
    """Return the grown model with adapters; all else is frozen.

    With `rows="new"` only the embeddings of image words learn, so an adapter stays a few MB. With
    `rows="all"` embeddings, output layer and norms are trained and stored in full, as published.

    Raises:
        ConfigError: A target names no layer; lists those there are.
    """
    peft = import_extra("peft", install=_EXTRA)
    embedding = _name_of(model, model.get_input_embeddings())
    output = model.get_output_embeddings()
    tied = output is None or output.weight is model.get_input_embeddings().weight
    settings: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": target_names(model, config.targets),
        "task_type": "CAUSAL_LM",
    }
    if config.rows == "new":
        new = list(range(vocabulary.shift, max(vocabulary.begin, vocabulary.end) + 1))
        places = {embedding: new}
        if not tied:
            places[_name_of(model, output)] = new
        settings["trainable_token_indices"] = places
    else:
        full = [embedding, *norm_names(model)]
        if not tied:
            full.append(_name_of(model, output))
        settings["modules_to_save"] = full
        settings["ensure_weight_tying"] = tied
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def linear_names(model: Any) -> list[str]:
    """Return the last parts of the names of all linear layers but the output layer."""
    output = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    return sorted(names)


def norm_names(model: Any) -> list[str]:
    """Return the last parts of the names of all norms."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
        }
    )


def target_names(model: Any, targets: tuple[str, ...]) -> list[str]:
    """Return the linear layers to adapt: `all-linear`, or endings of names, each checked.

    Raises:
        ConfigError: One matches nothing.
    """
    known = linear_names(model)
    if targets == ("all-linear",):
        return known
    for target in targets:
        if target not in known:
            raise ConfigError(
                f"targets: no linear layer is called {target!r}; there are {', '.join(known)}"
            )
    return list(targets)


def save_adapters(folder: str | Path, model: Any, *, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors in peft's layout.

    Args:
        folder: Made where missing.
        model: As `adapt` made it.
        base: Name of the base model, to load it again: asset, folder or hub id.
    """
    peft = import_extra("peft", install=_EXTRA)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    before, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = before
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    write_weights(folder / WEIGHTS, tensors)


def load_adapters(
    folder: Path, *, tokenizer: Any, vocabulary: ImageVocabulary, base: str | Path | None
) -> Any:
    """Read adapters onto their base, grown exactly as it was for training.

    Raises:
        WeightsError: The adapters do not fit the base.
    """
    from polyzoo.seed.language import grow, load_base

    peft = import_extra("peft", install=_EXTRA)
    about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = base or about.get("base_model_name_or_path")
    if not name:
        raise WeightsError(f"{folder}: does not say what its base is; give base")
    model, plain = load_base(name)
    grown = grow(model, plain, codes=vocabulary.codes,
                 tokens_per_image=vocabulary.tokens_per_image)  # fmt: skip
    if (grown.shift, grown.fingerprint) != (vocabulary.shift, vocabulary.fingerprint):
        raise ConfigError(
            f"{name}: gives image ids from {grown.shift} on, and the adapters were trained with "
            f"{vocabulary.shift}: it is another base model, or its tokenizer was changed"
        )
    del tokenizer  # the one in the folder is kept by the caller
    config = peft.LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    adapted = peft.get_peft_model(model, config)
    tensors = read_weights(folder / WEIGHTS)
    result = peft.set_peft_model_state_dict(adapted, tensors)
    lost = [key for key in result.unexpected_keys if re.search("lora|token|modules", key)]
    if lost:
        raise WeightsError(f"{folder}: {len(lost)} tensors have no place, first {lost[0]}")
    return adapted


@torch.no_grad()
def merge(model: Any) -> Any:
    """Return the plain model with its adapters worked in."""
    if not hasattr(model, "merge_and_unload"):
        raise ConfigError("the model has no adapters to merge")
    return model.merge_and_unload()


def _name_of(model: Any, wanted: Any) -> str:
    """Return the last part of a module's name."""
    for name, module in model.named_modules():
        if module is wanted:
            return name.rpartition(".")[2]
    raise ConfigError(f"the model has no {type(wanted).__name__} where its embeddings should be")
