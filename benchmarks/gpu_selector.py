"""The selector's kernels on one GPU: checked against the reference, then launch variants timed stage by stage.

    python benchmarks/gpu_selector.py --out benchmarks/results/gpu_selector.json

Llama-3.1-8B shape, bfloat16, random queries and keys. Device time in milliseconds, median of repeated runs; decode in a
CUDA graph. The last line is JSON. No accuracy belongs to random tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from sketch_walk import SketchWalkConfig, kernels, sketch_walk_attention
from sketch_walk.kernels import triton_peaks, triton_sketch
from sketch_walk.kernels.triton_peaks import PeakLaunch, StepLaunch
from sketch_walk.layout import Layout, make_layout
from sketch_walk.scoring import absorb_keys, call_scores, step_selection
from sketch_walk.selection import row_counts, select_blocks
from sketch_walk.sketch import CLIP, KEY_LEVELS, rotation
from sketch_walk.state import LayerSketch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
VARIANTS = {
    "64x128, 4 warps, 128 registers": PeakLaunch(),
    "64x128, 4 warps, 160 registers, 3 programs": PeakLaunch(max_registers=160, per_processor=3),
    "64x128, 4 warps, 4 stages": PeakLaunch(num_stages=4, per_processor=3),
    "128x128, 8 warps, 128 registers": PeakLaunch(rows=128, num_warps=8, per_processor=2),
}
STEP_VARIANTS = [StepLaunch(*sizes) for sizes in ((256, 4), (512, 4), (512, 8), (128, 4), (128, 2), (1024, 8))]
CASES: list[tuple[int, int, int, int, int, int, dict[str, Any]]] = [
    (2, 4, 2, 3000, 0, 64, {}),
    (1, 32, 8, 4000, 777, 128, {}),
    (1, 32, 8, 4000, 0, 128, {"block_size": 128}),
    (1, 6, 2, 2000, 0, 80, {}),
    (1, 8, 2, 1000, 0, 64, {"block_size": 32, "head_mode": "per_kv_head"}),
    (1, 14, 2, 2100, 0, 64, {}),
    (3, 32, 8, 1, 4000, 128, {}),
    (2, 9, 3, 1, 3333, 64, {}),
    (1, 8, 2, 999, 60, 64, {"sketch_dim": 32, "query_keep": 1.0}),
]


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median device time."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return round(statistics.median(times), 4)


def graph_milliseconds(call: Callable[[], Any], repeats: int, steps: int = 20) -> float:
    """Median device time of one call in a CUDA graph of `steps` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            call()
    return round(milliseconds(graph.replay, repeats) / steps, 5)


def check() -> list[dict[str, Any]]:
    """Differences from the reference; fails if they are more than rounding."""
    found = []
    for batch, heads, kv_heads, new, past, dim, changes in CASES:
        config = SketchWalkConfig(**{"sketch_dim": 128, **changes})
        query = torch.randn(batch, heads, new, dim, device="cuda", dtype=torch.bfloat16)
        key = torch.randn(batch, kv_heads, past + new, dim, device="cuda", dtype=torch.bfloat16)
        layout = make_layout(batch, new, past + new, query.device)
        states = [LayerSketch(config) for _ in range(2)]
        scores = []
        for state, impl in zip(states, ("reference", "triton"), strict=True):
            absorb_keys(state, key, layout, query, impl)
            scores.append(call_scores(states[0], query, layout, dim**-0.5, True, impl))
        exact, fused = states[0].codes, states[1].codes
        assert exact is not None
        assert fused is not None
        row = {
            "case": str((batch, heads, kv_heads, new, past, dim, changes)),
            "codes_moved": (exact != fused).float().mean().item(),
            "score_error": (scores[0] - scores[1]).abs().max().item(),
        }
        print(row)
        assert row["score_error"] < 2e-2, row
        assert row["codes_moved"] < 0.1, row
        found.append(row)
    return found


