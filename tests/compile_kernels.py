"""Compiles the Triton kernels ahead of time for GPUs that need not be there; `test_triton.py` starts it."""

from __future__ import annotations

import sys
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sketch_walk.kernels import (
    triton_backward,
    triton_decode,
    triton_peaks,
    triton_prefill,
    triton_select,
    triton_shares,
    triton_sketch,
)
from sketch_walk.kernels.triton_tiles import Device, gdc_wait


class Target(NamedTuple):
    """A GPU, and what its launches may take."""

    gpu: GPUTarget
    device: Device


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), Device(108, 166912)),
    "sm_89": Target(GPUTarget("cuda", 89, 32), Device(142, 101376)),
    "sm_90": Target(GPUTarget("cuda", 90, 32), Device(132, 232448)),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Device(304, 65536)),
}
POINTERS = {
    "query": "*bf16", "key": "*bf16", "value": "*bf16", "output": "*bf16", "grad": "*bf16", "query_grad": "*bf16",
    "key_grad": "*bf16", "value_grad": "*bf16", "indices": "*i32", "counts": "*i32", "rows": "*i32", "starts": "*i32",
    "past": "*i64", "length": "*i64", "query_index": "*i64", "key_index": "*i64", "table": "*i32",
    "query_codes": "*i8", "query_scales": "*fp32", "last_rank": "*i32", "codes": "*u8", "scales": "*fp32",
    "matrix": "*bf16", "keys": "*i8", "key_scales": "*fp32", "scratch": "*fp16", "normalisers": "*fp32",
    "counter": "*i32", "step_of_spread": "fp32", "salience": "fp32", "contrast": "fp32",
    "lse": "*fp32", "delta": "*fp32",
    "partial": "*fp32", "peaks": "*fp32", "totals": "*fp32", "scale_log2": "fp32", "scale": "fp32",
    "budget": "*i64", "sink": "*i64", "local": "*i64", "scores": "*fp32", "best": "*fp32",
    "masses": "*fp32", "ranks": "*i64", "memory": "*fp32", "shared": "*fp32", "fade": "fp32", "ahead": "fp32",
    "across": "fp32", "tokens_per_power": "fp32",
}  # fmt: skip
STRIDES = {f"{x}_{axis}" for x in "qkvoc" for axis in ("batch", "head", "token", "page", "block")}
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 64
SHAPE = {
    "GROUP": HEADS // KV_HEADS, "BLOCK": BLOCK, "HEAD_DIM": HEAD_DIM, "PADDED_DIM": HEAD_DIM, "PER_HEAD": False,
    "WIDEN": False,
}  # fmt: skip
# The default rule: sub-blocks of 4, half of the sub-queries, every coordinate of a head.
PER_BLOCK, KEPT = BLOCK // 4, BLOCK // 8
PACKED = {
    "PER_BLOCK": PER_BLOCK, "QUARTER": HEAD_DIM // 4, "PADDED_QUARTER": HEAD_DIM // 4, "COLUMNS": HEAD_DIM,
}  # fmt: skip


def compile_for(
    kernel: triton.JITFunction,
    constants: dict[str, object],
    target: Target,
    warps: int = 4,
    stages: int = 2,
    pointers: dict[str, str] | None = None,
    **options: object,
) -> int:
    """Bytes of machine code; fails if a program takes more shared memory than the GPU has."""
    signature, values, attributes = {}, {}, {}
    if "PDL" in kernel.arg_names:
        constants = {
            "PDL": gdc_wait is not None and target.gpu.backend == "cuda" and target.gpu.arch >= 90,
            **constants,
        }
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(position,)] = "constexpr", constants[name]
        else:
            signature[name] = {**POINTERS, **(pointers or {})}.get(name, "i32")
        # As at run time: addresses, and strides of rows of 128 elements, are multiples of 16.
        if str(signature[name]).startswith("*") or name in STRIDES:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options |= {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=target.gpu, options=options)
    shared = compiled.metadata.shared
    assert shared <= target.device.shared_bytes, f"{kernel.__name__} takes {shared} bytes of {target.device}"
    if constants.get("PDL"):
        check_order(kernel.__name__, compiled.asm["ptx"])
    return len(compiled.asm["hsaco" if target.gpu.backend == "hip" else "cubin"])


