"""The invariants of the design, one by one, on the module and the function that everything else is built on."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import restatement
from sketch_walk import HadamardTransform, SketchState, SketchWalkAttention, SketchWalkConfig, sketch_walk_attention
from sketch_walk.hadamard import sketch_matrix
from sketch_walk.sketch import payload_size
from sketch_walk.state import ROLLBACK, LayerSketch
from tensors import QKV, block_mask, layers, qkv

SIZE = 32
HEADS, KV_HEADS, DIM = 6, 2, 32
SPARSE = SketchWalkConfig(block_size=SIZE, density=0.3, skip_first_n_layers=0, dense_below=0)
WALKING = replace(SPARSE, walk="damped")
VARIANTS = {
    "default": SPARSE,
    "damped": WALKING,
    "mass-scores": replace(SPARSE, block_score="mass"),
    "mass-scores-damped": replace(WALKING, block_score="mass"),
    "mean": replace(SPARSE, head_mode="mean", walk="product"),
    "per-kv-head": replace(WALKING, head_mode="per_kv_head", reduce="mean"),
    "few-queries": replace(SPARSE, head_mode="per_kv_head", query_keep=0.2, key_sub_block=2),
    "sixteen-bits": replace(WALKING, key_sketch_bits=16, walk_degree=2, sketch_dim=16),
    "coarse": replace(WALKING, query_sub_block=16, key_sub_block=32, local_blocks=2),
    "mass": replace(SPARSE, density=None, mass=0.6, sink_blocks=2),
    "correction": replace(SPARSE, mean_correction=True),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
walking = pytest.mark.parametrize(
    "config", [c for c in VARIANTS.values() if c.uses_walk], ids=[n for n, c in VARIANTS.items() if c.uses_walk]
)


class Run:
    """Layers over one batch, fed call by call, as a model would."""

    def __init__(self, config: SketchWalkConfig, stack: list[QKV], state: SketchState | None = None) -> None:
        self.attention = SketchWalkAttention(config, stack[0][0].shape[3])
        self.stack = stack
        self.state = SketchState(config) if state is None else state
        self.outputs: list[list[Tensor]] = [[] for _ in stack]
        self.selected: list[list[Tensor]] = [[] for _ in stack]

    def call(self, start: int, stop: int, mask: Tensor | None = None) -> Run:
        for layer, (query, key, value) in enumerate(self.stack):
            now = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
            output, selected = self.attention(*now, layer, attention_mask=mask, state=self.state)
            assert selected is not None
            self.outputs[layer].append(output)
            self.selected[layer].append(selected)
        return self

    def calls(self, *cuts: int) -> Run:
        for start, stop in pairwise(cuts):
            self.call(start, stop)
        return self

    def blocks(self, layer: int, total: int) -> Tensor:
        """Bool (batch, [heads,] rows, total) over all calls; calls must have been block-aligned."""
        return torch.cat([block_mask(indices, total) for indices in self.selected[layer]], -2)


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def assert_same_state(actual: SketchState, expected: SketchState, tokens: int) -> None:
    """Key sketches and transition rows of the complete blocks, to rounding.

    The keys are bitwise the same however they arrive, so 8-bit codes are too.
    """
    assert actual.layers.keys() == expected.layers.keys()
    for index, wanted in expected.layers.items():
        config, found = wanted.config, actual.layers[index]
        complete = tokens // config.block_size
        codes, scales = found.read_keys(complete)
        wanted_codes, wanted_scales = wanted.read_keys(complete)
        assert codes.shape[2] == complete
        torch.testing.assert_close(codes, wanted_codes, atol=0, rtol=0)
        torch.testing.assert_close(scales, wanted_scales, atol=0, rtol=1e-6)
        if config.uses_walk:
            # exp(4sδ) with δ of float32 products (see test_against_restatement): below 1e-3 for these shapes.
            torch.testing.assert_close(found.read_rows(complete), wanted.read_rows(complete), atol=1e-6, rtol=1e-3)


# 1. With budget for everything, output equals dense attention.


@pytest.mark.parametrize("tokens", [1, 5, 31, 32, 33, 64, 111, 200])
@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head", "mean"])
@pytest.mark.parametrize("budget", [{"density": 1.0}, {"top_k_blocks": 99}, {"mass": 1.0}])
def test_1_full_budget_is_dense(tokens: int, head_mode: str, budget: dict[str, Any]) -> None:
    config = SketchWalkConfig(
        block_size=SIZE, head_mode=head_mode, skip_first_n_layers=0, dense_below=0, mean_correction=True, **budget
    )
    stack = layers(2, 2, HEADS, KV_HEADS, tokens, DIM)
    run = Run(config, stack).call(0, tokens)
    blocks = -(-tokens // SIZE)
    for layer, (query, key, value) in enumerate(stack):
        torch.testing.assert_close(run.outputs[layer][0], dense(query, key, value), atol=1e-5, rtol=0)
        if config.mass is None:
            expected = torch.ones(blocks, blocks, dtype=torch.bool).tril()
            chosen = run.blocks(layer, blocks)
            assert (chosen == expected).all()


@pytest.mark.parametrize("tokens", [63, 111, 500])
def test_1_full_budget_in_bfloat16(tokens: int) -> None:
    config = replace(SPARSE, density=1.0)
    query, key, value = qkv(2, HEADS, KV_HEADS, tokens, 64, dtype=torch.bfloat16)
    exact = dense(query.double(), key.double(), value.double())
    output, _ = SketchWalkAttention(config, 64)(query, key, value, 0)
    assert output.dtype == torch.bfloat16
    error, dense_error = ((x.double() - exact).abs().max() for x in (output, dense(query, key, value)))
    assert error <= 2 * dense_error


def test_1_decode_at_full_budget_is_dense() -> None:
    stack = layers(2, 2, HEADS, KV_HEADS, 100, DIM)
    run = Run(replace(SPARSE, density=1.0), stack).calls(0, 90, *range(91, 101))
    for layer, (query, key, value) in enumerate(stack):
        torch.testing.assert_close(torch.cat(run.outputs[layer], 2), dense(query, key, value), atol=1e-5, rtol=0)


# 2. Later tokens.


@variants
@pytest.mark.parametrize("changed", [0, 31, 32, 70, 149])
def test_2_a_changed_token_leaves_earlier_blocks_alone(config: SketchWalkConfig, changed: int) -> None:
    stack = layers(3, 1, HEADS, KV_HEADS, 150, DIM)
    other = [tuple(x.clone() for x in layer) for layer in stack]
    for layer in other:
        for x in layer:
            x[:, :, changed] = 5 * torch.randn(x[:, :, changed].shape, generator=torch.Generator().manual_seed(changed))
    before, after = Run(config, stack).call(0, 150), Run(config, other).call(0, 150)
    border = changed // SIZE * SIZE
    moved = False
    for layer in range(3):
        a, b = before.outputs[layer][0], after.outputs[layer][0]
        assert (a[:, :, :border] == b[:, :, :border]).all()
        moved = moved or bool((a[:, :, changed:] != b[:, :, changed:]).any())
    assert moved


@variants
def test_2_values_of_later_tokens_never_enter(config: SketchWalkConfig) -> None:
    """Values have no part in the selection: one at token t may reach t and later queries only."""
    query, key, value = qkv(1, HEADS, KV_HEADS, 150, DIM)
    clean, _ = SketchWalkAttention(config, DIM)(query, key, value, 0)
    for changed in (3, 40, 149):
        poisoned = value.clone()
        poisoned[:, :, changed] = 1e4
        output, _ = SketchWalkAttention(config, DIM)(query, key, poisoned, 0)
        assert (output[:, :, :changed] == clean[:, :, :changed]).all()
        assert (output[:, :, changed] != clean[:, :, changed]).any()


def test_2_logits_of_later_tokens_never_enter() -> None:
    """Inside the diagonal block a key may sway the selection, never the softmax: with full budget nothing moves."""
    query, key, value = qkv(1, HEADS, KV_HEADS, 150, DIM)
    config = replace(SPARSE, density=1.0)
    clean, _ = SketchWalkAttention(config, DIM)(query, key, value, 0)
    loud = key.clone()
    loud[:, :, 100] *= 100
    output, _ = SketchWalkAttention(config, DIM)(query, loud, value, 0)
    assert (output[:, :, :100] == clean[:, :, :100]).all()
    assert (output[:, :, 100:] != clean[:, :, 100:]).any()


# 3. Padding.


LENGTHS = [150, 111, 63, 1]


def ragged(stack: list[QKV], side: str, width: int, fill: float) -> tuple[list[QKV], Tensor]:
    """Batch of the first LENGTHS[i] tokens of sequence i, padded with `fill`; and its mask."""
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.bool)
    padded = []
    for tensors in stack:
        layer = []
        for x in tensors:
            out = torch.full((*x.shape[:2], width, x.shape[3]), fill, dtype=x.dtype)
            for i, n in enumerate(LENGTHS):
                at = slice(width - n, None) if side == "left" else slice(0, n)
                out[i, :, at] = x[i, :, :n]
                mask[i, at] = True
            layer.append(out)
        padded.append((layer[0], layer[1], layer[2]))
    return padded, mask


@variants
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [0.0, 1e4, float("nan")], ids=["zero", "huge", "nan"])
def test_3_padded_batch_is_each_sequence_alone(config: SketchWalkConfig, side: str, fill: float) -> None:
    stack = layers(3, len(LENGTHS), HEADS, KV_HEADS, 150, DIM)
    padded, mask = ragged(stack, side, 160, fill)
    together = Run(config, padded).call(0, 160, mask=mask)
    for i, n in enumerate(LENGTHS):
        alone = Run(config, [(q[i : i + 1, :, :n], k[i : i + 1, :, :n], v[i : i + 1, :, :n]) for q, k, v in stack])
        alone.call(0, n)
        blocks = -(-n // SIZE)
        for layer in range(3):
            chosen = block_mask(together.selected[layer][0][i], 160 // SIZE)
            assert (chosen[..., :blocks, :blocks] == alone.blocks(layer, blocks)[0]).all()
            assert not chosen[..., blocks:, :].any()
            assert not chosen[..., blocks:].any()
            output = together.outputs[layer][0][i]
            real = output[:, mask[i]]
            torch.testing.assert_close(real, alone.outputs[layer][0][0], atol=1e-5, rtol=0)
            assert (output[:, ~mask[i]] == 0).all()


@variants
def test_3_padded_batch_decodes_as_each_sequence_alone(config: SketchWalkConfig) -> None:
    """Left padding, poisoned, and a block of steps: across a block border for every sequence."""
    steps = 33
    stack = layers(2, len(LENGTHS), HEADS, KV_HEADS, 150 + steps, DIM)
    padded = []
    mask = torch.zeros(len(LENGTHS), 160 + steps, dtype=torch.bool)
    for tensors in stack:
        layer = [torch.full((*x.shape[:2], 160 + steps, DIM), float("nan")) for x in tensors]
        for i, n in enumerate(LENGTHS):
            for out, x in zip(layer, tensors, strict=True):
                out[i, :, 160 - n :] = x[i, :, : n + steps]
            mask[i, 160 - n :] = True
        padded.append((layer[0], layer[1], layer[2]))
    together = Run(config, padded).call(0, 160, mask=mask[:, :160])
    for step in range(160, 160 + steps):
        together.call(step, step + 1, mask=mask[:, : step + 1])
    for i, n in enumerate(LENGTHS):
        alone = Run(config, [(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for q, k, v in stack])
        alone.calls(0, n, *range(n + 1, n + steps + 1))
        for layer in range(2):
            for mine, theirs in zip(together.selected[layer][1:], alone.selected[layer][1:], strict=True):
                assert (block_mask(mine[i], 10) == block_mask(theirs[0], 10)).all()
            mine, theirs = (torch.cat(run.outputs[layer][1:], 2) for run in (together, alone))
            torch.testing.assert_close(mine[i], theirs[0], atol=1e-5, rtol=0)


def test_3_batch_composition_does_not_matter() -> None:
    stack = layers(2, 4, HEADS, KV_HEADS, 111, DIM)
    together = Run(SPARSE, stack).call(0, 111)
    for i in range(4):
        alone = Run(SPARSE, [(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for q, k, v in stack]).call(0, 111)
        for layer in range(2):
            assert (together.selected[layer][0][i] == alone.selected[layer][0][0]).all()


# 4. Chunks.


@variants
def test_4_aligned_chunks_select_the_same(config: SketchWalkConfig) -> None:
    stack = layers(3, 2, HEADS, KV_HEADS, 150, DIM)
    whole = Run(config, stack).calls(0, 150)
    chunks = Run(config, stack).calls(0, SIZE, 3 * SIZE, 4 * SIZE, 150)
    for layer in range(3):
        assert (chunks.blocks(layer, 5) == whole.blocks(layer, 5)).all()
        torch.testing.assert_close(torch.cat(chunks.outputs[layer], 2), whole.outputs[layer][0], atol=1e-5, rtol=0)
    assert_same_state(chunks.state, whole.state, 150)


@variants
@pytest.mark.parametrize("cuts", [(0, 50, 70, 133, 150), (0, 31, 33, 65, 127, 129, 150), (0, 5, 6, 150)])
def test_4_unaligned_chunks_leave_the_same_state(config: SketchWalkConfig, cuts: tuple[int, ...]) -> None:
    stack = layers(3, 2, HEADS, KV_HEADS, 150, DIM)
    assert_same_state(Run(config, stack).calls(*cuts).state, Run(config, stack).calls(0, 150).state, 150)


@pytest.mark.parametrize("cuts", [(0, 50, 70, 133, 150), (0, 1, 2, 3, 150)])
def test_4_unaligned_chunks_at_full_budget(cuts: tuple[int, ...]) -> None:
    stack = layers(2, 2, HEADS, KV_HEADS, 150, DIM)
    run = Run(replace(SPARSE, density=1.0), stack).calls(*cuts)
    for layer, (query, key, value) in enumerate(stack):
        torch.testing.assert_close(torch.cat(run.outputs[layer], 2), dense(query, key, value), atol=1e-5, rtol=0)


# 5. Prefill and decode.


@variants
@pytest.mark.parametrize("prompt", [1, 50, 64, 95])
def test_5_decode_leaves_the_state_of_prefill(config: SketchWalkConfig, prompt: int) -> None:
    stack = layers(3, 2, HEADS, KV_HEADS, 135, DIM)
    stepped = Run(config, stack).calls(0, prompt, *range(prompt + 1, 136))
    assert_same_state(stepped.state, Run(config, stack).calls(0, 135).state, 135)


@walking
def test_5_decode_walks_as_the_restatement(config: SketchWalkConfig) -> None:
    """A decode step's own query makes its row; earlier rows are those of complete blocks."""
    stack = layers(3, 1, HEADS, KV_HEADS, 110, DIM)
    run = Run(config, stack).calls(0, 100, *range(101, 111))
    for step in range(10):
        pairs = [(q[0].double(), k[0].double()) for q, k, _ in stack]
        calls = restatement.run_call(pairs, config, 100 + step, 101 + step)
        for layer, call in enumerate(calls):
            chosen = block_mask(run.selected[layer][1 + step][0], 4)
            assert (chosen.view_as(call.chosen) == call.chosen).all()


