"""What callers of the module hand in: shapes checked, masks turned into padding and bias."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.kernels import attend_dense
from sketch_walk.layout import Layout
from sketch_walk.state import SketchState

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# Additive masks hide with -inf, the dtype's least value or a large negative number: all of them lie below this.
HIDDEN_BELOW = -1e4


def check_attention_inputs(
    Q: Tensor, K: Tensor, V: Tensor, head_dim: int, layer_idx: int, causal: bool, has_state: bool
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the three tensors fit each other and `head_dim`."""
    for name, x in (("Q", Q), ("K", K), ("V", V)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, tokens, head_dim), got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.dtype != Q.dtype or x.device != Q.device:
            raise TypeError(f"{name} is {x.dtype} on {x.device}, but Q is {Q.dtype} on {Q.device}")
        if x.shape[-1] != head_dim:
            raise ValueError(f"{name} must have head_dim {head_dim} as last dimension, got {x.shape[-1]}")
        if x.shape[0] != Q.shape[0]:
            raise ValueError(f"{name} has batch size {x.shape[0]}, but Q has {Q.shape[0]}")
    if V.shape != K.shape:
        raise ValueError(f"V must have the shape of K, {tuple(K.shape)}, got {tuple(V.shape)}")
    if K.shape[1] < 1 or Q.shape[1] % K.shape[1]:
        raise ValueError(f"Q's {Q.shape[1]} heads must be a multiple of K's {K.shape[1]}")
    if K.shape[2] < Q.shape[2]:
        raise ValueError(f"K must hold every token so far: it has {K.shape[2]}, fewer than the {Q.shape[2]} of Q")
    if not isinstance(layer_idx, int) or isinstance(layer_idx, bool) or layer_idx < 0:
        raise ValueError(f"layer_idx must be an int of at least 0, got {layer_idx!r}")
    if not causal and (has_state or Q.shape[2] != K.shape[2]):
        raise ValueError("causal=False supports whole sequences only: n_q = n_k and state=None")


def check_state(state: SketchState, config: SketchWalkConfig, layer_idx: int, Q: Tensor, K: Tensor) -> None:
    """Raise ValueError or TypeError, naming `state`, unless it is one of `config` and stands where the call begins."""
    if not isinstance(state, SketchState):
        raise TypeError(f"state must be a SketchState, got {type(state).__name__}")
    if replace(state.config, dense_below=0) != replace(config, dense_below=0):
        raise ValueError("state was made with another config than the attention's own")
    layer = state.layers.get(layer_idx)
    seen, past = 0 if layer is None else layer.tokens, K.shape[2] - Q.shape[2]
    if seen != past:
        raise ValueError(
            f"K holds {past} tokens before Q, but state has taken in {seen} in layer {layer_idx}; hand in every call, "
            "and state.crop() after a cache crop"
        )
    if layer is not None and layer.codes is not None and layer.codes.shape[0] != Q.shape[0]:
        raise ValueError(
            f"state holds {layer.codes.shape[0]} sequences, but Q has {Q.shape[0]}; state.reorder() or repeat()"
        )