def check_order(name: str, code: str) -> None:
    """A kernel that starts early writes nothing, and lets none start after it, before it has waited."""
    # The first kernel of a chain is launched the ordinary way.
    waits = 0 if name == "_sketch_step" else code.index("griddepcontrol.wait")
    for later in ("st.global", "griddepcontrol.launch_dependents"):
        at = code.find(later)
        assert at < 0 or at > waits, f"{name}: {later} before griddepcontrol.wait"
    assert name == "_merge" or "griddepcontrol.launch_dependents" in code, name


def prefill(target: Target, padded: bool) -> int:
    """The forward kernel; the padded one stores what the backward kernels need."""
    launch = triton_prefill.prefill_launch(HEADS, KV_HEADS, BLOCK, HEAD_DIM, 2, target.device)
    constants = {
        **SHAPE, "TILE_HEADS": launch.tile_heads, "QUERIES": launch.queries, "KEYS": launch.keys,
        "NEIGHBOURS": launch.neighbours, "STAGES": launch.num_stages, "WIDE": launch.wide,
        "PREFETCH": launch.prefetch, "INDEXED": padded,
        "DESCRIPTORS": False, "STORE_LSE": padded, "key_blocks": None, "value_blocks": None,
    }  # fmt: skip
    constants |= {} if padded else {"lse": None, "query_index": None, "key_index": None}
    return compile_for(triton_prefill._prefill, constants, target, launch.num_warps, launch.num_stages)


def backward(target: Target) -> int:
    """Both backward kernels, for a padded batch."""
    launch = triton_backward.backward_launch(HEADS, KV_HEADS, BLOCK, HEAD_DIM, 2)
    constants = {
        **SHAPE, "TILE_HEADS": launch.tile_heads, "KEYS": launch.tile, "QUERIES": launch.tile, "INDEXED": True,
    }  # fmt: skip
    kernels = (triton_backward._query_gradient, triton_backward._key_gradient)
    sizes = []
    for kernel in kernels:
        own = {name: value for name, value in constants.items() if name in kernel.arg_names}
        sizes.append(compile_for(kernel, own, target, launch.num_warps, launch.num_stages))
    return sum(sizes)


