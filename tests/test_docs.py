"""The documentation: tables that are current, links that lead somewhere, code that runs, tests that exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sketch_walk import SketchWalkConfig, causal_density
from sketch_walk.complexity import ModelShape
from sketch_walk.sketch import payload_size
from sketch_walk.state import LayerSketch

PROJECT = Path(__file__).parents[1]
PAGES = [
    *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((PROJECT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

generate = pytest.importorskip("generate", reason="not a checkout")
regions = pytest.importorskip("regions")
stored = pytest.importorskip("regions.results")


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT))


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as the site makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def python_blocks(page: Path) -> Iterator[str]:
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            yield code


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_regions_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- generated:") == len(generate.REGION.findall(text)), "a region has no end"
    assert generate.filled(text) == text, "stale: run `make docs`"


def test_every_region_is_used() -> None:
    used = {name for page in PAGES for _, name, _ in generate.REGION.findall(page.read_text(encoding="utf-8"))}
    assert used == set(generate.REGIONS)


def test_stale_pages_are_noticed_and_rewritten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- generated: crossover -->\nold\n<!-- end -->\nb\n", encoding="utf-8")
    monkeypatch.setattr(stored, "PROJECT", tmp_path)
    assert generate.main(["--check"]) == 1
    assert "old" in page.read_text(encoding="utf-8")
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert "old" not in page.read_text(encoding="utf-8")
    assert capsys.readouterr().out == "README.md: stale; run make docs\nREADME.md: rewritten\n"


def test_speed_table_waits_for_its_file_and_shows_density_and_accuracy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quality = (stored.RESULTS / stored.QUALITY).read_text(encoding="utf-8")
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    (tmp_path / stored.QUALITY).write_text(quality, encoding="utf-8")
    assert "not measured in this checkout" in regions.cpu.speed()
    row: dict[str, Any] = {"dense_seconds": 4.0, "sparse_seconds": 2.0, "block_density": 0.22}
    row |= {f"{key}_speedup": 2.0 for key in ("sparse", "automatic", "sparse_attention")}
    record = {
        "what": "a prompt",
        "device": "a CPU",
        "torch": "2",
        "config": SketchWalkConfig(density=0.2, min_blocks=4, dense_below=0).to_dict(),
        "crossover_tokens": 2048,
        "results": [{"tokens": tokens, **row} for tokens in (64, 4096)],
    }
    (tmp_path / stored.SPEED).write_text(json.dumps(record), encoding="utf-8")
    text = regions.cpu.speed()
    assert "| 64 | 4.00 s | 2.00 s | 2.00× | 2.00× | 2.00× | 22.0 % |" in text
    assert re.search(r"with this setting: 0\.\d\d, dense 0\.\d\d", " ".join(text.split()))
    assert "| 64 |" not in regions.cpu.speed_table((4096,))
    assert "earlier default" not in text
    record["config"] = {**record["config"], "walk": "damped"}
    del record["config"]["query_keep"]
    (tmp_path / stored.SPEED).write_text(json.dumps(record), encoding="utf-8")
    text = " ".join(regions.cpu.speed().split())
    assert "**Measured with an earlier default**: with `walk='damped'`, and before there were `query_keep`." in text
    assert "No accuracy of today's default belongs to these times." in text
    assert "with this setting" not in text


def test_runs_without_a_dense_one_beside_them_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(precision: str, nll: float, **config: Any) -> dict[str, Any]:
        scores = {task: {"accuracy": 0.5, "nll": 0.5} for task in stored.TASKS}
        return {"config": config, "rope_frequencies": precision, "block_density": 0.2, "prose_nll": nll, **scores}

    runs = [
        run("float32 (as saved)", 3.5, **stored.BASE),
        run("bfloat16 (cast)", 3.25, **stored.BASE),
    ]
    runs.append(run("bfloat16 (cast)", 3.0, rule="dense"))
    record = {"samples": 100, "results": runs}
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    (tmp_path / stored.QUALITY).write_text(json.dumps(record), encoding="utf-8")
    table = regions.quality.quality_today()
    assert "3.2500" in table
    assert "3.0000" in table
    assert "3.5000" not in table
    # Two errors of 5 points each, and a quarter of a nat above 3.
    assert "| +0.0 ± 7.1 | +0.0 ± 7.1 | +0.0 ± 7.1 | +0.250 (8.3 %) |" in regions.quality.quality_loss()


def test_attention_on_a_gpu_shows_every_case_for_both_kernels() -> None:
    data = stored.required(stored.GPU_CUTE)
    cases = {(row["tokens"], row["block_size"], row["density"]) for row in data["sparse"]}
    lines = [line for line in regions.gpu.gpu_cute().splitlines() if line.endswith("× |")]
    assert sum("`triton`" in line for line in lines) == sum("`cute`" in line for line in lines) == len(cases)
    for line in lines:
        tokens, *_, ms, _, over_flash, over_fastest = [cell.strip(" ×") for cell in line.strip("|").split("|")]
        (dense,) = (row for row in data["dense"] if f"{row['tokens']:,}" == tokens)
        fastest = min(value for name, value in dense.items() if name.endswith("_ms") and "first" not in name)
        assert float(over_flash) == pytest.approx(dense["flash_ms"] / float(ms), rel=0.01)
        assert float(over_fastest) == pytest.approx(fastest / float(ms), rel=0.01)


def cells_of(text: str) -> list[list[str]]:
    """Cells of the rows of every table in `text`, headings among them."""
    return [[cell.strip(" *×%") for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]


def test_a_layer_on_a_gpu_is_divided_by_what_was_timed_beside_it() -> None:
    files = {
        "gpu-prefill": stored.PREFILL,
        "gpu-decode": stored.STEP,
        "gpu-prefill-triton": stored.TRITON,
    }
    for region, name in files.items():
        data = stored.required(name)
        rows = cells_of(generate.REGIONS[region]())[2:]
        layers = [row for row in data["results"] if row["kind"] == "layer"]
        assert len(rows) == len(layers) > 0
        steps = region == "gpu-decode"
        for cells, layer in zip(rows, layers, strict=True):
            assert (cells.pop(0) if steps else "1") == str(layer["batch"])
            assert cells[:2] == [f"{layer['tokens']:,}", str(layer["block_size"])]
            assert float(cells[2]) == pytest.approx(layer["block_density"], abs=6e-4)
            *dense, attention, own, share, over_flash = map(float, cells[3 : len(data["options"]["baselines"]) + 7])
            case = [layer[name] for name in ("batch", "tokens", "block_size", "density")]
            (alone,) = (
                row["median_ms"]
                for row in data["results"]
                if row["kind"] == "attention" and [row[x] for x in ("batch", "tokens", "block_size", "density")] == case
            )
            assert own == pytest.approx(layer["median_ms"], rel=0.01)
            # A step's has two digits.
            assert attention == pytest.approx(alone, rel=0.03)
            assert share == pytest.approx(100 * (layer["median_ms"] / alone - 1), abs=0.51)
            assert over_flash == pytest.approx(dense[0] / own, rel=0.02)
            if len(dense) > 1:
                assert float(cells[-1]) == pytest.approx(min(dense) / own, rel=0.02)
    assert len(cells_of(regions.gpu.gpu_readme())) == len(cells_of(regions.gpu.gpu_prefill()))


def cells_after(text: str) -> list[list[str]]:
    """Rows of the first table in `text`, without its heading."""
    return cells_of("\n".join(line for line in text.partition("| --")[2].partition("\n\n")[0].splitlines()[1:]))


@pytest.mark.parametrize(
    ("region", "name", "unit"), [("gpu-ttft", "TTFT", 1e3), ("gpu-step", "MODEL_STEP", 1.0)], ids=["ttft", "step"]
)
def test_a_whole_model_stands_beside_the_dense_times_of_its_run(region: str, name: str, unit: float) -> None:
    data = stored.required(getattr(stored, name))
    text = generate.REGIONS[region]()
    models = [row for row in data["results"] if row["kind"] == "model"]
    rows = cells_after(text)
    assert len(rows) == len(models) > 0
    for cells, row in zip(rows, models, strict=True):
        batch, tokens, block, density, *times, ran, over_flash, over_fastest = cells
        assert (batch, tokens, block) == (str(row["batch"]), f"{row['tokens']:,}", str(row["block_size"]))
        assert float(density) == pytest.approx(row["block_density"], abs=6e-4)
        *dense, own = map(float, times)
        assert len(dense) == len(data["options"]["baselines"]) > 1
        assert own * unit == pytest.approx(row["median_ms"], rel=0.01)
        assert float(over_flash) == pytest.approx(dense[0] / own, abs=0.02)
        assert float(over_fastest) == pytest.approx(min(dense) / own, abs=0.02)
        assert set(ran.split(", ")) == set(row["impl"].split("+"))
    flat = " ".join(text.split())
    assert "Random weights: no accuracy belongs to these rows." in flat
    assert f"`{stored.QUALITY}`" in flat
    readme = " ".join(regions.models.model_readme().split())
    assert all(f"{row['over_fastest_dense']:.2f}×" in readme for row in models)


def test_layers_around_the_crossovers_stand_beside_the_fastest_dense_kernel() -> None:
    rows = cells_after(generate.REGIONS["gpu-cross"]())
    layers = [row for row in stored.required(stored.CROSS)["results"] if row["kind"] == "layer"]
    assert len(rows) == len(layers) > 0
    for cells, row in zip(rows, layers, strict=True):
        fastest, own = (
            float(cell.split()[0]) for cell in (min(cells[3:5], key=lambda x: float(x.split()[0])), cells[5])
        )
        assert own == pytest.approx(row["median_ms"], abs=6e-4)
        (over,) = (cell for cell in cells if cell == f"{row['over_fastest_dense']:.2f}")
        assert float(over) == pytest.approx(fastest / own, rel=0.02, abs=0.01)


def test_a_step_out_of_a_graph_takes_the_longer_of_the_hosts_time_and_the_devices() -> None:
    rows = cells_after(generate.REGIONS["gpu-eager"]())
    layers = [row for row in stored.required(stored.EAGER)["results"] if row["kind"] == "layer"]
    assert len(rows) == len(layers) > 0
    for cells, row in zip(rows, layers, strict=True):
        dense, dense_host, own, own_host, over = (float(cell.split()[0]) for cell in cells[4:9])
        assert (own, own_host) == pytest.approx((row["median_ms"], row["host_ms"]), abs=6e-4)
        assert over == pytest.approx(max(dense, dense_host) / max(own, own_host), rel=0.02, abs=0.01)
    crossover = f"dense below {regions.gpu.kernels.DECODE_CROSSOVER['cuda']:,} cached tokens"
    assert crossover in regions.gpu.gpu_eager()
    # The step of the same size in a graph, where it was timed.
    steps = {(row["batch"], row["tokens"], row["block_size"], row["density"]): row["median_ms"]
             for row in stored.required(stored.STEP)["results"] if row["kind"] == "layer"}  # fmt: skip
    eager = [row for row in stored.required(stored.EAGER)["results"] if row["kind"] == "layer"]
    beside = [steps.get((row["batch"], row["tokens"], row["block_size"], row["density"])) for row in eager]
    assert [cells[-1] for cells in cells_after(regions.gpu.gpu_eager())] == [
        "" if value is None else f"{value:.3f}" for value in beside
    ]
    assert any(beside)


def test_a_million_tokens_cost_what_their_chunks_say() -> None:
    runs = stored.required(stored.MILLION)["results"]
    totals, costs = (cells_after(part) for part in regions.models.gpu_million().split("Microseconds a token"))
    assert len(totals) == len(costs) == len(runs) > 0
    for total, cost, run in zip(totals, costs, runs, strict=True):
        assert total[:2] == cost[:2] == [str(run["block_size"]), f"`{run['walk']}`"]
        assert float(total[3].replace(",", "")) == pytest.approx(sum(chunk["ms"] for chunk in run["chunks"]), rel=0.01)
        last = [chunk for chunk in run["chunks"] if chunk["tokens"] == run["chunk"]][-1]
        assert float(cost[-1]) == pytest.approx(1e3 * last["ms"] / last["tokens"], rel=0.01)


def test_a_walk_is_compared_with_the_same_prompt_without_one() -> None:
    plain = {"tokens": 100, "chunk": 10, "block_size": 8, "density": 0.5, "walk": "none", "total_ms": 200.0}
    walked = {**plain, "walk": "damped", "total_ms": 230.0}
    (sentence,) = regions.models._walk_cost([plain, walked, {**walked, "block_size": 16}])
    assert "blocks of 8 the prompt took 15.0 % longer with the damped walk" in sentence


def test_aims_are_judged_by_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured() -> list[list[str]]:
        speeds, others = regions.aims.gpu_aims().split("| aim |")
        rows = [line for part in (speeds, others) for line in part.splitlines()[2:] if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]

    number = re.compile(r"[\d.]+")
    judged = 0
    for cells in measured():
        pairs = [cells[3:5], cells[5:7]] if len(cells) == 7 else [cells[1:3]]
        for asked, found in pairs:
            if not asked or asked.startswith("-"):
                continue
            least, value = (float(number.findall(cell)[0]) for cell in (asked, found))
            if abs(value - least) < 0.006:  # Too close for the digits that are shown.
                continue
            met = value <= least if "at most" in asked else value >= least
            assert found.startswith("**") is not met, cells
            judged += 1
    assert judged > 20
    for file in stored.RESULTS.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    step = json.loads((tmp_path / stored.MODEL_STEP).read_text(encoding="utf-8"))
    for factor in (1.2, 2.4):
        step["results"][-1]["over_fastest_dense"] = factor
        (tmp_path / stored.MODEL_STEP).write_text(json.dumps(step), encoding="utf-8")
        monkeypatch.setattr(stored, "RESULTS", tmp_path)
        (cells,) = (cells for cells in measured() if cells[0].startswith("step, whole model"))
        assert cells[-1] == (f"**{factor:.2f}×**" if factor < 1.7 else f"{factor:.2f}×")


def test_aims_of_quality_are_judged_by_the_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = stored.required(stored.QUALITY)
    rows = cells_after(regions.aims.quality_aims())
    assert [cells[0] for cells in rows] == ["0.2", "0.1"]
    for density, *cells in rows:
        (run,) = (r for r in data["results"] if r["config"] == {"density": float(density), "min_blocks": 4})
        assert [float(cell) for cell in cells[1:6:2]] == pytest.approx(
            [run[task]["accuracy"] for task in stored.TASKS], abs=6e-4
        )
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    for nll in (3.2551, 3.2549):
        for run in data["results"]:
            if run["config"] == stored.BASE:
                run["prose_nll"] = nll
        (tmp_path / stored.QUALITY).write_text(json.dumps(data), encoding="utf-8")
        line = next(line for line in regions.aims.quality_aims().splitlines() if line.startswith("| 0.2 "))
        assert ("**" in line) is (nll > 3.255)


def test_aims_of_steps_are_judged_by_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = stored.required(stored.ANSWERS)
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    for points in (-1.9, -2.1):
        data["summary"]["0.2: sparse steps"]["prose_hits_against_dense_steps"]["mean"] = points / 100
        (tmp_path / stored.ANSWERS).write_text(json.dumps(data), encoding="utf-8")
        line = next(line for line in regions.aims.step_aims().splitlines() if line.startswith("| 0.2 |"))
        assert (f"**{points:.1f} (" in line) is (points < -2)


def test_speed_names_the_quality_of_its_settings() -> None:
    assert regions.gpu.quality_note([]) == ""
    read = {(64, 0.2): "22.5", (64, 0.1): "14.1"}
    for setting, share in read.items():
        (row,) = (
            row for row in regions.quality.quality()[1] if row["config"] == {"density": setting[1], "min_blocks": 4}
        )
        assert f"{100 * row['block_density']:.1f}" == share
        text = f"the quality of block 64 at density {setting[1]} ({share}\u00a0%)."
        assert text in regions.gpu.quality_note([setting])
    both = regions.gpu.quality_note([(64, 0.2), (128, 0.3), (64, 0.2)])
    assert both.startswith(f"`{stored.QUALITY}` has, with the blocks in brackets that its prompts of 4,000 tokens read")
    assert both.endswith("the quality of block 64 at density 0.2 (22.5\u00a0%), not of block 128 at density 0.3.")
    assert "does not have the quality of block 32 at density 0.3." in regions.gpu.quality_note([(32, 0.3)])


def test_memory_shows_the_estimates_and_what_the_run_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = cells_after(regions.memory.gpu_memory())
    assert {cells[0] for cells in rows} == {"8,192", "65,536", "131,072"}
    (cells,) = (cells for cells in rows if cells[:2] == ["65,536", "64"])
    # The founding document's 96, 1, 0.5 and 4 MB of 1,048,576 bytes.
    assert [cell.partition(" / ")[0] for cell in cells[2:6]] == ["101 MB", "1.0 MB", "524 KB", "4.2 MB"]
    data = stored.required(stored.MEMORY)
    kinds = [(phase, tokens, kind) for phase in ("prefill", "decode") for tokens in (8192, 65_536, 131_072)
             for kind in ("dense", "attention", "layer")]  # fmt: skip
    found = {(row["phase"], row["tokens"], row["kind"]) for row in data["results"] if "peak_bytes" in row}
    absent = [
        f"{phase}, {tokens:,} tokens, {kind}" for phase, tokens, kind in kinds if (phase, tokens, kind) not in found
    ]
    text = " ".join(regions.memory.gpu_memory().split())
    assert ("The run ended before it had metered" in text) is bool(absent)
    assert all(case in text for case in absent)
    layers = [row for row in data["results"] if row["kind"] == "layer" and row["phase"] == "prefill"]
    peaks = [cells for cells in cells_of(regions.memory.gpu_memory()) if cells[0] == "prefill" and cells[2] == "layer"]
    sizes = [(f"{row['tokens']:,}", f"{row['peak_bytes'] / 1e6:,.2f}") for row in layers]
    assert [(cells[3], cells[5]) for cells in peaks] == sizes
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    assert "Not measured in this checkout yet" in regions.memory.gpu_memory()


def test_the_picture_is_of_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regions.gpu.speed_up_is_drawn(), "stale: run `make docs`"
    curves = regions.gpu.speed_up_curves()
    assert all(list(curve.x) == sorted(set(curve.x)) for curve in curves.values())
    for name in (stored.CROSS, stored.PREFILL):
        for row in stored.required(name)["results"]:
            if row["kind"] == "layer":
                curve = curves[f"block {row['block_size']}, density {row['density']}"]
                assert curve.y[curve.x.index(row["tokens"])] == row["over_fastest_dense"]
    monkeypatch.setattr(stored, "IMAGES", tmp_path)
    monkeypatch.setattr(stored, "SPEED_UP_PICTURE", tmp_path / "gpu" / "picture.png")
    monkeypatch.setattr(generate, "pages", list)
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    monkeypatch.setattr(regions.gpu, "speed_up_curves", lambda: {**curves, "one more": curves["block 64, density 0.2"]})
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "gpu/picture.png: stale; run make docs", "gpu/picture.png: drawn", "gpu/picture.png: stale; run make docs",
    ]  # fmt: skip


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Times of three settings of the ablations, made up, in a folder of their own beside the real quality."""
    quality = (stored.RESULTS / stored.ABLATIONS).read_text(encoding="utf-8")
    (tmp_path / stored.ABLATIONS).write_text(quality, encoding="utf-8")
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    monkeypatch.setattr(stored, "CURVE_PICTURE", tmp_path / "curve.png")

    def row(group: str, label: str, ms: float, **changes: Any) -> dict[str, Any]:
        stages = {stage: {"median_ms": ms / 4} for stage in regions.selector.CURVE_STAGES}
        return {"group": group, "label": label, "changes": changes, "stages_ms": stages,
                "selector_ms": {"median_ms": ms}}  # fmt: skip

    return {
        "device": "a GPU", "versions": {"torch": "2", "triton": "3"}, "tokens": 131_072, "dtype": "bfloat16",
        "shape": {"heads": 32, "kv_heads": 8, "head_dim": 128}, "density": 0.2, "repeats": 5,
        "config": SketchWalkConfig(density=0.2, min_blocks=4, sketch_dim=128, dense_below=0).to_dict(),
        "attention": [{"density": d, "block_size": 64, "impl": "cute", "median_ms": ms}
                      for d, ms in ((0.2, 50.0), (0.05, 10.0))],
        "results": [
            row("query-keep", "0.5", 5.0), row("query-keep", "1", 9.0, query_keep=1.0),
            row("sketch-size", "32 of 64", 4.0, sketch_dim=64),
            {"group": "query-keep", "label": "0.25", "changes": {"query_keep": 0.25}, "error": "it was not right"},
        ],
    }  # fmt: skip


