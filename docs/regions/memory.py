"""The region on memory on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regions.results import MEMORY, Row, percent, read, table, wrapped
from sketch_walk.bench.memory import founding_bytes
from sketch_walk.cli.format import bytes_text
from sketch_walk.complexity import ModelShape, count_memory
from sketch_walk.config import SketchWalkConfig


def gpu_memory() -> str:
    """Region: bytes of one layer, beside the founding document's estimates; a sentence while it is unmeasured."""
    data = read(MEMORY)
    if data is None:
        return wrapped(
            f"Not measured in this checkout yet (`benchmarks/results/{MEMORY}`); "
            "[Benchmarks](bench.md#memory) has the command."
        )
    shape, versions = data["shape"], data["versions"]
    text = (
        f"Bytes of one layer and one sequence, {shape['heads']}/{shape['kv_heads']} heads x {shape['head_dim']}, "
        f"{data['dtype']}, density {', '.join(map(str, data['options']['densities']))}; {data['device']}, torch "
        f"{versions['torch']}. `{data['command']}`. Source: `benchmarks/results/{MEMORY}`."
    )
    rows = [row for row in data["results"] if "peak_bytes" in row]
    absent = _absent(data["options"], rows)
    return "\n\n".join(
        [
            wrapped(text),
            "### Estimate and truth, after a prompt",
            _founding_table(rows),
            _walk_bytes(rows),
            "### Peak of one call",
            *([wrapped(f"The run ended before it had metered: {'; '.join(absent)}.")] if absent else []),
            _peak_table(rows),
        ]
    )


def _walk_bytes(rows: Sequence[Row]) -> str:
    """What a walk would add to the lengths that were metered, by counting."""
    kept = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        memory = count_memory(tokens, SketchWalkConfig(walk="damped"), ModelShape())
        kept.append(f"{bytes_text(memory.transition_rows)} at {tokens:,}")
    return wrapped(
        f"Metered without a walk. With one, and blocks of {SketchWalkConfig().block_size}, its transition rows would "
        f"stay too, by counting: {', '.join(kept)} tokens."
    )


def _absent(options: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """What was to be metered and is not in the file."""
    met = {(row["phase"], row["tokens"], row["kind"]) for row in rows}
    return [
        f"{phase}, {tokens:,} tokens, {kind}"
        for phase in options["phases"]
        for tokens in options["tokens"]
        for kind in ("dense", *options["kinds"])
        if (phase, tokens, kind) not in met
    ]


def _founding_table(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row["kind"] != "layer" or row["phase"] != "prefill":
            continue
        state, estimate = row["state_bytes"], founding_bytes(row["tokens"])
        pairs = (
            (estimate["qkv"], row["qkv_bytes"]),
            (estimate["block_means"], 0),
            (estimate["sketches"], state["keys"]),
            (estimate["walk"], state["rows"] + row["walk_bytes"]),
        )
        together = [sum(column) for column in zip(*pairs[1:], strict=True)]
        cells = [f"{bytes_text(estimated)} / {bytes_text(real)}" for estimated, real in (*pairs, together)]
        shares = (f"{percent(part / whole)}" for part, whole in zip(together, pairs[0], strict=True))
        kept = (bytes_text(state["queries"]), f"{bytes_text(sum(state.values()))} ({percent(row['state_share'])})")
        body.append([f"{row['tokens']:,}", str(row["block_size"]), *cells, " / ".join(shares), *kept])
    head = (
        "Q, K and V", "block means", "sketches", "walk, block scores", "the last three", "of Q, K and V",
        "recent queries", "stays (of the KV cache)",
    )  # fmt: skip
    return table(("tokens", "block", *head), body, left=0)


def _peak_table(rows: Sequence[Row]) -> str:
    def case(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("phase", "tokens", "method", "block_size", "density"))

    attention = {case(row): row["peak_bytes"] for row in rows if row["kind"] == "attention"}
    body = []
    for row in rows:
        own = row.get("impl", row["method"]) == row["method"]
        alone = attention.get(case(row)) if row["kind"] == "layer" else None
        body.append(
            [
                row["phase"],
                row["method"] if own else f"{row['method']} ({row['impl']})",
                row["kind"],
                f"{row['tokens']:,}",
                str(row.get("block_size", "")),
                *(f"{row[name] / 1e6:,.2f}" for name in ("peak_bytes", "output_bytes")),
                f"{sum(row['state_bytes'].values()) / 1e6:,.2f}" if "state_bytes" in row else "",
                "" if alone is None else percent(1 - alone / row["peak_bytes"]),
            ]
        )
    right = ("tokens", "block", "peak above the inputs, MB", "output, MB", "state, MB", "selector, of the peak")
    return table(("phase", "method", "what", *right), body, left=3)
