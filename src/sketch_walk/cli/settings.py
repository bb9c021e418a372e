"""From options of the command line to a config."""

from __future__ import annotations

from typing import Any

from sketch_walk.config import SketchWalkConfig


def make_config(
    preset: str | None = None,
    density: float | None = None,
    block_size: int | None = None,
    top_k: int | None = None,
    dense_below: int | None = None,
) -> SketchWalkConfig:
    """A preset (default "default") with the given fields changed; a density keeps at least four blocks.

    Raises
    ------
    ValueError
        For an unknown preset, a field out of range, or both `density` and `top_k`.
    """
    if density is not None and top_k is not None:
        raise ValueError("--density and --top-k exclude each other: a density replaces the count of blocks")
    changes: dict[str, Any] = {
        "density": density,
        "min_blocks": None if density is None else 4,
        "block_size": block_size,
        "top_k_blocks": top_k,
        "dense_below": dense_below,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return SketchWalkConfig.preset(preset or "default", **given)
