"""Figures: the right pixels are dark, and every file is a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from sketch_walk.plots import (
    Curve,
    Point,
    _front,
    plot_block_selection,
    plot_needle_heat_map,
    plot_quality_against_density,
    plot_quality_against_time,
    plot_speed_against_length,
    plot_speed_up_against_length,
    plot_stage_breakdown,
    selection_grid,
)

SELECTION = torch.tensor([[0, -1, -1], [0, 1, -1], [0, 2, -1], [1, 2, 3]], dtype=torch.int32)
RED, BLUE = (0.82, 0.29, 0.36), (0.12, 0.37, 0.66)


def share_of(path: Path, color: tuple[float, float, float]) -> float:
    """Fraction of the pixels of about that color."""
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)[..., :3]
    return float((np.abs(pixels - np.array(color)).max(-1) < 0.06).mean())


def test_selection_grid() -> None:
    assert selection_grid(SELECTION).tolist() == [[1, -1, -1, -1], [1, 1, -1, -1], [1, 0, 1, -1], [0, 1, 1, 1]]


def test_selection_grid_of_a_later_chunk() -> None:
    assert selection_grid(torch.tensor([[0, 2, 3]])).tolist() == [[1, 0, 1, 1]]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4,), (1, 2, 3)])
def test_selection_grid_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="indices must be a non-empty"):
        selection_grid(torch.zeros(shape, dtype=torch.int32))


def test_block_selection_shows_what_was_read(tmp_path: Path) -> None:
    few = torch.stack([torch.zeros(20), torch.arange(20)], dim=1).int()
    few[0, 1] = -1
    every = torch.where(torch.arange(20) <= torch.arange(20)[:, None], torch.arange(20), -1).int()
    plot_block_selection(tmp_path / "few.png", {2: few}, block_size=64)
    plot_block_selection(tmp_path / "all.png", {2: every}, block_size=64)
    assert 2 < share_of(tmp_path / "all.png", BLUE) / share_of(tmp_path / "few.png", BLUE) < 8


def test_block_selection_points_at_the_needle(tmp_path: Path) -> None:
    layers = {2: SELECTION, 9: SELECTION, 17: SELECTION, 29: SELECTION}
    plot_block_selection(tmp_path / "folder" / "plain.png", layers, block_size=64)
    plot_block_selection(tmp_path / "needle.png", layers, block_size=64, needle_tokens=[100], title="One needle")
    assert share_of(tmp_path / "folder" / "plain.png", RED) == 0
    assert share_of(tmp_path / "needle.png", RED) > 0


def test_block_selection_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers must hold at least one selection"):
        plot_block_selection(tmp_path / "none.png", {}, block_size=64)


def test_heat_map(tmp_path: Path) -> None:
    plot_needle_heat_map(tmp_path / "good.png", [0.0, 0.5], [1000, 2000], [[1.0, 1.0], [1.0, None]])
    plot_needle_heat_map(tmp_path / "bad.png", [0.0, 0.5], [1000, 2000], [[0.0, 0.0], [0.0, None]])
    assert share_of(tmp_path / "bad.png", RED) > 3 * share_of(tmp_path / "good.png", RED)


@pytest.mark.parametrize("accuracy", [[], [[1.0]], [[1.0, 1.0], [1.0]]])
def test_heat_map_of_another_shape(tmp_path: Path, accuracy: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="accuracy must have 2 rows of 2 values"):
        plot_needle_heat_map(tmp_path / "heat.png", [0.0, 0.5], [1000, 2000], accuracy)


def test_lines(tmp_path: Path) -> None:
    curves = {"sparse": Curve([1024, 3000], [900, 1200]), "dense": Curve([1024, 3000], [1000, 400])}
    plot_speed_against_length(tmp_path / "speed.png", curves)
    assert share_of(tmp_path / "speed.png", BLUE) > 0
    assert share_of(tmp_path / "speed.png", RED) > 0
    plot_quality_against_density(tmp_path / "quality.png", {"walk": Curve([0.1, 0.2], [0.8, 0.9])}, dense=0.95)
    assert share_of(tmp_path / "quality.png", BLUE) > 0


def test_lines_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="curves must hold at least one line"):
        plot_speed_against_length(tmp_path / "speed.png", {})
    with pytest.raises(ValueError, match="curve 'walk' has 2 x and 1 y values"):
        plot_quality_against_density(tmp_path / "quality.png", {"walk": Curve([0.1, 0.2], [0.8])})


def test_speed_up(tmp_path: Path) -> None:
    curves = {"auto, density 0.2": Curve([1024, 8192], [0.8, 2.5]), "auto, density 0.05": Curve([1024, 8192], [0.9, 6])}
    plot_speed_up_against_length(tmp_path / "deep" / "up.png", curves, over="SDPA flash", xlabel="cached tokens")
    assert share_of(tmp_path / "deep" / "up.png", BLUE) > 0
    assert share_of(tmp_path / "deep" / "up.png", RED) > 0
    with pytest.raises(ValueError, match="curves must hold at least one line"):
        plot_speed_up_against_length(tmp_path / "up.png", {}, over="SDPA flash")


def test_stage_breakdown(tmp_path: Path) -> None:
    """A stage's color covers its share: three times the milliseconds, three times the pixels."""
    bars = {"8K": {"scores": 9.0, "attend": 3.0}, "64K": {"scores": 3.0, "attend": 1.0}}
    plot_stage_breakdown(tmp_path / "stages.png", bars, title="Stages")
    ratio = share_of(tmp_path / "stages.png", BLUE) / share_of(tmp_path / "stages.png", RED)
    assert 2.5 < ratio < 3.5


@pytest.mark.parametrize("bars", [{}, {"8K": {}}, {"8K": {"scores": 1.0}, "64K": {"attend": 1.0}}])
def test_stage_breakdown_refuses(tmp_path: Path, bars: dict[str, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="bars must hold at least one bar, all of the same stages"):
        plot_stage_breakdown(tmp_path / "stages.png", bars)


def test_quality_against_time(tmp_path: Path) -> None:
    """The default is a star of its own color, larger than a point, and has no second one under it."""
    default = Point("default", 6.0, 2.8, 2.7, 2.9)
    settings = {"query_keep": [Point("0.25", 3.0, 3.0), Point("1", 12.0, 2.75, 2.7, 2.8)]}
    plot_quality_against_time(tmp_path / "new" / "curve.png", settings, default=default, dense=2.3)
    plot_quality_against_time(tmp_path / "alone.png", {}, default=default)
    assert share_of(tmp_path / "new" / "curve.png", BLUE) > 0
    assert share_of(tmp_path / "new" / "curve.png", RED) > 0
    # A line to a cheaper and a dearer point is there, and not where both are apart.
    plot_quality_against_time(tmp_path / "apart.png", settings, default=default, dense=2.3, apart=["query_keep"])
    gray = (0.58, 0.59, 0.60)
    assert share_of(tmp_path / "new" / "curve.png", gray) > 1.5 * share_of(tmp_path / "apart.png", gray)
    # Without other settings the default takes the first color.
    assert share_of(tmp_path / "alone.png", RED) == 0
    with pytest.raises(ValueError, match="points that all have an x"):
        plot_quality_against_time(tmp_path / "none.png", {"a": [Point("b", None, 1.0)]}, default=default)


def test_the_front_is_what_nothing_beats() -> None:
    points = [Point("dear", 9.0, 1.0), Point("worse", 5.0, 3.0), Point("cheap", 1.0, 2.5), Point("equal", 9.5, 1.0)]
    assert [point.label for point in _front([*points, Point("dearer", 1.0, 2.6)])] == ["cheap", "dear"]
