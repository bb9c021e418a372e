"""Sketches and "peak" scores in Triton against the reference: on a GPU where there is one, else under the interpreter.

Stage by stage, each from the same inputs. What may differ: a code by one, where the kernel's product falls on the other
side of a tie (the GPU's rotation is made in bfloat16, which moves more of them), and scores by the scratch's float16.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sketch_walk import SketchWalkConfig, kernels, sketch_walk_attention
from sketch_walk.kernels import available, sketches_with_triton
from sketch_walk.layout import Layout, make_layout
from sketch_walk.scoring import _sketch_queries, absorb_call, absorb_keys, call_scores
from sketch_walk.sketch import (
    CLIP,
    KEY_LEVELS,
    KeySketch,
    QuerySketch,
    block_scores,
    feature_width,
    payload_size,
    quantise_keys,
    rotation,
)
from sketch_walk.state import LayerSketch
from tensors import qkv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = available()["triton"]
if importlib.util.find_spec("triton") is not None:
    from sketch_walk.kernels.triton_peaks import PeakLaunch, decode_peaks, peak_scores, unpack_keys, unsupported
    from sketch_walk.kernels.triton_sketch import PackedQueries, sketch_keys, sketch_queries
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"triton cannot run: {REASON}")

EXACT = DEVICE == "cpu"
# Share of codes that may be off by one, and relative error of a step: bfloat16 keeps 8 bits of a mean, and of a rotated
# coordinate as many; a root mean square is 40 steps.
MOVED, STEP_ERROR = (2e-3, 1e-5) if EXACT else (0.3, 1e-2)

# batch, heads, kv_heads, new tokens, past tokens, head_dim, padding, changes to the config
CASES: list[tuple[int, int, int, int, int, int, str | None, dict[str, Any]]] = [
    (2, 4, 2, 300, 0, 64, None, {}),
    (2, 4, 2, 301, 0, 64, "left", {}),
    (3, 2, 1, 111, 0, 32, "right", {"block_size": 16}),
    (1, 4, 1, 150, 130, 32, None, {}),
    (2, 6, 2, 63, 70, 80, "left", {"block_size": 32}),
    (1, 5, 1, 333, 0, 96, None, {"sketch_dim": 128}),
    (1, 2, 2, 200, 55, 128, None, {"block_size": 128, "sketch_dim": 128}),
    (1, 2, 1, 100, 0, 256, None, {"block_size": 32, "sketch_dim": 256}),
    (2, 6, 2, 90, 20, 64, "right", {"block_size": 32, "head_mode": "per_kv_head"}),
    (1, 7, 1, 260, 0, 64, None, {"query_sub_block": 8}),
    (2, 14, 2, 70, 33, 64, "left", {"block_size": 32, "head_mode": "per_kv_head", "query_keep": 0.25}),
    (1, 3, 3, 130, 0, 128, None, {"sketch_dim": 32, "query_keep": 1.0}),
    (1, 4, 2, 100, 37, 64, None, {"block_size": 32, "query_sub_block": 1, "key_sub_block": 1, "query_keep": 0.25}),
    (1, 4, 2, 90, 0, 64, None, {"block_size": 16, "query_sub_block": 16, "key_sub_block": 16}),
    (2, 4, 2, 90, 7, 32, "left", {"block_size": 32, "query_sub_block": 16, "key_sub_block": 2}),
    (1, 2, 1, 130, 0, 64, None, {"query_sub_block": 2, "key_sub_block": 32, "score_scale": "sketch"}),
    (1, 3, 1, 2, 127, 64, None, {"query_keep": 0.25}),
    (1, 2, 1, 150, 10, 64, "left", {"block_size": 48, "query_sub_block": 3, "key_sub_block": 3, "salience": 5.0}),
    (1, 2, 1, 150, 0, 64, None, {"salience": 0.0, "query_contrast": 1.0}),
    (1, 2, 1, 150, 0, 64, None, {"salience": 0.5, "query_contrast": 3.0}),
]
PROMPTS = [pytest.param(case, id="-".join(str(part) for part in case)) for case in CASES]
# One query per sequence: the same columns, `new` is 1.
STEPS = [
    pytest.param((batch, heads, kv_heads, 1, past, dim, padding, changes), id=f"{heads}x{kv_heads}-{past}-{dim}")
    for batch, heads, kv_heads, past, dim, padding, changes in (
        (2, 4, 2, 200, 64, "left", {}),
        (1, 3, 1, 129, 96, None, {"sketch_dim": 128}),
        (1, 7, 1, 127, 80, None, {"block_size": 32}),
        (3, 16, 1, 300, 32, "left", {"block_size": 16}),
        (2, 6, 3, 64, 128, None, {"block_size": 128, "sketch_dim": 128, "head_mode": "per_kv_head"}),
        (1, 2, 2, 63, 256, None, {"sketch_dim": 256}),
        (1, 4, 2, 90, 64, None, {"block_size": 16, "key_sub_block": 16, "sketch_dim": 16}),
        (1, 4, 2, 99, 64, None, {"block_size": 32, "key_sub_block": 1}),
        (1, 40, 1, 70, 64, None, {}),
    )
]
Case = tuple[int, int, int, int, int, int, str | None, dict[str, Any]]


class Call:
    """Tensors of one case, uneven from coordinate to coordinate, NaN where a sequence is padded."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        batch, heads, kv_heads, new, past, dim, padding, changes = case
        self.config = SketchWalkConfig(**changes)
        total = past + new
        query, key, _ = qkv(batch, heads, kv_heads, total, dim, seed=new + 7 * past + dim)
        loud = 1 + 3 * torch.rand(dim, generator=torch.Generator().manual_seed(dim))
        self.query, self.key = query[:, :, past:].to(DEVICE, dtype), (key * loud).to(DEVICE, dtype)
        valid = None
        if padding is not None:
            valid = torch.ones(batch, total, dtype=torch.bool, device=DEVICE)
            valid[0, slice(0, 37) if padding == "left" else slice(-9, None)] = False
            self.key.masked_fill_(~valid[:, None, :, None], torch.nan)
            self.query.masked_fill_(~valid[:, None, past:, None], torch.nan)
        self.layout: Layout = make_layout(batch, new, total, self.query.device, valid=valid)
        self.width, self.scale = feature_width(dim, self.config), dim**-0.5
        self.per_block = self.config.block_size // self.config.key_sub_block
        self.blocks = -(-self.layout.max_length // self.config.block_size)
        self.rows = self.layout.num_query_blocks(self.config.block_size)
        sub_queries = 1 if new == 1 else self.config.block_size // self.config.query_sub_block
        self.kept = self.config.kept_sub_queries(sub_queries)

    def matrix(self) -> Tensor:
        return rotation(self.key.shape[3], self.config, self.key.device, kernels.product_dtype())

    def stored(self, impl: str = "reference") -> LayerSketch:
        """Sketches of all keys, blocks before the call's included, as earlier calls left them."""
        state = LayerSketch(self.config)
        whole = make_layout(
            self.key.shape[0], self.key.shape[2], self.key.shape[2], self.key.device, valid=self.valid()
        )
        absorb_keys(state, self.key, whole, self.query.new_zeros(1, self.query.shape[1], 1, self.key.shape[3]), impl)
        return state

    def valid(self) -> Tensor | None:
        return None if self.layout.key_index is None else self.layout.ranks()[0] >= 0

    def packed_queries(self) -> PackedQueries:
        config = self.config
        return sketch_queries(
            self.query,
            self.layout,
            self.matrix(),
            block_size=config.block_size,
            query_sub_block=config.query_sub_block,
            kept=self.kept,
            salience=config.salience,
            contrast=config.query_contrast,
        )

    def unpacked(self, queries: PackedQueries) -> QuerySketch:
        """(batch, rows, heads, kept, width) in float32."""
        assert (queries.codes[..., self.width :] == 0).all()
        return QuerySketch((queries.codes * queries.scales[..., None])[..., : self.width], queries.last_rank.long())


def codes_of(call: Call, state: LayerSketch) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps, and which sub-keys are real, of the call's sequences."""
    codes, scales = KeySketch(*state.read_keys(call.blocks)).unpack(call.per_block, call.width)
    assert scales is not None
    start = torch.arange(call.blocks * call.per_block, device=DEVICE) * call.config.key_sub_block
    real = (start < call.layout.length[:, None]).view(-1, 1, call.blocks, call.per_block)
    return codes, scales, real


def assert_same_codes(actual: Tensor, expected: Tensor, what: str) -> None:
    difference = (actual.float() - expected.float()).abs()
    assert difference.max() <= 1, f"{what}: a code is {difference.max().item()} off"
    assert (difference > 0).float().mean() <= MOVED, f"{what}: {(difference > 0).float().mean().item():.2e} differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PROMPTS)
def test_key_sketches(case: Case, dtype: torch.dtype) -> None:
    call = Call(case, dtype)
    found, expected = (codes_of(call, call.stored(impl)) for impl in ("triton", "reference"))
    real = expected[2].expand(expected[0].shape[:-1])
    assert_same_codes(found[0][real], expected[0][real], "keys")
    torch.testing.assert_close(found[1][real.any(-1)], expected[1][real.any(-1)], rtol=STEP_ERROR, atol=0)


def test_only_the_blocks_of_the_call_are_written() -> None:
    call = Call((2, 4, 2, 40, 70, 64, None, {"block_size": 32}))
    config, layout = call.config, call.layout
    codes = torch.full((2, 2, 6, payload_size(call.width, config)), 170, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((2, 2, 6, 2), torch.nan, device=DEVICE)
    sketch_keys(
        call.key,
        layout,
        call.rows,
        codes,
        scales,
        call.matrix(),
        block_size=32,
        key_sub_block=4,
        step=CLIP / KEY_LEVELS,
        salience=config.salience,
    )
    # Tokens 70 ... 109 lie in blocks 2 and 3; 4 is free, 5 the spare one.
    assert (codes[:, :, [0, 1, 4, 5]] == 170).all()
    assert scales[:, :, [0, 1, 4, 5]].isnan().all()
    expected = call.stored()
    torch.testing.assert_close(scales[:, :, 2:4], expected.read_keys(4)[1][:, :, 2:], rtol=STEP_ERROR, atol=0)


def test_no_blocks_and_no_rows() -> None:
    layout = make_layout(2, 0, 40, torch.device(DEVICE))
    key = torch.zeros(2, 2, 40, 64, device=DEVICE)
    codes = torch.full((2, 2, 2, 1024), 3, dtype=torch.uint8, device=DEVICE)
    scales = torch.ones(2, 2, 2, 1, device=DEVICE)
    matrix = torch.eye(64, device=DEVICE)
    sketch_keys(key, layout, 0, codes, scales, matrix, block_size=64, key_sub_block=4, step=0.025, salience=1.0)
    assert (codes == 3).all()
    packed = sketch_queries(
        key[:, :, :0], layout, matrix, block_size=64, query_sub_block=4, kept=8, salience=1.0, contrast=1.5
    )
    assert packed.codes.shape == (2, 0, 2, 8, 64)


def test_keys_of_zeros_have_a_step_and_no_score_is_nan() -> None:
    query, key, value = (torch.zeros(1, 2, 100, 32, device=DEVICE) for _ in range(3))
    config = SketchWalkConfig(block_size=16, top_k_blocks=3)
    state = LayerSketch(config)
    layout = make_layout(1, 100, 100, query.device)
    absorb_keys(state, key, layout, query, "triton")
    scores = call_scores(state, query, layout, 0.2, impl="triton")
    expected = torch.ones(7, 7, device=DEVICE).tril() / torch.arange(1, 8, device=DEVICE)[:, None]
    torch.testing.assert_close(scores[0, 0], expected, atol=1e-6, rtol=1e-3)
    selected = sketch_walk_attention(query, key, value, config, impl="triton").selection
    assert selected.indices[0, 6].tolist() == [0, 5, 6]


@pytest.mark.parametrize("case", [*PROMPTS, *STEPS])
def test_query_sketches(case: Case) -> None:
    """The same sub-queries, rounded alike; where bfloat16 keeps another, those that both keep are compared."""
    call = Call(case)
    expected = _sketch_queries(call.query, call.layout, 0, call.rows, call.config)
    packed = call.packed_queries()
    found = call.unpacked(packed)
    ranks = expected.last_rank.expand(found.last_rank.shape)
    assert found.last_rank.shape == ranks.shape
    same = found.last_rank == ranks
    assert same.all() if EXACT else same.float().mean() >= 0.9
    real = same & (ranks >= 0)
    steps = expected.values.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(packed.scales[real], steps[real][..., 0], rtol=STEP_ERROR, atol=0)
    codes = expected.values[real] / steps[real]
    assert_same_codes(packed.codes[..., : call.width][real], codes.round(), "queries")
    assert packed.codes.amin() >= -127


def scratch_error(queries: QuerySketch, keys: Tensor, scale: float) -> float:
    """Relative error of a score whose logit the scratch rounded: 11 bits of its distance from the row's base."""
    group = queries.values.shape[2] // keys.shape[1]
    logits = torch.einsum("brhkw,bhsw->brhks", queries.values, keys.repeat_interleave(group, 1)) * scale
    farthest = (logits - logits[..., :1]).abs().max().item() / math.log(2)
    # The normaliser is not rounded; products of whole numbers are exact, their scaling is float32's.
    return math.expm1(math.log(2) * farthest * 2.0**-11) + 1e-4


def reference_scores(call: Call, queries: QuerySketch, keys: Tensor) -> Tensor:
    return block_scores(queries, keys, call.layout.length, scale=call.scale, config=call.config)


LAUNCHES = [
    {},
    {"rows": 128, "num_warps": 8, "per_processor": 2},
    {"rows": 16},
    {"columns": 64},
    {"rows": 32, "columns": 32, "per_processor": 1, "num_stages": 2},
    {"max_registers": None},
    {"descriptors": True},
    {"rows": 128, "columns": 32, "descriptors": True},
]


def stored_and_packed(call: Call) -> tuple[PackedQueries, QuerySketch, Tensor, Tensor, Tensor]:
    """Queries, codes and steps as the kernels take them, queries and keys as the reference does."""
    queries = call.packed_queries()
    stored = KeySketch(*call.stored().read_keys(call.blocks))
    outline = call.layout.num_queries == 1
    assert stored.scales is not None
    keys = stored.dequantise(call.per_block, call.width, outline)
    return queries, call.unpacked(queries), stored.codes, stored.scales, keys


@pytest.mark.parametrize("case", PROMPTS)
def test_peak_scores(case: Case) -> None:
    call = Call(case)
    packed, queries, codes, scales, keys = stored_and_packed(call)
    expected = reference_scores(call, queries, keys)
    found = peak_scores(
        packed,
        codes,
        scales,
        call.layout.length,
        scale=call.scale,
        per_block=call.per_block,
        key_sub_block=call.config.key_sub_block,
        per_kv_head=call.config.head_mode == "per_kv_head",
    )
    assert found.shape == expected.shape
    assert expected.amax() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=scratch_error(queries, keys, call.scale))
    assert (found[expected == 0] == 0).all(), "nothing beyond the diagonal, nothing for a row without queries"


@pytest.mark.parametrize("changes", LAUNCHES, ids=str)
@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
def test_how_scores_are_cut_does_not_matter(changes: dict[str, Any], head_mode: str) -> None:
    if "descriptors" in changes:
        pytest.importorskip("triton.tools.tensor_descriptor")
    call = Call((2, 8, 2, 150, 45, 32, "left", {"block_size": 16, "head_mode": head_mode}))
    packed, queries, codes, scales, keys = stored_and_packed(call)
    found = peak_scores(
        packed,
        codes,
        scales,
        call.layout.length,
        scale=call.scale,
        per_block=4,
        key_sub_block=4,
        per_kv_head=head_mode == "per_kv_head",
        launch=PeakLaunch()._replace(**changes),
    )
    expected = reference_scores(call, queries, keys)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=scratch_error(queries, keys, call.scale))


