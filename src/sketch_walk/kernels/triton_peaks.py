"""Stage 3 in Triton: "peak" block scores from 8-bit sketches, without ever writing the matrix of sub-scores.

Prefill: a fixed set of programs takes tiles of query rows (some heads of some query blocks), each the next one when it
is ready, head after head, so that those that run at once read the same keys. A program multiplies its sub-queries with
all sub-keys as whole numbers, keeps the best of every key block in a scratch of its own, and with the softmax's
normaliser known at the end of the row turns that scratch into scores. Decode: one query per sequence against the means
and outlines of the key sketches.

Equal to `sketch_walk.sketch.block_scores` but for the scratch's rounding to float16.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_walk.extras import is_installed
from sketch_walk.kernels.triton_sketch import PackedQueries, StepQueries
from sketch_walk.kernels.triton_tiles import (
    HIDDEN,
    LOG2_E,
    await_previous,
    dependent,
    device_of,
    interpreted,
    next_power_of_2,
    overlaps,
    register_limit,
    release_next,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Rows that no token fills give a block this many units: far below any product of codes.
NOTHING = tl.constexpr(-(1 << 30))


class PeakLaunch(NamedTuple):
    """How the prefill kernel runs.

    Parameters
    ----------
    rows, columns : int
        Sub-queries and sub-keys of a tile.
    per_processor : int
        Programs per multiprocessor.
    num_warps, num_stages : int
        Of a program.
    max_registers : int, optional
        Of a thread, where the compiler takes a limit (NVIDIA).
    descriptors : bool
        Read tiles of keys through a tensor descriptor: Triton 3.4.
    """

    rows: int = 64
    columns: int = 128
    per_processor: int = 4
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = 128
    descriptors: bool = False


# By major compute capability, for sketches of TUNED_COLUMNS: of the launches in `benchmarks/gpu_selector.py` the
# fastest for blocks of 64 and of 128 tokens, at 65,536 tokens and at 131,072.
TUNED = {9: PeakLaunch(64, 256, 2, 4, 3, 255, True)}
TUNED_COLUMNS = 128


def peak_launch(device: torch.device, columns: int) -> PeakLaunch:
    """The launch for sketches of `columns` coordinates."""
    return _tuned(device.index or 0) if device.type == "cuda" and columns == TUNED_COLUMNS else PeakLaunch()


@functools.cache
def _tuned(index: int) -> PeakLaunch:
    if torch.version.hip is not None or not is_installed("triton.tools.tensor_descriptor"):
        return PeakLaunch()
    return TUNED.get(torch.cuda.get_device_capability(index)[0], PeakLaunch())


class StepLaunch(NamedTuple):
    """How the decode kernel runs.

    Parameters
    ----------
    sub_keys : int
        Of a tile.
    per_processor : int
        Programs per multiprocessor, which take the tiles of one head in turn.
    num_warps, num_stages : int
        Of a program.
    max_registers : int, optional
        As in `PeakLaunch`.
    """

    sub_keys: int = 256
    per_processor: int = 8
    num_warps: int = 2
    num_stages: int = 2
    max_registers: int | None = 128


# Where every tile has a program of its own, and all wait at once for the kernel in front.
OVERLAPPED = StepLaunch(128, 1, 1, 1, None)


# Blocks of a row whose scratch is turned into scores at a time.
CHUNK = 512


@triton.jit
def _outlines(packed, ASM: tl.constexpr):
    """The four pairs of bits of every byte, lowest first, 0 ... 3, as int8."""
    if ASM:
        # Four bytes at a time.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t; and.b32 $0, $4, 0x03030303; shr.u32 t, $4, 2; and.b32 $1, t, 0x03030303;
            shr.u32 t, $4, 4; and.b32 $2, t, 0x03030303; shr.u32 t, $4, 6; and.b32 $3, t, 0x03030303; }""",
            "=r,=r,=r,=r,r", [packed], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    first, second = (packed & 3).to(tl.int8), ((packed >> 2) & 3).to(tl.int8)
    return first, second, ((packed >> 4) & 3).to(tl.int8), (packed >> 6).to(tl.int8)


@triton.jit
def _words(pointer, WORD: tl.constexpr):
    """`pointer` to bytes as one to words of WORD of them."""
    return pointer.to(tl.pointer_type(tl.uint32 if WORD == 4 else tl.uint8))


