"""What the `polyzoo towers` commands do."""

from __future__ import annotations

from dataclasses import dataclass

from polyzoo.core.errors import DataError
from polyzoo.core.icons.pack import IconPack
from polyzoo.towers.cli import DistanceConfig, FitConfig, RetrieveConfig
from polyzoo.towers.dinov2 import load_dinov2
from polyzoo.towers.folders import FolderDistance, compare_folders
from polyzoo.towers.judge import PromptJudge, Retrieval, read_prompts
from polyzoo.towers.text import load_text_tower


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What was written."""

    file: str
    bytes: int


def distance(config: DistanceConfig) -> FolderDistance:
    """Compare two folders."""
    return compare_folders(config.first, config.second, load_dinov2(device=config.device))


def retrieve(config: RetrieveConfig) -> Retrieval:
    """Find each picture's prompt."""
    pairs = read_prompts(config.prompts)
    candidates = None
    if config.candidates is not None:
        try:
            lines = config.candidates.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise DataError(f"{config.candidates}: no such file") from None
        candidates = [line.strip() for line in lines if line.strip()]
    text = load_text_tower("minilm", device=config.device)
    judge = PromptJudge.load(load_dinov2(device=config.device), text)
    pictures, prompts = zip(*pairs, strict=True)
    return judge.retrieval(list(pictures), list(prompts), candidates=candidates)


def fit_judge(config: FitConfig) -> Fitted:
    """Fit the judge and write it."""
    pack = IconPack.open(config.icons)
    text = load_text_tower("minilm", device=config.device)
    model = load_dinov2(device=config.device)
    PromptJudge.fit(pack, model, text, penalty=config.penalty).save(config.out)
    return Fitted(file=str(config.out), bytes=config.out.stat().st_size)
