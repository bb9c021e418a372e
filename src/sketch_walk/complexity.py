"""The calculator: operations and memory of dense and of SketchWalk attention for a model shape, by counting."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sketch_walk.config import SketchWalkConfig, calculate_sparsity, causal_density
from sketch_walk.sketch import feature_width, payload_size, selection_heads, sketched_heads

# Below this fraction of the causal blocks retrieval is no longer measured to hold.
LEAST_ADVISED_DENSITY = 0.02
# The founding document's estimate of the selector's state for one layer at 65,536 tokens, in bytes.
PROMISED_STATE_TOKENS = 65_536
PROMISED_STATE_BYTES = 5_500_000
# Queries kept beyond one block, so that a rejected draft can be taken back.
QUERY_RING_SPARE = 32
# Of the rank of a kept query.
RANK_BYTES = 8
# A step size and a bound, float32, per block and head.
SKETCH_SCALE_BYTES = 8


class ModelShape(NamedTuple):
    """What the calculator needs to know of a model; the defaults are Llama-3.1-8B in 16 bits."""

    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype_bytes: int = 2


class Operations(NamedTuple):
    """Floating-point operations of one prompt; a multiply and an add are two.

    `sparse_layer` and `dense_layer` hold the attention products alone; `scores_layer` compares sketches, `walk_layer`
    multiplies block matrices. The totals are over all layers, with the first ones dense as configured.
    """

    dense_layer: int
    sparse_layer: int
    scores_layer: int
    walk_layer: int
    dense_total: int
    sparse_total: int

    @property
    def ratio(self) -> float:
        """How many times fewer operations the sparse model needs."""
        return self.dense_total / self.sparse_total


class Memory(NamedTuple):
    """Bytes for one sequence. All but the totals are of one layer."""

    qkv: int
    kv_cache: int
    key_sketches: int
    transition_rows: int
    query_ring: int
    state_total: int
    kv_cache_total: int

    @property
    def state(self) -> int:
        """Bytes that the selector keeps in one sparse layer."""
        return self.key_sketches + self.transition_rows + self.query_ring

    @property
    def state_share(self) -> float:
        """The state of one sparse layer as a fraction of the layer's KV cache."""
        return self.state / self.kv_cache


class Estimate(NamedTuple):
    """Everything that the calculator says about one prompt.

    `promised_sparsity` is the founding document's formula (None when the budget is no fixed count of blocks),
    `density` the fraction of causal blocks that are read; `warning` is None when there is nothing to warn of.
    """

    seq_len: int
    num_blocks: int
    promised_sparsity: float | None
    density: float
    last_row_density: float
    operations: Operations
    memory: Memory
    warning: str | None


def estimate(seq_len: int, config: SketchWalkConfig, shape: ModelShape | None = None) -> Estimate:
    """Operations and memory of one prompt of `seq_len` tokens.

    Parameters
    ----------
    seq_len : int
        Tokens.
    config : SketchWalkConfig
        With `mass` set, the least that a run can read is counted.
    shape : ModelShape, optional

    Raises
    ------
    ValueError
        If `seq_len` or a field of `shape` is below 1, or `kv_heads` does not divide `heads`.
    """
    shape = shape or ModelShape()
    _check_shape(shape)
    density = causal_density(seq_len, config)
    blocks = math.ceil(seq_len / config.block_size)
    counted = config.density is None and config.mass is None
    promised = calculate_sparsity(seq_len, config.block_size, config.top_k_blocks) if counted else None
    last_row = config.budget(blocks) / blocks
    return Estimate(
        seq_len=seq_len,
        num_blocks=blocks,
        promised_sparsity=promised,
        density=density,
        last_row_density=last_row,
        operations=count_operations(seq_len, config, shape),
        memory=count_memory(seq_len, config, shape),
        warning=low_density_warning(seq_len, config),
    )