# 6. Crop, reorder, repeat, reset.


@variants
@pytest.mark.parametrize(("back", "end"), [(1, 96), (5, 100), (20, 115), (32, 100), (32, 127)])
def test_6_crop_then_other_tokens(config: SketchWalkConfig, back: int, end: int) -> None:
    """Tokens are taken back, also across a block border, and others take their place.

    From 127 back to 95 is the farthest that 32 tokens can reach: all but one token of a block.
    """
    assert back <= ROLLBACK
    first = layers(2, 2, HEADS, KV_HEADS, 130, DIM)
    second = [tuple(x.clone() for x in layer) for layer in first]
    for layer, other in zip(second, layers(2, 2, HEADS, KV_HEADS, 130, DIM, seed=9), strict=True):
        for x, y in zip(layer, other, strict=True):
            x[:, :, end - back :] = y[:, :, end - back :]
    run = Run(config, first).calls(0, 60, 90, *range(91, end + 1))
    run.state.crop(end - back)
    run.stack = [(q, k, v) for q, k, v in second]
    run.calls(end - back, *range(end - back + 1, 131))
    straight = Run(config, run.stack).calls(0, end - back, *range(end - back + 1, 131))
    assert_same_state(run.state, straight.state, 130)
    for layer in range(2):
        mine, theirs = run.selected[layer][-(130 - end) :], straight.selected[layer][-(130 - end) :]
        assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))


