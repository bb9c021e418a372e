"""Rewrite the generated regions of README.md and docs/*.md from benchmarks/results and from the package.

    python docs/generate.py            rewrite
    python docs/generate.py --check    say which pages are stale, exit 1 if any

A region lies between ``<!-- generated: NAME -->`` and ``<!-- end -->``; NAME is a function in `REGIONS`. The pictures
of times on a GPU are drawn anew when their curves are no longer those of the results.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from regions import results
from regions.ablations import ablation_regions, ablation_setting
from regions.aims import gpu_aims, gpu_summary, quality_aims, step_aims
from regions.cpu import cpu_decode, crossover, speed
from regions.gpu import (
    draw_speed_up,
    gpu_cross,
    gpu_cute,
    gpu_decode,
    gpu_dense,
    gpu_eager,
    gpu_prefill,
    gpu_prefill_triton,
    gpu_short,
    speed_up_is_drawn,
)
from regions.memory import gpu_memory
from regions.models import gpu_million, gpu_step, gpu_ttft
from regions.package import commands, config_fields, state_bytes, state_promise, state_walk
from regions.quality import (
    answers,
    generation,
    knobs,
    knobs_earlier,
    pooling,
    preset_costs,
    presets,
    quality_earlier,
    quality_earlier_triton,
    quality_loss,
    quality_setting,
    quality_today,
    walk_finding,
)
from regions.readme import readme_results
from regions.selector import curve_is_drawn, draw_curve, gpu_selector, selector_curve

REGION = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
REGIONS: dict[str, Callable[[], str]] = {
    **ablation_regions(),
    "ablation-setting": ablation_setting,
    "selector-curve": selector_curve,
    "readme-results": readme_results,
    "speed": speed,
    "quality": quality_today,
    "quality-loss": quality_loss,
    "quality-setting": quality_setting,
    "quality-earlier": quality_earlier,
    "quality-earlier-triton": quality_earlier_triton,
    "gpu-cute": gpu_cute,
    "gpu-dense": gpu_dense,
    "gpu-prefill": gpu_prefill,
    "gpu-prefill-triton": gpu_prefill_triton,
    "gpu-decode": gpu_decode,
    "gpu-selector": gpu_selector,
    "gpu-short": gpu_short,
    "gpu-cross": gpu_cross,
    "gpu-eager": gpu_eager,
    "gpu-ttft": gpu_ttft,
    "gpu-step": gpu_step,
    "gpu-million": gpu_million,
    "gpu-summary": gpu_summary,
    "gpu-aims": gpu_aims,
    "quality-aims": quality_aims,
    "step-aims": step_aims,
    "gpu-memory": gpu_memory,
    "cpu-decode": cpu_decode,
    "generation": generation,
    "answers": answers,
    "walk-finding": walk_finding,
    "pooling": pooling,
    "knobs": knobs,
    "knobs-earlier": knobs_earlier,
    "presets": presets,
    "preset-costs": preset_costs,
    "config-fields": config_fields,
    "state-bytes": state_bytes,
    "state-walk": state_walk,
    "state-promise": state_promise,
    "crossover": crossover,
    "commands": commands,
}


def pages() -> list[Path]:
    """Every page that may hold regions."""
    return [results.PROJECT / "README.md", *sorted((results.PROJECT / "docs").glob("*.md"))]


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
        print(f"{page.relative_to(results.PROJECT)}: {'stale; run make docs' if check else 'rewritten'}")
    for picture, is_drawn, draw in (
        (results.SPEED_UP_PICTURE, speed_up_is_drawn, draw_speed_up),
        (results.CURVE_PICTURE, curve_is_drawn, draw_curve),
    ):
        if is_drawn():
            continue
        stale += 1
        if not check:
            draw()
        print(f"{picture.relative_to(results.IMAGES)}: {'stale; run make docs' if check else 'drawn'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
