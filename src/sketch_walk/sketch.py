"""Sketch: queries and keys pooled by sub-blocks, rotated by the Hadamard transform, and the block scores they give."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sketch_walk.config import SketchWalkConfig
from sketch_walk.hadamard import sketch_matrix, sketch_width

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

# Codes of keys cover this many root mean squares of their block on either side; what lies beyond is clipped. After the
# rotation coordinates are close to normal.
CLIP = 3.2
KEY_LEVELS = 128
# Codes are kept as differences from their block's mean, in bytes: which side of the mean, whether beyond the block's
# bound, and one of so many distances. No bound is greater: differences within it would be left without a byte.
DISTANCES = 64
# Planes of two bits that the bytes of codes are stored in.
PLANES = 4
# Codes of queries are symmetric: -127 ... 127.
LARGEST_CODE = 127.0
# Below any exp() that float32 keeps; finite, so that a row without keys gives no NaN.
MASKED = -1e30


class KeySketch(NamedTuple):
    """Sketched keys as they are stored, one row per block.

    With 8 bits a sub-key's code is kept as its difference from the mean code of the block, which is what tells the
    block's sub-keys apart: in one byte, side of the mean (1 bit), beyond the block's bound or not (1), steps from the
    mean or from the bound (6). The few that lie 64 steps and more beyond it take bytes that would otherwise say, of one
    within the bound, that it is not: no difference is lost up to 127. Side and bound alone are an outline of the code,
    nearly the best of two bits, for the bound is the root mean square of the differences: a decode step reads means and
    outlines, less than a third of the bytes.

    Parameters
    ----------
    codes : torch.Tensor
        Shape (..., blocks, payload). With 8 bits: uint8, first the mean codes plus 128, then the bytes of all sub-keys
        in four planes of two bits each, the outlines first; a byte of a plane holds the bits of coordinates i,
        i + quarter, i + 2 quarter and i + 3 quarter, from its lowest bits up, with quarter = `quarter_width`. Else the
        values themselves, sub-key after sub-key.
    scales : torch.Tensor, optional
        float32, shape (..., blocks, 2): step size of the block's codes, and its bound in steps; None with 16 bits.
    """

    codes: Tensor
    scales: Tensor | None

    def unpack(
        self, per_block: int, width: int, outline: bool = False
    ) -> tuple[Float[Tensor, "... blocks per_block width"], Float[Tensor, "... blocks 1"] | None]:
        """Codes as float32 (whole numbers with 8 bits) and step sizes; `outline` reads the first plane alone."""
        if self.scales is None:
            return self.codes.unflatten(-1, (per_block, width)).float(), None
        steps, bound = self.scales[..., :1], self.scales[..., None, 1:]
        quarter = quarter_width(width)
        mean = (self.codes[..., None, :width] ^ KEY_LEVELS).view(torch.int8)
        planes = self.codes[..., PLANES * quarter :].unflatten(-1, (PLANES, per_block, quarter)).unbind(-3)
        if outline:
            side = _coordinates(planes[:1], width).float()
            return side.sub_(1.5).mul_(bound).add_(mean), steps
        # All of it fits 8 bits, where whole caches are read: a bitwise not is -1 less the number.
        stored = _coordinates(planes, width)
        away, side, bound = (stored & (DISTANCES - 1)).view(torch.int8), stored >> 6, bound.to(torch.int8)
        far = (away >= bound).to(torch.int8).mul_(DISTANCES)
        away += torch.where((side == 0) | (side == 3), bound, far)
        return torch.where(side >= 2, away, ~away).add_(mean).float(), steps

    def dequantise(self, per_block: int, width: int, outline: bool = False) -> Float[Tensor, "... sub_keys width"]:
        """Sketched sub-keys in float32."""
        codes, steps = self.unpack(per_block, width, outline)
        return (codes if steps is None else codes.mul_(steps[..., None])).flatten(-3, -2)


class QuerySketch(NamedTuple):
    """Sketched sub-queries that take part in the scores.

    Parameters
    ----------
    values : torch.Tensor
        float32, shape (batch, rows, heads, sub_queries, width).
    last_rank : torch.Tensor
        Rank of the last token that each sub-query stands for, -1 for an empty one; shape (batch, rows, heads or 1,
        sub_queries).
    """

    values: Tensor
    last_rank: Tensor


def quarter_width(width: int) -> int:
    """Bytes that hold two bits each of `width` coordinates."""
    return -(-width // PLANES)


def payload_size(width: int, config: SketchWalkConfig) -> int:
    """Entries of a block's codes: bytes with 8 bits, else values."""
    per_block = config.block_size // config.key_sub_block
    return PLANES * quarter_width(width) * (1 + per_block) if config.key_sketch_bits == 8 else per_block * width


