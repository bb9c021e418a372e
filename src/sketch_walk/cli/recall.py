"""`sketch-walk recall`: how much of the exact attention a selector keeps, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sketch_walk.cli.loading import load_quietly
from sketch_walk.config import SketchWalkConfig
from sketch_walk.evaluation import TASKS, SelectionReport, make_sample, measure_selection
from sketch_walk.evaluation.selectors import score_function

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


def run_recall(
    *,
    model: str | None,
    file: Path | None,
    task: str,
    tokens: int,
    seed: int,
    selector: str,
    config: SketchWalkConfig,
    follow: str,
    decode_tokens: int,
    output: Path,
    gguf_file: str | None,
    device: str | None,
) -> None:
    """Measure one text, print a table, write ``recall.json`` and pictures into `output`."""
    score_function(selector)
    if file is None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {tuple(TASKS)}")
    text = None if file is None else file.read_text(encoding="utf-8")
    console = Console()
    loaded = load_quietly(console, model, gguf_file, device)
    needle: tuple[int, ...] = ()
    if text is None:
        sample = make_sample(loaded.tokenizer, task, tokens, seed)
        ids, needle = sample.prompt, (sample.needle_start,)
    else:
        ids = _first_tokens(loaded.tokenizer, text, tokens)
    layers: int = loaded.model.config.get_text_config().num_hidden_layers
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("layers", total=(layers - config.skip_first_n_layers) * max(1, decode_tokens))
        report = measure_selection(
            loaded.model,
            ids,
            config,
            selector=selector,
            follow=follow,
            decode_tokens=decode_tokens,
            on_layer=lambda _: progress.advance(bar),
        )
        progress.update(bar, total=progress.tasks[0].completed)
    report.settings.update({"task": task, "seed": seed} if text is None else {"file": file.name if file else None})
    report.write_json(output / "recall.json")
    pictures = _draw(report, output, needle)
    console.print(report.table())
    measured = f"the last {decode_tokens} one by one" if decode_tokens else "as one prompt"
    console.print(
        f"selector {selector!r} on {ids.shape[1]:,} tokens, {measured}, each layer given {follow} outputs",
        highlight=False,
    )
    console.print(f"wrote {', '.join(str(path) for path in (output / 'recall.json', *pictures))}", highlight=False)


def _first_tokens(tokenizer: Any, text: str, tokens: int) -> Int[Tensor, "1 tokens"]:
    ids = tokenizer(text, verbose=False)["input_ids"][:tokens]
    if not ids:
        raise ValueError("the text is empty")
    return torch.tensor([ids])


def _draw(report: SelectionReport, output: Path, needle: tuple[int, ...]) -> list[Path]:
    from sketch_walk.plots import Curve, plot_block_selection, plot_head_heat_map, plot_recall_by_layer

    index = [layer.layer for layer in report.layers]
    means = [layer.means() for layer in report.layers]
    lines = {"read": "recall", "max-oracle": "oracle_max_recall", "mean-oracle": "oracle_mean_recall"}
    curves = {name: Curve(index, [float(row[key] or 0.0) for row in means]) for name, key in lines.items()}
    size = report.settings["config"]["block_size"]
    by_layer, by_head, errors, blocks = (
        output / f"{name}.png" for name in ("recall_by_layer", "recall_by_head", "error_by_head", "blocks")
    )
    plot_recall_by_layer(by_layer, curves)
    plot_head_heat_map(by_head, index, [layer.recall for layer in report.layers])
    plot_head_heat_map(
        errors,
        index,
        [layer.head_output_error for layer in report.layers],
        label="relative l2 error",
        title="Output error by layer and head",
    )
    if report.settings["decode_tokens"]:
        return [by_layer, by_head, errors]
    shown = sorted({index[0], index[len(index) // 2], index[-1]})
    plot_block_selection(
        blocks, {layer: report.selections[layer] for layer in shown}, block_size=size, needle_tokens=needle
    )
    return [by_layer, by_head, errors, blocks]
