"""Regions on the selector's stages, and on quality against its time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from regions import results
from regions.package import SMOLLM2
from regions.quality import config_note
from regions.results import (
    ABLATIONS,
    SELECTOR,
    SELECTOR_CALLS,
    STEP_FIELDS,
    Row,
    holds,
    percent,
    put_inside,
    read,
    required,
    table,
    thousands,
    wrapped,
)
from sketch_walk.cli.ablate_report import TASK_NAMES
from sketch_walk.plots import Point, plot_quality_against_time

# Of benchmarks/gpu_curve.py, and the prompts whose quality stands beside its times.
CURVE, CURVE_PROMPT = "gpu_curve.json", "4000"
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
# The launch of a step's peaks that the kernels take by themselves; a prompt's row names its own.
STEP_LAUNCH = "peaks, 256 sub-keys, 2 warps, 2 stages, 128 registers"
LAUNCH = "launch"
# What that script times; the last came later, and is of the step after a prompt.
LOOK = "look_back"
PROMPT_STAGES = {
    "sketch_keys": "sketch of keys",
    "sketch_queries": "sketch of queries",
    "unpack": "unpacking of codes",
    LAUNCH: "peaks",
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


def gpu_selector() -> str:
    """Region: stages of the selector as the kernels run by themselves, then other ways to launch them."""
    data = required(SELECTOR)
    checked = "checked in the same run" if data["checks"] else "timed without a check in this run"
    text = (
        f"Milliseconds of device time: {data['what']}; {checked}. {data['device']}, torch {data['torch']}, triton "
        f"{data['triton']}. Source: `benchmarks/results/{SELECTOR}`."
    )
    first = data["prefill"][0]
    stages = {name: text for name, text in PROMPT_STAGES.items() if name in (LAUNCH, *first["ms"])}
    looks = [LOOK] if LOOK in first["ms"] else []
    prompts, steps = [], []
    for row in data["prefill"]:
        ms = {**row["ms"], LAUNCH: row["ms"][row[LAUNCH]]}
        whole = sum(ms[name] for name in SELECTOR_CALLS)
        times = (f"{value:.2f}" for value in (*(ms[name] for name in stages), whole, *(ms[name] for name in looks)))
        prompts.append([f"{row['tokens']:,}", str(row["block_size"]), *times])
    for row in data["decode"]:
        times = (f"{row['graph_ms'][name]:.4f}" for name in STEP_STAGES)
        steps.append([str(row["batch"]), f"{row['tokens']:,}", str(row["block_size"]), *times])
    head = (
        "tokens",
        "block",
        *stages.values(),
        "keys, scores and selection",
        *(["first step: look back"] if looks else []),
    )
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
    """Time of each launch variant, a column for each row, what runs in bold; one that failed shows its error."""
    body = []
    for name in rows[0][times]:
        if name.startswith(starts):
            cells = []
            for row in rows:
                value = row[times][name]
                cell = value if isinstance(value, str) else f"{value:.{digits}f}"
                cells.append(f"**{cell}**" if name == row.get(LAUNCH, STEP_LAUNCH) else cell)
            body.append([name.removeprefix("peaks, "), *cells])
    batches = [f"batch {row['batch']}, " if "batch" in row else "" for row in rows]
    sizes = [f"{row['tokens']:,} tokens, block {row['block_size']}" for row in rows]
    return table((call, *map("".join, zip(batches, sizes, strict=True))), body)


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
        f"{config_note(data['config'], ('sketch_dim', *STEP_FIELDS))} Sources: `benchmarks/results/{CURVE}`, "
        f"`benchmarks/results/{ABLATIONS}`."
    )
    head = (
        "setting", *CURVE_STAGES.values(), "selector in one call",
        *(f"of the attention at {row['density']:g}" for row in attention),
        *(f"{TASK_NAMES[task]}: accuracy / NLL" for task in tasks), "prose NLL",
    )  # fmt: skip
    picture = f"![{CURVE_TITLE}]({results.CURVE_PICTURE.relative_to(results.PROJECT / 'docs').as_posix()})"
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
    return default is None or holds(results.CURVE_PICTURE, [series, default])


def draw_curve() -> None:
    """Draw the picture of `selector_curve`, with its points as text inside the file."""
    series, default = curve_points()
    assert default is not None
    data, dense = required(CURVE), _curve_dense(required(ABLATIONS))["prose_nll"]["mean"]
    plot_quality_against_time(
        results.CURVE_PICTURE,
        series,
        default=default,
        apart=(CURVE_APART,),
        dense=dense,
        xlabel=f"selector of one layer, milliseconds at {thousands(data['tokens'])} tokens, {data['device']}",
        ylabel=f"prose NLL at {int(CURVE_PROMPT):,} tokens, nats",
        title=CURVE_TITLE,
    )
    put_inside(results.CURVE_PICTURE, [series, default])
