"""What importing loads, which way imports run, and that the façades hold no logic."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sketch_walk

PACKAGE = Path(sketch_walk.__file__).parent
PROJECT = PACKAGE.parents[1]

STAGES = {"hadamard", "sketch", "walk", "selection", "state", "memory", "kernels"}
BELOW_ATTENTION = STAGES | {"config", "layout", "masks", "scoring", "look_back"}
# Which units a unit may import: a top-level module or subpackage is one unit, and "" is sketch_walk/__init__.py.
ALLOWED = {
    "config": set(),
    "extras": set(),
    "layout": {"config"},
    "hadamard": {"config", "layout"},
    "sketch": {"config", "layout", "hadamard"},
    "walk": {"config", "layout"},
    "selection": {"config", "layout"},
    "state": {"config", "layout"},
    "memory": {"config", "layout"},
    "kernels": {"config", "layout", "extras"},
    "masks": {"config", "layout", "kernels", "state"},
    "scoring": {"config", "layout", "kernels", "sketch", "walk", "state"},
    "look_back": {"config", "layout", "kernels", "memory", "state"},
    "attention": BELOW_ATTENTION,
    "": BELOW_ATTENTION | {"attention"},
    "common": BELOW_ATTENTION | {"attention"},
    "integrations": BELOW_ATTENTION | {"attention", "extras"},
    "llama": {"integrations"},
    "complexity": {"config", "sketch"},
    "plots": {"extras"},
    "evaluation": {"config", "extras", "kernels", "layout", "selection", "attention", "integrations"},
    "bench": BELOW_ATTENTION | {"attention", "extras", "integrations"},
    "cli": {"config", "extras", "kernels", "integrations", "complexity", "evaluation", "bench", "plots"},
}


def unit_of(module: str) -> str:
    """``sketch_walk.kernels.dense`` -> ``kernels``."""
    return module.partition(".")[2].partition(".")[0]


def imported_units(source: str, unit: str) -> set[str]:
    """Units that a file of `unit` imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {unit_of(alias.name) for alias in node.names if alias.name.split(".")[0] == "sketch_walk"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "sketch_walk":
                found |= {alias.name if alias.name in ALLOWED else "" for alias in node.names}
            elif node.module is not None and node.module.startswith("sketch_walk."):
                found.add(unit_of(node.module))
    return found - {unit}


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    unit = "" if parts == ("__init__",) else parts[0]
    assert unit in ALLOWED, f"give {unit!r} its place in ALLOWED"
    wrong = imported_units(path.read_text(encoding="utf-8"), unit) - ALLOWED[unit]
    assert not wrong, f"{unit or 'sketch_walk'} must not import {sorted(wrong)}"


def test_the_table_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {unit for unit, below in ALLOWED.items() if unit not in done and below <= done}
        assert ready, f"a circle among {sorted(set(ALLOWED) - done)}"
        done |= ready


def test_the_reader_of_imports_sees_them_all() -> None:
    source = (
        "import sketch_walk.walk\nfrom sketch_walk import kernels, PRESETS\n"
        "def f():\n    from sketch_walk.cli.app import app\n"
    )
    assert imported_units(source, "config") == {"walk", "kernels", "", "cli"}


def test_facades_hold_no_logic() -> None:
    for path in (*(PACKAGE / "llama").glob("*.py"), *(PACKAGE / "common").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            listing = isinstance(node, ast.Assign)
            assert docstring or listing or isinstance(node, ast.ImportFrom | ast.Import), (
                f"{path.name}: {ast.dump(node)}"
            )


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout))


def test_importing_loads_torch_only() -> None:
    heavy = {"transformers", "triton", "matplotlib", "jaxtyping", "beartype", "typer", "rich", "tqdm", "vllm", "gguf"}
    before = loaded_by("import torch")
    after = loaded_by("import sketch_walk, sketch_walk.common.core, sketch_walk.complexity, sketch_walk.plots")
    assert "torch" in after
    assert not (after - before) & heavy


def test_missing_transformers_names_the_extra() -> None:
    modules = ["integrations.transformers", "integrations.llama", "llama.modeling_llama_sketchwalk"]
    code = (
        "import importlib, sys\nsys.modules['transformers'] = None\n"
        f"for name in {modules}:\n"
        "    try:\n        importlib.import_module(f'sketch_walk.{name}')\n"
        "    except ImportError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = 'transformers is not installed; run: pip install "sketch_walk[transformers]"'
    assert done.stdout.splitlines() == [line] * len(modules)


def test_version_is_written_once_and_the_same() -> None:
    from importlib.metadata import version

    assert sketch_walk.__version__ == version("sketch_walk")


def test_public_names_exist() -> None:
    assert all(hasattr(sketch_walk, name) for name in sketch_walk.__all__)


@pytest.mark.skipif(not (PROJECT / "examples").is_dir(), reason="not a checkout")
@pytest.mark.parametrize("name", sorted(path.name for path in (PROJECT / "examples").glob("*.py")))
def test_examples_run(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(PROJECT / "examples" / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example says what it did"
