"""Rewrite the generated regions of README.md and docs/*.md from benchmarks/results and from the package.

    python docs/generate.py            rewrite
    python docs/generate.py --check    say which pages are stale, exit 1 if any

A region lies between ``<!-- generated: NAME -->`` and ``<!-- end -->``; NAME is a function in `REGIONS`. The pictures
of times on a GPU are drawn anew when their curves are no longer those of the results.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from typer import Context
from typer.models import ArgumentInfo

from sketch_walk import kernels
from sketch_walk.bench.memory import founding_bytes
from sketch_walk.cli.ablate_report import TASK_NAMES, body, header
from sketch_walk.cli.app import app
from sketch_walk.cli.format import bytes_text
from sketch_walk.complexity import (
    LEAST_ADVISED_DENSITY,
    PROMISED_STATE_BYTES,
    SKETCH_SCALE_BYTES,
    ModelShape,
    count_memory,
)
from sketch_walk.config import PRESETS, SketchWalkConfig, causal_density
from sketch_walk.evaluation.ablation import read_plan
from sketch_walk.kernels import flash_cute
from sketch_walk.kernels.dense import FASTEST_FROM
from sketch_walk.plots import Curve, Point, plot_quality_against_time, plot_speed_up_against_length
from sketch_walk.sketch import feature_width, outline_size

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "benchmarks" / "results"
IMAGES = PROJECT / "docs" / "images"
ABLATIONS = "ablations_smollm2.json"
# Plans beside benchmarks/ablations.json, and groups that were measured elsewhere than the others.
OTHER_PLANS = ("ablations_question.json",)
OTHER_ABLATIONS = {"question-block": "ablations_question_cpu.json", "decode": "ablations_decode_cpu.json"}
# Under today's rule, and under the rules that came before it.
QUALITY, PLAIN = "yardstick_smollm2_4k.json", "yardstick_smollm2_4k_plain.json"
EARLIER, EARLIER_TRITON = "yardstick_smollm2_4k_mass.json", "yardstick_smollm2_4k_mass_triton.json"
SPEED, DECODE, GENERATION = "cpu_prompt.json", "cpu_decode.json", "cpu_generation.json"
ANSWERS = "answers_smollm2.json"
GPU_CUTE, MEMORY, SELECTOR = "gpu_cute.json", "gpu_memory.json", "gpu_selector.json"
# Of `sketch-walk bench attention`.
PREFILL, TRITON, STEP = "gpu_prefill.json", "gpu_prefill_triton.json", "gpu_decode.json"
SHORT, SHORT_GRAPH = "gpu_short.json", "gpu_short_graph.json"
CROSS, EAGER = "gpu_cross.json", "gpu_eager.json"
# Of `sketch-walk bench model`, and of benchmarks/gpu_million.py.
TTFT, MODEL_STEP, MILLION = "gpu_ttft.json", "gpu_step.json", "gpu_million.json"
# Files that time decode steps.
DECODED = (STEP, EAGER, MODEL_STEP)
SPEED_UP_PICTURE = IMAGES / "gpu" / "speed-up-of-a-prompt.png"
# Of benchmarks/gpu_curve.py, and the prompts whose quality stands beside its times.
CURVE, CURVE_PROMPT = "gpu_curve.json", "4000"
CURVE_PICTURE = IMAGES / "gpu" / "quality-against-selector-time.png"
CURVE_STAGES = {
    "sketch_keys": "sketch of keys",
    "sketch_queries": "of queries",
    "scores": "scores",
    "selection": "selection",
}
# How the groups of the plan are called there.
CURVE_GROUPS = {
    "query-keep": "query_keep",
    "block-size": "block size",
    "sub-blocks": "sub-blocks",
    "sketch-size": "coordinates",
    "salience": "pooling",
}
TASKS = ("noise", "essay", "mk4")
LENGTHS = (4096, 32_768, 131_072)
README_LENGTHS = (1024, 2048, 4096, 8000)
SMOLLM2 = ModelShape(layers=30, heads=9, kv_heads=3, head_dim=64)
# The run that most tables compare with: the defaults at a fifth of the blocks.
BASE = {"density": 0.2, "min_blocks": 4}
EARLIER_BASE = {"block_score": "mass", "walk": "damped", **BASE}
# What makes of today's rule the one of `PLAIN`: sub-blocks are means.
PLAIN_MEANS = {"salience": 0.0, "query_contrast": 1.0}
README_RUNS = (BASE, {**BASE, "density": 0.1}, {**BASE, "block_size": 128})
DENSE_NAMES = {"sdpa-flash": "SDPA flash", "sdpa-cudnn": "SDPA cuDNN", "flash-attn-4": "flash-attn-4"}
# The launch variants of benchmarks/gpu_selector.py that the kernels take by themselves.
PEAK_LAUNCH, STEP_LAUNCH = "64x128, 4 warps, 128 registers", "peaks, 256 sub-keys, 2 warps, 2 stages, 128 registers"
# What that script times.
PROMPT_STAGES = {
    "sketch_keys": "sketch of keys",
    "sketch_queries": "sketch of queries",
    "unpack": "unpacking of codes",
    PEAK_LAUNCH: "peaks",
    "call_scores": "the three before in one call",
    "select": "selection",
}
STEP_STAGES = {
    "sketch": "key and query",
    STEP_LAUNCH: "peaks",
    "call_scores": "scores in one call",
    "select": "selection",
    "step_selection": "the selector as a step runs it",
    "layer": "whole layer",
}
# The kernels of `impl="cute"` were timed at this shape on this GPU (major compute capability).
HEAD_DIM, GROUP, CAPABILITY = 128, 4, 9
SPEED_UP_TITLE = "One layer's prompt with its selector"
REGION = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; columns from `left` on are right aligned."""
    rule = [" --- " if i < left else " ---: " for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(rule) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(fraction: float) -> str:
    return f"{fraction:.1%}".replace("%", " %")


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def read(name: str) -> dict[str, Any] | None:
    """A result file, or None where it is not there."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def required(name: str) -> dict[str, Any]:
    """A result file that must be there."""
    data = read(name)
    assert data is not None, f"{RESULTS / name} is missing"
    return data


def precision_of(row: Row) -> str:
    """How a run's RoPE frequencies were kept: float32 or bfloat16."""
    return str(row["rope_frequencies"]).partition(" ")[0]


def compared(name: str) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """A quality file, and its runs by precision, dense first; a precision without a dense run is left out."""
    data = required(name)
    by_precision: dict[str, list[Row]] = {}
    for row in data["results"]:
        by_precision.setdefault(precision_of(row), []).append(row)
    return data, {
        precision: ordered(rows)
        for precision, rows in by_precision.items()
        if any(row["config"] == {"rule": "dense"} for row in rows)
    }


def quality() -> tuple[dict[str, Any], list[Row]]:
    """The quality file of today's rule, and its runs with dense beside them (of the precision with most runs)."""
    data, by_precision = compared(QUALITY)
    return data, max(by_precision.values(), key=len)


def run_of(rows: Iterable[Row], **config: Any) -> Row:
    """The one run with exactly this config."""
    (row,) = (row for row in rows if row["config"] == config)
    return row


def rule_name(config: dict[str, Any]) -> str:
    """A run's name in a table."""
    fields_given = dict(config)
    rule = fields_given.pop("rule", None)
    if rule == "dense":
        return "dense"
    if rule == "icml":
        return "`SketchWalkConfig.icml()`"
    if rule == "paper":
        written = "" if fields_given.pop("normalise", True) else "normalise=False"
        return f"`SketchWalkConfig.paper({written})`, density {fields_given['density']}"
    text = "default"
    if fields_given.get("block_score") == "mass":
        del fields_given["block_score"]
        walk = fields_given.pop("walk")
        text = f"mass scores, {'no' if walk == 'none' else walk} walk"
    changed = {name: value for name, value in fields_given.items() if name not in BASE}
    return f"{text}, density {fields_given['density']}" + "".join(f", `{k}={v!r}`" for k, v in changed.items())


def ordered(rows: Iterable[Row]) -> list[Row]:
    """Dense first, then the default, its variations, and the published rules."""
    rank = {"dense": 0, None: 1, "icml": 2, "paper": 3}
    return sorted(rows, key=lambda row: (rank[row["config"].get("rule")], len(row["config"])))


def standard_error(accuracy: float, samples: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / samples)


def wrapped(text: str) -> str:
    """`text` in lines of at most 120 characters."""
    return textwrap.fill(text, width=120, break_on_hyphens=False, break_long_words=False)


def setting(data: dict[str, Any], name: str) -> str:
    """How a quality file was made."""
    prompts = f"{data['samples']} prompts per task, " if "samples" in data else ""
    return (
        f"{data['model']}, prompts of {data['tokens']:,} tokens, {prompts}sparse from layer "
        f"{data['skip_first_n_layers']} up, every call sparse (`dense_below=0`), kernels: {data['impl']}, "
        f"{data['device']}. Source: `benchmarks/results/{name}`."
    )


def frequencies(precision: str) -> str:
    """What a precision of the RoPE frequencies means."""
    return {"float32": "RoPE frequencies in float32, as saved", "bfloat16": "whole model cast to bfloat16"}[precision]


def readme_results() -> str:
    """Region: today's rule with dense beside it, then the speed on a GPU and on a CPU."""
    data, rows = quality()
    dense, sparse = rows[0], [run_of(rows, **config) for config in README_RUNS]
    body = [
        [
            rule_name(row["config"]),
            percent(row["block_density"]),
            *(f"{row[task]['accuracy']:.2f} ({dense[task]['accuracy']:.2f})" for task in TASKS),
            f"{row['prose_nll']:.3f} ({dense['prose_nll']:.3f})",
        ]
        for row in sparse
    ]
    needles = (f"one needle in {text}" for text in ("repeated text", "prose"))
    head = ("attention", "blocks read", *needles, "one of four needles", "prose NLL, nats")
    error = standard_error(dense["essay"]["accuracy"], data["samples"])
    text = (
        f"Quality, dense attention of the same run in brackets. {setting(data, QUALITY)} One standard error of the "
        f"prose needles is about {100 * error:.0f} points."
    )
    return "\n\n".join([wrapped(text), table(head, body), gpu_readme(), model_readme(), speed_table(README_LENGTHS)])


def quality_loss() -> str:
    """Region: today's rule minus dense, with the standard error that two independent samples would have."""
    data, rows = quality()
    dense, *sparse = rows
    body = []
    for row in sparse:
        cells = []
        for task in TASKS:
            pair = (row[task]["accuracy"], dense[task]["accuracy"])
            error = math.hypot(*(standard_error(accuracy, data["samples"]) for accuracy in pair))
            cells.append(f"{100 * (pair[0] - pair[1]):+.1f} ± {100 * error:.1f}")
        rise = row["prose_nll"] - dense["prose_nll"]
        body.append(
            [
                rule_name(row["config"]),
                percent(row["block_density"]),
                *cells,
                f"{rise:+.3f} ({percent(rise / dense['prose_nll'])})",
            ]
        )
    head = ("attention", "blocks read", *(f"{task}, points" for task in TASKS), "prose NLL, nats")
    return table(head, body)


def config_note(config: dict[str, Any], apart: Sequence[str] = ()) -> str:
    """A sentence when a file's config, the fields `apart` left out, is not today's default with `BASE`; else empty."""
    today = SketchWalkConfig(**BASE).to_dict()
    names = [name for name in today if name not in ("dense_below", *apart)]
    changed = [f"`{name}={config[name]!r}`" for name in names if name in config and config[name] != today[name]]
    absent = [f"`{name}`" for name in names if name not in config]
    parts = [f"with {', '.join(changed)}"] if changed else []
    if absent:
        parts.append(f"before there were {', '.join(absent)}")
    return f"**Measured with an earlier default**: {', and '.join(parts)}." if parts else ""


def speed_table(lengths: Sequence[int] | None = None) -> str:
    """Time of prompts on a CPU, with density and accuracy of the same setting; a sentence while it is unmeasured."""
    data = read(SPEED)
    if data is None:
        return f"Speed on a CPU: not measured in this checkout yet (`benchmarks/results/{SPEED}`)."
    _, rows = quality()
    dense, sparse = rows[0]["essay"]["accuracy"], run_of(rows, **BASE)["essay"]["accuracy"]
    accuracy = config_note(data["config"], ("step_memory",))
    accuracy = (
        f"{accuracy} No accuracy of today's default belongs to these times."
        if accuracy
        else f"Prose needles at 4,000 tokens with this setting: {sparse:.2f}, dense {dense:.2f} (`{QUALITY}`)."
    )
    body = [
        [
            f"{row['tokens']:,}",
            f"{row['dense_seconds']:.2f} s",
            f"{row['sparse_seconds']:.2f} s",
            f"{row['sparse_speedup']:.2f}×",
            f"{row['automatic_speedup']:.2f}×",
            f"{row['sparse_attention_speedup']:.2f}×",
            percent(row["block_density"]),
        ]
        for row in data["results"]
        if lengths is None or row["tokens"] in lengths
    ]
    times = ("dense", "sparse", "dense / sparse", "dense / automatic", "attention of sparse layers, dense / sparse")
    text = (
        f"Time on a CPU: {data['what']}. {data['device']}, torch {data['torch']}. Every call sparse, and "
        f'"automatic" (`dense_below=None`, dense below {data["crossover_tokens"]:,} tokens); medians. {accuracy} '
        f"Source: `benchmarks/results/{SPEED}`."
    )
    return wrapped(text) + "\n\n" + table(("prompt tokens", *times, "blocks read"), body, left=0)


def speed() -> str:
    """Region: every measured length."""
    return speed_table()


def quality_rows(rows: Iterable[Row], *extra: str) -> list[list[str]]:
    """Lines of a quality table; `extra` names fields of a run that come after its name."""
    return [
        [
            rule_name(row["config"]),
            *(str(row[name]) for name in extra),
            f"{row['block_density']:.3f}",
            *(f"{row[task]['accuracy']:.2f} / {row[task]['nll']:.2f}" for task in TASKS),
            f"{row['prose_nll']:.4f}",
        ]
        for row in rows
    ]


def quality_today() -> str:
    """Region: today's rule."""
    return table(("attention", "block density", *TASKS, "prose NLL"), quality_rows(quality()[1]))


def quality_earlier() -> str:
    """Region: the rules that came before, and the published ones, by precision."""
    data, by_precision = compared(EARLIER)
    parts = [wrapped(f"{data['what'][0].upper()}{data['what'][1:]}. {setting(data, EARLIER)}")]
    for precision in ("float32", "bfloat16"):
        head = (f"attention; {frequencies(precision)}", "block density", *TASKS, "prose NLL")
        parts.append(table(head, quality_rows(by_precision[precision])))
    return "\n\n".join(parts)


def quality_earlier_triton() -> str:
    """Region: the earlier rule through Triton kernels, with more prompts."""
    data, by_precision = compared(EARLIER_TRITON)
    head = ("prompts per task", "block density", *TASKS, "prose NLL")
    parts = [wrapped(setting(data, EARLIER_TRITON))]
    for precision in ("float32", "bfloat16"):
        rows = quality_rows(by_precision[precision], "samples")
        parts.append(table((f"attention; {frequencies(precision)}", *head), rows))
    return "\n\n".join(parts)


def gpu_cute() -> str:
    """Region: attention alone on a GPU, Triton and flash-attn-4, beside dense."""
    data = required(GPU_CUTE)
    dense = {row["tokens"]: row for row in data["dense"]}
    body = []
    for row in data["sparse"]:
        plan = flash_cute.plan_for(row["block_size"], HEAD_DIM, GROUP, CAPABILITY)
        assert plan.tile is not None
        route = f"{plan.route} {plan.tile[0]}x{plan.tile[1]}{' packed' if plan.pack_gqa else ''}"
        if row["kernel"] not in ("triton", route):
            continue
        beside = dense[row["tokens"]]
        fastest = min(beside[f"{name}_ms"] for name in ("flash", "cudnn", "flash-attn-4"))
        # What the benchmark selects: a fraction of every row's blocks, two at least.
        config = SketchWalkConfig(block_size=row["block_size"], density=row["density"], min_blocks=2)
        body.append(
            [
                f"{row['tokens']:,}",
                str(row["block_size"]),
                f"{causal_density(row['tokens'], config):.3f}",
                "`triton`" if row["kernel"] == "triton" else "`cute`",
                f"{row['ms']:.2f}",
                f"{row['tflops']:.0f}",
                f"{beside['flash_ms'] / row['ms']:.2f}×",
                f"{fastest / row['ms']:.2f}×",
            ]
        )
    text = f"Milliseconds of device time: {data['what']}. {gpu_versions(data)} Source: `benchmarks/results/{GPU_CUTE}`."
    head = ("tokens", "block", "block density", "kernel", "ms", "TFLOP/s", "over SDPA flash", "over the fastest dense")
    chunks = [
        [f"{row['queries']:,}", f"{row['tokens']:,}", str(row["block_size"]), f"`{row['kernel']}`", f"{row['ms']:.2f}",
         f"{row['host_us']:.0f}"]
        for row in data["chunks"]
    ]  # fmt: skip
    densities = ", ".join(sorted({f"{row['density']:g}" for row in data["chunks"]}))
    return "\n\n".join(
        [
            wrapped(text),
            table(head, body, left=0),
            wrapped(f"A chunk of queries after a long cache, density {densities}, and the host's time of the call:"),
            table(("queries", "keys", "block", "kernel", "ms", "host, µs"), chunks, left=0),
        ]
    )


def gpu_versions(data: dict[str, Any]) -> str:
    """Device and versions of a file."""
    return f"{data['device']}; {', '.join(f'{name} {version}' for name, version in data['versions'].items())}."


def gpu_dense() -> str:
    """Region: dense kernels by length, with the first call's cost and what the automatic path takes."""
    data = required(GPU_CUTE)
    body = []
    for row in data["dense"]:
        choices = []
        for installed in (("flash-attn-4", "cudnn"), ("cudnn",)):
            starts = FASTEST_FROM[CAPABILITY].items()
            known = [name for name, start in starts if name in installed and row["tokens"] >= start]
            choices.append(known[0] if known else "torch's own choice")
        first = f"{row['cudnn_first_ms']:.0f}"
        times = (f"{row[f'{name}_ms']:.3f}" for name in ("flash", "cudnn", "flash-attn-4"))
        body.append([f"{row['tokens']:,}", *times, first, *choices])
    text = (
        "Milliseconds of dense causal prefill of one layer, Llama-3.1-8B shape, bfloat16, and what dense calls of the "
        f"automatic path take on that GPU. {gpu_versions(data)} Source: `benchmarks/results/{GPU_CUTE}`."
    )
    head = (
        "tokens", "SDPA flash", "SDPA cuDNN", "flash-attn-4", "cuDNN, first call of a length",
        "taken with flash-attn-4", "taken without it",
    )  # fmt: skip
    return wrapped(text) + "\n\n" + table(head, body, left=0)


def bench_setting(data: dict[str, Any], name: str) -> str:
    """How a file of `sketch-walk bench attention` was made."""
    shape = data["shape"]
    return (
        f"{shape['heads']}/{shape['kv_heads']} heads x {shape['head_dim']}, sketches of {data['config']['sketch_dim']} "
        f"coordinates, {data['dtype']}; {data['device']}, {bench_versions(data, 'torch', 'triton')}; "
        f"{repeats_text(data)}, each kernel checked before it was timed. Random tensors: {bench_notes(data, name)}"
    )


def model_setting(data: dict[str, Any]) -> str:
    """The model, device and versions of a file of `sketch-walk bench model`."""
    made, config = data["model"]["random_llama"], data["config"]
    return (
        f"a Llama of random weights ({made['layers']} layers, {made['heads']}/{made['kv_heads']} heads x "
        f"{made['head_dim']}, hidden {made['hidden']:,}, MLP {made['mlp']:,}, vocabulary {made['vocab']:,}), "
        f"{data['dtype']}, the first {config['skip_first_n_layers']} layers dense, sketches of {config['sketch_dim']} "
        f"coordinates; {data['device']}, {bench_versions(data, 'torch', 'triton', 'transformers')}"
    )


def bench_versions(data: dict[str, Any], *packages: str) -> str:
    """Versions of `packages`, and of flash-attn-4 where it was a baseline."""
    timed = (kernel for kernel in ("flash-attn-4",) if kernel in data["options"]["baselines"])
    return ", ".join(f"{package} {data['versions'][package]}" for package in (*packages, *timed))


def repeats_text(data: dict[str, Any]) -> str:
    """What a time of a bench file is."""
    repeats = data["options"]["repeats"]
    return "a single run of each" if repeats == 1 else f"medians of {repeats}"


def bench_notes(data: dict[str, Any], name: str) -> str:
    """What the rows of a bench file do not say: quality, another default, and the file."""
    # Fields that a row of such a file sets, and the sketch of the full head dimension.
    apart = ["block_size", "density", "min_blocks", "sketch_dim"]
    if name not in DECODED:
        # A prompt has no steps that remember.
        apart.append("step_memory")
    note = config_note(data["config"], apart)
    timed = [(row["block_size"], row["density"]) for row in data["results"] if row["kind"] in ("layer", "model")]
    parts = ("no accuracy belongs to these rows.", quality_note(timed), note, f"Source: `benchmarks/results/{name}`.")
    return " ".join(filter(None, parts))


def quality_note(timed: Iterable[tuple[int, float]]) -> str:
    """Which of some settings, each a block size and a density, have their quality in `QUALITY`, and which have not."""
    fields_read = {"block_size", "density", "min_blocks"}
    data, rows = quality()
    block = SketchWalkConfig().block_size
    read = {
        (row["config"].get("block_size", block), row["config"]["density"]): row["block_density"]
        for row in rows
        if row["config"].keys() <= fields_read
    }
    named: dict[bool, list[str]] = {}
    for setting in dict.fromkeys(timed):
        # A line must not end between the figure and its sign.
        share = f" ({percent(read[setting])})".replace(" %", "\u00a0%") if setting in read else ""
        named.setdefault(setting in read, []).append("block {} at density {:g}".format(*setting) + share)
    if not named:
        return ""
    known, unknown = (", ".join(named.get(there, [])) for there in (True, False))
    if not known:
        return f"`{QUALITY}` does not have the quality of {unknown}."
    return (
        f"`{QUALITY}` has, with the blocks in brackets that its prompts of {data['tokens']:,} tokens read, the quality "
        f"of {known}{', not of ' if unknown else ''}{unknown}."
    )


def beside_dense(data: dict[str, Any], kind: str) -> Iterable[tuple[dict[str, Row], Row]]:
    """Every row of `kind` in a bench file, after the dense rows of its size by kernel."""

    def size(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("phase", "batch", "tokens", "graph"))

    for row in data["results"]:
        if row["kind"] == kind:
            same = (other for other in data["results"] if other["kind"] == "dense" and size(other) == size(row))
            yield {other["method"]: other for other in same}, row


def layer_rows(data: dict[str, Any]) -> Iterable[tuple[dict[str, Row], Row, Row]]:
    """Of every case of a bench file: the dense rows by kernel, attention alone, and the layer with its selector."""
    by_case: dict[tuple[Any, ...], dict[str, Row]] = {}
    dense: dict[tuple[int, int], dict[str, Row]] = {}
    for row in data["results"]:
        size = (row["batch"], row["tokens"])
        if row["kind"] == "dense":
            dense.setdefault(size, {})[row["method"]] = row
        else:
            by_case.setdefault((*size, row["block_size"], row["density"]), {})[row["kind"]] = row
    for case, kinds in by_case.items():
        yield dense[case[:2]], kinds["attention"], kinds["layer"]


def layer_table(data: dict[str, Any], what: str, digits: int) -> str:
    """Dense attention, sparse attention alone and with its selector; `what` names the latter."""
    baselines, steps = data["options"]["baselines"], data["options"]["phases"] == ["decode"]
    body = []
    for dense, attention, layer in layer_rows(data):
        share = layer["median_ms"] / attention["median_ms"] - 1.0
        body.append(
            [
                *([str(layer["batch"])] if steps else []),
                f"{layer['tokens']:,}",
                str(layer["block_size"]),
                f"{layer['block_density']:.3f}",
                *(f"{dense[name]['median_ms']:.{digits}f}" for name in baselines),
                f"{attention['median_ms']:.{digits}f}",
                f"{layer['median_ms']:.{digits}f}",
                f"{share:.0%}".replace("%", " %"),
                f"{layer['over_flash']:.2f}×",
                *([f"{layer['over_fastest_dense']:.2f}×"] if len(baselines) > 1 else []),
            ]
        )
    head = (
        *(["batch"] if steps else []), "tokens", "block", "block density", *(DENSE_NAMES[name] for name in baselines),
        "attention alone", what, "selector, of the attention", f"{what}, over SDPA flash",
        *(["over the fastest dense"] if len(baselines) > 1 else []),
    )  # fmt: skip
    return table(head, body, left=0)


def gpu_prefill() -> str:
    """Region: one layer's prompt on a GPU with its selector, beside dense kernels."""
    data = required(PREFILL)
    text = f"Milliseconds of device time of one layer's prompt, {bench_setting(data, PREFILL)}"
    return wrapped(text) + "\n\n" + layer_table(data, "layer", 2)


def gpu_prefill_triton() -> str:
    """Region: the same through the Triton kernels alone."""
    data = required(TRITON)
    text = f"Milliseconds of device time of one layer's prompt, Triton kernels only, {bench_setting(data, TRITON)}"
    return wrapped(text) + "\n\n" + layer_table(data, "layer", 1)


def gpu_decode() -> str:
    """Region: a decode step of one layer on a GPU, in a CUDA graph."""
    data = required(STEP)
    assert all(row["graph"] for row in data["results"])
    text = f"Milliseconds of one layer's decode step in a CUDA graph, {bench_setting(data, STEP)}"
    return wrapped(text) + "\n\n" + layer_table(data, "step", 3)


def gpu_readme() -> str:
    """One layer's prompt on a GPU in few columns."""
    data = required(PREFILL)
    body = [
        [
            f"{layer['tokens']:,}",
            str(layer["block_size"]),
            percent(layer["block_density"]),
            f"{dense['sdpa-flash']['median_ms']:.1f}",
            f"{dense[layer['fastest_dense']]['median_ms']:.1f}",
            f"{layer['median_ms']:.1f}",
            f"{layer['over_flash']:.1f}×",
            f"{layer['over_fastest_dense']:.1f}×",
        ]
        for dense, _, layer in layer_rows(data)
    ]
    text = f"Time on a GPU: milliseconds of one layer's prompt with its selector, {bench_setting(data, PREFILL)}"
    times = ("SDPA flash", "fastest dense kernel", "sparse layer", "over SDPA flash", "over the fastest")
    return wrapped(text) + "\n\n" + table(("tokens", "block", "blocks read", *times), body, left=0)


def gpu_short() -> str:
    """Region: what the automatic path takes for prompts below the crossover, in a CUDA graph and called by the host."""
    graphs, eager = required(SHORT_GRAPH), required(SHORT)
    names = [DENSE_NAMES[name] for name in graphs["options"]["baselines"]]
    inside, outside = [], []
    for dense, row in beside_dense(graphs, "automatic"):
        times = (f"{dense[name]['median_ms']:.3f}" for name in graphs["options"]["baselines"])
        ratio = f"{row['over_fastest_dense']:.2f}×"
        inside.append([f"{row['tokens']:,}", *times, quartiles(row), row["impl"], ratio])
    for dense, row in beside_dense(eager, "automatic"):
        every = (*(dense[name] for name in eager["options"]["baselines"]), row)
        times = (f"{x['median_ms']:.3f} / {x['host_ms']:.3f}" for x in every)
        outside.append([f"{row['tokens']:,}", *times, f"{row['over_fastest_dense']:.2f}×"])
    text = (
        "Milliseconds of one layer's prompt in a CUDA graph, automatic path (`dense_below=None`), "
        f"{bench_setting(graphs, SHORT_GRAPH)}"
    )
    called = f"The same called by the host, device / host. Source: `benchmarks/results/{SHORT}`."
    last = "fastest dense / automatic"
    return "\n\n".join(
        [
            wrapped(text),
            table(("tokens", *names, "automatic (quartiles)", "what ran", last), inside, left=0),
            wrapped(called),
            table(("tokens", *names, "automatic", f"{last}, device"), outside, left=0),
        ]
    )


def quartiles(row: Row, digits: int = 3) -> str:
    """A median with its quartiles."""
    return f"{row['median_ms']:.{digits}f} ({row['low_ms']:.{digits}f} to {row['high_ms']:.{digits}f})"


def gpu_cross() -> str:
    """Region: prompts of one layer around the length from which sparse attention is faster, and a picture."""
    data = required(CROSS)
    baselines = data["options"]["baselines"]
    body = [
        [
            f"{row['tokens']:,}",
            str(row["block_size"]),
            f"{row['block_density']:.3f}",
            *(f"{dense[name]['median_ms']:.3f}" for name in baselines),
            quartiles(row),
            f"`{row['impl']}`",
            f"{row['over_fastest_dense']:.2f}×",
        ]
        for dense, row in beside_dense(data, "layer")
    ]
    text = f"Milliseconds of device time of one layer's prompt, {bench_setting(data, CROSS)}"
    names = (DENSE_NAMES[name] for name in baselines)
    head = ("tokens", "block", "block density", *names, "layer (quartiles)", "attention by", "over the fastest dense")
    automatic = f"The automatic path is sparse from {kernels.PREFILL_CROSSOVER['cuda']:,} tokens on."
    caption = (
        f"The same figures, and beyond them those of `benchmarks/results/{PREFILL}`, which is another run; each is "
        "divided by the fastest dense kernel of its own run:"
    )
    picture = f"![{SPEED_UP_TITLE}]({SPEED_UP_PICTURE.relative_to(PROJECT / 'docs').as_posix()})"
    return "\n\n".join([wrapped(text), table(head, body, left=0), automatic, wrapped(caption), picture])


def speed_up_curves() -> dict[str, Curve]:
    """How many times faster than the fastest dense kernel a layer's prompt is, by setting, over the length."""
    points: dict[str, list[tuple[int, float]]] = {}
    for name in (CROSS, PREFILL):
        for _, row in beside_dense(required(name), "layer"):
            label = f"block {row['block_size']}, density {row['density']}"
            points.setdefault(label, []).append((row["tokens"], row["over_fastest_dense"]))
    return {label: Curve(*zip(*sorted(pairs), strict=True)) for label, pairs in points.items()}


def speed_up_is_drawn() -> bool:
    """Whether the picture of `gpu_cross` is there and shows the curves of today's results."""
    return _holds(SPEED_UP_PICTURE, speed_up_curves())


def _holds(path: Path, curves: Any) -> bool:
    """Whether a picture is there and has these curves inside."""
    from PIL import Image

    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return bool(picture.info.get("curves") == json.dumps(curves))


def _put_inside(path: Path, curves: Any) -> None:
    """Write the curves of a picture into it, as text."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    inside = PngInfo()
    inside.add_text("curves", json.dumps(curves))
    with Image.open(path) as picture:
        picture.save(path, pnginfo=inside, dpi=picture.info["dpi"])


def draw_speed_up() -> None:
    """Draw the picture of `gpu_cross`, with its curves as text inside the file."""
    curves = speed_up_curves()
    plot_speed_up_against_length(
        SPEED_UP_PICTURE,
        curves,
        over="the fastest dense kernel",
        title=f"{SPEED_UP_TITLE}, {required(PREFILL)['device']}",
    )
    _put_inside(SPEED_UP_PICTURE, curves)


def gpu_eager() -> str:
    """Region: a decode step of one layer out of a CUDA graph, and the same inside one where that was timed."""
    data, graphs = required(EAGER), required(STEP)
    assert not any(row["graph"] for row in data["results"])
    names = ("batch", "tokens", "block_size", "density")
    inside = {tuple(row[name] for name in names): row for _, row in beside_dense(graphs, "layer")}
    baselines = data["options"]["baselines"]
    body = []
    for dense, row in beside_dense(data, "layer"):
        graph = inside.get(tuple(row[name] for name in names))
        body.append(
            [
                str(row["batch"]),
                f"{row['tokens']:,}",
                str(row["block_size"]),
                f"{row['block_density']:.3f}",
                *(quartiles(dense[name]) for name in baselines),
                quartiles(row),
                f"{row['over_fastest_dense']:.2f}×",
                "" if graph is None else f"{graph['median_ms']:.3f}",
            ]
        )
    text = (
        f"Milliseconds of one layer's decode step out of a CUDA graph, quartiles in brackets, "
        f"{bench_setting(data, EAGER)} The last column is from `benchmarks/results/{STEP}`, another run."
    )
    head = (
        "batch", "tokens", "block", "block density", *(DENSE_NAMES[name] for name in baselines), "step",
        "dense / step", "the step in a CUDA graph",
    )  # fmt: skip
    automatic = f"The automatic path is dense below {kernels.DECODE_CROSSOVER['cuda']:,} cached tokens."
    return "\n\n".join([wrapped(text), table(head, body, left=0), automatic])


def model_table(data: dict[str, Any], unit: float, digits: int) -> str:
    """Dense and sparse times of a whole model, in units of `unit` milliseconds."""
    baselines = data["options"]["baselines"]
    body = [
        [
            str(row["batch"]),
            f"{row['tokens']:,}",
            str(row["block_size"]),
            f"{row['block_density']:.3f}",
            *(f"{dense[name]['median_ms'] / unit:.{digits}f}" for name in baselines),
            f"{row['median_ms'] / unit:.{digits}f}",
            row["impl"].replace("+", ", "),
            f"{row['over_flash']:.2f}×",
            f"{row['over_fastest_dense']:.2f}×",
        ]
        for dense, row in beside_dense(data, "model")
    ]
    names = (DENSE_NAMES[name] for name in baselines)
    head = (
        "batch", "tokens", "block", "block density of sparse layers", *names, "sparse", "what ran",
        "over SDPA flash", "over the fastest dense",
    )  # fmt: skip
    return table(head, body, left=0)


def gpu_ttft() -> str:
    """Region: time to the first token of a whole model."""
    data = required(TTFT)
    text = (
        f"Seconds from a prompt to its first token: {model_setting(data)}; {repeats_text(data)}, each method checked "
        f"before it was timed. Random weights: {bench_notes(data, TTFT)}"
    )
    return wrapped(text) + "\n\n" + model_table(data, 1e3, 2)


def gpu_step() -> str:
    """Region: a decode step of a whole model, in a CUDA graph."""
    data = required(MODEL_STEP)
    assert all(row["graph"] for row in data["results"])
    text = (
        f"Milliseconds of a decode step in a CUDA graph, after a static cache filled at random: {model_setting(data)}; "
        f"{repeats_text(data)}, each method checked before it was timed. Random weights: "
        f"{bench_notes(data, MODEL_STEP)}"
    )
    return wrapped(text) + "\n\n" + model_table(data, 1.0, 2)


def model_readme() -> str:
    """A whole model on a GPU in few columns."""
    body: list[list[str]] = []
    timed: list[tuple[int, float]] = []
    for name, call in ((TTFT, "first token of a prompt"), (MODEL_STEP, "decode step in a CUDA graph")):
        data = required(name)
        for dense, row in beside_dense(data, "model"):
            timed.append((row["block_size"], row["density"]))
            body.append(
                [
                    call,
                    f"{row['tokens']:,}" if row["batch"] == 1 else f"{row['tokens']:,} × {row['batch']}",
                    str(row["block_size"]),
                    percent(row["block_density"]),
                    f"{dense['sdpa-flash']['median_ms']:,.1f}",
                    f"{dense[row['fastest_dense']]['median_ms']:,.1f}",
                    f"{row['median_ms']:,.1f}",
                    f"{row['over_flash']:.2f}×",
                    f"{row['over_fastest_dense']:.2f}×",
                ]
            )
    first, steps = (repeats_text(required(name)) for name in (TTFT, MODEL_STEP))
    text = (
        f"A whole model on a GPU, milliseconds: {model_setting(required(TTFT))}; each method checked before it was "
        f"timed. First tokens: {first}; steps: {steps}. Blocks read are those of the sparse layers. Random weights: no "
        f"accuracy belongs to these rows. {quality_note(timed)} "
        f"Sources: `benchmarks/results/{TTFT}`, `benchmarks/results/{MODEL_STEP}`."
    )
    times = ("SDPA flash", "fastest dense kernel", "sparse", "over SDPA flash", "over the fastest")
    return wrapped(text) + "\n\n" + table(("call", "tokens", "block", "blocks read", *times), body)


def gpu_million() -> str:
    """Region: a very long prompt in chunks, and what a token costs along it."""
    data = required(MILLION)
    runs = data["results"]
    chunk = runs[0]["chunk"]
    # Chunks that end at powers of two, and the last whole one.
    whole = [part["stop"] for part in runs[0]["chunks"] if part["tokens"] == chunk]
    ends = [stop for stop in whole if (stop // chunk).bit_count() == 1 or stop == whole[-1]]
    totals, costs = [], []
    for run in runs:
        assert run["chunk"] == chunk
        label = [str(run["block_size"]), f"`{run['walk']}`"]
        last = run["chunks"][-1]
        totals.append(
            [
                *label,
                f"{last['block_density']:.3f}",
                f"{run['total_ms']:,.0f}",
                percent(run["selector_share"]),
                f"{run['cost_growth']:.2f}×",
                f"{run['position_growth']:.2f}×",
                *(percent(run["state_share"][part]) for part in ("keys", "rows")),
                f"{run['peak_gb']:.1f} GB",
            ]
        )
        cost = {part["stop"]: part["us_per_token"] for part in run["chunks"]}
        costs.append([*label, *(f"{cost[stop]:.3f}" for stop in ends)])
    (tokens,) = {run["tokens"] for run in runs}
    densities = ", ".join(dict.fromkeys(f"{run['density']:g}" for run in runs))
    note = quality_note((run["block_size"], run["density"]) for run in runs)
    text = (
        f"{data['what'][0].upper()}{data['what'][1:]}; {tokens:,} tokens in chunks of {chunk:,}, density {densities}; "
        f"{data['device']}, torch {data['torch']}, triton {data['triton']}. Milliseconds of device time; no accuracy "
        f"belongs to these rows. {note} Source: `benchmarks/results/{MILLION}`."
    )
    head = (
        "block", "walk", "block density at the end", "whole prompt", "of it sketches and scores",
        "a token's cost grows", "its position grows", "key sketches, of the KV cache", "transition rows, of it",
        "peak of memory",
    )  # fmt: skip
    between = "Microseconds a token, by the position at which its chunk ends:"
    parts = [wrapped(text), table(head, totals, left=0), between]
    parts += [table(("block", "walk", *(f"{stop:,}" for stop in ends)), costs, left=0), *_walk_cost(runs)]
    return "\n\n".join(parts)


def _walk_cost(runs: Sequence[Row]) -> Iterable[str]:
    """A sentence for every run with a walk: what it took above the same run without one."""
    for run in runs:
        settings = ("tokens", "chunk", "block_size", "density")
        plain = [other for other in runs if other["walk"] == "none" and all(other[k] == run[k] for k in settings)]
        if run["walk"] == "none" or not plain:
            continue
        yield wrapped(
            f"With blocks of {run['block_size']} the prompt took {percent(run['total_ms'] / plain[0]['total_ms'] - 1)} "
            f"longer with the {run['walk']} walk than without."
        )


def span(values: Iterable[float]) -> str:
    """The least and the greatest of some factors."""
    texts = sorted({f"{value:.2f}" for value in values}, key=float)
    return f"{texts[0]}× to {texts[-1]}×" if len(texts) > 1 else f"{texts[0]}×"


def gpu_summary() -> str:
    """Region: speed-ups over the fastest dense kernel, a line a call."""
    calls = (
        (PREFILL, "layer", "one layer's prompt"),
        (STEP, "layer", "one layer's decode step in a CUDA graph"),
        (TTFT, "model", "first token of a whole model"),
        (MODEL_STEP, "model", "decode step of a whole model in a CUDA graph"),
    )
    lines = []
    for name, kind, what in calls:
        by_batch: dict[int, list[Row]] = {}
        for _, row in beside_dense(required(name), kind):
            by_batch.setdefault(row["batch"], []).append(row)
        for batch, rows in by_batch.items():
            lengths = " and ".join(dict.fromkeys(thousands(row["tokens"]) for row in rows))
            factors = ", ".join(
                f"{span(row['over_fastest_dense'] for row in rows if row['density'] == density)} at density {density:g}"
                for density in dict.fromkeys(row["density"] for row in rows)
            )
            line = f"- {what}, {lengths} tokens, batch {batch}: {factors}"
            lines.append(textwrap.fill(line, width=120, subsequent_indent="  "))
    text = f"Speed-up over the fastest dense kernel of the same run, selector included, {required(PREFILL)['device']}:"
    return "\n\n".join([text, "\n".join(lines)])


class Aim(NamedTuple):
    """A promised speed-up: the case, its rows in a bench file, and the least factors."""

    case: str
    file: str
    rows: dict[str, Any]
    over_flash: float | None
    over_fastest_dense: float | None


LAYER, MODEL = {"kind": "layer"}, {"kind": "model"}
AIMS = (
    Aim("prompt of 64K", PREFILL, {**LAYER, "tokens": 65_536, "density": 0.2, "block_size": 128}, 8, 3.7),
    Aim("prompt of 128K", PREFILL, {**LAYER, "tokens": 131_072, "density": 0.2, "block_size": 128}, 8.5, 4),
    Aim("prompt of 128K", PREFILL, {**LAYER, "tokens": 131_072, "density": 0.2, "block_size": 64}, 7, 3.3),
    Aim("prompt of 128K", PREFILL, {**LAYER, "tokens": 131_072, "density": 0.05, "block_size": 128}, 26, 12.5),
    Aim("prompt of 128K, Triton only", TRITON, {**LAYER, "tokens": 131_072, "density": 0.2}, 5.5, None),
    Aim("step at 128K, batch 8", STEP, {**LAYER, "tokens": 131_072, "batch": 8, "density": 0.1}, None, 6),
    Aim("step at 128K, batch 8", STEP, {**LAYER, "tokens": 131_072, "batch": 8, "density": 0.05}, None, 8),
    Aim("step at 128K, batch 1", STEP, {**LAYER, "tokens": 131_072, "batch": 1, "density": 0.1}, None, 3.5),
    Aim("first token, whole model, 128K", TTFT, {**MODEL, "tokens": 131_072, "density": 0.2}, 3, 1.8),
    Aim("first token, whole model, 128K", TTFT, {**MODEL, "tokens": 131_072, "density": 0.05}, 3.5, 2.2),
    Aim("step, whole model, 128K, batch 2", MODEL_STEP, {**MODEL, "tokens": 131_072, "density": 0.1}, None, 1.7),
)
# Most of the attention that a prompt's selector may take by density, and least of the fastest dense kernel's speed that
# a short prompt may have; most of the KV cache that the state may take at 128K, and that a decode step may read of it.
SELECTOR_SHARE = {0.2: 0.10, 0.05: 0.25}
SHORT_SPEED, STATE_SHARE, STEP_SHARE = 0.97, 0.08, 0.02


# By density: least accuracies of the three tasks and most prose NLL, at the length of `QUALITY`.
QUALITY_AIMS = {0.2: ((1.0, 0.90, 0.32), 3.255), 0.1: ((1.0, 0.88, 0.26), 3.32)}
# Points that sparse steps may lose against dense steps after the same prompts.
STEP_AIM = 2


def judged(text: str, met: bool) -> str:
    """In bold what misses its aim."""
    return text if met else f"**{text}**"


def quality_aims() -> str:
    """Region: what was asked of quality and what was measured; what is missed in bold."""
    data, rows = quality()
    body = []
    for density, (least, most) in QUALITY_AIMS.items():
        row = run_of(rows, **{**BASE, "density": density})
        cells = []
        for task, aim in zip(TASKS, least, strict=True):
            accuracy = row[task]["accuracy"]
            cells += [f"{aim:.2f}", judged(f"{accuracy:.3f}", accuracy >= aim)]
        cells += [f"at most {most:g}", judged(f"{row['prose_nll']:.4f}", row["prose_nll"] <= most)]
        body.append([f"{density:g}", *cells])
    asked = (column for task in (*TASKS, "prose NLL") for column in (f"{task}, asked for", "measured"))
    text = f"Prompts of {data['tokens']:,} tokens, default rule, at least {BASE['min_blocks']} blocks a row:"
    return text + "\n\n" + table(("density", *asked), body, left=0)


def step_aims() -> str:
    """Region: answers of sparse steps beside dense steps after the same sparse prompts; what is missed in bold."""
    data = required(ANSWERS)
    body = []
    for setting in ("0.2, tail of 4", "0.2"):
        row = data["summary"][f"{setting}: sparse steps"]
        cells = []
        for task in data["rows"]["dense"]["hits"]:
            apart = row[f"{task}_hits_against_dense_steps"]
            points = f"{100 * apart['mean']:+.1f} ({100 * apart['low']:+.1f} to {100 * apart['high']:+.1f})"
            cells.append(judged(points, 100 * apart["mean"] >= -STEP_AIM))
        body.append([setting, f"at least -{STEP_AIM:g}", *cells])
    text = (
        "Needle answers of sparse steps, in points against dense steps after the same sparse prompts, with 95 % "
        f"intervals of the paired difference (`{ANSWERS}`):"
    )
    return wrapped(text) + "\n\n" + table(("density", "asked for", *data["rows"]["dense"]["hits"]), body)


def gpu_aims() -> str:
    """Region: what was asked for and what was measured; what is missed in bold."""
    speeds = []
    for aim in AIMS:
        rows = [row for row in required(aim.file)["results"] if aim.rows.items() <= row.items()]
        assert rows, f"{aim.file} has no row for {aim}"
        for row in rows:
            cells = []
            for field in ("over_flash", "over_fastest_dense"):
                least = getattr(aim, field)
                cells += [f"{least:g}×", judged(f"{row[field]:.2f}×", row[field] >= least)] if least else ["", ""]
            speeds.append([aim.case, str(row["block_size"]), f"{row['density']:g}", *cells])
    others = [
        *_selector_aims(),
        *(
            (
                f"automatic path in a CUDA graph, prompt of {row['tokens']:,}, of the fastest dense kernel's speed",
                f"at least {SHORT_SPEED:g}",
                judged(f"{row['over_fastest_dense']:.2f}", row["over_fastest_dense"] >= SHORT_SPEED),
            )
            for _, row in beside_dense(required(SHORT_GRAPH), "automatic")
        ),
        *(
            (
                f"{run['tokens']:,} tokens, block {run['block_size']}, walk `{run['walk']}`: growth of a token's cost",
                f"at most {run['position_growth']:.2f}×, as its position",
                judged(f"{run['cost_growth']:.2f}×", run["cost_growth"] <= run["position_growth"]),
            )
            for run in required(MILLION)["results"]
        ),
        *_state_aims(),
    ]
    measured = ("over SDPA flash, asked for", "measured", "over the fastest dense, asked for", "measured")
    return "\n\n".join(
        [
            table(("case", "block", "density", *measured), speeds),
            table(("aim", "asked for", "measured"), others),
        ]
    )


def _selector_aims() -> Iterable[tuple[str, str, str]]:
    for _, attention, layer in layer_rows(required(PREFILL)):
        if layer["density"] not in SELECTOR_SHARE:
            continue
        share, most = layer["median_ms"] / attention["median_ms"] - 1, SELECTOR_SHARE[layer["density"]]
        case = f"prompt of {thousands(layer['tokens'])}, block {layer['block_size']}, density {layer['density']:g}"
        yield (
            f"{case}: selector, of the attention",
            f"at most {most:.0%}".replace("%", " %"),
            judged(percent(share), share <= most),
        )


def _state_aims() -> Iterable[tuple[str, str, str]]:
    config, tokens = SketchWalkConfig(sketch_dim=HEAD_DIM), 131_072
    memory = count_memory(tokens, config, ModelShape())
    read_share = step_bytes(tokens, config, ModelShape()) / memory.kv_cache
    for what, most, share in (
        ("kept beside the KV cache", STATE_SHARE, memory.state_share),
        ("read of it by a decode step", STEP_SHARE, read_share),
    ):
        asked = f"at most {most:.0%} of the KV cache".replace("%", " %")
        yield f"state at 128K, sketches of {HEAD_DIM} coordinates, {what}", asked, judged(percent(share), share <= most)


def gpu_selector() -> str:
    """Region: stages of the selector as the kernels run by themselves, then other ways to launch them."""
    data = required(SELECTOR)
    checked = "checked in the same run" if data["checks"] else "timed without a check in this run"
    text = (
        f"Milliseconds of device time: {data['what']}; {checked}. {data['device']}, torch {data['torch']}, triton "
        f"{data['triton']}. Source: `benchmarks/results/{SELECTOR}`."
    )
    prompts, steps = [], []
    for row in data["prefill"]:
        ms = row["ms"]
        whole = sum(ms[name] for name in ("sketch_keys", "call_scores", "select"))
        times = (f"{value:.2f}" for value in (*(ms[name] for name in PROMPT_STAGES), whole))
        prompts.append([f"{row['tokens']:,}", str(row["block_size"]), *times])
    for row in data["decode"]:
        times = (f"{row['graph_ms'][name]:.4f}" for name in STEP_STAGES)
        steps.append([str(row["batch"]), f"{row['tokens']:,}", str(row["block_size"]), *times])
    head = ("tokens", "block", *PROMPT_STAGES.values(), "keys, scores and selection")
    return "\n\n".join(
        [
            wrapped(text),
            table(head, prompts, left=0),
            "A decode step, in a CUDA graph:",
            table(("batch", "tokens", "block", *STEP_STAGES.values()), steps, left=0),
            "Other ways to launch the peaks; **bold** is what runs:",
            _variants("prompt", data["prefill"], "ms", ("64x", "128x"), 2),
            _variants("decode step", data["decode"], "graph_ms", ("peaks",), 4),
        ]
    )


def _variants(call: str, rows: Sequence[Row], times: str, starts: tuple[str, ...], digits: int) -> str:
    """Time of each launch variant, a column for each row, the default in bold; one that failed shows its error."""
    body = []
    for name in rows[0][times]:
        if name.startswith(starts):
            values = (row[times][name] for row in rows)
            label = name.removeprefix("peaks, ")
            label = f"**{label}**" if name in (PEAK_LAUNCH, STEP_LAUNCH) else label
            body.append([label, *(v if isinstance(v, str) else f"{v:.{digits}f}" for v in values)])
    batches = [f"batch {row['batch']}, " if "batch" in row else "" for row in rows]
    sizes = [f"{row['tokens']:,} tokens, block {row['block_size']}" for row in rows]
    return table((call, *map("".join, zip(batches, sizes, strict=True))), body)


def gpu_memory() -> str:
    """Region: bytes of one layer, beside the founding document's estimates; a sentence while it is unmeasured."""
    data = read(MEMORY)
    if data is None:
        return wrapped(
            f"Not measured in this checkout yet (`benchmarks/results/{MEMORY}`); "
            "[Benchmarks](bench.md#memory) has the command."
        )
    shape, versions = data["shape"], data["versions"]
    text = (
        f"Bytes of one layer and one sequence, {shape['heads']}/{shape['kv_heads']} heads x {shape['head_dim']}, "
        f"{data['dtype']}, density {', '.join(map(str, data['options']['densities']))}; {data['device']}, torch "
        f"{versions['torch']}. `{data['command']}`. Source: `benchmarks/results/{MEMORY}`."
    )
    rows = [row for row in data["results"] if "peak_bytes" in row]
    absent = _absent(data["options"], rows)
    return "\n\n".join(
        [
            wrapped(text),
            "### Estimate and truth, after a prompt",
            _founding_table(rows),
            _walk_bytes(rows),
            "### Peak of one call",
            *([wrapped(f"The run ended before it had metered: {'; '.join(absent)}.")] if absent else []),
            _peak_table(rows),
        ]
    )


def _walk_bytes(rows: Sequence[Row]) -> str:
    """What a walk would add to the lengths that were metered, by counting."""
    kept = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        memory = count_memory(tokens, SketchWalkConfig(walk="damped"), ModelShape())
        kept.append(f"{bytes_text(memory.transition_rows)} at {tokens:,}")
    return wrapped(
        f"Metered without a walk. With one, and blocks of {SketchWalkConfig().block_size}, its transition rows would "
        f"stay too, by counting: {', '.join(kept)} tokens."
    )


def _absent(options: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """What was to be metered and is not in the file."""
    met = {(row["phase"], row["tokens"], row["kind"]) for row in rows}
    return [
        f"{phase}, {tokens:,} tokens, {kind}"
        for phase in options["phases"]
        for tokens in options["tokens"]
        for kind in ("dense", *options["kinds"])
        if (phase, tokens, kind) not in met
    ]


def _founding_table(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row["kind"] != "layer" or row["phase"] != "prefill":
            continue
        state, estimate = row["state_bytes"], founding_bytes(row["tokens"])
        pairs = (
            (estimate["qkv"], row["qkv_bytes"]),
            (estimate["block_means"], 0),
            (estimate["sketches"], state["keys"]),
            (estimate["walk"], state["rows"] + row["walk_bytes"]),
        )
        together = [sum(column) for column in zip(*pairs[1:], strict=True)]
        cells = [f"{bytes_text(estimated)} / {bytes_text(real)}" for estimated, real in (*pairs, together)]
        shares = (f"{percent(part / whole)}" for part, whole in zip(together, pairs[0], strict=True))
        kept = (bytes_text(state["queries"]), f"{bytes_text(sum(state.values()))} ({percent(row['state_share'])})")
        body.append([f"{row['tokens']:,}", str(row["block_size"]), *cells, " / ".join(shares), *kept])
    head = (
        "Q, K and V", "block means", "sketches", "walk, block scores", "the last three", "of Q, K and V",
        "recent queries", "stays (of the KV cache)",
    )  # fmt: skip
    return table(("tokens", "block", *head), body, left=0)


def _peak_table(rows: Sequence[Row]) -> str:
    def case(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("phase", "tokens", "method", "block_size", "density"))

    attention = {case(row): row["peak_bytes"] for row in rows if row["kind"] == "attention"}
    body = []
    for row in rows:
        own = row.get("impl", row["method"]) == row["method"]
        alone = attention.get(case(row)) if row["kind"] == "layer" else None
        body.append(
            [
                row["phase"],
                row["method"] if own else f"{row['method']} ({row['impl']})",
                row["kind"],
                f"{row['tokens']:,}",
                str(row.get("block_size", "")),
                *(f"{row[name] / 1e6:,.2f}" for name in ("peak_bytes", "output_bytes")),
                f"{sum(row['state_bytes'].values()) / 1e6:,.2f}" if "state_bytes" in row else "",
                "" if alone is None else percent(1 - alone / row["peak_bytes"]),
            ]
        )
    right = ("tokens", "block", "peak above the inputs, MB", "output, MB", "state, MB", "selector, of the peak")
    return table(("phase", "method", "what", *right), body, left=3)


def cpu_decode() -> str:
    """Region: a decode step of one layer on a CPU."""
    data = required(DECODE)
    body = [
        [
            f"{row['tokens']:,}",
            f"{row['dense_ms']:.2f}",
            f"{row['sparse_ms']:.2f}",
            f"{row['speedup']:.2f}×",
            f"{row['block_density']:.3f}",
        ]
        for row in data["results"]
    ]
    text = (
        f"Milliseconds: {data['what']}; {data['device']}, torch {data['torch']}, medians. "
        f"{config_note(data['config'])} Source: `benchmarks/results/{DECODE}`.".strip()
    )
    head = ("cached tokens", "dense", "sparse", "dense / sparse", "block density")
    return wrapped(text) + "\n\n" + table(head, body, left=0)


def generation() -> str:
    """Region: needle questions answered by generation."""
    data = read(GENERATION)
    if data is None:
        return wrapped(f"Not measured in this checkout yet (`benchmarks/results/{GENERATION}`).")
    tasks = tuple(data["results"][0]["right"])
    body = [
        [
            "dense" if row["mode"] == "dense" else rule_name(row["config"]),
            {"both": "prompt and steps", "prefill": "prompt", "decode": "steps"}.get(row["mode"], ""),
            f"{row['block_density']:.3f}",
            *(f"{row['right'][task]} of {row['of']}" for task in tasks),
            str(sum(row["right"].values())),
        ]
        for row in data["results"]
    ]
    text = (
        f"Right answers: {data['what']}, prompts of {data['tokens']:,} tokens, seeds {data['seeds']}; {data['model']}, "
        f"{data['device']}. {config_note(data['config'])} "
    ).strip() + f" Source: `benchmarks/results/{GENERATION}`."
    return wrapped(text) + "\n\n" + table(("attention", "sparse", "block density", *tasks, "all"), body, left=2)


def answers() -> str:
    """Region: answers given token by token, with and without a memory of steps."""
    data = read(ANSWERS)
    if data is None:
        return wrapped(f"Not measured in this checkout yet (`benchmarks/results/{ANSWERS}`).")
    rows, means = data["rows"], data["summary"]
    tasks = tuple(rows["dense"]["hits"])
    body = []
    for name, row in rows.items():
        cells = []
        for task in tasks:
            apart = means[name][f"{task}_hits_against_dense_steps"]
            gap = "" if name == "dense" or name.endswith("dense steps") else f" ({100 * apart['mean']:+.1f})"
            cells += [f"{means[name][f'{task}_hits']['mean']:.3f}{gap}", f"{means[name][f'{task}_nll']['mean']:.3f}"]
        body.append(
            [
                name,
                *(
                    percent(row[part]) if row[part] is not None else "100 %"
                    for part in ("prefill_density", "decode_density")
                ),
                *cells,
                f"{means[name]['continuation_nll']['mean']:.3f}",
            ]
        )
    samples = len(rows["dense"]["hits"][tasks[0]])
    errors = [100 * means["dense"][f"{task}_hits"]["standard_error"] for task in tasks]
    text = (
        f"{data['what'][0].upper()}{data['what'][1:]}: {data['model']}, {data['device']}, torch {data['torch']}, "
        f"transformers {data['transformers']}; {samples} prompts per task of "
        f"{', '.join(f'{n:,}' for n in data['tokens'])} tokens (standard error of a dense accuracy "
        f"{', '.join(f'{error:.1f}' for error in errors)} points), "
        f"{len(rows['dense']['continuation_nll'])} continuations of {data['new_tokens']} tokens. Accuracy, in brackets "
        "points against dense steps after the same prompts, and the NLL; last the NLL of dense's own continuation. "
        f"{config_note(data['config'])} "
    ).strip() + f" Source: `benchmarks/results/{ANSWERS}`."
    head = ("prompt: steps", "read by a prompt", "by a step", *(x for task in tasks for x in (task, "NLL")), "prose")
    return wrapped(text) + "\n\n" + table(head, body)


def quality_setting() -> str:
    """Region: how the quality file of today's rule was made."""
    data, (dense, *_) = quality()
    errors = ", ".join(
        f"{task} {100 * standard_error(dense[task]['accuracy'], data['samples']):.1f}"
        for task in TASKS
        if 0 < dense[task]["accuracy"] < 1
    )
    return wrapped(
        f"{setting(data, QUALITY)} RoPE frequencies: {dense['rope_frequencies']}. Versions: torch {data['torch']}, "
        f"triton {data['triton']}, transformers {data['transformers']}. Prose NLL: {data['prose_passages']} passages. "
        f"One standard error of the dense accuracies, in points: {errors}."
    )


def walk_finding() -> str:
    """Region: the damped walk beside one hop without a walk and dense, from every run that has the three."""
    body = []
    for name in (EARLIER, EARLIER_TRITON):
        data, by_precision = compared(name)
        for precision, rows in sorted(by_precision.items(), reverse=True):
            three = [
                next((row for row in rows if row["config"] == config), None)
                for config in (EARLIER_BASE, {**EARLIER_BASE, "walk": "none"}, {"rule": "dense"})
            ]
            walked, hop, dense = three
            if walked is None or hop is None or dense is None:
                continue
            accuracies = (
                " / ".join(f"{row[task]['accuracy']:.2f}" for row in (walked, hop, dense)) for task in TASKS[1:]
            )
            price = walked["prose_nll"] - hop["prose_nll"]
            prompts = str(walked.get("samples", data.get("samples")))
            body.append([f"{frequencies(precision)}; {data['impl']}", prompts, *accuracies, f"{price:+.4f}"])
    head = ("run", "prompts", *(f"{task}: walk / none / dense" for task in TASKS[1:]), "prose NLL, walk minus none")
    return table(head, body)


def knob_table(data: dict[str, Any], rows: Sequence[Row], base_config: dict[str, Any]) -> str:
    """One field changed at a time, beside dense and the base."""
    base = run_of(rows, **base_config)

    def line(name: str, row: Row) -> list[str]:
        scores = []
        for task in TASKS:
            accuracy = row[task]["accuracy"]
            prompts = round((accuracy - base[task]["accuracy"]) * data["samples"])
            scores.append(f"{accuracy:.2f} ({prompts:+d})")
        return [name, f"{row['block_density']:.3f}", *scores, f"{row['prose_nll']:.4f}"]

    body = [line("dense", run_of(rows, rule="dense")), line(rule_name(base["config"]), base)]
    for row in rows:
        changed = {k: v for k, v in row["config"].items() if base_config.get(k, ...) != v}
        if "rule" not in changed and changed:
            body.append(line(", ".join(f"`{k}={v!r}`" for k, v in changed.items()), row))
    head = ("changed field", "block density", *(f"{task}, accuracy (prompts)" for task in TASKS), "prose NLL")
    return table(head, body)


def knobs() -> str:
    """Region: fields of today's rule; plain means come from a file of their own."""
    data, rows = quality()
    means = run_of(_plain_runs(rows[0]), **BASE, **PLAIN_MEANS)
    text = f"{data['samples']} prompts per task. Sources: `benchmarks/results/{QUALITY}`, `benchmarks/results/{PLAIN}`."
    return wrapped(text) + "\n\n" + knob_table(data, [*rows, means], BASE)


def _plain_runs(dense: Row) -> list[Row]:
    """Runs of `PLAIN` that share prompts and precision with today's, whose dense run is `dense`."""
    data, by_precision = compared(PLAIN)
    rows = by_precision[precision_of(dense)]
    assert data["seeds"] == required(QUALITY)["seeds"]
    assert run_of(rows, rule="dense") == dense, f"{PLAIN} asked other prompts"
    return rows


def pooling() -> str:
    """Region: plain means of sub-blocks against the default's pooling, the same prompts."""
    data, rows = quality()
    dense, *_ = rows
    body = [["dense", "1.000", *(f"{dense[task]['accuracy']:.2f}" for task in TASKS), f"{dense['prose_nll']:.4f}"]]
    for means in _plain_runs(dense):
        config = {name: value for name, value in means["config"].items() if name not in PLAIN_MEANS}
        if "rule" in config:
            continue
        salient = run_of(rows, **config)
        cells = []
        for task in TASKS:
            before, after = means[task]["accuracy"], salient[task]["accuracy"]
            cells.append(f"{before:.2f} / {after:.2f} ({round((after - before) * data['samples']):+d})")
        change = salient["prose_nll"] - means["prose_nll"]
        losses = f"{means['prose_nll']:.4f} / {salient['prose_nll']:.4f} ({change:+.4f})"
        body.append([rule_name(config), f"{salient['block_density']:.3f}", *cells, losses])
    text = (
        f"Plain means (`salience=0, query_contrast=1`) / the default; in brackets prompts of {data['samples']}, and "
        f"nats. {setting(data, QUALITY)[:-1]} and `benchmarks/results/{PLAIN}`, which asked the same prompts."
    )
    return wrapped(text) + "\n\n" + table(("attention", "block density", *TASKS, "prose NLL"), body)


def knobs_earlier() -> str:
    """Region: fields of the rule that came before."""
    data, by_precision = compared(EARLIER)
    text = f"{data['samples']} prompts per task, {frequencies('float32')}."
    return wrapped(text) + "\n\n" + knob_table(data, by_precision["float32"], EARLIER_BASE)


def presets() -> str:
    """Region: the promised four numbers, and the blocks that each preset reads."""
    body = []
    for name, config in PRESETS.items():
        numbers = (config.block_size, config.sketch_dim, config.top_k_blocks, f"{config.sparsity_exponent:g}")
        body.append([f"`{name}`", *map(str, numbers), *(_density_text(config, tokens) for tokens in LENGTHS)])
    by_density = SketchWalkConfig(**BASE)
    numbers = (by_density.block_size, by_density.sketch_dim, "-", f"{by_density.sparsity_exponent:g}")
    body.append(["`density=0.2, min_blocks=4`", *map(str, numbers), *(_density_text(by_density, n) for n in LENGTHS)])
    head = ("preset", "block", "sketch dim", "top blocks", "exponent", *(f"read at {thousands(n)}" for n in LENGTHS))
    note = f"**Bold**: below {LEAST_ADVISED_DENSITY:.0%}".replace("%", " %") + ", where retrieval is likely to fail."
    return f"{table(head, body)}\n\n{note}"


def preset_costs() -> str:
    """Region: what each preset costs for Llama-3.1-8B."""
    body = []
    for name, config in PRESETS.items():
        memory = [count_memory(n, config, ModelShape()) for n in LENGTHS]
        last = [config.budget(n // config.block_size) * config.block_size for n in LENGTHS]
        body.append(
            [f"`{name}`", f"{max(last):,}", *(f"{bytes_text(m.state)} ({percent(m.state_share)})" for m in memory)]
        )
    return table(("preset", "tokens a late query reads", *(f"state at {thousands(n)}" for n in LENGTHS)), body)


def _density_text(config: SketchWalkConfig, tokens: int) -> str:
    share = causal_density(tokens, config)
    return f"**{percent(share)}**" if share < LEAST_ADVISED_DENSITY else percent(share)


def config_fields() -> str:
    """Region: every field with its default and its docstring."""
    described = dict(_described_fields(inspect.getdoc(SketchWalkConfig) or ""))
    body = []
    for entry in fields(SketchWalkConfig):
        kind, text = described[entry.name]
        default = str(entry.default) if entry.name == "walk_state_dtype" else repr(entry.default)
        body.append([f"`{entry.name}`", f"`{kind}`".replace("|", "\\|"), f"`{default}`", text])
    return table(("field", "type", "default", "meaning"), body, left=4)


def _described_fields(doc: str) -> Iterable[tuple[str, tuple[str, str]]]:
    """(field, (type, meaning)) of a NumPy docstring's Parameters."""
    section = doc.partition("Parameters\n----------\n")[2].partition("\n\nRaises")[0]
    for entry in re.split(r"\n(?=\S)", section):
        head, _, text = entry.partition("\n")
        names, _, kind = head.partition(" : ")
        meaning = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
        for name in names.split(", "):
            yield name, (kind, meaning)


def step_bytes(tokens: int, config: SketchWalkConfig, shape: ModelShape) -> int:
    """Bytes of key sketches that a decode step reads: every block's mean codes, outlines, step size and bound."""
    read = outline_size(feature_width(shape.head_dim, config), config)
    return math.ceil(tokens / config.block_size) * shape.kv_heads * (read + SKETCH_SCALE_BYTES)


def state_bytes() -> str:
    """Region: what is kept and what a decode step reads of it, by length, for two model shapes."""
    body = []
    for label, shape, width in (
        ("Llama-3.1-8B", ModelShape(), 64),
        ("Llama-3.1-8B", ModelShape(), 128),
        ("SmolLM2-135M", SMOLLM2, 64),
    ):
        config = SketchWalkConfig(sketch_dim=width)
        for tokens in (4096, 65_536, 131_072):
            memory, read_bytes = count_memory(tokens, config, shape), step_bytes(tokens, config, shape)
            body.append(
                [
                    f"{label}, head_dim {shape.head_dim}",
                    str(width),
                    f"{tokens:,}",
                    f"{bytes_text(memory.state)} ({percent(memory.state_share)})",
                    f"{bytes_text(read_bytes)} ({percent(read_bytes / memory.kv_cache)})",
                ]
            )
    head = ("model shape, 16 bits", "`sketch_dim`", "tokens", "kept (of the KV cache)", "read by a decode step")
    return table(head, body)


def state_walk() -> str:
    """Region: what a walk adds to the state, by length, for two model shapes."""
    body = []
    for label, shape in (("Llama-3.1-8B", ModelShape()), ("SmolLM2-135M", SMOLLM2)):
        for tokens in (1024, 4096, 32_768, 131_072):
            memory = count_memory(tokens, SketchWalkConfig(walk="damped"), shape)
            parts = (memory.key_sketches, memory.transition_rows, memory.query_ring, memory.state)
            body.append([label, f"{tokens:,}", *map(bytes_text, parts), percent(memory.state_share)])
    parts = ("key sketches", "transition rows", "ring", "together")
    return table(("model shape, 16 bits", "tokens", *parts, "share of the KV cache"), body)


def state_promise() -> str:
    """Region: the promised size of the state beside the counted one."""
    kept, full, walked = (
        count_memory(65_536, config, ModelShape())
        for config in (SketchWalkConfig(), SketchWalkConfig(sketch_dim=128), SketchWalkConfig(walk="damped"))
    )
    return wrapped(
        f"At 65,536 tokens the founding document estimates {bytes_text(PROMISED_STATE_BYTES)} for one layer, 6 %. For "
        f"the shape of Llama-3.1-8B the default keeps {bytes_text(kept.state)} ({percent(kept.state_share)} of the "
        f"layer's KV cache), sketches of all 128 coordinates {bytes_text(full.state)} ({percent(full.state_share)}), "
        f'and the default with `walk="damped"` {bytes_text(walked.state)} ({percent(walked.state_share)}).'
    )


def crossover() -> str:
    """Region: below which length calls run dense."""
    tables = {
        "prompt (several tokens)": kernels.PREFILL_CROSSOVER,
        "decode step (one token)": kernels.DECODE_CROSSOVER,
    }
    body = [[name, device, f"{tokens:,}"] for name, by_device in tables.items() for device, tokens in by_device.items()]
    return table(("call", "device", "dense below, tokens"), body, left=2)


def commands() -> str:
    """Region: the commands with their options."""
    parts = []
    grouped = [
        (f"{group.name} ", command)
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
    ]
    for prefix, command in [*(("", command) for command in app.registered_commands), *grouped]:
        callback = command.callback
        assert callback is not None
        hints = typing.get_type_hints(callback, include_extras=True)
        rows = []
        for name, parameter in inspect.signature(callback).parameters.items():
            hint = hints[name]
            if hint is Context:
                continue
            if not hasattr(hint, "__metadata__"):  # Python 3.10 wraps an option that defaults to None.
                hint = typing.get_args(hint)[0]
            kind, option = typing.get_args(hint)
            if isinstance(option, ArgumentInfo):
                rows.append([f"`{name.upper()}`", _kind(kind), _default(parameter.default), option.help])
                continue
            given = [text for text in (option.default, *(option.param_decls or ())) if isinstance(text, str)]
            spelled = given or [f"--{name.replace('_', '-')}"]
            rows.append([", ".join(f"`{s}`" for s in spelled), _kind(kind), _default(parameter.default), option.help])
        parts.append(f"## sketch-walk {prefix}{callback.__name__}\n\n{inspect.getdoc(callback)}")
        if rows:
            parts.append(table(("option", "value", "default", "meaning"), rows, left=4))
    return "\n\n".join(parts)


def _kind(annotation: Any) -> str:
    kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    return {"bool": "flag", "Path": "path", "str": "text"}.get(kinds[0].__name__, kinds[0].__name__)


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return "" if value is None or value is False else f"`{value}`"


def ablation(group: str) -> str:
    """Region: one group of ablations: its picture, a table a length, and its machine if it is not that of the rest."""
    name = OTHER_ABLATIONS.get(group, ABLATIONS)
    data = read(name)
    entry = None if data is None else data["groups"].get(group)
    if data is None or entry is None:
        return f"Not measured in this checkout yet (`benchmarks/results/{name}`)."
    picture = IMAGES / Path(name).stem / f"{group}.png"
    parts = [wrapped(_ablation_setting(name, data["header"]))] if group in OTHER_ABLATIONS else []
    if picture.is_file():
        parts.append(f"![{entry['question']}]({picture.relative_to(PROJECT / 'docs').as_posix()})")
    # Seconds are no speed: rows were measured in processes side by side.
    left, last = (1, -1) if entry["measure"] == "prompt" else (2, None)
    for length, measured in sorted(entry["tokens"].items(), key=lambda item: int(item[0])):
        parts.append(wrapped(_ablation_samples(entry["measure"], int(length), measured["samples"])))
        rows = (row[:last] for row in body(entry, length))
        parts.append(table(("attention", *header(entry, length)[1:last]), rows, left=left))
    return "\n\n".join(parts)


def ablation_setting() -> str:
    """Region: the model and the machine of every group that does not name its own."""
    return wrapped(_ablation_setting(ABLATIONS, required(ABLATIONS)["header"]))


def _ablation_setting(name: str, made: dict[str, Any]) -> str:
    packages = [package for package in ("torch", "triton", "transformers") if made["versions"][package]]
    versions = ", ".join(f"{package} {made['versions'][package]}" for package in packages)
    return (
        f"{made['model'][0].upper()}{made['model'][1:]}, {made['dtype']}, {made['device']}, {versions}, "
        f"kernel `{made['kernel']}`. Source: `benchmarks/results/{name}`."
    )


def _ablation_samples(measure: str, tokens: int, samples: dict[str, Any]) -> str:
    first, last = samples["first_seed"], samples["first_seed"] + samples["samples"] - 1
    rest = (
        f"{samples['passages']} passages"
        if measure == "prompt"
        else f"{samples['texts']} continuations of {samples['new_tokens']} tokens"
    )
    if "text_sha256" in samples:
        rest += f" of a text (SHA-256 {samples['text_sha256']}...)"
    return f"{tokens:,} tokens, {samples['samples']} prompts per task (seeds {first} to {last}), {rest}:"


class Priced(NamedTuple):
    """A setting that was timed, and its row of the ablations."""

    name: str
    timed: Row
    measured: Row

    @property
    def is_default(self) -> bool:
        return not self.timed["changes"]

    @property
    def ms(self) -> float:
        return float(self.timed["selector_ms"]["median_ms"])

    @property
    def figures(self) -> dict[str, Any]:
        return dict(self.measured["modes"]["prefill"]["figures"])


def priced_settings(data: dict[str, Any], quality_of: dict[str, Any]) -> list[Priced]:
    """Every timed setting with its quality, by group and label, the cheapest first."""
    found = []
    for row in data["results"]:
        if "selector_ms" not in row:
            continue
        rows = quality_of["groups"][row["group"]]["tokens"][CURVE_PROMPT]["rows"]
        (measured,) = (other for other in rows if other["label"] == row["label"])
        timed, asked = {**data["config"], **row["changes"]}, quality_of["measurements"][measured["key"]]["config"]
        # Another model's sketch keeps the same share of a head's coordinates; fields that came later changed nothing.
        shares = timed["sketch_dim"] * SMOLLM2.head_dim, asked["sketch_dim"] * data["shape"]["head_dim"]
        others = [name for name in asked if name != "sketch_dim" and asked[name] != timed[name]]
        same = shares[0] == shares[1] and not others
        assert same, f"{row['group']}, {row['label']}: timed and measured with different settings"
        name = f"{CURVE_GROUPS[row['group']]}: {row['label']}" if row["changes"] else "default"
        found.append(Priced(name, row, measured))
    return sorted(found, key=lambda setting: setting.ms)


def selector_curve() -> str:
    """Region: what a setting's selector costs on a GPU, beside the quality that the ablations measured; a picture."""
    data = read(CURVE)
    if data is None:
        return f"Not measured in this checkout yet (`benchmarks/results/{CURVE}`)."
    quality_of = required(ABLATIONS)
    tasks = quality_of["groups"]["query-keep"]["tokens"][CURVE_PROMPT]["samples"]["tasks"]
    shape, attention = data["shape"], data["attention"]

    def scores(figures: dict[str, Any]) -> list[str]:
        answers = (f"{figures[f'accuracy:{t}']['mean']:.2f} / {figures[f'nll:{t}']['mean']:.2f}" for t in tasks)
        return [*answers, f"{figures['prose_nll']['mean']:.4f}"]

    dense = _curve_dense(quality_of)
    body = [["dense", *[""] * (len(CURVE_STAGES) + 1 + len(attention)), *scores(dense)]]
    settings = priced_settings(data, quality_of)
    for setting in settings:
        times = (setting.timed["stages_ms"][stage]["median_ms"] for stage in CURVE_STAGES)
        shares = (percent(setting.ms / row["median_ms"]) for row in attention)
        name = f"**{setting.name}**" if setting.is_default else setting.name
        body.append([name, *(f"{ms:.2f}" for ms in (*times, setting.ms)), *shares, *scores(setting.figures)])
    beside = ", ".join(
        f"{row['median_ms']:.1f} ms at density {row['density']:g} (blocks of {row['block_size']}, `{row['impl']}`)"
        for row in attention
    )
    text = (
        f"Milliseconds of device time of the selector over one layer's prompt of {data['tokens']:,} tokens, "
        f"{shape['heads']}/{shape['kv_heads']} heads x {shape['head_dim']}, {data['dtype']}, density "
        f"{data['density']:g}, medians of {data['repeats']}, each setting checked in the same run; {data['device']}, "
        f"{bench_torch(data)}. Its share is of the sparse attention alone: {beside}. Quality is that of the tables "
        f"above and below, {int(CURVE_PROMPT):,} tokens; a sketch of 32 of 64 coordinates was timed as 64 of 128. "
        f"{config_note(data['config'], ('sketch_dim', 'step_memory'))} Sources: `benchmarks/results/{CURVE}`, "
        f"`benchmarks/results/{ABLATIONS}`."
    )
    head = (
        "setting", *CURVE_STAGES.values(), "selector in one call",
        *(f"of the attention at {row['density']:g}" for row in attention),
        *(f"{TASK_NAMES[task]}: accuracy / NLL" for task in tasks), "prose NLL",
    )  # fmt: skip
    picture = f"![{CURVE_TITLE}]({CURVE_PICTURE.relative_to(PROJECT / 'docs').as_posix()})"
    parts = [wrapped(" ".join(text.split())), table(head, body), *_worth_of_a_millisecond(settings)]
    return "\n\n".join([*parts, picture] if settings else parts)


# Its settings change the attention's own time too.
CURVE_APART = CURVE_GROUPS["block-size"]
CURVE_TITLE = "Prose NLL against the selector's time"


def bench_torch(data: dict[str, Any]) -> str:
    """Versions of what computed."""
    return ", ".join(f"{package} {data['versions'][package]}" for package in ("torch", "triton"))


def _curve_dense(quality_of: dict[str, Any]) -> dict[str, Any]:
    rows = quality_of["groups"]["query-keep"]["tokens"][CURVE_PROMPT]["rows"]
    return dict(next(row for row in rows if row["label"] == "dense")["modes"]["dense"]["figures"])


def _worth_of_a_millisecond(settings: Sequence[Priced]) -> Iterable[str]:
    """A sentence: what a further millisecond of the selector wins along `query_keep`, from step to step."""
    line = [setting for setting in settings if setting.timed["group"] == "query-keep"]
    steps = []
    for cheap, dear in pairwise(line):
        won = cheap.figures["prose_nll"]["mean"] - dear.figures["prose_nll"]["mean"]
        if dear.ms > cheap.ms:
            labels = f"{cheap.timed['label']} to {dear.timed['label']}"
            steps.append(f"{won / (dear.ms - cheap.ms):.3f} from {labels}")
    if steps:
        default = next((setting.timed["label"] for setting in line if setting.is_default), None)
        known = "" if default is None else f" (the default is {default})"
        yield wrapped(
            f"Nats of prose NLL that a further millisecond wins along `query_keep`{known}: {', '.join(steps)}."
        )


def curve_points() -> tuple[dict[str, list[Point]], Point | None]:
    """Prose NLL over milliseconds by group, and the default's."""
    data = read(CURVE)
    series: dict[str, list[Point]] = {}
    default = None
    for setting in [] if data is None else priced_settings(data, required(ABLATIONS)):
        figure = setting.figures["prose_nll"]
        center = figure["mean"] - figure["difference"]["mean"]
        ends = (center + figure["difference"][end] for end in ("low", "high"))
        label = "default" if setting.is_default else setting.timed["label"]
        point = Point(label, setting.ms, figure["mean"], *ends)
        if setting.is_default:
            default = point
        else:
            series.setdefault(CURVE_GROUPS[setting.timed["group"]], []).append(point)
    return series, default


def curve_is_drawn() -> bool:
    """Whether the picture of `selector_curve` is there and current, or there is nothing to draw."""
    series, default = curve_points()
    return default is None or _holds(CURVE_PICTURE, [series, default])


def draw_curve() -> None:
    """Draw the picture of `selector_curve`, with its points as text inside the file."""
    series, default = curve_points()
    assert default is not None
    data, dense = required(CURVE), _curve_dense(required(ABLATIONS))["prose_nll"]["mean"]
    plot_quality_against_time(
        CURVE_PICTURE,
        series,
        default=default,
        apart=(CURVE_APART,),
        dense=dense,
        xlabel=f"selector of one layer, milliseconds at {thousands(data['tokens'])} tokens, {data['device']}",
        ylabel=f"prose NLL at {int(CURVE_PROMPT):,} tokens, nats",
        title=CURVE_TITLE,
    )
    _put_inside(CURVE_PICTURE, [series, default])


def ablation_regions() -> dict[str, Callable[[], str]]:
    """A region for each group of the committed plans."""
    plans = [read_plan(PROJECT / "benchmarks" / name) for name in ("ablations.json", *OTHER_PLANS)]
    return {f"ablation-{group.name}": partial(ablation, group.name) for plan in plans for group in plan.groups}


REGIONS: dict[str, Callable[[], str]] = {
    **ablation_regions(),
    "ablation-setting": ablation_setting,
    "selector-curve": selector_curve,
    "readme-results": readme_results,
    "speed": speed,
    "quality": quality_today,
    "quality-loss": quality_loss,
    "quality-setting": quality_setting,
    "quality-earlier": quality_earlier,
    "quality-earlier-triton": quality_earlier_triton,
    "gpu-cute": gpu_cute,
    "gpu-dense": gpu_dense,
    "gpu-prefill": gpu_prefill,
    "gpu-prefill-triton": gpu_prefill_triton,
    "gpu-decode": gpu_decode,
    "gpu-selector": gpu_selector,
    "gpu-short": gpu_short,
    "gpu-cross": gpu_cross,
    "gpu-eager": gpu_eager,
    "gpu-ttft": gpu_ttft,
    "gpu-step": gpu_step,
    "gpu-million": gpu_million,
    "gpu-summary": gpu_summary,
    "gpu-aims": gpu_aims,
    "quality-aims": quality_aims,
    "step-aims": step_aims,
    "gpu-memory": gpu_memory,
    "cpu-decode": cpu_decode,
    "generation": generation,
    "answers": answers,
    "walk-finding": walk_finding,
    "pooling": pooling,
    "knobs": knobs,
    "knobs-earlier": knobs_earlier,
    "presets": presets,
    "preset-costs": preset_costs,
    "config-fields": config_fields,
    "state-bytes": state_bytes,
    "state-walk": state_walk,
    "state-promise": state_promise,
    "crossover": crossover,
    "commands": commands,
}


def pages() -> list[Path]:
    """Every page that may hold regions."""
    return [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """`text` with its regions made anew.

    Raises
    ------
    KeyError
        For a region that no function makes.
    """
    return REGION.sub(lambda match: f"{match[1]}\n{REGIONS[match[2]]()}\n\n{match[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is stale")
    check = parser.parse_args(arguments).check
    stale = 0
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if new == old:
            continue
        stale += 1
        if not check:
            page.write_text(new, encoding="utf-8")
        print(f"{page.relative_to(PROJECT)}: {'stale; run make docs' if check else 'rewritten'}")
    for picture, is_drawn, draw in (
        (SPEED_UP_PICTURE, speed_up_is_drawn, draw_speed_up),
        (CURVE_PICTURE, curve_is_drawn, draw_curve),
    ):
        if is_drawn():
            continue
        stale += 1
        if not check:
            draw()
        print(f"{picture.relative_to(IMAGES)}: {'stale; run make docs' if check else 'drawn'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
