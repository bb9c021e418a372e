"""Models for an outside quality yardstick: `make(arg)` returns (model, tokenizer) with sparse attention switched on.

`arg` holds config fields, or {"rule": "paper" | "icml" | "dense", ...fields}. "cast": true loads float32 weights and
casts the whole model to bfloat16, as the yardstick's own loader does: that rounds RoPE's frequencies too, which changes
answers. Without it the frequencies stay in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sketch_walk import SketchWalkConfig
from sketch_walk.integrations.models import load
from sketch_walk.integrations.transformers import enable

HANDLES = []


def make(arg: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 with the config that `arg` describes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = dict(arg)
    cast = fields.pop("cast", False)
    model, tokenizer = load(None, dtype=torch.float32 if cast else torch.bfloat16, device=device)
    if cast:
        model = model.to(torch.bfloat16)
    rule = fields.pop("rule", "config")
    if rule != "dense":
        makers = {"config": SketchWalkConfig, "paper": SketchWalkConfig.paper, "icml": SketchWalkConfig.icml}
        HANDLES.append(enable(model, makers[rule](**{"dense_below": 0, **fields})))
    return model, tokenizer
