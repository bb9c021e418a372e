"""Stage 6 on a GPU: the Triton kernels over given selections against dense SDPA, checked against the reference first.

    python benchmarks/gpu_attention.py --out benchmarks/results/gpu_attention.json

Selections are random (sink and diagonal kept) at the stated block density; the selector's cost is NOT included, and no
accuracy belongs to random selections. Times are device time, the median of repeated runs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sketch_walk import SketchWalkConfig
from sketch_walk.kernels import attend
from sketch_walk.layout import make_layout
from sketch_walk.selection import select_blocks

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def random_selection(num_rows: int, first: int, config: SketchWalkConfig) -> tuple[Tensor, Tensor]:
    """Indices and counts of rows `first` ... `first + num_rows - 1` from random scores."""
    rows = (first + torch.arange(num_rows, device="cuda"))[None]
    scores = torch.rand(1, 1, num_rows, first + num_rows, device="cuda")
    selection = select_blocks(scores, rows, torch.ones_like(rows, dtype=torch.bool), config)
    return selection.indices[:, None], selection.counts[:, None]


def milliseconds(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median and spread (max - min) of device time."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), max(times) - min(times)


def tensors(batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh random bfloat16 query, key and value."""
    shapes = ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
    q, k, v = (torch.randn(batch, h, n, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for h, n in shapes)
    return q, k, v


def check(block: int, density: float) -> float:
    """Largest difference of the kernel from the reference at 4,000 tokens; fails above bfloat16's rounding."""
    config = SketchWalkConfig(block_size=block, density=density, min_blocks=2)
    q, k, v = tensors(1, 4000, 4000)
    layout = make_layout(1, 4000, 4000, q.device)
    indices, counts = random_selection(-(-4000 // block), 0, config)
    keys = {"block_size": block, "scale": HEAD_DIM**-0.5}
    fast, _ = attend(q, k, v, indices, counts, layout, impl="triton", **keys)
    exact, _ = attend(q.float(), k.float(), v.float(), indices, counts, layout, impl="reference", **keys)
    error = ((fast.float() - exact).norm() / exact.norm()).item()
    assert error < 1e-2, f"block {block}: relative error {error:.3g}"
    return error


def dense_times(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> dict[str, tuple[float, float]]:
    """SDPA with FlashAttention-2 and with cuDNN."""
    times = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            times[name] = milliseconds(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True), repeats
            )
    return times


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for block in (32, 64, 128):
        print(f"check block {block}: relative error {check(block, 0.3):.2e}")
    for tokens in (8192, 32768, 65536, 131072):
        q, k, v = tensors(1, tokens, tokens)
        layout = make_layout(1, tokens, tokens, q.device)
        dense = dense_times(q, k, v, args.repeats)
        for block in (64, 128):
            for density in (0.2, 0.05):
                config = SketchWalkConfig(block_size=block, density=density, min_blocks=2)
                indices, counts = random_selection(tokens // block, 0, config)
                keys = {"block_size": block, "scale": HEAD_DIM**-0.5, "impl": "triton"}
                call = partial(attend, q, k, v, indices, counts, layout, **keys)
                median, spread = milliseconds(call, args.repeats)
                read = counts.sum().item() / (counts.shape[2] * (counts.shape[2] + 1) / 2)
                rows.append(record("prefill", 1, tokens, block, read, median, spread, dense))
    for batch, tokens in ((1, 131072), (8, 131072)):
        q, k, v = tensors(batch, 1, tokens)
        layout = make_layout(batch, 1, tokens, q.device)
        dense = dense_times(q, k, v, args.repeats)
        for block in (64, 128):
            for density in (0.1, 0.05):
                config = SketchWalkConfig(block_size=block, density=density, min_blocks=2)
                indices, counts = random_selection(1, tokens // block - 1, config)
                indices, counts = indices.repeat(batch, 1, 1, 1), counts.repeat(batch, 1, 1)
                keys = {"block_size": block, "scale": HEAD_DIM**-0.5, "impl": "triton"}
                call = partial(attend, q, k, v, indices, counts, layout, **keys)
                median, spread = milliseconds(call, args.repeats)
                rows.append(record("decode", batch, tokens, block, density, median, spread, dense))
    result = {
        "what": "attention over random selections, no selector; Llama-3.1-8B shape (32/8 heads x 128), bfloat16",
        "command": "python benchmarks/gpu_attention.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "repeats": args.repeats,
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def record(
    phase: str, batch: int, tokens: int, block: int, density: float, median: float, spread: float, dense: dict[str, Any]
) -> dict[str, Any]:
    """One row, printed too."""
    row = {
        "phase": phase,
        "batch": batch,
        "tokens": tokens,
        "block_size": block,
        "block_density": round(density, 4),
        "triton_ms": round(median, 4),
        "triton_spread_ms": round(spread, 4),
        "flash_ms": round(dense["flash"][0], 4),
        "cudnn_ms": round(dense["cudnn"][0], 4),
        "over_flash": round(dense["flash"][0] / median, 2),
        "over_fastest_dense": round(min(t for t, _ in dense.values()) / median, 2),
    }
    print({name: row[name] for name in row if "spread" not in name})
    return row


if __name__ == "__main__":
    main()
