"""Where the real tokens of a (possibly padded) batch lie, so that every other stage counts real tokens only.

A token's *rank* is its position among the real tokens of its sequence. Block 0 starts at rank 0, so padding shifts the
block grid of a sequence with it and changes nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, Shaped


# Working memory that a slice of query blocks may always take: smaller slices are all overhead.
LEAST_SLICE_BYTES = {"cpu": 2 << 20}
LEAST_SLICE_BYTES_ELSEWHERE = 128 << 20


def slice_bytes(*inputs: Tensor) -> int:
    """Bytes that one slice of query blocks may gather or score: an eighth of the inputs', or a floor."""
    floor = LEAST_SLICE_BYTES.get(inputs[0].device.type, LEAST_SLICE_BYTES_ELSEWHERE)
    return max(floor, sum(x.nbytes for x in inputs) // 8)


@dataclass(frozen=True)
class Layout:
    """Ranks of one call's queries and keys.

    Parameters
    ----------
    past, length : torch.Tensor
        Shape (batch,), int64: real tokens of each sequence before the call's queries, and with them.
    num_queries, num_keys : int
        Sizes of the padded sequence dimension of the queries and of the keys.
    bounds : tuple of (int, int), optional
        `past` and `length` of every sequence as host integers; None where they are known on the device alone.
    query_index, key_index : torch.Tensor, optional
        Shapes (batch, num_queries) and (batch, num_keys), int64: position of the r-th real token. None where nothing is
        padded: the r-th new query then stands at r, the r-th key at r.
    """

    past: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"]
    num_queries: int
    num_keys: int
    bounds: tuple[tuple[int, int], ...] | None
    query_index: Int[Tensor, "batch num_queries"] | None = None
    key_index: Int[Tensor, "batch num_keys"] | None = None

    @property
    def max_length(self) -> int:
        """Upper bound of `length`, on the host."""
        return self.num_keys if self.bounds is None else max((length for _, length in self.bounds), default=0)

    def first_block(self, block_size: int) -> Int[Tensor, " batch"]:
        """Block of each sequence's first query of the call."""
        return self.past // block_size

    def num_query_blocks(self, block_size: int) -> int:
        """Blocks that the call's queries touch, in the sequence where they touch most."""
        if self.bounds is None:
            return 1 if self.num_queries == 1 else (self.num_queries - 1) // block_size + 2
        return max(((n - 1) // block_size - p // block_size + 1 for p, n in self.bounds if n > p), default=0)

    def first_block_range(self, block_size: int) -> tuple[int, int]:
        """Least and greatest `first_block`, on the host."""
        if self.bounds is None:
            return 0, max(0, self.num_keys - 1) // block_size
        firsts = [past // block_size for past, _ in self.bounds]
        return min(firsts, default=0), max(firsts, default=0)

    def completes_open_block(self, block_size: int) -> bool:
        """Whether some sequence's block that held tokens before the call is complete after it (True if unknown)."""
        if self.bounds is None:
            return True
        return any(p % block_size and n // block_size > p // block_size for p, n in self.bounds)

    def ranks(self) -> tuple[Int[Tensor, "batch num_keys"], Int[Tensor, "batch num_queries"]]:
        """Rank of the token at each key and at each query position, -1 for padding."""
        batch, device = self.past.shape[0], self.past.device
        keys = torch.arange(self.num_keys, device=device).expand(batch, -1)
        queries = torch.arange(self.num_queries, device=device).expand(batch, -1)
        key_rank = torch.where(keys < self.length[:, None], keys, -1)
        if self.key_index is None or self.query_index is None:
            return key_rank, queries + self.past[:, None]
        new = self.length - self.past
        query_rank = torch.where(queries < new[:, None], queries + self.past[:, None], -1)
        return (
            torch.empty_like(key_rank).scatter_(1, self.key_index, key_rank),
            torch.empty_like(query_rank).scatter_(1, self.query_index, query_rank),
        )

    def query_positions(self, slots: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"]:
        """Positions, in the query tensor, of each sequence's `slots`-th real queries; any position if out of range."""
        slots = slots.clamp(0, max(0, self.num_queries - 1))
        return slots if self.query_index is None else self.query_index.gather(1, slots)

    def key_positions(self, ranks: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"]:
        """Positions, in the key tensor, of the keys of rank `ranks`; out-of-range ranks give the last real token's.

        A key that is masked out still meets its zero weight in a product: padding may hold NaN, real tokens do not.
        """
        ranks = torch.minimum(ranks, self.length[:, None] - 1).clamp(min=0)
        return ranks if self.key_index is None else self.key_index.gather(1, ranks)


def make_layout(
    batch: int,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    *,
    valid: Bool[Tensor, "batch num_keys"] | None = None,
    offset: int | Tensor | None = None,
) -> Layout:
    """Layout of a call whose queries stand at positions `offset` ... `offset + num_queries - 1` of the keys.

    Parameters
    ----------
    valid : torch.Tensor, optional
        True where a key is a real token. Positions past the last query never count.
    offset : int or scalar tensor, optional
        Default: the queries are the last `num_queries` positions. Without `valid`, a tensor is not read on the host.
    """
    if offset is None:
        offset = num_keys - num_queries
    if valid is None and isinstance(offset, int):
        past = torch.full((batch,), offset, dtype=torch.int64, device=device)
        return Layout(past, past + num_queries, num_queries, num_keys, ((offset, offset + num_queries),) * batch)
    if valid is None:
        # A count that stays on the device: nothing is padded, and positions from `length` on hold nothing yet.
        past = torch.as_tensor(offset, dtype=torch.int64, device=device).expand(batch).contiguous()
        return Layout(past, past + num_queries, num_queries, num_keys, None)
    position = torch.arange(num_keys, device=device)
    seen = (position < offset + num_queries).expand(batch, num_keys)
    real = seen & valid
    past = (real & (position < offset)).sum(1)
    length = real.sum(1)
    bounds = None
    if not torch.compiler.is_compiling():
        bounds = tuple(zip(past.tolist(), length.tolist(), strict=True))
        if isinstance(offset, int) and all(b == (offset, offset + num_queries) for b in bounds):
            return Layout(past, length, num_queries, num_keys, bounds)
    key_index = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
    query_at = (torch.arange(num_queries, device=device) + offset).expand(batch, num_queries)
    query_index = torch.argsort((~real.gather(1, query_at)).to(torch.int8), dim=1, stable=True)
    return Layout(past, length, num_queries, num_keys, bounds, query_index, key_index)


def take_tokens(
    x: Shaped[Tensor, "batch heads seq dim"], positions: Int[Tensor, "batch groups one_or_heads tokens"]
) -> Shaped[Tensor, "batch groups heads tokens dim"]:
    """Rows of `x` at `positions`, without a copy of `x` when its last dimension is contiguous.

    Parameters
    ----------
    x : torch.Tensor
        Shape (batch, heads, seq, dim).
    positions : torch.Tensor
        Shape (batch, groups, 1 or heads, tokens), int64, in range.

    Returns
    -------
    torch.Tensor
        Shape (batch, groups, heads, tokens, dim).
    """
    batch, heads, _, dim = x.shape
    strides = x.stride()
    whole_rows = strides[3] == 1 and all(stride % dim == 0 for stride in strides[:3])
    if x.numel() == 0 or x.requires_grad or not whole_rows:
        x = x.contiguous()
        strides = x.stride()
        flat = x.view(-1, dim)
    else:
        last = sum((size - 1) * stride for size, stride in zip(x.shape[:3], strides[:3], strict=True))
        flat = x.as_strided((last // dim + 1, dim), (dim, 1))
    sequence = torch.arange(batch, device=x.device).view(-1, 1, 1, 1) * (strides[0] // dim)
    head = torch.arange(heads, device=x.device).view(1, 1, -1, 1) * (strides[1] // dim)
    rows = positions * (strides[2] // dim) + sequence + head
    return flat.index_select(0, rows.flatten()).view(*rows.shape, dim)
