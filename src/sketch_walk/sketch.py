"""Sketch: sub-block means of queries and keys, rotated by the Hadamard transform, and the block scores they give."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sketch_walk.config import SketchWalkConfig
from sketch_walk.hadamard import sketch_matrix, sketch_width

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# int8 codes are symmetric: -127 ... 127.
LARGEST_CODE = 127.0
# Below any exp() that float32 keeps; finite, so that a row without keys gives no NaN.
MASKED = -1e30


class KeySketch(NamedTuple):
    """Sketched keys: int8 codes with a float32 scale each, or plain values with `scales` None.

    `codes` has shape (..., sub_keys, width), `scales` (..., sub_keys, 1).
    """

    codes: Tensor
    scales: Tensor | None

    def dequantise(self) -> Float[Tensor, "... sub_keys width"]:
        """Values in float32."""
        values = self.codes.float()
        return values if self.scales is None else values.mul_(self.scales)


def sketched_heads(num_heads: int, config: SketchWalkConfig) -> int:
    """Heads that a sketch of `num_heads` heads has: all of them, or one when they are averaged first."""
    return 1 if config.head_mode == "mean" else num_heads


def selection_heads(num_kv_heads: int, config: SketchWalkConfig) -> int:
    """Selections per sequence: one shared by all heads, or one per key/value head."""
    return num_kv_heads if config.head_mode == "per_kv_head" else 1


def feature_width(head_dim: int, config: SketchWalkConfig) -> int:
    """Coordinates of a sketched query or key."""
    return sketch_width(head_dim, config.sketch_dim) if config.use_srht else head_dim


def score_scale(head_dim: int, attention_scale: float, config: SketchWalkConfig) -> float:
    """Factor on sketched logits (`SketchWalkConfig.score_scale`)."""
    width = feature_width(head_dim, config)
    if config.score_scale == "sketch":
        return 1.0 / math.sqrt(width)
    if config.score_scale == "authors":
        return math.sqrt(width) / 100.0
    return attention_scale


def sub_block_means(
    x: Float[Tensor, "batch groups heads tokens dim"], valid: Bool[Tensor, "batch groups tokens"], size: int
) -> Float[Tensor, "batch groups heads sub_blocks dim"]:
    """Mean of each run of `size` tokens in float32 over its real tokens only; 0 where it has none."""
    weight = valid.unflatten(-1, (-1, size)).float()
    share = weight / weight.sum(-1, keepdim=True).clamp_(min=1.0)
    runs = x.float().unflatten(3, (-1, size))
    if size == 1:
        return runs.squeeze(4) * share[:, :, None]
    # [batch, groups, heads, sub_blocks, 1, size] @ [..., size, dim]
    return (share[:, :, None, :, None, :] @ runs.nan_to_num_(nan=0.0)).squeeze(-2)


def sketch_tokens(
    x: Float[Tensor, "batch groups heads tokens dim"],
    valid: Bool[Tensor, "batch groups tokens"],
    size: int,
    config: SketchWalkConfig,
) -> Float[Tensor, "batch groups sketched_heads sub_blocks width"]:
    """Token-space sketch (means of `size` tokens), then feature-space sketch (rotate, keep r coordinates); float32."""
    if config.head_mode == "mean":
        x = x.float().mean(2, keepdim=True)
    means = sub_block_means(x, valid, size)
    if not config.use_srht:
        return means
    return means @ sketch_matrix(x.shape[-1], config.sketch_dim, config.hadamard_seed, x.device)


def quantise_keys(sketch: Float[Tensor, "... width"], config: SketchWalkConfig, dtype: torch.dtype) -> KeySketch:
    """Key sketches as they are stored: int8 with a float32 scale per sub-key, or `dtype`.

    After the rotation no coordinate stands out, so one scale per vector is enough.
    """
    if config.key_sketch_bits == 16:
        return KeySketch(sketch.to(dtype), None)
    scales = (sketch.abs().amax(-1, keepdim=True) / LARGEST_CODE).clamp_(min=torch.finfo(torch.float32).tiny)
    return KeySketch((sketch / scales).round_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scales)


def block_scores(
    queries: Float[Tensor, "batch rows heads sub_queries width"],
    last_rank: Int[Tensor, "batch rows sub_queries"],
    keys: Float[Tensor, "batch kv_heads sub_keys width"],
    length: Int[Tensor, " batch"],
    *,
    scale: float,
    config: SketchWalkConfig,
    open_from: int = 0,
    causal: bool = True,
) -> Float[Tensor, "batch selections rows blocks"]:
    """Scores of key blocks for rows of query blocks.

    Softmax of the sketched logits over the causal sub-keys, summed over the sub-keys of a block, then reduced over the
    row's sub-queries and over heads. Selection is not differentiated: call it under `torch.no_grad`.

    Parameters
    ----------
    queries : torch.Tensor
        Sketched sub-queries, float32; `heads` is a multiple of `kv_heads`.
    last_rank : torch.Tensor
        Rank of the last token that each sub-query stands for; -1 for an empty one, which scores nothing.
    keys : torch.Tensor
        Sketched sub-keys from rank 0 on, float32, whole blocks of them.
    length : torch.Tensor
        Real tokens per sequence.
    open_from : int
        Sub-keys before this one are known to be visible to every row, so that only the rest is masked.

    Returns
    -------
    torch.Tensor
        float32, in [0, 1]; `selections` is 1 or kv_heads; 0 beyond the diagonal.
    """
    batch, rows, heads, subs, width = queries.shape
    kv_heads, sub_keys = keys.shape[1], keys.shape[2]
    per_block = config.block_size // config.key_sub_block
    grouped = queries.unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4, 5)
    logits = (grouped.reshape(batch, kv_heads, -1, width) * scale) @ keys.transpose(-1, -2)
    logits = logits.view(batch, kv_heads, heads // kv_heads, rows, subs, sub_keys)
    start = torch.arange(open_from, sub_keys, device=keys.device) * config.key_sub_block
    hidden = start >= length.view(-1, 1, 1, 1)
    if causal:
        hidden = hidden | (start > last_rank[..., None])
    logits[..., open_from:].masked_fill_(hidden[:, None, None], MASKED)
    mass = logits.sub_(logits.amax(-1, keepdim=True)).exp_().unflatten(-1, (-1, per_block)).sum(-1)
    mass /= mass.sum(-1, keepdim=True)
    full = (last_rank >= 0)[:, None, None, :, :, None]
    # A row without a visible key would spread its softmax over hidden ones: it scores nothing instead.
    mass = torch.where(full, mass, 0.0)
    if config.reduce == "max":
        scores = mass.amax(4).amax(2)
        return scores if config.head_mode == "per_kv_head" else scores.amax(1, keepdim=True)
    scores = (mass.sum(4) / full.sum(4).clamp(min=1)).mean(2)
    return scores if config.head_mode == "per_kv_head" else scores.mean(1, keepdim=True)


class Sketch(nn.Module):
    """Stages 1 to 3 for one whole call without padding: queries and keys in, block scores out.

    Parameters
    ----------
    config : SketchWalkConfig
    head_dim : int
        Size of the last dimension of queries and keys.
    """

    def __init__(self, config: SketchWalkConfig, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim

    @torch.no_grad()
    def forward(
        self,
        Q: Float[Tensor, "batch heads num_queries head_dim"],
        K: Float[Tensor, "batch kv_heads num_keys head_dim"],
        causal: bool = True,
    ) -> Float[Tensor, "batch selections query_blocks key_blocks"]:
        """Block scores.

        Parameters
        ----------
        Q, K : torch.Tensor
            Shapes (batch, num_heads, n_q, head_dim) and (batch, num_kv_heads, n_k, head_dim); the queries are the last
            n_q tokens.

        Returns
        -------
        torch.Tensor
            float32 in [0, 1], shape (batch, 1 or num_kv_heads, query blocks, key blocks), 0 beyond the diagonal.

        Raises
        ------
        ValueError
            For a last dimension that is not `head_dim`, or fewer keys than queries.
        """
        for name, x in (("Q", Q), ("K", K)):
            if x.dim() != 4 or x.shape[-1] != self.head_dim:
                raise ValueError(
                    f"{name} must have shape (batch, heads, tokens, {self.head_dim}), got {tuple(x.shape)}"
                )
        past, total = K.shape[2] - Q.shape[2], K.shape[2]
        if past < 0:
            raise ValueError(f"K must hold every token so far: it has {total}, fewer than the {Q.shape[2]} of Q")
        size, lead = self.config.block_size, past % self.config.block_size
        queries = _whole_blocks(Q, lead, size).transpose(1, 2)
        keys = _whole_blocks(K, 0, size)
        rank = torch.arange(past - lead, past - lead + queries.shape[1] * size, device=Q.device).view(1, -1, size)
        real = ((rank >= past) & (rank < total)).expand(Q.shape[0], -1, -1)
        sub = self.config.query_sub_block
        ends = rank.unflatten(-1, (-1, sub))[..., -1].clamp(max=total - 1)
        last_rank = torch.where(real.unflatten(-1, (-1, sub)).any(-1), ends, -1)
        key_real = torch.arange(keys.shape[2] * size, device=K.device).expand(K.shape[0], 1, -1) < total
        sketched_keys = sketch_tokens(keys.flatten(2, 3)[:, None], key_real, self.config.key_sub_block, self.config)[
            :, 0
        ]
        return block_scores(
            sketch_tokens(queries, real, sub, self.config),
            last_rank,
            sketched_keys,
            torch.full((K.shape[0],), total, device=K.device),
            scale=score_scale(self.head_dim, 1.0 / math.sqrt(self.head_dim), self.config),
            config=self.config,
            causal=causal,
        )


def _whole_blocks(x: Tensor, lead: int, size: int) -> Tensor:
    """Split the tokens of `x` into blocks, zeros before and after: (batch, heads, blocks, size, dim)."""
    tail = -(lead + x.shape[2]) % size
    return nn.functional.pad(x, (0, 0, lead, tail)).unflatten(2, (-1, size))
