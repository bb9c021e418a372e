"""flash-attn-4 behind `impl="cute"` on one GPU: its routes against the reference, then against every other kernel.

    python benchmarks/gpu_cute.py --out benchmarks/results/gpu_cute.json

Selections are random (sink and diagonal kept) at the stated block density; the selector's cost is NOT included, and no
accuracy belongs to random selections. Times are device time in milliseconds, the median of repeated runs. A kernel that
fails, or differs from the reference, is printed as an error and not timed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sketch_walk import SketchWalkConfig
from sketch_walk.kernels import attend, available, flash_cute
from sketch_walk.kernels.flash_cute import Plan
from sketch_walk.layout import Layout, make_layout
from sketch_walk.selection import select_blocks

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LENGTHS, DENSITIES = (16384, 65536, 131072), (0.2, 0.05)
BF16, FP16 = torch.bfloat16, torch.float16
# batch, heads, kv_heads, new tokens, past tokens, head_dim, block, dtype, tokens behind the last key's, plan
CASES: list[tuple[int, int, int, int, int, int, int, torch.dtype, int, Plan | None]] = [
    (1, 8, 8, 1000, 0, 64, 64, BF16, 0, None),
    (1, 8, 2, 1000, 0, 128, 64, BF16, 200, None),
    (1, 8, 1, 1000, 0, 128, 64, FP16, 0, None),
    (2, 8, 2, 500, 333, 128, 64, BF16, 200, None),
    (1, 6, 2, 600, 0, 128, 64, BF16, 0, None),
    (1, 8, 2, 700, 0, 96, 64, BF16, 0, None),
    (1, 8, 4, 300, 64, 256, 64, BF16, 0, None),
    (2, 8, 2, 777, 0, 128, 128, BF16, 200, None),
    (2, 8, 2, 500, 333, 128, 128, BF16, 200, None),
    (1, 8, 2, 512, 512, 64, 128, FP16, 0, None),
    (1, 8, 8, 640, 0, 64, 128, BF16, 0, None),
    (1, 8, 1, 901, 128, 128, 128, FP16, 0, None),
    (1, 4, 2, 700, 0, 80, 128, BF16, 0, None),
    (1, 8, 2, 640, 0, 256, 128, BF16, 0, None),
    (1, 8, 2, 777, 256, 128, 128, BF16, 200, Plan("pages", (128, 128), False)),
]
# Ways to run a block size; "sequences" hands the rows over as one variable-length batch.
VARIANTS: dict[int, dict[str, Plan | str]] = {
    64: {
        "pages 128x64 packed": Plan("pages", (128, 64), True),
        "pages 192x64 packed": Plan("pages", (192, 64), True),
        "pages 128x128 packed": Plan("pages", (128, 128), True),
        "pages 64x64": Plan("pages", (64, 64), False),
        "sequences 128x64 packed": "128x64",
        "sequences 128x128 packed": "128x128",
        "blocks 64x64": Plan("blocks", (64, 64), False),
    },
    128: {
        "blocks 128x128": Plan("blocks", (128, 128), False),
        "blocks 128x128 packed": Plan("blocks", (128, 128), True),
        "pages 128x128": Plan("pages", (128, 128), False),
        "pages 128x128 packed": Plan("pages", (128, 128), True),
        "sequences 128x128 packed": "128x128",
    },
}
errors: list[str] = []


def guarded(what: str, run: Callable[[], Any]) -> Any:
    """The result of `run`, or None with one printed line if it fails."""
    try:
        return run()
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        errors.append(f"{what}: {text}")
        print(f"ERROR {what}: {text[:220]}", flush=True)
        return None


def tensors(
    batch: int, heads: int, kv_heads: int, new: int, keys: int, dim: int, dtype: torch.dtype, behind: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value; `behind` adds memory behind the last key that holds NaN, as a cache may."""
    query = torch.randn(batch, heads, new, dim, dtype=dtype, device="cuda")
    key, value = (torch.randn(batch, kv_heads, keys + behind, dim, dtype=dtype, device="cuda") for _ in range(2))
    for x in (key, value):
        x[:, :, keys:] = torch.nan
    return query, key[:, :, :keys], value[:, :, :keys]


