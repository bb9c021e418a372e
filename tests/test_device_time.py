"""Timing on a GPU with the host ahead: the plan of head starts, and what is done on a device of known times."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

from sketch_walk.bench import measure
from sketch_walk.bench.device_time import (
    HEAD_START,
    LONG_READ,
    LONGEST_MS,
    MARGIN,
    MAX_READS,
    Group,
    Pace,
    _measure_pace,
    _run,
    device_times,
    plan,
)

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
READ_MS, LAUNCH_MS, PENDING = 0.1, 0.005, 1000


class SimulatedEvent:
    """Reached when the device has done what was enqueued before it."""

    def __init__(self, gpu: Simulated) -> None:
        self.gpu = gpu
        self.at = 0.0

    def record(self) -> None:
        self.at = max(self.gpu.free, self.gpu.now)

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def elapsed_time(self, end_event: SimulatedEvent) -> float:
        return end_event.at - self.at


class Simulated:
    """A device and a host with clocks of their own; the host waits while `PENDING` launches are pending."""

    def __init__(self) -> None:
        self.now = self.free = 0.0
        self.pending: deque[float] = deque()
        self.waits: list[str] = []
        self.reads: list[int] = []

    def clock(self) -> float:
        return self.now

    def work(self, host_ms: float) -> None:
        self.now += host_ms

    def launch(self, device_ms: float) -> None:
        self.now += LAUNCH_MS
        while self.pending and (self.pending[0] <= self.now or len(self.pending) >= PENDING):
            self.now = max(self.now, self.pending.popleft())
        self.free = max(self.free, self.now) + device_ms
        self.pending.append(self.free)

    def read(self, times: int = 1) -> None:
        self.reads.append(times)
        self.launch(times * READ_MS)

    def event(self) -> SimulatedEvent:
        return SimulatedEvent(self)

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def wait(self) -> None:
        self.synchronize()
        self.waits.append("it waits")

    @contextmanager
    def noting_waits(self) -> Iterator[list[str]]:
        self.waits = []
        yield self.waits


def call_of(gpu: Simulated, host_ms: float, *kernels: float) -> tuple[Callable[[], None], list[float]]:
    """A call that works on the host, then launches kernels; and the moments at which it was made."""
    made: list[float] = []

    def call() -> None:
        made.append(gpu.now)
        gpu.work(host_ms)
        for kernel in kernels:
            gpu.launch(kernel)

    return call, made


PACE = Pace(READ_MS, LONG_READ * READ_MS, 0.02)


@pytest.mark.parametrize("repeats", [1, 7, 50, 1000])
@pytest.mark.parametrize("host_ms", [0.0, 0.01, 0.2, 1.0, 30.0, 400.0])
def test_every_group_has_a_head_start_that_covers_it(repeats: int, host_ms: float) -> None:
    groups = plan(repeats, host_ms, PACE)
    assert sum(group.repeats for group in groups) == repeats
    sizes = [group.repeats for group in groups]
    assert max(sizes) - min(sizes) <= 1
    for group in groups:
        lasts = group.reads * group.times * READ_MS
        assert lasts >= MARGIN * (host_ms + PACE.own_ms) * group.repeats - 1e-6
        assert group.reads * group.times >= HEAD_START
        assert group.reads <= MAX_READS
        assert lasts <= LONGEST_MS
        # No longer than what covers it, up to one launch.
        needed = MARGIN * (host_ms + PACE.own_ms) * group.repeats
        assert group.reads == HEAD_START or lasts < needed + group.times * READ_MS + 1e-6
    # No more groups than the longest head start asks for.
    for one, other in pairwise(groups):
        both = one.repeats + other.repeats
        assert MARGIN * (host_ms + PACE.own_ms) * both > PACE.longest_ms * 0.5


def test_short_calls_have_the_shortest_head_start_and_those_that_none_covers_too() -> None:
    assert plan(10, 0.05, PACE) == [Group(10, HEAD_START, 1)]
    assert plan(50, 0.2, PACE) == [Group(50, 165, 1)]
    assert plan(50, 1.0, PACE) == [Group(50, 48, LONG_READ)]
    assert not PACE.covers(5000.0)
    assert plan(3, 5000.0, PACE) == [Group(1, HEAD_START, 1)] * 3
    slow = Pace(10.0, 160.0, 0.02)
    assert slow.longest_ms == LONGEST_MS
    assert [group.repeats for group in plan(6, 500.0, slow)] == [2, 2, 2]


def test_the_pace_is_that_of_the_device_and_of_the_host() -> None:
    pace = _measure_pace(Simulated())
    assert pace.read_ms == pytest.approx(READ_MS, rel=0.01)
    assert pace.long_read_ms == pytest.approx(LONG_READ * READ_MS, rel=0.01)
    assert pace.own_ms == pytest.approx(LAUNCH_MS)


@pytest.mark.parametrize("flush", [True, False])
def test_a_slow_host_does_not_show(flush: bool) -> None:
    gpu = Simulated()
    call, made = call_of(gpu, 0.2, 0.05)
    # Behind a fixed number of reads it does.
    old = _run(call, gpu, Group(100, HEAD_START, 1), PACE, flush, last=False)
    assert not old[-1].behind
    assert old[-1].ms > 0.1, "twice as long as the kernel"
    made.clear()
    found = device_times(call, gpu, 50, flush=flush, host_ms=0.205)
    assert found.ms == pytest.approx([0.05] * 50)
    assert found.host_ms == pytest.approx([0.205] * 50)
    assert not found.host_paced
    assert len(made) == 50


def test_a_host_that_was_thought_faster_gets_a_longer_head_start() -> None:
    gpu = Simulated()
    call, made = call_of(gpu, 1.0, 0.05)
    found = device_times(call, gpu, 20, flush=True, host_ms=0.0)
    assert found.ms == pytest.approx([0.05] * 20)
    assert not found.host_paced
    assert 20 < len(made) <= 40, "those that were behind the host are not timed again"


def test_more_launches_than_may_pend_are_seen_to_be_behind_the_host() -> None:
    gpu = Simulated()
    call, made = call_of(gpu, 0.3, *[0.02] * 30)
    found = device_times(call, gpu, 50, flush=True, host_ms=0.45)
    assert found.ms == pytest.approx([0.6] * 50)
    assert not found.host_paced
    assert len(made) == 50


def test_a_call_that_holds_the_host_back_is_the_device_s() -> None:
    gpu = Simulated()
    call, made = call_of(gpu, 0.3, *[1.0] * 3000)
    found = device_times(call, gpu, 2, flush=False, host_ms=2000.0)
    assert found.ms == pytest.approx([3000.0] * 2)
    assert not found.host_paced
    assert len(made) == 2
    # As much, when its time on the host was not known or could have been covered.
    assert not device_times(call, gpu, 1, flush=False, host_ms=0.0).host_paced
    call, _ = call_of(gpu, 0.3, *[0.1] * 3000)
    assert not device_times(call, gpu, 2, flush=False, host_ms=0.0).host_paced


def test_a_host_that_no_head_start_covers_is_told() -> None:
    gpu = Simulated()
    call, made = call_of(gpu, 5000.0, 0.05)
    found = device_times(call, gpu, 2, flush=True, host_ms=5000.0)
    assert found.host_paced
    assert len(made) == 2
    # Launches by the thousand, each slower on the host than on the device.
    call, _ = call_of(gpu, 0.0, *[0.001] * 200_000)
    assert device_times(call, gpu, 1, flush=True, host_ms=0.0).host_paced


def test_a_call_that_waits_for_the_device_is_told_and_not_repeated() -> None:
    gpu = Simulated()
    made = []

    def call() -> None:
        made.append(None)
        gpu.launch(0.1)
        gpu.wait()
        gpu.launch(50.0)

    found = device_times(call, gpu, 3, flush=True, host_ms=0.2)
    assert found.host_paced
    assert len(made) == 3

    def slow() -> None:
        gpu.work(5000.0)
        call()

    # Much to do at its end does not make up for the wait.
    assert device_times(slow, gpu, 1, flush=True, host_ms=5000.0).host_paced


@gpu_only
def test_on_a_gpu() -> None:
    x = torch.ones(1 << 20, device="cuda")

    def slow_host() -> None:
        end = time.perf_counter() + 2e-3
        while time.perf_counter() < end:
            pass
        x.mul_(1.0)

    timing = measure(slow_host, x.device, 60)
    assert not timing.host_paced
    assert timing.high_ms < 0.5
    assert timing.host_ms is not None
    assert timing.host_ms >= 2
    waiting = measure(lambda: x.sum().item(), x.device, 5)
    assert waiting.host_paced
    assert not measure(lambda: x * 2, x.device, 5, warm_up=0).host_paced
    assert torch.cuda.get_sync_debug_mode() == 0
