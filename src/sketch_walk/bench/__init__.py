"""Benchmarks of kernels, of the selector's stages, of memory and of whole models; correctness comes before every time.

Used by ``sketch-walk bench``; nothing here is imported with `sketch_walk` itself.
"""

from sketch_walk.bench.attention import AttentionOptions, run_attention
from sketch_walk.bench.inputs import HeadShape, bench_config
from sketch_walk.bench.memory import MemoryOptions, run_memory
from sketch_walk.bench.record import Row, environment
from sketch_walk.bench.stages import StageOptions, run_stages
from sketch_walk.bench.timing import Timing, measure

__all__ = [
    "AttentionOptions",
    "HeadShape",
    "MemoryOptions",
    "Row",
    "StageOptions",
    "Timing",
    "bench_config",
    "environment",
    "measure",
    "run_attention",
    "run_memory",
    "run_stages",
]
