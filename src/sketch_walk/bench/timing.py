"""How long a call takes, and the same call inside a CUDA graph."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Read between repeats, so that no repeat finds its inputs in the L2 cache: above the 50 MB of an H100's. Read, as a
# model's weights are between two layers' attention: what is written has to leave the cache while the call is timed.
FLUSH_BYTES = 256 << 20
# Reads of that buffer before the first repeat: milliseconds in which the host queues repeats ahead of the device.
HEAD_START = 40


class Timing(NamedTuple):
    """Milliseconds of one call: median, lower and upper quartile, and how many repeats they come from."""

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int


class Captured(NamedTuple):
    """A CUDA graph's replay, and the tensors that each replay writes anew."""

    replay: Callable[[], Any]
    result: Any


class NotCapturableError(RuntimeError):
    """A call cannot be captured into a CUDA graph; the message says why."""


def measure(
    call: Callable[[], Any],
    device: torch.device,
    repeats: int = 10,
    *,
    warm_up: int = 2,
    flush: bool = True,
) -> Timing:
    """Time `call`.

    Parameters
    ----------
    call : callable
        Run `warm_up` times untimed, then `repeats` times.
    device : torch.device
        On a GPU: time between two events on the current stream around each repeat; all repeats are queued before the
        first is waited for, and the device is kept busy while the host gets ahead, so the host's pace shows only where
        it is the slower one for long. Elsewhere: wall clock.
    flush : bool
        Empty the GPU's L2 cache before each repeat. Nothing on a CPU.

    Raises
    ------
    ValueError
        If `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warm_up):
        call()
    times = _device_times(call, device, repeats, flush) if device.type == "cuda" else _wall_times(call, repeats)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if repeats > 1 else times * 3
    return Timing(median, low, high, repeats)


def _wall_times(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def _device_times(call: Callable[[], Any], device: torch.device, repeats: int, flush: bool) -> list[float]:
    scratch = torch.zeros(FLUSH_BYTES // 4, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for _ in range(HEAD_START):
        scratch.amax()
    for begin, end in events:
        if flush:
            scratch.amax()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def capture(call: Callable[[], Any], device: torch.device) -> Captured:
    """Capture `call` into a CUDA graph.

    A call that waits for the device is found by a dry run first: a capture that fails half way leaves torch's random
    generator of the device unusable.

    Raises
    ------
    NotCapturableError
        If there is no GPU, or `call` does what a graph cannot hold.
    """
    if device.type != "cuda":
        raise NotCapturableError("CUDA graphs need a GPU")
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
            torch.cuda.synchronize()
            _refuse_synchronisation(call)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = call()
        except RuntimeError as error:
            raise NotCapturableError(f"the capture failed: {first_line(error)}") from error
        torch.cuda.synchronize()
    return Captured(graph.replay, result)


def _refuse_synchronisation(call: Callable[[], Any]) -> None:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # "a prototype feature"
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            raise NotCapturableError(f"it waits for the device: {first_line(error)}") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