@variants
def test_6_reorder_follows_the_beams(config: SketchWalkConfig) -> None:
    stack = layers(2, 4, HEADS, KV_HEADS, 110, DIM)
    beams = torch.tensor([2, 2, 0, 3])
    run = Run(config, stack).calls(0, 50, *range(51, 81))
    run.state.reorder(beams)
    run.stack = [(q[beams], k[beams], v[beams]) for q, k, v in stack]
    run.calls(*range(80, 111))
    straight = Run(config, run.stack).calls(0, 50, *range(51, 111))
    assert_same_state(run.state, straight.state, 110)
    for layer in range(2):
        for mine, theirs in zip(run.selected[layer][-30:], straight.selected[layer][-30:], strict=True):
            assert (mine == theirs).all()


@variants
def test_6_repeat_copies_each_sequence(config: SketchWalkConfig) -> None:
    stack = layers(2, 2, HEADS, KV_HEADS, 110, DIM)
    run = Run(config, stack).call(0, 75)
    run.state.repeat(3)
    run.stack = [(q.repeat_interleave(3, 0), k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)) for q, k, v in stack]
    run.calls(*range(75, 111))
    straight = Run(config, run.stack).calls(0, 75, *range(76, 111))
    assert_same_state(run.state, straight.state, 110)
    for layer in range(2):
        assert all((a == b).all() for a, b in zip(run.selected[layer][1:], straight.selected[layer][1:], strict=True))


