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
    usual_density: float | None = None,
) -> SketchWalkConfig:
    """A preset (default "default") with the given fields changed; a density keeps at least four blocks.

    `usual_density` counts where neither a preset, nor a density, nor a count of blocks is given.

    Raises
    ------
    ValueError
        For an unknown preset, a field out of range, or both `density` and `top_k`.
    """
    if density is not None and top_k is not None:
        raise ValueError("--density and --top-k exclude each other: a density replaces the count of blocks")
    if density is None and preset is None and top_k is None:
        density = usual_density
    changes: dict[str, Any] = {
        "density": density,
        "min_blocks": None if density is None else 4,
        "block_size": block_size,
        "top_k_blocks": top_k,
        "dense_below": dense_below,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return SketchWalkConfig.preset(preset or "default", **given)


def parse_list(text: str) -> tuple[str, ...]:
    """``"a, b"`` -> ``("a", "b")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_tokens(name: str, text: str) -> tuple[int, ...]:
    """``"512,8K"`` -> ``(512, 8192)``.

    Raises
    ------
    ValueError
        If nothing is there or something is no whole number, with or without a K for 1,024.
    """
    numbers = []
    for part in parse_list(text):
        digits = part[:-1] if part[-1] in "kK" else part
        if not digits.isdigit():
            raise ValueError(f"{name} must be numbers such as 512,8K, got {text!r}")
        numbers.append(int(digits) * (1 if digits is part else 1024))
    if not numbers:
        raise ValueError(f"{name} must be numbers such as 512,8K, got {text!r}")
    return tuple(numbers)


def parse_numbers(name: str, text: str) -> tuple[float, ...]:
    """``"0.2,0.05"`` -> ``(0.2, 0.05)``.

    Raises
    ------
    ValueError
        If nothing is there or something is no number.
    """
    try:
        numbers = tuple(float(part) for part in parse_list(text))
    except ValueError:
        numbers = ()
    if not numbers:
        raise ValueError(f"{name} must be numbers such as 0.2,0.05, got {text!r}")
    return numbers
