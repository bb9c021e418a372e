"""Every setting of the method, its default written once, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

REDUCTIONS = ("max", "mean")
BLOCK_SCORES = ("peak", "mass")
HEAD_MODES = ("shared", "per_kv_head", "mean")
WALKS = ("damped", "product", "none")
SCORE_SCALES = ("attention", "sketch", "authors")
WALK_DTYPES = (torch.float32, torch.float64)
KEY_SKETCH_BITS = (8, 16)

# A density of exactly k blocks must not become k + 1 through rounding (0.2 * 35 is 7.000000000000001).
DENSITY_SLACK = 1e-6


def _require_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown walk_state_dtype {name!r}; expected one of {WALK_DTYPES}")
    return dtype


@dataclass(frozen=True)
class SketchWalkConfig:
    """What is sketched, how the walk composes layers, and how many blocks are read.

    Parameters
    ----------
    block_size : int
        Tokens per block of queries and of keys (B in the paper).
    sketch_dim : int
        Coordinates kept by the subsampled Hadamard transform (r in the paper). At or above the head dimension the
        transform is an exact rotation and keeps ``head_dim`` coordinates, whatever ``sketch_dim`` says.
    top_k_blocks : int
        Key blocks read by one query block (τ in the paper). Replaced by `density` or `mass` when one is set.
    sparsity_exponent : float
        Power s that sharpens block scores before they become transition probabilities.
    skip_first_n_layers : int
        Layers with a smaller index keep dense attention and take no part in the walk.
    use_srht : bool
        Rotate and subsample features by the seeded Hadamard transform. False compares unsketched features.
    hadamard_seed : int
        Seed of the signs and of the sampled coordinates; the same on every device and dtype.
    walk_state_dtype : torch.dtype
        float32 or float64, of the walk rows and the stored transition rows (a name such as "float32" is accepted).
    density : float, optional
        Fraction of a row's causal blocks to read, in (0, 1]. Replaces `top_k_blocks`.
    mass : float, optional
        Read the fewest blocks whose share of the row's walk scores reaches this, in (0, 1]. Replaces `top_k_blocks`.
    min_blocks : int
        Least number of blocks of a row when `density` or `mass` is set.
    sink_blocks, local_blocks : int
        First blocks, and last blocks up to and with the diagonal one, that are always read.
    dense_tail_blocks : int
        Last query blocks of a call of several tokens that read everything.
    query_sub_block, key_sub_block : int
        Tokens pooled into one sketched query or key; each divides `block_size`. `block_size` itself is the paper.
    salience : float
        How much more a token counts within its sub-block the farther it is from its block's mean: softmax weights of
        `salience` times its squared distance over the block's mean squared distance. 0 is the plain mean.
    query_contrast : float
        Factor above 0 on a sub-query's deviation from its block's mean, which pooling has made smaller. Sub-blocks of
        one token are left as they are.
    block_score : {"peak", "mass"}
        What a sub-query gives a key block: the softmax, over blocks, of each block's best sketched logit, or the
        softmax over all sub-keys, summed over the block's.
    step_memory : float
        In [0, 1). Of a block is remembered this times the share of attention that it got in the step before, this
        squared times that of two steps before, and so on. A generated token gives the block at least the square of
        that as a score: what was read and proved useful is read again. 0 forgets. Only without a walk and with
        ``reduce="max"``.
    step_ahead : float
        In [0, 1]. Of a block is remembered at least this times what is of the block before it: a passage that was
        useful may go on there. The first block's share, which is that of the attention sink, is not passed on.
    step_across : float
        In [0, 1]. Of a block is remembered at least this times what any layer remembers of it: where the sketch of one
        layer misses a block, others' may not.
    query_keep : float
        Share of a block's sub-queries, per head, that take part in "peak" scores, in (0, 1]: those that differ most
        from the block's mean.
    reduce : {"max", "mean"}
        How scores of sub-queries and of heads become one block score.
    head_mode : {"shared", "per_kv_head", "mean"}
        One selection for all heads, one per key/value head, or (the paper) one from head-averaged queries and keys.
    score_scale : {"attention", "sketch", "authors"}
        Scale of sketched logits: the attention's own, 1/sqrt(r) (the paper), or sqrt(r)/100 (the authors' code).
    walk : {"damped", "product", "none"}
        Rule that composes transition matrices across layers (`sketch_walk.walk`).
    walk_beta : float
        Weight β in [0, 1) of the damped walk's hop.
    walk_degree : int
        Damped hops per layer.
    walk_normalise : bool
        Make every transition row sum to 1. False is the paper's rule, which funnels mass into the first block.
    mean_correction : bool
        Let each pruned block stand in as its mean key and value, with log(count) added to its logit.
    sink_density, local_density : float
        Fractions of a row's causal blocks that `sink_blocks` and `local_blocks` grow to, if that is more.
    density_excludes_forced : bool
        Count `density` over the blocks that are neither sink nor local, on top of those.
    key_sketch_bits : int
        8 stores key sketches as 8-bit codes, apart from their block's mean, with two float32 numbers per block; 16
        stores them in the model's dtype.
    dense_below : int, optional
        Calls over fewer tokens run dense attention. None takes the measured crossover of the device; 0 is never.

    Raises
    ------
    ValueError, TypeError
        For a value out of range; the message names the field.
    """

    block_size: int = 64
    sketch_dim: int = 64
    top_k_blocks: int = 16
    sparsity_exponent: float = 8
    skip_first_n_layers: int = 2
    use_srht: bool = True
    hadamard_seed: int = 42
    walk_state_dtype: torch.dtype = torch.float32
    density: float | None = None
    mass: float | None = None
    min_blocks: int = 1
    sink_blocks: int = 1
    local_blocks: int = 1
    dense_tail_blocks: int = 0
    query_sub_block: int = 4
    key_sub_block: int = 4
    salience: float = 2.0
    query_contrast: float = 1.25
    step_memory: float = 0.9
    step_ahead: float = 0.9
    step_across: float = 0.7
    block_score: str = "peak"
    query_keep: float = 0.5
    reduce: str = "max"
    head_mode: str = "shared"
    score_scale: str = "attention"
    walk: str = "none"
    walk_beta: float = 0.3
    walk_degree: int = 1
    walk_normalise: bool = True
    mean_correction: bool = False
    sink_density: float = 0.0
    local_density: float = 0.0
    density_excludes_forced: bool = False
    key_sketch_bits: int = 8
    dense_below: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.walk_state_dtype, str):
            object.__setattr__(self, "walk_state_dtype", _dtype_named(self.walk_state_dtype))
        for name in ("block_size", "sketch_dim", "top_k_blocks", "query_sub_block", "key_sub_block"):
            _require_int(name, getattr(self, name), least=1)
        for name in ("walk_degree", "min_blocks", "local_blocks"):
            _require_int(name, getattr(self, name), least=1)
        for name in ("skip_first_n_layers", "sink_blocks", "dense_tail_blocks"):
            _require_int(name, getattr(self, name), least=0)
        _require_int("hadamard_seed", self.hadamard_seed, least=0)
        if self.dense_below is not None:
            _require_int("dense_below", self.dense_below, least=0)
        for name in ("use_srht", "walk_normalise", "mean_correction", "density_excludes_forced"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, choices in (
            ("block_score", BLOCK_SCORES),
            ("reduce", REDUCTIONS),
            ("head_mode", HEAD_MODES),
            ("score_scale", SCORE_SCALES),
            ("walk", WALKS),
            ("walk_state_dtype", WALK_DTYPES),
            ("key_sketch_bits", KEY_SKETCH_BITS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; expected one of {choices}")
        for name in ("density", "mass"):
            value = getattr(self, name)
            if value is not None and not (_is_real(value) and 0.0 < value <= 1.0):
                raise ValueError(f"{name} must be None or in (0, 1], got {value!r}")
        for name in ("sink_density", "local_density", "step_ahead", "step_across"):
            if not (_is_real(getattr(self, name)) and 0.0 <= getattr(self, name) <= 1.0):
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if self.density is not None and self.mass is not None:
            raise ValueError("density and mass exclude each other: each one replaces top_k_blocks")
        if self.density_excludes_forced and self.density is None:
            raise ValueError("density_excludes_forced needs density")
        if not (_is_real(self.sparsity_exponent) and self.sparsity_exponent > 0):
            raise ValueError(f"sparsity_exponent must be above 0, got {self.sparsity_exponent!r}")
        if not (_is_real(self.query_keep) and 0.0 < self.query_keep <= 1.0):
            raise ValueError(f"query_keep must be in (0, 1], got {self.query_keep!r}")
        if not (_is_real(self.salience) and self.salience >= 0):
            raise ValueError(f"salience must be a number of at least 0, got {self.salience!r}")
        if not (_is_real(self.query_contrast) and self.query_contrast > 0):
            raise ValueError(f"query_contrast must be above 0, got {self.query_contrast!r}")
        if not (_is_real(self.step_memory) and 0.0 <= self.step_memory < 1.0):
            raise ValueError(f"step_memory must be in [0, 1), got {self.step_memory!r}")
        if not (_is_real(self.walk_beta) and 0.0 <= self.walk_beta < 1.0):
            raise ValueError(f"walk_beta must be in [0, 1), got {self.walk_beta!r}")
        for name in ("query_sub_block", "key_sub_block"):
            if self.block_size % getattr(self, name):
                raise ValueError(f"{name} ({getattr(self, name)}) must divide block_size ({self.block_size})")

    @property
    def uses_walk(self) -> bool:
        """Whether transition rows are kept at all."""
        return self.walk != "none"

    @property
    def remembers(self) -> bool:
        """Whether `step_memory` has any effect."""
        return self.step_memory > 0 and not self.uses_walk and self.reduce == "max"

    def kept_sub_queries(self, sub_queries: int) -> int:
        """Sub-queries per head and block that take part in the scores, of `sub_queries`."""
        if self.block_score == "mass":
            return sub_queries
        return max(1, math.ceil(self.query_keep * sub_queries - DENSITY_SLACK))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SketchWalkConfig:
        """One of `PRESETS`, with fields changed by keyword.

        Raises
        ------
        ValueError
            For an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; expected one of {tuple(PRESETS)}")
        return replace(PRESETS[name], **changes)

    @classmethod
    def paper(cls, normalise: bool = True, **changes: Any) -> SketchWalkConfig:
        """Algorithms 1 and 2 of arXiv 2602.07397: head-averaged block means, product walk, first and current block
        kept.

        `normalise=False` keeps the published unnormalised powers of the softmax as transition rows, in float64.
        """
        published: dict[str, Any] = {
            "query_sub_block": changes.get("block_size", 64),
            "key_sub_block": changes.get("block_size", 64),
            "salience": 0.0,
            "query_contrast": 1.0,
            "step_memory": 0.0,
            "block_score": "mass",
            "head_mode": "mean",
            "score_scale": "sketch",
            "walk": "product",
            "walk_normalise": normalise,
            "walk_state_dtype": torch.float32 if normalise else torch.float64,
            "key_sketch_bits": 16,
        }
        return cls(**{**published, **changes})

    @classmethod
    def icml(cls, **changes: Any) -> SketchWalkConfig:
        """The rule of the authors' released code, to compare with.

        Window 5 %, sink 2.5 % and 12.5 % of the rest of a row's causal blocks; block means per head, averaged over
        heads; three damped hops per layer with β = 0.25; the last four query blocks dense. Two differences, both
        because ours must also decode: fractions are of the row's own blocks rather than of the whole prompt, and the
        softmax is causal, where theirs also sees future blocks.
        """
        released: dict[str, Any] = {
            "sketch_dim": 128,
            "sparsity_exponent": 1,
            "query_sub_block": changes.get("block_size", 64),
            "key_sub_block": changes.get("block_size", 64),
            "salience": 0.0,
            "query_contrast": 1.0,
            "step_memory": 0.0,
            "block_score": "mass",
            "reduce": "mean",
            "score_scale": "authors",
            "density": 0.125,
            "density_excludes_forced": True,
            "sink_density": 0.025,
            "local_density": 0.05,
            "walk": "damped",
            "walk_beta": 0.25,
            "walk_degree": 3,
            "dense_tail_blocks": 4,
            "key_sketch_bits": 16,
        }
        return cls(**{**released, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON-able values; `from_dict` takes them back."""
        values = asdict(self)
        values["walk_state_dtype"] = str(self.walk_state_dtype).removeprefix("torch.")
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SketchWalkConfig:
        """Inverse of `to_dict`.

        Raises
        ------
        ValueError
            For a key that is no field.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown config fields {unknown}")
        return cls(**values)

    def sink_count(self, available: int) -> int:
        """First blocks always read in a row of `available` causal blocks."""
        return max(self.sink_blocks, math.ceil(self.sink_density * available - DENSITY_SLACK))

    def local_count(self, available: int) -> int:
        """Last blocks always read in a row of `available` causal blocks."""
        return max(self.local_blocks, math.ceil(self.local_density * available - DENSITY_SLACK))

    def budget(self, available: int) -> int:
        """Blocks that a row of `available` causal blocks reads (for `mass`: the least it reads).

        Returns
        -------
        int
            Between 1 and `available` (0 if that is 0).
        """
        if self.mass is not None:
            wanted = max(self.min_blocks, self.sink_count(available) + self.local_count(available))
        elif self.density is None:
            wanted = self.top_k_blocks
        elif self.density_excludes_forced:
            forced = self.sink_count(available) + self.local_count(available)
            rest = max(0, available - forced)
            wanted = max(self.min_blocks, forced + math.ceil(self.density * rest - DENSITY_SLACK))
        else:
            wanted = max(self.min_blocks, math.ceil(self.density * available - DENSITY_SLACK))
        return min(available, wanted)


# Four promised numbers each. What goes beyond them: a dense tail of 256 tokens, room for a question. It costs a long
# prompt next to nothing and finds what a sparse question block loses (benchmarks/results/ablations_question_cpu.json).
PRESETS: dict[str, SketchWalkConfig] = {
    "default": SketchWalkConfig(),
    "high_quality": SketchWalkConfig(
        block_size=32, sketch_dim=128, top_k_blocks=32, sparsity_exponent=4, dense_tail_blocks=8
    ),
    "high_speed": SketchWalkConfig(block_size=128, sketch_dim=32, top_k_blocks=8, sparsity_exponent=16),
    "long_context": SketchWalkConfig(
        block_size=128, sketch_dim=128, top_k_blocks=32, sparsity_exponent=8, dense_tail_blocks=2
    ),
}


def create_sketch_walk_config(
    block_size: int = SketchWalkConfig.block_size,
    sketch_dim: int = SketchWalkConfig.sketch_dim,
    top_k_blocks: int = SketchWalkConfig.top_k_blocks,
    sparsity_exponent: float = SketchWalkConfig.sparsity_exponent,
    **fields_by_name: Any,
) -> SketchWalkConfig:
    """A `SketchWalkConfig` from the four headline numbers and any other field by keyword.

    A block smaller than the default sub-block takes sub-blocks of its own size.

    Raises
    ------
    ValueError, TypeError
        As `SketchWalkConfig`; TypeError for a keyword that is no field.
    """
    if isinstance(block_size, int) and block_size > 0:
        for name in ("query_sub_block", "key_sub_block"):
            fields_by_name.setdefault(name, math.gcd(block_size, getattr(SketchWalkConfig, name)))
    return SketchWalkConfig(
        block_size=block_size,
        sketch_dim=sketch_dim,
        top_k_blocks=top_k_blocks,
        sparsity_exponent=sparsity_exponent,
        **fields_by_name,
    )


def calculate_sparsity(seq_len: int, block_size: int = 64, top_k_blocks: int = 16) -> float:
    """Fraction of key blocks that the last row leaves out: 1 - min(1, top_k_blocks * block_size / seq_len).

    This is the founding document's formula (65,536 tokens, 64, 16: 0.984). `causal_density` counts what a causal run
    really reads.

    Raises
    ------
    ValueError
        If an argument is below 1.
    """
    for name, value in (("seq_len", seq_len), ("block_size", block_size), ("top_k_blocks", top_k_blocks)):
        _require_int(name, value, least=1)
    return 1.0 - min(1.0, top_k_blocks * block_size / seq_len)


def causal_density(seq_len: int, config: SketchWalkConfig) -> float:
    """Fraction of causal key blocks that one prompt of `seq_len` tokens reads in a sparse layer, diagonal counted
    whole.

    For `mass` this is the least it can be.

    Raises
    ------
    ValueError
        If `seq_len` is below 1.
    """
    _require_int("seq_len", seq_len, least=1)
    rows = math.ceil(seq_len / config.block_size)
    tail = min(config.dense_tail_blocks, rows) if seq_len > 1 else 0
    read = sum(config.budget(i + 1) for i in range(rows - tail)) + sum(range(rows - tail + 1, rows + 1))
    return read / (rows * (rows + 1) / 2)
