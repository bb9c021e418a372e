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
    CLIP,
    KEY_LEVELS,
    KeySketch,
    QuerySketch,
    block_scores,
    feature_width,
    keep_salient,
    payload_size,
    quantise_keys,
    quantise_queries,
    rotation,
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
    absorb_keys(state, key, layout, query, impl)
    if state.config.uses_walk:
        scores = call_scores(state, query, layout, scale, impl=impl)
        if combine_scores is not None:
            scores = combine_scores(scores)
        absorb_rows(state, query, transition_rows(scores, state.config), layout, scale, combine_scores)


def make_room(state: LayerSketch, key: Tensor, layout: Layout, query: Tensor) -> None:
    """Buffers for everything up to the call's last token."""
    config = state.config
    heads, width = sketched_heads(key.shape[1], config), feature_width(key.shape[3], config)
    state.allocate(
        key.shape[0],
        (heads, payload_size(width, config)),
        (sketched_heads(query.shape[1], config), query.shape[3]),
        key.dtype,
        key.device,
        layout.max_length,
    )
    state.reserve(layout.max_length)
    if state.cropped:
        state.drop_queries(layout.past)


def absorb_keys(state: LayerSketch, key: Tensor, layout: Layout, query: Tensor, impl: str = "auto") -> None:
    """Sketch the keys of the call into the state; a block that was open is sketched again from all its keys."""
    config, size = state.config, state.config.block_size
    width = feature_width(key.shape[3], config)
    make_room(state, key, layout, query)
    total = layout.num_query_blocks(size)
    if kernels.sketches_with_triton(impl, key, config, width):
        assert state.codes is not None
        assert state.scales is not None
        matrix = rotation(key.shape[3], config, key.device, kernels.product_dtype())
        kernels.sketch_keys(
            key, layout, total, state.codes, state.scales, matrix, config=config, step=CLIP / KEY_LEVELS
        )
        return
    first = layout.first_block(size)
    per_block = size // config.key_sub_block
    # A run's keys in float32, their means before and after the rotation, and what quantising them takes.
    bytes_per_block = key.shape[0] * key.shape[1] * key.shape[3] * 4 * (size + 8 * per_block)
    run = max(1, slice_bytes(key, key) // bytes_per_block)
    for lo in range(0, total, run):
        index = first[:, None] + torch.arange(lo, min(lo + run, total), device=key.device)
        rank = (index[..., None] * size + torch.arange(size, device=key.device)).flatten(1)
        real = rank < layout.length[:, None]
        tokens = take_tokens(key, layout.key_positions(rank)[:, None, None])
        sketch = sketch_tokens(tokens, real[:, None], config.key_sub_block, config)[:, 0]
        held = real[:, None, :: config.key_sub_block].unflatten(-1, (-1, per_block))
        codes = quantise_keys(sketch.unflatten(2, (-1, per_block)), held, config, key.dtype)
        state.write_keys(index, real[:, ::size], *codes)


def call_scores(
    state: LayerSketch, query: Tensor, layout: Layout, scale: float, causal: bool = True, impl: str = "auto"
) -> Float[Tensor, "batch selections rows blocks"]:
    """Block scores for the call's query blocks, from the call's queries; worked in slices of rows.

    A call of one query per sequence reads means and outlines of 8-bit key sketches, less than a third of them.
    """
    config, size = state.config, state.config.block_size
    batch, heads, num_queries, head_dim = query.shape
    num_rows = layout.num_query_blocks(size)
    blocks = -(-layout.max_length // size)
    kv_heads = state.codes.shape[1] if state.codes is not None else 1
    shape = (batch, selection_heads(kv_heads, config), num_rows, blocks)
    if 0 in shape:
        return query.new_zeros(shape, dtype=torch.float32)
    sketch = KeySketch(*state.read_keys(blocks))
    score_factor = score_scale(head_dim, scale, config)
    width = feature_width(head_dim, config)
    if causal and sketch.scales is not None and kernels.sketches_with_triton(impl, query, config, width):
        return kernels.peak_scores(
            query,
            layout,
            sketch.codes,
            sketch.scales,
            rotation(head_dim, config, query.device, kernels.product_dtype()),
            scale=score_factor,
            config=config,
        )
    scores = query.new_zeros(shape, dtype=torch.float32)
    least, most = layout.first_block_range(size)
    per_block = size // config.key_sub_block
    keys = sketch.dequantise(per_block, width, outline=num_queries == 1)
    kept = config.kept_sub_queries(1 if num_queries == 1 else size // config.query_sub_block)
    bytes_per_row = batch * sketched_heads(heads, config) * kept * blocks * per_block * 4
    step = max(1, slice_bytes(query, query, query) // max(1, bytes_per_row))
    for lo in range(0, num_rows, step):
        hi = min(lo + step, num_rows)
        visible = min(blocks, most + hi) if causal else blocks
        scores[:, :, lo:hi, :visible] = block_scores(
            _sketch_queries(query, layout, lo, hi, config),
            keys[:, :, : visible * per_block],
            layout.length,
            scale=score_factor,
            config=config,
            open_from=min(least + lo, visible - 1) * per_block if causal and layout.bounds is not None else 0,
            causal=causal,
        )
    return scores


def step_with_triton(config: SketchWalkConfig, query: Tensor, key: Tensor, impl: str) -> bool:
    """Whether `step_selection` serves a call: one query per sequence, no walk, and sketches that the kernels take."""
    if query.shape[2] != 1 or config.uses_walk or not query.numel():
        return False
    width = feature_width(query.shape[3], config)
    return all(kernels.sketches_with_triton(impl, x, config, width) for x in (query, key))


def step_selection(
    state: LayerSketch,
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads num_keys head_dim"],
    layout: Layout,
    scale: float,
    counts: tuple[Tensor, Tensor, Tensor],
    width: int,
    memory: kernels.StepMemory | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, indices and counts of one decode step: `absorb_keys`, `call_scores`, `sketch_walk.memory.recall` and the
    selection in fewer kernels. The state has room for the step (`make_room`).

    `counts` are `sketch_walk.selection.row_counts`, `width` the greatest of the budgets.
    """
    config = state.config
    codes, scales = state.read_keys(-(-layout.max_length // config.block_size))
    assert scales is not None
    return kernels.step_selection(
        key,
        query,
        layout,
        codes,
        scales,
        rotation(query.shape[3], config, query.device, kernels.product_dtype()),
        counts,
        memory,
        step=CLIP / KEY_LEVELS,
        scale=score_scale(query.shape[3], scale, config),
        width=width,
        config=config,
    )


def _sketch_queries(query: Tensor, layout: Layout, lo: int, hi: int, config: SketchWalkConfig) -> QuerySketch:
    """Sketched sub-queries of the call's query blocks lo ... hi - 1."""
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
    return _query_sketch(take_tokens(query, at[:, :, None]), rank, real, layout.length, sub, config)


def _query_sketch(
    tokens: Tensor, rank: Tensor, real: Tensor, length: Tensor, sub: int, config: SketchWalkConfig
) -> QuerySketch:
    """Sub-queries of tokens [batch, rows, heads, tokens, dim], the salient ones, rounded as the kernels round them."""
    ends = torch.minimum(rank.unflatten(-1, (-1, sub))[..., -1], length.view(-1, 1, 1) - 1)
    last_rank = torch.where(real.unflatten(-1, (-1, sub)).any(-1), ends, -1)
    sketch = sketch_tokens(tokens, real, sub, config, config.query_contrast)
    values, ranks = keep_salient(sketch, last_rank, config)
    if config.key_sketch_bits == 8 and config.block_score == "peak":
        values = quantise_queries(values)
    return QuerySketch(values, ranks)


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
    state.keep_queries(query, layout)


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
    width = feature_width(query.shape[3], config)
    keys = KeySketch(*state.read_keys(blocks)).dequantise(size // config.key_sub_block, width)
    scores = block_scores(
        _query_sketch(tokens, rank[:, None], real, layout.length, config.query_sub_block, config),
        keys,
        layout.length,
        scale=score_scale(query.shape[3], scale, config),
        config=config,
    )
    return transition_rows(scores if combine_scores is None else combine_scores(scores), config)