def outline_size(width: int, config: SketchWalkConfig) -> int:
    """Leading entries of a block's codes that a decode step reads: means and outlines with 8 bits, else everything."""
    per_block = config.block_size // config.key_sub_block
    return quarter_width(width) * (PLANES + per_block) if config.key_sketch_bits == 8 else per_block * width


def sketched_heads(num_heads: int, config: SketchWalkConfig) -> int:
    """Heads that a sketch of `num_heads` heads has: all of them, or one when they are averaged first."""
    return 1 if config.head_mode == "mean" else num_heads


def selection_heads(num_kv_heads: int, config: SketchWalkConfig) -> int:
    """Selections per sequence: one shared by all heads, or one per key/value head."""
    return num_kv_heads if config.head_mode == "per_kv_head" else 1


def feature_width(head_dim: int, config: SketchWalkConfig) -> int:
    """Coordinates of a sketched query or key."""
    return sketch_width(head_dim, config.sketch_dim) if config.use_srht else head_dim


def rotation(
    head_dim: int, config: SketchWalkConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "head_dim width"]:
    """The feature-space sketch as a matrix."""
    return sketch_matrix(head_dim, config.sketch_dim, config.hadamard_seed, device, dtype)


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


def pool_sub_blocks(
    x: Float[Tensor, "batch groups heads tokens dim"],
    valid: Bool[Tensor, "batch groups tokens"],
    size: int,
    config: SketchWalkConfig,
    contrast: float = 1.0,
) -> Float[Tensor, "batch groups heads sub_blocks dim"]:
    """One vector for each run of `size` tokens in float32, from its real tokens only; 0 where it has none.

    A mean of four tokens hides the one that stands out, so tokens far from their block's mean weigh more
    (`SketchWalkConfig.salience`), and what is left of a run's deviation is multiplied by `contrast`. Tokens are whole
    blocks; with sub-blocks of one token there is nothing to pool.
    """
    if size == 1 or (config.salience == 0.0 and contrast == 1.0):
        return sub_block_means(x, valid, size)
    real = valid.unflatten(-1, (-1, config.block_size))[:, :, None]
    tokens = x.float().unflatten(3, (-1, config.block_size))
    tokens = torch.where(real[..., None], tokens, 0.0)
    count = real.sum(-1, keepdim=True).clamp(min=1)
    centre = tokens.sum(-2, keepdim=True) / count[..., None]
    apart = torch.where(real[..., None], tokens - centre, 0.0)
    distance = torch.linalg.vector_norm(apart, dim=-1).square()
    spread = distance.sum(-1, keepdim=True) / count
    excess = config.salience * distance / spread.clamp_(min=torch.finfo(torch.float32).tiny)
    runs = real.unflatten(-1, (-1, size))
    weight = excess.unflatten(-1, (-1, size)).masked_fill_(~runs, MASKED).softmax(-1)
    # [batch, groups, heads, blocks, sub_blocks, 1, size] @ [..., size, dim]
    deviation = (weight[..., None, :] @ apart.unflatten(-2, (-1, size))).squeeze(-2)
    pooled = centre + contrast * deviation
    return torch.where(runs.any(-1)[..., None], pooled, 0.0).flatten(3, 4)


def sketch_tokens(
    x: Float[Tensor, "batch groups heads tokens dim"],
    valid: Bool[Tensor, "batch groups tokens"],
    size: int,
    config: SketchWalkConfig,
    contrast: float = 1.0,
) -> Float[Tensor, "batch groups sketched_heads sub_blocks width"]:
    """Token-space sketch (pool `size` tokens), then feature-space sketch (rotate, keep r coordinates); float32."""
    if config.head_mode == "mean":
        x = x.float().mean(2, keepdim=True)
    pooled = pool_sub_blocks(x, valid, size, config, contrast)
    if not config.use_srht:
        return pooled
    return pooled @ rotation(x.shape[-1], config, x.device)


