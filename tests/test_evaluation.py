"""Needle tasks: the text, the prompts, the scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketch_walk.config import SketchWalkConfig
from sketch_walk.evaluation import TASKS, EvaluationResult, SampleScore, evaluate, make_sample, prose
from sketch_walk.integrations.models import LoadedModel, load
from sketch_walk.integrations.transformers import enable


def score(**changes: Any) -> SampleScore:
    fields = {
        "task": "prose",
        "tokens": 1000,
        "depth": 0.5,
        "seed": 0,
        "question": "?",
        "expected": "123456",
        "correct": True,
        "nll": 0.5,
        "seconds": 2.0,
    }
    return SampleScore(**{**fields, **changes})


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_prose_is_its_seed(seed: int) -> None:
    assert prose(seed, 500) == prose(seed, 500)
    assert prose(seed, 500) != prose(seed + 1, 500)
    assert prose(seed, 900).startswith(prose(seed, 500))


def test_prose_is_varied_and_whole() -> None:
    text = prose(7, 48_000)
    assert len(text) >= 48_000
    sentences = re.split(r'(?<=[.])\s+|(?<=[.]")\s+', text)
    assert len(set(sentences)) > 0.97 * len(sentences)
    assert len(set(re.findall(r"[a-z]+", text.lower()))) > 500
    assert "{" not in text
    assert all(re.match(r'"?[A-Z]', sentence) for sentence in sentences)
    assert not re.search(r"\d", text), "a digit could be taken for a code"


def test_prose_of_nothing() -> None:
    assert prose(0, 0) == ""
    with pytest.raises(ValueError, match="characters must be at least 0, got -1"):
        prose(0, -1)


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("tokens", [300, 1111])
@pytest.mark.parametrize("depth", [None, 0.0, 0.4, 1.0])
def test_sample(tokenizer: Any, task: str, tokens: int, depth: float | None) -> None:
    sample = make_sample(tokenizer, task, tokens, 3, depth)
    assert sample.prompt.shape == (1, tokens)
    assert sample.prompt.dtype == torch.int64
    text = tokenizer.decode(sample.prompt[0])
    key = re.search(r"secret code of the (\w+)\?", sample.question)
    assert key is not None
    assert text.count(f"The secret code of the {key[1]} is {sample.answer_text}.") == 1
    assert len(re.findall(r"The secret code of the \w+ is \d{6}\.", text)) == TASKS[task].needles
    assert text.endswith(f"The secret code of the {key[1]} is")
    assert tokenizer.decode(sample.answer) == f" {sample.answer_text}"
    told = tokenizer.decode(sample.prompt[0, sample.needle_start : sample.needle_start + 20])
    assert told.startswith(f" The secret code of the {key[1]} is {sample.answer_text}")
    if depth is not None:
        assert sample.depth == depth


def test_sample_is_its_seed(tokenizer: Any) -> None:
    first, again = (make_sample(tokenizer, "multi_key", 500, 5) for _ in range(2))
    assert torch.equal(first.prompt, again.prompt)
    assert not torch.equal(first.prompt, make_sample(tokenizer, "multi_key", 500, 6).prompt)


def test_depth_moves_the_needle(tokenizer: Any) -> None:
    starts = [make_sample(tokenizer, "prose", 800, 2, depth).needle_start for depth in (0.0, 0.5, 1.0)]
    assert starts == sorted(starts)
    assert starts[2] - starts[0] > 600
    assert abs(2 * starts[1] - starts[0] - starts[2]) <= 2


def test_tokenizer_without_a_chat_template(tokenizer: Any) -> None:
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    text = plain.decode(make_sample(plain, "prose", 300, 0).prompt[0])
    assert text.startswith(f"{plain.bos_token}Somewhere in the text below")
    assert "assistant" not in text


def test_terse_tokenizer_still_fills_the_prompt(tokenizer: Any) -> None:
    def ids(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"][::3]}

    class Terse:
        chat_template = None
        bos_token = ""

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return ids(text)

    assert make_sample(Terse(), "prose", 700, 0).prompt.shape == (1, 700)


def test_bad_samples(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown task 'hay'; expected one of \('noise', 'prose', 'multi_key'\)"):
        make_sample(tokenizer, "hay", 500, 0)
    with pytest.raises(ValueError, match=r"depth must be None or in \[0, 1\], got 1\.5"):
        make_sample(tokenizer, "prose", 500, 0, 1.5)
    with pytest.raises(ValueError, match="tokens must be at least") as caught:
        make_sample(tokenizer, "prose", 50, 0)
    least = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    assert make_sample(tokenizer, "prose", least, 0).prompt.shape[1] == least


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder, device="cpu")


def test_a_real_model_finds_the_needle_dense_and_sparse(smollm2: LoadedModel) -> None:
    asked = {
        "tasks": ("prose",),
        "lengths": (500,),
        "depths": (0.3,),
        "samples": 1,
        "generate": True,
        "progress": False,
    }
    dense = evaluate(*smollm2, **asked)
    assert dense.accuracy == 1.0
    assert dense.generated_accuracy == 1.0
    assert dense.nll < 0.3
    assert dense.block_density is None
    config = SketchWalkConfig(density=0.5, min_blocks=4, dense_below=0)
    with enable(smollm2.model, config, record=True) as handle:
        sparse = evaluate(*smollm2, handle=handle, **asked)
    assert sparse.block_density is not None
    assert 0.5 < sparse.block_density < 0.9
    assert sparse.samples[0].nll != dense.samples[0].nll


def test_scores_equal_a_plain_forward_pass(tiny: LoadedModel) -> None:
    result = evaluate(*tiny, tasks=("noise",), lengths=(300,), samples=1, first_seed=4, progress=False)
    sample = make_sample(tiny.tokenizer, "noise", 300, 4)
    ids = torch.cat((sample.prompt, sample.answer[None]), dim=1)
    with torch.inference_mode():
        logits = tiny.model(input_ids=ids).logits[0, -len(sample.answer) - 1 : -1]
    expected = -logits.log_softmax(-1).gather(1, sample.answer[:, None]).mean()
    assert result.nll == pytest.approx(expected.item(), abs=1e-4)
    assert result.samples[0].correct == bool((logits.argmax(-1) == sample.answer).all())
    assert result.samples[0].seed == 4
    assert result.samples[0].generated is None


def test_every_combination_is_run(tiny: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[SampleScore] = []
    asked = {"tasks": ("noise", "prose"), "lengths": (200, 260), "depths": (0.0, 1.0)}
    result = evaluate(*tiny, **asked, samples=2, on_sample=seen.append)
    assert len(result.samples) == 16
    assert tuple(seen) == result.samples
    assert {(s.task, s.tokens, s.depth, s.seed) for s in seen} == {
        (task, tokens, depth, seed)
        for task in asked["tasks"]
        for tokens in asked["lengths"]
        for depth in asked["depths"]
        for seed in (0, 1)
    }
    assert "prompt" in capsys.readouterr().err
    assert result.settings["device"] == "cpu"
    assert len(result.of_task("prose").samples) == 8


def test_the_handle_is_cleared_for_each_prompt(tiny: LoadedModel) -> None:
    config = SketchWalkConfig(block_size=16, density=0.4, dense_below=0, skip_first_n_layers=1, sketch_dim=8)
    with enable(tiny.model, config, record=True) as handle:
        result = evaluate(*tiny, tasks=("noise",), lengths=(200,), samples=2, handle=handle, progress=False)
        assert len(handle.calls) == 3
    assert result.block_density == pytest.approx(handle.summary()["block_density"])
    assert result.pair_density == pytest.approx(handle.summary()["pair_density"])


@pytest.mark.parametrize("name", ["tasks", "lengths", "depths"])
def test_nothing_to_run(tiny: LoadedModel, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be empty"):
        evaluate(*tiny, **{name: ()})


def test_bad_runs(tiny: LoadedModel) -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        evaluate(*tiny, samples=0)
    with pytest.raises(ValueError, match="there are no samples to average"):
        _ = EvaluationResult(()).accuracy


def test_means_and_heat_map() -> None:
    result = EvaluationResult(
        (
            score(block_density=0.2),
            score(correct=False, nll=1.5, block_density=0.4, generated=" 12345"),
            score(depth=0.1, tokens=2000, generated=": 123456."),
        )
    )
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.nll == pytest.approx(2.5 / 3)
    assert result.seconds == 2.0
    assert result.block_density == pytest.approx(0.3)
    assert result.pair_density is None
    assert result.generated_accuracy == 0.5
    heat = result.heat_map()
    assert heat.depths == (0.1, 0.5)
    assert heat.lengths == (1000, 2000)
    assert heat.accuracy == ((None, 1.0), (0.5, None))


def test_json(tmp_path: Path) -> None:
    result = EvaluationResult((score(), score(task="noise", generated="123456")), {"dtype": "bfloat16"})
    result.write_json(tmp_path / "new" / "result.json")
    read = json.loads((tmp_path / "new" / "result.json").read_text())
    assert read == json.loads(json.dumps(result.to_dict()))
    assert read["settings"] == {"dtype": "bfloat16"}
    assert read["tasks"]["prose"]["accuracy"] == 1.0
    assert [s["generated_correctly"] for s in read["samples"]] == [None, True]


def test_padding_token_falls_back_to_the_end_token(tiny: LoadedModel) -> None:
    asked = SimpleNamespace(pad_token_id=None, eos_token_id=2, decode=tiny.tokenizer.decode)
    from sketch_walk.evaluation.runner import _generate

    prompt = make_sample(tiny.tokenizer, "noise", 200, 0).prompt
    assert _generate(tiny.model, asked, prompt, 3) == _generate(tiny.model, tiny.tokenizer, prompt, 3)
