"""Regions on quality: the yardstick, ablations of one knob, generated answers, presets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from regions.package import LENGTHS
from regions.results import (
    ANSWERS,
    BASE,
    EARLIER,
    EARLIER_TRITON,
    GENERATION,
    PLAIN,
    QUALITY,
    TASKS,
    Row,
    percent,
    read,
    required,
    standard_error,
    table,
    thousands,
    wrapped,
)
from sketch_walk.cli.format import bytes_text
from sketch_walk.complexity import LEAST_ADVISED_DENSITY, ModelShape, count_memory
from sketch_walk.config import PRESETS, SketchWalkConfig, causal_density

EARLIER_BASE = {"block_score": "mass", "walk": "damped", **BASE}
# What makes of today's rule the one of `PLAIN`: sub-blocks are means.
PLAIN_MEANS = {"salience": 0.0, "query_contrast": 1.0}


def precision_of(row: Row) -> str:
    """How a run's RoPE frequencies were kept: float32 or bfloat16."""
    return str(row["rope_frequencies"]).partition(" ")[0]


def compared(name: str) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """A quality file, and its runs by precision, dense first; a precision without a dense run is left out."""
    data = required(name)
    by_precision: dict[str, list[Row]] = {}
    for row in data["results"]:
        by_precision.setdefault(precision_of(row), []).append(row)
    return data, {
        precision: ordered(rows)
        for precision, rows in by_precision.items()
        if any(row["config"] == {"rule": "dense"} for row in rows)
    }


def quality() -> tuple[dict[str, Any], list[Row]]:
    """The quality file of today's rule, and its runs with dense beside them (of the precision with most runs)."""
    data, by_precision = compared(QUALITY)
    return data, max(by_precision.values(), key=len)


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
    text = "default"
    if fields_given.get("block_score") == "mass":
        del fields_given["block_score"]
        walk = fields_given.pop("walk")
        text = f"mass scores, {'no' if walk == 'none' else walk} walk"
    changed = {name: value for name, value in fields_given.items() if name not in BASE}
    return f"{text}, density {fields_given['density']}" + "".join(f", `{k}={v!r}`" for k, v in changed.items())


def ordered(rows: Iterable[Row]) -> list[Row]:
    """Dense first, then the default, its variations, and the published rules."""
    rank = {"dense": 0, None: 1, "icml": 2, "paper": 3}
    return sorted(rows, key=lambda row: (rank[row["config"].get("rule")], len(row["config"])))


def setting(data: dict[str, Any], name: str) -> str:
    """How a quality file was made."""
    prompts = f"{data['samples']} prompts per task, " if "samples" in data else ""
    return (
        f"{data['model']}, prompts of {data['tokens']:,} tokens, {prompts}sparse from layer "
        f"{data['skip_first_n_layers']} up, every call sparse (`dense_below=0`), kernels: {data['impl']}, "
        f"{data['device']}. Source: `benchmarks/results/{name}`."
    )


def frequencies(precision: str) -> str:
    """What a precision of the RoPE frequencies means."""
    return {"float32": "RoPE frequencies in float32, as saved", "bfloat16": "whole model cast to bfloat16"}[precision]


def quality_loss() -> str:
    """Region: today's rule minus dense, with the standard error that two independent samples would have."""
    data, rows = quality()
    dense, *sparse = rows
    body = []
    for row in sparse:
        cells = []
        for task in TASKS:
            pair = (row[task]["accuracy"], dense[task]["accuracy"])
            error = math.hypot(*(standard_error(accuracy, data["samples"]) for accuracy in pair))
            cells.append(f"{100 * (pair[0] - pair[1]):+.1f} ± {100 * error:.1f}")
        rise = row["prose_nll"] - dense["prose_nll"]
        body.append(
            [
                rule_name(row["config"]),
                percent(row["block_density"]),
                *cells,
                f"{rise:+.3f} ({percent(rise / dense['prose_nll'])})",
            ]
        )
    head = ("attention", "blocks read", *(f"{task}, points" for task in TASKS), "prose NLL, nats")
    return table(head, body)


def config_note(config: dict[str, Any], apart: Sequence[str] = ()) -> str:
    """A sentence when a file's config, the fields `apart` left out, is not today's default with `BASE`; else empty."""
    today = SketchWalkConfig(**BASE).to_dict()
    names = [name for name in today if name not in ("dense_below", *apart)]
    changed = [f"`{name}={config[name]!r}`" for name in names if name in config and config[name] != today[name]]
    absent = [f"`{name}`" for name in names if name not in config]
    parts = [f"with {', '.join(changed)}"] if changed else []
    if absent:
        parts.append(f"before there were {', '.join(absent)}")
    return f"**Measured with an earlier default**: {', and '.join(parts)}." if parts else ""


def quality_rows(rows: Iterable[Row], *extra: str) -> list[list[str]]:
    """Lines of a quality table; `extra` names fields of a run that come after its name."""
    return [
        [
            rule_name(row["config"]),
            *(str(row[name]) for name in extra),
            f"{row['block_density']:.3f}",
            *(f"{row[task]['accuracy']:.2f} / {row[task]['nll']:.2f}" for task in TASKS),
            f"{row['prose_nll']:.4f}",
        ]
        for row in rows
    ]


