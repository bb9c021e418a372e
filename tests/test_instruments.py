"""Oracle, baseline selectors and recall: against restatements in float64, through a model, and on the command line."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sketch_walk import SketchWalkConfig, layout
from sketch_walk.attention import sketch_walk_attention
from sketch_walk.cli import main
from sketch_walk.cli.app import app
from sketch_walk.evaluation import SELECTORS, measure_selection, observe_selection, oracle, selector
from sketch_walk.evaluation.baselines import (
    block_mean_scores,
    flexprefill_scores,
    local_scores,
    quest_scores,
    xattention_scores,
)
from sketch_walk.evaluation.oracle import oracle_scores
from sketch_walk.evaluation.recall import SelectionRecorder, best_blocks
from sketch_walk.layout import make_layout
from sketch_walk.plots import plot_head_heat_map, plot_recall_by_layer
from sketch_walk.selection import select_blocks
from sketch_walk.sketch import Sketch
from tensors import qkv

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from sketch_walk.integrations.transformers import LayerTensors, enable

SIZE = 16
CONFIG = SketchWalkConfig(
    block_size=SIZE, density=0.3, min_blocks=2, walk="none", sparsity_exponent=1, dense_below=0, skip_first_n_layers=1
)
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
}
PROMPT_ONLY = ("xattention", "flexprefill")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**TINY), attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 128, (1, 231), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little memory as a slice can have: every run of rows and of keys is cut."""
    monkeypatch.setitem(layout.LEAST_SLICE_BYTES, "cpu", 1)


def attention(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Causal probabilities (batch, heads, queries, keys) in float64, all at once."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    rank = torch.arange(key.shape[2] - query.shape[2], key.shape[2])
    return logits.masked_fill(torch.arange(key.shape[2]) > rank[:, None], -math.inf).softmax(-1)


def spans(queries: int, keys: int, size: int) -> list[tuple[int, int]]:
    """First and last-plus-one query of the call in each of its blocks."""
    past = keys - queries
    return [
        (max(past, b * size) - past, min(keys, (b + 1) * size) - past)
        for b in range(past // size, (keys - 1) // size + 1)
    ]


def by_block(probabilities: Tensor, size: int) -> Tensor:
    """Sum over the keys of each block."""
    return torch.stack([part.sum(-1) for part in probabilities.split(size, -1)], -1)


def join_heads(by_head: Tensor, kv_heads: int, head_mode: str, reduce: str) -> Tensor:
    grouped = by_head.unflatten(1, (kv_heads if head_mode == "per_kv_head" else 1, -1))
    return grouped.amax(2) if reduce == "max" else grouped.mean(2)


def restated_oracle(query: Tensor, key: Tensor, config: SketchWalkConfig, reduce: str, scale: float | None) -> Tensor:
    mass = by_block(attention(query, key, scale), config.block_size)
    rows = [mass[:, :, lo:hi] for lo, hi in spans(query.shape[2], key.shape[2], config.block_size)]
    by_head = torch.stack([row.amax(2) if reduce == "max" else row.mean(2) for row in rows], 2)
    return join_heads(by_head, key.shape[1], config.head_mode, reduce)


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize(("queries", "keys"), [(63, 63), (111, 111), (40, 111), (7, 71), (1, 111), (1, 1)])
@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
def test_oracle_is_the_softmax(reduce: str, queries: int, keys: int, head_mode: str) -> None:
    config = replace(CONFIG, head_mode=head_mode)
    q, k, _ = qkv(2, 6, 2, keys, 8, dtype=torch.float64)
    scores = oracle_scores(q[:, :, -queries:], k, config, reduce=reduce, scale=0.3)
    assert torch.allclose(scores, restated_oracle(q[:, :, -queries:], k, config, reduce, 0.3), atol=1e-12)
    assert scores.dtype == torch.float64
    single = oracle_scores(q[:, :, -queries:].float(), k.float(), config, reduce=reduce, scale=0.3)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), scores, atol=1e-5)


def test_oracle_rows_are_probabilities() -> None:
    q, k, _ = qkv(1, 4, 4, 200, 16)
    scores = oracle_scores(q, k, CONFIG, reduce="mean")
    assert torch.allclose(scores.sum(-1), torch.ones(1, 1, 13), atol=1e-5)
    assert torch.equal(scores.triu(1), torch.zeros_like(scores))


