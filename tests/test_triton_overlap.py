"""Launches that start before the kernel in front has ended: where they are taken, and that they change no bit."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sketch_walk import create_sketch_walk_config, sketch_walk_attention
from sketch_walk.bench.timing import capture
from sketch_walk.kernels import available
from sketch_walk.layout import make_layout
from sketch_walk.scoring import absorb_keys
from sketch_walk.state import LayerSketch, SharedMemory

REASON = available()["triton"]
if importlib.util.find_spec("triton") is not None:
    from sketch_walk.kernels import triton_decode, triton_peaks, triton_select, triton_sketch, triton_tiles
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"triton cannot run: {REASON}")


@pytest.mark.parametrize(
    ("capability", "hip", "interpreted", "known", "expected"),
    [
        ((9, 0), None, False, True, True),
        ((10, 0), None, False, True, True),
        ((8, 9), None, False, True, False),
        ((9, 4), "6.4", False, True, False),
        ((9, 0), None, True, True, False),
        ((9, 0), None, False, False, False),
    ],
)
def test_devices_that_take_early_launches(
    capability: tuple[int, int],
    hip: str | None,
    interpreted: bool,
    known: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton_tiles, "interpreted", lambda: interpreted)
    monkeypatch.setattr(triton_tiles, "gdc_wait", object() if known else None)
    assert triton_tiles._overlaps.__wrapped__(0) is expected
    assert not triton_tiles.overlaps(torch.device("cpu"), 1)


def test_only_small_steps_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of many sequences fill the device by themselves."""
    monkeypatch.setattr(triton_tiles, "_overlaps", lambda index: True)
    taken = [triton_tiles.overlaps(torch.device("cuda"), batch * 8) for batch in (1, 2, 3, 8)]
    assert taken == [True, True, False, False]
    monkeypatch.setattr(triton_tiles, "_overlaps", lambda index: False)
    assert not triton_tiles.overlaps(torch.device("cuda"), 1)


@pytest.mark.parametrize(("batch", "kv_heads", "expected"), [(1, 2, True), (2, 8, True), (3, 8, False), (17, 1, False)])
def test_every_launch_of_a_step_counts_the_same(
    batch: int, kv_heads: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of one chain overlap all or none: sequences and key/value heads, whatever the queries' heads."""
    counted = []

    def counting(device: torch.device, pairs: int) -> bool:
        counted.append(pairs)
        return False

    for module in (triton_sketch, triton_peaks, triton_select, triton_decode):
        monkeypatch.setattr(module, "overlaps", counting)
    config = create_sketch_walk_config(block_size=16, density=0.5)
    key, value = (torch.randn(batch, kv_heads, 65, 32, device=DEVICE) for _ in range(2))
    query = torch.randn(batch, 2 * kv_heads, 1, 32, device=DEVICE)
    state = LayerSketch(config)
    absorb_keys(state, key[:, :, :64], make_layout(batch, 64, 64, key.device), query)
    sketch_walk_attention(query, key, value, config, state=state, impl="triton")
    assert len(counted) == 4
    assert set(counted) == {batch * kv_heads}
    assert (batch * kv_heads <= triton_tiles.MOST_OVERLAPPED) is expected


def test_others_get_no_launch_argument() -> None:
    """AMD's launches know no such argument, and Triton before 3.4 has none."""
    assert triton_tiles.dependent(False) == {"PDL": False}
    assert triton_tiles.dependent(True) == {"PDL": True, "launch_pdl": True}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches overlap on a GPU only")
@pytest.mark.parametrize(("block", "tokens"), [(64, 40_000), (32, 900)])
def test_layers_of_a_graph_are_the_same_bits(block: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several layers in a row, whose buffers share memory, and a sequence that grows from replay to replay."""
    torch.manual_seed(block)
    config = create_sketch_walk_config(block_size=block, density=0.1)
    key, value = (torch.randn(2, 4, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert triton_tiles.overlaps(key.device, 2 * 4) is triton_tiles._overlaps(key.device.index)
    queries = [torch.randn(2, 16, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    layout = replace(make_layout(2, 1, tokens, key.device), bounds=None)
    shared: dict[torch.device, SharedMemory] = {}
    states = [LayerSketch(config, capacity=tokens, shared=shared) for _ in queries]
    for state, query in zip(states, queries, strict=True):
        absorb_keys(state, key, make_layout(2, tokens, tokens, key.device), query)

    def step() -> list[Tensor]:
        results = [
            sketch_walk_attention(query, key, value, config, state=state, layout=layout, impl="triton")
            for query, state in zip(queries, states, strict=True)
        ]
        return [x for r in results for x in (r.output, r.walk, r.selection.indices, r.selection.counts)]

    runs = []
    real = triton_tiles._overlaps
    for overlaps in (real, lambda index: False):
        monkeypatch.setattr(triton_tiles, "_overlaps", overlaps)
        runs.append(capture(step, key.device))
    memories = [memory for state in states for memory in state.memories()]
    assert len(memories) == len(states) + 1
    for end in range(tokens - 20, tokens + 1):
        layout.past.fill_(end - 1)
        layout.length.fill_(end)
        key[:, :, end - 1].normal_()
        for query in queries:
            query.normal_()
        found = []
        held = [torch.rand_like(memory) * end for memory in memories]
        # The overlapping launches first: the others leave nothing to wait for. Each remembers the same beforehand.
        for replay, result in runs:
            for memory, before in zip(memories, held, strict=True):
                memory.copy_(before)
            replay()
            found.append([x.clone() for x in (*result, *memories)])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
