"""Benchmarks: nothing wrong gets a time, what is unavailable says why, the command prints and writes what it found."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sketch_walk import SketchWalkConfig, kernels
from sketch_walk.bench import (
    AttentionOptions,
    HeadShape,
    MemoryOptions,
    Row,
    Timing,
    bench_config,
    measure,
    run_attention,
    run_memory,
    run_stages,
)
from sketch_walk.bench import attention as bench_attention
from sketch_walk.bench.baselines import UnavailableError, dense_attention, flex_mask, selected_attention
from sketch_walk.bench.checks import MismatchError, check_attend, check_layer, relative_error, sampled_error
from sketch_walk.bench.inputs import make_generator, make_qkv, random_selection
from sketch_walk.bench.memory import LiveBytes, founding_bytes, num_rows, peak_of
from sketch_walk.bench.model import REGISTERED, ModelOptions, dense_model, head_shape, run_model
from sketch_walk.bench.random_model import LlamaShape, random_llama
from sketch_walk.bench.record import code_digest, compare, environment, resolve_device, resumed
from sketch_walk.bench.stages import StageRow
from sketch_walk.bench.timing import NotCapturableError, Stopwatch, capture
from sketch_walk.cli import main
from sketch_walk.cli.bench import parse_settings
from sketch_walk.cli.bench_report import attention_tables, stage_tables
from sketch_walk.layout import make_layout
from sketch_walk.selection import BlockSelection
from sketch_walk.sketch import payload_size
from sketch_walk.state import LayerSketch

CPU = torch.device("cpu")
SHAPE = HeadShape(4, 2, 32)
SMALL = AttentionOptions(
    CPU, torch.float32, SHAPE, tokens=(300,), densities=(0.2,), block_sizes=(32,), baselines=("sdpa", "flex"), repeats=2
)
TINY = LlamaShape(layers=3, heads=4, kv_heads=2, head_dim=16, hidden=64, mlp=96, vocab=300)
HEADS = ("--device", "cpu", "--heads", "4/2", "--head-dim", "32")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def select(tokens: int, config: SketchWalkConfig, queries: int | None = None) -> tuple[Any, BlockSelection]:
    """Inputs and a random selection."""
    generator = make_generator(CPU, 1)
    inputs = make_qkv(SHAPE, 2, queries or tokens, tokens, torch.float32, generator)
    layout = make_layout(2, queries or tokens, tokens, CPU)
    return inputs, random_selection(layout, config, SHAPE.kv_heads, generator)


# Timing.


def test_measure_counts_and_orders() -> None:
    calls = []

    def call() -> None:
        calls.append(None)
        time.sleep(0.002)

    timing = measure(call, CPU, 5, warm_up=3)
    assert len(calls) == 8
    assert 2 <= timing.low_ms <= timing.median_ms <= timing.high_ms
    assert timing.repeats == 5
    assert (timing.host_paced, timing.host_ms) == (False, None)
    one = measure(call, CPU, 1)
    assert one.low_ms == one.median_ms == one.high_ms
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure(call, CPU, 0)


def test_a_call_may_be_timed_in_several_runs() -> None:
    pauses = iter([0.0, 0.0, 0.0, 0.02, 0.02, 0.02])
    watch = Stopwatch(lambda: time.sleep(next(pauses)), CPU)
    watch.run(3, warm_up=0)
    first = watch.timing()
    watch.run(3, warm_up=0)
    both = watch.timing()
    assert (first.repeats, both.repeats) == (3, 6)
    assert first.high_ms < 20 <= both.high_ms
    assert both.median_ms == pytest.approx(sum(sorted(watch.ms)[2:4]) / 2)


def test_rounds_time_every_call_again() -> None:
    sizes = {"tokens": (96,), "densities": (0.5,), "block_sizes": (32,), "phases": ("prefill",), "check_tokens": 96}
    options = AttentionOptions(CPU, torch.float32, SHAPE, **sizes, baselines=("sdpa",), repeats=2, rounds=3)
    rows = run_attention(options)
    assert [row.timing.repeats for row in rows if row.timing is not None] == [6, 6, 6]
    assert all(row.tflops is not None and row.tflops > 0 for row in rows)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        replace(options, rounds=0)


def test_a_time_that_the_host_paced_is_marked() -> None:
    def row(method: str, **about: Any) -> Row:
        return Row("prefill", 1, 64, method, "dense", timing=Timing(1.25, 1.0, 1.5, 3, **about))

    paced, free = row("sdpa", host_paced=True, host_ms=1.23456789), row("sdpa-flash")
    assert paced.to_dict().items() >= {"host_paced": True, "host_ms": 1.2346, "median_ms": 1.25}.items()
    assert free.to_dict()["host_paced"] is False
    assert "host_ms" not in free.to_dict()

    def drawn(tables: list[Table]) -> str:
        console = Console(width=160, record=True, file=io.StringIO())
        for table in tables:
            console.print(table)
        return console.export_text()

    text = drawn(attention_tables([paced, free]))
    assert text.count("1.250 *") == 1
    assert text.count("1.250") == 2
    assert re.search(r"1.000 - 1.500 +│ +1.235 +│", text)
    assert "* the device waited for the host" in text
    text = drawn(attention_tables([free]))
    assert "*" not in text
    assert "host ms" not in text
    own, slow = Timing(2.0, 2.0, 2.0, 1), Timing(1.0, 1.0, 1.0, 1, host_paced=True)
    stages = StageRow("prefill", 1, 64, "auto", 32, 0.2, stages={"scores": slow, "attend": own}, layer=own)
    text = drawn(stage_tables([stages]))
    assert text.count("1.000 *") == 1
    assert "* the device waited for the host" in text
    assert stages.to_dict()["stages_ms"]["scores"]["host_paced"] is True


def test_capture_needs_a_gpu() -> None:
    with pytest.raises(NotCapturableError, match="CUDA graphs need a GPU"):
        capture(lambda: None, CPU)


@gpu
def test_capture_replays_and_refuses_what_synchronises() -> None:
    x = torch.ones(8, device="cuda")
    captured = capture(lambda: x * 2, x.device)
    x.fill_(3)
    captured.replay()
    assert captured.result.tolist() == [6] * 8
    with pytest.raises(NotCapturableError, match="it waits for the device"):
        capture(lambda: x.sum().item(), x.device)
    assert torch.randn(2, device="cuda").isfinite().all(), "the generator still works"
    assert measure(lambda: x * 2, x.device, 3).median_ms > 0


# Checks.


@pytest.mark.parametrize("queries", [None, 1])
@pytest.mark.parametrize("changes", [{}, {"head_mode": "per_kv_head"}], ids=["shared", "per-head"])
def test_sampled_rows_agree_with_the_reference_and_see_errors(queries: int | None, changes: dict[str, Any]) -> None:
    config = bench_config(32, 32, 0.3, changes)
    inputs, chosen = select(301, config, queries)
    layout = make_layout(2, queries or 301, 301, CPU)
    output, _ = kernels.attend(*inputs, chosen.indices, chosen.counts, layout, block_size=32, scale=0.2)
    assert sampled_error(output, inputs, 0.2, chosen, 32) < 1e-5
    assert sampled_error(output, inputs, 0.3, chosen, 32) > 1e-2
    assert sampled_error(output, inputs, 0.2) > 1e-2, "a sparse result is not the dense one"
    output[1, 3, -1] += 1
    assert sampled_error(output, inputs, 0.2, chosen, 32) > 1e-2
    dense = dense_attention("sdpa", CPU, 0.2)(*inputs)
    assert sampled_error(dense, inputs, 0.2) < 1e-5


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) != 0


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("check", [check_attend, check_layer])
def test_checks_pass_what_is_right_and_refuse_what_is_not(check, decode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bench_config(32, 32, 0.3)
    options: dict[str, Any] = {"tokens": 200, "batch": 2, "decode": decode}
    assert check("auto", SHAPE, config, torch.bfloat16, make_generator(CPU, 0), **options) < 1e-2
    attend = kernels.attend

    def wrong(*args: Any, impl: str, **kwargs: Any) -> tuple[Tensor, str]:
        output, used = attend(*args, impl=impl, **kwargs)
        return (output if impl == "reference" else output * 1.02), used

    monkeypatch.setattr(kernels, "attend", wrong)
    with pytest.raises(MismatchError, match=r"auto at 200 tokens: error 0\.02\d*, allowed 0\.01"):
        check("auto", SHAPE, config, torch.bfloat16, make_generator(CPU, 0), **options)


def test_wrong_scores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sketch_walk.bench import checks

    scores = checks.call_scores
    monkeypatch.setattr(
        checks, "call_scores", lambda *a, impl, **k: scores(*a, impl=impl, **k) + (0.01 if impl == "auto" else 0)
    )
    with pytest.raises(MismatchError, match="block scores of auto"):
        check_layer("auto", SHAPE, bench_config(32, 32, 0.3), torch.float32, make_generator(CPU, 0), tokens=200)


# Baselines.


def test_flex_mask_is_the_selection() -> None:
    config = bench_config(32, 32, 0.3)
    _, chosen = select(300, config)
    dense = flex_mask(chosen, 32, 300, 300, CPU).to_dense()
    expected = torch.zeros(2, 1, 10, 11)
    expected.scatter_(3, chosen.indices.long() % 11, 1)
    assert (dense == expected[..., :10]).all()
    assert (flex_mask(None, 32, 300, 300, CPU).to_dense()[0, 0] == torch.ones(10, 10).tril()).all()
    _, step = select(289, config, 1)
    assert flex_mask(step, 32, 1, 289, CPU).to_dense()[0, 0, 0].sum() == step.counts[0, 0, 0]
    with pytest.raises(UnavailableError, match="begin with a block of 32"):
        flex_mask(None, 32, 4, 300, CPU)


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-cudnn", "flash-attn-4", "flex"])
def test_baselines_without_a_gpu_say_so(name: str) -> None:
    with pytest.raises(UnavailableError, match="it needs a GPU"):
        dense_attention(name, CPU, 1.0)


def test_flex_sparse_without_a_gpu_says_so() -> None:
    _, chosen = select(300, bench_config(32, 32, 0.3))
    with pytest.raises(UnavailableError, match="it needs a GPU"):
        selected_attention(chosen, 32, CPU, 1.0)


# Attention.


def test_attention_rows() -> None:
    options = replace(SMALL, kinds=("attention", "layer", "automatic"), batches=(2,))
    seen: list[Row] = []
    rows = run_attention(options, seen.append)
    assert rows == seen
    assert len(rows) == options.num_rows() == 2 * (2 + 3)
    named = {(row.phase, row.method, row.kind): row for row in rows}
    assert {row.batch for row in rows if row.phase == "decode"} == {2}
    for phase in ("prefill", "decode"):
        dense, flex = named[phase, "sdpa", "dense"], named[phase, "flex", "dense"]
        assert dense.timing is not None
        assert dense.over_fastest_dense is None
        assert (flex.timing, flex.reason, flex.failed) == (None, "it needs a GPU", False)
        assert "median_ms" not in flex.to_dict()
        for kind in ("attention", "layer"):
            row = named[phase, "auto", kind]
            assert row.timing is not None
            assert (row.impl, row.fastest_dense, row.over_flash) == ("reference", "sdpa", None)
            assert row.error is not None
            assert row.error < 1e-5
            assert row.over_fastest_dense == dense.timing.median_ms / row.timing.median_ms
        # Below the crossover: dense.
        automatic = named[phase, "auto", "automatic"]
        assert automatic.timing is not None
        assert (automatic.impl, automatic.block_density) == ("dense", None)
    # 10 rows of which the last reads 4 of 10: 1 + 2 + 3 + 7 * 4 of 55.
    assert named["prefill", "auto", "layer"].block_density == pytest.approx(34 / 55)
    assert named["decode", "auto", "attention"].block_density == pytest.approx(0.4)


def test_an_automatic_call_above_the_crossover_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "dense_crossover", lambda *_: 300)
    (row,) = run_attention(replace(SMALL, kinds=("automatic",), baselines=(), phases=("prefill",)))
    assert row.timing is not None
    assert (row.impl, row.block_density) == ("reference", pytest.approx(34 / 55))


@pytest.mark.parametrize("kind", ["attention", "layer"])
def test_a_kernel_that_is_wrong_at_full_size_gets_no_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right at the short length, where the reference is asked too."""
    attend = kernels.attend_selected

    def wrong(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attend(query, *args, **kwargs) * (1.5 if query.shape[2] > 200 else 1)

    monkeypatch.setattr(kernels, "attend_selected", wrong)
    options = replace(SMALL, phases=("prefill",), kinds=(kind,), baselines=(), check_tokens=200)
    (row,) = run_attention(options)
    assert row.failed
    assert row.timing is None
    assert "no match, no time: sampled rows at 300 tokens: error 0.5" in (row.reason or "")
    (right,) = run_attention(replace(options, tokens=(200,)))
    assert right.timing is not None


def test_a_kernel_that_raises_fails_and_one_that_refuses_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(SMALL, phases=("prefill",), kinds=("attention",), baselines=())
    for error, failed in ((RuntimeError("boom\nmore"), True), (ValueError("impl 'x' cannot run this call: no"), False)):

        def raising(*_: Any, error: Exception = error, **__: Any) -> Tensor:
            raise error

        monkeypatch.setattr(kernels, "attend_selected", raising)
        (row,) = run_attention(options)
        assert row.failed is failed
        assert row.timing is None
        assert row.reason == f"{type(error).__name__}: {str(error).splitlines()[0]}"


def test_graph_without_a_gpu_is_eager_and_says_so() -> None:
    rows = run_attention(replace(SMALL, phases=("decode",), graph=True, baselines=("sdpa",)))
    for row in rows:
        assert row.timing is not None
        assert not row.graph
        assert row.note == "eager, no CUDA graph: CUDA graphs need a GPU"


def test_the_interpreter_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = replace(SMALL, phases=("decode",), kinds=("attention",), kernels=("triton",), baselines=())
    for row in (*run_attention(options), *run_stages(options)):
        assert not row.failed
        assert row.reason == "it runs in Triton's interpreter here: a time would mean nothing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels": ("fast",)}, r"unknown impl 'fast'"),
        ({"baselines": ("magic",)}, r"unknown baseline 'magic'; expected one of \('sdpa', 'sdpa-flash'"),
        ({"phases": ("train",)}, r"unknown phase 'train'; expected one of \('prefill', 'decode'\)"),
        ({"kinds": ("all",)}, r"unknown kind 'all'"),
        ({"densities": (1.5,)}, r"density must be None or in \(0, 1\], got 1.5"),
        ({"tokens": (1,)}, "tokens must be at least 2, got 1"),
        ({"tokens": ()}, r"tokens must be numbers of at least 1, got \(\)"),
        ({"batches": (0,)}, r"batches must be numbers of at least 1, got \(0,\)"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"shape": HeadShape(4, 3, 32)}, r"kv_heads \(3\) must divide heads \(4\)"),
        ({"shape": HeadShape(4, 2, 0)}, "head_dim must be at least 1, got 0"),
        ({"changes": {"speed": 1}}, r"unknown config fields \['speed'\]"),
    ],
)
def test_options_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_comparison_keeps_graphs_and_sizes_apart() -> None:
    def row(method: str, kind: str, ms: float, **fields: Any) -> Row:
        return Row("decode", 1, fields.pop("tokens", 64), method, kind, timing=Timing(ms, ms, ms, 1), **fields)

    sparse, graphed, alone = (
        row("auto", "layer", 2),
        row("auto", "layer", 1, graph=True),
        row("auto", "layer", 1, tokens=8),
    )
    dense = [row("sdpa-flash", "dense", 8), row("sdpa", "dense", 6), row("sdpa", "dense", 3, graph=True)]
    compare([sparse, graphed, alone, *dense, Row("decode", 1, 64, "flex", "dense", reason="no")])
    assert (sparse.over_flash, sparse.over_fastest_dense, sparse.fastest_dense) == (4, 3, "sdpa")
    assert (graphed.over_flash, graphed.over_fastest_dense) == (None, 3)
    assert (alone.over_flash, alone.over_fastest_dense) == (None, None)


