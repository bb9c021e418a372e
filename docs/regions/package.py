"""Regions made from the package alone: options, commands, the state's bytes."""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from typer import Context
from typer.models import ArgumentInfo

from regions.results import percent, table, wrapped
from sketch_walk.cli.app import app
from sketch_walk.cli.format import bytes_text
from sketch_walk.complexity import PROMISED_STATE_BYTES, SKETCH_SCALE_BYTES, ModelShape, count_memory
from sketch_walk.config import SketchWalkConfig
from sketch_walk.sketch import feature_width, outline_size

LENGTHS = (4096, 32_768, 131_072)
SMOLLM2 = ModelShape(layers=30, heads=9, kv_heads=3, head_dim=64)


def config_fields() -> str:
    """Region: every field with its default and its docstring."""
    described = dict(_described_fields(inspect.getdoc(SketchWalkConfig) or ""))
    body = []
    for entry in fields(SketchWalkConfig):
        kind, text = described[entry.name]
        default = str(entry.default) if entry.name == "walk_state_dtype" else repr(entry.default)
        body.append([f"`{entry.name}`", f"`{kind}`".replace("|", "\\|"), f"`{default}`", text])
    return table(("field", "type", "default", "meaning"), body, left=4)


def _described_fields(doc: str) -> Iterable[tuple[str, tuple[str, str]]]:
    """(field, (type, meaning)) of a NumPy docstring's Parameters."""
    section = doc.partition("Parameters\n----------\n")[2].partition("\n\nRaises")[0]
    for entry in re.split(r"\n(?=\S)", section):
        head, _, text = entry.partition("\n")
        names, _, kind = head.partition(" : ")
        meaning = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
        for name in names.split(", "):
            yield name, (kind, meaning)


def step_bytes(tokens: int, config: SketchWalkConfig, shape: ModelShape) -> int:
    """Bytes of key sketches that a decode step reads: every block's mean codes, outlines, step size and bound."""
    read = outline_size(feature_width(shape.head_dim, config), config)
    return math.ceil(tokens / config.block_size) * shape.kv_heads * (read + SKETCH_SCALE_BYTES)


def state_bytes() -> str:
    """Region: what is kept and what a decode step reads of it, by length, for two model shapes."""
    body = []
    for label, shape, width in (
        ("Llama-3.1-8B", ModelShape(), 64),
        ("Llama-3.1-8B", ModelShape(), 128),
        ("SmolLM2-135M", SMOLLM2, 64),
    ):
        config = SketchWalkConfig(sketch_dim=width)
        for tokens in (4096, 65_536, 131_072):
            memory, read_bytes = count_memory(tokens, config, shape), step_bytes(tokens, config, shape)
            body.append(
                [
                    f"{label}, head_dim {shape.head_dim}",
                    str(width),
                    f"{tokens:,}",
                    f"{bytes_text(memory.state)} ({percent(memory.state_share)})",
                    f"{bytes_text(read_bytes)} ({percent(read_bytes / memory.kv_cache)})",
                ]
            )
    head = ("model shape, 16 bits", "`sketch_dim`", "tokens", "kept (of the KV cache)", "read by a decode step")
    return table(head, body)


def state_walk() -> str:
    """Region: what a walk adds to the state, by length, for two model shapes."""
    body = []
    for label, shape in (("Llama-3.1-8B", ModelShape()), ("SmolLM2-135M", SMOLLM2)):
        for tokens in (1024, 4096, 32_768, 131_072):
            memory = count_memory(tokens, SketchWalkConfig(walk="damped"), shape)
            parts = (memory.key_sketches, memory.transition_rows, memory.query_ring, memory.state)
            body.append([label, f"{tokens:,}", *map(bytes_text, parts), percent(memory.state_share)])
    parts = ("key sketches", "transition rows", "ring", "together")
    return table(("model shape, 16 bits", "tokens", *parts, "share of the KV cache"), body)


def state_promise() -> str:
    """Region: the promised size of the state beside the counted one."""
    kept, full, walked = (
        count_memory(65_536, config, ModelShape())
        for config in (SketchWalkConfig(), SketchWalkConfig(sketch_dim=128), SketchWalkConfig(walk="damped"))
    )
    return wrapped(
        f"At 65,536 tokens the founding document estimates {bytes_text(PROMISED_STATE_BYTES)} for one layer, 6 %. For "
        f"the shape of Llama-3.1-8B the default keeps {bytes_text(kept.state)} ({percent(kept.state_share)} of the "
        f"layer's KV cache), sketches of all 128 coordinates {bytes_text(full.state)} ({percent(full.state_share)}), "
        f'and the default with `walk="damped"` {bytes_text(walked.state)} ({percent(walked.state_share)}).'
    )


def commands() -> str:
    """Region: the commands with their options."""
    parts = []
    grouped = [
        (f"{group.name} ", command)
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
    ]
    for prefix, command in [*(("", command) for command in app.registered_commands), *grouped]:
        callback = command.callback
        assert callback is not None
        hints = typing.get_type_hints(callback, include_extras=True)
        rows = []
        for name, parameter in inspect.signature(callback).parameters.items():
            hint = hints[name]
            if hint is Context:
                continue
            if not hasattr(hint, "__metadata__"):  # Python 3.10 wraps an option that defaults to None.
                hint = typing.get_args(hint)[0]
            kind, option = typing.get_args(hint)
            if isinstance(option, ArgumentInfo):
                rows.append([f"`{name.upper()}`", _kind(kind), _default(parameter.default), option.help])
                continue
            given = [text for text in (option.default, *(option.param_decls or ())) if isinstance(text, str)]
            spelled = given or [f"--{name.replace('_', '-')}"]
            rows.append([", ".join(f"`{s}`" for s in spelled), _kind(kind), _default(parameter.default), option.help])
        parts.append(f"## sketch-walk {prefix}{callback.__name__}\n\n{inspect.getdoc(callback)}")
        if rows:
            parts.append(table(("option", "value", "default", "meaning"), rows, left=4))
    return "\n\n".join(parts)


def _kind(annotation: Any) -> str:
    kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    return {"bool": "flag", "Path": "path", "str": "text"}.get(kinds[0].__name__, kinds[0].__name__)


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return "" if value is None or value is False else f"`{value}`"
