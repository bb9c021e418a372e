"""Bytes that attention of one layer needs: the peak of a call, what stays, and the selector's share of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sketch_walk.attention import SketchWalkOutput, sketch_walk_attention
from sketch_walk.bench.attention import AttentionOptions, Case, make_case
from sketch_walk.bench.baselines import Attention, UnavailableError, dense_attention
from sketch_walk.bench.checks import filled_state
from sketch_walk.bench.inputs import attend_selection, random_selection
from sketch_walk.bench.timing import first_line
from sketch_walk.config import SketchWalkConfig
from sketch_walk.selection import BlockSelection
from sketch_walk.state import LayerSketch

# `AttentionOptions` says all that is asked here; repeats, batches and graphs are not read.
MemoryOptions = AttentionOptions

MIB = 1 << 20
# The founding document's estimates for one layer at 65,536 tokens. They are those of one head in float32, with 1,024
# blocks of 64 tokens and sketches of 64 coordinates, of queries and of keys: 3·65,536·128·4, 2·1,024·128·4,
# 2·1,024·64·4 and 1,024²·4 bytes.
FOUNDING_TOKENS = 65_536
FOUNDING_BYTES = {"qkv": 96 * MIB, "block_means": MIB, "sketches": MIB // 2, "walk": 4 * MIB}


def founding_bytes(tokens: int) -> dict[str, float]:
    """The founding document's estimates scaled to `tokens`: the walk with the square of the length."""
    ratio = tokens / FOUNDING_TOKENS
    return {name: size * ratio ** (2 if name == "walk" else 1) for name, size in FOUNDING_BYTES.items()}


class Peak(NamedTuple):
    """What a call returned, and the most bytes that were alive at once above those before it."""

    result: Any
    bytes: int


