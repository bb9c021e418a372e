"""A whole model: time to the first token of a prompt, and of a decode step, with dense and with sparse attention.

Dense kernels are registered with transformers' attention interface and get no mask, which these calls do not need; so
each runs at its best. A decode step goes through a static cache that was filled at random.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sketch_walk import kernels
from sketch_walk.bench.attention import is_refusal
from sketch_walk.bench.baselines import DENSE, UnavailableError, check_baselines, dense_attention
from sketch_walk.bench.checks import MismatchError, check_attend, expect, relative_error
from sketch_walk.bench.inputs import HeadShape, bench_config, make_generator
from sketch_walk.bench.record import Row, compare
from sketch_walk.bench.timing import NotCapturableError, capture, first_line, measure
from sketch_walk.config import SketchWalkConfig
from sketch_walk.extras import require
from sketch_walk.layout import make_layout
from sketch_walk.scoring import absorb_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dense kernels that a model is timed with.
MODEL_BASELINES = ("sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn-4")
# Relative error of logits at full budget against torch's own dense attention, through all layers. Where layers magnify
# rounding, twice the difference between two exact kernels counts if that is more.
LOGIT_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3}
# What tells a registered dense kernel how many positions of a static cache hold keys.
VISIBLE = "bench_visible_keys"
# Numbered: transformers takes a name with "flash" in it for a kernel to be fetched from a hub.
REGISTERED = {name: f"sketch_walk_bench_{number}" for number, name in enumerate(MODEL_BASELINES)}


@dataclass(frozen=True)
class ModelOptions:
    """What is timed.

    Parameters
    ----------
    prompt_tokens : tuple of int
        Lengths of a prompt, batch 1; empty for none.
    cached_tokens : tuple of int
        Lengths of a static cache for one decode step; empty for none.
    batch : int
        Sequences of the decode step.
    densities, block_size, kernels, changes
        As `sketch_walk.bench.attention.AttentionOptions`.
    automatic : bool
        Also time the automatic path: calls below the measured crossover run dense.
    baselines : tuple of str
        Names of `MODEL_BASELINES`.
    graph : bool
        Time the decode step inside a CUDA graph, and eagerly where that is not possible.
    check_tokens : int
        Length at which sparse attention at full budget is compared with dense attention.

    Raises
    ------
    ValueError, TypeError
        For a name that is unknown, a number out of range, or a kernel that is not usable here.
    """

    device: torch.device
    dtype: torch.dtype
    prompt_tokens: tuple[int, ...] = (131_072,)
    cached_tokens: tuple[int, ...] = ()
    batch: int = 2
    densities: tuple[float, ...] = (0.2,)
    block_size: int = 128
    kernels: tuple[str, ...] = ("auto",)
    automatic: bool = False
    baselines: tuple[str, ...] = MODEL_BASELINES
    graph: bool = False
    repeats: int = 3
    seed: int = 0
    check_tokens: int = 1024
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_baselines(self.baselines)
        for name in self.baselines:
            if name not in MODEL_BASELINES:
                raise ValueError(f"baseline {name!r} is not timed in a model; expected one of {MODEL_BASELINES}")
        for impl in self.kernels:
            kernels.check_impl(impl)
        if min((*self.prompt_tokens, *self.cached_tokens), default=0) < 4:
            raise ValueError(f"lengths must be at least 4, got {self.prompt_tokens} and {self.cached_tokens}")
        for name in ("batch", "repeats", "check_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.configs(128)

    def configs(self, head_dim: int) -> list[SketchWalkConfig]:
        """One per density."""
        return [bench_config(head_dim, self.block_size, density, self.changes) for density in self.densities]

    def num_rows(self) -> int:
        """Rows that `run_model` makes."""
        sizes = len(self.prompt_tokens) + len(self.cached_tokens)
        sparse = len(self.densities) * len(self.kernels) * (2 if self.automatic else 1)
        return sizes * (len(self.baselines) + sparse)


@dataclass
class Method:
    """One way to run the model: `switch` puts the model into it for a while."""

    name: str
    kind: str
    switch: Callable[..., AbstractContextManager[Any]]
    config: SketchWalkConfig | None = None

    def row(self, phase: str, batch: int, tokens: int) -> Row:
        """A row without a time."""
        block, density = (None, None) if self.config is None else (self.config.block_size, self.config.density)
        return Row(phase, batch, tokens, self.name, self.kind, block_size=block, density=density)


def head_shape(model: PreTrainedModel) -> HeadShape:
    """Heads of one of the model's attention layers.

    Raises
    ------
    ValueError
        If some layers do not attend to the whole context: their dense kernels would need a mask.
    """
    from sketch_walk.integrations.transformers import head_dim_of

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    if kinds != {"full_attention"}:
        raise ValueError(f"the model has layers of types {sorted(kinds)}; only full attention is timed")
    return HeadShape(config.num_attention_heads, config.num_key_value_heads, head_dim_of(model))


@torch.no_grad()
def run_model(model: PreTrainedModel, options: ModelOptions, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Check and time every method at every length.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On `options.device`, in evaluation mode.

    Returns
    -------
    list of Row
        Phase "prefill" is the time to the first token, "decode" that of one step. A row without a time has a reason.

    Raises
    ------
    ValueError
        For a model whose layers do not all attend to the whole context.
    """
    shape = head_shape(model)
    methods = _methods(model, shape, options)
    rows: list[Row] = []
    for phase, lengths in (("prefill", options.prompt_tokens), ("decode", options.cached_tokens)):
        for tokens in lengths:
            found = []
            for method in methods:
                batch = 1 if phase == "prefill" else options.batch
                row = method.row(phase, batch, tokens)
                _fill(row, model, shape, method, options)
                found.append(row)
                if on_row is not None:
                    on_row(row)
            compare(found)
            rows += found
    return rows


