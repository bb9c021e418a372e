"""What a state holds, how it grows, and what each cache operation does to its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sketch_walk import HadamardTransform, SketchState, SketchWalkAttention, SketchWalkConfig, sketch_walk_attention
from sketch_walk.layout import make_layout
from sketch_walk.scoring import absorb_call, absorb_keys
from sketch_walk.sketch import Sketch, quantise_keys
from sketch_walk.state import LAST_TOKENS, ROLLBACK, LayerSketch, packed_size
from sketch_walk.walk import transition_rows
from tensors import qkv

SIZE = 16
CONFIG = SketchWalkConfig(block_size=SIZE, top_k_blocks=3, skip_first_n_layers=0, walk="damped")


def fed(tokens: int, config: SketchWalkConfig = CONFIG, capacity: int | None = None, batch: int = 2) -> LayerSketch:
    """A layer's sketch after one prompt."""
    sketch = LayerSketch(config, capacity)
    sketch_walk_attention(*qkv(batch, 4, 2, tokens, 32), config, state=sketch)
    return sketch


def buffers(sketch: LayerSketch) -> dict[str, Tensor | None]:
    return {name: getattr(sketch, name) for name in ("codes", "scales", "memory", "rows", "ring", "ring_ranks")}


@pytest.mark.parametrize("blocks", [0, 1, 2, 7])
def test_packed_size(blocks: int) -> None:
    assert packed_size(blocks) == torch.ones(blocks, blocks).tril().sum()


def test_parts_of_a_state_with_a_walk() -> None:
    sketch = fed(50)
    assert sketch.num_blocks == 4
    codes, scales = sketch.read_keys(4)
    # Four sub-keys to a block and their mean, a byte for each of 32 coordinates.
    assert codes.shape == (2, 2, 4, 5 * 32)
    assert codes.dtype == torch.uint8
    assert scales is not None
    assert scales.shape == (2, 2, 4, 2)
    assert scales.dtype == torch.float32
    assert sketch.read_rows(4).shape == (2, 1, 4, 4)
    assert sketch.ring is not None
    assert sketch.ring.shape == (2, 4, SIZE + ROLLBACK + 1, 32)


