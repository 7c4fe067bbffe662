"""A run's state into a checkpoint, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyzoo.core.config import dump
from polyzoo.training import lora
from polyzoo.training.checkpoint.flat import (
    BUFFER,
    EMA,
    MASTER,
    FlatReader,
    Shard,
    size_of,
    whole,
    write_rank,
)
from polyzoo.training.checkpoint.state import RunState, from_json, to_json
from polyzoo.training.checkpoint.store import CheckpointStore, FileRecord
from polyzoo.training.config import TrainConfig
from polyzoo.training.ema import Ema
from polyzoo.training.errors import TrainingError
from polyzoo.training.strategies.base import Strategy

_DIFFERENCES_SHOWN = 10


class Snapshots:
    """Saves and restores one run.

    Example:
        >>> Snapshots(store, config, strategy, ema=None).save(state)
    """

    def __init__(
        self, store: CheckpointStore, config: TrainConfig, strategy: Strategy, *, ema: Ema | None
    ) -> None:
        self.store = store
        self.config = config
        self.strategy = strategy
        self.ema = ema

    def save(self, state: RunState) -> Path:
        """Write a checkpoint of the counters' step."""
        shards = list(self._shards())

        def write(folder: Path) -> tuple[dict[str, FileRecord], dict[str, Any]]:
            records = write_rank(folder, self.strategy.rank, shards, to_json(state))
            if lora.is_adapted(self.strategy.module):
                lora.write_adapter(folder / "adapter", self.strategy.module)
            return records, self._manifest(shards)

        return self.store.save(state.counters.step, write, needed=size_of(shards))

    def load(self, path: Path, identity: Mapping[str, str]) -> RunState:
        """Restore weights, optimizer and averages from a verified checkpoint; return the rest.

        Raises:
            TrainingError: E-CKPT-MISMATCH, before anything has been changed.
        """
        reader = FlatReader(path)
        state = from_json(reader.rank_state(self.strategy.rank))
        self._check_fit(path, reader)
        self._check_identity(path, state.identity, identity)
        self.strategy.load_shards(reader, state.strategy)
        if self.ema:
            stored = set(reader.names(EMA))
            for master, average in zip(self.ema.masters, self.ema.averages, strict=True):
                average.copy_(master.detach())
            for name, average in zip(self.ema.names, self.ema.averages, strict=True):
                if name in stored:
                    average.copy_(reader.tensor(EMA, name))
        return state

    def _shards(self) -> Iterator[Shard]:
        yield from self.strategy.local_shards()
        if self.ema:
            for name, average in zip(self.ema.names, self.ema.averages, strict=True):
                yield whole(EMA, name, average)

    def _manifest(self, shards: list[Shard]) -> dict[str, Any]:
        parameters = {s.name: list(s.full_shape) for s in shards if s.state == MASTER}
        return {
            "world_size": self.strategy.world_size,
            "strategy": self.strategy.name,
            "config_hash": _digest(dump(self.config)),
            "model_fingerprint": _digest(parameters),
            "parameters": parameters,
        }

    def _check_fit(self, path: Path, reader: FlatReader) -> None:
        """Compare names and shapes of everything the run holds with what the checkpoint holds."""
        # With accepted changes, an average may begin or end at a resume.
        states = (MASTER, BUFFER) if self.config.accept_changes else (MASTER, BUFFER, EMA)
        here = {s.key: s.full_shape for s in self._shards() if s.state in states}
        there = {
            key: shape for key, shape in reader.shapes.items() if key.split("|", 1)[0] in states
        }
        differences = [
            f"{key}: {there.get(key, 'absent')} in the checkpoint, {here.get(key, 'absent')} here"
            for key in sorted({*here, *there})
            if here.get(key) != there.get(key)
        ]
        if differences:
            raise TrainingError(
                "E-CKPT-MISMATCH",
                f"{path} belongs to another model ({len(differences)} differences)",
                "; ".join(differences[:_DIFFERENCES_SHOWN]),
                "build the model as it was, or choose another run_dir",
            )

    def _check_identity(
        self, path: Path, there: Mapping[str, str], here: Mapping[str, str]
    ) -> None:
        changed = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
        if changed:
            raise TrainingError(
                "E-CKPT-MISMATCH",
                f"{path} was trained beside other frozen weights",
                f"different now: {', '.join(changed[:_DIFFERENCES_SHOWN])}",
                "load the same frozen weights as before, or choose another run_dir",
            )


def fingerprint(module: nn.Module, *, frozen_only: bool) -> str:
    """Return a digest of names, shapes and a spread of values of a module's parameters.

    Up to 4,096 values of each parameter are looked at, so that a large frozen model costs little.

    Args:
        module: The module.
        frozen_only: Leave out trainable parameters.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        if frozen_only and parameter.requires_grad:
            continue
        values = parameter.detach().reshape(-1)
        spread = values[:: max(1, values.numel() // 4096)].cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(spread.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()