def write_curve(curve: dict[str, Any]) -> None:
    (stored.RESULTS / regions.selector.CURVE).write_text(json.dumps(curve), encoding="utf-8")


def test_the_selectors_time_stands_beside_the_quality_of_its_setting(
    curve: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        regions.selector.selector_curve() == "Not measured in this checkout yet (`benchmarks/results/gpu_curve.json`)."
    )
    write_curve(curve)
    # Nothing is drawn; the link is made relative to the site.
    monkeypatch.setattr(stored, "CURVE_PICTURE", stored.IMAGES / "curve.png")
    text = regions.selector.selector_curve()
    rows = cells_after(text)
    assert [cells[0] for cells in rows] == ["dense", "coordinates: 32 of 64", "default", "query_keep: 1"]
    assert "| **default** |" in text
    groups = stored.required(stored.ABLATIONS)["groups"]
    for cells, group, label, ms in zip(
        rows[1:], ("sketch-size", "query-keep", "query-keep"), ("32 of 64", "0.5", "1"), (4.0, 5.0, 9.0), strict=True
    ):
        (row,) = (row for row in groups[group]["tokens"]["4000"]["rows"] if row["label"] == label)
        nll = row["modes"]["prefill"]["figures"]["prose_nll"]["mean"]
        assert cells[5:8] == [f"{ms:.2f}", f"{2 * ms:.1f}", f"{10 * ms:.1f}"]
        assert float(cells[-1]) == pytest.approx(nll, abs=6e-5)
    won = float(rows[2][-1]) - float(rows[3][-1])
    assert f"(the default is 0.5): {won / 4:.3f} from 0.5 to 1." in " ".join(text.split())
    assert text.endswith("](images/curve.png)")


