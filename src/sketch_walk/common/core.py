"""The method's names under their promised import path. No logic lives here."""

from sketch_walk.attention import SketchWalkAttention
from sketch_walk.config import SketchWalkConfig, create_sketch_walk_config
from sketch_walk.hadamard import HadamardTransform
from sketch_walk.sketch import Sketch
from sketch_walk.state import SketchState
from sketch_walk.state import SketchState as DecodeCache
from sketch_walk.walk import Walk

__all__ = [
    "DecodeCache",
    "HadamardTransform",
    "Sketch",
    "SketchState",
    "SketchWalkAttention",
    "SketchWalkConfig",
    "Walk",
    "create_sketch_walk_config",
]
