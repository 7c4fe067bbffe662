"""Training of every part at tiny size, through the engine."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyzoo.core.errors import ConfigError, WeightsError
from polyzoo.pixart_delta.captions import RowCaptions
from polyzoo.pixart_delta.config import ControlConfig
from polyzoo.pixart_delta.extract import main as extract
from polyzoo.pixart_delta.folders import load_control, load_transformer
from polyzoo.pixart_delta.lora import read_adapter
from polyzoo.pixart_delta.model import Conditions
from polyzoo.pixart_delta.objectives import draw, lcm_objective, noise_objective
from polyzoo.pixart_delta.options import ExtractConfig
from polyzoo.pixart_delta.presets import (
    LORA_TARGETS,
    PRESETS,
    PixArtDataConfig,
    PixArtTrainConfig,
)
from polyzoo.pixart_delta.recipe import LcmRecipe, NoiseRecipe
from polyzoo.pixart_delta.train import Distilled, main, network_of
from polyzoo.training.config import (
    CheckpointConfig,
    LogConfig,
    LoraConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from support.cli import run_python
from support.pixart_folders import picture, write_model
from support.pixart_models import tiny_branch, tiny_config, tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and encoded pictures with control maps."""
    folder = tmp_path_factory.mktemp("training")
    write_model(folder / "model", control=False)
    (folder / "images").mkdir()
    rows = []
    for index in range(6):
        picture(index, (32, 32)).save(folder / "images" / f"{index}.png")
        rows.append({"path": f"{index}.png", "prompt": ("red apple", "blue house")[index % 2]})
    (folder / "list.json").write_text(json.dumps(rows))
    extract(ExtractConfig(
        data=folder / "list.json", images=folder / "images", out=folder / "features",
        model=str(folder / "model"), resolution=32, control="edges", device="cpu",
    ))  # fmt: skip
    return folder


def recipe(home: Path, out: Path, task: str, **changes) -> PixArtTrainConfig:
    run = TrainConfig(
        run_dir=out / "run", steps=4, batch_size=2, grad_clip=1.0, device="cpu",
        optim=OptimConfig(lr=1e-3), schedule=ScheduleConfig(kind="constant"),
        checkpoint=CheckpointConfig(every=2, keep_last=10),
        log=LogConfig(every=1, progress=False, plots=False),
        lora=LoraConfig(rank=2, alpha=2.0, targets=LORA_TARGETS) if task == "lcm-lora" else None,
    )  # fmt: skip
    values = {
        "task": task, "out": out / "model", "start": home / "model",
        "control": ControlConfig(num_blocks=2), "lcm": LcmRecipe(null="empty"),
        "data": PixArtDataConfig(manifest=home / "features", resolution=32), "train": run,
    }  # fmt: skip
    return PixArtTrainConfig(**{**values, **changes})


def losses(out: Path) -> list[float]:
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(out: Path) -> dict[str, bytes]:
    return {
        f"{path.parent.name}/{name}": tensor.numpy().tobytes()
        for path in sorted((out / "model").rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("task", ["base", "lcm", "lcm-lora", "controlnet"])
class TestTasks:
    """Every task, stopped and gone on with, gives what it gives in one go."""

    def test_resume_is_bit_equal(self, home, tmp_path, task):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        report = main(recipe(home, whole, task))
        assert report.steps == 4
        assert report.images == 6
        config = recipe(home, cut, task)
        main(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)))
        shutil.rmtree(cut / "model")
        main(config)
        assert losses(cut) == losses(whole)
        assert weights(cut) == weights(whole)
        assert weights(whole)


