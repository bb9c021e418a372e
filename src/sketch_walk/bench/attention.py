"""Attention of one layer, prefill and decode: sparse kernels alone and with the selector, against dense kernels.

Prefill is a whole prompt. A decode step is one new token per sequence; its keys are one token short of the stated
length, so that the step, like most, completes no block.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sketch_walk import kernels
from sketch_walk.attention import SketchWalkOutput, sketch_walk_attention
from sketch_walk.bench.baselines import (
    BASELINES,
    UnavailableError,
    check_baselines,
    dense_attention,
    selected_attention,
)
from sketch_walk.bench.checks import (
    MismatchError,
    check_attend,
    check_layer,
    expect,
    filled_state,
    relative_error,
    sampled_error,
    tolerance,
)
from sketch_walk.bench.inputs import (
    QKV,
    HeadShape,
    attend_selection,
    bench_config,
    check_shape,
    make_generator,
    make_qkv,
    random_selection,
    row_index,
)
from sketch_walk.bench.record import Row, compare
from sketch_walk.bench.timing import NotCapturableError, Stopwatch, capture, first_line
from sketch_walk.config import SketchWalkConfig
from sketch_walk.layout import Layout, make_layout
from sketch_walk.look_back import defers
from sketch_walk.selection import BlockSelection, block_density, pair_density
from sketch_walk.state import LayerSketch

LLAMA_8B = HeadShape()
PHASES = ("prefill", "decode")
KINDS = ("attention", "layer", "automatic")


@dataclass(frozen=True)
class AttentionOptions:
    """What is timed.

    Parameters
    ----------
    tokens, batches, densities, block_sizes : tuple
        Every combination is one case; prefill always has batch 1.
    phases : tuple of {"prefill", "decode"}
    kernels : tuple of str
        Implementations of `sketch_walk.kernels`.
    kinds : tuple of {"attention", "layer", "automatic"}
        A kernel on a random selection; a layer with its selector; whatever the automatic path chooses.
    baselines : tuple of str
        Names of `sketch_walk.bench.baselines`.
    graph : bool
        Time calls inside a CUDA graph, and eagerly where that is not possible.
    repeats, rounds : int
        Each call is timed `repeats` times in a row, and all calls of a case in so many rounds: what a GPU's clock does
        in the meantime is then the same to all.
    check_tokens : int
        Longest call that is compared with the reference kernel.
    changes : dict
        Fields of `SketchWalkConfig`.

    Raises
    ------
    ValueError, TypeError
        For a name that is unknown, a number out of range, or a kernel that is not usable here.
    """

    device: torch.device
    dtype: torch.dtype
    shape: HeadShape = LLAMA_8B
    tokens: tuple[int, ...] = (8192, 32768, 65536, 131072)
    batches: tuple[int, ...] = (1,)
    densities: tuple[float, ...] = (0.2, 0.05)
    block_sizes: tuple[int, ...] = (64, 128)
    phases: tuple[str, ...] = PHASES
    kernels: tuple[str, ...] = ("auto",)
    kinds: tuple[str, ...] = ("attention", "layer")
    baselines: tuple[str, ...] = BASELINES
    graph: bool = False
    flush: bool = True
    repeats: int = 10
    rounds: int = 1
    seed: int = 0
    check_tokens: int = 4096
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_shape(self.shape)
        check_baselines(self.baselines)
        for name, given, known in (("phase", self.phases, PHASES), ("kind", self.kinds, KINDS)):
            for value in given:
                if value not in known:
                    raise ValueError(f"unknown {name} {value!r}; expected one of {known}")
        for impl in self.kernels:
            kernels.check_impl(impl)
        for name in ("tokens", "batches", "block_sizes"):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(f"{name} must be numbers of at least 1, got {getattr(self, name)}")
        if min(self.tokens) < 2:
            raise ValueError(f"tokens must be at least 2, got {min(self.tokens)}")
        for name in ("repeats", "rounds", "check_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.configs()

    def configs(self) -> list[SketchWalkConfig]:
        """One per block size and density."""
        return [
            bench_config(self.shape.head_dim, block, density, self.changes)
            for block in self.block_sizes
            for density in self.densities
        ]

    def cases(self) -> list[tuple[str, int, int]]:
        """(phase, batch, tokens) of every size."""
        found = []
        for phase in self.phases:
            batches = self.batches if phase == "decode" else (1,)
            found += [(phase, batch, tokens) for batch in batches for tokens in self.tokens]
        return found

    def num_rows(self) -> int:
        """Rows that `run_attention` makes."""
        dense = sum(name != "flex-sparse" for name in self.baselines)
        sparse = len(self.kernels) * len(self.kinds) + ("flex-sparse" in self.baselines)
        return len(self.cases()) * (dense + sparse * len(self.configs()))


@dataclass
class Case:
    """Inputs of one size."""

    options: AttentionOptions
    phase: str
    batch: int
    tokens: int
    generator: torch.Generator
    inputs: QKV
    layout: Layout
    # What is timed in later rounds: rows, and the operations of a call of each.
    timed: list[tuple[Row, Stopwatch, float]] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """The attention's own."""
        return float(self.options.shape.head_dim**-0.5)

    @property
    def decode(self) -> bool:
        """Whether there is one query only."""
        return self.phase == "decode"

    @property
    def graph(self) -> bool:
        """Whether times come from inside a CUDA graph where that is possible."""
        return self.options.graph

    def row(self, method: str, kind: str, config: SketchWalkConfig | None = None) -> Row:
        """A row without a time."""
        block, density = (None, None) if config is None else (config.block_size, config.density)
        return Row(self.phase, self.batch, self.tokens, method, kind, block_size=block, density=density)


