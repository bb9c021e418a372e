"""Dense attention to compare with, and FlexAttention over the same selection.

Each baseline is made for one call's shapes and gives a callable of query, key and value. One that cannot run here
raises `UnavailableError` or its own error, which becomes the reason in its row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sketch_walk.bench.record import FLASH
from sketch_walk.selection import BlockSelection

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS = {
    FLASH: SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Plain "sdpa" is what torch chooses itself; "flex-sparse" reads the same blocks as the sparse kernels.
DENSE = ("sdpa", *BACKENDS, "flash-attn-4", "flex")
BASELINES = (*DENSE, "flex-sparse")
# FlexAttention's default tiles, and its least block: it refuses 64 with them (measured on an H100).
FLEX_BLOCK = 128


class UnavailableError(Exception):
    """A baseline cannot run here; the message says why."""


def check_baselines(names: tuple[str, ...]) -> None:
    """Raise unless every name is a baseline.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"unknown baseline {name!r}; expected one of {BASELINES}")


def dense_attention(name: str, device: torch.device, scale: float) -> Attention:
    """Dense attention, causal when there is more than one query.

    Raises
    ------
    UnavailableError
        If it needs a GPU or a package that is not here.
    """
    if name == "sdpa":
        return partial(_sdpa, None, scale)
    if device.type != "cuda":
        raise UnavailableError("it needs a GPU")
    if name in BACKENDS:
        return partial(_sdpa, BACKENDS[name], scale)
    if name == "flash-attn-4":
        return _flash_attn_4(scale)
    if name == "flex":
        return _Flex(None, FLEX_BLOCK, scale)
    raise ValueError(f"unknown baseline {name!r}; expected one of {DENSE}")


def selected_attention(selection: BlockSelection, block_size: int, device: torch.device, scale: float) -> Attention:
    """FlexAttention over a selection, given with its head axis.

    Raises
    ------
    UnavailableError
        Without a GPU, or for a selection per key/value head.
    """
    if device.type != "cuda":
        raise UnavailableError("it needs a GPU")
    if selection.indices.shape[1] > 1:
        raise UnavailableError("its block mask is shared by all heads here")
    return _Flex(selection, block_size, scale)


def _sdpa(backend: SDPBackend | None, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    options: dict[str, Any] = {
        "is_causal": query.shape[2] > 1,
        "scale": scale,
        "enable_gqa": key.shape[1] != query.shape[1],
    }
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value, **options)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, **options)


def _flash_attn_4(scale: float) -> Attention:
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        raise UnavailableError('flash-attn-4 is not installed; run: pip install "sketch_walk[hopper]"')
    from flash_attn.cute import flash_attn_func

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Its layout is [batch, seq, heads, head_dim]; the views cost nothing.
        tokens_first = (x.transpose(1, 2) for x in (query, key, value))
        output = flash_attn_func(*tokens_first, softmax_scale=scale, causal=query.shape[2] > 1)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return attention


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class _Flex:
    """FlexAttention over one selection; its block mask is made by the first call."""

    # Shapes that the compiled function was last made for.
    compiled_for: ClassVar[tuple[Any, ...]] = ()

    def __init__(self, selection: BlockSelection | None, block_size: int, scale: float) -> None:
        self.selection, self.block_size, self.scale = selection, block_size, scale
        self.mask: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = flex_mask(self.selection, self.block_size, query.shape[2], key.shape[2], query.device)
        shapes = (query.shape, key.shape, query.dtype)
        if shapes != _Flex.compiled_for:
            # A graph per shape: beyond torch's limit of them FlexAttention would silently run unfused.
            torch.compiler.reset()
            _Flex.compiled_for = shapes
        options = {"block_mask": self.mask, "scale": self.scale, "enable_gqa": key.shape[1] != query.shape[1]}
        result: Tensor = _compiled_flex()(query, key, value, **options)
        return result


def flex_mask(
    selection: BlockSelection | None, block_size: int, num_queries: int, num_keys: int, device: torch.device
) -> Any:
    """FlexAttention's `BlockMask`: the diagonal block partial, every other one full.

    Parameters
    ----------
    selection : BlockSelection, optional
        With its head axis; None is dense.

    Raises
    ------
    UnavailableError
        If the queries do not begin with a block.
    """
    from torch.nn.attention.flex_attention import BlockMask

    past = num_keys - num_queries
    if past % block_size and num_queries > 1:
        raise UnavailableError(f"its block mask needs queries that begin with a block of {block_size}")
    blocks = -(-num_keys // block_size)
    rows = -(-num_queries // block_size)
    diagonal = torch.arange(rows, dtype=torch.int32, device=device) + past // block_size
    if selection is None:
        full_count = diagonal[None, None]
        full = torch.arange(blocks, dtype=torch.int32, device=device).expand(1, 1, rows, blocks)
    else:
        # The diagonal is the last of each row; what stands behind the count is never read.
        full_count = (selection.counts - 1).clamp(min=0)
        full = F.pad(selection.indices.clamp(min=0), (0, blocks - selection.indices.shape[-1]))
    partial_block = F.pad(diagonal[None, None, :, None], (0, blocks - 1)).expand(*full.shape[:2], rows, blocks)

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + past

    return BlockMask.from_kv_blocks(
        torch.ones_like(full_count).contiguous(),
        partial_block.contiguous(),
        full_count.contiguous(),
        full.contiguous(),
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=causal,
        seq_lengths=(num_queries, num_keys),
    )