def test_a_time_of_another_setting_than_the_measured_one_is_refused(curve: dict[str, Any]) -> None:
    for changes in ({"query_keep": 0.75}, {"query_keep": 1.0, "sketch_dim": 64}):
        curve["results"][1]["changes"] = changes
        write_curve(curve)
        with pytest.raises(AssertionError, match="query-keep, 1: timed and measured with different settings"):
            regions.selector.selector_curve()


def test_the_picture_of_the_selectors_time_is_of_the_results(curve: dict[str, Any]) -> None:
    assert regions.selector.curve_is_drawn(), "nothing to draw"
    write_curve(curve)
    assert not regions.selector.curve_is_drawn()
    regions.selector.draw_curve()
    assert regions.selector.curve_is_drawn()
    series, default = regions.selector.curve_points()
    assert {name: [point.label for point in points] for name, points in series.items()} == {
        "coordinates": ["32 of 64"],
        "query_keep": ["1"],
    }
    assert default.x == 5.0
    assert default.low < default.y < default.high
    curve["results"][0]["selector_ms"]["median_ms"] = 5.5
    write_curve(curve)
    assert not regions.selector.curve_is_drawn()


def test_the_picture_of_the_selectors_time_in_the_checkout_is_current() -> None:
    assert regions.selector.curve_is_drawn(), "stale: run `make docs`"