def quality_today() -> str:
    """Region: today's rule."""
    return table(("attention", "block density", *TASKS, "prose NLL"), quality_rows(quality()[1]))


def quality_earlier() -> str:
    """Region: the rules that came before, and the published ones, by precision."""
    data, by_precision = compared(EARLIER)
    parts = [wrapped(f"{data['what'][0].upper()}{data['what'][1:]}. {setting(data, EARLIER)}")]
    for precision in ("float32", "bfloat16"):
        head = (f"attention; {frequencies(precision)}", "block density", *TASKS, "prose NLL")
        parts.append(table(head, quality_rows(by_precision[precision])))
    return "\n\n".join(parts)


def quality_earlier_triton() -> str:
    """Region: the earlier rule through Triton kernels, with more prompts."""
    data, by_precision = compared(EARLIER_TRITON)
    head = ("prompts per task", "block density", *TASKS, "prose NLL")
    parts = [wrapped(setting(data, EARLIER_TRITON))]
    for precision in ("float32", "bfloat16"):
        rows = quality_rows(by_precision[precision], "samples")
        parts.append(table((f"attention; {frequencies(precision)}", *head), rows))
    return "\n\n".join(parts)


def generation() -> str:
    """Region: needle questions answered by generation."""
    data = read(GENERATION)
    if data is None:
        return wrapped(f"Not measured in this checkout yet (`benchmarks/results/{GENERATION}`).")
    tasks = tuple(data["results"][0]["right"])
    body = [
        [
            "dense" if row["mode"] == "dense" else rule_name(row["config"]),
            {"both": "prompt and steps", "prefill": "prompt", "decode": "steps"}.get(row["mode"], ""),
            f"{row['block_density']:.3f}",
            *(f"{row['right'][task]} of {row['of']}" for task in tasks),
            str(sum(row["right"].values())),
        ]
        for row in data["results"]
    ]
    text = (
        f"Right answers: {data['what']}, prompts of {data['tokens']:,} tokens, seeds {data['seeds']}; {data['model']}, "
        f"{data['device']}. {config_note(data['config'])} "
    ).strip() + f" Source: `benchmarks/results/{GENERATION}`."
    return wrapped(text) + "\n\n" + table(("attention", "sparse", "block density", *tasks, "all"), body, left=2)


def answers() -> str:
    """Region: answers given token by token, with and without a memory of steps."""
    data = read(ANSWERS)
    if data is None:
        return wrapped(f"Not measured in this checkout yet (`benchmarks/results/{ANSWERS}`).")
    texts = len(data["rows"]["dense"]["continuation_nll"])
    rows, means = data["rows"], data["summary"]
    tasks = tuple(rows["dense"]["hits"])
    body = []
    for name, row in rows.items():
        cells = []
        for task in tasks:
            apart = means[name][f"{task}_hits_against_dense_steps"]
            gap = "" if name == "dense" or name.endswith("dense steps") else f" ({100 * apart['mean']:+.1f})"
            cells += [f"{means[name][f'{task}_hits']['mean']:.3f}{gap}", f"{means[name][f'{task}_nll']['mean']:.3f}"]
        body.append(
            [
                name,
                *(
                    percent(row[part]) if row[part] is not None else "100 %"
                    for part in ("prefill_density", "decode_density")
                ),
                *cells,
                *([f"{means[name]['continuation_nll']['mean']:.3f}"] if texts else []),
            ]
        )
    samples = len(rows["dense"]["hits"][tasks[0]])
    errors = [100 * means["dense"][f"{task}_hits"]["standard_error"] for task in tasks]
    text = (
        f"{data['what'][0].upper()}{data['what'][1:]}: {data['model']}, {data['device']}, torch {data['torch']}, "
        f"transformers {data['transformers']}; {samples} prompts per task of "
        f"{', '.join(f'{n:,}' for n in data['tokens'])} tokens (standard error of a dense accuracy "
        f"{', '.join(f'{error:.1f}' for error in errors)} points)"
        + (f", {texts} continuations of {data['new_tokens']} tokens" if texts else "")
        + ". Accuracy, in brackets points against dense steps after the same prompts, and the NLL"
        + ("; last the NLL of dense's own continuation" if texts else "")
        + f". {config_note(data['config'])} "
    ).strip() + f" Source: `benchmarks/results/{ANSWERS}`."
    head = ("prompt: steps", "read by a prompt", "by a step", *(x for task in tasks for x in (task, "NLL")))
    head += ("prose",) if texts else ()
    return wrapped(text) + "\n\n" + table(head, body)


def quality_setting() -> str:
    """Region: how the quality file of today's rule was made."""
    data, (dense, *_) = quality()
    errors = ", ".join(
        f"{task} {100 * standard_error(dense[task]['accuracy'], data['samples']):.1f}"
        for task in TASKS
        if 0 < dense[task]["accuracy"] < 1
    )
    return wrapped(
        f"{setting(data, QUALITY)} RoPE frequencies: {dense['rope_frequencies']}. Versions: torch {data['torch']}, "
        f"triton {data['triton']}, transformers {data['transformers']}. Prose NLL: {data['prose_passages']} passages. "
        f"One standard error of the dense accuracies, in points: {errors}."
    )


