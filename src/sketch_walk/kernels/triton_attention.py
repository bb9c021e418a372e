"""Stage 6 in Triton, for any GPU that Triton serves: prefill over a page table, and split-KV decode.

The contract is `reference.attend_selected`'s, forward only, causal, without bias or mean correction. Every block before
a row's last one is whole and earlier than its queries, so that only the last one (the diagonal) is masked.

Under TRITON_INTERPRET=1 both kernels run on a CPU; bfloat16 products are wrong in the interpreter (seen in Triton 3.7
and 3.9), so operands are widened there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped

LOG2_E = 1.4426950408889634
# Rows of a prefill tile: what keeps a matrix unit busy without spilling registers at head_dim 128.
TILE_ROWS = 128
# Selected blocks that one decode program reads: enough work per program, enough programs per sequence.
DECODE_BLOCKS = {32: 8, 64: 4, 128: 2}
HEAD_DIMS = range(16, 257)
BLOCK_SIZES = (16, 32, 64, 128)


@triton.jit
def _load_tile(base, position, stride, dim, rows_real, HEAD_DIM: tl.constexpr, WIDEN: tl.constexpr):
    """Rows `position` of a (tokens, dim) matrix: [rows, PADDED_DIM], zeros outside."""
    offsets = position.to(tl.int64)[:, None] * stride + dim[None, :]
    tile = tl.load(base + offsets, mask=rows_real[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _positions(index, sequence, rank, count, size, INDEXED: tl.constexpr):
    """Where tokens of rank `rank` stand: themselves, or looked up in a (batch, size) table."""
    if INDEXED:
        at = tl.load(index + sequence.to(tl.int64) * size + rank, mask=(rank >= 0) & (rank < count), other=0)
    else:
        at = rank.to(tl.int64)
    return at


@triton.jit
def _accumulate(acc, best, total, logits, values, WIDEN: tl.constexpr):
    """One step of the online softmax over logits [rows, keys] (in units of log 2) and values [keys, PADDED_DIM]."""
    now = tl.maximum(best, tl.max(logits, 1))
    shrink = tl.exp2(best - now)
    weight = tl.exp2(logits - now[:, None])
    total = total * shrink + tl.sum(weight, 1)
    acc = acc * shrink[:, None]
    if WIDEN:
        acc += tl.dot(weight, values, input_precision="ieee")
    else:
        acc += tl.dot(weight.to(values.dtype), values)
    return acc, now, total


@triton.jit
def _logits(queries, keys, scale_log2, WIDEN: tl.constexpr):
    if WIDEN:
        return tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale_log2
    return tl.dot(queries, tl.trans(keys)) * scale_log2


@triton.jit
def _prefill(
    query, key, value, output, indices, counts, past, length, query_index, key_index,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    i_batch, i_head, i_row, c_batch, c_head,
    num_rows, num_queries, num_keys, scale_log2,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PER_HEAD: tl.constexpr, INDEXED: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """One query block of TILE_HEADS heads of one group."""
    # Later rows read more blocks: they start first.
    row = num_rows - 1 - tl.program_id(0)
    tile, sequence = tl.program_id(1), tl.program_id(2)
    head = tile * TILE_HEADS
    kv_head = head // GROUP
    selection = kv_head if PER_HEAD else 0
    count = tl.load(counts + sequence * c_batch + selection * c_head + row)
    if count == 0:
        return
    seen = tl.load(past + sequence).to(tl.int32)
    end = tl.load(length + sequence).to(tl.int32)
    lane = tl.arange(0, TILE_HEADS * BLOCK)
    lane_head = head + lane // BLOCK
    rank = (seen // BLOCK + row) * BLOCK + lane % BLOCK
    real = (rank >= seen) & (rank < end)
    at = _positions(query_index, sequence, rank - seen, num_queries, num_queries, INDEXED)
    dim = tl.arange(0, PADDED_DIM)
    from_query = (
        sequence.to(tl.int64) * q_batch + lane_head.to(tl.int64)[:, None] * q_head + at.to(tl.int64)[:, None] * q_token
    )
    inside = real[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(query + from_query + dim[None, :], mask=inside, other=0.0)
    if WIDEN:
        queries = queries.to(tl.float32)
    key += sequence.to(tl.int64) * k_batch + kv_head * k_head
    value += sequence.to(tl.int64) * v_batch + kv_head * v_head
    page = indices + sequence.to(tl.int64) * i_batch + selection * i_head + row.to(tl.int64) * i_row

    acc = tl.zeros([TILE_HEADS * BLOCK, PADDED_DIM], tl.float32)
    best = tl.full([TILE_HEADS * BLOCK], -1.0e30, tl.float32)
    total = tl.zeros([TILE_HEADS * BLOCK], tl.float32)
    column = tl.arange(0, KEYS)
    for step in range((count - 1) * (BLOCK // KEYS)):
        block = tl.load(page + step // (BLOCK // KEYS))
        key_rank = block * BLOCK + (step % (BLOCK // KEYS)) * KEYS + column
        key_at = _positions(key_index, sequence, key_rank, end, num_keys, INDEXED)
        whole = key_rank < end
        keys = _load_tile(key, key_at, k_token, dim, whole, HEAD_DIM, WIDEN)
        values = _load_tile(value, key_at, v_token, dim, whole, HEAD_DIM, WIDEN)
        logits = _logits(queries, keys, scale_log2, WIDEN)
        acc, best, total = _accumulate(acc, best, total, logits, values, WIDEN)
    block = tl.load(page + count - 1)
    for part in range(BLOCK // KEYS):
        key_rank = block * BLOCK + part * KEYS + column
        key_at = _positions(key_index, sequence, key_rank, end, num_keys, INDEXED)
        keys = _load_tile(key, key_at, k_token, dim, key_rank < end, HEAD_DIM, WIDEN)
        values = _load_tile(value, key_at, v_token, dim, key_rank < end, HEAD_DIM, WIDEN)
        logits = _logits(queries, keys, scale_log2, WIDEN)
        visible = (key_rank[None, :] <= rank[:, None]) & (key_rank < end)[None, :]
        logits = tl.where(visible, logits, -1.0e30)
        acc, best, total = _accumulate(acc, best, total, logits, values, WIDEN)
    result = acc / total[:, None]
    to = sequence.to(tl.int64) * o_batch + lane_head.to(tl.int64)[:, None] * o_head + at.to(tl.int64)[:, None] * o_token
    tl.store(output + to + dim[None, :], result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _decode(
    query, key, value, partial, peaks, totals, indices, counts, length, key_index,
    q_batch, q_head, k_batch, k_head, k_token, v_batch, v_head, v_token,
    i_batch, i_head, c_batch, c_head,
    num_keys, num_splits, scale_log2,
    GROUP: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PER_HEAD: tl.constexpr, INDEXED: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """BLOCKS selected blocks of one sequence, for the heads of one group: an unnormalised partial result."""
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    selection = kv_head if PER_HEAD else 0
    count = tl.load(counts + sequence * c_batch + selection * c_head)
    end = tl.load(length + sequence).to(tl.int32)
    lane = tl.arange(0, LANES)
    real = lane < GROUP
    dim = tl.arange(0, PADDED_DIM)
    inside = real[:, None] & (dim < HEAD_DIM)[None, :]
    head = kv_head * GROUP + lane
    start = query + sequence.to(tl.int64) * q_batch
    queries = tl.load(start + head.to(tl.int64)[:, None] * q_head + dim[None, :], mask=inside, other=0.0)
    if WIDEN:
        queries = queries.to(tl.float32)
    key += sequence.to(tl.int64) * k_batch + kv_head * k_head
    value += sequence.to(tl.int64) * v_batch + kv_head * v_head
    page = indices + sequence.to(tl.int64) * i_batch + selection * i_head

    acc = tl.zeros([LANES, PADDED_DIM], tl.float32)
    best = tl.full([LANES], -1.0e30, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    column = tl.arange(0, BLOCK)
    for step in range(split * BLOCKS, tl.minimum(count, (split + 1) * BLOCKS)):
        key_rank = tl.load(page + step) * BLOCK + column
        key_at = _positions(key_index, sequence, key_rank, end, num_keys, INDEXED)
        keys = _load_tile(key, key_at, k_token, dim, key_rank < end, HEAD_DIM, WIDEN)
        values = _load_tile(value, key_at, v_token, dim, key_rank < end, HEAD_DIM, WIDEN)
        logits = tl.where((key_rank < end)[None, :], _logits(queries, keys, scale_log2, WIDEN), -1.0e30)
        acc, best, total = _accumulate(acc, best, total, logits, values, WIDEN)
    slot = (sequence.to(tl.int64) * tl.num_programs(1) * GROUP + head) * num_splits + split
    tl.store(partial + slot[:, None] * HEAD_DIM + dim[None, :], acc, mask=inside)
    tl.store(peaks + slot, best, mask=real)
    tl.store(totals + slot, total, mask=real)


def supported(query: Tensor, key: Tensor, value: Tensor, block_size: int) -> str | None:
    """None if the kernels take these tensors, else the reason why not."""
    if block_size not in BLOCK_SIZES:
        return f"block_size {block_size} is not one of {BLOCK_SIZES}"
    if query.shape[3] not in HEAD_DIMS or value.shape[3] != query.shape[3]:
        return f"head_dim must be the same for query and value and lie in 16 ... 256, got {query.shape[3]}"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {query.dtype} is none of float16, bfloat16, float32"
    if any(x.stride(3) != 1 for x in (query, key, value)):
        return "the last dimension of query, key and value must be contiguous"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "gradients are only computed by the reference kernel"
    return None


def attend_selected(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    indices: Int[Tensor, "batch selections rows max_selected"],
    counts: Int[Tensor, "batch selections rows"],
    layout: Layout,
    *,
    block_size: int,
    scale: float,
) -> Shaped[Tensor, "batch heads num_queries head_dim"]:
    """As `reference.attend_selected`, causal, forward only.

    Returns
    -------
    torch.Tensor
        Like `query`; 0 where a query is padding. No host synchronisation.
    """
    if query.shape[2] == 1:
        return _attend_one(query, key, value, indices, counts, layout, block_size, scale)
    batch, heads, num_queries, head_dim = query.shape
    group = heads // key.shape[1]
    padded = layout.query_index is not None
    memory = torch.zeros if padded else torch.empty
    output = memory(batch, num_queries, heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    tile_heads = max(h for h in range(1, group + 1) if group % h == 0 and h & (h - 1) == 0 and _fits(h, block_size))
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    # Two tiles of keys and values of 128 rows and 256 columns do not fit into the shared memory of older GPUs.
    keys = min(block_size, 64 if padded_dim <= 128 else 32)
    grid = (indices.shape[2], heads // tile_heads, batch)
    _prefill[grid](
        query, key, value, output, indices, counts, layout.past, layout.length, layout.query_index, layout.key_index,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        *indices.stride()[:3], *counts.stride()[:2],
        indices.shape[2], num_queries, key.shape[2], scale * LOG2_E,
        GROUP=group, TILE_HEADS=tile_heads, BLOCK=block_size, KEYS=keys, HEAD_DIM=head_dim, PADDED_DIM=padded_dim,
        PER_HEAD=indices.shape[1] > 1, INDEXED=padded, WIDEN=_interpreted(),
        num_warps=8 if tile_heads * block_size >= TILE_ROWS and padded_dim >= 128 else 4,
        num_stages=3 if padded_dim <= 128 else 2,
    )  # fmt: skip
    return output


def _attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    layout: Layout,
    block_size: int,
    scale: float,
) -> Tensor:
    """One query per sequence: partial results of runs of blocks, then their weighted mean."""
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    blocks = DECODE_BLOCKS.get(block_size, 8)
    splits = max(1, triton.cdiv(indices.shape[3], blocks))
    partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=query.device)
    peaks, totals = torch.empty(2, batch, heads, splits, dtype=torch.float32, device=query.device)
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    _decode[(splits, kv_heads, batch)](
        query, key, value, partial, peaks, totals, indices, counts, layout.length, layout.key_index,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], *indices.stride()[:2], *counts.stride()[:2],
        key.shape[2], splits, scale * LOG2_E,
        GROUP=group, LANES=max(16, triton.next_power_of_2(group)), BLOCK=block_size, BLOCKS=blocks,
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PER_HEAD=indices.shape[1] > 1,
        INDEXED=layout.key_index is not None, WIDEN=_interpreted(),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    weight = torch.exp2(peaks - peaks.amax(-1, keepdim=True))
    total = (totals * weight).sum(-1, keepdim=True)
    mixed = (partial * weight[..., None]).sum(2) / total.clamp(min=torch.finfo(torch.float32).tiny)
    return mixed.to(query.dtype).unsqueeze(2)


def _fits(heads: int, block_size: int) -> bool:
    return heads == 1 or heads * block_size <= TILE_ROWS


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
