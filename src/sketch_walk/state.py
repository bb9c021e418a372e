"""What the selector remembers of a sequence between calls; it lives with the KV cache, one `LayerSketch` per layer.

Kept per layer: sketches of the keys; what share of attention each block got in the last steps, and the queries of a
prompt's last tokens, with which a step looks back (`sketch_walk.look_back`); or, with a walk, the transition rows of
complete blocks and the queries of the last tokens. What steps remember is kept for all layers together as well.
Transition rows of a new block need the queries of the whole block, which no KV cache holds: the ring of recent queries
covers the open block and `ROLLBACK` tokens more, so that a crop of up to that many tokens (speculative decoding) loses
nothing. After a deeper crop into a block, that one row is made from the queries seen since.

Capacity grows with the sequence, in whole blocks; a state made with a fixed capacity never reallocates, which compiled
graphs need. Buffers are made outside of inference mode, so that a prompt may be read in it and a step taken out of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout, take_tokens

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

# Tokens that may be cropped and re-decoded without loss: above the 20 candidates that assisted decoding drafts.
ROLLBACK = 32
# Tokens at the end of a prompt that leave something to the memory of steps: what the sixteenth left fades to a fifth.
LAST_TOKENS = 16
# Of 4 bytes each: what GPUs load several of at once starts at such a multiple.
ALIGNED_SLOTS = 16


class SharedMemory:
    """What steps of all layers on one device remember: float32, shape (batch, slots).

    Every layer makes room in it and notes in it. The first one, which owns it, takes it along where cache operations
    come to every layer.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.memory = _nothing(batch, ALIGNED_SLOTS, device=device)

    def reserve(self, blocks: int) -> None:
        """Make room for `blocks` blocks and a spare slot."""
        self.memory = _with_slots(self.memory, blocks)


def packed_size(num_blocks: int) -> int:
    """Entries of `num_blocks` rows of a lower triangle, stored one after the other."""
    return num_blocks * (num_blocks + 1) // 2


