"""Time of a SmolLM2 prompt on a CPU: dense SDPA, sparse, and the automatic choice, interleaved in one process.

    OMP_NUM_THREADS=2 python benchmarks/cpu_prompt.py --out benchmarks/results/cpu_prompt.json

Each repeat runs dense, sparse, automatic and dense again, so that a drift of the machine's speed meets all of them;
ratios are medians over repeats, each against the mean of its two dense runs. Sparse output at full budget is checked
against dense first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sketch_walk import SketchWalkConfig, kernels
from sketch_walk.evaluation.prose import prose
from sketch_walk.integrations.models import load
from sketch_walk.integrations.transformers import NAME, enable

LENGTHS = (64, 256, 512, 1024, 1536, 2048, 3072, 4096, 6000, 8000)


class LayerClock:
    """Wraps an attention function and sums its time per layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds: dict[int, float] = {}

    def __call__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = self.function(module, *args, **kwargs)
        layer = int(module.layer_idx)
        self.seconds[layer] = self.seconds.get(layer, 0.0) + time.perf_counter() - begin
        return result


def timed_prompt(model: PreTrainedModel, ids: torch.Tensor, name: str, skipped: int) -> tuple[float, float]:
    """Seconds of one prompt with a fresh cache, and the share of the attention of layers from `skipped` up."""
    original = ALL_ATTENTION_FUNCTIONS[name]
    clock = LayerClock(original)
    ALL_ATTENTION_FUNCTIONS.register(name, clock)
    try:
        begin = time.perf_counter()
        with torch.no_grad():
            model.model(ids, use_cache=True)
        total = time.perf_counter() - begin
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, original)
    return total, sum(seconds for layer, seconds in clock.seconds.items() if layer >= skipped)


def check(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Relative error of the logits at full budget against dense; fails when it is above bfloat16's own noise."""
    with torch.no_grad():
        dense = model(ids).logits.float()
        with enable(model, SketchWalkConfig(density=1.0, dense_below=0)):
            full = model(ids).logits.float()
    error = (dense - full).norm().item() / dense.norm().item()
    assert error < 2e-2, f"full-budget output differs from dense by {error:.3g}"
    return error


def measure(model: PreTrainedModel, ids: torch.Tensor, config: SketchWalkConfig, repeats: int) -> dict[str, Any]:
    """Medians and ratios at one length."""
    automatic = SketchWalkConfig.from_dict({**config.to_dict(), "dense_below": None})
    times: dict[str, list[tuple[float, float]]] = {"dense": [], "sparse": [], "automatic": []}
    density = None
    for repeat in range(repeats + 1):
        dense = timed_prompt(model, ids, "sdpa", config.skip_first_n_layers)
        with enable(model, config):
            sparse = timed_prompt(model, ids, NAME, config.skip_first_n_layers)
        with enable(model, automatic):
            auto = timed_prompt(model, ids, NAME, config.skip_first_n_layers)
        again = timed_prompt(model, ids, "sdpa", config.skip_first_n_layers)
        dense = ((dense[0] + again[0]) / 2, (dense[1] + again[1]) / 2)
        if repeat:
            for key, value in (("dense", dense), ("sparse", sparse), ("automatic", auto)):
                times[key].append(value)
    with enable(model, config, record=True) as handle:
        timed_prompt(model, ids, NAME, config.skip_first_n_layers)
        density = handle.summary()
    row: dict[str, Any] = {"tokens": ids.shape[1], "repeats": repeats}
    for key, values in times.items():
        row[f"{key}_seconds"] = round(statistics.median(v[0] for v in values), 4)
        row[f"{key}_attention_seconds"] = round(statistics.median(v[1] for v in values), 4)
    for key in ("sparse", "automatic"):
        ratios = [d[0] / v[0] for d, v in zip(times["dense"], times[key], strict=True)]
        row[f"{key}_speedup"] = round(statistics.median(ratios), 3)
        row[f"{key}_speedup_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    layers = [d[1] / v[1] for d, v in zip(times["dense"], times["sparse"], strict=True)]
    row["sparse_attention_speedup"] = round(statistics.median(layers), 3)
    row["sparse_attention_speedup_range"] = [round(min(layers), 3), round(max(layers), 3)]
    row["block_density"] = round(density["block_density"], 4)
    row["pair_density"] = round(density["pair_density"], 4)
    return row


def main() -> None:
    """Run the benchmark and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    args = parser.parse_args()
    model, tokenizer = load(None, dtype=torch.bfloat16, device="cpu")
    config = SketchWalkConfig(density=args.density, min_blocks=4, dense_below=0)
    text = tokenizer(prose(seed=0, characters=max(args.lengths) * 8))["input_ids"]
    error = check(model, torch.tensor([text[:700]]))
    rows = []
    for length in tqdm(args.lengths, unit="length"):
        repeats = args.repeats * (10 if length <= 512 else 4 if length <= 1536 else 1)
        rows.append(measure(model, torch.tensor([text[:length]]), config, repeats))
    table = Table("tokens", "dense s", "sparse ×", "automatic ×", "sparse layers' attention ×", "block density")
    for row in rows:
        table.add_row(
            str(row["tokens"]),
            f"{row['dense_seconds']:.2f}",
            f"{row['sparse_speedup']:.2f}",
            f"{row['automatic_speedup']:.2f}",
            f"{row['sparse_attention_speedup']:.2f}",
            f"{row['block_density']:.3f}",
        )
    Console(stderr=True).print(table)
    result = {
        "what": "prompt of SmolLM2-135M-Instruct, bfloat16, fresh cache; speed-ups over dense SDPA",
        "command": "python benchmarks/cpu_prompt.py " + " ".join(sys.argv[1:]),
        "device": f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": config.to_dict(),
        "crossover_tokens": kernels.dense_crossover("cpu"),
        "full_budget_relative_error": round(error, 5),
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
