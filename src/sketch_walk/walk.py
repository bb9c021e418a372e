"""Walk: block scores become transition probabilities, and transitions compose across layers.

With T^k the transition matrix of layer k (row i: where query block i looks) and R^k the walk:

    product   R^k = R^(k-1) T^k                          (the paper)
    damped    R^k = (1 - β) T^k + β R^(k-1) T^k
    none      R^k = T^k

In the first sparse layer R = T. A call computes only its own rows of R; T's earlier rows come from the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sketch_walk.config import SketchWalkConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def transition_rows(
    scores: Float[Tensor, "batch selections rows blocks"], config: SketchWalkConfig
) -> Float[Tensor, "batch selections rows blocks"]:
    """Rows of T: scores to the power `sparsity_exponent`, normalised to sum 1, in `walk_state_dtype`.

    Unnormalised rows (`walk_normalise=False`) are the paper's; their products funnel mass into the earliest blocks.
    An all-zero row (no queries) stays zero. Without a walk nothing is composed: rows are the scores as they are.
    """
    if config.walk == "none":
        return scores
    scores = scores.to(config.walk_state_dtype)
    if not config.walk_normalise:
        return scores**config.sparsity_exponent
    tiny = torch.finfo(scores.dtype).tiny
    # Dividing by the row's largest first keeps the power from underflowing where it matters.
    rows = (scores / scores.amax(-1, keepdim=True).clamp(min=tiny)) ** config.sparsity_exponent
    return rows / rows.sum(-1, keepdim=True).clamp(min=tiny)


def walk_step(
    previous: Float[Tensor, "batch selections rows blocks"] | None,
    rows: Float[Tensor, "batch selections rows blocks"],
    transitions: Float[Tensor, "batch selections blocks blocks"] | None,
    row_index: Int[Tensor, "batch rows"],
    config: SketchWalkConfig,
) -> Float[Tensor, "batch selections rows blocks"]:
    """This layer's rows of R.

    Parameters
    ----------
    previous : torch.Tensor, optional
        The same rows of R after the previous sparse layer; None in the first one.
    rows : torch.Tensor
        This call's rows of T.
    transitions : torch.Tensor, optional
        Rows of T for all blocks before each row's own; rows at or after it are not read. None when `previous` is.
    row_index : torch.Tensor
        Block of each row. A row's own transition is `rows`, not `transitions`: its block may still be open.

    Returns
    -------
    torch.Tensor
        Rows of R. Only compared within a row, so the product walk is rescaled freely and cannot underflow.
    """
    if previous is None or config.walk == "none":
        return rows
    if transitions is None:
        raise ValueError("transitions must be given when previous is")
    walk = previous
    block = torch.arange(rows.shape[-1], device=rows.device)
    earlier = block < row_index[:, None, :, None]
    # Rows that pad a ragged batch may lie past the last block; what they hold is never read.
    own = row_index.clamp(max=rows.shape[-1] - 1)[:, None, :, None].expand(*rows.shape[:-1], 1)
    for _ in range(config.walk_degree if config.walk == "damped" else 1):
        hop = torch.where(earlier, walk, 0.0) @ transitions + walk.gather(-1, own) * rows
        walk = hop if config.walk == "product" else (1 - config.walk_beta) * rows + config.walk_beta * hop
    if config.walk == "product":
        walk = walk / walk.amax(-1, keepdim=True).clamp(min=torch.finfo(walk.dtype).tiny)
    return walk


class Walk(nn.Module):
    """Stage 4 for one whole call: block scores of each layer in, rows of R out. Holds no state.

    Parameters
    ----------
    config : SketchWalkConfig
    """

    def __init__(self, config: SketchWalkConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(
        self,
        scores: Float[Tensor, "batch selections blocks blocks"],
        previous: Float[Tensor, "batch selections blocks blocks"] | None = None,
    ) -> Float[Tensor, "batch selections blocks blocks"]:
        """Rows of R after this layer.

        Parameters
        ----------
        scores : torch.Tensor
            Block scores of a whole sequence (`sketch_walk.sketch.Sketch`), as many rows as columns.
        previous : torch.Tensor, optional
            R after the previous sparse layer; None in the first.

        Raises
        ------
        ValueError
            If `scores` is not square or `previous` has another shape.
        """
        if scores.dim() != 4 or scores.shape[-1] != scores.shape[-2]:
            raise ValueError(f"scores must have shape (batch, selections, blocks, blocks), got {tuple(scores.shape)}")
        if previous is not None and previous.shape != scores.shape:
            raise ValueError(
                f"previous must have the shape of scores, {tuple(scores.shape)}, got {tuple(previous.shape)}"
            )
        rows = transition_rows(scores, self.config)
        index = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape[0], -1)
        return walk_step(previous, rows, rows, index, self.config)
