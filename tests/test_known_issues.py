"""Defects of an earlier implementation that no test of behaviour would show: see docs/known-issues.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sketch_walk import SketchWalkConfig, sketch_walk_attention
from tensors import qkv

HERE = Path(__file__).parent


def checking_helpers(trees: dict[Path, ast.Module]) -> set[str]:
    """Names of functions of the test files that check something, directly or through another one."""
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    known: set[str] = set()
    while True:
        more = {node.name for node in functions if checks(node, known)}
        if more == known:
            return known
        known = more


def checks(node: ast.AST, helpers: set[str]) -> bool:
    """Whether a function asserts, expects an exception, or calls something that does."""
    called = [inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    names = {
        f.attr if isinstance(f, ast.Attribute) else f.id for f in called if isinstance(f, ast.Attribute | ast.Name)
    }
    expected = {"raises", "warns", "assert_close", "gradcheck"} | helpers
    return any(isinstance(inner, ast.Assert) for inner in ast.walk(node)) or bool(names & expected)


def test_every_test_checks_something() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.py"))}
    helpers = {name for name in checking_helpers(trees) if not name.startswith("test_")}
    idle = [
        f"{path.name}::{node.name}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not checks(node, helpers)
    ]
    assert idle == []


class Operations(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("walk", ["damped", "none"])
@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
def test_no_loop_over_batch_heads_or_blocks(walk: str, head_mode: str) -> None:
    """More of each, still one slice of query blocks: the same operations."""
    config = SketchWalkConfig(block_size=8, density=0.3, walk=walk, head_mode=head_mode)
    counts = []
    for batch, heads, kv_heads, tokens in ((1, 1, 1, 24), (4, 4, 4, 64)):
        query, key, value = qkv(batch, heads, kv_heads, tokens, 16)
        for _ in range(2):  # The first call also fills caches.
            with torch.no_grad(), Operations() as operations:
                sketch_walk_attention(query, key, value, config)
        counts.append(operations.count)
    # Expanding an axis of one is an operation less or more; a loop would repeat its whole body.
    assert abs(counts[1] - counts[0]) <= 8
