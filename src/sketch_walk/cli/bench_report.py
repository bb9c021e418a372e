"""What `sketch-walk bench` prints and writes: progress, a table, plots, a JSON file and JSON as the last line."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sketch_walk.bench.attention import AttentionOptions
from sketch_walk.bench.memory import MemoryRow
from sketch_walk.bench.model import ModelOptions
from sketch_walk.bench.record import FLASH, Row, environment
from sketch_walk.bench.stages import StageRow
from sketch_walk.bench.timing import Timing
from sketch_walk.cli.format import bytes_text, percent_text
from sketch_walk.config import SketchWalkConfig
from sketch_walk.extras import require
from sketch_walk.plots import Curve, plot_speed_up_against_length, plot_stage_breakdown

AnyRow = Row | StageRow | MemoryRow
R = TypeVar("R", Row, StageRow, MemoryRow)

# Behind a time that is not the device's alone.
HOST_PACED = " *"
# What a table needs when nobody's terminal bounds it.
PIPED_WIDTH = 120


class Report:
    """One run of a benchmark.

    Parameters
    ----------
    what : str
        Name of the command.
    context : typer.Context
        Its root holds the command line.
    options : AttentionOptions or ModelOptions
    config : SketchWalkConfig
        Any one of those that are timed; they differ by block size and density, which each row says.
    json_file, plots : path, optional
        File and folder to write; `json_file` is written anew after every row, so that a run that is cut off leaves what
        it has.

    Raises
    ------
    MissingExtraError
        If plots are wanted and matplotlib is not installed.
    """

    def __init__(
        self,
        what: str,
        context: typer.Context,
        options: AttentionOptions | ModelOptions,
        config: SketchWalkConfig,
        json_file: Path | None,
        plots: Path | None,
    ) -> None:
        if plots is not None:
            require("matplotlib", "eval")
        self.what = what
        self.command = shlex.join(["sketch-walk", *(context.find_root().obj or sys.argv[1:])])
        self.options = options
        self.config = {name: value for name, value in config.to_dict().items() if name not in ("block_size", "density")}
        self.json_file = json_file
        self.plots = plots
        self.extra: dict[str, Any] = {}
        self.console = Console()
        if not self.console.is_terminal and self.console.width < PIPED_WIDTH:
            self.console = Console(width=PIPED_WIDTH)

    def watch(self, total: int, run: Callable[[Callable[[R], None]], list[R]]) -> list[R]:
        """Run a benchmark under a progress bar on standard error."""
        rows: list[R] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(self.what, total=total)

            def on_row(row: R) -> None:
                rows.append(row)
                progress.update(bar, advance=1, description=f"{self.what}: {row.tokens:,} tokens, {row.method}")
                self._save(rows)

            return run(on_row)

    def finish(
        self,
        rows: Sequence[AnyRow],
        tables: Sequence[Table],
        plot: Callable[[Path, Sequence[Any]], list[Path]] | None,
    ) -> None:
        """Print the tables and what has no time, write what was asked for, end with one line of JSON.

        Raises
        ------
        typer.Exit
            With code 1 if a kernel failed or did not match.
        """
        for table in tables:
            self.console.print(table)
        for line in remarks(rows):
            self.console.print(line, markup=False, highlight=False)
        files = plot(self.plots, rows) if plot is not None and self.plots is not None else []
        self._save(rows)
        for file in (*files, *([self.json_file] if self.json_file else [])):
            self.console.print(f"wrote {file}", markup=False, highlight=False)
        failed = sum(row.failed for row in rows)
        if failed:
            print(f"sketch-walk: {failed} of {len(rows)} rows failed; the remarks say why", file=sys.stderr)
        print(json.dumps(self.record(rows)))
        if failed:
            raise typer.Exit(1)

    def record(self, rows: Sequence[AnyRow]) -> dict[str, Any]:
        """The whole result, JSON-able."""
        options = self.options
        described = {
            name: value
            for name, value in vars(options).items()
            if name not in ("device", "dtype", "shape", "changes") and value not in ((), None)
        }
        shape = options.shape._asdict() if isinstance(options, AttentionOptions) else None
        return {
            "what": f"sketch-walk bench {self.what}",
            "command": self.command,
            **environment(options.device).to_dict(),
            "dtype": str(options.dtype).removeprefix("torch."),
            **({} if shape is None else {"shape": shape}),
            **self.extra,
            "options": described,
            "config": self.config,
            "results": [row.to_dict() for row in rows],
        }

    def _save(self, rows: Sequence[AnyRow]) -> None:
        if self.json_file is not None:
            self.json_file.parent.mkdir(parents=True, exist_ok=True)
            self.json_file.write_text(json.dumps(self.record(rows), indent=1) + "\n", encoding="utf-8")


def remarks(rows: Sequence[AnyRow]) -> list[str]:
    """Why rows have no figures, and notes on those that have; the same remark once, with all that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        remark = row.reason or (None if isinstance(row, MemoryRow) else row.note)
        if remark is None:
            continue
        block = "" if row.block_size is None else f" block {row.block_size}"
        names = about.setdefault(remark, [])
        name = f"{row.method}{block} ({row.phase} {row.tokens:,})"
        if name not in names:
            names.append(name)
    return [f"{', '.join(names[:4])}{_more(names[4:])}: {remark}" for remark, names in about.items()]


