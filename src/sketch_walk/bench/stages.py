"""The selector stage by stage, beside the attention it serves and the layer as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from sketch_walk.attention import one_step, select
from sketch_walk.bench.attention import AttentionOptions, Case, is_refusal, layer_call, make_case
from sketch_walk.bench.checks import MismatchError, check_attend, check_layer, filled_state
from sketch_walk.bench.inputs import attend_selection
from sketch_walk.bench.record import timing_dict
from sketch_walk.bench.timing import NotCapturableError, Timing, capture, first_line, measure
from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout
from sketch_walk.scoring import absorb_keys, absorb_rows, call_scores, step_with_triton
from sketch_walk.selection import block_density
from sketch_walk.state import LayerSketch
from sketch_walk.walk import transition_rows, walk_step

ATTEND = "attend"

# `AttentionOptions` says all that is asked here; kinds and baselines are not read.
StageOptions = AttentionOptions


class Stage(NamedTuple):
    """One step of `sketch_walk.attention.sketch_walk_attention`, with its inputs bound."""

    name: str
    call: Callable[[], Any]


@dataclass
class StageRow:
    """Times of one size, by stage in the order of the layer.

    `selector_ms` is the sum of all stages but the attention; `layer` is the whole call, which may overlap or skip what
    the stages do one by one.
    """

    phase: str
    batch: int
    tokens: int
    method: str
    block_size: int
    density: float | None
    impl: str | None = None
    block_density: float | None = None
    error: float | None = None
    stages: dict[str, Timing] | None = None
    layer: Timing | None = None
    graph: bool = False
    reason: str | None = None
    note: str | None = None
    failed: bool = False

    @property
    def selector_ms(self) -> float:
        """All stages but the attention."""
        return sum(timing.median_ms for name, timing in (self.stages or {}).items() if name != ATTEND)

    @property
    def selector_share(self) -> float | None:
        """The selector's time as a fraction of the attention's: what the layer takes above its attention."""
        if self.stages is None or self.layer is None:
            return None
        return self.layer.median_ms / self.stages[ATTEND].median_ms - 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; empty fields are left out."""
        simple = {
            name: value
            for name, value in vars(self).items()
            if value is not None and name not in ("stages", "layer") and value is not False
        }
        for name in ("block_density", "error"):
            if name in simple:
                simple[name] = float(f"{simple[name]:.4g}")
        if self.stages is None or self.layer is None or self.selector_share is None:
            return simple
        return {
            **simple,
            "stages_ms": {name: timing_dict(timing) for name, timing in self.stages.items()},
            "layer_ms": timing_dict(self.layer),
            "selector_ms": round(self.selector_ms, 5),
            "selector_share": round(self.selector_share, 4),
        }


def selector_stages(
    case: Case, config: SketchWalkConfig, state: LayerSketch, layout: Layout, impl: str
) -> tuple[list[Stage], float, str]:
    """The stages of one call in their order, each run once so that the next has its inputs.

    Returns
    -------
    stages : list of Stage
    block_density : float
    impl : str
        The kernel that attends.
    """
    query, key, _ = case.inputs
    stages = []

    def stage(name: str, call: Callable[[], Any]) -> Any:
        stages.append(Stage(name, call))
        return call()

    blocks = config.block_size
    rows_of_call = layout.num_query_blocks(blocks)
    index = layout.first_block(blocks)[:, None] + torch.arange(rows_of_call, device=query.device)
    if step_with_triton(config, query, key, impl):
        _, selection = stage("sketch, score, select", partial(one_step, state, query, key, layout, case.scale, config))
    else:
        stage("sketch keys", partial(absorb_keys, state, key, layout, query, impl))
        scores = stage("scores", partial(call_scores, state, query, layout, case.scale, impl=impl))
        walk = scores
        if config.uses_walk:
            rows = stage("transition rows", partial(transition_rows, scores, config))
            stage("keep rows", partial(absorb_rows, state, query, rows, layout, case.scale))
            walk = stage("walk", lambda: walk_step(rows, rows, state.read_rows(rows.shape[3]), index, config))
        selection = stage("select", partial(select, walk, layout, config, impl=impl))
    attend = partial(attend_selection, case.inputs, selection.per_head(), layout, config, case.scale, impl)
    _, used = stage(ATTEND, attend)
    return stages, block_density(selection, index), used


def run_stages(options: StageOptions, on_row: Callable[[StageRow], None] | None = None) -> list[StageRow]:
    """Check and time every combination of size, config and kernel.

    Returns
    -------
    list of StageRow
        A row without times has a reason.
    """
    rows = []
    for phase, batch, tokens in options.cases():
        case = make_case(options, phase, batch, tokens)
        for config in options.configs():
            for impl in options.kernels:
                row = StageRow(phase, batch, tokens, impl, config.block_size, config.density)
                _fill(row, case, config, impl)
                rows.append(row)
                if on_row is not None:
                    on_row(row)
                if options.device.type == "cuda":
                    torch.cuda.empty_cache()
        # Before the next size is made: both need not fit.
        del case
    return rows


def _fill(row: StageRow, case: Case, config: SketchWalkConfig, impl: str) -> None:
    options = case.options
    if options.device.type == "cpu" and impl == "triton":
        row.reason = "it runs in Triton's interpreter here: a time would mean nothing"
        return
    try:
        row.error = max(
            check(
                impl,
                options.shape,
                config,
                options.dtype,
                case.generator,
                tokens=min(case.tokens, options.check_tokens),
                batch=min(case.batch, 2),
                decode=case.decode,
            )
            for check in (check_attend, check_layer)
        )
        layer = layer_call(case, config, impl)
        layout = case.layout
        state = (
            filled_state(case.inputs.key, case.inputs.query, config, layout, fixed=True)
            if case.decode
            else LayerSketch(config)
        )
        stages, row.block_density, row.impl = selector_stages(case, config, state, layout, impl)
        calls = [*stages, Stage("layer", layer)]
        if case.graph:
            calls = _graphed(row, calls, options.device)
        times = {name: measure(call, options.device, options.repeats, flush=options.flush) for name, call in calls}
        row.layer = times.pop("layer")
        row.stages = times
    except MismatchError as error:
        row.reason, row.failed = f"no match, no time: {error}", True
    except Exception as error:
        row.reason = f"{type(error).__name__}: {first_line(error)}"
        row.failed = not is_refusal(error)


def _graphed(row: StageRow, calls: list[Stage], device: torch.device) -> list[Stage]:
    """Every stage in a graph of its own, or all of them eagerly."""
    try:
        graphed = [Stage(name, _holding(call, device)) for name, call in calls]
    except NotCapturableError as error:
        row.note = f"eager, no CUDA graph: {error}"
        return calls
    row.graph = True
    return graphed


def _holding(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    captured = capture(call, device)
    return captured.replay