class TestResults:
    """What training leaves behind."""

    def test_control_leaves_the_base_alone(self, home, tmp_path):
        before = (home / "model/transformer/diffusion_pytorch_model.safetensors").read_bytes()
        main(recipe(home, tmp_path, "controlnet"))
        branch = load_control(tmp_path / "model" / "controlnet")
        assert any(bool(p.any()) for n, p in branch.named_parameters() if "after_proj" in n)
        after = (home / "model/transformer/diffusion_pytorch_model.safetensors").read_bytes()
        assert before == after
        assert not (tmp_path / "model" / "transformer").exists()

    def test_adapter_is_read_again(self, home, tmp_path):
        main(recipe(home, tmp_path, "lcm-lora"))
        adapter = read_adapter(tmp_path / "model" / "lora" / "lcm")
        assert adapter.kind == "lcm"
        assert adapter.rank == 2
        assert "pos_embed.proj" in adapter.factors

    def test_lcm_weights_say_so(self, home, tmp_path):
        main(recipe(home, tmp_path, "lcm"))
        assert load_transformer(tmp_path / "model" / "transformer")[1] == "lcm"

    def test_control_by_consistency(self, home, tmp_path):
        config = recipe(home, tmp_path, "controlnet", control_objective="lcm")
        assert main(config).steps == 4

    def test_killed_while_running(self, home, tmp_path):
        code = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests_recipe import recipe, main
import torch
seen = []
def kill(module, inputs, output):
    if type(module).__name__ == "PixArtTransformer":
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
torch.nn.modules.module.register_module_forward_hook(kill)
main(recipe(Path(sys.argv[1]), Path(sys.argv[2]), "base"))
"""
        (tmp_path / "tests_recipe.py").write_text(_RECIPE)
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        main(recipe(home, whole, "base"))
        done = run_python(code, str(home), str(killed), str(tmp_path))
        assert done.returncode == -9, done.stderr[-2000:]
        assert not (killed / "model").exists()
        main(recipe(home, killed, "base"))
        assert weights(killed) == weights(whole)


_RECIPE = """
from polyzoo.pixart_delta.config import ControlConfig
from polyzoo.pixart_delta.presets import PixArtDataConfig, PixArtTrainConfig
from polyzoo.pixart_delta.recipe import LcmRecipe
from polyzoo.pixart_delta.train import main
from polyzoo.training.config import *
def recipe(home, out, task):
    run = TrainConfig(run_dir=out / "run", steps=4, batch_size=2, grad_clip=1.0, device="cpu",
        optim=OptimConfig(lr=1e-3), schedule=ScheduleConfig(kind="constant"),
        checkpoint=CheckpointConfig(every=2, keep_last=10),
        log=LogConfig(every=1, progress=False, plots=False))
    return PixArtTrainConfig(task=task, out=out / "model", start=home / "model",
        control=ControlConfig(num_blocks=2), lcm=LcmRecipe(null="empty"),
        data=PixArtDataConfig(manifest=home / "features", resolution=32), train=run)
