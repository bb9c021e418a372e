"""The algorithm, written a second time from its description: float64, one sequence, dense matrices, loops over rows.

It shares with the package the config and the drawn signs and coordinates of the Hadamard transform, and nothing else.
Nothing is remembered between calls: each call is worked out again from all queries and keys so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.hadamard import HadamardTransform


@dataclass
class Call:
    """One layer's part of one call: rows are the query blocks that the call touches, from `first` on."""

    first: int
    scores: Tensor
    rows: Tensor
    walk: Tensor
    chosen: Tensor


def hadamard_matrix(n: int) -> Tensor:
    """Sylvester's matrix divided by sqrt(n)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(n)


def feature_matrix(dim: int, config: SketchWalkConfig) -> Tensor:
    """sqrt(n/r) · D·H·P as a (dim, r) matrix; the identity without SRHT."""
    if not config.use_srht:
        return torch.eye(dim, dtype=torch.float64)
    drawn = HadamardTransform(dim, config.sketch_dim, config.hadamard_seed)
    signs = torch.diag(drawn.signs.double())
    if config.sketch_dim >= dim:
        powers = [2**bit for bit in range(dim.bit_length(), -1, -1) if dim // 2**bit % 2]
        return signs @ torch.block_diag(*(hadamard_matrix(p) for p in powers))
    padded = 1
    while padded < dim:
        padded *= 2
    sampled = (signs @ hadamard_matrix(padded)[:dim])[:, drawn.coordinates]
    return sampled * math.sqrt(padded / config.sketch_dim)


def storage_step(sketch: Tensor, config: SketchWalkConfig, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring storable values around each coordinate of a key sketch."""
    if config.key_sketch_bits == 16:
        return sketch.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return (sketch.abs().amax(-1, keepdim=True) / 127).expand_as(sketch)


def logit_scale(dim: int, scale: float, config: SketchWalkConfig) -> float:
    """Factor on sketched logits."""
    width = min(dim, config.sketch_dim) if config.use_srht else dim
    return {"attention": scale, "sketch": 1 / math.sqrt(width), "authors": math.sqrt(width) / 100}[config.score_scale]


