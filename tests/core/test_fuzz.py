"""Damaged files of every kind raise our errors only; `--fuzz N` sets how many are tried."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from polyzoo.core.config import load
from polyzoo.core.errors import PolyzooError
from polyzoo.core.weights import read_weights, write_weights
from support.configs import Fuzzed

YAML = b"""\
steps: 10
rate: 1e-3
name: some text
kind: a
flags: [true, false]
sizes: {small: 1, large: 2}
inner:
  depth: 3
  path: /tmp/x
"""
JSON = (
    b'{"steps": 10, "rate": 0.001, "name": "some text", "kind": "a", "flags": [true, false], '
    b'"sizes": {"small": 1, "large": 2}, "inner": {"depth": 3, "path": "/tmp/x"}}'
)
TOKENS = [
    b"[", b"]", b"{", b"}", b":", b",", b"- ", b"&a ", b"*a", b"!!int ", b"!x", b"<<: ", b'"', b"'",
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\t", b"\r", b"#", b"|", b">", b"%",
    b"---\n", b"...", b"1e999", b"-",
    b"9" * 400, b"9" * 5000, b"0x", b"NaN", b"Infinity", b"null", b"~",
    b"[" * 2000, b"{\"a\":" * 500, b"\\ud800", b"\\u0000", b"\xe2\x80\xa8", b"? ", b"steps",
    b"inner:\n  ", b"true",
]  # fmt: skip


def mutate(data: bytes, draw: random.Random, tokens: list[bytes]) -> bytes:
    """Flip, cut, repeat, insert: one to four times."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, end = sorted(draw.randint(0, len(out)) for _ in range(2))
        match draw.randrange(6):
            case 0:
                out[at:at] = draw.choice(tokens)
            case 1:
                out[at:end] = b""
            case 2:
                out[at:at] = out[at:end]
            case 3 if out:
                out[draw.randrange(len(out))] = draw.randrange(256)
            case 4:
                out[at:end] = draw.choice(tokens)
            case _ if out:
                out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def survives(
    path: Path, count: int, make: Callable[[random.Random], bytes], read: Callable[[Path], Any]
) -> tuple[int, int]:
    """Try damaged files; return how many were read and how many refused. Others' errors escape."""
    fine = refused = 0
    for seed in range(count):
        data = make(random.Random(seed))
        path.unlink(missing_ok=True)  # cheaper than truncating: file systems flush that
        path.write_bytes(data)
        try:
            read(path)
        except PolyzooError as error:
            assert str(path.parent) in str(error)
            refused += 1
        else:
            fine += 1
    return fine, refused


def test_damaged_configs_raise_only_our_errors(tmp_path: Path, fuzz_count: int) -> None:
    for suffix, whole in ((".yaml", YAML), (".json", JSON)):
        fine, refused = survives(
            tmp_path / f"a{suffix}",
            fuzz_count // 2,
            lambda draw, whole=whole: mutate(whole, draw, TOKENS),
            lambda path: load(Fuzzed, path),
        )
        assert fine > 0, "some damage is harmless, such as a changed letter of a text"
        assert refused > fuzz_count // 8


def test_damaged_weights_raise_only_our_errors(tmp_path: Path, fuzz_count: int) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"m": torch.randn(3, 4), "i": torch.arange(4), "h": torch.ones(2).half()}
    write_weights(path, tensors, metadata={"x": "y"}, int8_rows=["m"])
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    words = [b"F32", b"F16", b"I64", b"BOOL", b"F8_E4M3", b"F4", b"C64", b"data_offsets", b"shape"]
    tokens = [*TOKENS, *words, b"18446744073709551615", b"-1", b"0", (2**63).to_bytes(8, "little")]

    def damaged(draw: random.Random) -> bytes:
        if draw.random() < 0.3:
            return mutate(whole, draw, tokens)
        header = mutate(whole[8 : 8 + length], draw, tokens)  # keep the length right: goes deeper
        return len(header).to_bytes(8, "little") + header + whole[8 + length :]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fine, refused = survives(path, fuzz_count, damaged, read_weights)
    assert fine > 0
    assert refused > fuzz_count // 4
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 50, f"{grown:.0f} MB more memory"


def test_damaged_indexes_raise_only_our_errors(tmp_path: Path, fuzz_count: int) -> None:
    write_weights(tmp_path / "one.safetensors", {"a": torch.ones(2)})
    whole = b'{"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors"}}'
    tokens = [*TOKENS, b"../", b"/", b"one.safetensors", b".safetensors"]
    fine, refused = survives(
        tmp_path / "model.safetensors.index.json",
        fuzz_count // 4,
        lambda draw: mutate(whole, draw, tokens),
        lambda path: read_weights(path.parent) if path.stat().st_size else read_weights(path),
    )
    assert fine > 0
    assert refused > fuzz_count // 16
