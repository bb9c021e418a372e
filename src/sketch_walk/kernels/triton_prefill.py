"""Prefill in Triton: one program attends the queries of one block, for some heads of a group, to their selected blocks.

Every block before a row's last one is whole and earlier than its queries: the main loop needs no mask, and only the
tail with the diagonal block has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_walk.kernels.triton_tiles import (
    HIDDEN,
    LOG2_E,
    Device,
    accumulate,
    device_of,
    interpreted,
    load_lanes,
    load_tile,
    padded_dim,
    positions,
    product,
    register_limit,
)
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Rows and bytes of a tile of queries: what keeps a matrix unit busy without spilling registers at head_dim 128.
TILE_ROWS = 128
QUERY_TILE_BYTES = 65536
# Bytes of one tile of keys: 64 rows of 128 columns in 16 bits. Two of them, three deep, fit beside the queries.
KEY_TILE_BYTES = 16384


@dataclass(frozen=True)
class PrefillLaunch:
    """How a prefill is cut into programs; the result does not depend on it.

    Parameters
    ----------
    tile_heads, queries : int
        Query heads of one program, and queries of each: powers of two that divide the group and block_size.
    keys : int
        Keys of one step of the main loop: a divisor of block_size, or twice block_size.
    num_warps, num_stages : int
        Of the compiler.
    neighbours : int
        Tiles of heads that are neighbours in the grid; a divisor of heads // tile_heads. 1: all rows of one tile come
        first. heads // tile_heads: all heads of one row come first.
    wide : bool
        64-bit offsets inside a tile, for strides that need them.
    prefetch : bool
        Load the next step's block number one step ahead.
    descriptors : bool
        Read whole blocks through tensor descriptors: Triton 3.4, unpadded batches, head_dim a power of two, a block or
        less at a step.
    max_registers : int, optional
        Registers of a thread (NVIDIA only): fewer let more programs share a multiprocessor.
    """

    tile_heads: int
    queries: int
    keys: int
    num_warps: int
    num_stages: int
    neighbours: int = 1
    wide: bool = False
    prefetch: bool = True
    descriptors: bool = False
    max_registers: int | None = None


@lru_cache(maxsize=256)
def prefill_launch(
    heads: int, kv_heads: int, block_size: int, head_dim: int, element_size: int, device: Device
) -> PrefillLaunch:
    """The launch for these shapes on this device."""
    group, columns = heads // kv_heads, padded_dim(head_dim)
    rows = min(TILE_ROWS, QUERY_TILE_BYTES // (columns * element_size))
    queries, tile_heads = min(block_size, rows), 1
    while group % (2 * tile_heads) == 0 and 2 * tile_heads * queries <= rows:
        tile_heads *= 2
    rows = tile_heads * queries
    keys = min(block_size, 64, max(16, KEY_TILE_BYTES // (columns * element_size)))
    room = device.shared_bytes - rows * columns * element_size
    return PrefillLaunch(
        tile_heads,
        queries,
        keys,
        num_warps=8 if rows >= TILE_ROWS and columns >= 128 else 4,
        num_stages=max(1, min(3, room // (2 * keys * columns * element_size))),
        neighbours=group // tile_heads,
    )


@triton.jit
def _block_pair(page, step, last, PER_STEP: tl.constexpr):
    """Numbers of the first and the last block of a step of 1 or 2 blocks; never one beyond the row's `last`."""
    near = tl.load(page + tl.minimum(step * PER_STEP, last))
    far = tl.load(page + tl.minimum(step * PER_STEP + 1, last)) if PER_STEP == 2 else near
    return near, far


