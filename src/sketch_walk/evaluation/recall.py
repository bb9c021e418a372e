"""How good selections are: attention mass that they keep, blocks shared with the oracle, and what the output loses.

Everything is streamed over query blocks beside a real sparse forward pass: no tensor of queries by keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sketch_walk import kernels
from sketch_walk.attention import ScoreFunction
from sketch_walk.config import REDUCTIONS, SketchWalkConfig
from sketch_walk.evaluation.oracle import block_mass, mass_bytes
from sketch_walk.evaluation.query_rows import QueryRows, call_span, each_rows, over_queries
from sketch_walk.evaluation.selectors import SKETCH, score_function
from sketch_walk.evaluation.selectors import selector as select_by
from sketch_walk.extras import require
from sketch_walk.selection import BlockSelection, pair_density

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from transformers import PreTrainedModel

    from sketch_walk.integrations.transformers import LayerTensors, SketchWalkHandle

FOLLOW = ("sparse", "dense")


@dataclass(frozen=True)
class LayerSelection:
    """One layer's selections. Per-head tuples are by query head; oracles are "max" and "mean" (`oracle_scores`).

    Parameters
    ----------
    layer, queries : int
        Absolute index of the layer; queries measured, over all sequences.
    recall : tuple of float
        Share of the exact attention's mass that falls on the blocks that were read, mean over queries.
    least_recall : tuple of float
        The same of the query block where it is smallest (mean over that block's queries).
    oracle_recall : dict of str to tuple of float
        `recall` if each row had read the oracle's blocks instead, as many of them. No selection shared in the same way
        has a higher mean over heads than oracle "mean".
    overlap : dict of str to float or None
        Of the blocks that the oracle chooses freely (neither sink nor local, in rows that leave something out), the
        share that was read. None where no row had a choice.
    output_error : float
        Relative l2 distance of the sparse output from dense attention over the same queries, keys and values.
    head_output_error : tuple of float
    block_density, pair_density : float
        Fractions of causal key blocks and of causal token pairs that were read.
    """

    layer: int
    queries: int
    recall: tuple[float, ...]
    least_recall: tuple[float, ...]
    oracle_recall: dict[str, tuple[float, ...]]
    overlap: dict[str, float | None]
    output_error: float
    head_output_error: tuple[float, ...]
    block_density: float
    pair_density: float

    def means(self) -> dict[str, float | None]:
        """Over heads; `least_recall` is the smallest of all heads."""
        return {
            "recall": _mean(self.recall),
            "least_recall": min(self.least_recall),
            **{f"oracle_{name}_recall": _mean(by_head) for name, by_head in self.oracle_recall.items()},
            **{f"oracle_{name}_overlap": share for name, share in self.overlap.items()},
            "output_error": self.output_error,
            "block_density": self.block_density,
            "pair_density": self.pair_density,
        }


@dataclass(frozen=True)
class SelectionReport:
    """What `measure_selection` found.

    Parameters
    ----------
    layers : tuple of LayerSelection
        The sparse layers, in order.
    settings : dict
        What was run, JSON-able.
    selections : dict of int to torch.Tensor
        By layer: int32 (num_query_blocks, max_selected), the first sequence's selection in the last measured call (of
        the first key/value head, where each has its own), for `sketch_walk.plots.plot_block_selection`. Not in
        `to_dict`.
    """

    layers: tuple[LayerSelection, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    selections: dict[int, Int[Tensor, "rows max_selected"]] = field(default_factory=dict)

    def means(self) -> dict[str, float | None]:
        """Mean over layers of `LayerSelection.means`; `least_recall` is the smallest of all layers."""
        by_layer = [layer.means() for layer in self.layers]
        over: dict[str, float | None] = {}
        for name in by_layer[0]:
            known = [value for means in by_layer if (value := means[name]) is not None]
            smallest = name == "least_recall"
            over[name] = None if not known else min(known) if smallest else _mean(known)
        return over

    def to_dict(self) -> dict[str, Any]:
        """Settings, means, and every layer with its heads, as JSON-able values."""
        layers = [{**layer.means(), "by_head": asdict(layer)} for layer in self.layers]
        return {"settings": self.settings, "means": self.means(), "layers": layers}

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a file, making its folder."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def table(self) -> Any:
        """A `rich.table.Table`: a line for each layer, and one for their means.

        Raises
        ------
        MissingExtraError
            If rich is not installed.
        """
        table = require("rich.table", "eval").Table(
            title="Selections by layer",
            caption="max, mean oracle: recall of its blocks; in max, in mean: its free blocks that were read",
            title_justify="left",
            caption_justify="left",
            box=require("rich.box", "eval").SIMPLE_HEAD,
            padding=(0, 0, 0, 1),
            show_edge=False,
        )
        for column in ("layer", *COLUMNS):
            table.add_column(column, justify="right")
        for layer in self.layers:
            table.add_row(str(layer.layer), *_cells(layer.means()))
        table.add_section()
        table.add_row("all", *_cells(self.means()))
        return table


COLUMNS = {
    "recall": "recall",
    "least block": "least_recall",
    "max oracle": "oracle_max_recall",
    "mean oracle": "oracle_mean_recall",
    "in max": "oracle_max_overlap",
    "in mean": "oracle_mean_overlap",
    "output error": "output_error",
    "blocks read": "block_density",
    "pairs read": "pair_density",
}


def measure_selection(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch tokens"],
    config: SketchWalkConfig | None = None,
    *,
    selector: str | ScoreFunction = SKETCH,
    follow: str = "sparse",
    decode_tokens: int = 0,
    impl: str = "auto",
    on_layer: Callable[[int], None] | None = None,
) -> SelectionReport:
    """Run `model` sparse over a text, and measure every sparse layer's selections against exact attention.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One that `enable` takes, not enabled yet. It is left as it was.
    input_ids : torch.Tensor
        Sequences of one length, without padding.
    config : SketchWalkConfig, optional
        Default ``SketchWalkConfig()``; measured with ``dense_below=0``.
    selector : str or ScoreFunction
        Who scores blocks: see `sketch_walk.evaluation.selectors.selector`.
    follow : {"sparse", "dense"}
        Whose output a measured layer hands on. "sparse" is the run as it is. "dense" gives every layer the dense
        model's own queries, keys and values, so that selectors are compared on the same ones.
    decode_tokens : int
        0 measures one prompt of all tokens. n reads the last n tokens one at a time and measures those steps only; the
        prompt before them is not measured, and sparse or dense as `follow` says.
    impl : str
        Kernel; see `sketch_walk.kernels`.
    on_layer : callable, optional
        Called with a layer's index when it has been measured.

    Returns
    -------
    SelectionReport

    Raises
    ------
    TypeError, ValueError
        For `input_ids` of another kind, `decode_tokens` out of range, a run in which no layer was sparse, an unknown
        selector, and as `enable`.
    """
    from sketch_walk.integrations.transformers import enable

    if follow not in FOLLOW:
        raise ValueError(f"unknown follow {follow!r}; expected one of {FOLLOW}")
    _check_input(input_ids, decode_tokens)
    score_function(selector)
    config = SketchWalkConfig() if config is None else config
    if isinstance(config, SketchWalkConfig):
        config = replace(config, dense_below=0)
    ids = input_ids.to(model.device)
    prompt = ids.shape[1] - decode_tokens
    dense = follow == "dense"
    enabled = enable(model, config, mode="decode" if decode_tokens and dense else "both", record=True, impl=impl)
    with torch.inference_mode(), enabled as handle, select_by(handle, selector):
        decoder = model.get_decoder()
        if not decode_tokens:
            with observe_selection(handle, on_layer, hand_on_dense=dense) as recorder:
                decoder(input_ids=ids, use_cache=False)
        else:
            cache = decoder(input_ids=ids[:, :prompt], use_cache=True).past_key_values
            with observe_selection(handle, on_layer, hand_on_dense=dense) as recorder:
                for at in range(prompt, ids.shape[1]):
                    decoder(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        if not recorder.totals:
            raise ValueError(f"no layer ran sparse: {', '.join(handle.summary()['reasons']) or 'no attention layer'}")
    settings = {
        "model": type(model).__name__,
        "selector": selector if isinstance(selector, str) else getattr(selector, "__name__", type(selector).__name__),
        "follow": follow,
        "config": config.to_dict(),
        "sequences": ids.shape[0],
        "tokens": ids.shape[1],
        "decode_tokens": decode_tokens,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return SelectionReport(recorder.layers(), settings, recorder.selections)


def _check_input(input_ids: Any, decode_tokens: Any) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be a tensor of integers, got {kind}")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must have shape (batch, tokens), neither 0, got {tuple(input_ids.shape)}")
    if not isinstance(decode_tokens, int) or not 0 <= decode_tokens < input_ids.shape[1]:
        raise ValueError(
            f"decode_tokens must be at least 0 and below the {input_ids.shape[1]} of input_ids, got {decode_tokens!r}"
        )


@contextmanager
def observe_selection(
    handle: SketchWalkHandle, on_layer: Callable[[int], None] | None = None, hand_on_dense: bool = False
) -> Iterator[SelectionRecorder]:
    """Measure every sparse call that an enabled model makes inside the block, whoever calls it.

    Parameters
    ----------
    handle : SketchWalkHandle
        What `enable` returned; its observer is put back at the end.
    on_layer : callable, optional
        Called with a layer's index after each of its calls.
    hand_on_dense : bool
        Put dense attention's output in the place of the sparse one when it has been measured.

    Raises
    ------
    ValueError
        From the forward pass itself: for padded batches, and inside compiled graphs.
    """
    recorder = SelectionRecorder(handle.config, on_layer, hand_on_dense)
    before, handle.observer = handle.observer, recorder
    try:
        yield recorder
    finally:
        handle.observer = before


class SelectionRecorder:
    """Adds up the calls of `observe_selection` by layer."""

    def __init__(
        self, config: SketchWalkConfig, on_layer: Callable[[int], None] | None = None, hand_on_dense: bool = False
    ) -> None:
        self.config = config
        self.on_layer = on_layer
        self.hand_on_dense = hand_on_dense
        self.totals: dict[int, _Totals] = {}
        self.selections: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, seen: LayerTensors) -> None:
        """The handle's observer."""
        totals = self.totals.setdefault(seen.layer_idx, _Totals(seen.query.shape[1]))
        selection = seen.result.selection.per_head()
        totals.add_masses(seen, selection, self.config)
        dense = kernels.attend_dense(seen.query, seen.key, seen.value, seen.layout, scale=seen.scale)
        totals.add_error(seen.result.output, dense)
        totals.add_densities(seen, selection, self.config.block_size)
        self.selections[seen.layer_idx] = selection.indices[0, 0].cpu()
        if self.on_layer is not None:
            self.on_layer(seen.layer_idx)
        if self.hand_on_dense:
            seen.result.output.copy_(dense)

    def layers(self) -> tuple[LayerSelection, ...]:
        """What was measured so far."""
        return tuple(totals.result(layer) for layer, totals in sorted(self.totals.items()))