def run_attention(options: AttentionOptions, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Check and time every combination.

    Parameters
    ----------
    on_row : callable, optional
        Called with each row once it is there; its comparisons are filled in when its size is done.

    Returns
    -------
    list of Row
        A row without a time has a reason.
    """
    rows: list[Row] = []
    for phase, batch, tokens in options.cases():
        found = []
        for row in _case_rows(options, phase, batch, tokens):
            found.append(row)
            if on_row is not None:
                on_row(row)
        compare(found)
        rows += found
    return rows


def _case_rows(options: AttentionOptions, phase: str, batch: int, tokens: int) -> Iterator[Row]:
    case = make_case(options, phase, batch, tokens)
    for name in options.baselines:
        if name != "flex-sparse":
            yield _dense_row(case, name)
    for config in options.configs():
        chosen = random_selection(case.layout, config, options.shape.kv_heads, case.generator)
        if "flex-sparse" in options.baselines:
            yield _flex_row(case, config, chosen)
        for impl in options.kernels:
            for kind in options.kinds:
                yield _sparse_row(case, config, chosen, impl, kind)
    for _ in range(1, options.rounds):
        for row, watch, operations in case.timed:
            watch.run(options.repeats)
            _time(row, watch, operations)


def make_case(options: AttentionOptions, phase: str, batch: int, tokens: int) -> Case:
    """Random inputs of one size."""
    generator = make_generator(options.device, options.seed)
    keys = tokens - 1 if phase == "decode" else tokens
    queries = 1 if phase == "decode" else tokens
    inputs = make_qkv(options.shape, batch, queries, keys, options.dtype, generator)
    layout = make_layout(batch, queries, keys, options.device)
    if phase == "decode" and options.graph:
        # A graph that is replayed for the next tokens too cannot know their positions on the host.
        layout = replace(layout, bounds=None)
    return Case(options, phase, batch, tokens, generator, inputs, layout)


def _dense_row(case: Case, name: str) -> Row:
    row = case.row(name, "dense")

    def prepare() -> tuple[Callable[[], Tensor], float]:
        attention = dense_attention(name, case.options.device, case.scale)
        call = partial(attention, *case.inputs)
        return call, _check_output(case, call())

    return _fill(case, row, prepare, 1.0)


def _flex_row(case: Case, config: SketchWalkConfig, chosen: BlockSelection) -> Row:
    row = case.row("flex-sparse", "attention", config)

    def prepare() -> tuple[Callable[[], Tensor], float]:
        attention = selected_attention(chosen, config.block_size, case.options.device, case.scale)
        call = partial(attention, *case.inputs)
        return call, _check_output(case, call(), chosen, config)

    return _fill(case, row, prepare, _density(case, config, chosen, row))


def _sparse_row(case: Case, config: SketchWalkConfig, chosen: BlockSelection, impl: str, kind: str) -> Row:
    options = case.options
    row = case.row(impl, kind, config)
    check = {"attention": check_attend, "layer": check_layer, "automatic": check_layer}[kind]
    short = min(case.tokens, options.check_tokens)
    read = [1.0]

    def prepare() -> tuple[Callable[[], Tensor], float]:
        if options.device.type == "cpu" and impl == "triton":
            raise UnavailableError("it runs in Triton's interpreter here: a time would mean nothing")
        error = check(
            impl,
            options.shape,
            config,
            options.dtype,
            case.generator,
            tokens=short,
            batch=min(case.batch, 2),
            decode=case.decode,
        )
        call, selection, output = _sparse_call(case, config, chosen, impl, kind, row)
        read[0] = _density(case, config, selection, row) if selection is not None else 1.0
        return call, max(error, _check_output(case, output, selection, config))

    return _fill(case, row, prepare, lambda: read[0])


def _sparse_call(
    case: Case, config: SketchWalkConfig, chosen: BlockSelection, impl: str, kind: str, row: Row
) -> tuple[Callable[[], Tensor], BlockSelection | None, Tensor]:
    """What is timed, the selection that a call of it read (None: dense), and that call's output.

    A step remembers: the next call may read other blocks, as many of them.
    """
    device = case.options.device
    if kind == "attention":
        call = partial(attend_selection, case.inputs, chosen, case.layout, config, case.scale, impl)
        output, row.impl = call()
        return lambda: call()[0], chosen, output
    if kind == "automatic" and case.tokens < kernels.dense_crossover(device.type, case.decode):
        row.impl = "dense"
        return partial(_dense_path, case, config), None, _dense_path(case, config)
    layer = layer_call(case, config, impl)
    result = layer()
    row.impl = result.impl
    return lambda: layer().output, result.selection.per_head(), result.output


def _dense_path(case: Case, config: SketchWalkConfig) -> Tensor:
    """A call below the crossover: torch's dense attention, and the queries kept for a sparse call to come."""
    output = kernels.attend_dense(*case.inputs, case.layout, scale=case.scale)
    if defers(config, case.inputs.query.shape[2], case.tokens):
        LayerSketch(config).defer(case.inputs.query, case.tokens)
    return output


def layer_call(case: Case, config: SketchWalkConfig, impl: str) -> Callable[[], Any]:
    """One sparse layer with its selector and with a walk handed in: a prompt, or a step after a filled cache."""
    layout, state = case.layout, None
    if case.decode:
        state = filled_state(case.inputs.key, case.inputs.query, config, layout, fixed=True)

    def call(walk: Tensor | None = None) -> SketchWalkOutput:
        # A prompt makes the state that steps need.
        own = LayerSketch(config) if state is None else state
        return sketch_walk_attention(*case.inputs, config, state=own, walk=walk, layout=layout, impl=impl)

    return partial(call, walk=call().walk)


def _check_output(
    case: Case, output: Tensor, chosen: BlockSelection | None = None, config: SketchWalkConfig | None = None
) -> float:
    """Error of a sample of the timed call's own rows."""
    block = 1 if config is None else config.block_size
    if config is not None and config.mean_correction:
        # Exact attention here knows no stand-ins; the reference kernel, which does, was compared at a shorter length.
        return 0.0
    error = sampled_error(output, case.inputs, case.scale, chosen, block)
    return expect(error, tolerance(output.dtype, output.device), f"sampled rows at {case.tokens} tokens")


def _density(case: Case, config: SketchWalkConfig, chosen: BlockSelection, row: Row) -> float:
    """Fill in the block density; the fraction of causal token pairs that are read."""
    index = row_index(case.layout, config)
    row.block_density = block_density(chosen, index)
    return pair_density(chosen, index, case.layout.past, case.layout.length, config.block_size)


def _fill(
    case: Case,
    row: Row,
    prepare: Callable[[], tuple[Callable[[], Tensor], float]],
    read: float | Callable[[], float],
) -> Row:
    """Check, then time; whatever goes wrong becomes the row's reason."""
    options = case.options
    seen: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                call, row.error = prepare()
            finally:
                seen = [first_line(warning.message) for warning in caught if isinstance(warning.message, Warning)]
        if case.graph:
            call = _graphed(row, call, options)
        watch = Stopwatch(call, options.device, flush=options.flush)
        watch.run(options.repeats)
        operations = _operations(case, read() if callable(read) else read)
        _time(row, watch, operations)
        if options.rounds > 1:
            case.timed.append((row, watch, operations))
    except UnavailableError as error:
        row.reason = str(error)
    except MismatchError as error:
        row.reason, row.failed = f"no match, no time: {error}", True
    except Exception as error:
        row.reason = "; ".join([f"{type(error).__name__}: {first_line(error)}", *seen[:1]])
        row.failed = row.method in kernels.IMPLEMENTATIONS and not is_refusal(error)
    if row.timing is None and case.graph:
        row.graph = False
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _time(row: Row, watch: Stopwatch, operations: float) -> None:
    row.timing = watch.timing()
    row.tflops = operations / row.timing.median_ms / 1e9


def is_refusal(error: Exception) -> bool:
    """Whether a kernel says that it cannot do this, which is a reason; any other error of ours is a failure."""
    return isinstance(error, ValueError) and "cannot run this call" in str(error)


def _graphed(row: Row, call: Callable[[], Tensor], options: AttentionOptions) -> Callable[[], Tensor]:
    try:
        captured = capture(call, options.device)
    except NotCapturableError as error:
        row.note = f"eager, no CUDA graph: {error}"
        return call
    expected = call()
    captured.replay()
    limit = tolerance(expected.dtype, options.device)
    row.error = max(row.error or 0.0, expect(relative_error(captured.result, expected), limit, "replay of the graph"))
    row.graph = True
    return captured.replay


def _operations(case: Case, fraction: float) -> float:
    """Floating-point operations of the two products over `fraction` of the causal pairs."""
    queries, keys = case.layout.num_queries, case.layout.num_keys
    pairs = queries * (keys - queries) + queries * (queries + 1) // 2
    shape = case.options.shape
    return 4.0 * case.batch * shape.heads * shape.head_dim * pairs * fraction
