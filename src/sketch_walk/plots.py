"""Figures, drawn off screen. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sketch_walk.extras import require

if TYPE_CHECKING:
    from jaxtyping import Int

READ, SKIPPED, FUTURE = "#1f5fa8", "#dfe7f1", "#ffffff"
NEEDLE = "#d1495b"
SERIES = ("#1f5fa8", "#d1495b", "#2a9d6f", "#e9a13b", "#7b5ea7", "#5c6770", "#57a0c9", "#9c6b4e")
INK = "#2b2f36"


class Curve(NamedTuple):
    """Points of one line: `x` ascending, `y` of the same length."""

    x: Sequence[float]
    y: Sequence[float]


def selection_grid(indices: Int[Tensor, "num_query_blocks max_selected"]) -> Int[Tensor, "num_query_blocks num_blocks"]:
    """A selection as a picture: 1 where a query block read a key block, 0 where it skipped one, -1 in the future.

    Parameters
    ----------
    indices : torch.Tensor
        Shape (num_query_blocks, max_selected), int32: ascending, the diagonal block last, -1 beyond the count.

    Raises
    ------
    ValueError
        If `indices` is not two-dimensional or empty.
    """
    if indices.ndim != 2 or indices.numel() == 0:
        raise ValueError(f"indices must be a non-empty [num_query_blocks, max_selected], got {tuple(indices.shape)}")
    rows = indices.to("cpu", torch.int64)
    diagonal = rows.amax(dim=1)
    columns = int(diagonal.max()) + 1
    grid = torch.where(torch.arange(columns) <= diagonal[:, None], 0, -1)
    row, slot = torch.nonzero(rows >= 0, as_tuple=True)
    grid[row, rows[row, slot]] = 1
    return grid


def plot_block_selection(
    path: str | os.PathLike[str],
    layers: Mapping[int, Int[Tensor, "num_query_blocks max_selected"]],
    *,
    block_size: int,
    needle_tokens: Sequence[int] = (),
    title: str = "Key blocks that each query block read",
) -> None:
    """Draw which blocks were read, one panel a layer, and write a PNG.

    Parameters
    ----------
    path : str or path
        File to write; its folder is made.
    layers : mapping of int to torch.Tensor
        Layer index to selection, as `selection_grid` takes it.
    block_size : int
        Tokens per block.
    needle_tokens : sequence of int
        Positions of tokens to point at on the key axis.
    title : str

    Raises
    ------
    ValueError
        If `layers` is empty.
    """
    if not layers:
        raise ValueError("layers must hold at least one selection")
    colors, patches = require("matplotlib.colors", "eval"), require("matplotlib.patches", "eval")
    columns = min(len(layers), 3)
    rows = -(-len(layers) // columns)
    figure, axes = _figure(rows, columns, width=4.3, height=4.5)
    palette = colors.ListedColormap([FUTURE, SKIPPED, READ])
    for axis, (layer, indices) in zip(axes, layers.items(), strict=False):
        grid = selection_grid(indices)
        read, causal = int((grid == 1).sum()), int((grid >= 0).sum())
        axis.imshow(grid.numpy(), cmap=palette, vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
        for token in needle_tokens:
            # Tokens run along the axis in blocks whose centres are the integers.
            axis.axvline(token / block_size - 0.5, color=NEEDLE, linewidth=1.0, linestyle=(0, (4, 3)), alpha=0.8)
        axis.set_title(f"layer {layer}: {read / causal:.0%} of the causal blocks", fontsize=10)
        axis.set_xlabel(f"key block ({block_size} tokens)")
        axis.set_ylabel("query block")
    handles = [patches.Patch(facecolor=READ, label="read"), patches.Patch(facecolor=SKIPPED, label="skipped")]
    if needle_tokens:
        handles.append(require("matplotlib.lines", "eval").Line2D([], [], color=NEEDLE, linestyle="--", label="needle"))
    for axis in axes[len(layers) :]:
        axis.axis("off")
    figure.suptitle(title, fontsize=13)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    _write(figure, path)


def plot_needle_heat_map(
    path: str | os.PathLike[str],
    depths: Sequence[float],
    lengths: Sequence[int],
    accuracy: Sequence[Sequence[float | None]],
    *,
    title: str = "Needle retrieval",
) -> None:
    """Draw accuracy over depth and length, and write a PNG.

    Parameters
    ----------
    path : str or path
        File to write; its folder is made.
    depths, lengths : sequence
        Rows (0 is the start of the text) and columns (tokens).
    accuracy : sequence of rows
        Values in [0, 1], None where nothing was measured.
    title : str

    Raises
    ------
    ValueError
        If `accuracy` is not of shape (depths, lengths).
    """
    if len(accuracy) != len(depths) or any(len(row) != len(lengths) for row in accuracy) or not depths or not lengths:
        raise ValueError(f"accuracy must have {len(depths)} rows of {len(lengths)} values, none of them 0")
    values = [[float("nan") if value is None else value for value in row] for row in accuracy]
    figure, (axis,) = _figure(1, 1, width=max(4.5, 1.8 + 0.9 * len(lengths)), height=max(3.2, 1.6 + 0.5 * len(depths)))
    colors = require("matplotlib.colors", "eval").LinearSegmentedColormap.from_list(
        "", ["#d1495b", "#f3e3b3", "#2a9d6f"]
    )
    image = axis.imshow(values, cmap=colors, vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axis.text(j, i, "–" if value != value else f"{value:.0%}", ha="center", va="center", color=INK, fontsize=9)
    axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set_xlabel("prompt tokens")
    axis.set_ylabel("depth of the needle")
    axis.set_title(title)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    figure.colorbar(image, ax=axis, format=lambda value, _: f"{value:.0%}", label="accuracy")
    _write(figure, path)


def plot_quality_against_density(
    path: str | os.PathLike[str],
    curves: Mapping[str, Curve],
    *,
    dense: float | None = None,
    ylabel: str = "accuracy",
    title: str = "Quality against density",
) -> None:
    """Draw a quality (y) over the fraction of causal blocks read (x in (0, 1]), one line a name, and write a PNG.

    Parameters
    ----------
    path : str or path
        File to write; its folder is made.
    curves : mapping of str to Curve
    dense : float, optional
        Quality of dense attention, drawn as a level.
    ylabel, title : str

    Raises
    ------
    ValueError
        If `curves` is empty or a curve's lengths differ.
    """
    figure, axis = _line_figure(curves, title)
    if dense is not None:
        axis.axhline(dense, color=INK, linewidth=1.2, linestyle="--", label="dense")
    axis.set_xlabel("fraction of causal blocks read")
    axis.set_ylabel(ylabel)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(frameon=False)
    _write(figure, path)


def plot_speed_against_length(
    path: str | os.PathLike[str],
    curves: Mapping[str, Curve],
    *,
    ylabel: str = "tokens per second",
    title: str = "Speed against length",
) -> None:
    """Draw a speed (y) over prompt tokens (x, logarithmic), one line a name, and write a PNG.

    Parameters
    ----------
    path : str or path
        File to write; its folder is made.
    curves : mapping of str to Curve
    ylabel, title : str

    Raises
    ------
    ValueError
        If `curves` is empty or a curve's lengths differ.
    """
    figure, axis = _line_figure(curves, title)
    _length_axis(axis, curves, "prompt tokens")
    axis.set_ylim(bottom=0)
    axis.set_ylabel(ylabel)
    axis.legend(frameon=False)
    _write(figure, path)


def plot_speed_up_against_length(
    path: str | os.PathLike[str],
    curves: Mapping[str, Curve],
    *,
    over: str,
    xlabel: str = "prompt tokens",
    title: str = "Speed-up against length",
) -> None:
    """Draw how many times faster (y) than `over` a method is over the length (x, logarithmic), and write a PNG.

    Parameters
    ----------
    path : str or path
        File to write; its folder is made.
    curves : mapping of str to Curve
        By method; its density belongs in its name.
    over : str
        What is divided by, drawn as the level 1.
    xlabel, title : str

    Raises
    ------
    ValueError
        If `curves` is empty or a curve's lengths differ.
    """
    figure, axis = _line_figure(curves, title)
    _length_axis(axis, curves, xlabel)
    axis.axhline(1, color=INK, linewidth=1.2, linestyle="--", label=over)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.set_ylabel(f"times faster than {over}")
    axis.legend(frameon=False, fontsize=8)
    _write(figure, path)


def plot_stage_breakdown(
    path: str | os.PathLike[str],
    bars: Mapping[str, Mapping[str, float]],
    *,
    title: str = "Where the time of a layer goes",
) -> None:
    """Draw one stacked bar a name, its parts in milliseconds, and write a PNG.

    Parameters
    ----------
    path : str or path
        File to write; its folder is made.
    bars : mapping of str to mapping of str to float
        Milliseconds by stage; every bar has the same stages in the same order.
    title : str

    Raises
    ------
    ValueError
        If `bars` is empty, or the stages of two bars differ.
    """
    stages = list(next(iter(bars.values()), {}))
    if not stages or any(list(parts) != stages for parts in bars.values()):
        raise ValueError("bars must hold at least one bar, all of the same stages")
    figure, (axis,) = _figure(1, 1, width=7.2, height=1.6 + 0.42 * len(bars))
    left = [0.0] * len(bars)
    for i, stage in enumerate(stages):
        widths = [parts[stage] for parts in bars.values()]
        axis.barh(range(len(bars)), widths, left=left, height=0.68, color=SERIES[i % len(SERIES)], label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(bars)), list(bars))
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds")
    axis.set_title(title)
    axis.grid(axis="x", color="#e6e8eb")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(stages)), frameon=False)
    _write(figure, path)


def _length_axis(axis: Any, curves: Mapping[str, Curve], label: str) -> None:
    axis.set_xscale("log", base=2)
    ticks = sorted({int(x) for curve in curves.values() for x in curve.x})
    axis.set_xticks(ticks, [f"{tick // 1024}K" if tick % 1024 == 0 else f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(label)


def plot_recall_by_layer(
    path: str | os.PathLike[str],
    curves: Mapping[str, Curve],
    *,
    ylabel: str = "recall of attention mass",
    title: str = "Recall by layer",
) -> None:
    """Draw a share in [0, 1] (y) over layers (x), one line a name, and write a PNG.

    Parameters
    ----------
    path : str or path
        File to write; its folder is made.
    curves : mapping of str to Curve
    ylabel, title : str

    Raises
    ------
    ValueError
        If `curves` is empty or a curve's lengths differ.
    """
    figure, axis = _line_figure(curves, title)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("layer")
    axis.set_ylabel(ylabel)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(frameon=False)
    _write(figure, path)


def plot_head_heat_map(
    path: str | os.PathLike[str],
    layers: Sequence[int],
    values: Sequence[Sequence[float]],
    *,
    label: str = "recall of attention mass",
    title: str = "Recall by layer and head",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Draw a value of every layer (rows) and head (columns), and write a PNG.

    Parameters
    ----------
    path : str or path
        File to write; its folder is made.
    layers : sequence of int
        Layer of each row.
    values : sequence of rows
        One value a head, equally many in every row.
    label, title : str
        `label` names the values.
    bounds : (float, float)
        Values at the two ends of the colors.

    Raises
    ------
    ValueError
        If `values` is not of shape (layers, heads).
    """
    if not layers or len(values) != len(layers) or any(len(row) != len(values[0]) or not row for row in values):
        raise ValueError(f"values must have {len(layers)} rows of equally many values, none of them 0")
    heads = len(values[0])
    figure, (axis,) = _figure(1, 1, width=max(4.5, 2.5 + 0.22 * heads), height=max(3.2, 1.4 + 0.17 * len(layers)))
    image = axis.imshow(values, cmap="viridis", vmin=bounds[0], vmax=bounds[1], aspect="auto", interpolation="nearest")
    shown = range(0, len(layers), 1 + len(layers) // 24)
    axis.set_yticks(shown, [str(layers[i]) for i in shown])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("query head")
    axis.set_ylabel("layer")
    axis.set_title(title)
    figure.colorbar(image, ax=axis, label=label)
    _write(figure, path)


def _line_figure(curves: Mapping[str, Curve], title: str) -> tuple[Any, Any]:
    if not curves:
        raise ValueError("curves must hold at least one line")
    for name, curve in curves.items():
        if len(curve.x) != len(curve.y) or len(curve.x) == 0:
            raise ValueError(f"curve {name!r} has {len(curve.x)} x and {len(curve.y)} y values; expected equally many")
    figure, (axis,) = _figure(1, 1, width=6.4, height=4.2)
    for i, (name, curve) in enumerate(curves.items()):
        axis.plot(curve.x, curve.y, marker="o", markersize=5, linewidth=2, color=SERIES[i % len(SERIES)], label=name)
    axis.set_title(title)
    axis.grid(color="#e6e8eb")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    # The Agg canvas of a bare Figure needs no display and leaves the process's backend alone.
    figure = require("matplotlib.figure", "eval").Figure(
        figsize=(width * columns, height * rows), dpi=150, layout="constrained", facecolor="white"
    )
    require("matplotlib.backends.backend_agg", "eval").FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _write(figure: Any, path: str | os.PathLike[str]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png")


class Point(NamedTuple):
    """A measured value: `x` for lines, `label` for rows, and the ends of its interval if it has one."""

    label: str
    x: float | None
    y: float
    low: float | None = None
    high: float | None = None


class Panel(NamedTuple):
    """Points by the name of their series ("" for a single one) under a title; `dense` is drawn as a level."""

    title: str
    quantity: str
    series: Mapping[str, Sequence[Point]]
    dense: float | None = None


def plot_panels(
    path: str | os.PathLike[str], panels: Sequence[Panel], *, columns: int, xlabel: str | None = None, title: str = ""
) -> None:
    """Draw one panel a quantity, and write a PNG: lines over `x` where every point has one, else a row a label.

    Parameters
    ----------
    path : str or path
        File to write; its folder is made.
    panels : sequence of Panel
        Row by row, `columns` to a row.
    xlabel : str, optional
        What `x` is.
    title : str

    Raises
    ------
    ValueError
        If there are no panels, `columns` is below 1, or a panel has no points.
    """
    if not panels or columns < 1:
        raise ValueError(f"panels must hold at least one and columns be at least 1, got {len(panels)} and {columns}")
    if not all(any(panel.series.values()) for panel in panels):
        raise ValueError("panels must hold at least one point each")
    found = [point for panel in panels for points in panel.series.values() for point in points]
    lines = all(point.x is not None for point in found)
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    labels = list(dict.fromkeys(point.label for point in found))
    height = 3.4 if lines else 1.3 + 0.34 * len(labels) * max(1, 0.6 * len(names))
    figure, axes = _figure(-(-len(panels) // columns), columns, width=3.9, height=height)
    for i, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
        for name, points in panel.series.items():
            style = {
                "color": SERIES[names.index(name) % len(SERIES)],
                "label": name or None,
                "markersize": 5,
                "elinewidth": 1,
            }
            if lines:
                _draw_line(axis, sorted(points, key=lambda point: point.x or 0.0), style)
            else:
                _draw_rows(axis, points, labels, (names.index(name) + 0.5) / len(names) - 0.5, style)
        if panel.dense is not None:
            level = axis.axhline if lines else axis.axvline
            level(panel.dense, color=INK, linewidth=1.2, linestyle="--", label="dense")
        axis.set_title(panel.title, fontsize=10)
        (axis.set_ylabel if lines else axis.set_xlabel)(panel.quantity)
        if lines:
            axis.set_xlabel(xlabel or "")
        else:
            axis.set_yticks(range(len(labels)), labels if i % columns == 0 else [""] * len(labels))
            axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.grid(color="#e6e8eb")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    # The level of dense is in every panel that has one: the first of each name stands for all.
    known = [pair for axis in axes[: len(panels)] for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    legend: dict[str, Any] = {}
    for handle, label in known:
        legend.setdefault(label, handle)
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=12)
    _write(figure, path)


def plot_quality_against_time(
    path: str | os.PathLike[str],
    series: Mapping[str, Sequence[Point]],
    *,
    default: Point,
    apart: Collection[str] = (),
    dense: float | None = None,
    xlabel: str = "selector, milliseconds",
    ylabel: str = "NLL, nats",
    title: str = "Quality against the selector's time",
) -> None:
    """Draw a loss (y) over milliseconds (x), a labelled point a setting, and write a PNG.

    A line joins the points that no other beats in both, `default` among them if it is one, but no series of `apart`.

    Parameters
    ----------
    path : str or path
        File to write; its folder is made.
    series : mapping of str to sequence of Point
        By name, each with its `x`; intervals are drawn where there are.
    default : Point
        Drawn as a star.
    apart : collection of str
        Series that also cost more or less elsewhere: their points are neither on the line nor beat one that is.
    dense : float, optional
        Loss of dense attention, drawn as a level.
    xlabel, ylabel, title : str

    Raises
    ------
    ValueError
        If a point has no `x`.
    """
    found = [point for points in series.values() for point in points]
    if any(point.x is None for point in [*found, default]):
        raise ValueError("series and default must hold points that all have an x")
    figure, (axis,) = _figure(1, 1, width=7.6, height=5.2)
    best = _front([default, *(point for name, points in series.items() if name not in apart for point in points)])
    axis.plot([p.x for p in best], [p.y for p in best], color=INK, linewidth=1, alpha=0.5, label="beaten by none")
    marked = {name: (points, "o", 5) for name, points in series.items()} | {"default": ([default], "*", 13)}
    for i, (name, (points, marker, size)) in enumerate(marked.items()):
        axis.errorbar(
            [p.x for p in points],
            [p.y for p in points],
            yerr=_margins(points),
            fmt=marker,
            markersize=size,
            elinewidth=1,
            capsize=2,
            color=SERIES[i % len(SERIES)],
            label=name,
        )
        for point in points:
            axis.annotate(
                point.label, (point.x, point.y), xytext=(6, 4), textcoords="offset points", fontsize=7, color=INK
            )
    if dense is not None:
        axis.axhline(dense, color=INK, linewidth=1.2, linestyle="--", label="dense")
    # Room for the labels, which stand to the right of their points.
    axis.set_xlim(0, 1.25 * max(point.x or 0.0 for point in [*found, default]))
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_title(title)
    axis.grid(color="#e6e8eb")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    _write(figure, path)


def _front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, by ascending `x`: a lower `y` than all before them."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x or 0.0, p.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return best


def _draw_line(axis: Any, points: Sequence[Point], style: Mapping[str, Any]) -> None:
    x = [point.x or 0.0 for point in points]
    axis.errorbar(x, [p.y for p in points], yerr=_margins(points), marker="o", linewidth=1.8, capsize=2, **style)
    if min(x) > 0 and max(x) >= 8 * min(x):
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [f"{value:.3g}" for value in x], fontsize=8)
        axis.minorticks_off()


def _draw_rows(
    axis: Any, points: Sequence[Point], labels: Sequence[str], offset: float, style: Mapping[str, Any]
) -> None:
    at = [labels.index(point.label) + 0.7 * offset for point in points]
    axis.errorbar([p.y for p in points], at, xerr=_margins(points), fmt="o", capsize=2, **style)


def _margins(points: Sequence[Point]) -> list[list[float]]:
    """Lengths of the intervals' arms, below and above; a value outside its interval has an arm on one side."""
    low = [max(0.0, p.y - p.low) if p.low is not None else 0.0 for p in points]
    high = [max(0.0, p.high - p.y) if p.high is not None else 0.0 for p in points]
    return [low, high]
