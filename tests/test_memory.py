"""Memory of steps: what is remembered, how it fades, and that the kernels remember what the reference remembers."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sketch_walk import SketchWalkConfig, kernels, sketch_walk_attention
from sketch_walk.layout import make_layout
from sketch_walk.look_back import look_back
from sketch_walk.memory import note, recall
from sketch_walk.scoring import call_scores
from sketch_walk.state import LayerSketch, SharedMemory

CONFIG = SketchWalkConfig(block_size=16, top_k_blocks=4, query_sub_block=4, key_sub_block=4, dense_below=0)
TRITON = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Shares that differ by 0.3 %.
TOKENS_APART = 0.003 / math.log(1 / 0.9)
needs_triton = pytest.mark.skipif(not TRITON, reason="needs a GPU or TRITON_INTERPRET=1")


def tensors(tokens: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, h, tokens, 32) for h in (heads, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)


def step(
    state: LayerSketch, q: Tensor, k: Tensor, v: Tensor, end: int, config: SketchWalkConfig, impl: str = "reference"
) -> SketchWalkOutput:
    """The token before `end`."""
    return sketch_walk_attention(q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end], config, state=state, impl=impl)


def prompt(q: Tensor, k: Tensor, v: Tensor, end: int, config: SketchWalkConfig, *, leaves: bool = True) -> LayerSketch:
    """State after the first `end` tokens, with or without what the next step looks back with."""
    state = LayerSketch(config)
    sketch_walk_attention(q[:, :, :end], k[:, :, :end], v[:, :, :end], config, state=state, impl="reference")
    state.unseen = state.unseen and leaves
    return state


def remembered(state: LayerSketch, end: int, *, shared: bool = False) -> Tensor:
    """What is remembered of the blocks of the only sequence in the eyes of the token before `end`."""
    assert state.memory is not None
    assert state.shared is not None
    stamps = state.shared.memory[0] if shared else state.memory[0, 0]
    return state.config.step_memory ** (end - 1 - stamps)


def full_marks(state: LayerSketch, block: int, end: int) -> None:
    """The token before `end` gave all its attention to `block`, as far as the layer remembers."""
    assert state.memory is not None
    state.memory[:, :, block] = end - 1


def true_shares(q: Tensor, k: Tensor, end: int, blocks: Tensor) -> Tensor:
    """Share of each block of `blocks` in the attention of token end - 1 over them alone, greatest over heads."""
    keys = k[0].repeat_interleave(q.shape[1] // k.shape[1], 0)[:, :end]
    logits = (q[0, :, end - 1 : end] @ keys.mT)[:, 0] / 32**0.5
    read = torch.isin(torch.arange(end, device=k.device) // 16, blocks)
    weights = logits.masked_fill(~read, -torch.inf).softmax(-1)
    return torch.stack([weights[:, b * 16 : (b + 1) * 16].sum(-1).amax() for b in blocks.tolist()])


def test_a_step_notes_the_true_shares_of_what_it_read() -> None:
    q, k, v = tensors(200)
    state = prompt(q, k, v, 190, CONFIG, leaves=False)
    result = step(state, q, k, v, 191, CONFIG)
    read = result.selection.indices[0, 0].long()
    for shared in (False, True):
        held = remembered(state, 191, shared=shared)
        torch.testing.assert_close(held[read], true_shares(q, k, 191, read))
        others = torch.ones(len(held), dtype=torch.bool, device=DEVICE)
        others[read] = False
        assert not held[others].any()


def test_what_was_useful_is_read_again_and_fades() -> None:
    q, k, v = tensors(200)
    found, missed = prompt(q, k, v, 190, CONFIG, leaves=False), prompt(q, k, v, 190, replace(CONFIG, step_memory=0.0))
    assert missed.memory is None
    unread = [b for b in range(12) if b not in step(missed, q, k, v, 191, CONFIG).selection.indices[0, 0].tolist()]
    full_marks(found, unread[0], 190)
    first = step(found, q, k, v, 191, CONFIG)
    assert unread[0] in first.selection.indices[0, 0].tolist()
    assert first.walk[0, 0, 0, unread[0]].item() == pytest.approx(0.9**2)
    # Its true share is small: the claim fades.
    assert remembered(found, 191)[unread[0]].item() == pytest.approx(0.9)
    for end in range(192, 201):
        step(found, q, k, v, end, CONFIG)
    assert remembered(found, 200)[unread[0]] < 0.9**9 + 0.2


def test_the_block_behind_a_useful_one_is_read_too() -> None:
    """But not the one behind the attention sink, nor one behind the last."""
    layout = make_layout(1, 1, 75, torch.device("cpu"))
    own, shared = nothing(1, 1, 6)
    note(own, shared, torch.tensor([0.9, 0.0, 0.4, 0.1, 0.2]).view(1, 1, 1, 5), torch.tensor([[73]]), CONFIG)
    shared.fill_(-torch.inf)
    scores = recall(own, shared, torch.zeros(1, 1, 1, 5), layout, replace(CONFIG, step_ahead=0.5))
    torch.testing.assert_close(scores.flatten(), (0.9 * torch.tensor([0.9, 0.0, 0.4, 0.2, 0.2])).square())
    q, k, v = tensors(200)
    state = prompt(q, k, v, 190, CONFIG, leaves=False)
    plain = prompt(q, k, v, 190, CONFIG, leaves=False)
    read = step(plain, q, k, v, 191, CONFIG).selection.indices[0, 0].tolist()
    block = next(b for b in range(2, 10) if b not in read and b + 1 not in read)
    full_marks(state, block, 190)
    result = step(state, q, k, v, 191, CONFIG)
    assert {block, block + 1} <= set(result.selection.indices[0, 0].tolist())


def nothing(batch: int, selections: int, slots: int) -> tuple[Tensor, Tensor]:
    """A memory of a layer and one of all layers that remember nothing."""
    return torch.full((batch, selections, slots), -torch.inf), torch.full((batch, slots), -torch.inf)


def test_what_one_layer_found_the_others_read() -> None:
    """In the same step, the layers behind it; and a part of what it is worth there."""
    q, k, v = tensors(200)
    shared: dict[torch.device, SharedMemory] = {}
    first, second = (LayerSketch(CONFIG, shared=shared) for _ in range(2))
    for state in (first, second):
        sketch_walk_attention(q[:, :, :190], k[:, :, :190], v[:, :, :190], CONFIG, state=state, impl="reference")
        state.unseen = False
    assert first.shared is second.shared
    assert (first.owns_shared, second.owns_shared) == (True, False)
    plain = step(prompt(q, k, v, 190, CONFIG, leaves=False), q, k, v, 191, CONFIG).selection.indices[0, 0].tolist()
    block = next(b for b in range(1, 11) if b not in plain)
    # All keys of one block are the first layer's query: it gets all of its attention.
    keys = k.clone()
    keys[:, :, block * 16 : (block + 1) * 16] = 40 * q[:, :1, 190:191]
    step(first, q, keys, v, 191, replace(CONFIG, top_k_blocks=12))
    result = step(second, q, k, v, 191, replace(CONFIG, step_across=0.8))
    assert block in result.selection.indices[0, 0].tolist()
    assert result.walk[0, 0, 0, block].item() == pytest.approx(0.8**2, rel=1e-3)
    assert block not in step(second, q, k, v, 191, replace(CONFIG, step_across=0.0)).selection.indices[0, 0].tolist()


def test_every_new_token_fades_the_memory_of_its_own_sequence() -> None:
    """By rank, not by position: the last of 40 positions of the second sequence is padding."""
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 39:] = False
    own, shared = nothing(2, 1, 4)
    shares = torch.rand(2, 4, 1, 3)
    note(own, shared, shares, torch.tensor([[36], [36]]), CONFIG)
    scores = recall(own, shared, torch.zeros(2, 1, 1, 3), make_layout(2, 3, 40, own.device, valid=valid), CONFIG)
    expected = shares.amax((1, 2))
    expected[:, 2] = torch.maximum(expected[:, 2], 0.9 * expected[:, 1])
    expected = torch.maximum(expected, 0.9 * shares.amax((1, 2)))
    torch.testing.assert_close(scores[0, 0, 0], (expected[0] * 0.9**3).square())
    torch.testing.assert_close(scores[1, 0, 0], (expected[1] * 0.9**2).square())


def as_if_steps(q: Tensor, k: Tensor, end: int, tokens: int = 16) -> Tensor:
    """What the last tokens before `end` would have left as steps, each over every block up to its own."""
    memory = torch.zeros(-(-end // 16), device=k.device)
    for position in range(max(0, end - tokens), end):
        read = torch.arange(position // 16 + 1, device=k.device)
        memory *= 0.9
        memory[read] = torch.maximum(memory[read], true_shares(q, k, position + 1, read))
    return memory


def with_shares(memory: Tensor, q: Tensor, k: Tensor, end: int, result: SketchWalkOutput) -> Tensor:
    """The memory after a step that leaves shares of the blocks it read."""
    read = result.selection.indices[0, 0].long()
    after = torch.zeros(-(-end // 16), device=k.device)
    after[: len(memory)] = memory * 0.9
    after[read] = torch.maximum(after[read], true_shares(q, k, end, read))
    return after


@pytest.mark.parametrize("end", [9, 176, 181, 190])
@pytest.mark.parametrize("capacity", [None, 200])
@pytest.mark.parametrize("chunks", [[], [16], [160, 170, 173]])
def test_a_step_looks_back_over_every_block(end: int, capacity: int | None, chunks: list[int]) -> None:
    """With the last tokens of what came before it, in however many calls; where capacity is fixed, each call does."""
    q, k, v = tensors(200)
    state = LayerSketch(CONFIG, capacity)
    cuts = [0, *(cut for cut in chunks if cut < end), end]
    for start, stop in itertools.pairwise(cuts):
        now = (q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
        sketch_walk_attention(*now, CONFIG, state=state, impl="reference")
    expected = as_if_steps(q, k, end)
    if capacity:
        torch.testing.assert_close(remembered(state, end)[: len(expected)], expected)
        torch.testing.assert_close(remembered(state, end, shared=True)[: len(expected)], expected)
    else:
        assert not remembered(state, end).any()
    if end < 16 and not capacity:
        expected = torch.zeros_like(expected)
    result = step(state, q, k, v, end + 1, CONFIG)
    expected = with_shares(expected, q, k, end + 1, result)
    torch.testing.assert_close(remembered(state, end + 1)[: len(expected)], expected)
    torch.testing.assert_close(remembered(state, end + 1, shared=True)[: len(expected)], expected)
    result = step(state, q, k, v, end + 2, CONFIG)
    expected = with_shares(expected, q, k, end + 2, result)
    torch.testing.assert_close(remembered(state, end + 2)[: len(expected)], expected)


def test_a_few_tokens_between_steps_look_back_once_in_sixteen() -> None:
    """What was noted stays, and fades: tokens that were steps have kept no query."""
    q, k, v = tensors(200)
    state = prompt(q, k, v, 100, CONFIG)
    memory = with_shares(as_if_steps(q, k, 100), q, k, 101, step(state, q, k, v, 101, CONFIG))
    sketch_walk_attention(q[:, :, 101:105], k[:, :, :105], v[:, :, :105], CONFIG, state=state, impl="reference")
    memory = with_shares(memory * 0.9**4, q, k, 106, step(state, q, k, v, 106, CONFIG))
    torch.testing.assert_close(remembered(state, 106)[:7], memory)
    sketch_walk_attention(q[:, :, 106:117], k[:, :, :117], v[:, :, :117], CONFIG, state=state, impl="reference")
    older = torch.zeros(8, device=DEVICE)
    older[:7] = memory * 0.9**11
    # Of its sixteen tokens one was a step, and four came before it.
    noted = torch.maximum(as_if_steps(q, k, 117, 11), older)
    early = as_if_steps(q, k, 105, 4) * 0.9**12
    noted[: len(early)] = torch.maximum(noted[: len(early)], early)
    memory = with_shares(noted, q, k, 118, step(state, q, k, v, 118, CONFIG))
    torch.testing.assert_close(remembered(state, 118)[:8], memory)


def test_sequences_of_a_batch_look_back_each_by_itself() -> None:
    """Padded on the left or on the right, each leaves what it leaves alone."""
    q, k, v = tensors(100, batch=2)
    valid = torch.ones(2, 100, dtype=torch.bool, device=DEVICE)
    valid[0, 70:99] = False
    valid[1, :60] = False
    both = LayerSketch(CONFIG)
    for first, last in ((0, 88), (88, 99), (99, 100)):
        layout = make_layout(2, last - first, last, q.device, valid=valid[:, :last])
        now = (q[:, :, first:last], k[:, :, :last], v[:, :, :last])
        sketch_walk_attention(*now, CONFIG, state=both, layout=layout, impl="reference")
    assert both.memory is not None
    for sequence, blocks in ((0, 5), (1, 3)):
        alone = [x[sequence : sequence + 1, :, valid[sequence]] for x in (q, k, v)]
        tokens = alone[0].shape[2]
        state = prompt(*alone, tokens - 1, CONFIG)
        step(state, *alone, tokens, CONFIG)
        assert state.memory is not None
        torch.testing.assert_close(both.memory[sequence, :, :blocks], state.memory[0, :, :blocks])
        assert both.memory[sequence, :, :blocks].isfinite().all()


def test_a_call_without_a_lasting_state_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(100)
    monkeypatch.setattr("sketch_walk.attention.leave", lambda *_: pytest.fail("nobody reads it"))
    sketch_walk_attention(q, k, v, CONFIG, impl="reference")


@needs_triton
@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
def test_prompts_through_kernels_note_the_same(head_mode: str) -> None:
    config = replace(CONFIG, head_mode=head_mode)
    q, k, v = tensors(130, batch=2)
    states = [LayerSketch(config), LayerSketch(config)]
    for state, impl in zip(states, ("reference", "triton"), strict=True):
        sketch_walk_attention(q[:, :, :129], k[:, :, :129], v[:, :, :129], config, state=state, impl=impl)
        sketch_walk_attention(q[:, :, 129:], k, v, config, state=state, impl=impl)
    expected, found = (state.memory for state in states)
    assert expected is not None
    assert found is not None
    assert expected[..., :9].isfinite().all()
    torch.testing.assert_close(found[..., :9], expected[..., :9], rtol=0, atol=TOKENS_APART)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "block_size", "dim", "dtype"),
    [
        (4, 2, 16, 16, 32, torch.float32),
        (16, 1, 16, 32, 64, torch.float32),
        (3, 1, 16, 64, 80, torch.float32),
        (2, 2, 1, 128, 256, torch.float32),
        (8, 2, 5, 128, 128, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_token_shares_agree(
    heads: int, kv_heads: int, tokens: int, block_size: int, dim: int, dtype: torch.dtype, padded: bool
) -> None:
    """Of every token that is one, over all blocks, of which some lie past it."""
    generator = torch.Generator().manual_seed(0)
    length, sequences = 5 * block_size - 3, 2
    key = torch.randn(sequences, length, kv_heads, dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    query = torch.randn(sequences, heads, tokens, dim, generator=generator).to(DEVICE, dtype)
    valid = torch.ones(sequences, length, dtype=torch.bool, device=DEVICE)
    if padded:
        valid[1, : block_size + 2] = False
        key[1, :, : block_size + 2] = float("nan")
    layout = make_layout(sequences, tokens, length, key.device, valid=valid if padded else None)
    ranks = (layout.length[:, None] - 1 - 2 * torch.arange(tokens, device=DEVICE)).contiguous()
    ranks[0, tokens // 2 :] = -1
    shares = [
        kernels.token_shares(query, key, ranks, layout, block_size=block_size, scale=dim**-0.5, impl=impl)
        for impl in ("reference", "triton")
    ]
    assert shares[0].shape == (sequences, heads, tokens, 5)
    assert not shares[0][0, :, tokens // 2 :].any()
    totals = shares[0][1].sum(-1)
    torch.testing.assert_close(totals, torch.ones_like(totals))
    if padded:
        assert not shares[0][1, :, :, -1].any()
    precision = {"rtol": 2e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 1e-3}
    torch.testing.assert_close(shares[1], shares[0], **precision)


@needs_triton
def test_token_shares_of_an_impl_that_cannot() -> None:
    q, k, _ = tensors(64)
    layout = make_layout(1, 2, 64, k.device)
    with pytest.raises(ValueError, match="block_size 24"):
        kernels.token_shares(q[:, :, -2:], k, layout.length[:, None], layout, block_size=24, scale=1.0, impl="triton")


def test_slots_beyond_the_sequence_say_nothing() -> None:
    layout = make_layout(1, 1, 20, torch.device("cpu"))
    scores = recall(torch.full((1, 1, 4), 18.0), torch.full((1, 4), 18.0), torch.zeros(1, 1, 1, 3), layout, CONFIG)
    assert scores.flatten().tolist() == pytest.approx([0.81, 0.81, 0.0])


@pytest.mark.parametrize(
    "changes",
    [{"step_memory": 0.0}, {"walk": "damped"}, {"reduce": "mean"}],
    ids=["off", "walk", "mean"],
)
def test_configs_without_a_memory(changes: dict[str, object]) -> None:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    assert not config.remembers
    q, k, v = tensors(60)
    assert prompt(q, k, v, 59, config).memory is None


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "0.5"])
def test_step_memory_is_checked(value: object) -> None:
    with pytest.raises(ValueError, match="step_memory"):
        replace(CONFIG, step_memory=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["step_ahead", "step_across"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5"])
def test_parts_of_the_memory_are_checked(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        replace(CONFIG, **{name: value})  # type: ignore[arg-type]


def test_crop_reorder_repeat_and_reset() -> None:
    """Each comes to every layer; what the layers remember together follows once."""
    q, k, v = tensors(200, batch=2)
    shared: dict[torch.device, SharedMemory] = {}
    states = [LayerSketch(CONFIG, shared=shared) for _ in range(2)]
    for state in states:
        sketch_walk_attention(q[:, :, :190], k[:, :, :190], v[:, :, :190], CONFIG, state=state, impl="reference")
        state.tokens = 190

    def memories() -> list[Tensor]:
        assert states[0].shared is states[1].shared is not None
        return [*(state.memory for state in states if state.memory is not None), states[0].shared.memory]

    for memory in memories():
        memory.copy_(190 * torch.rand(memory.shape))
    before = [memory.clone() for memory in memories()]
    assert len(before) == 3
    for state in states:
        state.reorder(torch.tensor([1, 0]))
    for memory, old in zip(memories(), before, strict=True):
        torch.testing.assert_close(memory, old.flip(0))
    for state in states:
        state.repeat(2)
    for memory, old in zip(memories(), before, strict=True):
        torch.testing.assert_close(memory, old.flip(0).repeat_interleave(2, 0))
    for state in states:
        state.crop(100)
    for memory, old in zip(memories(), before, strict=True):
        kept = old.flip(0).repeat_interleave(2, 0)[..., :7]
        torch.testing.assert_close(memory[..., :7], kept.clamp(max=99))
        assert (memory[..., 7:] == -torch.inf).all()
    assert states[0].nbytes()["memory"] - states[1].nbytes()["memory"] == memories()[2].nbytes
    for state in states:
        state.reset()
        assert state.memory is None
        assert state.shared is None
    assert not shared


def test_reset_keeps_buffers_of_a_fixed_capacity() -> None:
    q, k, v = tensors(60)
    fixed = LayerSketch(CONFIG, capacity=200)
    sketch_walk_attention(q, k, v, CONFIG, state=fixed, impl="reference")
    assert fixed.memory is not None
    assert fixed.shared is not None
    addresses = [memory.data_ptr() for memory in (fixed.memory, fixed.shared.memory)]
    fixed.reset()
    assert [memory.data_ptr() for memory in (fixed.memory, fixed.shared.memory)] == addresses
    assert not remembered(fixed, 60).any()
    assert not remembered(fixed, 60, shared=True).any()


def test_the_memory_grows_with_the_sequence() -> None:
    q, k, v = tensors(200)
    state = prompt(q, k, v, 40, CONFIG)
    step(state, q, k, v, 41, CONFIG)
    assert state.memory is not None
    before = state.memory[:, :, :3].clone()
    sketch_walk_attention(q[:, :, 41:59], k[:, :, :59], v[:, :, :59], CONFIG, state=state, impl="reference")
    step(state, q, k, v, 60, CONFIG)
    assert state.shared is not None
    assert state.memory.shape[2] == state.shared.memory.shape[1] > state.num_blocks
    assert before.isfinite().all()


@needs_triton
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "changes"),
    [
        (1, 4, 2, {}),
        (2, 8, 2, {"head_mode": "per_kv_head"}),
        (2, 6, 2, {"block_size": 32, "top_k_blocks": 2}),
        (1, 12, 1, {"block_size": 128, "top_k_blocks": 2}),
        (1, 16, 2, {"step_memory": 0.5}),
    ],
)
def test_kernels_remember_what_the_reference_remembers(
    batch: int, heads: int, kv_heads: int, changes: dict[str, object]
) -> None:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    q, k, v = tensors(401, batch=batch, heads=heads, kv_heads=kv_heads)
    expected, found = prompt(q, k, v, 396, config), prompt(q, k, v, 396, config)
    layout = make_layout(batch, 16, 396, q.device)
    for state, impl in ((expected, "reference"), (found, "triton")):
        look_back(state, k[:, :, :396], layout.length, layout, 32**-0.5, config, impl)
    assert expected.memory is not None
    assert found.memory is not None
    blocks = -(-396 // config.block_size)
    assert expected.memory[..., :blocks].isfinite().all()
    apart = TOKENS_APART * math.log(0.9) / math.log(config.step_memory)
    torch.testing.assert_close(found.memory, expected.memory, rtol=0, atol=apart)
    for end in range(397, 402):
        # One past for both: a block within rounding of the cut would lead them apart.
        assert expected.shared is not None
        assert found.shared is not None
        found.memory.copy_(expected.memory)
        found.shared.memory.copy_(expected.shared.memory)
        blocks = -(-end // config.block_size)
        want = step(expected, q, k, v, end, config)
        own, shared = (config.step_memory ** (end - 1 - x[..., :blocks]) for x in (found.memory, found.shared.memory))
        recalled = torch.maximum(own, shared[:, None] * config.step_across)
        recalled[..., 2:] = torch.maximum(recalled[..., 2:], own[..., 1:-1] * config.step_ahead)
        have = step(found, q, k, v, end, config, impl="triton")
        assert have.impl == "triton"
        # From the codes that it made: those of the open block differ by rounding.
        layout = make_layout(batch, 1, end, q.device)
        scores = call_scores(found, q[:, :, end - 1 : end], layout, 32**-0.5, impl="reference")
        torch.testing.assert_close(
            have.walk, torch.maximum(scores, recalled[:, :, None].square()), rtol=3e-2, atol=3e-3
        )
        torch.testing.assert_close(have.selection.indices, want.selection.indices)
        for mine, theirs in ((found.memory, expected.memory), (found.shared.memory, expected.shared.memory)):
            torch.testing.assert_close(mine[..., :blocks], theirs[..., :blocks], rtol=0, atol=apart)


@needs_triton
def test_gradients_leave_the_memory_right() -> None:
    q, k, v = tensors(100)
    expected, found = prompt(q, k, v, 99, CONFIG), prompt(q, k, v, 99, CONFIG)
    step(expected, q, k, v, 100, CONFIG)
    with torch.enable_grad():
        v.requires_grad_()
        step(found, q, k, v, 100, CONFIG, impl="triton").output.sum().backward()
    assert v.grad is not None
    assert expected.memory is not None
    assert found.memory is not None
    torch.testing.assert_close(found.memory, expected.memory, rtol=0, atol=TOKENS_APART)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
def test_a_padded_sequence_remembers_what_it_does_alone(impl: str) -> None:
    q, k, v = tensors(90)
    short = [x[:, :, :60] for x in (q, k, v)]
    padded = [
        torch.cat([x, torch.cat([torch.zeros_like(x[:, :, :30]), y], 2)]) for x, y in zip((q, k, v), short, strict=True)
    ]
    valid = torch.ones(2, 90, dtype=torch.bool, device=DEVICE)
    valid[1, :30] = False
    alone, both = LayerSketch(CONFIG), LayerSketch(CONFIG)
    for first, last in ((0, 87), (87, 88), (88, 89), (89, 90)):
        new, seen = slice(first, last), slice(0, last)
        layout = make_layout(2, last - first, last, q.device, valid=valid[:, :last])
        calls = (padded[0][:, :, new], padded[1][:, :, seen], padded[2][:, :, seen])
        sketch_walk_attention(*calls, CONFIG, state=both, layout=layout, impl=impl)
        new, seen = slice(max(first - 30, 0), last - 30), slice(0, last - 30)
        calls = (short[0][:, :, new], short[1][:, :, seen], short[2][:, :, seen])
        sketch_walk_attention(*calls, CONFIG, state=alone, impl=impl)
    assert alone.memory is not None
    assert both.memory is not None
    assert alone.memory[0, 0, :4].isfinite().all()
    torch.testing.assert_close(both.memory[1, :, :4], alone.memory[0, :, :4], rtol=0, atol=1e-2)
