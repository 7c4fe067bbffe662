from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from polyzoo.core.errors import ConfigError
from polyzoo.training import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    LogConfig,
    LoraConfig,
    OptimConfig,
    Trainer,
    TrainingError,
)
from support.runs import (
    Points,
    Regressor,
    assert_same_run,
    checkpoint_folder,
    everything_saved,
    fit,
    logged,
    mean_error,
    resumed_at,
    tiny_config,
)

STEPS = 10
SGD = OptimConfig(name="torch.optim:SGD", lr=0.01, options={"momentum": 0.9})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory):
    """Ten steps in one go; epochs end inside steps 3, 6 and 9, log windows span saves."""
    config = tiny_config(
        tmp_path_factory.mktemp("whole"),
        grad_accum=4,
        eval_every=4,
        best_metric="error",
        best_mode="min",
        ema=EmaConfig(decay=0.9),
        log=LogConfig(every=3, progress=False, plots=False),
    )
    fit(config, eval_fn=mean_error)
    return config


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resuming_at_any_step_changes_nothing(whole_run, step, tmp_path) -> None:
    result = resumed_at(whole_run, step, tmp_path / "resumed", eval_fn=mean_error)
    assert result.step == STEPS
    assert_same_run(Path(whole_run.run_dir), tmp_path / "resumed", STEPS)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"data": DataConfig(workers=2)},
        {"optim": SGD},
        {"optim": OptimConfig(name="torch.optim:Adafactor", lr=0.01)},
        {"lora": LoraConfig(rank=2, dropout=0.1, modules_to_save=("head",))},
    ],
    ids=["bf16", "fp16", "workers", "sgd", "adafactor", "lora"],
)
def test_resuming_in_other_settings(changes, tmp_path) -> None:
    config = tiny_config(tmp_path / "whole", steps=6, **changes)
    fit(config)
    resumed_at(config, 3, tmp_path / "resumed")
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", 6)


