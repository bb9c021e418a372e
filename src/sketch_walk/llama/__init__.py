"""Promised import path of the Llama names."""

from sketch_walk.llama.configuration_llama_sketchwalk import SketchWalkLlamaConfig
from sketch_walk.llama.modeling_llama_sketchwalk import (
    SketchWalkLlamaForCausalLM,
    SketchWalkLlamaModel,
    create_sketch_walk_llama,
)

__all__ = [
    "SketchWalkLlamaConfig",
    "SketchWalkLlamaForCausalLM",
    "SketchWalkLlamaModel",
    "create_sketch_walk_llama",
]