def interpret_mask(
    mask: Tensor | None, Q: Tensor, K: Tensor, has_state: bool = False
) -> tuple[Bool[Tensor, "batch num_keys"] | None, Float[Tensor, "batch one_or_heads num_queries num_keys"] | None]:
    """Split an attention mask into real keys (padding is never sketched) and a bias on the logits.

    Raises
    ------
    ValueError, TypeError
        For a shape that does not fit, or a mask of 3 or 4 dimensions beside a state.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a torch.Tensor, got {type(mask).__name__}")
    batch, heads, num_queries, num_keys = Q.shape[0], Q.shape[1], Q.shape[2], K.shape[2]
    if mask.is_complex():
        raise TypeError(f"attention_mask must be bool, integer or floating point, got {mask.dtype}")
    if mask.is_floating_point() and not bool((mask < math.inf).all()):
        raise ValueError("attention_mask holds NaN or +inf; an additive mask is finite, or -inf to hide")
    mask = mask.to(Q.device)
    if mask.dim() == 2:
        if mask.shape != (batch, num_keys):
            raise ValueError(f"attention_mask of 2 dimensions must be {(batch, num_keys)}, got {tuple(mask.shape)}")
        if not mask.is_floating_point():
            return mask != 0, None
        hidden = mask <= HIDDEN_BELOW
        if not bool((hidden | (mask == 0)).all()):
            raise ValueError(
                "attention_mask of 2 dimensions and floating dtype is additive: its entries must be 0 (seen) or at "
                f"most {HIDDEN_BELOW:g} (hidden); pass a bool or integer mask for 1 / 0"
            )
        return ~hidden, None
    if mask.dim() == 3:
        mask = mask.unsqueeze(1)
    wanted = [(batch, h, num_queries, num_keys) for h in (1, heads)]
    if mask.dim() != 4 or tuple(mask.shape) not in [*wanted, *((1, *shape[1:]) for shape in wanted)]:
        raise ValueError(
            f"attention_mask must have shape {(batch, num_keys)}, {(batch, num_queries, num_keys)} or "
            f"{(batch, '1 or ' + str(heads), num_queries, num_keys)}, got {tuple(mask.shape)}"
        )
    if has_state:
        raise ValueError(
            "attention_mask of 3 or 4 dimensions cannot be combined with state; pass padding as 2 dimensions"
        )
    if mask.is_floating_point():
        bias = mask.to(torch.promote_types(mask.dtype, torch.float32))
        bias = bias.masked_fill(bias <= HIDDEN_BELOW, -math.inf)
    else:
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, -math.inf)
    bias = bias.expand(batch, -1, -1, -1)
    return (bias > -math.inf).any(2).any(1), bias


def allowed_blocks(
    bias: Float[Tensor, "batch one_or_heads num_queries num_keys"], layout: Layout, size: int, rows: int, blocks: int
) -> Bool[Tensor, "batch rows blocks"]:
    """Key blocks in which the bias lets some query of the row see something."""
    batch, device = bias.shape[0], bias.device
    seen = (bias > -math.inf).any(1)
    row = layout.first_block(size)[:, None] + torch.arange(rows, device=device)
    rank = (row[..., None] * size + torch.arange(size, device=device)).flatten(1)
    real = (rank >= layout.past[:, None]) & (rank < layout.length[:, None])
    at = layout.query_positions(rank - layout.past[:, None])
    key_rank = torch.arange(blocks * size, device=device).expand(batch, -1)
    key_at = layout.key_positions(key_rank)
    sequence = torch.arange(batch, device=device)[:, None]
    by_row = (seen[sequence, at] & real[..., None]).unflatten(1, (rows, size)).any(2)
    by_rank = by_row.gather(2, key_at[:, None].expand(-1, rows, -1)) & (key_rank < layout.length[:, None])[:, None]
    return by_rank.unflatten(2, (blocks, size)).any(3)


def dense_with_mask(Q: Tensor, K: Tensor, V: Tensor, layout: Layout, bias: Tensor | None, causal: bool) -> Tensor:
    """Attention over all keys of a layer that is not sparse; 0 where a query sees nothing."""
    scale = 1.0 / math.sqrt(Q.shape[3])
    if bias is None and causal:
        return attend_dense(Q, K, V, layout, scale=scale)
    num_queries, num_keys, device = Q.shape[2], K.shape[2], Q.device
    hidden = (layout.ranks()[0] < 0)[:, None, None]
    if causal:
        after = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).triu(num_keys - num_queries + 1)
        hidden = hidden | after
    mask = torch.zeros((), dtype=Q.dtype, device=device) if bias is None else bias.to(Q.dtype)
    mask = mask.masked_fill(hidden, -math.inf)
    nothing = (mask == -math.inf).all(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        Q, K, V, attn_mask=mask.masked_fill(nothing, 0.0), scale=scale, enable_gqa=Q.shape[1] != K.shape[1]
    )
    return out.masked_fill(nothing, 0.0)
