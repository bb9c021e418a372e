"""`sketch-walk bench`: its commands and their options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sketch_walk.cli.settings import parse_list, parse_numbers, parse_tokens

if TYPE_CHECKING:
    import torch

    from sketch_walk.bench import HeadShape

app = typer.Typer(
    help="Time and meter attention on this machine; no kernel is timed before it has matched the reference.",
    no_args_is_help=True,
)

T = TypeVar("T")

Tokens = Annotated[str | None, typer.Option(help="Lengths, such as 8K,64K,128K.")]
Batch = Annotated[str, typer.Option(help="Sequences of a decode step, such as 1,8,64. A prompt is always one.")]
Densities = Annotated[str, typer.Option("--density", help="Fractions of the causal blocks to read, such as 0.2,0.05.")]
Blocks = Annotated[str, typer.Option("--block-size", help="Tokens per block, such as 64,128.")]
Phases = Annotated[str, typer.Option("--phase", help="prefill, decode or both: prefill,decode.")]
Kernels = Annotated[str, typer.Option("--kernel", help="Kernels of the sparse path, such as auto,triton.")]
Baselines = Annotated[str, typer.Option("--baseline", help="Dense kernels to compare with: all, none, or names.")]
Heads = Annotated[str, typer.Option(help="Query heads / key/value heads.")]
HeadDim = Annotated[int, typer.Option(help="Size of one head.")]
DType = Annotated[
    str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16 on a GPU, else float32.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any field of SketchWalkConfig, as name=value; may be repeated.")
]
Graph = Annotated[bool, typer.Option("--graph", help="Time calls inside a CUDA graph; of a model its decode steps.")]
Repeats = Annotated[int, typer.Option(help="Timed repeats of each call.")]
CheckTokens = Annotated[str, typer.Option(help="Longest call that is compared with the reference kernel.")]
Seed = Annotated[int, typer.Option(help="Seed of the random tensors.")]
Json = Annotated[Path | None, typer.Option("--json", help="File to write the result to.")]
Plots = Annotated[Path | None, typer.Option("--plots", help="Folder to write PNG plots into.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: the GPU if there is one.")]

LLAMA_HEADS, LLAMA_HEAD_DIM = "32/8", 128
# A CPU takes minutes for what a GPU does in milliseconds.
GPU_TOKENS, CPU_TOKENS = "8K,32K,64K,128K", "1K,4K"


@app.command()
def attention(
    context: typer.Context,
    tokens: Tokens = None,
    batch: Batch = "1",
    density: Densities = "0.2,0.05",
    block_size: Blocks = "64,128",
    phase: Phases = "prefill,decode",
    kernel: Kernels = "auto",
    kind: Annotated[
        str,
        typer.Option(
            help="attention: a kernel on a random selection; layer: with its selector; automatic: what the automatic "
            "path chooses."
        ),
    ] = "attention,layer",
    baseline: Baselines = "all",
    heads: Heads = LLAMA_HEADS,
    head_dim: HeadDim = LLAMA_HEAD_DIM,
    dtype: DType = None,
    set_: Set = None,
    graph: Graph = False,
    flush: Annotated[bool, typer.Option(help="Empty the GPU's L2 cache before each repeat.")] = True,
    repeats: Repeats = 10,
    rounds: Annotated[int, typer.Option(help="Rounds of all calls of a size, each with so many repeats.")] = 1,
    check_tokens: CheckTokens = "4K",
    seed: Seed = 0,
    json_file: Json = None,
    plots: Plots = None,
    device: Device = None,
) -> None:
    """Attention of one layer, prompts and decode steps: sparse kernels alone and with their selector, beside dense."""
    from sketch_walk.bench.attention import AttentionOptions, run_attention
    from sketch_walk.bench.baselines import BASELINES
    from sketch_walk.cli import bench_report

    where = _device(device)
    options = AttentionOptions(
        where,
        _dtype(dtype, where),
        shape=_shape(heads, head_dim),
        tokens=_tokens(tokens, where),
        batches=parse_tokens("batch", batch),
        densities=parse_numbers("density", density),
        block_sizes=parse_tokens("block_size", block_size),
        phases=parse_list(phase),
        kernels=parse_list(kernel),
        kinds=parse_list(kind),
        baselines=_baselines(baseline, BASELINES),
        graph=graph,
        flush=flush,
        repeats=repeats,
        rounds=rounds,
        seed=seed,
        check_tokens=_one("check_tokens", check_tokens),
        changes=parse_settings(set_),
    )
    report = bench_report.Report("attention", context, options, options.configs()[0], json_file, plots)
    with _no_grad():
        rows = report.watch(options.num_rows(), lambda on_row: run_attention(options, on_row))
    report.finish(rows, bench_report.attention_tables(rows), bench_report.plot_attention)


@app.command()
def stages(
    context: typer.Context,
    tokens: Tokens = None,
    batch: Batch = "1",
    density: Densities = "0.2,0.05",
    block_size: Blocks = "128",
    phase: Phases = "prefill,decode",
    kernel: Kernels = "auto",
    heads: Heads = LLAMA_HEADS,
    head_dim: HeadDim = LLAMA_HEAD_DIM,
    dtype: DType = None,
    set_: Set = None,
    graph: Graph = False,
    flush: Annotated[bool, typer.Option(help="Empty the GPU's L2 cache before each repeat.")] = True,
    repeats: Repeats = 10,
    check_tokens: CheckTokens = "4K",
    seed: Seed = 0,
    json_file: Json = None,
    plots: Plots = None,
    device: Device = None,
) -> None:
    """The selector one stage at a time, beside the attention that it serves and the layer as a whole."""
    from sketch_walk.bench.stages import StageOptions, run_stages
    from sketch_walk.cli import bench_report

    where = _device(device)
    options = StageOptions(
        where,
        _dtype(dtype, where),
        shape=_shape(heads, head_dim),
        tokens=_tokens(tokens, where),
        batches=parse_tokens("batch", batch),
        densities=parse_numbers("density", density),
        block_sizes=parse_tokens("block_size", block_size),
        phases=parse_list(phase),
        kernels=parse_list(kernel),
        kinds=(),
        baselines=(),
        graph=graph,
        flush=flush,
        repeats=repeats,
        seed=seed,
        check_tokens=_one("check_tokens", check_tokens),
        changes=parse_settings(set_),
    )
    report = bench_report.Report("stages", context, options, options.configs()[0], json_file, plots)
    total = len(options.cases()) * len(options.configs()) * len(options.kernels)
    with _no_grad():
        rows = report.watch(total, lambda on_row: run_stages(options, on_row))
    report.finish(rows, bench_report.stage_tables(rows), bench_report.plot_stages)


@app.command()
def memory(
    context: typer.Context,
    tokens: Tokens = None,
    density: Densities = "0.2",
    block_size: Blocks = "64,128",
    phase: Phases = "prefill,decode",
    kernel: Kernels = "auto",
    baseline: Baselines = "sdpa,sdpa-flash,sdpa-cudnn,flash-attn-4",
    heads: Heads = LLAMA_HEADS,
    head_dim: HeadDim = LLAMA_HEAD_DIM,
    dtype: DType = None,
    set_: Set = None,
    seed: Seed = 0,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Peak and persistent bytes of one layer's attention by method, and the selector's share."""
    from sketch_walk.bench.baselines import BASELINES
    from sketch_walk.bench.memory import FOUNDING_BYTES, FOUNDING_TOKENS, MemoryOptions, num_rows, run_memory
    from sketch_walk.cli import bench_report

    where = _device(device)
    options = MemoryOptions(
        where,
        _dtype(dtype, where),
        shape=_shape(heads, head_dim),
        tokens=_tokens(tokens, where),
        densities=parse_numbers("density", density),
        block_sizes=parse_tokens("block_size", block_size),
        phases=parse_list(phase),
        kernels=parse_list(kernel),
        baselines=_baselines(baseline, BASELINES),
        seed=seed,
        changes=parse_settings(set_),
    )
    report = bench_report.Report("memory", context, options, options.configs()[0], json_file, None)
    report.extra = {"founding_estimate": {"tokens": FOUNDING_TOKENS, "bytes": FOUNDING_BYTES}}
    with _no_grad():
        rows = report.watch(num_rows(options), lambda on_row: run_memory(options, on_row))
    report.finish(rows, bench_report.memory_tables(rows), None)


