"""`enable` on tiny random models: dense results at full budget, one result however tokens arrive, exact undo."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounter  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from sketch_walk import SketchWalkConfig, kernels  # noqa: E402
from sketch_walk.extras import MissingExtraError  # noqa: E402
from sketch_walk.integrations import transformers as integration  # noqa: E402
from sketch_walk.integrations.sketch_cache import SketchDynamicLayer, SketchStaticLayer  # noqa: E402
from sketch_walk.integrations.transformers import NAME, SketchWalkHandle, enable  # noqa: E402
from sketch_walk.sketch import KeySketch  # noqa: E402
from sketch_walk.state import LayerSketch  # noqa: E402

SIZE = 16
# Weights of this spread make attention uneven and its output count, so that a wrong selection changes tokens.
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**TINY),
    "qwen2": lambda: Qwen2Config(**TINY),
    "qwen3": lambda: Qwen3Config(**TINY, head_dim=16),
    "mistral": lambda: MistralConfig(**TINY, sliding_window=None),
    "phi3": lambda: Phi3Config(**TINY),
    "olmo2": lambda: Olmo2Config(**TINY),
    "gemma3": lambda: Gemma3TextConfig(**TINY, head_dim=16, sliding_window=32, layer_types=SLIDING),
}
FULL = SketchWalkConfig(block_size=SIZE, density=1.0, dense_below=0, skip_first_n_layers=1)
SPARSE = replace(FULL, density=0.3)
WALKING = replace(SPARSE, walk="damped")
sparse_rules = pytest.mark.parametrize("config", [SPARSE, WALKING], ids=["default", "walk"])
PROMPT, PADDING, NEW = 119, 37, 20


def build(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    config = MODELS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


_built: dict[str, PreTrainedModel] = {}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """Each architecture, built once."""
    yield from usable(request.param)


@pytest.fixture
def llama() -> Iterator[PreTrainedModel]:
    yield from usable("llama")


def usable(name: str) -> Iterator[PreTrainedModel]:
    """A model that must be left as it was found."""
    model = _built.setdefault(name, build(name))
    before = fingerprint(model)
    yield model
    assert fingerprint(model) == before


def fingerprint(model: PreTrainedModel) -> Any:
    """Everything that enabling touches."""
    decoder = model.get_decoder()
    return (
        model.config._attn_implementation,
        [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        model.config.to_json_string(),
        "forward" in vars(decoder),
        type(model),
    )


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Two prompts with repeated stretches, so that prompt look-up finds something."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 128, (2, 40), generator=generator)
    return torch.cat([words, words.flip(1)[:, :20], words, words[:, : PROMPT - 100]], 1)


@pytest.fixture(scope="module")
def left_mask(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return mask


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, **options)


def distance(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    difference = (a - b).abs()
    return (difference if mask is None else difference[mask.bool()]).max().item()


# Full budget: the tokens of SDPA.

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "beams-returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampled-returned": {"do_sample": True, "num_return_sequences": 3},
    "chunked-prefill": {"prefill_chunk_size": 50},
    "no-cache": {"use_cache": False},
    "static-cache": {"cache_implementation": "static"},
    "static-beams": {"cache_implementation": "static", "num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_full_budget_gives_the_tokens_of_sdpa(model: PreTrainedModel, ids: Tensor, left_mask: Tensor, way: str) -> None:
    expected = generate(model, ids, left_mask, **WAYS[way])
    with enable(model, FULL, record=True) as handle:
        actual = generate(model, ids, left_mask, **WAYS[way])
    assert actual.tolist() == expected.tolist()
    sparse = {call.layer_idx for call in handle.calls if call.reason == "sparse"}
    assert sparse == ({2, 3} if model.config.model_type == "gemma3_text" else {1, 2, 3})
    assert {call.key_length for call in handle.calls} >= {PROMPT, PROMPT + NEW - 1}


@pytest.mark.parametrize("way", ["look-up", "assisted"])
@pytest.mark.parametrize("config", [FULL, replace(FULL, density=0.3)], ids=["full", "sparse"])
def test_speculative_decoding_gives_the_tokens_of_greedy(
    model: PreTrainedModel, ids: Tensor, way: str, config: SketchWalkConfig
) -> None:
    """Drafts are cropped again. At full budget the tokens are SDPA's; below, a draft's block shares one selection."""
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 5}
    if way == "assisted":
        options = {"assistant_model": build("llama", seed=1, num_hidden_layers=2)}
    prompt = ids[1:]
    expected = generate(model, prompt, **options)
    with enable(model, config, record=True) as handle:
        actual = generate(model, prompt, **options)
    drafts = [call for call in handle.calls if call.layer_idx == 3 and 1 < call.query_length < PROMPT]
    assert drafts, "nothing was ever drafted: the test would not see a crop"
    assert actual.shape == expected.shape
    if config is FULL:
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_full_budget_logits_of_a_padded_forward(model: PreTrainedModel, ids: Tensor, side: str) -> None:
    mask = torch.ones_like(ids)
    mask[0, slice(0, PADDING) if side == "left" else slice(-PADDING, None)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        with enable(model, FULL):
            actual = model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.isfinite(actual[mask.bool()]).all()
    assert distance(actual, expected, mask) <= 1e-5 * expected.abs().max()


def test_full_budget_in_bfloat16(ids: Tensor) -> None:
    """No farther from float64 than twice SDPA in bfloat16."""
    model = build("llama")
    with torch.no_grad():
        exact = model.double()(ids).logits
        model.bfloat16()
        dense = distance(model(ids).logits.double(), exact)
        with enable(model, FULL):
            sparse = distance(model(ids).logits.double(), exact)
    assert 0 < sparse <= 2 * dense


def test_training_gradients_at_full_budget(ids: Tensor) -> None:
    model = build("llama").train()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with enable(model, FULL):
        model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        largest = expected[name].abs().max()
        assert distance(parameter.grad, expected[name]) <= 1e-4 * largest, name


# Below full budget: one result, however the same tokens arrive.


def test_sparse_is_not_dense(model: PreTrainedModel, ids: Tensor) -> None:
    """Or the tests below could not fail."""
    with torch.no_grad():
        dense = model(ids).logits
        with enable(model, SPARSE, record=True) as handle:
            sparse = model(ids).logits
    assert distance(dense, sparse) > 1e-2
    assert handle.summary()["block_density"] < 0.6


@sparse_rules
def test_sparse_static_cache_is_dynamic_cache(
    model: PreTrainedModel, ids: Tensor, left_mask: Tensor, config: SketchWalkConfig
) -> None:
    with enable(model, config):
        dynamic = generate(model, ids, left_mask)
        static = generate(model, ids, left_mask, cache_implementation="static")
        logits = model(ids, attention_mask=left_mask).logits
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
        static_logits = model(ids, attention_mask=left_mask, past_key_values=cache).logits
    assert static.tolist() == dynamic.tolist()
    assert distance(logits, static_logits, left_mask) <= 1e-5 * logits.abs().max()


@sparse_rules
def test_sparse_padded_is_alone(
    model: PreTrainedModel, ids: Tensor, left_mask: Tensor, config: SketchWalkConfig
) -> None:
    with enable(model, config):
        together = generate(model, ids, left_mask)
        first = generate(model, ids[:1, PADDING:])
        second = generate(model, ids[1:])
    assert together[0, PADDING:].tolist() == first[0].tolist()
    assert together[1].tolist() == second[0].tolist()


@sparse_rules
def test_sparse_right_padded_forward_is_alone(model: PreTrainedModel, ids: Tensor, config: SketchWalkConfig) -> None:
    mask = torch.ones_like(ids)
    mask[0, -PADDING:] = 0
    with torch.no_grad(), enable(model, config):
        together = model(ids, attention_mask=mask).logits
        first = model(ids[:1, :-PADDING]).logits
        second = model(ids[1:]).logits
    assert distance(together[:1, :-PADDING], first) <= 1e-5 * first.abs().max()
    assert distance(together[1:], second) <= 1e-5 * second.abs().max()


@sparse_rules
@pytest.mark.parametrize("chunk", [SIZE, 3 * SIZE])
def test_sparse_aligned_chunks_are_one_go(
    model: PreTrainedModel, ids: Tensor, chunk: int, config: SketchWalkConfig
) -> None:
    """Without padding the chunks end on block borders; generate() keeps the last one for the first decode."""
    with enable(model, config, record=True) as handle:
        whole = generate(model, ids)
        one_go = [call for call in handle.calls if call.layer_idx == 3]
        handle.calls.clear()
        chunked = generate(model, ids, prefill_chunk_size=chunk)
        parts = [call for call in handle.calls if call.layer_idx == 3]
    assert len(parts) > len(one_go)
    assert chunked.tolist() == whole.tolist()


def test_sparse_without_cache_is_prefill(llama: PreTrainedModel, ids: Tensor) -> None:
    with torch.no_grad(), enable(llama, SPARSE):
        with_cache = llama(ids, use_cache=True)
        without = llama(ids, use_cache=False)
    assert without.past_key_values is None
    assert distance(with_cache.logits, without.logits) == 0


@pytest.mark.parametrize("config", [SPARSE, WALKING, replace(WALKING, head_mode="per_kv_head")])
def test_sparse_beams_are_each_beam_alone(llama: PreTrainedModel, ids: Tensor, config: SketchWalkConfig) -> None:
    """The score of each returned beam is that of its tokens fed step by step to a cache of their own."""
    with torch.no_grad(), enable(llama, config):
        beams = llama.generate(
            ids[:1],
            attention_mask=torch.ones_like(ids[:1]),
            max_new_tokens=12,
            min_new_tokens=12,
            num_beams=4,
            num_return_sequences=4,
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=0.0,
        )
        for sequence, score in zip(beams.sequences, beams.sequences_scores, strict=True):
            out = llama(sequence[None, :PROMPT], use_cache=True)
            total = 0.0
            for token in sequence[PROMPT:]:
                total += out.logits[0, -1].log_softmax(-1)[token].item()
                out = llama(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            assert total == pytest.approx(score.item(), abs=1e-4)
        assert len(set(map(tuple, beams.sequences.tolist()))) == 4


@pytest.mark.parametrize("config", [FULL, SPARSE, WALKING], ids=["full", "sparse", "walk"])
def test_compiled_static_decode_is_eager(ids: Tensor, left_mask: Tensor, config: SketchWalkConfig) -> None:
    """fullgraph=True, and one graph for all steps."""
    model, total = build("llama"), PROMPT + NEW
    counter = CompileCounter()

    def decode(step: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=total)
        out = model(ids, attention_mask=left_mask, past_key_values=cache, use_cache=True)
        mask, tokens, logits = left_mask, [out.logits[:, -1:].argmax(-1)], [out.logits[:, -1]]
        for _ in range(NEW - 1):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            out = step(
                tokens[-1],
                attention_mask=nn.functional.pad(mask, (0, total - mask.shape[1])),
                past_key_values=cache,
                use_cache=True,
                position_ids=mask.sum(1, keepdim=True) - 1,
            )
            tokens.append(out.logits[:, -1:].argmax(-1))
            logits.append(out.logits[:, -1])
        return torch.cat(tokens, 1), torch.stack(logits)

    torch._dynamo.reset()
    with torch.no_grad(), enable(model, config):
        eager, eager_logits = decode(model.forward)
        compiled, compiled_logits = decode(torch.compile(model.forward, fullgraph=True, backend=counter))
    torch._dynamo.reset()
    assert compiled.tolist() == eager.tolist()
    assert distance(compiled_logits, eager_logits) <= 1e-5 * eager_logits.abs().max()
    assert counter.frame_count == 1


# Modes and reasons.


def test_modes_decide_which_calls_are_sparse(llama: PreTrainedModel, ids: Tensor) -> None:
    counts = {}
    for mode in ("both", "prefill", "decode"):
        with enable(llama, FULL, mode=mode, record=True) as handle:
            generate(llama, ids)
        counts[mode] = {(call.query_length > 1, call.reason) for call in handle.calls if call.layer_idx == 2}
        assert Counter(call.reason for call in handle.calls) == handle.summary()["reasons"]
    assert counts["both"] == {(True, "sparse"), (False, "sparse")}
    assert counts["prefill"] == {(True, "sparse"), (False, "decode step in mode 'prefill'")}
    assert counts["decode"] == {(True, "prompt in mode 'decode'"), (False, "sparse")}


def test_records_name_layer_kernel_and_densities(llama: PreTrainedModel, ids: Tensor) -> None:
    with enable(llama, SPARSE, record=True) as handle:
        llama(ids)
    first, *rest = handle.calls
    assert first._asdict() == {
        "layer_idx": 0,
        "impl": "dense",
        "reason": "first layers",
        "query_length": PROMPT,
        "key_length": PROMPT,
        "block_density": 1.0,
        "pair_density": 1.0,
        "indices": None,
    }
    assert [call.layer_idx for call in rest] == [1, 2, 3]
    blocks = -(-PROMPT // SIZE)
    for call in rest:
        assert call.impl == "reference"
        read = (call.indices >= 0).sum().item()
        assert call.block_density == pytest.approx(read / (2 * blocks * (blocks + 1) / 2))
        assert 0 < call.pair_density < call.block_density + 0.1
    summary = handle.summary()
    assert summary["sparse_calls"] == 3
    assert summary["dense_calls"] == 1
    assert summary["block_density"] == pytest.approx(sum(call.block_density for call in rest) / 3)


def test_pair_density_counts_token_pairs(llama: PreTrainedModel, ids: Tensor) -> None:
    with enable(llama, SPARSE, record=True) as handle:
        llama(ids)
    call = handle.calls[-1]
    position = torch.arange(PROMPT)
    causal = position <= position[:, None]
    read = 0
    for selected in call.indices:
        for row, blocks in enumerate(selected):
            keys = torch.isin(position // SIZE, blocks)
            read += (causal & keys)[position // SIZE == row].sum().item()
    assert call.pair_density == pytest.approx(read / (2 * causal.sum().item()))


def test_nothing_is_recorded_unless_asked(llama: PreTrainedModel, ids: Tensor) -> None:
    with enable(llama, SPARSE) as handle:
        llama(ids)
    assert handle.calls == []
    assert handle.summary()["block_density"] is None


def test_dense_below_a_length(llama: PreTrainedModel, ids: Tensor) -> None:
    with enable(llama, replace(SPARSE, dense_below=60), record=True) as handle:
        generate(llama, ids[:, :50])
    reasons = {call.key_length: call.reason for call in handle.calls if call.layer_idx == 1}
    assert reasons[50] == reasons[59] == "shorter than dense_below=60"
    assert reasons[60] == "sparse"


def test_dense_below_the_measured_crossover(
    llama: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    crossover = kernels.dense_crossover("cpu")
    assert crossover > PROMPT
    with enable(llama, replace(SPARSE, dense_below=None), record=True) as handle:
        llama(ids)
    assert handle.calls[-1].reason == f"below the measured crossover of {crossover} tokens"
    monkeypatch.setitem(kernels.PREFILL_CROSSOVER, "cpu", 64)
    with enable(llama, replace(SPARSE, dense_below=None), record=True) as handle:
        llama(ids)
    assert handle.calls[-1].reason == "sparse"
    with enable(llama, replace(SPARSE, dense_below=None, density=None, top_k_blocks=8), record=True) as handle:
        llama(ids)
    assert handle.calls[-1].reason == "the budget covers every block"


def key_codes(sketch: LayerSketch, blocks: int) -> Tensor:
    """8-bit codes of the first blocks' key sketches, (batch, heads, blocks, sub_keys, width)."""
    stored, config = KeySketch(*sketch.read_keys(blocks)), sketch.config
    per_block = config.block_size // config.key_sub_block
    return stored.unpack(per_block, stored.codes.shape[-1] // (1 + per_block))[0]


def sketches(cache: Any) -> dict[int, LayerSketch]:
    return {i: layer.sketch for i, layer in enumerate(cache.layers) if hasattr(layer, "sketch")}


@pytest.mark.parametrize("start", [64, 119, 120, 130])
@pytest.mark.parametrize("cache_type", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("max_pending", [4096, 30])
def test_dense_calls_leave_the_state_of_sparse_ones(
    llama: PreTrainedModel,
    ids: Tensor,
    left_mask: Tensor,
    start: int,
    cache_type: str,
    padded: bool,
    max_pending: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full budget, so that the same queries and keys reach every layer; calls shorter than `start` are dense."""
    monkeypatch.setattr(integration, "MAX_PENDING", max_pending)
    mask = left_mask if padded else torch.ones_like(left_mask)
    tokens = torch.cat([ids, ids[:, :NEW]], 1)
    mask = torch.cat([mask, torch.ones(2, NEW, dtype=mask.dtype)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cuts = [0, 50, PROMPT, *range(PROMPT + 1, PROMPT + NEW + 1)]
    found = []
    for dense_below in (0, start):
        cache = DynamicCache(config=llama.config)
        if cache_type == "static":
            cache = StaticCache(config=llama.config, max_cache_len=PROMPT + NEW)
        with (
            torch.no_grad(),
            enable(llama, replace(FULL, dense_below=dense_below, walk="damped"), record=True) as handle,
        ):
            for a, b in pairwise(cuts):
                llama(tokens[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache)
        reasons = [call.reason for call in handle.calls if call.layer_idx == 2]
        assert "sparse" in reasons
        assert (f"shorter than dense_below={start}" in reasons) == bool(dense_below)
        found.append(sketches(cache))
    assert found[0].keys() == found[1].keys() == {1, 2, 3}
    complete = (PROMPT + NEW - (PADDING if padded else 0)) // SIZE
    for layer in (1, 2, 3):
        always, late = found[0][layer], found[1][layer]
        codes, late_codes = (key_codes(sketch, complete) for sketch in (always, late))
        scales, late_scales = (sketch.read_keys(complete)[1] for sketch in (always, late))
        # Dense and gathered attention round differently: a coordinate on the edge between two codes may take either.
        assert (codes - late_codes).abs().max() <= 1
        assert (codes != late_codes).float().mean() < 0.01
        torch.testing.assert_close(scales, late_scales, atol=0, rtol=1e-4)
        torch.testing.assert_close(always.read_rows(complete), late.read_rows(complete), atol=2e-2, rtol=0)
        identity = torch.eye(complete).expand_as(late.read_rows(complete))
        assert distance(late.read_rows(complete), identity) > 0.1


@pytest.mark.parametrize("cache_type", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_dense_prompts_leave_what_their_last_tokens_found(
    llama: PreTrainedModel,
    ids: Tensor,
    left_mask: Tensor,
    cache_type: str,
    padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sparse prompt's last tokens read every block, as those of a dense one do that is long enough."""
    monkeypatch.setattr(integration.look_back, "DENSE_FROM", PROMPT)
    mask = left_mask if padded else torch.ones_like(left_mask)
    tokens = torch.cat([ids, ids[:, :1]], 1)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    memories = []
    for mode in ("both", "decode"):
        cache: Any = DynamicCache(config=llama.config)
        if cache_type == "static":
            cache = StaticCache(config=llama.config, max_cache_len=PROMPT + NEW)
        with torch.no_grad(), enable(llama, FULL, mode=mode):
            for a, b in ((0, PROMPT), (PROMPT, PROMPT + 1)):
                llama(tokens[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache)
        memories.append({layer: sketch.memory for layer, sketch in sketches(cache).items()})
    for layer, expected in memories[0].items():
        assert expected is not None
        assert expected[:, :, : (PROMPT - PADDING) // SIZE].isfinite().all()
        torch.testing.assert_close(memories[1][layer], expected, rtol=0, atol=1e-2)


def test_a_short_dense_prompt_leaves_nothing(llama: PreTrainedModel, ids: Tensor) -> None:
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), enable(llama, FULL, mode="decode"):
        llama(ids, past_key_values=cache)
    assert not any(sketch.pending for sketch in sketches(cache).values())


def test_cache_filled_before_enabling_is_taken_over(llama: PreTrainedModel, ids: Tensor) -> None:
    """Keys of tokens that were never seen are sketched from the cache; at full budget nothing differs."""
    with torch.no_grad():
        cache = llama(ids[:, :70]).past_key_values
        expected = llama(ids).logits[:, 70:]
        with enable(llama, FULL):
            actual = llama(ids[:, 70:], past_key_values=cache).logits
        assert distance(actual, expected) <= 1e-5 * expected.abs().max()
        assert all(isinstance(layer, SketchDynamicLayer) for layer in cache.layers[1:])
        assert not isinstance(cache.layers[0], SketchDynamicLayer)
        seen = sketches(cache)[2]
        with enable(llama, FULL):
            fresh = sketches(llama(ids).past_key_values)[2]
        assert (seen.read_keys(PROMPT // SIZE)[0].int() - fresh.read_keys(PROMPT // SIZE)[0].int()).abs().max() <= 1


def test_cache_outlives_disabling(llama: PreTrainedModel, ids: Tensor) -> None:
    with torch.no_grad():
        expected = llama(ids).logits[:, 70:]
        with enable(llama, FULL):
            cache = llama(ids[:, :70]).past_key_values
        actual = llama(ids[:, 70:], past_key_values=cache).logits
    assert distance(actual, expected) <= 1e-5 * expected.abs().max()


def test_calls_while_disabled_are_caught_up(llama: PreTrainedModel, ids: Tensor) -> None:
    with torch.no_grad():
        with enable(llama, FULL):
            cache = llama(ids[:, :40]).past_key_values
        llama(ids[:, 40:90], past_key_values=cache)
        with enable(llama, FULL):
            actual = llama(ids[:, 90:], past_key_values=cache).logits
            fresh = llama(ids)
    assert distance(actual, fresh.logits[:, 90:]) <= 1e-5 * fresh.logits.abs().max()
    complete = PROMPT // SIZE
    codes = [key_codes(sketches(c)[1], complete) for c in (cache, fresh.past_key_values)]
    assert (codes[0] - codes[1]).abs().max() <= 1


def test_positional_cache_is_adopted(llama: PreTrainedModel, ids: Tensor) -> None:
    """The decoder's own signature decides where a positional cache stands."""
    decoder = llama.get_decoder()
    with torch.no_grad(), enable(llama, SPARSE):
        expected = decoder(ids)
        cache = DynamicCache(config=llama.config)
        actual = decoder(ids, None, None, cache)
    assert isinstance(cache.layers[2], SketchDynamicLayer)
    assert distance(actual.last_hidden_state, expected.last_hidden_state) == 0


@sparse_rules
@pytest.mark.parametrize(
    ("operation", "argument", "order"),
    [
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_select_indices", torch.tensor([False, True]), [1]),
        ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
    ],
    ids=["repeat", "select", "select-by-mask", "reorder"],
)
def test_cache_operations_carry_the_sketches(
    llama: PreTrainedModel, ids: Tensor, operation: str, argument: Any, order: list[int], config: SketchWalkConfig
) -> None:
    with torch.no_grad(), enable(llama, config):
        cache = llama(ids[:, :70]).past_key_values
        getattr(cache, operation)(argument)
        actual = llama(ids[order, 70:], past_key_values=cache).logits
        straight = llama(ids[order, :70]).past_key_values
        expected = llama(ids[order, 70:], past_key_values=straight).logits
    assert distance(actual, expected) <= 1e-5 * expected.abs().max()


def test_dynamic_cache_is_reused_after_reset(llama: PreTrainedModel, ids: Tensor) -> None:
    with torch.no_grad(), enable(llama, SPARSE):
        cache = llama(ids.flip(1)).past_key_values
        layer = cache.layers[2]
        layer.reset()
        assert layer.sketch.tokens == 0
        assert layer.sketch.codes is None


@sparse_rules
def test_static_cache_is_reused_after_reset(llama: PreTrainedModel, ids: Tensor, config: SketchWalkConfig) -> None:
    with torch.no_grad(), enable(llama, config):
        cache = StaticCache(config=llama.config, max_cache_len=PROMPT + 1)
        first = llama(ids, past_key_values=cache).logits
        llama(ids[:, :1], past_key_values=cache)
        cache.reset()
        assert isinstance(cache.layers[3], SketchStaticLayer)
        again = llama(ids, past_key_values=cache).logits
    assert distance(first, again) == 0


def test_static_cache_filled_before_is_refused(llama: PreTrainedModel, ids: Tensor) -> None:
    cache = StaticCache(config=llama.config, max_cache_len=PROMPT + 8)
    llama(ids, past_key_values=cache)
    with enable(llama, SPARSE), pytest.raises(ValueError, match="StaticCache that was filled before"):
        llama(ids[:, :1], past_key_values=cache)


def test_offloaded_cache_is_refused(llama: PreTrainedModel, ids: Tensor) -> None:
    cache = DynamicCache(config=llama.config)
    cache.offloading = True
    with enable(llama, SPARSE), pytest.raises(ValueError, match="offloading is not supported"):
        llama(ids, past_key_values=cache)


def test_quantised_cache_is_refused(llama: PreTrainedModel, ids: Tensor) -> None:
    """The quantising packages are optional: a layer of their base class stands in."""
    from transformers.cache_utils import QuantizedLayer

    class NoQuantizedLayer(QuantizedLayer):
        def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
            return tensor

        def _dequantize(self, q_tensor: Tensor) -> Tensor:
            return q_tensor

    cache = DynamicCache(config=llama.config)
    cache.layers = [NoQuantizedLayer() for _ in range(4)]
    with (
        enable(llama, SPARSE),
        pytest.raises(ValueError, match="NoQuantizedLayer layers, which sparse attention cannot"),
    ):
        llama(ids, past_key_values=cache)


def test_sliding_layer_keeps_its_own_attention(ids: Tensor) -> None:
    model = build("gemma3")
    with torch.no_grad(), enable(model, SPARSE, record=True) as handle:
        cache = model(ids).past_key_values
    reasons = {call.layer_idx: call.reason for call in handle.calls}
    assert reasons == {0: "first layers", 1: "sliding window", 2: "sparse", 3: "sparse"}
    assert [hasattr(layer, "sketch") for layer in cache.layers] == [False, False, True, True]


def test_mistral_with_a_window_stays_dense_everywhere(ids: Tensor) -> None:
    model = build("mistral", sliding_window=32)
    with torch.no_grad():
        expected = model(ids).logits
        with enable(model, SPARSE, record=True) as handle:
            actual = model(ids).logits
    assert {call.reason for call in handle.calls} == {"sliding window"}
    assert distance(actual, expected) == 0


def test_custom_mask_of_queries_by_keys_is_obeyed(llama: PreTrainedModel, ids: Tensor) -> None:
    """A caller's own 4-D mask cannot be read as padding: the call runs SDPA and says so."""
    hidden = torch.ones(PROMPT, PROMPT, dtype=torch.bool).triu(1) | (torch.arange(PROMPT) == 5)
    hidden[5, 5] = False
    mask = torch.zeros(2, 1, PROMPT, PROMPT).masked_fill(hidden, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = llama(ids, attention_mask=mask).logits
        with enable(llama, FULL, record=True) as handle:
            actual = llama(ids, attention_mask=mask).logits
    assert {call.reason for call in handle.calls} == {"mask of queries by keys"}
    assert distance(actual, expected) <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "told"), [({"sketch_dim": 8}, True), ({}, False), ({"sketch_dim": 8, "use_srht": False}, False)]
)
def test_a_sample_of_the_coordinates_is_told(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], told: bool
) -> None:
    with enable(llama, replace(SPARSE, **changes)):
        pass
    messages = [record.getMessage() for record in caplog.records if record.name == "sketch_walk"]
    assert len(messages) == told
    assert not told or ("sketch_dim=8" in messages[0] and "16 coordinates" in messages[0])


# Undo.


def test_enable_and_disable_restore_everything(model: PreTrainedModel, ids: Tensor) -> None:
    before, expected = fingerprint(model), model(ids).logits
    handle = enable(model, SPARSE)
    assert handle.enabled
    assert model.config._attn_implementation == NAME
    assert fingerprint(model) != before
    handle.disable()
    handle.disable()
    assert not handle.enabled
    assert fingerprint(model) == before
    assert distance(model(ids).logits, expected) == 0


def test_undo_after_an_exception(llama: PreTrainedModel, ids: Tensor) -> None:
    before = fingerprint(llama)

    def fail() -> None:
        with enable(llama, SPARSE):
            llama(ids)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert fingerprint(llama) == before
    with pytest.raises(IndexError), enable(llama, SPARSE):
        llama(ids + 1000)
    assert fingerprint(llama) == before


def test_undo_keeps_the_attention_that_was_set(ids: Tensor) -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    with enable(model, FULL):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "eager"


def test_enabling_twice_is_an_error_and_changes_nothing(llama: PreTrainedModel, ids: Tensor) -> None:
    with enable(llama, SPARSE) as handle:
        inside = fingerprint(llama)
        with pytest.raises(ValueError, match="LlamaForCausalLM is enabled already"):
            enable(llama, FULL)
        assert fingerprint(llama) == inside
        assert handle.enabled
    with enable(llama, FULL):
        pass


def test_two_models_at_once(ids: Tensor) -> None:
    one, two = build("llama"), build("llama")
    with enable(one, FULL, record=True) as first, enable(two, SPARSE, record=True) as second:
        one(ids)
        two(ids)
    assert first.summary()["block_density"] == 1.0
    assert second.summary()["block_density"] < 0.6


def test_base_model_without_a_head(ids: Tensor) -> None:
    model = build("llama").model
    before = fingerprint(model)
    expected = model(ids).last_hidden_state
    with enable(model, FULL, record=True) as handle:
        actual = model(ids).last_hidden_state
    assert handle.summary()["sparse_calls"] == 3
    assert distance(actual, expected) <= 1e-5 * expected.abs().max()
    assert fingerprint(model) == before


def test_saved_while_enabled_loads_as_if_never_enabled(ids: Tensor, tmp_path: Path) -> None:
    model = build("llama")
    with enable(model, SPARSE):
        model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert distance(loaded(ids).logits, model(ids).logits) == 0


def test_handle_does_not_keep_the_model_alive() -> None:
    import gc
    import weakref

    model = build("llama")
    handle: SketchWalkHandle = enable(model, SPARSE)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    handle.disable()


# What cannot be supported says so.


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mode": "sometimes"}, ValueError, "unknown mode 'sometimes'; expected one of"),
        ({"impl": "magic"}, ValueError, "unknown impl 'magic'; expected one of"),
        ({"config": {"density": 0.2}}, TypeError, "config must be a SketchWalkConfig, got dict"),
    ],
)
def test_bad_options(llama: PreTrainedModel, options: dict[str, Any], error: type[Exception], match: str) -> None:
    before = fingerprint(llama)
    with pytest.raises(error, match=match):
        enable(llama, **options)
    assert fingerprint(llama) == before


def test_model_of_another_library() -> None:
    with pytest.raises(TypeError, match=r"model must be a transformers\.PreTrainedModel, got Linear"):
        enable(nn.Linear(2, 2))


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
MLA: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
UNSUPPORTED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "encoder-decoder": ("T5ForConditionalGeneration", "T5Config", T5, "is an encoder-decoder model"),
    "mla-v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", MLA, "multi-head latent attention"),
    "mla-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA, "multi-head latent attention"),
    "soft-cap": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "attn_logit_softcapping": 50.0},
        "attn_logit_softcapping",
    ),
    "sinks": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 2},
        "learned attention sinks",
    ),
    "own-attention": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        "does not go through transformers' attention interface",
    ),
    "rotary-own": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
        "does not go through transformers' attention interface",
    ),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models_are_refused_and_untouched(kind: str) -> None:
    model_type, config_type, settings, match = UNSUPPORTED[kind]
    model = getattr(transformers, model_type)(getattr(transformers, config_type)(**settings)).eval()
    before = fingerprint_of_any(model)
    with pytest.raises(ValueError, match=match):
        enable(model, SPARSE)
    assert fingerprint_of_any(model) == before