@triton.jit
def _unpack(
    codes, scales, output, c_batch, c_head, c_block, s_batch, s_head, num_blocks, num_tiles,
    TILE_BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, QUARTER: tl.constexpr, PADDED_QUARTER: tl.constexpr,
    COLUMNS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """int8 codes of a tile of blocks, sub-key s of block j in row s * TILE_BLOCKS + j; blocks past the last are 0.

    WORD bytes at a time: nothing that is computed for one of a word carries over into the next.
    """
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, TILE_BLOCKS * PER_BLOCK)
    block = tile * TILE_BLOCKS + row % TILE_BLOCKS
    word = tl.arange(0, PADDED_QUARTER // WORD)[None, :]
    inside = (block < num_blocks)[:, None] & (word < QUARTER // WORD)
    start = codes + sequence.to(tl.int64) * c_batch + head.to(tl.int64) * c_head + block.to(tl.int64) * c_block
    at = _words(start + (4 + row // TILE_BLOCKS) * QUARTER, WORD)[:, None] + word
    PLANE: tl.constexpr = PER_BLOCK * QUARTER // WORD
    p0 = tl.load(at, mask=inside, other=0).to(tl.uint32)
    p1 = tl.load(at + PLANE, mask=inside, other=0).to(tl.uint32)
    p2 = tl.load(at + 2 * PLANE, mask=inside, other=0).to(tl.uint32)
    p3 = tl.load(at + 3 * PLANE, mask=inside, other=0).to(tl.uint32)
    bounds = scales + sequence.to(tl.int64) * s_batch + head.to(tl.int64) * s_head + 2 * block + 1
    bound = tl.load(bounds, mask=block < num_blocks, other=0.0).to(tl.uint32)[:, None] * 0x01010101
    place = (sequence.to(tl.int64) * tl.num_programs(1) + head) * num_tiles + tile
    to = _words(output + (place * (TILE_BLOCKS * PER_BLOCK) + row) * COLUMNS, WORD)[:, None] + word
    mean_at = _words(start, WORD)[:, None] + word
    for number in tl.static_range(4):
        side = (p0 >> (2 * number)) & 0x03030303
        away = (((p1 >> (2 * number)) & 0x03030303) << 4) | (((p2 >> (2 * number)) & 0x03030303) << 2)
        away |= (p3 >> (2 * number)) & 0x03030303
        # 64 where it is `bound` or more: 128 and what lies between them, which is less, has its highest bit then.
        far = ((away + 0x80808080 - bound) >> 1) & 0x40404040
        within = ((side ^ (side >> 1)) & 0x01010101) * 255
        away += (within & far) | ((within ^ 0xFFFFFFFF) & bound)
        # -1 - away, of those below the mean, are its bits the other way round.
        away ^= (((side >> 1) & 0x01010101) ^ 0x01010101) * 255
        mean = tl.load(mean_at + number * (QUARTER // WORD), mask=inside, other=0).to(tl.uint32) ^ 0x80808080
        code = ((mean & 0x7F7F7F7F) + (away & 0x7F7F7F7F)) ^ ((mean ^ away) & 0x80808080)
        written = (word < QUARTER // WORD) & (number * (QUARTER // WORD) + word < COLUMNS // WORD) & (row >= 0)[:, None]
        tl.store(to + number * (QUARTER // WORD), tl.where(inside, code, 0).to(to.dtype.element_ty), mask=written)


@triton.jit
def _products(
    queries, keys, key_tiles, first, tile, column, TILE: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr
):
    """Products [ROWS, TILE] of a tile of sub-keys, from `keys` of one head or from row `first` on of all."""
    if key_tiles is None:
        row = tl.arange(0, TILE)
        tile_keys = tl.load(keys + (tile * TILE + row)[:, None] * COLUMNS + column[None, :])
    else:
        tile_keys = key_tiles.load([first + tile * TILE, 0])
    if WIDEN:
        products = tl.dot(queries.to(tl.float32), tl.trans(tile_keys.to(tl.float32)), input_precision="ieee")
        return products.to(tl.int32)
    return tl.dot(queries, tl.trans(tile_keys), out_dtype=tl.int32)


@triton.jit
def _logits(products, units, steps, ROWS: tl.constexpr, PER_BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """Best logit [ROWS, TILE_BLOCKS] of every block of a tile."""
    peak = tl.max(tl.reshape(products, [ROWS, PER_BLOCK, TILE_BLOCKS]), 1)
    logit = peak.to(tl.float32) * (units[:, None] * steps[None, :])
    if MASKED:
        logit = tl.where(peak == NOTHING, HIDDEN, logit)
    return logit


@triton.jit
def _keep(logit, base, total, to, block, CLAMP: tl.constexpr):
    """Logits over the row's base: into the scratch, and into the sum of their powers."""
    excess = logit - base[:, None]
    if CLAMP:
        # Beyond float16: a GPU stores infinities there.
        excess = tl.minimum(tl.maximum(excess, -60000.0), 60000.0)
    tl.store(to + block[None, :], excess.to(tl.float16))
    return total + tl.exp2(tl.minimum(excess, 120.0))


@triton.jit
def _exact_normaliser(logits, num_blocks, CHUNK: tl.constexpr):
    """From one lane of the scratch, of a tile where a sum of powers was cut: over the best block's."""
    best = tl.full([CHUNK], -60000.0, tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        logit = tl.load(logits + block, mask=block < num_blocks, other=-60000.0).to(tl.float32)
        logit = tl.minimum(tl.maximum(logit, -60000.0), 60000.0)
        now = tl.maximum(best, logit)
        total = total * tl.exp2(best - now) + tl.exp2(logit - now)
        best = now
    top = tl.max(best, 0)
    return top + tl.log2(tl.sum(total * tl.exp2(best - top), 0))


@triton.jit
def _best_share(scratch, normalisers, start, block, kept, width, LANES: tl.constexpr, CHUNK: tl.constexpr):
    """Greatest share [CHUNK] of attention that LANES sub-queries from `start` on give to blocks.

    Lane after lane: a thread has the same blocks of all.
    """
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    for lane in tl.range(start, start + LANES, loop_unroll_factor=min(LANES, 32)):
        logit = tl.load(scratch + lane * width + block, mask=kept, other=float("-inf"))
        best = tl.maximum(best, logit.to(tl.float32) - tl.load(normalisers + lane))
    return tl.exp2(tl.minimum(best, 0.0))


@triton.jit
def _hide(products, tile, last, end, TILE: tl.constexpr, TILE_BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr,
          KEY_SUB: tl.constexpr):  # fmt: skip
    """NOTHING for sub-keys that a sub-query may not see."""
    part = tl.arange(0, TILE)
    start = ((tile * TILE_BLOCKS + part % TILE_BLOCKS) * PER_BLOCK + part // TILE_BLOCKS) * KEY_SUB
    return tl.where((start[None, :] <= last[:, None]) & (start < end)[None, :], products, NOTHING)


@triton.jit
def _peaks(
    query_codes, query_scales, last_rank, keys, key_tiles, key_scales, scratch, normalisers, scores, counter, length,
    s_batch, s_head, o_batch, o_selection, o_row,
    batch, num_rows, num_heads, num_groups, num_blocks, num_tiles, width, scale_log2,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, KEPT: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, KEY_SUB: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, PER_HEAD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Tiles of TILE_ROWS query blocks and TILE_HEADS heads of one group, one after the other; later rows first.

    `counter` says how many tiles have been taken: they differ in length, so none is meant for any program.
    """
    BLOCK: tl.constexpr = PER_BLOCK * KEY_SUB
    TILE: tl.constexpr = PER_BLOCK * TILE_BLOCKS
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    block_column = tl.arange(0, TILE_BLOCKS)
    scratch += tl.program_id(0).to(tl.int64) * ROWS * width
    normalisers += tl.program_id(0) * ROWS
    head_tiles = num_heads // TILE_HEADS
    task = tl.atomic_add(counter, 1, sem="relaxed")
    while task < num_groups * head_tiles * batch:
        group = num_groups - 1 - task % num_groups
        head = (task // num_groups) % head_tiles * TILE_HEADS
        sequence = task // (num_groups * head_tiles)
        row = group * TILE_ROWS + lane // (KEPT * TILE_HEADS)
        lane_head = head + lane // KEPT % TILE_HEADS
        slot = ((sequence.to(tl.int64) * num_rows + row) * num_heads + lane_head) * KEPT + lane % KEPT
        inside = (row < num_rows) & (lane < TILE_ROWS * TILE_HEADS * KEPT)
        last = tl.load(last_rank + slot, mask=inside, other=-1)
        end = tl.load(length + sequence).to(tl.int32)
        reach = tl.minimum(tl.max(last, 0), end - 1)
        if reach >= 0:
            queries = tl.load(
                query_codes + slot[:, None] * COLUMNS + column[None, :],
                mask=inside[:, None] & (column >= 0)[None, :],
                other=0,
            )
            units = tl.load(query_scales + slot, mask=inside, other=0.0) * scale_log2
            kv_head = head // GROUP
            place = (sequence.to(tl.int64) * (num_heads // GROUP) + kv_head) * num_tiles
            tile_keys = keys + place * TILE * COLUMNS
            first_row = (place * TILE).to(tl.int32)
            key_steps = key_scales + sequence.to(tl.int64) * s_batch + kv_head.to(tl.int64) * s_head
            # Powers are taken over the first sub-key's logit, which takes out what all keys have in common. Where a
            # logit lies 120 and more above it the sum is cut, and made again from the scratch.
            first_key = tl.load(tile_keys + column).to(tl.float32)
            base = tl.sum(queries.to(tl.float32) * first_key[None, :], 1) * units * tl.load(key_steps)
            total = tl.zeros([ROWS, TILE_BLOCKS], tl.float32)
            to = scratch + lane[:, None] * width
            # Tiles before this one are seen in full by every sub-query that is one.
            clear = (tl.min(tl.where(last >= 0, last, 1 << 30), 0) + 1) // (TILE_BLOCKS * BLOCK)
            tiles = reach // (TILE_BLOCKS * BLOCK) + 1
            for tile in range(clear):
                block = tile * TILE_BLOCKS + block_column
                # Loaded here, they arrive while the products are made.
                steps = tl.load(key_steps + 2 * block, mask=block < num_blocks, other=0.0)
                products = _products(queries, tile_keys, key_tiles, first_row, tile, column, TILE, COLUMNS, WIDEN)
                logit = _logits(products, units, steps, ROWS, PER_BLOCK, TILE_BLOCKS, False)
                total = _keep(logit, base, total, to, block, WIDEN)
            for tile in range(clear, tiles):
                block = tile * TILE_BLOCKS + block_column
                steps = tl.load(key_steps + 2 * block, mask=block < num_blocks, other=0.0)
                products = _products(queries, tile_keys, key_tiles, first_row, tile, column, TILE, COLUMNS, WIDEN)
                products = _hide(products, tile, last, end, TILE, TILE_BLOCKS, PER_BLOCK, KEY_SUB)
                logit = _logits(products, units, steps, ROWS, PER_BLOCK, TILE_BLOCKS, True)
                total = _keep(logit, base, total, to, block, WIDEN)
            normaliser = tl.log2(tl.maximum(tl.sum(total, 1), 1.1754944e-38))
            tl.store(normalisers + lane, tl.where(last >= 0, normaliser, 1.0e30))
            tl.debug_barrier()
            if tl.max(tl.where(last >= 0, normaliser, 0.0), 0) >= 119.0:
                for one in range(ROWS):
                    if tl.load(normalisers + one) < 1.0e30:
                        exact = _exact_normaliser(scratch + one * width, tiles * TILE_BLOCKS, CHUNK)
                        tl.store(normalisers + one, exact)
                tl.debug_barrier()
            selection = kv_head if PER_HEAD else 0
            out = scores + sequence.to(tl.int64) * o_batch + selection * o_selection
            for first in range(0, tiles * TILE_BLOCKS, CHUNK):
                block = first + tl.arange(0, CHUNK)
                kept = block < tl.minimum(tiles * TILE_BLOCKS, num_blocks)
                for of_tile in range(tl.minimum(TILE_ROWS, num_rows - group * TILE_ROWS)):
                    start = of_tile * (ROWS // TILE_ROWS)
                    score = _best_share(scratch, normalisers, start, block, kept, width, ROWS // TILE_ROWS, CHUNK)
                    to_row = out + (group * TILE_ROWS + of_tile).to(tl.int64) * o_row
                    # Shares are not negative: whole numbers of their bits have their order.
                    bits, to_bits = score.to(tl.int32, bitcast=True), to_row.to(tl.pointer_type(tl.int32))
                    tl.atomic_max(to_bits + block, bits, mask=kept, sem="relaxed")
            tl.debug_barrier()
        task = tl.atomic_add(counter, 1, sem="relaxed")


@triton.jit
def _code_products(queries, keys, products, WIDEN: tl.constexpr):
    """`products` [LANES, rows] and those of codes [LANES, columns] with codes [rows, columns]."""
    if WIDEN:
        added = tl.dot(queries.to(tl.float32), tl.trans(keys.to(tl.float32)), input_precision="ieee")
        return products + added.to(tl.int32)
    return tl.dot(queries, tl.trans(keys), acc=products, out_dtype=tl.int32)


@triton.jit
def _outline_tile(
    base, scales, tile, num_blocks, c_block,
    TILE_BLOCKS: tl.constexpr, MEANS: tl.constexpr, PER_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    QUARTER: tl.constexpr, PADDED_QUARTER: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Outlines, means, bounds and steps of a tile of one head's blocks.

    Outlines come sub-key by sub-key, so that the best of a block is found without another layout; means
    MEANS / TILE_BLOCKS times, where a matrix unit takes no fewer.
    """
    row = tl.arange(0, TILE_BLOCKS * PER_BLOCK)
    of_row = tile * TILE_BLOCKS + row % TILE_BLOCKS
    quarter = tl.arange(0, PADDED_QUARTER)
    at = base + (of_row.to(tl.int64) * c_block + (4 + row // TILE_BLOCKS) * QUARTER)[:, None] + quarter[None, :]
    of_mean = tile * TILE_BLOCKS + tl.arange(0, MEANS) % TILE_BLOCKS
    column = tl.arange(0, COLUMNS)
    at_mean = base + (of_mean.to(tl.int64) * c_block)[:, None] + column[None, :]
    block = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    there = (of_row < num_blocks)[:, None] & (quarter < QUARTER)[None, :]
    packed = tl.load(at, mask=there, other=0, cache_modifier=CACHE)
    there = (of_mean < num_blocks)[:, None] & (column < 4 * QUARTER)[None, :]
    means = tl.load(at_mean, mask=there, other=0, cache_modifier=CACHE)
    bounds = tl.load(scales + 2 * block + 1, mask=block < num_blocks, other=0.0, cache_modifier=CACHE)
    steps = tl.load(scales + 2 * block, mask=block < num_blocks, other=0.0, cache_modifier=CACHE)
    return packed, means, bounds, steps


@triton.jit
def _query_quarters(
    queries, start, real, QUARTER: tl.constexpr, PADDED_QUARTER: tl.constexpr, LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quarters of the coordinates of queries [LANES, COLUMNS] that begin at `start`."""
    if COLUMNS == 4 * PADDED_QUARTER and QUARTER == PADDED_QUARTER:
        # Without another trip to memory.
        pairs = tl.reshape(queries, [LANES, 2, 2, QUARTER])
        even, odd = tl.split(tl.permute(pairs, (0, 3, 1, 2)))
        q0, q2 = tl.split(even)
        q1, q3 = tl.split(odd)
    else:
        quarter = tl.arange(0, PADDED_QUARTER)
        start += quarter[None, :]
        known = real[:, None] & (quarter < QUARTER)[None, :]
        q0 = tl.load(start, mask=known, other=0)
        q1 = tl.load(start + QUARTER, mask=known & (quarter + QUARTER < COLUMNS)[None, :], other=0)
        q2 = tl.load(start + 2 * QUARTER, mask=known & (quarter + 2 * QUARTER < COLUMNS)[None, :], other=0)
        q3 = tl.load(start + 3 * QUARTER, mask=known & (quarter + 3 * QUARTER < COLUMNS)[None, :], other=0)
    return q0, q1, q2, q3


@triton.jit
def _store_peaks(to, logit, real, tile, num_blocks, TILE_BLOCKS: tl.constexpr):
    """Logits of the blocks of a tile, where they are; `to` is where those of the first tile go."""
    there = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS) < num_blocks
    tl.store(to + tile * TILE_BLOCKS, logit, mask=real[:, None] & there[None, :])


@triton.jit
def _tile_peaks(
    packed, means, bounds, steps, queries, q0, q1, q2, q3, units, sums, to, real, tile, num_blocks, end,
    LANES: tl.constexpr, TILE_BLOCKS: tl.constexpr, MEANS: tl.constexpr, PER_BLOCK: tl.constexpr, KEY_SUB: tl.constexpr,
    WIDEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Best logits [LANES, TILE_BLOCKS] of the blocks of a tile, written; -inf where no key is."""
    means = (means.to(tl.int32) - 128).to(tl.int8)
    of_mean = _code_products(queries, means, tl.zeros([LANES, MEANS], tl.int32), WIDEN)
    if MEANS > TILE_BLOCKS:
        of_mean = tl.max(tl.reshape(of_mean, [LANES, MEANS // TILE_BLOCKS, TILE_BLOCKS]), 1)
    o0, o1, o2, o3 = _outlines(packed, ASM)
    products = tl.zeros([LANES, TILE_BLOCKS * PER_BLOCK], tl.int32)
    products = _code_products(q0, o0, products, WIDEN)
    products = _code_products(q1, o1, products, WIDEN)
    products = _code_products(q2, o2, products, WIDEN)
    products = _code_products(q3, o3, products, WIDEN)
    if (tile + 1) * TILE_BLOCKS * PER_BLOCK * KEY_SUB > end:
        row = tl.arange(0, TILE_BLOCKS * PER_BLOCK)
        start = ((tile * TILE_BLOCKS + row % TILE_BLOCKS) * PER_BLOCK + row // TILE_BLOCKS) * KEY_SUB
        products = tl.where((start < end)[None, :], products, NOTHING)
    peak = tl.max(tl.reshape(products, [LANES, PER_BLOCK, TILE_BLOCKS]), 1)
    # An outline o stands for the mean code and o - 1.5 bounds more.
    code = (peak.to(tl.float32) - 1.5 * sums) * bounds[None, :] + of_mean.to(tl.float32)
    logit = tl.where(peak == NOTHING, float("-inf"), code * units[:, None] * steps[None, :])
    _store_peaks(to, logit, real, tile, num_blocks, TILE_BLOCKS)


@triton.jit
def _decode_peaks(
    query_codes, query_scales, codes, key_scales, length, peaks,
    c_batch, c_head, c_block, s_batch, s_head, num_heads, num_blocks, scale_log2,
    GROUP: tl.constexpr, LANES: tl.constexpr, TILE_BLOCKS: tl.constexpr, MEANS: tl.constexpr, PER_BLOCK: tl.constexpr,
    KEY_SUB: tl.constexpr, COLUMNS: tl.constexpr, QUARTER: tl.constexpr, PADDED_QUARTER: tl.constexpr,
    WIDEN: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Best logits of tiles of TILE_BLOCKS blocks for the heads of one group, from means and outlines.

    A program takes every num_programs-th tile. PDL: it has one, and the kernel in front is `_sketch_step`, which writes
    the last block; codes of other tiles are read meanwhile, past the first cache, which may not see what that kernel
    writes beside them.
    """
    first, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = tl.load(length + sequence).to(tl.int32)
    TOKENS: tl.constexpr = TILE_BLOCKS * PER_BLOCK * KEY_SUB
    lane = tl.arange(0, LANES)
    real = lane < GROUP
    slot = sequence.to(tl.int64) * num_heads + kv_head * GROUP + lane
    to = peaks + slot[:, None] * num_blocks + tl.arange(0, TILE_BLOCKS)[None, :]
    base = codes + sequence.to(tl.int64) * c_batch + kv_head.to(tl.int64) * c_head
    scales = key_scales + sequence.to(tl.int64) * s_batch + kv_head.to(tl.int64) * s_head
    start = query_codes + slot[:, None] * COLUMNS
    column = tl.arange(0, COLUMNS)
    if PDL:
        if (first + 1) * TOKENS >= end:
            await_previous(PDL)
        packed, means, bounds, steps = _outline_tile(
            base, scales, first, num_blocks, c_block,
            TILE_BLOCKS, MEANS, PER_BLOCK, COLUMNS, QUARTER, PADDED_QUARTER, ".cg",
        )  # fmt: skip
        await_previous(PDL)
        release_next(PDL)
    queries = tl.load(start + column[None, :], mask=real[:, None] & (column >= 0)[None, :], other=0)
    units = tl.load(query_scales + slot, mask=real, other=0.0) * scale_log2
    q0, q1, q2, q3 = _query_quarters(queries, start, real, QUARTER, PADDED_QUARTER, LANES, COLUMNS)
    # The sum of each query's codes, in the layout of the other products.
    ones = tl.full([MEANS, COLUMNS], 1, tl.int8)
    sums = _code_products(queries, ones, tl.zeros([LANES, MEANS], tl.int32), WIDEN)
    if MEANS > TILE_BLOCKS:
        sums = tl.max(tl.reshape(sums, [LANES, MEANS // TILE_BLOCKS, TILE_BLOCKS]), 1)
    sums = sums.to(tl.float32)
    if PDL:
        _tile_peaks(
            packed, means, bounds, steps, queries, q0, q1, q2, q3, units, sums, to, real, first, num_blocks, end,
            LANES, TILE_BLOCKS, MEANS, PER_BLOCK, KEY_SUB, WIDEN, ASM,
        )  # fmt: skip
    else:
        filled = tl.cdiv(end, TOKENS)
        for tile in tl.range(first, filled, tl.num_programs(0), num_stages=STAGES):
            packed, means, bounds, steps = _outline_tile(
                base, scales, tile, num_blocks, c_block,
                TILE_BLOCKS, MEANS, PER_BLOCK, COLUMNS, QUARTER, PADDED_QUARTER, "",
            )  # fmt: skip
            _tile_peaks(
                packed, means, bounds, steps, queries, q0, q1, q2, q3, units, sums, to, real, tile, num_blocks, end,
                LANES, TILE_BLOCKS, MEANS, PER_BLOCK, KEY_SUB, WIDEN, ASM,
            )  # fmt: skip
        after = first + tl.cdiv(tl.maximum(filled - first, 0), tl.num_programs(0)) * tl.num_programs(0)
        for tile in range(after, tl.cdiv(num_blocks, TILE_BLOCKS), tl.num_programs(0)):
            nothing = tl.full([LANES, TILE_BLOCKS], float("-inf"), tl.float32)
            _store_peaks(to, nothing, real, tile, num_blocks, TILE_BLOCKS)


def unsupported(block_size: int, query_sub_block: int, key_sub_block: int, kept: int, width: int) -> str | None:
    """None if the kernels take sketches of this shape, else the reason why not."""
    per_block, subs = block_size // key_sub_block, block_size // query_sub_block
    if any(n & (n - 1) for n in (per_block, subs, kept)):
        return f"a block must hold powers of two of sub-keys and sub-queries, got {per_block}, {subs} ({kept} kept)"
    if per_block > PeakLaunch().columns or kept > PeakLaunch().rows:
        return f"a block must hold at most {PeakLaunch().columns} sub-keys and {PeakLaunch().rows} sub-queries"
    if not 16 <= width <= 256 or width % 2:
        return f"sketches must have an even number of 16 to 256 coordinates, got {width}"
    return None


def unpack_keys(
    codes: Int[Tensor, "batch kv_heads blocks payload"],
    scales: Float[Tensor, "batch kv_heads blocks 2"],
    tile_blocks: int,
    per_block: int,
    columns: int,
) -> Int[Tensor, "batch kv_heads tiles sub_keys columns"]:
    """int8 codes in tiles of `tile_blocks` blocks, sub-key by sub-key, as `_peaks` reads them."""
    batch, heads, blocks, payload = codes.shape
    quarter = payload // (4 * (1 + per_block))
    tiles = -(-blocks // tile_blocks)
    make = torch.empty if 4 * quarter == columns else torch.zeros
    output = make(batch, heads, tiles, tile_blocks * per_block, columns, dtype=torch.int8, device=codes.device)
    _unpack[(tiles, heads, batch)](
        codes, scales, output, *codes.stride()[:3], *scales.stride()[:2], blocks, tiles,
        TILE_BLOCKS=tile_blocks, PER_BLOCK=per_block, QUARTER=quarter, PADDED_QUARTER=next_power_of_2(quarter),
        COLUMNS=columns, WORD=1 if quarter % 4 else 4, num_warps=8,
    )  # fmt: skip
    return output


def _described(keys: Int[Tensor, "batch kv_heads tiles sub_keys columns"]) -> object:
    """A tensor descriptor of tiles of keys."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(keys.view(-1, keys.shape[4]), list(keys.shape[3:]))


def peak_scores(
    queries: PackedQueries,
    codes: Int[Tensor, "batch kv_heads blocks payload"],
    scales: Float[Tensor, "batch kv_heads blocks 2"],
    length: Int[Tensor, " batch"],
    *,
    scale: float,
    per_block: int,
    key_sub_block: int,
    per_kv_head: bool,
    launch: PeakLaunch | None = None,
) -> Float[Tensor, "batch selections rows blocks"]:
    """As `sketch_walk.sketch.block_scores` with "peak", "max" and the causal order. No host synchronisation.

    Beyond its result it takes one scratch per running program (float16, `launch.rows` by blocks) and the keys' codes
    as bytes.
    """
    batch, rows, heads, kept, columns = queries.codes.shape
    launch = launch or peak_launch(codes.device, columns)
    kv_heads, blocks = codes.shape[1], codes.shape[2]
    group = heads // kv_heads
    tile_blocks = max(1, launch.columns // per_block)
    keys = unpack_keys(codes, scales, tile_blocks, per_block, columns)
    tile_heads = max(h for h in range(1, group + 1) if group % h == 0 and h & (h - 1) == 0 and h * kept <= launch.rows)
    tile_rows = max(1, min(launch.rows // (tile_heads * kept), next_power_of_2(rows)))
    lanes = max(16, tile_rows * tile_heads * kept)
    if lanes > tile_rows * tile_heads * kept:
        tile_rows = lanes // (tile_heads * kept)
    groups = -(-rows // tile_rows)
    processors = device_of(codes.device).processors
    programs = min(groups * (heads // tile_heads) * batch, processors * launch.per_processor)
    width = -(-keys.shape[2] * tile_blocks // CHUNK) * CHUNK
    scratch = torch.empty(programs, lanes, width, dtype=torch.float16, device=codes.device)
    normalisers = torch.empty(programs, lanes, dtype=torch.float32, device=codes.device)
    selections = kv_heads if per_kv_head else 1
    # Behind the scores, zero as they are: the counter.
    zeros = torch.zeros(batch * selections * rows * blocks + 1, dtype=torch.float32, device=codes.device)
    scores, counter = zeros[:-1].view(batch, selections, rows, blocks), zeros[-1:].view(torch.int32)
    key_tiles = _described(keys) if launch.descriptors else None
    _peaks[(programs,)](
        *queries, keys, key_tiles, scales, scratch, normalisers, scores, counter, length,
        *scales.stride()[:2], *scores.stride()[:3],
        batch, rows, heads, groups, blocks, keys.shape[2], width, scale * LOG2_E,
        GROUP=group, TILE_HEADS=tile_heads, KEPT=kept, TILE_ROWS=tile_rows, ROWS=lanes, TILE_BLOCKS=tile_blocks,
        PER_BLOCK=per_block, KEY_SUB=key_sub_block, COLUMNS=columns, CHUNK=CHUNK, PER_HEAD=per_kv_head,
        WIDEN=interpreted(), num_warps=launch.num_warps, num_stages=launch.num_stages,
        **register_limit(launch.max_registers),
    )  # fmt: skip
    return scores


def decode_peaks(
    queries: PackedQueries | StepQueries,
    codes: Int[Tensor, "batch kv_heads blocks payload"],
    scales: Float[Tensor, "batch kv_heads blocks 2"],
    length: Int[Tensor, " batch"],
    *,
    scale: float,
    per_block: int,
    key_sub_block: int,
    after_step: bool = False,
    launch: StepLaunch | None = None,
) -> Float[Tensor, "batch heads blocks"]:
    """Best logit of every block for the one query of every sequence, in units of log 2; -inf where no key is.

    Reads means and outlines of the key sketches. `after_step`: the kernel in front is that of
    `triton_sketch.sketch_step`, with these queries, codes and scales; this one may then start before that has ended.
    """
    batch, _, heads, _, columns = queries.codes.shape
    kv_heads, blocks = codes.shape[1], codes.shape[2]
    pdl = dependent(after_step and overlaps(codes.device, batch * kv_heads))
    launch = launch or (OVERLAPPED if pdl["PDL"] else StepLaunch())
    quarter = codes.shape[3] // (4 * (1 + per_block))
    group = heads // kv_heads
    tile_blocks = max(1, launch.sub_keys // per_block)
    peaks = torch.empty(batch, heads, blocks, dtype=torch.float32, device=codes.device)
    programs = tiles = -(-blocks // tile_blocks)
    if not pdl["PDL"]:
        most = max(1, device_of(codes.device).processors * launch.per_processor // (batch * kv_heads))
        programs = -(-tiles // -(-tiles // most))
    _decode_peaks[(programs, kv_heads, batch)](
        queries.codes, queries.scales, codes, scales, length, peaks,
        *codes.stride()[:3], *scales.stride()[:2], heads, blocks, scale * LOG2_E,
        GROUP=group, LANES=max(16, next_power_of_2(group)), TILE_BLOCKS=tile_blocks, MEANS=max(16, tile_blocks),
        PER_BLOCK=per_block, KEY_SUB=key_sub_block, COLUMNS=columns, QUARTER=quarter,
        PADDED_QUARTER=max(32, next_power_of_2(quarter)), WIDEN=interpreted(),
        ASM=not interpreted() and torch.version.hip is None, num_warps=launch.num_warps,
        STAGES=launch.num_stages, **register_limit(launch.max_registers), **pdl,
    )  # fmt: skip
    return peaks
