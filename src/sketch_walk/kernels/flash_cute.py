"""Stage 6 through flash-attn-4 (CuTe DSL), for Hopper and newer GPUs: prefill, forward only, causal.

A selection shared by all heads needs no kernel of its own. Two of the library's features compute it:

- pages: every query block is one short sequence, its selected blocks are its pages, their tokens its used length;
  bottom-right causal masking is then right inside the diagonal block, which comes last.
- blocks: the library's block-sparse tensors, the diagonal as its one masked block and the others as full ones.

Keys and values are read where they lie, in any layout whose rows are aligned. Only the block-sparse route takes a last
block that is not whole: a page is read to its end, and what lies behind the last key may be anything. Query blocks
that do not fit (a first one that earlier calls began, a last open one) go through the Triton kernel.

Compiled kernels are cached by the library, by dtype, head sizes and tiles, never by a length.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sketch_walk.layout import Layout, make_layout

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped

BLOCK_SIZES = (64, 128)
HEAD_DIMS = range(32, 257, 8)
# Compute capabilities whose kernels read pages; consumer Blackwell's (12.x) do not.
CAPABILITIES = (9, 10, 11)


class Plan(NamedTuple):
    """How a shape runs: route "pages" or "blocks", tile of (queries, keys) or None for the library's, GQA packing."""

    route: str
    tile: tuple[int, int] | None
    pack_gqa: bool


class PagedCall(NamedTuple):
    """One sequence's whole query blocks as a batch of short sequences over pages of its keys and values.

    Parameters
    ----------
    query : torch.Tensor
        Shape (rows, block_size, heads, head_dim), a view.
    key, value : torch.Tensor
        Shape (pages, page_size, kv_heads, head_dim), views.
    table : torch.Tensor
        Shape (rows, max_pages), int32: pages in order of their tokens; 0 beyond the used ones.
    used : torch.Tensor
        Shape (rows,), int32: tokens that a row reads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor
    used: Tensor


class BlockLists(NamedTuple):
    """The library's block-sparse tensors, int32: counts (batch, 1, rows), indices (batch, 1, rows, width)."""

    mask_count: Tensor
    mask_index: Tensor
    full_count: Tensor
    full_index: Tensor


def plan_for(block_size: int, head_dim: int, group: int, capability: int = 9) -> Plan:
    """The route of a shape; `group` is heads / kv_heads, `capability` the GPU's major compute capability."""
    if capability != 9:
        return Plan("pages", None, group > 1)
    # Measured in benchmarks/results/gpu_cute.json at head_dim 128. Packing fills a tile of queries.
    if block_size == 128 and head_dim <= 128:
        return Plan("blocks", (128, 128), group > 1)
    if group > 1 and head_dim <= 128:
        return Plan("pages", (128, 128), True)
    # A page that is one tile of keys is loaded by the tensor memory accelerator.
    return Plan("pages", (128 if group > 1 or block_size == 128 else 64, 64), group > 1)


def supported(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, layout: Layout, block_size: int
) -> str | None:
    """None if this call can run, else the reason why not."""
    if block_size not in BLOCK_SIZES:
        return f"block_size {block_size} is not one of {BLOCK_SIZES}"
    if indices.shape[1] != 1:
        return "it takes one selection shared by all heads (head_mode 'shared')"
    if layout.query_index is not None or layout.bounds is None:
        return "it takes no padding and no compiled graph"
    if _rows(layout, block_size).whole == 0:
        return f"the call's {layout.num_queries} queries hold no whole block; single tokens are the other kernels' job"
    return _unreadable(query, key, value)


def dense_supported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """None if `attend_dense` takes these tensors, else the reason why not."""
    if not is_installed():
        return "flash-attn-4 is not installed"
    return _unreadable(query, key, value)