def quantise_keys(
    sketch: Float[Tensor, "... blocks per_block width"],
    real: Bool[Tensor, "... blocks per_block"],
    config: SketchWalkConfig,
    dtype: torch.dtype,
) -> KeySketch:
    """Key sketches of whole blocks as they are stored: codes of 8 bits with one step size per block, or `dtype`.

    After the rotation no coordinate stands out, so one step size for all of a block is enough. Sub-keys without a real
    token are zeros and count neither towards it nor towards the block's mean and bound.
    """
    if config.key_sketch_bits == 16:
        return KeySketch(sketch.flatten(-2).to(dtype), None)
    count = real.sum(-1, keepdim=True).clamp(min=1)[..., None]
    entries = count * sketch.shape[-1]
    spread = (sketch.square().sum((-2, -1), keepdim=True) / entries).sqrt()
    steps = (spread * (CLIP / KEY_LEVELS)).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (sketch / steps).round_().clamp_(-KEY_LEVELS, KEY_LEVELS - 1).to(torch.int16)
    counted = real[..., None]
    mean = _rounded((codes * counted).sum(-2, keepdim=True) / count)
    apart = codes - mean
    squares = (apart * counted).int().square_().sum((-2, -1), keepdim=True)
    bound = _rounded((squares / entries).sqrt()).clamp_(1, DISTANCES)
    below = apart < 0
    away = torch.where(below, -1 - apart, apart).clamp_(max=2 * DISTANCES - 1)
    far = away >= bound + DISTANCES
    beyond = ((away >= bound) & ~far).to(torch.int16)
    away -= torch.where(far, DISTANCES, beyond * bound)
    outline = torch.where(below, 1 - beyond, 2 + beyond)
    spare = (0, -sketch.shape[-1] % PLANES)
    means = nn.functional.pad(mean + KEY_LEVELS, spare, value=KEY_LEVELS).to(torch.uint8).flatten(-2)
    planes = _packed(nn.functional.pad(outline << 6 | away, spare, value=KEY_LEVELS).to(torch.uint8))
    return KeySketch(torch.cat([means, planes], -1), torch.cat([steps, bound], -1).squeeze(-2).float())


def _rounded(x: Tensor) -> Tensor:
    """Whole numbers, halves upwards."""
    return (x + 0.5).floor_().to(torch.int16)


def _packed(stored: Shaped[Tensor, "... per_block width"]) -> Shaped[Tensor, "... bytes"]:
    """Bytes of sub-keys, a multiple of four each, as four planes of two bits, one after the other."""
    planes = []
    for shift in (6, 4, 2, 0):
        first, second, third, fourth = ((quarter >> shift) & 3 for quarter in stored.chunk(PLANES, -1))
        planes.append(first | (second << 2) | (third << 4) | (fourth << 6))
    return torch.stack(planes, -3).flatten(-3)


def _coordinates(planes: tuple[Tensor, ...], width: int) -> Shaped[Tensor, "... per_block width"]:
    """What the planes, first ones first, say of every coordinate."""
    quarters = []
    for shift in (0, 2, 4, 6):
        value = (planes[0] >> shift) & 3
        for plane in planes[1:]:
            value = (value << 2) | ((plane >> shift) & 3)
        quarters.append(value)
    return torch.cat(quarters, -1)[..., :width]


