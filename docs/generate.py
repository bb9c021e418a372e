"""Rewrite the generated regions of README.md and docs/*.md from benchmarks/results and from the package.

    python docs/generate.py            rewrite
    python docs/generate.py --check    say which pages are stale, exit 1 if any

A region lies between ``<!-- generated: NAME -->`` and ``<!-- end -->``; NAME is a function in `REGIONS`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from typer import Context

from sketch_walk import kernels
from sketch_walk.bench.memory import founding_bytes
from sketch_walk.cli.app import app
from sketch_walk.cli.format import bytes_text
from sketch_walk.complexity import LEAST_ADVISED_DENSITY, PROMISED_STATE_BYTES, ModelShape, count_memory
from sketch_walk.config import PRESETS, SketchWalkConfig, causal_density

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "benchmarks" / "results"
QUALITY, SPEED = "yardstick_smollm2_4k.json", "cpu_prompt.json"
MEMORY = "gpu_memory.json"
QUALITY_TRITON, GPU_LAYER, DECODE = "yardstick_smollm2_4k_triton.json", "gpu_layer.json", "cpu_decode.json"
TASKS = ("noise", "essay", "mk4")
LENGTHS = (4096, 32_768, 131_072)
README_LENGTHS = (1024, 2048, 4096, 8000)
SMOLLM2 = ModelShape(layers=30, heads=9, kv_heads=3, head_dim=64)
# The run that most tables compare with: the defaults at a fifth of the blocks.
BASE = {"density": 0.2, "min_blocks": 4}
REGION = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; columns from `left` on are right aligned."""
    rule = [" --- " if i < left else " ---: " for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(rule) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(fraction: float) -> str:
    return f"{fraction:.1%}".replace("%", " %")


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def read(name: str) -> dict[str, Any] | None:
    """A result file, or None where it is not there."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def quality(precision: str = "float32") -> tuple[dict[str, Any], list[Row]]:
    """The quality file, and its runs whose RoPE frequencies were kept in `precision`."""
    data = read(QUALITY)
    assert data is not None, f"{RESULTS / QUALITY} is missing"
    return data, [row for row in data["results"] if row["rope_frequencies"].startswith(precision)]


def run_of(rows: Iterable[Row], **config: Any) -> Row:
    """The one run with exactly this config."""
    (row,) = (row for row in rows if row["config"] == config)
    return row


def rule_name(config: dict[str, Any]) -> str:
    """A run's name in a table."""
    fields_given = dict(config)
    rule = fields_given.pop("rule", None)
    if rule == "dense":
        return "dense"
    if rule == "icml":
        return "`SketchWalkConfig.icml()`"
    if rule == "paper":
        written = "" if fields_given.pop("normalise", True) else "normalise=False"
        return f"`SketchWalkConfig.paper({written})`, density {fields_given['density']}"
    changed = {name: value for name, value in fields_given.items() if name not in BASE}
    text = f"default, density {fields_given['density']}"
    return text + "".join(f", `{name}={value!r}`" for name, value in changed.items())


def ordered(rows: Iterable[Row]) -> list[Row]:
    """Dense first, then the default, its variations, and the published rules."""
    rank = {"dense": 0, None: 1, "icml": 2, "paper": 3}
    return sorted(rows, key=lambda row: (rank[row["config"].get("rule")], len(row["config"])))


def standard_error(accuracy: float, samples: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / samples)


def wrapped(text: str) -> str:
    """`text` in lines of at most 120 characters."""
    return textwrap.fill(text, width=120, break_on_hyphens=False, break_long_words=False)


def setting(data: dict[str, Any]) -> str:
    """How the quality file was made."""
    return (
        f"{data['model']}, prompts of {data['tokens']:,} tokens, {data['samples']} prompts per task, sparse from layer "
        f"{data['skip_first_n_layers']} up, every call sparse (`dense_below=0`), {data['impl']} kernel, "
        f"{data['device']}. Source: `benchmarks/results/{QUALITY}`."
    )


def readme_results() -> str:
    """Region: ours and the paper's rule with dense beside them, then the speed on a CPU."""
    data, rows = quality()
    dense = run_of(rows, rule="dense")
    shown = [
        run_of(rows, **BASE),
        run_of(rows, **BASE, dense_tail_blocks=1),
        run_of(rows, **BASE, walk="none"),
        run_of(rows, rule="paper", normalise=False, **BASE),
    ]
    body = [
        [
            rule_name(row["config"]),
            percent(row["block_density"]),
            *(f"{row[task]['accuracy']:.2f} ({dense[task]['accuracy']:.2f})" for task in TASKS),
            f"{row['prose_nll']:.3f} ({dense['prose_nll']:.3f})",
        ]
        for row in shown
    ]
    needles = (f"one needle in {text}" for text in ("repeated text", "prose"))
    head = ("attention", "blocks read", *needles, "one of four needles", "prose NLL, nats")
    error = standard_error(dense["essay"]["accuracy"], data["samples"])
    text = (
        f"Quality, dense attention in brackets. {setting(data)} RoPE frequencies in float32. One standard error of the "
        f"prose needles is about {100 * error:.0f} points."
    )
    return "\n\n".join([wrapped(text), table(head, body), speed_table(README_LENGTHS)])


def speed_table(lengths: Sequence[int] | None = None) -> str:
    """Time of prompts on a CPU, with density and accuracy of the same setting; a sentence while it is unmeasured."""
    data = read(SPEED)
    if data is None:
        return f"Speed on a CPU: not measured in this checkout yet (`benchmarks/results/{SPEED}`)."
    _, rows = quality()
    dense = run_of(rows, rule="dense")["essay"]["accuracy"]
    sparse = run_of(rows, **BASE)["essay"]["accuracy"]
    same = all(data["config"][name] == value for name, value in BASE.items())
    accuracy = (
        f"Prose needles at 4,000 tokens with this setting: {sparse:.2f}, dense {dense:.2f} (`{QUALITY}`)."
        if same
        else "The accuracy of this setting is not measured."
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


def quality_table(precision: str) -> str:
    """All runs of one precision, dense first."""
    _, rows = quality(precision)
    body = [
        [
            rule_name(row["config"]),
            f"{row['block_density']:.3f}",
            *(f"{row[task]['accuracy']:.2f} / {row[task]['nll']:.2f}" for task in TASKS),
            f"{row['prose_nll']:.4f}",
        ]
        for row in ordered(rows)
    ]
    return table(("attention", "block density", *TASKS, "prose NLL"), body)


def quality_float32() -> str:
    """Region: the runs with RoPE frequencies in float32."""
    return quality_table("float32")


def quality_bfloat16() -> str:
    """Region: the runs with the whole model cast to bfloat16."""
    return quality_table("bfloat16")


def quality_triton() -> str:
    """Region: the same questions through the Triton kernels, with more prompts."""
    data = read(QUALITY_TRITON)
    assert data is not None, f"{RESULTS / QUALITY_TRITON} is missing"
    body = [
        [
            rule_name(row["config"]),
            row["rope_frequencies"].split(" ")[0],
            str(row["samples"]),
            f"{row['block_density']:.3f}",
            *(f"{row[task]['accuracy']:.2f} / {row[task]['nll']:.2f}" for task in TASKS),
            f"{row['prose_nll']:.4f}",
        ]
        for row in data["results"]
    ]
    source = f"Source: `benchmarks/results/{QUALITY_TRITON}`."
    text = f"Kernel: {data['impl']}, triton {data['triton']}, {data['device']}. {source}"
    head = ("attention", "RoPE frequencies", "prompts per task", "block density", *TASKS, "prose NLL")
    return wrapped(text) + "\n\n" + table(head, body, left=2)


def gpu_layer() -> str:
    """Region: one layer's prefill on a GPU, selector included."""
    data = read(GPU_LAYER)
    assert data is not None, f"{RESULTS / GPU_LAYER} is missing"
    body = [
        [
            f"{row['tokens']:,}",
            str(row["block_size"]),
            f"{row['block_density']:.3f}",
            f"{row['layer_ms']:.1f}",
            f"{row['stages_ms']['sketch_keys'] + row['stages_ms']['scores']:.1f}",
            f"{row['stages_ms']['attend']:.1f}",
            f"{row['flash_ms']:.1f}",
            f"{row['cudnn_ms']:.1f}",
            f"{row['over_flash']:.2f}×",
            f"{row['over_fastest_dense']:.2f}×",
        ]
        for row in data["results"]
    ]
    text = (
        f"Milliseconds of device time: {data['what']}. {data['device']}, torch {data['torch']}, "
        f"triton {data['triton']}; medians of {data['repeats']}. Random tensors: no accuracy belongs to these rows; "
        "that of the same settings on a small real model is in the [validation report](validation-report.md). "
        f"Source: `benchmarks/results/{GPU_LAYER}`."
    )
    head = (
        "tokens", "block", "block density", "layer", "sketch and scores", "attention", "SDPA flash", "SDPA cuDNN",
        "over flash", "over the faster dense",
    )  # fmt: skip
    return wrapped(text) + "\n\n" + table(head, body, left=0)


def gpu_memory() -> str:
    """Region: bytes of one layer, beside the founding document's estimates; a sentence while it is unmeasured."""
    data = read(MEMORY)
    if data is None:
        return wrapped(
            f"Not measured in this checkout yet (`benchmarks/results/{MEMORY}`); "
            "[Benchmarks](bench.md#memory) has the command."
        )
    shape, versions = data["shape"], data["versions"]
    text = (
        f"Bytes of one layer and one sequence, {shape['heads']}/{shape['kv_heads']} heads x {shape['head_dim']}, "
        f"{data['dtype']}; {data['device']}, torch {versions['torch']}. `{data['command']}`. "
        f"Source: `benchmarks/results/{MEMORY}`."
    )
    rows = [row for row in data["results"] if "peak_bytes" in row]
    parts = [wrapped(text), "### Estimate and truth, after a prompt", _founding_table(rows), "### Peak of one call"]
    return "\n\n".join([*parts, _peak_table(rows)])


def _founding_table(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row["kind"] != "layer" or row["phase"] != "prefill":
            continue
        state, estimate = row["state_bytes"], founding_bytes(row["tokens"])
        pairs = (
            (estimate["qkv"], row["qkv_bytes"]),
            (estimate["block_means"] + estimate["sketches"], state["keys"]),
            (estimate["walk"], state["rows"] + row["walk_bytes"]),
        )
        cells = [f"{bytes_text(promised)} / {bytes_text(real)}" for promised, real in pairs]
        share = percent(row["state_share"])
        body.append([f"{row['tokens']:,}", str(row["block_size"]), *cells, bytes_text(state["queries"]), share])
    head = ("Q, K and V", "block means and sketches", "walk", "recent queries", "state, of the KV cache")
    return table(("tokens", "block", *head), body, left=0)


def _peak_table(rows: Sequence[Row]) -> str:
    body = [
        [
            row["phase"],
            row["method"] if row.get("impl", row["method"]) == row["method"] else f"{row['method']} ({row['impl']})",
            row["kind"],
            f"{row['tokens']:,}",
            str(row.get("block_size", "")),
            bytes_text(row["peak_bytes"]),
            bytes_text(row["output_bytes"]),
            bytes_text(sum(row.get("state_bytes", {}).values())),
        ]
        for row in rows
    ]
    head = ("phase", "method", "what", "tokens", "block", "peak above the inputs", "output", "state")
    return table(head, body, left=3)


def cpu_decode() -> str:
    """Region: a decode step of one layer on a CPU."""
    data = read(DECODE)
    assert data is not None, f"{RESULTS / DECODE} is missing"
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
        f"Source: `benchmarks/results/{DECODE}`."
    )
    head = ("cached tokens", "dense", "sparse", "dense / sparse", "block density")
    return wrapped(text) + "\n\n" + table(head, body, left=0)


def quality_setting() -> str:
    """Region: how the quality file was made."""
    data, rows = quality()
    dense = run_of(rows, rule="dense")
    errors = ", ".join(
        f"{task} {100 * standard_error(dense[task]['accuracy'], data['samples']):.1f}"
        for task in TASKS
        if 0 < dense[task]["accuracy"] < 1
    )
    return wrapped(
        f"{setting(data)} Versions: torch {data['torch']}, transformers {data['transformers']}. Prose NLL: "
        f"{data['prose_passages']} passages. One standard error of the dense accuracies, in points: {errors}."
    )


def walk_finding() -> str:
    """Region: the default, one hop and dense on prose needles, in both precisions."""
    body = []
    for precision, name in (("float32", "float32, as saved"), ("bfloat16", "bfloat16, whole model cast")):
        _, rows = quality(precision)
        runs = (run_of(rows, **BASE), run_of(rows, **BASE, walk="none"), run_of(rows, rule="dense"))
        body.append([name, *(f"{run['essay']['accuracy']:.2f}" for run in runs), f"{runs[0]['block_density']:.3f}"])
    head = ("RoPE frequencies", "default walk", 'one hop, `walk="none"`', "dense", "block density of the sparse two")
    return table(head, body)


def knobs() -> str:
    """Region: one field changed at a time."""
    data, rows = quality()
    base, dense = run_of(rows, **BASE), run_of(rows, rule="dense")

    def line(name: str, row: Row) -> list[str]:
        scores = []
        for task in TASKS:
            accuracy = row[task]["accuracy"]
            prompts = round((accuracy - base[task]["accuracy"]) * data["samples"])
            scores.append(f"{accuracy:.2f} ({prompts:+d})")
        return [name, f"{row['block_density']:.3f}", *scores, f"{row['prose_nll']:.4f}"]

    body = [line("dense", dense), line("default, density 0.2, min_blocks 4", base)]
    for row in rows:
        changed = {k: v for k, v in row["config"].items() if k not in BASE}
        if "rule" not in changed and changed:
            body.append(line(", ".join(f"`{k}={v!r}`" for k, v in changed.items()), row))
    head = ("changed field", "block density", *(f"{task}, accuracy (prompts)" for task in TASKS), "prose NLL")
    return table(head, body)


def presets() -> str:
    """Region: the promised four numbers, and the blocks that each preset reads."""
    body = []
    for name, config in PRESETS.items():
        numbers = (config.block_size, config.sketch_dim, config.top_k_blocks, f"{config.sparsity_exponent:g}")
        body.append([f"`{name}`", *map(str, numbers), *(_density_text(config, tokens) for tokens in LENGTHS)])
    by_density = SketchWalkConfig(**BASE)
    numbers = (by_density.block_size, by_density.sketch_dim, "-", f"{by_density.sparsity_exponent:g}")
    body.append(["`density=0.2, min_blocks=4`", *map(str, numbers), *(_density_text(by_density, n) for n in LENGTHS)])
    head = ("preset", "block", "sketch dim", "top blocks", "exponent", *(f"read at {thousands(n)}" for n in LENGTHS))
    note = f"**Bold**: below {LEAST_ADVISED_DENSITY:.0%}".replace("%", " %") + ", where retrieval is likely to fail."
    return f"{table(head, body)}\n\n{note}"


def preset_costs() -> str:
    """Region: what each preset costs for Llama-3.1-8B."""
    body = []
    for name, config in PRESETS.items():
        memory = [count_memory(n, config, ModelShape()) for n in LENGTHS]
        last = [config.budget(n // config.block_size) * config.block_size for n in LENGTHS]
        body.append(
            [f"`{name}`", f"{max(last):,}", *(f"{bytes_text(m.state)} ({percent(m.state_share)})" for m in memory)]
        )
    return table(("preset", "tokens a late query reads", *(f"state at {thousands(n)}" for n in LENGTHS)), body)


def _density_text(config: SketchWalkConfig, tokens: int) -> str:
    share = causal_density(tokens, config)
    return f"**{percent(share)}**" if share < LEAST_ADVISED_DENSITY else percent(share)


def config_fields() -> str:
    """Region: every field with its default and its docstring."""
    described = dict(_described_fields(inspect.getdoc(SketchWalkConfig) or ""))
    body = []
    for entry in fields(SketchWalkConfig):
        kind, text = described[entry.name]
        default = str(entry.default) if entry.name == "walk_state_dtype" else repr(entry.default)
        body.append([f"`{entry.name}`", f"`{kind}`".replace("|", "\\|"), f"`{default}`", text])
    return table(("field", "type", "default", "meaning"), body, left=4)


def _described_fields(doc: str) -> Iterable[tuple[str, tuple[str, str]]]:
    """(field, (type, meaning)) of a NumPy docstring's Parameters."""
    section = doc.partition("Parameters\n----------\n")[2].partition("\n\nRaises")[0]
    for entry in re.split(r"\n(?=\S)", section):
        head, _, text = entry.partition("\n")
        names, _, kind = head.partition(" : ")
        meaning = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
        for name in names.split(", "):
            yield name, (kind, meaning)


def state_bytes() -> str:
    """Region: the selector's state by length, two model shapes."""
    body = []
    for label, shape in (("Llama-3.1-8B", ModelShape()), ("SmolLM2-135M", SMOLLM2)):
        for tokens in (1024, 4096, 32_768, 65_536, 131_072):
            memory = count_memory(tokens, SketchWalkConfig(), shape)
            body.append(
                [
                    label,
                    f"{tokens:,}",
                    *map(bytes_text, (memory.key_sketches, memory.transition_rows, memory.query_ring, memory.state)),
                    percent(memory.state_share),
                ]
            )
    parts = ("key sketches", "transition rows", "ring", "together")
    return table(("model shape, 16 bits", "tokens", *parts, "share of the KV cache"), body)


def state_promise() -> str:
    """Region: the promised size of the state beside the counted one."""
    memory = count_memory(65_536, SketchWalkConfig(), ModelShape())
    without = count_memory(65_536, SketchWalkConfig(walk="none"), ModelShape())
    return wrapped(
        f"At 65,536 tokens the founding document estimates {bytes_text(PROMISED_STATE_BYTES)} for one layer. For the "
        f"shape of Llama-3.1-8B the default keeps {bytes_text(memory.state)} ({percent(memory.state_share)} of the "
        f'layer\'s KV cache), and `walk="none"` {bytes_text(without.state)} ({percent(without.state_share)}).'
    )


def crossover() -> str:
    """Region: below which length calls run dense."""
    tables = {
        "prompt (several tokens)": kernels.PREFILL_CROSSOVER,
        "decode step (one token)": kernels.DECODE_CROSSOVER,
    }
    body = [[name, device, f"{tokens:,}"] for name, by_device in tables.items() for device, tokens in by_device.items()]
    return table(("call", "device", "dense below, tokens"), body, left=2)


def commands() -> str:
    """Region: the commands with their options."""
    parts = []
    grouped = [
        (f"{group.name} ", command)
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
    ]
    for prefix, command in [*(("", command) for command in app.registered_commands), *grouped]:
        callback = command.callback
        assert callback is not None
        hints = typing.get_type_hints(callback, include_extras=True)
        rows = []
        for name, parameter in inspect.signature(callback).parameters.items():
            hint = hints[name]
            if hint is Context:
                continue
            if not hasattr(hint, "__metadata__"):  # Python 3.10 wraps an option that defaults to None.
                hint = typing.get_args(hint)[0]
            kind, option = typing.get_args(hint)
            given = [text for text in (option.default, *(option.param_decls or ())) if isinstance(text, str)]
            spelled = given or [f"--{name.replace('_', '-')}"]
            rows.append([", ".join(f"`{s}`" for s in spelled), _kind(kind), _default(parameter.default), option.help])
        parts.append(f"## sketch-walk {prefix}{callback.__name__}\n\n{inspect.getdoc(callback)}")
        if rows:
            parts.append(table(("option", "value", "default", "meaning"), rows, left=4))
    return "\n\n".join(parts)


def _kind(annotation: Any) -> str:
    kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    return {"bool": "flag", "Path": "path", "str": "text"}.get(kinds[0].__name__, kinds[0].__name__)


def _default(value: Any) -> str:
    return "" if value is None or value is False else f"`{value}`"


REGIONS: dict[str, Callable[[], str]] = {
    "readme-results": readme_results,
    "speed": speed,
    "quality-float32": quality_float32,
    "quality-bfloat16": quality_bfloat16,
    "quality-setting": quality_setting,
    "quality-triton": quality_triton,
    "gpu-layer": gpu_layer,
    "gpu-memory": gpu_memory,
    "cpu-decode": cpu_decode,
    "walk-finding": walk_finding,
    "knobs": knobs,
    "presets": presets,
    "preset-costs": preset_costs,
    "config-fields": config_fields,
    "state-bytes": state_bytes,
    "state-promise": state_promise,
    "crossover": crossover,
    "commands": commands,
}


def pages() -> list[Path]:
    """Every page that may hold regions."""
    return [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """`text` with its regions made anew.

    Raises
    ------
    KeyError
        For a region that no function makes.
    """
    return REGION.sub(lambda match: f"{match[1]}\n{REGIONS[match[2]]()}\n\n{match[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is stale")
    check = parser.parse_args(arguments).check
    stale = 0
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if new == old:
            continue
        stale += 1
        if not check:
            page.write_text(new, encoding="utf-8")
        print(f"{page.relative_to(PROJECT)}: {'stale; run make docs' if check else 'rewritten'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
