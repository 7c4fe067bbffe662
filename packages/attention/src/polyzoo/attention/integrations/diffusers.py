"""Our attention in diffusers models: as a processor, and as the dispatcher's backend "polyzoo".

Example:
    >>> from polyzoo.attention.integrations.diffusers import install
    >>> pipe = PixArtAlphaPipeline.from_pretrained(path)
    >>> install(pipe.transformer)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.attention.api import attention
from polyzoo.attention.integrations.padding import kv_lens_of

NAME = "polyzoo"
"""What the dispatcher calls the backend."""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """Which layers of a model now attend through this package."""

    processors: tuple[str, ...]
    """Layers that got a `PolyzooAttnProcessor`."""
    dispatched: tuple[str, ...]
    """Layers whose own processor asks the dispatcher, which now asks us."""
    left: tuple[str, ...]
    """Layers with a processor of another kind, which stays."""


def install(model: nn.Module) -> Installed:
    """Route every attention layer of a diffusers model through this package.

    Nothing outside the model changes (its own `set_attention_backend` would also set the default
    of the whole process). Use the result to see which layers were reached.

    Raises:
        ValueError: No layer could be routed.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    processors: list[str] = []
    dispatched: list[str] = []
    left: list[str] = []
    for name, layer in model.named_modules():
        theirs = getattr(layer, "processor", None)
        set_processor: Any = getattr(layer, "set_processor", None)
        if theirs is None or set_processor is None:
            continue
        if isinstance(theirs, PolyzooAttnProcessor) or type(theirs) is AttnProcessor2_0:
            set_processor(PolyzooAttnProcessor())
            processors.append(name)
        elif hasattr(theirs, "_attention_backend"):
            theirs._attention_backend = register()
            dispatched.append(name)
        else:
            left.append(f"{name} ({type(theirs).__name__})")
    if not processors and not dispatched:
        others = f": {', '.join(left)}" if left else ", it has no attention layer of diffusers'"
        raise ValueError(
            f"no layer of this {type(model).__name__} can attend through polyzoo{others}; layers "
            "with AttnProcessor2_0, or with a processor that asks diffusers' dispatcher, can"
        )
    return Installed(processors=tuple(processors), dispatched=tuple(dispatched), left=tuple(left))


