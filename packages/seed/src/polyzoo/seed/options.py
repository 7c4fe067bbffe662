"""What the commands other than training take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """The text side of a training, made once: pieces and vectors."""

    out: Path
    """Folder to write."""
    pack: Path | None = None
    """Icon pack; its training and validation splits are read."""
    pairs: Path | None = None
    """Or a .jsonl file of pairs."""
    images: Path | None = None
    """Folder of the files that pairs names."""
    vocabulary: int = 4096
    """Word pieces to keep."""
    teacher: str = "minilm"
    """Sentence encoder whose vectors are written: minilm or wordllama."""
