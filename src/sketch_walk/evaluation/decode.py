"""Quality of generated tokens: needle answers and long continuations, with sparse or dense prompts and steps.

Every token is one call of one query, as in generation. Tokens are forced, never sampled, and nothing is lost by that:
greedy decoding gives an answer exactly when each of its tokens is the arg max after the ones before, and a greedy
continuation leaves dense's own exactly where the first forced token is not the arg max.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from sketch_walk.config import SketchWalkConfig
from sketch_walk.evaluation.batched import (
    Densities,
    Workload,
    check_run,
    in_parts,
    judge,
    make_passages,
    make_workload,
)
from sketch_walk.evaluation.selectors import SKETCH, selector

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sketch_walk.attention import ScoreFunction
    from sketch_walk.integrations.transformers import SketchWalkHandle

# Modes of `enable`: sparse prompt and sparse steps, sparse prompt and dense steps, dense prompt and sparse steps.
MODES = ("both", "prefill", "decode")


class DecodeWorkload(NamedTuple):
    """Needle prompts to answer, and prose to continue by `new_tokens` tokens: `texts` is [texts, tokens], int64."""

    needles: Workload
    texts: Int[Tensor, "texts tokens"]
    new_tokens: int


@dataclass
class DecodeScores:
    """Outcomes of one way to run the model, in the order of the samples' seeds.

    Parameters
    ----------
    hits, nll : dict of str to list of float
        By task. `hits` is 1.0 where greedy decoding gives the answer; `nll` is the answer's mean loss, nats per token.
    continuation_nll : list of float
        Loss of each of dense's own greedy continuations, nats per token, up to its first end-of-text token.
    agreement : list of float
        Share of a continuation's tokens that are the arg max, given the ones before.
    agreed_tokens : list of int
        Tokens of a greedy continuation before the first one that differs from dense's.
    prefill_density, decode_density : float, optional
        Block densities of sparse layers, from the first batch of each part; None where nothing was sparse.
    impls : list of str
        Kernels that attended in sparse layers.
    seconds : float
        Of prompts and steps; a prompt that several ways share counts for each of them.
    """

    hits: dict[str, list[float]] = field(default_factory=dict)
    nll: dict[str, list[float]] = field(default_factory=dict)
    continuation_nll: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    agreed_tokens: list[int] = field(default_factory=list)
    prefill_density: float | None = None
    decode_density: float | None = None
    impls: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class DenseDecode:
    """Dense attention's scores and its continuations, [texts, new_tokens] as lists: what sparse runs are held to."""

    scores: DecodeScores
    continuations: list[list[int]]


class DecodeWay(NamedTuple):
    """How steps follow a prompt.

    Parameters
    ----------
    mode : {"both", "prefill", "decode"}
        Which calls are sparse: prompts and steps, prompts alone, steps alone.
    config : SketchWalkConfig, optional
        Of the steps, where it differs from the prompt's in what only steps read.
    """

    mode: str
    config: SketchWalkConfig | None = None


# Makes a model attend some way until it is left, and tells by which handle; None is the model as it is.
_Attending = Callable[[], "AbstractContextManager[SketchWalkHandle | None]"]


class _Steps(NamedTuple):
    """Arg max of every step [batch, tokens], whether it is the forced token, and the forced token's loss."""

    best: Int[Tensor, "batch tokens"]
    agrees: Bool[Tensor, "batch tokens"]
    loss: Float[Tensor, "batch tokens"]


def make_decode_workload(
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    tasks: Sequence[str] = ("prose", "multi_key"),
    samples: int = 64,
    first_seed: int = 0,
    texts: int = 8,
    new_tokens: int = 128,
    text: str | None = None,
) -> DecodeWorkload:
    """Needle prompts as `make_workload` makes them, and passages of prose, or of `text`, to continue; all of exactly
    `tokens` tokens.

    Raises
    ------
    ValueError
        As `make_workload`, and for `texts` below 0 or `new_tokens` below 1.
    """
    if texts < 0 or new_tokens < 1:
        raise ValueError(f"texts must be at least 0 and new_tokens at least 1, got {texts} and {new_tokens}")
    needles = make_workload(tokenizer, tokens, tasks=tasks, samples=samples, first_seed=first_seed, passages=0)
    return DecodeWorkload(needles, make_passages(tokenizer, tokens, texts, first_seed, text), new_tokens)


