"""Line charts of runs, as SVG inside a page or as a PNG file."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

COLOURS = ("#1b7f5c", "#d9822b", "#4a6fb5", "#b5485d", "#7a5ea8", "#5d6b78", "#9a8a2c", "#2a9aa8")
# Inches: one chart fills a phone's width and two or three stand side by side on a screen.
SIZE = (4.4, 2.7)


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name in the legend, its points, and whether it stands in the background."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart: title, lines over optimizer steps, and whether its axis is logarithmic."""

    title: str
    lines: list[Line]
    logarithmic: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing finite to draw."""
        return not any(math.isfinite(v) for line in self.lines for v in line.values)


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """The exponential moving average over about ``span`` values, corrected for its start; skips what is not finite."""
    average, weight, result = 0.0, 0.0, []
    keep = 1 - 1 / max(1, span)
    for value in values:
        if math.isfinite(value):
            average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight if weight else value)
    return result


def svg(chart: Chart) -> str:
    """The chart as an SVG element that scales with its container."""
    stream = io.StringIO()
    _save(chart, SIZE, stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # The width is the page's affair; the viewBox keeps the proportions.
    head, rest = text.split(">", 1)
    parts = [p for p in head.split(" ") if not p.startswith(("width=", "height="))]
    return f'{" ".join(parts)} role="img" aria-label="{escape(chart.title, quote=True)}">{rest}'


def png(chart: Chart, file: Path) -> None:
    """The chart as a picture of its own."""
    _save(chart, (6.4, 3.6), file, format="png", dpi=130)


def _inside(size: tuple[float, float]) -> tuple[float, float, float, float]:
    """Where the axes lie in a figure of ``size`` inches, as shares of it: left, bottom, width, height.

    The margins are fixed and hold seven characters of a tick's label, and a power of ten above the axis: matplotlib's
    own layout engines draw everything twice to find them, and a page has up to twenty charts.
    """
    left, right, bottom, top = 0.62, 0.12, 0.48, 0.46
    width, height = size
    return left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height


def _save(chart: Chart, size: tuple[float, float], target: Any, **options: Any) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    # Text as text: a page can be searched, and is a fifth of the size. The salt makes the ids, and so the file, the
    # same each time.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.family": "sans-serif"}):
        figure = Figure(figsize=size)
        axes = figure.add_axes(_inside(size))
        for number, line in enumerate(line for line in chart.lines if not line.faint):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(line.steps, line.values, color=colour, linewidth=1.6, label=line.name, zorder=3)
            if len(line.steps) == 1:
                axes.plot(line.steps, line.values, "o", color=colour, markersize=4)
        for line in chart.lines:
            if line.faint:
                axes.plot(line.steps, line.values, color="#9fb8ae", linewidth=0.8, label=line.name, zorder=2)
        axes.set_title(chart.title, fontsize=11, loc="left")
        if chart.logarithmic and all(v > 0 for line in chart.lines for v in line.values if math.isfinite(v)):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            # 2, 3, 4 and 6 as well, where an axis covers less than two powers of ten.
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        if len(chart.lines) > 1:
            axes.legend(fontsize=7.5, frameon=False)
        axes.grid(alpha=0.25)
        axes.tick_params(which="both", labelsize=8)
        axes.yaxis.get_offset_text().set_fontsize(8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("optimizer step", fontsize=8)
        figure.savefig(target, **options)
