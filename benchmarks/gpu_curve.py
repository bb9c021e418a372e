"""What each setting of the ablations costs on one GPU: its selector over one layer's prompt, stage by stage.

    python benchmarks/gpu_curve.py --resume --seconds 40 --out benchmarks/results/gpu_curve.json

The settings are those rows of benchmarks/ablations.json that change the selector's work and that the Triton kernels
take, under the plan's names, so that quality and time can be put side by side; a setting of two groups is timed
once. Llama-3.1-8B shape, bfloat16, random tensors; a sketch keeps the plan's share of a head's coordinates.

Every setting is compiled and checked against the reference in a process of its own, all at once; then, with the GPU for
itself, each is timed. Beside them once the sparse attention. Device milliseconds; the file is written after every row.
`--seconds` begins no row later (compiling may take six tenths of them) and leaves exit code 1 while rows are missing;
`--resume` goes on from a file of the same code, versions and device. No accuracy belongs to random tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sketch_walk import SketchWalkConfig, kernels
from sketch_walk.attention import select
from sketch_walk.bench import HeadShape, environment, measure
from sketch_walk.bench.checks import SCORE_TOLERANCE, expect, relative_error, sampled_error, tolerance
from sketch_walk.bench.inputs import QKV, attend_selection, make_generator, make_qkv, random_selection, row_index
from sketch_walk.bench.record import code_digest, resumed, timing_dict
from sketch_walk.bench.timing import first_line
from sketch_walk.evaluation.ablation import read_plan
from sketch_walk.kernels import triton_peaks, triton_sketch
from sketch_walk.layout import Layout, make_layout
from sketch_walk.scoring import absorb_keys, call_scores
from sketch_walk.selection import BlockSelection, block_density
from sketch_walk.sketch import KeySketch, feature_width, rotation, score_scale
from sketch_walk.state import LayerSketch

PLAN = Path(__file__).parent / "ablations.json"
# The head dimension of the model that the plan was measured with: its sketches are shares of that.
PLAN_HEAD_DIM = 64
SHAPE = HeadShape()
SCALE = SHAPE.head_dim**-0.5
DTYPE = torch.bfloat16
# Groups of the plan, and of some the rows that cost other work than the default. A curve needs the first rows first.
GROUPS: dict[str, tuple[str, ...] | None] = {
    "query-keep": ("0.5", "0.25", "0.125", "1"),
    "block-size": None,
    "sub-blocks": None,
    "sketch-size": None,
    "salience": ("plain means, 0 and contrast 1",),
}
ATTENTION_BLOCK, ATTENTION_DENSITIES = 64, (0.2, 0.05)
# Query blocks at the prompt's end whose scores are compared with the reference.
CHECKED_ROWS = 4
# Relative error of the keys that the codes stand for: the kernels rotate in bfloat16, which moves few codes, by one.
KEY_TOLERANCE = 2e-2
COMPILING = 0.6
# What a file must share with a run that goes on from it.
SAME = ("device", "versions", "code", "shape", "dtype", "tokens", "config", "repeats")
Row = dict[str, Any]


class Setting(NamedTuple):
    """A row of the plan, with its config for the timed heads."""

    group: str
    label: str
    config: SketchWalkConfig


def settings() -> list[Setting]:
    """The plan's rows that are timed, each config once, the default first."""
    found: dict[SketchWalkConfig, Setting] = {}
    groups = {group.name: group for group in read_plan(PLAN).groups}
    for name, labels in GROUPS.items():
        variants = {variant.label: variant for variant in groups[name].variants}
        for label in labels or variants:
            plain = variants[label].config
            width = min(plain.sketch_dim, PLAN_HEAD_DIM) * SHAPE.head_dim // PLAN_HEAD_DIM
            config = replace(plain, sketch_dim=width)
            found.setdefault(config, Setting(name, label, config))
    return list(found.values())


def inputs(tokens: int, device: str) -> tuple[QKV, Layout]:
    """One prompt, the same in every process."""
    where = torch.device(device)
    return make_qkv(SHAPE, 1, tokens, tokens, DTYPE, make_generator(where, 0)), make_layout(1, tokens, tokens, where)


