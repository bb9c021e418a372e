"""Dense attention through torch's SDPA: what runs below the crossover and in layers that stay dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Shaped

# Queries per masked slice: bounds the mask of a padded batch to this many rows.
QUERY_SLICE = 1024


def attend_dense(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    layout: Layout,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Shaped[Tensor, "batch heads num_queries head_dim"]:
    """Causal attention over all real keys; outputs of padding queries are finite and meaningless."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    grouped = key.shape[1] != query.shape[1]
    unpadded = layout.key_index is None
    if unpadded and (num_queries == num_keys or num_queries == 1):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scale, is_causal=num_queries > 1, enable_gqa=grouped
        )
    key_rank, query_rank = layout.ranks()
    results = []
    for lo in range(0, num_queries, QUERY_SLICE):
        rank = query_rank[:, lo : lo + QUERY_SLICE, None]
        visible = (key_rank[:, None] >= 0) & (key_rank[:, None] <= rank)
        visible |= rank < 0
        results.append(
            F.scaled_dot_product_attention(
                query[:, :, lo : lo + QUERY_SLICE],
                key,
                value,
                attn_mask=visible[:, None],
                dropout_p=dropout,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return results[0] if len(results) == 1 else torch.cat(results, 2)
