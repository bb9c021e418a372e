"""The commands and their options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sketch_walk.cli import bench
from sketch_walk.cli.settings import make_config, parse_list, parse_tokens
from sketch_walk.complexity import ModelShape

# Where a command is given neither a preset, nor a density, nor a count of blocks.
USUAL_DENSITY = 0.2

app = typer.Typer(
    help="Training-free block-sparse attention for long-context LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub id, folder or .gguf file. Default: the embedded SmolLM2.")
]
GgufFile = Annotated[str | None, typer.Option(help="Name of the GGUF file inside --model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: the GPU if there is one.")]
Preset = Annotated[str | None, typer.Option(help="default, high_quality, high_speed or long_context.")]
Density = Annotated[float | None, typer.Option(help="Fraction of the causal blocks to read, in (0, 1].")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens per block.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Blocks read by each query block.")]


@app.command()
def demo(
    model: Model = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 3000,
    samples: Annotated[int, typer.Option(help="Prompts of each of the three tasks.")] = 2,
    density: Annotated[float, typer.Option(help="Fraction of the causal blocks to read.")] = 0.2,
    output: Annotated[Path, typer.Option(help="Folder for demo.json and blocks.png.")] = Path("demo-output"),
    device: Device = None,
) -> None:
    """Ask a model for codes hidden in long texts, with dense and with sparse attention, side by side."""
    from sketch_walk.cli.demo import run_demo

    run_demo(model=model, tokens=tokens, samples=samples, density=density, output=output, device=device)


@app.command()
def generate(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a text file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 100,
    mode: Annotated[str, typer.Option(help="Which calls are sparse: both, prefill or decode.")] = "both",
    dense: Annotated[bool, typer.Option("--dense", help="Run the model's own dense attention.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Leave the model's chat template out.")] = False,
    density: Density = None,
    preset: Preset = None,
    block_size: BlockSize = None,
    top_k: TopK = None,
    dense_below: Annotated[
        int | None, typer.Option(min=0, help="Run shorter calls dense. Default: the measured crossover.")
    ] = None,
    gguf_file: GgufFile = None,
    device: Device = None,
) -> None:
    """Continue a prompt greedily, and say what was read and how fast."""
    from sketch_walk.cli.generate import read_prompt, run_generate

    config = None
    if not dense:
        config = make_config(preset, density, block_size, top_k, dense_below, usual_density=USUAL_DENSITY)
    run_generate(
        model=model,
        prompt=read_prompt(prompt, file),
        config=config,
        mode=mode,
        raw=raw,
        max_new_tokens=max_new_tokens,
        gguf_file=gguf_file,
        device=device,
    )


@app.command()
def recall(
    model: Model = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read a text file instead of a task.")] = None,
    task: Annotated[str, typer.Option(help="Built-in text: noise, prose or multi_key.")] = "prose",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text; a file is cut there.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Number of the built-in text.")] = 0,
    selector: Annotated[
        str, typer.Option(help="sketch, oracle_max, oracle_mean, quest, xattention, flexprefill, block_means or local.")
    ] = "sketch",
    density: Density = None,
    preset: Preset = None,
    block_size: BlockSize = None,
    top_k: TopK = None,
    walk: Annotated[str | None, typer.Option(help="damped, product or none. Default: the preset's.")] = None,
    exponent: Annotated[float | None, typer.Option(help="Power of the scores. Default: the preset's.")] = None,
    follow: Annotated[str, typer.Option(help="Outputs that layers hand on: sparse or dense.")] = "sparse",
    decode_tokens: Annotated[int, typer.Option(min=0, help="Measure the last tokens, read one by one.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for recall.json and pictures.")] = Path("recall-output"),
    gguf_file: GgufFile = None,
    device: Device = None,
) -> None:
    """Measure what a selector keeps of the exact attention, per layer and head, beside the oracle."""
    from sketch_walk.cli.recall import run_recall

    config = make_config(preset, density, block_size, top_k, dense_below=0, usual_density=USUAL_DENSITY)
    changes: dict[str, Any] = {"walk": walk, "sparsity_exponent": exponent}
    run_recall(
        model=model,
        file=file,
        task=task,
        tokens=tokens,
        seed=seed,
        selector=selector,
        config=replace(config, **{name: value for name, value in changes.items() if value is not None}),
        follow=follow,
        decode_tokens=decode_tokens,
        output=output,
        gguf_file=gguf_file,
        device=device,
    )


@app.command()
def ablate(
    configs: Annotated[Path, typer.Argument(help="JSON file of groups of configs, such as benchmarks/ablations.json.")],
    model: Model = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Text file to take passages from. Default: built-in prose.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Lengths, such as 4000,8000. Default: the file's.")] = None,
    samples: Annotated[int | None, typer.Option(help="Prompts per task. Default: the file's.")] = None,
    first_seed: Annotated[int | None, typer.Option(help="Seed of the first prompt. Default: the file's.")] = None,
    groups: Annotated[str | None, typer.Option(help="Names of groups, such as walk,density. Default: all.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences per forward pass. Default: 65,536 tokens on a GPU, 1 on a CPU.")
    ] = None,
    kernel: Annotated[str, typer.Option(help="Kernels of the sparse path: auto, reference, triton or cute.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write results to, again after every row.")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Folder to write one PNG a group into.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what the --json file holds and measure the rest.")
    ] = False,
    seconds: Annotated[float | None, typer.Option(help="Start no row after that many seconds.")] = None,
    gguf_file: GgufFile = None,
    device: Device = None,
) -> None:
    """Measure what each part of the method is worth, every row beside dense over the same prompts."""
    from sketch_walk.cli.ablate import run_ablate

    run_ablate(
        configs=configs,
        file=file,
        model=model,
        gguf_file=gguf_file,
        device=device,
        tokens=None if tokens is None else parse_tokens("tokens", tokens),
        samples=samples,
        first_seed=first_seed,
        groups=None if groups is None else parse_list(groups),
        batch=batch,
        kernel=kernel,
        json_file=json_file,
        plots=plots,
        resume=resume,
        seconds=seconds,
    )


@app.command()
def sparsity(
    seq_len: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 65_536,
    preset: Preset = None,
    block_size: BlockSize = None,
    top_k: TopK = None,
    density: Density = None,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = ModelShape().layers,
    heads: Annotated[int, typer.Option(help="Query heads.")] = ModelShape().heads,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = ModelShape().kv_heads,
    head_dim: Annotated[int, typer.Option(help="Size of one head.")] = ModelShape().head_dim,
) -> None:
    """Count operations and memory for a model shape (default: Llama-3.1-8B in 16 bits)."""
    from sketch_walk.cli.sparsity import run_sparsity

    config = make_config(preset, density, block_size, top_k)
    run_sparsity(seq_len, config, ModelShape(layers, heads, kv_heads, head_dim))


@app.command()
def info() -> None:
    """Versions, device, kernels, and where dense attention is still faster."""
    from sketch_walk.cli.info import run_info

    run_info()
