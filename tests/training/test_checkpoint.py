from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from polyzoo.core.errors import ConfigError
from polyzoo.training import CheckpointConfig, TrainingError
from polyzoo.training.checkpoint.flat import FlatReader, Shard, whole, write_rank
from polyzoo.training.checkpoint.state import Best, Counters, RunState, from_json, to_json
from polyzoo.training.checkpoint.store import CheckpointStore, find_fault
from polyzoo.training.data import DataPosition
from support.runs import checkpoint_folder, fit, tiny_config


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_layout_reads_any_layout(data, tmp_path_factory) -> None:
    """Write with some number of processes, each holding some ranges; read with another."""
    folder = tmp_path_factory.mktemp("flat")
    shapes = data.draw(
        st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=4)
    )
    world = data.draw(st.integers(1, 4))
    tensors = {f"p{i}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
    ranks: list[list[Shard]] = [[] for _ in range(world)]
    for name, tensor in tensors.items():
        length = tensor.numel()
        cuts = sorted(
            data.draw(st.lists(st.integers(0, length), min_size=world - 1, max_size=world - 1))
        )
        for rank, (start, end) in enumerate(zip([0, *cuts], [*cuts, length], strict=True)):
            if end > start:
                values = tensor.flatten()[start:end]
                ranks[rank].append(Shard("fp32", name, start, tuple(tensor.shape), values))
    for rank, shards in enumerate(ranks):
        write_rank(folder, rank, shards, {"rank": rank})
    reader = FlatReader(folder)
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor("fp32", name), tensor)
        start = data.draw(st.integers(0, tensor.numel() - 1))
        length = data.draw(st.integers(0, tensor.numel() - start))
        expected = tensor.flatten()[start : start + length]
        assert torch.equal(reader.values("fp32", name, start, length), expected)
    assert [reader.rank_state(rank)["rank"] for rank in range(world)] == list(range(world))


def test_shards_are_plain_safetensors_and_hashed_on_the_way(tmp_path) -> None:
    tensors = {
        "a": torch.randn(3, 2),
        "b": torch.arange(5),
        "c": torch.tensor([True, False]),
        "d": torch.randn(4).bfloat16(),
        "e": torch.zeros(0, 3),
        "f": torch.tensor(2.5),
    }
    records = write_rank(tmp_path, 0, [whole("s", n, t) for n, t in tensors.items()], {})
    stored = load_file(tmp_path / "rank00000.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(stored[f"s|{name}"], tensor.flatten())
        assert FlatReader(tmp_path).tensor("s", name).shape == tensor.shape
    for name, record in records.items():
        content = (tmp_path / name).read_bytes()
        assert (record.size, record.blake2b) == (len(content), hashlib.blake2b(content).hexdigest())


def test_missing_ranges_and_odd_dtypes_are_explained(tmp_path) -> None:
    write_rank(tmp_path, 0, [Shard("fp32", "w", 0, (10,), torch.ones(4))], {})
    with pytest.raises(TrainingError, match=r"E-CKPT-CORRUPT.*values 4 to 10 of fp32\|w"):
        FlatReader(tmp_path).tensor("fp32", "w")
    with pytest.raises(ConfigError, match=r"s\|z: torch.complex64 cannot be stored"):
        write_rank(tmp_path, 0, [whole("s", "z", torch.zeros(2, dtype=torch.complex64))], {})


def test_plain_state_comes_back_bit_for_bit() -> None:
    state = RunState(
        counters=Counters(
            step=3, seconds=0.1 + 0.2, evaluation={"m": 1 / 3}, best=Best(2, math.pi)
        ),
        data=DataPosition(1, 5, {"nested": ({"k": torch.arange(3)}, b"\x00\xff", None), 4: "four"}),
        random={"torch": torch.get_rng_state()},
        window=[{"step": 1, "values": {"loss": 1e-45}}],
        strategy={"scalars": {"w": {"step": torch.tensor(3.0)}}},
        identity={"teacher": "ab"},
    )
    back = from_json(json.loads(json.dumps(to_json(state))))
    assert back.counters == state.counters
    assert back.data.dataset[4] == "four"
    ((inner, raw, nothing),) = [back.data.dataset["nested"]]
    assert torch.equal(inner["k"], torch.arange(3))
    assert (raw, nothing, back.window) == (b"\x00\xff", None, state.window)
    assert torch.equal(back.random["torch"], state.random["torch"])
    assert torch.equal(back.strategy["scalars"]["w"]["step"], torch.tensor(3.0))
    with pytest.raises(ConfigError, match="a object cannot be kept in a checkpoint"):
        to_json(RunState(Counters(), DataPosition(0, 0, object()), {}, [], {}, {}))


def save(store: CheckpointStore, step: int) -> Path:
    def write(folder: Path):
        (folder / "sub").mkdir()
        (folder / "sub" / "more.bin").write_bytes(b"more")
        return write_rank(folder, 0, [whole("fp32", "w", torch.full((9,), float(step)))], {}), {}

    return store.save(step, write)


def test_retention_keeps_the_newest_and_the_milestones(tmp_path) -> None:
    store = CheckpointStore(tmp_path / "c", keep_last=2, keep_every=30)
    for step in range(10, 101, 10):
        save(store, step)
    assert store.steps() == [30, 60, 90, 100]
    assert (tmp_path / "c" / "latest").resolve().name == "step_00000100"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "latest", "step_00000030", "step_00000060", "step_00000090", "step_00000100",
    ]  # fmt: skip