@pytest.mark.parametrize("name", [name for name, function in SELECTORS.items() if function])
def test_slices_change_nothing(name: str, small_slices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    function = SELECTORS[name]
    assert function is not None
    q, k, _ = qkv(2, 4, 2, 331, 8, dtype=torch.float64)
    call = {"layout": make_layout(2, 250, 331, q.device), "scale": 0.4}
    cut = function(q[:, :, -250:], k, CONFIG, **call)
    monkeypatch.setitem(layout.LEAST_SLICE_BYTES, "cpu", 1 << 30)
    assert torch.allclose(cut, function(q[:, :, -250:], k, CONFIG, **call), atol=1e-12)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            # A view that repeats elements takes no memory.
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.nbytes:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("name", ["sketch", "oracle_max", "quest", "xattention", "flexprefill"])
def test_no_tensor_of_queries_by_keys(name: str, small_slices: None) -> None:
    tokens, heads = 4096, 2
    q, k, v = qkv(1, heads, 1, tokens, 16)
    config = replace(CONFIG, block_size=64)
    with Largest() as largest:
        result = sketch_walk_attention(q, k, v, config, score_with=SELECTORS[name])
        call = LayerTensors(0, q, k, v, make_layout(1, tokens, tokens, q.device), 0.25, result)
        SelectionRecorder(config)(call)
    assert largest.elements < heads * tokens * tokens / 8


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize(("queries", "keys"), [(63, 63), (111, 111), (40, 111), (1, 111)])
def test_quest_is_a_softmax_of_bounds(reduce: str, queries: int, keys: int) -> None:
    config = replace(CONFIG, reduce=reduce)
    q, k, _ = qkv(1, 4, 2, keys, 8, dtype=torch.float64)
    q = q[:, :, -queries:]
    heads = k.repeat_interleave(2, 1)
    bounds = []
    for page in heads.split(SIZE, 2):
        best = torch.maximum(q * page.amin(2, keepdim=True), q * page.amax(2, keepdim=True)).sum(-1)
        bounds.append(best)
        assert ((q @ page.mT).amax(-1) <= best + 1e-9).all()
    block = torch.arange(keys - queries, keys) // SIZE
    logits = torch.stack(bounds, -1) / math.sqrt(8)
    share = logits.masked_fill(torch.arange(len(bounds)) > block[:, None], -math.inf).softmax(-1)
    rows = [share[:, :, lo:hi] for lo, hi in spans(queries, keys, SIZE)]
    expected = torch.stack([row.amax(2) if reduce == "max" else row.mean(2) for row in rows], 2)
    scores = quest_scores(q, k, config)
    assert torch.allclose(scores, join_heads(expected, 2, "shared", reduce), atol=1e-12)


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("tokens", [64, 100, 111])
def test_xattention_sums_antidiagonals(stride: int, tokens: int) -> None:
    q, k, _ = qkv(1, 2, 1, tokens, 8, dtype=torch.float64)
    padded = torch.zeros(1, 2, -(-tokens // SIZE) * SIZE, 8, dtype=torch.float64)
    queries, keys = padded.clone(), padded.clone()
    queries[:, :, :tokens], keys[:, :, :tokens] = q, k
    logits = (queries @ keys.mT / math.sqrt(8) / stride).unflatten(2, (-1, stride)).unflatten(4, (-1, stride))
    # [batch, heads, query tile, in tile, key tile, in tile]: the anti-diagonal has indices that add up to stride - 1.
    tiles = sum(logits[:, :, :, stride - 1 - s, :, s] for s in range(stride))
    assert isinstance(tiles, Tensor)
    count = tiles.shape[-1]
    share = tiles.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    mass = by_block(share, SIZE // stride)[:, :, : -(-tokens // stride)]
    expected = torch.stack([row.mean(2) for row in mass.split(SIZE // stride, 2)], 2).amax(1, keepdim=True)
    assert torch.allclose(xattention_scores(q, k, CONFIG, stride=stride), expected, atol=1e-12)


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
def test_block_means_are_the_coarsest_sketch(reduce: str, head_mode: str) -> None:
    plain = replace(CONFIG, salience=0.0, query_contrast=1.0, use_srht=False)
    config = replace(plain, query_sub_block=SIZE, key_sub_block=SIZE, reduce=reduce, head_mode=head_mode)
    q, k, _ = qkv(2, 4, 2, 111, 8)
    assert torch.allclose(block_mean_scores(q, k, config), Sketch(config, 8)(q, k), atol=1e-6)
    later = block_mean_scores(q[:, :, -30:], k, config)
    assert torch.allclose(later, Sketch(config, 8)(q[:, :, -30:], k), atol=1e-6)


def lines(tokens: int, distance: int, column: int | None) -> tuple[Tensor, Tensor]:
    """One head whose queries look `distance` tokens back, or all at the key in `column`."""
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(1, 1, tokens, 64, generator=generator, dtype=torch.float64)
    at = (torch.arange(tokens) - distance).clamp(min=0) if column is None else torch.full((tokens,), column)
    return 1.5 * k[:, :, at], k


def test_flexprefill_extends_a_diagonal_to_earlier_rows() -> None:
    q, k = lines(240, distance=5 * SIZE + 4, column=None)
    scores = flexprefill_scores(q, k, CONFIG, tau=0.0)[0, 0]
    for row in (6, 7, 10, 11, 12):
        # Offset 5 blocks and 4 tokens: a quarter of a block's queries look one block farther.
        far, near = scores[row, row - 6], scores[row, row - 5]
        assert near / far == pytest.approx(3.0, abs=0.1)
        # Blocks 8 and 9 are the columns that the probe, block 14, looked at.
        rest = [scores[row, b].item() for b in range(row + 1) if b not in (row - 6, row - 5, 8, 9)]
        assert max(rest) < far / 20
    assert torch.allclose(scores.sum(-1), torch.ones(15, dtype=torch.float64))


def test_flexprefill_extends_a_column_to_every_row() -> None:
    q, k = lines(240, distance=0, column=37)
    scores = flexprefill_scores(q, k, CONFIG, tau=0.0)[0, 0]
    free = scores[3:].clone()
    assert (free[:-1].argmax(-1) == 37 // SIZE).all()


def test_flexprefill_trusts_a_good_estimate() -> None:
    q, k, _ = qkv(1, 4, 2, 200, 8)
    always = flexprefill_scores(q, k, CONFIG, tau=1.0)
    assert torch.allclose(always, block_mean_scores(q, k, CONFIG), atol=1e-6)
    assert not torch.allclose(always, flexprefill_scores(q, k, CONFIG, tau=0.0), atol=1e-2)
    # All tokens of a block alike, all queries at block 2: the estimate is as good as exact.
    keys = k[:, :, ::SIZE].repeat_interleave(SIZE, 2)
    queries = 20 * keys[:, :, 2 * SIZE : 2 * SIZE + 1].repeat_interleave(2, 1).expand(-1, -1, 200, -1)
    keys = keys[:, :, :200]
    assert torch.allclose(flexprefill_scores(queries, keys, CONFIG), block_mean_scores(queries, keys, CONFIG))


def test_local_window() -> None:
    q, k, _ = qkv(1, 2, 1, 150, 8)
    result = sketch_walk_attention(q, k, k, replace(CONFIG, min_blocks=4), score_with=local_scores)
    assert result.selection.indices[0, 9].tolist() == [0, 7, 8, 9]


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (oracle_scores, {"reduce": "sum"}, r"unknown reduce 'sum'; expected one of \('max', 'mean'\)"),
        (xattention_scores, {"stride": 5}, r"stride must divide block_size \(16\), got 5"),
        (xattention_scores, {"stride": 0}, r"stride must divide block_size \(16\), got 0"),
        (flexprefill_scores, {"tau": -0.1}, r"tau must be at least 0, got -0\.1"),
    ],
)
def test_options_that_do_not_fit(function: Any, options: dict[str, Any], message: str) -> None:
    q, k, _ = qkv(1, 2, 1, 40, 8)
    with pytest.raises(ValueError, match=message):
        function(q, k, CONFIG, **options)


@pytest.mark.parametrize("function", [xattention_scores, flexprefill_scores])
def test_prompt_selectors_refuse_single_queries(function: Any) -> None:
    q, k, _ = qkv(1, 2, 1, 40, 8)
    with pytest.raises(ValueError, match="scores prompts, not single queries: use mode='prefill'"):
        function(q[:, :, -1:], k, CONFIG)


@pytest.mark.parametrize("name", [name for name, function in SELECTORS.items() if function])
def test_padding_is_refused(name: str) -> None:
    function = SELECTORS[name]
    assert function is not None
    q, k, _ = qkv(2, 2, 1, 40, 8)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :7] = False
    padded = make_layout(2, 40, 40, q.device, valid=valid)
    with pytest.raises(ValueError, match="layout is of a padded batch"):
        function(q, k, CONFIG, layout=padded, scale=1.0)
    with pytest.raises(ValueError, match="do not run inside a compiled graph"):
        function(q, k, CONFIG, layout=replace(make_layout(2, 40, 40, q.device), bounds=None), scale=1.0)


def test_the_hook_takes_plain_causal_attention_only() -> None:
    q, k, v = qkv(1, 2, 1, 40, 8)
    for options in ({"causal": False}, {"bias": torch.zeros(1, 1, 40, 40)}):
        with pytest.raises(ValueError, match="score_with scores causal attention without a bias"):
            sketch_walk_attention(q, k, v, CONFIG, score_with=local_scores, **options)


@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
@pytest.mark.parametrize("sinks", [0, 1, 5])
def test_best_blocks_are_what_selection_takes(head_mode: str, sinks: int) -> None:
    from sketch_walk.evaluation.query_rows import each_rows
    from sketch_walk.evaluation.recall import _block_mask, _forced_blocks

    config = replace(CONFIG, sink_blocks=sinks, local_blocks=2, head_mode=head_mode, top_k_blocks=4, density=None)
    # Few distinct values, so that ties decide.
    scores = torch.randint(0, 4, (2, 2, 12, 12), generator=torch.Generator().manual_seed(sinks)) / 4
    scores = scores if head_mode == "per_kv_head" else scores[:, :1]
    index = torch.arange(12).expand(2, -1)
    chosen = select_blocks(scores, index, has_queries=index >= 0, config=config).per_head()
    expected, seen = _block_mask(chosen.indices, 12), 0
    for rows in each_rows(torch.zeros(2, 2, 192, 8), make_layout(2, 192, 192, scores.device), SIZE, 1e-3):
        part, blocks = slice(rows.start, rows.stop), rows.stop
        forced = _forced_blocks(rows, blocks, config)
        best = best_blocks(scores[:, :, part, :blocks], chosen.counts[:, :, part], forced)
        assert torch.equal(best, expected[:, :, part, :blocks])
        seen += rows.stop - rows.start
    assert seen == 12


class Seen:
    """Keeps the tensors of every sparse call."""

    def __init__(self) -> None:
        self.calls: list[LayerTensors] = []

    def __call__(self, call: LayerTensors) -> None:
        self.calls.append(call)


def token_mask(call: LayerTensors, size: int) -> Tensor:
    """Bool (batch, heads, queries, keys): pairs that were read."""
    batch, heads, queries, _ = call.query.shape
    keys, selection = call.key.shape[2], call.result.selection.per_head()
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    group = heads // selection.counts.shape[1]
    for row, (lo, hi) in enumerate(spans(queries, keys, size)):
        for b in range(batch):
            for head in range(heads):
                for block in selection.indices[b, head // group, row].tolist():
                    if block >= 0:
                        mask[b, head, lo:hi, block * size : (block + 1) * size] = True
    rank = torch.arange(keys - queries, keys)
    return mask & (torch.arange(keys) <= rank[:, None])


def restated_layer(calls: list[LayerTensors], size: int) -> dict[str, Any]:
    """What a layer's report must say, from full matrices."""
    recalls, least, read, pairs = [], [], 0, 0
    for call in calls:
        mask = token_mask(call, size)
        kept = (attention(call.query, call.key, call.scale) * mask).sum(-1)
        recalls.append(kept)
        least += [kept[:, :, lo:hi].mean(2).amin(0) for lo, hi in spans(kept.shape[2], call.key.shape[2], size)]
        read += int(mask[:, 0].sum())
        pairs += mask.shape[0] * sum(range(mask.shape[3] - mask.shape[2] + 1, mask.shape[3] + 1))
    return {
        "recall": torch.cat(recalls, 2).mean((0, 2)),
        "least_recall": torch.stack(least).amin(0),
        "pair_density": read / pairs,
    }


@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
@pytest.mark.parametrize("chunks", [(231,), (100, 64, 67), (228, 1, 1, 1)])
def test_measurement_equals_full_matrices(
    model: PreTrainedModel, ids: Tensor, head_mode: str, chunks: tuple[int, ...], small_slices: None
) -> None:
    config = replace(CONFIG, head_mode=head_mode, walk="damped", sparsity_exponent=8)
    batch = torch.cat([ids, ids.flip(1)])
    seen = Seen()
    with enable(model, config) as handle, torch.no_grad(), observe_selection(handle) as recorder:

        def both(call: LayerTensors) -> None:
            recorder(call)
            seen(call)

        handle.observer = both
        cache, start = None, 0
        for chunk in chunks:
            cache = model(batch[:, start : start + chunk], past_key_values=cache, use_cache=True).past_key_values
            start += chunk
    assert handle.observer is None
    layers = recorder.layers()
    assert [layer.layer for layer in layers] == [1, 2]
    for layer in layers:
        expected = restated_layer([call for call in seen.calls if call.layer_idx == layer.layer], SIZE)
        assert layer.queries == 2 * 231
        assert torch.allclose(torch.tensor(layer.recall).double(), expected["recall"], atol=1e-5)
        assert torch.allclose(torch.tensor(layer.least_recall).double(), expected["least_recall"], atol=1e-5)
        if head_mode == "shared":
            assert layer.pair_density == pytest.approx(expected["pair_density"], abs=1e-6)


def test_output_error_equals_full_matrices(model: PreTrainedModel, ids: Tensor) -> None:
    seen = Seen()
    with enable(model, CONFIG) as handle, torch.no_grad():
        handle.observer = seen
        model(ids, use_cache=False)
    report = measure_selection(model, ids, CONFIG)
    for layer, call in zip(report.layers, seen.calls, strict=True):
        values = call.value.double().repeat_interleave(2, 1)
        dense = attention(call.query, call.key, call.scale)
        sparse = dense * token_mask(call, SIZE)
        sparse, dense = (sparse / sparse.sum(-1, keepdim=True)) @ values, dense @ values
        by_head = ((sparse - dense).square().sum((0, 2, 3)) / dense.square().sum((0, 2, 3))).sqrt()
        assert torch.allclose(torch.tensor(layer.head_output_error).double(), by_head, atol=1e-5)
        assert layer.output_error == pytest.approx(((sparse - dense).norm() / dense.norm()).item(), abs=1e-5)
        assert layer.output_error > 0.01


@pytest.mark.parametrize("decode_tokens", [0, 5])
def test_full_budget_keeps_everything(model: PreTrainedModel, ids: Tensor, decode_tokens: int) -> None:
    report = measure_selection(model, ids, replace(CONFIG, density=1.0), decode_tokens=decode_tokens)
    for layer in report.layers:
        assert layer.queries == (decode_tokens or 231)
        assert min(layer.least_recall) == pytest.approx(1.0, abs=1e-5)
        assert layer.output_error < 1e-5
        assert layer.overlap == {"max": None, "mean": None}
        assert layer.block_density == layer.pair_density == 1.0
    assert report.means()["oracle_max_overlap"] is None


@pytest.mark.parametrize("name", list(SELECTORS))
@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
def test_no_selector_beats_the_mean_oracle(model: PreTrainedModel, ids: Tensor, name: str, head_mode: str) -> None:
    report = measure_selection(model, ids, replace(CONFIG, head_mode=head_mode), selector=name)
    for layer in report.layers:
        means = layer.means()
        assert means["recall"] is not None
        assert means["oracle_mean_recall"] is not None
        assert means["recall"] <= means["oracle_mean_recall"] + 1e-6
        assert 0 < means["least_recall"] <= means["recall"] < 1
        assert 0.3 <= layer.block_density < 0.4
        for reduce in ("max", "mean"):
            overlap = layer.overlap[reduce]
            assert overlap is not None
            if name == f"oracle_{reduce}":
                assert overlap == 1.0
                assert layer.recall == pytest.approx(layer.oracle_recall[reduce], abs=1e-6)
            else:
                assert 0.0 <= overlap < 1.0


def test_counts_by_mass_are_the_selections_own(model: PreTrainedModel, ids: Tensor) -> None:
    config = replace(CONFIG, density=None, mass=0.8)
    report = measure_selection(model, ids, config, selector="oracle_mean")
    for layer in report.layers:
        assert layer.overlap["mean"] == 1.0
        assert sum(layer.recall) / 4 > 0.8
        assert layer.block_density < 1


def test_oracles_find_the_needle_that_a_window_loses() -> None:
    tokens, config = 400, replace(CONFIG, density=None, top_k_blocks=4)
    q, k, v = qkv(1, 4, 2, tokens, 16, sharpness=0.5)
    needle = 7 * SIZE + 3
    q[:, 3, 200:] += 6 * torch.nn.functional.normalize(k[:, 1:2, needle : needle + 1], dim=-1)[:, 0]
    measured = {}
    for name in ("local", "oracle_max", "oracle_mean"):
        result = sketch_walk_attention(q, k, v, config, score_with=SELECTORS[name])
        recorder = SelectionRecorder(config)
        recorder(LayerTensors(0, q, k, v, make_layout(1, tokens, tokens, q.device), 0.25, result))
        measured[name] = recorder.layers()[0]
    # Only one head of four looks at the needle, from row 13 on, and the window has left it by then.
    for name in ("oracle_max", "oracle_mean"):
        assert measured[name].recall[3] > measured["local"].recall[3] + 0.1
    assert measured["oracle_max"].output_error < measured["local"].output_error
    assert (measured["oracle_max"].overlap["max"] or 0) > (measured["local"].overlap["max"] or 0) + 0.2


def test_dense_outputs_give_every_selector_the_same_layers(model: PreTrainedModel, ids: Tensor) -> None:
    def oracle_recalls(name: str, follow: str, decode_tokens: int = 0) -> list[float]:
        report = measure_selection(model, ids, CONFIG, selector=name, follow=follow, decode_tokens=decode_tokens)
        return [value for layer in report.layers for value in layer.oracle_recall["max"]]

    assert oracle_recalls("local", "dense") == oracle_recalls("sketch", "dense")
    assert oracle_recalls("local", "sparse")[4:] != oracle_recalls("sketch", "sparse")[4:]
    assert oracle_recalls("local", "dense", 4) == oracle_recalls("sketch", "dense", 4)


def test_selectors_inside_a_model(model: PreTrainedModel, ids: Tensor) -> None:
    def selections(handle: Any) -> list[Any]:
        handle.calls.clear()
        with torch.no_grad():
            model(ids, use_cache=False)
        return [call.indices.tolist() for call in handle.calls if call.indices is not None]

    with enable(model, CONFIG, record=True) as handle:
        own = selections(handle)
        with oracle(handle) as same:
            assert same is handle
            best = selections(handle)
            with selector(handle, local_scores):
                assert selections(handle) not in (own, best)
            assert selections(handle) == best
            with pytest.raises(RuntimeError, match="inside"), oracle(handle, reduce="mean"):
                raise RuntimeError("inside")
            assert selections(handle) == best
            with selector(handle, "sketch"):
                assert selections(handle) == own
        assert selections(handle) == own != best
    with pytest.raises(ValueError, match="handle is disabled"), selector(handle, "quest"):
        pass


@pytest.mark.parametrize("walk", ["none", "damped"])
@pytest.mark.parametrize("name", [name for name in SELECTORS if name not in PROMPT_ONLY])
def test_generation_through_a_selector(model: PreTrainedModel, ids: Tensor, name: str, walk: str) -> None:
    with enable(model, replace(CONFIG, walk=walk), record=True) as handle, selector(handle, name):
        # 231 tokens leave 9 in the open block: it is closed by decode steps.
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12)
    assert output.shape == (1, 243)
    assert all(call.indices is not None for call in handle.calls if call.layer_idx)


def test_selectors_say_what_they_cannot_do(model: PreTrainedModel, ids: Tensor) -> None:
    with enable(model, CONFIG) as handle:
        unknown = r"unknown selector 'best'; expected one of \('sketch', 'oracle_max'"
        with pytest.raises(ValueError, match=unknown), selector(handle, "best"):
            pass
        with pytest.raises(TypeError, match="selector must be a name or a function"), selector(handle, 3):  # type: ignore[arg-type]
            pass
        with pytest.raises(ValueError, match="unknown reduce 'sum'"):
            oracle(handle, reduce="sum")
        assert handle.score_with is None
        mask = torch.ones(2, 100, dtype=torch.long)
        mask[0, :9] = 0
        with oracle(handle), pytest.raises(ValueError, match="layout is of a padded batch"):
            model(ids[:, :100].repeat(2, 1), attention_mask=mask)
        with observe_selection(handle), pytest.raises(ValueError, match="layout is of a padded batch"):
            model(ids[:, :100].repeat(2, 1), attention_mask=mask)
        with pytest.raises(ValueError, match="enabled already"):
            measure_selection(model, ids, CONFIG)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": [1, 2]}, TypeError, "input_ids must be a tensor of integers, got list"),
        ({"input_ids": torch.ones(1, 9)}, TypeError, "input_ids must be a tensor of integers, got torch.float32"),
        ({"input_ids": torch.ones(9, dtype=torch.long)}, ValueError, r"input_ids must have shape \(batch, tokens\)"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, ValueError, r"input_ids must have .* got \(1, 0\)"),
        ({"decode_tokens": 231}, ValueError, "decode_tokens must be at least 0 and below the 231 of input_ids"),
        ({"decode_tokens": -1}, ValueError, "decode_tokens must be at least 0 and below"),
        ({"follow": "both"}, ValueError, r"unknown follow 'both'; expected one of \('sparse', 'dense'\)"),
        ({"selector": "best"}, ValueError, "unknown selector 'best'"),
        ({"selector": "xattention", "decode_tokens": 3}, ValueError, "xattention scores prompts"),
        ({"config": 3}, TypeError, "config must be a SketchWalkConfig, got int"),
        ({"config": replace(CONFIG, skip_first_n_layers=3)}, ValueError, "no layer ran sparse: first layers"),
    ],
)  # fmt: skip
def test_measurement_refuses(
    model: PreTrainedModel, ids: Tensor, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure_selection(model, **{"input_ids": ids, "config": CONFIG, **changes})
    assert model.config._attn_implementation == "sdpa"


def test_layers_with_a_window_are_not_measured(ids: Tensor) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**TINY, head_dim=16, sliding_window=32, layer_types=kinds)
    gemma = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().bfloat16()
    report = measure_selection(gemma, ids, CONFIG, selector="oracle_mean")
    assert [layer.layer for layer in report.layers] == [2]
    assert report.layers[0].overlap["mean"] == 1.0
    assert report.settings["dtype"] == "bfloat16"


def test_report(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    done: list[int] = []
    report = measure_selection(model, ids, replace(CONFIG, dense_below=None), selector="quest", on_layer=done.append)
    assert done == [1, 2]
    report.write_json(tmp_path / "folder" / "recall.json")
    record = json.loads((tmp_path / "folder" / "recall.json").read_text(encoding="utf-8"))
    assert record["settings"]["config"] == replace(CONFIG, dense_below=0).to_dict()
    assert (record["settings"]["selector"], record["settings"]["tokens"]) == ("quest", 231)
    assert [layer["by_head"]["layer"] for layer in record["layers"]] == [1, 2]
    assert all(len(layer["by_head"]["recall"]) == 4 for layer in record["layers"])
    recalls = [layer["recall"] for layer in record["layers"]]
    assert record["means"]["recall"] == pytest.approx(sum(recalls) / 2)
    assert record["means"]["least_recall"] == min(min(layer.least_recall) for layer in report.layers)
    table = report.table()
    assert table.row_count == 3
    assert list(table.columns[1].cells) == [f"{value:.3f}" for value in (*recalls, record["means"]["recall"])]
    assert {layer: tuple(rows.shape) for layer, rows in report.selections.items()} == {1: (15, 5), 2: (15, 5)}
    by_name = measure_selection(model, ids, CONFIG, selector=quest_scores)
    assert by_name.settings["selector"] == "quest_scores"
    assert by_name.layers == report.layers


def test_figures(tmp_path: Path) -> None:
    from sketch_walk.plots import Curve

    plot_recall_by_layer(tmp_path / "a" / "layers.png", {"read": Curve([2, 3], [0.5, 0.9])})
    plot_head_heat_map(tmp_path / "heads.png", [2, 3], [[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.rglob("*.png"))
    with pytest.raises(ValueError, match="curves must hold at least one line"):
        plot_recall_by_layer(tmp_path / "layers.png", {})
    for values in ([[0.1]], [[0.1], [0.2, 0.3]], [[], []]):
        with pytest.raises(ValueError, match="values must have 2 rows of equally many values"):
            plot_head_heat_map(tmp_path / "heads.png", [2, 3], values)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["recall", *arguments])
    return int(done.value.code or 0)


@pytest.mark.parametrize("options", [("--task", "multi_key"), ("--decode-tokens", "3", "--walk", "none")])
def test_command(
    options: tuple[str, ...],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    common = ("--model", str(tiny_folder), "--output", str(tmp_path / "out"), "--tokens", "400", "--device", "cpu")
    assert command(*common, "--selector", "oracle_max", "--exponent", "1", *options) == 0
    record = json.loads((tmp_path / "out" / "recall.json").read_text(encoding="utf-8"))
    assert record["settings"]["tokens"] == 400
    assert record["settings"]["config"]["density"] == 0.2
    assert record["settings"]["config"]["sparsity_exponent"] == 1
    (layer,) = record["layers"]
    decode = "--decode-tokens" in options
    assert layer["by_head"]["queries"] == (3 if decode else 400)
    # With the default walk, the only sparse layer's rows of R are its own scores.
    assert layer["oracle_max_overlap"] == 1.0
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"recall_by_layer.png", "recall_by_head.png", "error_by_head.png"} | (
        set() if decode else {"blocks.png"}
    )
    out = capsys.readouterr().out
    assert f"{layer['recall']:.3f}" in out
    assert "…" not in out


def test_command_reads_a_file(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The pilot counted the barrels near the harbour. " * 60, encoding="utf-8")
    common = ("--model", str(tiny_folder), "--output", str(tmp_path / "out"), "--file", str(text), "--device", "cpu")
    assert command(*common, "--tokens", "333", "--follow", "dense") == 0
    settings = json.loads((tmp_path / "out" / "recall.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["tokens"], settings["file"], settings["follow"]) == (333, "text.txt", "dense")
    text.write_text("", encoding="utf-8")
    capsys.readouterr()
    assert command(*common) == 1
    assert capsys.readouterr().err == "sketch-walk: the text is empty\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--selector", "best"), "unknown selector 'best'; expected one of ('sketch', 'oracle_max'"),
        (("--task", "hay"), "unknown task 'hay'; expected one of ('noise', 'prose', 'multi_key')"),
        (("--file", "/no/such/file"), "No such file or directory: '/no/such/file'"),
        (("--walk", "often"), "unknown walk 'often'; expected one of"),
        (("--density", "0.2", "--top-k", "3"), "--density and --top-k exclude each other"),
        (("--model", "./nowhere"), "no such file or folder: ./nowhere"),
    ],
)
def test_command_mistakes(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_names_every_selector() -> None:
    callbacks = {c.callback.__name__: c.callback for c in app.registered_commands if c.callback}
    hint = callbacks["recall"].__annotations__["selector"]
    assert set(re.findall(r"[a-z_]{4,}", hint)) >= set(SELECTORS)


def test_oracle_of_a_real_model_finds_the_needle(smollm2: Any) -> None:
    from sketch_walk.evaluation import make_sample

    sample = make_sample(smollm2.tokenizer, "noise", 700, 0, depth=0.5)
    config = SketchWalkConfig(density=0.2, min_blocks=3, walk="none", sparsity_exponent=1, skip_first_n_layers=15)
    needle, found = sample.needle_start // 64, {}
    for name in ("oracle_max", "local"):
        report = measure_selection(smollm2.model, sample.prompt, config, selector=name, follow="dense")
        found[name] = sum(needle in rows[-1].tolist() for rows in report.selections.values())
    assert found["oracle_max"] >= 5
    assert found["local"] == 0
