from __future__ import annotations

import pytest
import torch
from torch import nn

from polyzoo.core.errors import ConfigError, WeightsError
from polyzoo.training import EmaConfig, TrainingError, load_best
from polyzoo.training.checkpoint.flat import FlatReader
from support.runs import Regressor, checkpoint_folder, fit, logged, mean_error, tiny_config


def test_the_best_weights_are_kept_and_load_strictly(tmp_path) -> None:
    values = {2: 0.1, 4: 0.7, 6: 0.3, 8: 0.7, 10: 0.2}
    weights: dict[int, torch.Tensor] = {}

    def evaluate(model, ctx):
        weights[ctx.step] = model.head.weight.detach().clone()
        return {"score": torch.tensor(values[ctx.step])}

    config = tiny_config(tmp_path, eval_every=2, best_metric="score", ema=EmaConfig(decay=0.5))
    result = fit(config, eval_fn=evaluate)
    assert result.best == {"step": 4, "metric": "score", "value": pytest.approx(0.7)}
    assert result.metrics == {"score": pytest.approx(0.2)}
    best = load_best(tmp_path, Regressor())
    assert torch.equal(best.head.weight, weights[4])
    average = FlatReader(checkpoint_folder(tmp_path, 4)).tensor("ema", "head.weight")
    assert torch.equal(best.head.weight, average)
    with pytest.raises(WeightsError):
        load_best(tmp_path, nn.Linear(2, 2))
    with pytest.raises(WeightsError, match="holds no weights"):
        load_best(tmp_path / "elsewhere", Regressor())


def test_less_can_be_better(tmp_path) -> None:
    config = tiny_config(tmp_path, eval_every=1, best_metric="error", best_mode="min")
    result = fit(config, eval_fn=mean_error)
    errors = dict(logged(tmp_path, "error", "eval"))
    assert result.best is not None
    assert result.best["value"] == min(errors.values()) == errors[result.best["step"]]


def test_evaluation_leaves_no_trace_in_training(tmp_path) -> None:
    modes: list[bool] = []

    def draws(model, ctx):
        modes.append(any(module.training for module in model.modules()))
        assert not torch.is_grad_enabled()
        return {"draw": torch.rand(())}

    def step(model, batch, ctx):
        modes.append(model.training and not model.middle.training)
        return (model(batch["x"]) - batch["y"]).square().mean()

    class HalfEval(Regressor):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.middle.eval()
            return self

    fit(tiny_config(tmp_path / "without"), model=HalfEval, step_fn=step)
    modes.clear()
    fit(tiny_config(tmp_path / "with", eval_every=3), model=HalfEval, step_fn=step, eval_fn=draws)
    assert logged(tmp_path / "with") == logged(tmp_path / "without")
    # Evaluated after steps 3, 6, 9 and at the end; never in training mode.
    assert [index for index, mode in enumerate(modes) if not mode] == [3, 7, 11, 13]
    values = [value for _, value in logged(tmp_path / "with", "draw", "eval")]
    assert len(set(values)) == 1


def test_metrics_must_be_numbers_and_hold_the_one_asked_for(tmp_path) -> None:
    config = tiny_config(tmp_path, steps=1, best_metric="recall")
    with pytest.raises(TrainingError, match=r"(?s)E-METRIC: best_metric='recall'.*returned error"):
        fit(config, eval_fn=mean_error)
    with pytest.raises(TrainingError, match=r"(?s)E-METRIC: evaluation metric 'a' is not a number"):
        fit(tiny_config(tmp_path / "b", steps=1), eval_fn=lambda model, ctx: {"a": "high"})


def test_frozen_modules_are_beside_the_model_in_the_compute_dtype(tmp_path) -> None:
    seen: list[nn.Module] = []

    def step(model, batch, ctx):
        teacher = ctx.frozen["teacher"]
        seen.append(teacher)
        with torch.no_grad():
            target = teacher(batch["x"]).squeeze(-1)
        return (ctx.call(model, "forward", batch["x"]) - target).square().mean()

    teacher = nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 1))
    config = tiny_config(tmp_path, steps=1, precision="bf16")
    fit(config, step_fn=step, frozen={"teacher": lambda: teacher})
    assert not seen[0].training
    assert {p.dtype for p in seen[0].parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in seen[0].parameters())
    stored = FlatReader(checkpoint_folder(tmp_path, 1)).shapes
    assert not any("teacher" in key for key in stored)


def test_masters_are_fp32_whatever_the_model_comes_in(tmp_path) -> None:
    def half() -> nn.Module:
        return Regressor().bfloat16()

    model = fit(tiny_config(tmp_path, steps=1, precision="bf16"), model=half).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.dropout(self.linear(x).tanh())


def stack() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(6, 1))


def stack_step(model, batch, ctx):
    return (model(batch["x"]).squeeze(-1) - batch["y"]).square().mean()


def test_recomputed_activations_give_the_same_run(tmp_path) -> None:
    models = {}
    for name, on in (("plain", False), ("recomputed", True)):
        config = tiny_config(tmp_path / name, steps=5, activation_checkpointing=on)
        models[name] = fit(
            config, model=stack, step_fn=stack_step, checkpoint_blocks=(Block,)
        ).model
    for one, other in zip(*(m.parameters() for m in models.values()), strict=True):
        assert torch.equal(one, other)
    assert [models[name][0].calls for name in models] == [5, 10]
    assert models["recomputed"].state_dict().keys() == models["plain"].state_dict().keys()
    models["recomputed"](torch.ones(1, 6)).sum().backward()
    assert models["recomputed"][0].calls == 11
    with pytest.raises(ConfigError, match=r"no block of checkpoint_blocks \(no class\)"):
        fit(tiny_config(tmp_path / "none", activation_checkpointing=True))
