"""Bar charts of the results as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_train.benchmarking.results import ContenderResult, StepResults
from bitnet_train.benchmarking.run_layers import LayerResults
from bitnet_train.planning.roofline import ceiling
from bitnet_train.quant.spec import build_spec

OWN, REFERENCE, OTHER = "#1b7f5c", "#4a4a4a", "#8fb3d9"


def draw_step(results: StepResults, title: str, file: Path) -> None:
    """Tokens per second and, where it was measured, memory of every contender, with the ratio written on the bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = results.timed
    names = list(timed)
    reference = results.reference
    memories = {name: r.memory.model / 1e6 for name, r in timed.items() if r.memory is not None}
    panels = 2 if memories else 1
    figure = Figure(figsize=(6.2 * panels + 1.2, 1.6 + 0.5 * len(names)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    colours = [REFERENCE if n == reference else OWN if _ternary(r) else OTHER for n, r in timed.items()]
    speeds = [timed[name].tokens_per_second for name in names]
    marks = []
    for name in names:
        ratio = results.ratio(name)
        marks.append("" if ratio is None else f"{ratio.of_medians:.2f}x")
    ends = [r.tokens / r.time.lower for r in timed.values()]
    _bars(axes[0], names, speeds, ends, colours, marks, f"tokens per second (written on: times {reference})")
    whiskers = [
        [speed - r.tokens / r.time.upper for speed, r in zip(speeds, timed.values(), strict=True)],
        [r.tokens / r.time.lower - speed for speed, r in zip(speeds, timed.values(), strict=True)],
    ]
    axes[0].errorbar(speeds, range(len(names)), xerr=whiskers, fmt="none", ecolor="black", elinewidth=0.9, capsize=2.5)
    if memories:
        base = memories.get(reference or "")
        values = [memories.get(name, 0.0) for name in names]
        marks = [
            "not measured" if n not in memories else f"{memories[n] / base:.2f}x" if base else f"{memories[n]:,.0f}"
            for n in names
        ]
        _bars(axes[1], names, values, values, colours, marks, "peak memory of model and step, MB (10^6 bytes)")
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def draw_layers(results: LayerResults, title: str, file: Path) -> None:
    """Forward with backward of every layer, relative to nn.Linear; one panel per shape and number of tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [result for result in results.shapes if result.reference is not None]
    columns = min(len(shown), 2)
    lines = -(-len(shown) // columns)
    largest = max(len(result.layers) for result in shown)
    size = (6.4 * columns, lines * (1.3 + 0.34 * largest) + 0.5)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, result in zip(panels, shown, strict=False):
        speeds = {name: result.speed(name) or 0.0 for name, layer in result.layers.items() if layer.both}
        colours = [
            OWN if name.startswith("ternary") else REFERENCE if name == result.reference else OTHER for name in speeds
        ]
        values, marks = list(speeds.values()), [f"{speed:.2f}x" for speed in speeds.values()]
        _bars(panel, list(speeds), values, values, colours, marks, f"speed, times {result.reference}", digits=1)
        panel.set_title(f"{result.shape.label()}, {result.tokens:,} tokens", fontsize=10)
        if result.r is not None:
            limit = ceiling(result.r)
            panel.axvline(limit, color="black", linestyle="--", linewidth=1)
            panel.set_xlim(0, max(panel.get_xlim()[1], 1.12 * limit))
            panel.annotate(
                f"ceiling {limit:.2f}x", (limit, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    for panel in panels[len(shown) :]:
        panel.axis("off")
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _ternary(result: ContenderResult) -> bool:
    """Whether it is ours: the recipe or a variant of it."""
    contender = result.contender
    return contender.layers == "own" and build_spec(contender.cfg.quant).quantised


def _bars(
    panel: Any,
    names: Sequence[str],
    values: Sequence[float],
    ends: Sequence[float],
    colours: Sequence[str],
    marks: Sequence[str],
    label: str,
    digits: int = 0,
) -> None:
    """One bar per name, its mark beyond ``ends``, where its whisker ends."""
    panel.barh(range(len(names)), values, color=colours, height=0.66)
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel(label)
    largest = max(ends, default=0.0) or 1.0
    panel.set_xlim(0, 1.18 * largest)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.{digits}f}")
    for place, (value, mark) in enumerate(zip(ends, marks, strict=True)):
        panel.annotate(
            mark, (value, place), textcoords="offset points", xytext=(7, 0), verticalalignment="center", fontsize=9
        )
    if not panel.yaxis_inverted():
        panel.invert_yaxis()
