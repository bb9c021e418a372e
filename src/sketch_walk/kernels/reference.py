"""The specification of stage 6, in torch, on any device: gather the selected blocks, attend to them exactly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sketch_walk.kernels.step_memory import StepMemory
from sketch_walk.layout import Layout, slice_bytes, take_tokens

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

# Blocks averaged at a time for the mean correction, to bound the copies of their keys and values.
MEAN_RUN = 16


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
    causal: bool = True,
    bias: Float[Tensor, "batch one_or_heads num_queries num_keys"] | None = None,
    mean_correction: bool = False,
    memory: StepMemory | None = None,
) -> Shaped[Tensor, "batch heads num_queries head_dim"]:
    """Exact softmax attention of each query block over its selected key blocks, causal inside the diagonal block.

    Parameters
    ----------
    indices, counts : torch.Tensor
        A `BlockSelection` with its head axis (size 1 or kv_heads).
    bias : torch.Tensor, optional
        Added to the logits, -inf to hide.
    mean_correction : bool
        Each causal block that is not selected stands in as its mean key and value, log(count) added to its logit.
    memory : StepMemory, optional
        For one query per sequence: the share of attention that each block it reads gets, among those, in the head that
        gives most, is noted where that is a later stamp than the slot holds. A query that is padding notes nothing.

    Returns
    -------
    torch.Tensor
        Like `query`; 0 where a query is padding or sees nothing. Differentiable in query, key and value.

    Notes
    -----
    Query blocks are worked in slices of `slice_bytes` of gathered keys and values.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    group, selections, num_rows = heads // kv_heads, indices.shape[1], indices.shape[2]
    device = query.device
    width = 1 if num_queries == 1 else block_size
    within = torch.arange(block_size, device=device)
    first = layout.first_block(block_size)
    means = _block_means(key, value, layout, block_size) if mean_correction else None

    # One spare row takes the results of padding.
    rows_out = query.new_zeros(batch * num_queries * heads + 1, value_dim)
    widths = [indices.shape[3]] * num_rows if torch.compiler.is_compiling() else _widths(counts)
    per_key = kv_heads * (head_dim + value_dim)
    if selections > 1:
        # Each head then has a mask of its own, beside its boolean half-way.
        per_key += 2 * heads * width
    if mean_correction:
        # What is gathered is copied once more, with the means behind it.
        per_key *= 2
    room = slice_bytes(query, key, value) // max(1, batch * block_size * per_key * key.element_size())
    for lo, hi in _slices(widths, room):
        rows, blocks = hi - lo, max(1, *widths[lo:hi])
        block = indices[:, :, lo:hi, :blocks].transpose(1, 2).long()
        key_rank = (block[..., None] * block_size + within).flatten(3)
        key_real = (block >= 0).repeat_interleave(block_size, 3) & (key_rank < layout.length.view(-1, 1, 1, 1))
        key_at = layout.key_positions(key_rank.flatten(1)).view(key_rank.shape)
        keys = take_tokens(key, key_at).flatten(0, 1)
        values = take_tokens(value, key_at).flatten(0, 1)

        query_rank = _query_ranks(layout, first, lo, rows, width, block_size)
        slot = query_rank - layout.past.view(-1, 1, 1)
        query_real = (slot >= 0) & (query_rank < layout.length.view(-1, 1, 1))
        query_at = layout.query_positions(slot.flatten(1)).view(slot.shape)
        queries = take_tokens(query, query_at[:, :, None]).unflatten(2, (kv_heads, group))

        visible = key_real[:, :, :, None]
        if causal:
            visible = visible & (key_rank[:, :, :, None] <= query_rank[:, :, None, :, None])
        # Padding queries see everything, so that no softmax (and no gradient) is over nothing.
        visible = visible | ~query_real[:, :, None, :, None]
        mask = torch.zeros(visible.shape, dtype=query.dtype, device=device).masked_fill_(~visible, -math.inf)
        mask = mask[:, :, :, None].expand(-1, -1, -1, group, -1, -1)
        if bias is not None:
            mask = mask + _gathered_bias(bias, query_at, key_at, kv_heads, group).to(mask.dtype)
        if memory is not None:
            noted = torch.where(query_real[:, :, None], block, -1)
            _remember_shares(memory, queries, keys.unflatten(0, (batch, rows)), mask, noted, layout, scale)
        if means is not None:
            row_block = first[:, None] + torch.arange(lo, hi, device=device)
            extra = _mean_bias(block, row_block, layout, block_size, mask.dtype, causal)
            mask = torch.cat([mask, extra[:, :, :, None, None].expand(-1, -1, *mask.shape[2:5], -1)], -1)
            keys = torch.cat([keys, means[0].repeat_interleave(rows, 0)], 2)
            values = torch.cat([values, means[1].repeat_interleave(rows, 0)], 2)
        nothing = None
        if bias is not None:
            nothing = (mask == -math.inf).all(-1, keepdim=True)
            mask = mask.masked_fill(nothing, 0.0)

        result = F.scaled_dot_product_attention(
            queries.reshape(batch * rows, kv_heads, group * width, head_dim),
            keys,
            values,
            attn_mask=mask.reshape(batch * rows, mask.shape[2], group * width, -1),
            scale=scale,
        ).view(batch, rows, kv_heads, group, width, value_dim)
        if nothing is not None:
            result = result.masked_fill(nothing, 0.0)
        rows_out.index_copy_(
            0,
            _output_rows(query_at, query_real, num_queries, heads),
            result.flatten(2, 3).reshape(-1, value_dim),
        )
    return rows_out[:-1].view(batch, num_queries, heads, value_dim).transpose(1, 2)


