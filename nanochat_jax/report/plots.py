"""Plots as SVG text by matplotlib, without a display and without a network.

Text and grid take the page's colours (`currentColor`, `var(--grid)`), so that one drawing suits light and dark.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from nanochat_jax.report.blocks import Dots, LinePlot, Series, number  # noqa: E402

COLORS = ("#3f86e0", "#e2792b", "#2f9e6e", "#a465d6", "#cf4a63", "#8a8f98")
MAX_POINTS = 400
MAX_MARKS = 100
_INK, _GRID = "#010203", "#040506"  # stand-ins that no series uses, replaced in the finished SVG
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # real text: small, selectable, in the page's font
    "font.size": 9.0,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
}


def smoothed(values: Sequence[float]) -> np.ndarray:
    """A centred moving average over about a twentieth of the curve, (n,) as given; it does not lag behind."""
    half = len(values) // 40 + 1
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def thinned(x: Sequence[float], y: Sequence[float] | np.ndarray, points: int = MAX_POINTS) -> tuple[Any, Any]:
    """At most `points` of a long curve: the means of equal stretches."""
    if len(x) <= points:
        return x, y
    edges = [round(i * len(x) / points) for i in range(points + 1)]
    stretches = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    return [float(np.mean(x[s])) for s in stretches], [float(np.mean(y[s])) for s in stretches]


def plot_svg(plot: LinePlot) -> str:
    """One plot as an <svg> element."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        axes = figure.subplots()
        for color, series in zip(COLORS * (len(plot.series) // len(COLORS) + 1), plot.series, strict=False):
            _draw(axes, series, color)
        for i, x in enumerate(plot.marks[:MAX_MARKS]):
            label = plot.marks_name if i == 0 else None
            axes.axvline(x, color=COLORS[4], linewidth=0.8, alpha=0.7, linestyle=(0, (3, 2)), label=label)
        axes.set_xlabel(plot.x_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.02)
        if len(plot.series) > 1 or plot.marks:
            axes.legend(fontsize=8, labelcolor=_INK)
        return _svg(figure, plot.title)


def _draw(axes: Any, series: Series, color: str) -> None:
    if series.kind == "points" or len(series.x) == 1:
        if series.low:
            axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.18, linewidth=0)
        axes.plot(series.x, series.y, color=color, marker="o", markersize=3.5, linewidth=1.4, label=series.name)
    elif series.kind == "noisy":
        axes.plot(*thinned(series.x, series.y), color=color, alpha=0.3, linewidth=0.8)
        axes.plot(*thinned(series.x, smoothed(series.y)), color=color, linewidth=1.6, label=series.name)
    else:
        axes.plot(*thinned(series.x, series.y), color=color, linewidth=1.6, label=series.name)


def dots_svg(dots: Dots) -> str:
    """Accuracies as dots with their intervals, one line per metric and stage."""
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x", "axes.spines.left": False}):
        lanes = len(dots.stages)
        figure = Figure(figsize=(10, 0.7 + len(dots.metrics) * (0.14 + 0.11 * lanes)), layout="constrained")
        axes = figure.subplots()
        for i, values in enumerate(dots.values):
            for lane, value in enumerate(values):
                if value is None:
                    continue
                y = i + (lane - (lanes - 1) / 2) * 0.7 / lanes
                color = COLORS[lane % len(COLORS)]
                middle, low, high = value
                if low is not None and high is not None:
                    axes.plot([low, high], [y, y], color=color, linewidth=1.8, alpha=0.6, solid_capstyle="round")
                axes.plot([middle], [y], color=color, marker="o", markersize=4.5, linestyle="")
            chance = dots.chance[i] if dots.chance else None
            if chance is not None:
                axes.plot([chance, chance], [i - 0.42, i + 0.42], color=_INK, linewidth=0.9, linestyle=(0, (2, 2)))
        for lane, stage in enumerate(dots.stages):
            axes.plot([], [], color=COLORS[lane % len(COLORS)], marker="o", markersize=4.5, linestyle="", label=stage)
        axes.plot([], [], color=_INK, linewidth=0.9, linestyle=(0, (2, 2)), label="chance")
        axes.set_yticks(range(len(dots.metrics)), dots.metrics)
        axes.set_ylim(len(dots.metrics) - 0.5, -0.5)
        axes.set_xlim(-0.01, 1.01)
        figure.legend(loc="outside upper left", ncols=lanes + 1, fontsize=8, labelcolor=_INK)
        return _svg(figure, dots.title)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element to stand in an HTML page: its own ids, the page's colours and font."""
    slug = re.sub(r"\W+", "-", title)
    with matplotlib.rc_context({"svg.hashsalt": slug}):
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    text = re.sub(r"(?:'[^']*', )+sans-serif", "system-ui, sans-serif", text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1).strip()


def sparkline(series: Series, width: int = 32) -> str:
    """A curve in one line of text: eight heights, then its first and last value."""
    if not series.x:
        return ""
    y = np.asarray(thinned(series.x, series.y, width)[1], np.float64)
    span = y.max() - y.min()
    heights = np.rint(7 * (y - y.min()) / span).astype(int) if span > 0 else np.zeros(len(y), int)
    bars = "".join("▁▂▃▄▅▆▇█"[h] for h in heights)
    return f"{bars} {number(float(series.y[0]))} → {number(float(series.y[-1]))}"
