"""Train MiniLM with SEA scoring and its truncation twin, several seeds each, and compare them.

    polyzoo sea prepare --data corpus/train.jsonl.gz --out seeds/train.npz    # valid, test alike
    python benchmarks/sea_seeds.py --data seeds --out models/seeds

The recipe is the preset `minilm`: data, batches, loss, low-rank change, schedule. It only takes
another way to the same function: the low-rank change is added to the weights once per step, so that
the encoder runs without adapter layers, in bfloat16 (20 instead of 25 GiB on an H100). The folders
it writes are model folders like any other. One JSON line per model and file; the last lines are
means and standard deviations over the seeds. --quick tries all of it on an untrained encoder and
the functions of the tests.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.sea.config import SeaConfig
from polyzoo.sea.data import PairBatch, PairDataset, collate
from polyzoo.sea.encoding.encoder import PackedEncoder
from polyzoo.sea.encoding.fused import FusedEncoder
from polyzoo.sea.encoding.packing import PackedSequences
from polyzoo.sea.encoding.segments import segment_ids, segment_mean
from polyzoo.sea.evaluate import main as evaluate
from polyzoo.sea.folders import LowRank, save_folder
from polyzoo.sea.losses import contrastive_loss
from polyzoo.sea.model import SeaModel
from polyzoo.sea.model_sources import encoder_folder
from polyzoo.sea.options import EvalConfig
from polyzoo.sea.prepare import Preparation, prepare_file
from polyzoo.sea.prepared import Prepared
from polyzoo.sea.presets import SeaTrainConfig, minilm

PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}


class MergedEncoder(nn.Module):
    """A frozen BERT encoder whose matrices get a low-rank change before each forward pass."""

    def __init__(self, encoder: PackedEncoder, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.model = encoder.model.requires_grad_(False)
        self.fused = FusedEncoder(encoder.model, pooling="mean", dtype=torch.bfloat16)
        self.fused.gelu = "exact"  # the other form has no gradient
        self.fused._add_norm = self._add_norm
        self.plain = list(self.fused.layers)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for key, module in self._modules_to_change():
            rows, columns = module.weight.shape
            self.down[key] = nn.init.kaiming_uniform_(
                nn.Parameter(torch.empty(rank, columns)), a=math.sqrt(5)
            )
            self.up[key] = nn.Parameter(torch.zeros(rows, rank))

    def _modules_to_change(self) -> Iterator[tuple[str, nn.Linear]]:
        for index, layer in enumerate(self.model.encoder.layer):
            for part, path in PARTS.items():
                yield f"{index}_{part}", layer.get_submodule(path)

    def _add_norm(self, x: Tensor, y: Tensor, norm) -> Tensor:
        return norm(x + F.dropout(y, self.dropout, self.training))

    def changes(self) -> dict[str, LowRank]:
        """The low-rank changes by module name, as a model folder stores them."""
        return {
            f"encoder.layer.{key.split('_')[0]}.{PARTS[key.split('_')[1]]}": LowRank(
                down=self.down[key].detach().cpu(), up=self.up[key].detach().cpu()
            )
            for key in self.down
        }

    def forward(self, packed: PackedSequences) -> Tensor:
        """(s, d) float32 means of the last states."""
        weights = {
            key: (module.weight + self.scale * self.up[key] @ self.down[key]).bfloat16()
            for key, module in self._modules_to_change()
        }
        self.fused.layers = [
            replace(
                layer,
                qkv=(
                    torch.cat([weights[f"{i}_{part}"] for part in ("query", "key", "value")]),
                    layer.qkv[1],
                ),
                output=(weights[f"{i}_output"], layer.output[1]),
                up=(weights[f"{i}_up"], layer.up[1]),
                down=(weights[f"{i}_down"], layer.down[1]),
            )
            for i, layer in enumerate(self.plain)
        ]
        hidden = self.fused._run(packed, first_only=False)
        owner = segment_ids(packed.starts, hidden.shape[0])
        return segment_mean(hidden.float(), packed.starts, owner)


def train(
    config: SeaTrainConfig, files: dict[str, Prepared], folder: Path, *, stop_at: float
) -> None:
    """Train one model and write its folder.

    Args:
        config: The recipe.
        files: The prepared files by name.
        folder: Where the model goes.
        stop_at: Moment after which no further step is made.
    """
    recipe, shape = config.train, config.model
    assert recipe.lora is not None
    assert recipe.steps is not None
    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = encoder_folder(shape.encoder)
    bare = PackedEncoder.from_folder(base, pooling=shape.pooling)
    model = SeaModel(bare, shape)
    scale = recipe.lora.alpha / recipe.lora.rank
    encoder = MergedEncoder(
        PackedEncoder.from_folder(base, pooling=shape.pooling).to(device),
        rank=recipe.lora.rank,
        scale=scale,
        dropout=config.dropout,
    ).to(device)
    parameters = [*encoder.down.parameters(), *encoder.up.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.optim.lr, weight_decay=recipe.optim.weight_decay
    )
    pairs = PairDataset(
        files["train"],
        include_whole=shape.whole_entry,
        only_whole=shape.aggregator == "first",
        head_pieces=shape.head_pieces,
    )
    workers = 6 if device == "cuda" else 0
    loader = torch.utils.data.DataLoader(
        pairs,
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    began, step = time.monotonic(), 0
    encoder.train()
    while step < recipe.steps and time.monotonic() < stop_at:
        for batch in loader:
            if step >= recipe.steps or time.monotonic() >= stop_at:
                break
            share = min((step + 1) / recipe.schedule.warmup_steps, 1.0)
            share *= 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            for group in optimizer.param_groups:
                group["lr"] = recipe.optim.lr * share
            loss = objective(model, encoder, batch.to(device), config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0 or step == 5:
                say(
                    model=folder.name,
                    step=step,
                    loss=round(loss.item(), 4),
                    seconds=round(time.monotonic() - began, 1),
                    gib=round(torch.cuda.max_memory_allocated() / 2**30, 1) if workers else 0,
                )
    del loader
    if config.search_discount is not None and shape.aggregator == "soft_maxsim":
        model.config = replace(shape, count_discount=config.search_discount)
    save_folder(folder, model, tokenizer_folder=base, adapter=encoder.changes(), scale=scale)


def objective(
    model: SeaModel, encoder: MergedEncoder, batch: PairBatch, config: SeaTrainConfig
) -> Tensor:
    """The contrastive loss of one batch."""
    vectors = encoder(batch.packed)[batch.place]
    queries = F.normalize(vectors[: batch.n], dim=-1)
    codes = model.aggregate(vectors[batch.n :], batch.starts)
    return contrastive_loss(
        model.scores(queries, codes),
        temperature=config.loss.temperature,
        symmetric=config.loss.symmetric,
        duplicates=batch.duplicates,
    )


def measure(folder: Path, data: Path, name: str) -> dict[str, float]:
    """Figures of a model folder on a prepared file, as `polyzoo sea eval` gives them."""
    report = evaluate(
        EvalConfig(
            data=data / f"{name}.npz",
            model=str(folder),
            cache=False,
            baselines=False,
            ranks=folder / f"ranks-{name}.jsonl",
        )
    )
    row = {
        "mrr": report.mrr,
        "short": report.by_length["<=256"].mrr,
        "long": report.by_length[">256"].mrr,
        "recall_1": report.recall["1"],
    }
    say(model=folder.name, file=name, **{key: round(value, 4) for key, value in row.items()})
    return row


def summarise(rows: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    for (kind, name), found in rows.items():
        figures = {}
        for key in found[0]:
            values = [row[key] for row in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            figures[key] = [round(statistics.mean(values), 4), round(spread, 4)]
        say(summary=kind, file=name, seeds=len(found), **figures)


def twin_of(shape: SeaConfig) -> SeaConfig:
    """The same model that sees only the truncated function."""
    return replace(shape, aggregator="first")


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of train.npz, valid.npz, test.npz")
    parser.add_argument("--out", type=Path, help="folder for the models")
    parser.add_argument("--quick", action="store_true", help="a minute on a CPU, without data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=["sea", "twin"], choices=["sea", "twin"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after this long")
    parser.add_argument("--only", type=int, help="so many pairs of each file, to try it out")
    arguments = parser.parse_args()
    recipe = minilm()
    if arguments.quick:
        work = Path(tempfile.mkdtemp(prefix="sea-seeds-"))
        recipe = quick_recipe(recipe, work)
        arguments.data, arguments.out, arguments.seeds = work, work / "models", [0, 1]
    elif not (arguments.data and arguments.out):
        parser.error("--data and --out are needed, or --quick")
    stop_at = time.monotonic() + arguments.seconds
    files = {"train": Prepared.load(arguments.data / "train.npz")}
    if arguments.only:
        files = {name: file.take(range(arguments.only)) for name, file in files.items()}
    changes = {"steps": arguments.steps, "batch_size": arguments.batch_size}
    changes = {key: value for key, value in changes.items() if value}
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            if time.monotonic() > stop_at:
                say(skipped=f"{kind}-{seed}")
                continue
            config = replace(
                recipe,
                model=recipe.model if kind == "sea" else twin_of(recipe.model),
                train=replace(recipe.train, seed=seed, **changes),
            )
            folder = arguments.out / f"{kind}-{seed}"
            train(config, files, folder, stop_at=stop_at)
            for name in ("valid", "test"):
                rows.setdefault((kind, name), []).append(measure(folder, arguments.data, name))
    summarise(rows)
    if arguments.quick:
        shutil.rmtree(arguments.data)


def quick_recipe(recipe: SeaTrainConfig, work: Path) -> SeaTrainConfig:
    """The recipe at toy size, and its files in `work`: the functions of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.sea_models import encoder_folder as random_encoder
    from support.sea_models import records, write_jsonl

    encoder = random_encoder(work / "encoder")
    split = replace(recipe.model.split, budget=40, whole_budget=60, signature_pieces=8)
    shape = replace(
        recipe.model, encoder=str(encoder), split=split, head_pieces=8, max_query_tokens=16
    )
    preparation = Preparation(
        tokenizer_folder=str(encoder),
        split=split,
        max_query_tokens=16,
        split_identifiers=shape.split_identifiers,
    )
    source = write_jsonl(work / "functions.jsonl", records())
    for name in ("train", "valid", "test"):
        prepare_file(source, preparation).save(work / f"{name}.npz")
    train = replace(
        recipe.train,
        steps=20,
        batch_size=20,
        schedule=replace(recipe.train.schedule, warmup_steps=2),
    )
    return replace(recipe, model=shape, train=train)


if __name__ == "__main__":
    sys.exit(main())
