"""The Triton kernels against the reference: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sketch_walk import SketchWalkAttention, create_sketch_walk_config, sketch_walk_attention
from sketch_walk.bench.timing import capture
from sketch_walk.extras import MissingExtraError
from sketch_walk.kernels import StepMemory, attend, available, check_impl
from sketch_walk.kernels.dense import attend_filled
from sketch_walk.kernels.reference import attend_selected as attend_reference
from sketch_walk.layout import Layout, make_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = available()["triton"]
if importlib.util.find_spec("triton") is not None:
    from sketch_walk.kernels.triton_attention import attend_paged
    from sketch_walk.kernels.triton_backward import rows_that_read
    from sketch_walk.kernels.triton_decode import DecodeLaunch, decode, decode_launch
    from sketch_walk.kernels.triton_prefill import prefill, prefill_launch
    from sketch_walk.kernels.triton_tiles import Device, device_of
runs = pytest.mark.skipif(REASON is not None, reason=f"triton cannot run: {REASON}")
# Largest difference from the reference, for outputs of order 1: the rounding of one result in that dtype.
ERROR = {torch.float32: 1e-5 if DEVICE == "cpu" else 5e-3, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# batch, heads, kv_heads, new tokens, past tokens, head_dim, block, padding, head_mode, dtype
CASES = [
    (2, 4, 2, 111, 0, 32, 32, None, "shared", torch.float32),
    (1, 6, 2, 63, 70, 80, 32, None, "per_kv_head", torch.float32),
    (2, 3, 3, 90, 0, 64, 64, "left", "shared", torch.float16),
    (2, 4, 2, 40, 33, 32, 128, "right", "shared", torch.bfloat16),
    (1, 5, 1, 200, 0, 96, 64, None, "shared", torch.float32),
    (1, 16, 1, 65, 0, 128, 16, None, "shared", torch.float16),
    (8, 2, 1, 17, 16, 16, 16, "left", "per_kv_head", torch.float32),
    (1, 2, 1, 70, 0, 256, 32, None, "shared", torch.bfloat16),
    (2, 4, 1, 1, 200, 32, 32, "left", "shared", torch.float16),
    (1, 8, 2, 1, 150, 96, 16, None, "per_kv_head", torch.float32),
    (3, 6, 2, 1, 300, 80, 64, None, "shared", torch.bfloat16),
    (1, 16, 1, 1, 129, 128, 128, None, "shared", torch.float32),
]


def inputs(
    batch: int, heads: int, kv_heads: int, new: int, past: int, dim: int, padding: str | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Layout]:
    """Random tensors, NaN where a sequence is padded, and their layout."""
    generator = torch.Generator().manual_seed(new + 7 * past + dim)
    total = past + new
    shapes = ((batch, heads, new, dim), (batch, kv_heads, total, dim), (batch, kv_heads, total, dim))
    query, key, value = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    valid = None
    if padding is not None:
        valid = torch.ones(batch, total, dtype=torch.bool, device=DEVICE)
        valid[0, slice(0, 9) if padding == "left" else slice(-9, None)] = False
        for x in (key, value):
            x.masked_fill_(~valid[:, None, :, None], torch.nan)
        query.masked_fill_(~valid[:, None, past:, None], torch.nan)
    return query, key, value, make_layout(batch, new, total, query.device, valid=valid)


@runs
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case))
def test_agrees_with_the_reference_on_one_selection(
    case: tuple[int, int, int, int, int, int, int, str, str, torch.dtype],
) -> None:
    batch, heads, kv_heads, new, past, dim, block, padding, head_mode, dtype = case
    query, key, value, layout = inputs(batch, heads, kv_heads, new, past, dim, padding, dtype)
    config = create_sketch_walk_config(block_size=block, density=0.5, head_mode=head_mode)
    expected = sketch_walk_attention(query, key, value, config, layout=layout, impl="reference")
    selection = expected.selection.per_head()
    actual, name = attend(
        query,
        key,
        value,
        selection.indices,
        selection.counts,
        layout,
        block_size=block,
        scale=dim**-0.5,
        impl="triton",
    )
    assert name == "triton"
    assert actual.shape == query.shape
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected.output.float(), atol=ERROR[dtype], rtol=0)


@runs
def test_reads_only_selected_blocks() -> None:
    query, key, value, layout = inputs(1, 2, 1, 128, 0, 32, None, torch.float32)
    indices = torch.tensor([[[[0, -1], [0, 1], [0, 2], [1, 3]]]], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([[[1, 2, 2, 2]]], dtype=torch.int32, device=DEVICE)
    keys = {"block_size": 32, "scale": 32**-0.5, "impl": "triton"}
    before, _ = attend(query, key, value, indices, counts, layout, **keys)
    poisoned = value.clone()
    poisoned[:, :, 64:96] = torch.nan
    after, _ = attend(query, key, poisoned, indices, counts, layout, **keys)
    assert torch.isnan(after[:, :, 64:96]).all()
    untouched = torch.ones(128, dtype=torch.bool, device=DEVICE)
    untouched[64:96] = False
    assert torch.equal(after[:, :, untouched], before[:, :, untouched])


@runs
def test_whole_call_through_the_config() -> None:
    query, key, value, _ = inputs(2, 4, 2, 200, 0, 32, None, torch.float32)
    config = create_sketch_walk_config(block_size=32, top_k_blocks=3)
    triton = sketch_walk_attention(query, key, value, config, impl="triton")
    reference = sketch_walk_attention(query, key, value, config, impl="reference")
    assert (triton.impl, reference.impl) == ("triton", "reference")
    same = (triton.selection.indices == reference.selection.indices).all(-1).float().mean()
    # Scores differ by rounding: on random data a cut may fall between two blocks that close once in a while.
    assert same >= 0.9


@runs
@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({"mean_correction": True}, torch.float32, "mean correction"),
        (
            {"block_size": 48, "query_sub_block": 4},
            torch.float32,
            "powers of two of sub-keys and sub-queries, got 12, 12",
        ),
        ({"block_size": 8}, torch.float32, "block_size 8 is not one of"),
        ({}, torch.float64, "dtype torch.float64"),
    ],
)
def test_an_explicit_choice_never_falls_back(changes: dict[str, object], dtype: torch.dtype, reason: str) -> None:
    query, key, value, _ = inputs(1, 2, 1, 100, 0, 32, None, torch.float32)
    config = create_sketch_walk_config(**{"block_size": 32, "top_k_blocks": 2, **changes})
    with pytest.raises(ValueError, match=reason):
        sketch_walk_attention(query.to(dtype), key.to(dtype), value.to(dtype), config, impl="triton")
    assert sketch_walk_attention(query.to(dtype), key.to(dtype), value.to(dtype), config).impl == "reference"


# Cuts of a prefill of block 32 and group 4: what each of them changes beside the default.
LAUNCHES = [
    {"tile_heads": 1, "neighbours": 4},
    {"tile_heads": 4, "neighbours": 1},
    {"tile_heads": 2, "neighbours": 4},
    {"keys": 16},
    {"keys": 64},
    {"queries": 16, "neighbours": 2},
    {"keys": 64, "prefetch": False},
    {"prefetch": False, "wide": True},
    {"descriptors": True},
    {"descriptors": True, "keys": 16},
]


@runs
@pytest.mark.parametrize(
    ("changes", "padding", "dim"),
    [
        (changes, padding, dim)
        for changes in LAUNCHES
        for padding, dim in ((None, 64), ("left", 48))
        if padding is None or "descriptors" not in changes
    ],
    ids=str,
)
def test_how_a_prefill_is_cut_does_not_matter(changes: dict[str, Any], padding: str | None, dim: int) -> None:
    if "descriptors" in changes:
        pytest.importorskip("triton.tools.tensor_descriptor")
    query, key, value, layout = inputs(2, 8, 2, 90, 50, dim, padding, torch.float32)
    config = create_sketch_walk_config(block_size=32, density=0.8)
    expected = sketch_walk_attention(query, key, value, config, layout=layout, impl="reference")
    selection = expected.selection.per_head()
    launch = replace(prefill_launch(8, 2, 32, dim, 4, device_of(query.device)), **changes)
    actual = prefill(query, key, value, selection.indices, selection.counts, layout, 32, dim**-0.5, launch=launch)
    torch.testing.assert_close(actual, expected.output, atol=ERROR[torch.float32], rtol=0)


@runs
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(("blocks", "keys"), [(1, 16), (1, 32), (2, 32), (2, 64), (4, 128), (8, 64), (16, 32)])
def test_how_a_decode_step_is_cut_does_not_matter(blocks: int, keys: int, padding: str | None) -> None:
    query, key, value, layout = inputs(2, 6, 2, 1, 390, 48, padding, torch.float32)
    config = create_sketch_walk_config(block_size=32, density=0.7)
    expected = sketch_walk_attention(query, key, value, config, layout=layout, impl="reference")
    selection = expected.selection.per_head()
    actual = decode(
        query,
        key,
        value,
        selection.indices,
        selection.counts,
        layout.length,
        32,
        48**-0.5,
        table=layout.key_index,
        launch=DecodeLaunch(blocks, keys),
    )
    torch.testing.assert_close(actual, expected.output, atol=ERROR[torch.float32], rtol=0)


@runs
@pytest.mark.parametrize("split", [1, 2, 8])
def test_a_step_without_a_table_reads_what_is_filled(split: int) -> None:
    """All tokens before a length that only the device knows; what lies behind may be anything."""
    query, key, value, _ = inputs(3, 6, 2, 1, 299, 40, None, torch.float32)
    length = torch.tensor([300, 65, 3], device=DEVICE)
    behind = (torch.arange(300, device=DEVICE) >= length[:, None])[:, None, :, None]
    launch = DecodeLaunch(split, 64, num_stages=1)
    output = decode(
        query, key.masked_fill(behind, torch.nan), value.masked_fill(behind, torch.nan), None, None, length, 64, 0.2,
        launch=launch,
    )  # fmt: skip
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=~behind.transpose(2, 3), scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(output, expected, atol=ERROR[torch.float32], rtol=0)
    layout = replace(make_layout(3, 1, 300, key.device), past=length - 1, length=length, bounds=None)
    # Another launch; a GPU's matrix units round float32.
    error = 1e-6 if DEVICE == "cpu" else ERROR[torch.float32]
    torch.testing.assert_close(attend_filled(query, key, value, layout, 0.2), output, atol=error, rtol=0)


class Launches:
    """Stands for a kernel: keeps the constants it is launched with."""

    def __init__(self) -> None:
        self.seen: set[frozenset[tuple[str, object]]] = set()

    def __getitem__(self, grid: object) -> Launches:
        return self

    def __call__(self, *arguments: object, **constants: object) -> None:
        self.seen.add(frozenset(constants.items()))


def test_a_longer_selection_compiles_no_new_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel takes half a second to compile, and a prompt's last token takes a decode step at every length."""
    from sketch_walk.kernels import triton_decode

    kernels = {name: Launches() for name in ("_decode", "_merge")}
    for name, launches in kernels.items():
        monkeypatch.setattr(triton_decode, name, launches)
    monkeypatch.setattr(triton_decode, "device_of", lambda device: triton_decode.Device(132, 232448))
    query, key = torch.zeros(1, 8, 1, 64), torch.zeros(1, 2, 64, 64)
    length = torch.ones(1, dtype=torch.int64)
    launches_taken = set()
    for selected in range(1, 600, 11):
        indices, counts = torch.zeros(1, 1, 1, selected, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32)
        memory = StepMemory(torch.zeros(1, 1, selected), torch.zeros(1, selected), 0.9)
        triton_decode.decode(query, key, key, indices, counts, length, 64, 0.1, memory=memory, past=length)
        device = triton_decode.Device(132, 232448)
        launches_taken.add(triton_decode.decode_launch(1, 2, selected, 64, 64, 4, device).blocks)
    assert len(launches_taken) > 3
    # Few and many partial results to merge.
    assert [len(launches.seen) for launches in kernels.values()] == [1, 2]


