from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from polyzoo.training import CheckpointConfig, LogConfig, OptimConfig, StepOutput, TrainingError
from polyzoo.training.checkpoint.flat import FlatReader
from support.runs import Points, Regressor, checkpoint_folder, fit, logged, tiny_config

FUSED = OptimConfig(lr=0.02)
OTHER = OptimConfig(name="torch.optim:SGD", lr=0.01)


class Poisoned(Points):
    """One sample is not a number."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = bad

    def __getitem__(self, index: int):
        sample = super().__getitem__(index)
        if index in self.bad:
            sample["y"] = torch.tensor(float("nan"))
        return sample


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("every", [1, 5])
def test_a_nan_stops_the_run_with_its_step_and_keeps_the_batch(precision, every, tmp_path) -> None:
    log = LogConfig(every=every, progress=False, plots=False)
    config = tiny_config(tmp_path, steps=11, precision=precision, log=log)
    with pytest.raises(TrainingError) as caught:
        fit(config, train_data=Poisoned(17))
    assert caught.value.code == "E-NAN"
    step = next(s for s in range(1, 12) if f"step {s}: the loss is not finite" in str(caught.value))
    dumped = torch.load(tmp_path / f"bad_batch_{step}.pt", weights_only=True)
    (micro_batch,) = dumped["micro_batches"]
    assert 17 in micro_batch["indices"]
    assert micro_batch["batch"]["index"].tolist() == micro_batch["indices"]
    assert micro_batch["batch"]["y"].isnan().sum() == 1
    if step > 1 and precision != "fp16":
        assert f"at step {step - 1}" in caught.value.why
    saved = sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*"))
    assert saved[-1] == f"step_{step - 1:08d}"
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("optim", [FUSED, OTHER], ids=["fused", "other"])
def test_skipping_leaves_the_weights_alone_for_that_step(optim, tmp_path) -> None:
    config = tiny_config(tmp_path, steps=11, nan_policy="skip", optim=optim)
    result = fit(config, train_data=Poisoned(17))
    assert result.step == 11
    skipped = [count for _, count in logged(tmp_path, "skipped")]
    bad_step = skipped.index(1) + 1
    assert skipped[-1] == 1
    before, after = (
        FlatReader(checkpoint_folder(tmp_path, step)) for step in (bad_step - 1, bad_step)
    )
    names = [key for key in after.shapes if not key.startswith("buffer|")]
    for state, name in (key.split("|") for key in names):
        assert torch.equal(before.tensor(state, name), after.tensor(state, name))
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())


def test_too_many_skips_in_a_row_end_the_run(tmp_path) -> None:
    config = tiny_config(tmp_path, steps=11, nan_policy="skip", max_skips=2)
    with pytest.raises(TrainingError, match=r"(?s)E-NAN: step 3: .*max_skips=2"):
        fit(config, train_data=Poisoned(*range(44)))


def test_fp16_finds_its_scale_and_gives_up_when_there_is_none(tmp_path) -> None:
    def large(model, batch, ctx):
        # Finite in fp16, but not after scaling by 65,536.
        return (model(batch["x"]) - batch["y"]).square().mean() * 1e3

    fit(tiny_config(tmp_path / "large", steps=30, precision="fp16"), step_fn=large)
    skips = [count for _, count in logged(tmp_path / "large", "skipped")]
    assert 0 < skips[-1] < 30
    assert skips[-1] == skips[-2]

    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    def hopeless(model, batch, ctx):
        return Explodes.apply(model(batch["x"])).float().square().mean()

    with pytest.raises(TrainingError, match="E-NAN: step 31: the gradient norm is not finite"):
        fit(tiny_config(tmp_path / "none", steps=40, precision="fp16"), step_fn=hopeless)


def test_out_of_memory_says_where_and_what_to_try(tmp_path) -> None:
    def greedy(model, batch, ctx):
        return torch.empty(2**58).sum() + model(batch["x"]).sum()

    with pytest.raises(TrainingError) as caught:
        fit(tiny_config(tmp_path, grad_accum=3), step_fn=greedy)
    assert caught.value.code == "E-OOM"
    assert "in the forward pass" in caught.value.what
    assert "batch_size=2 with grad_accum=6" in caught.value.fix
    assert "activation_checkpointing=true" in caught.value.fix


@pytest.mark.parametrize(
    ("step_fn", "fault"),
    [
        (lambda m, b, c: 3.0, "it is a float"),
        (lambda m, b, c: m(b["x"]), r"its shape is \(4,\)"),
        (lambda m, b, c: m(b["x"]).sum().detach(), "does not depend on any trainable parameter"),
        (lambda m, b, c: StepOutput(loss=None), "it is a NoneType"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_explained(step_fn, fault, tmp_path) -> None:
    with pytest.raises(TrainingError, match=rf"(?s)E-LOSS.*{fault}"):
        fit(tiny_config(tmp_path), step_fn=step_fn)


def test_parameters_without_gradient_are_named(tmp_path, caplog) -> None:
    def build() -> nn.Module:
        model = Regressor()
        model.forgotten = nn.Linear(3, 3)
        return model

    fit(tiny_config(tmp_path, steps=2), model=build)
    warnings = [record.getMessage() for record in caplog.records if "W-UNUSED" in record.message]
    assert len(warnings) == 1
    assert "2 trainable parameters get no gradient: forgotten.weight, forgotten.bias" in warnings[0]


class Reads(TorchDispatchMode):
    """Counts how often the host asks the device for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if "_local_scalar_dense" in str(function):
            self.count += 1
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("changes", [{}, {"grad_accum": 3}, {"nan_policy": "skip"}])
def test_a_step_never_waits_for_the_device(changes, tmp_path) -> None:
    """Whatever is read, is read at log lines: more steps between two of them read no more."""
    counts = []
    for steps in (3, 30):
        config = tiny_config(
            tmp_path / str(steps),
            steps=steps,
            log=LogConfig(every=1000, progress=False, plots=False),
            checkpoint=CheckpointConfig(every=None),
            **changes,
        )
        with Reads() as reads:
            fit(config, train_data=Plain())
        counts.append(reads.count)
    assert counts[0] == counts[1]


class Plain(Points):
    """Reads no number itself."""

    def __getitem__(self, index: int):
        features = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return {"x": features, "y": features.sum()}