# Stages.


def test_stages_are_those_of_the_layer() -> None:
    rows = run_stages(replace(SMALL, densities=(0.2,), repeats=3))
    assert [row.phase for row in rows] == ["prefill", "decode"]
    names = ["sketch keys", "scores", "select", "attend"]
    for row in rows:
        assert row.reason is None
        assert row.stages is not None
        assert row.layer is not None
        assert list(row.stages) == names
        assert row.selector_ms == pytest.approx(sum(row.stages[name].median_ms for name in names[:-1]))
        assert row.selector_share == row.layer.median_ms / row.stages["attend"].median_ms - 1
        assert set(row.to_dict()["stages_ms"]) == set(names)
    assert rows[0].block_density == pytest.approx(34 / 55)
    (row,) = run_stages(replace(SMALL, phases=("prefill",), changes={"walk": "damped"}))
    assert row.stages is not None
    assert list(row.stages) == [*names[:2], "transition rows", "keep rows", "walk", *names[2:]]


def test_stages_of_a_wrong_kernel_have_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = kernels.attend
    monkeypatch.setattr(
        kernels, "attend", lambda *a, impl, **k: attend(*a, impl=impl, **k) if impl == "reference" else (a[0], impl)
    )
    row = run_stages(replace(SMALL, phases=("prefill",)))[0]
    assert row.failed
    assert row.stages is None
    assert "no match, no time" in (row.reason or "")
    assert "stages_ms" not in row.to_dict()


