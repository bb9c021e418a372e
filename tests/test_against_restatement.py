"""The package against `restatement`, over a matrix of shapes, dtypes and settings that covers every pair of values.

Budgets are worked out, not tuned. With every sketched logit off by at most δ, a softmax share is off by a factor
within exp(±2δ), and so is any sum, mean or maximum of shares. The power s makes that exp(±2sδ), normalising a row
doubles it, and walks only add and multiply non-negative numbers, so after L layers of h hops every entry of R is within
exp(±4sδLh). δ is that of float32 products, 16 ulp of the norms' product. "Peak" scores share the bound: the best of
logits off by δ is off by δ. What rounding key sketches and sub-queries to 8 bits does, and which sub-queries are kept,
is tested on its own (`test_stored_key_sketches`, `Settle`): float32 may fall on the other side of a tie. Everything
after it starts from the numbers as rounded.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import restatement
from sketch_walk import SketchWalkConfig, sketch_walk_attention
from sketch_walk.kernels import attend_selected
from sketch_walk.layout import make_layout
from sketch_walk.scoring import _sketch_queries
from sketch_walk.sketch import Sketch
from sketch_walk.state import LayerSketch, SharedMemory
from tensors import QKV, block_mask, layers

LAYERS = 3
FLOAT32_ULPS = 16
# Below this share of a row's largest entry, float32 powers lose digits or underflow.
FLOOR = 1e-30

SHAPES: dict[str, list[Any]] = {
    "tokens": [63, 111, 200, 333],
    "kv_heads": [1, 2, 3],
    "group": [1, 2, 3, 16],
    "dim": [32, 64, 80, 96, 128, 256],
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "batch": [1, 2, 3, 8],
}
BUDGETS: dict[str, list[float]] = {"top_k_blocks": [2, 5], "density": [0.2, 0.5], "mass": [0.5, 0.9]}
SETTINGS: dict[str, list[Any]] = {
    "block_size": [16, 32, 64, 128],
    "query_sub_block": [1, 2, 4, 8, 16],
    "key_sub_block": [1, 2, 4, 8, 16],
    "sketch_dim": [16, 32, 64, 512],
    "use_srht": [True, True, False],
    "block_score": ["peak", "peak", "mass"],
    "query_keep": [0.25, 0.5, 1.0],
    "salience": [0.0, 2.0, 5.0],
    "query_contrast": [1.0, 1.25, 3.0],
    "reduce": ["max", "mean"],
    "head_mode": ["shared", "per_kv_head", "mean"],
    "walk": ["damped", "product", "none"],
    "walk_degree": [1, 3],
    "walk_beta": [0.3, 0.9],
    "sparsity_exponent": [1, 2, 8],
    "budget": [
        {"top_k_blocks": 2},
        {"top_k_blocks": 5},
        {"density": 0.2},
        {"density": 0.5},
        {"mass": 0.5},
        {"mass": 0.9},
    ],
    "min_blocks": [1, 4],
    "sink_blocks": [1, 2, 3],
    "local_blocks": [1, 2, 3],
    "dense_tail_blocks": [0, 1, 2],
    "mean_correction": [False, True],
    "key_sketch_bits": [8, 16],
    "score_scale": ["attention", "attention", "sketch"],
    "walk_normalise": [True, True, False],
    "hadamard_seed": [42, 7],
}


@dataclass(frozen=True)
class Case:
    """One row of the matrix."""

    name: str
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    config: SketchWalkConfig
    seed: int = 0

    def stack(self) -> list[QKV]:
        return layers(LAYERS, *self.shape, seed=self.seed, dtype=self.dtype)


def covering_rows(parameters: dict[str, list[Any]], candidates: int = 24) -> list[dict[str, Any]]:
    """Rows in which every two values of every two parameters meet at least once; greedy, seeded."""
    names, draw = list(parameters), random.Random(0)
    wanted = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(parameters[names[a]]))
        for j in range(len(parameters[names[b]]))
    }
    rows = []

    def pairs(row: list[int]) -> set[tuple[int, int, int, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(names)), 2)}

    while wanted:
        a, i, b, j = min(wanted)
        best: list[int] = []
        for _ in range(candidates):
            row = [draw.randrange(len(parameters[name])) for name in names]
            row[a], row[b] = i, j
            if not best or len(pairs(row) & wanted) > len(pairs(best) & wanted):
                best = row
        wanted -= pairs(best)
        rows.append({name: parameters[name][at] for name, at in zip(names, best, strict=True)})
    return rows


def make_case(number: int, row: dict[str, Any]) -> Case:
    shape = (row["batch"], row["kv_heads"] * row["group"], row["kv_heads"], row["tokens"], row["dim"])
    settings = {name: value for name, value in row.items() if name in SETTINGS and name != "budget"}
    config = SketchWalkConfig(**settings, **row["budget"])
    name = f"{number}-n{row['tokens']}-h{shape[1]}x{shape[2]}-d{row['dim']}-{str(row['dtype'])[6:]}-b{row['batch']}"
    return Case(name, shape, row["dtype"], config, number)


PUBLISHED = [
    Case(name, (2, 4, 2, 333, 64), torch.float32, config)
    for name, config in {
        "default": SketchWalkConfig(top_k_blocks=3),
        "default-damped": SketchWalkConfig(top_k_blocks=3, walk="damped"),
        "mass-damped": SketchWalkConfig(top_k_blocks=3, walk="damped", block_score="mass"),
        "high_quality": SketchWalkConfig.preset("high_quality", top_k_blocks=4),
        "high_speed": SketchWalkConfig.preset("high_speed", top_k_blocks=2),
        "long_context": SketchWalkConfig.preset("long_context", top_k_blocks=2),
        "paper": SketchWalkConfig.paper(block_size=32, top_k_blocks=4),
        "paper-unnormalised": SketchWalkConfig.paper(normalise=False, block_size=32, top_k_blocks=4),
        "icml": SketchWalkConfig.icml(block_size=16),
        "icml-no-tail": SketchWalkConfig.icml(block_size=16, dense_tail_blocks=0, sketch_dim=32),
    }.items()
]
MATRIX = [make_case(number, row) for number, row in enumerate(covering_rows({**SHAPES, **SETTINGS}))]
EIGHT_BITS = [
    pytest.param(case, id=case.name)
    for case in PUBLISHED + MATRIX
    if case.config.key_sketch_bits == 8 and case.config.uses_walk and case.shape[3] >= case.config.block_size
]
CASES = [pytest.param(case, id=case.name) for case in PUBLISHED + MATRIX]


def doubles(stack: list[QKV], sequence: int) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of one sequence, in float64."""
    return [(q[sequence].double(), k[sequence].double()) for q, k, _ in stack]


