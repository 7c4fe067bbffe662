"""The attention implementation "polyzoo" for every transformers model.

Example:
    >>> from polyzoo.attention.integrations.transformers import register
    >>> register()
    >>> model = AutoModel.from_pretrained(path, attn_implementation="polyzoo")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.attention.api import attention
from polyzoo.attention.integrations.padding import kv_lens_of
from polyzoo.attention.types import CuSeqlens

NAME = "polyzoo"
"""Without "flash", "sdpa" or "flex_attention": transformers looks for these parts of a name."""

_HARMLESS = frozenset(
    {
        "attention_mask",  # some models pass their 2-d mask along; the 4-d one is what counts
        "cache_position",
        "deterministic",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "head_mask",
        "input_ids",
        "labels",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)
_REFUSED = {
    "softcap": "capped scores",
    "s_aux": "attention sinks",
    "cache": "a paged cache",
}
_KEPT_AS = "_polyzoo_cu_seqlens"
_KEPT_ROWS = "_polyzoo_rows"


def register() -> None:
    """Make "polyzoo" known to transformers, with its mask function; may be called again.

    Both are needed: without a mask function of that name transformers drops every mask silently.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(**arguments: Any) -> Tensor | None:
    """Make a model's mask as torch's function takes it; transformers calls it.

    Where every query sees the same keys (encoders), one row is made and seen by all of them: no
    n x m tensor.

    Args:
        arguments: What transformers' own `sdpa_mask` takes.

    Returns:
        None, or bool `(b, 1, n, m)`, True attends.
    """
    from transformers import masking_utils

    encoder = getattr(masking_utils, "bidirectional_mask_function", None)
    if encoder is None or arguments.get("mask_function") is not encoder:
        return masking_utils.sdpa_mask(**arguments)
    row = masking_utils.sdpa_mask(**{**arguments, "q_length": 1})
    return None if row is None else row.expand(-1, -1, arguments["q_length"], -1)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Serve one layer; transformers calls it.

    Args:
        module: The layer, asked for `is_causal`.
        query: `(b, h, n, d)`.
        key: `(b, hk, m, d)`, grouped heads not repeated.
        value: `(b, hk, m, dv)`.
        attention_mask: What the mask function made: None or bool `(b, 1, n, m)`; or a caller's own
            additive mask.
        dropout: Probability of dropping.
        scaling: Multiplies the scores.
        is_causal: Overrides the layer's.
        position_bias: Added to the scores (T5).
        cu_seq_lens_q: Packed batch `(1, T)`: starts of the sequences.
        cu_seq_lens_k: The same for the keys.
        max_length_q: Longest packed sequence.
        max_length_k: The same for the keys.
        sliding_window: Keys a query sees; used where packing replaces the mask.
        kwargs: Other things models pass along: known ones are ignored, others refused.

    Returns:
        `(b, n, h, dv)` contiguous, and None for the weights.

    Raises:
        ValueError: The layer asks for what "polyzoo" does not do.
    """
    _refuse_unknown(kwargs)
    layer_is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if cu_seq_lens_q is not None:
        if attention_mask is not None and not layer_is_causal:
            raise ValueError(
                "cu_seq_lens_q together with an attention_mask: a packed batch has no padding; "
                "leave attention_mask out"
            )
        if position_bias is not None:
            raise ValueError('cu_seq_lens_q together with position_bias is not served by "polyzoo"')
        # A causal model's mask restates the packing, which transformers reads off position_ids.
        out = attention(
            query,
            key,
            value,
            causal=layer_is_causal,
            window=(sliding_window - 1, 0) if layer_is_causal and sliding_window else None,
            cu_seqlens=_lengths(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k),
            scale=scaling,
            dropout=dropout,
        )
        return out.transpose(1, 2), None
    n, m = query.shape[2], key.shape[2]
    causal = False
    if attention_mask is None and layer_is_causal and n > 1:
        causal = True
        if m > n:  # a static cache being filled: transformers aligns at the top left here
            key, value = key[:, :, :n], value[:, :, :n]
            if position_bias is not None:
                position_bias = position_bias[..., :n]
    mask, bias = attention_mask, position_bias
    if mask is not None and mask.dtype != torch.bool:
        bias = mask if bias is None else bias + mask
        mask = None
    lengths = None
    if mask is not None and mask.dim() == 4 and mask.stride(2) == 0:  # the same for every query
        mask, lengths = _padding(mask, key)
    if query.shape[0] == 1 < key.shape[0]:  # learned queries shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    out = attention(
        query,
        key,
        value,
        causal=causal,
        kv_lens=lengths,
        mask=mask,
        bias=bias,
        scale=scaling,
        dropout=dropout,
    )
    return out.transpose(1, 2), None


def _padding(mask: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return a mask over keys alone, or the lengths that it says, where looking is free."""
    whole = (key.shape[0], 1, key.shape[2])
    if mask.is_cpu and (mask.shape[0], mask.shape[1], mask.shape[3]) == whole:
        kept = getattr(mask, _KEPT_ROWS, None)  # one row tensor for all layers: it keeps lengths
        if kept is None:
            kept = mask[:, 0, 0]
            if not torch.compiler.is_compiling():
                setattr(mask, _KEPT_ROWS, kept)
        lengths = kv_lens_of(kept)
        if lengths is not None:
            return None, lengths
    return mask[:, :, :1], None


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if given is None or name in _HARMLESS:
            continue
        if name in _REFUSED:
            raise ValueError(
                f'{name} ({_REFUSED[name]}) is not supported by "{NAME}"; '
                'load the model with attn_implementation="eager"'
            )
        if isinstance(given, Tensor):
            raise ValueError(
                f'the model passes a tensor {name} of shape {tuple(given.shape)} that "{NAME}" '
                "does not know, and ignoring it could change the result; "
                'load the model with attn_implementation="eager"'
            )


def _lengths(
    queries: Tensor, keys: Tensor | None, max_q: int | None, max_k: int | None
) -> CuSeqlens:
    """Build the description of a packed batch once and keep it on its tensor for all layers."""
    if keys is None:
        keys = queries
    if max_q is None or max_k is None:
        raise ValueError(
            "cu_seq_lens_q needs max_length_q and max_length_k, the longest sequences, beside it"
        )
    max_q, max_k = int(max_q), int(max_k)
    if torch.compiler.is_compiling():
        return CuSeqlens(queries, keys, max_q, max_k)
    version = 0 if queries.is_inference() else queries._version
    kept = getattr(queries, _KEPT_AS, None)
    if kept is not None:
        lengths, made_at = kept
        if (
            made_at == version
            and lengths.k is keys
            and (lengths.max_q, lengths.max_k)
            == (
                max_q,
                max_k,
            )
        ):
            return lengths
    lengths = CuSeqlens(queries, keys, max_q, max_k)
    setattr(queries, _KEPT_AS, (lengths, version))
    return lengths
