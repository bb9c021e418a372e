"""Regions that hold what was measured to what was aimed at."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple

from regions.gpu import HEAD_DIM, beside_dense, layer_rows
from regions.models import span
from regions.package import step_bytes
from regions.quality import quality, run_of
from regions.results import (
    ANSWERS,
    BASE,
    MILLION,
    MODEL_STEP,
    PREFILL,
    SELECTOR,
    SELECTOR_CALLS,
    SHORT_GRAPH,
    STEP,
    TASKS,
    TRITON,
    TTFT,
    Row,
    percent,
    required,
    table,
    thousands,
    wrapped,
)
from sketch_walk.complexity import ModelShape, count_memory
from sketch_walk.config import SketchWalkConfig

LAYER, MODEL = {"kind": "layer"}, {"kind": "model"}
SHORT_SPEED, STATE_SHARE, STEP_SHARE = 0.97, 0.08, 0.02


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
    tasks = next(iter(data["rows"].values()))["hits"]
    body = []
    for setting in ("0.2, tail of 4", "0.2"):
        row = data["summary"][f"{setting}: sparse steps"]
        cells = []
        for task in tasks:
            apart = row[f"{task}_hits_against_dense_steps"]
            points = f"{100 * apart['mean']:+.1f} ({100 * apart['low']:+.1f} to {100 * apart['high']:+.1f})"
            cells.append(judged(points, 100 * apart["mean"] >= -STEP_AIM))
        body.append([setting, f"at least -{STEP_AIM:g}", *cells])
    text = (
        "Needle answers of sparse steps, in points against dense steps after the same sparse prompts, with 95 % "
        f"intervals of the paired difference (`{ANSWERS}`):"
    )
    return wrapped(text) + "\n\n" + table(("density", "asked for", *tasks), body)


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
    """What a layer takes above its attention, and in brackets what the selector's kernels take one by one."""
    kernels = {
        (row["tokens"], row["block_size"]): sum(row["ms"][name] for name in SELECTOR_CALLS)
        for row in required(SELECTOR)["prefill"]
    }
    for _, attention, layer in layer_rows(required(PREFILL)):
        if layer["density"] not in SELECTOR_SHARE:
            continue
        share, most = layer["median_ms"] / attention["median_ms"] - 1, SELECTOR_SHARE[layer["density"]]
        size = layer["tokens"], layer["block_size"]
        case = f"prompt of {thousands(layer['tokens'])}, block {layer['block_size']}, density {layer['density']:g}"
        yield (
            f"{case}: selector, of the attention (its kernels alone)",
            f"at most {most:.0%}".replace("%", " %"),
            f"{judged(percent(share), share <= most)} ({percent(kernels[size] / attention['median_ms'])})",
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