# Memory.


def test_live_bytes() -> None:
    def call() -> Tensor:
        first = torch.ones(1000)
        first.view(10, 100)
        del first
        return torch.ones(500) + 1

    with LiveBytes() as meter:
        result = call()
    assert meter.peak == 4000
    assert meter.total == result.nbytes == 2000
    assert peak_of(call, CPU).bytes == 4000


def test_memory_rows() -> None:
    options = MemoryOptions(
        CPU, torch.bfloat16, SHAPE, tokens=(512,), densities=(0.2,), block_sizes=(32,), baselines=("sdpa", "flex")
    )
    rows = run_memory(options)
    assert len(rows) == num_rows(options) == 2 * (2 + 2)
    prompt, step = ({row.method + row.kind: row for row in rows if row.phase == p} for p in options.phases)
    dense, layer = prompt["sdpadense"], prompt["autolayer"]
    assert dense.qkv_bytes == 512 * (4 + 2 + 2) * 32 * 2
    assert dense.kv_cache_bytes == 512 * 2 * 2 * 32 * 2
    assert dense.output_bytes == 512 * 4 * 32 * 2
    assert dense.peak_bytes is not None
    assert dense.peak_bytes >= dense.output_bytes
    assert prompt["flexdense"].reason == "it needs a GPU"
    config = options.configs()[0]
    state = LayerSketch(config)
    state.allocate(1, (2, payload_size(32, config)), (4, 32), torch.bfloat16, CPU)
    state.reserve(512)
    # A prompt leaves the queries of sixteen tokens, a spare one and their ranks.
    waiting = {layer.phase: 17 * (4 * 32 * 2 + 8)}
    for row in (layer, step["autolayer"]):
        assert row.state_bytes == {**state.nbytes(), "queries": waiting.get(row.phase, 0)}
        assert row.state_share is not None
        assert row.state_share > 0
    assert layer.walk_bytes == 16 * 16 * 4
    assert layer.peak_bytes is not None
    assert layer.peak_bytes > sum(state.nbytes().values()) + (layer.output_bytes or 0)
    assert step["autoattention"].output_bytes == 4 * 32 * 2


