"""The method, top to bottom: sketch, score, walk, select, attend.

`sketch_walk_attention` composes the stages for one layer of one call. It is the only place that knows all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sketch_walk import kernels, masks
from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout, make_layout
from sketch_walk.look_back import leave, look_back
from sketch_walk.memory import recall
from sketch_walk.scoring import absorb_keys, absorb_rows, call_scores, make_room, step_selection, step_with_triton
from sketch_walk.selection import BlockSelection, row_counts, select_blocks
from sketch_walk.state import LayerSketch, SketchState
from sketch_walk.walk import transition_rows, walk_step

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


class SketchWalkOutput(NamedTuple):
    """Result of one layer.

    Parameters
    ----------
    output : torch.Tensor
        Shape (batch, num_heads, num_queries, head_dim).
    selection : BlockSelection
        What was read.
    walk : torch.Tensor
        Rows of R after this layer, to hand to the next sparse layer of the same forward pass.
    impl : str
        The kernel that attended.
    """

    output: Tensor
    selection: BlockSelection
    walk: Tensor
    impl: str


@runtime_checkable
class ScoreFunction(Protocol):
    """Block scores from somewhere else than the sketches: an oracle, a baseline."""

    def __call__(self, query: Tensor, key: Tensor, config: SketchWalkConfig, *, layout: Layout, scale: float) -> Tensor:
        """Scores of the call's query blocks: float32, at least 0, shape (batch, 1 or kv_heads, query blocks, blocks),
        0 beyond the diagonal. The head axis follows ``config.head_mode``.
        """
        ...


def sketch_walk_attention(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    config: SketchWalkConfig,
    *,
    state: LayerSketch | None = None,
    walk: Float[Tensor, "batch selections rows blocks"] | None = None,
    layout: Layout | None = None,
    bias: Float[Tensor, "batch one_or_heads num_queries num_keys"] | None = None,
    scale: float | None = None,
    causal: bool = True,
    impl: str = "auto",
    combine_scores: Callable[[Tensor], Tensor] | None = None,
    score_with: ScoreFunction | None = None,
) -> SketchWalkOutput:
    """Attention of one layer over the blocks that sketch and walk select.

    Parameters
    ----------
    query, key, value : torch.Tensor
        After RoPE. `key` and `value` hold every token so far; the queries are the last `num_queries` of them unless
        `layout` says otherwise.
    state : LayerSketch, optional
        The layer's memory of earlier calls, updated in place. None starts afresh: blocks that only earlier calls'
        queries could describe then keep their walk mass in place.
    walk : torch.Tensor, optional
        `SketchWalkOutput.walk` of the previous sparse layer of this forward pass.
    layout : Layout, optional
        Where the real tokens lie; None means nothing is padded.
    bias : torch.Tensor, optional
        Added to the logits of selected pairs, -inf to hide.
    scale : float, optional
        Default 1/sqrt(head_dim).
    impl : {"auto", "reference", "triton", "cute"}
        Kernels of the scores and of the attention; see `sketch_walk.kernels`.
    combine_scores : callable, optional
        Maps this rank's block scores to all ranks' under tensor parallelism (an all-reduce).
    score_with : ScoreFunction, optional
        Scores the call's query blocks in place of the sketches, for measurement (`sketch_walk.evaluation.selectors`).
        The walk, the selection and the attention are unchanged. A block that was open before the call still gets its
        transition row from the sketches.

    Returns
    -------
    SketchWalkOutput

    Raises
    ------
    ValueError
        For `score_with` together with `bias` or without `causal`, and as `sketch_walk.kernels`.
    """
    if score_with is not None and (bias is not None or not causal):
        raise ValueError("score_with scores causal attention without a bias: bias must be None and causal True")
    batch, _, num_queries, head_dim = query.shape
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    layout = layout or make_layout(batch, num_queries, key.shape[2], query.device)
    kernels.check_impl(impl)
    with torch.no_grad():
        lasting = state is not None
        state = LayerSketch(config) if state is None else state
        usual = causal and bias is None and score_with is None
        remembers = usual and config.remembers
        plain = usual and config.mass is None and combine_scores is None
        if remembers and num_queries == 1 and state.should_look(key.shape[2]):
            make_room(state, key, layout, query)
            look_back(state, key, layout.past, layout, scale, config, impl)
        if plain and step_with_triton(state.config, query, key, impl):
            rows, selection = one_step(state, query, key, layout, scale, config)
        else:
            absorb_keys(state, key, layout, query, impl)
            if score_with is None:
                scores = call_scores(state, query, layout, scale, causal, impl)
            else:
                scores = score_with(query, key, config, layout=layout, scale=scale)
            memory = step_memory(state, config) if remembers and num_queries == 1 else None
            if memory is not None:
                scores = recall(memory.own, memory.shared, scores, layout, config)
            if combine_scores is not None:
                scores = combine_scores(scores)
            rows = transition_rows(scores, config)
            if config.uses_walk:
                absorb_rows(state, query, rows, layout, scale, combine_scores)
                if walk is not None:
                    transitions = state.read_rows(rows.shape[3])
                    rows = walk_step(walk, rows, transitions, _row_index(layout, rows, config), config)
            selection = select(rows, layout, config, causal, bias, impl)
    shared = selection.per_head()
    output, used = kernels.attend(
        query,
        key,
        value,
        shared.indices,
        shared.counts,
        layout,
        block_size=config.block_size,
        scale=scale,
        causal=causal,
        bias=bias,
        mean_correction=config.mean_correction,
        memory=step_memory(state, config) if remembers and num_queries == 1 else None,
        impl=impl,
    )
    if remembers and lasting and num_queries > 1 and state.memory is not None and query.numel():
        with torch.no_grad():
            leave(state, query, key, layout, scale, config, impl)
    return SketchWalkOutput(output, selection, rows, used)


def one_step(
    state: LayerSketch, query: Tensor, key: Tensor, layout: Layout, scale: float, config: SketchWalkConfig
) -> tuple[Tensor, BlockSelection]:
    """Key sketches, scores and selection of one token per sequence without a walk, in one go.

    Budgets are those of `config`, which may have changed since the state was made.
    """
    blocks = -(-layout.max_length // config.block_size)
    counts = row_counts(config, blocks, query.device)
    make_room(state, key, layout, query)
    memory = step_memory(state, config) if config.remembers else None
    scores, *table = step_selection(state, query, key, layout, scale, counts, config.budget(blocks), memory)
    selection = BlockSelection(*table)
    if config.head_mode != "per_kv_head":
        selection = BlockSelection(selection.indices[:, 0], selection.counts[:, 0])
    return scores, selection


def step_memory(state: LayerSketch, config: SketchWalkConfig) -> kernels.StepMemory | None:
    """What steps remember in this layer and in all, as the kernels take it; None where the state was made without."""
    if state.memory is None or state.shared is None:
        return None
    parts = (config.step_memory, config.step_ahead, config.step_across)
    return kernels.StepMemory(state.memory, state.shared.memory, *parts)


def select(
    walk: Tensor,
    layout: Layout,
    config: SketchWalkConfig,
    causal: bool = True,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> BlockSelection:
    """Selection of the call's rows of R, by the kernel where it serves."""
    tail = config.dense_tail_blocks if layout.num_queries > 1 else 0
    if causal and bias is None and config.mass is None and kernels.selects_with_triton(impl, walk):
        counts = row_counts(config, walk.shape[3], walk.device)
        return BlockSelection(
            *kernels.select_rows(
                walk,
                layout,
                counts,
                width=walk.shape[3] if tail else config.budget(walk.shape[3]),
                block_size=config.block_size,
                per_head=config.head_mode == "per_kv_head",
                tail=tail,
            )
        )
    row_index = _row_index(layout, walk, config)
    return select_blocks(
        walk,
        row_index,
        has_queries=row_index * config.block_size < layout.length[:, None],
        config=config,
        dense_rows=_dense_rows(layout, row_index, config) if tail else None,
        available=None if causal else _all_blocks(layout, row_index, config),
        allowed=None if bias is None else masks.allowed_blocks(bias, layout, config.block_size, *walk.shape[2:]),
    )


