"""How long a call takes, and the same call inside a CUDA graph."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sketch_walk.bench.device_time import Gpu, device_times


class Timing(NamedTuple):
    """Milliseconds of one call: median, lower and upper quartile, and how many repeats they come from.

    On a GPU also `host_ms`, the median of what the host took to enqueue a call: a program that keeps no queue takes the
    longer of the two times. `host_paced` says that the device may have waited for the host while it was timed, so that
    the times are not the device's alone.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    host_paced: bool = False
    host_ms: float | None = None


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
        On a GPU: time between two events on the current stream around each repeat. The device is kept busy while the
        host enqueues repeats, for as long as that takes, and each repeat is seen to be enqueued before the device
        begins it; see `Timing.host_paced` where that fails. Elsewhere: wall clock.
    flush : bool
        Empty the GPU's L2 cache before each repeat. Nothing on a CPU.

    Raises
    ------
    ValueError
        If `repeats` is below 1.
    """
    watch = Stopwatch(call, device, flush=flush)
    watch.run(repeats, warm_up)
    return watch.timing()


class Stopwatch:
    """Times a call in one run or in several, between which others are timed.

    Parameters
    ----------
    call, device, flush
        As in `measure`.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device, *, flush: bool = True) -> None:
        self.call, self.device, self.flush = call, device, flush
        self.ms: list[float] = []
        self.host_ms: list[float] = []
        self.host_paced = False

    def run(self, repeats: int, warm_up: int = 2) -> None:
        """Time `repeats` more, as `measure` does.

        Raises
        ------
        ValueError
            If `repeats` is below 1.
        """
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        host_ms = _warm_up(self.call, self.device, warm_up)
        if self.device.type != "cuda":
            self.ms += _wall_times(self.call, repeats)
            return
        found = device_times(self.call, Gpu(self.device), repeats, flush=self.flush, host_ms=host_ms)
        self.ms += found.ms
        self.host_ms += found.host_ms
        self.host_paced |= found.host_paced

    def timing(self) -> Timing:
        """Of all runs so far."""
        host_ms = statistics.median(self.host_ms) if self.host_ms else None
        return _timing(self.ms)._replace(host_paced=self.host_paced, host_ms=host_ms)


def _warm_up(call: Callable[[], Any], device: torch.device, count: int) -> float:
    """Milliseconds of the host for the last of `count` calls, on an idle GPU only the enqueuing; 0 for none."""
    begin = end = 0.0
    for _ in range(count):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
    return 1e3 * (end - begin)


def _timing(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(median, low, high, len(times))


def _wall_times(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


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