def measure_dense_decode(model: PreTrainedModel, workload: DecodeWorkload, batch: int | None = None) -> DenseDecode:
    """Answers and greedy continuations of the model as it is, which must be dense.

    Raises
    ------
    ValueError
        If `batch` is below 1.
    """
    size = check_run(batch, None, model.device, workload.needles.tokens)
    begin = time.perf_counter()

    def continued(part: slice) -> list[list[int]]:
        cache, logits = _read(model, workload.texts[part])
        found: list[list[int]] = _steps(model, cache, logits, workload.new_tokens).best.tolist()
        return found

    continuations = [tokens for _, found in in_parts(len(workload.texts), size, continued) for tokens in found]
    scores = DecodeScores()
    _run(model, workload, continuations, nullcontext, {"dense": nullcontext}, {"dense": scores}, size)
    scores.seconds = time.perf_counter() - begin
    return DenseDecode(scores, continuations)


def measure_decode(
    model: PreTrainedModel,
    workload: DecodeWorkload,
    dense: DenseDecode,
    config: SketchWalkConfig,
    *,
    modes: Sequence[str] = MODES,
    selector_name: str | ScoreFunction = SKETCH,
    impl: str = "auto",
    batch: int | None = None,
) -> dict[str, DecodeScores]:
    """Scores of a dense model with sparse attention switched on, by mode.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense; it is enabled for the run and left as it was.
    dense : DenseDecode
        `measure_dense_decode` of the same model and workload.
    config : SketchWalkConfig
        Set ``dense_below=0`` to have every call sparse.
    modes : sequence of {"both", "prefill", "decode"}
        Which calls are sparse: prompts and steps, prompts alone, steps alone.
    selector_name : str or ScoreFunction
        Who scores the blocks (`sketch_walk.evaluation.selectors`).
    batch : int, optional
        Most sequences at a time; default by device and length. Halved when memory runs out.

    Raises
    ------
    ValueError, TypeError
        As `enable` and `selector`, if `batch` is below 1, or `dense` is of another workload.
    """
    ways = {mode: DecodeWay(mode) for mode in modes}
    return measure_ways(model, workload, dense, config, ways, selector_name=selector_name, impl=impl, batch=batch)


def measure_ways(
    model: PreTrainedModel,
    workload: DecodeWorkload,
    dense: DenseDecode,
    config: SketchWalkConfig,
    ways: Mapping[str, DecodeWay],
    *,
    selector_name: str | ScoreFunction = SKETCH,
    impl: str = "auto",
    batch: int | None = None,
) -> dict[str, DecodeScores]:
    """As `measure_decode`, of any named ways to take the steps. Ways that read a prompt alike share its forward pass;
    each takes its steps with a copy of the cache.

    Raises
    ------
    ValueError, TypeError
        As `measure_decode`.
    """
    from sketch_walk.integrations.transformers import enable

    size = check_run(batch, None, model.device, workload.needles.tokens)
    if len(dense.continuations) != len(workload.texts):
        raise ValueError(
            f"dense has {len(dense.continuations)} continuations; workload has {len(workload.texts)} texts"
        )

    def attending(way: DecodeWay) -> _Attending:
        @contextmanager
        def attend() -> Iterator[SketchWalkHandle]:
            with (
                enable(model, way.config or config, mode=way.mode, impl=impl) as handle,
                selector(handle, selector_name),
            ):
                yield handle

        return attend

    results = {name: DecodeScores() for name in ways}
    for mode in ("both", "decode"):
        alike = {name: attending(way) for name, way in ways.items() if (way.mode == "decode") == (mode == "decode")}
        if alike:
            _run(model, workload, dense.continuations, attending(DecodeWay(mode)), alike, results, size)
    return results


