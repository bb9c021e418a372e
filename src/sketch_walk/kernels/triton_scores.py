"""Stage 3 in Triton: block scores of sketched queries, without ever writing the matrix of sub-scores.

One program takes one query block and some heads of one group. It walks the sub-keys twice: once for the softmax's
normaliser, once for each key block's share, reduced over the program's sub-queries and heads. Equal to
`sketch_walk.sketch.block_scores` but for the rounding of the queries to float16 (int8 codes are exact in it).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

LOG2_E = 1.4426950408889634
# Sub-queries (times heads) of one program, and sub-keys per step.
TILE_ROWS = 128
TILE_KEYS = 128


@triton.jit
def _tile_logits(
    queries, codes, scales, column, count, c_token, s_token, dim,
    WIDTH: tl.constexpr, QUANTISED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Logits [rows, keys], in units of log 2, of a tile of sub-keys."""
    inside = column < count
    offsets = column.to(tl.int64)[:, None] * c_token + dim[None, :]
    keys = tl.load(codes + offsets, mask=inside[:, None] & (dim < WIDTH)[None, :], other=0)
    if WIDEN:
        logits = tl.dot(queries, tl.trans(keys.to(tl.float32)), input_precision="ieee")
    else:
        logits = tl.dot(queries, tl.trans(keys.to(tl.float16)))
    if QUANTISED:
        logits = logits * tl.load(scales + column.to(tl.int64) * s_token, mask=inside, other=0.0)[None, :]
    return logits


