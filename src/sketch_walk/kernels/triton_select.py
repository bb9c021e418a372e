"""Stage 5 in Triton: rows of scores -> page table, without a sort and without host synchronisation.

`selection.select_blocks` ranks blocks by a number; here that number is an int32 (`_ranks`), and the choice is the cut
between the k-th greatest rank and the next. The cut is bisected with several thresholds at once, and the search ends as
soon as exactly k ranks lie above one. Blocks that tie at the cut are dropped from the left, so the nearer one stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_walk.kernels.step_memory import StepMemory
from sketch_walk.kernels.triton_tiles import (
    Device,
    await_previous,
    dependent,
    device_of,
    next_power_of_2,
    overlaps,
    release_next,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# A row is one vector in registers, and two counts share 32 bits.
MAX_BLOCKS = 32768
# Programs that share the heads of one sequence's decode step at most, and the fewest heads worth a program.
MOST_PARTS = 8
LEAST_PART_HEADS = 4
# Peaks that one program holds at once.
TILE_PEAKS = 8192

# Ranks: no block of the row, then scores as ordered integers, then sinks (the first block highest), then local blocks.
NO_RANK = tl.constexpr(-(2**31))
GREATEST_SCORE = tl.constexpr(0x7F7FFFFF)
FIRST_SINK = tl.constexpr(0x7FFFFFFE)
LOCAL = tl.constexpr(0x7FFFFFFF)
BEYOND = tl.constexpr(2**31)
FINITE = tl.constexpr(-1.0e30)
# Blocks that loads come in.
ALIGNED = tl.constexpr(16)


class SelectedRows(NamedTuple):
    """A `BlockSelection` with its head axis always there.

    Parameters
    ----------
    indices : torch.Tensor
        int32, shape (batch, selections, rows, width): ascending, the diagonal block last, -1 beyond `counts`.
    counts : torch.Tensor
        int32, shape (batch, selections, rows).
    """

    indices: Int[Tensor, "batch selections rows width"]
    counts: Int[Tensor, "batch selections rows"]


class ScoredRows(NamedTuple):
    """A decode step's block scores, float32 of shape (batch, selections, 1, blocks), and what they select."""

    scores: Float[Tensor, "batch selections 1 blocks"]
    indices: Int[Tensor, "batch selections 1 width"]
    counts: Int[Tensor, "batch selections 1"]


class SelectLaunch(NamedTuple):
    """How a row is cut: thresholds compared at once (a power of two), and warps of a program."""

    thresholds: int
    num_warps: int


