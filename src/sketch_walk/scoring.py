"""Stages 1 to 3 of one call over a `LayerSketch`: sketch keys, score query blocks, keep what later calls need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk import kernels
from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout, slice_bytes, take_tokens
from sketch_walk.sketch import (
    KeySketch,
    block_scores,
    feature_width,
    quantise_keys,
    score_scale,
    selection_heads,
    sketch_tokens,
    sketched_heads,
)
from sketch_walk.state import LayerSketch
from sketch_walk.walk import transition_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


@torch.no_grad()
def absorb_call(
    state: LayerSketch,
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    layout: Layout,
    scale: float,
    combine_scores: Callable[[Tensor], Tensor] | None = None,
    impl: str = "auto",
) -> None:
    """Update `state` with a call that ran dense: the same key sketches and transition rows as if it had run sparse."""
    absorb_keys(state, key, layout, query)
    if state.config.uses_walk:
        scores = call_scores(state, query, layout, scale, impl=impl)
        if combine_scores is not None:
            scores = combine_scores(scores)
        absorb_rows(state, query, transition_rows(scores, state.config), layout, scale, combine_scores)


def absorb_keys(state: LayerSketch, key: Tensor, layout: Layout, query: Tensor) -> None:
    """Sketch the keys of the call into the state; sub-blocks that were open are sketched again from all their keys."""
    config, size = state.config, state.config.key_sub_block
    heads = sketched_heads(key.shape[1], config)
    state.allocate(
        key.shape[0],
        (heads, feature_width(key.shape[3], config)),
        (sketched_heads(query.shape[1], config), query.shape[3]),
        key.dtype,
        key.device,
    )
    state.reserve(layout.max_length)
    first = layout.past // size
    last = [(n - 1) // size - p // size + 1 for p, n in layout.bounds or ()]
    total = max(last, default=0) if layout.bounds is not None else (layout.num_queries - 1) // size + 2
    # A run's keys in float32, and their means before and after the rotation.
    bytes_per_sub_key = key.shape[0] * key.shape[1] * key.shape[3] * 4 * (size + 2)
    run = max(1, slice_bytes(key, key) // bytes_per_sub_key)
    for lo in range(0, total, run):
        index = first[:, None] + torch.arange(lo, min(lo + run, total), device=key.device)
        rank = (index[..., None] * size + torch.arange(size, device=key.device)).flatten(1)
        real = rank < layout.length[:, None]
        tokens = take_tokens(key, layout.key_positions(rank)[:, None, None])
        sketch = quantise_keys(sketch_tokens(tokens, real[:, None], size, config)[:, 0], config, key.dtype)
        state.write_keys(index, real[:, ::size], *sketch)


def call_scores(
    state: LayerSketch, query: Tensor, layout: Layout, scale: float, causal: bool = True, impl: str = "auto"
) -> Float[Tensor, "batch selections rows blocks"]:
    """Block scores for the call's query blocks, from the call's queries; worked in slices of rows."""
    config, size = state.config, state.config.block_size
    batch, heads, num_queries, head_dim = query.shape
    num_rows = layout.num_query_blocks(size)
    blocks = -(-layout.max_length // size)
    kv_heads = state.codes.shape[1] if state.codes is not None else 1
    scores = query.new_zeros(batch, selection_heads(kv_heads, config), num_rows, blocks, dtype=torch.float32)
    if not scores.numel():
        return scores
    sketch = KeySketch(*state.read_keys(blocks))
    least, most = layout.first_block_range(size)
    sub_queries = 1 if num_queries == 1 else size // config.query_sub_block
    per_block = size // config.key_sub_block
    width = sketch.codes.shape[3]
    rows_of_heads = sketched_heads(heads, config) * sub_queries
    fused = kernels.scores_with_triton(impl, query, causal, width, sub_queries, per_block, num_rows)
    keys = None if fused else sketch.dequantise()
    bytes_per_row = batch * rows_of_heads * (width if fused else blocks * per_block) * 4
    step = max(1, slice_bytes(query, query, query) // max(1, bytes_per_row))
    score_factor = score_scale(head_dim, scale, config)
    for lo in range(0, num_rows, step):
        hi = min(lo + step, num_rows)
        visible = min(blocks, most + hi) if causal else blocks
        sketched, last_rank = _sketch_queries(query, layout, lo, hi, config)
        if keys is None:
            scores[:, :, lo:hi, :visible] = kernels.fused_block_scores(
                sketched,
                last_rank,
                sketch.codes[:, :, : visible * per_block],
                None if sketch.scales is None else sketch.scales[:, :, : visible * per_block],
                layout.length,
                scale=score_factor,
                config=config,
            )
            continue
        scores[:, :, lo:hi, :visible] = block_scores(
            sketched,
            last_rank,
            keys[:, :, : visible * per_block],
            layout.length,
            scale=score_factor,
            config=config,
            open_from=min(least + lo, visible - 1) * per_block if causal and layout.bounds is not None else 0,
            causal=causal,
        )
    return scores


def _sketch_queries(query: Tensor, layout: Layout, lo: int, hi: int, config: SketchWalkConfig) -> tuple[Tensor, Tensor]:
    """Sketched sub-queries of the call's query blocks lo ... hi - 1, and the rank of the last token of each, or -1."""
    device, size = query.device, config.block_size
    if layout.num_queries == 1:
        rank = layout.past.view(-1, 1, 1)
        sub = 1
    else:
        block = layout.first_block(size)[:, None] + torch.arange(lo, hi, device=device)
        rank = block[..., None] * size + torch.arange(size, device=device)
        sub = config.query_sub_block
    slot = rank - layout.past.view(-1, 1, 1)
    real = (slot >= 0) & (rank < layout.length.view(-1, 1, 1))
    at = layout.query_positions(slot.flatten(1)).view(slot.shape)
    sketched = sketch_tokens(take_tokens(query, at[:, :, None]), real, sub, config)
    return sketched, _last_ranks(rank, real, layout.length, sub)


