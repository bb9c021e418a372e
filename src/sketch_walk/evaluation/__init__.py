"""Needle-in-a-haystack evaluation on text that belongs to this project, and instruments for selections."""

from sketch_walk.evaluation.needles import TASKS, NeedleSample, Task, make_sample
from sketch_walk.evaluation.oracle import oracle_scores
from sketch_walk.evaluation.prose import prose
from sketch_walk.evaluation.recall import LayerSelection, SelectionReport, measure_selection, observe_selection
from sketch_walk.evaluation.runner import EvaluationResult, HeatMap, SampleScore, evaluate
from sketch_walk.evaluation.selectors import SELECTORS, oracle, selector

__all__ = [
    "SELECTORS",
    "TASKS",
    "EvaluationResult",
    "HeatMap",
    "LayerSelection",
    "NeedleSample",
    "SampleScore",
    "SelectionReport",
    "Task",
    "evaluate",
    "make_sample",
    "measure_selection",
    "observe_selection",
    "oracle",
    "oracle_scores",
    "prose",
    "selector",
]
