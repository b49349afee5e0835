"""Charts of layers.csv: what happens in each kind of layer over the run."""

import math
from collections import defaultdict
from pathlib import Path

from bitnet_train.reporting.charts import Chart, Line
from bitnet_train.training.loggers.csv_rows import read_rows

# Column of layers.csv -> title, and whether its axis is logarithmic.
TITLES = {
    "zeros": ("Share of codes that are zero", False),
    "flips": ("Share of codes that flip in a step", True),
    "scale": ("Scale of the weights", True),
    "input_absmax": ("Largest quantised input", True),
    "input_saturated": ("Share of inputs at the end of the codes", True),
    "grad_norm": ("Gradient norm before clipping", True),
}


def layer_charts(path: Path) -> list[Chart]:
    """A chart per column: a line for each kind of layer (the last part of its name), the mean over the blocks.

    No charts where there is no file, or only a damaged one.
    """
    found: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    try:
        for row in read_rows(path):
            kind = row["layer"].rpartition(".")[2]
            for column in TITLES:
                value = float(row[column])
                if math.isfinite(value):
                    found[column][kind][int(row["step"])].append(value)
    except (OSError, UnicodeDecodeError, ValueError, KeyError):
        return []
    charts = []
    for column, kinds in found.items():
        title, logarithmic = TITLES[column]
        lines = [
            Line(kind, list(steps), [sum(values) / len(values) for values in steps.values()])
            for kind, steps in kinds.items()
        ]
        charts.append(Chart(f"{title}, by kind of layer", lines, logarithmic))
    return [chart for chart in charts if not chart.empty]
