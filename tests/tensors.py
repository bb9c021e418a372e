"""Tensors that several test files share."""

from __future__ import annotations

import torch
from torch import Tensor

QKV = tuple[Tensor, Tensor, Tensor]


def qkv(
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    dim: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 2.0,
) -> QKV:
    """Queries, keys and values whose attention is uneven: each stretch of 8 keys has a direction of its own.

    Independent normal keys would give every block nearly the same score, and every selection would be a near tie.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    topics = normal(6, dim)
    stretch = torch.randint(0, 6, (batch, 1, -(-tokens // 8)), generator=generator).repeat_interleave(8, 2)[
        ..., :tokens
    ]
    keys = normal(batch, kv_heads, tokens, dim) + topics[stretch.expand(-1, kv_heads, -1)]
    wanted = torch.randint(0, 6, (batch, heads, -(-tokens // 4)), generator=generator).repeat_interleave(4, 2)
    queries = sharpness / 2 * (normal(batch, heads, tokens, dim) + topics[wanted[..., :tokens]])
    return queries.to(dtype), keys.to(dtype), normal(batch, kv_heads, tokens, dim).to(dtype)


def layers(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[QKV]:
    """`qkv` for several layers."""
    return [qkv(*shape, seed=1000 * seed + layer, dtype=dtype) for layer in range(count)]


def block_mask(indices: Tensor, num_blocks: int) -> Tensor:
    """Selected blocks (..., rows, max_selected) with -1 padding -> bool (..., rows, num_blocks)."""
    chosen = torch.zeros(*indices.shape[:-1], num_blocks + 1, dtype=torch.bool)
    chosen.scatter_(-1, torch.where(indices >= 0, indices, num_blocks).long(), True)
    return chosen[..., :num_blocks]


def token_mask(blocks: Tensor, block_size: int, tokens: int) -> Tensor:
    """Bool block mask (..., rows, blocks) of a whole prompt -> causal token mask (..., tokens, tokens)."""
    by_token = blocks.repeat_interleave(block_size, -1).repeat_interleave(block_size, -2)[..., :tokens, :tokens]
    return by_token & torch.ones(tokens, tokens, dtype=torch.bool).tril()