@variants
def test_6_reset_forgets_everything(config: SketchWalkConfig) -> None:
    other, stack = layers(2, 3, HEADS, KV_HEADS, 90, DIM, seed=4), layers(2, 2, HEADS, KV_HEADS, 70, DIM)
    state = Run(config, other).calls(0, 80, *range(81, 91)).state
    state.reset()
    again, fresh = Run(config, stack, state).calls(0, 50, 70), Run(config, stack).calls(0, 50, 70)
    assert_same_state(again.state, fresh.state, 70)
    for layer in range(2):
        assert all((a == b).all() for a, b in zip(again.selected[layer], fresh.selected[layer], strict=True))
        assert all((a == b).all() for a, b in zip(again.outputs[layer], fresh.outputs[layer], strict=True))


def test_6_fixed_capacity_keeps_its_addresses_through_a_reset() -> None:
    """A compiled graph holds the buffers' addresses; what an earlier sequence left in them must not matter."""
    stack = layers(1, 2, HEADS, KV_HEADS, 120, DIM)
    query, key, value = stack[0]
    sketch = LayerSketch(WALKING, capacity=128)
    sketch_walk_attention(query * 3, key.flip(2), value, WALKING, state=sketch)
    buffers = {name: getattr(sketch, name).data_ptr() for name in ("codes", "scales", "rows", "ring", "ring_ranks")}
    sketch.reset()
    fresh = LayerSketch(WALKING)
    for start, stop in pairwise([0, 70, 71, 72, 97, 120]):
        now = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
        mine, theirs = (sketch_walk_attention(*now, WALKING, state=s) for s in (sketch, fresh))
        assert (mine.selection.indices == theirs.selection.indices).all()
    torch.testing.assert_close(sketch.read_rows(3), fresh.read_rows(3), atol=0, rtol=0)
    assert buffers == {name: getattr(sketch, name).data_ptr() for name in buffers}