@app.command()
def model(
    context: typer.Context,
    path: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id, folder or .gguf file. Default: a Llama of random weights."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Lengths of prompts to time, such as 128K; none for none.")] = None,
    cache: Annotated[str, typer.Option(help="Lengths of caches to time a decode step after; none for none.")] = "none",
    batch: Annotated[int, typer.Option(help="Sequences of the decode step. A prompt is always one.")] = 2,
    density: Densities = "0.2",
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 128,
    kernel: Kernels = "auto",
    automatic: Annotated[
        bool, typer.Option("--automatic", help="Also time the automatic path, dense below the measured crossover.")
    ] = False,
    baseline: Baselines = "all",
    layers: Annotated[int, typer.Option(help="Layers of the random model.")] = 32,
    heads: Heads = LLAMA_HEADS,
    head_dim: HeadDim = LLAMA_HEAD_DIM,
    hidden: Annotated[int, typer.Option(help="Hidden size of the random model.")] = 4096,
    mlp: Annotated[int, typer.Option(help="Intermediate size of the random model.")] = 14_336,
    vocab: Annotated[int, typer.Option(help="Vocabulary of the random model.")] = 128_256,
    dtype: DType = None,
    set_: Set = None,
    graph: Graph = False,
    repeats: Repeats = 3,
    check_tokens: CheckTokens = "1K",
    seed: Seed = 0,
    json_file: Json = None,
    plots: Plots = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of the GGUF file inside --model.")] = None,
    device: Device = None,
) -> None:
    """A whole model: time to the first token of a prompt, and of a decode step after a cache filled at random."""
    from sketch_walk.bench.model import MODEL_BASELINES, ModelOptions, head_shape, run_model
    from sketch_walk.bench.random_model import LlamaShape, random_llama
    from sketch_walk.cli import bench_report

    where = _device(device)
    default_prompt = "128K" if where.type == "cuda" else "1K"
    shape = LlamaShape(layers, *_shape(heads, head_dim), hidden, mlp, vocab)
    options = ModelOptions(
        where,
        _dtype(dtype, where),
        prompt_tokens=_lengths("prompt", prompt or default_prompt),
        cached_tokens=_lengths("cache", cache),
        batch=batch,
        densities=parse_numbers("density", density),
        block_size=block_size,
        kernels=parse_list(kernel),
        automatic=automatic,
        baselines=_baselines(baseline, MODEL_BASELINES),
        graph=graph,
        repeats=repeats,
        seed=seed,
        check_tokens=_one("check_tokens", check_tokens),
        changes=parse_settings(set_),
    )
    if path is None:
        longest = max((*options.prompt_tokens, *options.cached_tokens))
        described: dict[str, Any] = {"random_llama": shape._asdict()}
        network = random_llama(shape, options.dtype, where, longest, seed)
    else:
        from sketch_walk.integrations.models import load

        network = load(path, dtype=options.dtype, device=where, gguf_file=gguf_file).model
        described = {"name": path}
    config = options.configs(head_shape(network).head_dim)[0]
    report = bench_report.Report("model", context, options, config, json_file, plots)
    report.extra = {"model": described}
    rows = report.watch(options.num_rows(), lambda on_row: run_model(network, options, on_row))
    report.finish(rows, bench_report.attention_tables(rows), bench_report.plot_attention)