def test_founding_estimates_are_one_head_in_float32() -> None:
    assert founding_bytes(65_536) == {
        "qkv": 3 * 65_536 * 128 * 4,
        "block_means": 2 * 1024 * 128 * 4,
        "sketches": 2 * 1024 * 64 * 4,
        "walk": 1024 * 1024 * 4,
    }
    assert founding_bytes(131_072)["walk"] == 4 * founding_bytes(65_536)["walk"]
    assert founding_bytes(131_072)["qkv"] == 2 * founding_bytes(65_536)["qkv"]


def test_memory_page_waits_for_its_file_and_shows_it(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("generate", reason="not a checkout")
    regions = pytest.importorskip("regions")
    monkeypatch.setattr(regions.results, "RESULTS", tmp_path)
    assert "Not measured in this checkout yet" in regions.memory.gpu_memory()
    file = tmp_path / regions.results.MEMORY
    assert run("bench", "memory", *HEADS, "--tokens", "512", "--block-size", "32", "--json", str(file)).code == 0
    text = regions.memory.gpu_memory()
    (layer,) = (
        row for row in json.loads(file.read_text())["results"] if row["kind"] == "layer" and row["phase"] == "prefill"
    )
    # 96 MiB at 65,536 tokens.
    assert f"| 512 | 32 | 786 KB / {layer['qkv_bytes'] // 1000} KB |" in text
    assert "| prefill | auto (reference) | layer | 512 | 32 |" in text
    assert "4/2 heads x 32, float32" in text


# Whole models.


@pytest.fixture(scope="module")
def tiny_llama():
    return random_llama(TINY, torch.float32, CPU, 512)


MODEL = ModelOptions(
    CPU, torch.float32, prompt_tokens=(256,), cached_tokens=(256,), block_size=32, automatic=True, repeats=2
)


def test_random_llama(tiny_llama) -> None:
    config = tiny_llama.config
    assert head_shape(tiny_llama) == HeadShape(4, 2, 16)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 3, 300)
    weights = dict(tiny_llama.named_parameters())
    assert (weights["model.norm.weight"] == 1).all()
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    frequencies = tiny_llama.model.rotary_emb.inv_freq
    assert frequencies[0] == 1
    assert (frequencies.diff() < 0).all()
    logits = tiny_llama(input_ids=torch.arange(20)[None]).logits
    again = random_llama(TINY, torch.float32, CPU, 512)(input_ids=torch.arange(20)[None]).logits
    assert logits.isfinite().all()
    assert torch.equal(logits, again)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        random_llama(TINY._replace(layers=0), torch.float32, CPU, 512)


