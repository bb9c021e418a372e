"""Needle-in-a-haystack evaluation on text that belongs to this project."""

from sketch_walk.evaluation.needles import TASKS, NeedleSample, Task, make_sample
from sketch_walk.evaluation.prose import prose
from sketch_walk.evaluation.runner import EvaluationResult, HeatMap, SampleScore, evaluate

__all__ = [
    "TASKS",
    "EvaluationResult",
    "HeatMap",
    "NeedleSample",
    "SampleScore",
    "Task",
    "evaluate",
    "make_sample",
    "prose",
]
