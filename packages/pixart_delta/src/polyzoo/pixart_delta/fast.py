"""The fast path: compiled parts replayed as CUDA graphs, one for each shape."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.log import get_logger
from polyzoo.pixart_delta.blocks import PixArtBlock, TextKeys, TextLengths
from polyzoo.pixart_delta.captions import RowCaptions
from polyzoo.pixart_delta.control import Control, ControlBranch
from polyzoo.pixart_delta.model import Conditions, PixArtTransformer, TextMemory

_log = get_logger(__name__)
WARM_UP = 3
"""Runs before a capture: compilation, and what libraries set up at first use."""
MOST_GRAPHS = 8
"""Shapes whose graphs are kept; the one used longest ago goes first."""


class Replayed:
    """A function of tensors, compiled, and on a GPU captured once for each set of shapes.

    What it returns is overwritten by the next call of the same shapes.

    Example:
        >>> step = Replayed(model.denoise, name="transformer")
        >>> out = step(latents, timestep)
    """

    def __init__(self, function: Callable[..., Any], *, name: str, compiled: bool = False) -> None:
        """Wrap a function.

        Args:
            function: Takes tensors and returns a tensor, or a tuple of them.
            name: Of the part, for the log.
            compiled: Compile it as a whole first; see `compile_repeated` for networks.
        """
        self.name = name
        self.function = torch.compile(function, dynamic=False) if compiled else function
        self._graphs: dict[tuple[Any, ...], tuple[Any, list[Tensor], Any]] = {}

    @torch.no_grad()
    def __call__(self, *tensors: Tensor, fixed: tuple[Tensor, ...] = ()) -> Any:
        """Run it; the first call of a shape warms up, which takes seconds to a minute.

        Args:
            tensors: Copied to where the graph reads them.
            fixed: Further arguments that the graph reads where they are: they must stay there.
        """
        if not tensors[0].is_cuda:
            return self.function(*tensors, *fixed)
        key = (
            *((tuple(t.shape), t.dtype, t.stride()) for t in tensors),
            *(t.data_ptr() for t in fixed),
        )
        found = self._graphs.pop(key, None)
        if found is None:
            while len(self._graphs) >= MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            found = self._capture(tensors, fixed)
        self._graphs[key] = found  # the newest stands last
        graph, inputs, out = found
        for held, given in zip(inputs, tensors, strict=True):
            if held.data_ptr() != given.data_ptr():
                held.copy_(given)
        graph.replay()
        return out

    def _capture(
        self, tensors: tuple[Tensor, ...], fixed: tuple[Tensor, ...]
    ) -> tuple[Any, list[Tensor], Any]:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:2])
        _log.info("%s: warming up for %s", self.name, shapes)
        inputs = [t.clone() for t in tensors]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.function(*inputs, *fixed)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.function(*inputs, *fixed)
        return graph, inputs, out

    def forget(self) -> None:
        """Drop all graphs, as after weights moved."""
        self._graphs.clear()


def compile_repeated(module: nn.Module, kind: type[nn.Module]) -> int:
    """Compile what a network repeats, once for all its copies; return how many there are.

    A block's code is then made in seconds, where compiling the whole network takes a minute.
    Weights are inputs of that code: blocks of one shape share it.
    """
    shared = torch.compile(kind.forward, dynamic=False)
    blocks = [part for part in module.modules() if type(part) is kind]
    for block in blocks:
        block.forward = MethodType(shared, block)
    return len(blocks)


class FastTransformer:
    """A transformer's text pass and step, replayed; with a control branch where one is given.

    Example:
        >>> fast = FastTransformer(transformer)
        >>> kept = fast.remember(rows)
        >>> eps = fast.step(latents, conditions, kept)
    """

    def __init__(self, model: PixArtTransformer, branch: ControlBranch | None = None) -> None:
        for network in (model, branch):
            if network is not None:
                network.fuse_projections()
                compile_repeated(network, PixArtBlock)
        self.model = model
        self.branch = branch
        self._steps: dict[bool, Replayed] = {}
        self._text = Replayed(self._remember, name="text keys")

    def _remember(self, states: Tensor, kv_lens: Tensor) -> tuple[Tensor, ...]:
        memory = self.model.remember_rows(states, kv_lens, branch=self.branch)
        keys = tuple(t for keys in (*memory.blocks, *memory.control) for t in keys)
        return (*keys, kv_lens.clone())

    def remember(self, captions: RowCaptions) -> tuple[Tensor, ...]:
        """Keys and values of all blocks, flat, and the lengths last; they stay where they are."""
        return self._text(captions.states, captions.kv_lens)

    def step(
        self,
        latents: Tensor,
        conditions: Conditions,
        kept: tuple[Tensor, ...],
        *,
        control: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The network's output; overwritten by the next call.

        Args:
            latents: `(b, 4, H, W)`.
            conditions: Complete.
            kept: From `remember`.
            control: Control latents.
            scale: `()` tensor that multiplies the control.
        """
        p = self.model.shape.patch_size
        position = self.model.position(latents.shape[2] // p, latents.shape[3] // p, latents.device)
        multi = self.model.shape.multi_scale
        assert not multi or (conditions.size is not None and conditions.ratio is not None)  # noqa: S101
        size = conditions.size if multi else conditions.timestep
        ratio = conditions.ratio if multi else conditions.timestep
        arguments = [latents, conditions.timestep, size, ratio]
        if control is not None:
            arguments += [control, scale]
        controlled = control is not None
        if controlled not in self._steps:
            function = self._controlled if controlled else self._plain
            self._steps[controlled] = Replayed(function, name="transformer")
        return self._steps[controlled](*arguments, fixed=(position, *kept))

    def _plain(
        self, latents: Tensor, timestep: Tensor, size: Tensor, ratio: Tensor, position: Tensor,
        *kept: Tensor,
    ) -> Tensor:  # fmt: skip
        return self._run(latents, position, timestep, size, ratio, None, kept)

    def _controlled(
        self, latents: Tensor, timestep: Tensor, size: Tensor, ratio: Tensor, control: Tensor,
        scale: Tensor, position: Tensor, *kept: Tensor,
    ) -> Tensor:  # fmt: skip
        assert self.branch is not None  # noqa: S101 - our own promise
        given = Control(self.branch, control, scale)
        return self._run(latents, position, timestep, size, ratio, given, kept)

    def _run(
        self,
        latents: Tensor,
        position: Tensor,
        timestep: Tensor,
        size: Tensor,
        ratio: Tensor,
        control: Control | None,
        kept: tuple[Tensor, ...],
    ) -> Tensor:
        *tensors, kv_lens = kept
        keys = [TextKeys(tensors[i], tensors[i + 1]) for i in range(0, len(tensors), 2)]
        n = self.model.shape.num_layers
        memory = TextMemory(
            tuple(keys[:n]), TextLengths(kv_lens=kv_lens), len(latents), tuple(keys[n:])
        )
        conditions = Conditions(timestep=timestep, size=size, ratio=ratio)
        return self.model.denoise(latents, position, memory, conditions, control)

    def forget(self) -> None:
        """Drop all graphs."""
        self._text.forget()
        for step in self._steps.values():
            step.forget()