def test_model_rows(tiny_llama) -> None:
    rows = run_model(tiny_llama, MODEL)
    assert len(rows) == MODEL.num_rows() == 2 * (4 + 2)
    assert tiny_llama.config._attn_implementation == "sdpa"
    # transformers looks such names up in a hub.
    assert not any("flash" in name for name in REGISTERED.values())
    for phase, batch, density in (("prefill", 1, 26 / 36), ("decode", 2, 0.5)):
        dense, *absent, sparse, automatic = (row for row in rows if row.phase == phase)
        assert dense.timing is not None
        assert [row.reason for row in absent] == ["it needs a GPU"] * 3
        assert sparse.batch == batch
        assert sparse.timing is not None
        assert (sparse.kind, sparse.impl) == ("model", "dense+reference")
        assert sparse.block_density == pytest.approx(density)
        assert sparse.over_fastest_dense == dense.timing.median_ms / sparse.timing.median_ms
        assert automatic.timing is not None
        assert (automatic.impl, automatic.block_density) == ("dense", None)
        assert max(row.error or 0 for row in (dense, sparse, automatic)) < 1e-5


def test_a_step_may_be_repeated(tiny_llama) -> None:
    """The cache does not move: every repeat is the same step, of the same logits."""
    from sketch_walk.bench import model as bench_model
    from sketch_walk.integrations.transformers import enable

    config = bench_config(16, 32, 0.3)
    with enable(tiny_llama, config):
        call = bench_model._step(tiny_llama, head_shape(tiny_llama), config, 2, 256, MODEL)
        assert torch.equal(call(), call())
    with dense_model(tiny_llama, "sdpa", CPU):
        call = bench_model._step(tiny_llama, head_shape(tiny_llama), None, 2, 256, MODEL)
        assert torch.equal(call(), call())