def parse_settings(given: list[str] | None) -> dict[str, Any]:
    """``["walk=none", "key_sub_block=8"]`` -> fields of a config; a value that is no JSON is a string.

    Raises
    ------
    ValueError
        For an entry without "=".
    """
    changes = {}
    for entry in given or ():
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes name=value, got {entry!r}")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    return changes


def _device(name: str | None) -> torch.device:
    from sketch_walk.bench.record import resolve_device

    return resolve_device(name)


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    import torch

    known = ("bfloat16", "float16", "float32")
    chosen = name or ("bfloat16" if device.type == "cuda" else "float32")
    if chosen not in known:
        raise ValueError(f"unknown dtype {chosen!r}; expected one of {known}")
    dtype: torch.dtype = getattr(torch, chosen)
    return dtype


def _shape(heads: str, head_dim: int) -> HeadShape:
    from sketch_walk.bench.inputs import HeadShape, check_shape

    numbers = heads.split("/")
    if len(numbers) != 2 or not all(number.strip().isdigit() for number in numbers):
        raise ValueError(f"--heads takes query/key-value heads, such as 32/8, got {heads!r}")
    shape = HeadShape(int(numbers[0]), int(numbers[1]), head_dim)
    check_shape(shape)
    return shape


def _tokens(given: str | None, device: torch.device) -> tuple[int, ...]:
    return parse_tokens("tokens", given or (GPU_TOKENS if device.type == "cuda" else CPU_TOKENS))


def _lengths(name: str, given: str) -> tuple[int, ...]:
    return () if given == "none" else parse_tokens(name, given)


def _one(name: str, given: str) -> int:
    (number, *more) = parse_tokens(name, given)
    if more:
        raise ValueError(f"{name} must be one number, got {given!r}")
    return number


def _baselines(given: str, every: tuple[str, ...]) -> tuple[str, ...]:
    return {"all": every, "none": ()}.get(given) or (() if given == "none" else parse_list(given))


def _no_grad() -> Any:
    import torch

    return torch.no_grad()
