"""Shapes, random tensors and random selections that are timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sketch_walk import kernels
from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout
from sketch_walk.selection import BlockSelection, select_blocks

if TYPE_CHECKING:
    from jaxtyping import Shaped


class HeadShape(NamedTuple):
    """Heads of one attention layer; the defaults are Llama-3.1-8B's."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


class QKV(NamedTuple):
    """Query, key and value of one call, shape (batch, heads or kv_heads, tokens, head_dim)."""

    query: Shaped[Tensor, "batch heads num_queries head_dim"]
    key: Shaped[Tensor, "batch kv_heads num_keys head_dim"]
    value: Shaped[Tensor, "batch kv_heads num_keys head_dim"]

    @property
    def nbytes(self) -> int:
        """Bytes of the three together."""
        return sum(x.nbytes for x in self)


def check_shape(shape: HeadShape) -> None:
    """Raise unless the heads fit each other.

    Raises
    ------
    ValueError
        If a number is below 1 or `kv_heads` does not divide `heads`.
    """
    for name, value in shape._asdict().items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if shape.heads % shape.kv_heads:
        raise ValueError(f"kv_heads ({shape.kv_heads}) must divide heads ({shape.heads})")


def bench_config(
    head_dim: int, block_size: int, density: float | None, changes: dict[str, Any] | None = None
) -> SketchWalkConfig:
    """The config of a timed call: a full-width sketch, at least four blocks, always sparse, and `changes`.

    Raises
    ------
    ValueError, TypeError
        As `SketchWalkConfig`.
    """
    fields = {
        "block_size": block_size,
        "sketch_dim": head_dim,
        "density": density,
        "min_blocks": 4,
        "dense_below": 0,
        **(changes or {}),
    }
    return SketchWalkConfig.from_dict(fields)


def make_generator(device: torch.device, seed: int) -> torch.Generator:
    """A generator of its own: a failed graph capture makes the device's default one unusable."""
    return torch.Generator(device=device).manual_seed(seed)


def make_qkv(
    shape: HeadShape, batch: int, num_queries: int, num_keys: int, dtype: torch.dtype, generator: torch.Generator
) -> QKV:
    """Standard normal query, key and value."""
    sizes = ((shape.heads, num_queries), (shape.kv_heads, num_keys), (shape.kv_heads, num_keys))
    return QKV(
        *(
            torch.randn(batch, h, n, shape.head_dim, dtype=dtype, device=generator.device, generator=generator)
            for h, n in sizes
        )
    )


def row_index(layout: Layout, config: SketchWalkConfig) -> Tensor:
    """Block of each of the call's query blocks, shape (batch, rows)."""
    rows = torch.arange(layout.num_query_blocks(config.block_size), device=layout.past.device)
    return layout.first_block(config.block_size)[:, None] + rows


def random_selection(
    layout: Layout, config: SketchWalkConfig, kv_heads: int, generator: torch.Generator
) -> BlockSelection:
    """The selection that random scores give, with its head axis; what is forced and how much is read obey `config`."""
    index = row_index(layout, config)
    selections = kv_heads if config.head_mode == "per_kv_head" else 1
    blocks = -(-layout.num_keys // config.block_size)
    size = (index.shape[0], selections, index.shape[1], blocks)
    scores = torch.rand(size, device=generator.device, generator=generator)
    return select_blocks(scores, index, index * config.block_size < layout.length[:, None], config).per_head()


def attend_selection(
    inputs: QKV, chosen: BlockSelection, layout: Layout, config: SketchWalkConfig, scale: float, impl: str
) -> tuple[Tensor, str]:
    """`sketch_walk.kernels.attend` over a selection given with its head axis: output, and the kernel that ran."""
    return kernels.attend(
        inputs.query,
        inputs.key,
        inputs.value,
        chosen.indices,
        chosen.counts,
        layout,
        block_size=config.block_size,
        scale=scale,
        mean_correction=config.mean_correction,
        impl=impl,
    )