def walk_finding() -> str:
    """Region: the damped walk beside one hop without a walk and dense, from every run that has the three."""
    body = []
    for name in (EARLIER, EARLIER_TRITON):
        data, by_precision = compared(name)
        for precision, rows in sorted(by_precision.items(), reverse=True):
            three = [
                next((row for row in rows if row["config"] == config), None)
                for config in (EARLIER_BASE, {**EARLIER_BASE, "walk": "none"}, {"rule": "dense"})
            ]
            walked, hop, dense = three
            if walked is None or hop is None or dense is None:
                continue
            accuracies = (
                " / ".join(f"{row[task]['accuracy']:.2f}" for row in (walked, hop, dense)) for task in TASKS[1:]
            )
            price = walked["prose_nll"] - hop["prose_nll"]
            prompts = str(walked.get("samples", data.get("samples")))
            body.append([f"{frequencies(precision)}; {data['impl']}", prompts, *accuracies, f"{price:+.4f}"])
    head = ("run", "prompts", *(f"{task}: walk / none / dense" for task in TASKS[1:]), "prose NLL, walk minus none")
    return table(head, body)


def knob_table(data: dict[str, Any], rows: Sequence[Row], base_config: dict[str, Any]) -> str:
    """One field changed at a time, beside dense and the base."""
    base = run_of(rows, **base_config)

    def line(name: str, row: Row) -> list[str]:
        scores = []
        for task in TASKS:
            accuracy = row[task]["accuracy"]
            prompts = round((accuracy - base[task]["accuracy"]) * data["samples"])
            scores.append(f"{accuracy:.2f} ({prompts:+d})")
        return [name, f"{row['block_density']:.3f}", *scores, f"{row['prose_nll']:.4f}"]

    body = [line("dense", run_of(rows, rule="dense")), line(rule_name(base["config"]), base)]
    for row in rows:
        changed = {k: v for k, v in row["config"].items() if base_config.get(k, ...) != v}
        if "rule" not in changed and changed:
            body.append(line(", ".join(f"`{k}={v!r}`" for k, v in changed.items()), row))
    head = ("changed field", "block density", *(f"{task}, accuracy (prompts)" for task in TASKS), "prose NLL")
    return table(head, body)


def knobs() -> str:
    """Region: fields of today's rule; plain means come from a file of their own."""
    data, rows = quality()
    means = run_of(_plain_runs(rows[0]), **BASE, **PLAIN_MEANS)
    text = f"{data['samples']} prompts per task. Sources: `benchmarks/results/{QUALITY}`, `benchmarks/results/{PLAIN}`."
    return wrapped(text) + "\n\n" + knob_table(data, [*rows, means], BASE)


def _plain_runs(dense: Row) -> list[Row]:
    """Runs of `PLAIN` that share prompts and precision with today's, whose dense run is `dense`."""
    data, by_precision = compared(PLAIN)
    rows = by_precision[precision_of(dense)]
    assert data["seeds"] == required(QUALITY)["seeds"]
    assert run_of(rows, rule="dense") == dense, f"{PLAIN} asked other prompts"
    return rows


def pooling() -> str:
    """Region: plain means of sub-blocks against the default's pooling, the same prompts."""
    data, rows = quality()
    dense, *_ = rows
    body = [["dense", "1.000", *(f"{dense[task]['accuracy']:.2f}" for task in TASKS), f"{dense['prose_nll']:.4f}"]]
    for means in _plain_runs(dense):
        config = {name: value for name, value in means["config"].items() if name not in PLAIN_MEANS}
        if "rule" in config:
            continue
        salient = run_of(rows, **config)
        cells = []
        for task in TASKS:
            before, after = means[task]["accuracy"], salient[task]["accuracy"]
            cells.append(f"{before:.2f} / {after:.2f} ({round((after - before) * data['samples']):+d})")
        change = salient["prose_nll"] - means["prose_nll"]
        losses = f"{means['prose_nll']:.4f} / {salient['prose_nll']:.4f} ({change:+.4f})"
        body.append([rule_name(config), f"{salient['block_density']:.3f}", *cells, losses])
    text = (
        f"Plain means (`salience=0, query_contrast=1`) / the default; in brackets prompts of {data['samples']}, and "
        f"nats. {setting(data, QUALITY)[:-1]} and `benchmarks/results/{PLAIN}`, which asked the same prompts."
    )
    return wrapped(text) + "\n\n" + table(("attention", "block density", *TASKS, "prose NLL"), body)


def knobs_earlier() -> str:
    """Region: fields of the rule that came before."""
    data, by_precision = compared(EARLIER)
    text = f"{data['samples']} prompts per task, {frequencies('float32')}."
    return wrapped(text) + "\n\n" + knob_table(data, by_precision["float32"], EARLIER_BASE)


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
