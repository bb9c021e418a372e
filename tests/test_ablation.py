"""Batched scores, decode scores, paired statistics, and `sketch-walk ablate` from file to picture."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sketch_walk.cli import main
from sketch_walk.config import PRESETS, SketchWalkConfig
from sketch_walk.evaluation import evaluate
from sketch_walk.evaluation.ablation import (
    Store,
    choose_groups,
    measurement_key,
    parse_plan,
    read_plan,
    rows_of,
    summarise,
)
from sketch_walk.evaluation.batched import in_parts, make_workload, measure
from sketch_walk.evaluation.decode import (
    DecodeWay,
    DecodeWorkload,
    DenseDecode,
    _until_end,
    make_decode_workload,
    measure_decode,
    measure_dense_decode,
    measure_ways,
)
from sketch_walk.evaluation.statistics import mean_of, paired_difference
from sketch_walk.integrations.models import LoadedModel, load
from sketch_walk.integrations.transformers import enable
from sketch_walk.plots import Panel, Point, plot_panels

PROJECT = Path(__file__).parents[1]
SMALL = {"block_size": 16, "sketch_dim": 8, "skip_first_n_layers": 1, "density": 0.4, "dense_below": 0}
CONFIG = SketchWalkConfig(**SMALL)


@pytest.fixture(scope="module")
def sharp_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights so large that it matters which blocks are read."""
    model, tokenizer = load(tiny_folder, device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 15 if "_proj" in name else 20 if "lm_head" in name else 1
    folder = tmp_path_factory.mktemp("sharp-llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(sharp_folder: Path) -> LoadedModel:
    return load(sharp_folder, device="cpu")


class Uneven:
    """A tokenizer whose odd codes take a token more."""

    chat_template = None
    bos_token = ""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        bare = text.strip()
        return {"input_ids": [*ids, 5] if bare.isdigit() and int(bare) % 2 else ids}


def test_mean_and_standard_error() -> None:
    assert mean_of([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7.0) / math.sqrt(3.0)))
    assert mean_of([2.0]) == (2.0, None)
    with pytest.raises(ValueError, match="values must hold at least one sample"):
        mean_of([])


def test_paired_intervals() -> None:
    generator = torch.Generator().manual_seed(3)
    noise, shared = torch.randn(400, generator=generator), 10 * torch.randn(400, generator=generator)
    ours, theirs = (shared + noise + 0.5).tolist(), shared.tolist()
    found = paired_difference(ours, theirs)
    assert found == paired_difference(ours, theirs), "not repeatable"
    assert found.mean == pytest.approx(0.5, abs=0.2)
    assert found.low < found.mean < found.high
    # For many samples the bootstrap is the normal interval; the shared part, ten times larger, is gone.
    assert found.standard_error == pytest.approx(float(noise.std()) / 20, rel=1e-4)
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(noise.std()) / 20, rel=0.1)
    assert paired_difference([1.0, 1.0], [0.0, 0.0]) == (1.0, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="ours and theirs must be equally many, got 1 and 2"):
        paired_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize("sparse", [False, True])
def test_batches_score_as_single_prompts_do(tiny: LoadedModel, sparse: bool) -> None:
    tasks = ("noise", "prose")
    workload = make_workload(tiny.tokenizer, 210, tasks=tasks, samples=5, first_seed=2, passages=0)
    asked: dict[str, Any] = {"tasks": tasks, "lengths": (210,), "samples": 5, "first_seed": 2, "progress": False}
    if sparse:
        with enable(tiny.model, CONFIG, record=True) as handle:
            alone = evaluate(*tiny, handle=handle, **asked)
            batched = measure(tiny.model, workload, handle, batch=3)
            assert handle.record
            assert not handle.calls
        assert batched.block_density == pytest.approx(alone.block_density)
        assert batched.pair_density == pytest.approx(alone.pair_density)
        assert batched.impls == ["reference"]
    else:
        alone, batched = evaluate(*tiny, **asked), measure(tiny.model, workload, batch=3)
        assert batched.block_density is None
        assert batched.impls == []
    for task in tasks:
        assert batched.nll[task] == pytest.approx([s.nll for s in alone.of_task(task).samples], abs=1e-4)
        assert batched.hits[task] == [float(s.correct) for s in alone.of_task(task).samples]


