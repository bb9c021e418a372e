"""Other selectors than the sketches, run through the same walk, selection and attention: for measurement only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from sketch_walk.attention import ScoreFunction
from sketch_walk.config import REDUCTIONS
from sketch_walk.evaluation.baselines import (
    block_mean_scores,
    flexprefill_scores,
    local_scores,
    quest_scores,
    xattention_scores,
)
from sketch_walk.evaluation.oracle import oracle_scores

if TYPE_CHECKING:
    from sketch_walk.integrations.transformers import SketchWalkHandle

SKETCH = "sketch"
SELECTORS: dict[str, ScoreFunction | None] = {
    SKETCH: None,
    "oracle_max": partial(oracle_scores, reduce="max"),
    "oracle_mean": partial(oracle_scores, reduce="mean"),
    "quest": quest_scores,
    "xattention": xattention_scores,
    "flexprefill": flexprefill_scores,
    "block_means": block_mean_scores,
    "local": local_scores,
}


def score_function(which: str | ScoreFunction) -> ScoreFunction | None:
    """The function of a name in `SELECTORS` (None for "sketch"), or `which` itself.

    Raises
    ------
    ValueError, TypeError
        For an unknown name, or something that cannot be called.
    """
    if isinstance(which, str):
        if which not in SELECTORS:
            raise ValueError(f"unknown selector {which!r}; expected one of {tuple(SELECTORS)}")
        return SELECTORS[which]
    if not callable(which):
        raise TypeError(f"selector must be a name or a function of query, key and config, got {type(which).__name__}")
    return which


@contextmanager
def selector(handle: SketchWalkHandle, which: str | ScoreFunction) -> Iterator[SketchWalkHandle]:
    """Score blocks by `which` inside the block, by what scored them before afterwards.

    Parameters
    ----------
    handle : SketchWalkHandle
        What `enable` returned.
    which : str or ScoreFunction
        A name in `SELECTORS`, or a function of (query, key, config, layout=..., scale=...) that returns block scores.

    Raises
    ------
    ValueError, TypeError
        As `score_function`, and for a handle that is disabled. The functions themselves raise ValueError for padded
        batches and inside compiled graphs.

    Notes
    -----
    The config's walk, and with it `sparsity_exponent`, work on whatever scores come; a selector as its paper has it has
    none, which is the default. With a walk, start a sequence inside the block: transition rows of
    earlier calls, of dense calls, and of blocks that several calls fill come from the sketches.
    """
    function = score_function(which)
    if not handle.enabled:
        raise ValueError("handle is disabled: selectors need a model that runs sparse attention")
    before, handle.score_with = handle.score_with, function
    try:
        yield handle
    finally:
        handle.score_with = before


def oracle(handle: SketchWalkHandle, reduce: str = "max") -> AbstractContextManager[SketchWalkHandle]:
    """`selector` with the exact attention's block scores, `reduce` "max" or "mean" over queries and heads.

    Raises
    ------
    ValueError
        For an unknown `reduce`, and as `selector`.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"unknown reduce {reduce!r}; expected one of {REDUCTIONS}")
    return selector(handle, f"oracle_{reduce}")