def stored_codes(sketch: LayerSketch, blocks: int, width: int) -> tuple[Tensor, Tensor]:
    """Codes and outlines from the documented layout: mean codes plus 128, then four planes of two bits.

    Four coordinates to a byte of a plane, a quarter of the width apart; the first plane tells the side of the mean and
    whether beyond the bound, the others how far. Within the bound no distance reaches it: those that do are 64 more.
    """
    codes, scales = sketch.read_keys(blocks)
    assert scales is not None
    quarter, sub_keys = -(-width // 4), SIZE // sketch.config.key_sub_block
    mean = codes[:, :, :, None, :width].int() - 128
    planes = codes[..., 4 * quarter :].int().view(*codes.shape[:3], 4, sub_keys, quarter)
    bits = torch.cat([planes // 4**i % 4 for i in range(4)], -1)[..., :width]
    side, away = bits[:, :, :, 0], 16 * bits[:, :, :, 1] + 4 * bits[:, :, :, 2] + bits[:, :, :, 3]
    bound = scales[..., 1].int()[..., None, None]
    away = torch.where((side == 0) | (side == 3), away + bound, torch.where(away < bound, away, away + 64))
    return mean + torch.where(side < 2, -1 - away, away), mean + (side - 1.5) * bound


@pytest.mark.parametrize("width", [32, 17, 4])
def test_codes_are_multiples_of_the_blocks_step(width: int) -> None:
    """One step per block and head: 3.2 root mean squares are 128 steps. Outlines tell the side and whether beyond."""
    config = replace(CONFIG, sketch_dim=width, salience=0.0)
    query, key, value = qkv(2, 4, 2, 50, 32)
    sketch = LayerSketch(config)
    sketch_walk_attention(query, key, value, config, state=sketch)
    codes, outlines = stored_codes(sketch, 4, width)
    scales = sketch.read_keys(4)[1]
    assert scales is not None
    transform = HadamardTransform(32, width)
    means = [transform(run.mean(2).double()) for run in key.split(4, 2)]
    for block in range(4):
        sub_keys = torch.stack(means[4 * block : 4 * block + 4], 2)
        step = 3.2 / 128 * sub_keys.square().mean((2, 3)).sqrt()
        torch.testing.assert_close(scales[:, :, block, 0].double(), step, rtol=1e-5, atol=0)
        expected = (sub_keys / step[..., None, None]).clamp(-128, 127)
        # The last block has one sub-key of two tokens; nothing is known of the others.
        found, seen = (x[:, :, block, : sub_keys.shape[2]] for x in (codes, outlines))
        mean = (found.double().mean(2, keepdim=True) + 0.5).floor()
        bound = scales[:, :, block, 1, None, None].double()
        # What lies 128 steps from the mean is clipped.
        expected = torch.maximum(torch.minimum(expected, mean + 127), mean - 128)
        assert (found - expected).abs().max() <= 0.5001
        spread = (found - mean).square().mean((2, 3), keepdim=True).sqrt()
        assert (bound - spread.clamp(min=1)).abs().max() <= 1.5
        apart = found - mean
        away = torch.where(apart >= 0, apart, -1 - apart) - bound
        level = torch.where((away >= 0) & (away < 64), 1.5, 0.5) * torch.where(apart >= 0, 1, -1)
        torch.testing.assert_close(seen.double(), mean + level * bound)


@pytest.mark.parametrize("width", [32, 17])
def test_no_code_is_lost_up_to_127_steps_from_the_mean(width: int) -> None:
    """The bytes of one within the bound that its distance rules out tell of those far beyond it."""
    sketch = torch.randn(50, 4, width, generator=torch.Generator().manual_seed(3)) * 0.2 + 1.0
    sketch[:25, 1, 5] *= -2.5
    config = replace(CONFIG, key_sub_block=4)
    stored = quantise_keys(sketch, torch.ones(50, 4, dtype=torch.bool), config, torch.float32)
    found, steps = stored.unpack(4, width)
    assert steps is not None
    assert stored.scales is not None
    codes = (sketch / steps[..., None]).round().clamp(-128, 127)
    mean = (codes.mean(1, keepdim=True) + 0.5).floor()
    assert torch.equal(found, codes.clamp(mean - 128, mean + 127))
    far = (codes - mean).abs() > 64 + stored.scales[:, None, 1:]
    assert far[:25].any()
    assert not far[25:].any()


def test_codes_use_their_range_and_clip_what_lies_beyond() -> None:
    query, key, value = qkv(1, 4, 2, 48, 32)
    key[:, :, 4:8] *= 100
    sketch = LayerSketch(replace(CONFIG, use_srht=False))
    sketch_walk_attention(query, key, value, sketch.config, state=sketch)
    codes, outlines = stored_codes(sketch, 3, 32)
    assert codes[:, :, 0].min() == -128
    assert codes[:, :, 0].max() == 127
    assert outlines[:, :, 0, 1].abs().min() > outlines[:, :, 0, [0, 2, 3]].abs().amax(2).median()
    assert codes[:, :, 0, [0, 2, 3]].abs().max() <= 5, "beside a loud sub-key the others of its block lose their digits"
    assert codes[:, :, 1:].abs().amax((2, 3, 4)).min() >= 64


def test_an_open_block_is_sketched_again_from_all_its_keys() -> None:
    query, key, value = qkv(2, 4, 2, 64, 32)
    key[:, :, 40:] *= 10
    sketch = LayerSketch(CONFIG)
    for start, stop in ((0, 40), (40, 41), (41, 46), (46, 64)):
        sketch_walk_attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], CONFIG, state=sketch)
        alone = LayerSketch(CONFIG)
        sketch_walk_attention(query[:, :, :stop], key[:, :, :stop], value[:, :, :stop], CONFIG, state=alone)
        for mine, fresh in zip(sketch.read_keys(-(-stop // SIZE)), alone.read_keys(-(-stop // SIZE)), strict=True):
            assert mine is not None
            assert (mine == fresh).all()


def test_no_walk_keeps_no_rows_and_the_queries_of_a_few_tokens() -> None:
    sketch = fed(50, replace(CONFIG, walk="none"))
    assert sketch.rows is None
    assert sketch.nbytes()["rows"] == 0
    assert sketch.ring is not None
    assert sketch.ring.shape == (2, 4, LAST_TOKENS + 1, 32)
    sketch.looked(50)
    assert sketch.nbytes()["queries"] == 0
    assert fed(50, replace(CONFIG, walk="none", step_memory=0.0)).nbytes()["queries"] == 0


def test_sixteen_bits_keep_the_models_dtype() -> None:
    sketch = fed(50, replace(CONFIG, key_sketch_bits=16))
    assert sketch.scales is None
    assert sketch.codes is not None
    assert sketch.codes.dtype == torch.float32


@pytest.mark.parametrize(
    ("head_mode", "heads", "selections"), [("shared", 2, 1), ("per_kv_head", 2, 2), ("mean", 1, 1)]
)
def test_heads_of_each_mode(head_mode: str, heads: int, selections: int) -> None:
    sketch = fed(50, replace(CONFIG, head_mode=head_mode))
    assert sketch.read_keys(1)[0].shape[1] == heads
    assert sketch.read_rows(1).shape[1] == selections


def test_nbytes_counts_every_buffer() -> None:
    sketch = fed(50)
    held = sum(t.untyped_storage().nbytes() for t in buffers(sketch).values() if t is not None)
    assert sum(sketch.nbytes().values()) == held
    sketch.defer(torch.zeros(2, 4, 7, 32), 7)
    assert sketch.nbytes()["queries"] == fed(50).nbytes()["queries"] + 2 * 4 * 7 * 32 * 4
    state = SketchState(CONFIG)
    state.layers = {0: fed(50), 3: fed(90)}
    for part, size in state.nbytes().items():
        assert size == fed(50).nbytes()[part] + fed(90).nbytes()[part]


def test_growth_keeps_what_was_there_and_rows_start_as_identity() -> None:
    sketch = fed(40)
    codes, rows = sketch.read_keys(2)[0].clone(), sketch.read_rows(2).clone()
    sketch.reserve(200)
    assert sketch.num_blocks == 13
    assert (sketch.read_keys(2)[0] == codes).all()
    grown = sketch.read_rows(13)
    assert (grown[..., :2, :2] == rows).all()
    assert (grown[..., 2:, :] == torch.eye(13)[2:]).all()


def test_reserving_less_changes_nothing() -> None:
    sketch = fed(100)
    before = {name: t.data_ptr() for name, t in buffers(sketch).items() if t is not None}
    sketch.reserve(10)
    assert {name: t.data_ptr() for name, t in buffers(sketch).items() if t is not None} == before


def test_allocating_twice_keeps_the_first_buffers() -> None:
    sketch = fed(50)
    codes = sketch.codes
    sketch.allocate(7, (1, 1), (1, 1), torch.float64, torch.device("cpu"))
    assert sketch.codes is codes


def test_fixed_capacity_never_reallocates_and_is_a_limit() -> None:
    sketch = fed(50, capacity=64)
    before = {name: t.data_ptr() for name, t in buffers(sketch).items() if t is not None}
    query, key, value = qkv(2, 4, 2, 65, 32)
    sketch_walk_attention(query[:, :, 50:64], key[:, :, :64], value[:, :, :64], CONFIG, state=sketch)
    assert {name: t.data_ptr() for name, t in buffers(sketch).items() if t is not None} == before
    with pytest.raises(ValueError, match="the state holds 64 tokens per sequence, got 65"):
        sketch_walk_attention(query[:, :, 64:], key, value, CONFIG, state=sketch)


def test_incomplete_blocks_write_no_row() -> None:
    sketch = fed(3 * SIZE - 1)
    rows = sketch.read_rows(3)
    assert (rows[..., 2, :] == torch.eye(3)[2]).all()
    assert (rows[..., 1, 0] > 0).all()


def test_rows_never_change_once_written() -> None:
    query, key, value = qkv(1, 4, 2, 130, 32)
    sketch = LayerSketch(CONFIG)
    sketch_walk_attention(query[:, :, :40], key[:, :, :40], value[:, :, :40], CONFIG, state=sketch)
    first = sketch.read_rows(2).clone()
    for stop in range(41, 131):
        now = slice(stop - 1, stop)
        sketch_walk_attention(query[:, :, now], key[:, :, :stop], value[:, :, :stop], CONFIG, state=sketch)
    assert (sketch.read_rows(2) == first).all()


def test_ring_holds_the_last_queries() -> None:
    query, key, value = qkv(2, 4, 2, 130, 32)
    sketch = LayerSketch(CONFIG)
    sketch_walk_attention(query, key, value, CONFIG, state=sketch)
    rank = torch.arange(130).expand(2, -1)
    queries, kept = sketch.read_queries(rank)
    assert kept.sum(1).tolist() == [SIZE + ROLLBACK] * 2
    assert kept[:, -(SIZE + ROLLBACK) :].all()
    assert (queries[:, :, -(SIZE + ROLLBACK) :] == query[:, :, -(SIZE + ROLLBACK) :]).all()


def test_a_crop_deeper_than_the_ring_uses_the_queries_seen_since() -> None:
    """Documented: one row of the block that was cropped into is made without its lost queries; the others are right."""
    query, key, value = qkv(1, 4, 2, 160, 32)
    config = replace(CONFIG, reduce="mean", key_sketch_bits=16)
    whole, cropped = SketchState(config), SketchState(config)
    attention = SketchWalkAttention(config, 32)
    attention(query, key, value, 0, state=whole)
    attention(query, key, value, 0, state=cropped)
    cropped.crop(40)
    attention(query[:, :, 40:], key, value, 0, state=cropped)
    a, b = whole.layers[0].read_rows(10), cropped.layers[0].read_rows(10)
    same = torch.isclose(a, b, atol=1e-6, rtol=1e-3).all(-1)[0, 0]
    assert same.tolist() == [True, True, False, *[True] * 7]
    scores = Sketch(config, 32)(query[:, :, 40:48], key[:, :, :48])
    torch.testing.assert_close(b[:, :, 2:3, :3], transition_rows(scores, config), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [-1, -40])
def test_crop_to_less_than_nothing_raises(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"tokens must be at least 0, got {tokens}"):
        fed(50).crop(tokens)


def test_crop_beyond_the_end_changes_nothing() -> None:
    sketch = fed(50)
    sketch.tokens = 50
    sketch.crop(99)
    assert sketch.tokens == 50


def test_crop_forgets_deferred_queries_first() -> None:
    sketch = LayerSketch(CONFIG)
    sketch.tokens = 10
    queries = torch.arange(12.0).view(1, 1, 12, 1)
    sketch.defer(queries[:, :, :5], 15)
    sketch.defer(queries[:, :, 5:], 22)
    sketch.crop(18)
    assert sketch.pending_tokens == 8
    assert sketch.tokens == 10
    taken = sketch.take_pending(18)
    assert taken is not None
    assert taken.flatten().tolist() == list(range(8))
    sketch.defer(queries, 22)
    sketch.crop(9)
    assert sketch.pending_tokens == 0
    assert sketch.tokens == 9


def test_pending_is_taken_whole_or_not_at_all() -> None:
    sketch = LayerSketch(CONFIG)
    sketch.defer(torch.zeros(1, 1, 4, 2), 4)
    assert sketch.take_pending(5) is None
    assert sketch.pending_tokens == 0
    sketch.defer(torch.zeros(1, 1, 4, 2, requires_grad=True), 4)
    taken = sketch.take_pending(3)
    assert taken is not None
    assert taken.shape[2] == 3
    assert not taken.requires_grad
    assert sketch.take_pending(0) is None


def test_deferred_queries_follow_reorder_and_repeat() -> None:
    queries = torch.arange(2.0).view(2, 1, 1, 1)
    unfed = LayerSketch(CONFIG)
    unfed.defer(queries, 1)
    unfed.repeat(2)
    assert unfed.pending[0].flatten().tolist() == [0, 0, 1, 1]
    unfed.reorder(torch.tensor([3, 0]))
    assert unfed.pending[0].flatten().tolist() == [1, 0]
    sketch = fed(20)
    sketch.defer(queries, 21)
    sketch.repeat(2)
    assert sketch.pending[0].flatten().tolist() == [0, 0, 1, 1]
    assert sketch.codes is not None
    assert sketch.codes.shape[0] == 4


def test_without_a_walk_the_last_queries_are_deferred() -> None:
    """Of calls that follow each other, in as many parts as they came, and until they are cropped."""
    sketch = LayerSketch(SketchWalkConfig(block_size=SIZE))
    queries = torch.arange(40.0).view(1, 1, 40, 1).requires_grad_()
    sketch.defer(queries[:, :, :25], 25)
    sketch.defer(queries[:, :, 25:30], 30)
    assert sketch.pending_tokens == LAST_TOKENS
    sketch.crop(28)
    taken = sketch.take_pending(28)
    assert taken is not None
    assert taken.flatten().tolist() == list(range(14, 28))
    assert not taken.requires_grad
    assert sketch.take_pending(28) is None
    sketch.defer(queries[:, :, :4], 4)
    sketch.defer(queries[:, :, 10:12], 12)
    assert sketch.pending_tokens == 2
    assert sketch.take_pending(13) is None


def test_queries_of_cropped_tokens_are_dropped_from_the_ring() -> None:
    """Also when steps, which keep none, take their ranks."""
    query, key, value = qkv(1, 4, 2, 70, 32)
    config = SketchWalkConfig(block_size=SIZE, top_k_blocks=2)
    sketch = LayerSketch(config)
    rank = torch.arange(70).expand(1, -1)

    def call(start: int, stop: int) -> None:
        sketch.crop(start)
        now = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
        sketch_walk_attention(*now, config, state=sketch)
        sketch.tokens = stop

    def kept() -> list[int]:
        return sketch.read_queries(rank)[1].nonzero()[:, 1].tolist()

    call(0, 60)
    assert kept() == list(range(44, 60))
    call(60, 61)
    assert sketch.ring is None
    call(61, 66)
    call(63, 64)
    assert kept() == [61, 62]
    call(64, 67)
    assert kept() == [61, 62, 64, 65, 66]


def test_reorder_moves_every_buffer() -> None:
    sketch = fed(100, batch=3)
    before = {name: t.clone() for name, t in buffers(sketch).items() if t is not None}
    sketch.reorder(torch.tensor([2, 0, 0, 1]))
    assert len(before) == 5
    for name, old in before.items():
        assert (getattr(sketch, name) == old[[2, 0, 0, 1]]).all(), name


def test_repeat_of_nothing_is_nothing() -> None:
    sketch = LayerSketch(CONFIG)
    sketch.repeat(3)
    assert sketch.codes is None
    assert sketch.pending == []


def test_reset_empties() -> None:
    sketch = fed(50)
    sketch.tokens = 50
    sketch.defer(torch.zeros(2, 4, 1, 32), 1)
    sketch.reset()
    assert sketch.tokens == sketch.num_blocks == sketch.pending_tokens == 0
    assert all(t is None for t in buffers(sketch).values())


@pytest.mark.parametrize("operation", ["crop", "reorder", "repeat", "reset"])
def test_cache_operations_end_the_running_walk(operation: str) -> None:
    state = SketchState(CONFIG)
    SketchWalkAttention(CONFIG, 32)(*qkv(2, 4, 2, 50, 32), 4, state=state)
    assert state.walk is not None
    assert state.last_layer == 4
    argument = {"crop": (20,), "reorder": (torch.tensor([1, 0]),), "repeat": (2,), "reset": ()}[operation]
    getattr(state, operation)(*argument)
    assert state.walk is None
    assert state.last_layer == -1
    assert (state.layers == {}) == (operation == "reset")


def test_state_makes_a_layer_when_it_is_entered() -> None:
    state = SketchState(CONFIG)
    first, third = state.enter(1), state.enter(3)
    assert first is not third
    assert state.enter(1) is first
    assert set(state.layers) == {1, 3}


def test_a_dense_call_leaves_what_a_sparse_one_does() -> None:
    query, key, value = qkv(2, 4, 2, 111, 32)
    layout, dense, sparse = make_layout(2, 111, 111, key.device), LayerSketch(CONFIG), LayerSketch(CONFIG)
    absorb_call(dense, query, key, layout, 32**-0.5)
    sketch_walk_attention(query, key, value, CONFIG, state=sparse)
    for name in ("codes", "scales", "ring"):
        # The spare slot takes the writes of padding: whatever came last.
        assert (getattr(dense, name)[:, :, :-1] == getattr(sparse, name)[:, :, :-1]).all(), name
    assert (dense.read_rows(6) == sparse.read_rows(6)).all()
    assert dense.ring_ranks is not None
    assert sparse.ring_ranks is not None
    assert (dense.ring_ranks[:, :-1] == sparse.ring_ranks[:, :-1]).all()


def test_keys_alone_leave_identity_rows() -> None:
    query, key, _ = qkv(2, 4, 2, 111, 32)
    sketch = LayerSketch(CONFIG)
    absorb_keys(sketch, key, make_layout(2, 111, 111, key.device), query)
    assert (sketch.read_rows(6) == torch.eye(6)).all()
    assert (sketch.read_keys(6)[0] == fed(111).read_keys(6)[0]).all()


def test_scores_can_be_combined_across_ranks() -> None:
    """Two ranks with half of the heads each, their scores combined by max: both select as one device does."""
    query, key, value = qkv(1, 8, 4, 160, 32)
    whole = sketch_walk_attention(query, key, value, CONFIG)
    halves = [(query[:, r * 4 : r * 4 + 4], key[:, r * 2 : r * 2 + 2], value[:, r * 2 : r * 2 + 2]) for r in range(2)]
    seen: list[list[Tensor]] = [[], []]
    for rank, half in enumerate(halves):
        sketch_walk_attention(*half, CONFIG, combine_scores=lambda s, rank=rank: seen[rank].append(s) or s)
    combined = torch.maximum(seen[0][0], seen[1][0])
    results = [sketch_walk_attention(*half, CONFIG, combine_scores=lambda s: combined) for half in halves]
    for result in results:
        assert (result.selection.indices == whole.selection.indices).all()
    torch.testing.assert_close(torch.cat([r.output for r in results], 1), whole.output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("walk", ["none", "damped"])
def test_a_prompt_in_inference_mode_and_a_step_out_of_it(walk: str) -> None:
    """Made, grown and reordered in inference mode, and still written to afterwards."""
    config = replace(CONFIG, walk=walk)
    query, key, value = qkv(2, 4, 2, 61, 32)
    inside, outside = LayerSketch(config), LayerSketch(config)
    for state, mode in ((inside, True), (outside, False)):
        with torch.inference_mode(mode):
            for start, stop in ((0, 20), (20, 60)):
                call = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
                sketch_walk_attention(*call, config, state=state)
            state.reorder(torch.tensor([1, 0]))
    results = [
        sketch_walk_attention(*(x.flip(0)[:, :, part] for x, part in step), config, state=state)
        for state in (inside, outside)
        for step in [((query, slice(60, 61)), (key, slice(0, 61)), (value, slice(0, 61)))]
    ]
    assert torch.equal(results[0].output, results[1].output)
    assert torch.equal(results[0].selection.indices, results[1].selection.indices)
