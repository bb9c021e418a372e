"""Teacher-forced needles and prose, many sequences per forward pass, every sample's outcome kept for pairing.

Sequences of one pass have one length, so that nothing is padded: no mask, no gathered layout, and the same kernels as
for a single prompt. Dense and sparse runs over one `Workload` are paired sample by sample.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sketch_walk.evaluation.needles import TASKS, make_sample
from sketch_walk.evaluation.prose import prose

if TYPE_CHECKING:
    from jaxtyping import Int
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sketch_walk.integrations.transformers import LayerCall, SketchWalkHandle

# Tokens of one forward pass on a GPU, unless told otherwise; a CPU gains nothing from batches.
TOKENS_PER_PASS = 65_536
# Haystacks are prose of seeds 0, 1, ...; passages are other prose.
FIRST_PASSAGE = 1_000_000

T = TypeVar("T")


class NeedleGroup(NamedTuple):
    """Needle prompts of one task whose answers have equally many tokens.

    `prompts` is [samples, tokens] and `answers` [samples, answer_tokens], both int64 on the CPU; `order` tells which of
    the task's samples each row is.
    """

    task: str
    prompts: Int[Tensor, "samples tokens"]
    answers: Int[Tensor, "samples answer_tokens"]
    order: list[int]


@dataclass(frozen=True)
class Workload:
    """Needle prompts and prose passages of exactly `tokens` tokens each."""

    tokens: int
    samples: int
    first_seed: int
    groups: tuple[NeedleGroup, ...]
    passages: Int[Tensor, "passages tokens"]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks, in the order in which they were asked for."""
        return tuple(dict.fromkeys(group.task for group in self.groups))


@dataclass
class Scores:
    """Outcomes in the order of the samples' seeds.

    Parameters
    ----------
    hits, nll : dict of str to list of float
        By task. `hits` is 1.0 where every answer token is the arg max; `nll` the answer's mean loss, nats per token.
    prose_nll : list of float
        Loss of each passage's second half, nats per token.
    block_density, pair_density : float, optional
        Means over sparse layers and sequences; None for a dense model.
    impls : list of str
        Kernels that attended in sparse layers.
    seconds : float
        Wall time of the whole measurement.
    """

    hits: dict[str, list[float]] = field(default_factory=dict)
    nll: dict[str, list[float]] = field(default_factory=dict)
    prose_nll: list[float] = field(default_factory=list)
    block_density: float | None = None
    pair_density: float | None = None
    impls: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Densities:
    """Mean densities over recorded sparse calls, each weighted by its sequences."""

    def __init__(self) -> None:
        self._sums = [0.0, 0.0, 0.0]
        self.impls: set[str] = set()

    def add(self, calls: Sequence[LayerCall], sequences: int) -> None:
        """Count the sparse ones among `calls`."""
        for call in calls:
            if call.indices is not None:
                for i, value in enumerate((1.0, call.block_density, call.pair_density)):
                    self._sums[i] += sequences * value
                self.impls.add(call.impl)

    def means(self) -> tuple[float | None, float | None]:
        """Block and pair density, None if nothing was sparse."""
        count, block, pair = self._sums
        return (block / count, pair / count) if count else (None, None)


def make_workload(
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    samples: int = 64,
    first_seed: int = 0,
    passages: int = 4,
    text: str | None = None,
) -> Workload:
    """Tokenize the prompts of seeds `first_seed` ... `first_seed + samples - 1` for each task, and prose passages.

    Parameters
    ----------
    tokens : int
        Tokens of every prompt and of every passage, exact.
    passages : int
        May be 0.
    text : str, optional
        Take consecutive passages of this text instead of the library's prose.

    Raises
    ------
    ValueError
        If there is nothing to do, a count is out of range, `text` is too short, or as `make_sample`.
    """
    if samples < 1 or passages < 0:
        raise ValueError(f"samples must be at least 1 and passages at least 0, got {samples} and {passages}")
    if not tasks and not passages:
        raise ValueError("tasks must not be empty when there are no passages")
    if tokens < 4:
        raise ValueError(f"tokens must be at least 4, got {tokens}")
    by_length: dict[tuple[str, int], list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
    for task in tasks:
        for i in range(samples):
            sample = make_sample(tokenizer, task, tokens, first_seed + i)
            by_length[task, len(sample.answer)].append((i, sample.prompt[0], sample.answer))
    groups = tuple(
        NeedleGroup(task, torch.stack(prompts), torch.stack(answers), list(order))
        for (task, _), found in by_length.items()
        for order, prompts, answers in [zip(*found, strict=True)]
    )
    return Workload(tokens, samples, first_seed, groups, make_passages(tokenizer, tokens, passages, first_seed, text))


def make_passages(
    tokenizer: PreTrainedTokenizerBase, tokens: int, count: int, first_seed: int = 0, text: str | None = None
) -> Int[Tensor, "passages tokens"]:
    """`count` passages of `tokens` tokens: prose of seeds that no needle prompt has, or the first ones of `text`.

    Raises
    ------
    ValueError
        If `text` is too short.
    """
    if text is None:
        rows = [_prose_ids(tokenizer, tokens, FIRST_PASSAGE + first_seed + i) for i in range(count)]
        return torch.tensor(rows, dtype=torch.int64).view(count, tokens)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: count * tokens]
    if len(ids) < count * tokens:
        raise ValueError(f"text must have {count * tokens} tokens for {count} passages of {tokens}, got {len(ids)}")
    return torch.tensor(ids, dtype=torch.int64).view(count, tokens)