def prefill(tokens: int, block: int, repeats: int) -> dict[str, Any]:
    """Stages of one call over `tokens` tokens."""
    config = SketchWalkConfig(block_size=block, sketch_dim=HEAD_DIM, density=0.2, min_blocks=4)
    query = torch.randn(1, HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, KV_HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    layout = make_layout(1, tokens, tokens, query.device)
    state = LayerSketch(config)
    times: dict[str, Any] = {}
    matrix = rotation(HEAD_DIM, config, query.device, kernels.product_dtype())
    times["sketch_keys"] = milliseconds(partial(absorb_keys, state, key, layout, query), repeats)
    kept = block // 4 // 2
    sketch = partial(
        triton_sketch.sketch_queries, query, layout, matrix, block_size=block, query_sub_block=4, kept=kept,
        salience=config.salience, contrast=config.query_contrast,
    )  # fmt: skip
    times["sketch_queries"] = milliseconds(sketch, repeats)
    codes, scales = state.read_keys(tokens // block)
    assert scales is not None
    times["unpack"] = milliseconds(
        partial(triton_peaks.unpack_keys, codes, 128 // (block // 4), block // 4, 128), repeats
    )
    queries = sketch()
    score = partial(
        triton_peaks.peak_scores, queries, codes, scales, layout.length, scale=SCALE, per_block=block // 4,
        key_sub_block=4, per_kv_head=False,
    )  # fmt: skip
    exact = score()
    for name, launch in VARIANTS.items():
        try:
            assert (score(launch=launch) - exact).abs().max().item() < 1e-3
            times[name] = milliseconds(partial(score, launch=launch), repeats)
        except Exception as error:
            times[name] = f"{type(error).__name__}: {str(error)[:60]}"
    times["call_scores"] = milliseconds(partial(call_scores, state, query, layout, SCALE), repeats)
    times["select"] = _select_time(exact, layout, config, repeats)
    print(tokens, block, times)
    return {"tokens": tokens, "block_size": block, "ms": times}


def _select_time(scores: torch.Tensor, layout: Layout, config: SketchWalkConfig, repeats: int) -> float:
    from sketch_walk.kernels import triton_select

    counts = row_counts(config, scores.shape[-1], scores.device)
    width = max(config.budget(n) for n in range(scores.shape[-1] + 1))
    select = partial(
        triton_select.select_rows, scores, layout.past, layout.length, *counts, width=width,
        block_size=config.block_size, per_head=False,
    )  # fmt: skip
    rows = torch.arange(scores.shape[2], device=scores.device)[None]
    wanted = select_blocks(scores, rows, torch.ones_like(rows, dtype=torch.bool), config)
    indices, found = select()
    assert (found[:, 0] == wanted.counts).all()
    assert (indices[:, 0] == wanted.indices).all()
    return milliseconds(select, repeats)


def decode(batch: int, tokens: int, block: int, repeats: int) -> dict[str, Any]:
    """Stages of one decode step's selector."""
    config = SketchWalkConfig(block_size=block, sketch_dim=HEAD_DIM, density=0.1, min_blocks=4)
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(batch, KV_HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    layout = make_layout(batch, 1, tokens, query.device)
    layout = replace(layout, bounds=None)
    state = LayerSketch(config, capacity=tokens)
    whole = make_layout(batch, tokens, tokens, query.device)
    absorb_keys(state, key, whole, query)
    matrix = rotation(HEAD_DIM, config, query.device, kernels.product_dtype())
    codes, scales = state.read_keys(tokens // block)
    assert scales is not None
    sketch = partial(
        triton_sketch.sketch_step, key, query, layout, codes, scales, matrix, block_size=block, key_sub_block=4,
        step=CLIP / KEY_LEVELS, salience=config.salience,
    )  # fmt: skip
    times = {"sketch": graph_milliseconds(sketch, repeats)}
    peaks = partial(
        triton_peaks.decode_peaks, sketch(), codes, scales, layout.length, scale=SCALE, per_block=block // 4,
        key_sub_block=4,
    )  # fmt: skip
    for launch in STEP_VARIANTS:
        times[f"peaks, {launch.sub_keys} sub-keys, {launch.num_warps} warps"] = graph_milliseconds(
            partial(peaks, launch=launch), repeats
        )
    scores = partial(call_scores, state, query, layout, SCALE)
    times["call_scores"] = graph_milliseconds(scores, repeats)
    found = scores()
    from sketch_walk.kernels import triton_select

    counts = row_counts(config, found.shape[-1], found.device)
    width = max(config.budget(n) for n in range(found.shape[-1] + 1))
    select = partial(
        triton_select.select_rows,
        found,
        layout.past,
        layout.length,
        *counts,
        width=width,
        block_size=block,
        per_head=False,
    )
    times["select"] = graph_milliseconds(select, repeats)
    step = partial(step_selection, state, query, key, layout, SCALE, counts, width)
    times["step_selection"] = graph_milliseconds(step, repeats)
    value = torch.randn_like(key)
    layer = partial(sketch_walk_attention, query, key, value, config, state=state, layout=layout)
    times["layer"] = graph_milliseconds(layer, repeats)
    print("decode", batch, tokens, block, times)
    return {"batch": batch, "tokens": tokens, "block_size": block, "graph_ms": times}


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-check", action="store_true", help="time without checking first")
    parser.add_argument("--tokens", type=int, nargs="*", default=[65536, 131072], help="of a prompt")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8], help="of a decode step")
    args = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "what": "selector kernels; Llama-3.1-8B shape (32/8 heads x 128), bfloat16, random tensors",
        "command": "python benchmarks/gpu_selector.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "checks": [] if args.no_check else check(),
        "prefill": [prefill(tokens, block, args.repeats) for tokens in args.tokens for block in (64, 128)],
        "decode": [decode(batch, 131072, block, args.repeats) for batch in args.batch for block in (64, 128)],
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    with torch.no_grad():
        main()
