"""Selection: the key blocks that each query block reads."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sketch_walk.config import SketchWalkConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# A share of exactly `mass` must not need one more block through rounding.
MASS_SLACK = 1e-6


class BlockSelection(NamedTuple):
    """A page table: the key blocks that each query block attends to.

    Parameters
    ----------
    indices : torch.Tensor
        int32, shape (batch, num_query_blocks, max_selected), or (batch, num_kv_heads, num_query_blocks, max_selected)
        when selections differ per key/value head. Ascending, the diagonal block last, -1 beyond `counts`.
    counts : torch.Tensor
        int32, the shape of `indices` without its last axis. 0 for a row without queries.
    """

    indices: Int[Tensor, "batch *heads rows max_selected"]
    counts: Int[Tensor, "batch *heads rows"]

    def per_head(self) -> BlockSelection:
        """The same with the head axis always there (size 1 when shared)."""
        if self.counts.dim() == 3:
            return self
        return BlockSelection(self.indices.unsqueeze(1), self.counts.unsqueeze(1))


class RowCounts(NamedTuple):
    """Per number of causal blocks (index 0 ... num_blocks): blocks to read, first ones and last ones forced."""

    budget: Int[Tensor, " blocks_plus_1"]
    sink: Int[Tensor, " blocks_plus_1"]
    local: Int[Tensor, " blocks_plus_1"]


def row_counts(config: SketchWalkConfig, num_blocks: int, device: torch.device) -> RowCounts:
    """Counts of rows with 0 ... `num_blocks` causal blocks."""
    return _row_counts(config, num_blocks, device)


@lru_cache(maxsize=256)
def _row_counts(config: SketchWalkConfig, num_blocks: int, device: torch.device) -> RowCounts:
    available = range(num_blocks + 1)
    columns = ([count(n) for n in available] for count in (config.budget, config.sink_count, config.local_count))
    with torch.inference_mode(False):
        return RowCounts(*(torch.tensor(column, dtype=torch.int64, device=device) for column in columns))


def select_blocks(
    scores: Float[Tensor, "batch selections rows blocks"],
    row_index: Int[Tensor, "batch rows"],
    has_queries: Bool[Tensor, "batch rows"],
    config: SketchWalkConfig,
    *,
    dense_rows: Bool[Tensor, "batch rows"] | None = None,
    available: Int[Tensor, "batch rows"] | None = None,
    allowed: Bool[Tensor, "batch rows blocks"] | None = None,
) -> BlockSelection:
    """Rows of R -> page table.

    A row of `available` causal blocks keeps ``min(available, budget)``: the diagonal and the other local blocks first,
    then the sink blocks from the first on, then the highest scores, ties to the nearer block. Deterministic.

    Parameters
    ----------
    scores : torch.Tensor
        Rows of R (or any scores that are compared within a row only).
    row_index : torch.Tensor
        Block of each row.
    has_queries : torch.Tensor
        False for rows that pad the batch: they select nothing.
    dense_rows : torch.Tensor, optional
        Rows that keep every causal block (`dense_tail_blocks`).
    available : torch.Tensor, optional
        Blocks a row may read; default ``row_index + 1`` (causal).
    allowed : torch.Tensor, optional
        Blocks in which a mask leaves something to see; the others are taken last.

    Returns
    -------
    BlockSelection
        With a head axis only if `selections` is above 1 and the config selects per key/value head.
    """
    num_blocks, device = scores.shape[-1], scores.device
    if available is None:
        available = row_index + 1
    counts = row_counts(config, num_blocks, device)
    available = torch.where(has_queries, available, 0).clamp(0, num_blocks)
    block = torch.arange(num_blocks, device=device)
    causal = block < available[..., None]
    local = (block > (row_index - counts.local[available])[..., None]) & (block <= row_index[..., None]) & causal
    sink = (block < counts.sink[available][..., None]) & causal

    largest = torch.finfo(scores.dtype).max
    rank = scores.nan_to_num(nan=0.0, posinf=largest, neginf=-1.0)
    if allowed is not None:
        rank = torch.where(allowed[:, None], rank, -1.0)
    # Above every score, the first block highest: a budget below the sinks keeps the first of them.
    first_highest = largest * (1 - block.to(scores.dtype) / (2 * max(1, num_blocks)))
    rank = torch.where(sink[:, None], first_highest, rank).masked_fill(local[:, None], torch.inf)
    rank = rank.masked_fill(~causal[:, None], -torch.inf)
    # Flipped, a stable descending sort puts the nearer of two equal blocks first.
    order = num_blocks - 1 - rank.flip(-1).argsort(dim=-1, descending=True, stable=True)

    wanted = counts.budget[available][:, None].expand(scores.shape[:-1])
    if config.mass is not None:
        wanted = torch.maximum(wanted, _mass_count(scores, order, causal, config.mass))
    if dense_rows is not None:
        wanted = torch.where(dense_rows[:, None], available[:, None], wanted)
    wanted = torch.minimum(wanted, available[:, None])

    width = num_blocks if torch.compiler.is_compiling() else int(wanted.max()) if wanted.numel() else 0
    if torch.compiler.is_compiling() and config.mass is None and dense_rows is None:
        width = config.budget(num_blocks)  # budgets never shrink as rows grow
    keep = torch.arange(width, device=device) < wanted[..., None]
    chosen = torch.where(keep, order[..., :width], num_blocks).sort(-1).values
    indices = torch.where(chosen < num_blocks, chosen, -1).to(torch.int32)
    if config.head_mode == "per_kv_head":
        return BlockSelection(indices, wanted.to(torch.int32))
    return BlockSelection(indices[:, 0], wanted[:, 0].to(torch.int32))


def _mass_count(
    scores: Float[Tensor, "batch selections rows blocks"],
    order: Int[Tensor, "batch selections rows blocks"],
    causal: Bool[Tensor, "batch rows blocks"],
    mass: float,
) -> Int[Tensor, "batch selections rows"]:
    """Blocks, in the order of choice, whose share of the row's scores reaches `mass`."""
    share = torch.where(causal[:, None], scores.clamp(min=0.0), 0.0).double()
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    reached = share.gather(-1, order).cumsum(-1)
    return (reached < mass - MASS_SLACK).sum(-1) + 1


def block_density(selection: BlockSelection, row_index: Int[Tensor, "batch rows"]) -> float:
    """Fraction of causal key blocks that are read, the diagonal counted whole. Reads the device (synchronises)."""
    counts = selection.per_head().counts
    causal = torch.where(counts > 0, (row_index + 1)[:, None], 0)
    return (counts.sum() / causal.sum().clamp(min=1)).item()


def pair_density(
    selection: BlockSelection,
    row_index: Int[Tensor, "batch rows"],
    past: Int[Tensor, " batch"],
    length: Int[Tensor, " batch"],
    block_size: int,
) -> float:
    """Fraction of causal (query, key) token pairs that are read. Reads the device (synchronises).

    The diagonal block counts only its causal pairs. `past` and `length` are the real tokens before the call and after
    it.
    """
    counts = selection.per_head().counts
    first = torch.maximum(row_index * block_size, past[:, None])
    last = torch.minimum((row_index + 1) * block_size, length[:, None])
    queries = (last - first).clamp(min=0)
    # Sum over the row's queries of the keys in the diagonal block that each may see.
    inside = (first % block_size + 1) * queries + queries * (queries - 1) // 2
    whole = (counts - 1).clamp(min=0) * block_size * queries[:, None] + inside[:, None] * (counts > 0)
    causal = row_index * block_size * queries + inside
    return (whole.sum() / (causal.sum() * counts.shape[1]).clamp(min=1)).item()
