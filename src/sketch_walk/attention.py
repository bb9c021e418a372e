"""The method, top to bottom: sketch, score, walk, select, attend.

`sketch_walk_attention` composes the stages for one layer of one call. It is the only place that knows all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sketch_walk import kernels, masks
from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout, make_layout, slice_bytes, take_tokens
from sketch_walk.selection import BlockSelection, select_blocks
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
from sketch_walk.state import LayerSketch, SketchState
from sketch_walk.walk import transition_rows, walk_step

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped

# Keys are sketched in runs of this many tokens, to bound float32 copies.
KEY_RUN = 1024


class SketchWalkOutput(NamedTuple):
    """Result of one layer.

    Parameters
    ----------
    output : torch.Tensor
        Shape (batch, num_heads, num_queries, head_dim).
    selection : BlockSelection
        What was read.
    walk : torch.Tensor
        Rows of R after this layer, to hand to the next sparse layer of the same forward pass.
    """

    output: Tensor
    selection: BlockSelection
    walk: Tensor


def sketch_walk_attention(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    config: SketchWalkConfig,
    *,
    state: LayerSketch | None = None,
    walk: Float[Tensor, "batch selections rows blocks"] | None = None,
    layout: Layout | None = None,
    bias: Float[Tensor, "batch one_or_heads num_queries num_keys"] | None = None,
    scale: float | None = None,
    causal: bool = True,
    impl: str = "auto",
    combine_scores: Callable[[Tensor], Tensor] | None = None,
) -> SketchWalkOutput:
    """Attention of one layer over the blocks that sketch and walk select.

    Parameters
    ----------
    query, key, value : torch.Tensor
        After RoPE. `key` and `value` hold every token so far; the queries are the last `num_queries` of them unless
        `layout` says otherwise.
    state : LayerSketch, optional
        The layer's memory of earlier calls, updated in place. None starts afresh: blocks that only earlier calls' queries
        could describe then keep their walk mass in place.
    walk : torch.Tensor, optional
        `SketchWalkOutput.walk` of the previous sparse layer of this forward pass.
    layout : Layout, optional
        Where the real tokens lie; None means nothing is padded.
    bias : torch.Tensor, optional
        Added to the logits of selected pairs, -inf to hide.
    scale : float, optional
        Default 1/sqrt(head_dim).
    impl : str
        Kernel of the last stage.
    combine_scores : callable, optional
        Maps this rank's block scores to all ranks' under tensor parallelism (an all-reduce).

    Returns
    -------
    SketchWalkOutput
    """
    batch, _, num_queries, head_dim = query.shape
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    layout = layout or make_layout(batch, num_queries, key.shape[2], query.device)
    kernel = kernels.resolve(impl)
    with torch.no_grad():
        state = LayerSketch(config) if state is None else state
        absorb_keys(state, key, layout, query)
        scores = call_scores(state, query, layout, scale, causal)
        if combine_scores is not None:
            scores = combine_scores(scores)
        rows = transition_rows(scores, config)
        row_index = layout.first_block(config.block_size)[:, None] + torch.arange(rows.shape[2], device=rows.device)
        transitions = None
        if config.uses_walk:
            absorb_rows(state, query, rows, layout, scale, combine_scores)
            transitions = None if walk is None else state.read_rows(rows.shape[3])
        walk = walk_step(walk, rows, transitions, row_index, config)
        selection = select_blocks(
            walk,
            row_index,
            has_queries=row_index * config.block_size < layout.length[:, None],
            config=config,
            dense_rows=_dense_tail(layout, row_index, config),
            available=None if causal else _all_blocks(layout, row_index, config),
            allowed=None if bias is None else _allowed_blocks(bias, layout, config, *rows.shape[2:]),
        )
    assert kernel == "reference"
    shared = selection.per_head()
    output = kernels.attend_selected(
        query,
        key,
        value,
        shared.indices,
        shared.counts,
        layout,
        block_size=config.block_size,
        scale=scale,
        causal=causal,
        bias=bias,
        mean_correction=config.mean_correction,
    )
    return SketchWalkOutput(output, selection, walk)


@torch.no_grad()
def absorb_call(
    state: LayerSketch,
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    layout: Layout,
    scale: float,
    combine_scores: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Update `state` with a call that ran dense: the same key sketches and transition rows as if it had run sparse."""
    absorb_keys(state, key, layout, query)
    if state.config.uses_walk:
        scores = call_scores(state, query, layout, scale)
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
    run = max(1, KEY_RUN // size)
    for lo in range(0, total, run):
        index = first[:, None] + torch.arange(lo, min(lo + run, total), device=key.device)
        rank = (index[..., None] * size + torch.arange(size, device=key.device)).flatten(1)
        real = rank < layout.length[:, None]
        tokens = take_tokens(key, layout.key_positions(rank)[:, None, None])
        sketch = quantise_keys(sketch_tokens(tokens, real[:, None], size, config)[:, 0], config, key.dtype)
        state.write_keys(index, real[:, ::size], *sketch)


def call_scores(
    state: LayerSketch, query: Tensor, layout: Layout, scale: float, causal: bool = True
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
    keys = KeySketch(*state.read_keys(blocks)).dequantise()
    least, most = layout.first_block_range(size)
    single = num_queries == 1
    sub_queries = 1 if single else size // config.query_sub_block
    per_block = size // config.key_sub_block
    bytes_per_row = batch * sketched_heads(heads, config) * sub_queries * blocks * per_block * 4
    step = max(1, slice_bytes(query, query, query) // max(1, bytes_per_row))
    for lo in range(0, num_rows, step):
        hi = min(lo + step, num_rows)
        visible = min(blocks, most + hi) if causal else blocks
        sketched, last_rank = _sketch_queries(query, layout, lo, hi, config)
        scores[:, :, lo:hi, :visible] = block_scores(
            sketched,
            last_rank,
            keys[:, :, : visible * per_block],
            layout.length,
            scale=score_scale(head_dim, scale, config),
            config=config,
            open_from=min(least + lo, visible - 1) * per_block if causal and layout.bounds is not None else 0,
            causal=causal,
        )
    return scores


def _sketch_queries(
    query: Tensor, layout: Layout, lo: int, hi: int, config: SketchWalkConfig
) -> tuple[Tensor, Tensor]:
    """Sketched sub-queries of the call's query blocks lo ... hi - 1, and the rank of the last token of each (-1: none)."""
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
    config, size = state.config, state.config.block_size
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


def _dense_tail(layout: Layout, row_index: Tensor, config: SketchWalkConfig) -> Tensor | None:
    """The last `dense_tail_blocks` query blocks of each sequence, in a call of several tokens."""
    if not config.dense_tail_blocks or layout.num_queries == 1:
        return None
    last = (layout.length - 1) // config.block_size
    return row_index > (last - config.dense_tail_blocks)[:, None]


def _all_blocks(layout: Layout, row_index: Tensor, config: SketchWalkConfig) -> Tensor:
    """Every block of each sequence, for attention that is not causal."""
    return (-(-layout.length // config.block_size))[:, None].expand_as(row_index)


def _allowed_blocks(bias: Tensor, layout: Layout, config: SketchWalkConfig, rows: int, blocks: int) -> Bool[Tensor, "b r k"]:
    """Key blocks in which the bias lets some query of the row see something."""
    size, batch = config.block_size, bias.shape[0]
    device = bias.device
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


class SketchWalkAttention(nn.Module):
    """Sparse attention as a module: call it in place of a layer's attention.

    It holds no state: the walk and the sketches travel in the `SketchState` that the caller owns. It ignores
    `dense_below`: layers from `skip_first_n_layers` up are always sparse.

    Parameters
    ----------
    config : SketchWalkConfig
    head_dim : int
        Size of the last dimension of queries, keys and values.

    Raises
    ------
    TypeError, ValueError
        If `config` is no SketchWalkConfig or `head_dim` is below 1.
    """

    def __init__(self, config: SketchWalkConfig, head_dim: int) -> None:
        super().__init__()
        if not isinstance(config, SketchWalkConfig):
            raise TypeError(f"config must be a SketchWalkConfig, got {type(config).__name__}")
        if not isinstance(head_dim, int) or head_dim < 1:
            raise ValueError(f"head_dim must be an int of at least 1, got {head_dim!r}")
        self.config = replace(config, dense_below=0)
        self.head_dim = head_dim

    def forward(
        self,
        Q: Shaped[Tensor, "batch heads num_queries head_dim"],
        K: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
        V: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
        layer_idx: int,
        attention_mask: Tensor | None = None,
        causal: bool = True,
        state: SketchState | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Parameters
        ----------
        Q : torch.Tensor
            Shape (batch, num_heads, n_q, head_dim), after RoPE: the last n_q tokens.
        K, V : torch.Tensor
            Shape (batch, num_heads or num_kv_heads, n_k, head_dim): all tokens so far, those of `Q` included.
        layer_idx : int
            Absolute index of the layer; below `skip_first_n_layers` attention is dense.
        attention_mask : torch.Tensor, optional
            Shape (batch, n_k), (batch, n_q, n_k) or (batch, 1 or num_heads, n_q, n_k). Bool or integer: nonzero may be
            seen. Floating point: added to the logits. A key that no query may see counts as padding.
        causal : bool
            Hide later tokens. False supports whole sequences only (n_q = n_k, no `state`).
        state : SketchState, optional
            Carries the walk from layer to layer and the sketches from call to call; updated in place. With None every
            call starts afresh.

        Returns
        -------
        output : torch.Tensor
            Like `Q`.
        selected_blocks : torch.Tensor or None
            int32, shape (batch, num_query_blocks, max_selected), or (batch, num_kv_heads, num_query_blocks, max_selected)
            with ``head_mode="per_kv_head"``: ascending, the diagonal last, -1 padding. None in a dense layer.

        Raises
        ------
        ValueError, TypeError
            For shapes, dtypes, devices or masks that do not fit; the message names the argument.
        """
        masks.check_attention_inputs(Q, K, V, self.head_dim, layer_idx, causal, state is not None)
        valid, bias = masks.interpret_mask(attention_mask, Q, K, state is not None)
        layout = make_layout(Q.shape[0], Q.shape[2], K.shape[2], Q.device, valid=valid)
        if layer_idx < self.config.skip_first_n_layers:
            return masks.dense_with_mask(Q, K, V, layout, bias, causal), None
        if not Q.numel():
            return torch.zeros_like(Q), Q.new_zeros(Q.shape[0], 0, 0, dtype=torch.int32)
        layer, walk = None, None
        if state is not None:
            layer = state.enter(layer_idx)
            if layer.tokens != K.shape[2] - Q.shape[2]:
                raise ValueError(
                    f"K holds {K.shape[2] - Q.shape[2]} tokens before Q, but state has taken in {layer.tokens} in layer "
                    f"{layer_idx}; hand in every call, and state.crop() after a cache crop"
                )
            walk = state.walk
        result = sketch_walk_attention(
            Q, K, V, self.config, state=layer, walk=walk, layout=layout, bias=bias, causal=causal
        )
        if state is not None and layer is not None:
            state.walk = result.walk
            layer.tokens = K.shape[2]
        return result.output, result.selection.indices