# 7. Implementations against the reference: `test_against_restatement` holds the reference itself to float64.


def test_7_every_implementation_agrees_with_the_reference() -> None:
    from sketch_walk.kernels import IMPLEMENTATIONS, available

    stack = layers(2, 2, HEADS, KV_HEADS, 111, DIM)
    usable = [impl for impl in IMPLEMENTATIONS if impl == "auto" or available()[impl] is None]
    assert {"auto", "reference"} <= set(usable)
    for query, key, value in stack:
        expected = sketch_walk_attention(query, key, value, SPARSE, impl="reference")
        for impl in usable:
            actual = sketch_walk_attention(query, key, value, SPARSE, impl=impl)
            assert (actual.selection.indices == expected.selection.indices).all()
            torch.testing.assert_close(actual.output, expected.output, atol=1e-5, rtol=0)


# 8. Determinism.


@pytest.mark.parametrize(("head_dim", "sketch_dim"), [(64, 64), (64, 32), (80, 48), (128, 128)])
def test_8_signs_and_coordinates_do_not_depend_on_dtype_or_global_seed(head_dim: int, sketch_dim: int) -> None:
    torch.manual_seed(1)
    a = HadamardTransform(head_dim, sketch_dim, seed=3)
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    try:
        b = HadamardTransform(head_dim, sketch_dim, seed=3).to(torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (a.signs == b.signs).all()
    assert (a.coordinates == b.coordinates).all()
    assert a.signs.dtype == b.signs.dtype
    other = HadamardTransform(head_dim, sketch_dim, seed=4)
    assert (a.signs != other.signs).any()
    state = torch.get_rng_state()
    HadamardTransform(head_dim, sketch_dim, seed=3)
    assert (torch.get_rng_state() == state).all(), "drawing must leave the global generator alone"


def test_8_matrix_is_the_transform() -> None:
    for head_dim, sketch_dim in ((64, 32), (80, 48), (96, 96)):
        matrix = sketch_matrix(head_dim, sketch_dim, 42, torch.device("cpu"))
        x = torch.randn(5, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(x @ matrix.double(), HadamardTransform(head_dim, sketch_dim)(x), atol=1e-6, rtol=0)


@variants
def test_8_two_runs_are_identical(config: SketchWalkConfig) -> None:
    stack = layers(3, 2, HEADS, KV_HEADS, 111, DIM, dtype=torch.bfloat16)
    first, second = (Run(config, stack).calls(0, 100, *range(101, 112)) for _ in range(2))
    for layer in range(3):
        assert all((a == b).all() for a, b in zip(first.selected[layer], second.selected[layer], strict=True))
        assert all((a == b).all() for a, b in zip(first.outputs[layer], second.outputs[layer], strict=True))


# 9. Memory.


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the storages made inside the context, and the largest tensor among them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0
        self.most_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.track(tensor.untyped_storage(), tensor, inputs)
        return result

    def track(self, storage: Any, tensor: Tensor, inputs: set[int]) -> None:
        address = storage._cdata
        if address in self.live or address in inputs:
            return
        self.most_elements = max(self.most_elements, storage.nbytes() // tensor.element_size())
        self.live[address] = storage.nbytes()
        weakref.finalize(storage, self.live.pop, address, None)
        self.peak = max(self.peak, sum(self.live.values()))


def test_9_live_bytes_counts() -> None:
    """The meter itself: a freed tensor no longer counts, a view never does."""
    with LiveBytes() as meter:
        a = torch.ones(1000)
        a.view(10, 100)
        del a
        b = torch.ones(500) + 1
    assert meter.peak == 4000
    assert list(meter.live.values()) == [2000]
    assert meter.most_elements == 1000
    assert b.numel() == 500


TOKENS = 8000


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"key_sub_block": 1},
        {"query_sub_block": 1},
        {"head_mode": "mean", "walk": "product"},
        {"density": 0.5},
        {"mean_correction": True},
        {"head_mode": "per_kv_head"},
        {"walk": "damped"},
        {"block_score": "mass"},
    ],
    ids=["default", "fine-keys", "fine-queries", "averaged", "half", "corrected", "per-head", "damped", "mass-scores"],
)
def test_9_peak_memory_of_a_prompt(changes: dict[str, Any]) -> None:
    config = replace(SketchWalkConfig(density=0.2, min_blocks=4, skip_first_n_layers=0), **changes)
    query, key, value = qkv(1, 9, 3, TOKENS, 64, dtype=torch.bfloat16)
    state = LayerSketch(config)
    with torch.no_grad(), LiveBytes() as meter:
        result = sketch_walk_attention(query, key, value, config, state=state)
    kept = result.output.untyped_storage().nbytes() + sum(state.nbytes().values())
    extra = meter.peak - kept
    assert extra < (query.nbytes + key.nbytes + value.nbytes) / 2, f"{extra / 2**20:.1f} MiB"
    assert meter.most_elements < TOKENS * TOKENS / 8


