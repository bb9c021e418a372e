"""One decode step of one layer on a CPU, selector and state included, against dense SDPA over the same cache.

    OMP_NUM_THREADS=2 python benchmarks/cpu_decode.py --out benchmarks/results/cpu_decode.json

SmolLM2 shape (9/3 heads x 64), bfloat16, random tensors, a walk handed in from a layer before. Median over steps, dense
and sparse in turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from sketch_walk import SketchWalkConfig, kernels, sketch_walk_attention
from sketch_walk.layout import make_layout
from sketch_walk.scoring import absorb_keys
from sketch_walk.state import LayerSketch

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)


def measure(tokens: int, config: SketchWalkConfig, steps: int) -> dict[str, float | int]:
    """Median milliseconds of a dense and of a sparse step at `tokens` cached tokens."""
    total = tokens + steps
    query = torch.randn(1, HEADS, total, HEAD_DIM, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, KV_HEADS, total, HEAD_DIM, dtype=torch.bfloat16)
    state = LayerSketch(config)
    # Random tensors: the rows of earlier blocks may stay unwritten, a step reads them all the same.
    absorb_keys(state, key[:, :, :tokens], make_layout(1, tokens, tokens, key.device), query)
    walk = None
    dense_times, sparse_times = [], []
    for now in range(tokens + 1, total + 1):
        q, k, v = query[:, :, now - 1 : now], key[:, :, :now].contiguous(), value[:, :, :now].contiguous()
        begin = time.perf_counter()
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        middle = time.perf_counter()
        if walk is not None and walk.shape[3] < -(-now // config.block_size):
            walk = F.pad(walk, (0, 1))
        result = sketch_walk_attention(q, k, v, config, state=state, walk=walk)
        sparse_times.append(time.perf_counter() - middle)
        dense_times.append(middle - begin)
        walk = result.walk
    dense, sparse = statistics.median(dense_times[3:]), statistics.median(sparse_times[3:])
    return {
        "tokens": tokens,
        "dense_ms": round(dense * 1e3, 3),
        "sparse_ms": round(sparse * 1e3, 3),
        "speedup": round(dense / sparse, 3),
        "block_density": round(config.budget(tokens // config.block_size) / (tokens // config.block_size), 4),
    }


def main() -> None:
    """Time every length and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = SketchWalkConfig(density=args.density, min_blocks=4)
    with torch.no_grad():
        rows = [measure(tokens, config, args.steps) for tokens in tqdm(LENGTHS, unit="length")]
    result = {
        "what": "one decode step of one layer, SmolLM2's shape (9/3 heads x 64), bfloat16, random tensors",
        "command": "python benchmarks/cpu_decode.py " + " ".join(sys.argv[1:]),
        "device": f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "config": config.to_dict(),
        "crossover_tokens": kernels.dense_crossover("cpu", decode=True),
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
