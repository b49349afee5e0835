"""The page of a sweep: its runs ranked, their curves in one chart, what they differ in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitnet_train.errors import ConfigError
from bitnet_train.reporting.charts import Chart, Line, smoothed
from bitnet_train.reporting.metrics import Metrics, read_metrics
from bitnet_train.reporting.page import number, render

# What belongs to a run's place or to what is done with it, and not to what it tries.
OWN = (
    "run_name", "run", "command", "paths", "export", "evaluate", "generate", "benchmark", "samples", "logger",
    "checkpoint", "cluster", "submit",
)  # fmt: skip
# Runs whose curves are drawn; more lines than colours cannot be told apart.
DRAWN = 8
# What runs on text are ranked by, what they read, and the figure in words.
MEASURES_OF_TEXT = ("val/bits_per_byte", "tokens", "bits per byte")


def sweep_runs(folder: Path) -> list[Path]:
    """The folders of runs below ``folder`` (one or two levels), by name."""
    return sorted(file.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for file in folder.glob(pattern))


@dataclass(frozen=True)
class Ranking:
    """The runs of a sweep, best first, as a table."""

    # Names of the runs, best first, and what each differs in from the others.
    names: list[str]
    metrics: dict[str, Metrics]
    differing: list[str]
    # The figure that they are ranked by in words, and whether more of it is better.
    what: str
    on_images: bool
    headings: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    # Columns that hold numbers.
    numbers: tuple[int, ...] = (0, 2, 3, 4, 5)

    @property
    def best(self) -> str:
        """The best figure of the best run."""
        return str(self.rows[0][2])


def rank(runs: dict[str, Path]) -> Ranking | None:
    """The ranking of runs (name -> folder); None when none of them has metrics."""
    configs: dict[str, dict[str, Any]] = {}
    metrics: dict[str, Metrics] = {}
    for name, run in runs.items():
        try:
            metrics[name] = read_metrics(run / "metrics.csv")
            configs[name] = dict(_leaves(yaml.safe_load((run / "config.yaml").read_text()) or {}))
        except (ConfigError, OSError, yaml.YAMLError):
            metrics.pop(name, None)  # a job that has not begun
    if not metrics:
        return None
    on_images = any(found.series("val/accuracy")[0] for found in metrics.values())
    figure, unit, what = ("val/accuracy", "images", "accuracy") if on_images else MEASURES_OF_TEXT
    best = {name: found.most(figure) if on_images else found.best(figure) for name, found in metrics.items()}
    sign = -1.0 if on_images else 1.0
    names = sorted(metrics, key=lambda name: (best[name] is None, sign * (best[name] or 0.0), name))
    differing = _differing(configs)
    rows = [
        (
            place,
            name,
            number(best[name]),
            number(metrics[name].last(figure)),
            number(_last_step(metrics[name]), 0),
            number(metrics[name].last(f"{unit}_per_second"), 0),
            *(str(configs[name].get(key, "-")) for key in differing),
        )
        for place, name in enumerate(names, start=1)
    ]
    headings = ("", "run", f"best {what}", "last", "steps", f"{unit}/s", *differing)
    return Ranking(names, metrics, differing, what, on_images, headings, rows)


def sweep_page(folder: Path) -> str:
    """The page as HTML. Raises ConfigError when no run below ``folder`` has metrics."""
    ranking = rank({str(run.relative_to(folder)): run for run in sweep_runs(folder)})
    if ranking is None:
        raise ConfigError(f"{folder} holds no run with metrics: train first, or give the folder of a run.")
    names, what, on_images = ranking.names, ranking.what, ranking.on_images
    figures = [("runs", str(len(names))), (f"best {what}", ranking.best), ("best run", names[0])]
    drawn = f"The curves are those of the best {DRAWN}. " if len(names) > DRAWN else ""
    subtitle = f"{drawn}They differ in {', '.join(ranking.differing) or 'nothing but their names'}."
    ranked_by = f"{what} of held-out {'images (higher' if on_images else 'text (lower'} is better)"
    return render(
        f"Sweep {folder.name}", subtitle, str(folder), figures, _charts(names[:DRAWN], ranking.metrics),
        ranking=ranking, ranked_by=ranked_by,
    )  # fmt: skip


def _charts(names: list[str], metrics: dict[str, Metrics]) -> list[Chart]:
    charts = []
    for title, column, smooth, logarithmic in (
        ("Bits per byte of held-out text", "val/bits_per_byte", False, False),
        ("Accuracy on held-out images", "val/accuracy", False, False),
        ("Training loss (smoothed)", "train/loss", True, False),
        ("Gradient norm before clipping (smoothed)", "grad_norm", True, True),
        ("Learning rate", "lr", False, False),
        ("Share of codes that are zero", "codes/zeros", False, False),
        ("Tokens per second", "tokens_per_second", True, False),
        ("Images per second", "images_per_second", True, False),
    ):
        lines = []
        for name in names:
            steps, values = metrics[name].series(column)
            lines.append(Line(name, steps, smoothed(values, max(1, len(values) // 25)) if smooth else values))
        charts.append(Chart(title, [line for line in lines if line.steps], logarithmic))
    return [chart for chart in charts if not chart.empty]


def _differing(configs: dict[str, dict[str, Any]]) -> list[str]:
    keys = {key: None for config in configs.values() for key in config}
    values = lambda key: {repr(config.get(key)) for config in configs.values()}  # noqa: E731
    return [key for key in keys if key.split(".")[0] not in OWN and len(values(key)) > 1]


def _leaves(plain: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(plain, dict):
        return [(prefix, plain)]
    return [leaf for key, value in plain.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def _last_step(metrics: Metrics) -> float:
    return float(max((steps[-1] for steps, _ in metrics.columns.values() if steps), default=0))
