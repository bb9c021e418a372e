"""Runs the core with every annotated tensor shape checked; `test_checked_shapes.py` starts it in a process of its own.

Annotations are jaxtyping's and only exist for type checkers, so that a plain import loads torch alone. Here they are
made real before the package is first imported.
"""

from __future__ import annotations

import typing

import beartype  # noqa: F401  # before TYPE_CHECKING is set: it has such blocks too
import torch
import torch._dynamo
from jaxtyping import install_import_hook

CHECKED = ("attention", "hadamard", "kernels", "layout", "masks", "scoring", "selection", "sketch", "state", "walk")

typing.TYPE_CHECKING = True
with install_import_hook([f"sketch_walk.{name}" for name in CHECKED], "beartype.beartype"):
    from sketch_walk import SketchState, SketchWalkAttention, SketchWalkConfig
    from sketch_walk.common.core import Sketch, Walk

LENGTH, HEAD_DIM = 150, 32


def run(config: SketchWalkConfig) -> None:
    """Prompt, aligned and unaligned chunks and decode steps of a padded batch, over three layers."""
    attention, state = SketchWalkAttention(config, HEAD_DIM), SketchState(config)
    torch.manual_seed(0)
    for start, stop in ((0, 64), (64, 111), (111, LENGTH - 1), (LENGTH - 1, LENGTH)):
        mask = torch.ones(2, stop, dtype=torch.bool)
        mask[0, :37] = False
        for layer in range(3):
            q = torch.randn(2, 4, stop - start, HEAD_DIM)
            k, v = torch.randn(2, 2, 2, stop, HEAD_DIM)
            output, selected = attention(q, k, v, layer, attention_mask=mask, state=state)
            assert output.shape == q.shape
            assert (selected is None) == (layer < config.skip_first_n_layers)
    q, k = torch.randn(2, 4, LENGTH, HEAD_DIM), torch.randn(2, 2, LENGTH, HEAD_DIM)
    attention(q, k, k, 2, attention_mask=torch.ones(2, 1, LENGTH, LENGTH).tril().bool())
    rows = Walk(config)(scores := Sketch(config, HEAD_DIM)(q, k))
    assert Walk(config)(scores, rows).shape == scores.shape


def wrong_shape_is_seen() -> None:
    """The checks are live: a tensor with a dimension too few is refused."""
    from sketch_walk.walk import transition_rows

    try:
        transition_rows(torch.ones(2, 2), SketchWalkConfig())
    except Exception as error:
        assert "transition_rows" in str(error)  # noqa: PT017
        return
    raise AssertionError("a wrong shape went through: the annotations are not checked")


if __name__ == "__main__":
    wrong_shape_is_seen()
    base = {"block_size": 16, "density": 0.4, "skip_first_n_layers": 1}
    run(SketchWalkConfig(**base))
    run(SketchWalkConfig(**base, walk="damped", query_keep=0.25))
    run(SketchWalkConfig(**base, block_score="mass", walk="damped", sketch_dim=17))
    run(SketchWalkConfig(**base, head_mode="per_kv_head", reduce="mean", mean_correction=True, key_sketch_bits=16))
    run(SketchWalkConfig(**base, head_mode="mean", walk="product", dense_tail_blocks=1, query_sub_block=16))
    run(SketchWalkConfig(block_size=16, mass=0.7, skip_first_n_layers=1))
    print("shapes hold")
