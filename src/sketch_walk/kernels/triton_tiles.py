"""What the attention kernels share: tiles of rows, one step of the online softmax, and facts about the device.

bfloat16 products are wrong in Triton's interpreter (seen in Triton 3.7 and 3.9), so operands are widened there (WIDEN).
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before 3.4; no launch has PDL then
    gdc_launch_dependents = gdc_wait = None

LOG2_E = 1.4426950408889634
# Logit of a pair that is masked: finite, so that no difference of two of them is undefined.
HIDDEN = tl.constexpr(-1.0e30)
# Sequences times key/value heads of a decode step up to which its kernels overlap: on an H100, steps of 8 gained
# (63 to 58 us at 131,072 tokens), steps of 64 gained nothing or lost 2 %.
MOST_OVERLAPPED = 16
HEAD_DIMS = range(16, 257)
BLOCK_SIZES = (16, 32, 64, 128)


class Device(NamedTuple):
    """What a launch depends on: how many programs fill the GPU, and how much shared memory one of them may take."""

    processors: int
    shared_bytes: int


# The interpreter has no device; launches are then chosen as for a small GPU.
NO_DEVICE = Device(16, 65536)


def device_of(device: torch.device) -> Device:
    """Facts of the GPU that a tensor lies on."""
    return NO_DEVICE if device.type == "cpu" else _device(device.index or 0)


@functools.cache
def _device(index: int) -> Device:
    facts = triton.runtime.driver.active.utils.get_device_properties(index)
    return Device(facts["multiprocessor_count"], facts["max_shared_mem"])


def overlaps(device: torch.device, pairs: int) -> bool:
    """Whether a kernel may start before the one in front of it has ended (programmatic dependent launch).

    `pairs` are the sequences of a decode step times their key/value heads: only steps that leave most of the device
    idle gain by it (`MOST_OVERLAPPED`).

    `await_previous` waits until the kernel in front has ended and its writes are seen, and says nothing of earlier
    ones: they have ended because in every kernel here some program waits, and does so before it calls `release_next`,
    so that none starts before the kernel two in front has ended. Hence a kernel may read, before it waits, what the one
    in front does not write, if that one is of the same chain and the chain's first kernel was launched the ordinary
    way. It writes nothing before it waits, for its buffers may be memory that an earlier kernel still reads.
    """
    return pairs <= MOST_OVERLAPPED and device.type == "cuda" and _overlaps(device.index or 0)


@functools.cache
def _overlaps(index: int) -> bool:
    if gdc_wait is None or torch.version.hip is not None or interpreted():
        return False
    return torch.cuda.get_device_capability(index)[0] >= 9


def dependent(pdl: bool) -> dict[str, bool]:
    """Launch arguments of a kernel that, with `pdl`, starts early and waits by itself."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def register_limit(max_registers: int | None) -> dict[str, int]:
    """Launch argument that limits a thread's registers, where the compiler takes one."""
    return {} if max_registers is None or torch.version.hip else {"maxnreg": max_registers}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n` (n >= 1); Triton's own, made for kernels, is slow on the host."""
    return 1 << (n - 1).bit_length()


def padded_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two that a matrix unit takes."""
    return max(16, next_power_of_2(head_dim))


def unsupported(query: Tensor, key: Tensor, value: Tensor, block_size: int) -> str | None:
    """None if the kernels take these tensors, else the reason why not."""
    if block_size not in BLOCK_SIZES:
        return f"block_size {block_size} is not one of {BLOCK_SIZES}"
    if query.shape[3] not in HEAD_DIMS or value.shape[3] != query.shape[3]:
        return f"head_dim must be the same for query and value and lie in 16 ... 256, got {query.shape[3]}"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {query.dtype} is none of float16, bfloat16, float32"
    if any(x.dtype != query.dtype for x in (key, value)):
        return f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
    if any(x.stride(3) != 1 for x in (query, key, value)):
        return "the last dimension of query, key and value must be contiguous"
    return None


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Returns when the kernel in front has ended and its writes are seen. Not for loops that are pipelined."""
    if PDL:
        gdc_wait()


@triton.jit
def release_next(PDL: tl.constexpr):
    """Lets the next kernel start once all programs were here or have ended; after `await_previous`."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def load_tile(base, position, stride, dim, real, HEAD_DIM: tl.constexpr, WIDEN: tl.constexpr):
    """Rows `position` of a (tokens, dim) matrix: [rows, PADDED_DIM], zeros outside."""
    offsets = position.to(tl.int64)[:, None] * stride + dim[None, :]
    tile = tl.load(base + offsets, mask=real[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def load_lanes(base, offsets, dim, real, HEAD_DIM: tl.constexpr, WIDEN: tl.constexpr):
    """Rows that start at `offsets` elements: [rows, PADDED_DIM], zeros outside."""
    tile = tl.load(base + offsets[:, None] + dim[None, :], mask=real[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def positions(index, sequence, rank, count, size, INDEXED: tl.constexpr):
    """Where tokens of rank `rank` stand: themselves, or looked up in a (batch, size) table."""
    if INDEXED:
        at = tl.load(index + sequence.to(tl.int64) * size + rank, mask=(rank >= 0) & (rank < count), other=0)
    else:
        at = rank.to(tl.int64)
    return at


@triton.jit
def product(left, right, WIDEN: tl.constexpr):
    """left @ right with float32 accumulation; `left` takes the dtype of `right`."""
    if WIDEN:
        return tl.dot(left.to(tl.float32), right, input_precision="ieee")
    return tl.dot(left.to(right.dtype), right)


@triton.jit
def product_added(left, right, acc, WIDEN: tl.constexpr):
    """acc + left @ right."""
    if WIDEN:
        return tl.dot(left.to(tl.float32), right, acc, input_precision="ieee")
    return tl.dot(left.to(right.dtype), right, acc)


@triton.jit
def accumulate(acc, best, total, raw, values, scale_log2, WIDEN: tl.constexpr):
    """One step of the online softmax over unscaled logits [rows, keys] and values [keys, PADDED_DIM].

    `best` is the greatest logit so far in units of log 2. Scaling inside the exponent is one fused multiply-add.
    """
    now = tl.maximum(best, tl.max(raw, 1) * scale_log2)
    shrink = tl.exp2(best - now)
    weight = tl.exp2(raw * scale_log2 - now[:, None])
    total = total * shrink + tl.sum(weight, 1)
    acc = product_added(weight, values, acc * shrink[:, None], WIDEN)
    return acc, now, total
