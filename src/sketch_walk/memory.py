"""Memory of steps: a generated token looks first where the tokens before it found something.

A sketch of four pooled keys finds the passage that a question is about, but blurs the single token that the next step
of an answer needs. Attention over the blocks that were read is exact, so each block's true share of it says what the
sketch could not: it is remembered, `SketchWalkConfig.step_memory` times less with every token, and its square stands in
as the block's score where the sketch gives less. A part of it does for the block behind it too: what an answer reads
next may be there, and no step has seen it yet. What a prompt leaves to the memory: `sketch_walk.look_back`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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

    A block claims the square of what is remembered of it, or of `config.step_ahead` times what is of the one before it:
    weak shares give way to what the sketches say now. The attention that follows notes the shares of what it reads
    (`sketch_walk.kernels.attend`).
    """
    fade(memory, layout, config)
    blocks = scores.shape[3]
    block = torch.arange(blocks, device=scores.device)
    claims = memory[:, :, :blocks]
    before = torch.where(block > 1, claims.roll(1, 2), 0.0)
    claims = torch.maximum(claims, config.step_ahead * before)
    held = block * config.block_size < layout.length[:, None]
    return torch.maximum(scores, (claims.square() * held[:, None])[:, :, None])


def note(
    memory: Float[Tensor, "batch selections slots"],
    shares: Float[Tensor, "batch heads tokens blocks"],
    ages: Int[Tensor, "batch tokens"],
    config: SketchWalkConfig,
) -> None:
    """Remember the first blocks' greatest shares, faded by the tokens' ages, where they are more than is remembered, in
    place. Tokens of a negative age say nothing.
    """
    weights = torch.where(ages >= 0, config.step_memory ** ages.float(), 0.0)
    greatest = (shares * weights[:, None, :, None]).amax(2).unflatten(1, (memory.shape[1], -1)).amax(2)
    held = memory[:, :, : shares.shape[3]]
    held.copy_(torch.maximum(held, greatest))
