"""Regions on one layer on a GPU: prompts, steps, dense kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from regions import results
from regions.quality import config_note, quality
from regions.results import (
    CROSS,
    EAGER,
    GPU_CUTE,
    MODEL_STEP,
    PREFILL,
    QUALITY,
    SHORT,
    SHORT_GRAPH,
    STEP,
    STEP_FIELDS,
    TRITON,
    Row,
    holds,
    percent,
    put_inside,
    required,
    table,
    wrapped,
)
from sketch_walk import kernels
from sketch_walk.config import SketchWalkConfig, causal_density
from sketch_walk.kernels import flash_cute
from sketch_walk.kernels.dense import FASTEST_FROM
from sketch_walk.plots import Curve, plot_speed_up_against_length

# Files that time decode steps.
DECODED = (STEP, EAGER, MODEL_STEP)
DENSE_NAMES = {"sdpa-flash": "SDPA flash", "sdpa-cudnn": "SDPA cuDNN", "flash-attn-4": "flash-attn-4"}
# The kernels of `impl="cute"` were timed at this shape on this GPU (major compute capability).
HEAD_DIM, GROUP, CAPABILITY = 128, 4, 9
SPEED_UP_TITLE = "One layer's prompt with its selector"


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
    repeats, rounds = data["options"]["repeats"], data["options"].get("rounds", 1)
    of_all = f", {repeats} in each of {rounds} rounds" if rounds > 1 else ""
    return "a single run of each" if repeats * rounds == 1 else f"medians of {repeats * rounds}{of_all}"


def default_note(data: dict[str, Any], name: str) -> str:
    """A sentence when a bench file was made with another default; else empty."""
    # Fields that a row of such a file sets, and the sketch of the full head dimension.
    apart = ["block_size", "density", "min_blocks", "sketch_dim"]
    if name not in DECODED:
        # A prompt has no steps that remember.
        apart += STEP_FIELDS
    return config_note(data["config"], apart)


def bench_notes(data: dict[str, Any], name: str) -> str:
    """What the rows of a bench file do not say: quality, another default, and the file."""
    timed = [(row["block_size"], row["density"]) for row in data["results"] if row["kind"] in ("layer", "model")]
    note = default_note(data, name)
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
    return wrapped(text) + "\n\n" + layer_table(data, "step", 4)


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
    picture = f"![{SPEED_UP_TITLE}]({results.SPEED_UP_PICTURE.relative_to(results.PROJECT / 'docs').as_posix()})"
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
    return holds(results.SPEED_UP_PICTURE, speed_up_curves())


def draw_speed_up() -> None:
    """Draw the picture of `gpu_cross`, with its curves as text inside the file."""
    curves = speed_up_curves()
    plot_speed_up_against_length(
        results.SPEED_UP_PICTURE,
        curves,
        over="the fastest dense kernel",
        title=f"{SPEED_UP_TITLE}, {required(PREFILL)['device']}",
    )
    put_inside(results.SPEED_UP_PICTURE, curves)


def _longer(row: Row) -> float:
    """Milliseconds of a call for which host and device wait for one another."""
    return float(max(row["median_ms"], row["host_ms"]))


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
                *(cell for name in baselines for cell in (quartiles(dense[name]), f"{dense[name]['host_ms']:.3f}")),
                quartiles(row),
                f"{row['host_ms']:.3f}",
                f"{min(map(_longer, dense.values())) / _longer(row):.2f}×",
                "" if graph is None else f"{graph['median_ms']:.3f}",
            ]
        )
    text = (
        f"Milliseconds of one layer's decode step out of a CUDA graph, on the device with quartiles in brackets, and "
        f"what the host takes to enqueue it: a program that does not get ahead of the device takes the longer of both, "
        f"{bench_setting(data, EAGER)} The last column is from `benchmarks/results/{STEP}`, another run."
    )
    head = (
        "batch", "tokens", "block", "block density",
        *(cell for name in baselines for cell in (DENSE_NAMES[name], "host")), "step", "host",
        "dense / step, the longer of each", "the step in a CUDA graph",
    )  # fmt: skip
    automatic = f"The automatic path is dense below {kernels.DECODE_CROSSOVER['cuda']:,} cached tokens."
    return "\n\n".join([wrapped(text), table(head, body, left=0), automatic])