def fingerprint_of_any(model: PreTrainedModel) -> Any:
    configs = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    return configs, [len(m._forward_pre_hooks) for m in model.modules()], model in integration._enabled


def test_an_encoder_is_refused() -> None:
    model = transformers.BertModel(transformers.BertConfig(**{**SMALL, "vocab_size": 128})).eval()
    before = fingerprint_of_any(model)
    with pytest.raises(ValueError, match="BertModel has no causal attention layer"):
        enable(model, SPARSE)
    assert fingerprint_of_any(model) == before


def test_a_layer_that_is_not_causal_keeps_its_attention(llama: PreTrainedModel, ids: Tensor) -> None:
    """It runs SDPA, and says so; the other layers stay sparse."""
    layer = llama.model.layers[2].self_attn
    layer.is_causal = False
    try:
        with torch.no_grad(), enable(llama, SPARSE, record=True) as handle:
            llama(ids)
    finally:
        layer.is_causal = True
    assert {call.reason for call in handle.calls if call.layer_idx == 2} == {"not causal"}
    assert {call.reason for call in handle.calls if call.layer_idx == 3} == {"sparse"}


def test_models_that_lack_what_is_needed_are_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(llama.model), "_supports_sdpa", False)
        with pytest.raises(ValueError, match="has an attention of its own"):
            enable(llama, SPARSE)
    with monkeypatch.context() as patch:
        patch.setattr(llama.config, "is_causal", False, raising=False)
        with pytest.raises(ValueError, match="attends to later tokens"):
            enable(llama, SPARSE)


