"""Kernels of stage 6 behind one contract: a `BlockSelection` in, attention out.

`reference` is the specification (torch, any device); `dense` is SDPA. "auto" picks and says what it picked; an explicit
choice never falls back.
"""

from __future__ import annotations

from sketch_walk.kernels.dense import attend_dense
from sketch_walk.kernels.reference import attend_selected

IMPLEMENTATIONS = ("auto", "reference")

# Prompt tokens below which dense attention is not slower, selector and state included.
# benchmarks/results/cpu_crossover.json measures the CPU's; other devices keep its value until they are measured.
PREFILL_CROSSOVER = {"cpu": 2048}
# Cached tokens below which a decode step is not slower dense.
DECODE_CROSSOVER = {"cpu": 4096}


def dense_crossover(device_type: str, decode: bool = False) -> int:
    """Tokens below which calls run dense attention when `SketchWalkConfig.dense_below` is None."""
    table = DECODE_CROSSOVER if decode else PREFILL_CROSSOVER
    return table.get(device_type, table["cpu"])


def available() -> dict[str, str | None]:
    """Every kernel's name, with None where it is usable here, else the reason why it is not."""
    return {"reference": None, "dense": None}


def resolve(impl: str) -> str:
    """The kernel that `impl` stands for.

    Raises
    ------
    ValueError
        For a name that is no kernel.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; expected one of {IMPLEMENTATIONS}")
    return "reference" if impl == "auto" else impl


__all__ = ["IMPLEMENTATIONS", "attend_dense", "attend_selected", "available", "dense_crossover", "resolve"]
