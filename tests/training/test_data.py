from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from polyzoo.core.errors import ConfigError
from polyzoo.training import DataConfig, TrainingError
from polyzoo.training.data import DataPosition, DataStream
from polyzoo.training.loader import epoch_order
from polyzoo.training.movement import to_device


class Noisy:
    """Draws from every global random state, and knows its epoch."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = -1

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int):
        drawn = [random.random(), np.random.random(), torch.rand(()).item()]  # noqa: NPY002
        return {"index": index, "epoch": self.epoch, "drawn": torch.tensor(drawn)}


def stream(dataset, batch_size=4, seed=7, collate=None, **config) -> DataStream:
    return DataStream(
        dataset, DataConfig(**config), batch_size=batch_size, collate=collate, seed=seed
    )


def seen(data: DataStream, batches: int) -> list:
    taken = [data.take(1)[0].data for _ in range(batches)]
    return [(b["index"].tolist(), b["epoch"].tolist(), b["drawn"].tolist()) for b in taken]


def test_each_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    orders = {(s, e): epoch_order(50, s, e, True).tolist() for s in (0, 1) for e in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    torch.manual_seed(123)
    assert epoch_order(50, 0, 1, True).tolist() == orders[0, 1]
    assert epoch_order(5, 0, 3, False).tolist() == [0, 1, 2, 3, 4]


def test_workers_change_nothing_and_draws_leave_the_training_alone() -> None:
    alone = stream(Noisy(10))
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    expected = seen(alone, 7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    helped = stream(Noisy(10), workers=2)
    assert seen(helped, 7) == expected
    helped.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("consumed", [1, 3, 4, 7])
def test_going_on_from_any_position_is_exact(workers, consumed) -> None:
    data = stream(Noisy(10))
    seen(data, consumed)
    position = copy.deepcopy(data.position)
    expected = seen(data, 4)
    resumed = stream(Noisy(10), workers=workers)
    resumed.move_to(position)
    assert seen(resumed, 4) == expected
    resumed.close()


def test_a_step_does_not_cross_epochs() -> None:
    data = stream(Noisy(10), shuffle=False)
    sizes = [[batch.samples for batch in data.take(2)] for _ in range(4)]
    assert sizes == [[4, 4], [2], [4, 4], [2]]
    assert data.position == DataPosition(epoch=1, samples=10)
    assert data.steps_per_epoch(2) == 2


def test_drop_last_leaves_out_what_does_not_fill_a_batch(caplog) -> None:
    with caplog.at_level("INFO"):
        data = stream(Noisy(10), drop_last=True)
    assert "leaves out 2 of 10 samples per epoch" in caplog.text
    assert [len(indices) for indices, _, _ in seen(data, 4)] == [4, 4, 4, 4]
    assert data.steps_per_epoch(1) == 2


@pytest.mark.parametrize(
    ("dataset", "config"), [([], {}), ([1, 2, 3], {"drop_last": True})], ids=["empty", "short"]
)
def test_an_epoch_without_a_batch_is_an_error(dataset, config) -> None:
    with pytest.raises(TrainingError, match="E-DATA-EMPTY: an epoch has no batch"):
        stream(dataset, **config)


def test_a_former_batch_can_be_fetched_again() -> None:
    data = stream(Noisy(10))
    batch = [data.take(1)[0] for _ in range(4)][-1]
    indices, again = data.fetch_again(batch.epoch, batch.start, batch.samples)
    assert again["index"].tolist() == indices == batch.data["index"].tolist()
    assert torch.equal(again["drawn"], batch.data["drawn"])


class Counting:
    """An iterable without a position of its own."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self):
        yield from range(self.length)


class Stateful(Counting):
    """An iterable that resumes by itself, and counts what it had to read."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.next = 0
        self.reads = 0

    def __iter__(self):
        while self.next < self.length:
            self.next += 1
            self.reads += 1
            yield self.next - 1
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@pytest.mark.parametrize("kind", [Counting, Stateful])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("consumed", [1, 2, 3, 5])
def test_iterables_go_on_exactly(kind, workers, consumed) -> None:
    data = stream(kind(10))
    for _ in range(consumed):
        data.take(1)
    position = copy.deepcopy(data.position)
    expected = [data.take(1)[0].data.tolist() for _ in range(4)]
    resumed = stream(kind(10), workers=workers)
    resumed.move_to(position)
    assert [resumed.take(1)[0].data.tolist() for _ in range(4)] == expected
    resumed.close()


def test_a_stateful_iterable_is_not_read_again() -> None:
    data = stream(Stateful(1000))
    for _ in range(100):
        data.take(1)
    dataset = Stateful(1000)
    resumed = stream(dataset)
    resumed.move_to(data.position)
    assert resumed.take(1)[0].data.tolist() == [400, 401, 402, 403]
    assert dataset.reads == 4


def test_iterable_limits_are_said() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.workers=2: an iterable dataset is read by 0 or 1"
    ):
        stream(Counting(4), workers=2)
    with pytest.raises(ConfigError, match="epochs: the dataset has no length"):
        stream(Counting(4)).steps_per_epoch(1)
    used_up = stream(iter(range(4)))
    used_up.take(1)
    with pytest.raises(TrainingError, match=r"E-DATA-EMPTY: epoch 1 has no batch"):
        used_up.take(1)
    shorter = stream(Counting(3))
    shorter.move_to(DataPosition(epoch=0, samples=8))
    with pytest.raises(TrainingError, match=r"(?s)E-CKPT-DATA.*8 samples were used.*after 3"):
        shorter.take(1)


@dataclass(frozen=True)
class Packed:
    ids: Tensor
    names: tuple[str, ...]


def test_nested_batches_move_and_keep_their_types() -> None:
    packed = Packed(torch.arange(3), ("a", "b"))
    moved = to_device(
        {"p": packed, "l": [torch.ones(2), 3], "t": (torch.ones(1),)}, torch.device("meta")
    )
    assert moved["p"].ids.is_meta
    assert moved["p"].names == ("a", "b")
    assert type(moved["l"]) is list
    assert moved["l"][0].is_meta
    assert moved["l"][1] == 3
    assert moved["t"][0].is_meta
    assert replace(packed).ids.device.type == "cpu"