class _Totals:
    """Sums over the calls of one layer, on the CPU."""

    def __init__(self, heads: int) -> None:
        self.queries = 0
        self.mass = torch.zeros(heads, dtype=torch.float64)
        self.least = torch.ones(heads, dtype=torch.float64)
        self.oracle_mass = {name: torch.zeros_like(self.mass) for name in REDUCTIONS}
        self.chosen = dict.fromkeys(REDUCTIONS, 0)
        self.chosen_and_read = dict.fromkeys(REDUCTIONS, 0)
        self.error = torch.zeros_like(self.mass)
        self.norm = torch.zeros_like(self.mass)
        self.blocks = self.blocks_read = self.pairs = self.pairs_read = 0.0

    def add_masses(self, seen: LayerTensors, selection: BlockSelection, config: SketchWalkConfig) -> None:
        query, key, selections = seen.query, seen.key, selection.counts.shape[1]
        self.queries += query.shape[0] * query.shape[2]
        for rows in each_rows(query, seen.layout, config.block_size, mass_bytes(query)):
            mass = block_mass(rows, key, seen.scale, config.block_size)
            read = _block_mask(selection.indices[:, :, rows.start : rows.stop], mass.shape[-1])
            counts = selection.counts[:, :, rows.start : rows.stop]
            forced = _forced_blocks(rows, mass.shape[-1], config)
            choice = ~forced.any(0) & (counts <= rows.block)[..., None]
            mean = over_queries(mass, rows.real, "mean")
            kept = _kept(mean, read)
            self.mass += _sum_by_head(kept, rows)
            self.least = torch.minimum(self.least, kept.amin((0, 2)).cpu().double())
            for name in REDUCTIONS:
                grouped = (mean if name == "mean" else over_queries(mass, rows.real, name)).unflatten(
                    1, (selections, -1)
                )
                best = best_blocks(grouped.mean(2) if name == "mean" else grouped.amax(2), counts, forced)
                self.oracle_mass[name] += _sum_by_head(_kept(mean, best), rows)
                self.chosen[name] += int((best & choice).sum())
                self.chosen_and_read[name] += int((best & choice & read).sum())

    def add_error(self, sparse: Tensor, dense: Tensor) -> None:
        self.error += (sparse.float() - dense.float()).square().sum((0, 2, 3)).cpu().double()
        self.norm += dense.float().square().sum((0, 2, 3)).cpu().double()

    def add_densities(self, seen: LayerTensors, selection: BlockSelection, block_size: int) -> None:
        past, length = call_span(seen.layout)
        batch, selections, rows = selection.counts.shape
        index = past // block_size + torch.arange(rows, device=selection.counts.device).expand(batch, -1)
        pairs = (length * (length + 1) - past * (past + 1)) // 2 * batch * selections
        self.blocks += float((index + 1).sum()) * selections
        self.blocks_read += float(selection.counts.sum())
        self.pairs += pairs
        self.pairs_read += pairs * pair_density(selection, index, seen.layout.past, seen.layout.length, block_size)

    def result(self, layer: int) -> LayerSelection:
        """The sums as means."""
        tiny = torch.finfo(torch.float64).tiny
        return LayerSelection(
            layer=layer,
            queries=self.queries,
            recall=tuple((self.mass / self.queries).tolist()),
            least_recall=tuple(self.least.tolist()),
            oracle_recall={name: tuple((sums / self.queries).tolist()) for name, sums in self.oracle_mass.items()},
            overlap={
                name: self.chosen_and_read[name] / chosen if chosen else None for name, chosen in self.chosen.items()
            },
            output_error=(self.error.sum() / self.norm.sum().clamp(min=tiny)).sqrt().item(),
            head_output_error=tuple((self.error / self.norm.clamp(min=tiny)).sqrt().tolist()),
            block_density=self.blocks_read / self.blocks,
            pair_density=self.pairs_read / self.pairs,
        )


