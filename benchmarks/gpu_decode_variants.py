"""Triton decode on a GPU: launches against each other and against dense SDPA over the same cache, in CUDA graphs.

    python benchmarks/gpu_decode_variants.py --out decode_variants.json

A graph holds several steps, each with a random selection of its own, so that no step finds its blocks in the L2 cache.
Effective bandwidth counts the keys and values of the selected blocks (dense: of all). 32/8 heads x 128, bfloat16; the
selector is not included. Every launch is checked against the reference first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from gpu_attention import HEAD_DIM, KV_HEADS, milliseconds, random_selection, tensors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sketch_walk import SketchWalkConfig
from sketch_walk.kernels import attend_selected
from sketch_walk.kernels.triton_decode import DecodeLaunch, attend_paged, decode, decode_launch
from sketch_walk.kernels.triton_tiles import device_of
from sketch_walk.layout import make_layout

STEPS = 8
SCALE = HEAD_DIM**-0.5
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
LAUNCHES = [
    *(DecodeLaunch(blocks, 64, 4, stages) for blocks in (2, 4, 8, 16) for stages in (2, 3, 4)),
    *(DecodeLaunch(blocks, 32, 4, 4) for blocks in (4, 16)),
    *(DecodeLaunch(blocks, 64, 8, 3) for blocks in (4, 16)),
    *(DecodeLaunch(blocks, 128, 4, 2) for blocks in (4, 16)),
]


def check(launch: DecodeLaunch | None, block: int) -> str:
    """Compile the launch and compare it with the reference: "" if it is right, else what is wrong."""
    torch.manual_seed(0)
    q, k, v = tensors(2, 1, 8000)
    layout = make_layout(2, 1, 8000, q.device)
    config = SketchWalkConfig(block_size=block, density=0.3, min_blocks=2)
    indices, counts = selections(2, 8000, config)
    try:
        fast = decode(q, k, v, indices, counts, layout.length, block, SCALE, launch=launch)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    exact = attend_selected(
        q.float(), k.float(), v.float(), indices, counts, layout, block_size=block, scale=SCALE
    )  # fmt: skip
    error = ((fast.float() - exact).norm() / exact.norm()).item()
    return "" if error < 1e-2 else f"relative error {error:.3g}"


def selections(batch: int, tokens: int, config: SketchWalkConfig) -> tuple[Tensor, Tensor]:
    """A random selection for each sequence."""
    rows = [random_selection(1, -(-tokens // config.block_size) - 1, config) for _ in range(batch)]
    return torch.cat([indices for indices, _ in rows]), torch.cat([counts for _, counts in rows])


def graphed(steps: list[Callable[[], Tensor]], repeats: int) -> float:
    """Milliseconds of one step, the median over replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return milliseconds(graph.replay, repeats)[0] / len(steps)


def sparse_steps(
    cache: tuple[Tensor, Tensor, Tensor, Tensor],
    chosen: list[tuple[Tensor, Tensor]],
    block: int,
    launch: DecodeLaunch | None,
) -> list[Callable[[], Tensor]]:
    """One decode step for each selection."""
    q, k, v, length = cache
    return [
        partial(decode, q, k, v, indices, counts, length, block, SCALE, launch=launch) for indices, counts in chosen
    ]


def paged(k: Tensor, v: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same cache in shuffled pages, and its block table."""
    batch, _, tokens, _ = k.shape
    table = torch.randperm(batch * tokens // page, device=k.device).view(batch, -1)
    pages = []
    for x in (k, v):
        pages.append(torch.empty(table.numel(), page, KV_HEADS, HEAD_DIM, dtype=x.dtype, device=x.device))
        pages[-1][table.flatten()] = x.transpose(1, 2).reshape(-1, page, KV_HEADS, HEAD_DIM)
    return pages[0], pages[1], table.int()


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    block, tokens = args.block, args.tokens
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        wrong = list(pool.map(check, LAUNCHES, [block] * len(LAUNCHES)))
    default = check(None, block)
    assert not default, default
    for launch, reason in zip(LAUNCHES, wrong, strict=True):
        if reason:
            print(f"refused {launch}: {reason}")
    launches = [launch for launch, reason in zip(LAUNCHES, wrong, strict=True) if not reason]
    rows: list[dict[str, Any]] = []

    def record(name: str, batch: int, density: float, ms: float, read: float, **more: Any) -> None:
        row = {"name": name, "batch": batch, "density": density, "ms": round(ms, 4)}
        row |= {"tb_per_s": round(read / ms / 1e9, 3), **more}
        rows.append(row)
        print(row, flush=True)

    per_token = 2 * KV_HEADS * HEAD_DIM * 2
    for batch in args.batches:
        torch.manual_seed(batch)
        q, k, v = tensors(batch, 1, tokens)
        length = make_layout(batch, 1, tokens, q.device).length
        cache = (q, k, v, length)
        for name, backend in DENSE.items():
            with sdpa_kernel(backend):
                try:
                    ms = graphed([partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)], args.repeats)
                except RuntimeError as error:
                    print(f"refused {name} at batch {batch}: {str(error)[:120]}")
                    continue
            record(name, batch, 1.0, ms, batch * tokens * per_token)
        for density in args.densities:
            config = SketchWalkConfig(block_size=block, density=density, min_blocks=2)
            chosen = [selections(batch, tokens, config) for _ in range(STEPS)]
            read = sum(int(counts.sum()) for _, counts in chosen) * block * per_token / STEPS
            width = chosen[0][0].shape[3]
            own = decode_launch(batch, KV_HEADS, width, block, HEAD_DIM, 2, device_of(q.device))
            record(
                "default",
                batch,
                density,
                graphed(sparse_steps(cache, chosen, block, None), args.repeats),
                read,
                launch=asdict(own),
            )
            for launch in launches:
                ms = graphed(sparse_steps(cache, chosen, block, launch), args.repeats)
                record("triton", batch, density, ms, read, launch=asdict(launch))
            if batch > 8:
                continue
            for page in (16, 64):
                keys, values, table = paged(k, v, page)
                calls = [
                    partial(attend_paged, q, keys, values, table, indices, counts, length, block, SCALE)
                    for indices, counts in chosen
                ]
                record(f"paged {page}", batch, density, graphed(calls, args.repeats), read)
                del keys, values, table, calls
        del q, k, v, cache
    result = {
        "what": "decode over random selections in CUDA graphs, no selector; 32/8 heads x 128, bfloat16",
        "tokens": tokens,
        "block_size": block,
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
