"""Time of a call on a GPU that never waits for the host: the host enqueues repeats behind work that keeps it busy."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch

# Read between repeats, so that no repeat finds its inputs in the L2 cache: above the 50 MB of an H100's. Read, as a
# model's weights are between two layers' attention: what is written has to leave the cache while the call is timed.
FLUSH_BYTES = 256 << 20
# Reads of that buffer ahead of the first repeat, at least.
HEAD_START = 40
# A head start lasts this many times as long as the host should need to enqueue what comes behind it.
MARGIN = 1.5
LONGEST_MS = 2000.0
# CUDA makes the host wait while about a thousand launches are pending. So a head start is not made of more launches
# than this: a longer one reads the buffer several times in each.
MAX_READS = 400
LONG_READ = 16
# torch's words for a call that waits for the device.
WAITS = "called a synchronizing CUDA operation"


class Event(Protocol):
    """What is used of `torch.cuda.Event`."""

    def record(self) -> Any: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class Device(Protocol):
    """What is used of a GPU."""

    def clock(self) -> float:
        """Milliseconds of the host."""

    def read(self, times: int = 1) -> None:
        """Enqueue one launch that reads a buffer above the L2 cache so many times."""

    def event(self) -> Event: ...
    def synchronize(self) -> None: ...
    def noting_waits(self) -> Any:
        """Context manager: a list that is filled when the host waits for the device inside."""


class Gpu:
    """The current stream of a GPU as `Device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device=device)

    def clock(self) -> float:
        return 1e3 * time.perf_counter()

    def read(self, times: int = 1) -> None:
        (self.buffer if times == 1 else self.buffer.expand(times, -1)).amax()

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    @contextmanager
    def noting_waits(self) -> Iterator[list[str]]:
        waits: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode(before)
                waits += [str(warning.message) for warning in caught if WAITS in str(warning.message)]


class Pace(NamedTuple):
    """Milliseconds of a read and of a long read on the device, and of the host for a repeat without its call."""

    read_ms: float
    long_read_ms: float
    own_ms: float

    @property
    def longest_ms(self) -> float:
        """Of a head start."""
        return min(LONGEST_MS, MAX_READS * max(self.read_ms, self.long_read_ms))

    def covers(self, host_ms: float) -> bool:
        """Whether a head start can be long enough for a call that takes the host `host_ms`."""
        return MARGIN * (host_ms + self.own_ms) <= self.longest_ms


class Group(NamedTuple):
    """A head start of `reads` launches, each of which reads the buffer `times` times, and `repeats` behind it."""

    repeats: int
    reads: int
    times: int


def plan(repeats: int, host_ms: float, pace: Pace) -> list[Group]:
    """Cut `repeats` of a call into groups, each behind a head start that covers their enqueuing.

    A call that takes the host longer than the longest head start is alone in its group, behind the shortest.
    """
    if not pace.covers(host_ms):
        return [Group(1, HEAD_START, 1)] * repeats
    each = MARGIN * (host_ms + pace.own_ms)
    count = math.ceil(repeats / max(1, int(pace.longest_ms / max(each, 1e-6))))
    groups = []
    for index in range(count):
        size = repeats // count + (index < repeats % count)
        reads, times = max(HEAD_START, math.ceil(size * each / pace.read_ms)), 1
        if reads > MAX_READS:
            reads, times = math.ceil(size * each / pace.long_read_ms), LONG_READ
        groups.append(Group(size, reads, times))
    return groups


class Repeat(NamedTuple):
    """One repeat: device and host milliseconds.

    `behind` says that the device never waited for the host in it, `waited` that the host waited for the device in its
    group.
    """

    ms: float
    host_ms: float
    behind: bool
    waited: bool


class DeviceTimes(NamedTuple):
    """Milliseconds of each repeat on the device and of its enqueuing, and whether the device waited in any."""

    ms: list[float]
    host_ms: list[float]
    host_paced: bool


def device_times(call: Callable[[], Any], gpu: Device, repeats: int, *, flush: bool, host_ms: float) -> DeviceTimes:
    """Time `call` on the device.

    A repeat in which the device may have waited for the host is timed once more, alone behind a head start for twice
    the host's time. That does not help a call that waits for the device itself.

    Parameters
    ----------
    host_ms : float
        What the host takes to enqueue a call, as far as it is known; 0 if not.
    flush : bool
        Read the buffer before each repeat.
    """
    pace = _measure_pace(gpu)
    done = []
    for group in plan(repeats, host_ms, pace):
        done += _run(call, gpu, group, pace, flush, last=False)
    for index, repeat in enumerate(done):
        if repeat.behind or repeat.waited or not pace.covers(repeat.host_ms):
            continue
        (group,) = plan(1, 2 * max(host_ms, repeat.host_ms), pace)
        (done[index],) = _run(call, gpu, group, pace, flush, last=True)
    paced = not all(repeat.behind for repeat in done)
    return DeviceTimes([repeat.ms for repeat in done], [repeat.host_ms for repeat in done], paced)


def _measure_pace(gpu: Device, count: int = 10) -> Pace:
    def read_ms(times: int) -> float:
        gpu.read(times)
        gpu.synchronize()
        begin, end = gpu.event(), gpu.event()
        begin.record()
        for _ in range(count):
            gpu.read(times)
        end.record()
        gpu.synchronize()
        return begin.elapsed_time(end) / count

    # Before the host is timed: the first read of a process loads its kernel.
    reads = read_ms(1), read_ms(LONG_READ)
    events = [(gpu.event(), gpu.event()) for _ in range(count)]
    start = gpu.clock()
    for begin, end in events:
        _repeat(lambda: None, gpu, begin, end, flush=True)
    own = (gpu.clock() - start) / count
    gpu.synchronize()
    return Pace(*reads, own_ms=own)


def _repeat(call: Callable[[], Any], gpu: Device, begin: Event, end: Event, flush: bool) -> tuple[float, bool]:
    """Enqueue one; milliseconds that the host takes for the call, and whether the device is not there yet."""
    if flush:
        gpu.read()
    begin.record()
    start = gpu.clock()
    call()
    host_ms = gpu.clock() - start
    end.record()
    return host_ms, not begin.query()


def _run(call: Callable[[], Any], gpu: Device, group: Group, pace: Pace, flush: bool, last: bool) -> list[Repeat]:
    """One head start and its repeats.

    The device cannot have waited in a repeat that it had not begun when all of it was enqueued. A call of more launches
    than CUDA lets pend is never enqueued by then, because the host waits for room; if no longer head start is left to
    try, it is enough that at its end the device has still as much to do as the shortest head start takes.
    """
    events = [(gpu.event(), gpu.event()) for _ in range(group.repeats)]
    gpu.synchronize()
    with gpu.noting_waits() as waits:
        for _ in range(group.reads):
            gpu.read(group.times)
        seen = [_repeat(call, gpu, begin, end, flush) for begin, end in events]
    enqueued = gpu.clock()
    gpu.synchronize()
    ahead_ms = gpu.clock() - enqueued
    held = group.repeats == 1 and not waits and (last or not pace.covers(seen[0][0]))
    enough = held and ahead_ms >= HEAD_START * pace.read_ms
    return [
        Repeat(begin.elapsed_time(end), host_ms, behind or enough, bool(waits))
        for (begin, end), (host_ms, behind) in zip(events, seen, strict=True)
    ]
