"""Is it right? Every kernel answers before it is timed.

Two checks: a short call against the reference kernel, and a sample of the timed call's own rows against exact
attention, worked out here in float32 token by token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketch_walk.attention import sketch_walk_attention
from sketch_walk.bench.inputs import QKV, HeadShape, attend_selection, make_qkv, random_selection
from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout, make_layout
from sketch_walk.scoring import absorb_keys, call_scores
from sketch_walk.selection import BlockSelection
from sketch_walk.state import LayerSketch

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

# Relative error (Frobenius norm) of an attention output. Two bfloat16 kernels on an H100 differed by 3.3e-3; float32 on
# a GPU may use TF32 products.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
TF32_TOLERANCE = 2e-3
# Relative error of block scores. Where rounding turns the choice between two equally distant sub-queries, a block's
# best probability moves by more than that, so that the norm over all blocks is judged and not the largest difference.
SCORE_TOLERANCE = 3e-2
# Queries of a sequence that are worked out exactly.
SAMPLED_QUERIES = 8


class MismatchError(Exception):
    """A kernel's result is not the reference's: it gets no time."""


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error that still counts as a match."""
    return TF32_TOLERANCE if dtype == torch.float32 and device.type == "cuda" else TOLERANCE[dtype]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||, NaN where `actual` has one. Reads the device."""
    exact = exact.double()
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def expect(error: float, limit: float, what: str) -> float:
    """`error` if it is within `limit`.

    Raises
    ------
    MismatchError
        If it is not, or is NaN.
    """
    if not error <= limit:
        raise MismatchError(f"{what}: error {error:.3g}, allowed {limit:.3g}")
    return error


def sampled_error(
    output: Shaped[Tensor, "batch heads num_queries head_dim"],
    inputs: QKV,
    scale: float,
    selection: BlockSelection | None = None,
    block_size: int = 1,
) -> float:
    """Relative error of some of `output`'s queries against exact causal attention in float32.

    Parameters
    ----------
    selection : BlockSelection, optional
        With its head axis; None is dense. The queries are the last of the keys, and nothing is padded.
    """
    query, key, _ = inputs
    batch, _, num_queries, _ = query.shape
    past = key.shape[2] - num_queries
    slots = sorted({round(i * (num_queries - 1) / (SAMPLED_QUERIES - 1)) for i in range(SAMPLED_QUERIES)})
    squared = torch.zeros(2, dtype=torch.float64, device=query.device)
    for sequence in sorted({0, batch - 1}):
        for slot in slots:
            seen = None
            if selection is not None:
                row = (past + slot) // block_size - past // block_size
                seen = selection.indices[sequence, :, row], selection.counts[sequence, :, row]
            exact = _exact_token(inputs, sequence, slot, past + slot, scale, seen, block_size).double()
            actual = output[sequence, :, slot].double()
            squared += torch.stack([(actual - exact).square().sum(), exact.square().sum()])
    difference, size = squared.sqrt().tolist()
    return difference / max(size, 1e-30)


def _exact_token(
    inputs: QKV,
    sequence: int,
    slot: int,
    position: int,
    scale: float,
    seen: tuple[Tensor, Tensor] | None,
    block_size: int,
) -> Float[Tensor, "heads head_dim"]:
    """Attention of one query over the tokens of the blocks `seen` (indices and counts per selection)."""
    query, key, value = inputs
    kv_heads = key.shape[1]
    groups = query[sequence, :, slot].float().unflatten(0, (kv_heads, -1))
    results = []
    for head in range(kv_heads):
        if seen is None:
            keys, values = key[sequence, head, : position + 1], value[sequence, head, : position + 1]
        else:
            indices, counts = (x[head if x.shape[0] > 1 else 0] for x in seen)
            blocks = indices[: int(counts)].long()
            at = (blocks[:, None] * block_size + torch.arange(block_size, device=key.device)).flatten()
            at = at[at <= position]
            keys, values = key[sequence, head, at], value[sequence, head, at]
        weights = torch.softmax(groups[head] @ keys.float().T * scale, -1)
        results.append(weights @ values.float())
    return torch.cat(results)


def check_attend(
    impl: str,
    shape: HeadShape,
    config: SketchWalkConfig,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    tokens: int,
    batch: int = 1,
    decode: bool = False,
) -> float:
    """Relative error of kernel `impl` against the reference in float32, on one random selection.

    Raises
    ------
    MismatchError
        If it is above `tolerance`.
    """
    device = generator.device
    inputs = make_qkv(shape, batch, 1 if decode else tokens, tokens, dtype, generator)
    layout = make_layout(batch, inputs.query.shape[2], tokens, device)
    chosen = random_selection(layout, config, shape.kv_heads, generator)
    wide = QKV(*(x.float() for x in inputs))
    output, _ = attend_selection(inputs, chosen, layout, config, shape.head_dim**-0.5, impl)
    exact, _ = attend_selection(wide, chosen, layout, config, shape.head_dim**-0.5, "reference")
    return expect(relative_error(output, exact), tolerance(dtype, device), f"attention of {impl} at {tokens} tokens")


def filled_state(
    key: Tensor, query: Tensor, config: SketchWalkConfig, layout: Layout, *, fixed: bool = False
) -> LayerSketch:
    """A layer's state that has sketched every key; `query` only shows its heads. Transition rows are the identity's.

    Parameters
    ----------
    fixed : bool
        With room for `key` and no more, which a CUDA graph needs.
    """
    state = LayerSketch(config, capacity=key.shape[2] if fixed else None)
    num_keys = key.shape[2]
    absorb_keys(state, key, make_layout(key.shape[0], num_keys, num_keys, key.device), query)
    state.tokens = layout.num_keys - layout.num_queries
    return state


def check_layer(
    impl: str,
    shape: HeadShape,
    config: SketchWalkConfig,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    tokens: int,
    batch: int = 1,
    decode: bool = False,
) -> float:
    """Relative error of a layer with its selector: scores against the reference's, attention on its own selection.

    Raises
    ------
    MismatchError
        If scores or attention are outside their budgets.
    """
    device, scale = generator.device, shape.head_dim**-0.5
    inputs = make_qkv(shape, batch, 1 if decode else tokens, tokens, dtype, generator)
    layout = make_layout(batch, inputs.query.shape[2], tokens, device)
    state = filled_state(inputs.key, inputs.query, config, layout)
    scores = [call_scores(state, inputs.query, layout, scale, impl=name) for name in (impl, "reference")]
    what = f"{impl} at {tokens} tokens"
    expect(relative_error(scores[0], scores[1]), SCORE_TOLERANCE, f"block scores of {what}")
    result = sketch_walk_attention(*inputs, config, state=state, layout=layout, impl=impl)
    wide = QKV(*(x.float() for x in inputs))
    exact, _ = attend_selection(wide, result.selection.per_head(), layout, config, scale, "reference")
    return expect(relative_error(result.output, exact), tolerance(dtype, device), f"layer of {what}")