@dataclass
class MemoryRow:
    """Bytes of one method at one length, batch 1.

    Parameters
    ----------
    qkv_bytes, kv_cache_bytes : int
        Inputs of the call; keys and values alone.
    peak_bytes : int
        Most bytes above the inputs during the call: output, working memory, and a state that the call makes.
    output_bytes : int
    state_bytes : dict, optional
        What the selector keeps between calls, by part: key sketches, transition rows, recent queries.
    walk_bytes : int, optional
        Rows of R, which one forward pass hands from layer to layer.
    state_share : float, optional
        The state as a fraction of the KV cache.
    """

    phase: str
    tokens: int
    method: str
    kind: str
    qkv_bytes: int
    kv_cache_bytes: int
    impl: str | None = None
    block_size: int | None = None
    density: float | None = None
    peak_bytes: int | None = None
    output_bytes: int | None = None
    state_bytes: dict[str, int] | None = None
    walk_bytes: int | None = None
    reason: str | None = None
    failed: bool = False

    @property
    def state_share(self) -> float | None:
        """The state as a fraction of the KV cache."""
        return None if self.state_bytes is None else sum(self.state_bytes.values()) / self.kv_cache_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; empty fields are left out."""
        values = {name: value for name, value in asdict(self).items() if value is not None and value is not False}
        if self.state_share is not None:
            values["state_share"] = round(self.state_share, 5)
        return values


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the storages that torch operations return inside the context.

    What an operation allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.total = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        address = storage._cdata
        if address in self.live:
            return
        self.live[address] = storage.nbytes()
        self.total += storage.nbytes()
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self.total -= self.live.pop(address, 0)


def peak_of(call: Callable[[], Any], device: torch.device) -> Peak:
    """Run `call` twice and meter the second: what is compiled or set up once is not counted.

    On a GPU by its allocator's statistics; elsewhere by the tensors that torch operations return.
    """
    call()
    if device.type != "cuda":
        with LiveBytes() as meter:
            result = call()
        return Peak(result, meter.peak)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    return Peak(result, torch.cuda.max_memory_allocated(device) - before)


def run_memory(options: MemoryOptions, on_row: Callable[[MemoryRow], None] | None = None) -> list[MemoryRow]:
    """Meter every combination at batch 1; nothing is timed or checked.

    Returns
    -------
    list of MemoryRow
        A row without a peak has a reason.
    """
    rows = []
    for phase in options.phases:
        for tokens in options.tokens:
            case = make_case(options, phase, 1, tokens)
            for row, call in _calls(case):
                rows.append(_metered(row, call, options.device))
                if on_row is not None:
                    on_row(rows[-1])
            del case
    return rows


def num_rows(options: MemoryOptions) -> int:
    """Rows that `run_memory` makes."""
    dense = sum(name != "flex-sparse" for name in options.baselines)
    sparse = 2 * len(options.kernels) * len(options.configs())
    return len(options.phases) * len(options.tokens) * (dense + sparse)


def _calls(case: Case) -> list[tuple[MemoryRow, Callable[[], Any]]]:
    options = case.options
    kv_cache = case.inputs.key.nbytes + case.inputs.value.nbytes

    def row(method: str, kind: str, config: SketchWalkConfig | None = None) -> MemoryRow:
        block, density = (None, None) if config is None else (config.block_size, config.density)
        size = (case.inputs.nbytes, kv_cache)
        return MemoryRow(case.phase, case.tokens, method, kind, *size, block_size=block, density=density)

    calls: list[tuple[MemoryRow, Callable[[], Any]]] = []
    for name in options.baselines:
        if name != "flex-sparse":
            calls.append((row(name, "dense"), _dense_call(case, name)))
    for config in options.configs():
        for impl in options.kernels:
            calls.append((row(impl, "attention", config), _attention_call(case, config, impl)))
            calls.append((row(impl, "layer", config), _layer_call(case, config, impl)))
    return calls


def _dense_call(case: Case, name: str) -> Callable[[], Tensor]:
    """A dense kernel, which is made by the first of its calls."""
    made: list[Attention] = []

    def call() -> Tensor:
        if not made:
            made.append(dense_attention(name, case.options.device, case.scale))
        return made[0](*case.inputs)

    return call


def _attention_call(case: Case, config: SketchWalkConfig, impl: str) -> Callable[[], Any]:
    """A kernel on a random selection, which is made by the first of its calls."""
    chosen: list[BlockSelection] = []

    def call() -> tuple[Tensor, str]:
        if not chosen:
            chosen.append(random_selection(case.layout, config, case.options.shape.kv_heads, case.generator))
        return attend_selection(case.inputs, chosen[0], case.layout, config, case.scale, impl)

    return call


def _layer_call(case: Case, config: SketchWalkConfig, impl: str) -> Callable[[], tuple[SketchWalkOutput, LayerSketch]]:
    """A layer with its selector: a prompt makes its state, a decode step finds it."""
    filled: list[LayerSketch] = []

    def call() -> tuple[SketchWalkOutput, LayerSketch]:
        if case.decode and not filled:
            filled.append(filled_state(case.inputs.key, case.inputs.query, config, case.layout, fixed=True))
        state = filled[0] if case.decode else LayerSketch(config)
        return sketch_walk_attention(*case.inputs, config, state=state, layout=case.layout, impl=impl), state

    return call


def _metered(row: MemoryRow, call: Callable[[], Any], device: torch.device) -> MemoryRow:
    try:
        result, row.peak_bytes = peak_of(call, device)
        if row.kind == "layer":
            output, state = result
            row.impl = output.impl
            row.output_bytes = output.output.nbytes
            row.walk_bytes = output.walk.nbytes
            row.state_bytes = state.nbytes()
        elif row.kind == "attention":
            row.output_bytes, row.impl = result[0].nbytes, result[1]
        else:
            row.output_bytes = result.nbytes
    except UnavailableError as error:
        row.reason = str(error)
    except Exception as error:
        row.reason = f"{type(error).__name__}: {first_line(error)}"
        row.failed = row.kind != "dense"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row