def each(query: Tensor, key: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of every sequence, in float64."""
    return [(q.double(), k.double()) for q, k in zip(query, key, strict=True)]


def logit_error(query: Tensor, key: Tensor, config: SketchWalkConfig) -> float:
    """δ of one sequence and layer (module docstring)."""
    keys = restatement.sketched_keys(key, config)
    if config.head_mode == "mean":
        query = query.mean(0, keepdim=True)
    scale = restatement.logit_scale(query.shape[2], query.shape[2] ** -0.5, config)
    # A sub-query's mean is no longer than its longest query, up to the transform's sqrt(n/r).
    queries = query @ restatement.feature_matrix(query.shape[2], config)
    norms = queries.norm(dim=-1).max() * keys.norm(dim=-1).max()
    return (scale * FLOAT32_ULPS * 2.0**-24 * norms).item()


def stored_sketches(states: list[LayerSketch], sequence: int, tokens: int, head_dim: int) -> list[restatement.Stored]:
    """Key sketches of one sequence as the states hold them, unpacked from the documented layout, in float64."""
    found = []
    for state in states:
        config = state.config
        per_block = config.block_size // config.key_sub_block
        width = min(config.sketch_dim, head_dim) if config.use_srht else head_dim
        buffers = state.read_keys(-(-tokens // config.block_size))
        codes, scales = (None if x is None else x[sequence] for x in buffers)
        assert codes is not None
        real = slice(0, -(-tokens // config.key_sub_block))
        if scales is None:
            values = codes.double().view(codes.shape[0], -1, width)[:, real]
            found.append(restatement.Stored(values, values))
            continue
        quarter = -(-width // 4)
        mean = codes[:, :, None, :width].double() - 128
        planes = codes[:, :, 4 * quarter :].int().view(*codes.shape[:2], 4, per_block, quarter)
        bits = torch.cat([(planes >> shift) % 4 for shift in (0, 2, 4, 6)], -1)[..., :width]
        side, away = bits[:, :, 0], 16 * bits[:, :, 1] + 4 * bits[:, :, 2] + bits[:, :, 3]
        steps, bound = scales.double()[:, :, None].split(1, -1)
        away = away + torch.where((side == 0) | (side == 3), bound, 64.0 * (away >= bound))
        code = mean + torch.where(side >= 2, away, -1 - away)
        read = (code * steps, (mean + (side - 1.5) * bound) * steps)
        found.append(restatement.Stored(*(x.flatten(1, 2)[:, real] for x in read)))
    return found


class Settle:
    """The package's sub-queries of one call, each checked against the restatement's before they replace them.

    Kept are those farthest from the mean, to float32's error of a distance; each lies half a step from its exact value,
    on a multiple of its own step.
    """

    def __init__(self, stack: list[QKV], sequence: int, stop: int, config: SketchWalkConfig) -> None:
        self.stack, self.sequence, self.stop, self.config = stack, sequence, stop, config

    def __call__(self, layer: int, start: int, own: list[restatement.Scoring]) -> list[restatement.Scoring]:
        config, query = self.config, self.stack[layer][0][self.sequence : self.sequence + 1, :, start : self.stop]
        layout = make_layout(1, query.shape[2], self.stop, query.device)
        values, last = _sketch_queries(query, layout, 0, layout.num_query_blocks(config.block_size), config)
        last = last.expand(-1, -1, values.shape[2], -1)
        assert values.shape[1] == len(own)
        settled = []
        for row, mine in enumerate(own):
            for head in range(mine.values.shape[0]):
                self.check(values[0, row, head].double(), last[0, row, head], mine, head, query.shape[2])
            settled.append(restatement.Scoring(values[0, row].double(), last[0, row], mine.exact, mine.ends))
        return settled

    def check(self, values: Tensor, last: Tensor, mine: restatement.Scoring, head: int, num_tokens: int) -> None:
        exact, slack = mine.exact[head], FLOAT32_ULPS * 2.0**-24 * mine.exact[head].norm(dim=-1).max()
        kept = [mine.ends.index(rank) for rank in last.tolist() if rank >= 0]
        assert kept == sorted(set(kept)), "kept sub-queries stay in order"
        limit = restatement.sub_queries_to_keep(num_tokens, self.config)
        assert len(kept) == min(limit, len(mine.ends))
        if len(mine.ends) == 2:
            assert kept == [0, 1][:limit], "two are equally far from their mean: the earlier comes first"
        apart = (exact - exact.mean(0)).norm(dim=-1)
        dropped = [i for i in range(len(mine.ends)) if i not in kept]
        if dropped:
            assert apart[kept].min() >= apart[dropped].max() - 2 * slack, "a sub-query nearer to the mean was kept"
        chosen, rounded = exact[kept], values[last >= 0]
        if self.config.key_sketch_bits == 8 and self.config.block_score == "peak":
            step = (chosen.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-300)
            assert ((rounded - chosen).abs() <= 0.5001 * step + slack).all()
            assert ((rounded / step - (rounded / step).round()).abs() <= 1e-3 + slack / step).all()
        else:
            assert ((rounded - chosen).abs() <= slack).all()


def cut_is_tied(scoring: restatement.Scoring, num_tokens: int, config: SketchWalkConfig) -> bool:
    """Whether float32 may keep another sub-query than float64 does."""
    kept = restatement.sub_queries_to_keep(num_tokens, config)
    if len(scoring.ends) <= max(2, kept):
        return False
    apart = (scoring.exact - scoring.exact.mean(1, keepdim=True)).norm(dim=-1).sort(-1, descending=True).values
    slack = 4 * FLOAT32_ULPS * 2.0**-24 * scoring.exact.norm(dim=-1).amax(-1)
    return bool((apart[:, kept - 1] - apart[:, kept] < slack).any())


def score_budget(delta: float) -> float:
    """Largest |log| of the ratio of two scores."""
    return 2 * delta + 1e-6


def walk_budget(deltas: list[float], config: SketchWalkConfig) -> float:
    """Largest |log| of the ratio of two entries of R after `deltas`' layers."""
    hops = config.walk_degree if config.walk == "damped" else 1
    per_layer = [2 * (config.sparsity_exponent * score_budget(delta) + 1e-6) for delta in deltas]
    return per_layer[-1] if config.walk == "none" else hops * sum(per_layer)


def assert_within_factor(actual: Tensor, expected: Tensor, budget: float, what: str) -> None:
    """|log(actual / expected)| <= budget wherever either counts beside its row's largest."""
    actual, expected = actual.double(), expected.double()
    largest = expected.amax(-1, keepdim=True)
    excess = (actual - expected).abs() - expected * math.expm1(budget) - FLOOR * largest
    assert torch.isfinite(actual).all(), what
    assert (excess <= 0).all(), (
        f"{what}: {(excess / largest).max().item():.2e} of the row's largest beyond {budget:.2e}"
    )


def assert_same_selection(actual: Tensor, call: restatement.Call, config: SketchWalkConfig, budget: float) -> int:
    """Blocks swapped only for near ties; returns the number of rows that differ."""
    differing = 0
    num_rows = actual.shape[1]
    for selection, row in itertools.product(range(actual.shape[0]), range(num_rows)):
        mine, theirs = actual[selection, row], call.chosen[selection, row]
        if (mine == theirs).all():
            continue
        differing += 1
        where = f"selection {selection}, row {call.first + row}"
        diagonal, walk = call.first + row, call.walk[selection, row]
        locals_, sinks = restatement.forced_blocks(diagonal + 1, diagonal, config)
        assert not mine[diagonal + 1 :].any(), f"{where} reads a later block"
        added, missing = (mine & ~theirs).nonzero().flatten(), (theirs & ~mine).nonzero().flatten()
        assert not set(missing.tolist()) & set(locals_), f"{where} misses a local block"
        if config.mass is not None:
            share = walk / walk.sum()
            slack = math.expm1(2 * budget) + 1e-5
            least = restatement.budget(diagonal + 1, config)[0]
            assert mine.sum() >= least, f"{where} reads too few blocks"
            assert share[mine].sum() >= config.mass - slack, f"{where} reads too little mass"
            optional = [b for b in mine.nonzero().flatten().tolist() if b not in locals_ + sinks]
            if mine.sum() > least:
                smallest = min(share[b].item() for b in optional)
                assert share[mine].sum() - smallest <= config.mass + slack, f"{where} reads too much"
        else:
            assert mine.sum() == theirs.sum(), f"{where} reads {mine.sum()} blocks instead of {theirs.sum()}"
        if len(added) and len(missing):
            gap = walk[missing].max() - walk[added].min() * math.exp(2 * budget)
            assert gap <= FLOOR * walk.max(), f"{where} swaps blocks that are no tie"
    return differing


@pytest.mark.parametrize("case", CASES)
def test_block_scores(case: Case) -> None:
    """Of the module, which rounds nothing. A row is left out if its cut between sub-queries is a tie in float32."""
    config = case.config
    query, key, _ = case.stack()[0]
    actual = Sketch(config, case.shape[4])(query, key)
    tied = rows = 0
    for sequence, (q, k) in enumerate(each(query, key)):
        own = restatement.scoring_queries(q, 0, config, rounded=False)
        factor = restatement.logit_scale(q.shape[2], q.shape[2] ** -0.5, config)
        expected = restatement.block_scores(own, restatement.sketched_keys(k, config), config, factor)
        clear = [row for row, scoring in enumerate(own) if not cut_is_tied(scoring, q.shape[1], config)]
        tied, rows = tied + len(own) - len(clear), rows + len(own)
        budget = score_budget(logit_error(q, k, config))
        assert_within_factor(actual[sequence][:, clear], expected[:, clear], budget, f"scores of sequence {sequence}")
    assert tied <= 1 + 0.02 * rows, f"{tied} of {rows} rows left out"


@pytest.mark.parametrize("case", CASES)
def test_walk_transitions_and_selection_over_layers(case: Case) -> None:
    config, stack = case.config, case.stack()
    batch, _, _, tokens, _ = case.shape
    states = [LayerSketch(config) for _ in stack]
    results, walk = [], None
    for (query, key, value), state in zip(stack, states, strict=True):
        results.append(sketch_walk_attention(query, key, value, config, state=state, walk=walk))
        walk = results[-1].walk
    differing = compared = 0
    for sequence in range(batch):
        pairs = doubles(stack, sequence)
        sketches = stored_sketches(states, sequence, tokens, case.shape[4])
        settle = Settle(stack, sequence, tokens, config)
        calls = restatement.run_call(pairs, config, 0, tokens, sketches=sketches, settle=settle)
        deltas: list[float] = []
        for layer, call in enumerate(calls):
            where = f"layer {layer}, sequence {sequence}"
            deltas.append(logit_error(*pairs[layer], config))
            result = results[layer]
            scale = call.walk.amax(-1, keepdim=True)
            mine = result.walk[sequence].double()
            budget = walk_budget(deltas, config)
            assert_within_factor(mine / mine.amax(-1, keepdim=True), call.walk / scale, 2 * budget, f"R, {where}")
            complete = tokens // config.block_size
            if config.uses_walk and complete:
                stored = states[layer].read_rows(complete)[sequence]
                row_budget = walk_budget(deltas[-1:], config)
                expected = call.rows[:, :complete, :complete]
                assert_within_factor(stored, expected, row_budget, f"T, {where}")
            indices = result.selection.per_head().indices[sequence]
            chosen = block_mask(indices, call.walk.shape[-1])
            differing += assert_same_selection(chosen, call, config, budget)
            compared += chosen.shape[0] * chosen.shape[1]
            assert (chosen.sum(-1) == result.selection.per_head().counts[sequence]).all()
    # Near ties are rare in data with structure.
    assert differing <= 0.01 * compared, f"{differing} of {compared} rows differ"


@pytest.mark.parametrize("case", CASES)
def test_stored_key_sketches(case: Case) -> None:
    """Half a storage step off, and float32 of the vector's length: a mean, a rotation. Codes beyond 8 bits are clipped.

    A tie of one code may move its block's mean or bound by one, and the outlines that lie on them.
    """
    config = case.config
    query, key, value = case.stack()[0]
    state = LayerSketch(config)
    sketch_walk_attention(query, key, value, config, state=state)
    for sequence, (_, k) in enumerate(each(query, key)):
        expected = restatement.sketched_keys(k, config)
        (actual,) = stored_sketches([state], sequence, case.shape[3], case.shape[4])
        step = restatement.storage_step(expected, config, case.dtype)
        slack = FLOAT32_ULPS * 2.0**-24 * k.norm(dim=-1).max()
        if config.key_sketch_bits == 8:
            own = restatement.store(expected, config)
            assert own.low is not None
            assert own.high is not None
            expected = torch.maximum(torch.minimum(expected, own.high), own.low)
            # The same codes but for ties: few coordinates may be one step apart.
            assert ((actual.full - own.full).abs() > 0.5 * step).double().mean() <= 2e-3
            assert ((actual.outline - own.outline).abs() > 0.5 * step).double().mean() <= 2e-2
        assert ((actual.full - expected).abs() <= 0.5001 * step + slack).all(), f"sequence {sequence}"


@pytest.mark.parametrize("case", EIGHT_BITS)
def test_eight_bits_against_unrounded_sketches(case: Case) -> None:
    """A key coordinate is off by half a step or by what is clipped, a query's by half of its own step, max|q̃| / 127.

    |logit error| <= |q̃| · |k̂ - k̃| + |k̂| · max|q̃| / 254 · sqrt(width).
    """
    # A power would multiply the budget until it allows anything.
    config = replace(case.config, sparsity_exponent=1)
    query, key, value = case.stack()[0]
    state = LayerSketch(config)
    sketch_walk_attention(query, key, value, config, state=state)
    complete = case.shape[3] // config.block_size
    stored = state.read_rows(complete)
    scale = restatement.logit_scale(case.shape[4], case.shape[4] ** -0.5, config)
    compared = 0
    for sequence, (q, k) in enumerate(each(query, key)):
        own = restatement.scoring_queries(q, 0, config, rounded=False)[:complete]
        clear = [row for row, scoring in enumerate(own) if not cut_is_tied(scoring, q.shape[1], config)]
        keys = restatement.sketched_keys(k, config)
        scores = restatement.block_scores(own, keys, config, scale)
        expected = restatement.transition_rows(scores, config)[:, :, :complete]
        rounded = restatement.store(keys, config).full
        key_error = 1.001 * (rounded - keys).norm(dim=-1).max()
        longest = max(scoring.exact.norm(dim=-1).max() for scoring in own)
        query_error = max(scoring.exact.abs().max() for scoring in own) / 254 * math.sqrt(keys.shape[2])
        if config.block_score == "mass":
            query_error = 0 * query_error
        off = longest * key_error + rounded.norm(dim=-1).max() * query_error
        delta = logit_error(q, k, config) + (scale * off).item()
        budget = walk_budget([delta], config)
        assert_within_factor(stored[sequence][:, clear], expected[:, clear], budget, f"T, sequence {sequence}")
        compared += len(clear)
    assert compared >= 0.98 * case.shape[0] * complete


@pytest.mark.parametrize("case", CASES)
def test_attention_over_a_given_selection(case: Case) -> None:
    """Within twice the error of SDPA with the same blocks as a dense mask, in the same dtype, plus output rounding.

    With mean correction log(count) is rounded to the dtype: its error e changes every weight by at most exp(2e).
    """
    config = case.config
    query, key, value = case.stack()[0]
    batch, heads, kv_heads, tokens, dim = case.shape
    size = config.block_size
    selection = sketch_walk_attention(query, key, value, config).selection.per_head()
    layout = make_layout(batch, tokens, tokens, query.device)
    actual = attend_selected(
        query,
        key,
        value,
        selection.indices,
        selection.counts,
        layout,
        block_size=size,
        scale=dim**-0.5,
        mean_correction=config.mean_correction,
    )
    blocks = -(-tokens // size)
    chosen = block_mask(selection.indices, blocks)
    by_token = chosen.repeat_interleave(size, -1).repeat_interleave(size, -2)[..., :tokens, :tokens]
    by_head = by_token.repeat_interleave(heads // by_token.shape[1], 1)
    visible = by_head & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    plain = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=heads != kv_heads)
    uncorrected = SketchWalkConfig(block_size=size, query_sub_block=1, key_sub_block=1)
    eps = torch.finfo(case.dtype).eps
    for sequence in range(batch):
        one = [x[sequence].double() for x in (query, key, value)]
        expected = restatement.attend(*one, chosen[sequence], config, 0)
        exact_plain = restatement.attend(*one, chosen[sequence], uncorrected, 0)
        largest = value[sequence].abs().max().item()
        budget = 2 * (plain[sequence] - exact_plain).abs().max().item() + 2 * eps * largest
        if config.mean_correction:
            budget += largest * math.expm1(2 * eps / 2 * math.log(size)) + 2 * eps * largest
        error = (actual[sequence] - expected).abs().max().item()
        assert error <= budget, f"sequence {sequence}: {error:.2e} against {budget:.2e}"
        if case.dtype == torch.float32:
            assert error <= 1e-5 * max(1.0, largest), f"sequence {sequence}: {error:.2e} in float32"


def padded(held: Tensor, like: Tensor) -> Tensor:
    """What is remembered of as many blocks as `like` has."""
    return torch.nn.functional.pad(held, (0, like.shape[-1] - held.shape[-1]))


def known_to_all(memories: list[Tensor], noted: list[Tensor], first_step: bool) -> list[Tensor]:
    """What any layer remembers when each of them chooses: those before it have noted what they found in this step, and
    those behind it look back only after it in the first one.
    """
    shared = []
    for layer, held in enumerate(memories):
        seen = [*(memories[: layer + 1] if first_step else memories), *noted[:layer]]
        like = noted[0] if noted else held
        shared.append(torch.stack([padded(x, like).amax(0) for x in seen]).amax(0))
    return shared


@pytest.mark.parametrize("case", CASES[:: max(1, len(CASES) // 16)])
def test_call_on_top_of_earlier_calls(case: Case) -> None:
    """A prompt in two unaligned chunks, then single tokens: rows of R and selections of every call."""
    config, stack = case.config, case.stack()
    batch, _, _, tokens, _ = case.shape
    cuts = [0, tokens // 2 - 3, tokens - 3, tokens - 2, tokens - 1, tokens]
    shared: dict[torch.device, SharedMemory] = {}
    states = [LayerSketch(config, shared=shared) for _ in stack]
    memories = [[torch.zeros(1, 0, dtype=torch.float64) for _ in stack] for _ in range(batch)]
    steps_from = cuts[2]
    for start, stop in itertools.pairwise(cuts):
        walk = None
        results = []
        for (query, key, value), state in zip(stack, states, strict=True):
            now = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
            results.append(sketch_walk_attention(*now, config, state=state, walk=walk))
            walk = results[-1].walk
        for sequence in range(batch):
            pairs = doubles(stack, sequence)
            sketches = stored_sketches(states, sequence, stop, case.shape[4])
            settle = Settle(stack, sequence, stop, config)
            remembers = restatement.has_memory(config)
            if remembers and start == steps_from:
                selections = results[0].selection.per_head().indices.shape[1]
                memories[sequence] = [restatement.look_back(*pair, start, selections, config) for pair in pairs]
            memories[sequence] = [held * config.step_memory ** (stop - start) for held in memories[sequence]]
            noted = []
            if remembers and start >= steps_from:
                for (query, key), result in zip(pairs, results, strict=True):
                    mask = block_mask(result.selection.per_head().indices[sequence], -(-stop // config.block_size))
                    noted.append(restatement.shares(query[:, stop - 1], key[:, :stop], mask[:, -1], config))
            calls = restatement.run_call(
                pairs, config, start, stop, sketches=sketches, settle=settle,
                memories=memories[sequence] if remembers else None,
                shared=known_to_all(memories[sequence], noted, start == steps_from),
            )  # fmt: skip
            deltas: list[float] = []
            for layer, call in enumerate(calls):
                deltas.append(logit_error(*pairs[layer], config))
                budget = walk_budget(deltas, config)
                if remembers and stop - start == 1:
                    # Shares come from logits in the model's dtype.
                    largest = pairs[layer][0].norm(dim=-1).max() * pairs[layer][1].norm(dim=-1).max()
                    budget += 2 * torch.finfo(case.dtype).eps * largest.item() / case.shape[4] ** 0.5
                mine = results[layer].walk[sequence].double()
                assert_within_factor(
                    mine / mine.amax(-1, keepdim=True),
                    call.walk / call.walk.amax(-1, keepdim=True),
                    2 * budget,
                    f"R, tokens {start}-{stop}, layer {layer}, sequence {sequence}",
                )
                indices = results[layer].selection.per_head().indices[sequence]
                chosen = block_mask(indices, call.walk.shape[-1])
                assert_same_selection(chosen, call, config, budget)
                if remembers and start >= steps_from:
                    memories[sequence][layer] = torch.maximum(noted[layer], padded(memories[sequence][layer], noted[0]))


@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head", "mean"])
@pytest.mark.parametrize("mass", [None, 0.7])
def test_without_causality(head_mode: str, mass: float | None) -> None:
    """causal=False: every block is available to every row, before and after it."""
    config = SketchWalkConfig(
        block_size=16, head_mode=head_mode, top_k_blocks=5, mass=mass, key_sketch_bits=16, sink_blocks=1, local_blocks=2
    )
    stack = layers(2, 2, 4, 2, 150, 32, seed=5)
    walk = None
    for layer, (query, key, value) in enumerate(stack):
        result = sketch_walk_attention(query, key, value, config, causal=False, walk=walk)
        walk = result.walk if layer else None
        if layer:
            continue
        for sequence in range(2):
            (call,) = restatement.run_call(doubles([stack[0]], sequence), config, 0, 150, causal=False)
            chosen = block_mask(result.selection.per_head().indices[sequence], call.walk.shape[-1])
            assert (chosen == call.chosen).all()
            one = [x[sequence].double() for x in stack[0]]
            expected = restatement.attend(*one, chosen, config, 0, causal=False)
            torch.testing.assert_close(result.output[sequence].double(), expected, atol=1e-5, rtol=0)


def test_matrix_covers_every_pair() -> None:
    """The matrix is what this file claims it is."""
    parameters = {**SHAPES, **SETTINGS}
    rows = covering_rows(parameters)
    for a, b in itertools.combinations(parameters, 2):
        for x, y in itertools.product(parameters[a], parameters[b]):
            assert any(row[a] == x and row[b] == y for row in rows), f"{a}={x} never meets {b}={y}"