@runs
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    ("blocks", "keys", "block_size"), [(3, 64, 64), (5, 32, 64), (7, 64, 16), (3, 32, 16), (6, 64, 32)]
)
def test_any_number_of_blocks_may_share_a_program(blocks: int, keys: int, block_size: int, per_head: bool) -> None:
    """Outputs and what is remembered, where neither blocks nor keys fill the last split, nor the last step of one."""
    query, key, value, layout = inputs(2, 6, 2, 1, 1090, 48, None, torch.float32)
    layout = replace(layout, past=layout.past - torch.tensor([0, 333], device=DEVICE))
    layout = replace(layout, length=layout.past + 1, bounds=None)
    config = create_sketch_walk_config(
        block_size=block_size, density=0.7, head_mode="per_kv_head" if per_head else "shared"
    )
    chosen = sketch_walk_attention(query, key, value, config, layout=layout, impl="reference").selection.per_head()
    assert (chosen.counts % blocks != 0).any()
    slots = -(-1091 // block_size)
    own, shared = (
        2000 * torch.rand(2, 2 if per_head else 1, slots, device=DEVICE),
        2000 * torch.rand(2, slots, device=DEVICE),
    )
    expected, found = (StepMemory(own.clone(), shared.clone(), 0.9) for _ in range(2))
    output = attend_reference(
        query, key, value, chosen.indices, chosen.counts, layout, block_size=block_size, scale=48**-0.5,
        memory=expected,
    )  # fmt: skip
    actual = decode(
        query, key, value, chosen.indices, chosen.counts, layout.length, block_size, 48**-0.5, memory=found,
        past=layout.past, launch=DecodeLaunch(blocks, keys),
    )  # fmt: skip
    torch.testing.assert_close(actual, output, atol=ERROR[torch.float32], rtol=0)
    tokens = (1e-3 if DEVICE == "cpu" else ERROR[torch.float32]) / math.log(1 / 0.9)
    for mine, theirs, before in zip(found[:2], expected[:2], (own, shared), strict=True):
        assert (theirs != before).any()
        assert (theirs == before).any()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tokens)


