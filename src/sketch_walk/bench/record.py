"""What a benchmark says: rows with a time or a reason, and where they were measured."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sketch_walk.bench.timing import Timing

PACKAGES = ("sketch_walk", "torch", "triton", "transformers", "flash-attn-4")
FLASH = "sdpa-flash"


@dataclass
class Row:
    """One method at one size.

    Parameters
    ----------
    phase : {"prefill", "decode"}
    batch, tokens : int
    method : str
        A dense baseline's name, or a sparse kernel's as it was asked for.
    kind : str
        "dense"; "attention" (a kernel on a random selection, no selector); "layer" (the selector's cost included);
        "automatic" (whatever the automatic path chooses); "model".
    impl : str, optional
        The kernel that ran.
    density : float, optional
        As configured; `block_density` is the fraction of causal blocks that was read, the diagonal counted whole.
    error : float, optional
        Largest relative error of the checks that came before the time.
    graph : bool
        Timed as a replay of a CUDA graph.
    timing : Timing, optional
        None if there is none: `reason` says why.
    failed : bool
        A kernel that should have run raised, or did not match. Its row has no time.
    note : str, optional
        Beside a time: what is particular about it.
    """

    phase: str
    batch: int
    tokens: int
    method: str
    kind: str
    impl: str | None = None
    block_size: int | None = None
    density: float | None = None
    block_density: float | None = None
    error: float | None = None
    graph: bool = False
    timing: Timing | None = None
    tflops: float | None = None
    over_flash: float | None = None
    over_fastest_dense: float | None = None
    fastest_dense: str | None = None
    reason: str | None = None
    note: str | None = None
    failed: bool = False

    @property
    def size(self) -> tuple[str, int, int, bool]:
        """What rows must share to be compared: a time inside a graph is compared with a time inside one."""
        return self.phase, self.batch, self.tokens, self.graph

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; empty fields are left out, times are flat."""
        values = {name: value for name, value in asdict(self).items() if value is not None and name != "timing"}
        if not self.failed:
            del values["failed"]
        for name in ("block_density", "error", "tflops", "over_flash", "over_fastest_dense"):
            if name in values:
                values[name] = float(f"{values[name]:.4g}")
        if self.timing is not None:
            values |= timing_dict(self.timing)
        return values


def code_digest(*files: Path) -> str:
    """Of the package's modules and of `files`: what times were measured with."""
    package = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in (*package, *files))).hexdigest()[:16]


def resumed(file: Path | None, header: dict[str, Any], same: Sequence[str]) -> dict[str, Any]:
    """What a JSON file holds already, if its fields `same` are those of `header`; else nothing."""
    if file is None or not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found if all(found.get(name) == header[name] for name in same) else {}


def timing_dict(timing: Timing) -> dict[str, Any]:
    """A timing with sensible digits; what it does not have is left out."""
    return {
        name: value if isinstance(value, int) else float(f"{value:.5g}")
        for name, value in timing._asdict().items()
        if value is not None
    }


def compare(rows: Iterable[Row]) -> None:
    """Fill in how many times faster than FlashAttention-2 and than the fastest dense kernel each row is."""
    rows = [row for row in rows if row.timing is not None]
    for row in rows:
        dense = {
            other.method: other.timing.median_ms
            for other in rows
            if other.kind == "dense" and other.size == row.size and other.timing is not None
        }
        if row.kind == "dense" or not dense or row.timing is None:
            continue
        row.fastest_dense = min(dense, key=dense.__getitem__)
        row.over_fastest_dense = dense[row.fastest_dense] / row.timing.median_ms
        row.over_flash = dense[FLASH] / row.timing.median_ms if FLASH in dense else None


@dataclass(frozen=True)
class Environment:
    """Where it was measured."""

    device: str
    compute_capability: str | None
    threads: int | None
    versions: dict[str, str | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; empty fields are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def environment(device: torch.device) -> Environment:
    """Name of the device and versions of what computes (None: not installed)."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__
    if device.type != "cuda":
        return Environment(f"{platform.machine()} CPU", None, torch.get_num_threads(), versions)
    major, minor = torch.cuda.get_device_capability(device)
    return Environment(torch.cuda.get_device_name(device), f"{major}.{minor}", None, versions)


def resolve_device(name: str | None) -> torch.device:
    """A device that is there; None is the GPU if there is one, else the CPU.

    Raises
    ------
    ValueError
        For a name that is no device, or a GPU that torch does not see.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be such as 'cpu' or 'cuda', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a GPU, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} is not there: torch sees no GPU")
        # Some of torch's calls take no GPU without a number.
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device
