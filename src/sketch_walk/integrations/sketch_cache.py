"""Layers of a transformers KV cache that carry a `LayerSketch`, so that it follows every cache operation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from sketch_walk.config import SketchWalkConfig
from sketch_walk.state import LayerSketch, SharedMemory

# What steps of a cache's layers remember together.
Shared = dict[torch.device, SharedMemory]


class SketchDynamicLayer(DynamicLayer):
    """A growing cache layer and its sketch."""

    def __init__(self, sketch_config: SketchWalkConfig, shared: Shared) -> None:
        super().__init__()
        self.sketch = LayerSketch(sketch_config, shared=shared)

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.sketch.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx.long())  # type: ignore[arg-type]  # any int64 tensor is a LongTensor
        self.sketch.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens."""
        super().crop(tokens_to_remove)
        self.sketch.crop(self.get_seq_length())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self.sketch.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)
        self.sketch.reorder(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)


class SketchStaticLayer(StaticLayer):
    """A cache layer of fixed size and its sketch, both at fixed addresses."""

    def __init__(self, max_cache_len: int, sketch_config: SketchWalkConfig, shared: Shared) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.sketch = LayerSketch(sketch_config, capacity=max_cache_len, shared=shared)

    def reset(self) -> None:
        """Empty the layer, in place."""
        super().reset()
        self.sketch.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx.long())  # type: ignore[arg-type]  # any int64 tensor is a LongTensor
        self.sketch.reorder(beam_idx)


SketchLayer = SketchDynamicLayer | SketchStaticLayer


def adopt(cache: Cache, config: SketchWalkConfig) -> None:
    """Swap the full-attention layers of `cache` for layers that carry a sketch; the cache object itself stays.

    Layers below `skip_first_n_layers`, sliding-window layers and layers that are no attention stay as they are. A
    growing layer may already hold tokens: its keys are sketched by the next sparse call.

    Raises
    ------
    ValueError
        For a cache that quantises or offloads its layers, or a filled StaticCache.
    """
    if cache.offloading:
        raise ValueError(
            "past_key_values with offloading is not supported: sketches would stay behind; use offloading=False"
        )
    held: list[Shared] = [layer.sketch.shared_by_device for layer in cache.layers if isinstance(layer, SketchLayer)]
    shared = held[0] if held else {}
    if cache.layer_class_to_replicate is DynamicLayer:
        made = partial(SketchDynamicLayer, config, shared)
        cache.layer_class_to_replicate = made  # type: ignore[assignment]  # only called
    for index, layer in enumerate(cache.layers):
        if index < config.skip_first_n_layers or isinstance(layer, SketchLayer):
            continue
        if type(layer) is DynamicLayer:
            cache.layers[index] = _with_attributes(SketchDynamicLayer(config, shared), layer)
        elif type(layer) is StaticLayer:
            if layer.is_initialized and int(layer.get_seq_length()) > 0:
                raise ValueError("past_key_values is a StaticCache that was filled before enable(); reset() it first")
            cache.layers[index] = _with_attributes(SketchStaticLayer(layer.max_cache_len, config, shared), layer)
        elif "Quantized" in type(layer).__name__:
            raise ValueError(
                f"past_key_values has {type(layer).__name__} layers, which sparse attention cannot read; "
                "use DynamicCache"
            )


def new_cache(model_config: PreTrainedConfig) -> DynamicCache:
    """The cache that the model itself would make."""
    return DynamicCache(config=model_config)


def _with_attributes(layer: SketchLayer, old: DynamicLayer | StaticLayer) -> SketchLayer:
    for name, value in vars(old).items():
        setattr(layer, name, value)
    return layer
