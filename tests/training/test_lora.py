from __future__ import annotations

import hashlib
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from polyzoo.core.errors import ConfigError
from polyzoo.training import EmaConfig, LoraConfig, load_best
from support.runs import FEATURES, Regressor, checkpoint_folder, fit, mean_error, tiny_config


def base() -> nn.Module:
    torch.manual_seed(4)
    return Regressor()


def digest(model: nn.Module) -> str:
    values = [v.detach().float().numpy().tobytes() for v in model.parameters()]
    return hashlib.sha256(b"".join(values)).hexdigest()


def test_plain_peft_loads_the_adapters_of_a_checkpoint(tmp_path) -> None:
    model = base()
    before = digest(model)
    lora = LoraConfig(rank=2, alpha=8.0, targets=("first", "middle"), modules_to_save=("head",))
    result = fit(tiny_config(tmp_path, lora=lora), model=model)
    folder = checkpoint_folder(tmp_path, 10) / "adapter"
    stored = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_" in name or ".head." in name for name in stored)
    assert stored["base_model.model.first.lora_A.weight"].shape == (2, FEATURES)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (2, 8.0, "LORA")

    loaded = peft.PeftModel.from_pretrained(base(), str(folder)).eval()
    trained = result.model.eval()
    # Running statistics are the base model's and not part of an adapter.
    loaded.base_model.model.norm.load_state_dict(trained.base_model.model.norm.state_dict())
    x = torch.randn(5, FEATURES)
    assert torch.equal(loaded(x), trained(x))
    assert not torch.equal(loaded(x), base().eval()(x))
    assert digest(base()) == before


def test_the_checkpoint_holds_no_base_weight(tmp_path) -> None:
    fit(tiny_config(tmp_path, steps=1, lora=LoraConfig(rank=2)), model=base)
    stored = load_file(checkpoint_folder(tmp_path, 1) / "rank00000.safetensors")
    weights = {name for name in stored if not name.startswith("buffer|")}
    assert weights
    assert all(".lora_" in name for name in weights)


def test_the_base_is_frozen_in_the_compute_dtype_and_adapters_are_fp32(tmp_path) -> None:
    config = tiny_config(tmp_path, steps=1, lora=LoraConfig(rank=2), precision="bf16")
    model = fit(config, model=base).model
    dtypes = {(p.requires_grad, p.dtype) for n, p in model.named_parameters() if "norm" not in n}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    # A layer with running statistics keeps its weights beside them.
    assert model.base_model.model.norm.weight.dtype == torch.float32


def test_best_adapters_load_into_a_base(tmp_path) -> None:
    config = tiny_config(
        tmp_path,
        lora=LoraConfig(rank=2),
        ema=EmaConfig(decay=0.5),
        eval_every=5,
        best_metric="error",
        best_mode="min",
    )
    result = fit(config, model=base, eval_fn=mean_error)
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert result.best is not None
    loaded = load_best(tmp_path, base())
    again = load_best(tmp_path, result.model)
    mine = {n: p for n, p in loaded.named_parameters() if ".lora_" in n}
    for name, parameter in again.named_parameters():
        if name in mine:
            assert torch.equal(parameter, mine[name])


def test_targets_that_match_nothing_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets=\('q_proj',\)"):
        fit(tiny_config(tmp_path, lora=LoraConfig(targets=("q_proj",))))
    with pytest.raises(ConfigError, match="the model has no linear layer"):
        fit(tiny_config(tmp_path, lora=LoraConfig()), model=lambda: nn.Conv1d(1, 1, 1))
