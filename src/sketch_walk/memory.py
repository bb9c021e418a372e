"""Memory of steps: a generated token looks first where the tokens before it found something.

A sketch of four pooled keys finds the passage that a question is about, but blurs the single token that the next step
of an answer needs. Attention over the blocks that were read is exact, so each block's true share of it says what the
sketch could not: it is remembered, `SketchWalkConfig.step_memory` times less with every token, and stands in as the
block's score where the sketch gives less. A longer call lets the memory
fade and leaves the shares of its last token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Float


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
