"""Run needle tasks on a model, as it is: dense, or with sparse attention switched on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from sketch_walk.evaluation.needles import TASKS, NeedleSample, make_sample
from sketch_walk.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Generated beyond the answer's length, for a colon or a word before it.
SPARE_TOKENS = 6


class Recorder(Protocol):
    """What `evaluate` asks of an enabled handle: the calls it recorded, and their summary."""

    calls: list[Any]

    def summary(self) -> dict[str, Any]:
        """Densities and counts over `calls`."""
        ...


@dataclass(frozen=True)
class SampleScore:
    """One prompt's outcome.

    `correct` is teacher forced: every answer token is the most likely one. For a dense model that is what greedy
    decoding would give; for a sparse one it is a little kinder, because the answer's own queries take part in choosing
    the last block's selection. `nll` is the answer's mean loss in nats per token, `seconds` the wall time of that one
    forward pass. `generated` is None unless generation was asked for; densities are None for a model without a
    recording handle.
    """

    task: str
    tokens: int
    depth: float
    seed: int
    question: str
    expected: str
    correct: bool
    nll: float
    seconds: float
    generated: str | None = None
    block_density: float | None = None
    pair_density: float | None = None

    @property
    def generated_correctly(self) -> bool | None:
        """Whether the generated text holds the expected code; None when nothing was generated."""
        return None if self.generated is None else self.expected in self.generated


class HeatMap(NamedTuple):
    """Accuracy by depth and length: ``accuracy[i][j]`` is of ``depths[i]``, ``lengths[j]``; None if unmeasured."""

    depths: tuple[float, ...]
    lengths: tuple[int, ...]
    accuracy: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class EvaluationResult:
    """All scores of one run, with the settings that made them."""

    samples: tuple[SampleScore, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def of_task(self, task: str) -> EvaluationResult:
        """The part of this result that belongs to `task`."""
        return EvaluationResult(tuple(s for s in self.samples if s.task == task), self.settings)

    @property
    def accuracy(self) -> float:
        """Fraction of samples that are correct."""
        return _mean([float(s.correct) for s in self.samples])

    @property
    def generated_accuracy(self) -> float | None:
        """Fraction of samples whose generated text holds the code, None if none was generated."""
        return _mean_or_none([s.generated_correctly for s in self.samples])

    @property
    def nll(self) -> float:
        """Mean answer loss in nats per token."""
        return _mean([s.nll for s in self.samples])

    @property
    def seconds(self) -> float:
        """Mean seconds of a forward pass."""
        return _mean([s.seconds for s in self.samples])

    @property
    def block_density(self) -> float | None:
        """Mean block density of the sparse layers, None if none was recorded."""
        return _mean_or_none([s.block_density for s in self.samples])

    @property
    def pair_density(self) -> float | None:
        """Mean pair density of the sparse layers, None if none was recorded."""
        return _mean_or_none([s.pair_density for s in self.samples])

    def heat_map(self) -> HeatMap:
        """Accuracy by depth (rounded to 1 %) and length."""
        cells: dict[tuple[float, int], list[float]] = {}
        for sample in self.samples:
            cells.setdefault((round(sample.depth, 2), sample.tokens), []).append(float(sample.correct))
        depths = tuple(sorted({depth for depth, _ in cells}))
        lengths = tuple(sorted({length for _, length in cells}))
        grid = tuple(tuple(_mean_or_none(cells.get((d, n), [])) for n in lengths) for d in depths)
        return HeatMap(depths, lengths, grid)

    def to_dict(self) -> dict[str, Any]:
        """Settings, means over everything and by task, and every sample, as JSON-able values."""
        tasks = sorted({s.task for s in self.samples})
        return {
            "settings": self.settings,
            **self._means(),
            "tasks": {task: self.of_task(task)._means() for task in tasks},
            "samples": [{**asdict(s), "generated_correctly": s.generated_correctly} for s in self.samples],
        }

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a file, making its folder."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def _means(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "generated_accuracy": self.generated_accuracy,
            "nll": self.nll,
            "seconds": self.seconds,
            "block_density": self.block_density,
            "pair_density": self.pair_density,
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = (3000,),
    depths: Sequence[float | None] = (None,),
    samples: int = 8,
    first_seed: int = 0,
    handle: Recorder | None = None,
    generate: bool = False,
    progress: bool = True,
    on_sample: Callable[[SampleScore], None] | None = None,
) -> EvaluationResult:
    """Score needle tasks.

    Parameters
    ----------
    model, tokenizer
        A causal LM of transformers, dense or enabled, and its tokenizer.
    tasks : sequence of {"noise", "prose", "multi_key"}
    lengths : sequence of int
        Tokens of the prompts.
    depths : sequence of float or None
        Where the asked code lies, in [0, 1]; None draws a depth for each seed.
    samples : int
        Seeds for each combination of task, length and depth.
    first_seed : int
        The first of those seeds.
    handle : optional
        What `enable(..., record=True)` returned. Its calls are cleared before each prompt; after the run they are those
        of the last scored forward pass.
    generate : bool
        Also decode an answer greedily.
    progress : bool
        Show a progress bar.
    on_sample : callable, optional
        Called with each score as it comes.

    Raises
    ------
    ValueError
        If a sequence is empty, `samples` is below 1, or as `make_sample`.
    """
    for name, values in (("tasks", tasks), ("lengths", lengths), ("depths", depths)):
        if len(values) == 0:
            raise ValueError(f"{name} must not be empty")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    plan = [
        (task, length, depth, seed)
        for task in tasks
        for length in lengths
        for depth in depths
        for seed in range(first_seed, first_seed + samples)
    ]
    scores = []
    for task, length, depth, seed in require("tqdm", "eval").tqdm(
        plan, disable=not progress, unit="prompt", leave=False
    ):
        sample = make_sample(tokenizer, task, length, seed, depth)
        scores.append(_score(model, tokenizer, sample, seed, handle, generate))
        if on_sample is not None:
            on_sample(scores[-1])
    settings = {
        "tasks": list(tasks),
        "lengths": list(lengths),
        "depths": list(depths),
        "samples": samples,
        "first_seed": first_seed,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return EvaluationResult(tuple(scores), settings)


@torch.inference_mode()
def _score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sample: NeedleSample,
    seed: int,
    handle: Recorder | None,
    generate: bool,
) -> SampleScore:
    prompt, answer = sample.prompt.to(model.device), sample.answer.to(model.device)
    generated = _generate(model, tokenizer, prompt, len(answer) + SPARE_TOKENS) if generate else None
    if handle is not None:
        handle.calls.clear()
    begin = time.perf_counter()
    # The last answer token is only predicted, so it need not be read.
    ids = torch.cat((prompt, answer[None, :-1]), dim=1)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer)).logits[0].float()
    correct = bool((logits.argmax(-1) == answer).all())
    seconds = time.perf_counter() - begin
    summary = {} if handle is None else handle.summary()
    return SampleScore(
        task=sample.task,
        tokens=prompt.shape[1],
        depth=sample.depth,
        seed=seed,
        question=sample.question,
        expected=sample.answer_text,
        correct=correct,
        nll=F.cross_entropy(logits, answer).item(),
        seconds=seconds,
        generated=generated,
        block_density=summary.get("block_density"),
        pair_density=summary.get("pair_density"),
    )


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, tokens: int) -> str:
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)).strip()


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("there are no samples to average")
    return sum(values) / len(values)


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
