"""What a prompt leaves to the memory of steps: its last queries, with which the next step looks back.

A call of several tokens leaves the queries of its last ones. With these the next step looks back over every block, and
what they find counts as if each had been a step (`sketch_walk.memory`): a question has often ended some tokens before
its answer begins, and what it needs may lie in no block that its row chose. A prompt in chunks leaves what it leaves in
one go.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk import kernels
from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout
from sketch_walk.memory import note
from sketch_walk.state import LAST_TOKENS, LayerSketch

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped

# Tokens from which a dense prompt leaves anything: below, a copy of sixteen queries would count beside its attention.
DENSE_FROM = 4096


def defers(config: SketchWalkConfig, num_queries: int, stop: int) -> bool:
    """Whether a dense call up to position `stop` keeps queries for the sparse call after it.

    For the memory of steps from a little before `DENSE_FROM` on: the prompt's last tokens may be in two calls.
    """
    return config.uses_walk or (config.remembers and num_queries > 1 and stop > DENSE_FROM - LAST_TOKENS)


def leave(
    state: LayerSketch,
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    layout: Layout,
    scale: float,
    config: SketchWalkConfig,
    impl: str = "auto",
) -> None:
    """What a call of several tokens, or the last of its queries, leaves to the steps after it.

    A state of fixed capacity looks back at once: its steps may be captured in a graph, where each does the same.
    """
    state.keep_queries(query, layout)
    state.unseen = True
    if state.capacity is not None:
        look_back(state, key, layout.length, layout, scale, config, impl)


def look_back(
    state: LayerSketch,
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    stop: Int[Tensor, " batch"],
    layout: Layout,
    scale: float,
    config: SketchWalkConfig,
    impl: str = "auto",
) -> None:
    """Note what the last tokens before the ranks `stop` find among all blocks up to their own, as if each had been a
    step. Tokens whose queries are not kept were steps, or are gone.
    """
    assert state.memory is not None
    assert state.shared is not None
    age = torch.arange(LAST_TOKENS, device=key.device)
    rank = stop[:, None] - 1 - age
    queries, kept = state.read_queries(rank)
    shares = kernels.token_shares(queries, key, rank, layout, block_size=config.block_size, scale=scale, impl=impl)
    # What tokens before these found no longer counts, unless some of these were steps.
    afresh = (kept | (rank < 0)).all(1)
    state.memory.masked_fill_(afresh[:, None, None], -math.inf)
    if state.owns_shared:
        state.shared.memory.masked_fill_(afresh[:, None], -math.inf)
    note(state.memory, state.shared.memory, shares, torch.where(kept, rank, -1), config)
    state.looked(layout.num_keys)
