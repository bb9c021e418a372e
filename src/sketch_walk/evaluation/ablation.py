"""Ablations: groups of configs from a file, each measured beside dense over the same samples, kept as they come."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sketch_walk.config import SketchWalkConfig
from sketch_walk.evaluation.batched import Scores, Workload, make_workload, measure
from sketch_walk.evaluation.decode import (
    MODES,
    DecodeScores,
    DecodeWorkload,
    DenseDecode,
    make_decode_workload,
    measure_decode,
    measure_dense_decode,
)
from sketch_walk.evaluation.needles import TASKS
from sketch_walk.evaluation.selectors import SKETCH, score_function, selector
from sketch_walk.evaluation.statistics import mean_of, paired_difference

if TYPE_CHECKING:
    from sketch_walk.integrations.models import LoadedModel

MEASURES = ("prompt", "decode")
RULES: dict[str, Callable[..., SketchWalkConfig]] = {"paper": SketchWalkConfig.paper, "icml": SketchWalkConfig.icml}
DENSE = "dense"
# Figures of a measurement that are lists over samples; the rest describe it.
PROMPT_LISTS = ("hits", "nll", "prose_nll")
DECODE_LISTS = ("hits", "nll", "continuation_nll", "agreement", "agreed_tokens")

Measurement = dict[str, Any]


class Variant(NamedTuple):
    """One row of a group: a config, who scores its blocks, and the line of a picture that it belongs to."""

    label: str
    config: SketchWalkConfig
    selector: str
    series: str


class Group(NamedTuple):
    """Variants that answer one question.

    `measure` is "prompt" (teacher-forced answers and prose) or "decode" (tokens generated one by one); `field` names
    the config field that a picture has on its axis, None for bars.
    """

    name: str
    question: str
    measure: str
    field: str | None
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Plan:
    """What to measure: groups, and the samples that all of them share; passages are of `text`, if one is given."""

    groups: tuple[Group, ...]
    tokens: tuple[int, ...] = (4000,)
    samples: int = 64
    first_seed: int = 0
    tasks: tuple[str, ...] = ("prose", "multi_key")
    passages: int = 8
    texts: int = 8
    new_tokens: int = 128
    text: str | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "new_tokens"):
            _require_count(name, getattr(self, name), least=1)
        for name in ("first_seed", "passages", "texts"):
            _require_count(name, getattr(self, name), least=0)
        if not self.tokens:
            raise ValueError("tokens must not be empty")
        for tokens in self.tokens:
            _require_count("tokens", tokens, least=1)
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks must be some of {tuple(TASKS)}, got {list(self.tasks)}")

    def samples_of(self, kind: str) -> dict[str, Any]:
        """The settings that decide which samples a measurement saw."""
        shared: dict[str, Any] = {"samples": self.samples, "first_seed": self.first_seed, "tasks": list(self.tasks)}
        if self.text is not None:
            shared["text_sha256"] = hashlib.sha256(self.text.encode()).hexdigest()[:12]
        if kind == "prompt":
            return {**shared, "passages": self.passages}
        return {**shared, "texts": self.texts, "new_tokens": self.new_tokens}

    def workload_options(self, kind: str) -> dict[str, Any]:
        """`samples_of` as `make_workload` and `make_decode_workload` take it."""
        options = {name: value for name, value in self.samples_of(kind).items() if name != "text_sha256"}
        return {**options, "text": self.text}


class Row(NamedTuple):
    """One variant at one length. `variant` None is dense; `key` finds its measurement."""

    group: Group
    variant: Variant | None
    tokens: int
    key: str

    @property
    def label(self) -> str:
        """What a table calls it."""
        return DENSE if self.variant is None else self.variant.label


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan from a JSON file; docs/ablations.md describes the format.

    Raises
    ------
    ValueError, TypeError
        If the file is no JSON, or something in it is wrong; the message says where.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return parse_plan(values)


def parse_plan(values: dict[str, Any]) -> Plan:
    """A plan from JSON values.

    Raises
    ------
    ValueError, TypeError
        If something is wrong; the message says where.
    """
    _check_keys("the plan", values, required={"groups"}, optional={"base", *_plan_settings()})
    base = values.get("base", {})
    groups = tuple(_parse_group(f"groups[{i}]", group, base) for i, group in enumerate(values["groups"]))
    names = [group.name for group in groups]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"groups must have names that differ, got {names}")
    settings = {name: values[name] for name in _plan_settings() if name in values}
    for name in ("tokens", "tasks"):
        if name in settings:
            settings[name] = tuple(settings[name])
    return Plan(groups, **settings)


def _plan_settings() -> tuple[str, ...]:
    return tuple(name for name in Plan.__dataclass_fields__ if name not in ("groups", "text"))


def _parse_group(where: str, values: dict[str, Any], base: dict[str, Any]) -> Group:
    _check_keys(where, values, required={"name", "question", "rows"}, optional={"measure", "field", "base"})
    kind = values.get("measure", "prompt")
    if kind not in MEASURES:
        raise ValueError(f"{where}: unknown measure {kind!r}; expected one of {MEASURES}")
    on_axis = values.get("field")
    if on_axis is not None and on_axis not in SketchWalkConfig.__dataclass_fields__:
        raise ValueError(f"{where}: field must name a config field, got {on_axis!r}")
    own = {**base, **values.get("base", {})}
    variants = tuple(_parse_variant(f"{where}.rows[{i}]", row, own) for i, row in enumerate(values["rows"]))
    labels = [variant.label for variant in variants]
    if not labels or len(set(labels)) != len(labels) or DENSE in labels:
        raise ValueError(f"{where}: rows must have labels that differ, none of them {DENSE!r}, got {labels}")
    return Group(values["name"], values["question"], kind, on_axis, variants)


def _parse_variant(where: str, values: dict[str, Any], base: dict[str, Any]) -> Variant:
    _check_keys(where, values, required={"label"}, optional={"changes", "selector", "rule", "series"})
    rule, changes = values.get("rule"), values.get("changes", {})
    if rule is not None and rule not in RULES:
        raise ValueError(f"{where}: unknown rule {rule!r}; expected one of {tuple(RULES)}")
    if "dense_below" in changes or "dense_below" in base:
        raise ValueError(f"{where}: dense_below is always 0 here: every call is to be sparse")
    try:
        score_function(values.get("selector", SKETCH))
        if rule is None:
            config = SketchWalkConfig.from_dict({**base, **changes, "dense_below": 0})
        else:
            config = RULES[rule](**{**changes, "dense_below": 0})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    return Variant(values["label"], config, values.get("selector", SKETCH), values.get("series", ""))


def _check_keys(where: str, values: Any, *, required: set[str], optional: set[str]) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"{where} must be an object, got {type(values).__name__}")
    missing, unknown = sorted(required - set(values)), sorted(set(values) - required - optional)
    if missing or unknown:
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}")


def _require_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def choose_groups(plan: Plan, names: Sequence[str]) -> Plan:
    """The plan with the named groups alone, in the plan's order.

    Raises
    ------
    ValueError
        For a name that is no group.
    """
    known = [group.name for group in plan.groups]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown groups {unknown}; expected some of {known}")
    return replace(plan, groups=tuple(group for group in plan.groups if group.name in names))


def rows_of(plan: Plan) -> Iterator[Row]:
    """Every row, dense first in each group; all groups at the first length, then at the next."""
    for tokens in plan.tokens:
        for group in plan.groups:
            for variant in (None, *group.variants):
                yield Row(group, variant, tokens, measurement_key(plan, group.measure, variant, tokens))


def measurement_key(plan: Plan, kind: str, variant: Variant | None, tokens: int) -> str:
    """Short name of a measurement: equal for equal configs, selectors and samples, whatever group they stand in."""
    what = None if variant is None else [variant.config.to_dict(), variant.selector]
    text = json.dumps([kind, what, tokens, plan.samples_of(kind)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class Store:
    """Measurements by key, in a JSON file that is rewritten after each one.

    Parameters
    ----------
    path : path, optional
        None keeps them in memory only.
    header : dict
        Where they come from: model, device, versions.
    groups : dict
        Summaries by group and length, as pages show them; see `Store.summarise`.
    """

    path: Path | None = None
    header: dict[str, Any] = field(default_factory=dict)
    measurements: dict[str, Measurement] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, resume: bool) -> Store:
        """An empty store, or with `resume` what the file holds (nothing yet, if there is none).

        Raises
        ------
        FileExistsError
            If the file is there and `resume` is not asked for.
        ValueError
            If the file holds something else.
        """
        if path is None or not path.exists():
            return cls(path)
        if not resume:
            raise FileExistsError(f"{path} is there already: resume it, or name another file")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, *(dict(values[name]) for name in ("header", "measurements", "groups")))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no ablations: {error}") from error

    def done(self, key: str) -> bool:
        """Whether a measurement is there and did not fail."""
        return key in self.measurements and "error" not in self.measurements[key]

    def save(self) -> None:
        """Write the file, one group and one measurement a line; a run that is cut while writing leaves the old one."""
        if self.path is None:
            return
        parts = [f'"header": {json.dumps(self.header)}']
        for name, values in (("groups", self.groups), ("measurements", self.measurements)):
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
            parts.append(f'"{name}": {{\n{lines}\n}}')
        text = "{" + ",\n".join(parts) + "}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".partial")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self.path)

    def summarise(self, plan: Plan) -> dict[str, Any]:
        """Put the summaries of the plan's rows among those of other groups and lengths; returns the plan's."""
        mine: dict[str, Any] = {}
        for row in rows_of(plan):
            group = row.group
            entry = mine.setdefault(
                group.name, {"question": group.question, "measure": group.measure, "field": group.field, "tokens": {}}
            )
            samples = plan.samples_of(group.measure)
            by_length = entry["tokens"].setdefault(str(row.tokens), {"samples": samples, "rows": []})
            by_length["rows"].append(summarise_row(row, plan, self))
        for name, entry in mine.items():
            earlier = self.groups.get(name, {}).get("tokens", {})
            self.groups[name] = {**entry, "tokens": {**earlier, **entry["tokens"]}}
        return mine


def run_plan(
    plan: Plan,
    store: Store,
    load: Callable[[], LoadedModel],
    *,
    batch: int | None = None,
    impl: str = "auto",
    seconds: float | None = None,
    on_row: Callable[[Row, Measurement | None], None] | None = None,
) -> bool:
    """Measure what `store` does not hold yet.

    Parameters
    ----------
    load : callable
        Gives the dense model; called only if something is to be measured.
    batch : int, optional
        Most sequences per forward pass.
    seconds : float, optional
        Start no row after that many.
    on_row : callable, optional
        Called with each row and its measurement, which is None if time ran out. A row that fails has its
        measurement's "error"; the next ones go on, except that nothing can be compared without dense.

    Returns
    -------
    bool
        Whether every row is there and none failed.
    """
    begin, runner, complete = time.perf_counter(), None, True
    for row in rows_of(plan):
        if not store.done(row.key):
            if seconds is not None and time.perf_counter() - begin > seconds:
                complete = False
                if on_row is not None:
                    on_row(row, None)
                continue
            runner = runner or _Runner(plan, store, load(), batch, impl)
            store.measurements[row.key] = runner.measure(row)
            store.save()
        complete = complete and store.done(row.key)
        if on_row is not None:
            on_row(row, store.measurements[row.key])
    return complete


class _Runner:
    """Workloads of one length at a time, and the model."""

    def __init__(self, plan: Plan, store: Store, loaded: LoadedModel, batch: int | None, impl: str) -> None:
        self.plan, self.store, self.batch, self.impl = plan, store, batch, impl
        self.model, self.tokenizer = loaded
        self.prompts: Workload | None = None
        self.decodes: DecodeWorkload | None = None

    def measure(self, row: Row) -> Measurement:
        """One measurement; an exception, a kernel's that does not compile included, becomes its "error"."""
        try:
            return (self._prompt if row.group.measure == "prompt" else self._decode)(row)
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            return {**self._describe(row), "error": f"{type(error).__name__}: {reason}"}

    def _describe(self, row: Row) -> Measurement:
        what: Measurement = {
            "measure": row.group.measure,
            "tokens": row.tokens,
            **self.plan.samples_of(row.group.measure),
        }
        if row.variant is None:
            return {**what, "config": None, "selector": None}
        return {**what, "config": row.variant.config.to_dict(), "selector": row.variant.selector}

    def _prompt(self, row: Row) -> Measurement:
        from sketch_walk.integrations.transformers import enable

        if self.prompts is None or self.prompts.tokens != row.tokens:
            self.prompts = make_workload(self.tokenizer, row.tokens, **self.plan.workload_options("prompt"))
        if row.variant is None:
            scores = measure(self.model, self.prompts, batch=self.batch)
        else:
            with (
                enable(self.model, row.variant.config, mode="prefill", impl=self.impl) as handle,
                selector(handle, row.variant.selector),
            ):
                scores = measure(self.model, self.prompts, handle, self.batch)
        return {**self._describe(row), **_rounded(scores)}

    def _decode(self, row: Row) -> Measurement:
        workload = self._decode_workload(row.tokens)
        if row.variant is None:
            dense = measure_dense_decode(self.model, workload, self.batch)
            return {**self._describe(row), **_rounded(dense.scores), "continuations": dense.continuations}
        saved = self.store.measurements[measurement_key(self.plan, "decode", None, row.tokens)]
        if "error" in saved:
            raise ValueError(f"dense failed: {saved['error']}")
        by_mode = measure_decode(
            self.model,
            workload,
            DenseDecode(DecodeScores(), saved["continuations"]),
            row.variant.config,
            selector_name=row.variant.selector,
            impl=self.impl,
            batch=self.batch,
        )
        seconds = sum(scores.seconds for scores in by_mode.values())
        modes = {mode: _rounded(scores) for mode, scores in by_mode.items()}
        return {**self._describe(row), "modes": modes, "seconds": round(seconds, 3)}

    def _decode_workload(self, tokens: int) -> DecodeWorkload:
        if self.decodes is None or self.decodes.needles.tokens != tokens:
            self.decodes = make_decode_workload(self.tokenizer, tokens, **self.plan.workload_options("decode"))
        return self.decodes