def test_the_timed_settings_are_rows_of_the_plan() -> None:
    """What benchmarks/gpu_curve.py times joins what the ablations measured: every setting has its quality."""
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("gpu_curve", PROJECT / "benchmarks" / "gpu_curve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.settings()
    default = settings[0].config
    assert {name for name, value in SketchWalkConfig(**stored.BASE).to_dict().items()
            if value != default.to_dict()[name]} == {"sketch_dim", "dense_below"}  # fmt: skip
    assert [setting.config.query_keep for setting in settings[:4]] == [0.5, 0.25, 0.125, 1.0]
    stage = {"median_ms": 1.0}
    rows = [{**module.named(setting, default), "stages_ms": {}, "selector_ms": stage} for setting in settings]
    data = {"config": default.to_dict(), "shape": module.SHAPE._asdict(), "results": rows}
    priced = regions.selector.priced_settings(data, stored.required(stored.ABLATIONS))
    assert len({setting.name for setting in priced}) == len(settings)
    assert sum(setting.is_default for setting in priced) == 1


def test_results_name_the_command_that_makes_them_and_no_other_place() -> None:
    files = sorted((PROJECT / "benchmarks" / "results").glob("gpu_*.json"))
    assert files
    for file in files:
        command = json.loads(file.read_text(encoding="utf-8"))["command"]
        assert command.endswith(f" benchmarks/results/{file.name}"), file.name
        assert not re.search(r"[\s=](/|~|\$)", command), file.name


def test_the_launches_in_bold_are_those_that_run() -> None:
    pytest.importorskip("triton")
    from sketch_walk.kernels.triton_peaks import TUNED, StepLaunch

    peak, step = TUNED[9], StepLaunch()
    for row in stored.required(stored.SELECTOR)["prefill"]:
        sizes = f"{peak.rows}x{peak.columns}, {peak.num_warps} warps, {peak.max_registers} registers, descriptors"
        assert row["launch"] == sizes
        assert peak.descriptors
    sizes = f"peaks, {step.sub_keys} sub-keys, {step.num_warps} warps, {step.num_stages} stages"
    assert f"{sizes}, {step.max_registers} registers" == regions.selector.STEP_LAUNCH
    rows = stored.required(stored.SELECTOR)
    assert regions.selector.gpu_selector().count("| **") == len(rows["prefill"]) + len(rows["decode"])


def test_plain_means_are_compared_on_the_same_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, today = (stored.required(name)["results"] for name in (stored.PLAIN, stored.QUALITY))
    (cells,) = (cells for cells in cells_of(regions.quality.pooling()) if cells[0] == "default, density 0.1")
    changed = {**stored.BASE, "density": 0.1}
    old, new = (
        regions.quality.run_of(before, **changed, **regions.quality.PLAIN_MEANS),
        regions.quality.run_of(today, **changed),
    )
    gained = round(128 * (new["essay"]["accuracy"] - old["essay"]["accuracy"]))
    assert cells[3] == f"{old['essay']['accuracy']:.2f} / {new['essay']['accuracy']:.2f} ({gained:+d})"
    assert cells[5] == f"{old['prose_nll']:.4f} / {new['prose_nll']:.4f} ({new['prose_nll'] - old['prose_nll']:+.4f})"
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    files = {}
    for name, rows in ((stored.QUALITY, today), (stored.PLAIN, before)):
        files[name] = {"samples": 128, "seeds": "0-127", "results": [dict(row) for row in rows]}
        (tmp_path / name).write_text(json.dumps(files[name]), encoding="utf-8")
    regions.quality.knobs()
    files[stored.PLAIN]["results"][0]["prose_nll"] += 0.1
    (tmp_path / stored.PLAIN).write_text(json.dumps(files[stored.PLAIN]), encoding="utf-8")
    with pytest.raises(AssertionError, match="asked other prompts"):
        regions.quality.knobs()


def test_a_bench_file_of_another_rule_says_so() -> None:
    data = stored.required(stored.PREFILL)
    assert "earlier default" not in regions.gpu.bench_setting(data, stored.PREFILL)
    data["config"] |= {"salience": 0.0}
    del data["config"]["query_contrast"]
    text = regions.gpu.bench_setting(data, stored.PREFILL)
    assert "**Measured with an earlier default**: with `salience=0.0`, and before there were `query_contrast`." in text


def test_a_decode_step_reads_means_outlines_and_all_scales() -> None:
    config, tokens = SketchWalkConfig(), 4096
    state = LayerSketch(config)
    state.allocate(1, (3, payload_size(64, config)), (9, 64), torch.bfloat16, torch.device("cpu"))
    state.reserve(tokens)
    codes, scales = state.read_keys(tokens // config.block_size)
    assert scales is not None
    shape = ModelShape(heads=9, kv_heads=3, head_dim=64)
    # 20 of a block's 68 quarters: its mean has four, the outlines of 16 sub-keys one each.
    assert regions.package.step_bytes(tokens, config, shape) == codes.nbytes * 20 // 68 + scales.nbytes


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        inside = PROJECT / "docs" if page.parent.name == "docs" else PROJECT
        assert target.is_relative_to(inside), f"{link} leaves the site"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_broken_links_and_anchors_would_be_seen() -> None:
    text = "# One `two`, (three)\n[a](b.md#c) `[x](y)`\n```\n# code\n[d](e)\n```\n"
    assert links(text) == ["b.md#c"]
    assert anchors(text) == {"one-two-three"}


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w-]+\.md)$", (PROJECT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (PROJECT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, names in re.findall(r"`((?:tests|src|examples|docs|benchmarks)/[\w/.-]+\.(?:py|md))((?:::\w+)*)`", text):
        file = PROJECT / path
        assert file.is_file(), path
        body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body if path.endswith(".py") else []
        for name in names.split("::")[1:]:
            found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
            assert found, f"{path} has no {names}"
            body = found[0].body


