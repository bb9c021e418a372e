"""Memory of steps: a generated token looks first where the tokens before it found something.

A sketch of four pooled keys finds the passage that a question is about, but blurs the single token that the next step
of an answer needs. Attention over the blocks that were read is exact, so each block's true share of it says what the
sketch could not: it is remembered, `SketchWalkConfig.step_memory` times less with every token, and its square stands in
as the block's score where the sketch gives less. A part of it does for the block behind it too: what an answer reads
next may be there, and no step has seen it yet. A part does in every other layer: one whose sketch misses the block
would never read it, and so never learn. What a prompt leaves to the memory: `sketch_walk.look_back`.

A memory does not change while it fades. What it holds of a block is the latest of **stamps**: the rank of a token,
later by log(share) / log(1 / step_memory), which is the rank at which a share of 1 would have left as much.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def recall(
    own: Float[Tensor, "batch selections slots"],
    shared: Float[Tensor, "batch slots"],
    scores: Float[Tensor, "batch selections 1 blocks"],
    layout: Layout,
    config: SketchWalkConfig,
) -> Float[Tensor, "batch selections 1 blocks"]:
    """Scores of a step of one token per sequence, with what is remembered.

    A block claims the square of what the layer remembers of it, of `config.step_ahead` times what that is of the block
    before it, or of `config.step_across` times what any layer remembers of it: weak shares give way to what the
    sketches say now. The attention that follows notes the shares of what it reads (`sketch_walk.kernels.attend`).
    """
    blocks = scores.shape[3]
    block = torch.arange(blocks, device=scores.device)
    rank = layout.length[:, None, None] - 1
    mine, all_layers = (config.step_memory ** (rank - x[..., :blocks]) for x in (own, shared[:, None]))
    before = torch.where(block > 1, mine.roll(1, 2), 0.0)
    claims = torch.maximum(torch.maximum(mine, config.step_ahead * before), config.step_across * all_layers)
    held = block * config.block_size < layout.length[:, None]
    return torch.maximum(scores, (claims.square() * held[:, None])[:, :, None])


def note(
    own: Float[Tensor, "batch selections slots"],
    shared: Float[Tensor, "batch slots"],
    shares: Float[Tensor, "batch heads tokens blocks"],
    ranks: Int[Tensor, "batch tokens"],
    config: SketchWalkConfig,
) -> None:
    """Remember the first blocks' shares of the tokens `ranks`, where they are more than is remembered, in place. Tokens
    of a negative rank say nothing.
    """
    stamps = ranks[:, None, :, None] - shares.log() / math.log(config.step_memory)
    stamps = stamps.masked_fill(ranks[:, None, :, None] < 0, -math.inf).amax(2)
    greatest = stamps.unflatten(1, (own.shape[1], -1)).amax(2)
    for memory, latest in ((own, greatest), (shared, greatest.amax(1))):
        held = memory[..., : latest.shape[-1]]
        held.copy_(torch.maximum(held, latest))