def test_tuned_launches_are_for_their_gpu_and_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others, and Triton without descriptors, take the launch that serves any GPU."""
    from sketch_walk.kernels import triton_peaks

    gpu, found = torch.device("cuda:7"), {}
    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, now=capability: now)
        triton_peaks._tuned.cache_clear()
        found[capability] = triton_peaks.peak_launch(gpu, 128)
        assert triton_peaks.peak_launch(gpu, 64) == PeakLaunch()
        assert triton_peaks.peak_launch(torch.device("cpu"), 128) == PeakLaunch()
    assert found[9, 0] == triton_peaks.TUNED[9]
    assert found[9, 0].descriptors
    assert found[9, 0].rows == 64
    assert found[8, 0] == found[10, 0] == PeakLaunch()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    triton_peaks._tuned.cache_clear()
    assert triton_peaks.peak_launch(gpu, 128) == PeakLaunch()
    triton_peaks._tuned.cache_clear()


def test_few_programs_take_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all tiles: its scratch is used again and again."""
    from sketch_walk.kernels import triton_peaks
    from sketch_walk.kernels.triton_tiles import Device

    monkeypatch.setattr(triton_peaks, "device_of", lambda device: Device(1, 232448))
    call = Call((2, 4, 2, 200, 0, 32, "right", {"block_size": 16}))
    packed, queries, codes, scales, keys = stored_and_packed(call)
    launch = PeakLaunch(rows=16, per_processor=1)
    found = peak_scores(
        packed, codes, scales, call.layout.length,
        scale=call.scale, per_block=4, key_sub_block=4, per_kv_head=False, launch=launch,
    )  # fmt: skip
    expected = reference_scores(call, queries, keys)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=scratch_error(queries, keys, call.scale))


