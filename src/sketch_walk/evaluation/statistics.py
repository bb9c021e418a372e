"""Means with their uncertainty, and differences between two runs over the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

RESAMPLES = 4000
COVERAGE = 0.95


class Mean(NamedTuple):
    """A mean over samples and its standard error (None of a single sample)."""

    mean: float
    standard_error: float | None


class Difference(NamedTuple):
    """Mean of ours minus theirs, its standard error (None of a single pair), and a 95 % bootstrap interval."""

    mean: float
    standard_error: float | None
    low: float
    high: float


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error of independent samples.

    Raises
    ------
    ValueError
        If there are none.
    """
    if not values:
        raise ValueError("values must hold at least one sample")
    x = torch.tensor(values, dtype=torch.float64)
    error = float(x.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(float(x.mean()), error)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Difference of two runs whose i-th values are of the same sample.

    The interval holds the middle 95 % of the means of `resamples` draws of pairs with replacement (the percentile
    bootstrap). It is too narrow for a handful of pairs.

    Raises
    ------
    ValueError
        If there are no values, or not equally many.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"ours and theirs must be equally many, got {len(ours)} and {len(theirs)}")
    mean, error = mean_of([a - b for a, b in zip(ours, theirs, strict=True)])
    pairs = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(pairs), (resamples, len(pairs)), generator=generator)
    tail = (1 - COVERAGE) / 2
    low, high = pairs[drawn].mean(1).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Difference(mean, error, low, high)
