"""Promised import path of the Llama models."""

from sketch_walk.integrations.llama import (
    SketchWalkLlamaForCausalLM,
    SketchWalkLlamaModel,
    create_sketch_walk_llama,
)

__all__ = ["SketchWalkLlamaForCausalLM", "SketchWalkLlamaModel", "create_sketch_walk_llama"]