@pytest.mark.parametrize("sign", [1, -1])
def test_what_all_keys_have_in_common_costs_no_digits(sign: int) -> None:
    """A vector added to every key shifts all logits of a query alike: scores stay, also with logits of hundreds."""
    call = Call((1, 4, 2, 150, 0, 32, None, {"block_size": 16}))
    call.key = call.key + sign * 20 * call.query.mean((0, 1, 2))
    call.query = call.query + call.query.mean((0, 1, 2)) * 10
    packed, queries, codes, scales, keys = stored_and_packed(call)
    assert (
        torch.einsum("brhkw,bhsw->brhks", queries.values, keys.repeat_interleave(2, 1)) * call.scale
    ).abs().max() > 100
    found = peak_scores(
        packed, codes, scales, call.layout.length, scale=call.scale, per_block=4, key_sub_block=4, per_kv_head=False
    )
    expected = reference_scores(call, queries, keys)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=scratch_error(queries, keys, call.scale))


@pytest.mark.parametrize("times", [4, 10, 1000, 100_000])
def test_extreme_logits_stay_finite_and_in_order(times: float) -> None:
    """Also far above the base: scores are the reference's shares as far as the scratch tells logits apart."""
    call = Call((1, 2, 1, 150, 0, 32, None, {"block_size": 16}))
    packed, queries, codes, scales, keys = stored_and_packed(call)
    found = peak_scores(
        packed,
        codes,
        scales,
        call.layout.length,
        scale=call.scale * times,
        per_block=4,
        key_sub_block=4,
        per_kv_head=False,
    )
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
    assert (found <= 1.01).all()
    expected = block_scores(queries, keys, call.layout.length, scale=call.scale * times, config=call.config)
    if times <= 1000:
        best = found.gather(-1, expected.argmax(-1, keepdim=True))
        assert (best >= 0.99 * found.amax(-1, keepdim=True)).all()
    if times <= 10:
        # Here the normaliser is of rounded logits too.
        error = math.expm1(2 * math.log1p(scratch_error(queries, keys, call.scale * times)))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=error)


