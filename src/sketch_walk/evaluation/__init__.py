"""Needle-in-a-haystack evaluation on text that belongs to this project, and instruments for selections."""

from sketch_walk.evaluation.batched import Scores, Workload, make_workload, measure
from sketch_walk.evaluation.decode import (
    DecodeScores,
    DecodeWay,
    DecodeWorkload,
    DenseDecode,
    make_decode_workload,
    measure_decode,
    measure_dense_decode,
    measure_ways,
)
from sketch_walk.evaluation.needles import TASKS, NeedleSample, Task, make_sample
from sketch_walk.evaluation.oracle import oracle_scores
from sketch_walk.evaluation.prose import prose
from sketch_walk.evaluation.recall import LayerSelection, SelectionReport, measure_selection, observe_selection
from sketch_walk.evaluation.runner import EvaluationResult, HeatMap, SampleScore, evaluate
from sketch_walk.evaluation.selectors import SELECTORS, oracle, selector
from sketch_walk.evaluation.statistics import Difference, Mean, mean_of, paired_difference

__all__ = [
    "SELECTORS",
    "TASKS",
    "DecodeScores",
    "DecodeWay",
    "DecodeWorkload",
    "DenseDecode",
    "Difference",
    "EvaluationResult",
    "HeatMap",
    "LayerSelection",
    "Mean",
    "NeedleSample",
    "SampleScore",
    "Scores",
    "SelectionReport",
    "Task",
    "Workload",
    "evaluate",
    "make_decode_workload",
    "make_sample",
    "make_workload",
    "mean_of",
    "measure",
    "measure_decode",
    "measure_dense_decode",
    "measure_selection",
    "measure_ways",
    "observe_selection",
    "oracle",
    "oracle_scores",
    "paired_difference",
    "prose",
    "selector",
]