def _row_index(layout: Layout, rows: Tensor, config: SketchWalkConfig) -> Tensor:
    """Block of each row, shape (batch, rows)."""
    return layout.first_block(config.block_size)[:, None] + torch.arange(rows.shape[2], device=rows.device)


def _dense_rows(layout: Layout, row_index: Tensor, config: SketchWalkConfig) -> Tensor:
    """The last `dense_tail_blocks` query blocks of each sequence."""
    last = (layout.length - 1) // config.block_size
    return row_index > (last - config.dense_tail_blocks)[:, None]


def _all_blocks(layout: Layout, row_index: Tensor, config: SketchWalkConfig) -> Tensor:
    """Every block of each sequence, for attention that is not causal."""
    return (-(-layout.length // config.block_size))[:, None].expand_as(row_index)


class SketchWalkAttention(nn.Module):
    """Sparse attention as a module: call it in place of a layer's attention.

    It holds no state: the walk and the sketches travel in the `SketchState` that the caller owns. It ignores
    `dense_below`: layers from `skip_first_n_layers` up are always sparse.

    Parameters
    ----------
    config : SketchWalkConfig
    head_dim : int
        Size of the last dimension of queries, keys and values.

    Raises
    ------
    TypeError, ValueError
        If `config` is no SketchWalkConfig or `head_dim` is below 1.
    """

    def __init__(self, config: SketchWalkConfig, head_dim: int) -> None:
        super().__init__()
        if not isinstance(config, SketchWalkConfig):
            raise TypeError(f"config must be a SketchWalkConfig, got {type(config).__name__}")
        if not isinstance(head_dim, int) or head_dim < 1:
            raise ValueError(f"head_dim must be an int of at least 1, got {head_dim!r}")
        self.config = replace(config, dense_below=0)
        self.head_dim = head_dim

    def forward(
        self,
        Q: Shaped[Tensor, "batch heads num_queries head_dim"],
        K: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
        V: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
        layer_idx: int,
        attention_mask: Tensor | None = None,
        causal: bool = True,
        state: SketchState | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Parameters
        ----------
        Q : torch.Tensor
            Shape (batch, num_heads, n_q, head_dim), after RoPE: the last n_q tokens.
        K, V : torch.Tensor
            Shape (batch, num_heads or num_kv_heads, n_k, head_dim): all tokens so far, those of `Q` included.
        layer_idx : int
            Absolute index of the layer; below `skip_first_n_layers` attention is dense.
        attention_mask : torch.Tensor, optional
            Shape (batch, n_k), (batch, n_q, n_k) or (batch, 1 or num_heads, n_q, n_k). Bool or integer: nonzero may be
            seen. Floating point: added to the logits. A key that no query may see counts as padding.
        causal : bool
            Hide later tokens. False supports whole sequences only (n_q = n_k, no `state`).
        state : SketchState, optional
            Carries the walk from layer to layer and the sketches from call to call; updated in place. With None every
            call starts afresh.

        Returns
        -------
        output : torch.Tensor
            Like `Q`.
        selected_blocks : torch.Tensor or None
            int32, shape (batch, num_query_blocks, max_selected), or (batch, num_kv_heads, num_query_blocks,
            max_selected) with ``head_mode="per_kv_head"``: ascending, the diagonal last, -1 padding. None in a dense
            layer.

        Raises
        ------
        ValueError, TypeError
            For shapes, dtypes, devices or masks that do not fit; the message names the argument.
        """
        masks.check_attention_inputs(Q, K, V, self.head_dim, layer_idx, causal, state is not None)
        valid, bias = masks.interpret_mask(attention_mask, Q, K, state is not None)
        layout = make_layout(Q.shape[0], Q.shape[2], K.shape[2], Q.device, valid=valid)
        if layer_idx < self.config.skip_first_n_layers:
            return masks.dense_with_mask(Q, K, V, layout, bias, causal), None
        if not Q.numel():
            return torch.zeros_like(Q), Q.new_zeros(Q.shape[0], 0, 0, dtype=torch.int32)
        layer, walk = None, None
        if state is not None:
            masks.check_state(state, self.config, layer_idx, Q, K)
            layer = state.enter(layer_idx)
            walk = state.walk
        result = sketch_walk_attention(
            Q, K, V, self.config, state=layer, walk=walk, layout=layout, bias=bias, causal=causal
        )
        if state is not None and layer is not None:
            state.walk = result.walk
            layer.tokens = K.shape[2]
        return result.output, result.selection.indices
