"""The promised test categories, each runnable by its class name, and the four named bugs as regression tests."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sketch_walk.common.core import (
    DecodeCache,
    HadamardTransform,
    Sketch,
    SketchState,
    SketchWalkAttention,
    SketchWalkConfig,
    Walk,
    create_sketch_walk_config,
)
from sketch_walk.config import causal_density
from sketch_walk.hadamard import fast_walsh_hadamard, sketch_matrix
from sketch_walk.selection import select_blocks
from sketch_walk.sketch import pool_sub_blocks
from sketch_walk.walk import transition_rows
from tensors import block_mask, layers, qkv, token_mask

# The same examples in every run: a failure here must be somebody's change.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=60)
repeatable = settings.get_profile("repeatable")


def sparse(**changes: Any) -> SketchWalkConfig:
    """A small config, sparse in every layer."""
    base: dict[str, Any] = {"block_size": 16, "top_k_blocks": 3, "skip_first_n_layers": 0}
    return SketchWalkConfig(**{**base, **changes})


def walking(**changes: Any) -> SketchWalkConfig:
    """The same with a walk."""
    return sparse(**{"walk": "damped", **changes})


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Dense attention in plain steps; `visible` (batch, heads or 1, n_q, n_k); 0 where a query sees nothing."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(~visible, -math.inf)
    return logits.softmax(-1).nan_to_num(nan=0.0) @ value


class TestHadamardTransform:
    """Signs, transform, sample."""

    @pytest.mark.parametrize("n", [1, 2, 8, 64, 256])
    def test_is_its_own_inverse_and_orthonormal(self, n: int) -> None:
        x = random(5, n)
        y = fast_walsh_hadamard(x)
        torch.testing.assert_close(fast_walsh_hadamard(y), x)
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))

    def test_is_sylvesters_matrix(self) -> None:
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        matrix = torch.kron(two, torch.kron(two, two)) / math.sqrt(8)
        torch.testing.assert_close(fast_walsh_hadamard(torch.eye(8, dtype=torch.float64)), matrix)

    @pytest.mark.parametrize("n", [0, 3, 12, 80])
    def test_refuses_lengths_that_are_no_power_of_two(self, n: int) -> None:
        with pytest.raises(ValueError, match=rf"last dimension of x must be a power of two, got {n}"):
            fast_walsh_hadamard(torch.zeros(2, n))

    @pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
    def test_full_width_keeps_every_inner_product(self, head_dim: int) -> None:
        transform = HadamardTransform(head_dim, sketch_dim=4 * head_dim)
        x, y = random(6, head_dim), random(7, head_dim, seed=1)
        assert transform(x).shape == (6, head_dim)
        torch.testing.assert_close(transform(x) @ transform(y).T, x @ y.T)

    @pytest.mark.parametrize(("head_dim", "sketch_dim"), [(64, 16), (80, 32), (128, 64)])
    def test_sampled_inner_products_are_right_on_average(self, head_dim: int, sketch_dim: int) -> None:
        """E<x̃, ỹ> = <x, y> over seeds: the mean of 400 is within 4 standard errors."""
        x, y = random(head_dim), random(head_dim, seed=1)
        products = torch.stack(
            [(t(x) * t(y)).sum() for t in (HadamardTransform(head_dim, sketch_dim, seed) for seed in range(400))]
        )
        error = (products.mean() - x @ y).abs()
        assert products.std() > 0
        assert error <= 4 * products.std() / math.sqrt(400)

    def test_samples_without_replacement(self) -> None:
        coordinates = HadamardTransform(64, 48).coordinates
        assert len(set(coordinates.tolist())) == 48
        assert coordinates.min() >= 0
        assert coordinates.max() < 64

    def test_signs_are_applied_once(self) -> None:
        """Applied twice they would cancel, and a constant vector would land on one coordinate."""
        transform = HadamardTransform(64, 64)
        assert set(transform.signs.tolist()) == {-1, 1}
        spread = transform(torch.ones(64, dtype=torch.float64))
        assert (spread.abs() > 1e-9).sum() > 8
        torch.testing.assert_close(spread, fast_walsh_hadamard(transform.signs.double()))

    def test_spreads_a_single_large_coordinate(self) -> None:
        x = torch.zeros(128, dtype=torch.float64)
        x[17] = 8.0
        torch.testing.assert_close(HadamardTransform(128, 128)(x).abs(), torch.full_like(x, 8 / math.sqrt(128)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_keeps_dtype_and_leading_shape(self, dtype: torch.dtype) -> None:
        y = HadamardTransform(64, 32)(random(2, 3, 5, 64, dtype=dtype))
        assert y.dtype == dtype
        assert y.shape == (2, 3, 5, 32)

    def test_nothing_of_it_is_saved_or_trained(self) -> None:
        transform = HadamardTransform(64, 32)
        assert transform.state_dict() == {}
        assert list(transform.parameters()) == []

    def test_says_what_it_is(self) -> None:
        assert repr(HadamardTransform(64, 32)) == "HadamardTransform(head_dim=64, sketch_dim=32, rotation=False)"

    @pytest.mark.parametrize("argument", ["head_dim", "sketch_dim"])
    def test_refuses_sizes_below_one(self, argument: str) -> None:
        with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
            HadamardTransform(**{"head_dim": 8, "sketch_dim": 8, argument: 0})

    def test_refuses_another_last_dimension(self) -> None:
        with pytest.raises(ValueError, match="last dimension of head_dim = 64, got 32"):
            HadamardTransform(64, 64)(torch.zeros(3, 32))


class TestSketch:
    """Queries and keys in, block scores out."""

    @pytest.mark.parametrize("tokens", [1, 16, 63, 111])
    @pytest.mark.parametrize("head_mode", ["shared", "per_kv_head", "mean"])
    def test_shape_and_range(self, tokens: int, head_mode: str) -> None:
        query, key, _ = qkv(2, 6, 3, tokens, 32)
        scores = Sketch(sparse(head_mode=head_mode), 32)(query, key)
        blocks = -(-tokens // 16)
        assert scores.shape == (2, 3 if head_mode == "per_kv_head" else 1, blocks, blocks)
        assert scores.dtype == torch.float32
        assert (scores >= 0).all()
        assert (scores <= 1 + 1e-6).all()

    def test_nothing_beyond_the_diagonal(self) -> None:
        query, key, _ = qkv(2, 6, 3, 111, 32)
        scores = Sketch(sparse(), 32)(query, key)
        assert (scores.triu(1) == 0).all()
        assert (scores.diagonal(dim1=-2, dim2=-1) > 0).all()

    def test_mean_scores_are_shares(self) -> None:
        query, key, _ = qkv(2, 6, 3, 111, 32)
        for rule in ("peak", "mass"):
            scores = Sketch(sparse(reduce="mean", block_score=rule), 32)(query, key)
            torch.testing.assert_close(scores.sum(-1), torch.ones(2, 1, 7))

    def test_max_is_at_least_the_mean(self) -> None:
        query, key, _ = qkv(2, 6, 3, 111, 32)
        largest, mean = (Sketch(sparse(reduce=reduce), 32)(query, key) for reduce in ("max", "mean"))
        assert (largest >= mean - 1e-6).all()
        assert (largest > mean + 1e-3).any()

    def test_sub_blocks_of_one_are_exact_attention_mass(self) -> None:
        """Nothing averaged, nothing sampled: the score is the largest attention mass over queries and heads."""
        query, key, _ = qkv(1, 4, 2, 64, 32, dtype=torch.float64)
        config = sparse(query_sub_block=1, key_sub_block=1, block_score="mass")
        scores = Sketch(config, 32)(query.float(), key.float())
        logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(32)
        mass = logits.masked_fill(~torch.ones(64, 64, dtype=torch.bool).tril(), -math.inf).softmax(-1)
        expected = mass.view(1, 4, 4, 16, 4, 16).sum(-1).amax((1, 3))
        torch.testing.assert_close(scores[0, 0].double(), expected[0], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("keep", [0.25, 0.5, 0.9, 1.0])
    def test_peak_scores_of_sub_blocks_of_one(self, keep: float) -> None:
        """The softmax over blocks of each block's best exact logit, for the queries farthest from the block's mean."""
        query, key, _ = qkv(1, 4, 2, 64, 32, dtype=torch.float64)
        config = sparse(query_sub_block=1, key_sub_block=1, query_keep=keep)
        scores = Sketch(config, 32)(query.float(), key.float())
        logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(32)
        logits = logits.masked_fill(~torch.ones(64, 64, dtype=torch.bool).tril(), -math.inf)
        shares = logits.view(1, 4, 4, 16, 4, 16).amax(-1).softmax(-1)
        blocks = query.view(1, 4, 4, 16, 32)
        distance = (blocks - blocks.mean(3, keepdim=True)).norm(dim=-1)
        farthest = distance.argsort(-1, descending=True)[..., : math.ceil(keep * 16)]
        kept = torch.zeros(1, 4, 4, 16, dtype=torch.bool).scatter_(-1, farthest, True)
        expected = shares.masked_fill(~kept[..., None], 0.0).amax((1, 3))
        torch.testing.assert_close(scores[0, 0].double(), expected[0], atol=1e-5, rtol=0)

    def test_equally_far_sub_queries_keep_the_earlier_ones(self) -> None:
        """Two queries are as far from their mean as each other: the first one scores."""
        query, key, _ = qkv(1, 2, 1, 34, 32)
        config = sparse(query_sub_block=1, key_sub_block=1, query_keep=0.05)
        scores, both = Sketch(config, 32)(query, key), Sketch(replace(config, query_keep=0.1), 32)(query, key)
        first, second = (query[..., [32, 32], :], query[..., [33, 33], :])
        alone = Sketch(config, 32)(torch.cat([query[:, :, :32], first[:, :, :1]], 2), key[:, :, :33])
        torch.testing.assert_close(scores[0, 0, 2, :2] / scores[0, 0, 2, 0], alone[0, 0, 2, :2] / alone[0, 0, 2, 0])
        logits = (second[:, :, 0] @ key[0, 0, :34].T / math.sqrt(32)).double()
        last = torch.stack([logits[..., :16].amax(-1), logits[..., 16:32].amax(-1), logits[..., 32:].amax(-1)], -1)
        expected = torch.maximum(scores[0, 0, 2].double(), last.softmax(-1).amax((0, 1)))
        torch.testing.assert_close(both[0, 0, 2].double(), expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("changes", [{"block_score": "mass"}, {"query_keep": 1.0}, {}], ids=str)
    def test_finds_the_block_of_a_planted_key(self, changes: dict[str, Any]) -> None:
        """By a query like any other where all take part; by one that stands out where half of them do."""
        query, key, _ = qkv(1, 2, 1, 160, 64, sharpness=0.5)
        if not changes:
            query[0, 1, 148:152] *= 2
        key[0, 0, 40:44] = 6 * query[0, 1, 150] / query[0, 1, 150].norm() * 8
        scores = Sketch(sparse(**changes), 64)(query, key)
        assert scores[0, 0, 9, :9].argmax() == 2

    def test_the_unfilled_tail_never_counts(self) -> None:
        """A mean divides by the tokens that are there: one token alone is its own mean."""
        query, key, _ = qkv(1, 2, 1, 33, 32)
        plain = {"query_sub_block": 16, "key_sub_block": 16, "salience": 0.0}
        for rule in ("peak", "mass"):
            self.check_tail(Sketch(sparse(block_score=rule, **plain), 32), query, key)

    @staticmethod
    def check_tail(sketch: Sketch, query: Tensor, key: Tensor) -> None:
        scores = sketch(query, key)
        first, second = key[:, :, :16].mean(2), key[:, :, 16:32].mean(2)
        logits = torch.stack([first, second, key[:, :, 32]], 2) @ query[0, :, 32, :, None] / math.sqrt(32)
        torch.testing.assert_close(scores[0, 0, 2], logits.softmax(2).amax((0, 1, 3)), atol=1e-5, rtol=0)

    def test_a_token_that_stands_out_weighs_more(self) -> None:
        """Its run moves towards it as salience rises; runs without one stay near their mean."""
        tokens = 0.01 * torch.randn(1, 1, 1, 16, 8)
        tokens[..., 6, :] = 4.0
        real = torch.ones(1, 1, 16, dtype=torch.bool)
        pooled = [pool_sub_blocks(tokens, real, 4, sparse(salience=s))[0, 0, 0] for s in (0.0, 0.2, 8.0)]
        torch.testing.assert_close(pooled[0], tokens[0, 0, 0].unflatten(0, (4, 4)).mean(1), atol=1e-6, rtol=0)
        assert (pooled[0][1] < pooled[1][1]).all()
        torch.testing.assert_close(pooled[2][1], tokens[0, 0, 0, 6], atol=1e-3, rtol=0)
        torch.testing.assert_close(pooled[2][[0, 2, 3]], pooled[0][[0, 2, 3]], atol=0.02, rtol=0)

    def test_contrast_multiplies_a_runs_deviation(self) -> None:
        tokens, real = torch.randn(1, 1, 2, 32, 8), torch.ones(1, 1, 32, dtype=torch.bool)
        tokens[..., 30:, :], real[..., 30:] = torch.nan, False
        config = sparse(salience=0.0)
        plain, doubled = (pool_sub_blocks(tokens, real, 4, config, contrast) for contrast in (1.0, 2.0))
        for runs, block in ((slice(0, 4), slice(0, 16)), (slice(4, 8), slice(16, 30))):
            centre = tokens[..., block, :].mean(3, keepdim=True)
            twice = 2 * (plain[..., runs, :] - centre)
            torch.testing.assert_close(doubled[..., runs, :] - centre, twice, atol=1e-5, rtol=0)

    def test_single_tokens_are_not_pooled(self) -> None:
        tokens, real = torch.randn(1, 1, 2, 32, 8), torch.ones(1, 1, 32, dtype=torch.bool)
        pooled = pool_sub_blocks(tokens, real, 1, sparse(salience=5.0, query_sub_block=1, key_sub_block=1), 2.0)
        torch.testing.assert_close(pooled, tokens, atol=0, rtol=0)

    def test_last_queries_alone(self) -> None:
        """A call of the last tokens scores as those rows of the whole call."""
        query, key, _ = qkv(2, 6, 3, 111, 32)
        sketch = Sketch(sparse(), 32)
        torch.testing.assert_close(sketch(query[:, :, 48:], key), sketch(query, key)[:, :, 3:], atol=1e-6, rtol=0)

    def test_srht_switch_is_read(self) -> None:
        query, key, _ = qkv(1, 2, 1, 111, 64)
        scores = [Sketch(sparse(sketch_dim=16, use_srht=flag), 64)(query, key) for flag in (True, False)]
        assert not torch.allclose(scores[0], scores[1], atol=1e-3)
        wide = [Sketch(sparse(sketch_dim=64, use_srht=flag), 64)(query, key) for flag in (True, False)]
        torch.testing.assert_close(wide[0], wide[1], atol=1e-5, rtol=0)

    def test_refuses_what_does_not_fit(self) -> None:
        sketch = Sketch(sparse(), 32)
        with pytest.raises(ValueError, match=r"Q must have shape \(batch, heads, tokens, 32\)"):
            sketch(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 32))
        with pytest.raises(ValueError, match="K must have shape"):
            sketch(torch.zeros(1, 2, 8, 32), torch.zeros(2, 8, 32))
        with pytest.raises(ValueError, match="K must hold every token so far: it has 4, fewer than the 8 of Q"):
            sketch(torch.zeros(1, 2, 8, 32), torch.zeros(1, 2, 4, 32))


def scores_of(tokens: int = 160, layer: int = 0, **changes: Any) -> Tensor:
    query, key, _ = layers(layer + 1, 2, 4, 2, tokens, 32)[layer]
    return Sketch(sparse(**changes), 32)(query, key)


class TestWalk:
    """Transition rows and their composition across layers."""

    def test_rows_are_probabilities(self) -> None:
        rows = transition_rows(scores_of(), walking())
        torch.testing.assert_close(rows.sum(-1), torch.ones(2, 1, 10))
        assert (rows.triu(1) == 0).all()

    def test_first_layer_is_its_own_transition(self) -> None:
        for walk in ("damped", "product", "none"):
            config = walking(walk=walk)
            torch.testing.assert_close(Walk(config)(scores_of()), transition_rows(scores_of(), config))

    def test_without_a_walk_rows_are_the_scores(self) -> None:
        """No exponent, no normalisation: nothing composes them."""
        for config in (sparse(), sparse(walk_normalise=False, sparsity_exponent=16)):
            assert config.walk == "none"
            assert (transition_rows(scores_of(), config) == scores_of()).all()

    def test_exponent_sharpens(self) -> None:
        entropy = []
        for exponent in (1, 2, 8):
            rows = transition_rows(scores_of(), walking(sparsity_exponent=exponent))
            entropy.append(torch.special.entr(rows).sum(-1).mean())
        assert entropy[0] > entropy[1] > entropy[2]

    def test_damped_walk_is_its_formula(self) -> None:
        config = walking(walk_beta=0.4)
        previous, rows = Walk(config)(scores_of()), transition_rows(scores_of(layer=1), config)
        expected = 0.6 * rows + 0.4 * previous @ rows
        torch.testing.assert_close(Walk(config)(scores_of(layer=1), previous), expected)

    def test_degree_repeats_the_damped_hop(self) -> None:
        config = walking(walk_beta=0.4, walk_degree=3)
        previous = Walk(config)(scores_of())
        rows = transition_rows(scores_of(layer=1), config)
        expected = previous
        for _ in range(3):
            expected = 0.6 * rows + 0.4 * expected @ rows
        torch.testing.assert_close(Walk(config)(scores_of(layer=1), previous), expected)

    def test_product_walk_is_the_product_up_to_the_scale_of_a_row(self) -> None:
        config = walking(walk="product")
        previous = Walk(config)(scores_of())
        expected = previous @ transition_rows(scores_of(layer=1), config)
        actual = Walk(config)(scores_of(layer=1), previous)
        torch.testing.assert_close(actual, expected / expected.amax(-1, keepdim=True))

    def test_no_walk_forgets(self) -> None:
        config = walking(walk="none")
        previous = Walk(config)(scores_of())
        assert (Walk(config)(scores_of(layer=1), previous) == Walk(config)(scores_of(layer=1))).all()

    def test_damping_of_zero_is_no_walk(self) -> None:
        config = walking(walk_beta=0.0)
        previous = Walk(config)(scores_of())
        torch.testing.assert_close(Walk(config)(scores_of(layer=1), previous), Walk(config)(scores_of(layer=1)))

    def test_stays_causal(self) -> None:
        for rule in ("damped", "product"):
            walk, config = None, walking(walk=rule)
            for layer in range(4):
                walk = Walk(config)(scores_of(layer=layer), walk)
            assert walk is not None
            assert (walk.triu(1) == 0).all()

    def test_damped_walk_keeps_its_mass(self) -> None:
        walk, config = None, walking(walk_beta=0.9)
        for layer in range(6):
            walk = Walk(config)(scores_of(layer=layer), walk)
        assert walk is not None
        torch.testing.assert_close(walk.sum(-1), torch.ones(2, 1, 10))

    def test_holds_no_state(self) -> None:
        walk = Walk(walking())
        first = walk(scores_of())
        walk(scores_of(layer=1), first)
        assert (walk(scores_of()) == first).all()

    def test_refuses_what_does_not_fit(self) -> None:
        walk = Walk(walking())
        with pytest.raises(ValueError, match="scores must have shape"):
            walk(torch.zeros(1, 1, 3, 4))
        with pytest.raises(ValueError, match="previous must have the shape of scores"):
            walk(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3))


MASK_KINDS = ["bool", "int", "float", "least"]


def as_kind(visible: Tensor, kind: str) -> Tensor:
    """A bool mask in one of the forms that callers use."""
    if kind == "bool":
        return visible
    if kind == "int":
        return visible.long()
    hide = -math.inf if kind == "float" else torch.finfo(torch.float32).min
    return torch.zeros(visible.shape).masked_fill(~visible, hide)


class TestSketchWalkIntegration:
    """The module, whole: the promised call, masks, widths, gradients, decode."""

    def test_the_promised_call(self) -> None:
        config = create_sketch_walk_config(block_size=64, sketch_dim=64, top_k_blocks=16, sparsity_exponent=8)
        attention = SketchWalkAttention(config, head_dim=128)
        Q, K, V = qkv(1, 4, 2, 1300, 128)
        output, selected_blocks = attention(Q, K, V, layer_idx=5, causal=True)
        assert output.shape == Q.shape
        assert selected_blocks.shape == (1, 21, 16)
        assert selected_blocks.dtype == torch.int32

    def test_rows_are_ascending_with_the_diagonal_last(self) -> None:
        _, selected = SketchWalkAttention(sparse(), 32)(*qkv(2, 4, 2, 160, 32), 0)
        for sequence in selected:
            for row, blocks in enumerate(sequence):
                kept = blocks[blocks >= 0].tolist()
                assert kept == sorted(set(kept))
                assert kept[-1] == row
                assert kept[0] == 0
                assert (blocks[len(kept) :] == -1).all()

    def test_output_is_dense_attention_over_the_selection(self) -> None:
        query, key, value = qkv(2, 4, 2, 111, 32)
        output, selected = SketchWalkAttention(sparse(), 32)(query, key, value, 0)
        visible = token_mask(block_mask(selected, 7), 16, 111)[:, None]
        torch.testing.assert_close(output, masked_attention(query, key, value, visible), atol=1e-5, rtol=0)

    def test_per_kv_head_selections(self) -> None:
        query, key, value = qkv(2, 6, 3, 111, 32)
        output, selected = SketchWalkAttention(sparse(head_mode="per_kv_head"), 32)(query, key, value, 0)
        assert selected.shape == (2, 3, 7, 3)
        assert (selected[:, 0] != selected[:, 1]).any()
        visible = token_mask(block_mask(selected, 7), 16, 111).repeat_interleave(2, 1)
        torch.testing.assert_close(output, masked_attention(query, key, value, visible), atol=1e-5, rtol=0)

    # The first named bug: masks of 2, 3 and 4 dimensions work, and really mask.

    @pytest.mark.parametrize("kind", MASK_KINDS)
    @pytest.mark.parametrize("top_k", [3, 99])
    def test_bug_1_mask_of_two_dimensions(self, kind: str, top_k: int) -> None:
        query, key, value = qkv(2, 4, 2, 111, 32)
        real = torch.ones(2, 111, dtype=torch.bool)
        real[0, :30] = False
        real[1, 100:] = False
        attention = SketchWalkAttention(sparse(top_k_blocks=top_k), 32)
        output, selected = attention(query, key, value, 0, attention_mask=as_kind(real, kind))
        moved, _ = attention(query, key + 50 * ~real[:, None, :, None], value, 0, attention_mask=as_kind(real, kind))
        assert (output == moved).all(), "a masked key must not matter"
        for i in range(2):
            alone, chosen = attention(*(x[i : i + 1, :, real[i]] for x in (query, key, value)), 0)
            torch.testing.assert_close(output[i, :, real[i]], alone[0], atol=1e-5, rtol=0)
            assert (
                block_mask(selected[i], 7)[: chosen.shape[1], : chosen.shape[1]]
                == block_mask(chosen[0], chosen.shape[1])
            ).all()

    @pytest.mark.parametrize("kind", MASK_KINDS)
    @pytest.mark.parametrize("shape", ["3-D", "4-D", "4-D per head", "4-D one for all"])
    @pytest.mark.parametrize("top_k", [3, 99])
    @pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
    def test_bug_1_mask_of_three_and_four_dimensions(self, kind: str, shape: str, top_k: int, head_mode: str) -> None:
        query, key, value = qkv(2, 4, 2, 111, 32)
        generator = torch.Generator().manual_seed(3)
        sizes = {"3-D": (2, 111, 111), "4-D": (2, 1, 111, 111), "4-D per head": (2, 4, 111, 111)}
        visible = torch.rand(sizes.get(shape, (1, 1, 111, 111)), generator=generator) < 0.7
        visible[..., torch.arange(111), torch.arange(111)] = True
        visible[..., 20:25, :] = False
        config = sparse(top_k_blocks=top_k, head_mode=head_mode)
        output, selected = SketchWalkAttention(config, 32)(query, key, value, 0, attention_mask=as_kind(visible, kind))
        blocks = token_mask(block_mask(selected, 7), 16, 111)
        blocks = blocks[:, None] if head_mode == "shared" else blocks.repeat_interleave(2, 1)
        by_head = visible[:, None] if visible.dim() == 3 else visible
        expected = masked_attention(query, key, value, by_head & blocks)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
        assert (output[:, :, 20:25] == 0).all(), "a query that sees nothing gives 0"
        unmasked, _ = SketchWalkAttention(config, 32)(query, key, value, 0)
        assert not torch.allclose(output, unmasked, atol=1e-2)

    def test_bug_1_additive_values_shift_logits(self) -> None:
        query, key, value = qkv(1, 4, 2, 64, 32)
        bias = random(1, 4, 64, 64, dtype=torch.float32)
        output, _ = SketchWalkAttention(sparse(top_k_blocks=99), 32)(query, key, value, 0, attention_mask=bias)
        logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(32) + bias
        causal = torch.ones(64, 64, dtype=torch.bool).tril()
        expected = logits.masked_fill(~causal, -math.inf).softmax(-1) @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)

    def test_bug_1_blocks_that_a_mask_hides_are_chosen_last(self) -> None:
        query, key, value = qkv(1, 4, 2, 160, 32)
        visible = torch.ones(1, 160, 160, dtype=torch.bool)
        visible[:, 80:, 16:64] = False
        _, selected = SketchWalkAttention(sparse(top_k_blocks=5), 32)(query, key, value, 0, attention_mask=visible)
        assert not block_mask(selected, 10)[0, 7:, 1:4].any()

    # The second and third: widths follow min(top_k, blocks available).

    @pytest.mark.parametrize("top_k", [1, 3, 16, 99])
    @pytest.mark.parametrize("tokens", [1, 15, 16, 17, 47, 160])
    def test_bugs_2_and_3_width_follows_the_blocks_available(self, top_k: int, tokens: int) -> None:
        output, selected = SketchWalkAttention(sparse(top_k_blocks=top_k), 32)(*qkv(2, 4, 2, tokens, 32), 0)
        blocks = -(-tokens // 16)
        assert selected.shape == (2, blocks, min(top_k, blocks))
        counts = (selected >= 0).sum(-1)
        assert (counts == torch.arange(1, blocks + 1).clamp(max=top_k)).all()
        assert output.shape == (2, 4, tokens, 32)

    def test_bugs_2_and_3_width_in_decode(self) -> None:
        attention, state = SketchWalkAttention(sparse(top_k_blocks=4), 32), SketchState(sparse(top_k_blocks=4))
        query, key, value = qkv(1, 4, 2, 90, 32)
        for step in range(90):
            now = slice(step, step + 1)
            _, selected = attention(query[:, :, now], key[:, :, : step + 1], value[:, :, : step + 1], 0, state=state)
            assert selected.shape == (1, 1, min(4, step // 16 + 1))

    # The fourth: gradients.

    @pytest.mark.parametrize(
        "changes",
        [{}, {"head_mode": "per_kv_head"}, {"top_k_blocks": 1}, {"density": 0.5}, {"dense_tail_blocks": 2}],
        ids=["default", "per-kv-head", "diagonal", "density", "tail"],
    )
    @pytest.mark.parametrize("tokens", [40, 111])
    def test_bug_4_gradients_are_those_of_masked_dense_attention(self, changes: dict[str, Any], tokens: int) -> None:
        """float64, against autograd of a dense reference over the same blocks."""
        inputs = qkv(2, 4, 2, tokens, 16, dtype=torch.float64)
        query, key, value = (x.clone().requires_grad_() for x in inputs)
        output, selected = SketchWalkAttention(sparse(**changes), 16)(query, key, value, 0)
        weight = random(*output.shape, seed=9)
        actual = torch.autograd.grad((output * weight).sum(), (query, key, value))
        visible = token_mask(block_mask(selected, -(-tokens // 16)), 16, tokens)
        visible = visible[:, None] if visible.dim() == 3 else visible.repeat_interleave(2, 1)
        reference = masked_attention(query, key, value, visible)
        expected = torch.autograd.grad((reference * weight).sum(), (query, key, value))
        for name, a, e in zip("QKV", actual, expected, strict=True):
            assert (e != 0).any()
            torch.testing.assert_close(a, e, atol=1e-10, rtol=0, msg=lambda m, name=name: f"{name}: {m}")

    @pytest.mark.parametrize("mask", [None, "2-D", "4-D"])
    def test_bug_4_gradcheck(self, mask: str | None) -> None:
        """Finite differences on a tiny case. Sixteen-bit sketches in float64, so that no step changes the selection."""
        config = sparse(block_size=2, query_sub_block=1, key_sub_block=1, top_k_blocks=2, key_sketch_bits=16)
        attention = SketchWalkAttention(config, 4)
        attention_mask = None
        if mask == "2-D":
            attention_mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
        if mask == "4-D":
            attention_mask = random(1, 2, 7, 7).masked_fill(torch.eye(7, dtype=torch.bool).roll(1, 1), -math.inf)
        inputs = tuple(x.clone().requires_grad_() for x in qkv(1, 2, 1, 7, 4, dtype=torch.float64))
        assert torch.autograd.gradcheck(
            lambda q, k, v: attention(q, k, v, 0, attention_mask=attention_mask)[0], inputs, eps=1e-6, atol=1e-6
        )

    def test_bug_4_gradients_through_mean_correction_reach_pruned_blocks(self) -> None:
        query, key, value = (x.requires_grad_() for x in qkv(1, 2, 1, 96, 16, dtype=torch.float64))
        plain, _ = SketchWalkAttention(sparse(top_k_blocks=1), 16)(query, key, value, 0)
        corrected, _ = SketchWalkAttention(sparse(top_k_blocks=1, mean_correction=True), 16)(query, key, value, 0)
        (without,) = torch.autograd.grad(plain[:, :, 80:].sum(), value, retain_graph=True)
        (with_means,) = torch.autograd.grad(corrected[:, :, 80:].sum(), value)
        assert (without[:, :, :80] == 0).all()
        assert (with_means[:, :, :80] != 0).all()

    def test_selection_is_not_differentiated(self) -> None:
        query, key, value = (x.requires_grad_() for x in qkv(1, 4, 2, 64, 32))
        state = SketchState(sparse())
        _, selected = SketchWalkAttention(sparse(), 32)(query, key, value, 0, state=state)
        assert not selected.requires_grad
        assert state.walk is not None
        assert not state.walk.requires_grad
        assert not any(t.requires_grad for t in vars(state.layers[0]).values() if isinstance(t, Tensor))

    # State.

    def test_decode_cache_is_the_state_under_its_promised_name(self) -> None:
        assert DecodeCache is SketchState

    def test_the_walk_travels_from_layer_to_layer(self) -> None:
        """With a state the second layer's rows depend on the first's; without one they do not."""
        config, stack = walking(walk_beta=0.9, top_k_blocks=3), layers(2, 1, 4, 2, 160, 32)
        attention, state = SketchWalkAttention(config, 32), SketchState(config)
        attention(*stack[0], 0, state=state)
        _, carried = attention(*stack[1], 1, state=state)
        _, alone = attention(*stack[1], 1)
        assert (carried != alone).any()

    def test_nothing_leaks_between_calls_without_state(self) -> None:
        attention = SketchWalkAttention(sparse(), 32)
        first = attention(*qkv(1, 4, 2, 111, 32), 3)
        attention(*qkv(2, 4, 2, 160, 32, seed=5), 4)
        again = attention(*qkv(1, 4, 2, 111, 32), 3)
        assert (first[0] == again[0]).all()
        assert (first[1] == again[1]).all()

    def test_a_new_pass_begins_a_new_walk(self) -> None:
        config, stack = walking(walk_beta=0.9), layers(2, 1, 4, 2, 112, 32)
        attention, twice, once = SketchWalkAttention(config, 32), SketchState(config), SketchState(config)
        for layer in range(2):
            attention(*(x[:, :, :96] for x in stack[layer]), layer, state=twice)
        _, after = attention(stack[0][0][:, :, 96:], stack[0][1], stack[0][2], 0, state=twice)
        attention(*(x[:, :, :96] for x in stack[0]), 0, state=once)
        _, fresh = attention(stack[0][0][:, :, 96:], stack[0][1], stack[0][2], 0, state=once)
        assert (after == fresh).all()

    def test_dense_tail_reads_everything(self) -> None:
        _, selected = SketchWalkAttention(sparse(dense_tail_blocks=2), 32)(*qkv(1, 4, 2, 160, 32), 0)
        assert ((selected >= 0).sum(-1) == torch.tensor([1, 2, 3, 3, 3, 3, 3, 3, 9, 10])).all()

    def test_mean_correction_brings_the_output_nearer_to_dense(self) -> None:
        query, key, value = qkv(2, 4, 2, 320, 32)
        dense = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        errors = []
        for correct in (False, True):
            config = sparse(mean_correction=correct)
            errors.append((SketchWalkAttention(config, 32)(query, key, value, 0)[0] - dense).norm())
        assert errors[1] < errors[0]

    def test_dense_below_is_ignored(self) -> None:
        _, selected = SketchWalkAttention(sparse(dense_below=10_000), 32)(*qkv(1, 4, 2, 160, 32), 0)
        assert selected is not None


class TestEdgeCases:
    """Shapes at the border."""

    @pytest.mark.parametrize("tokens", [1, 2, 3, 15])
    def test_shorter_than_a_block_is_dense(self, tokens: int) -> None:
        query, key, value = qkv(2, 4, 2, tokens, 32)
        output, selected = SketchWalkAttention(sparse(top_k_blocks=1), 32)(query, key, value, 0)
        dense = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(output, dense, atol=1e-5, rtol=0)
        assert selected.tolist() == [[[0]]] * 2

    @pytest.mark.parametrize("layer_idx", [0, 2])
    def test_empty_batch(self, layer_idx: int) -> None:
        config = sparse(skip_first_n_layers=1)
        output, selected = SketchWalkAttention(config, 32)(*qkv(0, 4, 2, 40, 32), layer_idx)
        assert output.shape == (0, 4, 40, 32)
        assert selected is None if layer_idx == 0 else selected.shape[0] == 0

    def test_no_queries(self) -> None:
        _, key, value = qkv(2, 4, 2, 40, 32)
        output, selected = SketchWalkAttention(sparse(), 32)(torch.zeros(2, 4, 0, 32), key, value, 0)
        assert output.shape == (2, 4, 0, 32)
        assert selected.shape[:2] == (2, 0)

    @pytest.mark.parametrize("layer_idx", [0, 2])
    def test_a_fully_padded_sequence_gives_zeros(self, layer_idx: int) -> None:
        query, key, value = qkv(2, 4, 2, 40, 32)
        mask = torch.tensor([[1] * 40, [0] * 40])
        config = sparse(skip_first_n_layers=1)
        output, selected = SketchWalkAttention(config, 32)(query, key, value, layer_idx, attention_mask=mask)
        alone, _ = SketchWalkAttention(config, 32)(query[:1], key[:1], value[:1], layer_idx)
        torch.testing.assert_close(output[:1], alone, atol=1e-5, rtol=0)
        assert torch.isfinite(output).all()
        if layer_idx:
            assert (output[1] == 0).all()
            assert (selected[1] == -1).all()

    @pytest.mark.parametrize("mask_dims", [None, 2, 3, 4])
    def test_first_layers_are_dense_and_select_nothing(self, mask_dims: int | None) -> None:
        query, key, value = qkv(2, 4, 2, 50, 32)
        visible = torch.ones(50, 50, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
        mask = None
        if mask_dims == 2:
            mask = torch.ones(2, 50, dtype=torch.long)
            mask[0, 40:] = 0
            visible[0, :, :, 40:] = False
        elif mask_dims:
            random_mask = torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(0)) < 0.6
            random_mask[..., torch.arange(50), torch.arange(50)] = True
            random_mask[0, 0, 7] = False
            visible &= random_mask
            mask = random_mask if mask_dims == 4 else random_mask[:, 0]
        state = SketchState(sparse(skip_first_n_layers=2))
        attention = SketchWalkAttention(sparse(skip_first_n_layers=2), 32)
        output, selected = attention(
            query, key, value, 1, attention_mask=mask, state=None if (mask_dims or 0) > 2 else state
        )
        assert selected is None
        assert state.layers == {}
        real = slice(None) if mask_dims != 2 else slice(0, 40)
        expected = masked_attention(query, key, value, visible)
        torch.testing.assert_close(output[:, :, real], expected[:, :, real], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("layer_idx", [0, 2])
    @pytest.mark.parametrize("padded", [False, True])
    def test_without_causality_every_token_is_seen(self, layer_idx: int, padded: bool) -> None:
        query, key, value = qkv(2, 4, 2, 70, 32)
        real = torch.ones(2, 70, dtype=torch.bool)
        if padded:
            real[0, :9] = False
        config = sparse(skip_first_n_layers=1, top_k_blocks=99)
        output, selected = SketchWalkAttention(config, 32)(
            query, key, value, layer_idx, causal=False, attention_mask=real if padded else None
        )
        expected = masked_attention(query, key, value, real[:, None, None].expand(-1, -1, 70, -1))
        rows = real[:, None, :, None].expand_as(output)
        torch.testing.assert_close(output[rows], expected[rows], atol=1e-5, rtol=0)
        if layer_idx:
            assert ((selected >= 0).sum(-1)[1] == 5).all()

    def test_without_causality_a_later_block_can_be_chosen(self) -> None:
        _, selected = SketchWalkAttention(sparse(top_k_blocks=4), 32)(*qkv(1, 4, 2, 160, 32), 0, causal=False)
        chosen = block_mask(selected, 10)
        assert (chosen.sum(-1) == 4).all()
        assert chosen[0].triu(1).any()

    @pytest.mark.parametrize("sketch_dim", [1, 32, 33, 4096])
    def test_sketch_dim_beside_and_beyond_the_head_dim(self, sketch_dim: int) -> None:
        output, selected = SketchWalkAttention(sparse(sketch_dim=sketch_dim), 32)(*qkv(1, 4, 2, 111, 32), 0)
        assert torch.isfinite(output).all()
        _, reference = SketchWalkAttention(sparse(sketch_dim=32), 32)(*qkv(1, 4, 2, 111, 32), 0)
        if sketch_dim >= 32:
            assert (selected == reference).all()

    @pytest.mark.parametrize("block_size", [1, 2, 3, 7, 200])
    def test_odd_block_sizes(self, block_size: int) -> None:
        config = sparse(block_size=block_size, query_sub_block=1, key_sub_block=1)
        query, key, value = qkv(1, 4, 2, 50, 16)
        output, selected = SketchWalkAttention(config, 16)(query, key, value, 0)
        visible = token_mask(block_mask(selected, -(-50 // block_size)), block_size, 50)[:, None]
        torch.testing.assert_close(output, masked_attention(query, key, value, visible), atol=1e-5, rtol=0)

    def test_inputs_that_are_no_contiguous_tensors(self) -> None:
        query, key, value = qkv(2, 4, 2, 111, 32)
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
        sliced = [torch.cat([x, x], -1)[..., :32] for x in (query, key, value)]
        backwards = [x.flip(-1).contiguous().flip(-1) for x in (query, key, value)]
        expected, selected = SketchWalkAttention(sparse(), 32)(query, key, value, 0)
        for inputs in (strided, sliced, backwards, [x.expand(2, -1, -1, -1) for x in (query, key, value)]):
            output, chosen = SketchWalkAttention(sparse(), 32)(*inputs, 0)
            assert (chosen == selected).all()
            torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)

    def test_one_sequence_expanded_to_a_batch(self) -> None:
        one = qkv(1, 4, 2, 111, 32)
        expected, selected = SketchWalkAttention(sparse(), 32)(*one, 0)
        output, chosen = SketchWalkAttention(sparse(), 32)(*(x.expand(3, -1, -1, -1) for x in one), 0)
        assert (chosen == selected).all()
        torch.testing.assert_close(output, expected.expand(3, -1, -1, -1), atol=1e-6, rtol=0)

    def test_inputs_are_left_alone(self) -> None:
        inputs = qkv(2, 4, 2, 111, 32)
        copies = [x.clone() for x in inputs]
        mask = torch.zeros(2, 1, 111, 111)
        SketchWalkAttention(sparse(query_sub_block=1), 32)(*inputs, 0, attention_mask=mask)
        Sketch(sparse(), 32)(inputs[0], inputs[1])
        assert all((a == b).all() for a, b in zip(inputs, copies, strict=True))
        assert (mask == 0).all()

    def test_inference_mode(self) -> None:
        """What a first call under inference mode caches must serve autograd later (hence a seed of its own)."""
        with torch.inference_mode():
            SketchWalkAttention(sparse(sketch_dim=24, hadamard_seed=77), 32)(*qkv(1, 4, 2, 50, 32), 0)
        query, key, value = (x.requires_grad_() for x in qkv(1, 4, 2, 50, 32))
        output, _ = SketchWalkAttention(sparse(sketch_dim=24, hadamard_seed=77), 32)(query, key, value, 0)
        output.sum().backward()
        assert query.grad is not None


class TestNumericalStability:
    """Large, small, equal and reduced-precision numbers."""

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
    def test_extreme_magnitudes_stay_finite(self, scale: float) -> None:
        query, key, value = (scale * x for x in qkv(1, 4, 2, 160, 32))
        config = sparse(top_k_blocks=99)
        output, selected = SketchWalkAttention(config, 32)(query, key, value, 0)
        dense = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert torch.isfinite(output).all()
        torch.testing.assert_close(output, dense, atol=1e-5 * scale, rtol=1e-5)
        assert (selected[0, -1] == torch.arange(10)).all()

    def test_equal_scores_go_to_the_nearer_block(self) -> None:
        zeros = torch.zeros(1, 4, 160, 32)
        _, selected = SketchWalkAttention(sparse(top_k_blocks=4), 32)(zeros, zeros[:, :2], zeros[:, :2], 0)
        assert selected[0, 9].tolist() == [0, 7, 8, 9]
        assert selected[0, 4].tolist() == [0, 2, 3, 4]

    @pytest.mark.parametrize("walk", ["product", "damped"])
    def test_forty_layers_of_sharp_walk_neither_underflow_nor_collapse(self, walk: str) -> None:
        config = sparse(walk=walk, sparsity_exponent=16)
        rows, walker = None, Walk(config)
        for layer in range(40):
            query, key, _ = qkv(1, 2, 1, 320, 32, seed=layer, sharpness=6.0)
            rows = walker(Sketch(config, 32)(query, key), rows)
        assert rows is not None
        assert torch.isfinite(rows).all()
        assert (rows.amax(-1) > 1e-3).all()

    def test_a_high_exponent_of_small_scores_does_not_underflow(self) -> None:
        scores = torch.full((1, 1, 3, 3), 1e-6).tril()
        rows = transition_rows(scores, walking(sparsity_exponent=16))
        expected = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]])
        torch.testing.assert_close(rows[0, 0], expected)

    def test_an_empty_row_stays_zero(self) -> None:
        for config in (sparse(), walking()):
            assert (transition_rows(torch.zeros(1, 1, 2, 3), config) == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_reduced_precision_is_as_good_as_dense_in_it(self, dtype: torch.dtype) -> None:
        query, key, value = qkv(2, 4, 2, 333, 64, dtype=dtype)
        config = sparse(top_k_blocks=99)
        exact = F.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True
        )
        dense = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        output, _ = SketchWalkAttention(config, 64)(query, key, value, 0)
        assert output.dtype == dtype
        assert (output - exact).abs().max() <= 2 * (dense - exact).abs().max()

    def test_selection_hardly_depends_on_the_dtype(self) -> None:
        """The same numbers, exactly representable: sketches and walk are float32 whatever the model is."""
        inputs = [x.bfloat16() for x in qkv(2, 4, 2, 333, 64)]
        _, low = SketchWalkAttention(sparse(), 64)(*inputs, 0)
        _, high = SketchWalkAttention(sparse(), 64)(*(x.float() for x in inputs), 0)
        assert (low == high).all()

    def test_walk_in_float64(self) -> None:
        state = SketchState(walking(walk_state_dtype="float64"))
        query, key, value = qkv(1, 4, 2, 160, 32)
        SketchWalkAttention(state.config, 32)(query, key, value, 0, state=state)
        assert state.walk is not None
        assert state.walk.dtype == torch.float64
        torch.testing.assert_close(state.walk.sum(-1), torch.ones(1, 1, 10, dtype=torch.float64), atol=1e-12, rtol=0)

    @pytest.mark.parametrize("rule", ["peak", "mass"])
    def test_an_overwhelming_key_keeps_other_sketches_exact(self, rule: str) -> None:
        """Each block has a step of its own: a loud key crushes its neighbours' codes, those of other blocks never."""
        query, key, value = qkv(1, 2, 1, 160, 32)
        config = sparse(block_score=rule)
        _, quiet = SketchWalkAttention(config, 32)(query, key, value, 0)
        before = SketchState(config), SketchState(config)
        SketchWalkAttention(config, 32)(query, key, value, 0, state=before[0])
        key[:, :, 150] *= 1e4
        _, loud = SketchWalkAttention(config, 32)(query, key, value, 0)
        assert (quiet[0, :9] == loud[0, :9]).all()
        SketchWalkAttention(config, 32)(query, key, value, 0, state=before[1])
        for a, b in zip(*(state.layers[0].read_keys(9) for state in before), strict=True):
            assert (a == b).all()

    def test_infinite_and_missing_numbers_never_select_out_of_range(self) -> None:
        scores = torch.tensor([[math.nan, 1.0, 2.0, 3.0], [math.inf, -math.inf, 0.0, math.nan]]).view(1, 1, 2, 4)
        selection = select_blocks(scores, torch.tensor([[2, 3]]), torch.tensor([[True, True]]), sparse())
        assert selection.indices.tolist() == [[[0, 1, 2], [0, 2, 3]]]
        assert selection.counts.tolist() == [[3, 3]]


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "group": st.sampled_from([1, 2, 4]),
        "tokens": st.integers(1, 90),
        "dim": st.sampled_from([4, 12, 16, 32]),
        "seed": st.integers(0, 5),
    }
)
configs = st.builds(
    SketchWalkConfig,
    block_size=st.sampled_from([4, 8, 16]),
    query_sub_block=st.sampled_from([1, 2, 4]),
    key_sub_block=st.sampled_from([1, 2, 4]),
    top_k_blocks=st.integers(1, 8),
    sketch_dim=st.sampled_from([2, 8, 64]),
    sparsity_exponent=st.sampled_from([1, 2.5, 8]),
    skip_first_n_layers=st.just(0),
    sink_blocks=st.integers(0, 3),
    local_blocks=st.integers(1, 3),
    dense_tail_blocks=st.integers(0, 2),
    block_score=st.sampled_from(["peak", "mass"]),
    query_keep=st.sampled_from([0.2, 0.5, 1.0]),
    head_mode=st.sampled_from(["shared", "per_kv_head", "mean"]),
    reduce=st.sampled_from(["max", "mean"]),
    walk=st.sampled_from(["damped", "product", "none"]),
    walk_degree=st.integers(1, 3),
    key_sketch_bits=st.sampled_from([8, 16]),
)
budgets = st.one_of(
    st.builds(dict),
    st.builds(lambda x: {"density": x}, st.floats(0.01, 1.0)),
    st.builds(lambda x: {"mass": x}, st.floats(0.01, 1.0)),
)