@triton.jit
def _whole_rows(base, at, start, local, stride, dim,
                HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ADJACENT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Rows that are all there: from `start` on at offsets `local` where they are adjacent, else at positions `at`."""
    if ADJACENT:
        pointers = base + start.to(tl.int64) * stride + local
    else:
        pointers = base + at.to(tl.int64)[:, None] * stride + dim[None, :]
    tile = tl.load(pointers) if HEAD_DIM == PADDED_DIM else tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit(
    do_not_specialize=["num_rows", "num_tiles", "num_queries", "num_keys", "i_batch", "i_head", "i_row", "c_batch",
                       "c_head"],
)  # fmt: skip
def _prefill(
    query, key, value, key_blocks, value_blocks, output, lse, indices, counts, past, length, query_index, key_index,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    i_batch, i_head, i_row, c_batch, c_head,
    num_rows, num_tiles, num_queries, num_keys, scale_log2,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PER_HEAD: tl.constexpr, INDEXED: tl.constexpr,
    NEIGHBOURS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr, PREFETCH: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STORE_LSE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of one block, for TILE_HEADS heads of one group."""
    SLICES: tl.constexpr = BLOCK // QUERIES
    along = tl.program_id(0) // NEIGHBOURS
    # Later rows read more blocks: they start first.
    row = num_rows - 1 - along // SLICES % num_rows
    tile = (along // (SLICES * num_rows)) * NEIGHBOURS + tl.program_id(0) % NEIGHBOURS
    sequence = tile // num_tiles
    head = (tile % num_tiles) * TILE_HEADS
    kv_head = head // GROUP
    selection = kv_head if PER_HEAD else 0
    count = tl.load(counts + sequence * c_batch + selection * c_head + row)
    if count == 0:
        return
    seen = tl.load(past + sequence).to(tl.int32)
    end = tl.load(length + sequence).to(tl.int32)
    lane = tl.arange(0, TILE_HEADS * QUERIES)
    lane_head = (head + lane // QUERIES).to(tl.int64)
    rank = (seen // BLOCK + row) * BLOCK + along % SLICES * QUERIES + lane % QUERIES
    real = (rank >= seen) & (rank < end)
    at = positions(query_index, sequence, rank - seen, num_queries, num_queries, INDEXED)
    dim = tl.arange(0, PADDED_DIM)
    from_query = sequence.to(tl.int64) * q_batch + lane_head * q_head + at * q_token
    queries = load_lanes(query, from_query, dim, real, HEAD_DIM, WIDEN)
    key += sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    value += sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    page = indices + sequence.to(tl.int64) * i_batch + selection * i_head + row.to(tl.int64) * i_row

    acc = tl.zeros([TILE_HEADS * QUERIES, PADDED_DIM], tl.float32)
    best = tl.full([TILE_HEADS * QUERIES], HIDDEN, tl.float32)
    total = tl.zeros([TILE_HEADS * QUERIES], tl.float32)
    PER_STEP: tl.constexpr = (KEYS + BLOCK - 1) // BLOCK
    PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    ADJACENT: tl.constexpr = PER_STEP == 1 and not INDEXED
    column = tl.arange(0, KEYS)
    local = column.to(tl.int64) if WIDE else column
    key_local = local[:, None] * k_token + dim[None, :]
    value_local = local[:, None] * v_token + dim[None, :]
    steps = ((count - 1) // PER_STEP) * PARTS
    if PREFETCH:
        near, far = _block_pair(page, 0, count - 1, PER_STEP)
    for step in tl.range(0, steps, num_stages=STAGES):
        if not PREFETCH:
            near, far = _block_pair(page, step // PARTS, count - 1, PER_STEP)
        start = near * BLOCK + (step % PARTS) * KEYS
        key_at = start + column
        if PER_STEP == 2:
            key_at = tl.where(column < BLOCK, key_at, (far - 1) * BLOCK + column)
        if INDEXED:
            key_at = tl.load(key_index + sequence.to(tl.int64) * num_keys + key_at)
        if PREFETCH:
            near, far = _block_pair(page, (step + 1) // PARTS, count - 1, PER_STEP)
        if DESCRIPTORS:
            keys = key_blocks.load([sequence, kv_head, start, 0]).reshape(KEYS, PADDED_DIM)
            values = value_blocks.load([sequence, kv_head, start, 0]).reshape(KEYS, PADDED_DIM)
            if WIDEN:
                keys, values = keys.to(tl.float32), values.to(tl.float32)
        else:
            keys = _whole_rows(key, key_at, start, key_local, k_token, dim, HEAD_DIM, PADDED_DIM, ADJACENT, WIDEN)
            values = _whole_rows(value, key_at, start, value_local, v_token, dim, HEAD_DIM, PADDED_DIM, ADJACENT, WIDEN)
        raw = product(queries, tl.trans(keys), WIDEN)
        acc, best, total = accumulate(acc, best, total, raw, values, scale_log2, WIDEN)

    # The diagonal block, and before it the whole one that a step of two blocks leaves over.
    TAIL: tl.constexpr = KEYS if PARTS > 1 else BLOCK
    behind = tl.arange(0, TAIL)
    for step in tl.range(steps * KEYS // TAIL, count * (BLOCK // TAIL), num_stages=1):
        key_rank = tl.load(page + step // (BLOCK // TAIL)) * BLOCK + (step % (BLOCK // TAIL)) * TAIL + behind
        key_at = positions(key_index, sequence, key_rank, end, num_keys, INDEXED)
        keys = load_tile(key, key_at, k_token, dim, key_rank < end, HEAD_DIM, WIDEN)
        values = load_tile(value, key_at, v_token, dim, key_rank < end, HEAD_DIM, WIDEN)
        logits = product(queries, tl.trans(keys), WIDEN) * scale_log2
        visible = (key_rank[None, :] <= rank[:, None]) & (key_rank < end)[None, :]
        acc, best, total = accumulate(acc, best, total, tl.where(visible, logits, HIDDEN), values, 1.0, WIDEN)
    result = (acc / total[:, None]).to(output.dtype.element_ty)
    to = sequence.to(tl.int64) * o_batch + lane_head * o_head + at * o_token
    tl.store(output + to[:, None] + dim[None, :], result, mask=real[:, None] & (dim < HEAD_DIM)[None, :])
    if STORE_LSE:
        slot = (sequence * num_tiles * TILE_HEADS + lane_head) * num_queries + at
        tl.store(lse + slot, best + tl.log2(total), mask=real)


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Int[Tensor, "batch selections rows max_selected"],
    counts: Int[Tensor, "batch selections rows"],
    layout: Layout,
    block_size: int,
    scale: float,
    *,
    lse: Float[Tensor, "batch heads num_queries"] | None = None,
    launch: PrefillLaunch | None = None,
) -> Tensor:
    """As `triton_attention.attend_selected`, for any number of queries.

    Parameters
    ----------
    lse : torch.Tensor, optional
        float32, filled with the logarithm to base 2 of each real query's softmax denominator.
    launch : PrefillLaunch, optional
        Default: `prefill_launch`.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads = key.shape[1]
    launch = launch or prefill_launch(
        heads, kv_heads, block_size, head_dim, query.element_size(), device_of(query.device)
    )
    indexed = layout.query_index is not None
    memory = torch.zeros if indexed else torch.empty
    output = memory(batch, num_queries, heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    key_blocks, value_blocks = (_blocks(x, launch.keys) if launch.descriptors else None for x in (key, value))
    num_rows, num_tiles = indices.shape[2], heads // launch.tile_heads
    limit = register_limit(launch.max_registers)
    wide = launch.wide or launch.keys * max(key.stride(2), value.stride(2)) >= 2**31
    _prefill[(num_rows * (block_size // launch.queries) * num_tiles * batch,)](
        query, key, value, key_blocks, value_blocks, output, lse, indices, counts,
        layout.past, layout.length, layout.query_index, layout.key_index,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        *indices.stride()[:3], *counts.stride()[:2],
        num_rows, num_tiles, num_queries, key.shape[2], scale * LOG2_E,
        GROUP=heads // kv_heads, TILE_HEADS=launch.tile_heads, QUERIES=launch.queries, BLOCK=block_size,
        KEYS=launch.keys, HEAD_DIM=head_dim, PADDED_DIM=padded_dim(head_dim), PER_HEAD=indices.shape[1] > 1,
        INDEXED=indexed,
        NEIGHBOURS=launch.neighbours, STAGES=launch.num_stages, WIDE=wide, PREFETCH=launch.prefetch,
        DESCRIPTORS=launch.descriptors, STORE_LSE=lse is not None, WIDEN=interpreted(),
        num_warps=launch.num_warps, num_stages=launch.num_stages, **limit,
    )  # fmt: skip
    return output


def _blocks(x: Tensor, keys: int) -> object:
    """A tensor descriptor of tiles of `keys` adjacent tokens of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, keys, padded_dim(x.shape[3])])