@pytest.mark.parametrize(
    ("batch", "selected", "block_size", "head_dim", "expected"),
    [
        (1, 205, 64, 128, (7, 64)),  # 8 x 30 programs of 264 at once
        (8, 205, 64, 128, (16, 64)),  # 52 blocks: too many
        (1, 2048, 64, 128, (16, 64)),
        (8, 103, 128, 128, (26, 64)),
        (1, 205, 16, 128, (8, 64)),  # steps of four whole blocks
        (1, 205, 32, 256, (7, 32)),
        (3, 110, 64, 128, (10, 64)),
        (1, 20, 64, 128, (1, 64)),  # too few: as without
        (20, 205, 64, 128, (16, 64)),  # 160 of 264 slots: too few
        (64, 205, 64, 128, (16, 64)),  # more pairs than slots
    ],
)
def test_a_step_in_one_wave(
    batch: int,
    selected: int,
    block_size: int,
    head_dim: int,
    expected: tuple[int, int],
) -> None:
    """All programs run at once where that leaves few slots empty; steps of the loop stay full."""
    gpu = Device(132, 232448)
    launch = decode_launch(batch, 8, selected, block_size, head_dim, 2, gpu)
    assert (launch.blocks, launch.keys) == expected
    assert launch.blocks * block_size % launch.keys == 0


