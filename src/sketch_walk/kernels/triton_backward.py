"""Gradients of the Triton prefill for query, key and value, in the order of no race: two runs give the same bits.

Softmax weights are made again from the stored log-sum-exp. A query block adds up its own gradient over its selected
blocks; a key block does so over the query blocks that selected it, found by inverting the page table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sketch_walk.kernels.triton_prefill import prefill
from sketch_walk.kernels.triton_tiles import (
    LOG2_E,
    interpreted,
    load_lanes,
    load_tile,
    padded_dim,
    positions,
    product,
    product_added,
)
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Int

# Rows and bytes of a tile: four tiles of queries or keys and two of weights are live at once.
TILE_ROWS = 64
TILE_BYTES = 16384


@triton.jit(
    do_not_specialize=["num_rows", "num_queries", "num_keys", "i_batch", "i_head", "i_row", "c_batch", "c_head"],
)
def _query_gradient(
    query, key, value, output, grad, lse, delta, query_grad, indices, counts, past, length, query_index, key_index,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    i_batch, i_head, i_row, c_batch, c_head,
    num_rows, num_queries, num_keys, scale, scale_log2,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PER_HEAD: tl.constexpr, INDEXED: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradient of QUERIES queries of TILE_HEADS heads of one group, and their delta = sum(grad * output)."""
    row = num_rows - 1 - tl.program_id(0) // (BLOCK // QUERIES)
    part = tl.program_id(0) % (BLOCK // QUERIES)
    tile, sequence = tl.program_id(1), tl.program_id(2)
    head = tile * TILE_HEADS
    kv_head = head // GROUP
    selection = kv_head if PER_HEAD else 0
    count = tl.load(counts + sequence * c_batch + selection * c_head + row)
    if count == 0:
        return
    seen = tl.load(past + sequence).to(tl.int32)
    end = tl.load(length + sequence).to(tl.int32)
    lane = tl.arange(0, TILE_HEADS * QUERIES)
    lane_head = (head + lane // QUERIES).to(tl.int64)
    rank = (seen // BLOCK + row) * BLOCK + part * QUERIES + lane % QUERIES
    real = (rank >= seen) & (rank < end)
    at = positions(query_index, sequence, rank - seen, num_queries, num_queries, INDEXED)
    dim = tl.arange(0, PADDED_DIM)
    from_query = sequence.to(tl.int64) * q_batch + lane_head * q_head + at * q_token
    from_output = sequence.to(tl.int64) * o_batch + lane_head * o_head + at * o_token
    slot = (sequence * tl.num_programs(1) * TILE_HEADS + lane_head) * num_queries + at
    queries = load_lanes(query, from_query, dim, real, HEAD_DIM, WIDEN)
    grads = load_lanes(grad, from_output, dim, real, HEAD_DIM, WIDEN)
    outputs = load_lanes(output, from_output, dim, real, HEAD_DIM, WIDEN)
    row_delta = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(delta + slot, row_delta, mask=real)
    denominator = tl.load(lse + slot, mask=real, other=float("inf"))
    key += sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    value += sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    page = indices + sequence.to(tl.int64) * i_batch + selection * i_head + row.to(tl.int64) * i_row

    acc = tl.zeros([TILE_HEADS * QUERIES, PADDED_DIM], tl.float32)
    column = tl.arange(0, KEYS)
    for step in range(count * (BLOCK // KEYS)):
        key_rank = tl.load(page + step // (BLOCK // KEYS)) * BLOCK + (step % (BLOCK // KEYS)) * KEYS + column
        key_at = positions(key_index, sequence, key_rank, end, num_keys, INDEXED)
        keys = load_tile(key, key_at, k_token, dim, key_rank < end, HEAD_DIM, WIDEN)
        values = load_tile(value, key_at, v_token, dim, key_rank < end, HEAD_DIM, WIDEN)
        logits = product(queries, tl.trans(keys), WIDEN) * scale_log2
        visible = key_rank[None, :] <= rank[:, None]
        weight = tl.where(visible, tl.exp2(logits - denominator[:, None]), 0.0)
        weight_grad = product(grads, tl.trans(values), WIDEN)
        acc = product_added(weight * (weight_grad - row_delta[:, None]), keys, acc, WIDEN)
    result = (acc * scale).to(query_grad.dtype.element_ty)
    inside = real[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(query_grad + from_output[:, None] + dim[None, :], result, mask=inside)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_blocks", "num_entries"])
def _key_gradient(
    query, key, value, grad, lse, delta, key_grad, value_grad, rows, starts, past, length, query_index, key_index,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    num_queries, num_keys, num_blocks, num_entries, scale, scale_log2,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PER_HEAD: tl.constexpr, INDEXED: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradients of KEYS keys and values of one head, over all queries of the group that read them."""
    # Earlier blocks are read by more rows: they start first.
    block = tl.program_id(0) // (BLOCK // KEYS)
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    lists = sequence.to(tl.int64)
    if PER_HEAD:
        lists = lists * tl.num_programs(1) + kv_head
    start = tl.load(starts + lists * (num_blocks + 1) + block)
    stop = tl.load(starts + lists * (num_blocks + 1) + block + 1)
    if start == stop:
        return
    rows += lists * num_entries
    seen = tl.load(past + sequence).to(tl.int32)
    end = tl.load(length + sequence).to(tl.int32)
    dim = tl.arange(0, PADDED_DIM)
    key_rank = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    key_real = key_rank < end
    key_at = positions(key_index, sequence, key_rank, end, num_keys, INDEXED)
    key += sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    value += sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    keys = load_tile(key, key_at, k_token, dim, key_real, HEAD_DIM, WIDEN)
    values = load_tile(value, key_at, v_token, dim, key_real, HEAD_DIM, WIDEN)

    key_acc = tl.zeros([KEYS, PADDED_DIM], tl.float32)
    value_acc = tl.zeros([KEYS, PADDED_DIM], tl.float32)
    lane = tl.arange(0, QUERIES)
    TILES: tl.constexpr = GROUP * (BLOCK // QUERIES)
    for step in range(start * TILES, stop * TILES):
        row = tl.load(rows + step // TILES)
        head = kv_head.to(tl.int64) * GROUP + (step % TILES) // (BLOCK // QUERIES)
        rank = (seen // BLOCK + row) * BLOCK + (step % (BLOCK // QUERIES)) * QUERIES + lane
        real = (rank >= seen) & (rank < end)
        at = positions(query_index, sequence, rank - seen, num_queries, num_queries, INDEXED)
        from_query = sequence.to(tl.int64) * q_batch + head * q_head + at * q_token
        from_output = sequence.to(tl.int64) * o_batch + head * o_head + at * o_token
        slot = (sequence * tl.num_programs(1) * GROUP + head) * num_queries + at
        queries = load_lanes(query, from_query, dim, real, HEAD_DIM, WIDEN)
        grads = load_lanes(grad, from_output, dim, real, HEAD_DIM, WIDEN)
        denominator = tl.load(lse + slot, mask=real, other=float("inf"))
        row_delta = tl.load(delta + slot, mask=real, other=0.0)
        logits = product(keys, tl.trans(queries), WIDEN) * scale_log2
        visible = key_rank[:, None] <= rank[None, :]
        weight = tl.where(visible, tl.exp2(logits - denominator[None, :]), 0.0)
        value_acc = product_added(weight, grads, value_acc, WIDEN)
        weight_grad = product(values, tl.trans(grads), WIDEN)
        key_acc = product_added(weight * (weight_grad - row_delta[None, :]), queries, key_acc, WIDEN)
    to = (sequence.to(tl.int64) * tl.num_programs(1) + kv_head) * num_keys + key_at
    offsets = to[:, None] * HEAD_DIM + dim[None, :]
    inside = key_real[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(key_grad + offsets, (key_acc * scale).to(key_grad.dtype.element_ty), mask=inside)
    tl.store(value_grad + offsets, value_acc.to(value_grad.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class BackwardLaunch:
    """How the backward pass is cut into programs: heads of a query tile, keys and queries of one head of a tile."""

    tile_heads: int
    tile: int
    num_warps: int
    num_stages: int


def backward_launch(heads: int, kv_heads: int, block_size: int, head_dim: int, element_size: int) -> BackwardLaunch:
    """The launch for these shapes."""
    group, columns = heads // kv_heads, padded_dim(head_dim)
    rows = min(TILE_ROWS, max(16, TILE_BYTES // (columns * element_size)))
    tile = min(block_size, rows)
    tile_heads = 1
    while group % (2 * tile_heads) == 0 and 2 * tile_heads * tile <= rows:
        tile_heads *= 2
    return BackwardLaunch(tile_heads, tile, num_warps=8 if columns >= 128 else 4, num_stages=1)


class SelectedAttention(torch.autograd.Function):
    """`triton_prefill.prefill` with gradients for query, key and value; the selection has none."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        indices: Tensor,
        counts: Tensor,
        layout: Layout,
        block_size: int,
        scale: float,
    ) -> Tensor:
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        output = prefill(query, key, value, indices, counts, layout, block_size, scale, lse=lse)
        ctx.save_for_backward(query, key, value, output, lse, indices, counts)
        ctx.layout, ctx.block_size, ctx.scale = layout, block_size, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The strides of the output: batch, token, head, dim.
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        gradients = _gradients(ctx.saved_tensors, grad, ctx.layout, ctx.block_size, ctx.scale)
        return (*gradients, None, None, None, None, None)


def rows_that_read(
    indices: Int[Tensor, "batch selections rows max_selected"],
    counts: Int[Tensor, "batch selections rows"],
    num_blocks: int,
) -> tuple[Int[Tensor, "batch selections entries"], Int[Tensor, "batch selections starts"]]:
    """The page table inverted: rows sorted by the block they read, and where each block's run of rows starts.

    Returns
    -------
    rows : torch.Tensor
        int32: ``rows[..., starts[..., b] : starts[..., b + 1]]`` are the rows that selected block b, ascending.
    starts : torch.Tensor
        int32, `num_blocks` + 1 of them.
    """
    width = indices.shape[3]
    real = torch.arange(width, device=indices.device) < counts[..., None]
    block, order = torch.where(real, indices, num_blocks).flatten(2).sort(dim=-1, stable=True)
    wanted = torch.arange(num_blocks + 1, dtype=block.dtype, device=block.device)
    starts = torch.searchsorted(block, wanted.expand(*block.shape[:2], -1).contiguous(), out_int32=True)
    return (order // width).to(torch.int32), starts


def _gradients(
    saved: tuple[Tensor, ...], grad: Tensor, layout: Layout, block_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, output, lse, indices, counts = saved
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    launch = backward_launch(heads, kv_heads, block_size, head_dim, query.element_size())
    query_grad = torch.zeros_like(output)
    key_grad, value_grad = torch.zeros(2, *key.shape, dtype=key.dtype, device=key.device)
    delta = torch.empty_like(lse)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3])
    options = {
        "GROUP": heads // kv_heads, "BLOCK": block_size, "KEYS": launch.tile, "QUERIES": launch.tile,
        "HEAD_DIM": head_dim, "PADDED_DIM": padded_dim(head_dim),
        "PER_HEAD": indices.shape[1] > 1, "INDEXED": layout.query_index is not None, "WIDEN": interpreted(),
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip
    _query_gradient[(indices.shape[2] * (block_size // launch.tile), heads // launch.tile_heads, batch)](
        query, key, value, output, grad, lse, delta, query_grad, indices, counts,
        layout.past, layout.length, layout.query_index, layout.key_index,
        *strides, *indices.stride()[:3], *counts.stride()[:2],
        indices.shape[2], num_queries, num_keys, scale, scale * LOG2_E,
        TILE_HEADS=launch.tile_heads, **options,
    )  # fmt: skip
    num_blocks = triton.cdiv(num_keys, block_size)
    rows, starts = rows_that_read(indices, counts, num_blocks)
    _key_gradient[(num_blocks * (block_size // launch.tile), kv_heads, batch)](
        query, key, value, grad, lse, delta, key_grad, value_grad, rows, starts,
        layout.past, layout.length, layout.query_index, layout.key_index,
        *strides, num_queries, num_keys, num_blocks, rows.shape[2], scale, scale * LOG2_E,
        **options,
    )  # fmt: skip
    return query_grad, key_grad, value_grad
