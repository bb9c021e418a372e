"""`SketchWalkConfig.paper(normalise=False)` against the published rule as an experiment states it.

The experiment averages queries and keys over heads, takes block means, keeps r = 64 coordinates, and walks
R <- R · softmax(q̃ k̃ᵀ / sqrt(r))**s, in float64 over one sequence. Its R is never rescaled, so after some layers it
underflows; where it has not, our rescaled R must choose the same blocks.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sketch_walk import SketchWalkConfig, sketch_walk_attention
from tensors import block_mask, layers

# float64's smallest normal number: below it R has lost digits.
UNDERFLOW = torch.finfo(torch.float64).tiny
# Scores in float32 against float64: sketched logits of up to 64 lose 1e-5, and s = 8 over 8 layers multiplies that.
TIE = 1e-2


def block_means(x: Tensor, size: int) -> Tensor:
    """Means over heads, then over blocks of tokens; the last block divides by its true length."""
    return torch.stack([part.mean(0) for part in x.mean(0).split(size)])


def experiment(stack: list[tuple[Tensor, Tensor]], size: int, density: float, min_blocks: int, exponent: float) -> list:
    """Per layer: R (float64) and the chosen blocks, both (blocks, blocks)."""
    results, walk = [], None
    for query, key in stack:
        width = query.shape[-1]
        logits = block_means(query, size) @ block_means(key, size).T / math.sqrt(width)
        blocks = logits.shape[0]
        causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
        step = logits.masked_fill(~causal, -math.inf).softmax(-1) ** exponent
        walk = step if walk is None else walk @ step
        row = torch.arange(blocks)
        budget = ((row + 1) * density - 1e-6).ceil().clamp(min=min_blocks).long()
        forced = (row == 0) | (row == row[:, None])
        rank = walk.masked_fill(~causal, -1.0).masked_fill(forced & causal, math.inf)
        order = rank.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        results.append((walk, (order < budget[:, None]) & causal))
    return results


@pytest.mark.parametrize(("dim", "sketch_dim"), [(64, 64), (32, 64)])
@pytest.mark.parametrize(("density", "min_blocks"), [(0.2, 4), (0.1, 2)])
@pytest.mark.parametrize("sharpness", [2.0, 12.0], ids=["mild", "sharp"])
def test_paper_rule_selects_what_the_experiment_selects(
    dim: int, sketch_dim: int, density: float, min_blocks: int, sharpness: float
) -> None:
    """At r = d the kept coordinates are a rotation, which no inner product sees."""
    config = SketchWalkConfig.paper(
        normalise=False,
        block_size=16,
        sketch_dim=sketch_dim,
        density=density,
        min_blocks=min_blocks,
        skip_first_n_layers=0,
    )
    assert config.sparsity_exponent == 8
    count, tokens = 8, 333
    stack = [(sharpness / 2 * q, k, v) for q, k, v in layers(count, 1, 6, 2, tokens, dim)]
    expected = experiment([(q[0].double(), k[0].double()) for q, k, _ in stack], 16, density, min_blocks, 8)
    walk, compared, lost, swapped = None, 0, 0, 0
    for layer, (query, key, value) in enumerate(stack):
        result = sketch_walk_attention(query, key, value, config, walk=walk)
        walk = result.walk
        reference, chosen = expected[layer]
        mine = block_mask(result.selection.indices[0], reference.shape[0])
        assert (mine.sum(-1) == chosen.sum(-1)).all()
        for row in range(reference.shape[0]):
            if (reference[row, : row + 1] < UNDERFLOW).any():
                lost += 1
                continue
            compared += 1
            added, missing = mine[row] & ~chosen[row], chosen[row] & ~mine[row]
            if added.any():
                swapped += 1
                best, worst = reference[row][missing].max(), reference[row][added].min()
                assert best <= worst * (1 + TIE), f"layer {layer}, row {row}: no tie"
    assert compared > 20, "too few rows compared to mean anything"
    assert swapped <= 0.02 * compared, f"{swapped} of {compared} rows swap near ties"
    assert compared + lost == count * -(-tokens // 16)


def test_the_experiment_underflows_and_ours_does_not() -> None:
    """What the test above leaves out exists, and our R still tells the blocks apart there."""
    config = SketchWalkConfig.paper(normalise=False, block_size=16, density=0.2, min_blocks=4)
    stack = [(q, k, v) for q, k, v in layers(40, 1, 6, 2, 333, 64)]
    reference, _ = experiment([(q[0].double(), k[0].double()) for q, k, _ in stack], 16, 0.2, 4, 8)[-1]
    walk = None
    for query, key, value in stack:
        walk = sketch_walk_attention(query, key, value, config, walk=walk).walk
    assert walk is not None
    assert (reference[-1] == 0).any()
    assert torch.isfinite(walk).all()
    assert (walk.amax(-1) == 1).all()


def test_normalised_rows_are_the_default_of_the_paper_rule() -> None:
    """Published rows lose mass at every layer; normalised ones keep it, and the selections differ."""
    plain, normalised = (
        SketchWalkConfig.paper(normalise=flag, block_size=16, top_k_blocks=4) for flag in (False, True)
    )
    assert SketchWalkConfig.paper().walk_normalise
    selections = []
    for config in (plain, normalised):
        walk = None
        for query, key, value in layers(4, 1, 6, 2, 333, 64):
            result = sketch_walk_attention(query, key, value, config, walk=walk)
            walk = result.walk
        selections.append(result.selection.indices)
    assert (selections[0] != selections[1]).any()