def _rounded(scores: Scores | DecodeScores) -> Measurement:
    """Fields as JSON-able values: hits as 0 and 1, the rest to five decimals."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(item) for name, item in value.items()}
        if isinstance(value, list):
            return [short(item) for item in value]
        if isinstance(value, float):
            return int(value) if value in (0.0, 1.0) else round(value, 5)
        return value

    return {name: short(value) for name, value in asdict(scores).items()}


def summarise(ours: Measurement, dense: Measurement | None) -> dict[str, Any]:
    """Means of one measurement, and what they lose or win against dense over the same samples.

    Parameters
    ----------
    ours, dense : dict
        Measurements of the same kind, or two modes of a decode measurement. `dense` None leaves differences out.

    Returns
    -------
    dict
        By figure ("accuracy:prose", "nll:prose", ..., "prose_nll", "continuation_nll", "agreement", "agreed_tokens"):
        `mean` and `standard_error`, and with dense `difference` as `sketch_walk.evaluation.statistics.Difference`.
    """
    theirs = {} if dense is None else dict(_figures(dense))
    summary: dict[str, Any] = {}
    for name, values in _figures(ours):
        summary[name] = _digits(mean_of(values)._asdict())
        if name in theirs:
            summary[name]["difference"] = _digits(paired_difference(values, theirs[name])._asdict())
    return summary


def _digits(values: dict[str, float | None]) -> dict[str, Any]:
    return {name: None if value is None else round(value, 5) for name, value in values.items()}


def _figures(measurement: Measurement) -> Iterator[tuple[str, list[float]]]:
    for name in dict.fromkeys((*PROMPT_LISTS, *DECODE_LISTS)):
        values = measurement.get(name)
        if isinstance(values, dict):
            for task, found in values.items():
                yield f"{'accuracy' if name == 'hits' else name}:{task}", found
        elif values:
            yield name, values


def summarise_row(row: Row, plan: Plan, store: Store) -> dict[str, Any]:
    """A row as a table or a page shows it: its means by mode, density, kernels and seconds.

    Returns
    -------
    dict
        `label`, `tokens`, `key`, `series`, `value` (of the group's field), and `error`, or `seconds` and `modes`:
        by mode of `enable` ("prefill" for the measure "prompt", "dense" for dense) its densities, its kernels and its
        `figures`, from `summarise`. With "both" and "prefill", "both" also has `over_prefill`: what sparse steps cost
        after a sparse prompt.
    """
    found = store.measurements.get(row.key)
    result: dict[str, Any] = {"label": row.label, "tokens": row.tokens, "key": row.key}
    if row.variant is not None:
        result["series"] = row.variant.series
        result["value"] = None if row.group.field is None else getattr(row.variant.config, row.group.field)
    if found is None or "error" in found:
        return {**result, "error": "not measured yet" if found is None else found["error"]}
    dense = None
    if row.variant is not None:
        dense = store.measurements.get(measurement_key(plan, row.group.measure, None, row.tokens))
        dense = None if dense is None or "error" in dense else dense
    parts = found.get("modes", {DENSE if row.variant is None else "prefill": found})
    modes = {}
    for mode in (*MODES, DENSE):
        if mode in parts:
            kept = ("block_density", "pair_density", "prefill_density", "decode_density", "impls")
            described = {name: parts[mode][name] for name in kept if parts[mode].get(name) is not None}
            modes[mode] = {**described, "figures": summarise(parts[mode], dense)}
    if {"both", "prefill"} <= set(parts):
        steps = summarise(parts["both"], parts["prefill"])
        modes["both"]["over_prefill"] = {name: figure["difference"] for name, figure in steps.items()}
    return {**result, "modes": modes, "seconds": found["seconds"]}