def test_a_model_with_a_wrong_kernel_gets_no_time(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = kernels.attend_selected
    monkeypatch.setattr(kernels, "attend_selected", lambda *a, **k: 3 * attend(*a, **k))
    rows = run_model(tiny_llama, replace(MODEL, automatic=False, baselines=("sdpa",)))
    for dense, sparse in (rows[:2], rows[2:]):
        assert dense.timing is not None
        assert sparse.timing is None
        assert sparse.failed
        assert "logits at 256 tokens, full budget" in (sparse.reason or "")


def test_models_with_windows_are_refused(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_llama.config, "layer_types", ["sliding_attention", "full_attention"], raising=False)
    with pytest.raises(ValueError, match="only full attention is timed"):
        run_model(tiny_llama, MODEL)


def test_dense_model_ends_as_it_began(tiny_llama) -> None:
    ids = torch.arange(40)[None]
    before = tiny_llama(input_ids=ids).logits
    with dense_model(tiny_llama, "sdpa", CPU):
        assert tiny_llama.config._attn_implementation == REGISTERED["sdpa"]
        torch.testing.assert_close(tiny_llama(input_ids=ids).logits, before)
    assert tiny_llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ("flex",)}, "baseline 'flex' is not timed in a model"),
        ({"prompt_tokens": (), "cached_tokens": ()}, "lengths must be at least 4"),
        ({"cached_tokens": (3,)}, "lengths must be at least 4"),
        ({"densities": (0.0,)}, r"density must be None or in \(0, 1\], got 0.0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_model_options_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MODEL, **changes)


# Where, and what was asked.


def test_environment() -> None:
    found = environment(CPU).to_dict()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"triton", "transformers", "flash-attn-4", "sketch_walk"} <= set(found["versions"])
    assert found["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda"])
