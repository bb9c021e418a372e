"""Decode in Triton: one query per sequence, split over its selected blocks, from contiguous and from paged caches.

A program reads some of the selected blocks for all heads of a group; a second kernel merges the partial results. Shapes
depend on nothing on the device, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_walk.kernels.step_memory import StepMemory
from sketch_walk.kernels.triton_tiles import (
    HIDDEN,
    LOG2_E,
    Device,
    accumulate,
    await_previous,
    dependent,
    device_of,
    interpreted,
    load_lanes,
    next_power_of_2,
    overlaps,
    padded_dim,
    product,
    release_next,
    unsupported,
)

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped

# Programs per multiprocessor below which a step does not fill a GPU.
PROGRAMS_PER_PROCESSOR = 2
SPLIT_BLOCKS = (16, 8, 4, 2, 1)
# A step's programs run all at once where they then take at least this share of what the device holds, and none reads
# more than so many blocks: a static cache that is partly filled leaves the last programs of a row without work.
LEAST_SHARE = 0.75
MOST_BLOCKS = 32
# Bytes of one tile of keys, and of all tiles in flight: two programs of a 228 KiB multiprocessor then run at once.
KEY_TILE_BYTES = 16384
IN_FLIGHT_BYTES = 98304
# Partial results that are merged at a time: few, or many.
MERGED = (16, 64)
# Blocks whose shares are remembered at a time.
REMEMBERED = tl.constexpr(128)


@dataclass(frozen=True)
class DecodeLaunch:
    """How a decode step is cut into programs; the result does not depend on it.

    Parameters
    ----------
    blocks : int
        Selected blocks of one program.
    keys : int
        Keys of one step of its loop, a power of two. They divide blocks * block_size where `decode_launch` chooses.
    num_warps, num_stages : int
        Of the compiler.
    """

    blocks: int
    keys: int
    num_warps: int = 4
    num_stages: int = 3


@lru_cache(maxsize=256)
def decode_launch(
    batch: int,
    kv_heads: int,
    max_selected: int,
    block_size: int,
    head_dim: int,
    element_size: int,
    device: Device,
    page_size: int = 0,
) -> DecodeLaunch:
    """The launch for these shapes: programs that all run at once and nearly fill the device; where there is no such
    number of them, the fewest that fill it.
    """
    wanted = PROGRAMS_PER_PROCESSOR * device.processors
    row = padded_dim(head_dim) * element_size
    most_keys = min(64, KEY_TILE_BYTES // row)
    pairs = batch * kv_heads
    blocks = _one_wave(pairs, max_selected, max(1, most_keys // block_size), wanted)
    if not blocks:
        filling = (n for n in SPLIT_BLOCKS if pairs * -(-max_selected // n) >= wanted)
        blocks = next(filling, 1)
    keys = max(16, min(blocks * block_size, most_keys))
    room = min(IN_FLIGHT_BYTES, device.shared_bytes)
    stages = max(1, min(4, room // (2 * keys * row)))
    if (page_size or keys > block_size) and device.shared_bytes >= IN_FLIGHT_BYTES:
        # Addresses that are loaded key by key take two stages of the pipeline before the keys.
        stages = min(stages + 2, 5)
    return DecodeLaunch(blocks, keys, num_stages=stages)


def _one_wave(pairs: int, max_selected: int, step_blocks: int, slots: int) -> int:
    """Blocks of a program, in whole steps of `step_blocks`, so that all programs of `pairs` sequences and key/value
    heads run at once in `slots`; 0 if too many slots stay empty or a program has too much to read.
    """
    splits = slots // pairs
    if not splits or not max_selected:
        return 0
    blocks = -(-max_selected // (splits * step_blocks)) * step_blocks
    filled = pairs * -(-max_selected // blocks) >= LEAST_SHARE * slots
    return blocks if filled and blocks <= MOST_BLOCKS else 0


@triton.jit
def _block_of(page, slot, last, BLOCK: tl.constexpr):
    """Numbers of the blocks that selected keys `slot` lie in; without a `page` table all blocks are selected."""
    return slot // BLOCK if page is None else tl.load(page + slot // BLOCK, mask=slot < last, other=0)


@triton.jit
def _num_selected(counts, length, sequence, selection, c_batch, c_head, BLOCK: tl.constexpr):
    """Blocks that one query reads: its count, without `counts` all that its sequence has filled."""
    if counts is None:
        count = ((tl.load(length + sequence) + BLOCK - 1) // BLOCK).to(tl.int32)
    else:
        count = tl.load(counts + sequence * c_batch + selection * c_head)
    return count


# What a longer cache changes is no reason to compile anew.
SIZES = ["num_splits", "split_blocks", "i_batch", "i_head", "c_batch", "c_head"]


@triton.jit(do_not_specialize=[*SIZES, "num_units", "t_batch"])
def _decode(
    query, key, value, output, partial, masses, indices, counts, length, table,
    q_batch, q_head, k_batch, k_head, k_page, k_token, v_batch, v_head, v_page, v_token, o_batch, o_head,
    i_batch, i_head, c_batch, c_head, t_batch,
    num_splits, num_units, split_blocks, scale_log2,
    GROUP: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PER_HEAD: tl.constexpr, PAGE: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`split_blocks` selected blocks of one sequence, for the heads of one group: an unnormalised partial result.

    Token t stands in row t of a contiguous cache (PAGE 0), else in row t % PAGE of page table[t // PAGE].
    WHOLE: there is one split, and its result is the output. `partial` holds the sums of all splits of all heads, then
    their greatest logits, then their totals. `masses` takes the log-sum-exp of every head's logits over each unit: the
    keys of a block, or of a step where a block takes several.
    """
    await_previous(PDL)
    release_next(PDL and not WHOLE)
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    selection = kv_head if PER_HEAD else 0
    # What is needed first in one trip to memory: the first block's number may turn out to be none.
    first = split * split_blocks * BLOCK
    page = indices
    if indices is not None:
        page += sequence.to(tl.int64) * i_batch + selection * i_head
    ONE_BLOCK: tl.constexpr = KEYS <= BLOCK
    if ONE_BLOCK:
        block = _block_of(page, first, first + 1, BLOCK)
    count = _num_selected(counts, length, sequence, selection, c_batch, c_head, BLOCK)
    end = tl.load(length + sequence).to(tl.int32)
    lane = tl.arange(0, LANES)
    real = lane < GROUP
    dim = tl.arange(0, PADDED_DIM)
    inside = real[:, None] & (dim < HEAD_DIM)[None, :]
    head = (kv_head * GROUP + lane).to(tl.int64)
    queries = load_lanes(query, sequence.to(tl.int64) * q_batch + head * q_head, dim, real, HEAD_DIM, WIDEN)
    if (split * split_blocks >= count) and (not WHOLE):
        return
    key += sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    value += sequence.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    if PAGE > 0:
        table += sequence.to(tl.int64) * t_batch

    acc = tl.zeros([LANES, PADDED_DIM], tl.float32)
    best = tl.full([LANES], HIDDEN, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    column = tl.arange(0, KEYS)
    last = tl.minimum(count, (split + 1) * split_blocks) * BLOCK
    # The number of a block that all keys of a step share is loaded one step ahead.
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        slot = start + column
        if not ONE_BLOCK:
            block = _block_of(page, slot, last, BLOCK)
        rank = block * BLOCK + slot % BLOCK
        seen = (slot < last) & (rank < end)
        if PAGE > 0:
            entry = tl.load(table + rank // PAGE, mask=seen, other=0).to(tl.int64)
            key_at = entry * k_page + (rank % PAGE).to(tl.int64) * k_token
            value_at = entry * v_page + (rank % PAGE).to(tl.int64) * v_token
        else:
            key_at = rank.to(tl.int64) * k_token
            value_at = rank.to(tl.int64) * v_token
        if ONE_BLOCK:
            block = _block_of(page, start + KEYS, last, BLOCK)
        keys = load_lanes(key, key_at, dim, seen, HEAD_DIM, WIDEN)
        values = load_lanes(value, value_at, dim, seen, HEAD_DIM, WIDEN)
        logits = product(queries, tl.trans(keys), WIDEN) * scale_log2
        logits = tl.where(seen[None, :], logits, HIDDEN)
        best_before, total_before = best, total
        acc, best, total = accumulate(acc, best, total, logits, values, 1.0, WIDEN)
        if masses is not None:
            WHOLE_BLOCKS: tl.constexpr = (KEYS + BLOCK - 1) // BLOCK
            UNIT: tl.constexpr = KEYS // WHOLE_BLOCKS
            # Over the best logit so far: what lies far below that has no share.
            if WHOLE_BLOCKS == 1:
                # What the step added to the total, to a ten-millionth of it.
                sums = (total - total_before * tl.exp2(best_before - best))[:, None]
            else:
                sums = tl.sum(tl.reshape(tl.exp2(logits - best[:, None]), [LANES, WHOLE_BLOCKS, UNIT]), 2)
            mass = best[:, None] + tl.log2(tl.maximum(sums, 1.1754944e-38))
            unit = start // UNIT + tl.arange(0, WHOLE_BLOCKS)
            of_head = masses + (sequence.to(tl.int64) * tl.num_programs(1) * GROUP + head) * num_units
            kept = real[:, None] & (unit * UNIT < last)[None, :]
            tl.store(of_head[:, None] + unit[None, :], mass, mask=kept)
    if WHOLE:
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        to = sequence.to(tl.int64) * o_batch + head * o_head
        tl.store(output + to[:, None] + dim[None, :], result.to(output.dtype.element_ty), mask=inside)
    else:
        heads = tl.num_programs(1) * GROUP
        slots = (sequence.to(tl.int64) * heads + head) * num_splits + split
        num_slots = tl.num_programs(2).to(tl.int64) * heads * num_splits
        tl.store(partial + slots[:, None] * HEAD_DIM + dim[None, :], acc, mask=inside)
        peaks = partial + num_slots * HEAD_DIM
        tl.store(peaks + slots, best, mask=real)
        tl.store(peaks + num_slots + slots, total, mask=real)


@triton.jit
def _merged(
    partial, start, num_slots, used, num_splits,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, MERGED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Sum [PADDED_DIM] if SUMS, greatest logit [1] and total [1] over all splits of one head, of which `used` count."""
    peaks = partial + num_slots * HEAD_DIM + start
    dim = tl.arange(0, PADDED_DIM)
    acc = tl.zeros([PADDED_DIM], tl.float32)
    best = tl.full([1], HIDDEN, tl.float32)
    total = tl.zeros([1], tl.float32)
    for first in tl.range(0, num_splits, MERGED, num_stages=1):
        split = first + tl.arange(0, MERGED)
        there, kept = split < num_splits, split < used
        peak = tl.load(peaks + split, mask=there, other=HIDDEN)
        share = tl.load(peaks + num_slots + split, mask=there, other=0.0)
        if SUMS:
            inside = there[:, None] & (dim < HEAD_DIM)[None, :]
            parts = tl.load(partial + (start + split)[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
            parts = tl.where(kept[:, None], parts, 0.0)
        peak, share = tl.where(kept, peak, HIDDEN), tl.where(kept, share, 0.0)
        now = tl.maximum(best, tl.max(peak, 0))
        shrink = tl.exp2(best - now)
        weight = tl.exp2(peak - now)
        total = total * shrink + tl.sum(share * weight, 0)
        if SUMS:
            acc = acc * shrink + tl.sum(parts * weight[:, None], 0)
        best = now
    return acc, best, total


@triton.jit
def _remember(
    memory, shared, indices, masses, normaliser, count, rank, tokens_per_power,
    UNITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Stamps of one head's share of attention in each block it read, where they are later than what is remembered."""
    for first in range(0, count, BLOCKS):
        place = first + tl.arange(0, BLOCKS)
        kept = place < count
        unit = place[:, None] * UNITS + tl.arange(0, UNITS)[None, :]
        mass = tl.load(masses + unit, mask=kept[:, None], other=float("-inf"))
        share = tl.sum(tl.exp2(mass - normaliser), 1)
        stamp = rank + tl.log2(tl.maximum(share, 1.1754944e-38)) * tokens_per_power
        block = tl.load(indices + place, mask=kept, other=0)
        tl.atomic_max(memory + block, stamp, mask=kept, sem="relaxed")
        tl.atomic_max(shared + block, stamp, mask=kept, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def _merge(
    partial, output, masses, memory, shared, indices, counts, past, length,
    o_batch, o_head, i_batch, i_head, c_batch, c_head, m_batch, m_head, m_shared,
    num_heads, num_splits, split_blocks, tokens_per_power,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PER_HEAD: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Output of one head of one sequence from the partial results of its splits; 0 where there are none.

    With a `memory` there are twice as many programs: the second half notes the shares of the blocks, UNITS of `masses`
    each, unless the sequence has no new token. PDL: the kernel in front is `_decode`, which writes `partial` and
    `masses` alone. Nothing waits for `count`: splits without a result are read, and taken for none.
    """
    head, sequence = tl.program_id(0) % num_heads, tl.program_id(1)
    selection = head // GROUP if PER_HEAD else 0
    count = _num_selected(counts, length, sequence, selection, c_batch, c_head, BLOCK)
    noted = 0
    if memory is not None:
        end = tl.load(length + sequence)
        noted = tl.where(tl.load(past + sequence) < end, count, 0)
    await_previous(PDL)
    used = (count + split_blocks - 1) // split_blocks
    start = (sequence.to(tl.int64) * num_heads + head) * num_splits
    num_slots = tl.num_programs(1).to(tl.int64) * num_heads * num_splits
    if tl.program_id(0) < num_heads:
        dim = tl.arange(0, PADDED_DIM)
        acc, best, total = _merged(partial, start, num_slots, used, num_splits, HEAD_DIM, PADDED_DIM, MERGED, True)
        result = acc / tl.where(total > 0, total, 1.0)
        to = sequence.to(tl.int64) * o_batch + head.to(tl.int64) * o_head
        tl.store(output + to + dim, result.to(output.dtype.element_ty), mask=dim < HEAD_DIM)
    elif memory is not None:
        _, best, total = _merged(partial, start, num_slots, used, num_splits, HEAD_DIM, PADDED_DIM, MERGED, False)
        _remember(
            memory + sequence.to(tl.int64) * m_batch + selection * m_head,
            shared + sequence.to(tl.int64) * m_shared,
            indices + sequence.to(tl.int64) * i_batch + selection * i_head,
            masses + (sequence.to(tl.int64) * num_heads + head) * (num_splits * split_blocks * UNITS),
            tl.max(best + tl.log2(tl.maximum(total, 1.1754944e-38)), 0), noted, (end - 1).to(tl.float32),
            tokens_per_power, UNITS, REMEMBERED,
        )  # fmt: skip


def decode(
    query: Shaped[Tensor, "batch heads 1 head_dim"],
    key: Tensor,
    value: Tensor,
    indices: Int[Tensor, "batch selections 1 max_selected"] | None,
    counts: Int[Tensor, "batch selections 1"] | None,
    length: Int[Tensor, " batch"],
    block_size: int,
    scale: float,
    *,
    table: Int[Tensor, "batch entries"] | None = None,
    page_size: int = 0,
    memory: StepMemory | None = None,
    past: Int[Tensor, " batch"] | None = None,
    launch: DecodeLaunch | None = None,
) -> Shaped[Tensor, "batch heads 1 head_dim"]:
    """One query per sequence over its selected blocks.

    Parameters
    ----------
    key, value : torch.Tensor
        Shape (batch, kv_heads, num_keys, head_dim), or (num_pages, page_size, kv_heads, head_dim) with a `page_size`.
    indices, counts : torch.Tensor, optional
        A `BlockSelection` of one row with its head axis. None, both, reads every token before `length`; not with a
        `page_size`.
    table : torch.Tensor, optional
        Page of every `page_size` tokens; without a `page_size`, the position of every token.
    memory : StepMemory, optional
        As in `reference.attend_selected`.
    past : torch.Tensor, optional
        int64, the tokens before the query; for a `memory`.
    launch : DecodeLaunch, optional
        Default: `decode_launch`.
    """
    batch, heads, _, head_dim = query.shape
    strides: list[int] = []
    for x in (key, value):
        first, second, third, _ = x.stride()
        strides += (0, third, first, second) if page_size else (first, second, third, third)
    kv_heads = key.shape[2 if page_size else 1]
    group = heads // kv_heads
    max_selected, selections, selection_strides = -(-key.shape[2] // block_size), 1, [0, 0, 0, 0]
    if indices is not None and counts is not None:
        max_selected, selections = indices.shape[3], indices.shape[1]
        selection_strides = [*indices.stride()[:2], *counts.stride()[:2]]
    launch = launch or decode_launch(
        batch,
        kv_heads,
        max_selected,
        block_size,
        head_dim,
        key.element_size(),
        device_of(query.device),
        0 if table is None else page_size or 1,
    )
    splits = max(1, -(-max_selected // launch.blocks))
    output = torch.empty(batch, heads, 1, head_dim, dtype=query.dtype, device=query.device)
    partial, masses, units = None, None, max(1, block_size // launch.keys)
    whole = splits == 1 and memory is None
    if memory is not None:
        masses = torch.empty(batch, heads, splits * launch.blocks * units, dtype=torch.float32, device=query.device)
    if not whole:
        partial = torch.empty(batch * heads * splits * (head_dim + 2), dtype=torch.float32, device=query.device)
    pdl = dependent(overlaps(query.device, batch * kv_heads))
    _decode[(splits, kv_heads, batch)](
        query, key, value, output, partial, masses, indices, counts, length, table,
        *query.stride()[:2], *strides, *output.stride()[:2],
        *selection_strides, 0 if table is None else table.stride(0),
        splits, splits * launch.blocks * units, launch.blocks, scale * LOG2_E,
        GROUP=group, LANES=max(16, next_power_of_2(group)), BLOCK=block_size,
        KEYS=launch.keys, HEAD_DIM=head_dim, PADDED_DIM=padded_dim(head_dim), PER_HEAD=selections > 1,
        PAGE=0 if table is None else page_size or 1, WHOLE=whole, STAGES=launch.num_stages, WIDEN=interpreted(),
        num_warps=launch.num_warps, num_stages=launch.num_stages, **pdl,
    )  # fmt: skip
    if not whole:
        held: tuple[Tensor | None, ...] = (None, None)
        held_strides, tokens_per_power = [0, 0, 0], 0.0
        if memory is not None:
            held, tokens_per_power = (memory.own, memory.shared), memory.tokens_per_power
            held_strides = [*memory.own.stride()[:2], memory.shared.stride(0)]
        _merge[(heads if memory is None else 2 * heads, batch)](
            partial, output, masses, *held, indices, counts, past, length,
            *output.stride()[:2], *selection_strides, *held_strides, heads, splits, launch.blocks, tokens_per_power,
            GROUP=group, BLOCK=block_size, MERGED=MERGED[splits > MERGED[0]],
            HEAD_DIM=head_dim, PADDED_DIM=padded_dim(head_dim), PER_HEAD=selections > 1, UNITS=units, num_warps=4,
            **pdl,
        )  # fmt: skip
    return output


def attend_paged(
    query: Shaped[Tensor, "batch heads 1 head_dim"],
    key_cache: Shaped[Tensor, "num_pages page_size kv_heads head_dim"],
    value_cache: Shaped[Tensor, "num_pages page_size kv_heads head_dim"],
    block_table: Int[Tensor, "batch max_pages"],
    indices: Int[Tensor, "batch selections 1 max_selected"],
    counts: Int[Tensor, "batch selections 1"],
    lengths: Int[Tensor, " batch"],
    block_size: int,
    scale: float,
) -> Shaped[Tensor, "batch heads 1 head_dim"]:
    """Attention of one query per sequence to selected blocks of a paged cache, as `vllm` keeps it.

    Parameters
    ----------
    query : torch.Tensor
        Shape (batch, num_heads, 1, head_dim), after RoPE: the last token of each sequence, already in the cache.
    key_cache, value_cache : torch.Tensor
        Shape (num_pages, page_size, num_kv_heads, head_dim), any strides with a contiguous last dimension.
    block_table : torch.Tensor
        Shape (batch, max_pages), int32: page t // page_size of a sequence holds its token t. Entries past a
        sequence's length are never used.
    indices, counts : torch.Tensor
        A `BlockSelection` of one row with its head axis (size 1 or num_kv_heads). Its blocks are of tokens, not pages:
        `page_size` and `block_size` need not agree.
    lengths : torch.Tensor
        Shape (batch,), int32 or int64: tokens of each sequence.
    block_size : int
        Tokens of a selected block: 16, 32, 64 or 128.
    scale : float
        Factor of the logits.

    Returns
    -------
    torch.Tensor
        Like `query`; 0 where `counts` is 0. No host synchronisation: capturable in a CUDA graph.

    Raises
    ------
    ValueError
        For shapes, dtypes or a block size that do not fit; the message names the argument.
    """
    _check_paged(query, key_cache, value_cache, block_table, indices, counts, lengths, block_size)
    page_size = key_cache.shape[1]
    return decode(
        query, key_cache, value_cache, indices, counts, lengths, block_size, scale, table=block_table,
        page_size=page_size,
    )  # fmt: skip


def _check_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    indices: Tensor,
    counts: Tensor,
    lengths: Tensor,
    block_size: int,
) -> None:
    if query.dim() != 4 or query.shape[2] != 1:
        raise ValueError(f"query must have the shape (batch, num_heads, 1, head_dim), got {tuple(query.shape)}")
    batch, heads, _, head_dim = query.shape
    if key_cache.dim() != 4 or key_cache.shape != value_cache.shape or key_cache.shape[3] != head_dim:
        raise ValueError(
            f"key_cache and value_cache must have the shape (num_pages, page_size, num_kv_heads, {head_dim}), "
            f"got {tuple(key_cache.shape)} and {tuple(value_cache.shape)}"
        )
    kv_heads = key_cache.shape[2]
    if heads % kv_heads:
        raise ValueError(f"query must have a multiple of the {kv_heads} heads of key_cache, got {heads}")
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.stride(1) != 1:
        raise ValueError(
            f"block_table must be contiguous, of shape ({batch}, max_pages), got {tuple(block_table.shape)}"
        )
    if indices.shape[:3] not in ((batch, 1, 1), (batch, kv_heads, 1)) or indices.dim() != 4:
        raise ValueError(
            f"indices must have the shape ({batch}, 1 or {kv_heads}, 1, max_selected), got {tuple(indices.shape)}"
        )
    if counts.shape != indices.shape[:3]:
        raise ValueError(f"counts must have the shape {tuple(indices.shape[:3])}, got {tuple(counts.shape)}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have the shape ({batch},), got {tuple(lengths.shape)}")
    reason = unsupported(query, key_cache, value_cache, block_size)
    if reason is not None:
        raise ValueError(reason)