def test_where_one_wave_would_leave_slots_empty_programs_fill_the_gpu() -> None:
    """A split is as long as that allows."""
    gpu = Device(132, 232448)
    launches = {batch: decode_launch(batch, 8, 205, 64, 128, 2, gpu) for batch in (1, 8, 20, 64)}
    assert [launch.blocks for launch in launches.values()] == [7, 16, 16, 16]
    assert decode_launch(1, 1, 3, 64, 128, 2, gpu).blocks == 1
    for batch, launch in launches.items():
        programs = batch * 8 * -(-205 // launch.blocks)
        assert programs >= 2 * gpu.processors or 0.75 <= programs / (2 * gpu.processors) <= 1
        assert 2 * launch.num_stages * launch.keys * 128 * 2 <= gpu.shared_bytes // 2


def page_cache(x: Tensor, page_size: int, table: Tensor, spare: int) -> Tensor:
    """(batch, kv_heads, tokens, dim) in pages as `table` says, two caches interleaved, NaN in what no page holds."""
    batch, kv_heads, _, dim = x.shape
    pages = torch.full((table.numel() + spare, 2, page_size, kv_heads, dim), torch.nan, dtype=x.dtype, device=x.device)
    for sequence in range(batch):
        for number, page in enumerate(table[sequence].tolist()):
            rows = x[sequence, :, number * page_size : (number + 1) * page_size].transpose(0, 1)
            pages[page, 0, : rows.shape[0]] = rows
    return pages[:, 0]


@runs
@pytest.mark.parametrize("selections", [1, 2])
@pytest.mark.parametrize(("page_size", "block"), [(16, 32), (64, 32), (32, 32), (48, 16), (128, 64), (1, 16)])
def test_a_paged_cache_gives_what_a_contiguous_one_does(page_size: int, block: int, selections: int) -> None:
    lengths, dim, dtype = [200, 77, 9], 40, torch.float32
    query, key, value, _ = inputs(3, 4, 2, 1, 199, dim, None, dtype)
    valid = torch.arange(200, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    generator = torch.Generator().manual_seed(page_size)
    max_pages = -(-200 // page_size)
    table = torch.randperm(3 * max_pages, generator=generator).view(3, -1).to(DEVICE, torch.int32)
    indices = torch.full((3, selections, 1, 5), -1, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(3, selections, 1, dtype=torch.int32, device=DEVICE)
    expected = torch.empty_like(query)
    for sequence, length in enumerate(lengths):
        blocks = -(-length // block)
        for selection in range(selections):
            chosen = torch.randperm(blocks - 1, generator=generator)[:4].sort().values
            picked = [*chosen.tolist(), blocks - 1]
            indices[sequence, selection, 0, : len(picked)] = torch.tensor(picked, dtype=torch.int32)
            counts[sequence, selection, 0] = len(picked)
        own = slice(sequence, sequence + 1)
        expected[own] = attend_reference(
            query[own],
            key[own, :, :length],
            value[own, :, :length],
            indices[own],
            counts[own],
            make_layout(1, 1, length, query.device),
            block_size=block,
            scale=0.2,
        )
    pages = [page_cache(x.masked_fill(~valid[:, None, :, None], torch.nan), page_size, table, 2) for x in (key, value)]
    # Entries behind a sequence's last page are whatever was left there.
    used = -(-torch.tensor(lengths, device=DEVICE) // page_size)
    table[torch.arange(max_pages, device=DEVICE) >= used[:, None]] = -1
    length = torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
    actual = attend_paged(query, *pages, table, indices, counts, length, block, 0.2)
    torch.testing.assert_close(actual, expected, atol=ERROR[dtype], rtol=0)
    counts[1] = 0
    without = attend_paged(query, *pages, table, indices, counts, length, block, 0.2)
    assert (without[1] == 0).all()
    assert torch.equal(without[[0, 2]], actual[[0, 2]])


@runs
@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("query", lambda x: x.expand(-1, -1, 2, -1), "query must have the shape"),
        ("query", lambda x: x[:, :3], "query must have a multiple of the 2 heads of key_cache, got 3"),
        ("value_cache", lambda x: x[..., :16], "key_cache and value_cache"),
        ("block_table", lambda x: x[:1], "block_table must be contiguous"),
        ("indices", lambda x: x[:, 0], "indices must have the shape"),
        ("counts", lambda x: x[:1], "counts must have the shape"),
        ("lengths", lambda x: x[:1], "lengths must have the shape"),
        ("block_size", lambda x: 24, "block_size 24 is not one of"),
        ("key_cache", lambda x: x.half(), "must have one dtype"),
    ],
)
def test_a_paged_call_is_checked(name: str, change: Callable[[Any], Any], reason: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(2, 4, 1, 32, device=DEVICE),
        "key_cache": torch.zeros(8, 16, 2, 32, device=DEVICE),
        "value_cache": torch.zeros(8, 16, 2, 32, device=DEVICE),
        "block_table": torch.zeros(2, 4, dtype=torch.int32, device=DEVICE),
        "indices": torch.zeros(2, 1, 1, 1, dtype=torch.int32, device=DEVICE),
        "counts": torch.ones(2, 1, 1, dtype=torch.int32, device=DEVICE),
        "lengths": torch.full((2,), 10, device=DEVICE),
        "block_size": 16,
        "scale": 1.0,
    }
    attend_paged(**arguments)
    with pytest.raises(ValueError, match=reason):
        attend_paged(**{**arguments, name: change(arguments[name])})


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("page_size", [None, 16, 64])
def test_a_decode_step_is_captured_in_a_graph(page_size: int | None) -> None:
    """Replays follow what the tensors hold by then: other queries, other selections, longer sequences."""
    query, key, value, layout = inputs(2, 8, 2, 1, 999, 64, None, torch.float16)
    length = layout.length.clone()
    indices = torch.tensor([[0, 3, 9, -1], [0, 2, 5, 9]], dtype=torch.int32, device=DEVICE).view(2, 1, 1, 4)
    counts = torch.tensor([3, 4], dtype=torch.int32, device=DEVICE).view(2, 1, 1)
    table, pages = None, []
    if page_size is not None:
        table = torch.randperm(2 * -(-1000 // page_size)).view(2, -1).to(DEVICE, torch.int32)
        pages = [page_cache(x, page_size, table, 0) for x in (key, value)]

    def step() -> Tensor:
        if table is None:
            return decode(query, key, value, indices, counts, length, 64, 0.125)
        return attend_paged(query, pages[0], pages[1], table, indices, counts, length, 64, 0.125)

    length.fill_(620)
    replay, output = capture(step, query.device)
    replay()
    torch.testing.assert_close(output, step(), atol=0, rtol=0)
    query.normal_()
    length.fill_(1000)
    indices[:, 0, 0] = torch.tensor([[0, 3, 9, 15], [7, 15, -1, -1]], dtype=torch.int32, device=DEVICE)
    counts[:, 0, 0] = torch.tensor([4, 2], dtype=torch.int32, device=DEVICE)
    replay()
    torch.testing.assert_close(output, step(), atol=0, rtol=0)
    exact = attend_reference(
        query.float(), key.float(), value.float(), indices, counts, layout, block_size=64, scale=0.125
    )
    torch.testing.assert_close(output.float(), exact, atol=ERROR[torch.float16], rtol=0)


# batch, heads, kv_heads, new tokens, past tokens, head_dim, block, padding, head_mode, dtype
GRADIENT_CASES = [
    (2, 4, 2, 111, 0, 32, 32, None, "shared", torch.float32),
    (1, 6, 2, 63, 70, 80, 32, None, "per_kv_head", torch.float32),
    (2, 3, 3, 90, 0, 64, 64, "left", "shared", torch.float32),
    (2, 4, 2, 40, 33, 32, 128, "right", "shared", torch.float32),
    (1, 5, 1, 150, 0, 96, 64, None, "shared", torch.float32),
    (2, 4, 1, 70, 30, 32, 16, "left", "per_kv_head", torch.float32),
    (1, 2, 1, 40, 0, 256, 32, None, "shared", torch.float32),
    (2, 4, 1, 1, 100, 32, 32, "left", "shared", torch.float32),
    (1, 4, 2, 111, 0, 128, 64, None, "shared", torch.bfloat16),
    (1, 4, 2, 111, 20, 64, 32, "right", "per_kv_head", torch.float16),
]
# Largest difference of a gradient, as a share of the reference's largest: the rounding of weights and outputs.
GRADIENT_ERROR = {torch.float32: 1e-4 if DEVICE == "cpu" else 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@runs
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: "-".join(str(part) for part in case))
def test_gradients_are_the_references(
    case: tuple[int, int, int, int, int, int, int, str, str, torch.dtype],
) -> None:
    batch, heads, kv_heads, new, past, dim, block, padding, head_mode, dtype = case
    query, key, value, layout = inputs(batch, heads, kv_heads, new, past, dim, padding, dtype)
    config = create_sketch_walk_config(block_size=block, density=0.5, head_mode=head_mode)
    selection = sketch_walk_attention(query, key, value, config, layout=layout, impl="reference").selection.per_head()
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def gradients(impl: str, kind: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        # The reference multiplies padding by zero weights, so it may not hold NaN there.
        tensors = [x.nan_to_num() if impl == "reference" else x for x in (query, key, value)]
        tensors = [x.to(kind).detach().requires_grad_() for x in tensors]
        output, name = attend(
            *tensors, selection.indices, selection.counts, layout, block_size=block, scale=dim**-0.5, impl=impl
        )
        assert name == impl
        output.backward(upstream.to(kind))
        return output, [x.grad for x in tensors if x.grad is not None]

    output, actual = gradients("triton", dtype)
    exact, expected = gradients("reference", torch.float32)
    torch.testing.assert_close(output.float(), exact, atol=ERROR[dtype], rtol=0)
    for own, wanted in zip(actual, expected, strict=True):
        assert own.dtype == dtype
        assert own.shape == wanted.shape
        bound = GRADIENT_ERROR[dtype] * wanted.abs().max().item()
        torch.testing.assert_close(own.float(), wanted, atol=bound, rtol=0)
    key_rank, query_rank = layout.ranks()
    for own, rank in zip(actual, (query_rank, key_rank, key_rank), strict=True):
        assert (own.transpose(1, 2)[rank < 0] == 0).all()


@runs
def test_keys_that_no_query_reads_get_no_gradient() -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 4, 2, 128, 0, 32, None, torch.float32)[:3]]
    layout = make_layout(1, 128, 128, tensors[0].device)
    indices = torch.tensor([[[[0, -1], [0, 1], [0, 2], [1, 3]]]], dtype=torch.int32, device=DEVICE)
    # Row 2 does not exist here: nothing reads block 2.
    counts = torch.tensor([[[1, 2, 0, 2]]], dtype=torch.int32, device=DEVICE)
    output, _ = attend(*tensors, indices, counts, layout, block_size=32, scale=0.2, impl="triton")
    output[:, :, [*range(64), *range(96, 128)]].sum().backward()
    for x in tensors[1:]:
        assert x.grad is not None
        assert (x.grad[:, :, 64:96] == 0).all()
        assert (x.grad[:, :, :64] != 0).any(-1).all()


@runs
def test_gradients_reach_through_a_whole_call() -> None:
    query, key, value, _ = inputs(2, 4, 2, 100, 0, 32, None, torch.float32)
    config = create_sketch_walk_config(block_size=32, top_k_blocks=2)
    grads = []
    for impl in ("triton", "reference"):
        tensors = [x.clone().requires_grad_() for x in (query, key, value)]
        output = sketch_walk_attention(*tensors, config, impl=impl)
        assert output.impl == impl
        output.output.square().sum().backward()
        grads.append([x.grad for x in tensors])
    for own, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(own, wanted, atol=GRADIENT_ERROR[torch.float32] * 10, rtol=0)


@runs
def test_two_backward_passes_give_the_same_bits() -> None:
    query, key, value, layout = inputs(1, 4, 2, 120, 0, 32, None, torch.float16)
    config = create_sketch_walk_config(block_size=16, density=0.5)
    selection = sketch_walk_attention(query, key, value, config, layout=layout, impl="reference").selection.per_head()
    runs = []
    for _ in range(2):
        tensors = [x.clone().requires_grad_() for x in (query, key, value)]
        output, _ = attend(
            *tensors, selection.indices, selection.counts, layout, block_size=16, scale=0.2, impl="triton"
        )
        output.backward(torch.ones_like(output))
        runs.append([x.grad for x in tensors])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@runs
@pytest.mark.parametrize("new", [1, 70])
def test_a_negative_scale_is_one_of_negative_queries(new: int) -> None:
    query, key, value, layout = inputs(1, 4, 2, new, 40, 32, None, torch.float32)
    config = create_sketch_walk_config(block_size=32, density=0.7)
    selection = sketch_walk_attention(query, key, value, config, layout=layout, impl="reference").selection.per_head()
    shared = (query, key, value, selection.indices, selection.counts, layout)
    actual, expected = (attend(*shared, block_size=32, scale=-3.0, impl=impl)[0] for impl in ("triton", "reference"))
    torch.testing.assert_close(actual, expected, atol=ERROR[torch.float32] * 10, rtol=0)


@runs
def test_the_page_table_is_inverted() -> None:
    indices = torch.tensor([[[[0, -1], [0, 1], [0, 2], [0, 3], [-1, -1]]]], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([[[1, 2, 2, 2, 0]]], dtype=torch.int32, device=DEVICE)
    rows, starts = rows_that_read(indices, counts, 5)
    assert starts.tolist() == [[[0, 4, 5, 6, 7, 7]]]
    assert rows[0, 0, :7].tolist() == [0, 1, 2, 3, 1, 2, 3]


def test_the_module_takes_the_automatic_choice() -> None:
    query, key, value, _ = inputs(1, 2, 1, 64, 0, 32, None, torch.float32)
    output, _ = SketchWalkAttention(create_sketch_walk_config(block_size=32, top_k_blocks=2), 32)(query, key, value, 5)
    assert output.shape == query.shape


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"sketch_walk\[triton\]"):
        check_impl("triton")


def test_without_a_gpu_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU is visible"):
        check_impl("triton")


def test_compiles_for_gpus_that_are_not_here() -> None:
    """Ahead of time, for Ampere, Ada, Hopper and CDNA 3."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 8
