"""Block scores after other published selectors, to compare with under one budget, one walk and one attention.

Each function is "like" its source in how it scores blocks, written from the paper's description. None is the original
system: how many blocks are read, which heads share them, and what attends to them is this library's, the same for all.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.evaluation.query_rows import (
    QueryRows,
    call_span,
    collect_scores,
    each_rows,
    over_queries,
    resolve_call,
)
from sketch_walk.layout import Layout, make_layout

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

# The papers' own values.
XATTENTION_STRIDE = 8
FLEXPREFILL_TAU = 0.1


@torch.no_grad()
def local_scores(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    config: SketchWalkConfig,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch selections rows blocks"]:
    """The nearer the higher: a sliding window (with the config's sink blocks), which looks at no token.

    Parameters and result as `sketch_walk.evaluation.oracle.oracle_scores`.
    """
    layout, _ = resolve_call(query, key, layout, scale)

    def score_rows(rows: QueryRows) -> Tensor:
        distance = rows.block[:, None] - torch.arange(rows.first_block + rows.stop - rows.start, device=query.device)
        near = torch.where(distance >= 0, 1.0 / (1.0 + distance.clamp(min=0)), 0.0)
        return near.expand(*query.shape[:2], -1, -1)

    return collect_scores(query, key.shape[1], config, layout, "max", _block_bytes(query, config), score_rows)


@torch.no_grad()
def block_mean_scores(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    config: SketchWalkConfig,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch selections rows blocks"]:
    """Attention between the mean query of a block and the mean keys of blocks.

    The estimate that most block selectors start from, among them the block-sparse heads of MInference
    (arXiv 2407.02490) and, with single queries, MoBA (arXiv 2502.13189). Unlike them: MInference chooses this pattern
    for some heads offline and keeps a top count per head; MoBA's models are trained with it.

    Parameters and result as `sketch_walk.evaluation.oracle.oracle_scores`; heads are reduced by ``config.reduce``.
    """
    layout, scale = resolve_call(query, key, layout, scale)
    means = _pooled_keys(key, layout, config.block_size)

    def score_rows(rows: QueryRows) -> Tensor:
        return _pooled_logits(rows, means, scale).softmax(-1)

    return collect_scores(query, key.shape[1], config, layout, config.reduce, _block_bytes(query, config), score_rows)


@torch.no_grad()
def quest_scores(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    config: SketchWalkConfig,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch selections rows blocks"]:
    """Upper bound of each query's logit in a page, from the page's least and greatest key per channel.

    After Quest (arXiv 2406.10774): ``sum_d max(q_d · min_d, q_d · max_d)``. Like it: the bound, for every query on its
    own. Unlike it: Quest serves decoding alone, with pages of 16 tokens and a top count per head; here a page is a
    block, prompts are scored too, and because heads and queries share a selection, each query's bounds pass a softmax
    over blocks before ``config.reduce`` joins them.

    Parameters and result as `sketch_walk.evaluation.oracle.oracle_scores`.
    """
    layout, scale = resolve_call(query, key, layout, scale)
    least = _whole_blocks(key, layout, config.block_size, math.inf).amin(3)
    greatest = _whole_blocks(key, layout, config.block_size, -math.inf).amax(3)

    def score_rows(rows: QueryRows) -> Tensor:
        seen = rows.first_block + rows.stop - rows.start
        queries = _by_kv_head(rows.queries * scale, key.shape[1])
        bound = queries.clamp(min=0) @ greatest[:, :, :seen].mT + queries.clamp(max=0) @ least[:, :, :seen].mT
        logits = bound.view(*rows.queries.shape[:4], seen)
        hidden = torch.arange(seen, device=query.device) > rows.block[:, None, None]
        return over_queries(logits.masked_fill(hidden, -math.inf).softmax(-1), rows.real, config.reduce)

    per_pair = _block_bytes(query, config)
    return collect_scores(query, key.shape[1], config, layout, config.reduce, per_pair, score_rows)


@torch.no_grad()
def xattention_scores(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    config: SketchWalkConfig,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
    stride: int = XATTENTION_STRIDE,
) -> Float[Tensor, "batch selections rows blocks"]:
    """Sums along anti-diagonals of stride x stride tiles of the logits, as the tile's one logit of a softmax.

    After XAttention (arXiv 2503.16428): runs of `stride` queries, reversed, meet runs of `stride` keys in one product
    of ``stride · head_dim`` features; a block's score is the sum of the tiles' probabilities in it. Like it: the score.
    Unlike it: XAttention keeps, per head, the fewest blocks that reach a threshold (set ``mass``, ``walk="none"`` and
    ``sparsity_exponent=1`` for that), tunes thresholds per head, and serves prompts alone; so does this function.

    Parameters and result as `sketch_walk.evaluation.oracle.oracle_scores`; heads are reduced by ``config.reduce``, and
    `stride` is in tokens.

    Raises
    ------
    ValueError
        Also for a stride that does not divide the block size, and for a call of one query.
    """
    size = config.block_size
    if stride < 1 or size % stride:
        raise ValueError(f"stride must divide block_size ({size}), got {stride}")
    layout, scale = resolve_call(query, key, layout, scale)
    _refuse_single_query(layout, "xattention")
    keys = _whole_blocks(key, layout, size).flatten(2, 3).unflatten(2, (-1, stride)).flatten(3)

    def score_rows(rows: QueryRows) -> Tensor:
        seen = (rows.first_block + rows.stop - rows.start) * size // stride
        queries = rows.queries.unflatten(3, (-1, stride)).flip(4).flatten(4)
        logits = _by_kv_head(queries * (scale / stride), key.shape[1]) @ keys[:, :, :seen].mT
        logits = logits.view(*queries.shape[:4], seen)
        tile = rows.rank[:, ::stride] // stride
        logits.masked_fill_(torch.arange(seen, device=query.device) > tile[..., None], -math.inf)
        mass = logits.softmax(-1).unflatten(-1, (-1, size // stride)).sum(-1)
        return over_queries(mass, rows.real.unflatten(1, (-1, stride)).any(-1), "mean")

    per_pair = 4.0 * query.shape[0] * query.shape[1] / stride**2
    return collect_scores(query, key.shape[1], config, layout, config.reduce, per_pair, score_rows)


@torch.no_grad()
def flexprefill_scores(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    config: SketchWalkConfig,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
    tau: float = FLEXPREFILL_TAU,
) -> Float[Tensor, "batch selections rows blocks"]:
    """Per head either block-pooled attention, or verticals and slashes extrapolated from the last query block.

    After FlexPrefill (arXiv 2502.20766). The exact attention of the call's last query block is the probe. Where the
    pooled estimate of that block is closer to it than `tau` (square root of the Jensen-Shannon divergence, nats), the
    head is query-aware: a row's scores are its own pooled attention. Elsewhere it is vertical-slash: key columns and
    diagonals keep the mass that the probe gave them, in every row. Like it: the probe, the test and the two patterns.
    Unlike it: FlexPrefill picks columns and diagonals token by token, and blocks over a head's whole map, each until a
    share of the mass is reached, and keeps a set of blocks per head; here rows are normalised and heads joined by
    ``config.reduce`` (set ``mass``, ``walk="none"`` and ``sparsity_exponent=1`` for a threshold per row). As in the
    original, early rows are chosen with knowledge of the last block: their selection, not their values, depends on
    later tokens.
    It serves prompts alone.

    Parameters and result as `sketch_walk.evaluation.oracle.oracle_scores`.

    Raises
    ------
    ValueError
        Also for a call of one query, or a negative `tau`.
    """
    if tau < 0:
        raise ValueError(f"tau must be at least 0, got {tau}")
    layout, scale = resolve_call(query, key, layout, scale)
    _refuse_single_query(layout, "flexprefill")
    size = config.block_size
    means = _pooled_keys(key, layout, size)
    last, probe = _probe_attention(query, key, layout, size, scale)
    columns = F.pad(probe.sum(2), (0, -probe.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)
    diagonals = _diagonal_mass(probe, size)
    exact = columns / columns.sum(-1, keepdim=True)
    estimate = _pooled_logits(last, means, scale).softmax(-1)[:, :, 0]
    pooled_heads = _jensen_shannon(estimate, exact).sqrt() < tau

    def score_rows(rows: QueryRows) -> Tensor:
        pooled = _pooled_logits(rows, means, scale).softmax(-1)
        seen = pooled.shape[-1]
        distance = rows.block[:, None] - torch.arange(seen, device=query.device)
        lines = columns[:, :, None, :seen] + diagonals[:, :, distance.clamp(min=0)]
        lines = torch.where(distance >= 0, lines, 0.0)
        lines = lines / lines.sum(-1, keepdim=True).clamp(min=torch.finfo(lines.dtype).tiny)
        return torch.where(pooled_heads[:, :, None, None], pooled, lines)

    return collect_scores(query, key.shape[1], config, layout, config.reduce, _block_bytes(query, config), score_rows)


def _probe_attention(
    query: Tensor, key: Tensor, layout: Layout, size: int, scale: float
) -> tuple[QueryRows, Float[Tensor, "batch heads queries keys"]]:
    """The call's last query block, and its exact attention."""
    past, length = call_span(layout)
    start = max(past, (length - 1) // size * size)
    tail = query[:, :, start - past :]
    (last,) = each_rows(tail, make_layout(tail.shape[0], tail.shape[2], length, tail.device), size, 1.0)
    queries, rank = last.queries.flatten(2, 3)[:, :, last.real[0]], last.rank[last.real]
    logits = _by_kv_head(queries * scale, key.shape[1]) @ key[:, :, :length].to(queries.dtype).mT
    logits = logits.view(*queries.shape[:3], length)
    return last, logits.masked_fill_(torch.arange(length, device=query.device) > rank[:, None], -math.inf).softmax(-1)


def _diagonal_mass(
    probe: Float[Tensor, "batch heads queries keys"], size: int
) -> Float[Tensor, "batch heads block_distances"]:
    """Mass of the probe by how many blocks a key lies before its query, as it would be met from a whole query block."""
    queries, keys = probe.shape[2:]
    rank = torch.arange(keys - queries, keys, device=probe.device)
    # The future holds no mass, so where it is put does not matter.
    offset = (rank[:, None] - torch.arange(keys, device=probe.device)).clamp(min=0)
    by_offset = probe.new_zeros(*probe.shape[:2], keys)
    by_offset.scatter_add_(2, offset.flatten().expand(*probe.shape[:2], -1), probe.flatten(2))
    # Of a block's queries, `inside` are so far back that a diagonal ends one block earlier for them.
    inside = torch.arange(size, device=probe.device) / size
    split = F.pad(by_offset, (0, -keys % size)).unflatten(-1, (-1, size))
    near, far = (split * (1 - inside)).sum(-1), (split * inside).sum(-1)
    return near + F.pad(far, (1, -1))


def _jensen_shannon(p: Float[Tensor, "... n"], q: Float[Tensor, "... n"]) -> Tensor:
    """Jensen-Shannon divergence of the last axis' distributions, in nats."""
    middle = (p + q) / 2
    return ((torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).nansum(-1) / 2).clamp(min=0)


def _pooled_logits(
    rows: QueryRows, means: Float[Tensor, "batch kv_heads blocks head_dim"], scale: float
) -> Float[Tensor, "batch heads rows visible"]:
    """Logits between the mean query of each row and the mean keys of blocks, -inf beyond the diagonal."""
    seen = rows.first_block + rows.stop - rows.start
    pooled = rows.queries.sum(3) / rows.real.sum(1)[:, None]
    logits = (_by_kv_head(pooled * scale, means.shape[1]) @ means[:, :, :seen].mT).view(*pooled.shape[:3], seen)
    return logits.masked_fill_(torch.arange(seen, device=means.device) > rows.block[:, None], -math.inf)


def _by_kv_head(x: Tensor, kv_heads: int) -> Float[Tensor, "batch kv_heads n dim"]:
    """(batch, heads, ..., dim) with all that one key/value head serves in one axis."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def _whole_blocks(key: Tensor, layout: Layout, size: int, fill: float = 0.0) -> Tensor:
    """Keys of the call's sequence in at least float32, `fill` after the last up to a whole block."""
    _, length = call_span(layout)
    keys = key[:, :, :length].to(torch.promote_types(key.dtype, torch.float32))
    return F.pad(keys, (0, 0, 0, -length % size), value=fill).unflatten(2, (-1, size))


def _pooled_keys(key: Tensor, layout: Layout, size: int) -> Float[Tensor, "batch kv_heads blocks head_dim"]:
    """Mean key of each block, over the tokens that are there."""
    _, length = call_span(layout)
    blocks = _whole_blocks(key, layout, size)
    start = torch.arange(0, length, size, device=key.device)
    return blocks.sum(3) / (length - start).clamp(max=size)[:, None]


def _block_bytes(query: Tensor, config: SketchWalkConfig) -> float:
    """Bytes for a query and a key that it sees, of a score per query and key block."""
    return 4.0 * query.shape[0] * query.shape[1] / config.block_size


def _refuse_single_query(layout: Layout, name: str) -> None:
    if layout.num_queries == 1:
        raise ValueError(f"{name} scores prompts, not single queries: use mode='prefill'")
