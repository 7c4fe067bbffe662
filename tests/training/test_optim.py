from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.training import EmaConfig, OptimConfig, ParamGroup, ScheduleConfig, StepOutput
from polyzoo.training.optim import build_optimizer, set_learning_rate
from support.runs import FEATURES, Regressor, fit, logged, tiny_config

SGD = OptimConfig(name="torch.optim:SGD", lr=1.0, weight_decay=0.0)
CONSTANT = ScheduleConfig(kind="constant")


def test_adamw_follows_its_formula() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    config = OptimConfig(lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    optimizer = build_optimizer(model, config)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 6):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            decay = 0.2 if name == "weight" else 0.0
            first[name] = 0.8 * first[name] + 0.2 * p.grad
            second[name] = 0.9 * second[name] + 0.1 * p.grad**2
            corrected = first[name] / (1 - 0.8**step)
            spread = (second[name] / (1 - 0.9**step)).sqrt() + 1e-6
            expected[name] = expected[name] * (1 - 0.1 * decay) - 0.1 * corrected / spread
        set_learning_rate(optimizer, 0.1)
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_groups_scale_the_learning_rate_and_choose_their_decay(tmp_path) -> None:
    def groups(model):
        return [
            ParamGroup(parameters=model.head.parameters(), lr_scale=0.0),
            ParamGroup(parameters=[p for n, p in model.named_parameters() if "head" not in n]),
        ]

    torch.manual_seed(0)
    start = Regressor()
    before = copy.deepcopy(start.state_dict())
    fit(tiny_config(tmp_path, steps=2), model=start, param_groups=groups)
    assert torch.equal(start.head.weight, before["head.weight"])
    assert not torch.equal(start.first.weight, before["first.weight"])


@pytest.mark.parametrize(
    ("config", "groups", "message"),
    [
        (OptimConfig(name="torch.optim:Nothing"), None, "cannot be imported"),
        (OptimConfig(name="torch.nn:Linear"), None, "is not a torch.optim.Optimizer class"),
        (OptimConfig(name="torch.optim:SGD", options={"speed": 3}), None, "optim.options=.*speed"),
        (SGD, lambda m: [ParamGroup(parameters=[m.weight])], "1 in no group, first bias"),
        (SGD, lambda m: [ParamGroup(parameters=[m.weight, m.weight])], "weight is in two groups"),
        (
            SGD,
            lambda m: [ParamGroup(parameters=nn.Linear(2, 2).parameters())],
            r"of shape \(2, 2\) is not the model's",
        ),
    ],
)
def test_bad_optimizers_and_groups_are_explained(config, groups, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(nn.Linear(2, 2), config, groups)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), SGD)


