"""Llama models of transformers that carry a SketchWalk configuration: their own classes, no modeling code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sketch_walk.config import SketchWalkConfig, create_sketch_walk_config
from sketch_walk.extras import require
from sketch_walk.integrations.models import load_causal_lm, load_config, resolve

require("transformers", "transformers")

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel  # noqa: E402

from sketch_walk.integrations.transformers import MODES, enable  # noqa: E402

if TYPE_CHECKING:
    import os


class SketchWalkLlamaConfig(LlamaConfig):
    """A `LlamaConfig` that also holds how attention is made sparse, and saves it.

    The model type stays "llama": a folder saved from these classes opens in plain transformers as the dense model.

    Parameters
    ----------
    sketch_walk : dict, optional
        Fields of `SketchWalkConfig` (`SketchWalkConfig.to_dict`); those left out take their defaults.
    sketch_walk_mode : {"both", "prefill", "decode"}
        Which calls are sparse.
    **kwargs
        Fields of `LlamaConfig`.

    Raises
    ------
    ValueError, TypeError
        For a field that `SketchWalkConfig` refuses, or an unknown mode.
    """

    sketch_walk: dict[str, Any] | None = None
    sketch_walk_mode: str = "both"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.sketch_walk_mode not in MODES:
            raise ValueError(f"unknown mode {self.sketch_walk_mode!r}; expected one of {MODES}")
        self.sketch_walk = SketchWalkConfig.from_dict(self.sketch_walk or {}).to_dict()
        super().__post_init__(**kwargs)

    @property
    def sketch_walk_config(self) -> SketchWalkConfig:
        """`sketch_walk` as a checked config."""
        return SketchWalkConfig.from_dict(self.sketch_walk or {})


class SketchWalkLlamaModel(LlamaModel):
    """`LlamaModel` with sparse attention switched on; `sketch_walk` is the handle that switches it off."""

    config_class = SketchWalkLlamaConfig

    def __init__(self, config: SketchWalkLlamaConfig) -> None:
        super().__init__(config)
        self.sketch_walk = enable(self, config.sketch_walk_config, mode=config.sketch_walk_mode)


class SketchWalkLlamaForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` with sparse attention switched on; `sketch_walk` is the handle that switches it off."""

    config_class = SketchWalkLlamaConfig

    def __init__(self, config: SketchWalkLlamaConfig) -> None:
        super().__init__(config)
        self.sketch_walk = enable(self, config.sketch_walk_config, mode=config.sketch_walk_mode)


def create_sketch_walk_llama(
    base_model_name: str | os.PathLike[str] | None = None,
    block_size: int = SketchWalkConfig.block_size,
    sketch_dim: int = SketchWalkConfig.sketch_dim,
    top_k_blocks: int = SketchWalkConfig.top_k_blocks,
    sparsity_exponent: float = SketchWalkConfig.sparsity_exponent,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    gguf_file: str | None = None,
    mode: str = "both",
    **config_fields: Any,
) -> SketchWalkLlamaForCausalLM:
    """A Llama causal LM with real weights and sparse attention.

    Parameters
    ----------
    base_model_name : str or path, optional
        A hub id, a local folder or a GGUF file of a Llama model; None is the embedded SmolLM2-135M-Instruct.
    block_size, sketch_dim, top_k_blocks, sparsity_exponent, **config_fields
        Fields of `SketchWalkConfig`.
    dtype, device, gguf_file
        As `sketch_walk.integrations.models.load`.
    mode : {"both", "prefill", "decode"}
        Which calls are sparse.

    Returns
    -------
    SketchWalkLlamaForCausalLM
        In evaluation mode; ``generate()`` works and ``model.sketch_walk`` is the handle.

    Raises
    ------
    ValueError, TypeError
        For a field that `SketchWalkConfig` refuses, or a model that is no Llama (use
        `sketch_walk.integrations.transformers.enable` for those).
    ModelLoadError
        If the model is missing, corrupt or out of reach.
    """
    config = create_sketch_walk_config(block_size, sketch_dim, top_k_blocks, sparsity_exponent, **config_fields)
    source = resolve(base_model_name, gguf_file)
    base = load_config(source)
    if base.model_type != LlamaConfig.model_type:
        raise ValueError(
            f"base_model_name must be a Llama model, got {source.label} of type {base.model_type!r}; "
            "load it with transformers and call sketch_walk.integrations.transformers.enable(model, config)"
        )
    fields = {name: value for name, value in base.to_dict().items() if name not in ("model_type", "architectures")}
    fields.update(sketch_walk=config.to_dict(), sketch_walk_mode=mode)
    llama = SketchWalkLlamaConfig(**fields)
    model = load_causal_lm(source, dtype=dtype, device=device, model_class=SketchWalkLlamaForCausalLM, config=llama)
    assert isinstance(model, SketchWalkLlamaForCausalLM)
    return model
