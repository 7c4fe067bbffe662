"""A BERT encoder and its aggregation in NumPy, for a handful of sequences. Torch-free.

Importing torch takes longer than encoding one edited file or one query: a command that has no more
to do than that reads the same weights and does the same arithmetic here, within float32's rounding.
Whatever is larger, trained or on a GPU goes through `PackedEncoder`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polyzoo.core.errors import WeightsError
from polyzoo.core.weight_files import read_header

Array = npt.NDArray[np.float32]
_FAMILY = "bert"


@dataclass(frozen=True)
class Shape:
    """What the forward pass must know beside the weights."""

    layers: int
    heads: int
    eps: float
    positions: int

    @classmethod
    def read(cls, path: Path) -> Shape | None:
        """Read an encoder's config.json; None for one that is not supported here."""
        try:
            shape = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None  # the other loader says what is wrong with it
        plain = (
            shape.get("model_type") == _FAMILY
            and shape.get("hidden_act") == "gelu"
            and not shape.get("is_decoder", False)
            and shape.get("position_embedding_type", "absolute") == "absolute"
        )
        if not plain:
            return None
        return cls(
            layers=int(shape["num_hidden_layers"]),
            heads=int(shape["num_attention_heads"]),
            eps=float(shape["layer_norm_eps"]),
            positions=int(shape["max_position_embeddings"]),
        )


class NumpyEncoder:
    """The encoder's forward pass with mean pooling.

    Example:
        >>> encoder = NumpyEncoder(read_arrays(file), shape)
        >>> encoder.encode([[101, 2175, 102]]).shape
        (1, 384)
    """

    def __init__(self, tensors: Mapping[str, Array], shape: Shape) -> None:
        """Arrange the weights.

        Args:
            tensors: By name inside the encoder, in float32.
            shape: From the encoder's config.

        Raises:
            WeightsError: one is missing.
        """
        self.shape = shape
        try:
            self._words = tensors["embeddings.word_embeddings.weight"]
            self._places = (
                tensors["embeddings.position_embeddings.weight"]
                + tensors["embeddings.token_type_embeddings.weight"][0]
            )
            self._norm = _norm(tensors, "embeddings.LayerNorm", shape.eps)
            self._layers = [_layer(tensors, index, shape.eps) for index in range(shape.layers)]
        except KeyError as error:
            raise WeightsError(f"the encoder's weights lack {error}") from None

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return self._words.shape[1]

    def encode(self, sequences: Sequence[Sequence[int]]) -> Array:
        """(s, d) means of the last states, not normalised."""
        rows = [self._states(np.asarray(ids)).mean(axis=0) for ids in sequences]
        return np.stack(rows) if rows else np.zeros((0, self.dim), np.float32)

    def _states(self, ids: npt.NDArray[np.int64]) -> Array:
        """(n, d) last hidden states of one sequence."""
        x = self._norm(self._words[ids] + self._places[: len(ids)])
        for layer in self._layers:
            x = layer(x, self.shape.heads)
        return x


@dataclass(frozen=True)
class _Linear:
    weight: Array
    """(in, out)."""
    bias: Array

    def __call__(self, x: Array) -> Array:
        return x @ self.weight + self.bias


@dataclass(frozen=True)
class _Norm:
    weight: Array
    bias: Array
    eps: np.float32

    def __call__(self, x: Array) -> Array:
        x = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(variance + self.eps) * self.weight + self.bias


@dataclass(frozen=True)
class _Layer:
    qkv: _Linear
    output: _Linear
    up: _Linear
    down: _Linear
    norm_attention: _Norm
    norm_output: _Norm

    def __call__(self, x: Array, heads: int) -> Array:
        n, width = x.shape
        q, k, v = self.qkv(x).reshape(n, 3, heads, width // heads).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) * np.float32((width // heads) ** -0.5)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = (shares @ v).transpose(1, 0, 2).reshape(n, width)
        x = self.norm_attention(x + self.output(mixed))
        return self.norm_output(x + self.down(gelu(self.up(x))))


def gelu(x: Array) -> Array:
    """The input times the normal distribution function, to about 1e-6 of the exact value.

    The error function by Abramowitz and Stegun's formula 7.1.26, off by at most 1.5e-7.
    """
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    tail = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = (tail + np.float32(factor)) * t
    upper = tail * np.exp(-z * z) / 2  # of the distribution, beyond |x|
    return x * np.where(x > 0, 1 - upper, upper)


def read_arrays(path: Path) -> dict[str, Array]:
    """Tensors of a safetensors file in float32, int8 rows restored.

    Raises:
        WeightsError: missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    metadata = read_header(path).get("__metadata__", {})
    try:
        tensors: dict[str, Any] = load_file(path)
        for name in json.loads(metadata.get("polyzoo.int8_rows", "[]")):
            scales = tensors.pop(f"{name}.int8_scale").astype(np.float32)
            steps = tensors[name].astype(np.float32)
            tensors[name] = steps * scales.reshape(-1, *[1] * (steps.ndim - 1))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: is damaged: {error}") from error
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def _linear(tensors: Mapping[str, Array], *names: str) -> _Linear:
    weight = np.concatenate([tensors[f"{name}.weight"] for name in names])
    return _Linear(
        np.ascontiguousarray(weight.T), np.concatenate([tensors[f"{name}.bias"] for name in names])
    )


def _norm(tensors: Mapping[str, Array], name: str, eps: float) -> _Norm:
    return _Norm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], np.float32(eps))


def _layer(tensors: Mapping[str, Array], index: int, eps: float) -> _Layer:
    at = f"encoder.layer.{index}"
    three = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
    return _Layer(
        qkv=_linear(tensors, *three),
        output=_linear(tensors, f"{at}.attention.output.dense"),
        up=_linear(tensors, f"{at}.intermediate.dense"),
        down=_linear(tensors, f"{at}.output.dense"),
        norm_attention=_norm(tensors, f"{at}.attention.output.LayerNorm", eps),
        norm_output=_norm(tensors, f"{at}.output.LayerNorm", eps),
    )
