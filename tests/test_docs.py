"""The documentation: tables that are current, links that lead somewhere, code that runs, tests that exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
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

pytestmark = pytest.mark.skipif(not (PROJECT / "mkdocs.yml").is_file(), reason="not a checkout")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", PROJECT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def test_regions_are_current(generate: ModuleType, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- generated:") == len(generate.REGION.findall(text)), "a region has no end"
    assert generate.filled(text) == text, "stale: run `make docs`"


def test_every_region_is_used(generate: ModuleType) -> None:
    used = {name for page in PAGES for _, name, _ in generate.REGION.findall(page.read_text(encoding="utf-8"))}
    assert used == set(generate.REGIONS)


def test_stale_pages_are_noticed_and_rewritten(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- generated: crossover -->\nold\n<!-- end -->\nb\n", encoding="utf-8")
    monkeypatch.setattr(generate, "PROJECT", tmp_path)
    assert generate.main(["--check"]) == 1
    assert "old" in page.read_text(encoding="utf-8")
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert "old" not in page.read_text(encoding="utf-8")
    assert capsys.readouterr().out == "README.md: stale; run make docs\nREADME.md: rewritten\n"


def test_speed_table_waits_for_its_file_and_shows_density_and_accuracy(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quality = (generate.RESULTS / generate.QUALITY).read_text(encoding="utf-8")
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    (tmp_path / generate.QUALITY).write_text(quality, encoding="utf-8")
    assert "not measured in this checkout" in generate.speed()
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
    (tmp_path / generate.SPEED).write_text(json.dumps(record), encoding="utf-8")
    text = generate.speed()
    assert "| 64 | 4.00 s | 2.00 s | 2.00× | 2.00× | 2.00× | 22.0 % |" in text
    assert re.search(r"with this setting: 0\.\d\d, dense 0\.\d\d", " ".join(text.split()))
    assert "| 64 |" not in generate.speed_table((4096,))
    assert "earlier default" not in text
    record["config"] = {**record["config"], "walk": "damped"}
    del record["config"]["query_keep"]
    (tmp_path / generate.SPEED).write_text(json.dumps(record), encoding="utf-8")
    text = " ".join(generate.speed().split())
    assert "**Measured with an earlier default**: with `walk='damped'`, and before there were `query_keep`." in text
    assert "No accuracy of today's default belongs to these times." in text
    assert "with this setting" not in text


def test_runs_without_a_dense_one_beside_them_are_left_out(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(precision: str, nll: float, **config: Any) -> dict[str, Any]:
        scores = {task: {"accuracy": 0.5, "nll": 0.5} for task in generate.TASKS}
        return {"config": config, "rope_frequencies": precision, "block_density": 0.2, "prose_nll": nll, **scores}

    runs = [run("float32 (as saved)", 3.5, **generate.BASE), run("bfloat16 (cast)", 3.25, **generate.BASE)]
    runs.append(run("bfloat16 (cast)", 3.0, rule="dense"))
    record = {"samples": 100, "results": runs}
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    (tmp_path / generate.QUALITY).write_text(json.dumps(record), encoding="utf-8")
    table = generate.quality_today()
    assert "3.2500" in table
    assert "3.0000" in table
    assert "3.5000" not in table
    # Two errors of 5 points each, and a quarter of a nat above 3.
    assert "| +0.0 ± 7.1 | +0.0 ± 7.1 | +0.0 ± 7.1 | +0.250 (8.3 %) |" in generate.quality_loss()


def test_attention_on_a_gpu_shows_every_case_for_both_kernels(generate: ModuleType) -> None:
    data = generate.required(generate.GPU_CUTE)
    cases = {(row["tokens"], row["block_size"], row["density"]) for row in data["sparse"]}
    lines = [line for line in generate.gpu_cute().splitlines() if line.endswith("× |")]
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


def test_a_layer_on_a_gpu_is_divided_by_what_was_timed_beside_it(generate: ModuleType) -> None:
    regions = {"gpu-prefill": generate.PREFILL, "gpu-decode": generate.STEP, "gpu-prefill-triton": generate.TRITON}
    for region, name in regions.items():
        data = generate.required(name)
        rows = cells_of(generate.REGIONS[region]())[2:]
        layers = [row for row in data["results"] if row["kind"] == "layer"]
        assert len(rows) == len(layers) > 0
        steps = region == "gpu-decode"
        for cells, layer in zip(rows, layers, strict=True):
            assert (cells.pop(0) if steps else "1") == str(layer["batch"])
            assert cells[:2] == [f"{layer['tokens']:,}", str(layer["block_size"])]
            assert float(cells[2]) == pytest.approx(layer["block_density"], abs=6e-4)
            *dense, attention, own, share, over_flash = map(float, cells[3 : len(data["options"]["baselines"]) + 7])
            assert own == pytest.approx(layer["median_ms"], rel=0.01)
            assert share == pytest.approx(100 * (own - attention) / attention, abs=4.0)
            assert over_flash == pytest.approx(dense[0] / own, rel=0.02)
            if len(dense) > 1:
                assert float(cells[-1]) == pytest.approx(min(dense) / own, rel=0.02)
    assert len(cells_of(generate.gpu_readme())) == len(cells_of(generate.gpu_prefill()))


def test_the_launches_in_bold_are_those_that_run(generate: ModuleType) -> None:
    pytest.importorskip("triton")
    from sketch_walk.kernels.triton_peaks import PeakLaunch, StepLaunch
    from sketch_walk.kernels.triton_sketch import SketchLaunch

    sketch, peak, step = SketchLaunch(), PeakLaunch(), StepLaunch()
    assert f"sketch_queries, {sketch.lanes} lanes, {sketch.num_warps} warps" == generate.SKETCH_LAUNCH
    sizes = f"{peak.rows}x{peak.columns}, {peak.num_warps} warps, {peak.max_registers} registers"
    assert sizes == generate.PEAK_LAUNCH
    assert f"peaks, {step.sub_keys} sub-keys, {step.num_warps} warps" == generate.STEP_LAUNCH
    assert generate.gpu_selector().count("| **") == 3


def test_plain_means_are_compared_on_the_same_prompts(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, today = (generate.required(name)["results"] for name in (generate.PLAIN, generate.QUALITY))
    (cells,) = (cells for cells in cells_of(generate.pooling()) if cells[0] == "default, density 0.1")
    changed = {**generate.BASE, "density": 0.1}
    old, new = generate.run_of(before, **changed, **generate.PLAIN_MEANS), generate.run_of(today, **changed)
    gained = round(128 * (new["essay"]["accuracy"] - old["essay"]["accuracy"]))
    assert cells[3] == f"{old['essay']['accuracy']:.2f} / {new['essay']['accuracy']:.2f} ({gained:+d})"
    assert cells[5] == f"{old['prose_nll']:.4f} / {new['prose_nll']:.4f} ({new['prose_nll'] - old['prose_nll']:+.4f})"
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    files = {}
    for name, rows in ((generate.QUALITY, today), (generate.PLAIN, before)):
        files[name] = {"samples": 128, "seeds": "0-127", "results": [dict(row) for row in rows]}
        (tmp_path / name).write_text(json.dumps(files[name]), encoding="utf-8")
    generate.knobs()
    files[generate.PLAIN]["results"][0]["prose_nll"] += 0.1
    (tmp_path / generate.PLAIN).write_text(json.dumps(files[generate.PLAIN]), encoding="utf-8")
    with pytest.raises(AssertionError, match="asked other prompts"):
        generate.knobs()


def test_a_bench_file_of_another_rule_says_so(generate: ModuleType) -> None:
    data = generate.required(generate.PREFILL)
    assert "earlier default" not in generate.bench_setting(data, generate.PREFILL)
    data["config"] |= {"salience": 0.0}
    del data["config"]["query_contrast"]
    text = generate.bench_setting(data, generate.PREFILL)
    assert "**Measured with an earlier default**: with `salience=0.0`, and before there were `query_contrast`." in text


def test_a_decode_step_reads_half_of_the_codes_and_all_scales(generate: ModuleType) -> None:
    config, tokens = SketchWalkConfig(), 4096
    state = LayerSketch(config)
    state.allocate(1, (3, payload_size(64, config)), (9, 64), torch.bfloat16, torch.device("cpu"))
    state.reserve(tokens)
    codes, scales = state.read_keys(tokens // config.block_size)
    assert scales is not None
    shape = ModelShape(heads=9, kv_heads=3, head_dim=64)
    assert generate.step_bytes(tokens, config, shape) == codes.nbytes // 2 + scales.nbytes


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
    # The prompt's, a dense last query block counted in; single tokens read a fifth.
    prompt = causal_density(names["inputs"]["input_ids"].shape[1], names["config"])
    assert 0.2 <= summary["block_density"] <= prompt < 0.3
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
