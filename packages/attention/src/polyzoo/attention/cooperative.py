"""Attention over more keys than the GPU holds: the CPU attends to those that lie in its memory.

FastAttention's CPU-GPU cooperative strategy (arXiv 2410.16663), cut finer: every layer keeps its
newest keys on the GPU and the older ones in pinned host memory. When few queries come (decoding),
the CPU attends to host keys where they lie, while the GPU attends to its own and to those host keys
that the bus has time to bring; the parts are joined exactly by their log-sum-exps. When many
queries come (prefill), arithmetic is what counts: host keys stream through the GPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyzoo.attention import checks
from polyzoo.attention.api import attention
from polyzoo.attention.host_decode import HostDecoder
from polyzoo.attention.lanes import Lane
from polyzoo.attention.merge import merge_states
from polyzoo.attention.offloaded_layer import HostBlock, OffloadedLayer
from polyzoo.attention.staging import Staging

DECODING_QUERIES = 16
"""Up to so many queries the CPU takes part."""
_CALIBRATION_BLOCKS = 8


@dataclass(frozen=True)
class Shares:
    """How a decoding step divides the keys in host memory, and why."""

    streamed: float
    """Share that the bus brings to the GPU; the CPU attends to the others."""
    bus: float
    """Measured bytes per second of the bus, or 0 where nothing was measured."""
    host: float
    """Measured bytes of keys and values per second of the CPU's attention, or 0."""