def select_launch(columns: int, programs: int, device: Device) -> SelectLaunch:
    """Parameters for `programs` rows of `columns` blocks (a power of two).

    Rows that fill the device take one threshold per step, the fewest comparisons; a few rows take four and twice the
    warps, for fewer steps one after the other.
    """
    few = programs < 2 * device.processors
    warps = min(16, max(1, columns // (256 if few else 512)))
    return SelectLaunch(4 if few and columns <= 4096 else 1, warps)


def unsupported(scores: Tensor) -> str | None:
    """None if the kernels take these scores or peaks, else the reason why not."""
    if scores.dtype != torch.float32:
        return f"scores must be float32, got {scores.dtype}"
    if scores.shape[-1] > MAX_BLOCKS:
        return f"scores must have at most {MAX_BLOCKS} blocks, got {scores.shape[-1]}"
    if scores.shape[-1] > 1 and scores.stride(-1) != 1:
        return f"scores must be contiguous in their last axis, got a stride of {scores.stride(-1)}"
    return None


@triton.jit
def _ranks(scores, column, row, available, sink, local):
    """Order of choice [COLUMNS] as int32: greater is chosen first, equal ones from the right."""
    scores = tl.where(scores != scores, 0.0, scores)
    scores = tl.where(scores == float("-inf"), -1.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    # -0.0 ties with 0.0; below 0 a greater magnitude is less.
    bits = tl.where(bits == NO_RANK, 0, bits)
    rank = tl.minimum(tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), GREATEST_SCORE)
    rank = tl.where(column < sink, FIRST_SINK - column, rank)
    rank = tl.where((column > row - local) & (column <= row), LOCAL, rank)
    return tl.where(column < available, rank, NO_RANK)


@triton.jit
def _cut(rank, available, forced, wanted, THRESHOLDS: tl.constexpr):
    """A rank and how many ranks are no less: `wanted`, or more if the surplus all equals it.

    The search starts between the least and the greatest rank of a score, which takes fewer steps than from all of
    int32; where no score is `wanted`, among the ranks of the `forced` blocks.
    """
    part = tl.arange(0, THRESHOLDS) + 1
    scored = (rank > NO_RANK) & (rank <= GREATEST_SCORE)
    among = wanted > forced
    least = tl.min(tl.where(scored, rank, GREATEST_SCORE), 0).to(tl.int64)
    greatest = tl.max(tl.where(scored, rank, NO_RANK), 0).to(tl.int64)
    low = tl.where(among, least, GREATEST_SCORE + 1)
    high = tl.where(among, greatest + 1, BEYOND)
    reached = tl.where(among, available, forced)
    candidates = rank[:, None]
    while (high - low > 1) & (reached > wanted):
        gap = high - low
        threshold = (low + gap * part // (THRESHOLDS + 1)).to(tl.int32)
        count = tl.sum((candidates >= threshold[None, :]).to(tl.int32), 0)
        # The least count that is enough and, in the last digits, how far its threshold lies from the last.
        counted = tl.where(count >= wanted, count * (2 * THRESHOLDS) + THRESHOLDS - part, BEYOND - 1)
        best = tl.minimum(tl.min(counted, 0), reached * (2 * THRESHOLDS) + THRESHOLDS)
        reached = (best // (2 * THRESHOLDS)).to(tl.int32)
        passed = THRESHOLDS - best % (2 * THRESHOLDS)
        # `passed` thresholds are no greater than the cut. Both ends from the same old interval.
        high = low + gap * (passed + 1) // (THRESHOLDS + 1)
        low += gap * passed // (THRESHOLDS + 1)
    return low.to(tl.int32), reached


@triton.jit
def _limits(budget, sink, local, available):
    """Blocks that a row of `available` blocks reads, and first and last ones forced among them."""
    read = tl.load(budget + available).to(tl.int32)
    return read, tl.load(sink + available).to(tl.int32), tl.load(local + available).to(tl.int32)


@triton.jit
def _choose(
    scores, column, row, available, read, first, last, indices, counts, width, dense,
    THRESHOLDS: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Writes one row of the page table, at `indices` and `counts`, from its scores [COLUMNS]; all of it if `dense`."""
    wanted = tl.minimum(tl.minimum(tl.where(dense, available, read), available), width)
    rank = _ranks(scores, column, row, available, first, last)
    # Sinks, and local blocks from row - last + 1 on that are none.
    sinks = tl.minimum(first, available)
    forced = sinks + tl.maximum(available - tl.maximum(row - last + 1, sinks), 0)
    low, reached = _cut(rank, available, forced, wanted, THRESHOLDS)
    surplus = reached - wanted
    taken = rank >= low
    tie = rank == low
    # Two running counts in one scan: of the blocks taken, and of the ties among them.
    running = tl.cumsum(taken.to(tl.int32) + (tie.to(tl.int32) << 16), 0)
    ties = (running >> 16) & 0xFFFF
    place = (running & 0xFFFF) - tl.minimum(ties, surplus) - 1
    tl.store(indices + place, column, mask=taken & ((ties > surplus) | (rank > low)))
    rest = tl.arange(0, FILL)
    tl.store(indices + rest, tl.full([FILL], -1, tl.int32), mask=(rest >= wanted) & (rest < width))
    tl.store(counts, wanted)


@triton.jit
def _last_row(length, sequence, num_blocks, BLOCK: tl.constexpr):
    """The block of a sequence's last token, and how many blocks it may read."""
    end = tl.load(length + sequence)
    row = (tl.maximum(end - 1, 0) // BLOCK).to(tl.int32)
    return row, tl.where(end > 0, tl.minimum(row + 1, num_blocks), 0)


@triton.jit
def _loaded(available, num_blocks):
    """How many blocks of a row are loaded: at least the `available` ones, in steps that let a thread load several at
    once, which a mask of any other number forbids.
    """
    return tl.minimum((available + ALIGNED - 1) // ALIGNED * ALIGNED, num_blocks)


@triton.jit
def _claims(memory, shared, column, available, num_blocks, rank, fade, ahead, across):
    """Scores [COLUMNS] that blocks claim for what is remembered of them at a `rank`: `StepMemory.claims`."""
    loaded = column < _loaded(available, num_blocks)
    own = tl.load(memory + column, mask=loaded, other=float("-inf"))
    before = tl.load(memory + column - 1, mask=(column < available) & (column > 1), other=float("-inf"))
    anywhere = tl.load(shared + column, mask=loaded, other=float("-inf"))
    rank = rank.to(tl.float32)
    claims = tl.maximum((own - rank) * fade, (before - rank) * fade + ahead)
    claims = tl.maximum(claims, (anywhere - rank) * fade + across)
    return tl.where(column < available, tl.exp2(claims), 0.0)


@triton.jit(do_not_specialize=["width"])
def _select(
    scores, past, length, budget, sink, local, best, indices, counts, memory, shared,
    s_batch, s_selection, s_row, s_part, m_batch, m_selection, m_shared,
    num_rows, num_selections, num_blocks, width, tail, fade, ahead, across,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, THRESHOLDS: tl.constexpr, FILL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row of scores; with several PARTS, the last row of a sequence, whose scores are the greatest of the parts.

    PDL: the kernel in front is `_from_peaks`, which writes the parts alone.
    """
    index = num_rows - 1 - tl.program_id(0)
    selection, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if past is None:
        row, available = _last_row(length, sequence, num_blocks, BLOCK)
    else:
        at = tl.load(past + sequence) // BLOCK + index
        row = at.to(tl.int32)
        available = tl.where(at * BLOCK < tl.load(length + sequence), tl.minimum(row + 1, num_blocks), 0)
    column = tl.arange(0, COLUMNS)
    read, first_forced, last_forced = _limits(budget, sink, local, available)
    if memory is not None:
        memory += sequence * m_batch + selection.to(tl.int64) * m_selection
        shared += sequence * m_shared
        rank = tl.load(length + sequence) - 1
        claimed = _claims(memory, shared, column, available, num_blocks, rank, fade, ahead, across)
    await_previous(PDL)
    release_next(PDL)
    scores += sequence * s_batch + selection.to(tl.int64) * s_selection + index.to(tl.int64) * s_row
    loaded = column < _loaded(available, num_blocks)
    values = tl.load(scores + column, mask=loaded, other=0.0)
    if COLUMNS <= 4096:
        # All loads in flight at once; longer rows have no registers for that.
        for part in tl.static_range(1, PARTS):
            values = tl.maximum(values, tl.load(scores + part * s_part + column, mask=loaded, other=0.0))
    else:
        for part in range(1, PARTS):
            values = tl.maximum(values, tl.load(scores + part * s_part + column, mask=loaded, other=0.0))
    if memory is not None:
        values = tl.maximum(values, claimed)
    place = (sequence * num_selections + selection) * num_rows + index
    if PARTS > 1:
        tl.store(best + place * num_blocks + column, values, mask=column < num_blocks)
    _choose(
        values, column, row, available, read, first_forced, last_forced, indices + place * width, counts + place,
        width, row > ((tl.load(length + sequence) - 1) // BLOCK).to(tl.int32) - tail, THRESHOLDS, FILL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["width"])
def _from_peaks(
    peaks, length, budget, sink, local, best, indices, counts, memory, shared,
    p_batch, p_head, m_batch, m_selection, m_shared,
    num_blocks, width, fade, ahead, across,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, PART_HEADS: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, THRESHOLDS: tl.constexpr, FILL: tl.constexpr, CHOOSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each block's greatest share over PART_HEADS of a selection's HEADS heads, and the selection if asked to CHOOSE.

    Without a `length` every block is read. PDL: the kernel in front is `_decode_peaks`, which writes the peaks alone.
    """
    part, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, available = num_blocks - 1, num_blocks
    if length is not None:
        row, available = _last_row(length, sequence, num_blocks, BLOCK)
    selection = part // PARTS
    first = selection * HEADS + (part % PARTS) * PART_HEADS
    end = tl.minimum(first + PART_HEADS, (selection + 1) * HEADS)
    column = tl.arange(0, COLUMNS)
    values = tl.zeros([COLUMNS], tl.float32)
    if CHOOSE:
        read, first_forced, last_forced = _limits(budget, sink, local, available)
        if memory is not None:
            memory += sequence * m_batch + selection.to(tl.int64) * m_selection
            shared += sequence * m_shared
            rank = tl.load(length + sequence) - 1
            claimed = _claims(memory, shared, column, available, num_blocks, rank, fade, ahead, across)
    await_previous(PDL)
    release_next(PDL)
    for at in range(first, end, TILE):
        head = at + tl.arange(0, TILE)
        offsets = sequence * p_batch + head.to(tl.int64)[:, None] * p_head + column[None, :]
        loaded = (head < end)[:, None] & (column < _loaded(available, num_blocks))[None, :]
        tile = tl.load(peaks + offsets, mask=loaded, other=float("-inf"))
        tile = tl.where((column < available)[None, :], tile, float("-inf"))
        weight = tl.exp2(tile - tl.maximum(tl.max(tile, 1), FINITE)[:, None])
        total = tl.sum(weight, 1)
        share = weight * (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
        values = tl.maximum(values, tl.max(share, 0))
    if CHOOSE and (memory is not None):
        values = tl.maximum(values, claimed)
    place = sequence * tl.num_programs(0) + part
    tl.store(best + place * num_blocks + column, values, mask=column < num_blocks)
    if CHOOSE:
        _choose(
            values, column, row, available, read, first_forced, last_forced, indices + place * width, counts + place,
            width, False, THRESHOLDS, FILL,
        )  # fmt: skip


def select_rows(
    scores: Float[Tensor, "batch selections rows blocks"],
    past: Int[Tensor, " batch"] | None,
    length: Int[Tensor, " batch"],
    budget: Int[Tensor, " blocks_plus_1"],
    sink: Int[Tensor, " blocks_plus_1"],
    local: Int[Tensor, " blocks_plus_1"],
    *,
    width: int,
    block_size: int,
    per_head: bool,
    tail: int = 0,
    launch: SelectLaunch | None = None,
) -> SelectedRows:
    """As `selection.select_blocks`, causal, without a mask or `mass`.

    Parameters
    ----------
    scores : torch.Tensor
        float32, contiguous in the last axis. Compared within a row only; NaN counts as 0.
    past : torch.Tensor
        int64: tokens before the rows' own; row r of a sequence is its block past // block_size + r. None: the one row
        is that of the last token.
    length : torch.Tensor
        int64: tokens of each sequence; a row that starts beyond them selects nothing.
    budget, sink, local : torch.Tensor
        int64: `selection.row_counts` of the config for these blocks.
    width : int
        Columns of the page table: the greatest budget. A greater budget is cut to it.
    block_size : int
        Tokens of a block.
    per_head : bool
        Whether `scores` may have more than one selection.
    tail : int
        Last blocks of each sequence whose rows read everything; `width` then counts all blocks.
    launch : SelectLaunch, optional
        Default: `select_launch`.

    Returns
    -------
    SelectedRows
        The same on every run. No host synchronisation: capturable in a CUDA graph.

    Raises
    ------
    ValueError
        For scores that the kernel does not take, or counts or a width that do not fit; the message names the argument.
    """
    if scores.dim() != 4 or not (per_head or scores.shape[1] == 1):
        raise ValueError(
            f"scores must have the shape (batch, {'selections' if per_head else '1'}, rows, blocks), "
            f"got {tuple(scores.shape)}"
        )
    _check(scores, budget, sink, local, width)
    batch, selections, rows, blocks = scores.shape
    table, counts = _page_table(scores, rows, selections, width)
    if counts.numel():
        columns = next_power_of_2(blocks)
        launch = launch or select_launch(columns, counts.numel(), device_of(scores.device))
        _select[(rows, selections, batch)](
            scores, past, length, budget, sink, local, None, table, counts, None, None,
            *scores.stride()[:3], 0, 0, 0, 0, rows, selections, blocks, width, tail, 0.0, 0.0, 0.0,
            BLOCK=block_size, PARTS=1, COLUMNS=columns, THRESHOLDS=launch.thresholds,
            FILL=next_power_of_2(width), PDL=False, num_warps=launch.num_warps,
        )  # fmt: skip
    return SelectedRows(table, counts)


def select_from_peaks(
    peaks: Float[Tensor, "batch heads blocks"],
    length: Int[Tensor, " batch"],
    budget: Int[Tensor, " blocks_plus_1"],
    sink: Int[Tensor, " blocks_plus_1"],
    local: Int[Tensor, " blocks_plus_1"],
    *,
    width: int,
    block_size: int,
    kv_heads: int,
    per_head: bool,
    memory: StepMemory | None = None,
    part_heads: int | None = None,
    after_peaks: bool = False,
    launch: SelectLaunch | None = None,
) -> ScoredRows:
    """Scores and selection of one decode step from each head's logit of each block.

    A head's share of a block is exp2(peak) over the sum of exp2(peak) of its blocks; a block scores the greatest share
    over all heads, or over those of one key/value head.

    Parameters
    ----------
    peaks : torch.Tensor
        float32, in units of log 2, -inf where a block holds no key. Blocks beyond the last token's are not read.
    length : torch.Tensor
        int64: tokens of each sequence. The row is that of the last one; a length of 0 selects nothing.
    budget, sink, local, width, block_size
        As `select_rows`.
    kv_heads : int
        Key/value heads; it divides the heads of `peaks`.
    per_head : bool
        One selection per key/value head instead of one for all heads.
    memory : StepMemory, optional
        With `sketch_walk.memory.recall`, of at least as many slots as blocks.
    part_heads : int, optional
        Heads of one program. At or above the heads of a selection one launch does everything; below, a second one takes
        the greatest of the parts and chooses. Default: `split_heads`.
    after_peaks : bool
        The kernel in front is that of `triton_peaks.decode_peaks` with `after_step`, and made these peaks; the first
        launch may then start before that has ended.
    launch : SelectLaunch, optional
        Default: `select_launch`.

    Returns
    -------
    ScoredRows
        `selections` is `kv_heads` if `per_head`, else 1. Scores are 0 beyond the last token's block. No host
        synchronisation: capturable in a CUDA graph.

    Raises
    ------
    ValueError
        As `select_rows`, and for `kv_heads` that do not divide the heads.
    """
    shape = _parts(peaks, kv_heads, per_head, part_heads)
    _check(peaks, budget, sink, local, width)
    held: tuple[Tensor | None, ...] = (None, None)
    strides, claims = (0, 0, 0), (0.0, 0.0, 0.0)
    if memory is not None:
        held, claims = (memory.own, memory.shared), memory.claims
        strides = (memory.own.stride(0), memory.own.stride(1), memory.shared.stride(0))
    batch, blocks, selections, parts = peaks.shape[0], peaks.shape[2], shape.selections, shape.parts
    scores = peaks.new_empty(batch, selections, 1, blocks)
    table, counts = _page_table(peaks, 1, selections, width)
    if not counts.numel():
        return ScoredRows(scores, table, counts)
    columns = next_power_of_2(blocks)
    launch = launch or select_launch(columns, counts.numel(), device_of(peaks.device))
    shares = scores if parts == 1 else peaks.new_empty(batch, selections, parts, blocks)
    pdl = dependent(after_peaks and overlaps(peaks.device, batch * kv_heads))
    common = {
        "BLOCK": block_size, "PARTS": parts, "COLUMNS": columns, "THRESHOLDS": launch.thresholds,
        "FILL": next_power_of_2(width),
    }  # fmt: skip
    _from_peaks[(selections * parts, batch)](
        peaks, length, budget, sink, local, shares, table, counts, *held,
        *peaks.stride()[:2], *strides, blocks, width, *claims,
        HEADS=shape.heads, PART_HEADS=shape.part_heads, TILE=shape.tile, CHOOSE=parts == 1, **common,
        num_warps=max(shape.num_warps, launch.num_warps if parts == 1 else 1), **pdl,
    )  # fmt: skip
    if parts > 1:
        _select[(1, selections, batch)](
            shares, None, length, budget, sink, local, scores, table, counts, *held,
            *shares.stride()[:2], 0, shares.stride(2), *strides, 1, selections, blocks, width, 0, *claims,
            **common, num_warps=launch.num_warps, **pdl,
        )  # fmt: skip
    return ScoredRows(scores, table, counts)


def scores_from_peaks(
    peaks: Float[Tensor, "batch heads blocks"], *, kv_heads: int, per_head: bool, part_heads: int | None = None
) -> Float[Tensor, "batch selections 1 blocks"]:
    """The scores of `select_from_peaks` alone, for a step with a walk between scores and selection.

    Every block is read: `peaks` must be -inf where a block holds no key.

    Raises
    ------
    ValueError
        As `select_from_peaks`.
    """
    shape = _parts(peaks, kv_heads, per_head, part_heads)
    _check_scores(peaks)
    batch, blocks = peaks.shape[0], peaks.shape[2]
    shares = peaks.new_empty(batch, shape.selections, shape.parts, blocks)
    if shares.numel():
        _from_peaks[(shape.selections * shape.parts, batch)](
            peaks, None, None, None, None, shares, None, None, None, None,
            *peaks.stride()[:2], 0, 0, 0, blocks, 0, 0.0, 0.0, 0.0,
            BLOCK=0, HEADS=shape.heads, PARTS=shape.parts, PART_HEADS=shape.part_heads, TILE=shape.tile,
            COLUMNS=next_power_of_2(blocks), THRESHOLDS=1, FILL=1, CHOOSE=False, PDL=False,
            num_warps=shape.num_warps,
        )  # fmt: skip
    return shares if shape.parts == 1 else shares.amax(2, keepdim=True)


class _Parts(NamedTuple):
    """How the heads of a decode step are shared out among programs."""

    selections: int
    heads: int
    part_heads: int
    parts: int
    tile: int
    num_warps: int


def _parts(peaks: Tensor, kv_heads: int, per_head: bool, part_heads: int | None) -> _Parts:
    if peaks.dim() != 3:
        raise ValueError(f"peaks must have the shape (batch, heads, blocks), got {tuple(peaks.shape)}")
    _, num_heads, blocks = peaks.shape
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"kv_heads must divide the {num_heads} heads of peaks, got {kv_heads}")
    selections = kv_heads if per_head else 1
    heads = num_heads // selections
    columns = next_power_of_2(blocks)
    part_heads = split_heads(heads, columns) if part_heads is None else min(heads, max(1, part_heads))
    tile = max(1, min(next_power_of_2(part_heads), TILE_PEAKS // columns))
    warps = min(16, max(1, tile * columns // 1024))
    return _Parts(selections, heads, part_heads, -(-heads // part_heads), tile, warps)


def split_heads(heads: int, columns: int) -> int:
    """Heads of one program in a decode step over rows of `columns` blocks (a power of two).

    One program reads a row's 32 x 2,048 peaks too slowly alone; what one tile holds needs no second launch.
    """
    if next_power_of_2(heads) * columns <= TILE_PEAKS:
        return heads
    return min(heads, max(LEAST_PART_HEADS, -(-heads // MOST_PARTS)))


def _page_table(scores: Tensor, rows: int, selections: int, width: int) -> SelectedRows:
    """Where the kernels write: every element of both."""
    counts = torch.empty(scores.shape[0], selections, rows, dtype=torch.int32, device=scores.device)
    return SelectedRows(torch.empty(*counts.shape, width, dtype=torch.int32, device=scores.device), counts)


def _check_scores(scores: Tensor) -> None:
    reason = unsupported(scores)
    if reason is not None:
        raise ValueError(reason)


def _check(scores: Tensor, budget: Tensor, sink: Tensor, local: Tensor, width: int) -> None:
    _check_scores(scores)
    blocks = scores.shape[-1]
    for name, counts in (("budget", budget), ("sink", sink), ("local", local)):
        if counts.shape != (blocks + 1,) or not counts.is_contiguous():
            raise ValueError(f"{name} must be contiguous, of shape ({blocks + 1},), got {tuple(counts.shape)}")
    if width < 1 or blocks < 1:
        raise ValueError(f"width and the number of blocks must be at least 1, got {width} and {blocks}")