@pytest.mark.parametrize("case", STEPS)
def test_decode_peaks(case: Case) -> None:
    """Best logit of every block for every head, from means and outlines, in powers of two."""
    call = Call(case)
    packed, queries, codes, scales, keys = stored_and_packed(call)
    found = decode_peaks(
        packed,
        codes,
        scales,
        call.layout.length,
        scale=call.scale,
        per_block=call.per_block,
        key_sub_block=call.config.key_sub_block,
    )
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    assert found.shape == (call.query.shape[0], heads, call.blocks)
    logits = torch.einsum("bhw,bhsw->bhs", queries.values[:, 0, :, 0], keys.repeat_interleave(heads // kv_heads, 1))
    start = torch.arange(keys.shape[2], device=DEVICE) * call.config.key_sub_block
    logits = logits.masked_fill(start >= call.layout.length[:, None, None], -math.inf)
    expected = logits.unflatten(-1, (-1, call.per_block)).amax(-1) * call.scale / math.log(2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("new", [100, 1])
def test_a_sequence_without_tokens_scores_nothing(new: int) -> None:
    query, key, value = (x.to(DEVICE) for x in qkv(2, 4, 2, 100, 32))
    query = query[:, :, -new:]
    valid = torch.ones(2, 100, dtype=torch.bool, device=DEVICE)
    valid[1] = False
    for x in (query, key, value):
        x[1] = torch.nan
    layout = make_layout(2, new, 100, query.device, valid=valid)
    config = SketchWalkConfig(block_size=16, top_k_blocks=3)
    found, expected = (
        sketch_walk_attention(query, key, value, config, layout=layout, impl=impl) for impl in ("triton", "reference")
    )
    assert (found.walk[1] == 0).all()
    assert (found.output[1] == 0).all()
    assert (found.selection.counts[1] == 0).all()
    assert torch.equal(found.selection.counts, expected.selection.counts)
    assert torch.isfinite(found.output).all()


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize(("tile_blocks", "per_block", "width"), [(8, 16, 64), (4, 4, 48), (1, 8, 64), (32, 2, 18)])
def test_unpacked_keys(tile_blocks: int, per_block: int, width: int, columns: int) -> None:
    """Tiles of blocks, sub-key by sub-key; coordinates past the width are 0."""
    generator = torch.Generator().manual_seed(0)
    config = SketchWalkConfig(block_size=per_block, key_sub_block=1, query_sub_block=1)
    sketch = torch.randn(2, 3, 19, per_block, width, generator=generator) + torch.randn(width, generator=generator)
    stored = quantise_keys(sketch, torch.ones(sketch.shape[:-1], dtype=torch.bool), config, torch.float32)
    assert stored.scales is not None
    expected = stored.unpack(per_block, width)[0]
    codes, scales = (x.to(DEVICE) for x in stored)
    found = unpack_keys(codes, scales, tile_blocks, per_block, columns).cpu()
    tiles = -(-19 // tile_blocks)
    assert found.shape == (2, 3, tiles, tile_blocks * per_block, columns)
    blocks = found.view(2, 3, tiles, per_block, tile_blocks, columns).transpose(3, 4).flatten(2, 3)[:, :, :19]
    assert (blocks[..., :width] == expected).all()
    assert (blocks[..., width:] == 0).all()


@pytest.mark.parametrize("case", [*PROMPTS, *STEPS])
def test_whole_selectors_agree(case: Case) -> None:
    """Sketches and scores of a call, both by the same implementation."""
    call = Call(case)
    found = []
    for impl in ("triton", "reference"):
        state = call.stored(impl)
        absorb_keys(state, call.key, call.layout, call.query, impl)
        found.append(call_scores(state, call.query, call.layout, call.scale, impl=impl))
    assert found[0].shape == found[1].shape
    difference = (found[0] - found[1]).abs()
    # Logits lie up to 128 powers of two over their base in a scratch of float16: half of its last place there.
    rounding = (2**2**-5 - 1) * found[1]
    # A code that moved by one moves a logit by a 254th of the query's largest coordinate times the key's; an outline
    # whose code moved over the bound, by a whole bound: bfloat16 alone, on a CPU, makes a mean of 0.016 of 14 scores.
    limit = 2e-2 if call.layout.num_queries == 1 else 1e-2
    assert (difference - rounding).max() <= 1e-3 if EXACT else difference.mean() <= limit
    assert (found[0][found[1] == 0] < 1e-30).all()


@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_chunks_and_steps_leave_the_state_of_one_call(padding: str | None, head_mode: str) -> None:
    """By the kernels alone, to the rounding of products of other tiles."""
    config = SketchWalkConfig(block_size=32, head_mode=head_mode, density=0.4)
    whole = Call((2, 4, 2, 150, 0, 64, padding, {"block_size": 32, "head_mode": head_mode}))
    expected = whole.stored("triton")
    state = LayerSketch(config)
    valid = whole.valid()
    for start, stop in ((0, 50), (50, 64), (64, 133), (133, 134), (134, 150)):
        seen = None if valid is None else valid[:, :stop]
        layout = make_layout(2, stop - start, stop, whole.key.device, valid=seen)
        tensors = (whole.query[:, :, start:stop], whole.key[:, :, :stop], whole.key[:, :, :stop])
        actual = sketch_walk_attention(*tensors, config, state=state, layout=layout, impl="triton")
        assert actual.impl == "triton"
        assert torch.isfinite(actual.walk).all()
    lengths = whole.layout.length.tolist()
    for sequence, length in enumerate(lengths):
        blocks = length // 32
        mine, theirs = (KeySketch(*x.read_keys(blocks)).unpack(8, 64) for x in (state, expected))
        difference = (mine[0][sequence] - theirs[0][sequence]).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() <= 2e-3
        torch.testing.assert_close(mine[1], theirs[1], rtol=1e-5, atol=0)


def test_a_steps_budget_is_that_of_the_call() -> None:
    """A cache that was filled under another density."""
    call = Call((2, 4, 2, 1, 200, 64, None, {"block_size": 32, "density": 0.2}))
    state = call.stored("triton")
    tensors = (call.query, call.key, call.key)
    for density, count in ((1.0, 7), (0.5, 4)):
        config = replace(call.config, density=density)
        found = sketch_walk_attention(*tensors, config, state=state, layout=call.layout, impl="triton")
        assert found.selection.counts.tolist() == [[count]] * 2


def test_transition_rows_are_the_references() -> None:
    """With a walk the kernels' scores become transition rows; the row of an open block is the reference's."""
    call = Call((1, 4, 2, 150, 0, 64, None, {"block_size": 32, "walk": "damped", "sparsity_exponent": 1}))
    rows = []
    for impl in ("triton", "reference"):
        state = LayerSketch(call.config)
        for start, stop in ((0, 50), (50, 150)):
            layout = make_layout(1, stop - start, stop, call.key.device)
            absorb_call(state, call.query[:, :, start:stop], call.key[:, :, :stop], layout, call.scale, impl=impl)
        rows.append(state.read_rows(4))
    difference = (rows[0] - rows[1]).abs()
    assert difference.max() <= 2e-2 if EXACT else difference.mean() <= 1e-2


def test_two_runs_give_the_same_bits() -> None:
    call = Call(CASES[0])
    states = [call.stored("triton") for _ in range(2)]
    assert torch.equal(states[0].read_keys(call.blocks)[0], states[1].read_keys(call.blocks)[0])
    scores = [call_scores(states[0], call.query, call.layout, call.scale, impl="triton") for _ in range(2)]
    assert torch.equal(*scores)


CHOICE = SketchWalkConfig()


@pytest.mark.parametrize(
    ("changes", "width", "reason"),
    [
        ({"block_size": 48, "query_sub_block": 16}, 64, "powers of two of sub-keys and sub-queries, got 12, 3"),
        ({"block_size": 48, "key_sub_block": 16}, 64, "powers of two of sub-keys and sub-queries, got 3, 12"),
        ({"query_keep": 0.3}, 64, r"powers of two of sub-keys and sub-queries, got 16, 16 \(5 kept\)"),
        ({"block_size": 256, "key_sub_block": 1}, 64, "at most 128 sub-keys"),
        ({}, 8, "an even number of 16 to 256 coordinates, got 8"),
        ({}, 33, "an even number of 16 to 256 coordinates, got 33"),
        ({}, 512, "an even number of 16 to 256 coordinates, got 512"),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "cute"])
def test_an_explicit_choice_never_falls_back(changes: dict[str, Any], width: int, reason: str, impl: str) -> None:
    x = torch.zeros(1, 2, 64, 64, device=DEVICE)
    config = replace(CHOICE, **changes)
    with pytest.raises(ValueError, match=f"impl '{impl}' cannot run this call: .*{reason}"):
        sketches_with_triton(impl, x, config, width)
    assert not sketches_with_triton("reference", x, config, width)
    assert not sketches_with_triton("auto", x, config, width)


def test_vectors_must_be_contiguous() -> None:
    x = torch.zeros(1, 2, 64, 64, device=DEVICE).transpose(2, 3)
    with pytest.raises(ValueError, match="the last dimension of query and key must be contiguous"):
        sketches_with_triton("triton", x, CHOICE, 64)
    assert not sketches_with_triton("auto", x, CHOICE, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_score": "mass"},
        {"key_sketch_bits": 16},
        {"reduce": "mean"},
        {"head_mode": "mean"},
        {"use_srht": False},
    ],
    ids=str,
)
def test_other_rules_are_the_references_everywhere(changes: dict[str, Any]) -> None:
    """They have no kernel: an explicit choice then holds for the attention, and scores are the same bits."""
    x = torch.zeros(1, 2, 64, 64, device=DEVICE)
    config = replace(CHOICE, block_size=16, top_k_blocks=3, **changes)
    assert not sketches_with_triton("triton", x, config, 64)
    query, key, value = (y.to(DEVICE) for y in qkv(1, 4, 2, 100, 32))
    found, expected = (sketch_walk_attention(query, key, value, config, impl=impl) for impl in ("triton", "reference"))
    assert (found.impl, expected.impl) == ("triton", "reference")
    assert torch.equal(found.walk, expected.walk)
    assert torch.equal(found.selection.indices, expected.selection.indices)


@pytest.mark.parametrize("impl", ["triton", "cute"])
def test_the_default_rule_has_kernels(impl: str) -> None:
    x = torch.zeros(1, 2, 64, 128, device=DEVICE)
    assert sketches_with_triton(impl, x, CHOICE, 64)
    assert sketches_with_triton("auto", x, CHOICE, 64) is (DEVICE == "cuda")
    for block_size in (16, 32, 64, 128):
        for width in (16, 32, 48, 64, 80, 96, 128, 256):
            assert unsupported(block_size, 4, 4, max(1, block_size // 8), width) is None


@pytest.mark.parametrize(("impl", "kernel"), [("triton", True), ("reference", False)])
def test_rows_of_dense_calls_keep_to_the_choice(monkeypatch: pytest.MonkeyPatch, impl: str, kernel: bool) -> None:
    """Both calls of the kernels are counted: keys, and scores of the rows that a walk needs."""
    calls: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(kernels, name)

        def counted(*args: Any, **keywords: Any) -> Any:
            calls.append(name)
            return original(*args, **keywords)

        return counted

    for name in ("sketch_keys", "peak_scores"):
        monkeypatch.setattr(kernels, name, counting(name))
    call = Call((1, 4, 2, 100, 0, 32, None, {"block_size": 32, "walk": "damped"}))
    absorb_call(LayerSketch(call.config), call.query, call.key, call.layout, 32**-0.5, impl=impl)
    assert calls == (["sketch_keys", "peak_scores"] if kernel else [])


@pytest.mark.parametrize("compiling", [False, True])
def test_auto_leaves_compiled_graphs_to_torch(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch looks at the device, which a graph that is being compiled cannot hold; an explicit choice stands."""
    on_gpu = SimpleNamespace(is_cuda=True, stride=lambda dim: 1, dtype=torch.float32, shape=(1, 1, 1, 8))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for impl, expected in (("auto", not compiling), ("triton", True), ("reference", False)):
        assert sketches_with_triton(impl, on_gpu, SketchWalkConfig(), 64) is expected  # type: ignore[arg-type]
        assert kernels.selects_with_triton(impl, on_gpu) is expected  # type: ignore[arg-type]