def _last_ranks(rank: Tensor, real: Tensor, length: Tensor, sub: int) -> Tensor:
    """Rank of the last position of each sub-block, clamped to the sequence; -1 where no token of it is real."""
    ends = torch.minimum(rank.unflatten(-1, (-1, sub))[..., -1], length.view(-1, 1, 1) - 1)
    return torch.where(real.unflatten(-1, (-1, sub)).any(-1), ends, -1)


def absorb_rows(
    state: LayerSketch,
    query: Tensor,
    rows: Tensor,
    layout: Layout,
    scale: float,
    combine_scores: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Store the transition rows of blocks that the call completes, and keep its last queries for the open block.

    A block that began in this call has its row in `rows` already. One that was open before the call needs its earlier
    queries too: they come from the ring.
    """
    size = state.config.block_size
    first = layout.first_block(size)
    index = first[:, None] + torch.arange(rows.shape[2], device=rows.device)
    complete = (index + 1) * size <= layout.length[:, None]
    began_here = index * size >= layout.past[:, None]
    state.write_rows(index, complete & began_here, rows)
    if layout.completes_open_block(size):
        row = _open_block_row(state, query, layout, rows.shape[3], scale, combine_scores)
        closes = (layout.past % size != 0) & ((first + 1) * size <= layout.length)
        state.write_rows(first[:, None], closes[:, None], row)
    _keep_queries(state, query, layout)


def _open_block_row(
    state: LayerSketch,
    query: Tensor,
    layout: Layout,
    blocks: int,
    scale: float,
    combine_scores: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Transition row of the block that was open before the call, from its ring queries and the call's."""
    config, size = state.config, state.config.block_size
    first = layout.first_block(size)
    rank = first[:, None] * size + torch.arange(size, device=query.device)
    slot = rank - layout.past[:, None]
    at = layout.query_positions(slot)
    new = take_tokens(query, at[:, None, None])
    if config.head_mode == "mean":
        new = new.float().mean(2, keepdim=True)
    old, kept = state.read_queries(rank)
    from_ring = rank < layout.past[:, None]
    tokens = torch.where(from_ring[:, None, None, :, None], old[:, None].to(new.dtype), new)
    end = torch.minimum(layout.length, (first + 1) * size)
    real = torch.where(from_ring, kept, rank < end[:, None])[:, None]
    sketched = sketch_tokens(tokens, real, config.query_sub_block, config)
    last_rank = _last_ranks(rank[:, None], real, layout.length, config.query_sub_block)
    keys = KeySketch(*state.read_keys(blocks)).dequantise()
    scores = block_scores(
        sketched,
        last_rank,
        keys,
        layout.length,
        scale=score_scale(query.shape[3], scale, config),
        config=config,
    )
    return transition_rows(scores if combine_scores is None else combine_scores(scores), config)


def _keep_queries(state: LayerSketch, query: Tensor, layout: Layout) -> None:
    """Put the call's last queries into the ring."""
    config = state.config
    kept = min(layout.num_queries, state.ring_size)
    new = layout.length - layout.past
    slot = torch.arange(kept, device=query.device) + (new - kept).clamp(min=0)[:, None]
    real = slot < new[:, None]
    queries = take_tokens(query, layout.query_positions(slot)[:, None, None])[:, 0]
    if config.head_mode == "mean":
        queries = queries.float().mean(1, keepdim=True)
    state.write_queries(layout.past[:, None] + slot, real, queries)