class CooperativeCache:
    """Keys and values of all layers of a model, in GPU memory as far as it may be used.

    Example:
        >>> cache = CooperativeCache(32, gpu_bytes=20 << 30, device="cuda")
        >>> for layer in range(32):
        ...     out = cache.attend(layer, q, k, v)  # appends k and v, then attends causally
    """

    def __init__(
        self,
        layers: int,
        *,
        gpu_bytes: int,
        device: torch.device | str,
        placement: Literal["even", "first"] = "even",
        expected_keys: int | None = None,
        block_keys: int = 8192,
        staging_blocks: int = 4,
        stream: Literal["auto"] | float = "auto",
        threads: int | None = None,
        native: bool | None = None,
    ) -> None:
        """Reserve nothing yet: the first keys tell the shapes.

        Args:
            layers: Of the model.
            gpu_bytes: What keys, values and the staging blocks may take on the device.
            device: Where queries come from; with "cpu" both parts are computed there.
            placement: "even" keeps as many keys of each layer on the GPU; "first" keeps the first
                layers whole and gives the others what is left.
            expected_keys: How many keys a layer will have: "first" needs it, and host memory is
                then reserved by `reserve` and not piece by piece while keys come.
            block_keys: Keys of a block of host memory, the unit of copies.
            staging_blocks: Blocks on the GPU through which host keys stream.
            stream: Share of the host's keys that a decoding step brings to the GPU; "auto"
                measures bus and CPU at the first such step and lets both end together.
            threads: Of the CPU's part; as many as the process has cores if left out.
            native: As for `HostDecoder`.

        Raises:
            ValueError: A number is out of range.
        """
        for name, value in (
            ("layers", layers),
            ("gpu_bytes", gpu_bytes),
            ("block_keys", block_keys),
            ("staging_blocks", staging_blocks),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if placement not in ("even", "first"):
            raise ValueError(f'placement is {placement!r}; use "even" or "first"')
        if placement == "first" and expected_keys is None:
            raise ValueError('placement="first" needs expected_keys, the keys a layer will have')
        self.device = torch.device(device)
        self._gpu_bytes = gpu_bytes
        self._placement = placement
        self._expected = expected_keys or 0
        self._block_keys = block_keys
        self._staging = staging_blocks
        self._shares: Shares | None = None
        self.divide(stream)
        self._decoder = HostDecoder(threads, native=native)
        self._layers: list[OffloadedLayer | None] = [None] * layers
        self._capacities: list[int] = []
        self._staged: Staging | None = None
        self._free: list[HostBlock] = []
        self._down = Lane(self.device)

    @property
    def shares(self) -> Shares | None:
        """How decoding steps divide the host's keys; None before the first with "auto"."""
        return self._shares

    def divide(self, stream: Literal["auto"] | float) -> None:
        """Change which share of the host's keys decoding steps bring to the GPU.

        Args:
            stream: As when the cache was made; "auto" measures again at the next step.

        Raises:
            ValueError: It is no share.
        """
        if stream != "auto" and not 0 <= stream <= 1:
            raise ValueError(f'stream is {stream}; give a share in [0, 1], or "auto"')
        self._shares = None if stream == "auto" else Shares(stream, 0.0, 0.0)

    def keys(self, layer: int) -> tuple[int, int]:
        """Return how many keys of a layer are on the device, and in host memory."""
        state = self._layers[layer]
        return (0, 0) if state is None else (state.held, state.on_host)

    def reserve(self, k: Tensor, v: Tensor) -> None:
        """Reserve all memory now, also the host's if `expected_keys` were given.

        Args:
            k: Of the batch, heads, channels, dtype and device that keys will have.
            v: The same for values.

        Raises:
            ValueError: `gpu_bytes` is too small.
        """
        for layer in range(len(self._layers)):
            state = self._state(layer, k, v)
            over = self._expected - state.capacity
            count = 0 if over <= 0 else -(-over // self._block_keys) + 1
            self._free += [HostBlock.like(k, v, self._block_keys) for _ in range(count)]

    @torch.no_grad()
    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store keys and values behind those of before.

        Args:
            layer: Which.
            k: `(b, hk, t, d)` on the cache's device.
            v: `(b, hk, t, dv)`.

        Raises:
            ValueError: The layer or a shape does not fit what is stored, or `gpu_bytes` is too
                small for it.
        """
        self._state(layer, k, v).store(k, v, piece=self._block_keys)

    @torch.no_grad()
    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> Tensor:
        """Append keys and values, and attend to everything stored up to each query's own key.

        Args:
            layer: Which.
            q: `(b, h, n, d)` on the cache's device: the newest n positions.
            k: `(b, hk, n, d)`: their keys.
            v: `(b, hk, n, dv)`.
            scale: Multiplies the scores; `d ** -0.5` if left out.

        Returns:
            `(b, h, n, dv)`; no gradients.

        Raises:
            ValueError: As for `append`, or q does not fit k.
        """
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
            raise checks.bad_shapes(q, k, v)
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"q has {q.shape[2]} positions and k has {k.shape[2]}; every new query needs its "
                "own key: use append for keys without queries"
            )
        state = self._state(layer, k, v)
        n = q.shape[2]
        factor: float = q.shape[3] ** -0.5 if scale is None else scale
        if n <= state.capacity:
            state.store(k, v, piece=self._block_keys)
            near_k, near_v = state.near()
        else:  # more than the GPU keeps: these are still here, so attend to them before they go
            state.spill(state.held)
            near_k, near_v = k, v
        if n <= DECODING_QUERIES and n <= state.capacity:
            return self._decode(layer, state, q, near_k, near_v, factor)
        out, lse = attention(q, near_k, near_v, causal=True, scale=factor, return_lse=True)
        if state.blocks:
            out, lse = out.float(), lse.clone()
            self._stream(layer, state, len(state.blocks), q, factor, into=[(out, lse)])
        if n > state.capacity:
            state.store(k, v, piece=self._block_keys)
        return out.to(q.dtype)

    def _decode(
        self, layer: int, state: OffloadedLayer, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        if not state.blocks:
            return attention(q, k, v, causal=True, scale=scale)
        host_q = q.cpu()
        if state.spilled is not None:
            state.spilled.synchronize()
        shares = self._shares or self._calibrate(host_q, state)
        streamed = round(shares.streamed * len(state.blocks))
        pending = None
        if streamed < len(state.blocks):
            parts = [block.part() for block in state.blocks[streamed:]]
            pending = self._decoder.start(host_q, parts, scale=scale)
        states: list[tuple[Tensor, Tensor]] = []
        if state.held:
            states.append(attention(q, k, v, causal=True, scale=scale, return_lse=True))
        self._stream(layer, state, streamed, q, scale, into=states, join=False)
        if pending is not None:
            states.append(tuple(part.to(self.device) for part in pending.result()))  # pyright: ignore[reportArgumentType]
        outs = [out.float() for out, _ in states]
        return merge_states(outs, [lse for _, lse in states])[0].to(q.dtype)

    def _stream(
        self,
        layer: int,
        state: OffloadedLayer,
        count: int,
        q: Tensor,
        scale: float,
        *,
        into: list[tuple[Tensor, Tensor]],
        join: bool = True,
    ) -> None:
        """Attend on the device to the first host blocks.

        Args:
            layer: Number of the layer.
            state: The layer.
            count: How many blocks.
            q: The queries.
            scale: Of the scores.
            into: With `join` its one state is updated in place, else the states are appended.
            join: Many queries make large results: join them one by one.
        """
        staged = self._staged
        assert staged is not None  # noqa: S101 - made with the first layer
        wanted = [(state, index) for index in range(count)]
        wanted += self._next_blocks(layer, q.shape[2])
        for index in range(count):
            k, v, slot = staged.fetch(wanted, index)
            out, lse = attention(q, k, v, scale=scale, return_lse=True)
            staged.release(slot)
            if not join:
                into.append((out, lse))
                continue
            total, whole = into[0]
            joined = torch.logaddexp(whole, lse)
            total.mul_(torch.exp(whole - joined).unsqueeze(-1))
            total.addcmul_(out.float(), torch.exp(lse - joined).unsqueeze(-1))
            whole.copy_(joined)
        staged.load_ahead(wanted, count)

    def _next_blocks(self, layer: int, queries: int) -> list[tuple[OffloadedLayer, int]]:
        """Guess which blocks the next call will stream: those of the next layer."""
        state = self._layers[(layer + 1) % len(self._layers)]
        if state is None:
            return []
        share = 1.0
        if queries <= DECODING_QUERIES:
            share = self._shares.streamed if self._shares is not None else 0.0
        return [(state, index) for index in range(round(share * len(state.blocks)))]

    def _state(self, layer: int, k: Tensor, v: Tensor) -> OffloadedLayer:
        """Return a layer's state, reserving memory for its first keys."""
        if not 0 <= layer < len(self._layers):
            raise ValueError(f"layer is {layer}; the cache has layers 0..{len(self._layers) - 1}")
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise checks.bad_shapes(k, k, v)
        if k.device.type != self.device.type:
            raise ValueError(
                f"k is on {k.device} and the cache on {self.device}; "
                f"move it with .to({str(self.device)!r})"
            )
        state = self._layers[layer]
        if state is None:
            if self._staged is None:
                self._place(k, v)
            none_k, none_v = (t.new_empty((*t.shape[:2], 0, t.shape[3])) for t in (k, v))
            free, keys = self._free, self._block_keys  # not self: a cycle would keep GPU memory

            def new_block() -> HostBlock:
                return free.pop() if free else HostBlock.like(none_k, none_v, keys)

            state = self._layers[layer] = OffloadedLayer(
                k, v, capacity=self._capacities[layer], down=self._down, new_block=new_block
            )
        stored = (*state.k.shape[:2], state.k.shape[3], state.v.shape[3], state.k.dtype)
        given = (*k.shape[:2], k.shape[3], v.shape[3], k.dtype)
        if stored != given or v.dtype != k.dtype:
            raise ValueError(
                f"layer {layer} holds batch, heads, channels of keys and values, dtype {stored}; "
                f"these are {given} (values {v.dtype}): one cache serves one batch"
            )
        return state

    def _place(self, k: Tensor, v: Tensor) -> None:
        """Divide `gpu_bytes` between staging and layers."""
        per_key = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
        left = self._gpu_bytes // per_key - self._staging * self._block_keys
        count = len(self._layers)
        if self._placement == "even":
            self._capacities = [left // count] * count
        else:
            self._capacities = []
            for remaining in range(count, 0, -1):  # everyone needs room for a step
                mine = min(self._expected, left - (remaining - 1) * DECODING_QUERIES)
                self._capacities.append(mine)
                left -= mine
        if min(self._capacities) < DECODING_QUERIES:
            needed = (self._staging * self._block_keys + count * DECODING_QUERIES) * per_key
            raise ValueError(
                f"gpu_bytes is {self._gpu_bytes:,}; {self._staging} staging blocks of "
                f"{self._block_keys} keys and {DECODING_QUERIES} keys for each of {count} layers "
                f"take {needed:,}: raise it, or lower block_keys or staging_blocks"
            )
        self._staged = Staging(k, v, slots=self._staging, keys=self._block_keys)

    def _calibrate(self, host_q: Tensor, state: OffloadedLayer) -> Shares:
        """Measure bus and CPU while both work, and divide so that they end together."""
        if self.device.type == "cpu":  # there is no bus: streaming would only copy
            self._shares = Shares(0.0, 0.0, 0.0)
            return self._shares
        blocks = [block for block in state.blocks if block.filled == self._block_keys]
        blocks = blocks[:_CALIBRATION_BLOCKS] or state.blocks[:1]
        staged = self._staged
        assert staged is not None  # noqa: S101 - made with the first layer
        size = sum(part.numel() * part.element_size() for part in (blocks[0].k, blocks[0].v))
        parts = [block.part() for block in blocks]
        self._decoder.start(host_q, parts).result()  # compiles, starts threads, touches pages
        staged.bring(blocks)()
        torch.cuda.synchronize(self.device)
        bringing = staged.bring(blocks)
        started = time.perf_counter()
        self._decoder.start(host_q, parts).result()
        host = len(blocks) * size / (time.perf_counter() - started)
        bus = len(blocks) * size / bringing()
        self._shares = Shares(bus / (bus + host), bus, host)
        return self._shares