def test_answers_of_different_lengths_keep_their_order(tiny: LoadedModel) -> None:
    workload = make_workload(Uneven(tiny.tokenizer), 200, tasks=("noise",), samples=6, passages=0)  # type: ignore[arg-type]
    assert len(workload.groups) == 2
    assert sorted(i for group in workload.groups for i in group.order) == list(range(6))
    assert {group.answers.shape[1] for group in workload.groups} == {7, 8}
    assert all(group.prompts.shape[1] == 200 for group in workload.groups)
    losses = measure(tiny.model, workload, batch=4).nll["noise"]
    for group in workload.groups:
        for i, prompt, answer in zip(group.order, group.prompts, group.answers, strict=True):
            ids = torch.cat((prompt, answer))[None]
            with torch.inference_mode():
                logits = tiny.model(input_ids=ids).logits[0, 199:-1]
            assert losses[i] == pytest.approx(torch.nn.functional.cross_entropy(logits, answer).item(), abs=1e-4)


def test_prose_loss_is_of_the_second_half(tiny: LoadedModel) -> None:
    workload = make_workload(tiny.tokenizer, 121, tasks=(), samples=1, passages=3)
    scores = measure(tiny.model, workload, batch=2)
    assert len(scores.prose_nll) == 3
    assert len(set(scores.prose_nll)) == 3
    ids = workload.passages[2:]
    with torch.inference_mode():
        logits = tiny.model(input_ids=ids).logits[0, 60:-1]
    assert scores.prose_nll[2] == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[0, 61:]).item(), abs=1e-4)


def test_passages_of_a_text(tiny: LoadedModel) -> None:
    text = "One two three four five six seven eight nine ten. " * 20
    ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    workload = make_workload(tiny.tokenizer, 40, tasks=(), samples=1, passages=3, text=text)
    assert workload.passages.flatten().tolist() == ids[:120]
    with pytest.raises(ValueError, match=f"text must have 4000 tokens for 100 passages of 40, got {len(ids)}"):
        make_workload(tiny.tokenizer, 40, tasks=(), samples=1, passages=100, text=text)
    plan = parse_plan(PLAN)
    other = replace(plan, text=text)
    assert measurement_key(plan, "prompt", None, 200) != measurement_key(other, "prompt", None, 200)
    assert other.workload_options("decode")["text"] == text
    assert "text_sha256" not in other.workload_options("decode")
    assert text not in json.dumps(other.samples_of("decode"))


