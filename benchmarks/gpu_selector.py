"""The selector's kernels on one GPU: checked against the reference, then launch variants timed stage by stage.

    python benchmarks/gpu_selector.py --resume --seconds 25 --out benchmarks/results/gpu_selector.json

Llama-3.1-8B shape, bfloat16, random queries and keys. Device time in milliseconds, median of repeated runs; decode in a
CUDA graph. Most of a run is the compilation of many launch variants: the file is written after every part, `--seconds`
ends a run early (exit code 1 while parts are missing) and `--resume` goes on from the file, which must be of the same
code, versions and device. The last line is JSON. No accuracy belongs to random tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from sketch_walk import SketchWalkConfig, kernels, sketch_walk_attention
from sketch_walk.attention import step_memory
from sketch_walk.bench import measure
from sketch_walk.bench.record import code_digest, resumed
from sketch_walk.bench.timing import capture
from sketch_walk.kernels import triton_peaks, triton_sketch
from sketch_walk.kernels.triton_peaks import PeakLaunch, StepLaunch
from sketch_walk.layout import Layout, make_layout
from sketch_walk.look_back import look_back
from sketch_walk.scoring import absorb_keys, call_scores, step_selection
from sketch_walk.selection import row_counts, select_blocks
from sketch_walk.sketch import CLIP, KEY_LEVELS, rotation
from sketch_walk.state import LayerSketch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
# What a file must share with a run that goes on from it.
SAME = ("device", "torch", "triton", "code", "repeats")
# Of the kernel of peaks: as on any GPU, with more rows, and with tensor descriptors.
VARIANTS = (
    PeakLaunch(),
    PeakLaunch(128, 128, 2, 8, 3, 128),
    PeakLaunch(64, 128, 3, 4, 3, 168, True),
    PeakLaunch(64, 256, 2, 4, 3, 255, True),
    PeakLaunch(128, 128, 2, 8, 3, 128, True),
)
STEP_VARIANTS = [
    StepLaunch(),
    *(
        StepLaunch(*sizes)
        for sizes in ((256, 8, 2, 3, 128), (256, 6, 2, 3, 168), (512, 4, 4, 3, 128), (128, 16, 1, 3, None))
    ),
]
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
Part = dict[str, Any]


@dataclass
class Stages:
    """Median device milliseconds by name; `host_paced` are those in which the device waited for the host."""

    repeats: int
    ms: dict[str, Any] = field(default_factory=dict)
    host_paced: list[str] = field(default_factory=list)

    def add(self, name: str, call: Callable[[], Any], calls: int = 1, digits: int = 4) -> None:
        """Time `call`, which makes `calls`."""
        timing = measure(call, torch.device("cuda"), self.repeats, flush=False)
        self.ms[name] = round(timing.median_ms / calls, digits)
        if timing.host_paced:
            self.host_paced.append(name)

    def add_graph(self, name: str, call: Callable[[], Any], steps: int = 20) -> None:
        """Time one call in a CUDA graph of `steps` calls."""

        def several() -> None:
            for _ in range(steps):
                call()

        self.add(name, capture(several, torch.device("cuda")).replay, steps, digits=5)


def check(batch: int, heads: int, kv_heads: int, new: int, past: int, dim: int, changes: dict[str, Any]) -> Part:
    """Differences from the reference; fails if they are more than rounding."""
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
        "codes_moved": (exact != fused).float().mean().item(),
        "score_error": (scores[0] - scores[1]).abs().max().item(),
    }
    assert row["score_error"] < 2e-2, row
    assert row["codes_moved"] < 0.1, row
    return row


def prefill(tokens: int, block: int, repeats: int) -> Part:
    """Stages of one call over `tokens` tokens."""
    config = SketchWalkConfig(block_size=block, sketch_dim=HEAD_DIM, density=0.2, min_blocks=4)
    query = torch.randn(1, HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, KV_HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    layout = make_layout(1, tokens, tokens, query.device)
    # Of fixed capacity, which keeps the queries that it looks back with.
    state = LayerSketch(config, tokens)
    stages = Stages(repeats)
    matrix = rotation(HEAD_DIM, config, query.device, kernels.product_dtype())
    stages.add("sketch_keys", partial(absorb_keys, state, key, layout, query))
    kept = block // 4 // 2
    sketch = partial(
        triton_sketch.sketch_queries, query, layout, matrix, block_size=block, query_sub_block=4, kept=kept,
        salience=config.salience, contrast=config.query_contrast,
    )  # fmt: skip
    stages.add("sketch_queries", sketch)
    codes, scales = state.read_keys(tokens // block)
    assert scales is not None
    stages.add("unpack", partial(triton_peaks.unpack_keys, codes, scales, 128 // (block // 4), block // 4, 128))
    queries = sketch()
    score = partial(
        triton_peaks.peak_scores, queries, codes, scales, layout.length, scale=SCALE, per_block=block // 4,
        key_sub_block=4, per_kv_head=False,
    )  # fmt: skip
    exact = score()
    for launch in VARIANTS:
        name = named(launch)
        try:
            assert (score(launch=launch) - exact).abs().max().item() < 1e-3
            stages.add(name, partial(score, launch=launch))
        except Exception as error:
            stages.ms[name] = f"{type(error).__name__}: {str(error)[:60]}"
    stages.add("call_scores", partial(call_scores, state, query, layout, SCALE))
    stages.add("select", _checked_select(exact, layout, config))
    assert state.memory is not None
    state.keep_queries(query, layout)
    look = partial(look_back, state, key, layout.length, layout, SCALE, config)
    look()
    found = config.step_memory ** (tokens - 1 - state.memory)
    look(impl="reference")
    exact = config.step_memory ** (tokens - 1 - state.memory)
    assert exact.any()
    assert (exact - found).abs().max().item() < 1e-3
    stages.add("look_back", look)
    launch = triton_peaks.peak_launch(codes.device, HEAD_DIM)
    return {"launch": named(launch), "ms": stages.ms, "host_paced": stages.host_paced}


def named(launch: PeakLaunch) -> str:
    """A launch as tables name it."""
    how = ", descriptors" if launch.descriptors else ""
    return f"{launch.rows}x{launch.columns}, {launch.num_warps} warps, {launch.max_registers} registers{how}"


def _checked_select(scores: torch.Tensor, layout: Layout, config: SketchWalkConfig) -> Callable[[], Any]:
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
    return select


def decode(batch: int, tokens: int, block: int, repeats: int) -> Part:
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
    stages = Stages(repeats)
    stages.add_graph("sketch", sketch)
    peaks = partial(
        triton_peaks.decode_peaks, sketch(), codes, scales, layout.length, scale=SCALE, per_block=block // 4,
        key_sub_block=4,
    )  # fmt: skip
    for launch in STEP_VARIANTS:
        registers = "" if launch.max_registers is None else f", {launch.max_registers} registers"
        name = f"peaks, {launch.sub_keys} sub-keys, {launch.num_warps} warps, {launch.num_stages} stages{registers}"
        stages.add_graph(name, partial(peaks, launch=launch))
    scores = partial(call_scores, state, query, layout, SCALE)
    stages.add_graph("call_scores", scores)
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
    stages.add_graph("select", select)
    memory = step_memory(state, config)
    step = partial(step_selection, state, query, key, layout, SCALE, counts, width, memory)
    stages.add_graph("step_selection", step)
    value = torch.randn_like(key)
    layer = partial(sketch_walk_attention, query, key, value, config, state=state, layout=layout)
    stages.add_graph("layer", layer)
    return {"graph_ms": stages.ms, "host_paced": stages.host_paced}


def parts(args: argparse.Namespace) -> Iterator[tuple[str, Part, Callable[[], Part]]]:
    """Where in the result, what names the part there, and what makes the rest of it."""
    for case in [] if args.no_check else CASES:
        yield "checks", {"case": str(case)}, partial(check, *case)
    for tokens in args.tokens:
        for block in (64, 128):
            name = {"tokens": tokens, "block_size": block}
            yield "prefill", name, partial(prefill, tokens, block, args.repeats)
    for batch in args.batch:
        for block in (64, 128):
            name = {"batch": batch, "tokens": args.cached, "block_size": block}
            yield "decode", name, partial(decode, batch, args.cached, block, args.repeats)


def main() -> None:
    """Check, time, write."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-check", action="store_true", help="time without checking first")
    parser.add_argument("--tokens", type=int, nargs="*", default=[131072], help="of a prompt")
    parser.add_argument("--batch", type=int, nargs="*", default=[8], help="of a decode step")
    parser.add_argument("--cached", type=int, default=131072, help="tokens before a decode step")
    parser.add_argument("--resume", action="store_true", help="keep the parts that --out has")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no part after so many")
    args = parser.parse_args()
    torch.manual_seed(0)
    result: Part = {
        "what": "selector kernels; Llama-3.1-8B shape (32/8 heads x 128), bfloat16, random tensors",
        "command": "python benchmarks/gpu_selector.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "code": code_digest(Path(__file__)),
        "repeats": args.repeats,
        "checks": [],
        "prefill": [],
        "decode": [],
    }
    earlier = resumed(args.out, result, SAME) if args.resume else {}
    missing = 0
    for kind, name, make in parts(args):
        row = next((old for old in earlier.get(kind, []) if old.items() >= name.items()), None)
        if row is None:
            if time.monotonic() - start > args.seconds:
                missing += 1
                continue
            begin = time.monotonic()
            row = {**name, **make()}
            print(f"{kind}, {time.monotonic() - begin:.1f} s: {row}", flush=True)
            torch.cuda.empty_cache()
        result[kind].append(row)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if missing:
        sys.exit(f"{missing} parts are missing: run the same with --resume")


if __name__ == "__main__":
    with torch.no_grad():
        main()
