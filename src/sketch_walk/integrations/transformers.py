"""Hugging Face transformers: `enable(model, config)` switches any decoder model over, and back.

The attention function and its mask function are registered under the name "sketch_walk" when a model is first enabled.
A hook before the decoder's forward hands every layer one `ForwardPass`: the walk of this pass, the cache, and where the
pass stands in it. Sketches live in the layers of the KV cache. No modeling file is copied and nothing is patched.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sketch_walk import kernels, look_back
from sketch_walk.attention import ScoreFunction, SketchWalkOutput, sketch_walk_attention
from sketch_walk.config import SketchWalkConfig
from sketch_walk.extras import require
from sketch_walk.hadamard import sketch_matrix
from sketch_walk.layout import Layout, make_layout
from sketch_walk.scoring import absorb_call, absorb_keys
from sketch_walk.selection import block_density, pair_density, row_counts

require("transformers", "transformers")

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel  # noqa: E402
from transformers.cache_utils import Cache  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import causal_mask_function, sdpa_mask  # noqa: E402

from sketch_walk.integrations.sketch_cache import (  # noqa: E402
    SketchDynamicLayer,
    SketchLayer,
    SketchStaticLayer,
    adopt,
    new_cache,
)

if TYPE_CHECKING:
    from jaxtyping import Bool

# Both depend on the config and on sizes only: a compiled graph holds their results. Marked here, because marking loads
# the compiler, which a plain import of the package must not.
for constant in (sketch_matrix, row_counts):
    torch.compiler.assume_constant_result(constant)

NAME = "sketch_walk"
LOGGER = logging.getLogger(NAME)
MODES = ("both", "prefill", "decode")
# Deferred queries of dense calls are taken in at this many tokens, to bound their memory.
MAX_PENDING = 4096

_enabled: weakref.WeakKeyDictionary[nn.Module, SketchWalkHandle] = weakref.WeakKeyDictionary()


class LayerCall(NamedTuple):
    """What one layer did in one forward pass.

    `block_density` and `pair_density` are the fractions of causal key blocks and of causal token pairs that were read
    (1.0 dense); `indices` is the int32 selection on the CPU, None if dense.
    """

    layer_idx: int
    impl: str
    reason: str
    query_length: int
    key_length: int
    block_density: float
    pair_density: float
    indices: Tensor | None


class LayerTensors(NamedTuple):
    """What a sparse layer worked on and what came of it, as `SketchWalkHandle.observer` sees it."""

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    layout: Layout
    scale: float
    result: SketchWalkOutput


@dataclass
class ForwardPass:
    """What the layers of one forward pass share."""

    handle: SketchWalkHandle
    cache: Cache | None
    offset: int | Tensor
    walk: Tensor | None = None
    layouts: dict[int, Layout] = field(default_factory=dict)

    def layout(self, query: Tensor, num_keys: int, valid: Bool[Tensor, "batch num_keys"] | None) -> Layout:
        """Layout of this pass over `num_keys` keys, made once."""
        if num_keys not in self.layouts:
            self.layouts[num_keys] = make_layout(
                query.shape[0], query.shape[2], num_keys, query.device, valid=valid, offset=self.offset
            )
        return self.layouts[num_keys]

    def sketch_layer(self, layer_idx: int) -> SketchLayer | None:
        """The cache layer of `layer_idx`, if there is a cache."""
        if self.cache is None:
            return None
        layer = self.cache.layers[layer_idx]
        if not isinstance(layer, SketchLayer):
            raise TypeError(f"cache layer {layer_idx} is a {type(layer).__name__}, which carries no sketch")
        return layer


class SketchWalkHandle:
    """A model that runs sparse attention until `disable` is called; also a context manager.

    Parameters
    ----------
    calls : list of LayerCall
        Filled when `enable` was given ``record=True``.
    score_with : ScoreFunction, optional
        Scores blocks in place of the sketches, for measurement; see `sketch_walk.evaluation.selectors.selector`.
    observer : callable, optional
        Called with the `LayerTensors` of every sparse layer, after it attended.
    """

    def __init__(self, model: PreTrainedModel, config: SketchWalkConfig, mode: str, record: bool, impl: str) -> None:
        self.config = config
        self.mode = mode
        self.record = record
        self.impl = impl
        self.calls: list[LayerCall] = []
        self.score_with: ScoreFunction | None = None
        self.observer: Callable[[LayerTensors], None] | None = None
        self._model = weakref.ref(model)
        self._restore: list[tuple[Any, str | None]] = []
        self._hook: Any = None
        self._positional: list[str] = []

    @property
    def enabled(self) -> bool:
        """Whether the model still runs through this handle."""
        return self._hook is not None

    def disable(self) -> None:
        """Give the model back the attention it had. A second call does nothing."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        for model_config, previous in self._restore:
            model_config._attn_implementation_internal = previous
        self._restore = []
        model = self._model()
        if model is not None:
            _enabled.pop(model, None)

    def __enter__(self) -> SketchWalkHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def summary(self) -> dict[str, Any]:
        """Mean densities of the recorded sparse calls, and how many calls ran which way and why."""
        sparse = [call for call in self.calls if call.indices is not None]
        count = len(sparse)
        return {
            "block_density": sum(call.block_density for call in sparse) / count if count else None,
            "pair_density": sum(call.pair_density for call in sparse) / count if count else None,
            "sparse_calls": count,
            "dense_calls": len(self.calls) - count,
            "reasons": dict(Counter(call.reason for call in self.calls)),
        }

    def _install(self, model: PreTrainedModel) -> None:
        decoder = model.get_decoder()
        self._positional = list(inspect.signature(decoder.forward).parameters)
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, validity_mask)
        for model_config in _attention_configs(model):
            self._restore.append((model_config, model_config._attn_implementation_internal))
            model_config._attn_implementation_internal = NAME
        self._hook = decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        _enabled[model] = self

    def _before_forward(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook: adopt the cache and hand the layers a fresh `ForwardPass`."""
        position = self._positional.index("past_key_values") if "past_key_values" in self._positional else len(args)
        positional = len(args) > position
        cache = args[position] if positional else kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if cache is None and not positional and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = new_cache(decoder.config)
        offset: int | Tensor = 0
        if cache is not None:
            adopt(cache, self.config)
            offset = cache.get_seq_length()
            if isinstance(offset, Tensor):
                # A static layer counts in place: keep the count from before this pass. A decode step on a GPU leaves it
                # there, so that the step can be captured in a CUDA graph.
                on_device = torch.compiler.is_compiling() or (offset.is_cuda and _is_one_token(args, kwargs))
                offset = offset.clone() if on_device else int(offset)
        return args, {**kwargs, NAME: ForwardPass(self, cache, offset)}


def enable(
    model: PreTrainedModel,
    config: SketchWalkConfig | None = None,
    mode: str = "both",
    record: bool = False,
    impl: str = "auto",
) -> SketchWalkHandle:
    """Run `model` with sparse attention.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder model whose attention goes through transformers' attention interface. Sliding-window and chunked
        layers keep their own attention.
    config : SketchWalkConfig, optional
        Default ``SketchWalkConfig()``.
    mode : {"both", "prefill", "decode"}
        Which calls are sparse: those of several tokens, those of one token, or both.
    record : bool
        Keep a `LayerCall` per layer and forward pass in ``handle.calls`` (synchronises the device).
    impl : str
        Kernel; see `sketch_walk.kernels`.

    Returns
    -------
    SketchWalkHandle
        ``handle.disable()`` undoes everything; ``with enable(model): ...`` does so at the end.

    Raises
    ------
    TypeError, ValueError
        For a model that cannot be supported, or one that is enabled already. The model is then untouched.

    Notes
    -----
    A ``sketch_dim`` below the model's head dimension samples coordinates, and loses what the others tell: the logger
    ``sketch_walk`` warns of it.
    """
    config = SketchWalkConfig() if config is None else config
    if not isinstance(config, SketchWalkConfig):
        raise TypeError(f"config must be a SketchWalkConfig, got {type(config).__name__}")
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; expected one of {MODES}")
    kernels.check_impl(impl)
    _check_model(model)
    handle = SketchWalkHandle(model, config, mode, record, impl)
    handle._install(model)
    _tell_of_sampling(model, config)
    return handle


def head_dim_of(model: PreTrainedModel) -> int:
    """Coordinates of a query, as the model's config says."""
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _tell_of_sampling(model: PreTrainedModel, config: SketchWalkConfig) -> None:
    head_dim = head_dim_of(model)
    if config.use_srht and config.sketch_dim < head_dim:
        LOGGER.warning(
            "sketch_dim=%d keeps a sample of the %d coordinates of this model's heads, and selects worse for it; "
            "sketch_dim=%d keeps them all",
            config.sketch_dim,
            head_dim,
            head_dim,
        )


def _is_one_token(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a decoder's call has one token per sequence; its ids or embeddings come first or by name."""
    inputs = args[0] if args and args[0] is not None else kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    return isinstance(inputs, Tensor) and inputs.shape[1] == 1


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    name, text = type(model).__name__, model.config.get_text_config()
    if model in _enabled:
        raise ValueError(f"this {name} is enabled already; call disable() on its handle first")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; only decoder models are supported")
    if not getattr(text, "is_causal", True):
        raise ValueError(f"{name} attends to later tokens; only causal decoder models are supported")
    causal = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if causal and not any(causal):
        raise ValueError(f"{name} has no causal attention layer; only causal decoder models are supported")
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"{name} keeps multi-head latent attention (MLA) caches, which are not supported")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ValueError(f"{name} shares keys between layers, which is not supported")
    if getattr(text, "attn_logit_softcapping", None):
        raise ValueError(f"{name} soft-caps its attention logits (attn_logit_softcapping), which is not supported")
    if any(key == "sinks" or key.endswith(".sinks") for key, _ in model.named_parameters()):
        raise ValueError(f"{name} has learned attention sinks, which are not supported")
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or not type(decoder)._can_set_attn_implementation():
        raise ValueError(f"{name} does not go through transformers' attention interface")
    if not getattr(decoder, "_supports_sdpa", False):
        raise ValueError(f"{name} has an attention of its own that a registered function cannot replace")


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """Every distinct config object of the decoder's modules."""
    configs: list[Any] = []
    for module in model.get_decoder().modules():
        candidate = getattr(module, "config", None)
        if hasattr(candidate, "_attn_implementation_internal") and not any(candidate is known for known in configs):
            configs.append(candidate)
    if not any(model.config is known for known in configs) and model.config is model.config.get_text_config():
        configs.append(model.config)
    return configs


def validity_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function of the interface: which keys are real, shape (batch, kv_length), or None where all are.

    No mask of queries by keys is made for plain causal layers. Any other pattern (sliding window, chunks, packed
    sequences) gets SDPA's mask, and with it SDPA's attention.
    """
    if mask_function is not causal_mask_function or kwargs.get("local_size") is not None:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # a tensor under compilation, as in transformers itself
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **{**kwargs, "allow_is_causal_skip": False},
        )
    fixed_size = isinstance(q_offset, Tensor) or q_offset + q_length != kv_length
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        if not fixed_size and not torch.compiler.is_compiling() and bool(attention_mask.all()):
            return None
    if not fixed_size:
        return attention_mask
    if attention_mask is None:
        return None
    position = torch.arange(kv_length, device=kwargs.get("device"))
    seen = (position < q_offset + q_length).expand(batch_size, -1)
    missing = kv_length - attention_mask.shape[1]
    return seen & nn.functional.pad(attention_mask, (0, missing), value=False)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of the interface.

    Parameters
    ----------
    query, key, value : torch.Tensor
        Shapes (batch, heads, q, head_dim) and (batch, kv_heads, kv, head_dim), after RoPE, the cache included.
    attention_mask : torch.Tensor, optional
        `validity_mask`'s result.

    Returns
    -------
    tuple
        Output of shape (batch, q, heads, head_dim), and None.
    """
    forward: ForwardPass | None = kwargs.pop(NAME, None)
    if forward is None:
        raise RuntimeError(
            f"{type(module).__name__} was called without the model's forward pass around it, or its model does not "
            "hand keyword arguments to its attention; such a model is not supported"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported by sparse attention")
    handle, layer_idx = forward.handle, int(getattr(module, "layer_idx", 0))
    own_mask = attention_mask is not None and attention_mask.dim() == 4
    if sliding_window is not None or own_mask or not getattr(module, "is_causal", True):
        own = "mask of queries by keys" if own_mask else "not causal"
        own = "sliding window" if sliding_window is not None else own
        _record_dense(handle, layer_idx, own, query, key)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    num_queries = query.shape[2]
    if isinstance(forward.offset, int) and key.shape[2] > forward.offset + num_queries:
        stop = forward.offset + num_queries
        key, value = key[:, :, :stop], value[:, :, :stop]
        attention_mask = None if attention_mask is None else attention_mask[:, :stop]
    layout = forward.layout(query, key.shape[2], attention_mask)
    if layer_idx < handle.config.skip_first_n_layers:
        _record_dense(handle, layer_idx, "first layers", query, key)
        out = kernels.attend_dense(query, key, value, layout, scale=scale, dropout=dropout)
        return out.transpose(1, 2).contiguous(), None
    layer = forward.sketch_layer(layer_idx)
    reason = _dense_reason(handle, num_queries, key)
    if reason is not None:
        _record_dense(handle, layer_idx, reason, query, key)
        out = kernels.attend_dense(query, key, value, layout, scale=scale, dropout=dropout)
        if layer is not None:
            _remember_dense_call(layer, query, key, layout, attention_mask, scale, handle.impl)
        return out.transpose(1, 2).contiguous(), None
    if dropout:
        raise ValueError("sparse attention has no dropout; call model.eval() or set attention_dropout to 0")
    result = _sparse_call(forward, layer, query, key, value, layout, attention_mask, scale)
    if handle.observer is not None:
        handle.observer(LayerTensors(layer_idx, query, key, value, layout, scale, result))
    if handle.record and not torch.compiler.is_compiling():
        handle.calls.append(_sparse_record(handle, layer_idx, result, query, key, layout))
    return result.output.transpose(1, 2).contiguous(), None


def _dense_reason(handle: SketchWalkHandle, num_queries: int, key: Tensor) -> str | None:
    """Why this call runs dense, or None."""
    config, decode = handle.config, num_queries == 1
    if decode and handle.mode == "prefill":
        return "decode step in mode 'prefill'"
    if not decode and handle.mode == "decode":
        return "prompt in mode 'decode'"
    length = key.shape[2]
    if config.dense_below is not None:
        return f"shorter than dense_below={config.dense_below}" if length < config.dense_below else None
    crossover = kernels.dense_crossover(key.device.type, decode)
    if length < crossover:
        return f"below the measured crossover of {crossover} tokens"
    blocks = -(-length // config.block_size)
    return "the budget covers every block" if config.mass is None and config.budget(blocks) >= blocks else None


def _sparse_call(
    forward: ForwardPass,
    layer: SketchLayer | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    valid: Tensor | None,
    scale: float,
) -> SketchWalkOutput:
    sketch = None
    if layer is not None:
        sketch = layer.sketch
        if isinstance(layer, SketchDynamicLayer):
            offset = key.shape[2] - query.shape[2]
            sketch.crop(offset)
            _take_in(layer, offset, query, key, valid, scale, forward.handle.impl)
    result = sketch_walk_attention(
        query,
        key,
        value,
        forward.handle.config,
        state=sketch,
        walk=forward.walk,
        layout=layout,
        scale=scale,
        impl=forward.handle.impl,
        score_with=forward.handle.score_with,
    )
    forward.walk = result.walk
    if isinstance(layer, SketchDynamicLayer):
        layer.sketch.tokens = key.shape[2]
    return result


def _take_in(
    layer: SketchDynamicLayer, stop: int, query: Tensor, key: Tensor, valid: Tensor | None, scale: float, impl: str
) -> None:
    """Take in the positions before `stop` that dense calls left: keys from the cache, queries as deferred."""
    sketch = layer.sketch
    missing = stop - sketch.tokens
    pending = sketch.take_pending(stop)
    if missing <= 0:
        return
    earlier, valid = key[:, :, :stop], None if valid is None else valid[:, :stop]
    layout = make_layout(key.shape[0], missing, stop, key.device, valid=valid)
    if pending is None:
        absorb_keys(sketch, earlier, layout, query)
    else:
        absorb_call(sketch, pending, earlier, layout, scale, impl=impl)
    sketch.tokens = stop
    if sketch.memory is not None and pending is not None and stop >= look_back.DENSE_FROM:
        layout = make_layout(key.shape[0], pending.shape[2], stop, key.device, valid=valid)
        look_back.leave(sketch, pending, earlier, layout, scale, sketch.config, impl)


def _remember_dense_call(
    layer: SketchLayer, query: Tensor, key: Tensor, layout: Layout, valid: Tensor | None, scale: float, impl: str
) -> None:
    """A dense call leaves the same state as a sparse one, at once or when a sparse call needs it."""
    sketch, num_queries, stop = layer.sketch, query.shape[2], key.shape[2]
    if isinstance(layer, SketchStaticLayer):
        absorb_call(sketch, query, key, layout, scale, impl=impl)
        if sketch.memory is not None and num_queries > 1 and stop >= look_back.DENSE_FROM:
            look_back.leave(sketch, query, key, layout, scale, sketch.config, impl)
    elif look_back.defers(sketch.config, num_queries, stop):
        sketch.crop(stop - num_queries)
        sketch.defer(query, stop)
        if sketch.pending_tokens > MAX_PENDING:
            _take_in(layer, stop, query, key, valid, scale, impl)


def _record_dense(handle: SketchWalkHandle, layer_idx: int, reason: str, query: Tensor, key: Tensor) -> None:
    if handle.record and not torch.compiler.is_compiling():
        handle.calls.append(LayerCall(layer_idx, "dense", reason, query.shape[2], key.shape[2], 1.0, 1.0, None))


def _sparse_record(
    handle: SketchWalkHandle, layer_idx: int, result: SketchWalkOutput, query: Tensor, key: Tensor, layout: Layout
) -> LayerCall:
    size, selection = handle.config.block_size, result.selection
    rows = torch.arange(selection.counts.shape[-1], device=query.device)
    row_index = layout.first_block(size)[:, None] + rows
    return LayerCall(
        layer_idx,
        result.impl,
        "sparse",
        query.shape[2],
        key.shape[2],
        block_density(selection, row_index),
        pair_density(selection, row_index, layout.past, layout.length, size),
        selection.indices.cpu(),
    )
