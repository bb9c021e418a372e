"""Launches of the Triton prefill against each other on a GPU: which way of cutting it into programs is fastest.

    python benchmarks/gpu_prefill_variants.py --out prefill_variants.json

Every variant is compiled in a process of its own and checked against the reference at 2,000 tokens before it is timed.
Selections are random (sink and diagonal kept), 32/8 heads x 128, bfloat16. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_attention import HEAD_DIM, HEADS, KV_HEADS, milliseconds, random_selection, tensors

from sketch_walk import SketchWalkConfig
from sketch_walk.kernels import attend_selected
from sketch_walk.kernels.triton_prefill import PrefillLaunch, prefill, prefill_launch
from sketch_walk.kernels.triton_tiles import device_of
from sketch_walk.layout import make_layout

GROUP = HEADS // KV_HEADS
# Each is one change, or a few that go together, of the launch that is the default.
CHANGES: dict[int, list[dict[str, Any]]] = {
    64: [
        {},
        {"num_warps": 4},
        {"num_stages": 2},
        {"num_stages": 4},
        {"num_stages": 2, "max_registers": 128},
        {"keys": 32, "max_registers": 128},
        {"keys": 32, "num_stages": 4},
        {"keys": 128, "num_stages": 2},
        {"tile_heads": 1, "num_warps": 4, "num_stages": 2, "neighbours": 4},
        {"tile_heads": 1, "num_warps": 4, "num_stages": 2, "neighbours": 4, "max_registers": 168},
        {"tile_heads": 4, "num_warps": 8, "num_stages": 2, "neighbours": 1},
        {"tile_heads": 4, "num_warps": 16, "num_stages": 2, "neighbours": 1},
        {"tile_heads": 4, "num_warps": 16, "num_stages": 3, "neighbours": 1},
        {"neighbours": 1},
        {"neighbours": HEADS // 2},
        {"wide": True},
        {"prefetch": False},
        {"descriptors": True},
        {"descriptors": True, "num_stages": 2, "max_registers": 128},
        {"descriptors": True, "num_stages": 2},
        {"descriptors": True, "tile_heads": 1, "num_warps": 4, "num_stages": 2, "neighbours": 4},
        {"descriptors": True, "tile_heads": 4, "num_warps": 16, "neighbours": 1},
    ],
    128: [
        {},
        {"num_stages": 2},
        {"num_stages": 2, "max_registers": 128},
        {"keys": 32, "max_registers": 128},
        {"keys": 128, "num_stages": 2},
        {"tile_heads": 2, "num_warps": 16, "num_stages": 2, "neighbours": 2},
        {"queries": 64, "num_warps": 4, "num_stages": 2},
        {"queries": 64, "tile_heads": 2, "neighbours": 2},
        {"descriptors": True, "queries": 64, "num_warps": 4, "num_stages": 2},
        {"neighbours": 1},
        {"neighbours": HEADS},
        {"prefetch": False},
        {"descriptors": True},
        {"descriptors": True, "num_stages": 2, "max_registers": 128},
        {"descriptors": True, "keys": 128, "num_stages": 2},
    ],
}


def launch_of(block: int, change: dict[str, Any]) -> PrefillLaunch:
    """The default launch of this GPU with some of its parts changed."""
    base = prefill_launch(HEADS, KV_HEADS, block, HEAD_DIM, 2, device_of(torch.device("cuda:0")))
    return replace(base, **change)


def check(block: int, change: dict[str, Any]) -> str:
    """Compile the variant and compare it with the reference: "" if it is right, else what is wrong."""
    torch.manual_seed(0)
    config = SketchWalkConfig(block_size=block, density=0.3, min_blocks=2)
    q, k, v = tensors(1, 2000, 2000)
    layout = make_layout(1, 2000, 2000, q.device)
    indices, counts = random_selection(-(-2000 // block), 0, config)
    scale = HEAD_DIM**-0.5
    try:
        fast = prefill(q, k, v, indices, counts, layout, block, scale, launch=launch_of(block, change))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    exact = attend_selected(
        q.float(), k.float(), v.float(), indices, counts, layout, block_size=block, scale=scale
    )  # fmt: skip
    error = ((fast.float() - exact).norm() / exact.norm()).item()
    return "" if error < 1e-2 else f"relative error {error:.3g}"


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128], choices=CHANGES)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    variants = [(block, change) for block in args.blocks for change in CHANGES[block]]
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        wrong = list(pool.map(check, *zip(*variants, strict=True)))
    torch.manual_seed(0)
    q, k, v = tensors(1, args.tokens, args.tokens)
    layout = make_layout(1, args.tokens, args.tokens, q.device)
    rows: list[dict[str, Any]] = []
    selections = {}
    for (block, change), reason in zip(variants, wrong, strict=True):
        row: dict[str, Any] = {"block_size": block, "change": change, "launch": asdict(launch_of(block, change))}
        if reason:
            row["refused"] = reason
        else:
            if block not in selections:
                config = SketchWalkConfig(block_size=block, density=args.density, min_blocks=2)
                selections[block] = random_selection(args.tokens // block, 0, config)
            indices, counts = selections[block]
            call = partial(
                prefill, q, k, v, indices, counts, layout, block, HEAD_DIM**-0.5, launch=launch_of(block, change)
            )
            median, spread = milliseconds(call, args.repeats)
            flops = 4 * HEADS * HEAD_DIM * block**2 * counts.sum().item()
            row |= {"ms": round(median, 3), "spread_ms": round(spread, 3), "tflops": round(flops / median / 1e9, 1)}
        rows.append(row)
        print({name: part for name, part in row.items() if name != "launch"}, flush=True)
    result = {
        "what": "launches of the Triton prefill over random selections; 32/8 heads x 128, bfloat16",
        "tokens": args.tokens,
        "density": args.density,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
