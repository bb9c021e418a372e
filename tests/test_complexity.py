"""The calculator, against counting pair by pair and against a real state."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketch_walk import sketch_walk_attention
from sketch_walk.complexity import (
    ModelShape,
    count_memory,
    count_operations,
    estimate,
    low_density_warning,
)
from sketch_walk.config import PRESETS, SketchWalkConfig, calculate_sparsity, causal_density
from sketch_walk.layout import make_layout
from sketch_walk.scoring import _sketch_queries
from sketch_walk.sketch import payload_size
from sketch_walk.state import LayerSketch
from tensors import qkv

SHAPE = ModelShape(layers=4, heads=4, kv_heads=2, head_dim=16, dtype_bytes=4)
SMALL = SketchWalkConfig(block_size=8, density=0.4, min_blocks=2, sketch_dim=8, query_sub_block=4, key_sub_block=4)


def pairs_read(seq_len: int, config: SketchWalkConfig) -> int:
    """Token pairs of a selection that reads the budget's newest blocks, counted one by one."""
    blocks = math.ceil(seq_len / config.block_size)
    total = 0
    for query in range(seq_len):
        row = query // config.block_size
        dense = row >= blocks - config.dense_tail_blocks
        oldest = 0 if dense else row + 1 - config.budget(row + 1)
        total += sum(1 for key in range(query + 1) if key // config.block_size >= oldest)
    return total


@settings(deadline=None, max_examples=40)
@given(
    seq_len=st.integers(1, 150),
    block_size=st.sampled_from([4, 8, 16]),
    density=st.floats(0.05, 1.0),
    tail=st.integers(0, 3),
)
def test_attention_operations_count_every_pair(seq_len: int, block_size: int, density: float, tail: int) -> None:
    tail = tail if seq_len > 1 else 0
    config = SketchWalkConfig(block_size=block_size, density=density, dense_tail_blocks=tail)
    count = count_operations(seq_len, config, SHAPE)
    each = 4 * SHAPE.heads * SHAPE.head_dim
    assert count.sparse_layer == each * pairs_read(seq_len, config)
    assert count.dense_layer == each * seq_len * (seq_len + 1) // 2


def test_walk_counts_a_product_of_triangles() -> None:
    blocks = 9
    products = sum(1 for i in range(blocks) for j in range(i + 1) for _ in range(j, i + 1))
    assert count_operations(8 * blocks, replace(SMALL, walk="damped"), SHAPE).walk_layer == 2 * products
    assert count_operations(72, SketchWalkConfig(walk="none"), SHAPE).walk_layer == 0


@pytest.mark.parametrize("seq_len", [1, 2, 63, 64, 65, 71, 130, 200])
@pytest.mark.parametrize(
    "changes",
    [{}, {"query_keep": 1.0}, {"query_keep": 0.1}, {"block_score": "mass"}, {"query_sub_block": 16}],
    ids=str,
)
def test_scores_count_the_sub_queries_that_are_kept(seq_len: int, changes: dict[str, Any]) -> None:
    """Half of the products of all of them with all sub-keys, a multiply and an add each."""
    config = SketchWalkConfig(sketch_dim=8, **changes)
    layout = make_layout(1, seq_len, seq_len, torch.device("cpu"))
    query = torch.randn(1, SHAPE.heads, seq_len, SHAPE.head_dim, generator=torch.Generator().manual_seed(0))
    queries = _sketch_queries(query, layout, 0, layout.num_query_blocks(config.block_size), config)
    scoring = int((queries.last_rank >= 0).expand(-1, -1, SHAPE.heads, -1).sum())
    keys = math.ceil(seq_len / config.key_sub_block)
    assert count_operations(seq_len, config, SHAPE).scores_layer == scoring * keys * 8


def test_totals_keep_the_first_layers_dense() -> None:
    count = count_operations(400, SMALL, SHAPE)
    sparse = count.sparse_layer + count.scores_layer + count.walk_layer
    assert count.dense_total == 4 * count.dense_layer
    assert count.sparse_total == 2 * count.dense_layer + 2 * sparse
    assert count.ratio == pytest.approx(count.dense_total / count.sparse_total)


def test_more_dense_layers_than_layers() -> None:
    config = SketchWalkConfig(skip_first_n_layers=9)
    assert count_operations(400, config, SHAPE).ratio == 1.0
    assert count_memory(400, config, SHAPE).state_total == 0


def test_head_averaged_scores_cost_one_head() -> None:
    config = SketchWalkConfig(head_mode="mean")
    shared = count_operations(4096, SketchWalkConfig(), SHAPE).scores_layer
    assert shared == SHAPE.heads * count_operations(4096, config, SHAPE).scores_layer


@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head", "mean"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("walk", ["damped", "none"])
def test_state_is_what_a_real_state_holds(head_mode: str, bits: int, walk: str) -> None:
    config = SketchWalkConfig(head_mode=head_mode, key_sketch_bits=bits, walk=walk, sketch_dim=8)
    tokens, mean = 64 * 50, head_mode == "mean"
    state = LayerSketch(config)
    key_heads, query_heads = (1, 1) if mean else (SHAPE.kv_heads, SHAPE.heads)
    # Head-averaged queries are kept in float32 as all of this test's tensors are.
    state.allocate(
        1, (key_heads, payload_size(8, config)), (query_heads, SHAPE.head_dim), torch.float32, torch.device("cpu")
    )
    state.reserve(tokens)
    held = state.nbytes()
    # A real buffer has one block more, for writes of sequences that have nothing to write.
    memory = count_memory(tokens, config, SHAPE)
    assert memory.key_sketches * 51 == held["keys"] * 50
    if walk == "none":
        assert (memory.transition_rows, memory.query_ring) == (0, 0)
    else:
        rows = 1275 * 4 * (SHAPE.kv_heads if head_mode == "per_kv_head" else 1)
        assert memory.transition_rows == rows == pytest.approx(held["rows"], rel=0.002)
        assert memory.query_ring == pytest.approx(held["queries"], rel=0.02)
    assert memory.state == memory.key_sketches + memory.transition_rows + memory.query_ring


@pytest.mark.parametrize("width", [5, 8, 16])
@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_state_after_a_prompt_of_any_length(tokens: int, width: int) -> None:
    """Odd widths too: four coordinates share a byte of each plane."""
    config = SketchWalkConfig(sketch_dim=width, block_size=16)
    state = LayerSketch(config)
    sketch_walk_attention(*qkv(1, SHAPE.heads, SHAPE.kv_heads, tokens, SHAPE.head_dim), config, state=state)
    spare = state.nbytes()["keys"] / (state.num_blocks + 1)
    assert count_memory(tokens, config, SHAPE).key_sketches == state.nbytes()["keys"] - spare


def test_llama_8b_at_64k() -> None:
    memory = count_memory(65_536, SketchWalkConfig(walk="damped"), ModelShape())
    assert memory.kv_cache == 65_536 * 2 * 8 * 128 * 2
    assert memory.qkv == 65_536 * (32 + 16) * 128 * 2
    assert memory.key_sketches == 1024 * 8 * (17 * 64 + 8)
    assert memory.transition_rows == 1024 * 1025 // 2 * 4
    assert memory.state_share < 0.06
    assert count_memory(65_536, SketchWalkConfig(), ModelShape()).state == memory.key_sketches
    full_width = count_memory(65_536, SketchWalkConfig(sketch_dim=128), ModelShape())
    assert full_width.state_share == pytest.approx(17 / 256, rel=0.01)
    assert memory.state_total == 30 * memory.state
    assert memory.kv_cache_total == 32 * memory.kv_cache


def test_promised_figure_beside_the_honest_one() -> None:
    result = estimate(65_536, PRESETS["default"])
    assert result.promised_sparsity == calculate_sparsity(65_536, 64, 16) == pytest.approx(0.984, abs=5e-4)
    assert result.density == causal_density(65_536, PRESETS["default"])
    assert result.density > 1 - result.promised_sparsity
    assert result.num_blocks == 1024
    assert estimate(65_536, SketchWalkConfig(density=0.2)).promised_sparsity is None


def test_warning_below_two_percent() -> None:
    message = low_density_warning(131_072, PRESETS["default"])
    assert message is not None
    assert "16 of 2,048 blocks (0.8%)" in message
    assert "density=0.2" in message
    assert low_density_warning(16 * 64 * 50, PRESETS["default"]) is None
    assert low_density_warning(16 * 64 * 51, PRESETS["default"]) is not None
    assert low_density_warning(131_072, SketchWalkConfig(density=0.2)) is None
    assert low_density_warning(131_072, SketchWalkConfig(mass=0.9)) is None


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (ModelShape(layers=0), "layers must be an int of at least 1, got 0"),
        (ModelShape(head_dim=True), "head_dim must be an int of at least 1, got True"),
        (ModelShape(heads=6, kv_heads=4), r"kv_heads \(4\) must divide heads \(6\)"),
    ],
)
def test_bad_shapes(shape: ModelShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(100, SMALL, shape)


def test_bad_length() -> None:
    with pytest.raises(ValueError, match="seq_len must be at least 1"):
        estimate(0, SMALL)
