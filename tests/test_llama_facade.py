"""The promised Llama names: real weights, a config that is saved, a handle that undoes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

import sketch_walk.llama as names
from sketch_walk.config import SketchWalkConfig
from sketch_walk.llama.configuration_llama_sketchwalk import SketchWalkLlamaConfig
from sketch_walk.llama.modeling_llama_sketchwalk import (
    SketchWalkLlamaForCausalLM,
    SketchWalkLlamaModel,
    create_sketch_walk_llama,
)
from tiny_gguf import write_tiny_gguf

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPARSE = {"block_size": 16, "density": 0.3, "min_blocks": 2, "dense_below": 0, "sketch_dim": 8}
EVERYTHING = {"block_size": 16, "density": 1.0, "dense_below": 0, "sketch_dim": 8}


def dense_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (1, 200), generator=torch.Generator().manual_seed(1))


def test_the_same_names_in_three_places() -> None:
    assert names.create_sketch_walk_llama is create_sketch_walk_llama
    assert names.SketchWalkLlamaConfig is SketchWalkLlamaConfig
    assert set(names.__all__) == {
        "SketchWalkLlamaConfig",
        "SketchWalkLlamaForCausalLM",
        "SketchWalkLlamaModel",
        "create_sketch_walk_llama",
    }


def test_real_weights_and_full_budget_equal_dense(tiny_folder: Path, ids: torch.Tensor) -> None:
    model = create_sketch_walk_llama(tiny_folder, device="cpu", **EVERYTHING)
    assert isinstance(model, SketchWalkLlamaForCausalLM)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, dense_logits(tiny_folder, ids), atol=1e-4, rtol=1e-4)


def test_sparse_differs_and_disable_gives_dense_back(tiny_folder: Path, ids: torch.Tensor) -> None:
    model = create_sketch_walk_llama(tiny_folder, device="cpu", skip_first_n_layers=0, **SPARSE)
    dense = dense_logits(tiny_folder, ids)
    with torch.inference_mode():
        assert not torch.allclose(model(input_ids=ids).logits, dense, atol=1e-5)
        model.sketch_walk.disable()
        torch.testing.assert_close(model(input_ids=ids).logits, dense, atol=0, rtol=0)


def test_headline_fields_and_mode_reach_the_handle(tiny_folder: Path) -> None:
    model = create_sketch_walk_llama(
        base_model_name=str(tiny_folder),
        block_size=32,
        sketch_dim=8,
        top_k_blocks=3,
        sparsity_exponent=4,
        device="cpu",
        dtype=torch.bfloat16,
        mode="prefill",
    )
    config = model.config.sketch_walk_config
    assert (config.block_size, config.sketch_dim, config.top_k_blocks, config.sparsity_exponent) == (32, 8, 3, 4)
    assert model.config.sketch_walk_mode == model.sketch_walk.mode == "prefill"
    assert model.sketch_walk.config == config
    assert model.dtype == torch.bfloat16


def test_generate(tiny_folder: Path, ids: torch.Tensor) -> None:
    model = create_sketch_walk_llama(tiny_folder, device="cpu", **EVERYTHING)
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids, **asked).tolist() == dense.generate(ids, **asked).tolist()


def test_embedded_model_answers_through_the_promised_call(smollm2: object) -> None:
    model = create_sketch_walk_llama(device="cpu", density=0.5, min_blocks=4, dense_below=0)
    tokenizer = smollm2[1]  # type: ignore[index]
    ids = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


def test_gguf_base(tmp_path: Path, ids: torch.Tensor) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    model = create_sketch_walk_llama(tmp_path, gguf_file="tiny.gguf", device="cpu", dtype=torch.float32, **EVERYTHING)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    with torch.inference_mode():
        expected = plain(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_config_round_trips(tmp_path: Path, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = SketchWalkLlamaConfig(**TINY, sketch_walk=SPARSE, sketch_walk_mode="prefill")
    model = SketchWalkLlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "llama"
    assert saved["sketch_walk"]["density"] == 0.3
    again = SketchWalkLlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.sketch_walk_config == SketchWalkConfig(**SPARSE)
    assert again.config.sketch_walk_mode == again.sketch_walk.mode == "prefill"
    with torch.inference_mode():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=0, rtol=0)


def test_saved_folder_opens_in_plain_transformers(tmp_path: Path) -> None:
    SketchWalkLlamaForCausalLM(SketchWalkLlamaConfig(**TINY)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_base_model_is_sparse_too(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = SketchWalkLlamaModel(SketchWalkLlamaConfig(**TINY, sketch_walk={**SPARSE, "skip_first_n_layers": 0})).eval()
    with torch.inference_mode():
        sparse = model(input_ids=ids).last_hidden_state
        model.sketch_walk.disable()
        assert not torch.allclose(model(input_ids=ids).last_hidden_state, sparse, atol=1e-5)


def test_defaults_when_nothing_is_given() -> None:
    config = SketchWalkLlamaConfig(**TINY)
    assert config.sketch_walk_config == SketchWalkConfig()
    assert config.sketch_walk_mode == "both"


def test_wrong_fields_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown config fields \['densty'\]"):
        SketchWalkLlamaConfig(**TINY, sketch_walk={"densty": 0.2})
    with pytest.raises(TypeError, match="densty"):
        create_sketch_walk_llama(tiny_folder, densty=0.2)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        create_sketch_walk_llama(tiny_folder, block_size=0)
    with pytest.raises(ValueError, match="unknown mode 'sometimes'"):
        create_sketch_walk_llama(tiny_folder, mode="sometimes", device="cpu")


def test_other_families_are_sent_to_enable(tmp_path: Path) -> None:
    MistralForCausalLM(MistralConfig(**TINY, head_dim=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be a Llama model, got .* of type 'mistral'.*enable"):
        create_sketch_walk_llama(tmp_path)
