"""`sketch-walk sparsity`: the calculator's tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from sketch_walk.cli.format import bytes_text, operations_text, percent_text
from sketch_walk.complexity import PROMISED_STATE_BYTES, PROMISED_STATE_TOKENS, Estimate, ModelShape, estimate
from sketch_walk.config import SketchWalkConfig


def run_sparsity(seq_len: int, config: SketchWalkConfig, shape: ModelShape) -> None:
    """Print what `estimate` counts."""
    result = estimate(seq_len, config, shape)
    console = Console()
    console.print(
        f"{seq_len:,} tokens, {result.num_blocks:,} blocks of {config.block_size}; {shape.layers} layers, "
        f"{shape.heads} query and {shape.kv_heads} key/value heads of {shape.head_dim}"
    )
    console.print(_density_table(result))
    console.print(_operations_table(result))
    console.print(_memory_table(result))
    if result.warning:
        console.print(f"[bold yellow]warning:[/] {result.warning}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _density_table(result: Estimate) -> Table:
    table = _table("Blocks read in a sparse layer", "share")
    promised = result.promised_sparsity
    table.add_row("sparsity by the founding formula 1 - k·B/n", percent_text(promised))
    table.add_row("causal blocks read, whole prompt", percent_text(result.density))
    table.add_row("causal blocks read, last row", percent_text(result.last_row_density))
    return table


def _operations_table(result: Estimate) -> Table:
    count = result.operations
    table = _table("Attention operations", "one layer", "all layers")
    table.add_row("dense, O(n²·d)", operations_text(count.dense_layer), operations_text(count.dense_total))
    sparse = count.sparse_layer + count.scores_layer + count.walk_layer
    table.add_row("SketchWalk", operations_text(sparse), operations_text(count.sparse_total))
    table.add_row("  selected blocks, O(n·τ·B·d)", operations_text(count.sparse_layer), "")
    table.add_row("  sketch scores", operations_text(count.scores_layer), "")
    table.add_row("  walk, O(b³)", operations_text(count.walk_layer), "")
    table.add_row("fewer by", f"{count.dense_layer / sparse:.1f}×", f"{count.ratio:.1f}×")
    return table


def _memory_table(result: Estimate) -> Table:
    memory = result.memory
    table = _table("Memory of one sequence", "one layer", "all layers")
    table.add_row("Q, K and V of the prompt", bytes_text(memory.qkv), "")
    table.add_row("KV cache", bytes_text(memory.kv_cache), bytes_text(memory.kv_cache_total))
    table.add_row("selector state", bytes_text(memory.state), bytes_text(memory.state_total))
    table.add_row("  key sketches", bytes_text(memory.key_sketches), "")
    table.add_row("  transition rows", bytes_text(memory.transition_rows), "")
    table.add_row("  recent queries", bytes_text(memory.query_ring), "")
    table.add_row("  share of the KV cache", percent_text(memory.state_share), "")
    table.add_row(f"founding estimate at {PROMISED_STATE_TOKENS:,} tokens", bytes_text(PROMISED_STATE_BYTES), "")
    return table
