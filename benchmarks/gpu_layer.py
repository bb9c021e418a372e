"""One sparse layer's prefill on a GPU, selector included and stage by stage, against dense SDPA.

    python benchmarks/gpu_layer.py --out benchmarks/results/gpu_layer.json

Llama-3.1-8B shape, bfloat16, random queries and keys, a walk handed in from a layer before. The fused scores are
checked against the reference first. Device time, median of repeated runs; the last line is JSON. Random tensors say
nothing of accuracy: benchmarks/results/yardstick_smollm2_4k.json has that of the same settings on a real model.
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
from gpu_attention import HEAD_DIM, dense_times, milliseconds, tensors

from sketch_walk import SketchWalkConfig, kernels, sketch_walk_attention
from sketch_walk.layout import make_layout
from sketch_walk.scoring import absorb_keys, absorb_rows, call_scores
from sketch_walk.selection import select_blocks
from sketch_walk.state import LayerSketch
from sketch_walk.walk import transition_rows, walk_step

SCALE = HEAD_DIM**-0.5


def check_scores(config: SketchWalkConfig) -> float:
    """Largest difference of fused from reference scores at 6,000 tokens."""
    q, k, _ = tensors(1, 6000, 6000)
    layout = make_layout(1, 6000, 6000, q.device)
    state = LayerSketch(config)
    absorb_keys(state, k, layout, q)
    fused = call_scores(state, q, layout, SCALE, impl="triton")
    exact = call_scores(state, q, layout, SCALE, impl="reference")
    error = (fused - exact).abs().max().item()
    assert error < 5e-3, f"scores differ by {error:.3g}"
    return error


def stages(config: SketchWalkConfig, tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of every stage and of the whole layer."""
    q, k, v = tensors(1, tokens, tokens)
    layout = make_layout(1, tokens, tokens, q.device)
    size = config.block_size
    times: dict[str, float] = {}
    state = LayerSketch(config)

    def timed(name: str, call: Any) -> Any:
        times[name] = round(milliseconds(call, repeats)[0], 3)
        return call()

    timed("sketch_keys", partial(absorb_keys, state, k, layout, q))
    scores = timed("scores", partial(call_scores, state, q, layout, SCALE))
    rows = timed("transition_rows", partial(transition_rows, scores, config))
    row_index = torch.arange(rows.shape[2], device=q.device)[None]
    timed("keep_rows", partial(absorb_rows, state, q, rows, layout, SCALE))
    walk = timed("walk", lambda: walk_step(rows, rows, state.read_rows(rows.shape[3]), row_index, config))
    queries = torch.ones_like(row_index, dtype=torch.bool)
    selection = timed("select", partial(select_blocks, walk, row_index, queries, config)).per_head()
    attend = partial(kernels.attend, q, k, v, selection.indices, selection.counts, layout, block_size=size, scale=SCALE)
    timed("attend", attend)
    previous = sketch_walk_attention(q, k, v, config).walk
    whole, spread = milliseconds(partial(sketch_walk_attention, q, k, v, config, walk=previous), repeats)
    dense = dense_times(q, k, v, repeats)
    count = selection.counts.sum().item() / (rows.shape[2] * (rows.shape[2] + 1) / 2)
    fastest = min(time for time, _ in dense.values())
    row = {
        "tokens": tokens,
        "block_size": size,
        "density": config.density,
        "block_density": round(count, 4),
        "layer_ms": round(whole, 3),
        "layer_spread_ms": round(spread, 3),
        "stages_ms": times,
        "flash_ms": round(dense["flash"][0], 3),
        "cudnn_ms": round(dense["cudnn"][0], 3),
        "over_flash": round(dense["flash"][0] / whole, 2),
        "over_fastest_dense": round(fastest / whole, 2),
    }
    print(row)
    return row


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    errors = {}
    for changes in ({}, {"reduce": "mean"}, {"head_mode": "per_kv_head"}, {"key_sketch_bits": 16}, {"block_size": 128}):
        errors[str(changes)] = check_scores(SketchWalkConfig(**changes))
    print(errors)
    rows = []
    for tokens in (8192, 32768, 131072):
        for block in (64, 128):
            for density in (0.2, 0.05):
                config = SketchWalkConfig(block_size=block, sketch_dim=HEAD_DIM, density=density, min_blocks=4)
                rows.append(stages(config, tokens, args.repeats))
    result = {
        "what": "prefill of one sparse layer with its selector; Llama-3.1-8B shape (32/8 heads x 128), bfloat16",
        "command": "python benchmarks/gpu_layer.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "score_errors": errors,
        "repeats": args.repeats,
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    with torch.no_grad():
        main()