def decode(target: Target, padded: bool) -> int:
    """Split and merge: of a selection in a paged cache if padded, else of one that is remembered, and of all tokens."""
    page = 16 if padded else 0
    launch = triton_decode.decode_launch(8, KV_HEADS, 205, BLOCK, HEAD_DIM, 2, target.device, page)
    constants = {
        **SHAPE, "LANES": 16, "KEYS": launch.keys, "PAGE": page,
        "WHOLE": False, "STAGES": launch.num_stages, "UNITS": max(1, BLOCK // launch.keys),
        **({} if padded else {"table": None}),
    }  # fmt: skip
    size = 0
    forgets: dict[str, object] = {"masses": None, "memory": None, "shared": None, "past": None}
    for table in [forgets] if padded else [{}, {**forgets, "indices": None, "counts": None}]:
        size += compile_for(triton_decode._decode, constants | table, target, launch.num_warps, launch.num_stages)
        for merged in triton_decode.MERGED:
            both = {**constants, **table, "MERGED": merged}
            merge = {name: part for name, part in both.items() if name in triton_decode._merge.arg_names}
            size += compile_for(triton_decode._merge, merge, target)
    return size


def _limit(max_registers: int | None, target: Target) -> dict[str, int]:
    """The compiler's limit of a thread's registers, where it takes one: `register_limit`, but of the target."""
    return {} if max_registers is None or target.gpu.backend == "hip" else {"maxnreg": max_registers}


def sketch(target: Target, padded: bool) -> int:
    """Keys and queries, sketched, of a prompt and of a decode step."""
    own = {
        **triton_sketch._quarters(HEAD_DIM), "KEPT": KEPT, "COLUMNS": HEAD_DIM, "LANES": 16, "GROUP": HEADS // KV_HEADS,
        "INDEXED": padded, **({} if padded else {"key_index": None, "query_index": None}),
    }  # fmt: skip
    size = 0
    for kernel, blocks, launch, pointers in (
        (triton_sketch._sketch_keys, 2048, triton_sketch.LAUNCH, {}),
        (triton_sketch._sketch_queries, 2048, triton_sketch.LAUNCH, {"codes": "*i8"}),
        (triton_sketch._sketch_step, 1, triton_sketch.STEP_LAUNCH, {}),
    ):
        constants = own | triton_sketch._sizes(BLOCK, 4, blocks, HEAD_DIM, HEAD_DIM, launch)
        named = {name: value for name, value in constants.items() if name in kernel.arg_names}
        limit = _limit(launch.max_registers, target)
        size += compile_for(kernel, named, target, constants["num_warps"], pointers=pointers, **limit)
    return size


def peaks(target: Target, per_head: bool) -> int:
    """Scores of a prompt and the peaks of a decode step, from unpacked and from packed keys."""
    launch, hip = triton_peaks.PeakLaunch(), target.gpu.backend == "hip"
    group, tile_blocks = HEADS // KV_HEADS, launch.columns // PER_BLOCK
    constants = {
        "GROUP": group, "TILE_HEADS": group, "KEPT": KEPT, "TILE_ROWS": launch.rows // (group * KEPT),
        "ROWS": launch.rows, "TILE_BLOCKS": tile_blocks, "PER_BLOCK": PER_BLOCK, "KEY_SUB": 4, "COLUMNS": HEAD_DIM,
        "CHUNK": triton_peaks.CHUNK, "PER_HEAD": per_head, "WIDEN": False, "key_tiles": None,
    }  # fmt: skip
    unpack = {**PACKED, "TILE_BLOCKS": tile_blocks, "WORD": 4}
    size = compile_for(
        triton_peaks._peaks, constants, target, launch.num_warps, launch.num_stages,
        **_limit(launch.max_registers, target),
    )  # fmt: skip
    size += compile_for(triton_peaks._unpack, unpack, target, pointers={"output": "*i8"})
    # Launched early only where a GPU can do that: elsewhere without.
    for step_launch, early in ((triton_peaks.StepLaunch(), {"PDL": False}), (triton_peaks.OVERLAPPED, {})):
        blocks = step_launch.sub_keys // PER_BLOCK
        step = {
            **PACKED, "GROUP": group, "LANES": 16, "TILE_BLOCKS": blocks, "MEANS": max(16, blocks), "KEY_SUB": 4,
            "WIDEN": False, "ASM": not hip, "STAGES": step_launch.num_stages, **early,
        }  # fmt: skip
        size += compile_for(
            triton_peaks._decode_peaks, step, target, step_launch.num_warps,
            **_limit(step_launch.max_registers, target),
        )  # fmt: skip
    return size


def select(target: Target, rows: int) -> int:
    """Rows of a prompt of 2,048 blocks, or the kernels of a decode step's selection, shared and per key/value head."""
    launch = triton_select.select_launch(2048, rows, target.device)
    shape = {"BLOCK": BLOCK, "COLUMNS": 2048, "FILL": 512, "THRESHOLDS": launch.thresholds}
    if rows > 1:
        constants = {**shape, "PARTS": 1, "best": None, "memory": None, "shared": None}
        return compile_for(triton_select._select, constants, target, launch.num_warps)
    shared = {**shape, "HEADS": HEADS, "PARTS": 8, "PART_HEADS": 4, "TILE": 4}
    per_head = {**shared, "HEADS": HEADS // KV_HEADS, "PARTS": 1, "memory": None, "shared": None}
    short = {**shared, "PARTS": 1, "PART_HEADS": HEADS, "TILE": HEADS, "COLUMNS": 256}
    sizes = [
        compile_for(triton_select._from_peaks, {**constants, "CHOOSE": constants["PARTS"] == 1}, target, 8)
        for constants in (shared, per_head, short)
    ]
    constants = {**shape, "PARTS": 8, "past": None}
    return sum(sizes) + compile_for(triton_select._select, constants, target, launch.num_warps)


def shares(target: Target, padded: bool) -> int:
    """What blocks get from a prompt's last sixteen tokens."""
    group = HEADS // KV_HEADS
    lanes, keys = triton_shares.launch_sizes(group * 16, BLOCK, HEAD_DIM, 2)
    constants = {
        **SHAPE, "LANES": lanes, "LANE_TILES": -(-group * 16 // lanes), "KEYS": keys,
        "SPLIT": triton_shares.SPLIT_BLOCKS, "INDEXED": padded, **({} if padded else {"key_index": None}),
    }  # fmt: skip
    return compile_for(triton_shares._masses, constants, target)


if __name__ == "__main__":
    for name in sys.argv[1:] or TARGETS:
        target = TARGETS[name]
        for padded in (False, True):
            sizes = {
                "prefill": prefill(target, padded),
                "decode": decode(target, padded),
                "sketch": sketch(target, padded),
                "peaks": peaks(target, padded),
                "select": select(target, 1 if padded else 2048),
                "shares": shares(target, padded),
            }
            if padded:
                sizes["backward"] = backward(target)
            assert min(sizes.values()) > 0
            print(f"{name} padded={padded}: {sizes} bytes")
