"""A Llama of any shape with random weights, made on the device itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sketch_walk.bench.inputs import HeadShape, check_shape, make_generator
from sketch_walk.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_SCALE = 0.02


class LlamaShape(NamedTuple):
    """Sizes of a Llama; the defaults are Llama-3.1-8B's."""

    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    mlp: int = 14_336
    vocab: int = 128_256

    @property
    def attention(self) -> HeadShape:
        """Heads of one layer."""
        return HeadShape(self.heads, self.kv_heads, self.head_dim)


def random_llama(
    shape: LlamaShape, dtype: torch.dtype, device: torch.device, max_tokens: int, seed: int = 0
) -> PreTrainedModel:
    """Weights normal with standard deviation 0.02, norms 1; nothing passes through the host's memory.

    Parameters
    ----------
    max_tokens : int
        Longest sequence that the model's config declares.

    Raises
    ------
    ValueError
        For a size below 1, or `kv_heads` that does not divide `heads`.
    MissingExtraError
        If transformers is not installed.
    """
    for name, value in shape._asdict().items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_shape(shape.attention)
    transformers = require("transformers", "transformers")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.to_empty(device=device)
    # Its frequencies are no weights: computed when it is made, lost on the way.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = make_generator(device, seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.fill_(1)
            else:
                weight.normal_(0, WEIGHT_SCALE, generator=generator)
    return model.eval().requires_grad_(False)
