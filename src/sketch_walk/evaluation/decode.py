"""Quality of generated tokens: needle answers and long continuations, with sparse or dense prompts and steps.

Every token is one call of one query, as in generation. Tokens are forced, never sampled, and nothing is lost by that:
greedy decoding gives an answer exactly when each of its tokens is the arg max after the ones before, and a greedy
continuation leaves dense's own exactly where the first forced token is not the arg max.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    parts = in_parts(
        len(workload.texts), size, lambda part: _steps(model, workload.texts[part], workload.new_tokens).best.tolist()
    )
    continuations = [tokens for _, found in parts for tokens in found]
    scores = _run(model, workload, continuations, None, size)
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
    from sketch_walk.integrations.transformers import enable

    size = check_run(batch, None, model.device, workload.needles.tokens)
    if len(dense.continuations) != len(workload.texts):
        raise ValueError(
            f"dense has {len(dense.continuations)} continuations; workload has {len(workload.texts)} texts"
        )
    results = {}
    for mode in modes:
        with enable(model, config, mode=mode, impl=impl) as handle, selector(handle, selector_name):
            begin = time.perf_counter()
            results[mode] = _run(model, workload, dense.continuations, handle, size)
            results[mode].seconds = time.perf_counter() - begin
    return results


def _run(
    model: PreTrainedModel,
    workload: DecodeWorkload,
    continuations: list[list[int]],
    handle: SketchWalkHandle | None,
    size: int,
) -> DecodeScores:
    scores, needles = DecodeScores(), workload.needles
    prefill, decode = Densities(), Densities()

    def forced(prompts: Tensor, targets: Tensor, part: slice) -> _Steps:
        if handle is not None:
            # Recording waits for the device in every layer: the first batch alone.
            handle.record = part.start == 0
            handle.calls.clear()
        steps = _steps(model, prompts[part], targets.shape[1], targets[part])
        if handle is not None:
            prefill.add([call for call in handle.calls if call.query_length > 1], len(steps.best))
            decode.add([call for call in handle.calls if call.query_length == 1], len(steps.best))
        return steps

    for task in needles.tasks:
        scores.hits[task], scores.nll[task] = [0.0] * needles.samples, [0.0] * needles.samples
    for group in needles.groups:
        for part, steps in in_parts(len(group.order), size, partial(forced, group.prompts, group.answers)):
            hits, losses = steps.agrees.all(1).float().tolist(), steps.loss.mean(1).tolist()
            for i, hit, loss in zip(group.order[part], hits, losses, strict=True):
                scores.hits[group.task][i], scores.nll[group.task][i] = hit, loss
    if continuations:
        targets = torch.tensor(continuations)
        counted = _until_end(targets, model)
        for part, steps in in_parts(len(targets), size, partial(forced, workload.texts, targets)):
            real = counted[part].to(steps.loss.device)
            count = real.sum(1)
            agrees = steps.agrees & real
            scores.continuation_nll += ((steps.loss * real).sum(1) / count).tolist()
            scores.agreement += (agrees.sum(1) / count).tolist()
            scores.agreed_tokens += agrees.int().cumprod(1).sum(1).tolist()
    scores.prefill_density, scores.decode_density = prefill.means()[0], decode.means()[0]
    scores.impls = sorted(prefill.impls | decode.impls)
    return scores


@torch.inference_mode()
def _steps(
    model: PreTrainedModel, prompts: Int[Tensor, "batch tokens"], count: int, forced: Tensor | None = None
) -> _Steps:
    """`count` tokens after the prompts, one call each: the `forced` ones, or the arg max."""
    network, device = cast("Any", model), model.device
    ids, cache, targets = prompts.to(device), None, None if forced is None else forced.to(device)
    best, agrees, losses = [], [], []
    for i in range(count):
        output = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1:].float()
        chosen = logits.argmax(-1)
        ids = chosen if targets is None else targets[:, i : i + 1]
        agree, loss = judge(logits, ids)
        best.append(chosen)
        agrees.append(agree)
        losses.append(loss)
    return _Steps(torch.cat(best, 1), torch.cat(agrees, 1), torch.cat(losses, 1))


def _until_end(tokens: Int[Tensor, "texts tokens"], model: PreTrainedModel) -> Bool[Tensor, "texts tokens"]:
    """True up to and with the first end-of-text token of each row."""
    settings = getattr(model, "generation_config", None) or model.config
    ends = settings.eos_token_id
    if ends is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = torch.isin(tokens, torch.as_tensor(ends))
    return ended.int().cumsum(1) - ended.int() == 0