def best_blocks(
    scores: Float[Tensor, "batch selections rows blocks"],
    counts: Int[Tensor, "batch selections rows"],
    forced: Bool[Tensor, "3 rows blocks"],
) -> Bool[Tensor, "batch selections rows blocks"]:
    """The `counts` blocks of each row that `sketch_walk.selection.select_blocks` would take by these scores in [0, 1].

    `forced` is `_forced_blocks`' result. Here the counts are given: a selection by `mass` has counts of its own.
    """
    local, sink, future = forced
    column = torch.arange(scores.shape[-1], device=scores.device)
    # Above every score, the first block highest.
    rank = torch.where(sink, 3.0 - column / scores.shape[-1], scores)
    rank = rank.masked_fill(local, torch.inf).masked_fill(future, -torch.inf)
    order = scores.shape[-1] - 1 - rank.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, order, column < counts[..., None])


def _forced_blocks(rows: QueryRows, blocks: int, config: SketchWalkConfig) -> Bool[Tensor, "3 rows blocks"]:
    """Local, sink and future blocks of each row: those that no score decides on."""
    device = rows.rank.device
    column = torch.arange(blocks, device=device)
    available = range(rows.first_block + 1, rows.first_block + 1 + rows.stop - rows.start)
    local = torch.tensor([config.local_count(n) for n in available], device=device)[:, None]
    sink = torch.tensor([config.sink_count(n) for n in available], device=device)[:, None]
    row = rows.block[:, None]
    future = column > row
    return torch.stack(((column > row - local) & ~future, (column < sink) & ~future, future))


