"""`impl="cute"`: what flash-attn-4 is handed, when it is chosen, and, on a GPU that runs it, what comes back.

Away from such a GPU its two documented contracts (pages, block-sparse tensors) are computed here in float64 from the
very tensors that the library would get.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sketch_walk import SketchWalkConfig, create_sketch_walk_config, kernels, sketch_walk_attention
from sketch_walk.extras import MissingExtraError
from sketch_walk.kernels import attend, attend_dense, available, check_impl, dense, flash_cute, sketches_with_triton
from sketch_walk.kernels.flash_cute import Plan
from sketch_walk.layout import Layout, make_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON, CUTE = available()["triton"], available()["cute"]
needs_triton = pytest.mark.skipif(TRITON is not None, reason=f"triton cannot run: {TRITON}")
needs_hopper = pytest.mark.skipif(CUTE is not None, reason=f"flash-attn-4 cannot run: {CUTE}")

PAGES, HALF_PAGES, BLOCKS = (
    Plan("pages", (128, 128), False),
    Plan("pages", (128, 32), True),
    Plan("blocks", None, False),
)
# batch, heads, kv_heads, new tokens, past tokens, head_dim, block, tokens of memory behind the last key
CASES = [
    (1, 4, 2, 256, 0, 32, 64, 0),
    (2, 4, 1, 200, 0, 40, 64, 30),
    (1, 3, 3, 193, 64, 32, 64, 100),
    (2, 4, 2, 300, 101, 32, 64, 0),
    (1, 2, 1, 260, 128, 32, 128, 5),
    (1, 2, 2, 130, 65, 32, 64, 5),
]


def inputs(
    batch: int, heads: int, kv_heads: int, new: int, past: int, dim: int, behind: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Layout]:
    """Random tensors; the cache they are part of holds NaN behind the last key."""
    generator = torch.Generator().manual_seed(new + 7 * past + dim)
    total = past + new
    # As transformers has them: tokens before heads in the queries' memory, after them in the cache's.
    query = torch.randn(batch, new, heads, dim, generator=generator).transpose(1, 2)
    key, value = (torch.randn(batch, kv_heads, total + behind, dim, generator=generator) for _ in range(2))
    for x in (key, value):
        x[:, :, total:] = torch.nan
    query, key, value = (x.to(DEVICE, dtype) for x in (query, key, value))
    return query, key[:, :, :total], value[:, :, :total], make_layout(batch, new, total, query.device)


def selected(query: Tensor, key: Tensor, value: Tensor, layout: Layout, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and counts with their head axis, and the reference's output."""
    config = create_sketch_walk_config(block_size=block, density=0.5, min_blocks=2)
    result = sketch_walk_attention(query, key, value, config, layout=layout, impl="reference")
    return *result.selection.per_head(), result.output


def softmax_rows(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Attention of [tokens, heads, dim] over [keys, kv_heads, dim] in float64: hidden keys weigh 0, NaN stays NaN."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (key, value))
    logits = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), values)


