"""Packed encoding against transformers' RobertaModel with the same weights.

    python benchmarks/sea_encode.py            # CUDA: roberta-base, 256 sequences, bfloat16
    python benchmarks/sea_encode.py --quick    # CPU: the same shape of problem, smaller

Sequences have 2 to 256 tokens, 150 on average. The peer pads them to 256 and masks, as its users
do; ours packs them. Every line of output is one JSON object; the last one holds the ratios. A
variant that fails prints its error and the others go on. Times are medians of single calls with the
inputs already on the device; compilation and warm-up are not counted.

`states` is the last hidden state of every token; `pooled` is what SEA uses (RoBERTa's pooler
output), for which ours computes only the first token in the last layer.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

from polyzoo.sea.encoding.encoder import PackedEncoder
from polyzoo.sea.encoding.encoder_loading import register_attention
from polyzoo.sea.encoding.fused import FusedEncoder
from polyzoo.sea.encoding.packing import PackedSequences

LONGEST, MEAN, PAD = 256, 150, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer layers and sequences")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=0, help="timed calls per variant")
    parser.add_argument("--only", default="", help="run variants whose name contains this")
    options = parser.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    repeats = options.repeats or (50 if cuda else 5)
    layers, count = (2, 32) if options.quick else (12, 256)

    register_attention()
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50265, num_hidden_layers=layers, max_position_embeddings=514,
        type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=PAD, attn_implementation="sdpa",
    )  # fmt: skip
    peer = RobertaModel(config).eval().requires_grad_(False)
    config_ours = RobertaConfig.from_dict(config.to_dict())
    config_ours._attn_implementation = "polyzoo"
    ours = RobertaModel(config_ours).eval().requires_grad_(False)
    ours.load_state_dict(peer.state_dict())
    sequences = make_sequences(count)
    packed = PackedSequences.pack(sequences).to(device)
    ids = torch.full((count, LONGEST), PAD)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    ids = ids.to(device)
    mask = (ids != PAD).long()
    tokens = sum(packed.lengths)
    say(
        machine=torch.cuda.get_device_name() if cuda else platform.machine(),
        torch=torch.__version__, threads=torch.get_num_threads(), dtype=str(dtype), layers=layers,
        sequences=count, tokens=tokens, mean=round(tokens / count, 1), padded=count * LONGEST,
    )  # fmt: skip

    exact = None
    if not cuda or not options.quick:
        with torch.inference_mode():
            peer.to(device)
            exact = peer(input_ids=ids, attention_mask=mask)  # float32, before rounding
            exact = (exact.last_hidden_state[mask.bool()].cpu(), exact.pooler_output.cpu())
    peer.to(device, dtype)
    ours.to(device, dtype)

    variants: dict[str, Callable[[], Callable[[], tuple[Tensor | None, Tensor]]]] = {
        "peer eager": lambda: peer_call(peer, ids, mask),
        "peer compiled": lambda: peer_call(torch.compile(peer), ids, mask),  # pyright: ignore
        "ours modules": lambda: modules_call(ours, packed),
        "ours fused": lambda: fused_call(ours, packed, "states"),
        "ours fused pooled": lambda: fused_call(ours, packed, "pooled"),
        "ours compiled": lambda: fused_call(ours, packed, "states", compile=True),
        "ours compiled pooled": lambda: fused_call(ours, packed, "pooled", compile=True),
        "ours compiled exact": lambda: fused_call(
            ours, packed, "states", compile=True, gelu="exact"
        ),
        "ours compiled exact pooled": lambda: fused_call(
            ours, packed, "pooled", compile=True, gelu="exact"
        ),
    }
    milliseconds: dict[str, float] = {}
    for name, make in variants.items():
        if options.only and options.only not in name and "peer" not in name:
            continue
        try:
            with torch.inference_mode():
                call = make()
                states, pooled = call()
                error = {}
                if exact is not None:
                    if states is not None:
                        error["states_error"] = largest(states, exact[0])
                    error["pooled_error"] = largest(pooled, exact[1])
                milliseconds[name] = median_time(call, repeats, device)
            say(variant=name, ms=round(milliseconds[name], 3), **error)
        except Exception as problem:
            say(variant=name, error=f"{type(problem).__name__}: {str(problem)[:400]}")
    if cuda:
        floor(tokens, layers, device)
    summarise(milliseconds)


def make_sequences(count: int) -> list[list[int]]:
    """Lengths from 2 to 256 with a mean of 150; ids without the padding id."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(44, LONGEST + 1, (count,), generator=generator)
    lengths[0] = LONGEST
    while abs(float(lengths.float().mean()) - MEAN) > 0.5:
        row = int(torch.randint(1, count, (1,), generator=generator))
        step = 1 if float(lengths.float().mean()) < MEAN else -1
        lengths[row] = min(max(int(lengths[row]) + step, 2), LONGEST)
    return [
        torch.randint(3, 50000, (int(length),), generator=generator).tolist() for length in lengths
    ]