def test_devices_that_are_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device .*'{name}'"):
        resolve_device(name)
    assert resolve_device(None) == CPU


def test_settings() -> None:
    assert parse_settings(["walk=none", "key_sub_block=8", "use_srht=false"]) == {
        "walk": "none",
        "key_sub_block": 8,
        "use_srht": False,
    }
    assert parse_settings(None) == {}
    with pytest.raises(ValueError, match="--set takes name=value, got 'walk'"):
        parse_settings(["walk"])


# The command.


class Outcome:
    """Exit code, output, and the JSON of its last line."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.flat = " ".join(re.sub(r"[│┃╭╮╰╯─━]", " ", out).split())

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return record


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(list(arguments))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(done.value.code or 0, captured.out, captured.err)

    return call


def test_bench_attention(run, tmp_path: Path) -> None:
    options = (*HEADS, "--tokens", "256,512", "--block-size", "32", "--density", "0.2", "--repeats", "2")
    file = tmp_path / "deep" / "a.json"
    result = run("bench", "attention", *options, "--json", str(file), "--plots", str(tmp_path), "--set", "walk=none")
    assert result.code == 0
    assert result.record == json.loads(file.read_text(encoding="utf-8"))
    assert result.record["command"].startswith("sketch-walk bench attention --device cpu --heads 4/2")
    assert result.record["shape"] == {"heads": 4, "kv_heads": 2, "head_dim": 32}
    assert (result.record["config"]["walk"], result.record["config"]["sketch_dim"]) == ("none", 32)
    timed = [row for row in result.record["results"] if "median_ms" in row]
    assert len(timed) == 2 * 2 * 3
    assert all(0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in timed)
    assert "prefill, 512 tokens, batch 1: milliseconds" in result.flat
    assert "auto (reference) layer 32 0.2: 0.426" in result.flat
    assert "flash-attn-4 (prefill 256)" in result.flat
    assert "it needs a GPU" in result.flat
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [f"speed-up-{phase}-batch1-over-fastest.png" for phase in ("decode", "prefill")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_bench_attention_fails_when_a_kernel_is_wrong(run, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = kernels.attend_selected
    monkeypatch.setattr(kernels, "attend_selected", lambda *a, **k: 3 * attend(*a, **k))
    result = run(
        "bench", "attention", *HEADS, "--tokens", "128", "--block-size", "32", "--phase", "prefill",
        "--baseline", "sdpa,flex", "--density", "0.2,0.5",
    )  # fmt: skip
    assert result.code == 1
    assert "sketch-walk: 4 of 6 rows failed; the remarks say why" in result.err
    assert "no match, no time" in result.flat
    assert {row["method"] for row in result.record["results"] if "median_ms" in row} == {"sdpa"}


def test_bench_stages(run, tmp_path: Path) -> None:
    options = (*HEADS, "--tokens", "512", "--block-size", "32", "--density", "0.2", "--repeats", "1")
    result = run("bench", "stages", *options, "--plots", str(tmp_path))
    assert result.code == 0
    assert "prefill, 512 tokens, batch 1: milliseconds by stage" in result.flat
    assert "selector, of the attention" in result.flat
    assert {path.name for path in tmp_path.glob("*.png")} == {"stages-prefill.png", "stages-decode.png"}
    assert [row["phase"] for row in result.record["results"]] == ["prefill", "decode"]


def test_bench_model(run) -> None:
    sizes = ("--layers", "3", "--hidden", "64", "--mlp", "96", "--vocab", "300", "--block-size", "32")
    result = run(
        "bench", "model", "--device", "cpu", "--heads", "4/2", "--head-dim", "16", *sizes, "--prompt", "256",
        "--baseline", "sdpa", "--repeats", "1",
    )  # fmt: skip
    assert result.code == 0
    assert result.record["model"]["random_llama"]["hidden"] == 64
    assert result.record["config"]["sketch_dim"] == 16
    assert [row["kind"] for row in result.record["results"]] == ["dense", "model"]
    assert "auto (dense+reference) model 32 0.2: 0.722" in result.flat


def test_bench_a_local_model(run, tiny_folder: Path) -> None:
    result = run(
        "bench", "model", "--model", str(tiny_folder), "--device", "cpu", "--prompt", "none", "--cache", "256",
        "--block-size", "32", "--baseline", "sdpa", "--repeats", "1",
    )  # fmt: skip
    assert result.code == 0
    assert result.record["model"] == {"name": str(tiny_folder)}
    assert [(row["phase"], row["batch"]) for row in result.record["results"]] == [("decode", 2)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attention", "--kernel", "fast"), "unknown impl 'fast'; expected one of"),
        (("attention", "--density", "0.2,2"), "density must be None or in (0, 1], got 2.0"),
        (("attention", "--density", "many"), "density must be numbers such as 0.2,0.05, got 'many'"),
        (("attention", "--tokens", "8KB"), "tokens must be numbers such as 512,8K, got '8KB'"),
        (("attention", "--tokens", ","), "tokens must be numbers such as 512,8K, got ','"),
        (("attention", "--heads", "32"), "--heads takes query/key-value heads, such as 32/8, got '32'"),
        (("attention", "--heads", "4/3"), "kv_heads (3) must divide heads (4)"),
        (("attention", "--dtype", "int8"), "unknown dtype 'int8'; expected one of"),
        (("attention", "--baseline", "magic"), "unknown baseline 'magic'"),
        (("attention", "--check-tokens", "1,2"), "check_tokens must be one number, got '1,2'"),
        (("attention", "--set", "pace=1"), "unknown config fields ['pace']"),
        (("stages", "--repeats", "0"), "repeats must be at least 1, got 0"),
        (("memory", "--phase", "train"), "unknown phase 'train'"),
        (("model", "--prompt", "none"), "lengths must be at least 4"),
        (("model", "--prompt", "64", "--model", "./nowhere"), "no such file or folder: ./nowhere"),
    ],
)
def test_mistakes_are_one_line(run, arguments: tuple[str, ...], message: str) -> None:
    result = run("bench", *arguments, "--device", "cpu")
    assert result.code == 1
    assert message in result.err
    assert result.err.startswith("sketch-walk: ")
    assert result.err.count("\n") == 1


def test_a_gpu_that_is_not_there(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", "attention", "--device", "cuda")
    assert (result.code, result.err) == (1, "sketch-walk: device 'cuda' is not there: torch sees no GPU\n")


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("transformers", "transformers", ("model", "--prompt", "64")),
        ("matplotlib", "eval", ("attention", "--tokens", "64", "--plots", "never-made")),
    ],
)
def test_missing_packages_name_their_extra(
    run, monkeypatch: pytest.MonkeyPatch, module: str, extra: str, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run("bench", *arguments, "--device", "cpu", "--heads", "4/2", "--head-dim", "16")
    assert result.code == 1
    assert result.err == f'sketch-walk: {module} is not installed; run: pip install "sketch_walk[{extra}]"\n'
    assert not Path("never-made").exists()


@gpu
def test_bench_attention_on_a_gpu(run) -> None:
    options = ("--tokens", "4K", "--block-size", "128", "--density", "0.2", "--repeats", "3", "--graph")
    result = run("bench", "attention", *options)
    assert result.code == 0, result.out
    rows = result.record["results"]
    assert {row["method"] for row in rows if "median_ms" in row} >= {"sdpa", "sdpa-flash", "auto"}
    assert any(row["graph"] for row in rows)


def test_operations_count_causal_pairs() -> None:
    case = bench_attention.make_case(SMALL, "prefill", 1, 4)
    assert bench_attention._operations(case, 1.0) == 4 * 4 * 32 * 10
    case = bench_attention.make_case(SMALL, "decode", 3, 5)
    assert bench_attention._operations(case, 0.5) == 3 * 4 * 4 * 32 * 4 / 2


def test_a_run_goes_on_from_a_file_of_the_same_code(tmp_path: Path) -> None:
    script, file = tmp_path / "script.py", tmp_path / "times.json"
    script.write_text("first", encoding="utf-8")
    header = {"code": code_digest(script), "repeats": 5}
    assert resumed(None, header, ("code",)) == resumed(file, header, ("code",)) == {}
    file.write_text(json.dumps({**header, "rows": [1]}), encoding="utf-8")
    assert resumed(file, header, ("code", "repeats"))["rows"] == [1]
    script.write_text("second", encoding="utf-8")
    later = {"code": code_digest(script), "repeats": 5}
    assert later["code"] != header["code"]
    assert resumed(file, later, ("code", "repeats")) == {}
    assert resumed(file, later, ("repeats",))["rows"] == [1]
