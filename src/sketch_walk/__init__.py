"""SketchWalk: training-free block-sparse attention for long-context LLM inference.

Importing it loads torch only. `sketch_walk.integrations.transformers.enable` switches a Hugging Face model over.
"""

from sketch_walk.attention import SketchWalkAttention, SketchWalkOutput, sketch_walk_attention
from sketch_walk.config import (
    PRESETS,
    SketchWalkConfig,
    calculate_sparsity,
    causal_density,
    create_sketch_walk_config,
)
from sketch_walk.hadamard import HadamardTransform
from sketch_walk.selection import BlockSelection
from sketch_walk.state import SketchState

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BlockSelection",
    "HadamardTransform",
    "SketchState",
    "SketchWalkAttention",
    "SketchWalkConfig",
    "SketchWalkOutput",
    "calculate_sparsity",
    "causal_density",
    "create_sketch_walk_config",
    "sketch_walk_attention",
]
