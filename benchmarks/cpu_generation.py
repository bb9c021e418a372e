"""Answers that SmolLM2 generates to needle questions: dense, sparse prompts, sparse decode steps, and a dense tail.

    python benchmarks/cpu_generation.py --out benchmarks/results/cpu_generation.json

Teacher-forced scores hand the answer's own queries to the selection of the prompt's last block, which helps them find
the needle; here the model has to find it before it has written a digit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from sketch_walk import SketchWalkConfig, causal_density
from sketch_walk.evaluation import evaluate
from sketch_walk.evaluation.runner import EvaluationResult
from sketch_walk.integrations.models import load
from sketch_walk.integrations.transformers import enable

TASKS = ("noise", "multi_key", "prose")
BASE: dict[str, Any] = {"density": 0.2, "min_blocks": 4, "dense_below": 0}
RUNS: list[tuple[dict[str, Any] | None, str]] = [
    (None, "dense"),
    (BASE, "both"),
    (BASE, "prefill"),
    (BASE, "decode"),
    ({**BASE, "dense_tail_blocks": 1}, "both"),
    ({**BASE, "dense_tail_blocks": 4}, "both"),
    ({**BASE, "density": 0.1, "dense_tail_blocks": 1}, "both"),
    ({**BASE, "density": 0.1, "dense_tail_blocks": 4}, "both"),
]


def score(result: EvaluationResult) -> dict[str, Any]:
    """Right answers per task."""
    right = Counter(sample.task for sample in result.samples if sample.generated_correctly)
    return {"right": {task: right[task] for task in TASKS}, "of": len(result.samples) // len(TASKS)}


def main() -> None:
    """Run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    # Not a whole number of blocks, as prompts are; the answer then begins in the question's block.
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out holds already")
    args = parser.parse_args()
    known = json.loads(args.out.read_text(encoding="utf-8"))["results"] if args.resume and args.out.exists() else []
    loaded = load()
    rows: list[dict[str, Any]] = []
    for fields, mode in tqdm(RUNS):
        config = fields or {"rule": "dense"}
        same = [row for row in known if row["config"] == config and row["mode"] == mode]
        if same:
            rows += same
            continue
        settings: dict[str, Any] = {
            "tasks": TASKS,
            "lengths": (args.tokens,),
            "samples": args.samples,
            "generate": True,
            "progress": False,
        }
        begin = time.perf_counter()
        density = 1.0
        if fields is not None and mode != "decode":
            density = causal_density(args.tokens, SketchWalkConfig(**fields))
        if fields is None:
            result = evaluate(loaded.model, loaded.tokenizer, **settings)
        else:
            with enable(loaded.model, SketchWalkConfig(**fields), mode=mode):
                result = evaluate(loaded.model, loaded.tokenizer, **settings)
        row = {
            "config": config,
            "mode": mode,
            **score(result),
            "block_density": round(density, 4),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        print(row)
        rows.append(row)
    record = {
        "what": "needle questions answered by greedy generation",
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "tokens": args.tokens,
        "seeds": f"0-{args.samples - 1}",
        "command": "python benchmarks/cpu_generation.py " + " ".join(sys.argv[1:]),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": SketchWalkConfig(**BASE).to_dict(),
        "block_density_note": "of the prompt, counted from the budgets at that length; sparse layers only",
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
