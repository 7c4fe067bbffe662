"""Linear layers in tiles: the same function, gradients and state dicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from polyzoo.core.errors import ConfigError
from polyzoo.training.config import TierConfig
from polyzoo.training.tiling import TiledLinear, tile_linears
from support.ranks import together
from support.tiers import Tower, assert_close, tower_config, train_tower


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tiles", [1, 3, 4])
def test_the_same_outputs_and_gradients(bias: bool, tiles: int) -> None:
    whole = nn.Linear(7, 10, bias=bias)
    tiled = TiledLinear(whole, tiles=tiles)
    x = torch.randn(5, 7)
    torch.testing.assert_close(tiled(x), whole(x), rtol=1e-6, atol=1e-6)
    whole(x).square().sum().backward()
    tiled(x).square().sum().backward()
    pieces = [tile.weight.grad for tile in tiled.tiles]
    torch.testing.assert_close(torch.cat(pieces), whole.weight.grad, rtol=1e-5, atol=1e-5)


def test_state_dicts_are_those_of_whole_layers() -> None:
    plain, tiled = Tower(), Tower()
    changed = tile_linears(tiled, tiles=3, above=1000)
    assert changed == [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]
    assert tiled.state_dict().keys() == plain.state_dict().keys()
    tiled.load_state_dict(plain.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(tiled(x), plain(x), rtol=1e-6, atol=1e-6)
    for name, value in tiled.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])


def test_shared_and_small_layers_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert tile_linears(model, tiles=2, above=16) == []


def test_a_run_by_option_gives_the_same_numbers(tmp_path: Path) -> None:
    tier = TierConfig(tile_linears=3, tile_above=1000)

    def single(_: int) -> list[dict]:
        return [
            train_tower(tower_config(tmp_path / "whole", "single", steps=3)),
            train_tower(tower_config(tmp_path / "tiled", "single", steps=3, tier=tier)),
        ]

    ((whole, tiled),) = together(single, 1, tmp_path / "ranks")
    assert_close(tiled, whole, 1e-4)


def test_not_for_models_built_in_pieces() -> None:
    with pytest.raises(ConfigError, match="tile_linears cuts whole layers"):
        TierConfig(tile_linears=2, sharded_init=True)
