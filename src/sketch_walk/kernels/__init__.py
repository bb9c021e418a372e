"""Kernels of stage 6 behind one contract: a `BlockSelection` in, attention out.

`reference` is the specification (torch, any device); `triton` serves GPUs; `cute` is flash-attn-4 on
Hopper and newer, for prefill; `dense` is SDPA. "auto" picks and says what it picked; an explicit choice never falls
back.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.extras import MissingExtraError, is_installed
from sketch_walk.kernels import flash_cute, reference
from sketch_walk.kernels.dense import attend_dense
from sketch_walk.kernels.reference import attend_selected
from sketch_walk.kernels.step_memory import StepMemory
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

    from sketch_walk.kernels.triton_sketch import PackedQueries, StepQueries

IMPLEMENTATIONS = ("auto", "reference", "triton", "cute")

# Prompt tokens below which dense attention is not slower, selector and state included: measured in
# benchmarks/results/cpu_prompt.json and, on an H100 beside the fastest dense kernel, in gpu_cross.json (at 8,192 tokens
# the host's launches take as long as dense attention). Other devices take CUDA's.
PREFILL_CROSSOVER = {"cpu": 1536, "cuda": 16384}
# Cached tokens below which a decode step is not slower dense: benchmarks/results/cpu_decode.json. On a GPU the host's
# launches pace an eager step (gpu_eager.json): it pays from 65,536 tokens in eight sequences, never in one. Inside CUDA
# graphs it does (gpu_decode.json), and who captures one sets `dense_below`.
DECODE_CROSSOVER = {"cpu": 8192, "cuda": 1 << 20}

# Keys and queries from which "auto" prefers `cute` to `triton` in prefill, by major compute capability
# (benchmarks/results/gpu_cute.json: at 16,384 tokens each wins at one of two densities; with 1,024 queries after
# 131,072 keys `triton` is faster at block 128, with 4,096 `cute`).
CUTE_FROM = {9: (16384, 4096)}


def dense_crossover(device_type: str, decode: bool = False) -> int:
    """Tokens below which calls run dense attention when `SketchWalkConfig.dense_below` is None."""
    table = DECODE_CROSSOVER if decode else PREFILL_CROSSOVER
    return table.get(device_type, table["cuda"])


def available() -> dict[str, str | None]:
    """Every kernel's name, with None where it is usable here, else the reason why it is not."""
    return {"reference": None, "dense": None, "triton": _why_no_triton(), "cute": _why_no_cute()}