class Sequences:
    """Sequences of very different length, padded with zeros; the mask counts the tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int):
        x = torch.zeros(9, FEATURES)
        length = self.lengths[index]
        x[:length] = torch.randn(length, FEATURES, generator=torch.Generator().manual_seed(index))
        return x, torch.arange(9) < length


def token_step(model, batch, ctx) -> StepOutput:
    x, mask = batch
    error = (model(x).squeeze(-1) - x.sum(-1)).square()
    tokens = mask.sum()
    return StepOutput(
        loss=(error * mask).sum() / tokens, weight=tokens, tokens=tokens, metrics={"n": tokens}
    )


def sample_step(model, batch, ctx):
    x, _ = batch
    return (model(x).squeeze(-1) - x.sum(-1)).square().mean()


@pytest.mark.parametrize("step_fn", [token_step, sample_step], ids=["tokens", "samples"])
@pytest.mark.parametrize("batch_size", [7, 4, 1])
def test_accumulation_equals_one_large_batch(step_fn, batch_size, tmp_path) -> None:
    # 14 samples: batches of 4 leave a last one of 2, which must not count double.
    data = Sequences([1, 9, 2, 7, 3, 3, 9, 1, 5, 8, 2, 2, 6, 4])
    weights, losses, norms = [], [], []
    for name, size in (("large", 14), ("small", batch_size)):
        config = tiny_config(
            tmp_path / name,
            steps=3,
            batch_size=size,
            grad_accum=-(-14 // size),
            optim=OptimConfig(name="torch.optim:SGD", lr=0.05),
            schedule=CONSTANT,
            grad_clip=2.0,
        )
        model = fit(
            config, model=lambda: nn.Linear(FEATURES, 1), step_fn=step_fn, train_data=data
        ).model
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        losses.append([loss for _, loss in logged(tmp_path / name)])
        norms.append([norm for _, norm in logged(tmp_path / name, "grad_norm")])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_a_negative_weight_is_refused(tmp_path) -> None:
    def step(model, batch, ctx):
        return StepOutput(loss=model(batch["x"]).mean(), weight=-1.0)

    with pytest.raises(DataError, match=r"weight=-1\.0 must be a finite number of at least 0"):
        fit(tiny_config(tmp_path), step_fn=step)


def test_clipping_bounds_the_step_and_logs_the_norm_before_it(tmp_path) -> None:
    torch.manual_seed(1)
    model = Regressor().eval()
    model.train = lambda mode=True: model  # dropout off: the gradient below is the run's
    start = copy.deepcopy(model.state_dict())
    batch = {"x": torch.ones(4, FEATURES), "y": torch.full((4,), 30.0)}

    def step(model, _, ctx):
        return (model(batch["x"]) - batch["y"]).square().mean()

    step(model, None, None).backward()
    true_norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    model.zero_grad()
    config = tiny_config(tmp_path, steps=1, grad_clip=0.5, optim=SGD, schedule=CONSTANT)
    fit(config, model=model, step_fn=step)
    moved = [p.detach() - start[name] for name, p in model.named_parameters()]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert logged(tmp_path, "grad_norm") == [(1, pytest.approx(true_norm, rel=1e-5))]
    assert true_norm > 5


def test_the_average_follows_its_recursion_and_is_what_is_evaluated_and_returned(tmp_path) -> None:
    decay = 0.6
    weights: list[torch.Tensor] = []
    evaluated: list[torch.Tensor] = []

    def step(model, batch, ctx):
        weights.append(model.first.weight.detach().clone())
        return (model(batch["x"]) - batch["y"]).square().mean()

    def evaluate(model, ctx):
        evaluated.append(model.first.weight.detach().clone())
        return {"error": 0.0}

    config = tiny_config(tmp_path, steps=6, eval_every=1, ema=EmaConfig(decay=decay, warmup=False))
    result = fit(config, step_fn=step, eval_fn=evaluate)
    average = weights[0]
    for index, expected_from in enumerate(weights[1:]):
        average = decay * average + (1 - decay) * expected_from
        torch.testing.assert_close(evaluated[index], average, rtol=1e-6, atol=1e-7)
    assert torch.equal(result.model.first.weight, evaluated[-1])


def test_warmup_lets_the_first_average_forget_the_start(tmp_path) -> None:
    torch.manual_seed(3)
    start = nn.Linear(FEATURES, 1)
    first = start.weight.detach().clone()

    def step(model, batch, ctx):
        return (model(batch["x"]).squeeze(-1) - batch["y"]).square().mean()

    config = tiny_config(tmp_path, steps=1, ema=EmaConfig(decay=0.9999), optim=SGD)
    fit(config, model=start, step_fn=step)
    from polyzoo.training.checkpoint.flat import FlatReader
    from support.runs import checkpoint_folder

    reader = FlatReader(checkpoint_folder(tmp_path, 1))
    trained = reader.tensor("fp32", "weight")
    # At step 1 the share of the old average is (1 + 1) / (10 + 1).
    expected = 2 / 11 * first + 9 / 11 * trained
    torch.testing.assert_close(reader.tensor("ema", "weight"), expected)