def random_selection(batch: int, layout: Layout, block: int, density: float) -> tuple[Tensor, Tensor]:
    """Indices and counts of a call's rows from random scores."""
    config = SketchWalkConfig(block_size=block, density=density, min_blocks=2)
    num_rows = layout.num_query_blocks(block)
    rows = layout.first_block(block)[:, None] + torch.arange(num_rows, device="cuda")
    scores = torch.rand(batch, 1, num_rows, -(-layout.max_length // block), device="cuda")
    selection = select_blocks(scores, rows, torch.ones_like(rows, dtype=torch.bool), config)
    return selection.indices[:, None], selection.counts[:, None]


def as_sequences(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block: int, tile: str) -> Tensor:
    """Rows as a variable-length batch, for whole blocks of one sequence without a past; [heads, queries, head_dim]."""
    call = flash_cute.paged_call(q[0], k[0], v[0], indices[0, 0], counts[0, 0], block, block)
    steps = torch.arange(0, q.shape[2] + 1, block, dtype=torch.int32, device=q.device)
    m, n = (int(side) for side in tile.split("x"))
    result = flash_cute.forward()(
        q[0].transpose(0, 1),
        call.key,
        call.value,
        cu_seqlens_q=steps,
        max_seqlen_q=block,
        page_table=call.table,
        seqused_k=call.used,
        causal=True,
        softmax_scale=q.shape[3] ** -0.5,
        tile_mn=(m, n),
        pack_gqa=True,
    )
    return result[0].transpose(0, 1)


def run_variant(
    variant: Plan | str | None, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block: int
) -> Tensor:
    """One way to run; None is the package's own choice."""
    if isinstance(variant, str):
        return as_sequences(q, k, v, indices, counts, block, variant)[None]
    layout = make_layout(q.shape[0], q.shape[2], k.shape[2], q.device)
    reason = flash_cute.supported(q, k, v, indices, layout, block)
    assert reason is None, reason
    return flash_cute.attend_selected(
        q, k, v, indices, counts, layout, block_size=block, scale=q.shape[3] ** -0.5, plan=variant
    )


def relative_error(
    variant: Plan | str | None, q: Tensor, k: Tensor, v: Tensor, block: int, density: float
) -> tuple[float, float]:
    """Of a variant and of the Triton kernel against the reference in float32."""
    layout = make_layout(q.shape[0], q.shape[2], k.shape[2], q.device)
    indices, counts = random_selection(q.shape[0], layout, block, density)
    keys = {"block_size": block, "scale": q.shape[3] ** -0.5}
    exact, _ = attend(q.float(), k.float(), v.float(), indices, counts, layout, impl="reference", **keys)
    portable, _ = attend(q, k, v, indices, counts, layout, impl="triton", **keys)
    result = run_variant(variant, q, k, v, indices, counts, block)
    ours, theirs = (((x.float() - exact).norm() / exact.norm()).item() for x in (result, portable))
    assert ours < 1e-2, f"relative error {ours:.3g} against the reference (triton {theirs:.3g})"
    return ours, theirs


def milliseconds(run: Callable[[], Any], calls: int = 1) -> float:
    """Median of device time per call."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (len(times) < 11 and sum(times) * calls < 400):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def host_microseconds(run: Callable[[], Any], calls: int = 50) -> float:
    """Host time to launch one call."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / calls * 1e6


def dense(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention through one of the dense kernels."""
    if name == "flash-attn-4":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_cute.forward()(q, k, v, causal=True, softmax_scale=q.shape[3] ** -0.5)[0]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if name == "flash" else SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def check_all() -> dict[int, list[str]]:
    """Print errors against the reference; names of the variants that may be timed."""
    for case in CASES:
        batch, heads, kv_heads, new, past, dim, block, dtype, behind, plan = case
        what = f"{batch}x{heads}/{kv_heads}x{new}+{past}x{dim} block {block} {str(dtype)[6:]} behind {behind}"
        inputs = tensors(batch, heads, kv_heads, new, past + new, dim, dtype, behind)
        found = guarded(what, partial(relative_error, plan, *inputs, block, 0.4))
        if found:
            print(f"check {what}: {found[0]:.1e} (triton {found[1]:.1e})", flush=True)
    good: dict[int, list[str]] = {}
    for block, variants in VARIANTS.items():
        inputs = tensors(1, HEADS, KV_HEADS, 4096, 4096, HEAD_DIM, BF16)
        for name, variant in variants.items():
            found = guarded(f"block {block} {name}", partial(relative_error, variant, *inputs, block, 0.3))
            if found:
                good.setdefault(block, []).append(name)
    return good


def time_sparse(good: dict[int, list[str]]) -> list[dict[str, Any]]:
    """Time every variant that is right, and Triton, at every length and density."""
    rows: list[dict[str, Any]] = []
    for tokens in LENGTHS:
        q, k, v = tensors(1, HEADS, KV_HEADS, tokens, tokens, HEAD_DIM, BF16)
        layout = make_layout(1, tokens, tokens, q.device)
        for block in VARIANTS:
            for density in DENSITIES:
                indices, counts = random_selection(1, layout, block, density)
                pairs = counts.sum().item() * block * block - counts.numel() * block * (block - 1) // 2
                portable = partial(
                    attend, q, k, v, indices, counts, layout, block_size=block, scale=HEAD_DIM**-0.5, impl="triton"
                )
                runs: dict[str, Callable[[], Any]] = {"triton": portable}
                for name in good.get(block, []):
                    runs[name] = partial(run_variant, VARIANTS[block][name], q, k, v, indices, counts, block)
                for name, run in runs.items():
                    ms = guarded(f"{tokens} block {block} {name}", partial(milliseconds, run))
                    if ms:
                        rate = 4 * HEADS * HEAD_DIM * pairs / ms / 1e9
                        rows.append(
                            {"tokens": tokens, "block_size": block, "density": density, "kernel": name}
                            | {"ms": round(ms, 4), "tflops": round(rate, 1)}
                        )
    return rows


def time_chunks() -> list[dict[str, Any]]:
    """A chunk after a long past: the package's own choice against Triton, with the host's time."""
    rows: list[dict[str, Any]] = []
    keys = 131072
    for new in (1024, 4096):
        q, k, v = tensors(1, HEADS, KV_HEADS, new, keys, HEAD_DIM, BF16)
        layout = make_layout(1, new, keys, q.device)
        for block in VARIANTS:
            indices, counts = random_selection(1, layout, block, 0.2)
            for impl in ("triton", "cute"):
                options = {"block_size": block, "scale": HEAD_DIM**-0.5, "impl": impl}
                run = partial(attend, q, k, v, indices, counts, layout, **options)
                ms = guarded(f"chunk {new} block {block} {impl}", partial(milliseconds, run))
                if ms:
                    host = host_microseconds(run)
                    rows.append(
                        {"queries": new, "tokens": keys, "block_size": block, "density": 0.2, "kernel": impl}
                        | {"ms": round(ms, 4), "host_us": round(host, 1)}
                    )
    return rows


def time_dense() -> list[dict[str, Any]]:
    """Dense kernels from 512 tokens up; "first" is the wall time of cuDNN's first call at a new length."""
    rows: list[dict[str, Any]] = []
    for tokens in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072):
        q, k, v = tensors(1, HEADS, KV_HEADS, tokens, tokens, HEAD_DIM, BF16)
        row: dict[str, Any] = {"tokens": tokens}
        for name in ("flash", "cudnn", "flash-attn-4"):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run = partial(dense, name, q, k, v)
            if guarded(f"dense {name} {tokens}", run) is None:
                continue
            torch.cuda.synchronize()
            row[f"{name}_first_ms"] = round((time.perf_counter() - begin) * 1e3, 2)
            row[f"{name}_ms"] = round(milliseconds(run, 20 if tokens <= 4096 else 1), 4)
        rows.append(row)
    return rows


def print_table(sparse: list[dict[str, Any]], chunks: list[dict[str, Any]], dense_rows: list[dict[str, Any]]) -> None:
    """A line per kernel, a column per length and density."""
    columns = [(tokens, density) for tokens in LENGTHS for density in DENSITIES]
    heads = "".join(f"{f'{t // 1024}K {d:.0%}':>17}" for t, d in columns)
    print(f"{'ms (TFLOP/s)':32}{heads}")
    for block in VARIANTS:
        for name in ["triton", *VARIANTS[block]]:
            line = f"{f'block {block} {name}':32}"
            for tokens, density in columns:
                key = (tokens, block, density, name)
                row = [r for r in sparse if (r["tokens"], r["block_size"], r["density"], r["kernel"]) == key]
                line += f"{row[0]['ms']:>10.3f} ({row[0]['tflops']:>3.0f}) " if row else f"{'-':>17}"
            print(line)
    for chunk in chunks:
        print(" ".join(f"{name} {value}" for name, value in chunk.items()))
    for times in dense_rows:
        print("dense " + " ".join(f"{name} {value}" for name, value in times.items()), flush=True)


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    begin = time.perf_counter()
    print(f"kernels: {available()}; import: {flash_cute.import_error()}; {time.perf_counter() - begin:.1f} s")
    good = check_all()
    print(f"checked after {time.perf_counter() - begin:.0f} s", flush=True)
    sparse, chunks, dense_rows = time_sparse(good), time_chunks(), time_dense()
    print_table(sparse, chunks, dense_rows)
    print(f"{len(errors)} errors, {time.perf_counter() - begin:.0f} s")
    packages = ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
    result = {
        "what": "attention over random selections, no selector; Llama-3.1-8B shape (32/8 heads x 128), bfloat16",
        "command": "python benchmarks/gpu_cute.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "versions": {name: metadata.version(name) for name in packages},
        "errors": errors,
        "sparse": sparse,
        "chunks": chunks,
        "dense": dense_rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("what", "device", "versions", "errors")}))


if __name__ == "__main__":
    main()