def _more(names: Sequence[str]) -> str:
    return f" and {len(names)} more" if names else ""


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _density_text(row: Row | StageRow) -> str:
    """As asked for, and as read."""
    return "" if row.block_density is None else f"{row.density or 0:g}: {row.block_density:.3f}"


def _name(row: AnyRow) -> str:
    return row.method if row.impl in (None, row.method) else f"{row.method} ({row.impl})"


def attention_tables(rows: Sequence[Row]) -> list[Table]:
    """Times of kernels, layers or models, a table a size."""
    tables = []
    # What the host takes to enqueue a call, where that is not in the time.
    host = ("host ms",) if any(row.timing is not None and row.timing.host_ms is not None for row in rows) else ()
    right = ("block", "density: read", "ms", "quartiles", *host, "TFLOP/s", "over flash", "over the fastest dense")
    for phase, batch, tokens in dict.fromkeys((row.phase, row.batch, row.tokens) for row in rows):
        table = _table(f"{phase}, {tokens:,} tokens, batch {batch}: milliseconds", ("method", "what"), right)
        for row in rows:
            if (row.phase, row.batch, row.tokens) != (phase, batch, tokens) or row.timing is None:
                continue
            fastest = "" if row.fastest_dense is None else f" ({row.fastest_dense})"
            table.add_row(
                _name(row),
                row.kind + (", graph" if row.graph else ""),
                "" if row.block_size is None else str(row.block_size),
                _density_text(row),
                _timing_text(row.timing),
                f"{_ms_text(row.timing.low_ms)} - {_ms_text(row.timing.high_ms)}",
                *("" if row.timing.host_ms is None else _ms_text(row.timing.host_ms) for _ in host),
                "" if row.tflops is None else f"{row.tflops:.3g}",
                _times_text(row.over_flash),
                _times_text(row.over_fastest_dense) + fastest,
            )
        if table.row_count:
            tables.append(_explained(table))
    return tables


def stage_tables(rows: Sequence[StageRow]) -> list[Table]:
    """Milliseconds by stage, a table a size, a column a config."""
    tables = []
    for phase, batch, tokens in dict.fromkeys((row.phase, row.batch, row.tokens) for row in rows):
        timed = [
            (row, row.stages, row.layer)
            for row in rows
            if (row.phase, row.batch, row.tokens) == (phase, batch, tokens) and row.stages and row.layer
        ]
        if not timed:
            continue
        columns = [
            f"{_name(row)}, block {row.block_size}, density {_density_text(row)}" + (", graph" if row.graph else "")
            for row, _, _ in timed
        ]
        table = _table(f"{phase}, {tokens:,} tokens, batch {batch}: milliseconds by stage", ("stage",), columns)
        for name in timed[0][1]:
            table.add_row(name, *(_timing_text(stages[name]) for _, stages, _ in timed))
        table.add_section()
        table.add_row("layer", *(_timing_text(layer) for _, _, layer in timed))
        table.add_row("selector, of the attention", *(percent_text(row.selector_share) for row, _, _ in timed))
        tables.append(_explained(table))
    return tables


