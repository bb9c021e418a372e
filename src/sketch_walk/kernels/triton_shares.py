"""Shares of attention in Triton: what each block gets from a few tokens of a sequence, from its keys alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_walk.kernels.triton_tiles import (
    HIDDEN,
    LOG2_E,
    interpreted,
    load_lanes,
    load_tile,
    next_power_of_2,
    padded_dim,
    positions,
    product,
)
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

# Tokens and heads of one program, which are rows of its products, and the blocks that it reads.
MOST_LANES = 64
SPLIT_BLOCKS = 8
# Of one tile of keys, as in decode.
KEY_TILE_BYTES = 16384


@triton.jit(do_not_specialize=["num_keys", "num_tokens", "num_slots"])
def _masses(
    query, key, key_index, ranks, length, masses, k_batch, k_head, k_token,
    num_keys, num_tokens, num_slots, num_heads, scale_log2,
    GROUP: tl.constexpr, LANES: tl.constexpr, LANE_TILES: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, INDEXED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of the powers of each token's logits over every KEYS keys of SPLIT blocks, for heads of a group.

    A lane is a token of a head. Slots of blocks beyond the sequence are left alone.
    """
    split, sequence = tl.program_id(0), tl.program_id(2)
    kv_head, lane_tile = tl.program_id(1) // LANE_TILES, tl.program_id(1) % LANE_TILES
    end = tl.load(length + sequence).to(tl.int32)
    lane = lane_tile * LANES + tl.arange(0, LANES)
    real = lane < GROUP * num_tokens
    row = (sequence * num_heads + kv_head * GROUP).to(tl.int64) * num_tokens + lane
    rank = tl.load(ranks + sequence * num_tokens + lane % num_tokens, mask=real, other=-1).to(tl.int32)
    dim = tl.arange(0, PADDED_DIM)
    queries = load_lanes(query, row * HEAD_DIM, dim, real, HEAD_DIM, WIDEN)
    key += sequence.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    UNITS: tl.constexpr = BLOCK // KEYS
    blocks = tl.minimum((end + BLOCK - 1) // BLOCK, (split + 1) * SPLIT)
    for unit in range(split * SPLIT * UNITS, blocks * UNITS):
        key_rank = unit * KEYS + tl.arange(0, KEYS)
        held = key_rank < end
        at = positions(key_index, sequence, key_rank, end, num_keys, INDEXED)
        keys = load_tile(key, at, k_token, dim, held, HEAD_DIM, WIDEN)
        logits = product(queries, tl.trans(keys), WIDEN) * scale_log2
        logits = tl.where(held[None, :] & (key_rank[None, :] <= rank[:, None]), logits, HIDDEN)
        best = tl.max(logits, 1)
        mass = tl.where(best > HIDDEN, best + tl.log2(tl.sum(tl.exp2(logits - best[:, None]), 1)), HIDDEN)
        tl.store(masses + row * num_slots + unit, mass, mask=real)


def launch_sizes(rows: int, block_size: int, head_dim: int, element_size: int) -> tuple[int, int]:
    """Lanes and keys of one product, for `rows` tokens and heads that share keys."""
    most_keys = KEY_TILE_BYTES // (padded_dim(head_dim) * element_size)
    return max(16, min(MOST_LANES, next_power_of_2(rows))), min(block_size, max(16, most_keys))


def token_shares(
    query: Shaped[Tensor, "batch heads tokens head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    ranks: Int[Tensor, "batch tokens"],
    layout: Layout,
    *,
    block_size: int,
    scale: float,
) -> Float[Tensor, "batch heads tokens blocks"]:
    """As `reference.token_shares`. No host synchronisation."""
    batch, heads, tokens, head_dim = query.shape
    kv_heads, num_keys, blocks = key.shape[1], key.shape[2], -(-layout.max_length // block_size)
    group = heads // kv_heads
    lanes, keys = launch_sizes(group * tokens, block_size, head_dim, key.element_size())
    lane_tiles, units = -(-group * tokens // lanes), block_size // keys
    masses = torch.full((batch, heads, tokens, blocks * units), HIDDEN.value, dtype=torch.float32, device=query.device)
    _masses[(-(-blocks // SPLIT_BLOCKS), kv_heads * lane_tiles, batch)](
        query.contiguous(), key, layout.key_index, ranks, layout.length, masses, *key.stride()[:3],
        num_keys, tokens, blocks * units, heads, scale * LOG2_E,
        GROUP=group, LANES=lanes, LANE_TILES=lane_tiles, BLOCK=block_size, KEYS=keys, SPLIT=SPLIT_BLOCKS,
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim(head_dim),
        INDEXED=layout.key_index is not None, WIDEN=interpreted(), num_warps=4,
    )  # fmt: skip
    shares = (masses / LOG2_E).softmax(-1).unflatten(-1, (-1, units)).sum(-1)
    return shares.masked_fill_(masses.amax(-1, keepdim=True) <= HIDDEN.value, 0.0)
