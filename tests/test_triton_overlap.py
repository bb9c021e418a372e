"""Launches that start before the kernel in front has ended: where they are taken, and that they change no bit."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sketch_walk import create_sketch_walk_config, sketch_walk_attention
from sketch_walk.kernels import available
from sketch_walk.layout import make_layout
from sketch_walk.scoring import absorb_keys
from sketch_walk.state import LayerSketch

REASON = available()["triton"]
if importlib.util.find_spec("triton") is not None:
    from sketch_walk.kernels import triton_tiles
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
    assert not triton_tiles.overlaps(torch.device("cpu"))


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
    queries = [torch.randn(2, 16, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    layout = replace(make_layout(2, 1, tokens, key.device), bounds=None)
    states = [LayerSketch(config, capacity=tokens) for _ in queries]
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
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            runs.append((graph, step()))
    for end in range(tokens - 20, tokens + 1):
        layout.past.fill_(end - 1)
        layout.length.fill_(end)
        key[:, :, end - 1].normal_()
        for query in queries:
            query.normal_()
        found = []
        # The overlapping launches first: the others leave nothing to wait for.
        for graph, result in runs:
            graph.replay()
            found.append([x.clone() for x in result])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
