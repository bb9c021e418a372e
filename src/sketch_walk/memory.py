"""Memory of steps: a generated token looks first where the tokens before it found something.

A sketch of four pooled keys finds the passage that a question is about, but blurs the single token that the next step
of an answer needs. Attention over the blocks that were read is exact, so each block's true share of it says what the
sketch could not: it is remembered, `SketchWalkConfig.step_memory` times less with every token, and stands in as the
block's score where the sketch gives less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Float


def recall(
    memory: Float[Tensor, "batch selections slots"],
    scores: Float[Tensor, "batch selections 1 blocks"],
    layout: Layout,
    config: SketchWalkConfig,
) -> Float[Tensor, "batch selections 1 blocks"]:
    """Scores of a step of one token per sequence, with what is remembered; the memory fades, in place.

    The attention that follows adds the shares of the blocks it reads (`sketch_walk.kernels.attend`). A sequence without
    a new token keeps its memory as it is.
    """
    blocks = scores.shape[3]
    fade = torch.where(layout.length > layout.past, config.step_memory, 1.0)[:, None, None]
    memory.mul_(fade)
    causal = torch.arange(blocks, device=scores.device) * config.block_size < layout.length[:, None]
    return torch.maximum(scores, (memory[:, :, :blocks] * causal[:, None])[:, :, None])


def remember_rows(
    memory: Float[Tensor, "batch selections slots"],
    scores: Float[Tensor, "batch selections rows blocks"],
    layout: Layout,
    config: SketchWalkConfig,
) -> None:
    """After a call of several tokens: the scores of its last query block, and of the one before, so much older.

    Prompts have no shares of single blocks to remember; their scores stand in. What was remembered before counts as the
    older row if the call lies in one block.
    """
    size, blocks = config.block_size, scores.shape[3]
    first, last = layout.past // size, (layout.length - 1).clamp(min=0) // size
    row = (last - first).clamp(0, scores.shape[2] - 1)
    newest, older = (_row(scores, at) for at in (row, (row - 1).clamp(min=0)))
    fade = config.step_memory ** (layout.length - torch.maximum(last * size, layout.past)).float()[:, None, None]
    held = memory[:, :, :blocks]
    older = torch.where((row > 0)[:, None, None], older, held)
    found = torch.maximum(newest, fade * older)
    held.copy_(torch.where((layout.length > layout.past)[:, None, None], found, held))


def _row(scores: Float[Tensor, "batch selections rows blocks"], at: Tensor) -> Float[Tensor, "batch selections blocks"]:
    """Row at[b] of every sequence."""
    index = at.view(-1, 1, 1, 1).expand(-1, scores.shape[1], 1, scores.shape[3])
    return scores.gather(2, index).squeeze(2)