class LayerSketch:
    """One layer's key sketches, transition rows and recent queries, for a batch of sequences.

    Every tensor is indexed by rank (position among a sequence's real tokens), so sequences of a batch may differ in
    length. The last block, row entry and ring slot of each buffer takes the writes of sequences that have nothing to
    write.

    Parameters
    ----------
    config : SketchWalkConfig
        Decides what is kept.
    capacity : int, optional
        Fixed number of tokens; None grows on demand.
    shared : dict, optional
        By device: what all layers remember together. The layers of a model take the same dict, empty at first.
    """

    def __init__(
        self,
        config: SketchWalkConfig,
        capacity: int | None = None,
        shared: dict[torch.device, SharedMemory] | None = None,
    ) -> None:
        self.config = config
        self.capacity = capacity
        self.shared_by_device = {} if shared is None else shared
        self.num_blocks = 0
        # Positions of the (padded) sequences that the state has taken in, on the host; with a fixed capacity the caller
        # keeps count.
        self.tokens = 0
        # Queries of dense calls, and the position behind them.
        self.pending: list[Tensor] = []
        self.pending_stop = 0
        # Whether a call of several tokens came since steps looked back, and at which length they did.
        self.unseen = False
        self.looked_at = 0
        # Whether the ring may hold queries of tokens that are no more.
        self.cropped = False
        self.codes: Tensor | None = None
        self.scales: Tensor | None = None
        self.memory: Tensor | None = None
        self.shared: SharedMemory | None = None
        self.owns_shared = False
        self.rows: Tensor | None = None
        self.ring: Tensor | None = None
        self.ring_ranks: Tensor | None = None

    @property
    def ring_size(self) -> int:
        """Recent tokens whose queries are kept."""
        return self.config.block_size + ROLLBACK if self.config.uses_walk else LAST_TOKENS

    @torch.inference_mode(False)
    def allocate(
        self,
        batch: int,
        sketch_shape: tuple[int, int],
        ring_shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        tokens: int = 0,
    ) -> None:
        """Make the buffers, once, for a fixed capacity or else with room for `tokens` tokens per sequence.

        Parameters
        ----------
        sketch_shape : (heads, entries of a block's codes)
        ring_shape : (heads, head_dim) of kept queries
        dtype : torch.dtype
            Of the model.
        """
        if self.codes is not None:
            return
        config = self.config
        heads, payload = sketch_shape
        packed = config.key_sketch_bits == 8
        blocks = -(-(tokens if self.capacity is None else self.capacity) // config.block_size)
        codes_dtype = torch.uint8 if packed else dtype
        self.codes = torch.zeros(batch, heads, blocks + 1, payload, dtype=codes_dtype, device=device)
        if packed:
            self.scales = torch.zeros(batch, heads, blocks + 1, 2, device=device)
        selections = heads if config.head_mode == "per_kv_head" else 1
        if config.remembers:
            self.memory = _nothing(batch, selections, _memory_slots(blocks), device=device)
            self.owns_shared = device not in self.shared_by_device
            if self.owns_shared:
                self.shared_by_device[device] = SharedMemory(batch, device)
            self.shared = self.shared_by_device[device]
            self.shared.reserve(blocks)
        if config.uses_walk:
            self.rows = torch.zeros(batch, selections, 1, dtype=config.walk_state_dtype, device=device)
            self._make_ring(batch, *ring_shape, torch.float32 if self._averages_queries else dtype, device)
            self._grow_rows(blocks)
        self.num_blocks = blocks

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens per sequence.

        Raises
        ------
        ValueError
            If that is more than a fixed capacity.
        """
        blocks = -(-tokens // self.config.block_size)
        if blocks <= self.num_blocks:
            return
        if self.capacity is not None and tokens > self.capacity:
            raise ValueError(f"the state holds {self.capacity} tokens per sequence, got {tokens}")
        self._grow(blocks)

    @torch.inference_mode(False)
    def _grow(self, blocks: int) -> None:
        assert self.codes is not None
        self.codes = _grown(self.codes, blocks, dim=2)
        if self.scales is not None:
            self.scales = _grown(self.scales, blocks, dim=2)
        if self.memory is not None:
            self.memory = _with_slots(self.memory, blocks)
        if self.shared is not None:
            self.shared.reserve(blocks)
        self._grow_rows(blocks)
        self.num_blocks = blocks

    def _grow_rows(self, blocks: int) -> None:
        if self.rows is None or blocks == self.num_blocks:
            return
        old = packed_size(self.num_blocks)
        self.rows = _grown(self.rows, packed_size(blocks), dim=2)
        # A row never written keeps its mass where it is: the identity.
        diagonal = [packed_size(i + 1) - 1 for i in range(self.num_blocks, blocks)]
        self.rows[..., old:] = 0
        self.rows[..., torch.tensor(diagonal, device=self.rows.device)] = 1

    def write_keys(
        self, index: Int[Tensor, "batch n"], real: Bool[Tensor, "batch n"], codes: Tensor, scales: Tensor | None
    ) -> None:
        """Store the key sketches of the blocks `index` where `real`; `codes` has shape (batch, heads, n, payload)."""
        assert self.codes is not None
        _scatter(self.codes, index, real, codes.to(self.codes.dtype))
        if self.scales is not None and scales is not None:
            _scatter(self.scales, index, real, scales)

    def read_keys(self, blocks: int) -> tuple[Tensor, Tensor | None]:
        """Codes and scales of the first `blocks` blocks, shape (batch, heads, blocks, ...)."""
        assert self.codes is not None
        return self.codes[:, :, :blocks], None if self.scales is None else self.scales[:, :, :blocks]

    def write_rows(
        self,
        index: Int[Tensor, "batch n"],
        complete: Bool[Tensor, "batch n"],
        rows: Float[Tensor, "batch selections n blocks"],
    ) -> None:
        """Store transition rows of the blocks `index` where `complete`."""
        assert self.rows is not None
        batch, selections, n, blocks = rows.shape
        column = torch.arange(blocks, device=rows.device)
        at = index * (index + 1) // 2
        kept = complete[..., None] & (column <= index[..., None])
        target = torch.where(kept, at[..., None] + column, self.rows.shape[-1] - 1).view(batch, 1, n * blocks)
        self.rows.scatter_(2, target.expand(-1, selections, -1), rows.reshape(batch, selections, -1))

    def read_rows(self, blocks: int) -> Float[Tensor, "batch selections blocks blocks"]:
        """The first `blocks` transition rows as a lower-triangular matrix; rows never written are the identity's."""
        assert self.rows is not None
        index = torch.arange(blocks, device=self.rows.device)
        at = (index * (index + 1) // 2)[:, None] + index
        lower = index <= index[:, None]
        dense = self.rows[..., torch.where(lower, at, 0).flatten()].unflatten(-1, (blocks, blocks))
        return torch.where(lower, dense, 0.0)

    @property
    def _averages_queries(self) -> bool:
        return self.config.uses_walk and self.config.head_mode == "mean"

    @torch.inference_mode(False)
    def _make_ring(self, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.ring = torch.zeros(batch, heads, self.ring_size + 1, dim, dtype=dtype, device=device)
        self.ring_ranks = torch.full((batch, self.ring_size + 1), -1, dtype=torch.int64, device=device)

    def keep_queries(self, query: Shaped[Tensor, "batch heads num_queries dim"], layout: Layout) -> None:
        """Put a call's last queries into the ring."""
        if self.ring is None:
            batch, heads, _, dim = query.shape
            self._make_ring(batch, heads, dim, query.dtype, query.device)
        assert self.ring is not None
        assert self.ring_ranks is not None
        kept = min(layout.num_queries, self.ring_size)
        new = layout.length - layout.past
        slot = torch.arange(kept, device=query.device) + (new - kept).clamp(min=0)[:, None]
        real, rank = slot < new[:, None], layout.past[:, None] + slot
        queries = take_tokens(query, layout.query_positions(slot)[:, None, None])[:, 0]
        if self._averages_queries:
            queries = queries.float().mean(1, keepdim=True)
        _scatter(self.ring, rank % self.ring_size, real, queries.to(self.ring.dtype))
        at = torch.where(real, rank % self.ring_size, self.ring_size)
        self.ring_ranks.scatter_(1, at, torch.where(real, rank, -1))

    def drop_queries(self, ranks: Int[Tensor, " batch"]) -> None:
        """After a crop, take each sequence's tokens from `ranks` on out of the ring."""
        if self.ring_ranks is not None:
            self.ring_ranks.masked_fill_(self.ring_ranks >= ranks[:, None], -1)
        self.cropped = False

    def read_queries(
        self, rank: Int[Tensor, "batch n"]
    ) -> tuple[Shaped[Tensor, "batch heads n dim"], Bool[Tensor, "batch n"]]:
        """Queries of tokens `rank` and whether the ring still holds them."""
        assert self.ring is not None
        assert self.ring_ranks is not None
        slot = rank % self.ring_size
        kept = (self.ring_ranks.gather(1, slot) == rank) & (rank >= 0)
        slot = slot[:, None, :, None].expand(-1, self.ring.shape[1], -1, self.ring.shape[3])
        return self.ring.gather(2, slot), kept

    def should_look(self, tokens: int) -> bool:
        """Whether a step at a length of `tokens` looks back: after calls of several tokens, once in sixteen."""
        return self.unseen and tokens - self.looked_at >= LAST_TOKENS

    def looked(self, tokens: int) -> None:
        """Steps looked back at a length of `tokens`. A fixed capacity keeps the ring: each call of a prompt looks."""
        self.unseen, self.looked_at = False, tokens
        if self.capacity is None:
            self.ring = self.ring_ranks = None

    def defer(self, queries: Shaped[Tensor, "batch heads n dim"], stop: int) -> None:
        """Keep the queries of a call that ran dense up to position `stop`, without a walk those of the last tokens; the
        next sparse call takes them in.

        A copy: holding on to the model's own tensor would fragment the allocator's memory, and page faults then cost a
        prompt of 1,024 tokens 3 % of its time on a CPU (seen with 20 interleaved runs).
        """
        if stop - queries.shape[2] != self.pending_stop:
            self.pending = []
        self.pending_stop = stop
        if not self.config.uses_walk:
            queries = torch.cat([*self.pending, queries[:, :, -LAST_TOKENS:]], 2)[:, :, -LAST_TOKENS:]
            self.pending = []
        self.pending.append(queries.detach().clone(memory_format=torch.contiguous_format))

    def take_pending(self, stop: int) -> Tensor | None:
        """Deferred queries of positions `self.tokens` ... `stop - 1`, with a walk if all of them are there; none stay
        behind.
        """
        self._crop_pending(stop)
        pending, self.pending = self.pending, []
        missing, held = stop - self.tokens, sum(queries.shape[2] for queries in pending)
        if missing <= 0 or not held or self.pending_stop != stop or (self.config.uses_walk and held < missing):
            return None
        return torch.cat(pending, 2)[:, :, -missing:]

    def _crop_pending(self, stop: int) -> None:
        if self.pending_stop > stop:
            keep = self.pending_tokens - (self.pending_stop - stop)
            self.pending = [torch.cat(self.pending, 2)[:, :, :keep]] if keep > 0 else []
            self.pending_stop = stop

    @property
    def pending_tokens(self) -> int:
        """Positions whose queries wait to be taken in."""
        return sum(queries.shape[2] for queries in self.pending)

    def crop(self, tokens: int) -> None:
        """Forget every position from `tokens` on (a cache crop). What the kept tokens left in the state stays."""
        if tokens < 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        self._crop_pending(tokens)
        if tokens < self.tokens:
            self.cropped = True
            for memory in self.memories():
                # Block by block: what was remembered of the block that is open again stays. No stamp is of a token
                # that is gone.
                memory.clamp_(max=tokens - 1)
                memory[..., -(-tokens // self.config.block_size) :] = -math.inf
        self.looked_at = min(self.looked_at, tokens)
        self.tokens = min(self.tokens, tokens)

    @torch.inference_mode(False)
    def reorder(self, index: Int[Tensor, " new_batch"]) -> None:
        """Make sequence i of the new batch a copy of sequence ``index[i]`` (beam search)."""
        for name in ("codes", "scales", "memory", "rows", "ring", "ring_ranks"):
            buffer = getattr(self, name)
            if buffer is not None:
                setattr(self, name, buffer.index_select(0, index.to(buffer.device)))
        if self.shared is not None and self.owns_shared:
            self.shared.memory = self.shared.memory.index_select(0, index.to(self.shared.memory.device))
        self.pending = [queries.index_select(0, index.to(queries.device)) for queries in self.pending]

    def memories(self) -> list[Tensor]:
        """What steps remember, as far as it is this layer's to take along: stamps (`sketch_walk.memory`)."""
        shared = self.shared.memory if self.shared is not None and self.owns_shared else None
        return [memory for memory in (self.memory, shared) if memory is not None]

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times in place (sequence 0 first)."""
        held = [x for x in (self.codes, *self.pending) if x is not None]
        if held:
            self.reorder(torch.arange(held[0].shape[0], device=held[0].device).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything; a fixed capacity keeps its buffers, at their addresses."""
        self.tokens = 0
        self.pending, self.pending_stop = [], 0
        self.unseen, self.looked_at, self.cropped = False, 0, False
        if self.capacity is not None and self.codes is not None:
            for memory in self.memories():
                memory.fill_(-math.inf)
            if self.ring_ranks is not None:
                self.ring_ranks.fill_(-1)
            return
        self.num_blocks = 0
        if self.owns_shared:
            self.shared_by_device.clear()
        self.shared, self.owns_shared = None, False
        self.codes = self.scales = self.memory = self.rows = self.ring = self.ring_ranks = None

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by part: keys, memory of steps, rows, queries (ring and deferred)."""
        size = {
            "keys": _bytes((self.codes, self.scales)),
            "memory": _bytes(self.memories()),
            "rows": _bytes((self.rows,)),
            "queries": _bytes((self.ring, self.ring_ranks, *self.pending)),
        }
        return size


class SketchState:
    """State of a whole model for one batch of sequences: a `LayerSketch` per layer and the walk of the running forward
    pass.

    The caller of `SketchWalkAttention` owns one per batch, hands it to every layer of every call, and drops it with the
    KV cache. Nothing of it is kept anywhere else.

    Parameters
    ----------
    config : SketchWalkConfig
        The config of the attention that will use it.
    """

    def __init__(self, config: SketchWalkConfig) -> None:
        self.config = config
        self.layers: dict[int, LayerSketch] = {}
        self.shared: dict[torch.device, SharedMemory] = {}
        self.walk: Tensor | None = None
        self.last_layer = -1

    def enter(self, layer_idx: int) -> LayerSketch:
        """The layer's sketch; a layer that is not after the last one begins a new forward pass and a new walk."""
        if layer_idx <= self.last_layer:
            self.walk = None
        self.last_layer = layer_idx
        if layer_idx not in self.layers:
            self.layers[layer_idx] = LayerSketch(self.config, shared=self.shared)
        return self.layers[layer_idx]

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` positions of every layer."""
        for layer in self.layers.values():
            layer.crop(tokens)
        self._end_pass()

    def reorder(self, index: Int[Tensor, " new_batch"]) -> None:
        """Reorder the sequences of every layer."""
        for layer in self.layers.values():
            layer.reorder(index)
        self._end_pass()

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        for layer in self.layers.values():
            layer.repeat(repeats)
        self._end_pass()

    def reset(self) -> None:
        """Forget everything."""
        self.layers, self.shared = {}, {}
        self._end_pass()

    def nbytes(self) -> dict[str, int]:
        """Bytes held over all layers, by part."""
        total = {"keys": 0, "memory": 0, "rows": 0, "queries": 0}
        for layer in self.layers.values():
            for part, size in layer.nbytes().items():
                total[part] += size
        return total

    def _end_pass(self) -> None:
        self.walk = None
        self.last_layer = -1


def _memory_slots(blocks: int) -> int:
    """Slots of a memory of steps: one per block and a spare one at least, so many that rows are aligned."""
    return -(-(blocks + 1) // ALIGNED_SLOTS) * ALIGNED_SLOTS


def _with_slots(memory: Tensor, blocks: int) -> Tensor:
    """`memory`, or a longer copy, with room for `blocks` blocks and a spare slot."""
    if blocks < memory.shape[-1]:
        return memory
    return _grown(memory, _memory_slots(blocks) - 1, memory.dim() - 1, -math.inf)


def _nothing(*shape: int, device: torch.device) -> Tensor:
    """A memory of steps that remembers nothing."""
    return torch.full(shape, -math.inf, device=device)


def _grown(buffer: Tensor, size: int, dim: int, fill: float = 0.0) -> Tensor:
    """`buffer` with `size` entries (and the spare one) along `dim`; the new ones are `fill`."""
    shape = list(buffer.shape)
    used = shape[dim] - 1
    shape[dim] = size + 1
    grown = buffer.new_full(shape, fill)
    grown.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
    return grown


def _scatter(
    buffer: Shaped[Tensor, "batch heads slots dim"],
    index: Int[Tensor, "batch n"],
    real: Bool[Tensor, "batch n"],
    values: Shaped[Tensor, "batch heads n dim"],
) -> None:
    """buffer[b, :, index[b, j]] = values[b, :, j] where real[b, j]; the rest goes to the spare slot."""
    batch, heads, slots, dim = buffer.shape
    slot = torch.where(real, index, slots - 1)[:, None]
    row = (torch.arange(batch * heads, device=buffer.device).view(batch, heads, 1) * slots + slot).flatten()
    buffer.view(-1, dim).index_copy_(0, row, values.reshape(-1, dim))


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