def test_leftovers_of_a_killed_process_are_swept(tmp_path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    for name in (".step_00000002.77-abcd.tmp", ".step_00000001.removed.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"x")
    (tmp_path / ".latest.77.tmp").symlink_to("step_00000001")
    store.sweep()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def damage_by_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def damage_by_flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_by_removal(file: Path) -> None:
    file.unlink()


NAMES = ["COMPLETE", "manifest.json", "rank00000.json", "rank00000.safetensors", "sub/more.bin"]


@pytest.mark.parametrize("damage", [damage_by_cut, damage_by_flip, damage_by_removal])
@pytest.mark.parametrize("name", NAMES)
def test_every_damage_to_every_file_is_found_and_the_newest_whole_one_named(
    name, damage, tmp_path
) -> None:
    store = CheckpointStore(tmp_path, keep_last=9)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert store.verified() == tmp_path / "step_00000004"
    damage_by_cut(tmp_path / "step_00000003" / "rank00000.json")
    if name == "COMPLETE" and damage is damage_by_cut:
        # Its last byte is a line end; cut further.
        damage(tmp_path / "step_00000004" / name)
    damage(tmp_path / "step_00000004" / name)
    with pytest.raises(TrainingError) as caught:
        store.verified()
    assert caught.value.code == "E-CKPT-CORRUPT"
    assert "step_00000004" in caught.value.what
    assert "step_00000002" in caught.value.fix
    assert "--checkpoint.from-step 2" in caught.value.fix


def test_sizes_alone_find_a_cut_but_not_a_flip(tmp_path) -> None:
    folder = save(CheckpointStore(tmp_path), 1)
    damage_by_flip(folder / "rank00000.safetensors")
    assert find_fault(folder, hashes=False) is None
    assert "blake2b differs" in (find_fault(folder) or "")
    damage_by_cut(folder / "rank00000.safetensors")
    assert "bytes," in (find_fault(folder, hashes=False) or "")


def test_a_damaged_run_is_not_resumed_until_told_from_where(tmp_path) -> None:
    config = tiny_config(tmp_path, steps=4)
    fit(config)
    damage_by_flip(checkpoint_folder(tmp_path, 4) / "rank00000.safetensors")
    with pytest.raises(TrainingError, match=r"(?s)E-CKPT-CORRUPT.*step_00000003.*from_step=3"):
        fit(config)
    fixed = tiny_config(tmp_path, steps=4, checkpoint=CheckpointConfig(every=1, from_step=3))
    assert fit(fixed).step == 4
    assert find_fault(checkpoint_folder(tmp_path, 4)) is None
    assert fit(config).step == 4


def test_too_little_space_is_found_before_writing(tmp_path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    with pytest.raises(TrainingError, match=r"(?s)E-DISK-FULL.*step 1 is untouched.*takes 1,0"):
        store.save(2, lambda folder: pytest.fail("began to write"), needed=10**18)
    assert store.steps() == [1]


def test_nothing_whole_is_left(tmp_path) -> None:
    store = CheckpointStore(tmp_path)
    damage_by_cut(save(store, 1) / "manifest.json")
    with pytest.raises(TrainingError, match=r"(?s)no whole checkpoint is left"):
        store.verified()