class PolyzooAttnProcessor:
    """What diffusers' `AttnProcessor2_0` computes, on our attention; for `set_attn_processor`.

    Text padding (zeros, then -10000) becomes lengths: hidden keys are then not read at all. Masks
    are not repeated for every head.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Serve one layer; diffusers calls it.

        Args:
            attn: The layer: projections, norms, number of heads.
            hidden_states: Queries, `(b, n, c)` or an image `(b, c, H, W)`.
            encoder_hidden_states: Keys and values, `(b, m, c)`; the queries if left out.
            attention_mask: bool or additive, `(b, 1, m)` or what the layer's
                `prepare_attention_mask` takes.
            temb: For a spatial norm.

        Returns:
            The shape of `hidden_states`, in its dtype.
        """
        states = hidden_states
        if attn.spatial_norm is not None:
            states = attn.spatial_norm(states, temb)
        image = states.shape if states.ndim == 4 else None
        if image is not None:
            states = states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            states = attn.group_norm(states.transpose(1, 2)).transpose(1, 2)
        context = states
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
        q, k, v = (
            project(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, source in ((attn.to_q, states), (attn.to_k, context), (attn.to_v, context))
        )
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        out = attention(q, k, v, **_masks(attn, attention_mask, k))
        out = out.transpose(1, 2).flatten(2)
        for layer in attn.to_out:  # the projection, then its dropout
            out = layer(out)
        if image is not None:
            out = out.transpose(1, 2).reshape(image)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def _masks(attn: Any, mask: Tensor | None, k: Tensor) -> dict[str, Any]:
    if mask is None:
        return {}
    b, m = k.shape[0], k.shape[2]
    padding = mask.ndim == 2 or (mask.ndim == 3 and mask.shape[1] == 1)
    if padding and mask.shape[0] == b and mask.shape[-1] == m:
        if mask.dtype == torch.bool:
            return {"mask": mask.reshape(b, 1, 1, m)}
        lengths = kv_lens_of(mask if mask.ndim == 2 else mask[:, 0])
        return {"bias": mask.reshape(b, 1, 1, m)} if lengths is None else {"kv_lens": lengths}
    whole: Tensor = attn.prepare_attention_mask(mask, m, b)
    whole = whole.view(b, attn.heads, -1, whole.shape[-1])
    return {"mask" if whole.dtype == torch.bool else "bias": whole}


def register() -> Any:
    """Make "polyzoo" known to diffusers' attention dispatcher; may be called again.

    Then `with attention_backend("polyzoo"):` and `model.set_attention_backend("polyzoo")` of
    diffusers work too. diffusers has no public way to add a backend; this extends its enumeration.

    Returns:
        The member of diffusers' `AttentionBackendName`.

    Raises:
        RuntimeError: This version of diffusers keeps its backends otherwise.
    """
    import diffusers
    from diffusers.models import attention_dispatch

    names: Any = getattr(attention_dispatch, "AttentionBackendName", None)
    registry: Any = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    if names is None or not hasattr(registry, "register") or not hasattr(registry, "_backends"):
        raise RuntimeError(
            f"diffusers {diffusers.__version__} has no attention dispatcher as of 0.36 to 0.42; "
            "give the model processors instead: model.set_attn_processor(PolyzooAttnProcessor())"
        )
    if NAME not in names._value2member_map_:
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        type.__setattr__(names, NAME.upper(), member)
        names._member_map_[NAME.upper()] = member
        names._member_names_.append(NAME.upper())
        names._value2member_map_[NAME] = member
    member = names(NAME)
    if member not in registry._backends:
        registry.register(member)(dispatched_attention)
    return member


def dispatched_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001 - diffusers passes it; grouped heads are seen
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Serve one layer; diffusers' dispatcher calls it.

    Args:
        query: `(b, n, h, d)`.
        key: `(b, m, hk, d)`.
        value: `(b, m, hk, dv)`.
        attn_mask: bool (True attends) or additive, broadcastable to `(b, h, n, m)`; or `(b, m)`.
        dropout_p: Probability of dropping.
        is_causal: As torch means it: aligned at the top left.
        scale: Multiplies the scores.
        enable_gqa: Grouped heads are served without being asked.
        return_lse: Also return the log-sum-exp, `(b, n, h)`.

    Returns:
        `(b, n, h, dv)`.

    Raises:
        ValueError: A context-parallel call, which this backend does not serve.
    """
    if _parallel_config is not None:
        raise ValueError(
            'context parallelism is not served by "polyzoo"; use diffusers\' own backend "native"'
        )
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    n, m = q.shape[2], k.shape[2]
    mask = bias = lengths = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = attn_mask
        if mask.ndim == 2 and mask.shape == (k.shape[0], m):
            mask = mask[:, None, None]
    elif attn_mask is not None:
        bias = attn_mask
        if bias.ndim == 2 and bias.shape == (k.shape[0], m):
            lengths = kv_lens_of(bias)
            bias = bias[:, None, None] if lengths is None else None
    causal = is_causal
    if is_causal and n > m:  # the first m queries are a square, the others see every key
        triangle = torch.ones(n, m, dtype=torch.bool, device=q.device).tril()
        mask, causal = triangle if mask is None else mask & triangle, False
    elif is_causal and n < m:
        k, v = k[:, :, :n], v[:, :, :n]
        mask, bias = (t if t is None or t.shape[-1] == 1 else t[..., :n] for t in (mask, bias))
        lengths = None if lengths is None else lengths.clamp(max=n)
    if causal and lengths is not None:  # with lengths ours is aligned at each sequence's end
        positions = torch.arange(k.shape[2], device=q.device)
        mask = (positions < lengths[:, None])[:, None, None]
        lengths = None
    options: dict[str, Any] = {
        "causal": causal,
        "kv_lens": lengths,
        "mask": mask,
        "bias": bias,
        "scale": scale,
        "dropout": dropout_p,
    }
    if return_lse:
        out, lse = attention(q, k, v, **options, return_lse=True)
        return out.transpose(1, 2), lse.transpose(1, 2)
    return attention(q, k, v, **options).transpose(1, 2)