def peer_call(model: Any, ids: Tensor, mask: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    keep = mask.bool()

    def call() -> tuple[Tensor, Tensor]:
        out = model(input_ids=ids, attention_mask=mask)
        return out.last_hidden_state, out.pooler_output

    call()
    return Selected(call, keep)


class Selected:
    """Times the call alone; picks the real tokens only where outputs are compared."""

    def __init__(self, call: Callable[[], tuple[Tensor, Tensor]], keep: Tensor) -> None:
        self.call, self.keep, self.first = call, keep, True

    def __call__(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        states, pooled = self.call()
        if self.first:
            self.first = False
            return states[self.keep], pooled
        return states, pooled


def modules_call(model: nn.Module, packed: PackedSequences) -> Callable[[], tuple[None, Tensor]]:
    encoder = PackedEncoder(model, pooling="pooler", max_tokens_per_forward=1 << 30)
    return lambda: (None, encoder(packed))


def fused_call(
    model: nn.Module, packed: PackedSequences, what: str, **options: Any
) -> Callable[[], tuple[Tensor | None, Tensor]]:
    encoder = FusedEncoder(model, pooling="pooler", **options)
    if what == "pooled":
        return lambda: (None, encoder(packed))
    weight, bias = encoder.pooler  # pyright: ignore[reportGeneralTypeIssues]
    first = packed.starts[:-1].long()

    def call() -> tuple[Tensor, Tensor]:
        states = encoder.states(packed)
        return states, torch.tanh(nn.functional.linear(states[first], weight, bias))

    return call


def median_time(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def floor(tokens: int, layers: int, device: torch.device) -> None:
    """The matrix products alone, without attention, norms or activations."""
    x = torch.randn(tokens, 768, device=device, dtype=torch.bfloat16)
    wide = torch.randn(tokens, 3072, device=device, dtype=torch.bfloat16)
    shapes = [(x, (2304, 768)), (x, (768, 768)), (x, (3072, 768)), (wide, (768, 3072))]
    pairs = [(a, torch.randn(*s, device=device, dtype=torch.bfloat16)) for a, s in shapes]

    def call() -> None:
        for _ in range(layers):
            for a, weight in pairs:
                torch.nn.functional.linear(a, weight)

    say(variant="matrix products alone", ms=round(median_time(call, 20, device), 3))


def summarise(milliseconds: dict[str, float]) -> None:
    ours = {name: ms for name, ms in milliseconds.items() if name.startswith("ours")}
    states = {name: ms for name, ms in ours.items() if "pooled" not in name}
    result: dict[str, Any] = {"summary": "times the speed of the peer"}
    for peer in ("peer eager", "peer compiled"):
        if peer in milliseconds and ours and states:
            best, best_states = min(ours.values()), min(states.values())
            result[f"vs {peer}, states"] = round(milliseconds[peer] / best_states, 2)
            result[f"vs {peer}, pooled"] = round(milliseconds[peer] / best, 2)
    say(**result)


def largest(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    found = found.float().cpu()
    return float(f"{float((found - wanted).abs().max() / wanted.abs().max()):.3g}")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