def _run(
    model: PreTrainedModel,
    workload: DecodeWorkload,
    continuations: list[list[int]],
    prompt: _Attending,
    ways: Mapping[str, _Attending],
    results: dict[str, DecodeScores],
    size: int,
) -> None:
    """Score steps of some ways after prompts that they share; fills in `results`."""
    needles = workload.needles
    prefill, decode = Densities(), {name: Densities() for name in ways}

    def forced(prompts: Tensor, targets: Tensor, part: slice) -> dict[str, _Steps]:
        begin = time.perf_counter()
        # Recording waits for the device in every layer: the first batch alone.
        first = part.start == 0
        with _recorded(prompt, prefill, first, len(prompts[part])):
            cache, logits = _read(model, prompts[part])
        shared = time.perf_counter() - begin
        found: dict[str, _Steps] = {}
        for name, attend in ways.items():
            begin = time.perf_counter()
            own = copy.deepcopy(cache) if len(found) + 1 < len(ways) else cache
            with _recorded(attend, decode[name], first, len(prompts[part])):
                found[name] = _steps(model, own, logits, targets.shape[1], targets[part])
            results[name].seconds += shared + time.perf_counter() - begin
        return found

    for name in ways:
        for task in needles.tasks:
            results[name].hits[task], results[name].nll[task] = [0.0] * needles.samples, [0.0] * needles.samples
    for group in needles.groups:
        for part, found in in_parts(len(group.order), size, partial(forced, group.prompts, group.answers)):
            for name, steps in found.items():
                hits, losses = steps.agrees.all(1).float().tolist(), steps.loss.mean(1).tolist()
                for i, hit, loss in zip(group.order[part], hits, losses, strict=True):
                    results[name].hits[group.task][i], results[name].nll[group.task][i] = hit, loss
    if continuations:
        targets = torch.tensor(continuations)
        counted = _until_end(targets, model)
        for part, found in in_parts(len(targets), size, partial(forced, workload.texts, targets)):
            for name, steps in found.items():
                real = counted[part].to(steps.loss.device)
                count = real.sum(1)
                agrees = steps.agrees & real
                scores = results[name]
                scores.continuation_nll += ((steps.loss * real).sum(1) / count).tolist()
                scores.agreement += (agrees.sum(1) / count).tolist()
                scores.agreed_tokens += agrees.int().cumprod(1).sum(1).tolist()
    for name in ways:
        results[name].prefill_density, results[name].decode_density = prefill.means()[0], decode[name].means()[0]
        results[name].impls = sorted(prefill.impls | decode[name].impls)


@contextmanager
def _recorded(attend: _Attending, densities: Densities, record: bool, batch: int) -> Iterator[None]:
    """Attend some way; with `record`, `densities` takes in what was read."""
    with attend() as handle:
        if handle is not None:
            handle.record = record
        yield
        if handle is not None:
            densities.add(handle.calls, batch)


@torch.inference_mode()
def _read(model: PreTrainedModel, prompts: Int[Tensor, "batch tokens"]) -> tuple[Any, Tensor]:
    """Cache of the prompts, and logits of the tokens behind them."""
    network = cast("Any", model)
    output = network(input_ids=prompts.to(model.device), use_cache=True, logits_to_keep=1)
    return output.past_key_values, output.logits[:, -1:].float()


@torch.inference_mode()
def _steps(model: PreTrainedModel, cache: Any, logits: Tensor, count: int, forced: Tensor | None = None) -> _Steps:
    """`count` tokens after a prompt, of which the first has `logits`, one call each: the `forced` ones, or the arg
    max.
    """
    network, targets = cast("Any", model), None if forced is None else forced.to(model.device)
    best, agrees, losses = [], [], []
    for i in range(count):
        chosen = logits.argmax(-1)
        ids = chosen if targets is None else targets[:, i : i + 1]
        agree, loss = judge(logits, ids)
        best.append(chosen)
        agrees.append(agree)
        losses.append(loss)
        if i + 1 < count:
            output = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1:].float()
    return _Steps(torch.cat(best, 1), torch.cat(agrees, 1), torch.cat(losses, 1))


def _until_end(tokens: Int[Tensor, "texts tokens"], model: PreTrainedModel) -> Bool[Tensor, "texts tokens"]:
    """True up to and with the first end-of-text token of each row."""
    settings = getattr(model, "generation_config", None) or model.config
    ends = settings.eos_token_id
    if ends is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = torch.isin(tokens, torch.as_tensor(ends))
    return ended.int().cumsum(1) - ended.int() == 0
