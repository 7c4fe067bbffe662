"""The encoder's tokenizer: ids with character offsets, special tokens kept apart. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers

from polyzoo.core.errors import DataError, WeightsError
from polyzoo.sea.splitting import Pieces

CAMEL_BORDER = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
_PROBE = "def getHTTPServer_2(self, x): return 'naïve'  # Über 42\n\tfoo->bar += unhappiness"


@dataclass(frozen=True)
class SpecialTokens:
    """What the encoder expects around every sequence."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad_id: int

    @property
    def count(self) -> int:
        """Pieces a sequence grows by."""
        return len(self.prefix) + len(self.suffix)


class SeaTokenizer:
    """Turns text into encoder pieces; callable where the splitters want a `Tokenize`.

    Example:
        >>> tokenizer = SeaTokenizer.from_folder("encoder")
        >>> tokenizer("def f(): pass").ids
        [13366, 1042, 1006, 1007, 1024, 3413]
    """

    def __init__(self, tokenizer: Tokenizer, *, split_identifiers: bool = False) -> None:
        """Take over a `tokenizers` tokenizer; its own truncation and padding are switched off.

        Args:
            tokenizer: Any fast tokenizer.
            split_identifiers: Cut at camelCase borders first. Offsets still refer to the text.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.special = _special_tokens(tokenizer)
        self.vocab_size = tokenizer.get_vocab_size()
        if split_identifiers:
            border = normalizers.Replace(Regex(CAMEL_BORDER), " ")
            own = tokenizer.normalizer
            tokenizer.normalizer = normalizers.Sequence([border, own] if own else [border])
        self._tokenizer = tokenizer
        self.sha256 = self._fingerprint()

    @classmethod
    def from_folder(cls, folder: str | Path, *, split_identifiers: bool = False) -> SeaTokenizer:
        """Read `tokenizer.json`, or let transformers build it from the older files."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if path.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:
                raise WeightsError(f"{path}: not a readable tokenizer file ({error})") from error
            return cls(tokenizer, split_identifiers=split_identifiers)
        from transformers import AutoTokenizer

        try:
            wrapped = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{folder}: no tokenizer.json, and transformers finds no other tokenizer files: "
                f"{error}"
            ) from error
        backend = getattr(wrapped, "backend_tokenizer", None)
        if backend is None:
            raise WeightsError(
                f"{folder}: its tokenizer has no fast version, and without one there are no "
                "character offsets; convert it with transformers' convert_slow_tokenizer"
            )
        return cls(backend, split_identifiers=split_identifiers)

    def __call__(self, text: str) -> Pieces:
        """Pieces of `text` with their character offsets; nothing cut, no special tokens."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return Pieces(ids=encoding.ids, spans=encoding.offsets)

    def query(self, text: str, *, limit: int) -> tuple[list[int], bool]:
        """Ids of a query with special tokens, and whether it was cut to `limit` pieces."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        room = limit - self.special.count
        if not ids:
            raise DataError(f"query {text!r} holds no words: give at least one")
        return self.wrap(ids[:room]), len(ids) > room

    def wrap(self, ids: Sequence[int]) -> list[int]:
        """Add the special tokens around pieces."""
        return [*self.special.prefix, *ids, *self.special.suffix]

    def vocabulary(self) -> dict[str, int]:
        """Piece to id."""
        return self._tokenizer.get_vocab()

    def _fingerprint(self) -> str:
        # Vocabulary and behaviour, not the file: its JSON differs between versions of tokenizers.
        content = json.dumps(
            [sorted(self.vocabulary().items()), self._tokenizer.encode(_PROBE).ids],
            ensure_ascii=True,
        )
        return hashlib.sha256(content.encode()).hexdigest()


def _special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    encoding = tokenizer.encode("a", add_special_tokens=True)
    mask = encoding.special_tokens_mask
    inside = [index for index, special in enumerate(mask) if not special]
    ids = encoding.ids
    if inside:
        prefix, suffix = ids[: inside[0]], ids[inside[-1] + 1 :]
    else:  # a vocabulary without "a": the template still shows on the empty text
        ids = tokenizer.encode("", add_special_tokens=True).ids
        prefix, suffix = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    pad = next(
        (
            found
            for name in ("[PAD]", "<pad>")
            if (found := tokenizer.token_to_id(name)) is not None
        ),
        0,
    )
    return SpecialTokens(prefix=tuple(prefix), suffix=tuple(suffix), pad_id=pad)