@triton.jit
def _scores(
    queries, last_rank, codes, scales, length, output,
    q_batch, q_row, q_head, q_sub, l_batch, l_row, c_batch, c_head, c_token, s_batch, s_head, s_token,
    o_batch, o_tile, o_row,
    num_rows, num_blocks,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, SUBS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PER_BLOCK: tl.constexpr, KEY_SUB: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    MEAN: tl.constexpr, QUANTISED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One query block of TILE_HEADS heads: its row of `output` for that tile of heads."""
    row = num_rows - 1 - tl.program_id(0)
    tile, sequence = tl.program_id(1), tl.program_id(2)
    head = tile * TILE_HEADS
    end = tl.load(length + sequence).to(tl.int32)
    lane = tl.arange(0, ROWS)
    used = lane < TILE_HEADS * SUBS
    sub = lane % SUBS
    last = tl.load(last_rank + sequence.to(tl.int64) * l_batch + row * l_row + sub, mask=used, other=-1).to(tl.int32)
    real = last >= 0
    reach = tl.max(last, 0)
    if reach < 0:
        return
    dim = tl.arange(0, PADDED)
    start = queries + sequence.to(tl.int64) * q_batch + row.to(tl.int64) * q_row
    offsets = (head + lane // SUBS).to(tl.int64)[:, None] * q_head + sub[:, None] * q_sub + dim[None, :]
    tile_queries = tl.load(start + offsets, mask=used[:, None] & (dim < WIDTH)[None, :], other=0.0)
    if WIDEN:
        tile_queries = tile_queries.to(tl.float32)
    codes += sequence.to(tl.int64) * c_batch + (head // GROUP) * c_head
    if QUANTISED:
        scales += sequence.to(tl.int64) * s_batch + (head // GROUP) * s_head

    # Sub-keys that this row may see, and how many whole tiles every one of its sub-queries sees in full.
    count = tl.minimum(reach, end - 1) // KEY_SUB + 1
    clear = (reach // (PER_BLOCK * KEY_SUB)) * PER_BLOCK // KEYS
    column = tl.arange(0, KEYS)
    best = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for step in range(clear):
        at = step * KEYS + column
        logits = _tile_logits(tile_queries, codes, scales, at, count, c_token, s_token, dim, WIDTH, QUANTISED, WIDEN)
        now = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp2(best - now) + tl.sum(tl.exp2(logits - now[:, None]), 1)
        best = now
    for step in range(clear, tl.cdiv(count, KEYS)):
        at = step * KEYS + column
        logits = _tile_logits(tile_queries, codes, scales, at, count, c_token, s_token, dim, WIDTH, QUANTISED, WIDEN)
        visible = (at * KEY_SUB)[None, :] <= last[:, None]
        logits = tl.where(visible & (at < count)[None, :], logits, -1.0e30)
        now = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp2(best - now) + tl.sum(tl.exp2(logits - now[:, None]), 1)
        best = now
    normaliser = tl.where(real, best + tl.log2(total), 1.0e30)

    block = tl.arange(0, KEYS // PER_BLOCK)
    output += sequence.to(tl.int64) * o_batch + tile.to(tl.int64) * o_tile + row.to(tl.int64) * o_row
    weight = 1.0
    if MEAN:
        weight = 1.0 / tl.sum(real.to(tl.float32), 0)
    for step in range(tl.cdiv(count, KEYS)):
        at = step * KEYS + column
        logits = _tile_logits(tile_queries, codes, scales, at, count, c_token, s_token, dim, WIDTH, QUANTISED, WIDEN)
        share = tl.exp2(logits - normaliser[:, None])
        if step >= clear:
            visible = ((at * KEY_SUB)[None, :] <= last[:, None]) & (at < count)[None, :]
            share = tl.where(visible, share, 0.0)
        by_block = tl.sum(tl.reshape(share, [ROWS, KEYS // PER_BLOCK, PER_BLOCK]), 2)
        score = tl.sum(by_block, 0) * weight if MEAN else tl.max(by_block, 0)
        to = step * (KEYS // PER_BLOCK) + block
        tl.store(output + to, score, mask=to < num_blocks)


def supported(width: int, subs: int, per_block: int) -> str | None:
    """None if the kernel takes sketches of this shape, else the reason why not."""
    if not 16 <= width <= 256:
        return f"sketched queries must have 16 to 256 coordinates, got {width}"
    if per_block & (per_block - 1) or per_block > TILE_KEYS:
        return f"a block must hold a power of two of sub-keys, at most {TILE_KEYS}, got {per_block}"
    if subs & (subs - 1) or subs > TILE_ROWS:
        return f"a block must hold a power of two of sub-queries, at most {TILE_ROWS}, got {subs}"
    return None


def block_scores(
    queries: Float[Tensor, "batch rows heads sub_queries width"],
    last_rank: Int[Tensor, "batch rows sub_queries"],
    codes: Shaped[Tensor, "batch kv_heads sub_keys width"],
    scales: Float[Tensor, "batch kv_heads sub_keys 1"] | None,
    length: Int[Tensor, " batch"],
    *,
    scale: float,
    per_block: int,
    key_sub_block: int,
    reduce: str,
    per_kv_head: bool,
) -> Float[Tensor, "batch selections rows blocks"]:
    """As `sketch_walk.sketch.block_scores`, causal, from key sketches as they are stored. No host synchronisation."""
    batch, rows, heads, subs, width = queries.shape
    kv_heads, sub_keys = codes.shape[1], codes.shape[2]
    group, blocks = heads // kv_heads, sub_keys // per_block
    tile_heads = max(h for h in range(1, group + 1) if group % h == 0 and (h == 1 or h * subs <= TILE_ROWS))
    tiles = heads // tile_heads
    narrow = (queries * (scale * LOG2_E)).to(torch.float16)
    output = torch.zeros(batch, tiles, rows, blocks, dtype=torch.float32, device=queries.device)
    strides = (0, 0, 0) if scales is None else scales.stride()[:3]
    _scores[(rows, tiles, batch)](
        narrow, last_rank, codes, scales, length, output,
        *narrow.stride()[:4], *last_rank.stride()[:2], *codes.stride()[:3], *strides, *output.stride()[:3],
        rows, blocks,
        GROUP=group, TILE_HEADS=tile_heads, SUBS=subs, ROWS=max(16, triton.next_power_of_2(tile_heads * subs)),
        KEYS=max(TILE_KEYS if width <= 128 else TILE_KEYS // 2, per_block), PER_BLOCK=per_block,
        KEY_SUB=key_sub_block, WIDTH=width, PADDED=max(16, triton.next_power_of_2(width)),
        MEAN=reduce == "mean", QUANTISED=scales is not None, WIDEN=os.environ.get("TRITON_INTERPRET") == "1",
        num_warps=4, num_stages=3 if width <= 128 else 2,
    )  # fmt: skip
    split = output.unflatten(1, (kv_heads, -1)) if per_kv_head else output.unsqueeze(1)
    return split.amax(2) if reduce == "max" else split.mean(2)