def _prose_ids(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> list[int]:
    characters = 6 * tokens
    while True:
        ids: list[int] = tokenizer(prose(seed, characters), add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            return ids[:tokens]
        characters *= 2


def default_batch(device: torch.device, tokens: int) -> int:
    """Sequences of one forward pass."""
    return max(1, TOKENS_PER_PASS // tokens) if device.type != "cpu" else 1


def in_parts(count: int, size: int, work: Callable[[slice], T]) -> list[tuple[slice, T]]:
    """`work` on consecutive slices of at most `size` of `count` things; half as many when memory runs out.

    Raises
    ------
    torch.OutOfMemoryError
        If a single thing is too much.
    """
    done: list[tuple[slice, T]] = []
    lo = 0
    while lo < count:
        part = slice(lo, min(lo + size, count))
        try:
            done.append((part, work(part)))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        else:
            lo = part.stop
            continue
        # Outside the handler: its traceback would keep the tensors alive.
        size = (part.stop - part.start + 1) // 2
        torch.cuda.empty_cache()
    return done


@torch.inference_mode()
def measure(
    model: PreTrainedModel, workload: Workload, handle: SketchWalkHandle | None = None, batch: int | None = None
) -> Scores:
    """Score a model as it is: dense, or enabled.

    An answer counts when every token of it is the arg max, given the ones before. The answer is part of the one
    forward pass, so its own queries take part in choosing the last block's selection: a little kinder than decoding,
    which `sketch_walk.evaluation.decode` measures.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    workload : Workload
        From `make_workload`.
    handle : SketchWalkHandle, optional
        What `enable` returned for this model; densities are taken from it.
    batch : int, optional
        Most sequences per forward pass; default by device and length. Halved when memory runs out.

    Raises
    ------
    ValueError
        If `batch` is below 1 or `handle` is disabled.
    """
    device, network = model.device, cast("Any", model)
    batch = check_run(batch, handle, device, workload.tokens)
    begin, scores, densities = time.perf_counter(), Scores(), Densities()
    recorded = None if handle is None else handle.record

    def forward(ids: Tensor, keep: int) -> Tensor:
        if handle is not None:
            handle.record = True
            handle.calls.clear()
        logits: Tensor = network(input_ids=ids.to(device), use_cache=False, logits_to_keep=keep).logits
        if handle is not None:
            densities.add(handle.calls, len(ids))
        return logits

    def answers_of(group: NeedleGroup, part: slice) -> tuple[list[float], list[float]]:
        answers = group.answers[part]
        logits = forward(torch.cat((group.prompts[part], answers[:, :-1]), 1), answers.shape[1]).float()
        hit, loss = judge(logits, answers.to(device))
        return hit.all(1).float().tolist(), loss.mean(1).tolist()

    def losses_of(part: slice) -> list[float]:
        ids = workload.passages[part]
        half = ids.shape[1] // 2
        logits = forward(ids, ids.shape[1] - half)
        # One sequence at a time in float32: the vocabulary may be large.
        pairs = zip(logits[:, :-1], ids[:, half + 1 :].to(device), strict=True)
        return [F.cross_entropy(row.float(), target).item() for row, target in pairs]

    try:
        for task in workload.tasks:
            scores.hits[task], scores.nll[task] = [0.0] * workload.samples, [0.0] * workload.samples
        for group in workload.groups:
            for part, (hits, losses) in in_parts(len(group.order), batch, partial(answers_of, group)):
                for i, hit, loss in zip(group.order[part], hits, losses, strict=True):
                    scores.hits[group.task][i], scores.nll[group.task][i] = hit, loss
        for _, found in in_parts(len(workload.passages), batch, losses_of):
            scores.prose_nll += found
    finally:
        if handle is not None and recorded is not None:
            handle.record = recorded
            handle.calls.clear()
    scores.block_density, scores.pair_density = densities.means()
    scores.impls = sorted(densities.impls)
    scores.seconds = time.perf_counter() - begin
    return scores


def judge(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each target is the arg max, and its loss, both [batch, tokens], from float32 logits."""
    return logits.argmax(-1) == target, F.cross_entropy(logits.transpose(1, 2), target, reduction="none")


def check_run(batch: int | None, handle: SketchWalkHandle | None, device: torch.device, tokens: int) -> int:
    """The batch to take.

    Raises
    ------
    ValueError
        If `batch` is below 1 or `handle` is disabled.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if handle is not None and not handle.enabled:
        raise ValueError("handle is disabled: enable the model again")
    return default_batch(device, tokens) if batch is None else batch