def test_one_seed_one_run_and_another_seed_another(tmp_path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        fit(tiny_config(tmp_path / name, steps=4, seed=seed))
    assert_same_run(tmp_path / "one", tmp_path / "two", 4)
    assert logged(tmp_path / "one") != logged(tmp_path / "three")


def test_the_log_has_every_step_once_after_a_crash_between_saves(tmp_path) -> None:
    config = tiny_config(tmp_path / "run", steps=7, checkpoint=CheckpointConfig(every=3))

    def failing(model, batch, ctx):
        if ctx.step == 5:
            raise RuntimeError("power cut")
        return (model(batch["x"]) - batch["y"]).square().mean()

    with pytest.raises(RuntimeError, match="power cut"):
        fit(config, step_fn=failing)
    assert [step for step, _ in logged(tmp_path / "run")] == [1, 2, 3, 4, 5]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    fit(config)
    assert [step for step, _ in logged(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]


def test_more_steps_go_on_from_a_finished_run_and_the_same_steps_do_nothing(tmp_path) -> None:
    config = tiny_config(tmp_path / "run", steps=3)
    first = fit(config)
    again = fit(config)
    assert again.step == 3
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert fit(dataclasses.replace(config, steps=5)).step == 5
    assert [step for step, _ in logged(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_resume_rules_for_folders(tmp_path) -> None:
    config = tiny_config(tmp_path / "run", steps=2)
    with pytest.raises(TrainingError, match="E-CKPT-NONE"):
        fit(dataclasses.replace(config, resume="must"))
    fit(dataclasses.replace(config, resume="never"))
    with pytest.raises(TrainingError, match=r"E-RUN-EXISTS.*step 2"):
        fit(dataclasses.replace(config, resume="never"))
    with pytest.raises(TrainingError, match=r"(?s)E-CKPT-NONE.*checkpoints here: 1, 2"):
        fit(dataclasses.replace(config, checkpoint=CheckpointConfig(from_step=9)))


def test_another_recipe_is_refused_unless_accepted(tmp_path) -> None:
    config = tiny_config(tmp_path / "run", steps=2)
    fit(config)
    other = dataclasses.replace(config, steps=3, optim=OptimConfig(lr=0.5), seed=1)
    with pytest.raises(TrainingError) as caught:
        fit(other)
    assert caught.value.code == "E-CKPT-MISMATCH"
    assert "optim.lr: 0.02 then, 0.5 now" in caught.value.why
    assert "seed: 0 then, 1 now" in caught.value.why
    assert fit(dataclasses.replace(other, accept_changes=True)).step == 3


def test_accepted_changes_may_bring_another_optimizer_and_an_average(tmp_path, caplog) -> None:
    config = tiny_config(tmp_path / "run", steps=2)
    fit(config)
    for steps, changes in ((4, {"optim": SGD, "ema": EmaConfig(decay=0.9)}), (6, {})):
        changed = dataclasses.replace(config, steps=steps, accept_changes=True, **changes)
        assert fit(changed).step == steps
    assert "the optimizer was AdamW; its state starts anew" in caplog.text
    assert "the optimizer was SGD; its state starts anew" in caplog.text


def test_another_model_is_refused_by_name_and_shape(tmp_path) -> None:
    config = tiny_config(tmp_path / "run", steps=2)
    fit(config)

    def wider() -> nn.Module:
        model = Regressor()
        model.head = nn.Linear(8, 2)
        model.extra = nn.Linear(1, 1)
        return model

    with pytest.raises(TrainingError) as caught:
        fit(dataclasses.replace(config, steps=3), model=wider)
    assert caught.value.code == "E-CKPT-MISMATCH"
    assert "fp32|extra.bias: absent in the checkpoint, (1,) here" in caught.value.why
    assert "fp32|head.weight: (1, 8) in the checkpoint, (2, 8) here" in caught.value.why


def test_other_frozen_weights_are_refused(tmp_path) -> None:
    config = tiny_config(tmp_path / "run", steps=2)
    teacher = nn.Linear(6, 1)
    fit(config, frozen={"teacher": teacher})
    longer = dataclasses.replace(config, steps=3)
    changed = nn.Linear(6, 1)
    with pytest.raises(TrainingError, match=r"(?s)E-CKPT-MISMATCH.*different now: teacher"):
        fit(longer, frozen={"teacher": changed})
    assert fit(longer, frozen={"teacher": teacher}).step == 3


def test_another_batch_size_goes_on_at_the_same_sample(tmp_path) -> None:
    seen: list[int] = []

    def watching(model, batch, ctx):
        seen.extend(batch["index"].tolist())
        return (model(batch["x"]) - batch["y"]).square().mean()

    config = tiny_config(tmp_path / "run", steps=5)
    fit(config, step_fn=watching)
    fit(dataclasses.replace(config, steps=7, batch_size=12), step_fn=watching)
    assert sorted(seen) == list(range(44))


def test_the_run_folder_says_what_made_it(tmp_path) -> None:
    config = tiny_config(tmp_path / "run", steps=1)
    fit(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"]["lr"] == 0.02
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert torch.__version__.startswith(made["versions"]["torch"])
    assert made["parameters"] == sum(p.numel() for p in Regressor().parameters())
    assert {"command", "python", "git", "host", "device"} <= made.keys()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 1)


def test_frozen_parameters_are_not_stored(tmp_path) -> None:
    def half_frozen() -> nn.Module:
        model = Regressor()
        model.first.requires_grad_(False)
        return model

    fit(tiny_config(tmp_path / "run", steps=1), model=half_frozen)
    tensors, _ = everything_saved(tmp_path / "run", 1)
    names = {key.split("|")[1] for key in tensors}
    assert "first.weight" not in names
    assert {"head.weight", "norm.running_mean", "norm.num_batches_tracked"} <= names


def test_neither_length_nor_evaluation_may_be_missing(tmp_path) -> None:
    with pytest.raises(ConfigError, match="steps and epochs are both None"):
        fit(tiny_config(tmp_path, steps=None))
    with pytest.raises(ConfigError, match=r"best_metric='error'.*need an eval_fn"):
        fit(tiny_config(tmp_path, best_metric="error"))


def test_epochs_count_short_last_steps(tmp_path) -> None:
    config = tiny_config(tmp_path / "run", steps=None, epochs=2, grad_accum=4)
    result = Trainer(config).fit(
        model=Regressor,
        step_fn=lambda model, batch, ctx: (model(batch["x"]) - batch["y"]).square().mean(),
        train_data=Points(44),
    )
    # 11 micro-batches make steps of 4, 4 and 3.
    assert result.step == 6
    assert checkpoint_folder(tmp_path / "run", 6).is_dir()
