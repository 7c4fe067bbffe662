"""What the `polyzoo icons` commands do, and how their results read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from polyzoo.core.icons.backgrounds import BuiltBackgrounds, build_backgrounds
from polyzoo.core.icons.build import BuiltPack, build_pack
from polyzoo.core.icons.cli import BackgroundsConfig, BuildConfig, InfoConfig
from polyzoo.core.icons.pack import IconPack
from polyzoo.core.icons.records import SPLITS


@dataclass(frozen=True, kw_only=True)
class PackInfo:
    """What a pack holds."""

    folder: str
    size: int
    records: int
    concepts: int
    counts: dict[str, dict[str, int]]
    """Style to split to number of pictures."""
    sources: dict[str, dict[str, str]]
    """Style to package, licence and credit."""


def build(config: BuildConfig) -> BuiltPack:
    """Build a pack."""
    return build_pack(
        config.out, size=config.size, styles=config.styles, offline_from=config.offline_from
    )


def backgrounds(config: BackgroundsConfig) -> BuiltBackgrounds:
    """Build the folder of photographs."""
    return build_backgrounds(config.out, side=config.side, offline_from=config.offline_from)


def info(config: InfoConfig) -> PackInfo:
    """Count a pack's pictures."""
    pack = IconPack.open(config.folder)
    counted = Counter((record.style, record.split) for record in pack.records)
    styles = dict.fromkeys(record.style for record in pack.records)
    return PackInfo(
        folder=str(config.folder),
        size=pack.size,
        records=len(pack),
        concepts=len({record.concept for record in pack.records}),
        counts={style: {split: counted[style, split] for split in SPLITS} for style in styles},
        sources=pack.sources,
    )


def render_info(result: PackInfo) -> str:
    """Return a table of counts, and the credits."""
    width = max((len(style) for style in result.counts), default=0)
    heads = "".join(f"  {split}" for split in SPLITS)
    lines = [
        f"{result.folder}: {result.records} pictures of {result.size} px, "
        f"{result.concepts} concepts",
        f"{'':<{width}}{heads}",
    ]
    for style, counts in result.counts.items():
        cells = "".join(f"  {counts[split]:>{len(split)}}" for split in SPLITS)
        lines.append(f"{style:<{width}}{cells}")
    lines += [
        f"{style}: {facts['credit']}; {facts['licence']}; {facts['package']}"
        for style, facts in result.sources.items()
    ]
    return "\n".join(lines)
