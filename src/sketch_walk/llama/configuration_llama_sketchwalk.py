"""Promised import path of the Llama configuration."""

from sketch_walk.integrations.llama import SketchWalkLlamaConfig

__all__ = ["SketchWalkLlamaConfig"]