def _unreadable(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    head_dim = query.shape[3]
    if head_dim not in HEAD_DIMS or value.shape[3] != head_dim:
        return f"head_dim must be the same for query and value, a multiple of 8 in 32 ... 256, got {head_dim}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {query.dtype} is neither float16 nor bfloat16"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "it computes no gradients"
    if any(not _aligned(x) for x in (query, key, value)):
        return "rows of query, key and value must be contiguous and start at multiples of 16 bytes"
    if not query.is_cuda:
        return "the tensors are not on a GPU"
    capability = torch.cuda.get_device_capability(query.device)
    if capability[0] not in CAPABILITIES:
        return f"it needs a GPU of compute capability 9.x to 11.x, got {capability[0]}.{capability[1]}"
    return import_error()


@lru_cache(maxsize=1)
def is_installed() -> bool:
    """Whether the distribution is there, by its name: FlashAttention-2 shares its import package."""
    try:
        metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return False
    return True


@lru_cache(maxsize=1)
def import_error() -> str | None:
    """Why flash-attn-4 cannot be imported, or None. The import takes seconds: it is tried once."""
    try:
        forward()
    except Exception as error:
        # Its compiler fails in its own ways where its libraries or the driver do not fit.
        return f"flash-attn-4 cannot be imported: {type(error).__name__}: {error}"
    return None


@lru_cache(maxsize=1)
def forward() -> Callable[..., Any]:
    """flash-attn-4's forward pass: unlike its public functions it takes tiles and the output's memory."""
    from flash_attn.cute.interface import _flash_attn_fwd

    # Its compiler says so of an argument that is None, once for every kernel.
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted", category=UserWarning)
    return _flash_attn_fwd


def attend_selected(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    indices: Int[Tensor, "batch 1 rows max_selected"],
    counts: Int[Tensor, "batch 1 rows"],
    layout: Layout,
    *,
    block_size: int,
    scale: float,
    plan: Plan | None = None,
) -> Shaped[Tensor, "batch heads num_queries head_dim"]:
    """As `reference.attend_selected`, causal, forward only, for calls that are `supported`.

    Parameters
    ----------
    plan : Plan, optional
        Default: `plan_for` the shape and the GPU.

    Returns
    -------
    torch.Tensor
        Like `query`. No host synchronisation.
    """
    batch, heads, num_queries, head_dim = query.shape
    if plan is None:
        major = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 9
        plan = plan_for(block_size, head_dim, heads // key.shape[1], major)
    query, key, value = query.detach(), key.detach(), value.detach()
    output = torch.empty(batch, num_queries, heads, head_dim, dtype=query.dtype, device=query.device)
    rows = _rows(layout, block_size)
    past = rows.past
    with torch.cuda.device_of(query):
        if plan.route == "blocks":
            stop = num_queries
            _run_blocks(output, query, key, value, indices, counts, rows, block_size, scale, plan)
        else:
            stop = rows.lead + rows.whole * block_size
            for sequence in range(batch):
                _run_pages(output, query, key, value, indices, counts, rows, block_size, scale, plan, sequence)
        for start, end, row in ((0, rows.lead, 0), (stop, num_queries, indices.shape[2] - 1)):
            if end > start:
                output[:, start:end] = _attend_row(
                    query[:, :, start:end], key, value, indices, counts, past + start, row, block_size, scale
                )
    return output.transpose(1, 2)


def attend_dense(
    query: Shaped[Tensor, "batch heads num_queries head_dim"],
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"],
    scale: float,
) -> Shaped[Tensor, "batch heads num_queries head_dim"]:
    """Causal attention of the last `num_queries` tokens to all keys, for tensors that are `dense_supported`."""
    tokens_first = (x.detach().transpose(1, 2) for x in (query, key, value))
    with torch.cuda.device_of(query):
        return forward()(*tokens_first, causal=True, softmax_scale=scale)[0].transpose(1, 2)


class _Rows(NamedTuple):
    """Queries before the first whole block that `past` leaves open, and whole blocks after them."""

    past: int
    lead: int
    whole: int


def _rows(layout: Layout, block_size: int) -> _Rows:
    if not layout.bounds:
        return _Rows(0, 0, 0)
    past = layout.bounds[0][0]
    lead = min(-past % block_size, layout.num_queries)
    return _Rows(past, lead, (layout.num_queries - lead) // block_size)


def _aligned(x: Tensor) -> bool:
    """Whether the library reads `x` in place: it copies what is not laid out so, and a copy of pages is a large one."""
    per_16_bytes = 16 // x.element_size()
    return x.stride(3) == 1 and all(s % per_16_bytes == 0 for s in x.stride()[:3]) and x.data_ptr() % 16 == 0


def paged_call(
    query: Shaped[Tensor, "heads num_queries head_dim"],
    key: Shaped[Tensor, "kv_heads num_keys head_dim"],
    value: Shaped[Tensor, "kv_heads num_keys head_dim"],
    indices: Int[Tensor, "rows max_selected"],
    counts: Int[Tensor, " rows"],
    block_size: int,
    page_size: int,
) -> PagedCall:
    """A sequence's whole query blocks as short sequences over pages of `page_size`, which divides `block_size`.

    `query` holds exactly the tokens of the rows, and every block that they select is whole.
    """
    pages = key.shape[1] // page_size

    def as_pages(x: Tensor) -> Tensor:
        return x[:, : pages * page_size].unflatten(1, (pages, page_size)).permute(1, 2, 0, 3)

    # Beyond `counts` stands -1: no kernel should be led to a page before the first.
    table, per_block = indices.clamp(min=0), block_size // page_size
    if per_block > 1:
        part = torch.arange(per_block, dtype=table.dtype, device=table.device)
        table = (table[..., None] * per_block + part).flatten(1)
    return PagedCall(
        query.unflatten(1, (-1, block_size)).permute(1, 2, 0, 3),
        as_pages(key),
        as_pages(value),
        table.contiguous(),
        counts * block_size,
    )


def block_lists(indices: Tensor, counts: Tensor, first_block: int) -> BlockLists:
    """Full and masked blocks of rows whose diagonals are `first_block`, `first_block` + 1, ..."""
    rows = indices.shape[2]
    diagonal = torch.arange(first_block, first_block + rows, dtype=torch.int32, device=indices.device)
    return BlockLists(
        torch.ones_like(counts),
        diagonal.view(1, 1, rows, 1).repeat(indices.shape[0], 1, 1, 1),
        counts - 1,
        indices.clamp(min=0),
    )


def _run_pages(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor,
    rows: _Rows, block_size: int, scale: float, plan: Plan, sequence: int,
) -> None:  # fmt: skip
    """Whole query blocks of one sequence, into `output`."""
    start, first = rows.lead, int(rows.lead > 0)
    stop = start + rows.whole * block_size
    call = paged_call(
        query[sequence, :, start:stop],
        key[sequence],
        value[sequence],
        indices[sequence, 0, first : first + rows.whole],
        counts[sequence, 0, first : first + rows.whole],
        block_size,
        block_size if plan.tile is None else min(block_size, plan.tile[1]),
    )
    forward()(
        call.query,
        call.key,
        call.value,
        page_table=call.table,
        seqused_k=call.used,
        out=output[sequence, start:stop].unflatten(0, (rows.whole, block_size)),
        **_options(plan, query.shape[3], scale),
    )


def _run_blocks(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor,
    rows: _Rows, block_size: int, scale: float, plan: Plan,
) -> None:  # fmt: skip
    """All query blocks from the first whole one on, of all sequences, into `output`."""
    start, first, length = rows.lead, int(rows.lead > 0), rows.past + query.shape[2]
    # The library refuses lists that are wider than the sequence has blocks.
    lists = block_lists(
        indices[:, :, first:, : -(-length // block_size)], counts[:, :, first:], -(-rows.past // block_size)
    )
    forward()(
        query[:, :, start:].transpose(1, 2),
        key[:, :, :length].transpose(1, 2),
        value[:, :, :length].transpose(1, 2),
        block_sparse_tensors=_block_sparse_tensors(lists, block_size),
        out=output[:, start:],
        **_options(plan, query.shape[3], scale),
    )


def _block_sparse_tensors(lists: BlockLists, block_size: int) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(
        lists.mask_count, lists.mask_index, lists.full_count, lists.full_index, block_size=(block_size, block_size)
    )


def _options(plan: Plan, head_dim: int, scale: float) -> dict[str, Any]:
    return {
        "causal": True,
        "softmax_scale": scale,
        "tile_mn": plan.tile,
        "pack_gqa": plan.pack_gqa,
        # Its own tables keep the weights in registers except at these head sizes.
        "mma_pv_is_rs": None if plan.tile is None else not 64 < head_dim <= 96,
    }


def _attend_row(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor,
    past: int, row: int, block_size: int, scale: float,
) -> Tensor:  # fmt: skip
    """Queries of one block, after `past` tokens, through the Triton kernel: [batch, queries, heads, head_dim]."""
    from sketch_walk.kernels import attend

    length = past + query.shape[2]
    result, _ = attend(
        query,
        key[:, :, :length],
        value[:, :, :length],
        indices[:, :, row : row + 1],
        counts[:, :, row : row + 1],
        make_layout(query.shape[0], query.shape[2], length, query.device, offset=past),
        block_size=block_size,
        scale=scale,
        impl="triton",
    )
    return result.transpose(1, 2)
