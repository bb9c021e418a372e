"""Memory of steps: a generated token looks first where the tokens before it found something.

A sketch of four pooled keys finds the passage that a question is about, but blurs the single token that the next step
of an answer needs. Attention over the blocks that were read is exact, so each block's true share of it says what the
sketch could not: it is remembered, `SketchWalkConfig.step_memory` times less with every token, and stands in as the
block's score where the sketch gives less. A call of several tokens leaves the queries of its last ones. With these the
next step looks back over every block, and what they find counts as if each had been a step: a prompt in chunks leaves
what it leaves in one go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk import kernels
from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout
from sketch_walk.state import LAST_TOKENS, LayerSketch

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

# Tokens from which a dense prompt leaves anything: below, a copy of sixteen queries would count beside its attention.
DENSE_FROM = 4096


def fade(memory: Float[Tensor, "batch selections slots"], layout: Layout, config: SketchWalkConfig) -> None:
    """Let every sequence forget as much as its new tokens of the call are worth, in place."""
    memory.mul_((config.step_memory ** (layout.length - layout.past).float())[:, None, None])


def recall(
    memory: Float[Tensor, "batch selections slots"],
    scores: Float[Tensor, "batch selections 1 blocks"],
    layout: Layout,
    config: SketchWalkConfig,
) -> Float[Tensor, "batch selections 1 blocks"]:
    """Scores of a step of one token per sequence, with what is remembered, which fades, in place.

    The attention that follows notes the shares of the blocks it reads (`sketch_walk.kernels.attend`).
    """
    fade(memory, layout, config)
    blocks = scores.shape[3]
    held = torch.arange(blocks, device=scores.device) * config.block_size < layout.length[:, None]
    return torch.maximum(scores, (memory[:, :, :blocks] * held[:, None])[:, :, None])


def note(
    memory: Float[Tensor, "batch selections slots"],
    shares: Float[Tensor, "batch heads tokens blocks"],
    indices: Int[Tensor, "batch selections blocks"],
    ages: Int[Tensor, "batch tokens"],
    config: SketchWalkConfig,
) -> None:
    """Remember each block's greatest share, faded by the token's age, where it is more than is remembered, in place.

    `indices` are the blocks' numbers, -1 for none; tokens of a negative age say nothing.
    """
    weights = torch.where(ages >= 0, config.step_memory ** ages.float(), 0.0)
    greatest = (shares * weights[:, None, :, None]).amax(2)
    greatest = greatest.unflatten(1, (indices.shape[1], -1)).amax(2)
    slots = torch.where(indices >= 0, indices, memory.shape[2] - 1).long()
    memory.scatter_reduce_(2, slots, torch.where(indices >= 0, greatest, 0.0), "amax")


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
    size, memory = config.block_size, state.memory
    age = torch.arange(LAST_TOKENS, device=key.device)
    rank = stop[:, None] - 1 - age
    queries, kept = state.read_queries(rank)
    blocks = torch.arange(-(-layout.max_length // size), dtype=torch.int32, device=key.device)
    blocks = blocks.expand(*memory.shape[:2], -1)
    counts = (-(-stop // size)).to(torch.int32)[:, None].expand(-1, memory.shape[1])
    shares = kernels.token_shares(queries, key, blocks, counts, rank, layout, block_size=size, scale=scale, impl=impl)
    # What tokens before these found no longer counts, unless some of these were steps.
    memory.mul_((~(kept | (rank < 0)).all(1))[:, None, None])
    note(memory, shares, blocks, torch.where(kept, age, -1), config)
    state.looked(layout.num_keys)