def count_operations(seq_len: int, config: SketchWalkConfig, shape: ModelShape) -> Operations:
    """Count the operations of one prompt.

    Dense attention is O(n²·d), sparse attention O(n·τ·B·d), the sketch scores O((n/m)²·r) with m tokens to a sketch,
    and the walk O(b³) for b blocks. "Peak" scores multiply only the sub-queries that `query_keep` keeps. Causal halves
    are counted as such; the softmax and the transforms, which are O(n·d·log d), are left out.
    """
    pairs = seq_len * (seq_len + 1) // 2
    dense = 4 * shape.heads * shape.head_dim * pairs
    sparse = 4 * shape.heads * shape.head_dim * _read_pairs(seq_len, config)
    keys = math.ceil(seq_len / config.key_sub_block)
    width = feature_width(shape.head_dim, config)
    scores = sketched_heads(shape.heads, config) * width * _scoring_queries(seq_len, config) * keys
    blocks = math.ceil(seq_len / config.block_size)
    walk = 0
    if config.uses_walk:
        # Exact for a product of two lower triangles: b³/3, a sixth of a full product.
        walk = config.walk_degree * selection_heads(shape.kv_heads, config) * blocks * (blocks + 1) * (blocks + 2) // 3
    dense_layers = min(config.skip_first_n_layers, shape.layers)
    sparse_layers = shape.layers - dense_layers
    return Operations(
        dense_layer=dense,
        sparse_layer=sparse,
        scores_layer=scores,
        walk_layer=walk,
        dense_total=dense * shape.layers,
        sparse_total=dense * dense_layers + (sparse + scores + walk) * sparse_layers,
    )


def count_memory(seq_len: int, config: SketchWalkConfig, shape: ModelShape) -> Memory:
    """Count the bytes that one sequence needs, those of the selector beside those of the KV cache."""
    vector = shape.head_dim * shape.dtype_bytes
    kv_cache = 2 * seq_len * shape.kv_heads * vector
    payload = payload_size(feature_width(shape.head_dim, config), config)
    sketch = payload + SKETCH_SCALE_BYTES if config.key_sketch_bits == 8 else payload * shape.dtype_bytes
    blocks = math.ceil(seq_len / config.block_size)
    key_sketches = blocks * sketched_heads(shape.kv_heads, config) * sketch
    rows = ring = 0
    if config.uses_walk:
        entry = torch.finfo(config.walk_state_dtype).bits // 8
        rows = selection_heads(shape.kv_heads, config) * blocks * (blocks + 1) // 2 * entry
        # Head-averaged queries are one vector, kept in float32.
        ring_vector = 4 * shape.head_dim if config.head_mode == "mean" else shape.heads * vector
        ring = (config.block_size + QUERY_RING_SPARE) * (ring_vector + RANK_BYTES)
    sparse_layers = max(0, shape.layers - config.skip_first_n_layers)
    return Memory(
        qkv=seq_len * (shape.heads + 2 * shape.kv_heads) * vector,
        kv_cache=kv_cache,
        key_sketches=key_sketches,
        transition_rows=rows,
        query_ring=ring,
        state_total=(key_sketches + rows + ring) * sparse_layers,
        kv_cache_total=kv_cache * shape.layers,
    )


def low_density_warning(seq_len: int, config: SketchWalkConfig) -> str | None:
    """A sentence when the last row of a prompt of `seq_len` tokens reads less than 2 % of its blocks, else None.

    With `mass` the rows decide for themselves how much they read, and there is nothing to warn of.
    """
    blocks = math.ceil(seq_len / config.block_size)
    share = config.budget(blocks) / blocks
    if config.mass is not None or share >= LEAST_ADVISED_DENSITY:
        return None
    return (
        f"at {seq_len:,} tokens the last query block reads {config.budget(blocks):,} of {blocks:,} blocks "
        f"({share:.1%}), below {LEAST_ADVISED_DENSITY:.0%}: retrieval is likely to fail; set density=0.2 instead"
    )


def _check_shape(shape: ModelShape) -> None:
    for name, value in shape._asdict().items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if shape.heads % shape.kv_heads:
        raise ValueError(f"kv_heads ({shape.kv_heads}) must divide heads ({shape.heads})")


def _scoring_queries(seq_len: int, config: SketchWalkConfig) -> int:
    """Sub-queries of one head that take part in the scores of a prompt."""
    per_block = 1 if seq_len == 1 else config.block_size // config.query_sub_block
    kept = config.kept_sub_queries(per_block)
    whole, rest = divmod(seq_len, config.block_size)
    return whole * kept + min(kept, math.ceil(rest / config.query_sub_block))


def _read_pairs(seq_len: int, config: SketchWalkConfig) -> int:
    """Causal query-key pairs of the blocks that one prompt reads; the diagonal block is a triangle."""
    size = config.block_size
    blocks = math.ceil(seq_len / size)
    tail = config.dense_tail_blocks if seq_len > 1 else 0
    total = 0
    for row in range(blocks):
        tokens = min(size, seq_len - row * size)
        read = row + 1 if row >= blocks - tail else config.budget(row + 1)
        total += tokens * (read - 1) * size + tokens * (tokens + 1) // 2
    return total
