"""Make the shipped model out of a trained folder: int8 rows, adapters of a lower rank, fewer words.

python scripts/pack_pixart_icons.py --model models/icons --pack icons/64 --out DIR --rank 16
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from polyzoo.core.icons import IconPack
from polyzoo.core.icons.captions import prompt
from polyzoo.core.icons.sources import CLIP_ART
from polyzoo.core.weights import read_weights, write_weights
from polyzoo.pixart_delta.folders import (
    load_control,
    load_transformer,
    save_control,
    save_part,
    save_transformer,
    write_json,
)
from polyzoo.pixart_delta.lcm import GRID_STEPS
from polyzoo.pixart_delta.lora import read_adapter
from polyzoo.pixart_delta.vae import load_vae
from polyzoo.pixart_delta.words import WordEncoder, split_words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pack", type=Path, required=True, help="icon pack, for its words")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--grid-steps", type=int, default=GRID_STEPS, help="of the distillation")
    given = parser.parse_args()
    model, _ = load_transformer(given.model / "transformer", dtype=torch.float32)
    save_transformer(given.out, model, kind="base", int8=True)
    vae = load_vae(given.model / "vae")
    values = {k: v for k, v in dict(vae.config).items() if not k.startswith("_")}
    save_part(given.out / "vae", vae, {"_class_name": "AutoencoderKL", **values}, int8=True)
    if (given.model / "controlnet").is_dir():
        branch = load_control(given.model / "controlnet", dtype=torch.float32)
        save_control(given.out, branch, int8=True)
    save_words(given.model / "text", given.pack, given.out / "text")
    if (given.model / "lora" / "lcm").is_dir():
        save_adapter(given.model / "lora" / "lcm", given.out / "lora" / "lcm", given.rank)
    write_json(
        given.out / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "LCMScheduler",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
            "original_inference_steps": given.grid_steps,
            "prediction_type": "epsilon",
        },
    )
    sizes = {p: p.stat().st_size for p in sorted(given.out.rglob("*")) if p.is_file()}
    for path, size in sizes.items():
        print(f"{size:>10,} {path.relative_to(given.out)}")
    print(f"{sum(sizes.values()):>10,} in all ({sum(sizes.values()) / 2**20:.2f} MiB)")


def save_words(source: Path, pack_folder: Path, out: Path) -> None:
    """Keep the words of the emoji: the transformer saw no clip art."""
    pack = IconPack.open(pack_folder)
    texts = (
        " ".join((prompt(record.label, record.style), *record.tags))
        for record in pack.records
        if record.style != CLIP_ART
    )
    wanted = sorted({word for text in texts for word in split_words(text)})
    encoder = WordEncoder.from_folder(source)
    kept = [word for word in wanted if word in encoder.index]
    rows = torch.tensor([encoder.index[word] for word in kept])
    WordEncoder(kept, encoder.vectors[rows]).save(out)


def save_adapter(source: Path, out: Path, rank: int) -> None:
    """Write adapters cut to a lower rank by their singular values."""
    adapter = read_adapter(source)
    config = json.loads((source / "adapter_config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for layer, factor in adapter.factors.items():
        u, s, v = torch.linalg.svd(
            (factor.up.flatten(1) @ factor.down.flatten(1) * factor.scale).float(),
            full_matrices=False,
        )
        r = min(rank, len(s))
        root = s[:r].sqrt()
        down = (root[:, None] * v[:r]).reshape(r, *factor.down.shape[1:])
        up = (u[:, :r] * root).reshape(-1, r, *factor.up.shape[2:])
        prefix = f"base_model.model.{layer}"
        tensors[f"{prefix}.lora_A.weight"] = down.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = up.contiguous()
        tensors[f"{prefix}.alpha"] = torch.tensor(float(r))
    rows = [name for name, tensor in tensors.items() if tensor.numel() >= 1024]
    half = {n: t if n in rows or t.ndim == 0 else t.half() for n, t in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_weights(
        out / "adapter_model.safetensors", half, int8_rows=rows,
        metadata={"polyzoo.kind": "lcm", "base": "icons"},
    )  # fmt: skip
    config.update(r=rank, lora_alpha=rank, base_model_name_or_path=None)
    write_json(out / "adapter_config.json", config)
    check = read_weights(out / "adapter_model.safetensors")
    if check.keys() != tensors.keys():
        raise SystemExit(f"{out}: what was written is not what was read back")


if __name__ == "__main__":
    main()
