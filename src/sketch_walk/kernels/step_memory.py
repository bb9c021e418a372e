"""What a kernel needs of the memory of steps; `sketch_walk.memory` says what it is for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class StepMemory(NamedTuple):
    """What steps remember of the blocks, which kernels update in place.

    A stamp is the rank of a token, later by log(share) / log(1 / fade): what is remembered of a block, in the eyes of a
    token of rank r, is ``fade ** (r - stamp)``. -inf is nothing.

    Parameters
    ----------
    own : torch.Tensor
        The layer's stamps: float32, contiguous, shape (batch, selections, slots), a slot per block and more.
    shared : torch.Tensor
        Of all layers and selections: float32, contiguous, shape (batch, slots).
    fade : float
        What is left of a share after a token.
    ahead : float
        Part of what is remembered of a block that the next one claims.
    across : float
        Part of what any layer remembers of a block that it claims in this one.
    """

    own: Float[Tensor, "batch selections slots"]
    shared: Float[Tensor, "batch slots"]
    fade: float
    ahead: float = 0.0
    across: float = 0.0

    @property
    def tokens_per_power(self) -> float:
        """By how many tokens twice the share is a later stamp."""
        return -1.0 / math.log2(self.fade)

    @property
    def claims(self) -> tuple[float, float, float]:
        """As powers of 2, since a claim is a square: what it loses with a token, and what is left of it for the next
        block, and in other layers.
        """
        return -2.0 * math.log2(self.fade), _power(self.ahead), _power(self.across)


def _power(part: float) -> float:
    return 2.0 * math.log2(part) if part > 0 else -math.inf