def tensors_of(shape: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    heads = shape["kv_heads"] * shape["group"]
    return qkv(shape["batch"], heads, shape["kv_heads"], shape["tokens"], shape["dim"], seed=shape["seed"])


class TestProperties:
    """What holds for every shape and config."""

    @repeatable
    @given(shapes, configs, budgets)
    def test_output_is_masked_dense_attention(
        self, shape: dict[str, int], config: SketchWalkConfig, budget: Any
    ) -> None:
        config = replace(config, **budget)
        query, key, value = tensors_of(shape)
        output, selected = SketchWalkAttention(config, shape["dim"])(query, key, value, 0)
        blocks = -(-shape["tokens"] // config.block_size)
        visible = token_mask(block_mask(selected, blocks), config.block_size, shape["tokens"])
        visible = visible.repeat_interleave(shape["group"], 1) if visible.dim() == 4 else visible[:, None]
        torch.testing.assert_close(output, masked_attention(query, key, value, visible), atol=1e-5, rtol=0)

    @repeatable
    @given(shapes, configs, budgets)
    def test_selection_obeys_its_rules(self, shape: dict[str, int], config: SketchWalkConfig, budget: Any) -> None:
        config = replace(config, **budget)
        _, selected = SketchWalkAttention(config, shape["dim"])(*tensors_of(shape), 0)
        blocks = -(-shape["tokens"] // config.block_size)
        chosen = block_mask(selected, blocks)
        assert (chosen.sum(-1) == (selected >= 0).sum(-1)).all(), "a block listed twice"
        assert not chosen.triu(1).any()
        for row in range(blocks):
            count, least = chosen[..., row, :].sum(-1), config.budget(row + 1)
            if shape["tokens"] > 1 and row >= blocks - config.dense_tail_blocks:
                assert (count == row + 1).all()
            elif config.mass is None:
                assert (count == least).all()
            else:
                assert (count >= least).all()
            nearest = min(row + 1, config.local_count(row + 1), least)
            assert chosen[..., row, row + 1 - nearest : row + 1].all()
            if least >= config.sink_count(row + 1) + config.local_count(row + 1):
                assert chosen[..., row, : config.sink_count(row + 1)].all()

    @repeatable
    @given(shapes, configs, budgets, st.data())
    def test_later_tokens_never_reach_earlier_blocks(
        self, shape: dict[str, int], config: SketchWalkConfig, budget: Any, data: st.DataObject
    ) -> None:
        config = replace(config, dense_tail_blocks=0, **budget)
        changed = data.draw(st.integers(0, shape["tokens"] - 1))
        first = tensors_of(shape)
        second = [x.clone() for x in first]
        for x in second:
            x[:, :, changed] += 3.0
        attention = SketchWalkAttention(config, shape["dim"])
        border = changed // config.block_size * config.block_size
        a, b = (attention(*x, 0)[0][:, :, :border] for x in (first, second))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)

    @repeatable
    @given(shapes, configs, st.data())
    def test_any_cut_leaves_the_same_state(
        self, shape: dict[str, int], config: SketchWalkConfig, data: st.DataObject
    ) -> None:
        tokens, tensors = shape["tokens"], tensors_of(shape)
        cuts = sorted({0, tokens, *data.draw(st.lists(st.integers(0, tokens), max_size=6))})
        attention, whole, parts = SketchWalkAttention(config, shape["dim"]), SketchState(config), SketchState(config)
        attention(*tensors, 0, state=whole)
        for start, stop in pairwise(cuts):
            query, key, value = tensors
            attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], 0, state=parts)
        complete = tokens // config.block_size
        a, b = whole.layers[0], parts.layers[0]
        for x, y in zip(a.read_keys(complete), b.read_keys(complete), strict=True):
            assert (x is None and y is None) or (x == y).all()
        if config.uses_walk:
            torch.testing.assert_close(a.read_rows(complete), b.read_rows(complete), atol=1e-5, rtol=1e-3)

    @repeatable
    @given(shapes, configs, st.data())
    def test_padding_changes_nothing(
        self, shape: dict[str, int], config: SketchWalkConfig, data: st.DataObject
    ) -> None:
        tokens = shape["tokens"]
        real = torch.ones(shape["batch"], tokens, dtype=torch.bool)
        for i in range(shape["batch"]):
            left = data.draw(st.integers(0, tokens - 1))
            right = data.draw(st.integers(0, tokens - 1 - left))
            real[i, :left] = False
            real[i, tokens - right :] = False
        tensors = [x.masked_fill(~real[:, None, :, None], math.nan) for x in tensors_of(shape)]
        attention = SketchWalkAttention(config, shape["dim"])
        output, _ = attention(*tensors, 0, attention_mask=real)
        for i in range(shape["batch"]):
            alone, _ = attention(*(x[i : i + 1, :, real[i]] for x in tensors), 0)
            torch.testing.assert_close(output[i, :, real[i]], alone[0], atol=1e-5, rtol=0)

    @repeatable
    @given(st.sampled_from([8, 24, 64, 80]), st.integers(1, 100), st.integers(0, 99))
    def test_transform_is_linear_and_its_matrix(self, head_dim: int, sketch_dim: int, seed: int) -> None:
        transform = HadamardTransform(head_dim, sketch_dim, seed)
        x, y = random(3, head_dim, seed=seed), random(3, head_dim, seed=seed + 1)
        torch.testing.assert_close(transform(2 * x - y), 2 * transform(x) - transform(y))
        matrix = sketch_matrix(head_dim, sketch_dim, seed, torch.device("cpu")).double()
        torch.testing.assert_close(x @ matrix, transform(x), atol=1e-5, rtol=0)

    @repeatable
    @given(st.integers(1, 3000), configs, budgets)
    def test_causal_density_counts_the_selected_blocks(
        self, tokens: int, config: SketchWalkConfig, budget: Any
    ) -> None:
        config = replace(config, block_size=64, **budget)
        rows = -(-tokens // 64)
        scores = torch.rand(1, 1, rows, rows, generator=torch.Generator().manual_seed(tokens))
        index = torch.arange(rows)[None]
        tail = (index >= rows - config.dense_tail_blocks) if tokens > 1 and config.dense_tail_blocks else None
        one = replace(config, head_mode="shared", mass=None)
        selection = select_blocks(scores, index, torch.ones(1, rows, dtype=torch.bool), one, dense_rows=tail)
        expected = selection.counts.sum().item() / (rows * (rows + 1) / 2)
        assert causal_density(tokens, one) == pytest.approx(expected)
