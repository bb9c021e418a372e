"""Files of benchmarks/results and how tables and texts are made of them."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
RESULTS = PROJECT / "benchmarks" / "results"
IMAGES = PROJECT / "docs" / "images"
ABLATIONS = "ablations_smollm2.json"
# Under today's rule, and under the rules that came before it.
QUALITY, PLAIN = "yardstick_smollm2_4k.json", "yardstick_smollm2_4k_plain.json"
EARLIER, EARLIER_TRITON = "yardstick_smollm2_4k_mass.json", "yardstick_smollm2_4k_mass_triton.json"
SPEED, DECODE, GENERATION = "cpu_prompt.json", "cpu_decode.json", "cpu_generation.json"
ANSWERS = "answers_smollm2.json"
# Fields of a config that say nothing to a prompt.
STEP_FIELDS = ("step_memory", "step_ahead", "step_across")
GPU_CUTE, MEMORY, SELECTOR = "gpu_cute.json", "gpu_memory.json", "gpu_selector.json"
# What a prompt's selector is made of there.
SELECTOR_CALLS = ("sketch_keys", "call_scores", "select")
# Of `sketch-walk bench attention`.
PREFILL, TRITON, STEP = "gpu_prefill.json", "gpu_prefill_triton.json", "gpu_decode.json"
SHORT, SHORT_GRAPH = "gpu_short.json", "gpu_short_graph.json"
CROSS, EAGER = "gpu_cross.json", "gpu_eager.json"
# Of `sketch-walk bench model`, and of benchmarks/gpu_million.py.
TTFT, MODEL_STEP, MILLION = "gpu_ttft.json", "gpu_step.json", "gpu_million.json"
SPEED_UP_PICTURE = IMAGES / "gpu" / "speed-up-of-a-prompt.png"
CURVE_PICTURE = IMAGES / "gpu" / "quality-against-selector-time.png"
TASKS = ("noise", "essay", "mk4")
# The run that most tables compare with: the defaults at a fifth of the blocks.
BASE = {"density": 0.2, "min_blocks": 4}
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


def required(name: str) -> dict[str, Any]:
    """A result file that must be there."""
    data = read(name)
    assert data is not None, f"{RESULTS / name} is missing"
    return data


def standard_error(accuracy: float, samples: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / samples)


def wrapped(text: str) -> str:
    """`text` in lines of at most 120 characters."""
    return textwrap.fill(text, width=120, break_on_hyphens=False, break_long_words=False)


def holds(path: Path, curves: Any) -> bool:
    """Whether a picture is there and has these curves inside."""
    from PIL import Image

    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return bool(picture.info.get("curves") == json.dumps(curves))


def put_inside(path: Path, curves: Any) -> None:
    """Write the curves of a picture into it, as text."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    inside = PngInfo()
    inside.add_text("curves", json.dumps(curves))
    with Image.open(path) as picture:
        picture.save(path, pnginfo=inside, dpi=picture.info["dpi"])