def check_impl(impl: str) -> None:
    """Raise unless `impl` names a kernel that is usable here.

    Raises
    ------
    ValueError
        For a name that is no kernel, or a kernel that cannot run on this machine.
    MissingExtraError
        If the kernel's package is not installed.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; expected one of {IMPLEMENTATIONS}")
    reason = {"triton": _why_no_triton, "cute": _why_no_cute}.get(impl, lambda: None)()
    if reason is not None:
        missing = "is not installed" in reason
        raise (MissingExtraError if missing else ValueError)(f"impl {impl!r} is not available: {reason}")


def attend(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    indices: Int[Tensor, "batch selections rows max_selected"],
    counts: Int[Tensor, "batch selections rows"],
    layout: Layout,
    *,
    block_size: int,
    scale: float,
    causal: bool = True,
    bias: Float[Tensor, "batch one_or_heads num_queries num_keys"] | None = None,
    mean_correction: bool = False,
    memory: StepMemory | None = None,
    impl: str = "auto",
) -> tuple[Tensor, str]:
    """Attention over the selected blocks, and the name of the kernel that computed it.

    A `memory` is updated in place (`reference.attend_selected`); it goes with calls of one query per sequence.

    Raises
    ------
    ValueError
        If an explicit `impl` cannot do what is asked; the message says what.
    """
    check_impl(impl)
    if impl in ("auto", "cute"):
        reason = _why_not_cute_here(
            query, key, value, indices, layout, block_size, causal, bias, mean_correction, impl == "auto"
        )
        if reason is None:
            output = flash_cute.attend_selected(
                query, key, value, indices, counts, layout, block_size=block_size, scale=scale
            )
            return output, "cute"
        if impl == "cute":
            raise ValueError(f"impl 'cute' cannot run this call: {reason}")
    if impl != "reference":
        reason = _why_not_triton_here(query, key, value, block_size, causal, bias, mean_correction, impl == "auto")
        if reason is None:
            from sketch_walk.kernels import triton_attention

            output = triton_attention.attend_selected(
                query, key, value, indices, counts, layout, block_size=block_size, scale=scale, memory=memory
            )
            return output, "triton"
        if impl == "triton":
            raise ValueError(f"impl 'triton' cannot run this call: {reason}")
    output = attend_selected(
        query,
        key,
        value,
        indices,
        counts,
        layout,
        block_size=block_size,
        scale=scale,
        causal=causal,
        bias=bias,
        mean_correction=mean_correction,
        memory=memory,
    )
    return output, "reference"


def token_shares(
    query: Shaped[Tensor, "batch heads tokens head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    ranks: Int[Tensor, "batch tokens"],
    layout: Layout,
    *,
    block_size: int,
    scale: float,
    impl: str = "auto",
) -> Float[Tensor, "batch heads tokens blocks"]:
    """`reference.token_shares`, by its Triton kernel where that serves ("cute" has none of its own)."""
    impl = "auto" if impl == "cute" else impl
    if impl != "reference":
        reason = _why_not_triton_here(query, key, key, block_size, True, None, False, impl == "auto")
        if reason is None:
            from sketch_walk.kernels import triton_shares

            return triton_shares.token_shares(query, key, ranks, layout, block_size=block_size, scale=scale)
        if impl == "triton":
            raise ValueError(f"impl 'triton' cannot run this call: {reason}")
    return reference.token_shares(query, key, ranks, layout, block_size=block_size, scale=scale)


def sketches_with_triton(impl: str, x: Tensor, config: SketchWalkConfig, width: int) -> bool:
    """Whether sketches and scores of a call are made by the Triton kernels.

    They serve "peak" scores from 8-bit sketches, reduced by "max"; other rules have the reference alone, whatever
    `impl` says. `impl` "reference" never takes them, "auto" takes them for tensors on a GPU.

    Raises
    ------
    ValueError
        If `impl` asks for kernels that cannot take blocks and sketches of these sizes; the message says why.
    """
    if not _takes_triton(impl, x):
        return False
    only_reference = config.block_score != "peak" or config.key_sketch_bits != 8 or config.reduce != "max"
    if only_reference or config.head_mode == "mean" or not config.use_srht:
        return False
    reason = _why_not_sketched(config, width)
    if reason is None and x.stride(3) != 1:
        reason = "the last dimension of query and key must be contiguous"
    if reason is not None and impl != "auto":
        raise ValueError(f"impl {impl!r} cannot run this call: {reason}")
    return reason is None


@lru_cache(maxsize=64)
def _why_not_sketched(config: SketchWalkConfig, width: int) -> str | None:
    """Why the sketch kernels do not take blocks and sketches of these sizes, or None."""
    from sketch_walk.kernels import triton_peaks

    size = config.block_size
    kept = config.kept_sub_queries(size // config.query_sub_block)
    return triton_peaks.unsupported(size, config.query_sub_block, config.key_sub_block, kept, width)


def product_dtype() -> torch.dtype:
    """Of the rotation in the sketch kernels: bfloat16 moves few 8-bit codes, by one; the interpreter takes float32."""
    return torch.float32 if os.environ.get("TRITON_INTERPRET") == "1" else torch.bfloat16


def sketch_keys(
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    layout: Layout,
    num_blocks: int,
    codes: Int[Tensor, "batch kv_heads blocks payload"],
    scales: Float[Tensor, "batch kv_heads blocks 2"],
    matrix: Float[Tensor, "head_dim width"],
    *,
    config: SketchWalkConfig,
    step: float,
) -> None:
    """Sketch the keys of the blocks that a call touches into a state's buffers, in one Triton kernel."""
    from sketch_walk.kernels import triton_sketch

    triton_sketch.sketch_keys(
        key,
        layout,
        num_blocks,
        codes,
        scales,
        matrix,
        block_size=config.block_size,
        key_sub_block=config.key_sub_block,
        step=step,
        salience=float(config.salience),
    )