def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, used: Tensor, out: Tensor, scale: float
) -> None:
    """Causal, bottom-right; a page in use is loaded to its end."""
    size, tokens = key.shape[1], query.shape[1]
    for row in range(query.shape[0]):
        length = int(used[row])
        pages = table[row, : -(-length // size)].long()
        keys, values = (x[pages].flatten(0, 1) for x in (key, value))
        place = torch.arange(keys.shape[0], device=key.device)
        last = length - tokens + torch.arange(tokens, device=key.device)
        hidden = place[None] > last[:, None]
        out[row] = softmax_rows(query[row], keys, values, hidden, scale).to(out.dtype)


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, lists: flash_cute.BlockLists, block: int, out: Tensor, scale: float
) -> None:
    """Full blocks unmasked, masked blocks causal bottom-right; keys beyond the last read as zeros."""
    shift = key.shape[1] - query.shape[1]
    for b in range(query.shape[0]):
        for row in range(-(-query.shape[1] // block)):
            tokens = torch.arange(row * block, min((row + 1) * block, query.shape[1]), device=query.device)
            full = lists.full_index[b, 0, row, : int(lists.full_count[b, 0, row])].tolist()
            masked = lists.mask_index[b, 0, row, : int(lists.mask_count[b, 0, row])].tolist()
            assert not set(full) & set(masked)
            place = torch.cat([torch.arange(n * block, (n + 1) * block, device=query.device) for n in full + masked])
            inside = place < key.shape[1]
            assert inside[: len(full) * block].all()
            hidden = place[None] > tokens[:, None] + shift
            hidden[:, : len(full) * block] = False
            keys, values = (x[b, place[inside]] for x in (key, value))
            out[b, tokens] = softmax_rows(query[b, tokens], keys, values, hidden[:, inside], scale).to(out.dtype)


def computed_here(monkeypatch: pytest.MonkeyPatch, block: int) -> list[str]:
    """Replace flash-attn-4 by its contracts in float64; returns the routes that calls took."""
    routes: list[str] = []

    def forward(query: Tensor, key: Tensor, value: Tensor, *, out: Tensor, **options: Any) -> None:
        assert options["causal"]
        scale = options["softmax_scale"]
        if options.get("page_table") is not None:
            routes.append("pages")
            assert options["page_table"].dtype == options["seqused_k"].dtype == torch.int32
            paged_attention(query, key, value, options["page_table"], options["seqused_k"], out, scale)
        else:
            routes.append("blocks")
            block_sparse_attention(query, key, value, options["block_sparse_tensors"], block, out, scale)

    monkeypatch.setattr(flash_cute, "forward", lambda: forward)
    monkeypatch.setattr(flash_cute, "_block_sparse_tensors", lambda lists, block_size: lists)
    return routes


@needs_triton
@pytest.mark.parametrize("plan", [PAGES, HALF_PAGES, BLOCKS], ids=["pages", "half pages", "blocks"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case))
def test_what_flash_attn_4_is_handed_gives_the_references_output(
    monkeypatch: pytest.MonkeyPatch, case: tuple[int, ...], plan: Plan
) -> None:
    batch, heads, kv_heads, new, past, dim, block, behind = case
    query, key, value, layout = inputs(batch, heads, kv_heads, new, past, dim, behind, torch.float32)
    indices, counts, expected = selected(query, key, value, layout, block)
    routes = computed_here(monkeypatch, block)
    output = flash_cute.attend_selected(
        query, key, value, indices, counts, layout, block_size=block, scale=dim**-0.5, plan=plan
    )
    assert routes == (["pages"] * batch if plan.route == "pages" else ["blocks"])
    assert output.shape == query.shape
    torch.testing.assert_close(output, expected, atol=1e-5 if DEVICE == "cpu" else 5e-3, rtol=0)


def test_pages_are_views() -> None:
    query, key, value, _ = inputs(1, 4, 2, 256, 0, 32, 70, torch.float16)
    indices = torch.tensor([[0, -1], [0, 1], [1, 2], [0, 3]], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([1, 2, 2, 2], dtype=torch.int32, device=DEVICE)
    call = flash_cute.paged_call(query[0], key[0], value[0], indices, counts, 64, 64)
    for view, source in ((call.query, query), (call.key, key), (call.value, value)):
        assert view.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    assert call.key.shape == (4, 64, 2, 32)
    assert torch.equal(call.key[2, 5, 1], key[0, 1, 2 * 64 + 5])
    assert torch.equal(call.query[3, 7, 2], query[0, 2, 3 * 64 + 7])
    assert call.table.tolist() == [[0, 0], [0, 1], [1, 2], [0, 3]]
    assert call.used.tolist() == [64, 128, 128, 128]
    half = flash_cute.paged_call(query[0], key[0], value[0], indices, counts, 64, 32)
    assert half.key.shape == (8, 32, 2, 32)
    assert half.table[2].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("block", "dim", "group", "capability", "expected"),
    [
        (128, 128, 4, 9, Plan("blocks", (128, 128), True)),
        (64, 128, 4, 9, Plan("pages", (128, 128), True)),
        (64, 64, 1, 9, Plan("pages", (64, 64), False)),
        (128, 256, 2, 9, Plan("pages", (128, 64), True)),
        (64, 128, 4, 10, Plan("pages", None, True)),
    ],
)
def test_a_shape_has_one_plan(block: int, dim: int, group: int, capability: int, expected: Plan) -> None:
    assert flash_cute.plan_for(block, dim, group, capability) == expected


def call(
    block: int = 64, dim: int = 32, new: int = 128, past: int = 0, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """Arguments of `supported`, on the CPU."""
    query, key = torch.zeros(1, 4, new, dim, dtype=dtype), torch.zeros(1, 2, past + new, dim, dtype=dtype)
    layout = make_layout(1, new, past + new, query.device)
    rows = layout.num_query_blocks(block)
    indices = torch.zeros(1, 1, rows, 2, dtype=torch.int32)
    tensors = {"query": query, "key": key, "value": key.clone(), "indices": indices}
    return {**tensors, "layout": layout, "block_size": block}


def padded() -> dict[str, Any]:
    arguments = call()
    valid = torch.ones(1, 128, dtype=torch.bool)
    valid[:, :5] = False
    return {**arguments, "layout": make_layout(1, 128, 128, valid.device, valid=valid)}


def per_head() -> dict[str, Any]:
    arguments = call()
    return {**arguments, "indices": arguments["indices"].expand(-1, 2, -1, -1)}


def with_gradients() -> dict[str, Any]:
    arguments = call()
    return {**arguments, "query": arguments["query"].requires_grad_()}


def odd_rows() -> dict[str, Any]:
    arguments = call()
    return {**arguments, "key": torch.zeros(1, 2, 128, 33, dtype=torch.float16)[..., :32]}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (call(block=32), "block_size 32 is not one of"),
        (per_head(), "one selection shared by all heads"),
        (call(dim=36), "multiple of 8 in 32 ... 256, got 36"),
        (call(dtype=torch.float32), "neither float16 nor bfloat16"),
        (with_gradients(), "no gradients"),
        (padded(), "no padding"),
        (call(new=1, past=64), "hold no whole block"),
        (call(new=100, past=10), "hold no whole block"),
        (odd_rows(), "multiples of 16 bytes"),
        (call(), "not on a GPU"),
        (call(new=120, past=10), "not on a GPU"),
    ],
)
def test_every_reason_not_to_run(arguments: dict[str, Any], reason: str) -> None:
    assert reason in str(flash_cute.supported(**arguments))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_cute, "is_installed", lambda: False)
    with pytest.raises(MissingExtraError, match=r"flash-attn-4 is not installed.*sketch_walk\[hopper\]"):
        check_impl("cute")


@pytest.mark.parametrize(
    ("visible", "capability", "reason"),
    [(False, None, "no NVIDIA GPU is visible"), (True, (8, 9), "compute capability is 8.9"), (True, (9, 0), None)],
)
def test_the_gpu_decides(
    monkeypatch: pytest.MonkeyPatch, visible: bool, capability: tuple[int, int] | None, reason: str | None
) -> None:
    monkeypatch.setattr(flash_cute, "is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    if reason is None:
        check_impl("cute")
    else:
        with pytest.raises(ValueError, match=reason):
            check_impl("cute")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": False}, "causal only"),
        ({"bias": torch.zeros(1, 1, 128, 128)}, "no mask"),
        ({"mean_correction": True}, "no mean correction"),
        ({}, "not on a GPU"),
    ],
)
def test_an_explicit_choice_never_falls_back(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(kernels, "_why_no_cute", lambda: None)
    arguments = call()
    counts = torch.ones(1, 1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"impl 'cute' cannot run this call: .*{reason}"):
        attend(**arguments, counts=counts, scale=0.1, impl="cute", **changes)


@needs_triton
def test_sketches_and_scores_under_cute_are_tritons() -> None:
    query = torch.zeros(1, 2, 64, 64, device=DEVICE)
    assert sketches_with_triton("cute", query, SketchWalkConfig(), 64)
    with pytest.raises(ValueError, match="impl 'cute' cannot run this call: sketches must have an even number"):
        sketches_with_triton("cute", query, SketchWalkConfig(), 7)


@pytest.mark.parametrize(
    ("new", "past", "installed", "expected"),
    [
        (256, 0, False, "cudnn"),
        (256, 0, True, "flash-attn-4"),
        (64, 192, True, "flash-attn-4"),
        (64, 192, False, None),
        (100, 0, True, "cudnn"),
        (60, 0, True, None),
    ],
)
def test_the_fastest_dense_kernel_is_looked_up(
    monkeypatch: pytest.MonkeyPatch, new: int, past: int, installed: bool, expected: str | None
) -> None:
    """With the table's lengths made short; whether a kernel is there is the machine's."""
    monkeypatch.setattr(dense, "FASTEST_FROM", {9: {"flash-attn-4": 200, "cudnn": 64}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda parameters: True)
    monkeypatch.setattr(flash_cute, "dense_supported", lambda *tensors: None if installed else "not installed")
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    query, key, value, _ = inputs(1, 4, 2, new, past, 32, 0, torch.float16)
    assert dense.fastest_dense(query, key, value) == expected
    # A graph that is captured has a table of its own.
    monkeypatch.setattr(dense, "FASTEST_CAPTURED_FROM", {9: {"cudnn": 60}})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dense.fastest_dense(query, key, value) == ("cudnn" if past == 0 else None)


@needs_hopper
@pytest.mark.filterwarnings("default")
def test_a_short_prompt_in_a_graph_takes_flash_attention_4() -> None:
    """Its first call may be the captured one, which then compiles the kernel."""
    query, key, value, layout = inputs(1, 8, 2, 700, 0, 128, 0, torch.bfloat16)
    assert dense.fastest_dense(query, key, value) is None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert dense.fastest_dense(query, key, value) == "flash-attn-4"
        output = attend_dense(query, key, value, layout, scale=0.1)
    graph.replay()
    exact = attend_dense(query.float(), key.float(), value.float(), layout, scale=0.1)
    torch.testing.assert_close(output.float(), exact, atol=1.6e-2, rtol=0)


@needs_hopper
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("new", "past"), [(300, 0), (100, 233)])
@pytest.mark.parametrize("name", ["flash-attn-4", "cudnn"])
def test_dense_kernels_agree(monkeypatch: pytest.MonkeyPatch, name: str, new: int, past: int) -> None:
    query, key, value, layout = inputs(2, 8, 2, new, past, 128, 40, torch.bfloat16)
    exact = attend_dense(query.float(), key.float(), value.float(), layout, scale=0.1)
    monkeypatch.setattr(dense, "FASTEST_FROM", {torch.cuda.get_device_capability()[0]: {name: 0}})
    expected = None if name == "cudnn" and past else name
    assert dense.fastest_dense(query, key, value) == expected
    output = attend_dense(query, key, value, layout, scale=0.1)
    torch.testing.assert_close(output.float(), exact, atol=1.6e-2, rtol=0)


# batch, heads, kv_heads, new tokens, past tokens, head_dim, block, dtype
ON_HOPPER = [
    (1, 8, 8, 700, 0, 64, 64, torch.bfloat16),
    (2, 8, 2, 500, 333, 128, 64, torch.float16),
    (2, 8, 2, 777, 0, 128, 128, torch.bfloat16),
    (2, 8, 1, 500, 333, 128, 128, torch.float16),
    (1, 6, 2, 600, 64, 96, 64, torch.bfloat16),
    (1, 8, 2, 640, 0, 256, 128, torch.bfloat16),
]


@needs_hopper
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", ON_HOPPER, ids=lambda case: "-".join(str(part) for part in case))
def test_agrees_with_the_reference_on_one_selection(
    case: tuple[int, int, int, int, int, int, int, torch.dtype],
) -> None:
    batch, heads, kv_heads, new, past, dim, block, dtype = case
    query, key, value, layout = inputs(batch, heads, kv_heads, new, past, dim, 77, dtype)
    indices, counts, _ = selected(query, key, value, layout, block)
    keys = {"block_size": block, "scale": dim**-0.5}
    exact, _ = attend(query.float(), key.float(), value.float(), indices, counts, layout, impl="reference", **keys)
    output, name = attend(query, key, value, indices, counts, layout, impl="cute", **keys)
    assert (name, output.dtype, output.shape) == ("cute", dtype, query.shape)
    atol = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(output.float(), exact, atol=atol, rtol=0)


@needs_hopper
@pytest.mark.filterwarnings("default")
def test_auto_prefers_it_from_a_measured_length() -> None:
    config = create_sketch_walk_config(block_size=64, density=0.2)
    major = torch.cuda.get_device_capability()[0]
    for tokens, expected in ((2048, "triton"), (16384, "cute" if major in kernels.CUTE_FROM else "triton")):
        query, key, value, _ = inputs(1, 8, 2, tokens, 0, 64, 0, torch.bfloat16)
        assert sketch_walk_attention(query, key, value, config).impl == expected