def test_bad_workloads(tiny: LoadedModel) -> None:
    for asked, message in (
        ({"samples": 0}, "samples must be at least 1 and passages at least 0, got 0 and 4"),
        ({"tasks": (), "passages": 0}, "tasks must not be empty when there are no passages"),
        ({"tasks": ("hay",)}, "unknown task 'hay'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_workload(tiny.tokenizer, 200, **asked)
    workload = make_workload(tiny.tokenizer, 100, tasks=(), passages=1)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        measure(tiny.model, workload, batch=0)
    handle = enable(tiny.model, CONFIG)
    handle.disable()
    with pytest.raises(ValueError, match="handle is disabled"):
        measure(tiny.model, workload, handle)


def test_parts_halve_when_memory_runs_out() -> None:
    tried: list[tuple[int, int]] = []

    def work(part: slice) -> list[int]:
        tried.append((part.start, part.stop))
        if part.stop - part.start > 2:
            raise torch.OutOfMemoryError("too many")
        return list(range(part.start, part.stop))

    assert [i for _, found in in_parts(9, 8, work) for i in found] == list(range(9))
    assert tried == [(0, 8), (0, 4), (0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]

    def never(part: slice) -> None:
        raise torch.OutOfMemoryError("too many")

    with pytest.raises(torch.OutOfMemoryError):
        in_parts(3, 4, never)


@pytest.fixture(scope="module")
def decode_workload(tiny: LoadedModel) -> DecodeWorkload:
    return make_decode_workload(tiny.tokenizer, 200, tasks=("noise",), samples=3, texts=3, new_tokens=20)


@pytest.fixture(scope="module")
def dense_decode(tiny: LoadedModel, decode_workload: DecodeWorkload) -> DenseDecode:
    return measure_dense_decode(tiny.model, decode_workload, batch=2)


def generated(model: Any, prompts: torch.Tensor, count: int) -> torch.Tensor:
    """New tokens of greedy generation that does not stop."""
    output = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return output[:, prompts.shape[1] :]


def test_dense_decode_is_greedy_generation(
    tiny: LoadedModel, decode_workload: DecodeWorkload, dense_decode: DenseDecode
) -> None:
    assert torch.equal(torch.tensor(dense_decode.continuations), generated(tiny.model, decode_workload.texts, 20))
    assert dense_decode.scores.agreement == [1.0] * 3
    assert dense_decode.scores.prefill_density is None
    workload = make_workload(tiny.tokenizer, 200, tasks=("noise",), samples=3, passages=0)
    assert dense_decode.scores.nll["noise"] == pytest.approx(measure(tiny.model, workload).nll["noise"], abs=1e-4)


def test_forced_tokens_tell_where_generation_differs(
    tiny: LoadedModel, decode_workload: DecodeWorkload, dense_decode: DenseDecode
) -> None:
    config = SketchWalkConfig(**{**SMALL, "density": None, "top_k_blocks": 2})
    found = measure_decode(tiny.model, decode_workload, dense_decode, config, batch=3)
    assert list(found) == ["both", "prefill", "decode"]
    target = torch.tensor(dense_decode.continuations)
    counted = _until_end(target, tiny.model).sum(1)
    for mode, scores in found.items():
        with enable(tiny.model, config, mode=mode):
            own = generated(tiny.model, decode_workload.texts, 20)
        until = (own == target).int().cumprod(1).sum(1)
        assert scores.agreed_tokens == torch.minimum(until, counted).tolist()
    assert min(scores.agreed_tokens[i] for scores in found.values() for i in range(3)) < 20, "nothing ever differed"
    assert found["both"].prefill_density == found["prefill"].prefill_density
    assert found["both"].decode_density is not None
    assert found["both"].decode_density == pytest.approx(2 / 13, abs=0.02)
    assert (found["prefill"].decode_density, found["decode"].prefill_density) == (None, None)


def test_full_budget_decodes_as_dense(
    tiny: LoadedModel, decode_workload: DecodeWorkload, dense_decode: DenseDecode
) -> None:
    config = SketchWalkConfig(**{**SMALL, "density": 1.0})
    scores = measure_decode(tiny.model, decode_workload, dense_decode, config, modes=("both",), batch=2)["both"]
    assert scores.nll["noise"] == pytest.approx(dense_decode.scores.nll["noise"], abs=1e-4)
    assert scores.continuation_nll == pytest.approx(dense_decode.scores.continuation_nll, abs=1e-4)
    assert scores.agreement == [1.0] * 3
    assert scores.agreed_tokens == dense_decode.scores.agreed_tokens


def test_ways_that_share_a_prompt_find_what_they_find_alone(
    tiny: LoadedModel, decode_workload: DecodeWorkload, dense_decode: DenseDecode
) -> None:
    config = SketchWalkConfig(**{**SMALL, "density": None, "top_k_blocks": 3})
    forgetful = replace(config, step_memory=0.0)
    ways = {
        "remembers": DecodeWay("both"),
        "forgets": DecodeWay("both", forgetful),
        "dense prompt": DecodeWay("decode"),
    }
    found = measure_ways(tiny.model, decode_workload, dense_decode, config, ways, batch=2)
    assert list(found) == list(ways)
    alone = {
        "remembers": measure_decode(tiny.model, decode_workload, dense_decode, config, modes=["both"])["both"],
        "forgets": measure_decode(tiny.model, decode_workload, dense_decode, forgetful, modes=["both"])["both"],
        "dense prompt": measure_decode(tiny.model, decode_workload, dense_decode, config, modes=["decode"])["decode"],
    }
    for name, scores in alone.items():
        assert found[name].nll["noise"] == pytest.approx(scores.nll["noise"], abs=1e-4)
        assert found[name].continuation_nll == pytest.approx(scores.continuation_nll, abs=1e-4)
        assert found[name].decode_density == pytest.approx(scores.decode_density, abs=0.02)
        assert found[name].seconds > 0
    assert found["remembers"].continuation_nll != found["forgets"].continuation_nll


def test_continuations_count_up_to_their_end(tiny: LoadedModel) -> None:
    end = tiny.model.generation_config.eos_token_id
    assert isinstance(end, int)
    tokens = torch.tensor([[7, end, 8, end], [7, 8, 9, 10]])
    assert _until_end(tokens, tiny.model).tolist() == [[True, True, False, False], [True] * 4]


def test_bad_decode(tiny: LoadedModel, decode_workload: DecodeWorkload, dense_decode: DenseDecode) -> None:
    with pytest.raises(ValueError, match="dense has 2 continuations; workload has 3 texts"):
        measure_decode(
            tiny.model, decode_workload, DenseDecode(dense_decode.scores, dense_decode.continuations[:2]), CONFIG
        )
    with pytest.raises(ValueError, match="texts must be at least 0 and new_tokens at least 1, got 1 and 0"):
        make_decode_workload(tiny.tokenizer, 200, texts=1, new_tokens=0)


PLAN: dict[str, Any] = {
    "base": {name: value for name, value in SMALL.items() if name != "dense_below"},
    "tokens": [200],
    "samples": 3,
    "tasks": ["noise"],
    "passages": 2,
    "texts": 2,
    "new_tokens": 4,
    "groups": [
        {
            "name": "density",
            "question": "How much is read",
            "field": "density",
            "rows": [
                {"label": "40 %"},
                {"label": "80 %", "changes": {"density": 0.8}},
                {"label": "local, 40 %", "selector": "local", "series": "local"},
                {"label": "local, 80 %", "selector": "local", "series": "local", "changes": {"density": 0.8}},
            ],
        },
        {
            "name": "rules",
            "question": "Whose rule",
            "rows": [
                {"label": "default"},
                {"label": "icml()", "rule": "icml", "changes": {"block_size": 16, "skip_first_n_layers": 1}},
            ],
        },
        {
            "name": "steps",
            "question": "Steps",
            "measure": "decode",
            "rows": [{"label": "sketch"}, {"label": "strided", "selector": "xattention"}],
        },
    ],
}


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    plan = json.loads(json.dumps(PLAN))
    at = plan
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return plan


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("grups",), [], r"the plan: missing \[\], unknown \['grups'\]"),
        (("samples",), 0, "samples must be a whole number of at least 1, got 0"),
        (("tokens",), [], "tokens must not be empty"),
        (("tasks",), ["hay"], r"tasks must be some of \('noise', 'prose', 'multi_key'\), got \['hay'\]"),
        (("groups",), [], r"groups must have names that differ, got \[\]"),
        (("groups", 0, "name"), "rules", "groups must have names that differ"),
        (("groups", 1, "field"), "blocks", r"groups\[1\]: field must name a config field, got 'blocks'"),
        (("groups", 1, "measure"), "speed", r"groups\[1\]: unknown measure 'speed'"),
        (("groups", 1, "rows", 0, "label"), "dense", r"groups\[1\]: rows must have labels that differ"),
        (("groups", 1, "rows", 0, "changes"), {"x": 1}, r"groups\[1\]\.rows\[0\]: unknown config fields \['x'\]"),
        (("groups", 1, "rows", 0, "changes"), {"dense_below": 9}, "dense_below is always 0 here"),
        (("groups", 1, "rows", 0, "selector"), "magic", r"groups\[1\]\.rows\[0\]: unknown selector 'magic'"),
        (("groups", 1, "rows", 0, "rule"), "magic", r"unknown rule 'magic'; expected one of \('paper', 'icml'\)"),
        (("groups", 1, "rows", 0), {"changes": {}}, r"groups\[1\]\.rows\[0\]: missing \['label'\]"),
    ],
)
def test_a_wrong_plan_says_where(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_plan(changed(path, value))


def test_plan_files(tmp_path: Path) -> None:
    plan = parse_plan(PLAN)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(PLAN), encoding="utf-8")
    assert read_plan(file) == plan
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        read_plan(file)
    with pytest.raises(TypeError, match=r"groups\[0\] must be an object, got int"):
        parse_plan({"groups": [1]})
    with pytest.raises(ValueError, match=r"unknown groups \['walks'\]"):
        choose_groups(plan, ["walks"])
    assert [group.name for group in choose_groups(plan, ["rules"]).groups] == ["rules"]


