"""Regions on speed on a CPU, and the crossovers."""

from __future__ import annotations

from collections.abc import Sequence

from regions.quality import config_note, quality, run_of
from regions.results import BASE, DECODE, QUALITY, SPEED, STEP_FIELDS, percent, read, required, table, wrapped
from sketch_walk import kernels


def speed_table(lengths: Sequence[int] | None = None) -> str:
    """Time of prompts on a CPU, with density and accuracy of the same setting; a sentence while it is unmeasured."""
    data = read(SPEED)
    if data is None:
        return f"Speed on a CPU: not measured in this checkout yet (`benchmarks/results/{SPEED}`)."
    _, rows = quality()
    dense, sparse = rows[0]["essay"]["accuracy"], run_of(rows, **BASE)["essay"]["accuracy"]
    accuracy = config_note(data["config"], STEP_FIELDS)
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


def crossover() -> str:
    """Region: below which length calls run dense."""
    tables = {
        "prompt (several tokens)": kernels.PREFILL_CROSSOVER,
        "decode step (one token)": kernels.DECODE_CROSSOVER,
    }
    body = [[name, device, f"{tokens:,}"] for name, by_device in tables.items() for device, tokens in by_device.items()]
    return table(("call", "device", "dense below, tokens"), body, left=2)
