"""The algorithm, written a second time from its description: float64, one sequence, dense matrices, loops over rows.

It shares with the package the config and the drawn signs and coordinates of the Hadamard transform, and nothing else.
Each call is worked out again from all queries and keys so far. What the memory of steps holds is the caller's to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


# Codes of key sketches are whole numbers from -128 to 127; one step is this share of the block's root mean square.
STEP_OF_RMS = 3.2 / 128


@dataclass
class Stored:
    """Key sketches of one sequence as later calls read them: all bits, and the outline that a single query reads.

    `low`, `high`: the least and the greatest storable value of each coordinate; None where nothing is clipped.
    """

    full: Tensor
    outline: Tensor
    low: Tensor | None = None
    high: Tensor | None = None


@dataclass
class Scoring:
    """Sub-queries of one query block that take part in the scores.

    `values` (heads, kept, width), `last` (heads, kept): rank of the last token of each, -1 where there is none. `exact`
    are all the block's sub-queries (heads, sub_queries, width) before rounding, `ends` the last token of each.
    """

    values: Tensor
    last: Tensor
    exact: Tensor
    ends: list[int]


def storage_step(sketch: Tensor, config: SketchWalkConfig, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring storable values around each coordinate of a key sketch."""
    if config.key_sketch_bits == 16:
        return sketch.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    runs = sketch.split(config.block_size // config.key_sub_block, 1)
    steps = [STEP_OF_RMS * run.square().mean((1, 2), keepdim=True).sqrt().expand_as(run) for run in runs]
    return torch.cat(steps, 1)


def store(sketch: Tensor, config: SketchWalkConfig) -> Stored:
    """Rounding of key sketches (heads, sub_keys, width) to 8 bits.

    A code lies at most 128 steps from its block's mean code. A single query knows of it which side of the mean it is
    on, and whether 0 to 63 steps beyond the root mean square, in whole steps, of the block's distances from the mean.
    """
    if config.key_sketch_bits == 16:
        return Stored(sketch, sketch)
    step = storage_step(sketch, config, torch.float64).clamp(min=1e-300)
    code = (sketch / step).round().clamp(-128, 127)
    parts = []
    for run in code.split(config.block_size // config.key_sub_block, 1):
        mean = (run.mean(1, keepdim=True) + 0.5).floor()
        bound = ((run - mean).square().mean((1, 2), keepdim=True).sqrt() + 0.5).floor().clamp(1, 64)
        low, high = (mean - 128).clamp(min=-128), (mean + 127).clamp(max=127)
        beyond = torch.where(run >= mean, run - mean, mean - 1 - run).clamp(max=127) - bound
        level = torch.where((beyond >= 0) & (beyond < 64), 1.5, 0.5) * bound
        outline = mean + torch.where(run >= mean, level, -level)
        parts.append([x.expand_as(run) for x in (run.clamp(low, high), outline, low, high)])
    return Stored(*(torch.cat(part, 1) * step for part in zip(*parts, strict=True)))


def logit_scale(dim: int, scale: float, config: SketchWalkConfig) -> float:
    """Factor on sketched logits."""
    width = min(dim, config.sketch_dim) if config.use_srht else dim
    return {"attention": scale, "sketch": 1 / math.sqrt(width), "authors": math.sqrt(width) / 100}[config.score_scale]


def pool(run: Tensor, block: Tensor, sub: int, config: SketchWalkConfig, contrast: float) -> Tensor:
    """One vector (heads, dim) for the tokens `run` of a sub-block, which are some of the tokens `block` of its block.

    Tokens weigh by a softmax of their squared distance from the block's mean, in units of the mean squared distance.
    """
    if sub == 1:
        return run[:, 0]
    centre = block.mean(1, keepdim=True)
    typical = (block - centre).square().sum(-1).mean(1, keepdim=True).clamp(min=1e-38)
    weight = torch.softmax(config.salience * (run - centre).square().sum(-1) / typical, -1)
    return centre[:, 0] + contrast * (weight[..., None] * (run - centre)).sum(1)


def sub_queries(query: Tensor, start: int, config: SketchWalkConfig) -> list[list[tuple[Tensor, int]]]:
    """Per query block of tokens `start` ...: (a sub-block's pooled tokens, rank of its last token) pairs."""
    size, sub, stop = config.block_size, config.query_sub_block, start + query.shape[1]
    blocks = []
    for block in range(start // size, (stop - 1) // size + 1):
        pooled = []
        whole = query[:, max(block * size - start, 0) : (block + 1) * size - start]
        for lo in range(block * size, (block + 1) * size, sub):
            begin, end = max(lo, start), min(lo + sub, stop)
            if begin < end:
                run = query[:, begin - start : end - start]
                pooled.append((pool(run, whole, sub, config, config.query_contrast), end - 1))
        blocks.append(pooled)
    return blocks


def sketched_keys(key: Tensor, config: SketchWalkConfig) -> Tensor:
    """Pooled sub-blocks of keys, rotated: (heads, sub_keys, width); of the heads' mean if the config says so."""
    sub, size = config.key_sub_block, config.block_size
    if config.head_mode == "mean":
        key = key.mean(0, keepdim=True)
    pooled = []
    for lo in range(0, key.shape[1], sub):
        block = key[:, lo // size * size : (lo // size + 1) * size]
        pooled.append(pool(key[:, lo : lo + sub], block, sub, config, 1.0))
    return torch.stack(pooled, 1) @ feature_matrix(key.shape[2], config)


def sub_queries_to_keep(num_tokens: int, config: SketchWalkConfig) -> int:
    """How many sub-queries of a block score, per head."""
    count = 1 if num_tokens == 1 else config.block_size // config.query_sub_block
    return count if config.block_score == "mass" else max(1, math.ceil(config.query_keep * count - 1e-6))


def scoring_queries(query: Tensor, start: int, config: SketchWalkConfig, rounded: bool = True) -> list[Scoring]:
    """Per query block of tokens `start` ...: the sub-queries that score, rounded to 8 bits where the rule says so.

    Those farthest from the mean of the block's sub-queries, per head; of two equals the earlier.
    """
    if config.head_mode == "mean":
        query = query.mean(0, keepdim=True)
    matrix = feature_matrix(query.shape[2], config)
    keep = sub_queries_to_keep(query.shape[1], config)
    blocks = []
    for pooled in sub_queries(query, start, config):
        exact = torch.stack([vector @ matrix for vector, _ in pooled], 1)
        ends = [last for _, last in pooled]
        chosen_values, chosen_ends = [], []
        for head in exact:
            apart = (head - head.mean(0)).square().sum(-1).tolist()
            # Two are equally far from their mean, whatever rounding says.
            order = sorted(range(len(apart)), key=lambda i, apart=apart: (-apart[i] if len(apart) > 2 else 0, i))
            kept = sorted(order[:keep])
            chosen_values.append(head[kept])
            chosen_ends.append([ends[i] for i in kept])
        values = torch.stack(chosen_values)
        if rounded and config.key_sketch_bits == 8 and config.block_score == "peak":
            step = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-300)
            values = (values / step).round() * step
        blocks.append(Scoring(values, torch.tensor(chosen_ends), exact, ends))
    return blocks


def block_scores(
    queries: list[Scoring],
    keys: Tensor,
    config: SketchWalkConfig,
    scale: float,
    causal: bool = True,
) -> Tensor:
    """(selections, rows, blocks): each of `queries` against sketched sub-keys (heads, sub_keys, width); `scale`
    multiplies sketched logits.

    Per sub-query: the softmax over blocks of each block's best visible logit ("peak"), or the softmax over sub-keys,
    summed over each block ("mass").
    """
    size, sub = config.block_size, config.key_sub_block
    kv_heads = keys.shape[0]
    first_token = torch.arange(keys.shape[1]) * sub
    rows = []
    for row in queries:
        group = row.values.shape[0] // kv_heads
        by_head = []
        for head, values in enumerate(row.values):
            real = row.last[head] >= 0
            logits = values[real] @ keys[head // group].T * scale
            if causal:
                logits = logits.masked_fill(first_token > row.last[head][real, None], -math.inf)
            of_block = logits.split(size // sub, -1)
            if config.block_score == "peak":
                shares = torch.stack([part.amax(-1) for part in of_block], -1).softmax(-1)
            else:
                weights = logits.softmax(-1).split(size // sub, -1)
                shares = torch.stack([part.sum(-1) for part in weights], -1)
            by_head.append(shares.amax(0) if config.reduce == "max" else shares.mean(0))
        grouped = torch.stack(by_head)
        grouped = grouped.unflatten(0, (-1, group)) if config.head_mode == "per_kv_head" else grouped[None]
        rows.append(grouped.amax(1) if config.reduce == "max" else grouped.mean(1))
    return torch.stack(rows, 1)


def transition_rows(scores: Tensor, config: SketchWalkConfig) -> Tensor:
    """Powers of the scores, as probabilities if the config says so; without a walk the scores themselves."""
    if config.walk == "none":
        return scores
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
    sketches: list[Stored] | None = None,
    settle: Callable[[int, int, list[Scoring]], list[Scoring]] | None = None,
    causal: bool = True,
    memories: list[Tensor] | None = None,
    shared: list[Tensor] | None = None,
) -> list[Call]:
    """One forward pass of one sequence.

    Parameters
    ----------
    stack : list of (query, key)
        Per sparse layer, shapes (heads, tokens, dim) and (kv_heads, tokens, dim), float64, of all tokens so far.
    start, stop : int
        Tokens of the call.
    sketches : list of Stored, optional
        Key sketches to score against, per layer: as somebody stored them. Default: rounded here.
    settle : callable, optional
        Maps layer, first token and this module's scoring sub-queries to those to go on with: somebody else's roundings
        of the same numbers. Default: rounded here.
    memories : list of Tensor, optional
        Per layer, (selections, blocks or fewer): what a call of one token remembers of the blocks, faded already.
    shared : list of Tensor, optional
        With `memories`: per layer, (blocks or fewer), what any layer remembers of them when this one chooses.
    """
    size, calls, previous = config.block_size, [], None
    first, num_blocks = start // size, -(-stop // size)
    for layer, (query, key) in enumerate(stack):
        query, key = query[:, :stop], key[:, :stop]
        factor = logit_scale(query.shape[2], 1 / math.sqrt(query.shape[2]) if scale is None else scale, config)
        stored = store(sketched_keys(key, config), config) if sketches is None else sketches[layer]
        own, of_all = scoring_queries(query[:, start:], start, config), None
        if config.walk != "none":
            of_all = scoring_queries(query, 0, config)
        if settle is not None:
            own = settle(layer, start, own)
            of_all = None if of_all is None else settle(layer, 0, of_all)
        keys = stored.outline if stop - start == 1 else stored.full
        scores = block_scores(own, keys, config, factor, causal)
        if memories is not None and shared is not None and stop - start == 1:
            for selection, held in enumerate(memories[layer]):
                for block in range(num_blocks):
                    claims = [held[block]] if block < len(held) else []
                    if 1 < block <= len(held):
                        claims.append(config.step_ahead * held[block - 1])
                    if block < len(shared[layer]):
                        claims.append(config.step_across * shared[layer][block])
                    scores[selection, 0, block] = max([scores[selection, 0, block], *(claim**2 for claim in claims)])
        rows = transition_rows(scores, config)
        walk = rows.clone()
        if previous is not None and of_all is not None:
            complete = transition_rows(block_scores(of_all, stored.full, config, factor, causal), config)
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


def has_memory(config: SketchWalkConfig) -> bool:
    """Whether steps remember."""
    return config.step_memory > 0 and config.walk == "none" and config.reduce == "max"


def shares(query: Tensor, key: Tensor, chosen: Tensor, config: SketchWalkConfig) -> Tensor:
    """What share of a token's attention over the chosen blocks (selections, blocks) each of them gets, in the head of
    its selection that gives most: (selections, blocks). `query` is (heads, dim), `key` (kv_heads, tokens, dim).
    """
    heads, dim = query.shape
    found = torch.zeros(chosen.shape, dtype=torch.float64)
    for head in range(heads):
        selection = head * chosen.shape[0] // heads
        logits = key[head * key.shape[0] // heads] @ query[head] / math.sqrt(dim)
        read = chosen[selection][torch.arange(key.shape[1]) // config.block_size]
        weights = logits.masked_fill(~read, -math.inf).softmax(0)
        by_block = torch.stack([part.sum() for part in weights.split(config.block_size)])
        seen = found[selection, : len(by_block)]
        seen.copy_(torch.maximum(seen, by_block))
    return found


def look_back(query: Tensor, key: Tensor, stop: int, selections: int, config: SketchWalkConfig) -> Tensor:
    """What a prompt of `stop` tokens leaves to the step after it: shares of its last sixteen tokens among all blocks up
    to their own, less with every token behind them.
    """
    left = torch.zeros(selections, -(-stop // config.block_size), dtype=torch.float64)
    for position in range(max(0, stop - 16), stop):
        found = shares(query[:, position], key[:, : position + 1], torch.ones_like(left, dtype=torch.bool), config)
        left = torch.maximum(left, found * config.step_memory ** (stop - 1 - position))
    return left


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