def quantise_queries(values: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
    """Queries rounded to 8 bits with a scale each, as the kernels multiply them."""
    scales = (values.abs().amax(-1, keepdim=True) / LARGEST_CODE).clamp_(min=torch.finfo(torch.float32).tiny)
    return (values / scales).round_() * scales


def keep_salient(
    values: Float[Tensor, "batch rows heads sub_queries width"],
    last_rank: Int[Tensor, "batch rows sub_queries"],
    config: SketchWalkConfig,
) -> QuerySketch:
    """The share `query_keep` of each head's sub-queries: those farthest from their mean, the earlier of two equals.

    What a block asks for apart from its neighbours is asked by few of its queries; the rest ask for much the same.
    """
    kept = config.kept_sub_queries(values.shape[3])
    if kept == values.shape[3]:
        return QuerySketch(values, last_rank[:, :, None])
    real = (last_rank >= 0)[:, :, None, :, None]
    count = real.sum(3, keepdim=True).clamp(min=1)
    centre = torch.where(real, values, 0.0).sum(3, keepdim=True) / count
    distance = torch.where(real, values - centre, 0.0).square().sum(-1)
    # Two are equally far from their mean: left to rounding, which of them is kept would depend on the device.
    distance = distance.masked_fill(count[..., 0] == 2, 0.0).masked_fill(~real[..., 0], -1.0)
    chosen = distance.argsort(dim=-1, descending=True, stable=True)[..., :kept].sort(-1).values
    ranks = last_rank[:, :, None].expand(-1, -1, values.shape[2], -1).gather(3, chosen)
    return QuerySketch(values.gather(3, chosen[..., None].expand(*chosen.shape, values.shape[4])), ranks)


def block_scores(
    queries: QuerySketch,
    keys: Float[Tensor, "batch kv_heads sub_keys width"],
    length: Int[Tensor, " batch"],
    *,
    scale: float,
    config: SketchWalkConfig,
    open_from: int = 0,
    causal: bool = True,
) -> Float[Tensor, "batch selections rows blocks"]:
    """Scores of key blocks for rows of query blocks.

    A sub-query gives a block either the softmax of the block's best sketched logit among the best of all causal blocks
    (`block_score` "peak"), or the softmax over all causal sub-keys, summed over the block's ("mass"). Scores are then
    reduced over the row's sub-queries and over heads. Selection is not differentiated: call it under `torch.no_grad`.

    Parameters
    ----------
    queries : QuerySketch
        `heads` is a multiple of `kv_heads`.
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
    values, last_rank = queries
    batch, rows, heads, subs, width = values.shape
    kv_heads, sub_keys = keys.shape[1], keys.shape[2]
    group, per_block = heads // kv_heads, config.block_size // config.key_sub_block
    grouped = values.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4, 5)
    logits = (grouped.reshape(batch, kv_heads, -1, width) * scale) @ keys.transpose(-1, -2)
    logits = logits.view(batch, kv_heads, group, rows, subs, sub_keys)
    # [batch, kv_heads or 1, group or 1, rows, subs]
    ranks = last_rank.unflatten(2, (kv_heads, group) if last_rank.shape[2] > 1 else (1, 1)).permute(0, 2, 3, 1, 4)
    start = torch.arange(open_from, sub_keys, device=keys.device) * config.key_sub_block
    hidden = start >= length.view(-1, 1, 1, 1, 1, 1)
    if causal:
        hidden = hidden | (start > ranks[..., None])
    logits[..., open_from:].masked_fill_(hidden, MASKED)
    if config.block_score == "peak":
        mass = logits.unflatten(-1, (-1, per_block)).amax(-1).softmax(-1)
    else:
        mass = logits.sub_(logits.amax(-1, keepdim=True)).exp_().unflatten(-1, (-1, per_block)).sum(-1)
        mass /= mass.sum(-1, keepdim=True)
    full = (ranks >= 0)[..., None]
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
        sketched_keys = sketch_tokens(keys.flatten(2, 3)[:, None], key_real, self.config.key_sub_block, self.config)
        return block_scores(
            keep_salient(
                sketch_tokens(queries, real, sub, self.config, self.config.query_contrast), last_rank, self.config
            ),
            sketched_keys[:, 0],
            torch.full((K.shape[0],), total, device=K.device),
            scale=score_scale(self.head_dim, 1.0 / math.sqrt(self.head_dim), self.config),
            config=self.config,
            causal=causal,
        )


def _whole_blocks(x: Tensor, lead: int, size: int) -> Tensor:
    """Split the tokens of `x` into blocks, zeros before and after: (batch, heads, blocks, size, dim)."""
    tail = -(lead + x.shape[2]) % size
    return nn.functional.pad(x, (0, 0, lead, tail)).unflatten(2, (-1, size))
