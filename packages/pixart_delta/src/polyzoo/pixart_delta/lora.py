"""Adapters over a transformer: three file formats in, merged and taken out again (section 5.3)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from polyzoo.core.errors import WeightsError
from polyzoo.core.log import get_logger
from polyzoo.core.weights import read_metadata, read_weights

_log = get_logger(__name__)
DEFAULT_ALPHA = 8.0
"""peft's default, with which the published adapters were trained and which their file omits."""
_PREFIXES = (
    "unet.base_model.model.", "base_model.model.transformer.", "base_model.model.", "transformer.",
    "unet.", "lora_transformer.", "diffusion_model.",
)  # fmt: skip
_FOLDER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Factor:
    """The change of one layer: up @ down, times a scale."""

    down: Tensor
    """`(r, inputs)`, or `(r, channels, p, p)` of a convolution."""
    up: Tensor
    """`(outputs, r)`."""
    scale: float
    """alpha / r."""

    def delta(self, weight: Tensor) -> Tensor:
        """The change as a tensor like the weight, float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * self.scale).view(weight.shape).to(weight.device)


@dataclass(frozen=True)
class Adapter:
    """Changes of some layers, by the layer's name."""

    factors: Mapping[str, Factor]
    source: str
    kind: str = ""
    """lcm where the file says so."""

    @property
    def rank(self) -> int:
        """Largest inner size."""
        return max(len(factor.down) for factor in self.factors.values())


def read_adapter(path: str | Path, *, alpha: float | None = None) -> Adapter:
    """Read adapters of any of the known formats.

    A peft folder; a single file with the official script's `unet.base_model.model.` names; names
    with a `transformer.` prefix. The rank is read off the shapes.

    Args:
        path: The folder or the .safetensors file.
        alpha: Where the file does not say; 8 where nobody does.

    Raises:
        WeightsError: No adapter names in the file, or one half of a pair is missing.
    """
    path = Path(path)
    config: dict[str, object] = {}
    file = path
    if path.is_dir():
        file = path / _FOLDER_FILE
        if not file.is_file():
            file = next(iter(sorted(path.glob("*.safetensors"))), file)
        if (path / "adapter_config.json").is_file():
            config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = read_weights(file)
    halves: dict[str, dict[str, Tensor]] = {}
    stray: list[str] = []
    for name, tensor in tensors.items():
        match = re.fullmatch(
            r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default)?\.weight"
            r"|(.+)\.(alpha)",
            name,
        )
        if match is None:
            stray.append(name)
            continue
        layer = _plain(match[1] or match[3])
        half = {"A": "down", "B": "up"}.get((match[2] or "")[-1:], "")
        half = half or ((match[2] or "")[5:] if match[2] else "alpha")
        halves.setdefault(layer, {})[half.strip("_.")] = tensor
    if not halves or stray:
        raise WeightsError(
            f"{file}: {len(stray) or 'all'} names are no adapter's"
            f"{' (' + ', '.join(stray[:3]) + ')' if stray else ''}; expected NAME.lora_A.weight "
            "and NAME.lora_B.weight"
        )
    given = config.get("lora_alpha")
    factors = {
        layer: _factor(layer, parts, given if given is not None else alpha, file)
        for layer, parts in halves.items()
    }
    if given is None and alpha is None and not any("alpha" in parts for parts in halves.values()):
        _log.info("%s: no alpha is stored; %g is taken, as in the official script", file, 8)
    kind = read_metadata(file).get("polyzoo.kind", "")
    return Adapter(factors, source=str(path), kind=kind)


def _factor(layer: str, parts: dict[str, Tensor], alpha: object, file: Path) -> Factor:
    missing = {"down", "up"} - parts.keys()
    if missing:
        raise WeightsError(f"{file}: layer {layer!r} lacks its {missing.pop()} half")
    down, up = parts["down"], parts["up"]
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise WeightsError(
            f"{file}: layer {layer!r} has ranks {rank} and {up.shape[1]} in its two halves"
        )
    if "alpha" in parts:
        alpha = float(parts["alpha"])
    value = float(alpha) if isinstance(alpha, int | float) else DEFAULT_ALPHA
    return Factor(down, up, value / rank)


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


class Adapters:
    """The adapters at work in a network: merged into its weights, and exactly taken out again.

    Example:
        >>> adapters = Adapters(transformer)
        >>> adapters.add("lcm", read_adapter("lora/lcm"), scale=1.0)
        >>> adapters.remove("lcm")
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._originals: dict[str, Tensor] = {}
        self._active: dict[str, tuple[Adapter, float]] = {}

    @property
    def active(self) -> dict[str, float]:
        """Name to scale."""
        return {name: scale for name, (_, scale) in self._active.items()}

    @property
    def kinds(self) -> set[str]:
        """What the active adapters' files call themselves."""
        return {adapter.kind for adapter, scale in self._active.values() if scale and adapter.kind}

    def add(self, name: str, adapter: Adapter, *, scale: float = 1.0) -> None:
        """Merge an adapter, beside those already there.

        Raises:
            WeightsError: It names layers that the network does not have, or of other shapes.
        """
        layers = dict(self.network.named_modules())
        unmatched = [
            layer for layer in adapter.factors if getattr(layers.get(layer), "weight", None) is None
        ]
        if unmatched:
            raise WeightsError(
                f"{adapter.source}: {len(unmatched)} of {len(adapter.factors)} adapted layers are "
                f"not in the transformer ({', '.join(unmatched[:3])}): it belongs to another model"
            )
        for layer, factor in adapter.factors.items():
            weight: Tensor = layers[layer].weight  # pyright: ignore[reportAssignmentType]
            size = len(factor.up) * factor.down[0].numel()
            if size != weight.numel():
                raise WeightsError(
                    f"{adapter.source}: layer {layer!r} changes {len(factor.up)} x "
                    f"{factor.down[0].numel()} entries, the weight is {tuple(weight.shape)}"
                )
        self._active[name] = (adapter, scale)
        self._merge()

    def remove(self, name: str | None = None) -> None:
        """Take one adapter, or all, out again; the weights are then bit for bit what they were."""
        if name is None:
            self._active.clear()
        elif self._active.pop(name, None) is None:
            raise WeightsError(
                f"no adapter {name!r}; there are {', '.join(self._active) or 'none'}"
            )
        self._merge()

    def set_scale(self, name: str, scale: float) -> None:
        """Weigh an adapter anew."""
        if name not in self._active:
            raise WeightsError(
                f"no adapter {name!r}; there are {', '.join(self._active) or 'none'}"
            )
        self._active[name] = (self._active[name][0], scale)
        self._merge()

    @torch.no_grad()
    def _merge(self) -> None:
        """Write the originals plus all changes, in place."""
        layers = dict(self.network.named_modules())
        wanted: dict[str, list[tuple[Factor, float]]] = {}
        for adapter, scale in self._active.values():
            for layer, factor in adapter.factors.items():
                wanted.setdefault(layer, []).append((factor, scale))
        for layer in [*wanted, *(name for name in self._originals if name not in wanted)]:
            weight: Tensor = layers[layer].weight  # pyright: ignore[reportAssignmentType]
            if layer not in self._originals:
                self._originals[layer] = weight.detach().to("cpu", copy=True)
            value = self._originals[layer].to(weight.device)
            if layer not in wanted:
                weight.copy_(value)
                del self._originals[layer]
                continue
            total = value.float()
            for factor, scale in wanted[layer]:
                total = total + scale * factor.delta(weight)
            weight.copy_(total.to(weight.dtype))