def _methods(model: PreTrainedModel, shape: HeadShape, options: ModelOptions) -> list[Method]:
    methods = [Method(name, "dense", partial(dense_model, model, name, options.device)) for name in options.baselines]
    for config in options.configs(shape.head_dim):
        for impl in options.kernels:
            methods.append(Method(impl, "model", partial(_sparse, model, config, impl), config))
            if options.automatic:
                chosen = replace(config, dense_below=None)
                methods.append(Method(impl, "automatic", partial(_sparse, model, chosen, impl), chosen))
    return methods


@contextmanager
def dense_model(model: PreTrainedModel, name: str, device: torch.device, **_: Any) -> Iterator[None]:
    """Let `model` run one dense kernel, without a mask, for a while.

    Raises
    ------
    UnavailableError
        If the kernel cannot run here.
    """
    transformers = require("transformers", "transformers")
    assert name in DENSE
    # Fails here rather than inside the first layer.
    dense_attention(name, device, 1.0)
    registered = REGISTERED[name]
    transformers.AttentionInterface.register(registered, partial(_attention_forward, name, device))
    transformers.AttentionMaskInterface.register(registered, _no_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(registered)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention_forward(
    name: str,
    device: torch.device,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    visible = kwargs.get(VISIBLE)
    if visible is not None:
        key, value = key[:, :, :visible], value[:, :, :visible]
    attention = dense_attention(name, device, query.shape[3] ** -0.5 if scaling is None else scaling)
    return attention(query, key, value).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _sparse(
    model: PreTrainedModel, config: SketchWalkConfig, impl: str, record: bool = False, full: bool = False
) -> AbstractContextManager[Any]:
    from sketch_walk.integrations.transformers import enable

    if full:
        config = replace(config, density=1.0, mass=None, density_excludes_forced=False, dense_below=0)
    return enable(model, config, impl=impl, record=record)


def _fill(row: Row, model: PreTrainedModel, shape: HeadShape, method: Method, options: ModelOptions) -> None:
    """Check, then time; whatever goes wrong becomes the row's reason."""
    phase, device = row.phase, options.device
    make = _prompt if phase == "prefill" else _step
    try:
        row.error = _check(row, model, shape, method, options)
        with method.switch(record=True) if method.config is not None else nullcontext() as handle:
            if handle is not None:
                make(model, shape, method.config, row.batch, row.tokens, options)()
                summary = handle.summary()
                row.block_density = summary["block_density"]
                row.impl = "+".join(sorted({call.impl for call in handle.calls}))
        with method.switch():
            call = make(model, shape, method.config, row.batch, row.tokens, options)
            if phase == "decode" and options.graph:
                call = _graphed(row, call, options)
            # A sparse prompt was run once at this length, to be recorded.
            warm_up = 0 if method.config is not None and phase == "prefill" else 1
            row.timing = measure(call, device, options.repeats, warm_up=warm_up, flush=False)
    except UnavailableError as error:
        row.reason = str(error)
    except MismatchError as error:
        row.reason, row.failed = f"no match, no time: {error}", True
    except Exception as error:
        row.reason = f"{type(error).__name__}: {first_line(error)}"
        row.failed = method.config is not None and not is_refusal(error)
    if row.timing is None:
        row.graph = False
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _graphed(row: Row, call: Callable[[], Tensor], options: ModelOptions) -> Callable[[], Any]:
    try:
        captured = capture(call, options.device)
    except NotCapturableError as error:
        row.note = f"eager, no CUDA graph: {error}"
        return call
    expected = call()
    captured.replay()
    expect(relative_error(captured.result, expected), LOGIT_TOLERANCE[options.dtype], "replay of the graph")
    row.graph = True
    return captured.replay


def _check(row: Row, model: PreTrainedModel, shape: HeadShape, method: Method, options: ModelOptions) -> float:
    """Largest error: of the logits against plain "sdpa", at full budget, and of the kernel against the reference."""
    make = _prompt if row.phase == "prefill" else _step
    tokens = min(row.tokens, options.check_tokens)
    dense = partial(dense_model, model, "sdpa", options.device)
    logits = []
    plain = nullcontext()
    for switch, backend in ((dense, plain), (dense, sdpa_kernel(SDPBackend.MATH)), (method.switch, plain)):
        sparse = switch is method.switch and method.config is not None
        with backend, switch(full=True) if sparse else switch():
            logits.append(make(model, shape, method.config if sparse else None, row.batch, tokens, options)())
    allowed = max(LOGIT_TOLERANCE[options.dtype], 2 * relative_error(logits[1], logits[0]))
    error = expect(relative_error(logits[2], logits[0]), allowed, f"logits at {tokens} tokens, full budget")
    if method.config is None:
        return error
    generator = make_generator(options.device, options.seed)
    return max(
        error,
        check_attend(
            method.name,
            shape,
            method.config,
            options.dtype,
            generator,
            tokens=tokens,
            batch=row.batch,
            decode=row.phase == "decode",
        ),
    )


def _prompt(
    model: PreTrainedModel,
    shape: HeadShape,
    config: SketchWalkConfig | None,
    batch: int,
    tokens: int,
    options: ModelOptions,
) -> Callable[[], Tensor]:
    """A whole prompt into a fresh cache; logits of the last token."""
    vocab = model.config.get_text_config().vocab_size
    generator = make_generator(options.device, options.seed)
    ids = torch.randint(vocab, (batch, tokens), device=options.device, generator=generator)
    # Logits of a long prompt would be larger than the model.
    accepted = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def call() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=True, **last).logits
        return logits[:, -1]

    return call


def _step(
    model: PreTrainedModel,
    shape: HeadShape,
    config: SketchWalkConfig | None,
    batch: int,
    tokens: int,
    options: ModelOptions,
) -> Callable[[], Tensor]:
    """One decode step after a static cache of `tokens` positions that lacks two; every call repeats the same step.

    With `config` the layers carry sketches of the random keys, and transition rows that keep mass where it is.
    """
    transformers = require("transformers", "transformers")
    cache = transformers.StaticCache(config=model.config, max_cache_len=tokens)
    if config is not None:
        from sketch_walk.integrations.sketch_cache import adopt

        adopt(cache, config)
    generator = make_generator(options.device, options.seed)
    cache.early_initialization(batch, shape.kv_heads, shape.head_dim, options.dtype, options.device)
    filled = tokens - 2
    heads = torch.empty(batch, shape.heads, 1, shape.head_dim, dtype=options.dtype, device=options.device)
    memories = []
    for layer in cache.layers:
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)
        layer.cumulative_length.fill_(filled)
        sketch = getattr(layer, "sketch", None)
        if sketch is not None:
            keys = layer.keys[:, :, :filled]
            absorb_keys(sketch, keys, make_layout(batch, filled, filled, options.device), heads)
            memories += sketch.memories()
    counters = [layer.cumulative_length for layer in cache.layers]
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (batch, 1), device=options.device, generator=generator)
    visible = {} if config is not None else {VISIBLE: filled + 1}

    def call() -> Tensor:
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **visible).logits
        # The step counted itself into the cache, in place, and remembers: take both back for the next repeat.
        torch._foreach_sub_(counters, 1)
        if memories:
            torch._foreach_sub_(memories, math.inf)
        return logits[:, -1]

    return call
