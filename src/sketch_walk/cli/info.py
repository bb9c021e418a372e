"""`sketch-walk info`: what is installed and what runs here."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from sketch_walk import kernels
from sketch_walk.extras import MissingExtraError

PACKAGES = ("sketch_walk", "torch", "transformers", "triton", "flash-attn-4", "vllm")


def run_info() -> None:
    """Print versions, the device, kernels, the dense crossover and the default model."""
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table(show_header=False, title="sketch_walk", title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, _version(package))
    table.add_row("device", torch.cuda.get_device_name() if device == "cuda" else _cpu())
    table.add_section()
    for name, reason in kernels.available().items():
        table.add_row(f"kernel {name}", "available" if reason is None else f"not available: {reason}")
    table.add_row("prefill is dense below", f"{kernels.dense_crossover(device):,} tokens on {device}")
    table.add_row("decode is dense below", f"{kernels.dense_crossover(device, decode=True):,} tokens on {device}")
    table.add_section()
    table.add_row("default model", _default_model())
    console.print(table)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _default_model() -> str:
    from sketch_walk.integrations.models import ModelLoadError, embedded_gguf, embedded_target, is_intact

    try:
        gguf = embedded_gguf()
    except (ModelLoadError, MissingExtraError) as error:
        return f"not found: {error}"
    target = embedded_target(gguf)
    state = f"converted in {target}" if is_intact(target) else "converted on first use"
    return f"{gguf.name}, {state}"