def test_9_peak_memory_of_a_decode_step() -> None:
    config = SketchWalkConfig(density=0.2, min_blocks=4, skip_first_n_layers=0)
    query, key, value = qkv(1, 9, 3, TOKENS + 1, 64, dtype=torch.bfloat16)
    state = LayerSketch(config)
    with torch.no_grad():
        sketch_walk_attention(query[:, :, :TOKENS], key[:, :, :TOKENS], value[:, :, :TOKENS], config, state=state)
        with LiveBytes() as meter:
            sketch_walk_attention(query[:, :, TOKENS:], key, value, config, state=state)
    assert meter.peak < (query.nbytes + key.nbytes + value.nbytes) / 2
    assert meter.most_elements <= TOKENS * 64


@pytest.mark.parametrize(("walk", "most"), [("none", 0.068), ("damped", 0.14)])
@pytest.mark.parametrize("tokens", [8000, 65536])
def test_9_persistent_state_is_a_small_share_of_the_cache(tokens: int, walk: str, most: float) -> None:
    """9/3 heads of 64 in bfloat16; at 64K tokens too the state is a few MB per layer, as promised.

    A byte for each coordinate of one sketched key in four is a sixteenth of keys and values of two bytes each; means of
    blocks of 16 sub-keys are a sixteenth of that.
    """
    config = SketchWalkConfig(skip_first_n_layers=0, walk=walk)
    sketch = LayerSketch(config)
    sketch.allocate(1, (3, payload_size(64, config)), (9, 64), torch.bfloat16, torch.device("cpu"))
    sketch.reserve(tokens)
    if tokens == 8000:
        used = LayerSketch(config)
        query, key, value = qkv(1, 9, 3, tokens, 64, dtype=torch.bfloat16)
        for now in (slice(0, tokens - 1), slice(tokens - 1, tokens)):
            seen = slice(0, now.stop)
            sketch_walk_attention(query[:, :, now], key[:, :, seen], value[:, :, seen], config, state=used)
        assert used.nbytes() == sketch.nbytes()
    cache = 2 * 3 * tokens * 64 * 2
    assert cache / 16 < sum(sketch.nbytes().values()) <= most * cache
