"""Low-rank adapters through peft; on disk in peft's own layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyzoo.core.errors import ConfigError
from polyzoo.core.lazy import import_extra
from polyzoo.core.weights import read_weights, write_weights
from polyzoo.training.config import LoraConfig
from polyzoo.training.precision import freeze

ADAPTER = "adapter_model.safetensors"
_EXTRA = "polyzoo-training[lora]"


def adapt(model: nn.Module, config: LoraConfig, dtype: torch.dtype) -> nn.Module:
    """Return the model with adapters; everything else is frozen, its weights in the compute dtype.

    Raises:
        ConfigError: The targets name no layer.
        MissingExtraError: peft is not installed.
    """
    peft = import_extra("peft", install=_EXTRA)
    everywhere = config.targets == ("all-linear",)
    targets = _all_linear(model) if everywhere else list(config.targets)
    freeze(model, dtype)
    try:
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=targets,
                modules_to_save=list(config.modules_to_save) or None,
                use_dora=config.dora,
            ),
        )
    except ValueError as error:
        raise ConfigError(f"lora.targets={config.targets!r}: {error}") from error
    # peft keeps adapters in fp32, but not the modules trained in full: their small updates would
    # vanish in half precision.
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # peft casts every input to the adapters' fp32, which autocast then casts back: two passes over
    # each activation for nothing.
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = dtype == torch.float32
    return adapted


def _all_linear(model: nn.Module) -> str:
    """Return a pattern of all linear layers but a language model's output layer.

    peft's own "all-linear" is for transformers models only.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    names = [
        re.escape(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    ]
    if not names:
        raise ConfigError("lora.targets=('all-linear',): the model has no linear layer")
    return "|".join(names)


def is_adapted(model: nn.Module) -> bool:
    """Tell whether a model carries adapters."""
    return hasattr(model, "peft_config")


def write_adapter(
    folder: Path,
    model: nn.Module,
    *,
    metadata: Mapping[str, str] | None = None,
    trained: Mapping[str, Tensor] | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft would.

    Args:
        folder: Where to.
        model: With adapters.
        metadata: Texts to go into the file's header.
        trained: The trainable parameters in full, by name; the model's own where not given.
    """
    peft = import_extra("peft", install=_EXTRA)
    folder.mkdir(parents=True, exist_ok=True)
    config = cast("Any", model).peft_config["default"]
    training = config.inference_mode
    config.inference_mode = True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = training
    tensors = peft.get_peft_model_state_dict(
        model, state_dict=None if trained is None else dict(trained), save_embedding_layers=False
    )
    write_weights(folder / ADAPTER, tensors, metadata=metadata)


def read_adapter(folder: Path, model: nn.Module) -> nn.Module:
    """Give an adapted model the stored adapters; adapt it first where it is a base model."""
    peft = import_extra("peft", install=_EXTRA)
    if not is_adapted(model):
        return peft.PeftModel.from_pretrained(model, str(folder))
    peft.set_peft_model_state_dict(model, read_weights(folder / ADAPTER))
    return model
