"""`sketch-walk ablate`: what each part of the method is worth, from a file of configs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich.console import Console

from sketch_walk.bench.record import environment
from sketch_walk.cli.ablate_report import draw, tables
from sketch_walk.cli.loading import load_quietly
from sketch_walk.evaluation.ablation import (
    Measurement,
    Plan,
    Row,
    Store,
    choose_groups,
    read_plan,
    rows_of,
    run_plan,
)
from sketch_walk.extras import require
from sketch_walk.kernels import check_impl

if TYPE_CHECKING:
    from sketch_walk.integrations.models import LoadedModel

# What a table needs when nobody's terminal bounds it.
PIPED_WIDTH = 200


def run_ablate(
    *,
    configs: Path,
    file: Path | None,
    model: str | None,
    gguf_file: str | None,
    device: str | None,
    tokens: tuple[int, ...] | None,
    samples: int | None,
    first_seed: int | None,
    groups: tuple[str, ...] | None,
    batch: int | None,
    kernel: str,
    json_file: Path | None,
    plots: Path | None,
    resume: bool,
    seconds: float | None,
) -> None:
    """Measure a plan, print tables, draw pictures, end with one line of JSON.

    Raises
    ------
    typer.Exit
        With code 1 if a row failed or time ran out.
    """
    text = None if file is None else file.read_text(encoding="utf-8")
    changes: dict[str, Any] = {"tokens": tokens, "samples": samples, "first_seed": first_seed, "text": text}
    plan = replace(read_plan(configs), **{name: value for name, value in changes.items() if value is not None})
    if groups is not None:
        plan = choose_groups(plan, groups)
    check_impl(kernel)
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if resume and json_file is None:
        raise ValueError("--resume needs --json, the file to go on with")
    store = Store.open(json_file, resume)
    if plots is not None:
        require("matplotlib", "eval")
    console = Console()
    if not console.is_terminal and console.width < PIPED_WIDTH:
        console = Console(width=PIPED_WIDTH)

    def load() -> LoadedModel:
        loaded = load_quietly(console, model, gguf_file, device)
        _describe(store, model, loaded, kernel)
        return loaded

    complete = _run(plan, store, load, console, batch, kernel, seconds)
    mine = store.summarise(plan)
    store.save()
    for table in tables(mine):
        console.print(table)
    files = draw(plots, {name: store.groups[name] for name in mine}) if plots is not None else []
    for file in (*files, *([json_file] if json_file else [])):
        console.print(f"wrote {file}", markup=False, highlight=False)
    print(json.dumps({"header": store.header, "complete": complete, "groups": mine}))
    if not complete:
        raise typer.Exit(1)


def _run(
    plan: Plan, store: Store, load: Any, console: Console, batch: int | None, kernel: str, seconds: float | None
) -> bool:
    total, held, done = len(list(rows_of(plan))), set(store.measurements), 0

    def on_row(row: Row, measurement: Measurement | None) -> None:
        nonlocal done
        done += 1
        if measurement is None:
            text = "left for another run: the time is up"
        elif "error" in measurement:
            text = f"failed: {measurement['error']}"
        elif row.key in held:
            text = "known"
        else:
            text = f"{measurement['seconds']:.1f} s"
            held.add(row.key)
        name = f"{row.tokens:,} tokens, {row.group.name}, {row.label}"
        console.print(f"{done}/{total} {name}: {text}", markup=False, highlight=False)

    return run_plan(plan, store, load, batch=batch, impl=kernel, seconds=seconds, on_row=on_row)


def _describe(store: Store, model: str | None, loaded: LoadedModel, kernel: str) -> None:
    """Fill in where measurements come from, or check that they all come from there.

    Raises
    ------
    ValueError
        If the file's measurements were made with something else.
    """
    device = loaded.model.device
    header = {
        "model": model or "the embedded SmolLM2",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "kernel": kernel,
        **environment(torch.device(device)).to_dict(),
    }
    compared = ("model", "dtype", "kernel", "device", "versions")
    differing = [name for name in compared if store.header and store.header.get(name) != header[name]]
    if differing:
        found = {name: store.header.get(name) for name in differing}
        raise ValueError(f"--resume would mix measurements: the file has {found}, this run {header}")
    store.header = header
