"""Compiles the Triton kernels ahead of time for GPUs that need not be there; `test_triton.py` starts it."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sketch_walk.kernels import triton_attention, triton_scores

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "query": "*bf16", "key": "*bf16", "value": "*bf16", "output": "*bf16", "indices": "*i32", "counts": "*i32",
    "past": "*i64", "length": "*i64", "query_index": "*i64", "key_index": "*i64",
    "queries": "*fp16", "last_rank": "*i64", "codes": "*i8", "scales": "*fp32",
    "partial": "*fp32", "peaks": "*fp32", "totals": "*fp32", "scale_log2": "fp32",
}  # fmt: skip
PREFILL = {
    "GROUP": 4, "TILE_HEADS": 2, "BLOCK": 64, "KEYS": 64, "HEAD_DIM": 128, "PADDED_DIM": 128, "PER_HEAD": False,
    "INDEXED": False, "WIDEN": False,
}  # fmt: skip
DECODE = {
    "GROUP": 4, "LANES": 16, "BLOCK": 64, "BLOCKS": 4, "HEAD_DIM": 128, "PADDED_DIM": 128, "PER_HEAD": False,
    "INDEXED": False, "WIDEN": False,
}  # fmt: skip
SCORES = {
    "GROUP": 4, "TILE_HEADS": 4, "SUBS": 16, "ROWS": 64, "KEYS": 128, "PER_BLOCK": 16, "KEY_SUB": 4, "WIDTH": 128,
    "PADDED": 128, "MEAN": False, "QUANTISED": True, "WIDEN": False,
}  # fmt: skip


def compile_for(kernel: triton.JITFunction, constants: dict[str, object], target: GPUTarget, padded: bool) -> int:
    """Bytes of machine code."""
    if "INDEXED" in constants:
        constants = {**constants, "INDEXED": padded}
    signature, values = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(position,)] = "constexpr", constants[name]
        elif name in ("query_index", "key_index") and not padded:
            signature[name], values[(position,)] = "constexpr", None
        else:
            signature[name] = POINTERS.get(name, "i32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    compiled = triton.compile(
        source, target=target, options={"num_warps": 8 if "INDEXED" in constants and "TILE_HEADS" in constants else 4}
    )
    return len(compiled.asm["hsaco" if target.backend == "hip" else "cubin"])


if __name__ == "__main__":
    for name in sys.argv[1:] or TARGETS:
        for padded in (False, True):
            prefill = compile_for(triton_attention._prefill, PREFILL, TARGETS[name], padded)
            decode = compile_for(triton_attention._decode, DECODE, TARGETS[name], padded)
            scores = compile_for(triton_scores._scores, {**SCORES, "MEAN": padded}, TARGETS[name], padded)
            assert min(prefill, decode, scores) > 0
            print(f"{name} padded={padded}: prefill {prefill}, decode {decode}, scores {scores} bytes")
