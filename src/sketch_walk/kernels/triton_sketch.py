"""Stages 1 and 2 in Triton: sub-blocks pooled, rotated, rounded to 8 bits, in one kernel for queries and one for keys.

Equal to `sketch_walk.sketch` (`sketch_tokens`, `quantise_keys`, `keep_salient`, `quantise_queries`) but for the
rounding of the pooled vectors to the rotation's dtype, which may move a code by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_walk.kernels.triton_tiles import (
    HIDDEN,
    LOG2_E,
    device_of,
    next_power_of_2,
    overlaps,
    padded_dim,
    register_limit,
    release_next,
)
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


class SketchLaunch(NamedTuple):
    """How a kernel runs.

    Parameters
    ----------
    lanes : int
        Pooled vectors of one program, which are rows of its product with the rotation; at least those of a block.
    num_warps : int
        Of a program of so many lanes; one of more has as many more, up to `MOST_WARPS`.
    unroll : int
        Tokens of every pooled run that are read at once.
    tiles : int
        Times that a program of a long prompt does this, with the matrix that it has.
    max_registers : int, optional
        Of a thread, where the compiler takes a limit (NVIDIA).
    """

    lanes: int
    num_warps: int
    unroll: int
    tiles: int = 1
    max_registers: int | None = None


# Without the limit fewer programs run: 0.77 ms for the queries of 131,072 tokens on an H100 instead of 0.71.
LAUNCH = SketchLaunch(16, 2, 4, tiles=8, max_registers=168)
# A decode step has one block, and a program for it: more warps, and all tokens of a run at once.
STEP_LAUNCH = SketchLaunch(16, 4, 8)
MOST_WARPS = 8
# Programs per multiprocessor that a prompt leaves before its programs take several tiles.
LEAST_PROGRAMS = 16


class PackedQueries(NamedTuple):
    """Sub-queries that take part in the scores, as the score kernels multiply them.

    Parameters
    ----------
    codes : torch.Tensor
        int8, shape (batch, rows, heads, kept, width), width padded with zeros to a power of two.
    scales : torch.Tensor
        float32, shape (batch, rows, heads, kept).
    last_rank : torch.Tensor
        int32, shape (batch, rows, heads, kept): rank of the last token of each, -1 for none.
    """

    codes: Tensor
    scales: Tensor
    last_rank: Tensor


class StepQueries(NamedTuple):
    """Codes and scales of a decode step's queries, as `PackedQueries` has them; a step sees everything."""

    codes: Tensor
    scales: Tensor


