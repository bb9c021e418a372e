"""Every wrong argument is named; masks are read as their callers mean them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sketch_walk import SketchState, SketchWalkAttention, SketchWalkConfig, sketch_walk_attention
from sketch_walk.layout import make_layout, take_tokens
from sketch_walk.masks import HIDDEN_BELOW, interpret_mask
from sketch_walk.selection import BlockSelection, block_density, pair_density, row_counts, select_blocks
from sketch_walk.walk import walk_step
from tensors import qkv

CONFIG = SketchWalkConfig(block_size=16, top_k_blocks=3, skip_first_n_layers=1)
ATTENTION = SketchWalkAttention(CONFIG, 32)


def call(**changes: Any) -> Any:
    """A right call of 2 sequences, 4/2 heads and 40 tokens, with some arguments changed."""
    query, key, value = qkv(2, 4, 2, 40, 32)
    return ATTENTION(**{"Q": query, "K": key, "V": value, "layer_idx": 2, **changes})


def test_the_call_that_the_errors_start_from_is_right() -> None:
    assert call()[0].shape == (2, 4, 40, 32)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"Q": [[1.0]]}, TypeError, r"Q must be a torch\.Tensor, got list"),
    "none": ({"V": None}, TypeError, r"V must be a torch\.Tensor, got NoneType"),
    "rank-3": ({"K": torch.zeros(2, 40, 32)}, ValueError, r"K must have 4 dimensions .* got shape \(2, 40, 32\)"),
    "integers": ({"Q": torch.zeros(2, 4, 40, 32, dtype=torch.long)}, TypeError, "Q must be floating point, got"),
    "dtypes": ({"K": torch.zeros(2, 2, 40, 32).half()}, TypeError, "K is torch.float16 on cpu, but Q is torch.float32"),
    "device": ({"V": torch.zeros(2, 2, 40, 32, device="meta")}, TypeError, "V is torch.float32 on meta, but Q is"),
    "head-dim": ({"Q": torch.zeros(2, 4, 40, 64)}, ValueError, "Q must have head_dim 32 as last dimension, got 64"),
    "batch": ({"K": torch.zeros(3, 2, 40, 32)}, ValueError, "K has batch size 3, but Q has 2"),
    "values": ({"V": torch.zeros(2, 2, 41, 32)}, ValueError, r"V must have the shape of K, \(2, 2, 40, 32\), got"),
    "heads": ({"Q": torch.zeros(2, 5, 40, 32)}, ValueError, "Q's 5 heads must be a multiple of K's 2"),
    "no-heads": (
        {"K": torch.zeros(2, 0, 40, 32), "V": torch.zeros(2, 0, 40, 32)},
        ValueError,
        "Q's 4 heads must be a multiple of K's 0",
    ),
    "short-keys": ({"Q": torch.zeros(2, 4, 41, 32)}, ValueError, "K must hold every token so far: it has 40, fewer"),
    "layer-negative": ({"layer_idx": -1}, ValueError, "layer_idx must be an int of at least 0, got -1"),
    "layer-float": ({"layer_idx": 1.0}, ValueError, "layer_idx must be an int of at least 0, got 1.0"),
    "not-causal-state": ({"causal": False, "state": SketchState(CONFIG)}, ValueError, "causal=False supports whole"),
    "not-causal-part": (
        {"causal": False, "Q": torch.zeros(2, 4, 3, 32)},
        ValueError,
        r"causal=False supports whole sequences only: n_q = n_k and state=None",
    ),
    "mask-list": ({"attention_mask": [1]}, TypeError, r"attention_mask must be a torch\.Tensor, got list"),
    "mask-2": ({"attention_mask": torch.ones(2, 39)}, ValueError, r"attention_mask of 2 dimensions must be \(2, 40\)"),
    "mask-2-batch": ({"attention_mask": torch.ones(1, 40)}, ValueError, "attention_mask of 2 dimensions must be"),
    "mask-2-ones": (
        {"attention_mask": torch.ones(2, 40)},
        ValueError,
        "attention_mask of 2 dimensions and floating dtype is additive",
    ),
    "mask-1": ({"attention_mask": torch.ones(40)}, ValueError, r"attention_mask must have shape .* got \(40,\)"),
    "mask-3": ({"attention_mask": torch.ones(2, 40, 39)}, ValueError, "attention_mask must have shape"),
    "mask-4-heads": ({"attention_mask": torch.ones(2, 2, 40, 40)}, ValueError, "attention_mask must have shape"),
    "mask-5": ({"attention_mask": torch.ones(1, 2, 1, 40, 40)}, ValueError, "attention_mask must have shape"),
    "mask-4-state": (
        {"attention_mask": torch.ones(2, 1, 40, 40), "state": SketchState(CONFIG)},
        ValueError,
        "attention_mask of 3 or 4 dimensions cannot be combined with state",
    ),
}


@pytest.mark.parametrize("layer_idx", [0, 2])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str, layer_idx: int) -> None:
    """In a dense layer as in a sparse one."""
    changes, error, match = WRONG[case]
    with pytest.raises(error, match=match):
        call(**{"layer_idx": layer_idx, **changes})


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "sinks"])
def test_arguments_of_other_softmaxes_raise(argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        call(**{argument: 1.0})


@pytest.mark.parametrize(
    ("config", "head_dim", "error", "match"),
    [
        ({}, 32, TypeError, "config must be a SketchWalkConfig, got dict"),
        (None, 32, TypeError, "config must be a SketchWalkConfig, got NoneType"),
        (CONFIG, 0, ValueError, "head_dim must be an int of at least 1, got 0"),
        (CONFIG, 32.0, ValueError, r"head_dim must be an int of at least 1, got 32\.0"),
    ],
)
def test_wrong_modules(config: Any, head_dim: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SketchWalkAttention(config, head_dim)


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="unknown impl 'fast'; expected one of"):
        sketch_walk_attention(*qkv(1, 2, 1, 20, 32), CONFIG, impl="fast")


def test_a_skipped_call_is_noticed() -> None:
    """The state has not seen tokens 20 to 29: a wrong answer is refused."""
    state = SketchState(CONFIG)
    query, key, value = qkv(2, 4, 2, 40, 32)
    ATTENTION(query[:, :, :20], key[:, :, :20], value[:, :, :20], 2, state=state)
    with pytest.raises(ValueError, match="K holds 30 tokens before Q, but state has taken in 20 in layer 2"):
        ATTENTION(query[:, :, 30:], key, value, 2, state=state)


def test_a_crop_that_the_state_was_not_told_of_is_noticed() -> None:
    state = SketchState(CONFIG)
    query, key, value = qkv(2, 4, 2, 40, 32)
    ATTENTION(query, key, value, 2, state=state)
    with pytest.raises(ValueError, match="K holds 35 tokens before Q, but state has taken in 40"):
        ATTENTION(query[:, :, 35:36], key[:, :, :36], value[:, :, :36], 2, state=state)
    state.crop(35)
    ATTENTION(query[:, :, 35:36], key[:, :, :36], value[:, :, :36], 2, state=state)


def test_walk_step_needs_transitions_with_a_previous_walk() -> None:
    rows = torch.eye(3)[None, None]
    with pytest.raises(ValueError, match="transitions must be given when previous is"):
        walk_step(rows, rows, None, torch.arange(3)[None], dataclasses.replace(CONFIG, walk="damped"))


# Reading masks.


def two() -> tuple[Tensor, Tensor]:
    query, key, _ = qkv(2, 4, 2, 6, 8)
    return query[:, :, 3:], key


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_two_dimensions_of_integers_are_one_for_seen(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=dtype)
    valid, bias = interpret_mask(mask, *two())
    assert bias is None
    assert valid is not None
    assert valid.tolist() == mask.bool().tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("hide", ["least", "-inf", "limit"])
def test_two_dimensions_of_floats_are_zero_for_seen(dtype: torch.dtype, hide: str) -> None:
    value = {"least": torch.finfo(dtype).min, "-inf": -math.inf, "limit": HIDDEN_BELOW}[hide]
    # bfloat16 rounds the limit up to -9984.
    value = -1.1e4 if hide == "limit" and dtype == torch.bfloat16 else value
    mask = torch.tensor([[value, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, value]], dtype=dtype)
    valid, bias = interpret_mask(mask, *two())
    assert bias is None
    assert valid is not None
    assert valid.tolist() == (mask == 0).tolist()


def test_no_mask_is_no_mask() -> None:
    assert interpret_mask(None, *two()) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_four_dimensions_keep_their_values_and_hide_the_least(dtype: torch.dtype) -> None:
    mask = torch.zeros(2, 1, 3, 6, dtype=dtype)
    mask[0, 0, 1, 2] = -2.5
    mask[0, 0, :, 0] = torch.finfo(dtype).min
    valid, bias = interpret_mask(mask, *two())
    assert valid is not None
    assert bias is not None
    assert valid.tolist() == [[False, *[True] * 5], [True] * 6]
    assert bias[0, 0, 1, 2] == -2.5
    assert (bias[0, 0, :, 0] == -math.inf).all()
    assert bias.dtype == torch.promote_types(dtype, torch.float32)


def test_one_mask_for_all_is_expanded() -> None:
    mask = torch.ones(1, 4, 3, 6, dtype=torch.bool)
    mask[:, 1, :, 2] = False
    valid, bias = interpret_mask(mask, *two())
    assert bias is not None
    assert bias.shape == (2, 4, 3, 6)
    assert valid is not None
    assert valid.all(), "one head still sees key 2"


def test_causal_mask_as_three_dimensions_changes_nothing() -> None:
    causal = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 40, 40)
    plain, masked = call(), call(attention_mask=causal)
    torch.testing.assert_close(masked[0], plain[0], atol=1e-6, rtol=0)
    assert (masked[1] == plain[1]).all()


# Where real tokens lie.


def test_layout_without_padding_has_no_index() -> None:
    for valid in (None, torch.ones(2, 40, dtype=torch.bool)):
        layout = make_layout(2, 10, 40, torch.device("cpu"), valid=valid)
        assert layout.query_index is None
        assert layout.key_index is None
        assert layout.bounds == ((30, 40), (30, 40))
        assert layout.max_length == 40
        assert layout.num_query_blocks(16) == 2
        assert layout.first_block_range(16) == (1, 1)


def test_layout_of_a_ragged_batch() -> None:
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[0, :35] = False
    valid[1, 3] = valid[1, 32] = False
    valid[2] = False
    layout = make_layout(3, 10, 40, torch.device("cpu"), valid=valid)
    assert layout.bounds == ((0, 5), (29, 38), (0, 0))
    assert layout.first_block(16).tolist() == [0, 1, 0]
    assert layout.num_query_blocks(16) == 2
    assert layout.first_block_range(16) == (0, 1)
    assert layout.query_positions(torch.arange(5).expand(3, -1))[:2].tolist() == [[5, 6, 7, 8, 9], [0, 1, 3, 4, 5]]
    assert layout.key_positions(torch.tensor([[0, 4], [3, 29], [0, 9]]))[:2].tolist() == [[35, 39], [4, 30]]


def test_ranks_past_the_end_point_at_the_last_real_token() -> None:
    """Padding may hold NaN; a masked key still meets its zero weight in a product."""
    valid = torch.zeros(2, 12, dtype=torch.bool)
    valid[0, 2:7] = True
    valid[1, :9] = True
    layout = make_layout(2, 12, 12, torch.device("cpu"), valid=valid)
    assert layout.key_positions(torch.tensor([[-1, 4, 5, 99], [-1, 8, 9, 99]])).tolist() == [[2, 6, 6, 6], [0, 8, 8, 8]]


@pytest.mark.parametrize(("offset", "bound"), [(20, 23), (torch.tensor(20), 64)], ids=["host", "device"])
def test_layout_of_queries_before_the_end_of_a_fixed_cache(offset: int | Tensor, bound: int) -> None:
    """A count on the device is not read: the host then knows an upper bound only, and all results are the same."""
    layout = make_layout(2, 3, 64, torch.device("cpu"), offset=offset)
    assert layout.past.tolist() == [20, 20]
    assert layout.length.tolist() == [23, 23]
    assert layout.max_length == bound
    query, key, value = qkv(2, 4, 2, 64, 32)
    actual = sketch_walk_attention(query[:, :, 20:23], key, value, CONFIG, layout=layout)
    expected = sketch_walk_attention(query[:, :, 20:23], key[:, :, :23], value[:, :, :23], CONFIG)
    rows = expected.selection.indices.shape[1]
    width = expected.selection.indices.shape[2]
    assert (actual.selection.indices[:, :rows, :width] == expected.selection.indices).all()
    assert (actual.selection.counts[:, :rows] == expected.selection.counts).all()
    assert (actual.selection.counts[:, rows:] == 0).all()
    torch.testing.assert_close(actual.output, expected.output, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("past", "length", "expected"), [(0, 40, False), (5, 15, False), (5, 16, True), (16, 31, False), (17, 40, True)]
)
def test_layout_knows_whether_the_open_block_completes(past: int, length: int, expected: bool) -> None:
    layout = make_layout(1, length - past, length, torch.device("cpu"))
    assert layout.completes_open_block(16) is expected


def test_empty_layout() -> None:
    layout = make_layout(0, 5, 5, torch.device("cpu"))
    assert layout.max_length == 0
    assert layout.num_query_blocks(16) == 0
    assert layout.first_block_range(16) == (0, 0)


@pytest.mark.parametrize("form", ["plain", "transposed", "sliced", "padded-rows", "expanded"])
def test_take_tokens_reads_any_layout_of_memory(form: str) -> None:
    x = torch.arange(2 * 3 * 7 * 4.0).view(2, 3, 7, 4)
    forms = {
        "plain": x,
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.cat([x, -x], 2)[:, :, :7],
        "padded-rows": torch.cat([x, -x[..., :1]], 3)[..., :4],
        "expanded": x[:1].expand(2, -1, -1, -1),
    }
    source = forms[form]
    positions = torch.tensor([[[6, 0], [2, 2]], [[1, 5], [3, 4]]])
    taken = take_tokens(source, positions[:, :, None])
    for b in range(2):
        for g in range(2):
            for h in range(3):
                assert (taken[b, g, h] == source[b, h, positions[b, g]]).all()
    by_head = positions[:, :, None].expand(-1, -1, 3, -1).clone()
    by_head[:, :, 1] = 0
    assert (take_tokens(source, by_head)[:, :, 1] == source[:, None, 1, :1]).all()


# Selections, by hand.


def chosen(scores: list[float], row: int, **changes: Any) -> list[int]:
    config = SketchWalkConfig(**{"top_k_blocks": 3, **changes})
    rows = torch.tensor(scores).view(1, 1, 1, -1)
    selection = select_blocks(rows, torch.tensor([[row]]), torch.tensor([[True]]), config)
    indices = selection.per_head().indices.flatten().tolist()
    assert selection.per_head().counts.item() == sum(i >= 0 for i in indices)
    return [i for i in indices if i >= 0]


SCORES = [0.0, 0.5, 0.1, 0.3, 0.2, 0.0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 1, 5]),
        ({"sink_blocks": 0}, [1, 3, 5]),
        ({"sink_blocks": 0, "top_k_blocks": 1}, [5]),
        ({"local_blocks": 2}, [0, 4, 5]),
        ({"top_k_blocks": 4}, [0, 1, 3, 5]),
        ({"top_k_blocks": 99}, [0, 1, 2, 3, 4, 5]),
        ({"density": 0.5}, [0, 1, 5]),
        ({"density": 1 / 6, "min_blocks": 4}, [0, 1, 3, 5]),
        ({"density": 0.01}, [5]),
        ({"mass": 0.4}, [0, 1, 5]),
        ({"mass": 0.6}, [0, 1, 3, 5]),
        ({"mass": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"mass": 0.01}, [0, 1, 5]),
        ({"mass": 0.01, "min_blocks": 4}, [0, 1, 3, 5]),
        ({"mass": 0.01, "local_blocks": 2}, [0, 4, 5]),
        ({"sink_density": 0.5}, [0, 1, 5]),
        ({"top_k_blocks": 2, "sink_blocks": 3}, [0, 5]),
        ({"local_density": 0.5}, [3, 4, 5]),
        ({"density": 0.5, "density_excludes_forced": True}, [0, 1, 3, 5]),
    ],
)
def test_selection_by_hand(changes: dict[str, Any], expected: list[int]) -> None:
    assert chosen(SCORES, 5, **changes) == expected


def test_rows_select_only_causal_blocks() -> None:
    assert chosen(SCORES, 2) == [0, 1, 2]
    assert chosen(SCORES, 3, top_k_blocks=2, sink_blocks=0) == [1, 3]


def test_row_counts_follow_the_config() -> None:
    config = SketchWalkConfig(density=0.3, sink_blocks=2, local_density=0.4)
    counts = row_counts(config, 10, torch.device("cpu"))
    assert counts.budget.tolist() == [config.budget(n) for n in range(11)] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert counts.sink.tolist() == [2] * 11
    assert counts.local.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]


def test_rows_without_queries_select_nothing() -> None:
    scores = torch.rand(1, 1, 2, 4)
    selection = select_blocks(scores, torch.tensor([[2, 3]]), torch.tensor([[True, False]]), CONFIG)
    assert selection.counts.tolist() == [[3, 0]]
    assert selection.indices[0, 1].tolist() == [-1, -1, -1]


def test_densities_of_a_selection() -> None:
    """Two rows of blocks of 4 from token 4 on, 7 tokens of them; block 0 alone is left out, in row 2."""
    selection = BlockSelection(
        torch.tensor([[[0, 1], [1, 2]]], dtype=torch.int32), torch.tensor([[2, 2]], dtype=torch.int32)
    )
    row_index = torch.tensor([[1, 2]])
    assert block_density(selection, row_index) == pytest.approx(4 / 5)
    pairs = pair_density(selection, row_index, torch.tensor([4]), torch.tensor([11]), 4)
    causal = sum(range(5, 12))
    assert pairs == pytest.approx((causal - 3 * 4) / causal)


def test_head_axis_of_a_selection() -> None:
    shared = BlockSelection(torch.zeros(2, 3, 4, dtype=torch.int32), torch.ones(2, 3, dtype=torch.int32))
    assert shared.per_head().indices.shape == (2, 1, 3, 4)
    assert shared.per_head().per_head() is not None
    assert shared.per_head().per_head().indices.shape == (2, 1, 3, 4)


# The state that a caller hands in.


STATE_CONFIG = SketchWalkConfig(block_size=16, top_k_blocks=3, skip_first_n_layers=0)


def state_qkv(batch: int, new: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, new, 32), torch.randn(batch, 2, total, 32), torch.randn(batch, 2, total, 32)


def test_state_of_another_config_raises() -> None:
    other = SketchState(dataclasses.replace(STATE_CONFIG, block_size=32))
    with pytest.raises(ValueError, match="state was made with another config"):
        SketchWalkAttention(STATE_CONFIG, 32)(*state_qkv(1, 40, 40), 0, state=other)


def test_state_that_differs_in_dense_below_alone_is_taken() -> None:
    state = SketchState(dataclasses.replace(STATE_CONFIG, dense_below=500))
    SketchWalkAttention(STATE_CONFIG, 32)(*state_qkv(1, 40, 40), 0, state=state)
    assert state.layers[0].tokens == 40


def test_state_of_another_type_raises() -> None:
    with pytest.raises(TypeError, match="state must be a SketchState, got dict"):
        SketchWalkAttention(STATE_CONFIG, 32)(*state_qkv(1, 40, 40), 0, state={})


def test_state_of_another_batch_size_raises_and_stays_usable() -> None:
    attention, state = SketchWalkAttention(STATE_CONFIG, 32), SketchState(STATE_CONFIG)
    attention(*state_qkv(2, 20, 20), 0, state=state)
    with pytest.raises(ValueError, match="state holds 2 sequences, but Q has 3"):
        attention(*state_qkv(3, 20, 40), 0, state=state)
    attention(*state_qkv(2, 20, 40), 0, state=state)
    assert state.layers[0].tokens == 40


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_mask_that_is_not_finite_raises(poison: float) -> None:
    mask = torch.zeros(1, 1, 40, 40)
    mask[0, 0, 3, 2] = poison
    with pytest.raises(ValueError, match="attention_mask holds NaN"):
        SketchWalkAttention(STATE_CONFIG, 32)(*state_qkv(1, 40, 40), 0, attention_mask=mask)


def test_complex_mask_raises() -> None:
    with pytest.raises(TypeError, match="attention_mask must be bool, integer or floating point"):
        SketchWalkAttention(STATE_CONFIG, 32)(
            *state_qkv(1, 40, 40), 0, attention_mask=torch.zeros(1, 40, dtype=torch.complex64)
        )