class Selector:
    """The selector's stages over one prompt."""

    def __init__(self, config: SketchWalkConfig, query: Tensor, key: Tensor, layout: Layout) -> None:
        self.config, self.query, self.key, self.layout = config, query, key, layout
        self.state = LayerSketch(config)

    def sketch_keys(self) -> None:
        absorb_keys(self.state, self.key, self.layout, self.query, "triton")

    def sketch_queries(self) -> triton_sketch.PackedQueries:
        config = self.config
        return triton_sketch.sketch_queries(
            self.query,
            self.layout,
            rotation(SHAPE.head_dim, config, self.query.device, kernels.product_dtype()),
            block_size=config.block_size,
            query_sub_block=config.query_sub_block,
            kept=config.kept_sub_queries(config.block_size // config.query_sub_block),
            salience=float(config.salience),
            contrast=float(config.query_contrast),
        )

    def peaks(self, queries: triton_sketch.PackedQueries) -> Tensor:
        codes, scales = self.state.read_keys(self.layout.max_length // self.config.block_size)
        assert scales is not None
        return triton_peaks.peak_scores(
            queries,
            codes,
            scales,
            self.layout.length,
            scale=score_scale(SHAPE.head_dim, SCALE, self.config),
            per_block=self.config.block_size // self.config.key_sub_block,
            key_sub_block=self.config.key_sub_block,
            per_kv_head=False,
        )

    def scores(self) -> Tensor:
        return call_scores(self.state, self.query, self.layout, SCALE, impl="triton")

    def select(self, scores: Tensor, impl: str = "triton") -> BlockSelection:
        return select(scores, self.layout, self.config, impl=impl)

    def whole(self) -> BlockSelection:
        self.sketch_keys()
        return self.select(self.scores())


def keys_of(state: LayerSketch, tokens: int) -> Iterator[Tensor]:
    """The sketched keys that a state's codes stand for, head by head."""
    config = state.config
    codes, scales = state.read_keys(tokens // config.block_size)
    assert scales is not None
    width = feature_width(SHAPE.head_dim, config)
    for head in range(codes.shape[1]):
        sketch = KeySketch(codes[:, head : head + 1], scales[:, head : head + 1])
        yield sketch.dequantise(config.block_size // config.key_sub_block, width)


@torch.no_grad()
def check(config: SketchWalkConfig, tokens: int, device: str) -> Row:
    """Compile the selector, and compare what is timed with the reference.

    Raises
    ------
    MismatchError
        If key sketches, scores or selection are not the reference's.
    """
    (query, key, _), layout = inputs(tokens, device)
    selector = Selector(config, query, key, layout)
    chosen = selector.whole()
    scores = selector.scores()
    state = LayerSketch(config)
    absorb_keys(state, key, layout, query, "reference")
    pairs = zip(keys_of(selector.state, tokens), keys_of(state, tokens), strict=True)
    apart = max(relative_error(*pair) for pair in pairs)
    rows = min(CHECKED_ROWS, scores.shape[2])
    last = query[:, :, -rows * config.block_size :]
    exact = call_scores(
        selector.state, last, make_layout(1, last.shape[2], tokens, query.device), SCALE, impl="reference"
    )
    wanted = selector.select(scores, "reference")
    wrong = (chosen.counts != wanted.counts).sum() + (chosen.indices != wanted.indices).sum()
    return {
        "key_error": round(expect(apart, KEY_TOLERANCE, "sketched keys"), 5),
        "score_error": round(expect(relative_error(scores[:, :, -rows:], exact), SCORE_TOLERANCE, "block scores"), 5),
        "selections_wrong": int(expect(wrong.item(), 0, "selection")),
        "block_density": round(block_density(chosen, row_index(layout, config)), 4),
    }


def time_selector(config: SketchWalkConfig, tensors: QKV, layout: Layout, repeats: int) -> Row:
    """Milliseconds of the stages one by one, and of the selector as a call runs it."""
    selector = Selector(config, tensors.query, tensors.key, layout)
    timed = partial(measure, device=tensors.query.device, repeats=repeats)
    selector.sketch_keys()
    queries = selector.sketch_queries()
    scores = selector.peaks(queries)
    stages: dict[str, Callable[[], Any]] = {
        "sketch_keys": selector.sketch_keys,
        "sketch_queries": selector.sketch_queries,
        "scores": partial(selector.peaks, queries),
        "selection": partial(selector.select, scores),
    }
    return {
        "stages_ms": {name: timing_dict(timed(call)) for name, call in stages.items()},
        "selector_ms": timing_dict(timed(selector.whole)),
    }


def attention_calls(tensors: QKV, layout: Layout) -> dict[float, Callable[[], tuple[Tensor, str]]]:
    """The sparse attention alone by density, over random selections; each called and checked once."""
    calls: dict[float, Callable[[], tuple[Tensor, str]]] = {}
    for density in ATTENTION_DENSITIES:
        config = SketchWalkConfig(block_size=ATTENTION_BLOCK, density=density, min_blocks=4)
        chosen = random_selection(layout, config, SHAPE.kv_heads, make_generator(tensors.query.device, 1))
        call = partial(attend_selection, tensors, chosen, layout, config, SCALE, "auto")
        error = sampled_error(call()[0], tensors, SCALE, chosen, ATTENTION_BLOCK)
        expect(error, tolerance(DTYPE, tensors.query.device), f"attention at density {density}")
        calls[density] = call
    return calls


def time_attention(call: Callable[[], tuple[Tensor, str]], density: float, device: torch.device, repeats: int) -> Row:
    """Milliseconds of one attention."""
    row = {"block_size": ATTENTION_BLOCK, "density": density, "impl": call()[1]}
    return row | timing_dict(measure(call, device, repeats))


def ready(
    pending: list[Setting], args: argparse.Namespace, seconds: float, meanwhile: Callable[[], Any]
) -> list[Row | None]:
    """Checks of every setting, all at once in processes of their own, or what went wrong; None where time ran out."""
    context = multiprocessing.get_context("forkserver")
    # Imported once, for all of them.
    context.set_forkserver_preload([triton_peaks.__name__, "sketch_walk.bench", "sketch_walk.evaluation"])
    begin = time.monotonic()
    with ProcessPoolExecutor(max(1, min(len(pending), args.workers)), mp_context=context) as pool:
        futures = [pool.submit(check, setting.config, args.tokens, args.device) for setting in pending]
        meanwhile()
        left = max(0.0, seconds - (time.monotonic() - begin))
        wait(futures, timeout=left if math.isfinite(left) else None)
        for future in futures:
            future.cancel()
    results: list[Row | None] = []
    for future in futures:
        if future.cancelled():
            results.append(None)
        else:
            error = future.exception()
            results.append({"error": f"{type(error).__name__}: {first_line(error)}"} if error else future.result())
    return results


def named(setting: Setting, default: SketchWalkConfig) -> Row:
    """What a row says of its setting."""
    before, own = default.to_dict(), setting.config.to_dict()
    changes = {name: value for name, value in own.items() if value != before[name]}
    return {"group": setting.group, "label": setting.label, "changes": changes}


def fill(result: Row, args: argparse.Namespace, begin: float) -> int:
    """Check and time what `result` does not have; how many settings are still missing, or wrong."""
    chosen = settings()
    default = chosen[0].config
    rows = {(row["group"], row["label"]): row for row in result["results"] if "error" not in row}
    pending = [setting for setting in chosen if (setting.group, setting.label) not in rows]
    if not pending and result["attention"]:
        return 0
    tensors, layout = inputs(args.tokens, args.device)
    calls: dict[float, Callable[[], tuple[Tensor, str]]] = {}

    def compile_attention() -> None:
        if not result["attention"]:
            calls.update(attention_calls(tensors, layout))

    left = COMPILING * args.seconds - (time.monotonic() - begin)
    checks = ready(pending, args, left, compile_attention)
    print(f"compiled and checked after {time.monotonic() - begin:.1f} s", flush=True)
    for density, call in calls.items():
        result["attention"].append(time_attention(call, density, tensors.query.device, args.repeats))
    for setting, checked in zip(pending, checks, strict=True):
        if checked is None or time.monotonic() - begin > args.seconds:
            continue
        row = {**named(setting, default), **checked}
        if "error" not in row:
            row |= time_selector(setting.config, tensors, layout, args.repeats)
        print(f"{time.monotonic() - begin:.1f} s: {json.dumps(row)}", flush=True)
        rows[setting.group, setting.label] = row
        result["results"] = [rows[key] for s in chosen if (key := (s.group, s.label)) in rows]
        write(result, args.out)
    write(result, args.out)
    return len(chosen) - sum("error" not in row for row in rows.values())


def write(result: Row, file: Path | None) -> None:
    """The file as far as it is."""
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Check, time, write."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=131072, help="of the prompt, a multiple of 128")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--device", default="cuda", help="cpu: a trial in Triton's interpreter, no times to report")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so many")
    args = parser.parse_args()
    if args.tokens < 128 or args.tokens % 128:
        parser.error(f"--tokens must be a multiple of 128, got {args.tokens}")
    default = settings()[0].config
    result: Row = {
        "what": "the selector of one layer's prompt by setting, and the sparse attention; Llama-3.1-8B shape "
        "(32/8 heads x 128), bfloat16, random tensors",
        "command": "python benchmarks/gpu_curve.py " + " ".join(sys.argv[1:]),
        **environment(torch.device(args.device)).to_dict(),
        "code": code_digest(Path(__file__), PLAN),
        "plan": f"benchmarks/{PLAN.name}",
        "shape": SHAPE._asdict(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "tokens": args.tokens,
        "density": default.density,
        "config": default.to_dict(),
        "repeats": args.repeats,
    }
    earlier = resumed(args.out, result, SAME) if args.resume else {}
    result |= {name: earlier.get(name, []) for name in ("attention", "results")}
    missing = fill(result, args, begin)
    print(json.dumps(result))
    if missing:
        sys.exit(f"{missing} settings are missing or wrong: run the same with --resume")


if __name__ == "__main__":
    with torch.no_grad():
        main()
