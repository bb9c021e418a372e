"""Regions of the committed ablation plans."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from regions import results
from regions.results import ABLATIONS, read, required, table, wrapped
from sketch_walk.cli.ablate_report import body, header
from sketch_walk.evaluation.ablation import read_plan

# Plans beside benchmarks/ablations.json, and groups that were measured elsewhere than the others.
OTHER_PLANS = ("ablations_question.json",)
OTHER_ABLATIONS = {"question-block": "ablations_question_cpu.json", "decode": "ablations_decode_cpu.json"}


def ablation(group: str) -> str:
    """Region: one group of ablations: its picture, a table a length, and its machine if it is not that of the rest."""
    name = OTHER_ABLATIONS.get(group, ABLATIONS)
    data = read(name)
    entry = None if data is None else data["groups"].get(group)
    if data is None or entry is None:
        return f"Not measured in this checkout yet (`benchmarks/results/{name}`)."
    picture = results.IMAGES / Path(name).stem / f"{group}.png"
    parts = [wrapped(_ablation_setting(name, data["header"]))] if group in OTHER_ABLATIONS else []
    if picture.is_file():
        parts.append(f"![{entry['question']}]({picture.relative_to(results.PROJECT / 'docs').as_posix()})")
    # Seconds are no speed: rows were measured in processes side by side.
    left, last = (1, -1) if entry["measure"] == "prompt" else (2, None)
    for length, measured in sorted(entry["tokens"].items(), key=lambda item: int(item[0])):
        parts.append(wrapped(_ablation_samples(entry["measure"], int(length), measured["samples"])))
        rows = (row[:last] for row in body(entry, length))
        parts.append(table(("attention", *header(entry, length)[1:last]), rows, left=left))
    return "\n\n".join(parts)


def ablation_setting() -> str:
    """Region: the model and the machine of every group that does not name its own."""
    return wrapped(_ablation_setting(ABLATIONS, required(ABLATIONS)["header"]))


def _ablation_setting(name: str, made: dict[str, Any]) -> str:
    packages = [package for package in ("torch", "triton", "transformers") if made["versions"][package]]
    versions = ", ".join(f"{package} {made['versions'][package]}" for package in packages)
    return (
        f"{made['model'][0].upper()}{made['model'][1:]}, {made['dtype']}, {made['device']}, {versions}, "
        f"kernel `{made['kernel']}`. Source: `benchmarks/results/{name}`."
    )


def _ablation_samples(measure: str, tokens: int, samples: dict[str, Any]) -> str:
    first, last = samples["first_seed"], samples["first_seed"] + samples["samples"] - 1
    rest = (
        f"{samples['passages']} passages"
        if measure == "prompt"
        else f"{samples['texts']} continuations of {samples['new_tokens']} tokens"
    )
    if "text_sha256" in samples:
        rest += f" of a text (SHA-256 {samples['text_sha256']}...)"
    return f"{tokens:,} tokens, {samples['samples']} prompts per task (seeds {first} to {last}), {rest}:"


def ablation_regions() -> dict[str, Callable[[], str]]:
    """A region for each group of the committed plans."""
    plans = [read_plan(results.PROJECT / "benchmarks" / name) for name in ("ablations.json", *OTHER_PLANS)]
    return {f"ablation-{group.name}": partial(ablation, group.name) for plan in plans for group in plan.groups}