def token_shares(
    query: Shaped[Tensor, "batch heads tokens head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    ranks: Int[Tensor, "batch tokens"],
    layout: Layout,
    *,
    block_size: int,
    scale: float,
) -> Float[Tensor, "batch heads tokens blocks"]:
    """Share of attention that a few tokens of a sequence give to each of its blocks.

    Parameters
    ----------
    ranks : torch.Tensor
        Of the tokens of `query`; a token sees the keys up to its own.

    Returns
    -------
    torch.Tensor
        float32, for every block of the longest sequence; 0 for tokens of a negative rank.
    """
    group, blocks = query.shape[1] // key.shape[1], -(-layout.max_length // block_size)
    shares = query.new_empty(*query.shape[:3], blocks, dtype=torch.float32)
    key_rank = torch.arange(blocks * block_size, device=query.device).expand(query.shape[0], -1)
    held = key_rank < layout.length[:, None]
    positions = layout.key_positions(key_rank)[:, None, None]
    # One head's keys at a time in a few runs, and some of the tokens: keys and logits of all could be as large as the
    # cache.
    some = max(1, slice_bytes(query, key) // (16 * max(1, len(query) * group * blocks * block_size)))
    run = max(block_size, -(-blocks * block_size // 4))
    for head in range(key.shape[1]):
        keys = key[:, head : head + 1]
        heads = slice(head * group, (head + 1) * group)
        for first in range(0, query.shape[2], some):
            tokens = slice(first, first + some)
            runs = [
                query[:, heads, tokens] @ take_tokens(keys, some_keys)[:, 0].mT for some_keys in positions.split(run, 3)
            ]
            logits = torch.cat(runs, 3).float() * scale
            visible = (held[:, None] & (key_rank[:, None] <= ranks[:, tokens, None]))[:, None]
            weights = logits.masked_fill_(~visible, -math.inf).softmax(-1).nan_to_num_(0.0)
            shares[:, heads, tokens] = weights.unflatten(-1, (-1, block_size)).sum(-1)
    return shares


def _remember_shares(
    memory: StepMemory,
    queries: Shaped[Tensor, "batch 1 kv_heads group 1 head_dim"],
    keys: Shaped[Tensor, "batch 1 kv_heads keys head_dim"],
    mask: Tensor,
    block: Int[Tensor, "batch 1 selections blocks"],
    layout: Layout,
    scale: float,
) -> None:
    """Note stamps of the shares of the blocks, -1 for none, in place."""
    logits = (queries[..., 0, :] @ keys.transpose(-1, -2)).float() * scale + mask[..., 0, :].float()
    # [batch, kv_heads, group, blocks]
    shares = logits.softmax(-1).unflatten(-1, (block.shape[3], -1)).sum(-1)[:, 0]
    shares = shares.amax(2) if block.shape[2] > 1 else shares.amax((1, 2))[:, None]
    block = block[:, 0]
    stamps = (layout.length - 1)[:, None, None] + shares.log2() * memory.tokens_per_power
    stamps = torch.where(block >= 0, stamps, -math.inf)
    for held, at, latest in ((memory.own, block, stamps), (memory.shared, block.flatten(1), stamps.flatten(1))):
        slot = torch.where(at >= 0, at, held.shape[-1] - 1)
        held.scatter_reduce_(-1, slot, latest, "amax")


def _widths(counts: Int[Tensor, "batch selections rows"]) -> list[int]:
    """Blocks to gather for each row."""
    return counts.amax((0, 1)).tolist() if counts.numel() else [0] * counts.shape[-1]


def _slices(widths: list[int], room: int) -> list[tuple[int, int]]:
    """Runs of rows whose gathered blocks fit into `room`, padding to the widest row counted."""
    slices, start, widest = [], 0, 0
    for row, width in enumerate(widths):
        widest = max(widest, width)
        if row > start and widest * (row - start + 1) > room:
            slices.append((start, row))
            start, widest = row, width
    if widths:
        slices.append((start, len(widths)))
    return slices


def _query_ranks(
    layout: Layout, first: Int[Tensor, " batch"], lo: int, rows: int, width: int, block_size: int
) -> Int[Tensor, "batch rows width"]:
    """Ranks of the queries of `rows` query blocks from `lo` on; a single query fills its block alone."""
    if layout.num_queries == 1:
        return layout.past.view(-1, 1, 1)
    start = (first[:, None] + torch.arange(lo, lo + rows, device=first.device)) * block_size
    return start[..., None] + torch.arange(width, device=first.device)


def _output_rows(
    query_at: Int[Tensor, "batch rows width"], query_real: Tensor, num_queries: int, heads: int
) -> Int[Tensor, " n"]:
    """Rows of the (batch, num_queries, heads) output for (batch, rows, heads, width) results; the last for padding."""
    batch = query_at.shape[0]
    sequence = torch.arange(batch, device=query_at.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=query_at.device).view(1, 1, -1, 1)
    row = (sequence * num_queries + query_at[:, :, None]) * heads + head
    return torch.where(query_real[:, :, None], row, batch * num_queries * heads).flatten()


def _gathered_bias(
    bias: Tensor,
    query_at: Int[Tensor, "batch rows width"],
    key_at: Int[Tensor, "batch rows selections keys"],
    kv_heads: int,
    group: int,
) -> Float[Tensor, "batch rows kv_heads_or_one group width keys"]:
    """The bias of each gathered (query, key) pair."""
    batch, bias_heads = bias.shape[:2]
    selections = key_at.shape[2]
    sequence = torch.arange(batch, device=bias.device).view(-1, 1, 1, 1, 1)
    # [batch, rows, selections, width, keys, bias_heads]
    picked = bias.permute(0, 2, 3, 1)[sequence, query_at[:, :, None, :, None], key_at[:, :, :, None]]
    picked = picked.permute(0, 1, 2, 5, 3, 4)
    if bias_heads == 1:
        return picked.expand(-1, -1, -1, group, -1, -1)
    split = picked.unflatten(3, (kv_heads, group))
    if selections == 1:
        return split[:, :, 0]
    own = torch.arange(kv_heads, device=bias.device)
    return split[:, :, own, own]


def _block_means(key: Tensor, value: Tensor, layout: Layout, block_size: int) -> tuple[Tensor, Tensor]:
    """Mean key and value of every block, shape (batch, kv_heads, blocks, dim), over real tokens only."""
    blocks = -(-layout.max_length // block_size)
    means: tuple[list[Tensor], list[Tensor]] = ([], [])
    for lo in range(0, blocks, MEAN_RUN):
        stop = min(lo + MEAN_RUN, blocks)
        rank = torch.arange(lo * block_size, stop * block_size, device=key.device).expand(key.shape[0], -1)
        at = layout.key_positions(rank)[:, None, None]
        real = (rank < layout.length[:, None]).unflatten(1, (-1, 1, block_size))
        weight = (real / real.sum(-1, keepdim=True).clamp(min=1))[:, None].to(key.dtype)
        for x, parts in zip((key, value), means, strict=True):
            # [batch, 1, blocks, 1, block_size] @ [batch, kv_heads, blocks, block_size, dim]
            parts.append((weight @ take_tokens(x, at)[:, 0].unflatten(2, (-1, block_size))).squeeze(3))
    return torch.cat(means[0], 2), torch.cat(means[1], 2)


def _mean_bias(
    block: Int[Tensor, "batch rows selections selected"],
    row_block: Int[Tensor, "batch rows"],
    layout: Layout,
    block_size: int,
    dtype: torch.dtype,
    causal: bool,
) -> Float[Tensor, "batch rows selections blocks"]:
    """log(count) for the blocks before the row's own that were not selected, -inf for the others."""
    blocks = -(-layout.max_length // block_size)
    every = torch.arange(blocks, device=block.device)
    counts = (layout.length[:, None] - every * block_size).clamp(0, block_size)[:, None, None]
    selected = torch.zeros(*block.shape[:3], blocks + 1, dtype=torch.bool, device=block.device)
    selected.scatter_(3, torch.where(block >= 0, block, blocks), True)
    pruned = ~selected[..., :blocks] & (counts > 0)
    if causal:
        pruned &= every < row_block[:, :, None, None]
    return torch.where(pruned, counts.clamp(min=1).log(), -math.inf).to(dtype)
