"""Query blocks of one call in runs, so that scores over every token never need a tensor of queries by keys.

Shared by the oracle, the baselines and the recall instruments. Sequences of one length without padding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout, make_layout, slice_bytes

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped


class QueryRows(NamedTuple):
    """A run of query blocks.

    Parameters
    ----------
    start, stop : int
        Rows of the call: its `start`-th to its (`stop` - 1)-th query block.
    first_block : int
        Block of the sequence that row `start` is.
    queries : torch.Tensor
        Shape (batch, heads, rows, width, head_dim), float32 (or float64), 0 where a block's token is not of this call.
        `width` is the block size, or 1 in a call of a single query.
    rank : torch.Tensor
        Shape (rows, width), int64: position of each query in its sequence.
    real : torch.Tensor
        Shape (rows, width): True where the token is a query of this call.
    """

    start: int
    stop: int
    first_block: int
    queries: Float[Tensor, "batch heads rows width head_dim"]
    rank: Int[Tensor, "rows width"]
    real: Bool[Tensor, "rows width"]

    @property
    def block(self) -> Int[Tensor, " rows"]:
        """Block of each row."""
        count = self.stop - self.start
        return torch.arange(self.first_block, self.first_block + count, device=self.rank.device)


def resolve_call(query: Tensor, key: Tensor, layout: Layout | None, scale: float | None) -> tuple[Layout, float]:
    """The given layout and scale, or those of attention over the last tokens of an unpadded sequence."""
    layout = make_layout(query.shape[0], query.shape[2], key.shape[2], query.device) if layout is None else layout
    return layout, 1.0 / math.sqrt(query.shape[3]) if scale is None else scale


def call_span(layout: Layout) -> tuple[int, int]:
    """Tokens of every sequence before the call, and with it.

    Raises
    ------
    ValueError
        If the batch is padded, or the call runs inside a compiled graph.
    """
    if layout.bounds is None:
        raise ValueError("layout has no lengths on the host: instruments do not run inside a compiled graph")
    if layout.key_index is not None or len(set(layout.bounds)) != 1:
        raise ValueError("layout is of a padded batch: instruments take sequences of one length without padding")
    return layout.bounds[0]


def each_rows(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    layout: Layout,
    block_size: int,
    bytes_per_pair: float,
) -> Iterator[QueryRows]:
    """Runs of query blocks, in order.

    Parameters
    ----------
    bytes_per_pair : float
        Bytes that a query and a key that it sees will need together, for all heads and sequences.

    Raises
    ------
    ValueError
        As `call_span`.
    """
    past, length = call_span(layout)
    first, rows = past // block_size, layout.num_query_blocks(block_size)
    width = 1 if layout.num_queries == 1 else block_size
    room = slice_bytes(query, query)
    lo = 0
    while lo < rows:
        # Later rows see more: a run is sized by its own last row, whose count is at most doubled by the run itself.
        seen = min(length, 2 * (first + lo + 1) * block_size)
        hi = min(rows, lo + max(1, min(first + lo + 1, int(room / (width * seen * bytes_per_pair)))))
        yield _take_rows(query, past, length, first, lo, hi, width, block_size)
        lo = hi


def _take_rows(
    query: Tensor, past: int, length: int, first: int, lo: int, hi: int, width: int, block_size: int
) -> QueryRows:
    begin = past if width == 1 else (first + lo) * block_size
    end = begin + (hi - lo) * width
    start, stop = max(past, begin), min(length, end)
    taken = query[:, :, start - past : stop - past]
    taken = taken.to(torch.promote_types(taken.dtype, torch.float32))
    queries = F.pad(taken, (0, 0, start - begin, end - stop)).unflatten(2, (hi - lo, width))
    rank = torch.arange(begin, end, device=query.device).view(hi - lo, width)
    return QueryRows(lo, hi, first + lo, queries, rank, (rank >= start) & (rank < stop))


def collect_scores(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    kv_heads: int,
    config: SketchWalkConfig,
    layout: Layout,
    reduce: str,
    bytes_per_pair: float,
    score_rows: Callable[[QueryRows], Float[Tensor, "batch heads rows visible"]],
) -> Float[Tensor, "batch selections rows blocks"]:
    """Scores of all query blocks from scores per head of a run of them, reduced over heads by `reduce`.

    `score_rows` may leave out key blocks after the last one that its rows see.
    """
    blocks = -(-layout.max_length // config.block_size)
    selections = kv_heads if config.head_mode == "per_kv_head" else 1
    shape = (query.shape[0], selections, layout.num_query_blocks(config.block_size), blocks)
    scores = torch.zeros(shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    for rows in each_rows(query, layout, config.block_size, bytes_per_pair):
        by_head = score_rows(rows)
        grouped = by_head.unflatten(1, (selections, -1))
        reduced = grouped.amax(2) if reduce == "max" else grouped.mean(2)
        scores[:, :, rows.start : rows.stop, : by_head.shape[-1]] = reduced
    return scores


def over_queries(
    values: Float[Tensor, "batch heads rows width blocks"], real: Bool[Tensor, "rows width"], reduce: str
) -> Float[Tensor, "batch heads rows blocks"]:
    """Greatest or mean value over a row's real queries."""
    kept = torch.where(real[:, :, None], values, 0.0)
    return kept.amax(3) if reduce == "max" else kept.sum(3) / real.sum(1)[:, None]
