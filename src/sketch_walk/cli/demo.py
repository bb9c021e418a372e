"""`sketch-walk demo`: needle retrieval, dense and sparse side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sketch_walk.cli.format import percent_text
from sketch_walk.cli.loading import load_quietly
from sketch_walk.config import SketchWalkConfig
from sketch_walk.evaluation import EvaluationResult, SampleScore, evaluate, make_sample

if TYPE_CHECKING:
    from sketch_walk.integrations.models import LoadedModel

# The picture is of the last prompt, so the task with one needle in prose comes last.
TASK_ORDER = ("noise", "multi_key", "prose")


def run_demo(*, model: str | None, tokens: int, samples: int, density: float, output: Path, device: str | None) -> None:
    """Run the prompts twice, print a table, write ``demo.json`` and ``blocks.png`` into `output`."""
    from sketch_walk.integrations.transformers import enable
    from sketch_walk.plots import plot_block_selection

    # One dense query block costs a short prompt 3 to 5 points of density and lets the question read everything.
    config = SketchWalkConfig(density=density, min_blocks=4, dense_tail_blocks=1, dense_below=0)
    console = Console()
    loaded = load_quietly(console, model, device=device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("dense", total=2 * samples * len(TASK_ORDER))

        def advance(_: SampleScore) -> None:
            progress.advance(bar)

        # The first pass of a process pays for set-up that is no property of either attention.
        evaluate(loaded.model, loaded.tokenizer, tasks=("noise",), lengths=(256,), samples=1, progress=False)
        dense = _run(loaded, tokens, samples, None, advance)
        progress.update(bar, description="sparse")
        with enable(loaded.model, config, record=True) as handle:
            sparse = _run(loaded, tokens, samples, handle, advance)
    picture = output / "blocks.png"
    last = make_sample(loaded.tokenizer, TASK_ORDER[-1], tokens, seed=samples - 1)
    selections = {call.layer_idx: call.indices for call in handle.calls if call.indices is not None}
    shown = sorted(selections)
    plot_block_selection(
        picture,
        {layer: selections[layer][0] for layer in (shown[0], shown[len(shown) // 2], shown[-1])},
        block_size=config.block_size,
        needle_tokens=(last.needle_start,),
        title=f"Key blocks read for one prompt of {tokens:,} tokens",
    )
    record = {"config": config.to_dict(), "dense": dense.to_dict(), "sparse": sparse.to_dict()}
    (output / "demo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(_answers_table(dense, sparse, tokens))
    console.print(_figures_table(dense, sparse))
    console.print(
        f"sparse: density={density:g}, min_blocks=4, and the last query block of a prompt dense", highlight=False
    )
    console.print(f"wrote {picture} and {output / 'demo.json'}", highlight=False)


def _run(
    loaded: LoadedModel, tokens: int, samples: int, handle: Any, on_sample: Callable[[SampleScore], None]
) -> EvaluationResult:
    return evaluate(
        loaded.model,
        loaded.tokenizer,
        tasks=TASK_ORDER,
        lengths=(tokens,),
        samples=samples,
        handle=handle,
        generate=True,
        progress=False,
        on_sample=on_sample,
    )


def _answers_table(dense: EvaluationResult, sparse: EvaluationResult, tokens: int) -> Table:
    table = Table(title=f"Codes hidden in {tokens:,} tokens", title_justify="left")
    for name in ("haystack", "depth", "question", "hidden", "dense answer", "sparse answer"):
        table.add_column(name, overflow="fold")
    for left, right in zip(dense.samples, sparse.samples, strict=True):
        table.add_row(
            left.task, f"{left.depth:.0%}", left.question, left.expected, _answer_text(left), _answer_text(right)
        )
    return table


def _answer_text(score: SampleScore) -> str:
    text = " ".join((score.generated or "").split()).replace("[", r"\[")
    return f"{text} [green]right[/]" if score.generated_correctly else f"{text} [red]wrong[/]"


def _figures_table(dense: EvaluationResult, sparse: EvaluationResult) -> Table:
    table = Table(title="Dense and sparse attention", title_justify="left")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("sparse", justify="right")
    rows: dict[str, Callable[[EvaluationResult], str]] = {
        "answers that are right": lambda result: percent_text(result.generated_accuracy),
        "teacher-forced accuracy": lambda result: percent_text(result.accuracy),
        "answer loss, nats per token": lambda result: f"{result.nll:.3f}",
        "causal blocks read": lambda result: percent_text(1.0 if result is dense else result.block_density),
        "causal token pairs read": lambda result: percent_text(1.0 if result is dense else result.pair_density),
        "seconds of prefill": lambda result: f"{result.seconds:.2f}",
    }
    for name, text in rows.items():
        table.add_row(name, text(dense), text(sparse))
    return table
