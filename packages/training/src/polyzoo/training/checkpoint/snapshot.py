"""A run's state into a checkpoint, and back."""

from __future__ import annotations

import hashlib
import json
import os
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
    write_rank,
)
from polyzoo.training.checkpoint.state import RunState, from_json, to_json
from polyzoo.training.checkpoint.store import CheckpointStore, FileRecord, Writer, Written
from polyzoo.training.config import TrainConfig
from polyzoo.training.ema import Ema
from polyzoo.training.errors import TrainingError
from polyzoo.training.gathering import collected_adapter
from polyzoo.training.strategies.base import Strategy

_DIFFERENCES_SHOWN = 10


class Snapshots:
    """Saves and restores one run, all of its processes together.

    Example:
        >>> Snapshots(store, config, strategy, ema=None).save(state)
    """

    def __init__(
        self, store: CheckpointStore, config: TrainConfig, strategy: Strategy, *, ema: Ema | None
    ) -> None:
        self.store = store
        self.config = config
        self.strategy = strategy
        self.world = strategy.world
        self.ema = ema

    def save(self, state: RunState) -> Path:
        """Write a checkpoint of the counters' step; every process writes what it holds."""
        shards = list(self._own_shards())
        step = state.counters.step
        with collected_adapter(self.strategy) as adapter:
            if not self.world.is_main:
                self._save_beside(shards, state)
                return self.store.path(step)

            def write(folder: Path) -> tuple[dict[str, FileRecord], dict[str, Any]]:
                self.world.broadcast(str(folder))
                records = self._write(folder, shards, state)
                if adapter is not None:
                    lora.write_adapter(folder / "adapter", self.strategy.model, trained=adapter)
                return records, self._manifest()

            needed = sum(self.world.gather(size_of(shards)))
            return self._save_main(step, write, needed)

    def _save_main(self, step: int, write: Writer, needed: int) -> Path:
        """Save, and let the other processes know however it ends."""
        begun = False

        def begin(folder: Path) -> tuple[Written, Mapping[str, Any]]:
            nonlocal begun
            begun = True
            return write(folder)

        try:
            path = self.store.save(step, begin, needed=needed)
        except Exception as error:
            if not begun:  # the others still wait for the folder's name
                self.world.broadcast(None)
            self.world.broadcast(getattr(error, "exit_code", 1))
            raise
        if not begun:
            self.world.broadcast(None)
        self.world.broadcast(None)
        return path

    def _save_beside(self, shards: list[Shard], state: RunState) -> None:
        """Write this process's files into the folder that process 0 has made."""
        self.world.gather(size_of(shards))
        folder = self.world.broadcast(None)
        if folder is not None:
            self._write(Path(folder), shards, state)
        code = self.world.broadcast(None)
        if code is not None:  # process 0 says why
            raise SystemExit(code)

    def _write(self, folder: Path, shards: list[Shard], state: RunState) -> dict[str, FileRecord]:
        """Write this process's files; return the records of everybody's."""
        failure: Exception | None = None
        records: dict[str, FileRecord] = {}
        try:
            records = write_rank(folder, self.world.rank, shards, to_json(state))
            if not self.world.is_main:  # whose host may be another than process 0's
                for name in records:
                    _sync(folder / name)
        except Exception as error:
            failure = error
        outcomes = self.world.gather((records, failure))
        failures = [error for _, error in outcomes if error is not None]
        if failures and self.world.is_main:
            raise failures[0]
        return {name: record for part, _ in outcomes for name, record in part.items()}

    def load(self, path: Path, identity: Mapping[str, str]) -> RunState:
        """Restore weights, optimizer and averages from a verified checkpoint; return the rest.

        Raises:
            TrainingError: E-CKPT-MISMATCH, before anything has been changed.
        """
        reader = FlatReader(path)
        state = from_json(reader.rank_state(self.world.rank))
        if self.world.rank >= reader.world_size:
            # A process that was not there has its own random numbers, not those of process 0.
            state.random = {}
        self._check_fit(path, reader)
        self._check_identity(path, state.identity, identity)
        self.strategy.load_shards(reader, state.strategy)
        if self.ema:
            self._load_averages(self.ema, reader)
        return state

    def _load_averages(self, ema: Ema, reader: FlatReader) -> None:
        stored = set(reader.names(EMA))
        if len(stored) < len(ema.averages):
            ema.start_anew()
        for average in ema.averages:
            if average.name in stored:
                length = average.tensor.numel()
                values = reader.values(EMA, average.name, average.start, length)
                average.tensor.copy_(values.reshape(average.tensor.shape))

    def _shards(self) -> Iterator[Shard]:
        yield from self.strategy.local_shards()
        for average in self.ema.averages if self.ema else ():
            values = average.tensor.detach().reshape(-1)
            yield Shard(EMA, average.name, average.start, average.shape, values)

    def _own_shards(self) -> Iterator[Shard]:
        """Yield what this process writes: its ranges, and its turn of what all hold alike."""
        for index, shard in enumerate(self._shards()):
            shared = self.strategy.is_whole or shard.state == BUFFER
            writer = index % self.world.size if self.strategy.is_whole else 0
            if not shared or writer == self.world.rank:
                yield shard

    def _manifest(self) -> dict[str, Any]:
        parameters = {
            shard.name: list(shard.full_shape) for shard in self._shards() if shard.state == MASTER
        }
        return {
            "world_size": self.world.size,
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


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()
