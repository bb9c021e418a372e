"""Needle tasks: a code word hidden in a long text, asked for at its end."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sketch_walk.evaluation.prose import prose

if TYPE_CHECKING:
    from jaxtyping import Int
    from transformers import PreTrainedTokenizerBase

KEYS = (
    "acorn", "barge", "canvas", "dolphin", "emerald", "falcon", "glacier", "harp", "igloo", "jasmine", "kayak",
    "lantern", "meadow", "nutmeg", "oyster", "pepper", "quiver", "raven", "sandal", "teapot", "urchin", "violet",
    "walnut", "zebra",
)  # fmt: skip
FILLER = "The road is long. The hills are low. The clouds drift by. We walk on. Soon we rest and then we go. "
INTRODUCTION = "Somewhere in the text below a secret code is written down. Remember it, you will be asked for it.\n"
PLACEHOLDER = "<<here>>"


class Task(NamedTuple):
    """A haystack ("noise" repeats a few sentences, "prose" is varied) and how many codes are hidden in it."""

    haystack: str
    needles: int


TASKS = {"noise": Task("noise", 1), "prose": Task("prose", 1), "multi_key": Task("prose", 4)}


class NeedleSample(NamedTuple):
    """One prompt with its answer.

    `prompt` is [1, tokens] and `answer` [answer_tokens], both int64; `depth` is where the asked code lies, 0 at the
    start of the haystack and 1 at its end; the sentence that tells it starts at token `needle_start` of `prompt`.
    """

    task: str
    prompt: Int[Tensor, "1 tokens"]
    answer: Int[Tensor, " answer_tokens"]
    question: str
    answer_text: str
    depth: float
    needle_start: int


def make_sample(
    tokenizer: PreTrainedTokenizerBase, task: str, tokens: int, seed: int, depth: float | None = None
) -> NeedleSample:
    """Build the prompt number `seed` of a task; the same arguments give the same prompt.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Its chat template is used when it has one.
    task : {"noise", "prose", "multi_key"}
    tokens : int
        Tokens of the prompt, exact.
    seed : int
        Chooses keys, codes, text and, unless given, depths.
    depth : float, optional
        Where the asked code lies, in [0, 1]; None draws it.

    Raises
    ------
    ValueError
        For an unknown task, a depth out of range, or `tokens` too few for the question.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {tuple(TASKS)}")
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be None or in [0, 1], got {depth!r}")
    kind, needles = TASKS[task]
    rng = random.Random(f"{task} {seed}")
    keys = rng.sample(KEYS, needles)
    codes = [str(rng.randint(100_000, 999_999)) for _ in keys]
    drawn = [rng.random() for _ in keys]
    depths = [drawn[0] if depth is None else depth, *drawn[1:]]
    facts = [
        _ids(tokenizer, f" The secret code of the {key} is {code}. ") for key, code in zip(keys, codes, strict=True)
    ]
    question = f"What is the secret code of the {keys[0]}?"
    before, after = _frame(tokenizer)
    head = _ids(tokenizer, before + INTRODUCTION)
    tail = _ids(tokenizer, f"\n{question}{after}The secret code of the {keys[0]} is")
    room = tokens - len(head) - len(tail) - sum(map(len, facts))
    if room < 0:
        raise ValueError(f"tokens must be at least {tokens - room} for the task {task!r}, got {tokens}")
    hay = _haystack(tokenizer, kind, seed, room)
    body: list[int] = []
    done = needle_start = 0
    for position, fact in sorted(zip(depths, facts, strict=True)):
        at = round(position * room)
        body += hay[done:at]
        if fact is facts[0]:
            needle_start = len(head) + len(body)
        body += fact
        done = at
    prompt = head + body + hay[done:] + tail
    return NeedleSample(
        task=task,
        prompt=torch.tensor([prompt]),
        answer=torch.tensor(_ids(tokenizer, f" {codes[0]}")),
        question=question,
        answer_text=codes[0],
        depth=depths[0],
        needle_start=needle_start,
    )


def _haystack(tokenizer: PreTrainedTokenizerBase, kind: str, seed: int, tokens: int) -> list[int]:
    # Six characters a token is more than English needs; a terser tokenizer asks again.
    characters = 6 * tokens
    while True:
        text = FILLER * (characters // len(FILLER) + 1) if kind == "noise" else prose(seed, characters)
        ids = _ids(tokenizer, text)
        if len(ids) >= tokens:
            return ids[:tokens]
        characters *= 2


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a chat template puts before and after a user's words."""
    if not tokenizer.chat_template:
        return tokenizer.bos_token or "", "\n"
    turns: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": PLACEHOLDER}], add_generation_prompt=True, tokenize=False
    )
    before, _, after = str(turns).partition(PLACEHOLDER)
    return before, after


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
