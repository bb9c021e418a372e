"""Selection in Triton against `selection.select_blocks`: on a GPU where there is one, else under the interpreter."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sketch_walk import SketchWalkConfig, create_sketch_walk_config
from sketch_walk.kernels import available
from sketch_walk.selection import BlockSelection, row_counts, select_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = available()["triton"]
if importlib.util.find_spec("triton") is not None:
    from sketch_walk.kernels.triton_select import (
        MAX_BLOCKS,
        SelectedRows,
        SelectLaunch,
        scores_from_peaks,
        select_from_peaks,
        select_launch,
        select_rows,
        split_heads,
    )
    from sketch_walk.kernels.triton_tiles import Device
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"triton cannot run: {REASON}"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]
BLOCK = 16


@pytest.fixture(autouse=True)
def filled_memory() -> Iterator[None]:
    """Fresh tensors hold NaN or the greatest integer: an element that no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def configured(**changes: Any) -> SketchWalkConfig:
    return create_sketch_walk_config(**{"block_size": BLOCK, "top_k_blocks": 4, **changes})


def widest(config: SketchWalkConfig, blocks: int) -> int:
    return max(config.budget(n) for n in range(blocks + 1))


def run_rows(
    scores: Tensor, first: list[int], length: list[int], config: SketchWalkConfig, **changes: Any
) -> SelectedRows:
    blocks = scores.shape[-1]
    arguments: dict[str, Any] = {
        "width": widest(config, blocks), "block_size": config.block_size,
        "per_head": config.head_mode == "per_kv_head",
    }  # fmt: skip
    past, ends = torch.tensor(first, device=DEVICE) * BLOCK + 5, torch.tensor(length, device=DEVICE)
    return select_rows(scores, past, ends, *row_counts(config, blocks, DEVICE), **{**arguments, **changes})


def expected_rows(scores: Tensor, first: list[int], length: list[int], config: SketchWalkConfig) -> BlockSelection:
    row_index = torch.tensor(first, device=DEVICE)[:, None] + torch.arange(scores.shape[2], device=DEVICE)
    has_queries = row_index * config.block_size < torch.tensor(length, device=DEVICE)[:, None]
    return select_blocks(scores, row_index, has_queries, config).per_head()


def assert_same(found: Any, expected: BlockSelection) -> None:
    """The same choice; the kernel's table may be wider."""
    width = expected.indices.shape[-1]
    assert found.indices.dtype == found.counts.dtype == torch.int32
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.indices[..., :width], expected.indices)
    assert (found.indices[..., width:] == -1).all()


def scores_of(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator)
    if kind == "ties":
        values = (values * 4).round() / 4
    elif kind == "equal":
        values = torch.full(shape, 0.25)
    elif kind == "zeros":
        values = torch.where(values < 0.8, 0.0, values)
    elif kind == "tiny":
        values = torch.exp2(-140 * values)
    elif kind == "special":
        choices = torch.tensor([0.0, -0.0, torch.nan, -torch.inf, torch.inf, -1.0, -2.5, 1.0, 3.4028235e38])
        values = choices[(values * len(choices)).long().clamp(max=len(choices) - 1)]
    return values.to(DEVICE)


