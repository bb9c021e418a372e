"""Dense attention: what runs below the crossover and in layers that stay dense.

Torch's SDPA, unless another installed kernel has been measured to be faster on the GPU at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sketch_walk.extras import is_installed
from sketch_walk.kernels import flash_cute
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Shaped

# Queries per masked slice: bounds the mask of a padded batch to this many rows.
QUERY_SLICE = 1024
# Keys per block where one query reads a whole cache.
DECODE_BLOCK = 64

# By major compute capability, best first: the keys from which a kernel beats those after it, and torch's own choice
# (benchmarks/results/gpu_cute.json). cuDNN takes 65 ms for the first call of every length, as much as it saves a model
# of 32 layers at 16,384 tokens; flash-attn-4 compiles once for all lengths.
FASTEST_FROM = {9: {"flash-attn-4": 2048, "cudnn": 16384}}
# The same while a CUDA graph is captured, which leaves the host out (gpu_short_graph.json): elsewhere a short prompt
# waits for flash-attn-4's Python longer than for the device (gpu_short.json).
FASTEST_CAPTURED_FROM = {9: {"flash-attn-4": 512, "cudnn": 16384}}


def fastest_dense(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
) -> str | None:
    """The kernel for unpadded causal attention of the last `num_queries` tokens; None leaves the choice to torch."""
    if not query.is_cuda or torch.version.hip is not None or torch.compiler.is_compiling():
        return None
    tables = FASTEST_CAPTURED_FROM if torch.cuda.is_current_stream_capturing() else FASTEST_FROM
    table = tables.get(torch.cuda.get_device_capability(query.device)[0], {})
    for name, start in table.items():
        if key.shape[2] >= start and _why_not(name, query, key, value) is None:
            return name
    return None


def _why_not(name: str, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if name == "flash-attn-4":
        return flash_cute.dense_supported(query, key, value)
    if query.shape[2] != key.shape[2]:
        return "its causal mask starts at the first key"
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, key.shape[1] != query.shape[1])
    return None if torch.backends.cuda.can_use_cudnn_attention(parameters) else "torch does not run it here"


def _step_with_triton(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_filled` serves: on a GPU with Triton, outside compiled graphs, without gradients."""
    if not query.is_cuda or torch.compiler.is_compiling() or not is_installed("triton"):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return False
    from sketch_walk.kernels import triton_attention

    return triton_attention.supported(query, key, value, DECODE_BLOCK) is None


def attend_filled(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """One query per sequence over the filled part of a cache, whose length stays on the device.

    SDPA would need a mask, and with it its slowest kernel. `scale` is at least 0.
    """
    from sketch_walk.kernels.triton_decode import decode

    return decode(query, key, value, None, None, layout.length, DECODE_BLOCK, scale)


def attend_dense(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    layout: Layout,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Shaped[Tensor, "batch heads num_queries head_dim"]:
    """Causal attention over all real keys; outputs of padding queries are finite and meaningless."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    grouped = key.shape[1] != query.shape[1]
    filled = layout.bounds is None and layout.key_index is None
    if filled and num_queries == 1 and not dropout and scale >= 0 and _step_with_triton(query, key, value):
        return attend_filled(query, key, value, layout, scale)
    unpadded = layout.key_index is None and layout.bounds is not None
    if unpadded and num_queries > 1 and not dropout and layout.bounds:
        length = layout.bounds[0][1]
        keys, values = (key, value) if length == num_keys else (key[:, :, :length], value[:, :, :length])
        fastest = fastest_dense(query, keys, values)
        if fastest == "flash-attn-4":
            return flash_cute.attend_dense(query, keys, values, scale)
        if fastest == "cudnn":
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(
                    query, keys, values, scale=scale, is_causal=True, enable_gqa=grouped
                )
    if unpadded and (num_queries == num_keys or num_queries == 1):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scale, is_causal=num_queries > 1, enable_gqa=grouped
        )
    key_rank, query_rank = layout.ranks()
    results = []
    for lo in range(0, num_queries, QUERY_SLICE):
        rank = query_rank[:, lo : lo + QUERY_SLICE, None]
        visible = (key_rank[:, None] >= 0) & (key_rank[:, None] <= rank)
        visible |= rank < 0
        results.append(
            F.scaled_dot_product_attention(
                query[:, :, lo : lo + QUERY_SLICE],
                key,
                value,
                attn_mask=visible[:, None],
                dropout_p=dropout,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return results[0] if len(results) == 1 else torch.cat(results, 2)