@triton.jit
def _tokens(
    base, index, sequence, rank, first_slot, end, token_stride, num_index, dim, inside,
    HEAD_DIM: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Tokens of these ranks in float32, 0 where there is none, and which are real.

    The token of rank r stands in slot r - first_slot; slots below 0 and ranks from `end` on are not real.
    """
    slot = rank - first_slot
    real = (slot >= 0) & (rank < end) & inside
    at = slot.to(tl.int64)
    if INDEXED:
        at = tl.load(index + sequence.to(tl.int64) * num_index + slot, mask=real, other=0).to(tl.int64)
    tokens = tl.load(
        base + at[:, None] * token_stride + dim[None, :],
        mask=real[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    return tokens.to(tl.float32), real


@triton.jit
def _block_sums(lanes, TILE: tl.constexpr, RUNS: tl.constexpr, LONE: tl.constexpr):
    """Sums [TILE] or [TILE, columns] over the RUNS lanes of each block of `lanes`, whose first axis is TILE * RUNS.

    LONE: of the only block, without the first axis. What is not reshaped keeps its layout, and a program that runs
    alone has nothing else to do while a layout changes.
    """
    if LONE:
        sums = tl.sum(lanes, 0)
    elif len(lanes.shape) == 1:
        sums = tl.sum(tl.reshape(lanes, [TILE, RUNS]), 1)
    else:
        sums = tl.sum(tl.reshape(lanes, [TILE, RUNS, lanes.shape[1]]), 1)
    return sums


@triton.jit
def _of_lanes(blocks, TILE: tl.constexpr, RUNS: tl.constexpr, LONE: tl.constexpr):
    """What is known of each block [TILE], for each of its lanes."""
    if not LONE:
        blocks = tl.reshape(tl.broadcast_to(blocks[:, None], [TILE, RUNS]), [TILE * RUNS])
    return blocks


@triton.jit
def _row_of_lanes(rows, TILE: tl.constexpr, RUNS: tl.constexpr, LONE: tl.constexpr):
    """A row for each block [TILE, columns], for each of its lanes."""
    if LONE:
        rows = rows[None, :]
    else:
        COLUMNS: tl.constexpr = rows.shape[1]
        rows = tl.reshape(tl.broadcast_to(rows[:, None, :], [TILE, RUNS, COLUMNS]), [TILE * RUNS, COLUMNS])
    return rows


@triton.jit
def _column(x):
    """Numbers of blocks or lanes, to go with rows; a scalar does as it is."""
    return x[:, None] if len(x.shape) else x


@triton.jit
def _row(x, LONE: tl.constexpr):
    """Numbers of columns, to go with the rows of blocks."""
    return x if LONE else x[None, :]


@triton.jit
def _block_numbers(first, TILE: tl.constexpr, LONE: tl.constexpr):
    """Numbers of a tile's blocks; a scalar of a lone one."""
    if not LONE:
        first += tl.arange(0, TILE)
    return first


@triton.jit
def _runs(first, last, SUB: tl.constexpr):
    """Runs of SUB tokens that tokens `first` to `last`, excluded, of a block lie in, 1 at least."""
    return tl.maximum((last + SUB - 1) // SUB - first // SUB, 1).to(tl.float32)


@triton.jit
def _distance(tokens, real, centre):
    """Squares of the distances of tokens from their block's mean, 0 for what is none."""
    apart = tokens - centre
    return tl.where(real, tl.sum(apart * apart, 1), 0.0)


@triton.jit
def _pooled(
    base, index, sequence, start, first_slot, end, token_stride, num_index, dim, salience, contrast,
    TILE: tl.constexpr, RUNS: tl.constexpr, PER_BLOCK: tl.constexpr, SUB: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, INDEXED: tl.constexpr, UNROLL: tl.constexpr, LONE: tl.constexpr,
):  # fmt: skip
    """Runs of SUB tokens as one vector each [TILE * RUNS, PADDED_DIM], and which of them hold a real token.

    The tile's first block begins at rank `start`; every block has PER_BLOCK runs, of RUNS lanes. Tokens are asked for
    as often as the block's mean, their distances from it and the weights that these give (`salience` in units of log 2)
    are found one after the other. With all tokens of a run in flight at once (UNROLL) no loop is left, and they are
    read once; longer runs are read twice, with the mean distance from sums of squares and weights over the best so far.
    """
    BLOCK: tl.constexpr = PER_BLOCK * SUB
    ONCE: tl.constexpr = UNROLL >= SUB
    lane = tl.arange(0, TILE * RUNS)
    inside = lane % RUNS < PER_BLOCK
    rank = start + (lane // RUNS) * BLOCK + (lane % RUNS) * SUB
    filled = (tl.minimum(rank + SUB, end) > tl.maximum(rank, first_slot)) & inside
    total = tl.zeros([TILE * RUNS, PADDED_DIM], tl.float32)
    distances = tl.zeros([TILE * RUNS], tl.float32)
    for step in tl.range(0, SUB, loop_unroll_factor=UNROLL):
        tokens, _ = _tokens(
            base, index, sequence, rank + step, first_slot, end, token_stride, num_index, dim, inside, HEAD_DIM, INDEXED
        )
        total += tokens
        if not ONCE:
            distances += tl.sum(tokens * tokens, 1)
    if SUB == 1:
        return total, filled
    block_start = _block_numbers(start // BLOCK, TILE, TILE == 1) * BLOCK
    count = tl.minimum(block_start + BLOCK, end) - tl.maximum(block_start, first_slot)
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    mean = _block_sums(total, TILE, RUNS, LONE) * _column(share)
    centre = _row_of_lanes(mean, TILE, RUNS, LONE)
    top = tl.full([TILE * RUNS], 0.0 if ONCE else HIDDEN, tl.float32)
    if ONCE:
        for step in tl.range(0, SUB, loop_unroll_factor=UNROLL):
            tokens, real = _tokens(
                base, index, sequence, rank + step, first_slot, end, token_stride, num_index, dim, inside, HEAD_DIM,
                INDEXED,
            )  # fmt: skip
            distance = _distance(tokens, real, centre)
            top = tl.maximum(top, distance)
            distances += distance
    spread = _block_sums(distances, TILE, RUNS, LONE) * share
    if not ONCE:
        # A difference of near equals: below a millionth of the square it is rounding, and so is what it weighs.
        spread = tl.maximum(spread - tl.sum(mean * mean, 0 if LONE else 1), spread * 1e-6)
    unit = _of_lanes(salience / tl.maximum(spread, 1.0e-30), TILE, RUNS, LONE)
    if ONCE:
        top *= unit
    weights = tl.zeros([TILE * RUNS], tl.float32)
    mixed = tl.zeros([TILE * RUNS, PADDED_DIM], tl.float32)
    for step in tl.range(0, SUB, loop_unroll_factor=UNROLL):
        tokens, real = _tokens(
            base, index, sequence, rank + step, first_slot, end, token_stride, num_index, dim, inside, HEAD_DIM, INDEXED
        )
        excess = _distance(tokens, real, centre) * unit
        if not ONCE:
            excess = tl.where(real, excess, HIDDEN)
            now = tl.maximum(top, excess)
            shrink = tl.exp2(top - now)
            weights *= shrink
            mixed *= shrink[:, None]
            top = now
        weight = tl.where(real, tl.exp2(excess - top), 0.0)
        weights += weight
        mixed += weight[:, None] * tokens
    share_of_mixed = contrast / tl.maximum(weights, 1.1754944e-38)
    pooled = mixed * share_of_mixed[:, None] + (1.0 - contrast) * centre
    return tl.where(filled[:, None], pooled, 0.0), filled


@triton.jit
def _matrix(matrix, dim, column, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Columns `column` of the sketch matrix [HEAD_DIM, WIDTH], zeros outside."""
    return tl.load(
        matrix + dim[:, None] * WIDTH + column[None, :],
        mask=(dim < HEAD_DIM)[:, None] & (column < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _coordinates(QUARTER: tl.constexpr, PADDED_QUARTER: tl.constexpr):
    """Quarters of the coordinates side by side, each padded to a power of two with one that is none."""
    column = tl.arange(0, 4 * PADDED_QUARTER)
    if PADDED_QUARTER > QUARTER:
        within = column % PADDED_QUARTER
        column = tl.where(within < QUARTER, column // PADDED_QUARTER * QUARTER + within, 4 * QUARTER)
    return column


@triton.jit
def _rotate(pooled, part):
    """pooled [rows, PADDED_DIM] times columns of the sketch matrix."""
    if part.dtype == tl.float32:
        return tl.dot(pooled, part, input_precision="ieee")
    return tl.dot(pooled.to(part.dtype), part)


@triton.jit
def _nearest(x):
    """Nearest whole numbers, of halves the even one, as int32; |x| is below 2^22.

    Added to 1.5 * 2^23 a number is rounded to a whole one, which is what the bits say beyond those of that sum's 0.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _code(values, steps):
    """Whole numbers -128 ... 127."""
    return tl.minimum(tl.maximum(_nearest(values * steps), -128), 127)


@triton.jit
def _stored(apart, bound):
    """Bytes, as int32, of codes `apart` from the mean; `bound` is that of their block."""
    below = apart >> 31
    away = tl.minimum(apart ^ below, 127)
    over = away - bound
    beyond = (over >= 0) & (over < 64)
    steps = tl.where(over >= 64, away - 64, tl.where(beyond, over, away))
    # The side and what lies beyond the bound are the same two bits on either side, the other way round.
    return (tl.where(beyond, 192, 128) | steps) ^ (below & 192)


@triton.jit
def _planes(stored, LANES: tl.constexpr, QUARTERS: tl.constexpr):
    """Bytes [LANES, QUARTERS] of all four planes, the first one's lowest, of bytes [LANES, 4 * QUARTERS]: of each, two
    bits of each quarter's coordinates.
    """
    # Pairs of bits go to bytes of their own: shifted by 4, 14 and 24 at once, for none of these overlap.
    pairs = (stored >> 6) | ((stored * 0x01004010) & 0x03030300)
    quarter = tl.arange(0, 4)[None, :, None]
    return tl.sum(tl.reshape(pairs, [LANES, 4, QUARTERS]) << (2 * quarter), 1)


@triton.jit
def _sketch_blocks(
    key, key_index, end, part, codes, scales, first_block, head, sequence,
    k_batch, k_head, k_token, c_batch, c_head, c_block, s_batch, s_head, s_block, num_keys, step_of_spread, salience,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RUNS: tl.constexpr, PER_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, WIDTH: tl.constexpr, QUARTER: tl.constexpr, PADDED_QUARTER: tl.constexpr,
    INDEXED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Codes and scales of TILE blocks of one head of a sequence of `end` tokens, rotated by `part`."""
    LONE: tl.constexpr = TILE == 1 and UNROLL > 1
    if first_block * BLOCK < end:
        dim = tl.arange(0, PADDED_DIM)
        coordinate = _coordinates(QUARTER, PADDED_QUARTER)
        base = key + sequence.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
        SUB: tl.constexpr = BLOCK // PER_BLOCK
        pooled, real = _pooled(
            base, key_index, sequence, first_block * BLOCK, 0, end, k_token, num_keys, dim, salience, 1.0,
            TILE, RUNS, PER_BLOCK, SUB, HEAD_DIM, PADDED_DIM, INDEXED, UNROLL, LONE,
        )  # fmt: skip
        values = _rotate(pooled, part)
        block = _block_numbers(first_block, TILE, LONE)
        count = _runs(0, tl.minimum(end - block * BLOCK, BLOCK), SUB)
        squares = _block_sums(tl.sum(values * values, 1), TILE, RUNS, LONE)
        scale = tl.maximum(tl.sqrt(squares / (count * WIDTH)) * step_of_spread, 1.1754944e-38)
        code = _code(values, _column(_of_lanes(1.0 / scale, TILE, RUNS, LONE)))
        total = _block_sums(tl.where(real[:, None], code, 0), TILE, RUNS, LONE)
        mean = tl.floor(total.to(tl.float32) / _column(count) + 0.5).to(tl.int32)
        apart = code - _row_of_lanes(mean, TILE, RUNS, LONE)
        squares = _block_sums(tl.where(real, tl.sum(apart * apart, 1), 0), TILE, RUNS, LONE).to(tl.float32)
        bound = tl.minimum(tl.maximum(tl.floor(tl.sqrt(squares / (count * WIDTH)) + 0.5), 1.0), 64.0)
        stored = _stored(apart, _column(_of_lanes(bound.to(tl.int32), TILE, RUNS, LONE)))
        planes = _planes(stored, TILE * RUNS, PADDED_QUARTER)
        lane = tl.arange(0, TILE * RUNS)
        run, of_lane = lane % RUNS, first_block + lane // RUNS
        to = codes + sequence.to(tl.int64) * c_batch + head.to(tl.int64) * c_head
        quarter = tl.arange(0, PADDED_QUARTER)
        at = (of_lane.to(tl.int64) * c_block + (4 + run) * QUARTER)[:, None] + quarter[None, :]
        inside = ((run < PER_BLOCK) & (of_lane * BLOCK < end))[:, None] & (quarter < QUARTER)[None, :]
        plane = tl.arange(0, 4)[None, :, None]
        at = at[:, None, :] + plane * PER_BLOCK * QUARTER
        tl.store(to + at, (planes[:, None, :] >> (8 * plane)).to(tl.uint8), mask=inside[:, None, :] & (plane >= 0))
        written = block * BLOCK < end
        at_mean = _column(block.to(tl.int64)) * c_block + _row(coordinate, LONE)
        mean_written = _column(written) & _row(coordinate < 4 * QUARTER, LONE)
        tl.store(to + at_mean, (mean + 128).to(tl.uint8), mask=mean_written)
        to_scale = scales + sequence.to(tl.int64) * s_batch + head.to(tl.int64) * s_head + block.to(tl.int64) * s_block
        tl.store(to_scale, scale, mask=written)
        tl.store(to_scale + 1, bound, mask=written)


@triton.jit
def _round_queries(values):
    """Codes [..., columns] as int8 and scales [...] of rotated queries."""
    LAST: tl.constexpr = len(values.shape) - 1
    scale = tl.maximum(tl.max(tl.abs(values), LAST) / 127.0, 1.1754944e-38)
    return _nearest(values * tl.expand_dims(1.0 / scale, LAST)).to(tl.int8), scale


@triton.jit(do_not_specialize=["tiles"])
def _sketch_keys(
    key, key_index, past, length, matrix, codes, scales,
    k_batch, k_head, k_token, c_batch, c_head, c_block, s_batch, s_head, s_block, num_keys, step_of_spread, salience,
    tiles,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RUNS: tl.constexpr, PER_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, WIDTH: tl.constexpr, QUARTER: tl.constexpr, PADDED_QUARTER: tl.constexpr,
    INDEXED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of blocks of one head, counted from the sequence's first open one, one after the other."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    end = tl.load(length + sequence).to(tl.int32)
    first_block = tl.load(past + sequence).to(tl.int32) // BLOCK
    part = _matrix(matrix, tl.arange(0, PADDED_DIM), _coordinates(QUARTER, PADDED_QUARTER), HEAD_DIM, WIDTH)
    for tile in tl.range(tl.program_id(0) * tiles, (tl.program_id(0) + 1) * tiles, num_stages=1):
        _sketch_blocks(
            key, key_index, end, part, codes, scales, first_block + tile * TILE, head, sequence,
            k_batch, k_head, k_token, c_batch, c_head, c_block, s_batch, s_head, s_block,
            num_keys, step_of_spread, salience,
            BLOCK, TILE, RUNS, PER_BLOCK, HEAD_DIM, PADDED_DIM, WIDTH, QUARTER, PADDED_QUARTER, INDEXED, UNROLL,
        )  # fmt: skip


@triton.jit
def _sketch_query_blocks(
    query, query_index, part, codes, scales, last_rank, first_row, head, sequence, seen, end,
    q_batch, q_head, q_token, num_rows, num_heads, num_queries, salience, contrast,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RUNS: tl.constexpr, PER_BLOCK: tl.constexpr, KEPT: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, COLUMNS: tl.constexpr, INDEXED: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """The KEPT most salient sub-queries of each of TILE query blocks of one head, rotated by `part` and rounded."""
    SUB: tl.constexpr = BLOCK // PER_BLOCK
    start = (seen // BLOCK + first_row) * BLOCK
    dim, column = tl.arange(0, PADDED_DIM), tl.arange(0, COLUMNS)
    base = query + sequence.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    pooled, real = _pooled(
        base, query_index, sequence, start, seen, end, q_token, num_queries, dim, salience, contrast,
        TILE, RUNS, PER_BLOCK, SUB, HEAD_DIM, PADDED_DIM, INDEXED, UNROLL, TILE == 1 and UNROLL > 1,
    )  # fmt: skip
    # Apart from the tokens: of one shape with these the codes would have them read in pieces of 16 elements.
    values = tl.reshape(_rotate(pooled, part), [TILE, RUNS, COLUMNS])
    real = tl.reshape(real, [TILE, RUNS])
    number, run = tl.arange(0, TILE)[:, None], tl.arange(0, RUNS)
    kept = tl.broadcast_to((run < PER_BLOCK)[None, :], [TILE, RUNS])
    place = tl.broadcast_to(run[None, :], [TILE, RUNS])
    if KEPT < PER_BLOCK:
        block_start = _block_numbers(start // BLOCK, TILE, TILE == 1) * BLOCK
        count = _runs(tl.maximum(seen - block_start, 0), tl.minimum(end - block_start, BLOCK), SUB)
        centre = tl.sum(values, 1) / _column(count)
        apart = values - centre[:, None, :]
        # Two are equally far from their mean, whatever rounding says.
        apart_squared = tl.where(_column(count == 2.0), 0.0, tl.sum(apart * apart, 2))
        distance = tl.where(real, apart_squared, -1.0)
        # Equal to a stable descending sort: how many come before each. Kept ones stay in the order of their tokens.
        mine, other = distance[:, :, None], distance[:, None, :]
        earlier = run[None, None, :] < run[None, :, None]
        before = (other > mine) | ((other == mine) & earlier)
        ahead = tl.sum((before & (run < PER_BLOCK)[None, None, :]).to(tl.int32), 2)
        kept = (ahead < KEPT) & kept
        place = tl.sum((kept[:, None, :] & earlier).to(tl.int32), 2)
    kept = kept & (first_row + number < num_rows)
    rounded, scale = _round_queries(values)
    last = tl.minimum(start + number * BLOCK + (run * SUB)[None, :] + SUB - 1, end - 1)
    first_slot = (sequence.to(tl.int64) * num_rows + first_row) * num_heads + head
    slot = number * (num_heads * KEPT) + place
    to = codes + first_slot * (KEPT * COLUMNS) + (slot[:, :, None] * COLUMNS + column[None, None, :])
    tl.store(to, rounded, mask=kept[:, :, None] & (column >= 0)[None, None, :])
    tl.store(scales + first_slot * KEPT + slot, scale, mask=kept)
    tl.store(last_rank + first_slot * KEPT + slot, tl.where(real, last, -1), mask=kept)


@triton.jit(do_not_specialize=["tiles"])
def _sketch_queries(
    query, query_index, past, length, matrix, codes, scales, last_rank,
    q_batch, q_head, q_token, num_rows, num_queries, salience, contrast, tiles,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RUNS: tl.constexpr, PER_BLOCK: tl.constexpr, KEPT: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, INDEXED: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of query blocks of one head, one after the other."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    seen, end = tl.load(past + sequence).to(tl.int32), tl.load(length + sequence).to(tl.int32)
    part = _matrix(matrix, tl.arange(0, PADDED_DIM), tl.arange(0, COLUMNS), HEAD_DIM, WIDTH)
    for tile in tl.range(tl.program_id(0) * tiles, (tl.program_id(0) + 1) * tiles, num_stages=1):
        if tile * TILE < num_rows:
            _sketch_query_blocks(
                query, query_index, part, codes, scales, last_rank, tile * TILE, head, sequence, seen, end,
                q_batch, q_head, q_token, num_rows, tl.num_programs(1), num_queries, salience, contrast,
                BLOCK, TILE, RUNS, PER_BLOCK, KEPT, HEAD_DIM, PADDED_DIM, COLUMNS, INDEXED, UNROLL,
            )  # fmt: skip


@triton.jit
def _sketch_step(
    key, key_index, query, query_index, past, length, matrix, codes, scales, query_codes, query_scales,
    k_batch, k_head, k_token, q_batch, q_head, q_token, c_batch, c_head, c_block, s_batch, s_head, s_block,
    num_keys, kv_heads, step_of_spread, salience,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RUNS: tl.constexpr, PER_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, WIDTH: tl.constexpr, QUARTER: tl.constexpr, PADDED_QUARTER: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, INDEXED: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One new token per sequence: its block of one head, or the queries of one group of heads."""
    COLUMNS: tl.constexpr = 4 * PADDED_QUARTER
    # Launched the ordinary way: all that came before has ended.
    release_next(PDL)
    task, sequence = tl.program_id(0), tl.program_id(1)
    seen, end = tl.load(past + sequence).to(tl.int32), tl.load(length + sequence).to(tl.int32)
    dim, column = tl.arange(0, PADDED_DIM), tl.arange(0, COLUMNS)
    # Before anything waits. Queries have as many columns as codes.
    part = _matrix(
        matrix, dim, tl.where(task < kv_heads, _coordinates(QUARTER, PADDED_QUARTER), column), HEAD_DIM, WIDTH
    )
    if task < kv_heads:
        _sketch_blocks(
            key, key_index, end, part, codes, scales, seen // BLOCK, task, sequence, k_batch, k_head, k_token,
            c_batch, c_head, c_block, s_batch, s_head, s_block, num_keys, step_of_spread, salience,
            BLOCK, TILE, RUNS, PER_BLOCK, HEAD_DIM, PADDED_DIM, WIDTH, QUARTER, PADDED_QUARTER, INDEXED, UNROLL,
        )  # fmt: skip
    else:
        lane = tl.arange(0, LANES)
        real = (lane < GROUP) & (seen < end)
        head = (task - kv_heads) * GROUP + lane
        at = sequence.to(tl.int64) * q_batch
        if INDEXED:
            at += tl.load(query_index + sequence) * q_token
        queries = tl.load(
            query + at + head.to(tl.int64)[:, None] * q_head + dim[None, :],
            mask=real[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        rounded, scale = _round_queries(_rotate(queries.to(tl.float32), part))
        slot = (sequence.to(tl.int64) * kv_heads + task - kv_heads) * GROUP
        inside = (lane < GROUP)[:, None] & (column >= 0)[None, :]
        tl.store(query_codes + slot * COLUMNS + (lane[:, None] * COLUMNS + column[None, :]), rounded, mask=inside)
        tl.store(query_scales + slot + lane, scale, mask=lane < GROUP)


def _sizes(
    block_size: int, sub_block: int, blocks: int, head_dim: int, width: int, launch: SketchLaunch
) -> dict[str, int]:
    """Constants of a kernel that pools runs of `blocks` blocks and rotates them, and its warps.

    TILE blocks of RUNS lanes each: as many as `launch` says, fewer where the call has fewer blocks, 16 lanes at least.
    """
    per_block = block_size // sub_block
    runs = next_power_of_2(per_block)
    tile = max(1, min(launch.lanes // runs, next_power_of_2(blocks)), 16 // runs)
    warps = launch.num_warps * max(1, tile * runs // launch.lanes)
    return {
        "BLOCK": block_size, "TILE": tile, "RUNS": runs, "PER_BLOCK": per_block, "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim(head_dim), "WIDTH": width, "UNROLL": min(launch.unroll, sub_block),
        "num_warps": min(warps, MOST_WARPS), **register_limit(launch.max_registers),
    }  # fmt: skip


def _in_turn(tiles: int, rest: int, device: torch.device) -> tuple[int, int]:
    """Programs of each of `rest` heads of sequences, and how many of its `tiles` each takes."""
    most = tiles * rest // (LEAST_PROGRAMS * device_of(device).processors)
    each = max(1, min(LAUNCH.tiles, most))
    return -(-tiles // each), each


def _quarters(width: int) -> dict[str, int]:
    """How the kernels that pack codes of `width` coordinates cut them."""
    quarter = -(-width // 4)
    return {"QUARTER": quarter, "PADDED_QUARTER": max(8, next_power_of_2(quarter))}


def sketch_keys(
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    layout: Layout,
    num_blocks: int,
    codes: Shaped[Tensor, "batch kv_heads blocks payload"],
    scales: Float[Tensor, "batch kv_heads blocks 2"],
    matrix: Float[Tensor, "head_dim width"],
    *,
    block_size: int,
    key_sub_block: int,
    step: float,
    salience: float,
) -> None:
    """Write codes and scales of the blocks that the call touches, from each sequence's first open one on.

    Parameters
    ----------
    num_blocks : int
        Blocks that the call touches in the sequence where it touches most.
    codes, scales : torch.Tensor
        The state's buffers, written in place (`sketch_walk.sketch.KeySketch`).
    matrix : torch.Tensor
        Rotation, float32 or bfloat16; products are made in its dtype.
    step : float
        Step size of a code in units of its block's root mean square.
    salience : float
        As in `SketchWalkConfig`; 0 is the plain mean.
    """
    if not num_blocks:
        return
    batch, heads, num_keys, head_dim = key.shape
    width = matrix.shape[1]
    sizes = _sizes(block_size, key_sub_block, num_blocks, head_dim, width, LAUNCH)
    programs, each = _in_turn(-(-num_blocks // sizes["TILE"]), heads * batch, key.device)
    _sketch_keys[(programs, heads, batch)](
        key, layout.key_index, layout.past, layout.length, matrix, codes, scales,
        *key.stride()[:3], *codes.stride()[:3], *scales.stride()[:3], num_keys, step, salience * LOG2_E,
        each, **sizes, **_quarters(width), INDEXED=layout.key_index is not None,
    )  # fmt: skip


def sketch_queries(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    layout: Layout,
    matrix: Float[Tensor, "head_dim width"],
    *,
    block_size: int,
    query_sub_block: int,
    kept: int,
    salience: float,
    contrast: float,
) -> PackedQueries:
    """The `kept` most salient sub-queries per head of every query block of the call.

    `salience` and `contrast` are those of `SketchWalkConfig`. A call of one query per sequence has one row and one
    sub-query.
    """
    batch, heads, num_queries, head_dim = query.shape
    if num_queries == 1:
        block_size = query_sub_block = kept = 1
    rows, width = layout.num_query_blocks(block_size), matrix.shape[1]
    codes, scales = _empty(batch, rows, heads, kept, width, query.device)
    packed = PackedQueries(codes, scales, torch.empty_like(scales, dtype=torch.int32))
    if rows:
        sizes = _sizes(block_size, query_sub_block, rows, head_dim, width, LAUNCH)
        programs, each = _in_turn(-(-rows // sizes["TILE"]), heads * batch, query.device)
        _sketch_queries[(programs, heads, batch)](
            query, layout.query_index, layout.past, layout.length, matrix, *packed,
            *query.stride()[:3], rows, num_queries, salience * LOG2_E, contrast, each,
            **sizes, KEPT=kept, COLUMNS=packed.codes.shape[-1], INDEXED=layout.query_index is not None,
        )  # fmt: skip
    return packed


def sketch_step(
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    query: Shaped[Tensor, "batch heads 1 head_dim"],
    layout: Layout,
    codes: Shaped[Tensor, "batch kv_heads blocks payload"],
    scales: Float[Tensor, "batch kv_heads blocks 2"],
    matrix: Float[Tensor, "head_dim width"],
    *,
    block_size: int,
    key_sub_block: int,
    step: float,
    salience: float,
) -> StepQueries:
    """`sketch_keys` and `sketch_queries` of one query per sequence, in one kernel."""
    batch, kv_heads, num_keys, head_dim = key.shape
    heads, width = query.shape[1], matrix.shape[1]
    packed = _empty(batch, 1, heads, 1, width, query.device)
    sizes = _sizes(block_size, key_sub_block, 1, head_dim, width, STEP_LAUNCH)
    group = heads // kv_heads
    _sketch_step[(2 * kv_heads, batch)](
        key, layout.key_index, query, layout.query_index, layout.past, layout.length, matrix, codes, scales,
        packed.codes, packed.scales, *key.stride()[:3], *query.stride()[:3], *codes.stride()[:3],
        *scales.stride()[:3], num_keys, kv_heads, step, salience * LOG2_E,
        **sizes, **_quarters(width), GROUP=group,
        LANES=max(16, next_power_of_2(group)), INDEXED=layout.key_index is not None,
        PDL=overlaps(key.device, batch * kv_heads),
    )  # fmt: skip
    return packed


def _empty(batch: int, rows: int, heads: int, kept: int, width: int, device: torch.device) -> StepQueries:
    """Memory for codes and scales."""
    shape = (batch, rows, heads, kept)
    return StepQueries(
        torch.empty(*shape, max(32, next_power_of_2(width)), dtype=torch.int8, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )
