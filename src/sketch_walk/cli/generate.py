"""`sketch-walk generate`: continue a prompt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sketch_walk.cli.format import percent_text
from sketch_walk.cli.loading import load_quietly
from sketch_walk.config import SketchWalkConfig


class Clock:
    """A streamer that only notes when tokens come: the prompt first, then each new one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt and then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate` when it is done."""


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the one option that was given.

    Raises
    ------
    ValueError
        If both or neither were given, or the prompt is empty.
    OSError
        If the file cannot be read.
    """
    if (prompt is None) == (file is None):
        raise ValueError("give either --prompt or --file")
    text = prompt if file is None else file.read_text(encoding="utf-8")
    if not text:
        raise ValueError("the prompt is empty")
    return text


def run_generate(
    *,
    model: str | None,
    prompt: str,
    config: SketchWalkConfig | None,
    mode: str,
    raw: bool,
    max_new_tokens: int,
    gguf_file: str | None,
    device: str | None,
) -> None:
    """Print the continuation, then one line of figures. `config` None is dense."""
    from sketch_walk.integrations.transformers import enable

    console = Console()
    loaded = load_quietly(console, model, gguf_file, device)
    network: Any = loaded.model
    inputs = _encode(loaded.tokenizer, prompt, raw).to(network.device)
    handle = None if config is None else enable(network, config, mode=mode, record=True)
    clock = Clock()
    begin = time.perf_counter()
    output = network.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=clock,
        pad_token_id=loaded.tokenizer.eos_token_id,
    )[0, inputs.shape[1] :]
    print(loaded.tokenizer.decode(output, skip_special_tokens=True))
    prefill, steps = clock.times[1] - begin, len(output) - 1
    figures = [f"{inputs.shape[1]:,} prompt tokens in {prefill:.2f} s ({inputs.shape[1] / prefill:,.0f} tokens/s)"]
    if steps:
        figures.append(f"{steps + 1} new tokens at {steps / (clock.times[-1] - clock.times[1]):.1f} tokens/s")
    console.print(f"[dim]{'; '.join(figures)}; {_density_text(handle)}[/]", highlight=False)


def _encode(tokenizer: Any, prompt: str, raw: bool) -> torch.Tensor:
    if raw or not tokenizer.chat_template:
        ids = tokenizer(prompt)["input_ids"]
    else:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids])


def _density_text(handle: Any) -> str:
    if handle is None:
        return "dense attention"
    summary = handle.summary()
    if not summary["sparse_calls"]:
        reasons = ", ".join(sorted(summary["reasons"]))
        return f"every call ran dense ({reasons})"
    return f"sparse calls read {percent_text(summary['block_density'])} of the causal blocks"
