"""Every field is checked when a config is made, and budgets count as the formulas say."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sketch_walk.config import (
    PRESETS,
    SketchWalkConfig,
    calculate_sparsity,
    causal_density,
    create_sketch_walk_config,
)


def test_promised_defaults() -> None:
    config = SketchWalkConfig()
    assert (config.block_size, config.sketch_dim, config.top_k_blocks, config.sparsity_exponent) == (64, 64, 16, 8)
    assert config.skip_first_n_layers == 2
    assert config.use_srht is True
    assert config.hadamard_seed == 42
    assert config.walk_state_dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("default", (64, 64, 16, 8)),
        ("high_quality", (32, 128, 32, 4)),
        ("high_speed", (128, 32, 8, 16)),
        ("long_context", (128, 128, 32, 8)),
    ],
)
def test_promised_presets(name: str, numbers: tuple[int, ...]) -> None:
    config = SketchWalkConfig.preset(name)
    assert (config.block_size, config.sketch_dim, config.top_k_blocks, config.sparsity_exponent) == numbers
    assert SketchWalkConfig.preset(name, top_k_blocks=5).top_k_blocks == 5
    assert PRESETS[name].top_k_blocks == numbers[2]


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'fast'; expected one of \('default'"):
        SketchWalkConfig.preset("fast")


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SketchWalkConfig().block_size = 32  # type: ignore[misc]


@pytest.mark.parametrize(
    "name", ["block_size", "sketch_dim", "top_k_blocks", "min_blocks", "local_blocks", "walk_degree"]
)
def test_counts_are_positive_ints(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        SketchWalkConfig(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an int, got 4.0"):
        SketchWalkConfig(**{name: 4.0})
    with pytest.raises(TypeError, match=f"{name} must be an int, got True"):
        SketchWalkConfig(**{name: True})


@pytest.mark.parametrize(
    "name", ["skip_first_n_layers", "sink_blocks", "dense_tail_blocks", "hadamard_seed", "dense_below"]
)
def test_counts_that_may_be_zero(name: str) -> None:
    assert getattr(SketchWalkConfig(**{name: 0}), name) == 0
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        SketchWalkConfig(**{name: -1})


@pytest.mark.parametrize("name", ["use_srht", "walk_normalise", "mean_correction", "density_excludes_forced"])
def test_flags(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 1"):
        SketchWalkConfig(**{name: 1})


@pytest.mark.parametrize("name", ["reduce", "head_mode", "score_scale", "walk", "key_sketch_bits", "walk_state_dtype"])
def test_choices(name: str) -> None:
    wrong = torch.float16 if name == "walk_state_dtype" else "other"
    with pytest.raises(ValueError, match=f"unknown {name} .*; expected one of"):
        SketchWalkConfig(**{name: wrong})


@pytest.mark.parametrize("name", ["density", "mass"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan, math.inf, "half", True])
def test_fractions_of_the_budget(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be None or in \(0, 1\]"):
        SketchWalkConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.2, "mass": 0.9}, "density and mass exclude each other"),
        ({"density_excludes_forced": True}, "density_excludes_forced needs density"),
        ({"sparsity_exponent": 0}, "sparsity_exponent must be above 0"),
        ({"walk_beta": 1.0}, r"walk_beta must be in \[0, 1\)"),
        ({"sink_density": 1.5}, r"sink_density must be in \[0, 1\]"),
        ({"local_density": -0.5}, r"local_density must be in \[0, 1\]"),
        ({"query_sub_block": 24}, r"query_sub_block \(24\) must divide block_size \(64\)"),
        ({"key_sub_block": 128}, r"key_sub_block \(128\) must divide block_size \(64\)"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SketchWalkConfig(**fields)


@pytest.mark.parametrize("config", [SketchWalkConfig(), SketchWalkConfig.paper(False), SketchWalkConfig.icml()])
def test_dict_round_trip(config: SketchWalkConfig) -> None:
    assert SketchWalkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_refuses_unknown_fields() -> None:
    with pytest.raises(ValueError, match=r"unknown config fields \['blocks', 'size'\]"):
        SketchWalkConfig.from_dict({"size": 1, "blocks": 2})


def test_dtype_by_name() -> None:
    assert SketchWalkConfig(walk_state_dtype="float64").walk_state_dtype == torch.float64
    assert SketchWalkConfig(walk_state_dtype="torch.float32").walk_state_dtype == torch.float32
    with pytest.raises(ValueError, match="unknown walk_state_dtype 'float31'"):
        SketchWalkConfig(walk_state_dtype="float31")


def test_published_rules() -> None:
    paper = SketchWalkConfig.paper()
    assert (paper.query_sub_block, paper.key_sub_block, paper.head_mode, paper.walk) == (64, 64, "mean", "product")
    assert SketchWalkConfig.paper(block_size=32).key_sub_block == 32
    assert SketchWalkConfig.paper(normalise=False).walk_state_dtype == torch.float64
    icml = SketchWalkConfig.icml()
    assert (icml.walk_beta, icml.walk_degree, icml.dense_tail_blocks) == (0.25, 3, 4)
    # 200 blocks: 5 first, 10 last and an eighth of the other 185.
    assert icml.budget(200) == 5 + 10 + 24


def test_create() -> None:
    assert create_sketch_walk_config() == SketchWalkConfig()
    assert create_sketch_walk_config(32, 16, 8, 4, density=0.3).density == 0.3
    assert create_sketch_walk_config(block_size=2).key_sub_block == 2
    assert create_sketch_walk_config(block_size=6).query_sub_block == 2
    with pytest.raises(TypeError, match="blok_size"):
        create_sketch_walk_config(blok_size=32)
    with pytest.raises(TypeError, match=r"block_size must be an int, got 1\.5"):
        create_sketch_walk_config(block_size=1.5)  # type: ignore[arg-type]


@given(available=st.integers(1, 3000), percent=st.integers(1, 100), least=st.integers(1, 50))
def test_density_budget_is_the_exact_ceiling(available: int, percent: int, least: int) -> None:
    config = SketchWalkConfig(density=percent / 100, min_blocks=least)
    assert config.budget(available) == min(available, max(least, -(-percent * available // 100)))


@given(available=st.integers(0, 3000), top_k=st.integers(1, 100))
def test_count_budget(available: int, top_k: int) -> None:
    assert SketchWalkConfig(top_k_blocks=top_k).budget(available) == min(available, top_k)


def test_mass_budget_is_its_least() -> None:
    assert SketchWalkConfig(mass=0.9, min_blocks=5).budget(100) == 5
    assert SketchWalkConfig(mass=0.9, sink_blocks=3, local_blocks=4).budget(100) == 7


def test_forced_blocks() -> None:
    config = SketchWalkConfig(sink_blocks=2, sink_density=0.1, local_blocks=1, local_density=0.05)
    assert [config.sink_count(n) for n in (1, 20, 30)] == [2, 2, 3]
    assert [config.local_count(n) for n in (1, 20, 21)] == [1, 1, 2]


def test_promised_sparsity() -> None:
    assert calculate_sparsity(65_536, 64, 16) == pytest.approx(0.984375)
    assert calculate_sparsity(1024) == 0.0
    assert calculate_sparsity(100, 64, 16) == 0.0
    for name in ("seq_len", "block_size", "top_k_blocks"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            calculate_sparsity(**{"seq_len": 100, name: 0})


@given(seq_len=st.integers(1, 5000), top_k=st.integers(1, 40), tail=st.integers(0, 5))
def test_causal_density_counts_rows(seq_len: int, top_k: int, tail: int) -> None:
    config = SketchWalkConfig(top_k_blocks=top_k, dense_tail_blocks=tail)
    rows = -(-seq_len // 64)
    tail = tail if seq_len > 1 else 0
    read = sum(i + 1 if i >= rows - tail else min(i + 1, top_k) for i in range(rows))
    assert causal_density(seq_len, config) == pytest.approx(read / (rows * (rows + 1) // 2))


def test_causal_density_refuses() -> None:
    with pytest.raises(ValueError, match="seq_len must be at least 1"):
        causal_density(0, SketchWalkConfig())
