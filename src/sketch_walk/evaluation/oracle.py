"""The oracle: block scores from the exact attention, to measure selectors by. As dear as dense attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sketch_walk.config import REDUCTIONS, SketchWalkConfig
from sketch_walk.evaluation.query_rows import QueryRows, collect_scores, over_queries, resolve_call
from sketch_walk.layout import Layout, slice_bytes

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


@torch.no_grad()
def oracle_scores(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    config: SketchWalkConfig,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
    reduce: str = "max",
) -> Float[Tensor, "batch selections rows blocks"]:
    """Exact attention probabilities, summed over each key block, reduced over the row's queries and over heads.

    Parameters
    ----------
    query, key : torch.Tensor
        After RoPE; the queries are the last `num_queries` of the keys' tokens.
    config : SketchWalkConfig
        Gives `block_size` and `head_mode` ("mean" counts as "shared": the exact attention has no average head).
    layout : Layout, optional
        Default: nothing is padded.
    scale : float, optional
        Default 1/sqrt(head_dim).
    reduce : {"max", "mean"}
        "max" keeps what any query of any head needs; "mean" ranks blocks by the mass they carry.

    Returns
    -------
    torch.Tensor
        float32 (float64 for such inputs), in [0, 1], 0 beyond the diagonal. `selections` is kv_heads for
        ``head_mode="per_kv_head"``, else 1.

    Raises
    ------
    ValueError
        For an unknown `reduce`, a padded batch, or inside a compiled graph.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"unknown reduce {reduce!r}; expected one of {REDUCTIONS}")
    layout, scale = resolve_call(query, key, layout, scale)

    def score_rows(rows: QueryRows) -> Tensor:
        return over_queries(block_mass(rows, key, scale, config.block_size), rows.real, reduce)

    return collect_scores(query, key.shape[1], config, layout, reduce, mass_bytes(query), score_rows)


def mass_bytes(query: Tensor) -> int:
    """Bytes that `block_mass` needs for a query position and a key that it sees: one float32 logit for every head."""
    return 4 * query.shape[0] * query.shape[1]


def block_mass(
    rows: QueryRows, key: Shaped[Tensor, "batch kv_heads num_keys head_dim"], scale: float, block_size: int
) -> Float[Tensor, "batch heads rows width visible"]:
    """Share of each query's exact causal attention that falls on each key block, up to the last one the rows see.

    Keys are met in runs: the softmax over blocks of the log-sum-exp over each block's logits is the softmax over keys,
    summed by block. Rows that are not `real` hold finite values that mean nothing.
    """
    batch, heads, count, width, dim = rows.queries.shape
    kv_heads, blocks = key.shape[1], rows.first_block + count
    queries = (rows.queries * scale).reshape(batch, kv_heads, -1, dim)
    per_key = 4 * batch * heads * count * width
    run = max(1, slice_bytes(rows.queries) // (per_key * block_size))
    parts = []
    for lo in range(0, blocks, run):
        hi = min(lo + run, blocks)
        keys = key[:, :, lo * block_size : hi * block_size].to(queries.dtype)
        keys = F.pad(keys, (0, 0, 0, (hi - lo) * block_size - keys.shape[2]))
        logits = (queries @ keys.mT).view(batch, heads, count, width, -1)
        if hi > rows.first_block:
            rank = torch.arange(lo * block_size, hi * block_size, device=key.device)
            logits.masked_fill_(rank > rows.rank[..., None], -math.inf)
        parts.append(logits.unflatten(-1, (hi - lo, block_size)).logsumexp(-1))
    return torch.cat(parts, -1).softmax(-1)
