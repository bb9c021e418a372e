"""Tables and pictures of ablations, from their summaries: for a terminal, for a page, as PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from sketch_walk.cli.format import percent_text
from sketch_walk.plots import Panel, Point, plot_panels

TASK_NAMES = {"noise": "needle in repeated text", "prose": "needle in prose", "multi_key": "one of four needles"}
MODE_NAMES = {"both": "prompt and steps", "prefill": "prompt", "decode": "steps", "dense": ""}
# Other figures than the tasks', and how a table and a picture call them.
PROMPT_FIGURES = {"prose_nll": "prose NLL, nats"}
DECODE_FIGURES = {"continuation_nll": "NLL of dense's continuation", "agreement": "tokens agreed"}

Entry = dict[str, Any]


def header(entry: Entry, length: str) -> list[str]:
    """Columns of a group's table at one length."""
    tasks = [TASK_NAMES[task] for task in entry["tokens"][length]["samples"]["tasks"]]
    answers = [name for task in tasks for name in (f"{task}: accuracy / NLL", "points over dense")]
    if entry["measure"] == "prompt":
        return ["", "blocks read", "pairs read", *answers, "prose NLL", "over dense", "s"]
    tail = ("points over dense steps", "NLL of dense's continuation", "tokens agreed", "agreed before a difference")
    return ["", "sparse", "blocks read, prompt / steps", *answers, *tail]


def body(entry: Entry, length: str) -> Iterator[list[str]]:
    """Cells of a group's rows at one length; dense first. A row without figures says why in its second cell."""
    width = len(header(entry, length))
    samples = entry["tokens"][length]["samples"]
    for row in entry["tokens"][length]["rows"]:
        if "error" in row:
            yield [row["label"], row["error"], *[""] * (width - 2)]
            continue
        for mode, part in row["modes"].items():
            figures = part["figures"]
            answers = [cell for task in samples["tasks"] for cell in _answer(figures, task)]
            if entry["measure"] == "prompt":
                densities = [percent_text(part.get(name)) for name in ("block_density", "pair_density")]
                prose = figures.get("prose_nll")
                nll = [f"{prose['mean']:.4f}", _over(prose, 1, 4)] if prose else ["-", "-"]
                yield [row["label"], *densities, *answers, *nll, f"{row['seconds']:.1f}"]
            else:
                yield [row["label"], MODE_NAMES[mode], _two_densities(part), *answers, *_steps(part, samples["tasks"])]


def _answer(figures: dict[str, Any], task: str) -> tuple[str, str]:
    accuracy = figures[f"accuracy:{task}"]
    return f"{accuracy['mean']:.2f} / {figures[f'nll:{task}']['mean']:.2f}", _over(accuracy, 100, 1)


def _over(figure: dict[str, Any], factor: float, digits: int) -> str:
    """A paired difference and its interval; nothing for dense itself."""
    return _interval(figure["difference"], factor, digits) if "difference" in figure else ""


def _interval(difference: dict[str, float], factor: float, digits: int) -> str:
    mean, low, high = (f"{factor * difference[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _two_densities(part: dict[str, Any]) -> str:
    return " / ".join(percent_text(part.get(name)) for name in ("prefill_density", "decode_density"))


def _steps(part: dict[str, Any], tasks: Sequence[str]) -> Iterator[str]:
    over = part.get("over_prefill")
    yield "" if over is None else ", ".join(_interval(over[f"accuracy:{task}"], 100, 1) for task in tasks)
    figures = part["figures"]
    if "continuation_nll" not in figures:
        yield from ("-", "-", "-")
        return
    yield f"{figures['continuation_nll']['mean']:.4f}"
    yield percent_text(figures["agreement"]["mean"])
    yield f"{figures['agreed_tokens']['mean']:.0f}"


def tables(groups: dict[str, Entry]) -> Iterator[Table]:
    """One table for each group and length."""
    for name, entry in groups.items():
        for length in entry["tokens"]:
            samples = entry["tokens"][length]["samples"]
            first, last = samples["first_seed"], samples["first_seed"] + samples["samples"] - 1
            table = Table(
                title=f"{name}, {int(length):,} tokens, seeds {first} to {last}", box=SIMPLE, padding=(0, 1, 0, 0)
            )
            for i, column in enumerate(header(entry, length)):
                table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
            for cells in body(entry, length):
                table.add_row(*map(escape, cells))
            yield table


def draw(folder: Path, groups: dict[str, Entry]) -> list[Path]:
    """One PNG a group that has measured rows, named after it; a row of panels for each length."""
    files = []
    for name, entry in groups.items():
        figures = _drawn_figures(entry)
        panels = [panel for length in entry["tokens"] for panel in _panels(entry, length, figures)]
        if panels:
            files.append(folder / f"{name}.png")
            xlabel = "blocks read" if entry["field"] == "density" else entry["field"]
            plot_panels(files[-1], panels, columns=len(figures), xlabel=xlabel, title=entry["question"])
    return files


def _drawn_figures(entry: Entry) -> dict[str, tuple[str, str]]:
    """Title and quantity by figure: those that the first measured row of every length has."""
    named: dict[str, tuple[str, str]] = {}
    rest = PROMPT_FIGURES if entry["measure"] == "prompt" else DECODE_FIGURES
    for by_length in entry["tokens"].values():
        found = next((row for row in by_length["rows"] if "modes" in row and row["label"] != "dense"), None)
        have = set() if found is None else set(next(iter(found["modes"].values()))["figures"])
        tasks = by_length["samples"]["tasks"]
        named |= {f"accuracy:{t}": (TASK_NAMES[t], "accuracy") for t in tasks if f"accuracy:{t}" in have}
        named |= {name: (text, text) for name, text in rest.items() if name in have}
    return named


def _panels(entry: Entry, length: str, figures: dict[str, tuple[str, str]]) -> list[Panel]:
    rows = [row for row in entry["tokens"][length]["rows"] if "modes" in row]
    dense: dict[str, Any] = next((row["modes"]["dense"]["figures"] for row in rows if "dense" in row["modes"]), {})
    sparse = [row for row in rows if "dense" not in row["modes"]]
    panels = []
    for name, (title, quantity) in figures.items():
        series: dict[str, list[Point]] = {}
        for row in sparse:
            for mode, part in row["modes"].items():
                if name in part["figures"]:
                    parts = [row["series"], MODE_NAMES[mode] if entry["measure"] == "decode" else ""]
                    line = ", ".join(text for text in parts if text)
                    series.setdefault(line, []).append(_point(entry, row, part, part["figures"][name]))
        if series:
            level = dense[name]["mean"] if name in dense else None
            panels.append(Panel(f"{title}, {int(length):,} tokens", quantity, series, level))
    # A length that lacks a figure would shift the columns of the next.
    return panels if len(panels) == len(figures) else []


def _point(entry: Entry, row: Entry, part: dict[str, Any], figure: dict[str, Any]) -> Point:
    value = row["value"]
    if entry["field"] == "density":
        names = ("block_density", "prefill_density", "decode_density")
        value = next((part[name] for name in names if part.get(name) is not None), None)
    x = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    mean, difference = figure["mean"], figure.get("difference")
    if difference is None:
        return Point(row["label"], x, mean)
    center = mean - difference["mean"]
    return Point(row["label"], x, mean, center + difference["low"], center + difference["high"])
