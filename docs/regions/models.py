"""Regions on whole models on a GPU, and on a prompt of a million tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from regions.gpu import DENSE_NAMES, bench_notes, beside_dense, default_note, model_setting, quality_note, repeats_text
from regions.results import MILLION, MODEL_STEP, TTFT, Row, percent, required, table, wrapped


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
    notes = {"First tokens": TTFT, "Steps": MODEL_STEP}
    notes = {call: default_note(required(name), name) for call, name in notes.items()}
    earlier = "".join(f"{call}: {note} " for call, note in notes.items() if note)
    text = (
        f"A whole model on a GPU, milliseconds: {model_setting(required(TTFT))}; each method checked before it was "
        f"timed. First tokens: {first}; steps: {steps}. Blocks read are those of the sparse layers. Random weights: no "
        f"accuracy belongs to these rows. {quality_note(timed)} {earlier}"
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