def test_the_file_tree_names_every_module() -> None:
    tree = (PROJECT / "README.md").read_text(encoding="utf-8").partition("## File tree")[2].partition("\n## ")[0]
    package = PROJECT / "src" / "sketch_walk"
    names = [path.name for path in package.glob("*.py") if path.name not in ("__init__.py", "extras.py")]
    names += [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert [name for name in names if name not in tree] == []
    listed = re.findall(r"^  ([\w.]+\.py)", tree, re.MULTILINE)
    assert [name for name in listed if not (package / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles(page: Path) -> None:
    for code in python_blocks(page):
        assert isinstance(ast.parse(code), ast.Module)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_imports_that_are_shown_exist(page: Path) -> None:
    for code in python_blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sketch_walk"):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def block_with(page: Path, text: str) -> str:
    (code,) = (code for code in python_blocks(page) if text in code)
    return code


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("README.md", "SketchWalkAttention(config, head_dim=64)"),
        ("docs/getting-started.md", "SketchWalkAttention(config, head_dim=128)"),
        ("docs/state-and-decode.md", "SketchWalkAttention(config, head_dim=64)"),
        ("docs/configuration.md", "from_dict"),
    ],
)
def test_blocks_on_plain_tensors_run(page: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(block_with(PROJECT / page, text), page, "exec"), names)
    if "output" in names:
        assert torch.isfinite(names["output"]).all()
    if page == "README.md":
        assert names["output"].shape == (1, 8, 1, 64)
        # 17 causal blocks at 20 %, at least 4.
        assert names["selected_blocks"].shape == (1, 1, 4)
        assert names["selected_blocks"][0, 0, -1] == 16
        assert "torch.Size([1, 8, 1, 64])" in capsys.readouterr().out


def test_quick_start_with_a_model_runs(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model instead of the embedded one."""
    from sketch_walk.integrations import models

    load = models.load
    monkeypatch.setattr(models, "load", lambda: load(tiny_folder, device="cpu"))
    names: dict[str, Any] = {}
    exec(compile(block_with(PROJECT / "README.md", 'mode="both", record=True'), "README.md", "exec"), names)
    assert names["output"].shape[1] == names["inputs"]["input_ids"].shape[1] + 8
    assert not names["handle"].enabled
    summary = names["handle"].summary()
    assert summary["sparse_calls"] > 0
    # The prompt's, its dense last query blocks counted in; the mean over layers is a float32.
    prompt = causal_density(names["inputs"]["input_ids"].shape[1], names["config"])
    assert 0.2 <= summary["block_density"] <= prompt + 1e-6
    assert prompt < 0.3
    assert "'block_density'" in capsys.readouterr().out


def test_the_promised_llama_call_stands_in_the_readme() -> None:
    tree = ast.parse(block_with(PROJECT / "README.md", "create_sketch_walk_llama("))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    (call,) = (node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "create_sketch_walk_llama")
    assert {k.arg: ast.literal_eval(k.value) for k in call.keywords} == {
        "base_model_name": "meta-llama/Llama-3.1-8B",
        "block_size": 64,
        "sketch_dim": 64,
        "top_k_blocks": 16,
        "sparsity_exponent": 8,
    }
