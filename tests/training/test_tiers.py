"""Strategies that need torch alone, in two processes: the same training as in one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from polyzoo.core.errors import PolyzooError
from polyzoo.training import CheckpointConfig, LoraConfig, StepContext
from polyzoo.training.checkpoint.store import read_manifest
from support.ranks import together
from support.tiers import (
    Tower,
    assert_close,
    tower_config,
    train_tower,
    weights_of,
)

SHARDED = ("ddp", "fsdp2", "fsdp2-cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs: `single` in one process, the others in two; each saved at 3 and 6."""
    folder = tmp_path_factory.mktemp("tiers")

    def alone(_: int) -> dict[str, Any]:
        return train_tower(tower_config(folder / "single", "single"))

    def pair(rank: int) -> dict[str, Any]:
        done = {name: _trained(folder, name) for name in SHARDED}
        done["from"] = {
            f"{there}>{name}": _continued(folder, there, name, rank)
            for there, name in (("fsdp2", "ddp"), ("single", "fsdp2-cpu"), ("ddp", "fsdp2"))
        }
        done["lora"] = _adapted(folder, rank)
        return done

    (single,) = together(alone, 1, folder / "alone")
    both, _ = together(pair, 2, folder / "pair")
    both["single"] = single

    def back(_: int) -> dict[str, Any]:
        return {
            f"{there}>{name}": _continued(folder, there, name, 0)
            for there, name in (("fsdp2", "single"), ("fsdp2-cpu", "fsdp2"), ("ddp", "single"))
        }

    (alone_again,) = together(back, 1, folder / "back")
    both["from"] |= alone_again
    (folder / "results.json").write_text(json.dumps(both))
    return folder


def _trained(folder: Path, name: str) -> dict[str, Any]:
    return train_tower(tower_config(folder / name, name, world=2))


def _continued(folder: Path, there: str, name: str, rank: int) -> dict[str, Any]:
    """Resume a run's step 3 under another strategy, in a copy."""
    import torch.distributed as dist

    import polyzoo.training.launch as launch

    world = launch.find_launch().world_size
    target = folder / f"{there}-{name}-{world}"
    if rank == 0:
        shutil.copytree(folder / there, target, symlinks=True)
    checkpoint = CheckpointConfig(every=3, keep_last=9, from_step=3)
    del dist
    # Process 0 alone makes the copy; the others meet it when they join.
    return train_tower(tower_config(target, name, world=world, checkpoint=checkpoint))


def _adapted(folder: Path, rank: int) -> dict[str, Any]:
    config = tower_config(
        folder / "lora", "fsdp2", world=2, lora=LoraConfig(rank=2), steps=2,
        checkpoint=CheckpointConfig(every=None),
    )  # fmt: skip
    return train_tower(config, step_fn=_adapted_step, eval_fn=None)


def _adapted_step(model: Any, batch: Any, ctx: StepContext) -> Any:
    return (model(batch["x"]).float() - batch["y"]).square().mean()


@pytest.fixture(scope="module")
def results(runs: Path) -> dict[str, Any]:
    return json.loads((runs / "results.json").read_text())


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_train_as_one(results: dict[str, Any], name: str) -> None:
    # Weighted micro-batches, clipping, an epoch's short end, averages: all are in these numbers.
    assert_close(results[name], results["single"], 1e-4)


@pytest.mark.parametrize("name", SHARDED)
def test_checkpoints_hold_the_same_weights_and_averages(runs: Path, name: str) -> None:
    for average in (False, True):
        out = runs / f"{name}-{average}.safetensors"
        here = weights_of(runs / name, 6, out, average=average)
        there = weights_of(runs / "single", 6, runs / "single.safetensors", average=average)
        assert here.keys() == there.keys()
        for key, value in there.items():
            torch.testing.assert_close(here[key], value, rtol=1e-3, atol=1e-5)


def test_every_value_is_stored_once(runs: Path) -> None:
    sizes = {}
    for name in ("single", *SHARDED):
        folder = runs / name / "checkpoints" / "step_00000006"
        entries = [
            entry
            for file in folder.glob("rank*.json")
            for entry in json.loads(file.read_text())["entries"]
        ]
        sizes[name] = sum(entry[2] for entry in entries)
        assert read_manifest(folder)["world_size"] == (1 if name == "single" else 2)
    assert len(set(sizes.values())) == 1


CHANGES = (
    "fsdp2>ddp", "single>fsdp2-cpu", "ddp>fsdp2", "fsdp2>single", "fsdp2-cpu>fsdp2", "ddp>single",
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_under_another_strategy_and_number_of_processes(
    results: dict[str, Any], change: str
) -> None:
    # The three steps after the resume, and the three before, which the log has kept.
    assert_close(results["from"][change], results["single"], 1e-3)


def test_adapters_are_whole_and_alone_on_disk(runs: Path) -> None:
    import peft
    from safetensors.torch import load_file

    folder = runs / "lora" / "checkpoints" / "step_00000002" / "adapter"
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored
    assert all("lora_" in name for name in stored)
    assert all(value.numel() for value in stored.values())
    base = Tower()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    loaded = peft.PeftModel.from_pretrained(base, str(folder))
    trained = dict(loaded.named_parameters())
    some = next(name for name in trained if "lora_B" in name)
    assert trained[some].abs().sum() > 0
    after = loaded.get_base_model().state_dict()
    for name, value in before.items():
        # peft puts adapted layers one level down.
        kept = after.get(name, after.get(_below(name)))
        assert kept is not None
        assert torch.equal(kept, value)


def _below(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}"


def test_processes_with_different_recipes_are_told(tmp_path: Path) -> None:
    from support.ranks import Ranks

    def work(rank: int) -> None:
        config = tower_config(tmp_path / "run", "ddp", world=2, seed=rank)
        train_tower(config)

    ranks = Ranks(work, 2, tmp_path / "ranks")
    codes = ranks.codes()
    assert codes[0] == 1
    assert "E-WORLD: the processes disagree about the recipe" in ranks.forks[0].errors()
    assert "E-WORLD" not in ranks.forks[1].errors()


def test_single_refuses_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(PolyzooError, match="E-WORLD: strategy=single cannot use 2 processes"):
        train_tower(tower_config(tmp_path, "single"))


def test_weights_count_over_processes_and_micro_batches(tmp_path: Path) -> None:
    """One large batch in one process, and the same samples in 2 x 2 parts: equal gradients."""
    whole = tower_config(tmp_path / "whole", "single", batch_size=16, grad_accum=1, steps=1)

    def alone(_: int) -> Any:
        return train_tower(whole)

    def parts(_: int) -> Any:
        return train_tower(tower_config(tmp_path / "parts", "ddp", world=2, steps=1))

    (one,) = together(alone, 1, tmp_path / "a")
    two, _ = together(parts, 2, tmp_path / "b")
    assert one["losses"][0] == pytest.approx(two["losses"][0], rel=1e-6)
    assert one["norms"][0] == pytest.approx(two["norms"][0], rel=1e-6)