def peak_scores(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    layout: Layout,
    codes: Int[Tensor, "batch kv_heads blocks payload"],
    scales: Float[Tensor, "batch kv_heads blocks 2"],
    matrix: Float[Tensor, "head_dim width"],
    *,
    scale: float,
    config: SketchWalkConfig,
) -> Float[Tensor, "batch selections rows blocks"]:
    """`sketch_walk.sketch.block_scores` of a call, from its queries and the stored key sketches, in Triton."""
    from sketch_walk.kernels import triton_peaks, triton_select, triton_sketch

    per_head = config.head_mode == "per_kv_head"
    queries = triton_sketch.sketch_queries(
        query,
        layout,
        matrix,
        block_size=config.block_size,
        query_sub_block=config.query_sub_block,
        kept=config.kept_sub_queries(config.block_size // config.query_sub_block),
        salience=float(config.salience),
        contrast=float(config.query_contrast),
    )
    if query.shape[2] == 1:
        peaks = _step_peaks(queries, layout, codes, scales, scale, config)
        return triton_select.scores_from_peaks(peaks, kv_heads=codes.shape[1], per_head=per_head)
    return triton_peaks.peak_scores(
        queries,
        codes,
        scales,
        layout.length,
        scale=scale,
        per_block=config.block_size // config.key_sub_block,
        key_sub_block=config.key_sub_block,
        per_kv_head=per_head,
    )


def _step_peaks(
    queries: PackedQueries | StepQueries,
    layout: Layout,
    codes: Tensor,
    scales: Tensor,
    scale: float,
    config: SketchWalkConfig,
    after_step: bool = False,
) -> Float[Tensor, "batch heads blocks"]:
    """Best logit of every block for one query per sequence."""
    from sketch_walk.kernels import triton_peaks

    return triton_peaks.decode_peaks(
        queries,
        codes,
        scales,
        layout.length,
        scale=scale,
        per_block=config.block_size // config.key_sub_block,
        key_sub_block=config.key_sub_block,
        after_step=after_step,
    )


def step_selection(
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    query: Shaped[Tensor, "batch heads 1 head_dim"],
    layout: Layout,
    codes: Int[Tensor, "batch kv_heads blocks payload"],
    scales: Float[Tensor, "batch kv_heads blocks 2"],
    matrix: Float[Tensor, "head_dim width"],
    row_counts: tuple[Tensor, Tensor, Tensor],
    memory: StepMemory | None,
    *,
    step: float,
    scale: float,
    width: int,
    config: SketchWalkConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, indices and counts of one decode step (`sketch_keys`, `peak_scores`, then `select_rows`) in three or four
    kernels.
    """
    from sketch_walk.kernels import triton_select, triton_sketch

    queries = triton_sketch.sketch_step(
        key,
        query,
        layout,
        codes,
        scales,
        matrix,
        block_size=config.block_size,
        key_sub_block=config.key_sub_block,
        step=step,
        salience=float(config.salience),
    )
    peaks = _step_peaks(queries, layout, codes, scales, scale, config, after_step=True)
    return triton_select.select_from_peaks(
        peaks,
        layout.length,
        *row_counts,
        width=width,
        block_size=config.block_size,
        kv_heads=codes.shape[1],
        per_head=config.head_mode == "per_kv_head",
        memory=memory,
        after_peaks=True,
    )


def selects_with_triton(impl: str, scores: Tensor) -> bool:
    """Whether blocks are selected by the Triton kernel: on a GPU, from float32 scores, unless `impl` is "reference"."""
    if not _takes_triton(impl, scores):
        return False
    from sketch_walk.kernels import triton_select

    return triton_select.unsupported(scores) is None


def select_rows(
    scores: Float[Tensor, "batch selections rows blocks"],
    layout: Layout,
    row_counts: tuple[Tensor, Tensor, Tensor],
    *,
    width: int,
    block_size: int,
    per_head: bool,
    tail: int = 0,
) -> tuple[Tensor, Tensor]:
    """Indices and counts of `sketch_walk.selection.select_blocks`, in one Triton kernel.

    Parameters
    ----------
    row_counts : tuple of torch.Tensor
        `sketch_walk.selection.row_counts`: blocks to read, first and last ones forced.
    width : int
        Columns of the page table.
    tail : int
        Last blocks of each sequence whose rows read everything.
    """
    from sketch_walk.kernels import triton_select

    past = None if layout.num_queries == 1 else layout.past
    indices, counts = triton_select.select_rows(
        scores, past, layout.length, *row_counts, width=width, block_size=block_size, per_head=per_head, tail=tail
    )
    return (indices, counts) if per_head else (indices[:, 0], counts[:, 0])


def _takes_triton(impl: str, x: Tensor) -> bool:
    """Whether `impl` leaves a stage to Triton here: "auto" does for tensors on a GPU, outside compiled graphs.

    The launches look at the device, which a graph that is being compiled cannot hold.
    """
    if impl == "reference" or (impl == "auto" and (not x.is_cuda or torch.compiler.is_compiling())):
        return False
    # A tensor on a GPU says that there is one.
    return is_installed("triton") if x.is_cuda else _why_no_triton() is None


def _why_no_triton() -> str | None:
    if not is_installed("triton"):
        return 'triton is not installed; run: pip install "sketch_walk[triton]"'
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "no GPU is visible (TRITON_INTERPRET=1 runs the kernel on the CPU, slowly)"


def _why_no_cute() -> str | None:
    if not flash_cute.is_installed():
        return 'flash-attn-4 is not installed; run: pip install "sketch_walk[hopper]"'
    if not is_installed("triton"):
        return 'triton is not installed; run: pip install "sketch_walk[hopper]"'
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no NVIDIA GPU is visible"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 9 else f"it needs a Hopper or newer GPU; this one's compute capability is {major}.{minor}"


def _why_not_cute_here(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    layout: Layout,
    block_size: int,
    causal: bool,
    bias: Tensor | None,
    mean_correction: bool,
    automatic: bool,
) -> str | None:
    if automatic:
        if not query.is_cuda or torch.version.hip is not None or torch.compiler.is_compiling():
            return "the tensors are not on an NVIDIA GPU, or a graph is being compiled"
        if query.shape[2] == 1:
            return "it is for prompts"
        least = CUTE_FROM.get(torch.cuda.get_device_capability(query.device)[0])
        if least is None or key.shape[2] < least[0] or query.shape[2] < least[1]:
            return "it is not known to be faster here"
        if _why_no_cute() is not None:
            return "flash-attn-4 is not available"
    reason = _why_not_plain(causal, bias, mean_correction)
    return reason or flash_cute.supported(query, key, value, indices, layout, block_size)


def _why_not_triton_here(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    causal: bool,
    bias: Tensor | None,
    mean_correction: bool,
    automatic: bool,
) -> str | None:
    if not _takes_triton("auto" if automatic else "triton", query):
        return "triton is not available, the tensors are not on a GPU, or a graph is being compiled"
    from sketch_walk.kernels import triton_attention

    return _why_not_plain(causal, bias, mean_correction) or triton_attention.supported(query, key, value, block_size)


def _why_not_plain(causal: bool, bias: Tensor | None, mean_correction: bool) -> str | None:
    """What the reference kernel alone can do, if it is asked for."""
    if not causal:
        return "it is causal only"
    if bias is not None:
        return "it takes no mask of queries by keys"
    return "it has no mean correction" if mean_correction else None


__all__ = [
    "IMPLEMENTATIONS",
    "StepMemory",
    "attend",
    "attend_dense",
    "attend_selected",
    "available",
    "check_impl",
    "dense_crossover",
    "peak_scores",
    "product_dtype",
    "select_rows",
    "selects_with_triton",
    "sketch_keys",
    "sketches_with_triton",
    "step_selection",
    "token_shares",
]
