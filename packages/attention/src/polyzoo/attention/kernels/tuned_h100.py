"""Tile sizes measured best on an H100 (benchmarks/attention_sweep.py): data, not code.

Keys are those of `tuning.case_key`: kernel, head dimension, rules, queries, keys. Values are
`(block_m, block_n, warps, stages, tma)`.
"""

from __future__ import annotations

H100: dict[str, tuple[int, int, int, int, bool]] = {
    "forward|72||4096|4096": (128, 64, 8, 3, True),
    "forward|72||1024|1024": (128, 64, 8, 3, True),
    "forward|72|lens|4096|128": (64, 64, 4, 2, False),
    "forward|72|lens|4096|512": (64, 64, 4, 3, False),
    "forward|64|bias|512|512": (64, 64, 4, 2, True),
    "forward|88||512|512": (64, 32, 4, 3, False),
    "forward|64|causal|32|32": (16, 64, 4, 2, False),
    "forward|64||32|512": (64, 32, 4, 3, False),
    "forward|80|grid64|4096|4096": (64, 64, 4, 3, False),
    "forward|64|grid64|4096|4096": (64, 64, 4, 3, False),
    "forward|80|grid16|256|256": (64, 32, 4, 3, False),
    "forward|64|lens|512|512": (64, 32, 4, 3, False),
    "forward|128|causal|2048|2048": (64, 64, 4, 2, True),
    "forward|128|causal|4096|4096": (128, 64, 8, 3, False),
    "forward|64|window|4096|4096": (64, 64, 4, 3, False),
    "forward|64||1024|1024": (128, 64, 8, 3, True),
    "forward|64||256|256": (64, 64, 4, 3, False),
    "backward_kv|72||4096|4096": (64, 64, 4, 3, False),
    "backward_kv|72||1024|1024": (64, 64, 4, 3, False),
    "backward_kv|72|lens|4096|128": (64, 64, 4, 3, False),
    "backward_kv|72|lens|4096|512": (64, 128, 8, 3, False),
    "backward_kv|64|bias|512|512": (64, 64, 4, 2, False),
    "backward_kv|88||512|512": (32, 64, 4, 3, False),
    "backward_kv|64|causal|32|32": (32, 64, 4, 2, False),
    "backward_kv|64||32|512": (32, 64, 4, 3, False),
    "backward_kv|80|grid64|4096|4096": (32, 64, 4, 3, False),
    "backward_kv|80|grid16|256|256": (32, 64, 4, 3, False),
    "backward_kv|64|lens|512|512": (32, 64, 4, 3, False),
    "backward_kv|128|causal|2048|2048": (32, 64, 4, 3, False),
    "backward_kv|64|window|4096|4096": (64, 64, 4, 2, False),
    "backward_kv|64||1024|1024": (32, 64, 4, 3, False),
    "backward_kv|64||256|256": (32, 64, 4, 3, False),
    "backward_q|72||4096|4096": (128, 32, 8, 3, False),
    "backward_q|72||1024|1024": (128, 32, 8, 3, False),
    "backward_q|72|lens|4096|128": (128, 32, 8, 3, False),
    "backward_q|72|lens|4096|512": (128, 32, 8, 3, False),
    "backward_q|64|bias|512|512": (64, 32, 4, 3, False),
    "backward_q|88||512|512": (64, 32, 4, 3, False),
    "backward_q|64|causal|32|32": (64, 32, 4, 3, False),
    "backward_q|64||32|512": (64, 32, 4, 3, False),
    "backward_q|80|grid64|4096|4096": (64, 64, 4, 3, False),
    "backward_q|80|grid16|256|256": (64, 32, 4, 3, False),
    "backward_q|64|lens|512|512": (64, 32, 4, 3, False),
    "backward_q|128|causal|2048|2048": (64, 32, 4, 3, False),
    "backward_q|64|window|4096|4096": (64, 32, 4, 3, False),
    "backward_q|64||1024|1024": (64, 32, 4, 3, False),
    "backward_q|64||256|256": (64, 32, 4, 3, False),
}

BY_HEAD: dict[str, tuple[tuple[int, tuple[int, int, int, int, bool]], ...]] = {
    "forward": (
        (64, (64, 64, 4, 3, False)),
        (80, (128, 64, 8, 3, True)),
        (96, (64, 32, 4, 3, False)),
        (128, (128, 64, 8, 3, False)),
    ),
    "backward_kv": (
        (64, (32, 64, 4, 3, False)),
        (80, (64, 64, 4, 3, False)),
        (128, (32, 64, 4, 3, False)),
    ),
    "backward_q": (
        (64, (64, 32, 4, 3, False)),
        (80, (128, 32, 8, 3, False)),
        (96, (64, 32, 4, 3, False)),
        (128, (64, 32, 4, 3, False)),
    ),
}
"""Where no case was measured: sizes up to a head dimension, the first that reaches it."""
