"""Stage 6 in Triton, for any GPU that Triton serves: prefill with gradients, and split-KV decode, over a page table.

The contract is `reference.attend_selected`'s, causal, without bias or mean correction. Under TRITON_INTERPRET=1 the
kernels run on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk.kernels.step_memory import StepMemory
from sketch_walk.kernels.triton_backward import SelectedAttention
from sketch_walk.kernels.triton_decode import attend_paged, decode
from sketch_walk.kernels.triton_prefill import prefill
from sketch_walk.kernels.triton_tiles import unsupported as supported
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped


def attend_selected(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    indices: Int[Tensor, "batch selections rows max_selected"],
    counts: Int[Tensor, "batch selections rows"],
    layout: Layout,
    *,
    block_size: int,
    scale: float,
    memory: StepMemory | None = None,
) -> Shaped[Tensor, "batch heads num_queries head_dim"]:
    """As `reference.attend_selected`, causal.

    Returns
    -------
    torch.Tensor
        Like `query`; 0 where a query is padding. Differentiable in query, key and value. No host synchronisation.
    """
    if scale < 0:
        # The running maximum of the logits is that of the products.
        query, scale = -query, -scale
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.shape[2] == 1 and (memory is not None or not gradients):
        with torch.no_grad():
            output = decode(
                query, key, value, indices, counts, layout.length, block_size, scale,
                table=layout.key_index, memory=memory, past=layout.past,
            )  # fmt: skip
        if not gradients:
            return output
    if gradients:
        # The backward pass has a forward pass of its own; what a step remembers is noted above.
        return SelectedAttention.apply(query, key, value, indices, counts, layout, block_size, scale)
    return prefill(query, key, value, indices, counts, layout, block_size, scale)


__all__ = ["attend_paged", "attend_selected", "supported"]