def test_shared_keys_are_refused(llama: PreTrainedModel) -> None:
    llama.config.num_kv_shared_layers = 2
    try:
        with pytest.raises(ValueError, match="shares keys between layers"):
            enable(llama, SPARSE)
    finally:
        del llama.config.num_kv_shared_layers


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias"])
def test_attention_arguments_that_change_the_softmax_raise(llama: PreTrainedModel, ids: Tensor, argument: str) -> None:
    with enable(llama, SPARSE), pytest.raises(ValueError, match=f"{argument} is not supported"):
        llama(ids, **{argument: torch.ones(4)})


def test_dropout_in_training_raises(ids: Tensor) -> None:
    model = build("llama", attention_dropout=0.1)
    with enable(model, SPARSE):
        model(ids)
        model.train()
        with pytest.raises(ValueError, match=r"no dropout; call model\.eval\(\)"):
            model(ids)


def test_layer_called_outside_the_model_raises(llama: PreTrainedModel) -> None:
    layer, hidden = llama.model.layers[2].self_attn, torch.randn(1, 8, 64)
    position = llama.model.rotary_emb(hidden, torch.arange(8)[None])
    with enable(llama, SPARSE), pytest.raises(RuntimeError, match="without the model's forward pass around it"):
        layer(hidden, position_embeddings=position, attention_mask=None)


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "sketch_walk.integrations.transformers")
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=r'transformers is not installed.*"sketch_walk\[transformers\]"'):
        real("sketch_walk.integrations.transformers")