def test_rows_share_measurements_and_rules_stand_alone() -> None:
    plan = parse_plan({**PLAN, "tokens": [200, 300]})
    rows = list(rows_of(plan))
    assert [row.tokens for row in rows] == [200] * 11 + [300] * 11
    assert [row.label for row in rows[:6]] == ["dense", "40 %", "80 %", "local, 40 %", "local, 80 %", "dense"]
    by_name = {(row.group.name, row.label, row.tokens): row for row in rows}
    assert by_name["rules", "default", 200].key == by_name["density", "40 %", 200].key
    assert by_name["rules", "dense", 200].key == by_name["density", "dense", 200].key
    assert by_name["steps", "dense", 200].key != by_name["density", "dense", 200].key
    assert by_name["density", "dense", 300].key != by_name["density", "dense", 200].key
    assert len({row.key for row in rows}) == 2 * 9
    other = parse_plan({**PLAN, "first_seed": 3})
    assert measurement_key(other, "prompt", None, 200) != measurement_key(plan, "prompt", None, 200)
    icml = plan.groups[1].variants[1].config
    assert icml == SketchWalkConfig.icml(block_size=16, skip_first_n_layers=1, dense_below=0)


def test_the_committed_plan_asks_everything_the_page_shows() -> None:
    plan = read_plan(PROJECT / "benchmarks" / "ablations.json")
    page = (PROJECT / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert [group.name for group in plan.groups if f"<!-- generated: ablation-{group.name} -->" not in page] == []
    used = {variant.selector for group in plan.groups for variant in group.variants}
    assert {"quest", "xattention", "flexprefill", "block_means", "oracle_max", "local"} <= used
    assert all(variant.config.dense_below == 0 for group in plan.groups for variant in group.variants)


def test_the_presets_of_the_plan_are_the_presets() -> None:
    plan = read_plan(PROJECT / "benchmarks" / "ablations.json")
    rows = next(group.variants for group in plan.groups if group.name == "presets")
    assert {row.label: row.config for row in rows} == {
        name: replace(config, dense_below=0) for name, config in PRESETS.items()
    }


def test_the_example_on_the_page_is_a_plan() -> None:
    page = (PROJECT / "docs" / "ablations.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```json\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    plan = parse_plan(json.loads(example))
    assert [variant.label for variant in plan.groups[0].variants] == ["64", "128", "oracle, 128", "paper()"]
    assert plan.groups[0].variants[3].config.head_mode == "mean"


def test_the_page_waits_for_its_files_and_shows_them(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("generate", reason="not a checkout")
    regions = pytest.importorskip("regions")
    monkeypatch.setattr(regions.results, "PROJECT", tmp_path)
    monkeypatch.setattr(regions.results, "IMAGES", tmp_path / "docs" / "images")
    monkeypatch.setattr(regions.results, "RESULTS", tmp_path)
    monkeypatch.setattr(regions.ablations, "OTHER_ABLATIONS", dict.fromkeys(("rules", "steps"), "ablations_tiny.json"))
    assert regions.ablations.ablation("rules").startswith("Not measured in this checkout yet")
    cli.json = tmp_path / "ablations_tiny.json"
    cli("--groups", "rules,steps", "--plots", str(tmp_path / "docs" / "images" / "ablations_tiny"))
    text = regions.ablations.ablation("rules")
    assert "![Whose rule](images/ablations_tiny/rules.png)" in text
    assert "Source: `benchmarks/results/ablations_tiny.json`." in " ".join(text.split())
    assert "200 tokens, 3 prompts per task (seeds 0 to 2), 2 passages:" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| icml() |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    found = cli.saved()["groups"]["rules"]["tokens"]["200"]["rows"][2]["modes"]["prefill"]
    assert cells[1] == f"{100 * found['block_density']:.1f} %"
    assert cells[3] == f"0.00 / {found['figures']['nll:noise']['mean']:.2f}"
    over = found["figures"]["prose_nll"]["difference"]
    assert cells[6] == f"{over['mean']:+.4f} ({over['low']:+.4f} to {over['high']:+.4f})"
    steps = regions.ablations.ablation("steps")
    assert "| sketch | prompt and steps |" in steps
    assert "| strided | ValueError: xattention scores prompts" in steps


def test_summaries_are_paired() -> None:
    ours = {"hits": {"noise": [1, 0, 1]}, "nll": {"noise": [1.0, 2.0, 3.0]}, "prose_nll": [2.0, 2.5]}
    dense = {"hits": {"noise": [1, 1, 1]}, "nll": {"noise": [0.5, 1.5, 2.5]}, "prose_nll": [2.0, 2.0]}
    found = summarise(ours, dense)
    assert found["accuracy:noise"]["mean"] == pytest.approx(2 / 3, abs=1e-5)
    assert found["accuracy:noise"]["difference"]["mean"] == pytest.approx(-1 / 3, abs=1e-5)
    assert found["nll:noise"]["difference"] == {"mean": 0.5, "standard_error": 0.0, "low": 0.5, "high": 0.5}
    assert found["prose_nll"]["difference"]["low"] == 0.0
    assert "difference" not in summarise(dense, None)["prose_nll"]


class Cli:
    """Runs `sketch-walk ablate` on a plan and the tiny model; keeps exit code, output and the last line."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.plan, self.json, self.model, self.capsys = folder / "plan.json", folder / "out.json", model, capsys
        self.plan.write_text(json.dumps(PLAN), encoding="utf-8")

    def __call__(self, *options: str, model: str | None = None) -> tuple[int, str, dict[str, Any]]:
        self.capsys.readouterr()
        where = ("--model", model or str(self.model), "--device", "cpu", "--json", str(self.json))
        with pytest.raises(SystemExit) as done:
            main(["ablate", str(self.plan), *where, *options])
        output = self.capsys.readouterr()
        last = output.out.strip().rpartition("\n")[2]
        return done.value.code or 0, output.out + output.err, json.loads(last) if last.startswith("{") else {}  # type: ignore[return-value]

    def saved(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.json.read_text(encoding="utf-8"))
        return values


@pytest.fixture
def cli(tmp_path: Path, sharp_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "240")
    return Cli(tmp_path, sharp_folder, capsys)


def test_ablate_from_file_to_picture(cli: Cli, tmp_path: Path, tiny: LoadedModel) -> None:
    code, output, last = cli("--groups", "density,rules", "--batch", "2", "--plots", str(tmp_path / "plots"))
    assert code == 0, output
    assert last["complete"]
    assert "8/8 200 tokens, rules, icml()" in output
    assert "7/8 200 tokens, rules, default: known" in output
    assert "density, 200 tokens, seeds 0 to 2" in output
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"density.png", "rules.png"}
    assert all(path.stat().st_size > 10_000 for path in (tmp_path / "plots").iterdir())
    saved = cli.saved()
    assert saved["groups"] == last["groups"]
    assert saved["header"]["dtype"] == "float32"
    assert saved["header"]["versions"]["torch"] == torch.__version__
    assert len(saved["measurements"]) == 6
    rows = last["groups"]["density"]["tokens"]["200"]["rows"]
    assert [row["label"] for row in rows] == ["dense", "40 %", "80 %", "local, 40 %", "local, 80 %"]
    workload = make_workload(tiny.tokenizer, 200, tasks=("noise",), samples=3, passages=2)
    with enable(tiny.model, CONFIG) as handle:
        expected = measure(tiny.model, workload, handle)
    found = saved["measurements"][rows[1]["key"]]
    assert found["nll"]["noise"] == pytest.approx(expected.nll["noise"], abs=1e-3)
    assert found["prose_nll"] == pytest.approx(expected.prose_nll, abs=1e-3)
    assert found["block_density"] == pytest.approx(expected.block_density, rel=1e-4)
    assert found["config"] == CONFIG.to_dict()
    dense = measure(tiny.model, workload)
    assert abs(expected.prose_nll[0] - dense.prose_nll[0]) > 0.01, "sparse and dense are the same: nothing is tested"
    difference = rows[1]["modes"]["prefill"]["figures"]["prose_nll"]["difference"]
    over = [a - b for a, b in zip(expected.prose_nll, dense.prose_nll, strict=True)]
    assert difference["mean"] == pytest.approx(sum(over) / 2, abs=2e-3)


def test_a_row_that_fails_leaves_the_others(cli: Cli) -> None:
    code, output, last = cli("--groups", "steps")
    assert code == 1
    dense, sketch, strided = last["groups"]["steps"]["tokens"]["200"]["rows"]
    assert set(dense["modes"]) == {"dense"}
    assert set(sketch["modes"]) == {"both", "prefill", "decode"}
    assert "accuracy:noise" in sketch["modes"]["both"]["over_prefill"]
    assert "continuation_nll" in sketch["modes"]["both"]["figures"]
    assert strided["error"].startswith("ValueError: xattention scores prompts")
    assert "3/3 200 tokens, steps, strided: failed: ValueError" in output


def test_a_cut_run_goes_on(cli: Cli, tmp_path: Path) -> None:
    code, output, last = cli("--groups", "rules", "--seconds", "0")
    assert code == 1
    assert "rules, dense: left for another run" in output
    assert last["groups"]["rules"]["tokens"]["200"]["rows"][0]["error"] == "not measured yet"
    code, output, _ = cli("--groups", "rules")
    assert code == 1
    assert "is there already: resume it, or name another file" in output
    code, output, last = cli("--groups", "rules", "--resume")
    assert code == 0, output
    first = cli.saved()["measurements"]
    # Everything is known by now: no model is loaded, and pictures can be drawn anywhere.
    code, output, last = cli("--groups", "rules", "--resume", "--plots", str(tmp_path / "p"), model="/no/such/model")
    assert code == 0, output
    assert output.count(": known") == 3
    assert cli.saved()["measurements"] == first
    assert (tmp_path / "p" / "rules.png").is_file()
    code, output, last = cli("--groups", "density", "--resume")
    assert code == 0, output
    assert set(cli.saved()["groups"]) == {"rules", "density"}
    assert first.items() <= cli.saved()["measurements"].items()
    text = tmp_path / "text.txt"
    text.write_text("To be read aloud, slowly. " * 100, encoding="utf-8")
    code, output, last = cli("--groups", "rules", "--tokens", "220", "--resume", "--file", str(text))
    assert code == 0, output
    lengths = cli.saved()["groups"]["rules"]["tokens"]
    assert [sorted(lengths), "text_sha256" in lengths["200"]["samples"]] == [["200", "220"], False]
    assert len(lengths["220"]["samples"]["text_sha256"]) == 12


def test_measurements_of_two_kinds_do_not_mix(cli: Cli) -> None:
    assert cli("--groups", "rules")[0] == 0
    code, output, _ = cli("--groups", "rules", "--resume", "--samples", "2", "--kernel", "reference")
    assert code == 1
    assert "--resume would mix measurements" in output
    cli.json.write_text("[]", encoding="utf-8")
    code, output, _ = cli("--resume")
    assert code == 1
    assert "holds no ablations" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--groups", "walks"), "unknown groups ['walks']"),
        (("--batch", "0"), "batch must be at least 1, got 0"),
        (("--samples", "0"), "samples must be a whole number of at least 1, got 0"),
        (("--tokens", "many"), "tokens must be numbers such as 512,8K, got 'many'"),
        (("--kernel", "fast"), "unknown impl 'fast'"),
    ],
)
def test_wrong_options(cli: Cli, options: tuple[str, ...], message: str) -> None:
    code, output, _ = cli(*options)
    assert code == 1
    assert message in output
    assert not cli.json.exists()


def test_resume_needs_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")
    with pytest.raises(SystemExit) as done:
        main(["ablate", str(tmp_path / "plan.json"), "--resume"])
    assert done.value.code == 1
    assert "--resume needs --json" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.json", measurements={"k": {"seconds": 1.0}})
    store.save()
    store.measurements["bad"] = {"x": object()}
    with pytest.raises(TypeError):
        store.save()
    assert Store.open(tmp_path / "a.json", resume=True).measurements == {"k": {"seconds": 1.0}}


def test_panels(tmp_path: Path) -> None:
    lines = Panel("a", "accuracy", {"": [Point("x", 1.0, 0.5, 0.4, 0.6), Point("y", 16.0, 0.7)]}, 0.9)
    rows = Panel("b", "NLL", {"one": [Point("x", None, 3.2, 3.1, 3.3)], "two": [Point("x", None, 3.4)]})
    plot_panels(tmp_path / "lines.png", [lines], columns=1, xlabel="n")
    plot_panels(tmp_path / "rows.png", [rows, rows, rows], columns=2, title="rows")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("lines.png", "rows.png"))
    for panels, columns, message in (
        ([], 1, "panels must hold at least one and columns be at least 1, got 0 and 1"),
        ([lines], 0, "got 1 and 0"),
        ([lines._replace(series={})], 1, "panels must hold at least one point each"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_panels(tmp_path / "none.png", panels, columns=columns)
