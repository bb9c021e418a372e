"""A prompt of 1,000,000 tokens through one layer on one GPU, in chunks: does it end, and what does a token cost?

    python benchmarks/gpu_million.py --out benchmarks/results/gpu_million.json

Llama-3.1-8B shape, bfloat16, random queries, keys and values; the key sketches grow with the chunks and the selector is
included. A token late in the prompt reads `density` times as many blocks as there are before it, so that its cost may
grow in proportion to its position and no faster. Device time per chunk; the last line is JSON. Random tensors say
nothing of accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

from sketch_walk import SketchWalkConfig, sketch_walk_attention
from sketch_walk.kernels import available
from sketch_walk.layout import make_layout
from sketch_walk.scoring import absorb_keys, call_scores
from sketch_walk.selection import block_density
from sketch_walk.state import LayerSketch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5


def timed(call: Any) -> tuple[float, Any]:
    """Device milliseconds of one call, and its result."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), result


def _chunks(
    config: SketchWalkConfig,
    queries: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    walks: list[torch.Tensor] | None = None,
) -> tuple[list[dict[str, Any]], LayerSketch, list[torch.Tensor]]:
    """One prompt, `queries` again and again, the state it leaves and the walk of every chunk.

    `walks` are those of a layer before: with them a config that walks takes its step.
    """
    state = LayerSketch(config)
    seen: list[torch.Tensor] = []
    tokens, chunk = key.shape[2], queries.shape[2]
    rows = []
    for start in tqdm(range(0, tokens, chunk), desc=f"density {config.density}, walk {config.walk}"):
        stop = min(tokens, start + chunk)
        query = queries[:, :, : stop - start]
        layout = make_layout(1, stop - start, stop, query.device)
        keys, values = key[:, :, :stop], value[:, :, :stop]
        walk = walks[len(seen)] if walks else None
        attend = partial(sketch_walk_attention, query, keys, values, config, layout=layout, state=state, walk=walk)
        whole, result = timed(attend)
        seen.append(result.walk)
        absorbed, _ = timed(partial(absorb_keys, state, keys, layout, query))
        scored, _ = timed(partial(call_scores, state, query, layout, SCALE))
        first = start // config.block_size
        index = torch.arange(first, first + result.selection.counts.shape[1], device="cuda")[None]
        rows.append(
            {
                "stop": stop,
                "tokens": stop - start,
                "ms": round(whole, 3),
                "us_per_token": round(1e3 * whole / (stop - start), 3),
                "sketch_and_score_ms": round(absorbed + scored, 3),
                "block_density": round(block_density(result.selection, index), 4),
                "impl": result.impl,
            }
        )
        assert result.output.isfinite().all()
    return rows, state, seen


def run(tokens: int, chunk: int, block: int, density: float, walk: str) -> dict[str, Any]:
    """One prompt: milliseconds per chunk, of all and of sketches and scores alone."""
    config = SketchWalkConfig(block_size=block, sketch_dim=HEAD_DIM, density=density, min_blocks=4, walk=walk)
    key, value = (torch.randn(1, KV_HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    queries = torch.randn(1, HEADS, chunk, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    # Every length that is met compiles or plans something the first time: the whole prompt goes through before it is
    # timed, and with a walk once more, for that needs walks to start from.
    *_, walks = _chunks(config, queries, key, value)
    if config.uses_walk:
        _chunks(config, queries, key, value, walks)
    torch.cuda.reset_peak_memory_stats()
    rows, state, _ = _chunks(config, queries, key, value, walks if config.uses_walk else None)
    held = state.nbytes()
    cache = key.nbytes + value.nbytes
    total = sum(row["ms"] for row in rows)
    # Chunks of one length: a short last one costs more per token.
    early = next(row for row in rows if row["stop"] >= tokens // 8)
    late = [row for row in rows if row["tokens"] == chunk][-1]
    row = {
        "tokens": tokens,
        "chunk": chunk,
        "block_size": block,
        "density": density,
        "walk": walk,
        "total_ms": round(total, 1),
        "selector_share": round(sum(r["sketch_and_score_ms"] for r in rows) / total, 4),
        "cost_growth": round(late["us_per_token"] / early["us_per_token"], 3),
        "position_growth": round(late["stop"] / early["stop"], 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "state_share": {part: round(size / cache, 5) for part, size in held.items()},
        "chunks": rows,
    }
    print({name: part for name, part in row.items() if name != "chunks"})
    return row


def main() -> None:
    """Run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=16384)
    args = parser.parse_args()
    torch.manual_seed(0)
    cases = ((128, 0.05, "none"), (64, 0.05, "none"), (128, 0.05, "damped"))
    results: list[dict[str, Any]] = []
    result = {
        "what": "one layer over a long prompt in chunks; Llama-3.1-8B shape (32/8 heads x 128), bfloat16, random",
        "command": "python benchmarks/gpu_million.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": available(),
        "results": results,
    }
    for block, density, walk in cases:
        try:
            results.append(run(args.tokens, args.chunk, block, density, walk))
        except torch.OutOfMemoryError as error:
            results.append({"block_size": block, "density": density, "walk": walk, "error": str(error)[:200]})
            print(results[-1])
        torch.cuda.empty_cache()
        # After every case: a run that is cut leaves those that it had.
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**result, "results": [{k: v for k, v in r.items() if k != "chunks"} for r in results]}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
