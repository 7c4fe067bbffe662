"""Everything of a run that is not a tensor of the model: counters, data position, random states."""

from __future__ import annotations

import base64
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polyzoo.core.errors import ConfigError
from polyzoo.training.data import DataPosition


@dataclass(slots=True)
class Best:
    """The best evaluation so far."""

    step: int
    value: float


@dataclass(slots=True)
class Counters:
    """How far a run is."""

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Samples seen, over all epochs."""
    tokens: int = 0
    """Tokens seen, where the step function counts them."""
    seconds: float = 0.0
    """Time spent training, over all parts of an interrupted run."""
    skipped: int = 0
    """Steps left out because of non-finite numbers."""
    skipped_in_a_row: int = 0
    """Of these, the ones since the last good step."""
    finite_loss: float | None = None
    """The last loss that was a number."""
    finite_loss_step: int = 0
    """Its step."""
    evaluated_step: int = 0
    """Step of the last evaluation."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Its result."""
    best: Best | None = None
    """The best of all evaluations."""
    interruptions: int = 0
    """How often a signal stopped the run."""


@dataclass(slots=True)
class RunState:
    """What a checkpoint holds beside tensors."""

    counters: Counters
    data: DataPosition
    random: dict[str, Any]
    window: list[dict[str, Any]]
    """Rows of the log window in progress."""
    strategy: dict[str, Any]
    """Loss scaler and scalar optimizer state."""
    identity: dict[str, str]
    """Fingerprints of everything that is not trained."""


def to_json(state: RunState) -> dict[str, Any]:
    """Return the state as JSON values; numbers come back bit for bit."""
    return _plain(dataclasses.asdict(state))


def from_json(values: dict[str, Any]) -> RunState:
    """Return the state that `to_json` turned into JSON values."""
    values = _restored(values)
    counters = dict(values["counters"])
    best = counters.pop("best")
    return RunState(
        counters=Counters(**counters, best=Best(**best) if best else None),
        data=DataPosition(**values["data"]),
        random=values["random"],
        window=values["window"],
        strategy=values["strategy"],
        identity=values["identity"],
    )


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            raw = value.detach().cpu().contiguous()
            bytes_ = raw.reshape(-1).view(torch.uint8).numpy().tobytes()
            dtype = str(raw.dtype).removeprefix("torch.")
            text = base64.b64encode(bytes_).decode("ascii")
            return {"__tensor__": [dtype, list(raw.shape), text]}
        case bytes():
            return {"__bytes__": base64.b64encode(value).decode("ascii")}
        case tuple():
            return {"__tuple__": [_plain(item) for item in value]}
        case list():
            return [_plain(item) for item in value]
        case dict() if all(isinstance(key, str) for key in value):
            return {key: _plain(item) for key, item in value.items()}
        case dict():
            return {"__pairs__": [[_plain(key), _plain(item)] for key, item in value.items()]}
    raise ConfigError(
        f"a {type(value).__name__} cannot be kept in a checkpoint; a dataset's state_dict may hold "
        "numbers, texts, bytes, tensors, lists, tuples and dicts"
    )


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag == "__tensor__":
            dtype, shape, text = content
            raw = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
            return raw.view(getattr(torch, dtype)).reshape(shape)
        if tag == "__bytes__":
            return base64.b64decode(content)
        if tag == "__tuple__":
            return tuple(_restored(item) for item in content)
        if tag == "__pairs__":
            return {_restored(key): _restored(item) for key, item in content}
    return {key: _restored(item) for key, item in value.items()}