"""


class TestLearning:
    """Losses fall on toy problems."""

    def batch(self, control: bool = False):
        from polyzoo.pixart_delta.batches import LatentBatch

        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(8, 4, 8, 8, generator=generator)
        states = torch.randn(8, 3, 16, generator=generator)
        return LatentBatch(
            latents, RowCaptions(states, torch.full((8,), 3, dtype=torch.int32)),
            control=latents.flip(1) if control else None,
        )  # fmt: skip

    def test_base_then_lcm(self):
        torch.manual_seed(0)
        batch = self.batch()
        model = tiny_model(use_additional_conditions=False)
        generator = torch.Generator().manual_seed(1)
        null = torch.zeros(1, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        found = []
        for _ in range(150):
            draws = draw(batch, generator, positions=1000, caption_dropout=0.1)
            objective = noise_objective(
                network_of(model), batch, draws, NoiseRecipe(null="empty"), null
            )
            optimizer.zero_grad()
            objective.loss.backward()
            optimizer.step()
            found.append(float(objective.metrics["mse"]))
        assert sum(found[-20:]) < 0.75 * sum(found[:20])
        self.distil(model.eval().requires_grad_(False), batch, null)

    def distil(self, teacher, batch, null):
        import copy

        made = Distilled(copy.deepcopy(teacher).requires_grad_(True))
        assert not list(made.target.parameters())
        recipe = LcmRecipe(guidance=0.0, null="empty", grid_steps=10)
        optimizer = torch.optim.AdamW(made.student.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(8, 4, 8, 8, generator=generator)
        wanted = self.one_look(teacher, batch, noise, steps=10)
        before = float((self.one_look(teacher, batch, noise, steps=1) - wanted).square().mean())
        for _ in range(60):
            draws = draw(batch, generator, positions=10, caption_dropout=0.0)
            objective = lcm_objective(
                network_of(made.student), network_of(made.target), network_of(teacher), batch,
                draws, recipe, null,
            )  # fmt: skip
            optimizer.zero_grad()
            objective.loss.backward()
            optimizer.step()
            made.follow(0.95)
        after = float((self.one_look(made.student, batch, noise, steps=1) - wanted).square().mean())
        assert after < 0.5 * before

    @torch.no_grad()
    def one_look(self, model, batch, noise, *, steps: int):
        """Clean latents of a DDIM run of so many steps."""
        from polyzoo.pixart_delta.diffusion import schedule
        from polyzoo.pixart_delta.lcm import lcm_timesteps

        points = lcm_timesteps(steps, grid_steps=10)
        table, x = schedule(), noise
        for index, t in enumerate(points):
            moment = torch.full((8,), t)
            eps = model(x, batch.captions, Conditions(timestep=moment.float()))[:, :4]
            start = table.predict_start(x, eps, moment)
            x = start
            if index + 1 < len(points):
                x = table.add_noise(start, eps, torch.full((8,), points[index + 1]))
        return x

    def test_control_learns_what_determines_the_image(self):
        batch = self.batch(control=True)
        model = tiny_model(use_additional_conditions=False).requires_grad_(False)
        branch = tiny_branch(model).train()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(branch.parameters(), lr=2e-3)
        found = []
        for _ in range(120):
            draws = draw(batch, generator, positions=1000, caption_dropout=0.0)
            objective = noise_objective(
                network_of(model, branch), batch, draws, NoiseRecipe(), torch.zeros(3, 16)
            )
            optimizer.zero_grad()
            objective.loss.backward()
            optimizer.step()
            found.append(float(objective.metrics["mse"]))
        assert sum(found[-20:]) < 0.8 * sum(found[:20])
        assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


class TestConfigs:
    """Recipes that cannot work are refused."""

    def test_presets_build(self):
        for name, preset in PRESETS.items():
            made = preset()
            assert made.train.steps, name

    def test_relations(self, home, tmp_path):
        with pytest.raises(ConfigError, match=r"task='lcm' needs start"):
            PixArtTrainConfig(task="lcm")
        with pytest.raises(ConfigError, match=r"needs train.lora"):
            PixArtTrainConfig(task="lcm-lora", start=home)
        with pytest.raises(ConfigError, match=r"give one source of data"):
            PixArtDataConfig(manifest=home, icons=home)
        with pytest.raises(ConfigError, match=r"data: give one of"):
            main(dataclasses.replace(recipe(home, tmp_path, "base"), data=PixArtDataConfig()))
        with pytest.raises(WeightsError, match=r"holds no transformer folder; train or convert"):
            main(recipe(home, tmp_path, "lcm", start=home / "features"))
        with pytest.raises(ConfigError, match=r"grid_steps=7 must divide 1000"):
            LcmRecipe(grid_steps=7)

    def test_auto_lr(self, home, tmp_path):
        from polyzoo.pixart_delta.train import with_auto_lr

        config = recipe(home, tmp_path, "base", auto_lr="sqrt")
        assert with_auto_lr(config).optim.lr == pytest.approx(1e-3 * (2 / 256) ** 0.5)


def test_conditions_are_never_rounded():
    model = tiny_model().bfloat16()
    seen = []
    model.adaln_single.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        captions = RowCaptions(
            torch.zeros(1, 2, 16).bfloat16(), torch.tensor([2], dtype=torch.int32)
        )
        model(torch.zeros(1, 4, 8, 8), captions, Conditions(timestep=torch.tensor([999.0])))
    assert seen[0].timestep.dtype == torch.float32
    assert seen[0].size.dtype == torch.float32
    assert tiny_config().multi_scale