KINDS = ("random", "ties", "equal", "zeros", "tiny", "special")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thresholds", [1, 4])
def test_every_row_of_a_prompt(kind: str, thresholds: int) -> None:
    config = configured(top_k_blocks=5)
    scores = scores_of(kind, (1, 1, 13, 13), seed=1)
    length = [13 * BLOCK - 3]
    found = run_rows(scores, [0], length, config, launch=SelectLaunch(thresholds, 1))
    assert_same(found, expected_rows(scores, [0], length, config))


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 40])
@pytest.mark.parametrize(("sink", "local"), [(0, 1), (1, 1), (3, 1), (0, 3), (2, 3), (3, 2)])
def test_forced_blocks_and_budgets_below_them(budget: int, sink: int, local: int) -> None:
    config = configured(top_k_blocks=budget, sink_blocks=sink, local_blocks=local)
    scores = scores_of("ties", (1, 1, 9, 9), seed=budget)
    found = run_rows(scores, [0], [9 * BLOCK], config)
    assert_same(found, expected_rows(scores, [0], [9 * BLOCK], config))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(KINDS),
    blocks=st.integers(1, 40),
    rows=st.integers(1, 4),
    tokens=st.lists(st.integers(0, 40 * BLOCK), min_size=1, max_size=3),
    sink=st.integers(0, 3),
    local=st.integers(1, 3),
    top_k=st.integers(1, 12),
    density=st.none() | st.sampled_from([0.05, 0.3, 1.0]),
    per_head=st.booleans(),
    extra=st.integers(0, 5),
)
@example("ties", 33, 4, [500, 0, 17], 2, 2, 6, None, True, 3)
@example("equal", 32, 2, [512, 480], 0, 1, 7, 0.3, False, 0)
def test_chunks_of_ragged_batches(
    kind: str, blocks: int, rows: int, tokens: list[int], sink: int, local: int, top_k: int,
    density: float | None, per_head: bool, extra: int,
) -> None:  # fmt: skip
    config = configured(
        top_k_blocks=top_k, density=density, sink_blocks=sink, local_blocks=local,
        head_mode="per_kv_head" if per_head else "shared",
    )  # fmt: skip
    scores = scores_of(kind, (len(tokens), 2 if per_head else 1, rows, blocks), seed=blocks)
    length = [min(count, blocks * BLOCK) for count in tokens]
    # The last rows of the sequences, some of them past their ends.
    first = [max(0, -(-count // BLOCK) - rows + position % 2) for position, count in enumerate(length)]
    found = run_rows(scores, first, length, config, width=widest(config, blocks) + extra)
    assert_same(found, expected_rows(scores, first, length, config))


@pytest.mark.parametrize("tail", [1, 2, 50])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_a_dense_tail_of_each_sequence(tail: int, kind: str) -> None:
    """The last rows of every sequence of a ragged batch read all their blocks, the others their budget."""
    config, first, length = configured(top_k_blocks=3), [0, 2], [9 * BLOCK - 1, 7 * BLOCK]
    scores = scores_of(kind, (2, 1, 9, 9), seed=tail)
    row_index = torch.tensor(first, device=DEVICE)[:, None] + torch.arange(9, device=DEVICE)
    ends = torch.tensor(length, device=DEVICE)[:, None]
    expected = select_blocks(
        scores,
        row_index,
        row_index * BLOCK < ends,
        config,
        dense_rows=row_index > (ends - 1) // BLOCK - tail,
    ).per_head()
    assert expected.counts.amax() == 9
    assert_same(run_rows(scores, first, length, config, tail=tail, width=9), expected)


def test_fractions_of_a_row_forced() -> None:
    config = SketchWalkConfig.icml(block_size=BLOCK, dense_tail_blocks=0)
    scores = scores_of("random", (1, 1, 3, 200), seed=3)
    found = run_rows(scores, [197], [200 * BLOCK], config)
    assert_same(found, expected_rows(scores, [197], [200 * BLOCK], config))


@pytest.mark.parametrize("blocks", [2048, 5000, MAX_BLOCKS if REASON is None else 0])
@pytest.mark.parametrize("kind", ["tiny", "zeros", "equal"])
def test_long_rows(blocks: int, kind: str) -> None:
    config = configured(density=0.2)
    scores = scores_of(kind, (1, 1, 1, blocks), seed=blocks)
    found = run_rows(scores, [blocks - 1], [blocks * BLOCK], config)
    assert_same(found, expected_rows(scores, [blocks - 1], [blocks * BLOCK], config))


def test_more_ties_than_fit_beside_a_greater_block() -> None:
    scores = torch.full((1, 1, 1, MAX_BLOCKS), 0.5, device=DEVICE)
    scores[..., 7] = 0.75
    config = configured(top_k_blocks=5)
    found = run_rows(scores, [MAX_BLOCKS - 1], [MAX_BLOCKS * BLOCK], config)
    assert found.indices.flatten().tolist() == [0, 7, MAX_BLOCKS - 3, MAX_BLOCKS - 2, MAX_BLOCKS - 1]


def test_infinity_ties_with_the_greatest_number() -> None:
    config = configured(top_k_blocks=2, sink_blocks=0)
    scores = torch.tensor([0.0, torch.inf, torch.finfo(torch.float32).max, 0.0, 0.0], device=DEVICE)[None, None, None]
    found = run_rows(scores, [4], [5 * BLOCK], config)
    assert found.indices.flatten().tolist() == [2, 4]
    assert_same(found, expected_rows(scores, [4], [5 * BLOCK], config))


def test_strided_scores() -> None:
    config = configured(head_mode="per_kv_head")
    stored = scores_of("random", (5, 2, 2, 24), seed=4)
    scores = stored.permute(2, 1, 0, 3)[..., 1:12]
    first, length = [0, 6], [5 * BLOCK, 11 * BLOCK - 1]
    assert_same(run_rows(scores, first, length, config), expected_rows(scores, first, length, config))


def test_a_narrow_table_keeps_the_best() -> None:
    config = configured(top_k_blocks=9)
    scores = scores_of("random", (1, 1, 1, 12), seed=5)
    found = run_rows(scores, [11], [12 * BLOCK], config, width=4)
    assert_same(found, expected_rows(scores, [11], [12 * BLOCK], configured(top_k_blocks=4)))


def expected_shares(peaks: Tensor, length: list[int], selections: int, block_size: int) -> Tensor:
    """Greatest softmax (base 2) over the heads of a selection, float64, 0 where a sequence has no block."""
    blocks = torch.arange(peaks.shape[2], device=peaks.device)
    ends = torch.tensor(length, device=peaks.device)[:, None, None]
    hidden = blocks * block_size >= ends
    shares = torch.softmax(peaks.double().masked_fill(hidden, -torch.inf) * torch.log(torch.tensor(2.0)).double(), -1)
    return shares.nan_to_num().unflatten(1, (selections, -1)).amax(2)[:, :, None]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "blocks", "part_heads"),
    [
        (8, 2, 21, None),
        (6, 2, 32, 2),
        (9, 3, 17, 1),
        (5, 1, 40, 3),
        (12, 4, 1, None),
        (16, 1, 9, 16),
        (32, 8, 100, None),
        (32, 8, 300, None),
    ],
)
def test_decode_from_peaks(heads: int, kv_heads: int, blocks: int, part_heads: int | None, per_head: bool) -> None:
    config = configured(top_k_blocks=6, head_mode="per_kv_head" if per_head else "shared")
    length = [blocks * BLOCK, max(1, blocks * BLOCK // 2 - 5), 0]
    generator = torch.Generator().manual_seed(heads)
    peaks = (8 * torch.randn(3, heads, blocks, generator=generator)).to(DEVICE)
    # A block without keys inside the sequence, and poison beyond its last token's block.
    peaks[0, 0, :-1] = -torch.inf
    for sequence, end in enumerate(length):
        peaks[sequence, :, -(-end // BLOCK) :] = torch.nan
    result = select_from_peaks(
        peaks, torch.tensor(length, device=DEVICE), *row_counts(config, blocks, DEVICE),
        width=widest(config, blocks), block_size=BLOCK, kv_heads=kv_heads, per_head=per_head, part_heads=part_heads,
    )  # fmt: skip
    expected = expected_shares(peaks, length, kv_heads if per_head else 1, BLOCK)
    torch.testing.assert_close(result.scores.double(), expected, rtol=1e-4, atol=1e-7)
    last = [max(end - 1, 0) // BLOCK for end in length]
    assert_same(result, expected_rows(result.scores, last, length, config))
    without_keys = peaks.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    scores = scores_from_peaks(without_keys, kv_heads=kv_heads, per_head=per_head, part_heads=part_heads)
    torch.testing.assert_close(scores, result.scores, rtol=1e-6, atol=0)


def test_parts_do_not_change_the_scores() -> None:
    peaks = scores_of("random", (2, 10, 50), seed=6) * 20
    config = configured(density=0.2)
    length = torch.tensor([800, 333], device=DEVICE)
    results = [
        select_from_peaks(
            peaks, length, *row_counts(config, 50, DEVICE), width=10, block_size=BLOCK, kv_heads=2, per_head=False,
            part_heads=part,
        )
        for part in (1, 3, 10)
    ]  # fmt: skip
    for other in results[1:]:
        assert torch.equal(other.indices, results[0].indices)
        torch.testing.assert_close(other.scores, results[0].scores, rtol=1e-6, atol=0)


def test_a_long_decode_step_in_parts() -> None:
    blocks, config = 4100, configured(density=0.05)
    peaks = scores_of("random", (1, 8, blocks), seed=10) * 20
    length = [blocks * BLOCK - 70]
    result = select_from_peaks(
        peaks, torch.tensor(length, device=DEVICE), *row_counts(config, blocks, DEVICE), width=widest(config, blocks),
        block_size=BLOCK, kv_heads=2, per_head=False, part_heads=3,
    )  # fmt: skip
    torch.testing.assert_close(result.scores.double(), expected_shares(peaks, length, 1, BLOCK), rtol=1e-4, atol=1e-9)
    assert_same(result, expected_rows(result.scores, [(length[0] - 1) // BLOCK], length, config))


def test_peaks_with_strides() -> None:
    stored = scores_of("random", (8, 3, 70), seed=7) * 9
    config = configured()
    length = torch.tensor([60 * BLOCK, 9], device=DEVICE)
    arguments: dict[str, Any] = {"width": 4, "block_size": BLOCK, "kv_heads": 4, "per_head": True}
    counts = row_counts(config, 60, DEVICE)
    view = stored.transpose(0, 1)[::2, :, 3:63]
    found = select_from_peaks(view, length, *counts, **arguments)
    copied = select_from_peaks(view.contiguous(), length, *counts, **arguments)
    assert torch.equal(found.scores, copied.scores)
    assert torch.equal(found.indices, copied.indices)


def test_empty_batches() -> None:
    config = configured()
    assert run_rows(torch.zeros(1, 1, 0, 3, device=DEVICE), [0], [0], config).indices.shape == (1, 1, 0, 3)
    result = select_from_peaks(
        torch.zeros(0, 4, 3, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE),
        *row_counts(config, 3, DEVICE), width=3, block_size=BLOCK, kv_heads=2, per_head=True,
    )  # fmt: skip
    assert result.scores.shape == (0, 2, 1, 3)
    assert scores_from_peaks(torch.zeros(0, 4, 3, device=DEVICE), kv_heads=2, per_head=False).shape == (0, 1, 1, 3)
    assert result.indices.shape == (0, 2, 1, 3)


def test_launches() -> None:
    hopper = Device(132, 232448)
    assert select_launch(2048, 2048, hopper) == SelectLaunch(1, 4)
    assert select_launch(2048, 1, hopper) == SelectLaunch(4, 8)
    assert select_launch(16384, 1, hopper) == SelectLaunch(1, 16)
    assert select_launch(4, 1, hopper).num_warps == 1
    assert [split_heads(heads, 2048) for heads in (1, 4, 9, 32, 64)] == [1, 4, 4, 4, 8]
    assert [split_heads(heads, 256) for heads in (9, 32, 33, 64)] == [9, 32, 5, 8]


@pytest.mark.parametrize(
    ("scores", "changes", "message"),
    [
        (torch.zeros(1, 1, 1, 3, dtype=torch.float64), {}, "scores must be float32"),
        (torch.zeros(1, 2, 1, 3), {}, "scores must have the shape \\(batch, 1, rows, blocks\\)"),
        (torch.zeros(1, 1, 3), {}, "scores must have the shape"),
        (torch.zeros(1, 1, 3, 3).transpose(2, 3), {}, "scores must be contiguous"),
        (torch.zeros(1, 1, 1, 3), {"width": 0}, "width"),
        (torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 32769), {}, "scores must have at most 32768"),
    ],
)
def test_refuses(scores: Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_rows(scores.to(DEVICE), [0], [BLOCK], configured(), **changes)


def test_refuses_counts_and_heads_that_do_not_fit() -> None:
    length = torch.tensor([BLOCK], device=DEVICE)
    arguments: dict[str, Any] = {"width": 2, "block_size": BLOCK, "per_head": False}
    counts = row_counts(configured(), 4, DEVICE)
    with pytest.raises(ValueError, match=r"budget must be contiguous, of shape \(4,\)"):
        select_rows(torch.zeros(1, 1, 1, 3, device=DEVICE), length * 0, length, *counts, **arguments)
    with pytest.raises(ValueError, match="kv_heads must divide the 4 heads"):
        select_from_peaks(torch.zeros(1, 4, 4, device=DEVICE), length, *counts, kv_heads=3, **arguments)
    with pytest.raises(ValueError, match="scores must be float32"):
        scores_from_peaks(torch.zeros(1, 4, 4, device=DEVICE, dtype=torch.float16), kv_heads=2, per_head=False)
    with pytest.raises(ValueError, match="peaks must have the shape"):
        select_from_peaks(torch.zeros(1, 4, device=DEVICE), length, *counts, kv_heads=2, **arguments)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs and synchronisation are a GPU's")
def test_captured_in_a_graph_and_without_synchronisation() -> None:
    config = configured(density=0.2)
    peaks = scores_of("random", (2, 32, 300), seed=8) * 20
    length = torch.tensor([300 * BLOCK, 100], device=DEVICE)
    counts, width = row_counts(config, 300, DEVICE), widest(config, 300)

    def step() -> Any:
        result = select_from_peaks(peaks, length, *counts, width=width, block_size=BLOCK, kv_heads=8, per_head=False)
        again = select_rows(result.scores, length - 1, length, *counts, width=width, block_size=BLOCK, per_head=False)
        return result, again

    step()
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            # torch warns, once a process, that it does not see every synchronisation.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result, again = step()
    peaks.copy_(scores_of("random", (2, 32, 300), seed=9) * 20)
    length.copy_(torch.tensor([290 * BLOCK - 3, 2000]))
    graph.replay()
    last = ((length - 1) // BLOCK).tolist()
    expected = expected_rows(result.scores, last, length.tolist(), config)
    assert_same(result, expected)
    assert_same(again, expected)
