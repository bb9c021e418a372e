"""The Triton kernels against the reference: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sketch_walk import SketchWalkAttention, create_sketch_walk_config, kernels, sketch_walk_attention
from sketch_walk.extras import MissingExtraError
from sketch_walk.kernels import attend, available, check_impl
from sketch_walk.layout import Layout, make_layout
from sketch_walk.scoring import absorb_call, absorb_keys, call_scores
from sketch_walk.state import LayerSketch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = available()["triton"]
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
        ({"block_size": 48, "query_sub_block": 4}, torch.float32, "power of two of sub-keys, at most 128, got 12"),
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


@runs
def test_gradients_are_the_references_alone() -> None:
    query, key, value, _ = inputs(1, 2, 1, 64, 0, 32, None, torch.float32)
    query.requires_grad_()
    config = create_sketch_walk_config(block_size=32, top_k_blocks=2)
    with pytest.raises(ValueError, match="gradients"):
        sketch_walk_attention(query, key, value, config, impl="triton")
    output = sketch_walk_attention(query, key, value, config)
    assert output.impl == "reference"
    output.output.sum().backward()
    assert query.grad is not None


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


# batch, rows of blocks, heads, kv_heads, head_dim, changes to the config
SCORE_CASES = [
    (1, 5, 4, 2, 32, {}),
    (2, 4, 6, 2, 32, {"head_mode": "per_kv_head"}),
    (1, 4, 3, 1, 64, {"reduce": "mean"}),
    (1, 3, 8, 2, 80, {"reduce": "mean", "head_mode": "per_kv_head"}),
    (1, 4, 4, 4, 16, {"key_sketch_bits": 16, "query_sub_block": 32, "key_sub_block": 32}),
    (2, 3, 5, 1, 128, {"query_sub_block": 2, "key_sub_block": 8}),
    (1, 4, 4, 2, 32, {"head_mode": "mean"}),
    (1, 4, 16, 1, 32, {"query_sub_block": 1, "key_sub_block": 1}),
]


@runs
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("case", SCORE_CASES, ids=lambda case: "-".join(str(part) for part in case))
def test_fused_scores_are_the_references(
    case: tuple[int, int, int, int, int, dict[str, object]], padding: str | None
) -> None:
    """Rounding queries to float16 moves a logit of size 8 by at most 8 · 2^-11, and a share by as much of itself."""
    batch, blocks, heads, kv_heads, dim, changes = case
    config = create_sketch_walk_config(**{"block_size": 32, **changes})
    past, new = 37, 32 * blocks - 37 - 5
    query, key, _, layout = inputs(batch, heads, kv_heads, new, past, dim, padding, torch.float32)
    state = LayerSketch(config)
    absorb_keys(state, key, layout, query)
    fused = call_scores(state, query, layout, dim**-0.5, impl="triton")
    exact = call_scores(state, query, layout, dim**-0.5, impl="reference")
    assert fused.shape == exact.shape
    assert exact.amax() > 0.1
    torch.testing.assert_close(fused, exact, atol=4e-3, rtol=0)
    empty = (exact == 0).all(-1)
    assert (fused[empty] == 0).all()


@runs
@pytest.mark.parametrize(("impl", "fused"), [("triton", 1), ("reference", 0)])
def test_rows_of_dense_calls_keep_to_the_choice(monkeypatch: pytest.MonkeyPatch, impl: str, fused: int) -> None:
    calls = []
    original = kernels.fused_block_scores

    def counted(*args: Tensor | None, **keywords: object) -> Tensor:
        calls.append(keywords)
        return original(*args, **keywords)

    monkeypatch.setattr(kernels, "fused_block_scores", counted)
    query, key, _, layout = inputs(1, 4, 2, 100, 0, 32, None, torch.float32)
    absorb_call(LayerSketch(create_sketch_walk_config(block_size=32)), query, key, layout, 32**-0.5, impl=impl)
    assert len(calls) == fused
