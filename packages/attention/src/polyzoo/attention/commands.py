"""What `polyzoo attention` runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polyzoo.attention.backend import Backend
from polyzoo.attention.cli import BackendsConfig, ExplainConfig
from polyzoo.attention.explaining import explain
from polyzoo.attention.features import FEATURES
from polyzoo.attention.registry import AUTO_ORDER, backends
from polyzoo.attention.types import CuSeqlens, DecomposedBias
from polyzoo.core.errors import UsageError

_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Explanation:
    """The backend of a call."""

    backend: str | None
    summary: str
    reasons: tuple[str, ...]
    """One line per refused backend."""

    @property
    def exit_code(self) -> int:
        """1 where nobody serves the call."""
        return 1 if self.backend is None else 0


@dataclass(frozen=True)
class Row:
    """One backend of the table."""

    name: str
    summary: str
    devices: tuple[str, ...]
    """Empty: any."""
    dtypes: tuple[str, ...]
    head_dims: str
    features: tuple[str, ...]
    n_by_m_for: tuple[str, ...]
    """Calls for which it holds an n x m matrix."""
    by_name_only: tuple[str, ...]
    """Calls for which `auto` passes it over, and why."""
    unavailable: str | None
    """Why it cannot run here."""


@dataclass(frozen=True)
class Table:
    """Every backend, and the order in which `auto` tries them."""

    backends: tuple[Row, ...]
    auto: dict[str, tuple[str, ...]]


def explain_call(config: ExplainConfig) -> Explanation:
    """Explain who serves the call that the flags describe."""
    q = _shape(config.q, "q", 4)
    k = q if config.k is None else _shape(config.k, "k", 4)
    v = k if config.v is None else _shape(config.v, "v", 4)
    dtype = _DTYPES[config.dtype]
    bias: DecomposedBias | tuple[int, ...] | None = (1, 1, q[2], k[2]) if config.bias else None
    if config.relpos is not None:
        if config.bias:
            raise UsageError("--bias and --relpos: a call has one bias")
        rows, columns = _shape(config.relpos, "relpos", 2)
        if rows * columns != k[2]:
            raise UsageError(
                f"--relpos {config.relpos}: {rows} x {columns} is not the number of keys, {k[2]}"
            )
        bias = DecomposedBias(
            torch.empty(*q[:3], rows, device="meta", dtype=dtype),
            torch.empty(*q[:3], columns, device="meta", dtype=dtype),
        )
    lengths = None
    if config.packed:
        starts = torch.zeros(2, dtype=torch.int32, device="meta")
        lengths = CuSeqlens(starts, starts, q[2], k[2])
    try:
        choice = explain(
            q,
            k,
            v,
            causal=config.causal,
            window=config.window,
            kv_lens=q[:1] if config.kv_lens else None,
            cu_seqlens=lengths,
            mask=(1, 1, q[2], k[2]) if config.mask else None,
            bias=bias,
            dropout=config.dropout,
            return_lse=config.lse,
            precision=config.precision,
            backward=config.backward,
            device=config.device,
            dtype=dtype,
            backend=config.backend,
        )
    except (ValueError, RuntimeError) as error:  # torch raises the latter for an unknown device
        raise UsageError(str(error)) from error
    backend = choice.backend
    return Explanation(
        backend=None if backend is None else backend.name,
        summary="no backend serves this call" if backend is None else backend.summary,
        reasons=choice.reasons,
    )


def render_explanation(explanation: Explanation) -> str:
    """Show the choice, then one line per refused backend."""
    head = explanation.summary
    if explanation.backend is not None:
        head = f"{explanation.backend}: {head}"
    return "\n".join([head, *(f"  not {reason}" for reason in explanation.reasons)])


def list_backends(config: BackendsConfig) -> Table:  # noqa: ARG001 - a command takes its config
    """List what there is."""
    return Table(backends=tuple(_row(backend) for backend in backends()), auto=AUTO_ORDER)


def render_backends(table: Table) -> str:
    """Show the table as blocks of lines."""
    lines: list[str] = []
    for row in table.backends:
        missing = [name for name in FEATURES if name not in row.features]
        lines += [
            f"{row.name}: {row.summary}",
            f"  devices   {', '.join(row.devices) or 'any'}",
            f"  dtypes    {', '.join(row.dtypes)}",
            f"  head size {row.head_dims}",
            f"  offers    {', '.join(row.features)}",
            f"  lacks     {', '.join(missing) or 'nothing'}",
            f"  n x m for {', '.join(row.n_by_m_for).replace('always', 'every call') or 'nothing'}",
        ]
        lines += [f"  by name only for {why}" for why in row.by_name_only]
        if row.unavailable is not None:
            lines.append(f"  not here: {row.unavailable}")
    lines += [f"auto on {device}: {', '.join(names)}" for device, names in table.auto.items()]
    return "\n".join(lines)


def _row(backend: Backend) -> Row:
    return Row(
        name=backend.name,
        summary=backend.summary,
        devices=() if backend.devices is None else tuple(sorted(backend.devices)),
        dtypes=tuple(name for name, dtype in _DTYPES.items() if dtype in backend.dtypes),
        head_dims=backend.head_dims_text,
        features=tuple(name for name in FEATURES if name in backend.features),
        n_by_m_for=tuple(sorted(backend.matrix_for)),
        by_name_only=tuple(why for _, why in backend.by_name_only),
        unavailable=backend.available(),
    )


def _shape(text: str, flag: str, axes: int) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != axes or min(shape) < 0:
        raise UsageError(
            f"--{flag} {text}: give {axes} sizes with commas between, as in 2,16,4096,72"
        )
    return shape
