"""Answers given token by token: sparse prompts with dense steps and with sparse steps, with and without a memory.

    python benchmarks/answers.py --out benchmarks/results/answers_smollm2.json

A step's query is one token, so that nothing of the answer helps a prompt's last block to choose. Prompts of several
lengths end at several places of their last block. Every row is paired, sample by sample, with dense steps after the
same prompts. Lengths may be measured in processes of their own, and `--merge` joins their files; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from sketch_walk import SketchWalkConfig
from sketch_walk.evaluation.decode import (
    DecodeScores,
    DecodeWay,
    DenseDecode,
    make_decode_workload,
    measure_dense_decode,
    measure_ways,
)
from sketch_walk.evaluation.statistics import mean_of, paired_difference
from sketch_walk.integrations.models import load

TASKS = ("prose", "multi_key")
DENSE = "dense"
BASE: dict[str, Any] = {"min_blocks": 4, "dense_below": 0}
# Ways to take the steps: name, what it changes, which calls are sparse. Dense steps come first: the others are held to
# them.
WAYS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("dense steps", {}, "prefill"),
    ("sparse steps", {}, "both"),
    ("sparse steps without a memory", {"step_memory": 0.0}, "both"),
)
# With `--parts`: the memory without one of its parts.
PARTS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("sparse steps, layers apart", {"step_across": 0.0}, "both"),
    ("sparse steps, nothing ahead", {"step_ahead": 0.0}, "both"),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "0.2": {"density": 0.2},
    "0.2, tail of 4": {"density": 0.2, "dense_tail_blocks": 4},
    "0.1, tail of 4": {"density": 0.1, "dense_tail_blocks": 4},
    "0.2, blocks of 128, tail of 2": {"density": 0.2, "block_size": 128, "dense_tail_blocks": 2},
    "dense prompt, 0.2": {"density": 0.2},
}


def ways_of(setting: str, parts: bool) -> dict[str, DecodeWay]:
    """The rows of a setting. Dense steps after dense prompts are dense, which is a row of its own."""
    config, dense = SketchWalkConfig(**BASE, **SETTINGS[setting]), setting.startswith("dense prompt")
    return {
        f"{setting}: {name}": DecodeWay("decode" if dense else mode, replace(config, **changes))
        for name, changes, mode in (*WAYS[dense:], *(PARTS if parts else ()))
    }


def joined(parts: list[DecodeScores]) -> dict[str, Any]:
    """Outcomes of one row over all lengths, as lists in the order of the lengths."""
    return {
        "hits": {task: [x for part in parts for x in part.hits[task]] for task in TASKS},
        "nll": {task: [round(x, 5) for part in parts for x in part.nll[task]] for task in TASKS},
        "continuation_nll": [round(x, 5) for part in parts for x in part.continuation_nll],
        "agreement": [round(x, 4) for part in parts for x in part.agreement],
        "prefill_density": parts[0].prefill_density,
        "decode_density": parts[0].decode_density,
        "impls": parts[0].impls,
    }


def measure(
    lengths: list[int], samples: int, texts: int, new_tokens: int, names: list[str], parts: bool
) -> Iterator[dict[str, Any]]:
    """The rows of the named settings that have every length: after each setting of the last one, so that a run which is
    cut leaves those.
    """
    loaded = load()
    device, rows = next(loaded.model.parameters()).device, dict[str, list[DecodeScores]]()
    about = {
        "what": f"needle answers{' and dense continuations' if texts else ''}, one call per token",
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "tokens": lengths,
        "seeds": f"0-{samples - 1} of each length",
        "new_tokens": new_tokens,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": SketchWalkConfig(**BASE, density=0.2).to_dict(),
    }
    settings = [name for name in names if name != DENSE]
    # Steps are held to dense's own continuations, where there are any.
    with_dense = DENSE in names or texts > 0
    with tqdm(total=len(lengths) * (len(settings) + with_dense)) as bar:
        for tokens in lengths:
            workload = make_decode_workload(
                loaded.tokenizer, tokens, tasks=TASKS, samples=samples, texts=texts, new_tokens=new_tokens
            )
            dense = DenseDecode(DecodeScores(), [])
            if with_dense:
                dense = measure_dense_decode(loaded.model, workload)
                rows.setdefault(DENSE, []).append(dense.scores)
                bar.update()
            for name in settings:
                config = SketchWalkConfig(**BASE, **SETTINGS[name])
                for row, scores in measure_ways(loaded.model, workload, dense, config, ways_of(name, parts)).items():
                    rows.setdefault(row, []).append(scores)
                bar.update()
                whole = {row: joined(found) for row, found in rows.items() if len(found) == len(lengths)}
                if whole:
                    yield {**about, "rows": whole}
    if not settings:
        yield {**about, "rows": {DENSE: joined(rows[DENSE])}}


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Records of several lengths as one."""
    whole = records[0]
    for record in records[1:]:
        whole["tokens"] += record["tokens"]
        for name, row in record["rows"].items():
            mine = whole["rows"][name]
            for field in ("hits", "nll"):
                for task in TASKS:
                    mine[field][task] += row[field][task]
            for field in ("continuation_nll", "agreement"):
                mine[field] += row[field]
    whole["command"] = "; ".join(record["command"] for record in records)
    return whole


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means of every row, and what dense steps do to it."""
    result = {}
    for name, row in rows.items():
        base = rows.get(f"{name.partition(': ')[0]}: {WAYS[0][0]}", rows.get(DENSE))
        result[name] = {
            **{f"{task}_hits": mean_of(row["hits"][task])._asdict() for task in TASKS},
            **{f"{task}_nll": mean_of(row["nll"][task])._asdict() for task in TASKS},
            **{
                f"{task}_hits_against_dense_steps": paired_difference(row["hits"][task], base["hits"][task])._asdict()
                for task in TASKS
                if base
            },
            "continuation_nll": mean_of(row["continuation_nll"])._asdict() if row["continuation_nll"] else None,
            "agreement": mean_of(row["agreement"])._asdict() if row["agreement"] else None,
        }
    return result


def main() -> None:
    """Measure or join, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", default="3944,3952,3960,3968,3976,3984,3992,4000")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    names = [*SETTINGS, DENSE]
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="SETTING", help=", ".join(names))
    parser.add_argument("--parts", action="store_true", help="also with layers apart, and with nothing ahead")
    parser.add_argument("--merge", type=Path, nargs="*", help="files of earlier runs to join instead of measuring")
    args = parser.parse_args()
    if args.merge:
        records = iter([merged([json.loads(path.read_text(encoding="utf-8")) for path in args.merge])])
    else:
        lengths, command = [int(x) for x in args.tokens.split(",")], shlex.join(sys.argv[1:])
        found = measure(lengths, args.samples, args.texts, args.new_tokens, args.settings, args.parts)
        records = ({**record, "command": f"python benchmarks/answers.py {command}"} for record in found)
    for record in records:
        record["summary"] = summary(record["rows"])
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, row in record["summary"].items():
        figures = [f"{row[f'{task}_hits']['mean']:.3f} / {row[f'{task}_nll']['mean']:.3f}" for task in TASKS]
        print(
            f"{name:55s}",
            *figures,
            "" if row["continuation_nll"] is None else round(row["continuation_nll"]["mean"], 3),
        )
    print(json.dumps(record["summary"]))


if __name__ == "__main__":
    main()