def _block_mask(indices: Int[Tensor, "batch selections rows max_selected"], blocks: int) -> Tensor:
    """Bool (batch, selections, rows, blocks): which blocks are among the indices."""
    mask = torch.zeros(*indices.shape[:3], blocks + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, torch.where(indices < 0, blocks, indices).long(), True)[..., :blocks]


def _kept(
    mass: Float[Tensor, "batch heads rows blocks"], blocks: Bool[Tensor, "batch selections rows blocks"]
) -> Float[Tensor, "batch heads rows"]:
    """Mass that falls on the given blocks of each head's selection."""
    return torch.where(blocks[:, :, None], mass.unflatten(1, (blocks.shape[1], -1)), 0.0).sum(-1).flatten(1, 2)


def _sum_by_head(by_row: Float[Tensor, "batch heads rows"], rows: QueryRows) -> Float[Tensor, " heads"]:
    """Sum over queries of what is a mean over the queries of each row."""
    return (by_row * rows.real.sum(1)).sum((0, 2)).cpu().double()


def _cells(means: dict[str, float | None]) -> list[str]:
    return ["-" if means[name] is None else f"{means[name]:.3f}" for name in COLUMNS.values()]


def _mean(values: tuple[float, ...] | list[float]) -> float:
    return sum(values) / len(values)
