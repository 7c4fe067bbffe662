"""Any Hugging Face encoder over packed sequences: no padding is ever computed.

All sequences of a chunk lie end to end in one row of tokens. Attention is told where each one
starts (`cu_seq_lens`), positions are counted per sequence, and pooling works per segment. An
encoder whose class does not hand these arguments to its attention is found out by a probe and run
on padded batches instead, said in `explain()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyzoo.core.errors import ConfigError
from polyzoo.core.log import get_logger
from polyzoo.core.weights import load_into
from polyzoo.sea.config import Pooling
from polyzoo.sea.encoding.encoder_loading import empty_encoder, encoder_weights
from polyzoo.sea.encoding.fused import FusedEncoder
from polyzoo.sea.encoding.packing import PackedSequences, by_length
from polyzoo.sea.encoding.segments import segment_ids, segment_mean

_log = get_logger(__name__)

# Families whose positions start behind the padding id (fairseq's habit).
_OFFSET_FAMILIES = frozenset(
    {
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "camembert",
        "data2vec-text",
        "longformer",
        "mpnet",
    }
)


class PackedEncoder(nn.Module):
    """A Hugging Face encoder that takes packed sequences and returns one vector each.

    Example:
        >>> encoder = PackedEncoder.from_folder("encoder", pooling="mean")
        >>> encoder(PackedSequences.pack([[101, 2175, 102]])).shape
        torch.Size([1, 384])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pooling: Pooling,
        max_tokens_per_forward: int = 32768,
        max_blocks_per_forward: int | None = None,
    ) -> None:
        """Wrap a model made with attn_implementation="polyzoo".

        Args:
            model: Returns `last_hidden_state`, and `pooler_output` if pooling is "pooler".
            pooling: How the states of a sequence become one vector.
            max_tokens_per_forward: Token budget of one forward pass.
            max_blocks_per_forward: Sequences in one forward pass; None for any number.
        """
        super().__init__()
        self.model = model
        self.pooling: Pooling = pooling
        self.max_tokens_per_forward = max_tokens_per_forward
        self.max_blocks_per_forward = max_blocks_per_forward
        self.packed = True
        self._fused: list[FusedEncoder] = []  # a list, so that its copies are no parameters of ours
        config = model.config
        if pooling == "pooler" and getattr(model, "pooler", None) is None:
            raise ConfigError(
                f"pooling='pooler' but {type(model).__name__} has no pooler layer: "
                "use pooling='mean' or 'cls'"
            )
        offset = config.model_type in _OFFSET_FAMILIES  # pyright: ignore[reportAttributeAccessIssue]
        self.pad_id = int(getattr(config, "pad_token_id", None) or 0)
        self.position_offset = self.pad_id + 1 if offset else 0

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        pooling: Pooling,
        max_tokens_per_forward: int = 32768,
        max_blocks_per_forward: int | None = None,
    ) -> PackedEncoder:
        """Load an encoder's folder (config.json and safetensors weights) in float32."""
        model = empty_encoder(folder, pooling=pooling)
        load_into(model, encoder_weights(folder, model), source=str(folder))
        return cls(
            model,
            pooling=pooling,
            max_tokens_per_forward=max_tokens_per_forward,
            max_blocks_per_forward=max_blocks_per_forward,
        )

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return int(self.model.config.hidden_size)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    @property
    def max_length(self) -> int:
        """Longest sequence the encoder has positions for, special tokens included."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return 1_000_000_000 if limit is None else int(limit) - self.position_offset

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def check(self, *, budget: int, special: int, pad_id: int, vocab_size: int) -> None:
        """Refuse a splitter or a tokenizer that does not fit this encoder."""
        if budget + special > self.max_length:
            raise ConfigError(
                f"budget={budget} plus {special} special tokens exceeds the encoder's "
                f"{self.max_length} positions: set it to {self.max_length - special} or less"
            )
        if pad_id != self.pad_id:
            raise ConfigError(
                f"pad id mismatch: the tokenizer says {pad_id}, the encoder's config says "
                f"{self.pad_id}; they do not belong together"
            )
        rows = int(self.model.config.vocab_size)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        if vocab_size > rows:
            raise ConfigError(
                f"the tokenizer has {vocab_size} pieces, the encoder {rows} rows: "
                "they do not belong together"
            )

    def fuse(self, *, compile: bool = False) -> bool:
        """Use the fused forward pass for inference from now on, if the family has one.

        Copies the weights as they are now: call it again after changing them.

        Returns:
            False if this encoder's family has no fused version; nothing is changed then.
        """
        fused = FusedEncoder.of(self.model, pooling=self.pooling, compile=compile)
        self._fused = [] if fused is None else [fused]
        if compile and fused is None:
            self.model.compile(dynamic=True)
        return fused is not None

    def unfuse(self) -> None:
        """Back to the modules themselves."""
        self._fused = []

    def explain(self) -> str:
        """One line on which path the forward pass takes, and why."""
        name = type(self.model).__name__
        if self._fused:
            return f"{name}: fused packed forward"
        if self.packed:
            return f"{name}: packed forward, attention told where sequences start"
        return f"{name}: padded batches; its attention does not receive cu_seq_lens"

    def forward(self, packed: PackedSequences, *, recompute: bool = False) -> Tensor:
        """Encode and pool. The result does not depend on how the sequences are chunked.

        Args:
            packed: s sequences.
            recompute: Keep only inputs and outputs of each chunk and run it again in the backward
                pass, so that memory is one chunk's and not the batch's (gradient caching).

        Returns:
            (s, d) vectors in float32, not normalised.
        """
        if packed.max_length > self.max_length:
            raise ConfigError(
                f"a sequence of {packed.max_length} tokens exceeds the encoder's "
                f"{self.max_length} positions: lower the budget"
            )
        chunks = packed.chunks(
            max_tokens=self.max_tokens_per_forward, max_sequences=self.max_blocks_per_forward
        )
        recompute = recompute and torch.is_grad_enabled()
        vectors = [
            checkpoint(self._chunk, chunk, use_reentrant=False) if recompute else self._chunk(chunk)
            for chunk in chunks
        ]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors)

    def encode(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """Encode lists of ids in any order; longest first inside, results in the given order."""
        order = by_length([len(sequence) for sequence in sequences])
        packed = PackedSequences.pack([sequences[index] for index in order]).to(self.device)
        vectors = self.forward(packed)
        back = torch.empty_like(vectors)
        back[torch.from_numpy(order).to(vectors.device)] = vectors
        return back

    def _chunk(self, packed: PackedSequences) -> Tensor:
        if self._fused and not torch.is_grad_enabled():
            return self._fused[0](packed).float()
        return self._packed(packed) if self.packed else self._padded(packed)

    def _packed(self, packed: PackedSequences) -> Tensor:
        total = packed.ids.shape[0]
        owner = segment_ids(packed.starts, total)
        positions = torch.arange(total, device=packed.ids.device) - packed.starts[owner]
        hidden = self.model(
            input_ids=packed.ids[None],
            position_ids=(positions + self.position_offset)[None],
            cu_seq_lens_q=packed.starts,
            cu_seq_lens_k=packed.starts,
            max_length_q=packed.max_length,
            max_length_k=packed.max_length,
        ).last_hidden_state[0]
        if self.pooling == "mean":
            return segment_mean(hidden.float(), packed.starts, owner)
        first = hidden[packed.starts[:-1].long()]
        if self.pooling == "pooler":
            first = self.model.pooler(first[:, None])  # pyright: ignore[reportCallIssue]
        return first.float()

    def _padded(self, packed: PackedSequences) -> Tensor:
        """Batches of similar length with an attention mask, for classes that cannot be packed."""
        order = by_length(packed.lengths)
        result = torch.empty(len(packed), self.dim, device=packed.ids.device)
        parts: list[Tensor] = []
        for first in range(0, len(order), _PADDED_BATCH):
            rows = order[first : first + _PADDED_BATCH]
            longest = max(packed.lengths[row] for row in rows)
            ids = packed.ids.new_full((len(rows), longest), self.pad_id)
            mask = torch.zeros_like(ids)
            starts = packed.starts.tolist()
            for line, row in enumerate(rows):
                length = packed.lengths[row]
                ids[line, :length] = packed.ids[starts[row] : starts[row] + length]
                mask[line, :length] = 1
            output = self.model(input_ids=ids, attention_mask=mask)
            parts.append(_pool_padded(output, mask, self.pooling))
        index = torch.from_numpy(order.copy()).to(result.device)
        return result.index_copy(0, index, torch.cat(parts).float())

    @torch.no_grad()
    def probe(self) -> bool:
        """Find out whether packing works: two sequences together must equal each alone.

        Sets `packed` accordingly and returns it. Families seen in the tests need no probe.
        """
        known = {"bert", "roberta", "xlm-roberta", "camembert", "electra"}
        if self.model.config.model_type in known:  # pyright: ignore[reportAttributeAccessIssue]
            return self.packed
        training = self.training
        self.eval()
        ids = [token for token in range(12) if token != self.pad_id]
        try:
            alone = torch.cat([self.encode([ids[:7]]), self.encode([ids[2:6]])])
            together = self.encode([ids[:7], ids[2:6]])
            scale = float(alone.abs().max())
            self.packed = bool((alone - together).abs().max() <= 1e-3 * max(scale, 1e-6))
        except (TypeError, ValueError, RuntimeError) as error:
            _log.info("%s refused packed input: %s", type(self.model).__name__, error)
            self.packed = False
        self.train(training)
        if not self.packed:
            _log.warning("%s", self.explain())
        return self.packed


_PADDED_BATCH = 32


def _pool_padded(output: Any, mask: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "pooler":
        return output.pooler_output
    hidden = output.last_hidden_state
    if pooling == "cls":
        return hidden[:, 0]
    weight = mask[..., None].to(torch.float32)
    return (hidden.float() * weight).sum(1) / weight.sum(1)


def set_dropout(model: nn.Module, *, hidden: float, attention: float) -> None:
    """Set how much is dropped in training, whatever the encoder's config says."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = attention if name.endswith(".self.dropout") else hidden