def sub_queries(query: Tensor, start: int, config: SketchWalkConfig) -> list[list[tuple[Tensor, int]]]:
    """Per query block of tokens `start` ...: (mean of a sub-block's tokens, rank of its last token) pairs."""
    size, sub, stop = config.block_size, config.query_sub_block, start + query.shape[1]
    blocks = []
    for block in range(start // size, (stop - 1) // size + 1):
        means = []
        for lo in range(block * size, (block + 1) * size, sub):
            begin, end = max(lo, start), min(lo + sub, stop)
            if begin < end:
                means.append((query[:, begin - start : end - start].mean(1), end - 1))
        blocks.append(means)
    return blocks


def sketched_keys(key: Tensor, config: SketchWalkConfig) -> Tensor:
    """Means of sub-blocks of keys, rotated: (heads, sub_keys, width)."""
    sub = config.key_sub_block
    means = [key[:, lo : lo + sub].mean(1) for lo in range(0, key.shape[1], sub)]
    return torch.stack(means, 1) @ feature_matrix(key.shape[2], config)


def block_scores(
    query: Tensor,
    key: Tensor,
    config: SketchWalkConfig,
    scale: float,
    start: int = 0,
    sketch: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """(selections, rows, blocks) for queries `start` ... against all keys, or against the given sketch of them."""
    size, sub = config.block_size, config.key_sub_block
    if config.head_mode == "mean":
        query, key = query.mean(0, keepdim=True), key.mean(0, keepdim=True)
    keys = sketched_keys(key, config) if sketch is None else sketch
    group = query.shape[0] // key.shape[0]
    keys = keys.repeat_interleave(group, 0)
    matrix = feature_matrix(query.shape[2], config)
    first_token = torch.arange(keys.shape[1]) * sub
    num_blocks = -(-key.shape[1] // size)
    rows = []
    for means in sub_queries(query, start, config):
        per_sub_query = []
        for mean, last in means:
            logits = torch.einsum("hw,hkw->hk", mean @ matrix, keys) * logit_scale(query.shape[2], scale, config)
            if causal:
                logits = logits.masked_fill(first_token > last, -math.inf)
            share = logits.softmax(-1)
            per_sub_query.append(
                torch.stack([share[:, (first_token // size) == b].sum(-1) for b in range(num_blocks)], -1)
            )
        mass = torch.stack(per_sub_query)
        by_head = mass.amax(0) if config.reduce == "max" else mass.mean(0)
        heads = by_head.unflatten(0, (-1, group)) if config.head_mode == "per_kv_head" else by_head[None]
        rows.append(heads.amax(1) if config.reduce == "max" else heads.mean(1))
    return torch.stack(rows, 1)


def transition_rows(scores: Tensor, config: SketchWalkConfig) -> Tensor:
    """Powers of the scores, as probabilities if the config says so."""
    powers = scores**config.sparsity_exponent
    return powers / powers.sum(-1, keepdim=True) if config.walk_normalise else powers


def walk_row(previous: Tensor, own: Tensor, transitions: Tensor, config: SketchWalkConfig) -> Tensor:
    """One row of R: `transitions` has the block's own row put in already."""
    walk = previous
    if config.walk == "product":
        return walk @ transitions
    for _ in range(config.walk_degree):
        walk = (1 - config.walk_beta) * own + config.walk_beta * (walk @ transitions)
    return walk


def budget(available: int, config: SketchWalkConfig) -> tuple[int, int, int]:
    """Blocks to read, sinks, locals of a row of `available` blocks (for mass: the least to read)."""

    def share(fraction: float, of: int) -> int:
        return math.ceil(fraction * of - 1e-6)

    sink = max(config.sink_blocks, share(config.sink_density, available))
    local = max(config.local_blocks, share(config.local_density, available))
    if config.mass is not None:
        wanted = max(config.min_blocks, sink + local)
    elif config.density is None:
        wanted = config.top_k_blocks
    elif config.density_excludes_forced:
        rest = max(0, available - sink - local)
        wanted = max(config.min_blocks, sink + local + share(config.density, rest))
    else:
        wanted = max(config.min_blocks, share(config.density, available))
    return min(available, wanted), sink, local


def forced_blocks(available: int, diagonal: int, config: SketchWalkConfig) -> tuple[list[int], list[int]]:
    """Local blocks of a row from the nearest on, and sink blocks from the first on."""
    _, sink, local = budget(available, config)
    locals_ = [b for b in range(diagonal, max(-1, diagonal - local), -1) if b < available]
    return locals_, [b for b in range(min(sink, available)) if b not in locals_]


def select_row(walk: Tensor, available: int, diagonal: int, config: SketchWalkConfig, everything: bool) -> list[int]:
    """Blocks that a row reads: local, sink, then the best, ties to the nearer."""
    locals_, sinks = forced_blocks(available, diagonal, config)
    rest = sorted((b for b in range(available) if b not in locals_ + sinks), key=lambda b: (-walk[b].item(), -b))
    order = locals_ + sinks + rest
    count = budget(available, config)[0]
    if config.mass is not None:
        share = (walk[:available] / walk[:available].sum()).tolist()
        reached = 0.0
        needed = 0
        while needed < available and reached < config.mass - 1e-6:
            reached += share[order[needed]]
            needed += 1
        count = max(count, needed)
    return sorted(order if everything else order[:count])


def run_call(
    stack: list[tuple[Tensor, Tensor]],
    config: SketchWalkConfig,
    start: int,
    stop: int,
    *,
    scale: float | None = None,
    sketches: list[Tensor] | None = None,
    causal: bool = True,
) -> list[Call]:
    """One forward pass of one sequence.

    Parameters
    ----------
    stack : list of (query, key)
        Per sparse layer, shapes (heads, tokens, dim) and (kv_heads, tokens, dim), float64, of all tokens so far.
    start, stop : int
        Tokens of the call.
    sketches : list of torch.Tensor, optional
        Key sketches to score against, per layer: as somebody stored them, rounding included. Default: unrounded.
    """
    size, calls, previous = config.block_size, [], None
    first, num_blocks = start // size, -(-stop // size)
    for layer, (query, key) in enumerate(stack):
        sketch = None if sketches is None else sketches[layer]
        scale_here = 1 / math.sqrt(query.shape[2]) if scale is None else scale
        query, key = query[:, :stop], key[:, :stop]
        scores = block_scores(query[:, start:], key, config, scale_here, start, sketch, causal)
        rows = transition_rows(scores, config)
        complete = transition_rows(block_scores(query, key, config, scale_here, 0, sketch, causal), config)
        walk = rows.clone()
        if previous is not None and config.walk != "none":
            for selection in range(rows.shape[0]):
                for row in range(rows.shape[1]):
                    transitions = complete[selection].clone()
                    transitions[first + row] = rows[selection, row]
                    walk[selection, row] = walk_row(previous[selection, row], rows[selection, row], transitions, config)
        previous = walk
        chosen = torch.zeros(rows.shape[0], rows.shape[1], num_blocks, dtype=torch.bool)
        for selection in range(rows.shape[0]):
            for row in range(rows.shape[1]):
                tail = stop - start > 1 and first + row >= num_blocks - config.dense_tail_blocks
                available = first + row + 1 if causal else num_blocks
                chosen[selection, row, select_row(walk[selection, row], available, first + row, config, tail)] = True
        calls.append(Call(first, scores, rows, walk, chosen))
    return calls


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    config: SketchWalkConfig,
    start: int,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Softmax attention of queries `start` ... over the chosen blocks (selections, rows, blocks), densely."""
    heads, num_queries, dim = query.shape
    kv_heads, num_keys = key.shape[0], key.shape[1]
    size, num_blocks = config.block_size, chosen.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    key, value = (x.repeat_interleave(heads // kv_heads, 0) for x in (key, value))
    per_head = chosen.repeat_interleave(heads // chosen.shape[0], 0)
    query_block = torch.arange(start, start + num_queries) // size
    key_block = torch.arange(num_keys) // size
    row = query_block - start // size
    logits = query @ key.transpose(1, 2) * scale
    visible = per_head[:, row][:, :, key_block]
    if causal:
        visible = visible & (torch.arange(num_keys) <= torch.arange(start, start + num_queries)[:, None])
    logits = logits.masked_fill(~visible, -math.inf)
    if config.mean_correction:
        stand_ins, stand_in_values, weights = [], [], []
        for block in range(num_blocks):
            inside = slice(block * size, min((block + 1) * size, num_keys))
            stand_ins.append(key[:, inside].mean(1))
            stand_in_values.append(value[:, inside].mean(1))
            weights.append(math.log(inside.stop - inside.start))
        extra = query @ torch.stack(stand_ins, 1).transpose(1, 2) * scale + torch.tensor(weights, dtype=torch.float64)
        pruned = ~per_head[:, row]
        if causal:
            pruned = pruned & (torch.arange(num_blocks) < query_block[:, None])
        logits = torch.cat([logits, extra.masked_fill(~pruned, -math.inf)], -1)
        value = torch.cat([value, torch.stack(stand_in_values, 1)], 1)
    return logits.softmax(-1) @ value