def memory_tables(rows: Sequence[MemoryRow]) -> list[Table]:
    """Bytes by method."""
    right = ("tokens", "block", "Q, K, V", "peak", "output", "state", "of the KV cache")
    table = _table("Bytes of one layer, one sequence", ("phase", "method", "what"), right)
    for row in rows:
        if row.peak_bytes is None or row.output_bytes is None:
            continue
        table.add_row(
            row.phase,
            _name(row),
            row.kind,
            f"{row.tokens:,}",
            "" if row.block_size is None else str(row.block_size),
            bytes_text(row.qkv_bytes),
            bytes_text(row.peak_bytes),
            bytes_text(row.output_bytes),
            "" if row.state_bytes is None else bytes_text(sum(row.state_bytes.values())),
            "" if row.state_share is None else percent_text(row.state_share),
        )
    return [table]


def plot_attention(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Speed-up against length, a picture a phase and batch; over FlashAttention-2 where it ran, else the fastest."""
    written: list[Path] = []
    for phase, batch in sorted({(row.phase, row.batch) for row in rows}):
        for over, field in ((FLASH, "over_flash"), ("the fastest dense kernel", "over_fastest_dense")):
            curves: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                value = getattr(row, field)
                if (row.phase, row.batch) == (phase, batch) and value is not None:
                    density = "" if row.density is None else f", density {row.density:g}"
                    name = f"{row.method}, {row.kind}, block {row.block_size}{density}"
                    curves.setdefault(name, []).append((row.tokens, value))
            if not curves:
                continue
            lines = {name: Curve(*zip(*sorted(points), strict=True)) for name, points in curves.items()}
            suffix = "flash" if over == FLASH else "fastest"
            written.append(folder / f"speed-up-{phase}-batch{batch}-over-{suffix}.png")
            axis = "prompt tokens" if phase == "prefill" else "cached tokens"
            title = f"{phase.capitalize()}, batch {batch}"
            plot_speed_up_against_length(written[-1], lines, over=over, xlabel=axis, title=title)
    return written


def plot_stages(folder: Path, rows: Sequence[StageRow]) -> list[Path]:
    """A stacked bar a size, a picture a phase."""
    written: list[Path] = []
    for phase in sorted({row.phase for row in rows}):
        bars = {
            f"{row.tokens:,} × {row.batch}, block {row.block_size}, density {row.density or 0:g}, {row.method}": {
                name: timing.median_ms for name, timing in row.stages.items()
            }
            for row in rows
            if row.phase == phase and row.stages
        }
        if bars:
            written.append(folder / f"stages-{phase}.png")
            plot_stage_breakdown(written[-1], bars, title=f"{phase.capitalize()}: where the time of a layer goes")
    return written


def _ms_text(milliseconds: float) -> str:
    """At least three significant digits."""
    digits = 1 if milliseconds >= 100 else 2 if milliseconds >= 10 else 3 if milliseconds >= 1 else 4
    return f"{milliseconds:,.{digits}f}"


def _timing_text(timing: Timing) -> str:
    """The median, with a mark if the device waited for the host."""
    return _ms_text(timing.median_ms) + (HOST_PACED if timing.host_paced else "")


def _explained(table: Table) -> Table:
    """With a line that says what the mark means, if it is there."""
    if any(HOST_PACED in str(cell) for column in table.columns for cell in column.cells):
        table.caption = f"{HOST_PACED.strip()} the device waited for the host: not the device's time alone"
        table.caption_justify = "left"
    return table


def _times_text(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.2f}×"
